"""Rebuilding a view while it is read and written: built beside it, compared with a replay, switched, and back.

A build of the view `sessions` is a schema: `sessions` is what is read, `sessions_next` is filled aside from position 0
by a projector of its own, `sessions_old` is what was replaced. To switch is to rename schemas, and the rows of
`positions` with them, in one transaction. Why that is enough:

- No name is told to anyone. A rename takes no lock that a reader needs; whoever is in the middle of a statement ends
  it on the tables it began with, which are still there, and of a prepared statement PostgreSQL throws the plan away
  and looks its names up again. Grants belong to schemas and tables, and are renamed with them.
- Who writes must not go on into the old tables by an old plan. The switch therefore locks `positions`, which every
  write of a view begins with: one that is under way is waited for, one that waits is planned again afterwards, and
  finds by the number of the schema that the view is another one now (`Overtaken`).
- Under that lock both builds are brought to the same position in every project, so no reader is ever taken back.

What is done, and how far, is in the database: killed anywhere, whichever worker runs the job goes on from there. A
migration that changes a view's tables must drop its `_next` and `_old`. Recording operators' actions in a ledger of
their own is to be added where `Rebuild` is written: it says all that such an event needs.
"""

import asyncio
import hashlib
import logging
from contextlib import suppress
from datetime import datetime
from typing import Any

from msgspec import Struct
from psycopg import sql
from psycopg.errors import DuplicateTable, UndefinedTable, UniqueViolation

from ledger.postgres import Connection, Pool, queries
from projections import VIEWS
from projections.projector import TROUBLE, Overtaken, Projector
from projections.verify import code_version, verify

log = logging.getLogger(__name__)

SQL = queries("projections", "rebuild")

LOOK_SECONDS = 0.2
FILL_EVENTS_MAX = 100
"""At a time, so that the views that are read, which the same process brings up to date, need not wait for long."""

CLOSE_EVENTS = 1000
"""So near to the view's end, a build is compared, and then switched."""

UNDER_WAY = ("filling", "comparing")
"""The states of a rebuild that has not ended."""


class Rebuild(Struct):
    """The latest rebuild of a view. `state`: filling, comparing; switched, rolled_back, cancelled, failed.

    When it was compared, it was a replay of ledgers with those heads by that code, and had that digest.
    """

    view: str
    number: int
    state: str
    asked_by: str
    reason: str
    began_at: datetime
    ended_at: datetime | None
    ended_because: str | None
    code_version: str | None
    heads_digest: str | None
    rows_compared: int | None
    digest: str | None
    has_old: bool


class Progress(Struct):
    """How many events a build has taken, of how many there are, and in how many projects it is parked."""

    taken: int = 0
    total: int = 0
    parked: int = 0


class Impossible(Exception):
    """What was asked for cannot be done as things are; the message says why, and what can."""


class _Failed(Exception):
    """The rebuild came to an end, for this reason."""


class _Ended(Exception):
    """Somebody else ended the rebuild."""


def next_of(view: str) -> str:
    return f"{view}_next"


def old_of(view: str) -> str:
    return f"{view}_old"


# What operators ask for


async def begin(connection: Connection, view: str, asked_by: str, reason: str) -> bool:
    """Begin to rebuild `view`; False, and nothing is done, where that is under way."""
    new = next_of(view)
    async with connection.transaction():
        asked = {"view": view, "asked_by": asked_by, "reason": reason}
        if not (await connection.execute(SQL.begin, asked)).rowcount:
            return False
        await _drop(connection, new)
        await connection.execute(SQL.make_schema, {"schema": new})
        for (statement,) in await _fetch(connection, SQL.tables, schema=view, new=new):
            await connection.execute(statement.encode())
    return True


async def cancel(connection: Connection, view: str, asked_by: str, reason: str) -> bool:
    """End the rebuild that is under way; False where there is none. What it made, a worker drops."""
    values = {"view": view, "because": f"cancelled by {asked_by}: {reason}"}
    return bool((await connection.execute(SQL.cancel, values)).rowcount)


