"""What publishing costs: appends while the worker publishes and while it does not, to one ledger, with witnesses, and
to many ledgers; and how long after its commit an event is covered by a checkpoint that is served.

As a program of the bench it appends to ledgers; told: url, keys, projects, seconds, callers of each; or
events_per_second, of all. The commands are made before the clock starts.
"""

import asyncio
import gc
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import uvloop

from ledger import store, tree
from ledger.checkpoint import VerifierKey
from ledger.postgres import Connection
from ledger.signing import LogFiles
from ops.bench import mix, serving
from ops.bench.committing import WARM_UP_SECONDS, Load, committing, summary
from ops.bench.serving import PROJECT, SETTLED_SECONDS_MAX, cpu_seconds, free_port, settled
from ops.bench.stage import BenchError, Figures, Measure, Stage, answer, environment, run, told, wait_for_word
from ops.bench.visible import lags_ms
from ops.witness import opened
from projections import VIEWS

CALLERS = 32
LEDGERS = 100
WITNESSES = 2
EVENTS_PER_SECOND = 2000
EVENTS_STEADILY = 1000
BATCH_CONNECTIONS = 16
LOOK_SECONDS = 0.002
A_MOMENT = 0.1
AROUND_SECONDS = 5.0
"""In so long a program gets ready, and views and log get all that it appended, as a rule; in a trial of the bench, with
rounds under 1 s, it does not matter."""

_NOT_PUBLISHED = "INSERT INTO projections.leases VALUES ('publisher', 'the bench', 1, 'infinity')"
"""The worker leaves to another what that other has the lease of, and does all else."""

_BEHIND = """
SELECT count(*)
FROM ledger.ledgers AS l
LEFT JOIN ledger.logs AS g USING (ledger_id)
CROSS JOIN unnest(%s::text[]) AS v (view)
LEFT JOIN projections.positions AS p ON p.ledger_id = l.ledger_id AND p.view = v.view
WHERE coalesce(p.position, 0) < l.size OR %s AND coalesce(g.published_size, 0) < l.size
"""
_REACHED = """
SELECT l.size, coalesce(g.published_size, 0)
FROM ledger.ledgers AS l LEFT JOIN ledger.logs AS g USING (ledger_id) WHERE l.project_id = %s
"""


class Auditor(NamedTuple):
    """A witness that runs, and where it has its store."""

    url: str
    vkey: str
    home: Path


@contextmanager
def publishing(stage: Stage) -> Iterator[dict[str, Measure]]:
    """A database and its worker for each measure, which runs for as long as it is measured."""
    many = max(2, int(LEDGERS * min(1.0, stage.seconds)))
    with ExitStack() as ends:
        auditors = [ends.enter_context(auditor(stage, number)) for number in range(WITNESSES)]
        one = Appends(stage, 1)
        measured = {
            "one ledger, not published": Appends(stage, 1, published=False),
            "one ledger, published": one,
            "one ledger, cosigned": Appends(stage, 1, auditors),
            "many ledgers, not published": Appends(stage, many, published=False),
            "many ledgers, published": Appends(stage, many),
        }
        yield {
            **{name: appends.fast for name, appends in measured.items()},
            **{f"steadily, {name}": appends.steadily for name, appends in measured.items()},
            "covered, 2,000 events/s": partial(covered, stage, one.database, _at_a_pace),
            "covered, 100 commands a request": partial(covered, stage, one.database, _in_batches),
        }


@contextmanager
def auditor(stage: Stage, number: int) -> Iterator[Auditor]:
    """A witness as `muniment witness run` runs it."""
    home, port = stage.directory / f"witness-{number}", free_port()
    witness = [sys.executable, "-P", "-m", "ops.cli", "witness"]
    making = [*witness, "init", f"witness-{number}.example.org", "--home", str(home)]
    subprocess.run(making, env=environment(), stdout=subprocess.DEVNULL, check=True)
    with serving.process([*witness, "run", "--home", str(home), "--port", str(port)], {}) as running:
        serving.wait_for(port, running)
        with opened(home) as same:
            yield Auditor(f"http://127.0.0.1:{port}", str(same.key.verifier), home)


