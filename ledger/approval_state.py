"""What an approval is: the question, the votes that stand, and what became of the grant, folded from its events.

Decision: pending -> approved | denied | expired | withdrawn | cancelled | superseded.
Grant: approved -> executing | lapsed | revoked; executing -> executed, or approved again while uses and time are left.
What is said of an execution after its time is added, and changes no state. Imported history has no clock and is no
grant. `approval.py` has the rules.
"""

from typing import Any, Literal, get_args
from uuid import UUID

from msgspec import Struct
from msgspec.structs import replace

from ledger.entry import Event
from ledger.events import (
    ApprovalCancelled,
    ApprovalDenied,
    ApprovalExpired,
    ApprovalGranted,
    ApprovalLapsed,
    ApprovalOutcomeUnknown,
    ApprovalPresented,
    ApprovalRequested,
    ApprovalRevoked,
    ApprovalSuperseded,
    ApprovalUseBegun,
    ApprovalUseCompleted,
    ApprovalWithdrawn,
    Fact,
    OutcomeReconciled,
    VoteCast,
    VoteWithdrawn,
)
from ledger.store import OpenItem
from ledger.system import Due, ExpireApproval, LapseApproval, MissOutcome
from ledger.values import Principal, Quorum, Risk, Stamp

Refused = Literal["denied", "expired", "withdrawn", "cancelled", "superseded"]
State = Literal["pending", Refused, "approved", "executing", "executed", "lapsed", "revoked"]


class Vote(Struct, frozen=True, kw_only=True):
    """A vote that stands. A sealed `reason` is bound to the event and version named here."""

    voter: Principal
    verdict: Literal["approve", "deny"]
    digest_seen: str | None
    reason: Any
    evidence: UUID | None
    event_id: UUID
    version: int
    cast_at: Stamp


class Execution(Struct, frozen=True, kw_only=True):
    """One use. Without an outcome it is being run."""

    execution_id: UUID
    audience: str | None
    begun_at: Stamp
    outcome_by: Stamp
    outcome: Literal["ok", "failed", "unknown"] | None = None


class Approval(Struct, frozen=True, kw_only=True):
    """An approval as of some event. Sealed values in `action`, `summary`, `reason` and `salts` are bound to
    `request_event_id` and `request_version`."""

    approval_id: UUID
    state: State
    action: Any
    summary: Any
    reason: Any
    risk: Risk
    quorum: Quorum
    votes: tuple[Vote, ...] = ()
    action_digest: str
    request_digest: str
    salts: Any
    request_event_id: UUID
    request_version: int
    requester: Principal
    on_behalf_of: tuple[Principal, ...]
    session_id: UUID | None
    root_session_id: UUID | None
    task_id: UUID | None
    root: UUID
    call_key: str | None
    match: bytes | None
    valid_for_seconds: int
    uses: int
    uses_left: int
    outcome_within_seconds: int
    executions: tuple[Execution, ...] = ()
    imported: bool
    supersedes: UUID | None
    superseded_by: UUID | None = None
    edited_by: Principal | None
    external_id: str | None
    version: int
    requested_at: Stamp
    updated_at: Stamp
    expires_at: Stamp
    decided_at: Stamp | None = None
    approved_until: Stamp | None = None

    @property
    def execution(self) -> Execution | None:
        """The one that is being run."""
        return self.executions[-1] if self.state == "executing" else None

    @property
    def askers(self) -> tuple[Principal, ...]:
        """Who asked, and whoever it was asked for: none of them ever votes on it."""
        return (self.requester, *self.on_behalf_of)

    @property
    def barred_editor(self) -> Principal | None:
        """Whoever edited it, where one approval is not enough: they do not vote on it either."""
        return self.edited_by if self.quorum.approve > 1 else None


# What an approval is after an event

_BECOMES: dict[type[Fact], State] = {
    ApprovalGranted: "approved",
    ApprovalDenied: "denied",
    ApprovalExpired: "expired",
    ApprovalWithdrawn: "withdrawn",
    ApprovalCancelled: "cancelled",
    ApprovalSuperseded: "superseded",
    ApprovalUseBegun: "executing",
    ApprovalRevoked: "revoked",
    ApprovalLapsed: "lapsed",
}


def evolve(approval: Approval | None, event: Event[Any]) -> Approval:
    """`approval` after `event`."""
    if isinstance(event.data, ApprovalRequested):
        return _requested(event)
    assert approval is not None, "an approval's history begins with ApprovalRequested"
    changed = _changed(approval, event)
    if becomes := _BECOMES.get(type(event.data)):
        changed["state"] = becomes
        if approval.state == "pending":
            changed["decided_at"] = event.recorded_at
    return replace(approval, version=event.stream_version, updated_at=event.recorded_at, **changed)