async def roll_back(pool: Pool, view: str, asked_by: str, reason: str) -> None:
    """Put back what the last rebuild replaced, brought to where the view is now. Raises Impossible; TROUBLE."""
    old = old_of(view)
    async with pool.connection() as connection:
        rebuilds = {rebuild.view: rebuild for rebuild in await latest(connection)}
        _may_roll_back(view, rebuilds.get(view))
        behind = await _fetch(connection, SQL.behind, view=view, schema=old)
    projector = Projector(pool, {old: VIEWS[view]})
    for (ledger_id,) in behind:
        # Where another rolls it back meanwhile, that is found out below.
        with suppress(Overtaken, UndefinedTable):
            while await projector.advance(ledger_id):
                pass
    async with pool.connection() as connection:
        async with connection.transaction():
            await _fetch(connection, SQL.take, view=view)
            rebuilds = {rebuild.view: rebuild for rebuild in await latest(connection)}
            _may_roll_back(view, rebuilds.get(view))
            await _drop(connection, next_of(view))
            await _exchange(connection, pool, view, incoming=old, outgoing=next_of(view))
            said = {"view": view, "state": "rolled_back", "because": f"rolled back by {asked_by}: {reason}"}
            await connection.execute(SQL.settle, said)
        await _tidy(connection, view)  # dying before this leaves it to a worker


def _may_roll_back(view: str, rebuild: Rebuild | None) -> None:
    if rebuild is None or not rebuild.has_old:
        raise Impossible(
            f"there is nothing to roll {view} back to: no rebuild has replaced anything that is still kept"
        )
    if rebuild.state in UNDER_WAY:
        raise Impossible(f"{view} is being rebuilt: cancel that first, or wait for it")


async def latest(connection: Connection) -> list[Rebuild]:
    """The latest rebuild of each view that had one."""
    return [Rebuild(*row) for row in await _fetch(connection, SQL.all)]


async def reached(connection: Connection, view: str) -> dict[str, int]:
    """How far a view has come, by project."""
    return dict(await _fetch(connection, SQL.reached, view=view))


async def progress(connection: Connection) -> dict[str, Progress]:
    """How far each build of each view has come, by its schema."""
    return {
        schema: Progress(taken, total, parked)
        for schema, taken, parked, total in await _fetch(connection, SQL.progress)
    }


# What a worker does about it


async def rebuild_for_ever(pool: Pool) -> None:
    """Do what rebuilds are asked for, one after another. Without a database, wait for one. Ends when cancelled."""
    failing = ""
    while True:
        try:
            async with pool.connection() as connection:
                for (view,) in await _fetch(connection, SQL.left_over):
                    await _tidy(connection, view)
                under_way = await _fetch(connection, SQL.under_way)
            for view, number in under_way:
                await _Run(pool, view, number).run()
            failing = ""
        except TROUBLE as error:
            if failing != str(error):
                log.warning("a rebuild goes on when the database can be used again: %s", error)
            failing = str(error)
        await asyncio.sleep(LOOK_SECONDS)


class _Run:
    """One rebuild, from wherever it is to its end."""

    def __init__(self, pool: Pool, view: str, number: int) -> None:
        self._pool = pool
        self._names = {"view": view, "schema": next_of(view), "number": number}
        self._view = view
        self._next = next_of(view)

    async def run(self) -> None:
        """Raises whatever of TROUBLE the database has; the rebuild can then be run again."""
        try:
            await self._build()
            await self._switch()
            log.info("%s is rebuilt", self._view)
        except _Ended:
            log.info("the rebuild of %s was ended", self._view)
        except _Failed as failure:
            log.error("the rebuild of %s failed: %s", self._view, failure)
            async with self._pool.connection() as connection:
                await connection.execute(SQL.fail, {**self._names, "because": str(failure)})

    async def _build(self) -> None:
        projector = Projector(self._pool, {self._next: VIEWS[self._view]}, batch_events_max=FILL_EVENTS_MAX)
        filling = asyncio.ensure_future(projector.run())
        building = asyncio.ensure_future(self._fill_and_compare())
        watching = asyncio.ensure_future(self._until_ended())
        jobs = (filling, building, watching)
        try:
            await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for job in jobs:
                if not job.done():
                    job.cancel()
            await asyncio.wait(jobs)
        for job in jobs:
            if not job.cancelled():
                job.result()

    async def _until_ended(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            with suppress(*TROUBLE):
                async with self._pool.connection() as connection:
                    await self._check(connection)

    async def _check(self, connection: Connection) -> None:
        rows = await _fetch(connection, SQL.state, **self._names)
        if not rows or rows[0][0] not in UNDER_WAY:
            raise _Ended

    async def _fill_and_compare(self) -> None:
        await self._come_near()
        async with self._pool.connection() as connection:
            # Made of all rows in one go, which costs less than row by row. What is made stays made.
            for (statement,) in await _fetch(connection, SQL.indexes, schema=self._view, new=self._next):
                # Else by another worker, which has not heard yet that it lost the job.
                with suppress(DuplicateTable, UniqueViolation):
                    await connection.execute(statement.encode())
            for (table,) in await _fetch(connection, SQL.names, schema=self._next):
                await connection.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(self._next, table)))
            await connection.execute(SQL.compare, {**self._names, "code_version": code_version()})
        heads, digests = hashlib.sha256(), hashlib.sha256()
        rows = 0
        async for verdict in verify(self._pool, self._next):
            if not verdict.holds:
                first = verdict.drifts[0] if verdict.drifts else None
                raise _Failed(f"what was built is not what a replay makes: {verdict}; first: {first}")
            heads.update(f"{verdict.project_id} {verdict.ledger_id} {verdict.position}\n".encode())
            digests.update(f"{verdict.project_id} {verdict.digest}\n".encode())
            rows += verdict.rows
        said = {"heads": heads.hexdigest(), "digest": digests.hexdigest(), "rows": rows}
        async with self._pool.connection() as connection:
            await connection.execute(SQL.compared, {**self._names, **said})
        await self._come_near()

    async def _come_near(self) -> None:
        """Return when the build is nearly where the view is. Raises _Failed where it cannot come there."""
        while True:
            async with self._pool.connection() as connection:
                for project, position, reason in await _fetch(connection, SQL.stuck, **self._names):
                    raise _Failed(f"event {position} of {project} cannot be taken: {reason}")
                if (await _fetch(connection, SQL.missing, **self._names))[0][0] <= CLOSE_EVENTS:
                    return
            await asyncio.sleep(LOOK_SECONDS)

    async def _switch(self) -> None:
        old = old_of(self._view)
        async with self._pool.connection() as connection:
            async with connection.transaction():
                await _fetch(connection, SQL.take, **self._names)
                await self._check(connection)
                await _drop(connection, old)
            # Dying before this commits leaves the view as it was, and the build to go on with.
            async with connection.transaction():
                await _fetch(connection, SQL.take, **self._names)
                await self._check(connection)
                await _exchange(connection, self._pool, self._view, incoming=self._next, outgoing=old)
                await connection.execute(SQL.settle, {"view": self._view, "state": "switched", "because": None})