class Appends:
    """Appends to ledgers of a database of their own, with a worker that follows them."""

    def __init__(self, stage: Stage, ledgers: int, auditors: Sequence[Auditor] = (), *, published: bool = True) -> None:
        self.database = stage.new_database()
        self._stage, self._published = stage, published
        projects = [PROJECT, *(f"{PROJECT}-{number}" for number in range(1, ledgers))]
        callers = CALLERS if ledgers == 1 else 1
        told = {"url": stage.api(self.database), "keys": str(stage.keys), "projects": projects, "callers": callers}
        self._program = partial(run_one, "publishing", told)
        self._program(seconds=A_MOMENT)  # that all ledgers are there
        self._settings: dict[str, str] = {}
        self._steadily: Figures | None = None
        if not published:
            with psycopg.connect(stage.owner(self.database)) as owner:
                owner.execute(_NOT_PUBLISHED)
        if auditors:
            key = asyncio.run(_key_of(stage, self.database))
            named = {"quorum": len(auditors), "witnesses": [{"url": one.url, "vkey": one.vkey} for one in auditors]}
            file = stage.directory / f"{self.database}.json"
            file.write_text(json.dumps(named))
            self._settings["MUNIMENT_WITNESSES"] = str(file)
            for one in auditors:
                with opened(one.home) as witness:
                    witness.add_log(key)

    def fast(self) -> Figures:
        """What was appended each second, as fast as it goes; then, with the same worker, what `steadily` tells."""
        self._steadily = None
        with self._followed() as (worker, owner):
            figures = Figures(**self._program(seconds=self._stage.seconds))
            self._caught_up(owner)
            self._steadily = self._measure_steadily(worker, owner)
        return figures

    def steadily(self) -> Figures:
        """What so many events a second cost in processor time."""
        if self._steadily is None:
            raise BenchError("what it comes after failed")
        return self._steadily

    def _measure_steadily(self, worker: int, owner: psycopg.Connection[Any]) -> Figures:
        """That of who appends, of the worker, and of PostgreSQL, for as long, and until the views have all of it, and
        the log where it is published."""
        seconds = self._stage.seconds
        worked, until = self._worked(worker), time.monotonic() + seconds + AROUND_SECONDS * min(1.0, seconds)
        figures = self._program(seconds=seconds, events_per_second=EVENTS_STEADILY)
        self._caught_up(owner)
        time.sleep(max(0.0, until - time.monotonic()))  # as long where nothing is to be published
        worked = self._worked(worker) - worked
        return Figures(**figures | {"cpu_seconds": figures["cpu_seconds"] + worked})

    @contextmanager
    def _followed(self) -> Iterator[tuple[int, psycopg.Connection[Any]]]:
        """With a worker, whose id it is, that is through with all that was there."""
        with (
            serving.worker(self._stage, self.database, **self._settings) as worker,
            psycopg.connect(self._stage.owner(self.database), autocommit=True) as owner,
        ):
            # One that just started looks at every log: that is done once it has followed what comes now.
            self._program(seconds=A_MOMENT)
            self._caught_up(owner)
            yield worker, owner

    def _worked(self, worker: int) -> float:
        postgres = self._stage.server.pid
        assert postgres is not None
        return cpu_seconds(worker) + cpu_seconds(postgres)

    def _caught_up(self, owner: psycopg.Connection[Any]) -> None:
        deadline = time.monotonic() + SETTLED_SECONDS_MAX
        while (behind := owner.execute(_BEHIND, [list(VIEWS), self._published]).fetchall()) != [(0,)]:
            if time.monotonic() > deadline:
                raise BenchError(f"views and logs did not catch up within {SETTLED_SECONDS_MAX} s: {behind}")
            time.sleep(0.05)


def run_one(program: str, told: dict[str, Any], **more: Any) -> dict[str, Any]:
    (figures,) = run((program, told | more))
    return figures


