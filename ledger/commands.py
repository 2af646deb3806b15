"""Every request a caller may make.

A command is imperative, names at most one target, and says which roles may give it. How its bytes are read is
in `syntax.py`; what becomes of it is for the rules.
"""

from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal
from uuid import UUID

from msgspec import UNSET, Meta, Struct, UnsetType, field

from ledger.values import (
    ONE_LINE,
    Action,
    AgentDescription,
    Artifact,
    Digest,
    Json,
    Line,
    Quorum,
    Ref,
    Risk,
    Usage,
    Voter,
)

TEXT_CHARACTERS_MAX = 4096
EXACT_INTEGER_MAX = 2**53 - 1

CommandId = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9._~:@+-]+$(?!\n)")]
ProjectId = Annotated[str, Meta(min_length=2, max_length=63, pattern=r"^[a-z0-9][a-z0-9-]{1,62}$(?!\n)")]
Moment = Annotated[datetime, Meta(tz=True)]
Kind = Annotated[str, Meta(max_length=100, pattern=r"^[a-z0-9_-]+(\.[a-z0-9_-]+)*$(?!\n)")]
Labels = Annotated[dict[Line, Line], Meta(max_length=32)]
Refs = Annotated[tuple[Ref, ...], Meta(max_length=16)]


class PersonalValue(Struct, frozen=True, forbid_unknown_fields=True):
    subject: Line
    value: Any


class Personal(Struct, frozen=True, forbid_unknown_fields=True, rename={"personal": "$personal"}):
    """A value about a person: sealed under that subject's own key from the first event on."""

    personal: PersonalValue


Text = Annotated[str, Meta(min_length=1, max_length=TEXT_CHARACTERS_MAX)] | Personal
Status = Literal["pending", "active", "completed", "failed", "expired", "cancelled"]


class Command(Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, tag_field="type"):
    """What every command may carry besides its own fields."""

    stream_type: ClassVar[str]
    creates: ClassVar[bool] = False
    roles: ClassVar[frozenset[str] | None]
    """One of these is needed to give it. None: its rules say who may."""

    command_id: CommandId | UnsetType = UNSET
    expected_version: Annotated[int, Meta(ge=0, le=EXACT_INTEGER_MAX)] | UnsetType = UNSET
    occurred_at: Moment | UnsetType = UNSET
    correlation_id: Annotated[str, Meta(min_length=1, max_length=128, pattern=ONE_LINE)] | UnsetType = UNSET
    causation_id: UUID | UnsetType = UNSET
    external_id: Line | UnsetType = UNSET
    refs: Refs = ()

    @property
    def target(self) -> UUID | None:
        """The stream this command is about, where the caller named it."""
        named = getattr(self, f"{self.stream_type}_id")
        return named if isinstance(named, UUID) else None

    @property
    def reads(self) -> tuple[UUID, ...]:
        """The other streams its rules must see."""
        return ()


class OfSession(Command, kw_only=True):
    stream_type = "session"

    session_id: UUID | UnsetType = UNSET


class OpenSession(OfSession, kw_only=True, tag=True):
    """Open a session: one agent at work, until it ends or its time runs out."""

    creates = True
    roles = frozenset({"agent"})

    agent_role: Line
    task_id: Line | None = None
    metadata: Json = field(default_factory=dict)
    labels: Labels = field(default_factory=dict)
    parent_session_id: UUID | None = None
    agent: AgentDescription | None = None
    expires_at: Moment | None = None

    @property
    def reads(self) -> tuple[UUID, ...]:
        return (self.parent_session_id,) if self.parent_session_id else ()


class ChangeSession(OfSession, kw_only=True, tag=True):
    """Change a session: its status, the work it is bound to, its metadata; all of it or nothing."""

    roles = frozenset({"agent"})

    status: Status | UnsetType = UNSET
    task_id: Line | UnsetType | None = UNSET
    metadata: Json | UnsetType = UNSET
    reason: Text | None = None
    force: bool = False


