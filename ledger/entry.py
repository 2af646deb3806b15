"""The envelope of every event, and the exact bytes it is stored as.

An entry is format 1: JSON, keys sorted, no white space, absent values left out, UTF-8 unescaped, times
as fixed-width UTC. It is encoded once, inside the append, and never again: the leaf hash (RFC 6962 s2.1)
is over these very bytes, so a change of field order or number form here would break every proof ever
given. The position is not in the bytes: the tree binds it (leaf_index = position - 1).
"""

from hashlib import sha256
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast
from uuid import UUID

import msgspec
from msgspec import Struct

from ledger import log_events, view_events  # noqa: F401  (what they define are facts too)
from ledger.errors import UpgradeRequired
from ledger.events import Fact
from ledger.values import Actor, Ref, Stamp

ENTRY_BYTES_MAX = 60 * 1024
"""A larger event keeps its `data` beside the entry, which then carries its digest and length."""

FACTS: dict[str, type[Fact]] = {cls.__name__: cls for cls in Fact.__subclasses__()}
"""Every fact, by the type of its event."""

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
