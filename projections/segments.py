"""Segments: an inverted index of what events are found by, and finding them newest or oldest first.

A segment is a row: up to 256 events that stand in a row, and for each of their terms which of them have it, as a
`tsvector` whose positions are the events. So what is common to many events is written, sorted and indexed once
for all of them. PostgreSQL keeps its index of the segments unordered, across ledgers: each also has a term for
its ledger and for each span of positions it lies in, and a search asks for the nearest span first. A frequent
term is then found in a short span, a rare one costs only its own hits.
"""

import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import groupby
from typing import Literal, NamedTuple
from uuid import UUID

from psycopg import sql

from ledger.entry import Event, Recorded
from ledger.events import Fact
from ledger.postgres import Connection, Tsvectors, bigints, queries, texts
from projections.terms import Condition

SEGMENT_BITS = 8
"""Segments end where a block of 2^8 positions does: a lexeme has 256 positions at most."""

SEGMENT_BYTES_MAX = 512 * 1024
"""Of several events; one alone is always less than a tsvector's limit of 1 MiB."""

SPAN_BITS = (10, 15, 20)
"""Spans of 2^10, 2^15 and 2^20 positions: what one search may find too much of is 32 times what it needs."""

COUNTED = (b"type:", b"principal:")
"""Terms that facets count: read with what is found, where that is to be counted."""

EVERY = b"*"
"""The term that every event has."""

Order = Literal["asc", "desc"]

_length = struct.Struct(">i").pack
_count = struct.Struct(">H").pack
# An event in a segment is a lexeme's position, from 1, in the low 14 bits; above them is its weight, B for COUNTED.
_PLACES = [_count(place) for place in range(1, 257)]
_PLACE, _WEIGHT_B = 0x3FFF, 0x8000

# From events to segments


def pack(
    ledger_id: UUID, batch: Sequence[Recorded], terms_of: Callable[[Event[Fact]], set[bytes]]
) -> tuple[bytes, bytes, bytes]:
    """The segments of `batch`, of one ledger, as columns: first position, times of all events from there on, terms.

    An event without terms is in no segment, though its time may be.
    """
    rows: list[tuple[int, str, bytes]] = []
    for _, block in groupby(batch, lambda recorded: recorded.position >> SEGMENT_BITS):
        events = list(block)
        rows += _rows(ledger_id, events, [terms_of(event) for _, event in events])
    firsts, times, vectors = zip(*rows, strict=True) if rows else ((), (), ())
    return bigints(firsts), texts(times), _tsvectors(vectors)


def _rows(ledger_id: UUID, events: list[Recorded], found: list[set[bytes]]) -> list[tuple[int, str, bytes]]:
    places: dict[bytes, list[bytes]] = defaultdict(list)
    for place, terms in zip(_PLACES, found, strict=False):
        if terms:
            places[EVERY].append(place)
        for term in terms:
            places[term].append(place)
    if not places:
        return []
    position = events[0].position
    vector = _vector(places, _place(ledger_id, position >> SPAN_BITS[0]))
    if len(vector) > SEGMENT_BYTES_MAX and len(events) > 1:
        middle = len(events) // 2
        first, second = (events[:middle], found[:middle]), (events[middle:], found[middle:])
        return _rows(ledger_id, *first) + _rows(ledger_id, *second)
    return [(position, f"{{{','.join([event.recorded_at for _, event in events])}}}", vector)]


def _vector(places: dict[bytes, list[bytes]], spans: Sequence[bytes]) -> bytes:
    """As PostgreSQL receives one: each lexeme up to a NUL, the number of its positions, these (`tsvectorrecv`)."""
    parts = [_length(len(places) + len(spans))]
    for term, at in places.items():
        if term.startswith(COUNTED):
            at = [_count(place | _WEIGHT_B) for place in _unpacked(b"".join(at))]
        parts += (term, b"\0", _count(len(at)), *at)
    for term in spans:
        parts += (term, b"\0\0\0")
    return b"".join(parts)


def _unpacked(places: bytes) -> tuple[int, ...]:
    return struct.unpack(f">{len(places) // 2}H", places)


def _tsvectors(vectors: Sequence[bytes]) -> Tsvectors:
    head = struct.pack(">iiiii", 1, 0, 3614, len(vectors), 1)
    return Tsvectors(head + b"".join([_length(len(vector)) + vector for vector in vectors]))


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


# From conditions to what fulfils them


class Found(NamedTuple):
    """What was found in one segment: positions in the order asked for, and how many of them have each counted term."""

    positions: list[int]
    counts: dict[bytes, int]


