"""One runner among many workers: who holds a job's lease row does the job.

It is a row with an end, not an advisory lock: that would be lost, or kept for ever, behind a transaction pooler.
A holder that stalls past its end may still believe for a moment that it holds it, so no job may rely on being
alone for its correctness; it relies on it for not doing the work twice.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from uuid import uuid4

import psycopg
from psycopg_pool import PoolTimeout

from ledger.postgres import Pool, queries

log = logging.getLogger(__name__)

SQL = queries("ops", "lease")

LEASE_SECONDS = 4.0
KEEP_SECONDS = 1.0
"""How often a holder renews its lease, and how often the others look whether it ran out."""

STOP_SECONDS_MAX = 10.0

HOLDER = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
"""This process, for whoever reads the table."""


async def run_alone(pool: Pool, job: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work`, which never ends by itself, while no other process runs `job`; wait for one's turn until then.

    Ends only when cancelled, and then lets the next one have the lease at once; a holder that dies is followed
    within LEASE_SECONDS and KEEP_SECONDS. What `work` raises is raised, and that it cannot be stopped. Without a
    database, it waits for one.
    """
    reachable = True
    while True:
        fence = None
        try:
            fence = await _take(pool, job)
            reachable = True
        except (psycopg.Error, PoolTimeout) as error:
            if reachable:
                log.warning("%s: waiting for the database: %s", job, error)
            reachable = False
        if fence is not None:
            log.info("%s: this worker runs it (fence %d)", job, fence)
            working = asyncio.ensure_future(work())
            try:
                await _keep(pool, job, fence, working)
            finally:
                working.cancel()
                _, goes_on = await asyncio.wait([working], timeout=STOP_SECONDS_MAX)
                if goes_on:
                    # In Python 3.11 a cancellation is lost where what was waited for came, or was late, at the same
                    # moment (asyncio.wait_for, which psycopg uses): as when this process was stopped for a while.
                    raise AssertionError(f"{job} goes on although it lost the lease: this worker has to start again")
                with suppress(psycopg.Error, PoolTimeout):
                    async with pool.connection(timeout=1) as connection:
                        await connection.execute(SQL.release, {"job": job, "fence": fence})
            log.warning("%s: this worker lost the lease", job)
        await asyncio.sleep(KEEP_SECONDS)


async def _take(pool: Pool, job: str) -> int | None:
    values = {"job": job, "holder": HOLDER, "seconds": LEASE_SECONDS}
    async with pool.connection() as connection:
        row = await (await connection.execute(SQL.take, values)).fetchone()
        return row[0] if row else None


async def _keep(pool: Pool, job: str, fence: int, working: "asyncio.Future[None]") -> None:
    """Return when the lease is lost, or may be: the server could not be asked in time. Raises what the work raises."""
    loop = asyncio.get_running_loop()
    held_until = loop.time() + LEASE_SECONDS
    values = {"job": job, "fence": fence, "seconds": LEASE_SECONDS}
    while loop.time() < held_until:
        await asyncio.wait([working], timeout=KEEP_SECONDS)
        if working.done():
            working.result()
            raise AssertionError(f"{job} ended by itself")
        asked_at = loop.time()
        with suppress(psycopg.Error, PoolTimeout):
            async with pool.connection(timeout=KEEP_SECONDS) as connection:
                row = await (await connection.execute(SQL.keep, values)).fetchone()
            if row is None:
                return
            held_until = asked_at + LEASE_SECONDS
