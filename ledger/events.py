"""Every fact that can ever be recorded, its envelope, and the exact bytes it is stored as.

An entry is format 1: JSON, keys sorted, no white space, absent values left out, UTF-8 unescaped, times
as fixed-width UTC. It is encoded once, inside the append, and never again: the leaf hash (RFC 6962 s2.1)
is over these very bytes, so a change of field order or number form here would break every proof ever
given. New fields are added with defaults; a field is never renamed and never changes its meaning.
The position is not in the bytes: the tree binds it (leaf_index = position - 1).
"""

from datetime import UTC, datetime
from hashlib import sha256
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar, cast
from uuid import UUID

import msgspec
from msgspec import Meta, Struct, field

from ledger.errors import UpgradeRequired

ENTRY_BYTES_MAX = 60 * 1024
"""A larger event keeps its `data` beside the entry, which then carries its digest and length."""

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

# The envelope


F = TypeVar("F")


class Event(Struct, Generic[F], frozen=True, kw_only=True, omit_defaults=True):
    """One fact with everything an auditor relies on. Encoding it gives the entry."""

    v: Literal[1]
    project: str
    ledger: UUID
    event_id: UUID
    stream_type: str
    stream_id: UUID
    stream_version: int
    type: str
    schema_version: int
    occurred_at: Stamp
    recorded_at: Stamp
    actor: Actor
    command_id: str
    correlation_id: str
    data: F
    session_id: UUID | None = None
    root_session_id: UUID | None = None
    causation_id: UUID | None = None
    traceparent: str | None = None
    external_id: str | None = None
    refs: tuple[Ref, ...] = ()
    reason: Any = None


class Recorded(NamedTuple):
    """An event in its place: `position` is dense from 1 within its ledger."""

    position: int
    event: Event[Fact]


_encoder = msgspec.json.Encoder(order="sorted")
_decoders: dict[str, msgspec.json.Decoder[Any]] = {
    name: msgspec.json.Decoder(cast("Any", Event)[fact]) for name, fact in FACTS.items()
}
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


class _Kind(Struct):
    type: str
    schema_version: int


_kind = msgspec.json.Decoder(_Kind)


def canonical(value: Any) -> bytes:
    """`value` as JSON with sorted keys and no white space: the form everything stored or hashed has."""
    return _encoder.encode(value)


def encode(event: Event[Any]) -> tuple[bytes, bytes | None]:
    """The entry of `event`, and its payload where the data is too large to stand inside it."""
    entry = _encoder.encode(event)
    if len(entry) <= ENTRY_BYTES_MAX:
        return entry, None
    fields = _fields.decode(entry)
    payload = bytes(fields.pop("data"))
    digest = {"data_sha256": sha256(payload).hexdigest(), "data_bytes": len(payload)}
    return _encoder.encode(fields | digest), payload


def whole(entry: bytes, payload: bytes | None) -> bytes:
    """The event with its data inside, whether or not the data is kept beside the entry.

    Raises ValueError when the payload is not the one the entry was hashed with.
    """
    if payload is None:
        return entry
    fields: dict[str, Any] = dict(_fields.decode(entry))
    if bytes(fields.pop("data_sha256", b"")).strip(b'"').decode() != sha256(payload).hexdigest():
        raise ValueError("this payload is not the one its entry carries the digest of")
    del fields["data_bytes"]
    return _encoder.encode(fields | {"data": msgspec.Raw(payload)})


def decode(entry: bytes, payload: bytes | None = None, event_type: str | None = None) -> Event[Fact]:
    """The event behind stored bytes. `event_type`, where the caller knows it, saves reading the entry twice.

    Raises UpgradeRequired for a type or schema version that this release does not know: skipping one
    would make every state after it wrong.
    """
    text = whole(entry, payload)
    kind = event_type or _kind.decode(text).type
    decoder = _decoders.get(kind)
    if decoder is None:
        raise UpgradeRequired(type=kind, schema_version=_kind.decode(text).schema_version)
    try:
        event: Event[Fact] = decoder.decode(text)
    except msgspec.ValidationError:
        seen = _kind.decode(text).schema_version
        if seen > FACTS[kind].schema_version:
            raise UpgradeRequired(type=kind, schema_version=seen) from None
        raise
    if event.schema_version > FACTS[kind].schema_version:
        raise UpgradeRequired(type=kind, schema_version=event.schema_version)
    return event


def leaf_hash(entry: bytes) -> bytes:
    """RFC 6962 s2.1: SHA-256(0x00 || entry)."""
    return sha256(b"\x00" + entry).digest()
