"""The committer in this process, given the mix by many callers at once. A program of the bench.

Told: url, keys, project, callers, seconds; replays (a share) and `old`: of commands that were recorded
before this process started. The commands are made before the clock starts, as pgbench's rows are; all that
Muniment does with them is inside.
"""

import asyncio
import gc
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvloop

from ledger.committer import Committer
from ledger.postgres import open_pool
from ledger.vault import Vault
from ops.bench import mix
from ops.bench.stage import answer, told, wait_for_word

WARM_UP_SECONDS = 0.5
OLD_UNITS_A_SECOND = 600
"""So many that up to 27,000 commands a second no old one is sent twice."""


@asynccontextmanager
async def committing(url: str, keys: str) -> AsyncIterator[Committer]:
    """A committer as an API process has it."""
    async with open_pool(url, connections_max=8) as pool:
        committer = Committer(pool, Vault(Path(keys), pool, create_keys=True), create_ledgers=True)
        yield committer
        await committer.close()


class Load:
    """Callers that take unit after unit from one supply and submit its commands in order."""

    def __init__(self, committer: Committer, project_id: str, supply: Iterator[mix.Unit]) -> None:
        self._committer, self._project_id, self._supply = committer, project_id, supply
        self.taken_ms: list[float] = []
        self.replayed = 0

    async def run(self, callers: int, seconds: float) -> float:
        """How long it really took: until `seconds` were over, or the supply was."""
        begun = time.perf_counter()
        await asyncio.gather(*(self._call(begun + seconds) for _ in range(callers)))
        return time.perf_counter() - begun

    async def _call(self, until: float) -> None:
        submit, project_id = self._committer.submit, self._project_id
        for unit in self._supply:
            for command in unit:
                begun = time.perf_counter()
                receipt = await submit(project_id, command, mix.AGENT)
                if receipt.refusal is not None:
                    raise receipt.refusal
                self.replayed += receipt.replayed
                ended = time.perf_counter()
                self.taken_ms.append((ended - begun) * 1000)
                if ended > until:
                    return


async def main(url: str, keys: str, project: str, callers: int, seconds: float, replays: float, old: bool) -> None:
    units_before = int(seconds * OLD_UNITS_A_SECOND) + 100 if old else mix.YOUNG_UNITS_AGO[1]
    before = list(itertools.islice(mix.units(), units_before if replays else 0))
    if old:
        async with committing(url, keys) as other:
            await Load(other, project, map(mix.copied, before)).run(64, float("inf"))
    async with committing(url, keys) as committer:
        warm_up = Load(committer, project, mix.units())
        took = await warm_up.run(callers, min(WARM_UP_SECONDS, seconds))
        if not old:
            await Load(committer, project, map(mix.copied, before)).run(callers, float("inf"))
        needed = len(warm_up.taken_ms) / took * seconds * 2 / mix.UNIT_COMMANDS + callers
        supply = list(itertools.islice(mix.units(), int(needed)))
        if replays:
            supply = mix.with_replays(before, supply, replays, old=old)
        gc.collect()
        gc.freeze()  # the supply is no garbage, and looking through it is not the ledger's work
        load = Load(committer, project, iter(supply))
        wait_for_word()
        worked = time.process_time()
        took = await load.run(callers, seconds)
        worked = time.process_time() - worked
    answer(**summary(load.taken_ms, took), cpu_seconds=worked, replayed=load.replayed)


def summary(taken_ms: list[float], seconds: float, items: int = 1) -> dict[str, Any]:
    """What `answer` says of answers to `items` commands each, that took this long."""
    ordered = sorted(taken_ms)
    return {
        "count": len(ordered) * items,
        "seconds": seconds,
        "p50_ms": ordered[len(ordered) // 2],
        "p99_ms": ordered[int(len(ordered) * 0.99)],
    }


if __name__ == "__main__":
    uvloop.run(main(**told()))  # as the API's process does
