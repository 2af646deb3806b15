"""The rules of a view as operators see it: what was asked of it, by whom and why, and what came of that.

built | switched -> rebuilding -> switched, or back; rebuilding -> cancelling; switched -> rolling_back -> built. A view
is `switched` while what its last rebuild replaced is kept. Verifying, trying again and skipping go with any state. How
far a worker has come is not here: nothing is decided by it. Pure: no clock, no I/O, and no personal field is looked
into.
"""

from typing import Any, ClassVar, Literal
from uuid import UUID

from msgspec import Struct
from msgspec.structs import replace

from ledger.commands import Command
from ledger.entry import Event
from ledger.errors import InvalidTransition, NotFound
from ledger.events import Fact
from ledger.operations import (
    OPERATORS,
    CancelRebuild,
    OfView,
    Outcome,
    RebuildView,
    RetryParked,
    RollBackView,
    SettleRequest,
    SkipEvent,
    VerifyView,
    stream_of,
)
from ledger.queue import World
from ledger.values import Asked, Principal, Replayed, Stamp
from ledger.view_events import (
    EventSkipped,
    EventSkipRequested,
    ParkedRetried,
    ParkedRetryRequested,
    RebuildCancelled,
    RebuildCancelRequested,
    RebuildRequested,
    RollBackRequested,
    VerificationRequested,
    ViewRequestFailed,
    ViewRolledBack,
    ViewSwitched,
    ViewVerified,
)

State = Literal["built", "switched", "rebuilding", "cancelling", "rolling_back"]

ALLOWED: dict[str, tuple[str, ...]] = {
    "built": ("rebuilding",),
    "switched": ("rebuilding", "rolling_back"),
    "rebuilding": ("cancelling",),
}
"""What an operator may turn each state into."""

_ASKED: dict[type[Fact], Asked] = {
    RebuildRequested: "rebuild",
    RollBackRequested: "rollback",
    VerificationRequested: "verify",
    ParkedRetryRequested: "retry",
    EventSkipRequested: "skip",
}
_OUTCOMES: dict[type[Fact], Outcome] = {
    ViewSwitched: "switched",
    RebuildCancelled: "cancelled",
    ViewRolledBack: "rolled_back",
    ViewVerified: "verified",
    ParkedRetried: "retried",
    EventSkipped: "skipped",
    ViewRequestFailed: "failed",
}


class Request(Struct, frozen=True, kw_only=True):
    """Something that was asked of a view: `request` is the version of the view that it made, `event_id` its event.

    `outcome` is what came of it, null while that is not known; `holds` says of a verified view whether it is what a
    replay makes.
    """

    request: int
    event_id: UUID
    asked: Asked
    asked_by: Principal
    asked_at: Stamp
    reason: Any = None
    project: str | None = None
    position: int | None = None
    cancelled_by: Principal | None = None
    outcome: Outcome | None = None
    ended_at: Stamp | None = None
    because: str | None = None
    holds: bool | None = None
    replayed: Replayed | None = None


class View(Struct, frozen=True, kw_only=True):
    """A view as of some event: `requests` are those that are open, and of each kind the last that has ended."""

    session_id: ClassVar[None] = None
    root_session_id: ClassVar[None] = None

    view_id: UUID
    view: str
    state: State = "built"
    requests: tuple[Request, ...] = ()
    keeps_replaced: bool = False
    version: int = 0
    updated_at: Stamp | None = None

    @property
    def open(self) -> tuple[Request, ...]:
        """What a worker has yet to do, the oldest first."""
        return tuple(request for request in self.requests if request.outcome is None)

    def asking(self, command: OfView) -> Request | None:
        """What is open and just what that command asks for, or cancels."""
        wanted = command.asked, getattr(command, "project", None), getattr(command, "position", None)
        return next((one for one in self.open if (one.asked, one.project, one.position) == wanted), None)

    def find(self, version: int) -> Request | None:
        """What was asked at that version, while that is known here."""
        return next((one for one in self.requests if one.request == version), None)


def unasked(view: str) -> View:
    """A view of which nothing was ever asked."""
    return View(view_id=stream_of(view), view=view)


