"""From commit to visible: how long after its receipt an event is in every view. A program of the bench.

Told: url, keys, project, events_per_second, seconds. Units begin at even intervals, whatever became of those
before. The views' positions are asked for every millisecond, so a lag is told up to about one too long.
"""

import asyncio
import time
from uuid import UUID

from ledger.postgres import Connection, Statement, open_pool, uuid
from ops.bench import mix
from ops.bench.committing import committing, summary
from ops.bench.stage import answer, told, wait_for_word
from projections import VIEWS

ASKED_EVERY_SECONDS = 0.001
PATIENCE_SECONDS = 60

# Not by way of psycopg's `execute`: what looks a thousand times a second must cost next to nothing.
_seen = Statement(
    "seen", b"SELECT count(*), min(position) FROM projections.positions WHERE ledger_id = %(ledger_id)s::uuid"
)


class Watch:
    """What the views have seen of a ledger, and when."""

    def __init__(self, connection: Connection, ledger_id: UUID) -> None:
        self._connection, self._ledger = connection, {"ledger_id": uuid(ledger_id)}
        self.seen: list[tuple[float, int]] = []
        self.last = 2**63
        """The position at which to stop looking."""

    async def run(self) -> None:
        deadline = time.perf_counter() + PATIENCE_SECONDS
        while not self.seen or self.seen[-1][1] < self.last:
            ((views, reached),) = await _seen.fetch(self._connection, self._ledger)
            now = time.perf_counter()
            if views == len(VIEWS):
                self.seen.append((now, reached))
            if now > deadline:
                raise TimeoutError(f"the views did not reach {self.last}: {views} are at {reached}")
            await asyncio.sleep(ASKED_EVERY_SECONDS)


def lags_ms(committed: list[tuple[float, int]], seen: list[tuple[float, int]]) -> list[float]:
    """For each (time, position) committed: how long until a (time, position) seen has reached it."""
    lags = []
    sights = iter(seen)
    at, reached = next(sights)
    for committed_at, position in sorted(committed, key=lambda one: one[1]):
        while reached < position:
            at, reached = next(sights)
        lags.append(max(0.0, at - committed_at) * 1000)
    return lags


async def main(url: str, keys: str, project: str, events_per_second: int, seconds: float) -> None:
    committed: list[tuple[float, int]] = []

    async def submit(unit: mix.Unit) -> None:
        for command in unit:
            receipt = await committer.submit(project, command, mix.AGENT)
            committed.append((time.perf_counter(), receipt.first_position))

    async def pace(seconds: float) -> None:
        begun = time.perf_counter()
        every = mix.UNIT_COMMANDS / events_per_second
        async with asyncio.TaskGroup() as group:
            for number in range(int(seconds / every)):
                await asyncio.sleep(begun + number * every - time.perf_counter())
                group.create_task(submit(next(units)))

    units = mix.units()
    async with committing(url, keys) as committer, open_pool(url, 1) as pool, pool.connection() as own:
        await pace(min(1.0, seconds))
        ledger = await committer.ledger(project)
        assert ledger is not None
        watch = Watch(own, ledger.ledger_id)
        watch.last = max(position for _, position in committed)
        await watch.run()
        committed.clear()
        wait_for_word()
        watch = Watch(own, ledger.ledger_id)
        begun = time.perf_counter()
        watching = asyncio.create_task(watch.run())
        await pace(seconds)
        took = time.perf_counter() - begun
        watch.last = max(position for _, position in committed)
        await watching
    answer(**summary(lags_ms(committed, watch.seen), took))


if __name__ == "__main__":
    asyncio.run(main(**told()))
