"""The Python peers of tasks as they come, given jobs that do nothing one a call. A program of the bench.

Told: peer, directory, database, submitters, workers, jobs. Each is set up in a database of its own and runs in this one
process, its callers and its workers, as Muniment's do in process; what it does with jobs that ended is as it comes.
pg-boss is told on to node, as a script that does the same.
"""

import asyncio
import gc
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import asyncpg
import psycopg
import uvloop
from pgqueuer.db import AsyncpgPoolDriver
from pgqueuer.models import Job
from pgqueuer.qm import QueueManager
from pgqueuer.queries import Queries
from procrastinate import App, PsycopgConnector

from ops.bench.stage import answer, told, wait_for_word

QUEUE = "bench"
USER = "muniment"
WARM_UP_JOBS = 200
AT_ONCE = 5
"""How many of a peer's own workers there are: each fetches one job after the other. In short trials on a busy machine
five beat one every time, and ten beat five once in four."""


class Jobs:
    """What was handed out, and when it was all that there is."""

    def __init__(self) -> None:
        self.submitted = 0
        self.all = asyncio.Event()
        self._seen: set[int] = set()

    def take(self, job: int) -> None:
        if job in self._seen:
            raise ValueError(f"{job} was handed out twice")
        self._seen.add(job)
        if len(self._seen) == self.submitted:
            self.all.set()

    def submit(self, count: int) -> Iterator[int]:
        """The numbers of `count` more."""
        self.all.clear()
        first, self.submitted = self.submitted, self.submitted + count
        return iter(range(first, self.submitted))


async def procrastinate(directory: str, database: str, submitters: int, workers: int, jobs: int) -> None:
    """Its workers, with so many jobs at once in all. Jobs that ended are kept, as it is set."""
    url = f"host={directory} port=5432 user={USER} dbname={database}"
    app = App(connector=PsycopgConnector(conninfo=url, min_size=4, max_size=submitters))
    handed = Jobs()

    @app.task(name="nothing", queue=QUEUE)
    async def nothing(number: int) -> None:
        handed.take(number)

    async with app.open_async(), await psycopg.AsyncConnection.connect(url, autocommit=True) as own:
        await app.schema_manager.apply_schema_async()
        told: dict[str, Any] = {"concurrency": workers // AT_ONCE, "install_signal_handlers": False}
        running = [asyncio.create_task(app.run_worker_async(**told)) for _ in range(AT_ONCE)]

        async def ended() -> bool:
            rows = await own.execute("SELECT FROM procrastinate_jobs WHERE status IN ('todo', 'doing') LIMIT 1")
            return await rows.fetchone() is None

        await measure(lambda number: nothing.defer_async(number=number), submitters, handed, jobs, ended)
        for worker in running:
            worker.cancel()
        await asyncio.wait(running)


async def pgqueuer(directory: str, database: str, submitters: int, workers: int, jobs: int) -> None:
    """Its queue managers, with batches of one. Jobs that ended are deleted and logged, as it is set."""
    told = {"host": directory, "port": 5432, "user": USER, "database": database}
    handed, most = Jobs(), submitters + 2 * AT_ONCE

    def manager(pool: Any) -> QueueManager:
        made = QueueManager(Queries(AsyncpgPoolDriver(pool)))

        @made.entrypoint(QUEUE)
        async def nothing(job: Job) -> None:
            assert job.payload is not None
            handed.take(int(job.payload))

        return made

    async with asyncpg.create_pool(**told, min_size=4, max_size=most) as pool:  # type: ignore[no-untyped-call]
        queries = Queries(AsyncpgPoolDriver(pool))
        await queries.install()
        managers = [manager(pool) for _ in range(AT_ONCE)]
        running = [asyncio.create_task(one.run(batch_size=1)) for one in managers]

        async def ended() -> bool:
            return await pool.fetchval("SELECT 1 FROM pgqueuer LIMIT 1") is None

        await measure(lambda number: queries.enqueue(QUEUE, b"%d" % number), submitters, handed, jobs, ended)
        for one in managers:
            one.shutdown.set()
        await asyncio.gather(*running)


async def measure(
    submit: Callable[[int], Awaitable[Any]],
    submitters: int,
    handed: Jobs,
    jobs: int,
    ended: Callable[[], Awaitable[bool]],
) -> None:
    """From the first job's submission to the end of the last, on record."""

    async def call(numbers: Iterator[int]) -> None:
        for number in numbers:
            await submit(number)

    async def work_off(count: int) -> None:
        numbers = handed.submit(count)
        await asyncio.gather(*(call(numbers) for _ in range(submitters)))
        await handed.all.wait()
        while not await ended():  # noqa: ASYNC110  (in the database)
            await asyncio.sleep(0.001)

    await work_off(min(WARM_UP_JOBS, jobs))
    gc.collect()
    gc.freeze()
    wait_for_word()
    begun, worked = time.perf_counter(), time.process_time()
    await work_off(jobs)
    took = time.perf_counter() - begun
    answer(count=jobs, seconds=took, cpu_seconds=time.process_time() - worked)


PEERS = {"procrastinate": procrastinate, "pgqueuer": pgqueuer}

if __name__ == "__main__":
    logging.getLogger("procrastinate").setLevel(logging.ERROR)  # or it warns that an app is in the main module
    known = told()
    if known["peer"] == "pg-boss":
        os.execv(known["node"], [known["node"], known["script"], json.dumps(known)])  # noqa: S606
    uvloop.run(PEERS[known.pop("peer")](**known))
