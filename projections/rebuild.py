"""Rebuilding a view while it is read and written: built beside it, compared with a replay, switched, and back.

A build of the view `sessions` is a schema: `sessions` is what is read, `sessions_next` is made aside (build.py) from
the ledger alone, `sessions_old` is what was replaced. To switch is to rename schemas, and the rows of
`positions` with them, in one transaction. Why that is enough:

- No name is told to anyone. A rename takes no lock that a reader needs; whoever is in the middle of a statement ends
  it on the tables it began with, which are still there, and of a prepared statement PostgreSQL throws the plan away
  and looks its names up again. Grants belong to schemas and tables, and are renamed with them.
- Who writes must not go on into the old tables by an old plan. The switch therefore locks `positions`, which every
  write of a view begins with: one that is under way is waited for, one that waits is planned again afterwards, and
  finds by the number of the schema that the view is another one now (`Overtaken`).
- Under that lock both builds are brought to the same position in every project, so no reader is ever taken back.

What is done, and how far, is in the database: killed anywhere, whichever worker runs the job goes on from there. A
migration that changes a view's tables must drop its `_next` and `_old`. Who asks for it, and that it is told what came
of it, is not here (requests.py).
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from importlib.metadata import version

from msgspec import Struct
from psycopg import sql
from psycopg.errors import UndefinedTable

from ledger.errors import StoreUnavailable
from ledger.postgres import Connection, Pool, fetch, queries
from projections import VIEWS
from projections.build import Failed, Told, aside, until_one_ends
from projections.projector import TROUBLE, Overtaken, Projector, Troubles

log = logging.getLogger(__name__)

SQL = queries("projections", "rebuild")

LOOK_SECONDS = 0.2
RETRY_SECONDS = 1.0

AT_ONCE = os.cpu_count() or 1
"""Each is made by a process of its own, which keeps one processor busy."""

UNDER_WAY = ("filling", "comparing")
"""The states of a rebuild that has not ended."""


class Rebuild(Struct):
    """The latest rebuild of a view. `state`: filling, comparing; switched, rolled_back, cancelled, failed.

    When it was compared, it was a replay of ledgers with those heads by that code, and had that digest. `request` is
    the version of the view, in the operators' ledger, at which was asked for what made this state, if it was there.
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
    request: int | None
    has_old: bool


class Progress(Struct):
    """How many events a build has taken, of how many there are, and in how many projects it is parked."""

    taken: int = 0
    total: int = 0
    parked: int = 0


class Impossible(Exception):
    """What was asked for cannot be done as things are; the message says why, and what can."""


class _Ended(Exception):
    """Somebody else ended the rebuild."""


def next_of(view: str) -> str:
    return f"{view}_next"


def old_of(view: str) -> str:
    return f"{view}_old"


# What operators ask for


async def begin(connection: Connection, view: str, asked_by: str, reason: str, request: int | None = None) -> bool:
    """Begin to rebuild `view`; False, and nothing is done, where that is under way, or was done for this `request`."""
    async with connection.transaction():
        asked = {"view": view, "asked_by": asked_by, "reason": reason, "request": request}
        if not (await connection.execute(SQL.begin, asked)).rowcount:
            return False
        await _lay_out(connection, view)
    return True


async def _lay_out(connection: Connection, view: str) -> None:
    """Empty tables for the next build of `view`, in the transaction that is open."""
    new = next_of(view)
    await _drop(connection, new)
    await connection.execute(SQL.make_schema, {"schema": new})
    await connection.execute(SQL.set_version, {"schema": new, "version": VIEWS[view].VERSION})
    for (statement,) in await fetch(connection, SQL.tables, schema=view, new=new):
        await connection.execute(statement.encode())


async def cancel(connection: Connection, view: str, asked_by: str, reason: str, request: int | None = None) -> bool:
    """End the rebuild that is under way, if it is that of `request`; False where there is none. What it made, a worker
    drops."""
    values = {"view": view, "because": _said("cancelled", asked_by, reason), "request": request}
    return bool((await connection.execute(SQL.cancel, values)).rowcount)