class Index:
    """The inverted index that one view's segments are."""

    def __init__(self, schema: str) -> None:
        name = sql.Identifier(schema, "segments")
        self._sql = {
            (query, order): sql.SQL(text.decode()).format(table=name, direction=sql.SQL(order)).as_bytes()
            for query, text in vars(queries("projections", "segments")).items()
            for order in ("asc", "desc")
        }

    async def search(
        self,
        connection: Connection,
        ledger_id: UUID,
        conditions: Sequence[Condition],
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        after: int | None = None,
        limit: int,
        order: Order,
        counting: bool = False,
    ) -> AsyncIterator[Found]:
        """Up to `limit` events, beyond `after` in this order, where all conditions hold; with counts, if `counting`.

        `since` is inclusive and `until` exclusive, on the time of recording. Costs at most four look-ups, each of
        which finds some 64 times `limit` at most, unless what is looked for is unevenly spread.
        """
        first = await self._bound(connection, "end_before", ledger_id, since) if since else 1
        end = await self._bound(connection, "end_before" if until else "end", ledger_id, until)
        if after is not None:
            first, end = (max(first, after + 1), end) if order == "asc" else (first, min(end, after))
        conditions = conditions or [((EVERY,),)]
        for stretch in _stretches(ledger_id, first, end, order):
            values = {
                "ledger_id": ledger_id,
                "query": f"{stretch.span} & {_query(conditions)}",
                "asked": texts({term.decode() for condition in conditions for terms in condition for term in terms}),
                "weights": "{a,b}" if counting else "{a}",
                "first": stretch.first,
                "end": stretch.end,
                "limit": limit + 2,  # of the two at the ends of the stretch, what is found may lie outside
            }
            cursor = await connection.execute(self._sql["find", order], values, prepare=True, binary=True)
            for at, vector in await cursor.fetchall():
                found = _found(at, vector, conditions, stretch, limit, order)
                limit -= len(found.positions)
                yield found
                if not limit:
                    return

    async def _bound(self, connection: Connection, name: str, ledger_id: UUID, time: datetime | None) -> int:
        values = {"ledger_id": ledger_id, "time": time}
        row = await (await connection.execute(self._sql[name, "asc"], values, prepare=True)).fetchone()
        assert row is not None
        return int(row[0])


def _query(conditions: Sequence[Condition]) -> str:
    """The tsquery of an event that fulfils all: terms at one position, which is at a distance of 0."""
    alternatives = [[" <0> ".join(map(_quoted, terms)) for terms in condition] for condition in conditions]
    return " <0> ".join([f"(({') | ('.join(sets)}))" for sets in alternatives])


def _quoted(lexeme: bytes) -> str:
    escaped = lexeme.decode().replace("\\", "\\\\").replace("'", "''")
    return f"'{escaped}'"


def _found(
    first: int, vector: bytes, conditions: Sequence[Condition], stretch: "Stretch", limit: int, order: Order
) -> Found:
    places = _read(vector)
    nowhere: set[int] = set()
    fulfilled = [
        set().union(*(set.intersection(*(places.get(term, nowhere) for term in terms)) for terms in condition))
        for condition in conditions
    ]
    inside = range(stretch.first - first + 1, stretch.end - first + 1)
    here = [place for place in sorted(set.intersection(*fulfilled), reverse=order == "desc") if place in inside][:limit]
    counts = {term: len(at.intersection(here)) for term, at in places.items() if term.startswith(COUNTED)}
    return Found([first + place - 1 for place in here], counts)


def _read(vector: bytes) -> dict[bytes, set[int]]:
    """The places of each term, from what `_vector` is the form of."""
    places: dict[bytes, set[int]] = {}
    at = 4
    while at < len(vector):
        end = vector.index(b"\0", at)
        (count,) = struct.unpack_from(">H", vector, end + 1)
        begin, after = end + 3, end + 3 + 2 * count
        places[vector[at:end]] = {place & _PLACE for place in _unpacked(vector[begin:after])}
        at = after
    return places


class Stretch(NamedTuple):
    """Part of a ledger, from `first` to before `end`; `span` is the condition of lying in it, or around it."""

    span: str
    first: int
    end: int


def _stretches(ledger_id: UUID, first: int, end: int, order: Order) -> Iterator[Stretch]:
    """The ledger from `first` to before `end` in this order, in ever longer stretches."""
    ledger = _ledger(ledger_id)
    for bits in SPAN_BITS:
        if first >= end:
            return
        # Two spans, this one and the next, since this one may be all but behind us.
        number, step = (first >> bits, 1) if order == "asc" else ((end - 1) >> bits, -1)
        span = f"('{_span(ledger, bits, number)}' | '{_span(ledger, bits, number + step)}')"
        if order == "asc":
            middle = min(end, (number + 2) << bits)
            yield Stretch(span, first, middle)
            first = middle
        else:
            middle = max(first, (number - 1) << bits)
            yield Stretch(span, middle, end)
            end = middle
    if first < end:
        yield Stretch(f"'{ledger}'", first, end)