class CancelSession(OfSession, kw_only=True, tag=True):
    """Cancel a session; with `cascade` every session below it too."""

    roles = frozenset({"agent", "operator"})

    reason: Text | None = None
    cascade: bool = False


class AnnotateSession(OfSession, kw_only=True, tag=True):
    """Add a remark to a session, whatever its state."""

    roles = frozenset({"agent"})

    text: Text


class Record(Command, kw_only=True, tag=True):
    """Record a plain fact: a message, a model call, a tool call, anything that happened."""

    stream_type = "record"
    creates = True
    roles = frozenset({"agent"})

    kind: Kind
    record_id: UUID | UnsetType = UNSET
    session_id: UUID | None = None
    task_id: UUID | None = None
    approval_id: UUID | None = None
    parent_record_id: UUID | None = None
    status: Literal["ok", "error"] | None = None
    started_at: Moment | None = None
    ended_at: Moment | None = None
    body: Any = None
    usage: Usage | None = None
    artifacts: Annotated[tuple[Artifact, ...], Meta(max_length=100)] = ()

    @property
    def reads(self) -> tuple[UUID, ...]:
        if self.session_id is None:
            return (self.parent_record_id,) if self.parent_record_id else ()
        return (self.session_id, self.parent_record_id) if self.parent_record_id else (self.session_id,)


# Tasks

LEASE_SECONDS = 60

Seconds = Annotated[int, Meta(ge=1, le=86_400)]
Days = Annotated[int, Meta(ge=1, le=30 * 86_400)]