async def roll_back(pool: Pool, view: str, asked_by: str, reason: str, request: int | None = None) -> None:
    """Put back what the last rebuild replaced, brought to where the view is now; nothing, where that was done for this
    `request`. Raises Impossible; TROUBLE."""
    old = old_of(view)
    async with pool.connection() as connection:
        if not _to_roll_back(view, await latest(connection), request):
            return
        behind = await fetch(connection, SQL.behind, view=view, schema=old)
    projector = Projector(pool, {old: VIEWS[view]})
    for (ledger_id,) in behind:
        # Where another rolls it back meanwhile, that is found out below.
        with suppress(Overtaken, UndefinedTable):
            while await projector.advance(ledger_id):
                pass
    async with pool.connection() as connection:
        async with connection.transaction():
            await fetch(connection, SQL.take, view=view)
            if not _to_roll_back(view, await latest(connection), request):
                return
            await _drop(connection, next_of(view))
            await _exchange(connection, pool, view, incoming=old, outgoing=next_of(view))
            said = {"view": view, "state": "rolled_back", "because": _said("rolled back", asked_by, reason)}
            await connection.execute(SQL.settle, said | {"request": request})
        await _tidy(connection, view)  # dying before this leaves it to a worker


def _said(what: str, by: str, reason: str) -> str:
    return f"{what} by {by}" + (f": {reason}" if reason else "")


def _to_roll_back(view: str, rebuilds: list[Rebuild], request: int | None) -> bool:
    """Whether that is still to be done. Raises Impossible."""
    rebuild = next((one for one in rebuilds if one.view == view), None)
    if rebuild is not None and request is not None and rebuild.request is not None and rebuild.request >= request:
        return False
    if rebuild is None or not rebuild.has_old:
        raise Impossible(
            f"there is nothing to roll {view} back to: no rebuild has replaced anything that is still kept"
        )
    if rebuild.state in UNDER_WAY:
        raise Impossible(f"{view} is being rebuilt: cancel that first, or wait for it")
    return True


async def latest(connection: Connection) -> list[Rebuild]:
    """The latest rebuild of each view that had one."""
    return [Rebuild(*row) for row in await fetch(connection, SQL.all)]


async def versions(connection: Connection) -> dict[str, int]:
    """Of which version each build of each view is, by its schema."""
    return dict(await fetch(connection, SQL.versions))


async def reached(connection: Connection, view: str) -> dict[str, int]:
    """How far a view has come, by project."""
    return dict(await fetch(connection, SQL.reached, view=view))


async def progress(connection: Connection) -> dict[str, Progress]:
    """How far each build of each view has come, by its schema."""
    return {
        schema: Progress(taken, total, parked) for schema, taken, parked, total in await fetch(connection, SQL.progress)
    }


# What a worker does about it


Ask = Callable[[Connection, str, str, str], Awaitable[bool]]
"""How a release asks for what it needs: as `begin` does, or where that is on record."""


async def rebuild_for_ever(pool: Pool, ask: Ask = begin) -> None:
    """Do what rebuilds are asked for, as many at once as there are processors. Without a database, wait for one. Ends
    when cancelled.

    First of all, `ask` for those of the views that are of an older version than this release.
    """
    troubles, renewed = Troubles(log.warning), False
    jobs: dict[str, asyncio.Task[None]] = {}
    try:
        while True:
            failing = ""
            try:
                for view in [view for view, job in jobs.items() if job.done()]:
                    jobs.pop(view).result()
                async with pool.connection() as connection:
                    if not renewed:
                        await _renew(connection, ask)
                        renewed = True
                    for (view,) in await fetch(connection, SQL.left_over):
                        await _tidy(connection, view)
                    under_way = await fetch(connection, SQL.under_way)
                    built_as = await versions(connection)
                for view, number in under_way:
                    # One that another release began is for its own workers.
                    ours = view in VIEWS and built_as.get(next_of(view)) == VIEWS[view].VERSION
                    if ours and view not in jobs and len(jobs) < AT_ONCE:
                        jobs[view] = asyncio.create_task(_Run(pool, view, number).run())
            except (*TROUBLE, StoreUnavailable) as error:
                failing = f"a rebuild goes on when the database can be used again: {error}"
            troubles.say("rebuild", failing)
            await asyncio.sleep(RETRY_SECONDS if failing else LOOK_SECONDS)
    finally:
        for job in jobs.values():
            job.cancel()
        await asyncio.gather(*jobs.values(), return_exceptions=True)


