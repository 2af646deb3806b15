"""Every fact that can ever be recorded, and the values that facts are made of.

A fact is the `data` of one event (`entry.py` has the envelope and the bytes). New fields are added with
defaults; a field is never renamed and never changes its meaning, for what was recorded is read for ever.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal
from uuid import UUID

from msgspec import Meta, Struct, field

# Values

Stamp = str
"""A time as it is stored and shown: `YYYY-MM-DDTHH:MM:SS.ffffffZ`. Fixed width, so stamps sort as text."""

ONE_LINE = r"^[^\x00-\x1f\x7f]*$(?!\n)"
"""In Python `$` also matches before a last line feed, and JSON Schema has no `\\Z`: so every pattern ends like this."""

Line = Annotated[str, Meta(min_length=1, max_length=255, pattern=ONE_LINE)]
"""One line of text without control characters: names, roles, the caller's own ids."""

Json = dict[str, Any]


def stamp(moment: datetime) -> Stamp:
    """`moment` (aware) as a Stamp."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def moment(text: Stamp) -> datetime:
    """The aware datetime behind a Stamp."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)


class Ref(Struct, frozen=True, forbid_unknown_fields=True):
    """A thing of the caller's world that this is about, such as `invoice:9`. Searchable."""

    type: Annotated[str, Meta(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f:]*$(?!\n)")]
    id: Line


class Principal(Struct, frozen=True):
    """One person or one machine, compared exactly (SPEC §3)."""

    issuer: str
    sub: str


class Actor(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who did it, as authenticated; never what the caller says of itself."""

    issuer: str
    sub: str
    kind: Literal["human", "agent", "service", "system"]
    assurance: Literal["authenticated", "asserted", "imported"]
    roles: tuple[str, ...] = ()
    client: str | None = None
    on_behalf_of: tuple[Principal, ...] = ()
    name: Any = None
    auth_time: int | None = None
    acr: str | None = None
    amr: tuple[str, ...] = ()

    @property
    def principal(self) -> str:
        """`issuer#sub`: one text per person, since an issuer has no fragment (OpenID Connect Discovery s3)."""
        return f"{self.issuer}#{self.sub}"


SYSTEM = Actor(issuer="muniment", sub="system", kind="system", assurance="authenticated")
"""The actor of what nobody asked for: expiry and reactions."""


class AgentDescription(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What an agent says it is. Asserted by the caller, and never mixed with the authenticated actor."""

    name: Line | None = None
    version: Line | None = None
    provider: Line | None = None
    model: Line | None = None
    instructions_digest: "Digest | None" = None
    tools_digest: "Digest | None" = None
    policy_digest: "Digest | None" = None


Digest = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}$(?!\n)")]
Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]


class Cost(Struct, frozen=True, forbid_unknown_fields=True):
    """Money, as a decimal string: a binary fraction cannot hold a cent."""

    amount: Annotated[str, Meta(pattern=r"^-?[0-9]{1,30}(\.[0-9]{1,30})?$(?!\n)")]
    currency: Annotated[str, Meta(pattern=r"^[A-Z]{3}$(?!\n)")]


class Usage(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a model call used, in tokens."""

    provider: Line | None = None
    model: Line | None = None
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    cached_input_tokens: Count | None = None
    reasoning_tokens: Count | None = None
    cost: Cost | None = None


class Artifact(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A file kept elsewhere; its digest makes it part of the evidence."""

    uri: Annotated[str, Meta(min_length=1, max_length=2048, pattern=ONE_LINE)] | None = None
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")] | None = None
    media_type: Line | None = None
    size_bytes: Count | None = None
    name: Line | None = None


# Facts. `stream_type` says whose history a fact belongs to; `personal` names the fields that may hold
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


FACTS: dict[str, type[Fact]] = {cls.__name__: cls for cls in Fact.__subclasses__()}
