"""Every request a caller may make, and the receipt it is answered with.

A command is imperative, names at most one target, and says which roles may give it. How its bytes are read is
in `syntax.py`; what becomes of it is for the rules.
"""

from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal
from uuid import UUID

from msgspec import UNSET, Meta, Struct, UnsetType, field

from ledger.errors import MunimentError
from ledger.events import ONE_LINE, AgentDescription, Artifact, Json, Line, Ref, Stamp, Usage

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

    target_field: ClassVar[str]
    stream_type: ClassVar[str]
    creates: ClassVar[bool] = False
    roles: ClassVar[frozenset[str]]

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
        named = getattr(self, self.target_field)
        return named if isinstance(named, UUID) else None

    @property
    def reads(self) -> tuple[UUID, ...]:
        """The other streams its rules must see."""
        return ()


class OpenSession(Command, kw_only=True, tag=True):
    """Open a session: one agent at work, until it ends or its time runs out."""

    target_field = "session_id"
    stream_type = "session"
    creates = True
    roles = frozenset({"agent"})

    agent_role: Line
    session_id: UUID | UnsetType = UNSET
    task_id: Line | None = None
    metadata: Json = field(default_factory=dict)
    labels: Labels = field(default_factory=dict)
    parent_session_id: UUID | None = None
    agent: AgentDescription | None = None
    expires_at: Moment | None = None

    @property
    def reads(self) -> tuple[UUID, ...]:
        return (self.parent_session_id,) if self.parent_session_id else ()


class ChangeSession(Command, kw_only=True, tag=True):
    """Change a session: its status, the work it is bound to, its metadata; all of it or nothing."""

    target_field = "session_id"
    stream_type = "session"
    roles = frozenset({"agent"})

    session_id: UUID | UnsetType = UNSET
    status: Status | UnsetType = UNSET
    task_id: Line | UnsetType | None = UNSET
    metadata: Json | UnsetType = UNSET
    reason: Text | None = None
    force: bool = False


class CancelSession(Command, kw_only=True, tag=True):
    """Cancel a session; with `cascade` every session below it too."""

    target_field = "session_id"
    stream_type = "session"
    roles = frozenset({"agent", "operator"})

    session_id: UUID | UnsetType = UNSET
    reason: Text | None = None
    cascade: bool = False


class AnnotateSession(Command, kw_only=True, tag=True):
    """Add a remark to a session, whatever its state."""

    target_field = "session_id"
    stream_type = "session"
    roles = frozenset({"agent"})

    text: Text
    session_id: UUID | UnsetType = UNSET


class Record(Command, kw_only=True, tag=True):
    """Record a plain fact: a message, a model call, a tool call, anything that happened."""

    target_field = "record_id"
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


class ExpireSession(Command, kw_only=True, tag=True):
    """Time ran out. Given by the system alone, with an id made from stream and deadline."""

    target_field = "session_id"
    stream_type = "session"
    roles = frozenset()

    session_id: UUID
    deadline: Stamp


COMMANDS: tuple[type[Command], ...] = (OpenSession, ChangeSession, CancelSession, AnnotateSession, Record)
"""What a caller may send; the system's own commands are not among them."""


class Receipt(Struct, frozen=True, kw_only=True):
    """What became of a command. Every answer, first or replayed, is made from this and nothing else.

    `state` is the target folded to `seen_position`; `refusal` is set when the command was refused and
    the refusal recorded. A command that appended nothing has `event_count` 0 and `first_position` 0.
    """

    command_id: str
    type: str
    status: int
    target: UUID | None
    first_position: int
    event_count: int
    seen_position: int
    state: Any = None
    refusal: MunimentError | None = None
    replayed: bool = False

    @property
    def positions(self) -> range:
        return range(self.first_position, self.first_position + self.event_count)