async def _renew(connection: Connection, ask: Ask) -> None:
    """Ask to rebuild each view that is of an older version. What an older release was building for whoever asked is
    built by this one, from the beginning."""
    built_as = await versions(connection)
    for view, of in VIEWS.items():
        if (built := built_as.get(view, 0)) >= of.VERSION:
            continue
        reason = f"it is of version {built}, and this release makes version {of.VERSION}"
        if built_as.get(next_of(view), 0) < of.VERSION:
            async with connection.transaction():
                if (await connection.execute(SQL.begin_again, {"view": view})).rowcount:
                    await _lay_out(connection, view)
                    continue
        if await ask(connection, view, f"release {version('muniment')}", reason):
            log.info("%s is built again: %s", view, reason)


class _Run:
    """One rebuild, from wherever it is to its end."""

    def __init__(self, pool: Pool, view: str, number: int) -> None:
        self._pool = pool
        self._names = {"view": view, "schema": next_of(view), "number": number}
        self._number = number
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
        except Failed as failure:
            log.error("the rebuild of %s failed: %s", self._view, failure)
            async with self._pool.connection() as connection:
                await connection.execute(SQL.fail, {**self._names, "because": str(failure)})

    async def _build(self) -> None:
        assert isinstance(self._pool.conninfo, str)
        told = Told(self._pool.conninfo, self._view, self._next, self._number)
        await until_one_ends(aside(told), self._until_ended())

    async def _until_ended(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            with suppress(*TROUBLE):
                async with self._pool.connection() as connection:
                    await self._check(connection)

    async def _check(self, connection: Connection) -> None:
        rows = await fetch(connection, SQL.state, **self._names)
        if not rows or rows[0][0] not in UNDER_WAY:
            raise _Ended

    async def _switch(self) -> None:
        old = old_of(self._view)
        async with self._pool.connection() as connection:
            async with connection.transaction():
                await fetch(connection, SQL.take, **self._names)
                await self._check(connection)
                await _drop(connection, old)
            # Dying before this commits leaves the view as it was, and the build to go on with.
            async with connection.transaction():
                await fetch(connection, SQL.take, **self._names)
                await self._check(connection)
                await _exchange(connection, self._pool, self._view, incoming=self._next, outgoing=old)
                said = {"view": self._view, "state": "switched", "because": None, "request": None}
                await connection.execute(SQL.settle, said)


async def _exchange(connection: Connection, pool: Pool, view: str, *, incoming: str, outgoing: str) -> None:
    """Make `incoming` the view, and what was it `outgoing`, in the transaction that is open."""
    await connection.execute(SQL.hold)
    projector = Projector(pool, dict.fromkeys((view, incoming), VIEWS[view]))
    for (ledger_id,) in await fetch(connection, SQL.behind, view=view, schema=incoming):
        places = await projector.meet(connection, ledger_id)
        # Back to what was there before one goes also where that is parked.
        if places[incoming].position < places[view].position and incoming == next_of(view):
            raise Failed(f"it is parked before event {places[incoming].position + 1} of ledger {ledger_id}")
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
    return [Parked(*row) for row in await fetch(connection, SQL.parked, views=list(VIEWS))]


async def retry(connection: Connection, view: str, project: str | None) -> dict[str, int]:
    """Have what is parked tried again now; answers where that is, by project."""
    return dict(await fetch(connection, SQL.retry, view=view, project=project))


async def skip(connection: Connection, view: str, project: str, position: int, asked_by: str, reason: str) -> None:
    """Let `view` leave out the event that it is parked before, in this build and those to come.

    A rebuild by code that can take it takes it. Raises Impossible where the view is not parked there.
    """
    values = {"view": view, "project": project, "position": position, "asked_by": asked_by, "reason": reason}
    async with connection.transaction():
        done = (await connection.execute(SQL.skip, values)).rowcount
        if not done and await fetch(connection, SQL.skipped, **values) != [(True,)]:
            raise Impossible(f"{view} of {project} is not parked before event {position}")
        await connection.execute(SQL.retry, {"view": view, "project": project})


async def _tidy(connection: Connection, view: str) -> None:
    """Drop what a rebuild that has ended left behind, unless another has begun."""
    async with connection.transaction():
        ((state,),) = await fetch(connection, SQL.take, view=view)
        if state not in UNDER_WAY:
            await _drop(connection, next_of(view))


async def _drop(connection: Connection, schema: str) -> None:
    # The tables first: who writes them locks them before the places.
    await connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))
    connection.prepared = {}  # after a DROP psycopg deallocates its own prepared statements, and ours with them
    await connection.execute(SQL.drop_places, {"schema": schema})
