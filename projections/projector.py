"""The projector: the one loop that brings every view to the end of every ledger.

Woken by NOTIFY and, as the net, by looking now and then, it reads a ledger after the views' position, projects,
and saves the position in the transaction of the rows: killed anywhere, it goes on where the rows are. An event
that cannot be projected stops that ledger's part of that view, just before it, and nothing else. One projector
runs at a time (a lease sees to it), but nothing breaks where two do: a position moves only from where it was.
What a view makes of an event may not stand here.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import pairwise
from typing import Any, Protocol
from uuid import UUID

import psycopg
from msgspec import Struct

from ledger import news, postgres
from ledger.entry import Recorded
from ledger.postgres import Connection, Pool, Statement, bigint, bigints, queries, texts, uuid
from ledger.store import Stored
from ledger.telemetry import Projected
from ledger.tracing import Tracing

log = logging.getLogger(__name__)

SQL = queries("projections", "projector")
_read = Statement("read", SQL.read)

BATCH_EVENTS_MAX = 1000
BATCH_BYTES_MAX = 16 * 2**20
LEDGERS_AT_ONCE = 4
MEMORIES_MAX = 50
POLL_SECONDS = 0.1
RETRY_SECONDS = 1.0
RETRY_PARKED_SECONDS = 60.0

REST_SECONDS_MIN = 0.002
REST_SECONDS_MAX = 0.01
BUSY_EVENTS = 20
"""After a small batch a ledger rests for a moment, so that what was committed shows at once. After one of more than
BUSY_EVENTS it rests for as long as that took: what a batch costs besides its events is then paid less often, and half
of a core stays with those who wait for answers. But not for longer than a reader would notice: where others keep the
machine busy, a batch takes long without costing much."""

TROUBLE = (*postgres.TROUBLE, psycopg.ProgrammingError)
"""The database's trouble, not an event's: it is tried again, and nothing is parked. Also a schema, or rights, that are
not there yet."""


class Troubles:
    """What is wrong, by topic: logged when it begins or changes, not each time it is met."""

    def __init__(self, log: Callable[..., None]) -> None:
        self._log = log
        self._said: dict[object, str] = {}

    def say(self, topic: object, text: str, error: Exception | None = None) -> None:
        """Nothing is wrong where `text` is empty."""
        if self._said.pop(topic, "") != text and text:
            self._log(text, exc_info=error)
        if text:
            self._said[topic] = text


class Memory(dict[UUID, Any]):
    """What the view in `schema` remembers of a ledger so as not to read it again: true as of the last batch, or thrown
    away."""

    def __init__(self, schema: str) -> None:
        super().__init__()
        self.schema = schema


class View(Protocol):
    """What a view must offer to be projected.

    Its SQL names it before the dot of a table and in quotes, and nowhere else: see `in_schema`.
    """

    VERSION: int
    """Raised when the rows become other ones: then a worker builds the view again, aside (rebuild.py)."""

    WRITE: bytes
    """The parts of a WITH that write the view's rows: each from `advanced AS a` where `a.view` is its name. It says
    the type of every value."""

    async def project(
        self, connection: Connection, ledger_id: UUID, batch: Sequence[Recorded], memory: Memory
    ) -> dict[str, bytes]:
        """What brings the view from just before `batch` to just after it: the values of WRITE, packed, each named as
        no other view's; none where `batch` says nothing to it. May read what the view has, keep in `memory` what it is
        after the batch, and write nothing."""
        ...


def view_of(schema: str) -> str:
    """The view that a schema is a build of: `sessions` is that which is read, `sessions_next` one in the making."""
    return schema.partition("_")[0]


@cache
def in_schema(sql: bytes, schema: str) -> bytes:
    """A view's `sql`, about that build of it."""
    name = view_of(schema).encode()
    return re.sub(rb"\b%b(?=\.[a-z])|(?<=')%b(?=')" % (name, name), schema.encode(), sql)


class Overtaken(Exception):
    """A view is not where this projector believed, or not what it was: another has moved it, or it was switched."""


class Gap(Exception):
    """The ledger does not go on with the next position: an event is missing."""


