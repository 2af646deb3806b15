"""Rebuilding views from a ledger of a million events of the mix: how fast, in how much memory, and who notices.

As a program of the bench it rebuilds views, all at once, or only gives commands at a steady rate, or both; told: url
and worker (as whom the API and a worker connect), keys, project, seconds, events_per_second, views; and `only_filled`:
they are cancelled before they are compared. With both, the sessions are read all the time, and a read that fails ends
it.
"""

import asyncio
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from ledger.postgres import Connection, Pool, open_pool
from ops.bench import mix, serving
from ops.bench.committing import Load, committing, summary
from ops.bench.serving import PROJECT, cpu_seconds, settled
from ops.bench.stage import BenchError, Figures, Measure, Stage, answer, run, told, wait_for_word
from projections import VIEWS, sessions
from projections.rebuild import UNDER_WAY, begin, cancel, latest, next_of, progress

EVENTS = 1_000_000
FILLED_SECONDS = 3.0
"""Where a measurement takes less, it is a trial of the bench itself, and the ledger much smaller."""

FILLED_SECONDS_MAX = 3600
CALLERS = 256
EVENTS_PER_SECOND = 1000
LOOK_SECONDS = 0.02
READ_EVERY_SECONDS = 0.005
SWITCH_SECONDS = 0.5
"""What is read so long before the switch, and after it, counts."""

_FACTS = """
CREATE TABLE public.facts AS
SELECT stream_id, stream_version, position, type, convert_from(entry, 'UTF8')::jsonb AS event FROM ledger.events
"""

_MADE = """
DROP TABLE IF EXISTS public.made;
CREATE TABLE public.made (
    session_id uuid, position bigint, opened_at timestamptz, expires_at timestamptz, state text, agent_role text,
    session jsonb
)
"""

_AGGREGATE = """
INSERT INTO public.made
SELECT
    stream_id, min(position), min(event->>'recorded_at')::timestamptz,
    min(event->'data'->>'expires_at')::timestamptz,
    (array_agg(
        CASE type
            WHEN 'SessionOpened' THEN 'pending' WHEN 'SessionActivated' THEN 'active'
            WHEN 'SessionCompleted' THEN 'completed' WHEN 'SessionFailed' THEN 'failed'
            WHEN 'SessionExpired' THEN 'expired' WHEN 'SessionCancelled' THEN 'cancelled'
        END ORDER BY stream_version DESC
    ) FILTER (WHERE type <> 'SessionAnnotated'))[1],
    min(event->'data'->>'agent_role'),
    jsonb_build_object(
        'session_id', stream_id, 'version', max(stream_version), 'updated_at', max(event->>'recorded_at'),
        'metadata',
        (
            array_agg(event->'data'->'metadata' ORDER BY stream_version DESC) FILTER (WHERE event->'data' ? 'metadata')
        )[1],
        'labels', (array_agg(event->'data'->'labels') FILTER (WHERE type = 'SessionOpened'))[1]
    )
FROM public.facts WHERE type LIKE 'Session%' GROUP BY stream_id
"""