class Start(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who begins the submitted task at once: the caller."""

    worker: Line
    lease_seconds: Seconds = LEASE_SECONDS
    lease_id: UUID | None = None


class OfTask(Command, kw_only=True):
    stream_type = "task"

    task_id: UUID | UnsetType = UNSET


class SubmitTask(OfTask, kw_only=True, tag=True):
    """Submit work: handed out to a worker by kind, or with `start` begun by the caller at once."""

    creates = True
    roles = frozenset({"agent"})

    kind: Kind
    session_id: UUID | None = None
    payload: Any = None
    priority: Annotated[int, Meta(ge=0, le=9)] = 5
    max_attempts: Annotated[int, Meta(ge=1, le=100)] = 3
    backoff_seconds: Annotated[int, Meta(ge=0, le=3600)] = 2
    run_at: Moment | None = None
    deadline_at: Moment | None = None
    start: Start | None = None

    @property
    def reads(self) -> tuple[UUID, ...]:
        return (self.session_id,) if self.session_id else ()


class ClaimTasks(OfTask, kw_only=True, tag=True):
    """Claim work: up to `n` tasks of these kinds, or one by its id. What is claimed is leased to the caller alone."""

    roles = frozenset({"agent"})

    worker: Line
    kinds: Annotated[tuple[Kind, ...], Meta(min_length=1, max_length=100)] | UnsetType = UNSET
    session_id: UUID | None = None
    n: Annotated[int, Meta(ge=1, le=100)] = 1
    lease_seconds: Seconds = LEASE_SECONDS


class CompleteTask(OfTask, kw_only=True, tag=True):
    """Say what came out of a task that is leased to the caller."""

    roles = frozenset({"agent"})

    lease_id: UUID
    result: Any = None
    is_error: bool = False


class FailTask(OfTask, kw_only=True, tag=True):
    """Say that the attempt failed: it is tried again, or dead once its attempts are used up or cannot help."""

    roles = frozenset({"agent"})

    lease_id: UUID
    error: Any = None
    retryable: bool = True


class SuspendTask(OfTask, kw_only=True, tag=True):
    """Wait for an approval of this task without holding its lease; any decision of it resumes the task."""

    roles = frozenset({"agent"})

    lease_id: UUID
    approval_id: UUID

    @property
    def reads(self) -> tuple[UUID, ...]:
        return (self.approval_id,)


class CancelTask(OfTask, kw_only=True, tag=True):
    """Cancel a task that has not ended; its worker's result will come too late."""

    roles = frozenset({"agent", "operator"})

    reason: Text | None = None


class RedriveTask(OfTask, kw_only=True, tag=True):
    """Take a task out of the dead letters and offer it again."""

    roles = frozenset({"operator"})

    reason: Text


# Approvals


class OfApproval(Command, kw_only=True):
    stream_type = "approval"

    approval_id: UUID | UnsetType = UNSET


class RequestApproval(OfApproval, kw_only=True, tag=True):
    """Ask people whether this exact action may run. An open request for the same is answered as it is now."""

    creates = True
    roles = frozenset({"agent", "importer"})

    action: Action
    session_id: UUID | None = None
    task_id: UUID | None = None
    call_key: Line | None = None
    summary: Text | None = None
    reason: Text | None = None
    risk: Risk = "medium"
    quorum: Quorum = Quorum()
    expires_at: Moment | None = None
    valid_for_seconds: Days = 900
    uses: Annotated[int, Meta(ge=1, le=1000)] = 1
    outcome_within_seconds: Seconds = 300
    imported: bool = False

    @property
    def reads(self) -> tuple[UUID, ...]:
        return tuple(i for i in (self.session_id, self.task_id) if i)


class PresentApproval(OfApproval, kw_only=True, tag=True):
    """Say that the caller was shown the request, and where."""

    roles = frozenset({"approver"})

    channel: Line


class CastVote(OfApproval, kw_only=True, tag=True):
    """Approve or deny what `digest_seen` commits to. One vote a person, and none by whoever it is asked for."""

    roles = None

    verdict: Literal["approve", "deny"]
    digest_seen: Digest | None = None
    reason: Text | None = None
    voter: Voter | None = None


class WithdrawVote(OfApproval, kw_only=True, tag=True):
    """Take one's vote back while nothing is decided."""

    roles = None


class EditApproval(OfApproval, kw_only=True, tag=True):
    """Ask about a changed action instead: the request is superseded by a new one of the same requester."""

    roles = frozenset({"approver"})

    action: Action
    new_approval_id: UUID | UnsetType = UNSET
    summary: Text | None = None
    reason: Text | None = None


class WithdrawApproval(OfApproval, kw_only=True, tag=True):
    """Take a request back: the one who asked."""

    roles = frozenset({"agent"})

    reason: Text | None = None


class CancelApproval(OfApproval, kw_only=True, tag=True):
    """End a request that nobody needs to decide any more."""

    roles = frozenset({"operator"})

    reason: Text | None = None


class RevokeApproval(OfApproval, kw_only=True, tag=True):
    """Take an approval back that is not being used."""

    roles = frozenset({"approver", "operator"})

    reason: Text | None = None


class BeginUse(OfApproval, kw_only=True, tag=True):
    """Begin to run what was approved: it is checked once more, at this moment, that this is it."""

    roles = frozenset({"agent"})

    execution_id: UUID
    action: Action
    audience: Line | None = None


class RecordOutcome(OfApproval, kw_only=True, tag=True):
    """Say what came of an execution."""

    roles = frozenset({"agent"})

    execution_id: UUID
    outcome: Literal["ok", "failed"]
    result: Any = None


COMMANDS: tuple[type[Command], ...] = (
    OpenSession,
    ChangeSession,
    CancelSession,
    AnnotateSession,
    Record,
    SubmitTask,
    ClaimTasks,
    CompleteTask,
    FailTask,
    SuspendTask,
    CancelTask,
    RedriveTask,
    RequestApproval,
    PresentApproval,
    CastVote,
    WithdrawVote,
    EditApproval,
    WithdrawApproval,
    CancelApproval,
    RevokeApproval,
    BeginUse,
    RecordOutcome,
)
"""What a caller may send; the system's own commands are not among them."""
