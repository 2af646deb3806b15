"""`muniment projections`: what operators do to views while they are read: rebuild, verify, unpark.

Every command here asks, in the ledger of the operators, and a worker does: a terminal that is closed stops nothing, and
who asked for what, why, and what came of it, is on record. Nothing is decided here, and no view is touched.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from cyclopts import App
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ledger.operations import CancelRebuild, RebuildView, RetryParked, RollBackView, SkipEvent, VerifyView
from ledger.postgres import Connection
from ledger.view import Request
from ops.desk import LOOK_SECONDS, Desk, DeskError, connected, open_desk
from projections import VIEWS, freshness, proof, rebuild
from projections.proof import Proof
from projections.rebuild import Rebuild

LINES_EVERY_SECONDS = 5.0
RETRY_SECONDS = 5.0

projections = App(name="projections", help="Rebuild, verify and unpark views while they are read.")
parked = App(name="parked", help="Parts of views that are stopped before an event they cannot take.")
projections.command(parked)


@projections.command(name="list")
async def list_views() -> None:
    """List the views: how far each has come, where it is parked, what came of its last rebuild."""
    async with connected() as connection:
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
async def rebuild_view(view: str, /, *, reason: str | None = None) -> None:
    """Rebuild a view beside the one that is read, compare it with a replay, and switch.

    Shows how far it is; Ctrl-C ends the showing, not the rebuild. Where one is under way it shows that.

    Parameters
    ----------
    view
        As `muniment projections list` names it.
    reason
        Why, for those who come after.
    """
    async with open_desk(view) as desk:
        asked, is_new = await desk.ask(RebuildView(view=view, reason=reason))
        if not is_new:
            print(f"{view} is being rebuilt already", file=sys.stderr)
        try:
            ended = await _watch(desk, view, asked)
        except asyncio.CancelledError:
            print(
                f"The rebuild of {view} goes on: the same command shows it, `projections cancel` ends it.",
                file=sys.stderr,
            )
            raise
        async with desk.pool.connection() as connection:
            (one,) = [one for one in await rebuild.latest(connection) if one.view == view]
    print(f"{view}: {_told(one)}")
    if ended.outcome != "switched":
        sys.exit(1)


@projections.command
async def cancel(view: str, /, *, reason: str | None = None) -> None:
    """End the rebuild of a view that is under way, and drop what it made.

    Parameters
    ----------
    view
        As `muniment projections list` names it.
    reason
        Why, for those who come after.
    """
    async with open_desk(view) as desk:
        ended = await desk.done(CancelRebuild(view=view, reason=reason))
    if ended.outcome != "cancelled":
        raise DeskError(f"the rebuild of {view} had ended before it was cancelled: {ended.outcome}")
    print(f"the rebuild of {view} is cancelled; {view} is as it was")


@projections.command
async def rollback(view: str, /, *, reason: str | None = None) -> None:
    """Put back what the last rebuild of a view replaced, brought to where the view is now.

    Parameters
    ----------
    view
        As `muniment projections list` names it.
    reason
        Why, for those who come after.
    """
    async with open_desk(view) as desk:
        await desk.done(RollBackView(view=view, reason=reason))
    print(f"{view} is what it was before its last rebuild, and what that had made is dropped")


@projections.command(name="verify")
async def verify_view(view: str, /, *, project: str | None = None, reason: str | None = None) -> None:
    """Compare a view, row by row, with a replay of the ledger that knows nothing of it.

    Ends with 1 where they differ, and names what differs: row, field, both values, the event.

    Parameters
    ----------
    view
        As `muniment projections list` names it.
    project
        Only this project's part.
    reason
        Why, for those who come after.
    """
    async with open_desk(view) as desk:
        ended = await desk.done(VerifyView(view=view, project=project, reason=reason))
        async with desk.pool.connection() as connection:
            proofs = await proof.latest(connection, [view], project)
    for one in proofs:
        _tell_proof(one)
    if not ended.holds:
        sys.exit(1)


@parked.default
async def list_parked() -> None:
    """List the parts of views that are stopped before an event, and why."""
    async with connected() as connection:
        found = await rebuild.parked(connection)
    for one in found:
        print(f"{one.view} of {one.project_id}, before event {one.position} ({one.type}), since {one.since}")
        print(f"  {one.reason}")
    if not found:
        print("nothing is parked")


@parked.command
async def retry(view: str, /, *, project: str | None = None, reason: str | None = None) -> None:
    """Have what is parked tried again now, not within a minute.

    Parameters
    ----------
    view
        As `muniment projections list` names it.
    project
        Only this project's part.
    reason
        Why, for those who come after.
    """
    async with open_desk(view) as desk, desk.pool.connection() as connection:
        found = [one for one in await rebuild.parked(connection) if one.view == view]
        tried = {one.project_id: one.position - 1 for one in found if project in (None, one.project_id)}
        if not tried:
            raise DeskError(f"{view} is not parked{f' in {project}' if project else ''}")
        await desk.done(RetryParked(view=view, project=project, reason=reason))
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
    async with open_desk(view) as desk, desk.pool.connection() as connection:
        await desk.done(SkipEvent(view=view, project=project, position=position, reason=reason))
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
        raise DeskError(f"{view} of {', '.join(waiting)} has not moved yet: does a worker run?")


# Showing how far it is


async def _watch(desk: Desk, view: str, asked: Request) -> Request:
    """Show the rebuild of a view until it has ended; answers what came of it."""
    console = Console(stderr=True)
    shown: AbstractContextManager[Callable[[Rebuild, rebuild.Progress], None]]
    shown = _Bar(console, view) if console.is_terminal else nullcontext(_Lines(view))
    with shown as show:
        while True:
            if (ended := await desk.outcome(view, asked)) is not None:
                return ended
            async with desk.pool.connection() as connection:
                reached = await rebuild.progress(connection)
                found = [one for one in await rebuild.latest(connection) if one.view == view]
            there = reached.get(view, rebuild.Progress())
            for one in found:
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


def _tell_proof(proof: Proof) -> None:
    found = proof.verdict
    print(f"{found} ({found.rows:,} rows)")
    for drift in found.drifts:
        print(f"  {drift}")
    if found.drifted > len(found.drifts):
        print(f"  and {found.drifted - len(found.drifts):,} more")
