"""Terms: what an event is found by, and what a search asks for.

Every filter is a term (`type:SessionOpened`, `session:<id>`) and so is every word of the text; a search is the
events that have all of its terms (`segments.py`). A sealed value gives no term, ever.
"""

import re
from collections.abc import Iterator
from functools import cache, lru_cache
from hashlib import blake2b
from typing import Any, TypeAlias
from unicodedata import normalize
from uuid import UUID

from msgspec import Struct

from ledger.entry import Event
from ledger.errors import MalformedRequest
from ledger.events import Fact
from ledger.personal import ERASED, SEALED

TEXT_CHARACTERS_MAX = 64 * 1024
"""How much of an event's text is searchable."""

WORD_CHARACTERS_MAX = 64
"""A longer one is kept in pieces, and looked for in pieces."""

QUERY_WORDS_MAX = 32
TERM_BYTES_MAX = 2000
"""PostgreSQL's lexemes have 2,046 bytes at most."""

OF_THE_SESSION = b"^session"
"""The term of an event whose stream is its session: that has no term of its own."""

_uuid = re.compile(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LETTERS = bytes(ord(chr(code).lower()) if chr(code).isalnum() else ord(" ") for code in range(128)).ljust(256)
# Chinese and Japanese put no spaces between words: there each character is one.
_UNSPACED = "\u2e80-\u9fff\uf900-\ufaff"
_words = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_TIMES = frozenset({"started_at", "ended_at", "expires_at", "deadline"})

Condition: TypeAlias = tuple[tuple[bytes, ...], ...]
"""Sets of terms, of which an event must have one whole."""

# From an event to its terms


def words(text: str) -> set[bytes]:
    """The words of `text`, as they are stored and looked for: runs of letters and digits.

    Case, and forms of one letter, do not matter.
    """
    if text.isascii():
        found = set(text.encode().translate(_LETTERS).split())
    else:
        text = normalize("NFKC", normalize("NFKC", text).casefold())[:TEXT_CHARACTERS_MAX]
        found = {word.encode() for word in _words.findall(text)}
    if len(max(found, key=len, default=b"")) > WORD_CHARACTERS_MAX:
        found = {piece for word in found for piece in _pieces(word.decode())}
    return found


def _pieces(word: str) -> Iterator[bytes]:
    for at in range(0, len(word), WORD_CHARACTERS_MAX):
        yield word[at : at + WORD_CHARACTERS_MAX].encode()


def term(kind: str, value: str) -> bytes:
    """The term of one value; where that is too long for the index, its digest stands for it."""
    encoded = f"{kind}:{value}".replace("\0", "\ufffd").encode()
    if len(encoded) <= TERM_BYTES_MAX:
        return encoded
    return f"{kind}:{blake2b(encoded, digest_size=32).hexdigest()}".encode()


common_term = lru_cache(1000)(term)
"""As `term`, of a value that many events have."""


def id_term(kind: str, value: UUID) -> bytes:
    """The term of one id."""
    return f"{kind}:{value.hex}".encode()


def event_terms(event: Event[Fact]) -> list[bytes]:
    """What every event is found by, whatever it says: whose it is, what it is about."""
    terms = [common_term("actor", event.actor.sub), _principal(event.actor.issuer, event.actor.sub)]
    if event.session_id is not None:
        terms.append(id_term("session", event.session_id))
    if event.refs:
        terms += [term("ref", f"{ref.type}:{ref.id}") for ref in event.refs]
    return terms


@lru_cache(1000)
def _principal(issuer: str, sub: str) -> bytes:
    return term("principal", f"{issuer}#{sub}")


def place_terms(event: Event[Fact]) -> list[bytes]:
    """Which history an event is part of, what it is, what led to it: these too every event is found by."""
    correlation = term("correlation", event.correlation_id)
    if event.stream_id == event.session_id:
        return [common_term("type", event.type), correlation, OF_THE_SESSION]
    return [common_term("type", event.type), correlation, id_term("stream", event.stream_id)]


def event_words(event: Event[Fact]) -> set[bytes]:
    """The words of all that may be searched: ids, and every string in what it says that is not sealed."""
    data = event.data
    values: list[Any] = [getattr(data, name) for name in _said(type(data))]
    values += [event.external_id, event.reason, *event.refs, *getattr(data, "labels", ())]
    texts: list[str] = [event.type, event.actor.sub]
    # Most are UUIDs, each of which is kept as one word; that of the correlation is found by its term.
    whole = event.command_id.encode()
    if not _uuid.fullmatch(whole):
        texts.append(event.command_id)
        whole = b""
    if not _uuid.fullmatch(event.correlation_id.encode()):
        texts.append(event.correlation_id)
    for value in values:  # it grows as we go: what lies near the surface comes first, however deep the rest
        kind = type(value)
        if kind is str:
            texts.append(value)
        elif value is None:
            pass
        elif kind is dict:
            if SEALED not in value and ERASED not in value:
                values += value.values()
        elif kind is list or kind is tuple:
            values += value
        elif isinstance(value, Struct):
            values += [getattr(value, name) for name in value.__struct_fields__]
    found = words("\n".join(texts)[:TEXT_CHARACTERS_MAX])
    if whole:
        found.add(whole)
    return found


@cache
def _said(kind: type[Fact]) -> tuple[str, ...]:
    return tuple(name for name in kind.__struct_fields__ if name not in _TIMES)


# What a search asks for: conditions, of which an event must fulfil all


def has(kind: str, value: str | UUID) -> Condition:
    """That an event has this term."""
    return ((id_term(kind, value) if isinstance(value, UUID) else term(kind, value),),)


def has_stream(stream_id: UUID) -> Condition:
    """That an event is part of the history of this."""
    return (id_term("stream", stream_id),), (id_term("session", stream_id), OF_THE_SESSION)


def has_actor(actor: str) -> Condition:
    """That this actor did it: `sub`, or `issuer#sub` (an issuer has no `#`)."""
    return has("actor", actor) + has("principal", actor)


def has_words(text: str) -> list[Condition]:
    """That an event has every word of `text`, in any order; a UUID may also be one it belongs to.

    Whatever `text` is, it is plain words. Raises MalformedRequest where it has none, or too many.
    """
    ids = {match.group() for match in _uuid.finditer(text.lower().encode())}
    found = words(text)
    if not 1 <= len(found) <= QUERY_WORDS_MAX:
        detail = f"it has {len(found)} different words (letters and digits); 1 to {QUERY_WORDS_MAX} are possible"
        raise MalformedRequest([{"pointer": "q", "detail": detail}])
    found -= {part for name in ids for part in words(name.decode())}
    return [*map(_has_id, sorted(ids)), *(((word,),) for word in sorted(found))]


def _has_id(name: bytes) -> Condition:
    value = UUID(name.decode())
    named = (term("correlation", str(value)), id_term("session", value), id_term("stream", value))
    return (name,), *((one,) for one in named), tuple(sorted(words(str(value))))