@contextmanager
def rebuilding(stage: Stage) -> Iterator[dict[str, Measure]]:
    """A ledger with its views, a worker that rebuilds them, and callers."""
    database = stage.new_database()
    events = int(EVENTS * min(1.0, (stage.seconds / FILLED_SECONDS) ** 2))
    asyncio.run(_fill(stage.api(database), str(stage.keys), events))
    connected = {"url": stage.api(database), "worker": stage.worker(database), "keys": str(stage.keys)}
    common = connected | {"project": PROJECT, "seconds": stage.seconds, "events_per_second": EVENTS_PER_SECOND}
    latest_of: dict[str, Figures] = {}
    with psycopg.connect(stage.owner(database), autocommit=True) as owner, serving.worker(stage, database):
        settled(stage, database, FILLED_SECONDS_MAX)
        owner.execute(_FACTS)
        owner.execute("VACUUM ANALYZE")

        def aggregate() -> Figures:
            owner.execute(_MADE)
            begun = time.perf_counter()
            owner.execute(_AGGREGATE)
            return Figures(stage.size(database, PROJECT), time.perf_counter() - begun)

        def rebuild(which: str, **more: Any) -> Figures:
            settled(stage, database, FILLED_SECONDS_MAX)
            (figures,) = run(("rebuilding", common | {"views": [], "only_filled": False} | more))
            latest_of.update({f"{name}, {which}": Figures(**one) for name, one in figures.items()})
            return latest_of.pop(f"it, {which}")

        def then(name: str) -> Figures:
            if name not in latest_of:
                raise BenchError("what it is a part of failed")
            return latest_of.pop(name)

        yield {
            "sessions by SQL over jsonb": aggregate,
            "sessions filled": lambda: rebuild("sessions", views=["sessions"], events_per_second=0),
            "sessions rebuilt": lambda: then("rebuilt, sessions"),
            "MB at a quarter": lambda: then("a quarter, sessions"),
            "MB at half": lambda: then("half, sessions"),
            "MB at the end": lambda: then("the end, sessions"),
            "all views filled": lambda: rebuild("all", views=list(VIEWS), events_per_second=0, only_filled=True),
            "commands, nothing rebuilt": lambda: rebuild("calm"),
            "commands, sessions rebuilt": lambda: rebuild("traffic", views=["sessions"]),
            "reads at the switch, the longest": lambda: then("switch, traffic"),
        }


