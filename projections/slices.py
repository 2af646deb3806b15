"""One slice of a project's part of a view: what the ledger has of it, and what the view has, both in one order.

Of streams it is those from one on that had begun at a position, as they are now; of single events, those from one on up
to a position. Whatever was done to the rows, they are read in their order, and none is missed but what came since.
"""

import struct
from bisect import bisect_left
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple
from uuid import UUID

from ledger.entry import FACTS
from ledger.postgres import Connection, queries
from ledger.store import Stored
from projections.projector import in_schema, view_of
from projections.replay import Row

SQL = queries("projections", "slices")

READ_ROWS = 20
READ_SEGMENTS = 2
"""At a time: of the largest events that is 20 MiB. A process that has other things to do, such as bringing views to
where their ledgers are, is kept from them for a few milliseconds at a time."""

PLACES_MAX = 2**14
"""More positions than one row of an index, whatever was done to it, can say something of."""


class Slice(NamedTuple):
    """From where on (a stream, or an event), of what there was as of `position`, in a view that has `reached` further.

    `last` is no stream less than the last one that there was then.
    """

    ledger_id: UUID
    start: Any
    position: int
    reached: int
    last: UUID

    def is_new(self, position: int) -> bool:
        """Whether what began there is left to the next proof: else one could go on for as long as its ledger does."""
        return self.position < position <= self.reached


async def groups(
    connection: Connection, stream_type: str | None, part: Slice
) -> AsyncGenerator[tuple[Any, list[Stored]]]:
    """What rows are made of, in order: the events of each stream as it is now, or each event up to the position."""
    types = [name for name, fact in FACTS.items() if fact.stream_type == stream_type]
    query = SQL.events if stream_type is None else SQL.streams
    key, events = None, list[Stored]()
    async with connection.cursor("replayed") as cursor:
        cursor.itersize = READ_ROWS
        await cursor.execute(query, {**part._asdict(), "types": types}, binary=True)
        async for begins, *row in cursor:
            if begins != key and events:
                yield key, events
                events = []
            key = begins
            if events or not part.is_new(row[0]):
                events.append(Stored(*row))
    if events:
        yield key, events


async def rows(
    connection: Connection, schema: str, table: str, part: Slice
) -> AsyncGenerator[tuple[Sequence[str], Row]]:
    """The rows of a table from where the slice starts, with the names of its columns."""
    sql = getattr(SQL, table)
    if table in ("segments", "spans"):  # the same in several views
        sql = sql.replace(b"FROM view.", b"FROM %b." % view_of(schema).encode())
    async with connection.cursor(f"stored_{table}") as cursor:
        cursor.itersize = READ_SEGMENTS if table == "segments" else READ_ROWS
        await cursor.execute(in_schema(sql, schema), {**part._asdict(), "places_max": PLACES_MAX}, binary=True)
        if table == "segments":
            async for said in _of_segments(cursor, part):
                yield ("position", "recorded_at", "terms"), said
            return
        columns = [column.name for column in cursor.description or ()]
        began = columns.index("position")
        async for row in cursor:
            if row[0] >= part.start and not part.is_new(row[began]):
                yield columns, tuple(tuple(value) if isinstance(value, list) else value for value in row)


async def _of_segments(segments: AsyncIterator[Row], part: Slice) -> AsyncIterator[Row]:
    """What segments say of each event, in the order of these, whatever was done to the segments."""
    waiting: list[Row] = []
    async for segment in segments:
        before = bisect_left(waiting, segment[0], key=itemgetter(0))
        for said in waiting[:before]:
            yield said
        new = (said for said in _of_segment(*segment) if said[0] >= part.start)
        new = (said for said in new if not part.is_new(said[0]))
        waiting = sorted([*waiting[before:], *new], key=itemgetter(0))
    for said in waiting:
        yield said


def _of_segment(first: int, recorded_ats: list[str], vector: bytes) -> Iterator[Row]:
    """What a segment says of each event that has terms: `tsvectorsend` gives each lexeme up to a NUL, the number of
    its places, and these, with a weight in the upper two bits. Those without a place are the whole segment's."""
    everywhere: list[str] = []
    terms: dict[int, list[str]] = defaultdict(list)
    at = 4
    while at < len(vector):
        end = vector.index(b"\0", at)
        name = vector[at:end].decode("utf-8", "replace")
        (count,) = struct.unpack_from(">H", vector, end + 1)
        if not count:
            everywhere.append(name)
        for place in struct.unpack_from(f">{count}H", vector, end + 3):
            terms[place & 0x3FFF].append(name + ("", "C", "B", "A")[place >> 14])
        at = end + 3 + 2 * count
    times = dict(enumerate(recorded_ats, 1))
    for place in sorted(terms):
        yield first + place - 1, times.get(place), tuple(sorted(terms[place] + everywhere))