def decide(view: View | None, command: Command, world: World) -> list[Fact]:
    """The facts that `command` makes of `view`; none where that is asked for already. Raises its refusal."""
    name = getattr(command, "view", None)
    if world.project_id != OPERATORS or not isinstance(name, str):
        raise NotFound(what="projection", id=name)
    now = view or unasked(name)
    match command:
        case RebuildView():
            return [RebuildRequested(view=name)] if _turns(now, command, "rebuilding") else []
        case CancelRebuild():
            rebuild = now.asking(command) if _turns(now, command, "cancelling") else None
            return [RebuildCancelRequested(view=name, request=rebuild.request)] if rebuild else []
        case RollBackView():
            return [RollBackRequested(view=name)] if _turns(now, command, "rolling_back") else []
        case VerifyView(project=project):
            return _once(now, command, VerificationRequested(view=name, project=project))
        case RetryParked(project=project):
            return _once(now, command, ParkedRetryRequested(view=name, project=project))
        case SkipEvent(project=project, position=position):
            return _once(now, command, EventSkipRequested(view=name, project=project, position=position))
        case SettleRequest(request=number):
            return [_settled(one, command) for one in now.open if one.request == number]
        case _:
            raise TypeError(f"{type(command).__name__} is not a view's command")


def _turns(view: View, command: Command, wanted: State) -> bool:
    """Whether the view is to become that; False where it is that already."""
    if view.state == wanted:
        return False
    allowed = ALLOWED.get(view.state, ())
    if wanted not in allowed:
        raise InvalidTransition(command=type(command).__name__, id=view.view, current_state=view.state, allowed=allowed)
    return True


def _once(view: View, command: OfView, fact: Fact) -> list[Fact]:
    return [] if view.asking(command) else [fact]


def _settled(asked: Request, command: SettleRequest) -> Fact:
    told: dict[str, Any] = {"view": command.view, "request": asked.request, "asked_by": asked.asked_by}
    replayed = command.replayed
    match command.outcome:
        case "switched":
            assert replayed is not None
            return ViewSwitched(**told, replayed=replayed)
        case "verified":
            assert replayed is not None
            return ViewVerified(**told, holds=not replayed.drifted, replayed=replayed, project=asked.project)
        case "cancelled":
            assert asked.cancelled_by is not None
            return RebuildCancelled(**told, cancelled_by=asked.cancelled_by)
        case "rolled_back":
            return ViewRolledBack(**told)
        case "retried":
            return ParkedRetried(**told)
        case "skipped":
            assert asked.project is not None
            assert asked.position is not None
            return EventSkipped(**told, project=asked.project, position=asked.position)
        case "failed":
            return ViewRequestFailed(**told, asked=asked.asked, because=command.because)


def evolve(view: View | None, event: Event[Any]) -> View:
    """`view` after `event`."""
    data = event.data
    before = view or unasked(data.view)
    if asked := _ASKED.get(type(data)):
        after = _asked(before, event, asked)
    elif isinstance(data, RebuildCancelRequested):
        by = Principal.of(event.actor)
        requests = tuple(replace(r, cancelled_by=by) if r.request == data.request else r for r in before.requests)
        after = replace(before, state="cancelling", requests=requests)
    else:
        after = _ended(before, event, _OUTCOMES[type(data)])
    return replace(after, version=event.stream_version, updated_at=event.recorded_at)


def _asked(view: View, event: Event[Any], asked: Asked) -> View:
    request = Request(
        request=event.stream_version,
        event_id=event.event_id,
        asked=asked,
        asked_by=Principal.of(event.actor),
        asked_at=event.recorded_at,
        reason=event.reason,
        project=getattr(event.data, "project", None),
        position=getattr(event.data, "position", None),
    )
    becomes: dict[str, State] = {"rebuild": "rebuilding", "rollback": "rolling_back"}
    return replace(view, state=becomes.get(asked, view.state), requests=(*view.requests, request))


def _ended(view: View, event: Event[Any], outcome: Outcome) -> View:
    data = event.data
    (request,) = [one for one in view.requests if one.request == data.request]
    ended = replace(
        request,
        outcome=outcome,
        ended_at=event.recorded_at,
        because=getattr(data, "because", None),
        holds=getattr(data, "holds", None),
        replayed=getattr(data, "replayed", None),
    )
    others = (r for r in view.requests if r is not request and (r.outcome is None or r.asked != request.asked))
    keeps = {"switched": True, "rolled_back": False}.get(outcome, view.keeps_replaced)
    state = view.state
    if request.asked in ("rebuild", "rollback"):
        state = "switched" if keeps else "built"
    requests = sorted((*others, ended), key=lambda one: one.request)
    return replace(view, state=state, requests=tuple(requests), keeps_replaced=keeps)


def due(view: View, now: Stamp) -> None:
    """Never: nothing about a view ends by itself."""


def item(view: View) -> None:
    """Never: it is under no session."""