async def _fill(url: str, keys: str, events: int) -> None:
    async with committing(url, keys) as committer:
        units = itertools.islice(mix.units(), events // mix.UNIT_COMMANDS)
        await Load(committer, PROJECT, units).run(CALLERS, float("inf"))


# The program


class Watch:
    """Sees rebuilds through that begin together: when the last of them was filled and switched, and, of one that is
    alone, what the process that did it used."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._builder: int | None = None
        self.events = 0
        self.fill_seconds = self.seconds = self.cpu_seconds = 0.0
        self.megabytes: dict[int, float] = {}
        """By quarters of the ledger that were taken."""
        self.switched_at = 0.0

    async def see(self, view: str, only_filled: bool) -> None:
        async with self._pool.connection() as connection:
            await self._see(connection, view, only_filled)

    async def _see(self, connection: Connection, view: str, only_filled: bool) -> None:
        begun, filled_at = time.perf_counter(), 0.0
        if not await begin(connection, view, "bench", "measured"):
            raise ValueError(f"{view} is being rebuilt already")
        while True:
            (rebuild,) = [one for one in await latest(connection) if one.view == view]
            now = time.perf_counter()
            if not filled_at:
                filled_at = now if await self._is_filled(connection, next_of(view)) else 0.0
            elif only_filled and rebuild.state in UNDER_WAY:
                await cancel(connection, view, "bench", "filled")
            if rebuild.state not in UNDER_WAY:
                break
            await asyncio.sleep(LOOK_SECONDS)
        if rebuild.state != ("cancelled" if only_filled else "switched"):
            raise ValueError(f"{view} was not rebuilt, but {rebuild.state}: {rebuild.ended_because}")
        self.switched_at = now
        self.fill_seconds = max(self.fill_seconds, filled_at - begun)
        self.seconds = max(self.seconds, now - begun)

    async def _is_filled(self, connection: Connection, schema: str) -> bool:
        table = f"{schema}.filling"
        cursor = await connection.execute("SELECT to_regclass(%s) IS NULL", [table])
        taken = (await progress(connection)).get(schema)
        if taken is None or not taken.taken:
            return False
        self.events = taken.total
        self._look_at_builder(4 * taken.taken // taken.total)
        return (await cursor.fetchall()) == [(True,)]

    def _look_at_builder(self, quarter: int) -> None:
        if self._builder is None or not Path(f"/proc/{self._builder}").exists():
            self._builder = builder()
        if self._builder is not None:
            self.megabytes[quarter] = megabytes(self._builder)
            self.cpu_seconds = cpu_seconds(self._builder)

    def megabytes_at(self, quarter: int) -> float:
        """As of when so much was taken, or the next time that was looked."""
        return next(used for reached, used in sorted(self.megabytes.items()) if reached >= quarter)


def builder() -> int | None:
    """The process that makes a build, somewhere among those that the bench started."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"projections.build" in path.read_bytes().split(b"\0") and os.getppid() in _ancestors(path.parent.name):
                return int(path.parent.name)
        except OSError:
            continue
    return None


def _ancestors(pid: str) -> Iterator[int]:
    while pid != "0":
        pid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        yield int(pid)


def megabytes(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0


class Traffic:
    """Commands at even intervals, whatever became of those before, and reads one after the other."""

    def __init__(self) -> None:
        self.taken_ms: list[float] = []
        self.reads: list[tuple[float, float]] = []
        """When each ended, and how long it took in ms."""

    async def command(self, committer: Any, project: str, per_second: int, seconds: float) -> None:
        async def submit(unit: mix.Unit) -> None:
            for command in unit:
                begun = time.perf_counter()
                receipt = await committer.submit(project, command, mix.AGENT)
                if receipt.refusal is not None:
                    raise receipt.refusal
                self.taken_ms.append((time.perf_counter() - begun) * 1000)

        begun = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in itertools.count():
                at = begun + number * mix.UNIT_COMMANDS / per_second
                if at > begun + seconds:
                    return
                await asyncio.sleep(at - time.perf_counter())
                group.create_task(submit(next(UNITS)))

    async def read(self, connection: Connection, ledger_id: UUID) -> None:
        page = await sessions.search(connection, ledger_id, sessions.Filter(), limit=100)
        for session in itertools.cycle(page.sessions):
            begun = time.perf_counter()
            if await sessions.get(connection, ledger_id, session.session_id) is None:
                raise ValueError(f"the session {session.session_id} was gone")
            now = time.perf_counter()
            self.reads.append((now, (now - begun) * 1000))
            await asyncio.sleep(READ_EVERY_SECONDS)

    def longest_read_ms(self, at: float) -> float:
        return max(took for ended, took in self.reads if abs(ended - at) < SWITCH_SECONDS)


UNITS = mix.units()


async def main(
    url: str,
    worker: str,
    keys: str,
    project: str,
    seconds: float,
    events_per_second: int,
    views: list[str],
    only_filled: bool,
) -> None:
    traffic = Traffic()
    async with (
        open_pool(url, 1) as readers,
        readers.connection() as reader,
        open_pool(worker, len(VIEWS)) as workers,
        committing(url, keys) as committer,
    ):
        watch = Watch(workers)
        ledger = await committer.ledger(project)
        assert ledger is not None
        if events_per_second:
            await traffic.command(committer, project, events_per_second, min(1.0, seconds))
            traffic.taken_ms.clear()
        wait_for_word()
        begun = time.perf_counter()
        async with _running(traffic.read(reader, ledger.ledger_id) if events_per_second else None):
            length = float("inf") if views else seconds
            commands = traffic.command(committer, project, events_per_second, length) if events_per_second else None
            async with _running(commands) as commanding:
                await asyncio.gather(*(watch.see(view, only_filled) for view in views))
                if commanding is not None and not views:
                    await commanding
                await asyncio.sleep(SWITCH_SECONDS if views and commanding is not None else 0)
        answer(**_found(watch, traffic, time.perf_counter() - begun))


@asynccontextmanager
async def _running(job: Any) -> Any:
    """`job`, if any, for as long as the block runs; what it raises is raised."""
    task = asyncio.ensure_future(job) if job is not None else None
    yield task
    if task is not None:
        if not task.done():
            task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


def _found(watch: Watch, traffic: Traffic, seconds: float) -> dict[str, Any]:
    if traffic.taken_ms:
        found: dict[str, Any] = {"it": summary(traffic.taken_ms, seconds)}
        if watch.switched_at:
            longest = traffic.longest_read_ms(watch.switched_at)
            found["switch"] = {"count": len(traffic.reads), "seconds": seconds, "p99_ms": longest}
        return found
    found = {"it": {"count": watch.events, "seconds": watch.fill_seconds, "cpu_seconds": watch.cpu_seconds}}
    found["rebuilt"] = {"count": watch.events, "seconds": watch.seconds}
    for quarter, name in ((1, "a quarter"), (2, "half"), (4, "the end")):
        found[name] = {"count": int(watch.megabytes_at(quarter)), "seconds": 1.0}
    return found


if __name__ == "__main__":
    asyncio.run(main(**told()))
