"""More commands at once than the views may be able to follow, and what becomes of the backlog.

A burst is as long as 20 measurements: a minute, where one takes 3 s. What came in it, by the time until all views had
it, is the sustained rate; at half of that a steady stream follows.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import psycopg

from ops.bench import serving
from ops.bench.serving import PROJECT, SETTLED_SECONDS_MAX, settled
from ops.bench.stage import BenchError, Figures, Measure, Stage, run

BURST_MEASUREMENTS = 20
CONNECTIONS = 16
LOOK_SECONDS = 0.05

_BACKLOG = """
SELECT l.size, l.size - coalesce(min(p.position), 0)
FROM ledger.ledgers AS l LEFT JOIN projections.positions AS p USING (ledger_id)
WHERE l.project_id = %s GROUP BY l.ledger_id
"""


@contextmanager
def burst(stage: Stage) -> Iterator[dict[str, Measure]]:
    """An API process given all that it can take, 100 commands a request, and its worker."""
    database = stage.new_database()
    sustained: list[Figures] = []
    with serving.api(stage, database) as api, serving.worker(stage, database), ThreadPoolExecutor(1) as aside:

        def drain() -> Figures:
            settled(stage, database)
            sustained.clear()
            loading = aside.submit(api.load, "batches", CONNECTIONS, stage.seconds * BURST_MEASUREMENTS)
            drained = watch(stage, database, loading)
            figures, _ = loading.result()
            sustained.append(Figures(figures.count, figures.seconds + drained.seconds))
            return drained

        def rate() -> Figures:
            if not sustained:
                raise BenchError("the burst before it failed")
            return sustained[0]

        def follow() -> Figures:
            told = {"url": stage.api(database), "keys": str(stage.keys), "project": PROJECT, "seconds": stage.seconds}
            (figures,) = run(("visible", told | {"events_per_second": int(rate().rate / 2)}))
            return Figures(**figures)

        yield {"backlog of a burst": drain, "sustained": rate, "visible at half the sustained rate": follow}


def watch(stage: Stage, database: str, loading: Future[tuple[Figures, int]]) -> Figures:
    """How many events some view had not seen when the ledger last grew, and how long after that all had seen all; told
    up to a look too long."""
    size, left, grown_at, seen_at = 0, 0, time.monotonic(), None
    with psycopg.connect(stage.owner(database), autocommit=True) as connection:
        while not loading.done() or seen_at is None:
            found, behind = connection.execute(_BACKLOG, [PROJECT]).fetchone() or (0, 0)
            now = time.monotonic()
            if found > size:
                size, left, grown_at, seen_at = found, behind, now, None
            if not behind and seen_at is None:
                seen_at = now
            if loading.done() and now - grown_at > SETTLED_SECONDS_MAX:
                raise BenchError(f"the views did not catch up within {SETTLED_SECONDS_MAX} s: {behind} events left")
            time.sleep(LOOK_SECONDS)
    return Figures(left, seen_at - grown_at + LOOK_SECONDS)
