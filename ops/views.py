"""`muniment projections`: what operators do to views while they are read: rebuild, verify, unpark.

Every command here asks, and a worker does: a terminal that is closed stops nothing. Whoever asks must be let in as
the worker is. Recording who asked for what in a ledger of the operators' own comes with that ledger.
"""

import asyncio
import getpass
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext

import psycopg
from cyclopts import App
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ledger.embedded import running_database
from ledger.postgres import Connection, Pool, open_pool, store_errors
from ops import OperatorError
from ops.projects import local_settings
from projections import VIEWS, freshness, rebuild
from projections.rebuild import Impossible, Rebuild
from projections.verify import Drift, verify

LOOK_SECONDS = 0.2
LINES_EVERY_SECONDS = 5.0
RETRY_SECONDS = 5.0

projections = App(name="projections", help="Rebuild, verify and unpark views while they are read.")
parked = App(name="parked", help="Parts of views that are stopped before an event they cannot take.")
projections.command(parked)


class ViewsError(OperatorError):
    """What was asked of a view cannot be done; the message says why."""


@projections.command(name="list")
async def list_views() -> None:
    """List the views: how far each has come, where it is parked, what came of its last rebuild."""
    async with _connection() as connection:
        healths = await freshness.health(connection, VIEWS)
        reached = await rebuild.progress(connection)
        rebuilds = {one.view: one for one in await rebuild.latest(connection)}
    for view, health in healths.items():
        taken = reached.get(view, rebuild.Progress()).taken
        line = f"{view:<10} {health.state:<9} {taken:>14,} events, {health.lag_events:,} behind"
        if health.parked_projects:
            line += f"; parked in {', '.join(health.parked_projects)}"
        print(line)
        if one := rebuilds.get(view):
            print(f"{'':<10} {_told(one)}")


@projections.command(name="rebuild")
async def rebuild_view(view: str, /, *, reason: str = "") -> None:
    """Rebuild a view beside the one that is read, compare it with a replay, and switch.

    Shows how far it is; Ctrl-C ends the showing, not the rebuild. Where one is under way it shows that.

    Parameters
    ----------
    view
        As `muniment projections list` names it.
    reason
        Why, for those who come after.
    """
    async with _pool(view) as pool:
        async with pool.connection() as connection:
            begun = await rebuild.begin(connection, view, _who(), reason)
        if not begun:
            print(f"{view} is being rebuilt already", file=sys.stderr)
        try:
            ended = await _watch(pool, view)
        except asyncio.CancelledError:
            print(
                f"The rebuild of {view} goes on: the same command shows it, `projections cancel` ends it.",
                file=sys.stderr,
            )
            raise
    print(f"{view}: {_told(ended)}")
    if ended.state != "switched":
        sys.exit(1)


@projections.command
async def cancel(view: str, /, *, reason: str = "") -> None:
    """End the rebuild of a view that is under way, and drop what it made.

    Parameters
    ----------
    view
        As `muniment projections list` names it.
    reason
        Why, for those who come after.
    """
    async with _connection(view) as connection:
        if not await rebuild.cancel(connection, view, _who(), reason):
            raise ViewsError(f"{view} is not being rebuilt")
    print(f"the rebuild of {view} is cancelled; {view} is as it was")


@projections.command
async def rollback(view: str, /, *, reason: str = "") -> None:
    """Put back what the last rebuild of a view replaced, brought to where the view is now.

    Parameters
    ----------
    view
        As `muniment projections list` names it.
    reason
        Why, for those who come after.
    """
    async with _pool(view) as pool:
        await rebuild.roll_back(pool, view, _who(), reason)
    print(f"{view} is what it was before its last rebuild, and what that had made is dropped")


@projections.command(name="verify")
async def verify_view(view: str, /, *, project: str | None = None) -> None:
    """Compare a view, row by row, with a replay of the ledger that knows nothing of it.

    Ends with 1 where they differ, and names every difference: row, field, both values, the event.

    Parameters
    ----------
    view
        As `muniment projections list` names it.
    project
        Only this project's part.
    """
    differing = met = 0
    async with _pool(view) as pool:
        async for verdict in verify(pool, view, project):
            met += 1
            differing += not verdict.holds
            print(f"{verdict} ({verdict.rows:,} rows)")
            for drift in verdict.drifts:
                print(f"  {_named(drift)}")
            if verdict.drifted > len(verdict.drifts):
                print(f"  and {verdict.drifted - len(verdict.drifts):,} more")
    if project is not None and not met:
        raise ViewsError(f"{view} has nothing of a project {project}")
    if differing:
        sys.exit(1)


@parked.default
async def list_parked() -> None:
    """List the parts of views that are stopped before an event, and why."""
    async with _connection() as connection:
        found = await rebuild.parked(connection)
    for one in found:
        print(f"{one.view} of {one.project_id}, before event {one.position} ({one.type}), since {one.since}")
        print(f"  {one.reason}")
    if not found:
        print("nothing is parked")


@parked.command
async def retry(view: str, /, *, project: str | None = None) -> None:
    """Have what is parked tried again now, not within a minute.

    Parameters
    ----------
    view
        As `muniment projections list` names it.
    project
        Only this project's part.
    """
    async with _connection(view) as connection:
        tried = await rebuild.retry(connection, view, project)
        if not tried:
            raise ViewsError(f"{view} is not parked{f' in {project}' if project else ''}")
        await _tell_what_came(connection, view, tried)


