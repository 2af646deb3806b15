"""Terms: what an event is found by, and finding it newest or oldest first however rare or common they are.

Every filter is a term (`type:SessionOpened`, `session:<id>`) and so is every word of the text; a search is the
events that have all of its terms, in one inverted index. PostgreSQL keeps such an index unordered, across
ledgers: so each event also has a term for its ledger and one for each of the spans it lies in, and a search
asks for the nearest span first. A frequent term is then found in a short span, a rare one costs only its own
hits. A sealed value gives no term, ever.
"""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache, lru_cache
from hashlib import blake2b
from typing import Any, Literal, NamedTuple
from unicodedata import normalize
from uuid import UUID

from msgspec import Struct
from psycopg import sql

from ledger.errors import MalformedRequest
from ledger.events import Event, Fact
from ledger.postgres import Connection, queries
from ledger.vault import ERASED, SEALED

TEXT_CHARACTERS_MAX = 64 * 1024
"""How much of an event's text is searchable."""

WORD_CHARACTERS_MAX = 64
"""A longer one is kept in pieces, and looked for in pieces."""

QUERY_WORDS_MAX = 32
TERM_BYTES_MAX = 512

SPAN_BITS = (10, 15, 20)
"""Spans of 2^10, 2^15 and 2^20 positions: what one search may find too much of is 32 times what it needs."""