async def _key_of(stage: Stage, database: str) -> VerifierKey:
    """The key of its log, which its worker will sign with."""
    async with await Connection.connect(stage.owner(database), autocommit=True) as connection:
        await tree.add_key(connection, 1, LogFiles(stage.keys).make(1))
        ledger = await store.find_ledger(connection, PROJECT)
        assert ledger is not None
        (key,) = await tree.keys_of(connection, f"{await store.deployment(connection)}/{ledger.ledger_id}")
    return key.vkey


# From the commit until it is covered


def _at_a_pace(stage: Stage, database: str) -> None:
    told = {"url": stage.api(database), "keys": str(stage.keys), "project": PROJECT, "seconds": stage.seconds}
    run(("visible", told | {"events_per_second": EVENTS_PER_SECOND}))


def _in_batches(stage: Stage, database: str) -> None:
    with serving.api(stage, database) as api:
        api.load("batches", BATCH_CONNECTIONS)


def covered(stage: Stage, database: str, load: Callable[[Stage, str], None]) -> Figures:
    """How long after it could first be seen an event was covered by a published checkpoint."""
    with serving.worker(stage, database), ThreadPoolExecutor(1) as aside:
        settled(stage, database)
        return watch(stage, database, aside.submit(load, stage, database))


def watch(stage: Stage, database: str, loading: Future[None]) -> Figures:
    """Look at both until all that came is covered. Told up to a look too long or too short."""
    grown: list[tuple[float, int]] = []
    seen: list[tuple[float, int]] = []
    with psycopg.connect(stage.api(database), autocommit=True) as connection:
        while True:
            over = loading.done()
            ((size, published),) = connection.execute(_REACHED, [PROJECT], prepare=True).fetchall()
            now = time.perf_counter()
            if not grown or size > grown[-1][1]:
                grown.append((now, size))
            seen.append((now, published))
            if over and published >= size:
                break
            if now - grown[-1][0] > SETTLED_SECONDS_MAX:
                raise BenchError(f"of {size} events {published} were published {SETTLED_SECONDS_MAX} s later")
            time.sleep(LOOK_SECONDS)
    loading.result()
    lags = lags_ms(grown[1:], seen)
    counts = [size - before for (_, before), (_, size) in itertools.pairwise(grown)]
    of_events = itertools.chain.from_iterable(map(itertools.repeat, lags, counts))
    return Figures(**summary(list(of_events), grown[-1][0] - grown[0][0]))


async def main(
    url: str, keys: str, projects: list[str], callers: int, seconds: float, events_per_second: int | None = None
) -> None:
    async with committing(url, keys) as committer:

        async def fast(supply: Iterator[mix.Unit], seconds: float) -> tuple[list[float], float]:
            loads = [Load(committer, project, supply) for project in projects]
            begun = time.perf_counter()
            await asyncio.gather(*(one.run(callers, seconds) for one in loads))
            return [took for one in loads for took in one.taken_ms], time.perf_counter() - begun

        async def steadily(supply: list[mix.Unit], every: float) -> tuple[list[float], float]:
            loads = [Load(committer, project, iter([unit])) for unit, project in zip(supply, itertools.cycle(projects))]
            begun = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for number, load in enumerate(loads):
                    await asyncio.sleep(begun + number * every - time.perf_counter())
                    group.create_task(load.run(1, float("inf")))
            return [took for one in loads for took in one.taken_ms], time.perf_counter() - begun

        needed = (events_per_second or 0) * seconds / mix.UNIT_COMMANDS
        if not events_per_second:
            warm_up, took = await fast(mix.units(), min(WARM_UP_SECONDS, seconds))
            needed = len(warm_up) / took * seconds * 2 / mix.UNIT_COMMANDS + callers * len(projects)
        supply = list(itertools.islice(mix.units(), int(needed)))
        gc.collect()
        gc.freeze()
        wait_for_word()
        worked = time.process_time()
        if events_per_second:
            taken_ms, took = await steadily(supply, mix.UNIT_COMMANDS / events_per_second)
        else:
            taken_ms, took = await fast(iter(supply), seconds)
        worked = time.process_time() - worked
    answer(**summary(taken_ms, took), cpu_seconds=worked)


if __name__ == "__main__":
    uvloop.run(main(**told()))