async def _exchange(connection: Connection, pool: Pool, view: str, *, incoming: str, outgoing: str) -> None:
    """Make `incoming` the view, and what was it `outgoing`, in the transaction that is open."""
    await connection.execute(SQL.hold)
    projector = Projector(pool, dict.fromkeys((view, incoming), VIEWS[view]))
    for (ledger_id,) in await _fetch(connection, SQL.behind, view=view, schema=incoming):
        places = await projector.meet(connection, ledger_id)
        # Back to what was there before one goes also where that is parked.
        if places[incoming].position < places[view].position and incoming == next_of(view):
            raise _Failed(f"it is parked before event {places[incoming].position + 1} of ledger {ledger_id}")
    for schema, new in ((view, outgoing), (incoming, view)):
        await connection.execute(SQL.rename_schema, {"schema": schema, "new": new})
        await connection.execute(SQL.rename_places, {"schema": schema, "new": new})


# Events that a view cannot take


class Parked(Struct):
    """A project's part of a view that is stopped before an event."""

    view: str
    project_id: str
    position: int
    type: str | None
    since: datetime
    reason: str


async def parked(connection: Connection) -> list[Parked]:
    return [Parked(*row) for row in await _fetch(connection, SQL.parked, views=list(VIEWS))]


async def retry(connection: Connection, view: str, project: str | None) -> dict[str, int]:
    """Have what is parked tried again now; answers where that is, by project."""
    return dict(await _fetch(connection, SQL.retry, view=view, project=project))


async def skip(connection: Connection, view: str, project: str, position: int, asked_by: str, reason: str) -> None:
    """Let `view` leave out the event that it is parked before, in this build and those to come.

    A rebuild by code that can take it takes it. Raises Impossible where the view is not parked there.
    """
    values = {"view": view, "project": project, "position": position, "asked_by": asked_by, "reason": reason}
    async with connection.transaction():
        if not (await connection.execute(SQL.skip, values)).rowcount:
            raise Impossible(f"{view} of {project} is not parked before event {position}")
        await connection.execute(SQL.retry, {"view": view, "project": project})


async def _tidy(connection: Connection, view: str) -> None:
    """Drop what a rebuild that has ended left behind, unless another has begun."""
    async with connection.transaction():
        ((state,),) = await _fetch(connection, SQL.take, view=view)
        if state not in UNDER_WAY:
            await _drop(connection, next_of(view))


async def _drop(connection: Connection, schema: str) -> None:
    # The tables first: who writes them locks them before the places.
    await connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))
    connection.prepared = {}  # after a DROP psycopg deallocates its own prepared statements, and ours with them
    await connection.execute(SQL.drop_places, {"schema": schema})


async def _fetch(connection: Connection, query: Any, **values: Any) -> list[tuple[Any, ...]]:
    return await (await connection.execute(query, values)).fetchall()
