"""What it takes to prove and to verify: an inclusion proof out of a large ledger, and the whole of a mirror.

As a program of the bench it asks for proofs over HTTP, one at a time; told: port, token, seconds, size.
"""

import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import uvloop

from ops.bench import serving
from ops.bench.caller import connect
from ops.bench.committing import summary
from ops.bench.scale import filled, kept
from ops.bench.serving import PROJECT, ours
from ops.bench.stage import BenchError, Figures, Measure, Stage, answer, environment, kept_stage, told, wait_for_word

MIRROR_EVENTS = 1_000_000
PUBLISHED_SECONDS_MAX = 3600

_PUBLISHED = """
SELECT coalesce(g.published_size, 0) FROM ledger.ledgers AS l LEFT JOIN ledger.logs AS g USING (ledger_id)
WHERE l.project_id = %s
"""


@contextmanager
def proofs(stage: Stage) -> Iterator[dict[str, Measure]]:
    """A ledger as large as it is told, with an API process; and a mirror, of one of a million events at most."""
    with ExitStack() as ends:
        home = ends.enter_context(kept_stage(stage.keep, stage.seconds)) if stage.keep else stage
        large, small = (ledger(home, size) for size in (stage.events, min(stage.events, MIRROR_EVENTS)))
        api = ends.enter_context(serving.api(home, large))
        mirror = home.directory / f"mirror_{small}"
        muniment(home, small, "publish", mirror, "--project", PROJECT)

        def prove() -> Figures:
            size = home.size(large, PROJECT)
            return api.meet("proofs", token=api.token, seconds=stage.seconds, size=size)[0]

        def verify() -> Figures:
            worked = _worked()
            muniment(home, small, "verify", mirror, "--key", mirror / "keys.json")
            worked = _worked() - worked
            return Figures(home.size(small, PROJECT), worked, cpu_seconds=worked)

        yield {"inclusion proof": prove, "mirror verified": verify}


def ledger(stage: Stage, events: int) -> str:
    """The database of a ledger of that size, all of it published; made now, or by an earlier run."""
    database = kept(stage, f"events_{events}")
    with serving.worker(stage, database), psycopg.connect(stage.owner(database), autocommit=True) as owner:
        filled(stage, database, events)
        deadline = time.monotonic() + PUBLISHED_SECONDS_MAX
        size = stage.size(database, PROJECT)
        while owner.execute(_PUBLISHED, [PROJECT]).fetchall() != [(size,)]:
            if time.monotonic() > deadline:
                raise BenchError(f"{size} events were not published within {PUBLISHED_SECONDS_MAX} s")
            time.sleep(0.1)
    return database


def muniment(stage: Stage, database: str, *arguments: str | Path) -> None:
    """A command, as an operator gives it. Raises BenchError with what it complains of."""
    settings = ours(stage) | {"DATABASE_URL": stage.worker(database)}
    line = [sys.executable, "-P", "-m", "ops.cli", *map(str, arguments)]
    done = subprocess.run(line, env=environment(**settings), capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"muniment {arguments[0]} failed: {done.stdout.strip()} {done.stderr.strip()}")


def _worked() -> float:
    """The processor time of all programs that were run here, and ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


async def main(port: int, token: str, seconds: float, size: int) -> None:
    caller = await connect(port, token)
    chance, taken_ms = random.Random(11), list[float]()  # noqa: S311  (the same in every run)
    await caller.fetch("GET", "/events/1/proof")
    wait_for_word()
    begun = time.perf_counter()
    while (now := time.perf_counter()) < begun + seconds:
        await caller.fetch("GET", f"/events/{chance.randint(1, size)}/proof")
        taken_ms.append((time.perf_counter() - now) * 1000)
    took = time.perf_counter() - begun
    caller.close()
    answer(**summary(taken_ms, took), sent=len(taken_ms))


if __name__ == "__main__":
    uvloop.run(main(**told()))
