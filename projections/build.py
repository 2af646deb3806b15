"""The making of a build of a view, aside: filled from the ledger, indexed, caught up, compared with a replay.

It has a process of its own, which gives way to all others, and rests while anybody writes: so whoever reads, writes
and keeps the other views waits for it as little as can be. What it is told it reads from its input, and ends when that
does; where the build cannot be made, it says why on its output. See `aside`.
"""

import asyncio
import gc
import logging
import os
import sys
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Struct
from psycopg.errors import DuplicateTable, UniqueViolation

from ledger.postgres import Pool, fetch, open_pool, queries
from projections import VIEWS
from projections.filling import REST, Filling, anybody_writes
from projections.projector import TROUBLE, Projector, Troubles
from projections.verify import code_version, summed_up, verify

log = logging.getLogger(__name__)

SQL = queries("projections", "build")

NICE = 10
"""Of the processor it gets a tenth of what others do who want it too."""

CATCH_UP_EVENTS_MAX = 1000
LOOK_SECONDS = 0.2
RETRY_SECONDS = 1.0
END_SECONDS_MAX = 5.0
LINE_BYTES_MAX = 2**24

CLOSE_EVENTS = 1000
"""So near to the view's end, a build is compared, and then switched."""


class Failed(Exception):
    """The build cannot be made, for this reason."""


async def until_one_ends(*work: Coroutine[Any, Any, None]) -> None:
    """Do all of this until one has ended, and end the others. Raises what any of them did."""
    jobs = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for job in jobs:
            job.cancel()
        await asyncio.wait(jobs)
    for job in jobs:
        if not job.cancelled():
            job.result()


class Told(Struct):
    """What the process is told: where the database is, and which build."""

    url: str
    view: str
    schema: str
    number: int


async def aside(told: Told) -> None:
    """Have the build made by a process of its own; killed, it is followed by another, which goes on. Raises Failed.

    Cancelled, or killed together with this process, it ends: its input does.
    """
    while True:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "projections.build"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=LINE_BYTES_MAX,
            start_new_session=True,  # who interrupts this process from a terminal does not mean that one
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        with suppress(ProcessLookupError, PermissionError):  # where a sandbox forbids it, it only rests
            os.setpriority(os.PRIO_PROCESS, process.pid, NICE)  # before it has begun: to start is work too
        try:
            process.stdin.write(msgspec.json.encode(told) + b"\n")
            reason, _ = await asyncio.gather(process.stdout.read(), _log(process.stderr))
        finally:
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), END_SECONDS_MAX)
            except TimeoutError:
                process.kill()
                await process.wait()
        if process.returncode == 0 and not reason:
            return
        if process.returncode is None or process.returncode >= 0:
            raise Failed(
                reason.decode() or f"the process that makes it ended with {process.returncode}; its log says why"
            )
        await asyncio.sleep(LOOK_SECONDS)


async def _log(lines: asyncio.StreamReader) -> None:
    """Write what that process logs to the log of this one, as that is written."""
    levels = logging.getLevelNamesMapping()
    async for line in lines:
        level, _, said = line.decode(errors="replace").rstrip().partition(" ")
        if level in levels:
            log.log(levels[level], "%s", said)
        else:
            log.error("%s %s", level, said)  # of a traceback


# In that process


async def _make(told: Told) -> None:
    """Raises Failed. Without a database, wait for one."""
    troubles = Troubles(log.warning)
    async with open_pool(told.url, connections_max=4) as pool:
        while True:
            try:
                return await Build(pool, told).make()
            except TROUBLE as error:
                troubles.say("build", f"a rebuild goes on when the database can be used again: {error}")
                await asyncio.sleep(RETRY_SECONDS)


class Build:
    """One build, from wherever it is until it may be switched."""

    def __init__(self, pool: Pool, told: Told) -> None:
        self._pool = pool
        self._view, self._schema = told.view, told.schema
        self._names = {"view": told.view, "schema": told.schema, "number": told.number}

    async def make(self) -> None:
        """Raises Failed, and whatever of TROUBLE the database has; it can then be made further."""
        await Filling(self._pool, self._schema).run()
        projector = Projector(self._pool, {self._schema: VIEWS[self._view]}, batch_events_max=CATCH_UP_EVENTS_MAX)
        await until_one_ends(projector.run(), self._index_and_compare())

    async def _index_and_compare(self) -> None:
        await self._come_near()
        async with self._pool.connection() as connection:
            # Made of all rows in one go, which costs less than row by row. What is made stays made.
            for (statement,) in await fetch(connection, SQL.finish, **self._names):
                # Else by another worker, which has not heard yet that it lost the job.
                with suppress(DuplicateTable, UniqueViolation):
                    async with connection.transaction():
                        await connection.execute(SQL.one_processor)
                        await connection.execute(statement.encode())
            await connection.execute(SQL.compare, {**self._names, "code_version": code_version()})
        verdicts = []
        rest = REST if await anybody_writes(self._pool) else 0.0
        async for verdict in verify(self._pool, self._schema, rest=rest):
            if not verdict.holds:
                first = verdict.drifts[0] if verdict.drifts else None
                raise Failed(f"what was built is not what a replay makes: {verdict}; first: {first}")
            verdicts.append(verdict)
        found = summed_up(verdicts)
        said = {"heads_digest": found.heads_digest, "digest": found.digest, "rows": found.rows}
        async with self._pool.connection() as connection:
            await connection.execute(SQL.compared, {**self._names, **said})
        await self._come_near()

    async def _come_near(self) -> None:
        """Return when the build is nearly where the view is. Raises Failed where it cannot come there."""
        while True:
            async with self._pool.connection() as connection:
                for project, position, reason in await fetch(connection, SQL.stuck, **self._names):
                    raise Failed(f"event {position} of {project} cannot be taken: {reason}")
                if (await fetch(connection, SQL.missing, **self._names))[0][0] <= CLOSE_EVENTS:
                    return
            await asyncio.sleep(LOOK_SECONDS)


async def main() -> None:
    told = msgspec.json.decode(sys.stdin.buffer.readline(), type=Told)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("psycopg").setLevel(logging.ERROR)  # of connections that are busy when it is to end
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    making = asyncio.ensure_future(_make(told))
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), making.cancel)
    try:
        await making
    except Failed as failed:
        sys.stdout.write(str(failed))
    except asyncio.CancelledError:
        sys.exit(1)  # the worker is gone, or wants it no more


if __name__ == "__main__":
    asyncio.run(main())
