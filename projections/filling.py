"""A build of a view, filled from the ledger as it stood when that began.

For a view of states that is done stream by stream, so that each row is made of all that is known of it and written
once, where it belongs; for a view of single events, position by position. In both, rows are made by the view's own
code, and saved with the place they reach to: killed anywhere, it goes on from there. Meanwhile a build's position says
how many events are taken, in whichever order. From where it is filled to, and past what it cannot take, the projector
goes on.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.errors import DuplicateTable, UniqueViolation

from ledger.entry import FACTS, Recorded
from ledger.postgres import Connection, Pool, Statement, bigint, bigints, fetch, queries, texts, uuid
from ledger.store import Stored
from projections import VIEWS
from projections.projector import BATCH_BYTES_MAX, TROUBLE, Gap, Memory, Overtaken, in_schema, view_of
from projections.projector import SQL as PROJECTOR
from projections.replay import DEFINITIONS

log = logging.getLogger(__name__)

SQL = queries("projections", "filling")
_boundary = Statement("boundary", SQL.boundary)
_count = Statement("count", SQL.count)
_payload = Statement("payload", SQL.payload)

FILL_EVENTS = 2048
"""Looked at, at a time; of the single events they are eight whole segments."""

FILLED = UUID(int=2**128 - 1)
"""Stands where a stream would at the end of the ledger: after all of them."""

BESIDE = b'"data_sha256":'
"""An entry without it has its data inside."""

LOOK_SECONDS = 0.2

REST = 2.0
"""While anybody writes, it rests for as long as it worked, times this."""

T = TypeVar("T")


class Place(NamedTuple):
    """How far a ledger is filled, of what it has up to the position `upto`: so many events are taken, in the order of
    streams up to this one; FILLED at the end."""

    ledger_id: UUID
    taken: int
    upto: int
    stream_id: UUID
    stream_version: int


class Batch(NamedTuple):
    """The next events that say something to the view (position, type, entry), and where they lead."""

    rows: list[tuple[int, str, bytes]]
    reached: Place


class _Refused(Exception):
    """The ledger has an event that the view cannot take."""


class Filling:
    """Fills the build in `schema`, unless that is done."""

    def __init__(self, pool: Pool, schema: str) -> None:
        name = view_of(schema)
        stream_type = DEFINITIONS[name].stream_type
        self._pool = pool
        self._schema = schema
        self._names = {"schema": schema, "view": name}
        self._view = VIEWS[name]
        self._types = [name for name, fact in FACTS.items() if fact.stream_type == stream_type]
        self._read = Statement("fill", SQL.streams if self._types else SQL.events)
        writes = PROJECTOR.advance, self._sql(SQL.moved), b", ", in_schema(self._view.WRITE, schema), PROJECTOR.advanced
        self._write = Statement("filled", b"".join(writes))
        self._move = Statement("moved", b"".join([PROJECTOR.advance, self._sql(SQL.moved), PROJECTOR.advanced]))
        self._number = 0
        self._others_write = False

    def _sql(self, query: bytes) -> bytes:
        return sql.SQL(query.decode()).format(filling=sql.Identifier(self._schema, "filling")).as_bytes()

    async def begin(self) -> None:
        """Fix what is to be filled, as far as that is not done."""
        # Else by another process, which has not heard yet that it lost the job.
        with suppress(DuplicateTable, UniqueViolation):
            async with self._pool.connection() as connection, connection.transaction():
                await connection.execute(self._sql(SQL.begin))
                await connection.execute(self._sql(SQL.ledgers), self._names)

    async def run(self) -> None:
        """Raises whatever of TROUBLE the database has."""
        await self.begin()
        looking = asyncio.ensure_future(self._look())
        try:
            while places := await self._places():
                for place in places:
                    await self._fill(place)
        finally:
            looking.cancel()
        async with self._pool.connection() as connection:
            await connection.execute(self._sql(SQL.filled))

    async def _places(self) -> list[Place]:
        async with self._pool.connection() as connection:
            ((self._number,),) = await fetch(connection, SQL.number, **self._names)
            return [Place(*row) for row in await fetch(connection, self._sql(SQL.places), **self._names)]

    async def _fill(self, place: Place) -> None:
        """Fill it as far as it can be; where not to the end, leave the rest to the projector."""
        try:
            async with self._pool.connection() as reader, self._pool.connection() as writer:
                await self._go_on(reader, writer, place)
        except Overtaken:
            pass  # another process is at it too, which has not heard yet that it lost the job; we look again
        except _Refused as refused:
            log.warning("ledger %s cannot be filled as a whole: %s", place.ledger_id, refused.__cause__)
            await self._give_up(place.ledger_id)

    async def _go_on(self, reader: Connection, writer: Connection, place: Place) -> None:
        """Batch after batch: while one is made into rows, the one before is written, and the next one is read."""
        memory = Memory(self._schema)
        loop = asyncio.get_running_loop()
        reading = await _begun(self._next(reader, place))
        writing = await _begun(asyncio.sleep(0))
        try:
            while place.stream_id != FILLED:
                began = loop.time()
                with _refusing():
                    batch = await asyncio.shield(reading)
                    if batch.reached.stream_id != FILLED:
                        reading = await _begun(self._next(reader, batch.reached))
                    async for events, reached in self._decoded(place, batch):
                        await asyncio.shield(writing)  # what is projected next may have to read what this wrote
                        rows = await self._view.project(writer, place.ledger_id, events, memory) if events else {}
                        writing = await _begun(self._save(writer, place, reached, rows))
                        place = reached
                await self._rest(loop.time() - began)
            with _refusing():
                await asyncio.shield(writing)
        finally:
            # They end in a moment; cut short, they would cost the connection.
            await asyncio.gather(reading, writing, return_exceptions=True)

    async def _next(self, connection: Connection, place: Place) -> Batch:
        """What comes after `place`. Raises Gap."""
        values: dict[str, bytes] = {"ledger_id": uuid(place.ledger_id), "upto": bigint(place.upto)}
        if not self._types:
            last = min(place.taken + FILL_EVENTS, place.upto)
            values |= {"after": bigint(place.taken), "last": bigint(last)}
            rows = await asyncio.to_thread(self._read.fetch_blocking, connection, values)
            if len(rows) < last - place.taken:
                raise Gap(f"not all events from {place.taken + 1} to {last} are there")
            return Batch(rows, place._replace(taken=last, stream_id=place.stream_id if last < place.upto else FILLED))
        values |= {"stream_id": uuid(place.stream_id), "stream_version": bigint(place.stream_version)}
        found = await _boundary.fetch(connection, values | {"offset": bigint(FILL_EVENTS - 1)})
        last_id, last_version = found[0] if found else (FILLED, 0)
        values |= {"last_id": uuid(last_id), "last_version": bigint(last_version), "types": texts(self._types)}
        rows = await asyncio.to_thread(self._read.fetch_blocking, connection, values)
        if found:
            return Batch(rows, Place(place.ledger_id, place.taken + FILL_EVENTS, place.upto, last_id, last_version))
        if await _count.fetch(connection, values) != [(place.upto,)]:
            raise Gap(f"not all events up to {place.upto} are there")
        return Batch(rows, place._replace(taken=place.upto, stream_id=FILLED))

    async def _decoded(self, place: Place, batch: Batch) -> AsyncIterator[tuple[list[Recorded], Place]]:
        """The events of a batch, in parts where they are large, and where each part leads."""
        events: list[Recorded] = []
        size = 0
        for number, (position, kind, entry) in enumerate(batch.rows, 1):
            payload = await self._payload(place.ledger_id, position) if BESIDE in entry else None
            recorded = Stored(position, kind, entry, payload).decode()
            events.append(recorded)
            size += len(entry) + len(payload or b"")
            if size > BATCH_BYTES_MAX and number < len(batch.rows):
                last = recorded.event
                yield (
                    events,
                    Place(place.ledger_id, place.taken + number, place.upto, last.stream_id, last.stream_version),
                )
                events, size = [], 0
        yield events, batch.reached

    async def _payload(self, ledger_id: UUID, position: int) -> bytes | None:
        async with self._pool.connection() as connection:
            values = {"ledger_id": uuid(ledger_id), "position": bigint(position)}
            found = await _payload.fetch(connection, values)
            return found[0][0] if found else None

    async def _save(self, connection: Connection, place: Place, reached: Place, rows: dict[str, bytes]) -> None:
        values = {
            "ledger_id": uuid(place.ledger_id),
            "views": texts([self._schema]),
            "schemas": bigints([self._number]),
            "expected": bigint(place.taken),
            "reached": bigint(reached.taken),
            "stream_id": uuid(reached.stream_id),
            "stream_version": bigint(reached.stream_version),
        }
        statement = self._write if rows else self._move
        # Dying before this commits leaves rows and place as they were; after it, both as they are.
        if await asyncio.to_thread(statement.fetch_blocking, connection, values | rows) != [(1,)]:
            raise Overtaken

    async def _give_up(self, ledger_id: UUID) -> None:
        """Leave a ledger to the projector: from where it is, but in the order of streams from the beginning."""
        values = {"ledger_id": ledger_id, "schema": self._schema, "anew": bool(self._types)}
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(self._sql(SQL.give_up), values)
            if self._types:
                for (table,) in await fetch(connection, SQL.names, **self._names):
                    table = sql.Identifier(self._schema, table)
                    await connection.execute(sql.SQL(SQL.empty.decode()).format(table=table), values)
                await connection.execute(SQL.from_the_beginning, values)

    # Giving way

    async def _look(self) -> None:
        while True:
            with suppress(*TROUBLE):
                self._others_write = await anybody_writes(self._pool)
            await asyncio.sleep(LOOK_SECONDS)

    async def _rest(self, seconds: float) -> None:
        if self._others_write:
            await asyncio.sleep(seconds * REST)


async def anybody_writes(pool: Pool) -> bool:
    """Whether any ledger grows, in a moment that this takes."""
    async with pool.connection() as connection:
        before = await fetch(connection, SQL.written)
    await asyncio.sleep(LOOK_SECONDS)
    async with pool.connection() as connection:
        return before != await fetch(connection, SQL.written)


@contextmanager
def _refusing() -> Iterator[None]:
    """Say what is not the database's trouble, but an event's, as _Refused."""
    try:
        yield
    except psycopg.errors.ProgramLimitExceeded as error:
        raise _Refused from error
    except (Overtaken, *TROUBLE):
        raise
    except Exception as error:
        raise _Refused from error


async def _begun(job: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """`job`, which has gone so far that it waits."""
    task = asyncio.ensure_future(job)
    await asyncio.sleep(0)
    return task