class Place(Struct):
    """Where a view stands in a ledger. `schema` is the number of its schema, which it keeps whatever its name."""

    position: int
    parked: bool
    schema: int


class Projector:
    """Keeps `views` at the end of every ledger, each in the schema that is its key. See `run`."""

    def __init__(
        self,
        pool: Pool,
        views: Mapping[str, View],
        *,
        listen_to: str | None = None,
        tracing: Tracing | None = None,
        batch_events_max: int | None = None,
    ) -> None:
        self.projected = Projected(tracing)
        self._pool = pool
        self._views = views
        self._listen_to = listen_to
        self._batch_events_max = batch_events_max or BATCH_EVENTS_MAX
        self._places: dict[UUID, dict[str, Place]] = {}
        self._memories: dict[tuple[UUID, str], Memory] = {}
        # A ledger is here while it waits, is worked on, or rests; True: it grew since it was last read.
        self._busy: dict[UUID, bool] = {}
        self._waiting: asyncio.Queue[UUID] = asyncio.Queue()
        self._look = asyncio.Event()
        self._writes: dict[tuple[str, ...], Statement] = {}
        self._say = Troubles(log.error).say

    async def run(self) -> None:
        """Until cancelled; it may be run again. `listen_to`, a connection string without a pooler between, only makes
        it quicker."""
        self._places.clear()  # others may have moved them since
        self._memories.clear()
        self._busy.clear()
        self._waiting = asyncio.Queue()
        async with asyncio.TaskGroup() as jobs:
            jobs.create_task(self._poll())
            jobs.create_task(self._retry_parked())
            if self._listen_to:
                jobs.create_task(self._listen(self._listen_to))
            for _ in range(LEDGERS_AT_ONCE):
                jobs.create_task(self._work())

    # Which ledgers

    def _wake(self, ledger_id: UUID) -> None:
        if ledger_id in self._busy:
            self._busy[ledger_id] = True
        else:
            self._busy[ledger_id] = False
            self._waiting.put_nowait(ledger_id)

    async def _listen(self, conninfo: str) -> None:
        async for ledger_id in news.announced(conninfo):
            if ledger_id is None:
                self._look.set()  # what was announced while nobody listened
            else:
                self._wake(ledger_id)

    async def _poll(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._look.clear()
            began = loop.time()
            try:
                for (ledger_id,) in await self._fetch(SQL.behind):
                    self._wake(ledger_id)
                self._say("database", "")
                # Where there are very many ledgers, looking costs: then it is done less often.
                pause = max(POLL_SECONDS, 20 * (loop.time() - began))
            except TROUBLE as error:
                self._say("database", f"the database cannot be read: {error}")
                pause = RETRY_SECONDS
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):  # wait_for may lose a cancellation
                    await self._look.wait()

    async def _retry_parked(self) -> None:
        while True:
            with suppress(*TROUBLE):
                for (ledger_id,) in await self._fetch(SQL.parked):
                    for place in self._places.get(ledger_id, {}).values():
                        place.parked = False
                    self._wake(ledger_id)
            await asyncio.sleep(RETRY_PARKED_SECONDS)

    async def _fetch(self, query: Any) -> list[tuple[Any, ...]]:
        async with self._pool.connection() as connection:
            cursor = await connection.execute(query, {"views": list(self._views)}, prepare=True)
            return await cursor.fetchall()

    # One ledger

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            ledger_id = await self._waiting.get()
            self._busy[ledger_id] = False
            began = loop.time()
            try:
                events = await self.advance(ledger_id)
                self._say(ledger_id, "")
            except TROUBLE as error:
                self._say(ledger_id, f"the views of ledger {ledger_id} cannot be written: {error}")
                loop.call_later(RETRY_SECONDS, self._waiting.put_nowait, ledger_id)
                continue
            except Overtaken:
                events = 1  # we look again where it stands; who holds the lease is settled elsewhere
            if events >= self._batch_events_max:
                self._waiting.put_nowait(ledger_id)
            elif events or self._busy[ledger_id]:
                took = loop.time() - began
                rest = REST_SECONDS_MIN if events <= BUSY_EVENTS else min(max(took, REST_SECONDS_MIN), REST_SECONDS_MAX)
                loop.call_later(rest, self._waiting.put_nowait, ledger_id)
            else:
                del self._busy[ledger_id]

    async def advance(self, ledger_id: UUID) -> int:
        """One batch for every group of views that stand at the same place; answers how many events that was.

        Raises Overtaken, and whatever of TROUBLE the database has.
        """
        try:
            return await self._advance(ledger_id)
        except Overtaken:
            # Whoever moved one view may have moved any: none is believed to be where we left it, or as we left it.
            del self._places[ledger_id]
            for name in self._views:
                self._memories.pop((ledger_id, name), None)
            raise

    async def _advance(self, ledger_id: UUID) -> int:
        async with self._pool.connection() as connection:
            await self._look_up(connection, ledger_id)
            events = 0
            for position, limit, names in _groups(self._places[ledger_id], self._batch_events_max):
                batch, failure = _decode(await self._read(connection, ledger_id, position, limit), position)
                if batch:
                    await self._apply(connection, ledger_id, names, batch)
                if failure is not None:
                    reached = position + len(batch)
                    for name in names:
                        if self._places[ledger_id][name].position == reached:
                            await self._park(connection, ledger_id, name, failure)
                            events += not self._places[ledger_id][name].parked
                events += len(batch)
            return events

    async def meet(self, connection: Connection, ledger_id: UUID) -> dict[str, Place]:
        """Bring all views to where the foremost one stands, in the transaction that the caller has open, while nobody
        else moves them; what is parked stays. Answers where they stand. Raises as `advance`."""
        places = self._places[ledger_id] = await self._load_places(connection, ledger_id)
        end = max(place.position for place in places.values())
        while behind := [group for group in _groups(places, self._batch_events_max) if group[0] < end]:
            position, limit, names = behind[0]
            batch, failure = _decode(
                await self._read(connection, ledger_id, position, min(limit, end - position)), position
            )
            if batch:
                await self._apply(connection, ledger_id, names, batch)
            else:
                for name in names:
                    await self._park(connection, ledger_id, name, failure or Gap(f"event {position + 1} is not there"))
        return places

    async def _look_up(self, connection: Connection, ledger_id: UUID) -> None:
        """Where the views stand, unless that is known; and what is parked, for an operator may have seen to that."""
        known = self._places.get(ledger_id)
        if known is None:
            self._places[ledger_id] = await self._load_places(connection, ledger_id)
            for place in self._places[ledger_id].values():
                place.parked = False  # tried once more by whoever starts: the code may be newer by now
        elif any(place.parked for place in known.values()):
            found = await self._load_places(connection, ledger_id)
            for name, place in known.items():
                if (found[name].position, found[name].schema) != (place.position, place.schema):
                    raise Overtaken
                place.parked = place.parked and found[name].parked

    async def _load_places(self, connection: Connection, ledger_id: UUID) -> dict[str, Place]:
        values = {"ledger_id": ledger_id, "views": list(self._views)}
        await connection.execute(SQL.begin, values)
        rows = await (await connection.execute(SQL.places, values)).fetchall()
        return {name: Place(*place) for name, *place in rows}

    async def _read(self, connection: Connection, ledger_id: UUID, after: int, limit: int) -> list[Stored]:
        values = {
            "ledger_id": uuid(ledger_id),
            "after": bigint(after),
            "limit": bigint(limit),
            "bytes": bigint(BATCH_BYTES_MAX),
        }
        return [Stored(*row) for row in await _read.fetch(connection, values)]

    async def _apply(
        self, connection: Connection, ledger_id: UUID, names: Sequence[str], batch: Sequence[Recorded]
    ) -> None:
        """Project `batch` into these views; where one of its events cannot be, up to that event, and park."""
        try:
            with self.projected.projecting(names, batch):
                await self._commit(connection, ledger_id, names, batch)
        except psycopg.errors.ProgramLimitExceeded as error:
            failure: Exception = error  # the server's limit, but this event's doing
        except (Overtaken, *TROUBLE):
            raise
        except Exception as error:  # noqa: BLE001  (whatever it is, it is kept and shown as the reason)
            failure = error
        else:
            return
        if len(names) > 1:
            for name in names:
                await self._apply(connection, ledger_id, [name], batch)
        elif len(batch) > 1:
            middle = len(batch) // 2
            await self._apply(connection, ledger_id, names, batch[:middle])
            if not self._places[ledger_id][names[0]].parked:
                await self._apply(connection, ledger_id, names, batch[middle:])
        else:
            await self._park(connection, ledger_id, names[0], failure)

    async def _commit(
        self, connection: Connection, ledger_id: UUID, names: Sequence[str], batch: Sequence[Recorded]
    ) -> None:
        reached = batch[-1].position
        values = {
            "ledger_id": uuid(ledger_id),
            "views": texts(names),
            "schemas": bigints(self._places[ledger_id][name].schema for name in names),
            "expected": bigint(batch[0].position - 1),
            "reached": bigint(reached),
        }
        # Whatever goes wrong from here on, what the views remember is not to be trusted any more.
        memories = {name: self._memories.pop((ledger_id, name), Memory(name)) for name in names}
        writing = []
        for name in names:
            if rows := await self._views[name].project(connection, ledger_id, batch, memories[name]):
                writing.append(name)
                values |= rows
        # Dying before this commits leaves rows and position as they were; after it, both as they are.
        if await self._write(writing).fetch(connection, values) != [(len(names),)]:
            raise Overtaken
        for name in names:
            self._places[ledger_id][name].position = reached
            if memories[name]:
                self._memories[ledger_id, name] = memories[name]
        if len(self._memories) > MEMORIES_MAX:
            del self._memories[next(iter(self._memories))]

    def _write(self, names: Sequence[str]) -> Statement:
        """The one write that moves views on, with the rows of these."""
        key = tuple(names)
        if key not in self._writes:
            writes = [in_schema(self._views[name].WRITE, name) for name in names]
            sql = b", ".join([SQL.advance, *writes]) + SQL.advanced
            self._writes[key] = Statement("write", sql)
        return self._writes[key]

    async def _park(self, connection: Connection, ledger_id: UUID, name: str, failure: Exception) -> None:
        """Stop this view before the event after its place; or pass it over, where an operator decided so."""
        place = self._places[ledger_id][name]
        reason = f"{type(failure).__name__}: {failure}".replace("\0", "\ufffd")[:2000]
        values = {"ledger_id": ledger_id, "view": name, "expected": place.position, "reason": reason}
        values |= {"skipped_by": view_of(name), "schema": place.schema}
        if (await connection.execute(SQL.pass_over, values)).rowcount:
            place.position += 1
            return
        place.parked = True
        await connection.execute(SQL.park, values)
        self._say(
            (ledger_id, name),
            f"the view {name} of ledger {ledger_id} is parked before event {place.position + 1}: {reason}",
            failure,
        )


def _groups(places: Mapping[str, Place], most: int) -> Iterator[tuple[int, int, list[str]]]:
    """The views that go on together: where they stand, how many events at most, their names.

    One that is behind goes on by itself, and just as far as the next, so that they meet.
    """
    going = {name: place.position for name, place in places.items() if not place.parked}
    positions = sorted(set(going.values()))
    for position, following in pairwise([*positions, None]):
        assert position is not None
        limit = most if following is None else min(most, following - position)
        yield position, limit, [name for name in going if going[name] == position]


def _decode(rows: Sequence[Stored], after: int) -> tuple[list[Recorded], Exception | None]:
    """The events of `rows`, up to one that cannot be read or does not come next; and what is wrong with that."""
    batch: list[Recorded] = []
    for expected, row in enumerate(rows, after + 1):
        try:
            if row.position != expected:
                raise Gap(f"event {expected} is not there; the next one is {row.position}")
            batch.append(row.decode())
        except Exception as error:  # noqa: BLE001  (as above)
            return batch, error
    return batch, None
