"""A state as the resource that callers see: its body, its address, its ETag, its personal values.

The body is a pure function of the state, here and nowhere else, so that an answer, a replay of it, a read from
a view and a read from the stream cannot differ. Sealed values are opened last, and only for a caller who may
read them.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ledger.approval import Approval, next_due
from ledger.erasure import Erasure
from ledger.hold import Hold, in_force
from ledger.record import RecordedFact
from ledger.session import Session, State
from ledger.task import Task
from ledger.values import Principal, Stamp, moment
from ledger.vault import Place, Vault
from ledger.view import View
from projections.tasks import Attempt

Resource: TypeAlias = Session | RecordedFact | Task | Approval | View | Erasure | Hold

SEALED = b'"$sealed"'

_encode = msgspec.json.Encoder().encode


class Origin(NamedTuple):
    """Where the value of a field was sealed: which two fields name the event (id, version), and the path in it."""

    event_id: str
    version: str
    path: str


class Form(NamedTuple):
    """How a state is shown: at which address, by which id; which of its fields may hold sealed values; which are not
    shown; and what it is called in its address, if that is not its id."""

    address: bytes
    id: str
    sealed: dict[str, Origin]
    hidden: tuple[str, ...] = ()
    name: str | None = None


FORMS: dict[type[Any], Form] = {
    Session: Form(
        b"/sessions",
        "session_id",
        {"metadata": Origin("metadata_event_id", "metadata_version", "/data/metadata")},
        hidden=("metadata_event_id", "metadata_version"),
    ),
    RecordedFact: Form(b"/records", "record_id", {"body": Origin("event_id", "version", "/data/body")}),
    Task: Form(
        b"/tasks",
        "task_id",
        {
            "payload": Origin("payload_event_id", "payload_version", "/data/payload"),
            "result": Origin("result_event_id", "result_version", "/data/result"),
        },
        hidden=("payload_event_id", "payload_version", "result_event_id", "result_version"),
    ),
    Approval: Form(
        b"/approvals",
        "approval_id",
        {
            "action": Origin("request_event_id", "request_version", "/data/action"),
            "summary": Origin("request_event_id", "request_version", "/data/summary"),
            "salts": Origin("request_event_id", "request_version", "/data/salts"),
            "reason": Origin("request_event_id", "request_version", "/reason"),
        },
        hidden=("request_event_id", "request_version", "root", "match"),
    ),
    View: Form(b"/projections", "view_id", {}, hidden=("view_id",), name="view"),
    Erasure: Form(b"/erasures", "subject", {}),
    Hold: Form(b"/holds", "hold_id", {}),
}
HIDDEN = {state: form.hidden for state, form in FORMS.items()} | {Attempt: ("error_event_id", "error_version")}


# What is shown beside a state


class OfSession(Struct, kw_only=True):
    status: State
    waiting_on: Annotated[
        list[UUID], Meta(description="The approvals that it waits for, where it is read; not of its version.")
    ]


class Electorate(Struct, frozen=True, kw_only=True):
    """Who may still vote: one of `roles`, but none of `excluded`, who have voted, or whom it was asked for."""

    roles: tuple[str, ...]
    excluded: list[Principal]


class Consequence(Struct, frozen=True, kw_only=True):
    """What follows a decision by which nothing runs. A task that waits for it goes on, and is told `decision`."""

    decision: Literal["denied", "expired"]
    resumes_task_id: UUID | None
    detail: str


class OfApproval(Struct, kw_only=True, omit_defaults=True):
    seconds_left: (
        Annotated[int, Meta(ge=0, description="To decide it, to use it, or to tell what came of that; by `state`.")]
        | None
    )
    may_still_vote: Electorate | None
    on_deny: Consequence | None
    on_expiry: Consequence | None
    use_token: (
        Annotated[str, Meta(description="Shows that the use has begun: to the one who began it, in that answer.")]
        | UnsetType
    ) = UNSET


class OfErasure(Struct, kw_only=True):
    destroyed: Annotated[bool, Meta(description="Whether the keys are gone. If not yet, a worker sees to it.")]


class OfHold(Struct, kw_only=True):
    in_force: Annotated[bool, Meta(description="Whether it prevents an erasure, when it is read; not of its version.")]


BESIDE: dict[type[Any], type[Struct]] = {
    Session: OfSession,
    Approval: OfApproval,
    Erasure: OfErasure,
    Hold: OfHold,
}
"""By state: what is shown of it that is no field of it."""


class ClaimedTask(Struct, frozen=True, kw_only=True):
    """A task as it is handed to a worker. Where it was resumed, `decision` is what became of `approval_id`."""

    task_id: UUID
    kind: str
    payload: Any
    attempt: int
    lease_id: UUID
    lease_until: Stamp
    session_id: UUID | None
    approval_id: UUID | None
    decision: str | None


class Claims(Struct, frozen=True, kw_only=True):
    """What was claimed, in the order in which it was offered; nothing, if nothing was to be had."""

    tasks: list[ClaimedTask]


def body(state: Resource) -> dict[str, Any]:
    """What is shown of `state`, personal values still sealed."""
    shown = msgspec.structs.asdict(state)
    for name in HIDDEN[type(state)]:
        del shown[name]
    if isinstance(state, Session):
        shown["status"] = state.state
        shown["waiting_on"] = []
    elif isinstance(state, Approval):
        shown |= _of_approval(state)
    elif isinstance(state, Hold):
        shown["in_force"] = in_force(state, state.updated_at)
    elif isinstance(state, View):
        shown["requests"] = [msgspec.structs.asdict(request) for request in state.requests]
    return shown


def _of_approval(approval: Approval) -> dict[str, Any]:
    pending = approval.state == "pending"
    return {
        "votes": [msgspec.structs.asdict(vote) for vote in approval.votes],
        "seconds_left": seconds_left(approval, moment(approval.updated_at)),
        "may_still_vote": _electorate(approval) if pending and not approval.imported else None,
        "on_deny": _consequence(approval, "denied") if pending else None,
        "on_expiry": _consequence(approval, "expired") if pending and not approval.imported else None,
    }


def seconds_left(approval: Approval, at: datetime | None = None) -> int | None:
    """What is left at a moment, now by default, of the time that runs for it; None where none does."""
    ends = next_due(approval)
    if ends is None:
        return None
    return max(0, int((moment(ends.deadline) - (at or datetime.now(UTC))).total_seconds()))


def _electorate(approval: Approval) -> Electorate:
    excluded = [*approval.askers, *(vote.voter for vote in approval.votes)]
    if approval.barred_editor is not None:
        excluded.append(approval.barred_editor)
    return Electorate(roles=approval.quorum.roles, excluded=list(dict.fromkeys(excluded)))


def _consequence(approval: Approval, decision: Literal["denied", "expired"]) -> Consequence:
    detail = f"The action does not run, and the agent reads `{decision}`."
    if approval.task_id is not None:
        detail += f" If its task waits for this, it goes on and is told the decision `{decision}`."
    return Consequence(decision=decision, resumes_task_id=approval.task_id, detail=detail)


def claimed(task: Task) -> dict[str, Any]:
    """What a worker is told of the task it claimed, personal values still sealed."""
    return {name: getattr(task, name) for name in ClaimedTask.__struct_fields__}


async def destroyed(vault: Vault, project_id: str, erasures: Sequence[Erasure]) -> list[bool]:
    """Of each erasure, whether it is done: whether the keys that it is of are gone."""
    first = await vault.first_keys(project_id, {one.subject for one in erasures})
    return [one.subject not in first or first[one.subject] > one.through for one in erasures]


def identity(state: Resource) -> UUID:
    named: UUID = getattr(state, FORMS[type(state)].id)
    return named


def location(state: Resource) -> bytes:
    form = FORMS[type(state)]
    return b"%b/%b" % (form.address, str(getattr(state, form.name or form.id)).encode())


def etag(state: Resource) -> bytes:
    return b'"%d"' % state.version


class Draft(NamedTuple):
    """A body that is encoded; and where something in it is sealed, what was encoded, and the fields to unseal in it."""

    encoded: bytes
    shown: dict[str, Any] | None = None
    sealed: Sequence[tuple[dict[str, Any], str, Place]] = ()

    def readable(self) -> bytes:
        """The body, once `sealed` was unsealed."""
        return self.encoded if self.shown is None else _encode(self.shown)


def draft(project_id: str, state: Resource | tuple[Task, ...], beside: dict[str, Any] | None = None) -> Draft:
    """The body of `state`, or of what was claimed; with what is known `beside` the state."""
    states: tuple[Resource, ...]
    if isinstance(state, tuple):
        states, items = state, [claimed(task) for task in state]
        shown: dict[str, Any] = {"tasks": items}
    else:
        shown = body(state) | (beside or {})
        states, items = (state,), [shown]
    encoded = _encode(shown)
    if SEALED not in encoded:
        return Draft(encoded)
    each = zip(states, items, strict=True)
    return Draft(encoded, shown, [place for one, item in each for place in _places(project_id, one, item)])


async def encode(
    vault: Vault, project_id: str, state: Resource | tuple[Task, ...], beside: dict[str, Any] | None = None
) -> bytes:
    """As `draft`, readable. Raises BrokenSeal."""
    drafted = draft(project_id, state, beside)
    await unseal(vault, project_id, drafted.sealed)
    return drafted.readable()


async def reveal(
    vault: Vault, project_id: str, states: Sequence[Resource], form: Callable[[Any], dict[str, Any]] = body
) -> list[dict[str, Any]]:
    """The bodies of `states`, readable; all keys in one go. Raises BrokenSeal."""
    shown = [form(state) for state in states]
    places = [place for item, state in zip(shown, states, strict=True) for place in _places(project_id, state, item)]
    await unseal(vault, project_id, places)
    return shown


def _places(project_id: str, state: Resource, shown: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Place]]:
    """The fields of `shown` that may be sealed, and what for."""
    for name, (event, version, path) in FORMS[type(state)].sealed.items():
        if name in shown and (event_id := getattr(state, event)) is not None:
            yield shown, name, Place(project_id, identity(state), getattr(state, version), event_id, path)
    if isinstance(state, Approval):
        for item, vote in zip(shown["votes"], state.votes, strict=True):
            yield item, "reason", Place(project_id, state.approval_id, vote.version, vote.event_id, "/data/reason")
    elif isinstance(state, View):
        for item, asked in zip(shown["requests"], state.requests, strict=True):
            yield item, "reason", Place(project_id, state.view_id, asked.request, asked.event_id, "/reason")


async def unseal(vault: Vault, project_id: str, places: Sequence[tuple[dict[str, Any], str, Place]]) -> None:
    """Have these fields of these items readable, each sealed for its place. Raises BrokenSeal."""
    sealed = [(item, name, place) for item, name, place in places if SEALED in _encode(item[name])]
    opened = await vault.unseal_all(project_id, [(item[name], place) for item, name, place in sealed]) if sealed else []
    for (item, name, _), value in zip(sealed, opened, strict=True):
        item[name] = value