def _requested(event: Event[ApprovalRequested]) -> Approval:
    data = event.data
    root = data.root or event.root_session_id
    assert root is not None, "a request says what it is open under where its envelope does not"
    return Approval(
        approval_id=event.stream_id,
        state="pending",
        action=data.action,
        summary=data.summary,
        reason=event.reason,
        risk=data.risk,
        quorum=data.quorum,
        action_digest=data.action_digest,
        request_digest=data.request_digest,
        salts=data.salts,
        request_event_id=event.event_id,
        request_version=event.stream_version,
        requester=data.requester,
        on_behalf_of=data.on_behalf_of,
        session_id=event.session_id,
        root_session_id=event.root_session_id,
        task_id=data.task_id,
        root=root,
        call_key=data.call_key,
        match=bytes.fromhex(data.match) if data.match else None,
        valid_for_seconds=data.valid_for_seconds,
        uses=data.uses,
        uses_left=data.uses,
        outcome_within_seconds=data.outcome_within_seconds,
        imported=data.imported,
        supersedes=data.supersedes,
        edited_by=data.edited_by,
        external_id=event.external_id,
        version=event.stream_version,
        requested_at=event.recorded_at,
        updated_at=event.recorded_at,
        expires_at=data.expires_at,
    )


def _changed(approval: Approval, event: Event[Any]) -> dict[str, Any]:
    match data := event.data:
        case VoteCast():
            return {"votes": (*approval.votes, _cast(event))}
        case VoteWithdrawn():
            gone = Principal.of(event.actor)
            return {"votes": tuple(vote for vote in approval.votes if vote.voter != gone)}
        case ApprovalGranted():
            return {"approved_until": data.approved_until}
        case ApprovalSuperseded():
            return {"superseded_by": data.by}
        case ApprovalUseBegun():
            return {"uses_left": approval.uses_left - 1, "executions": (*approval.executions, _begun(event))}
        case ApprovalUseCompleted():
            return {"state": _state_after_use(approval, event), "executions": _ended(approval, data, data.outcome)}
        case ApprovalOutcomeUnknown():
            return {"state": _state_after_use(approval, event), "executions": _ended(approval, data, "unknown")}
        case OutcomeReconciled():
            return {"executions": _ended(approval, data, data.outcome)}
        case _ if type(data) in _BECOMES or isinstance(data, ApprovalPresented):
            return {}
        case _:
            raise TypeError(f"{event.type} is not an approval's event")


def _cast(event: Event[VoteCast]) -> Vote:
    data = event.data
    return Vote(
        voter=Principal.of(data.voter or event.actor),
        verdict=data.verdict,
        digest_seen=data.digest_seen,
        reason=data.reason,
        evidence=data.voter.evidence if data.voter else None,
        event_id=event.event_id,
        version=event.stream_version,
        cast_at=event.recorded_at,
    )


def _begun(event: Event[ApprovalUseBegun]) -> Execution:
    data = event.data
    return Execution(
        execution_id=data.execution_id, audience=data.audience, begun_at=event.recorded_at, outcome_by=data.outcome_by
    )


def _ended(approval: Approval, data: Any, outcome: Any) -> tuple[Execution, ...]:
    return tuple(
        replace(execution, outcome=outcome) if execution.execution_id == data.execution_id else execution
        for execution in approval.executions
    )


def _state_after_use(approval: Approval, event: Event[Any]) -> State:
    in_time = approval.approved_until is not None and event.recorded_at < approval.approved_until
    return "approved" if approval.uses_left and in_time else "executed"


# What follows from it


def next_due(approval: Approval) -> Due | None:
    """What its time will bring, unless something else comes before."""
    if approval.imported:
        return None
    if approval.state == "pending":
        return ExpireApproval(approval_id=approval.approval_id, deadline=approval.expires_at)
    if approval.state == "approved" and approval.approved_until is not None:
        return LapseApproval(approval_id=approval.approval_id, deadline=approval.approved_until)
    if approval.execution is not None:
        return MissOutcome(approval_id=approval.approval_id, deadline=approval.execution.outcome_by)
    return None


def due(approval: Approval, now: Stamp) -> Due | None:
    """What must come before anything else is decided on this approval."""
    following = next_due(approval)
    return following if following is not None and following.deadline <= now else None


def item(approval: Approval) -> OpenItem | None:
    """What it is among the open items of its root: a question, or a grant that can still be used."""
    place = (approval.session_id, approval.root, approval.task_id, approval.match)
    if approval.state == "pending":
        return OpenItem(approval.approval_id, "approval", *place)
    if approval.state in ("approved", "executing") and approval.uses_left and not approval.imported:
        return OpenItem(approval.approval_id, "grant", *place)
    return None


def decision(approval: Approval) -> str:
    """How it was decided, whatever became of the grant."""
    return approval.state if approval.state in get_args(Refused) else "approved"