@parked.command
async def skip(view: str, /, *, project: str, position: int, reason: str) -> None:
    """Let a view leave out the event that it is parked before, in this build of it and those to come.

    The event stays in the ledger. A rebuild by a version that can take it takes it.

    Parameters
    ----------
    view
        As `muniment projections list` names it.
    project
        Whose part is parked.
    position
        The event's, as `muniment projections parked` tells it.
    reason
        Why, for those who come after.
    """
    async with _connection(view) as connection:
        await rebuild.skip(connection, view, project, position, _who(), reason)
        await _tell_what_came(connection, view, {project: position - 1})


async def _tell_what_came(connection: Connection, view: str, tried: dict[str, int]) -> None:
    """Wait until each of these parts has moved, or is parked again; not for ever, for there may be no worker."""
    until = time.monotonic() + RETRY_SECONDS
    waiting = dict(tried)
    while waiting and time.monotonic() < until:
        again = {one.project_id: one for one in await rebuild.parked(connection) if one.view == view}
        reached = await rebuild.reached(connection, view)
        for project, position in list(waiting.items()):
            if project in again:
                print(f"{view} of {project} is parked before event {again[project].position}: {again[project].reason}")
            elif reached.get(project, 0) > position:
                print(f"{view} of {project} goes on")
            else:
                continue
            del waiting[project]
        await asyncio.sleep(LOOK_SECONDS)
    if waiting:
        raise ViewsError(f"{view} of {', '.join(waiting)} has not moved yet: does a worker run?")


# Showing how far it is


async def _watch(pool: Pool, view: str) -> Rebuild:
    """Show the rebuild of a view until it has ended; answers what it is then."""
    console = Console(stderr=True)
    shown: AbstractContextManager[Callable[[Rebuild, rebuild.Progress], None]]
    shown = _Bar(console, view) if console.is_terminal else nullcontext(_Lines(view))
    with shown as show:
        while True:
            async with pool.connection() as connection:
                reached = await rebuild.progress(connection)
                (one,) = [one for one in await rebuild.latest(connection) if one.view == view]
            if one.state not in rebuild.UNDER_WAY:
                return one
            there = reached.get(view, rebuild.Progress())
            show(one, reached.get(rebuild.next_of(view), rebuild.Progress(total=there.total)))
            await asyncio.sleep(LOOK_SECONDS)


class _Rate:
    """Events a second since the showing began."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None

    def __call__(self, taken: int) -> float:
        now = time.monotonic()
        if self._began is None:
            self._began = now, taken
        at, events = self._began
        return (taken - events) / max(now - at, 0.001)


class _Bar(Progress):
    """A progress bar, over the events of all projects."""

    def __init__(self, console: Console, view: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        super().__init__(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
        self._rate = _Rate()
        self._bar = self.add_task(view, total=None)

    def __call__(self, one: Rebuild, reached: rebuild.Progress) -> None:
        said = (
            f"{one.view}: {one.state} {reached.taken:,} of {reached.total:,} events, {self._rate(reached.taken):,.0f}/s"
        )
        self.update(self._bar, completed=reached.taken, total=reached.total, description=said)


class _Lines:
    """The same where nobody watches a terminal: a line now and then."""

    def __init__(self, view: str) -> None:
        self._view = view
        self._rate = _Rate()
        self._next = 0.0

    def __call__(self, one: Rebuild, reached: rebuild.Progress) -> None:
        rate = self._rate(reached.taken)
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LINES_EVERY_SECONDS
        left = f"{(reached.total - reached.taken) / rate:,.0f} s left" if rate else "time left unknown"
        said = f"{one.view}: {one.state} {reached.taken:,} of {reached.total:,} events, {rate:,.0f}/s, {left}"
        print(said, file=sys.stderr, flush=True)


def _told(one: Rebuild) -> str:
    """What became of a rebuild, in a line."""
    why = f" ({one.reason})" if one.reason else ""
    said = f"{one.state}; asked for by {one.asked_by}{why}, {one.began_at:%Y-%m-%d %H:%M:%S}"
    if one.ended_because:
        said += f"; {one.ended_because}"
    if one.digest:
        said += f"; {one.rows_compared:,} rows as a replay by {one.code_version} makes them, digest {one.digest}"
    return said + ("; what it replaced is kept" if one.has_old else "")


def _named(drift: Drift) -> str:
    event = drift.event
    by = f"set by event {event.position} ({event.type} {event.event_id})" if event else "no event says so"
    where = f"{drift.table} [{drift.key}]"
    if drift.field == "*":
        return f"{where} {'is missing' if drift.stored is None else 'is too many'}: {by}"
    return f"{where} {drift.field}: {drift.stored!r}, a replay makes {drift.replayed!r}, {by}"


# How views are reached


def _who() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"


@asynccontextmanager
async def _connection(view: str | None = None) -> AsyncGenerator[Connection]:
    async with _pool(view) as pool, pool.connection() as connection:
        yield connection


@asynccontextmanager
async def _pool(view: str | None = None) -> AsyncGenerator[Pool]:
    """The database, as the worker uses it; what is wrong with that is said in a sentence."""
    if view is not None and view not in VIEWS:
        raise ViewsError(f"there is no view {view!r}: there are {', '.join(VIEWS)}")
    with running_database(local_settings(any_mode=True), "muniment_worker") as reached:
        async with open_pool(reached.database_url, 4) as pool:
            try:
                with store_errors():
                    yield pool
            except Impossible as error:
                raise ViewsError(str(error)) from error
            except psycopg.errors.InsufficientPrivilege as error:
                raise ViewsError("only the worker's role may do this: name it in DATABASE_URL") from error
            except (psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedTable) as error:
                raise ViewsError("the database is not at this version: run `muniment migrate`") from error