_uuid = re.compile(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_BREAKS = bytes(code if chr(code).isalnum() else ord(" ") for code in range(128)).ljust(256)
# Chinese and Japanese put no spaces between words: there each character is one.
_UNSPACED = "\u2e80-\u9fff\uf900-\ufaff"
_words = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_TIMES = frozenset({"started_at", "ended_at", "expires_at", "deadline"})

Order = Literal["asc", "desc"]

# From an event to its terms


def words(text: str) -> set[bytes]:
    """The words of `text`, as they are stored and looked for: runs of letters and digits.

    Case, and forms of one letter, do not matter.
    """
    if text.isascii():
        found = set(text.lower().encode().translate(_BREAKS).split())
    else:
        text = normalize("NFKC", normalize("NFKC", text).casefold())[:TEXT_CHARACTERS_MAX]
        found = {word.encode() for word in _words.findall(text)}
    if len(max(found, key=len, default=b"")) > WORD_CHARACTERS_MAX:
        found = {piece for word in found for piece in _pieces(word.decode())}
    return found


def _pieces(word: str) -> Iterator[bytes]:
    for at in range(0, len(word), WORD_CHARACTERS_MAX):
        yield word[at : at + WORD_CHARACTERS_MAX].encode()


@lru_cache(10_000)
def term(kind: str, value: str | UUID) -> bytes:
    """The term of one value; where that is too long for the index, its digest stands for it."""
    encoded = f"{kind}:{value}".replace("\0", "\ufffd").encode()
    if len(encoded) <= TERM_BYTES_MAX:
        return encoded
    return f"{kind}:{blake2b(encoded, digest_size=32).hexdigest()}".encode()


def event_terms(ledger_id: UUID, position: int, event: Event[Fact]) -> set[bytes]:
    """What every event is found by, whatever it says: its place, whose it is, what it is about."""
    terms = {term("actor", event.actor.sub), term("issuer", event.actor.issuer)}
    terms.update(_place(ledger_id, position >> SPAN_BITS[0]))
    if event.session_id is not None:
        terms.add(term("session", event.session_id))
    if event.refs:
        terms.update([term("ref", f"{ref.type}:{ref.id}") for ref in event.refs])
    return terms


def event_words(event: Event[Fact]) -> set[bytes]:
    """The words of all that may be searched: ids, and every string in what it says that is not sealed."""
    data = event.data
    values: list[Any] = [getattr(data, name) for name in _said(type(data))]
    values += [event.external_id, event.reason, *event.refs, *getattr(data, "labels", ())]
    texts: list[str] = [event.type, event.actor.sub]
    whole: list[bytes] = []
    for name in (event.command_id, event.correlation_id):
        word = name.encode()  # most are UUIDs, each of which is kept as one word
        if _uuid.fullmatch(word):
            whole.append(word)
        else:
            texts.append(name)
    for value in values:  # it grows as we go: what lies near the surface comes first, however deep the rest
        kind = type(value)
        if kind is str:
            texts.append(value)
        elif kind is dict:
            if SEALED not in value and ERASED not in value:
                values += value.values()
        elif kind is list or kind is tuple:
            values += value
        elif isinstance(value, Struct):
            values += [getattr(value, name) for name in value.__struct_fields__]
    found = words("\n".join(texts)[:TEXT_CHARACTERS_MAX])
    found.update(whole)
    return found


@cache
def _said(kind: type[Fact]) -> tuple[str, ...]:
    return tuple(name for name in kind.__struct_fields__ if name not in _TIMES)


@lru_cache(1000)
def _place(ledger_id: UUID, smallest_span: int) -> tuple[bytes, ...]:
    """The terms of a ledger and of the spans that its smallest one lies in."""
    ledger = _ledger(ledger_id)
    spans = [_span(ledger, bits, smallest_span >> (bits - SPAN_BITS[0])) for bits in SPAN_BITS]
    return tuple(name.encode() for name in (ledger, *spans))


def _ledger(ledger_id: UUID) -> str:
    # Half of its random bits are enough: what is found is compared with the whole id.
    return f"^{ledger_id.hex[-12:]}"


def _span(ledger: str, bits: int, number: int) -> str:
    return f"{ledger}{bits}/{number:x}"


# From terms to what is found by them. A condition is a part of a tsquery.


def has(kind: str, value: str | UUID) -> str:
    """The condition that an event has this term."""
    return _quoted(term(kind, value).decode())


def has_actor(actor: str) -> str:
    """The condition that this actor did it: `sub`, or `issuer#sub` (an issuer has no `#`)."""
    issuer, _, sub = actor.partition("#")
    return f"({has('actor', actor)} | {has('issuer', issuer)} & {has('actor', sub)})"


def has_words(text: str) -> list[str]:
    """The conditions that an event has every word of `text`, in any order; a UUID may also be one it belongs to.

    Whatever `text` is, it is plain words. Raises MalformedRequest where it has none, or too many.
    """
    ids = {match.group() for match in _uuid.finditer(text.lower().encode())}
    found = words(text)
    if not 1 <= len(found) <= QUERY_WORDS_MAX:
        detail = f"it has {len(found)} different words (letters and digits); 1 to {QUERY_WORDS_MAX} are possible"
        raise MalformedRequest([{"pointer": "q", "detail": detail}])
    found -= {part for name in ids for part in words(name.decode())}
    return [*map(_has_id, sorted(ids)), *(_quoted(word.decode()) for word in sorted(found))]


def _has_id(name: bytes) -> str:
    parts = " & ".join([_quoted(part.decode()) for part in sorted(words(name.decode()))])
    named = [has(kind, name.decode()) for kind in ("stream", "session")]
    return f"({' | '.join([_quoted(name.decode()), *named, parts])})"


def _quoted(lexeme: str) -> str:
    escaped = lexeme.replace("\\", "\\\\").replace("'", "''")
    return f"'{escaped}'"


class Stretch(NamedTuple):
    """Part of a ledger, from `first` to before `end`; `span` is the condition of lying in it, or around it."""

    span: str
    first: int
    end: int


class Index:
    """The inverted index over one view's table."""

    def __init__(self, schema: str, table: str) -> None:
        name = sql.Identifier(schema, table)
        self._sql = {
            (query, order): sql.SQL(text.decode()).format(table=name, direction=sql.SQL(order)).as_bytes()
            for query, text in vars(queries("projections", "terms")).items()
            for order in ("asc", "desc")
        }

    async def search(
        self,
        connection: Connection,
        ledger_id: UUID,
        conditions: Sequence[str],
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        after: int | None = None,
        limit: int,
        order: Order,
    ) -> list[int]:
        """Up to `limit` positions, beyond `after` in this order, where all conditions hold.

        `since` is inclusive and `until` exclusive, on the time of recording. Costs at most four look-ups, each of
        which finds some 64 times `limit` at most, unless what is looked for is unevenly spread.
        """
        first, end = await self.bounds(connection, ledger_id, since, until)
        if after is not None:
            first, end = (max(first, after + 1), end) if order == "asc" else (first, min(end, after))
        if not conditions:
            return await self._positions(connection, "page", order, ledger_id, "", first, end, limit)
        found: list[int] = []
        for stretch in stretches(ledger_id, first, end, order):
            query = " & ".join([*conditions, stretch.span])
            found += await self._positions(
                connection, "find", order, ledger_id, query, stretch.first, stretch.end, limit - len(found)
            )
            if len(found) >= limit:
                break
        return found

    async def bounds(
        self, connection: Connection, ledger_id: UUID, since: datetime | None, until: datetime | None
    ) -> tuple[int, int]:
        """The first position recorded since one time, and one past the last before the other."""
        first = await self._bound(connection, "end_before", ledger_id, since) if since else 1
        end = await self._bound(connection, "end_before" if until else "end", ledger_id, until)
        return first, end

    async def _bound(self, connection: Connection, name: str, ledger_id: UUID, time: datetime | None) -> int:
        values = {"ledger_id": ledger_id, "time": time}
        row = await (await connection.execute(self._sql[name, "asc"], values, prepare=True)).fetchone()
        assert row is not None
        return int(row[0])

    async def _positions(
        self,
        connection: Connection,
        name: str,
        order: Order,
        ledger_id: UUID,
        query: str,
        first: int,
        end: int,
        limit: int,
    ) -> list[int]:
        values = {"ledger_id": ledger_id, "query": query, "first": first, "end": end, "limit": limit}
        cursor = await connection.execute(self._sql[name, order], values, prepare=True)
        return [row[0] for row in await cursor.fetchall()]


def stretches(ledger_id: UUID, first: int, end: int, order: Order) -> Iterator[Stretch]:
    """The ledger from `first` to before `end` in this order, in ever longer stretches."""
    ledger = _ledger(ledger_id)
    for bits in SPAN_BITS:
        if first >= end:
            return
        # Two spans, this one and the next, since this one may be all but behind us.
        number, step = (first >> bits, 1) if order == "asc" else ((end - 1) >> bits, -1)
        span = f"({_quoted(_span(ledger, bits, number))} | {_quoted(_span(ledger, bits, number + step))})"
        if order == "asc":
            middle = min(end, (number + 2) << bits)
            yield Stretch(span, first, middle)
            first = middle
        else:
            middle = max(first, (number - 1) << bits)
            yield Stretch(span, middle, end)
            end = middle
    if first < end:
        yield Stretch(_quoted(ledger), first, end)
