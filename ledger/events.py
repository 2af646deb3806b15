"""Every fact that can ever be recorded, but those about views (view_events.py).

A fact is the `data` of one event (`entry.py` has the envelope and the bytes). New fields are added with
defaults; a field is never renamed and never changes its meaning, for what was recorded is read for ever.
"""

from typing import Any, ClassVar, Literal
from uuid import UUID

from msgspec import Struct, field

from ledger.values import AgentDescription, Artifact, Json, Principal, Quorum, Risk, Stamp, Usage, Voter

# `stream_type` says whose history a fact belongs to; `personal` names the fields that may hold
# a `$personal` value, which is sealed before the entry is encoded.


class Fact(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The `data` of one event. The class name is the event type."""

    stream_type: ClassVar[str]
    schema_version: ClassVar[int] = 1
    personal: ClassVar[tuple[str, ...]] = ()


class SessionOpened(Fact, frozen=True):
    stream_type = "session"
    personal = ("metadata",)
    agent_role: str
    expires_at: Stamp
    task_id: str | None = None
    metadata: Json = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    parent_session_id: UUID | None = None
    agent: AgentDescription | None = None


class SessionActivated(Fact, frozen=True):
    stream_type = "session"


class SessionCompleted(Fact, frozen=True):
    stream_type = "session"


class SessionFailed(Fact, frozen=True):
    stream_type = "session"
    personal = ("reason",)
    reason: Any = None


class SessionExpired(Fact, frozen=True):
    stream_type = "session"
    deadline: Stamp


class SessionCancelled(Fact, frozen=True):
    stream_type = "session"
    personal = ("reason",)
    reason: Any = None
    cascade: bool = False


class SessionTaskBound(Fact, frozen=True):
    """The work the session was opened to do; without `task_id` it was unbound."""

    stream_type = "session"
    task_id: str | None = None


class SessionMetadataChanged(Fact, frozen=True):
    """The metadata as it is from here on; it replaces what was there."""

    stream_type = "session"
    personal = ("metadata",)
    metadata: Json


class SessionAnnotated(Fact, frozen=True):
    stream_type = "session"
    personal = ("text",)
    text: Any


class FactRecorded(Fact, frozen=True):
    stream_type = "record"
    personal = ("body",)
    kind: str
    task_id: UUID | None = None
    approval_id: UUID | None = None
    parent_record_id: UUID | None = None
    status: Literal["ok", "error"] | None = None
    started_at: Stamp | None = None
    ended_at: Stamp | None = None
    body: Any = None
    usage: Usage | None = None
    artifacts: tuple[Artifact, ...] = ()


# Tasks


class TaskSubmitted(Fact, frozen=True):
    """Work to be handed out, not before `run_at`, nor after `deadline_at`."""

    stream_type = "task"
    personal = ("payload",)
    kind: str
    run_at: Stamp
    payload: Any = None
    priority: int = 5
    max_attempts: int = 3
    backoff_seconds: int = 2
    deadline_at: Stamp | None = None


class TaskQueued(Fact, frozen=True):
    """Its time to be tried again has come."""

    stream_type = "task"


class TaskClaimed(Fact, frozen=True):
    """An attempt has begun. Until `lease_until`, or for as long as it sends heartbeats, the task is its own."""

    stream_type = "task"
    attempt: int
    worker: str
    lease_id: UUID
    lease_until: Stamp


class TaskCompleted(Fact, frozen=True):
    stream_type = "task"
    personal = ("result",)
    lease_id: UUID
    result: Any = None
    is_error: bool = False


class AttemptFailed(Fact, frozen=True):
    """What follows stands in the next event: another attempt, or the end of them."""

    stream_type = "task"
    personal = ("error",)
    attempt: int
    lease_id: UUID
    error: Any = None
    retryable: bool = True


class AttemptLost(Fact, frozen=True):
    """Nothing was heard of the attempt until `lease_until`."""

    stream_type = "task"
    attempt: int
    lease_id: UUID
    lease_until: Stamp


class TaskRetryScheduled(Fact, frozen=True):
    stream_type = "task"
    run_at: Stamp


class TaskDeadLettered(Fact, frozen=True):
    stream_type = "task"
    attempts: int


class TaskSuspended(Fact, frozen=True):
    """It waits for an approval, and holds no lease meanwhile. Without `lease_id` it waited already: what it waited
    for was superseded by this one."""

    stream_type = "task"
    approval_id: UUID
    lease_id: UUID | None = None


class TaskResumed(Fact, frozen=True):
    """The approval it waited for was decided: it is offered again, and that costs no attempt."""

    stream_type = "task"
    approval_id: UUID
    decision: str


class TaskCancelled(Fact, frozen=True):
    stream_type = "task"
    personal = ("reason",)
    reason: Any = None


class TaskExpired(Fact, frozen=True):
    stream_type = "task"
    deadline: Stamp


class TaskRedriven(Fact, frozen=True):
    """Out of the dead letters and offered again, with as many attempts as it had at first."""

    stream_type = "task"
    personal = ("reason",)
    reason: Any = None


class LateResultRefused(Fact, frozen=True):
    """What a worker brought whose lease was no longer its own. Kept, and without effect."""

    stream_type = "task"
    personal = ("result",)
    lease_id: UUID
    outcome: Literal["completed", "failed", "suspended"]
    result: Any = None


# Approvals


class ApprovalRequested(Fact, frozen=True):
    """A question to people: may this action run? The digests are salted commitments over RFC 8785 forms.

    `requester` and `on_behalf_of` are those who may never vote on it; after an edit they are still the first
    request's, and `edited_by` is who changed the action. `root` is what it is open under where that is not the
    envelope's root session, and `match` the keyed hash by which another request for the same is known.
    """

    stream_type = "approval"
    personal = ("action", "summary", "salts")
    action: Any
    requester: Principal
    risk: Risk
    quorum: Quorum
    expires_at: Stamp
    valid_for_seconds: int
    uses: int
    outcome_within_seconds: int
    action_digest: str
    request_digest: str
    salts: Any
    on_behalf_of: tuple[Principal, ...] = ()
    task_id: UUID | None = None
    call_key: str | None = None
    summary: Any = None
    supersedes: UUID | None = None
    edited_by: Principal | None = None
    imported: bool = False
    root: UUID | None = None
    match: str | None = None


class ApprovalPresented(Fact, frozen=True):
    """The actor was shown it."""

    stream_type = "approval"
    channel: str


class VoteCast(Fact, frozen=True):
    """`voter` is set where an importer brought it; else the actor voted."""

    stream_type = "approval"
    personal = ("reason",)
    verdict: Literal["approve", "deny"]
    digest_seen: str | None = None
    reason: Any = None
    voter: Voter | None = None


class VoteWithdrawn(Fact, frozen=True):
    stream_type = "approval"


class ApprovalGranted(Fact, frozen=True):
    stream_type = "approval"
    approved_until: Stamp


class ApprovalDenied(Fact, frozen=True):
    stream_type = "approval"


class ApprovalExpired(Fact, frozen=True):
    """Nobody decided in time. That is never a yes."""

    stream_type = "approval"
    deadline: Stamp


class ApprovalWithdrawn(Fact, frozen=True):
    stream_type = "approval"
    personal = ("reason",)
    reason: Any = None


class ApprovalCancelled(Fact, frozen=True):
    """`cause` is what made the question pointless: an operator, or the end of its session or task."""

    stream_type = "approval"
    personal = ("reason",)
    cause: Literal["operator", "session_ended", "task_ended"]
    reason: Any = None


class ApprovalSuperseded(Fact, frozen=True):
    stream_type = "approval"
    by: UUID


class ApprovalUseBegun(Fact, frozen=True):
    """What was approved is being run. Nothing said of it by `outcome_by` means that nobody knows."""

    stream_type = "approval"
    execution_id: UUID
    outcome_by: Stamp
    audience: str | None = None


class ApprovalUseCompleted(Fact, frozen=True):
    stream_type = "approval"
    personal = ("result",)
    execution_id: UUID
    outcome: Literal["ok", "failed"]
    result: Any = None


class ApprovalOutcomeUnknown(Fact, frozen=True):
    stream_type = "approval"
    execution_id: UUID
    deadline: Stamp


class OutcomeReconciled(Fact, frozen=True):
    """What came of an execution, said too late."""

    stream_type = "approval"
    personal = ("result",)
    execution_id: UUID
    outcome: Literal["ok", "failed"]
    result: Any = None


class ApprovalRevoked(Fact, frozen=True):
    stream_type = "approval"
    personal = ("reason",)
    reason: Any = None


class ApprovalLapsed(Fact, frozen=True):
    """Approved, and not used in time."""

    stream_type = "approval"
    approved_until: Stamp


# Erasure. A subject is named by its pseudonym, as in what was sealed; nothing here may itself be personal.


class HoldPlaced(Fact, frozen=True):
    """What is recorded of the subject must stay readable, until it is released, or until `until`."""

    stream_type = "hold"
    subject: str
    reason: str
    until: Stamp | None = None


class HoldReleased(Fact, frozen=True):
    stream_type = "hold"
    subject: str
    reason: str


class SubjectErased(Fact, frozen=True):
    """The subject's keys up to the number `through` are destroyed, and with them all that was sealed before this event;
    0: it had none. What is sealed after it is sealed under a later one."""

    stream_type = "subject"
    subject: str
    ground: str
    through: int


# Refusals


class CommandRefused(Fact, frozen=True):
    """A command that was understood and refused; `attempted` is the command as it was sent."""

    stream_type = "refusal"
    personal = ("attempted",)
    command_type: str
    status: int
    code: str
    params: Json
    attempted: Any
    target: UUID | None = None
