"""What is known of whether views are what they say: the verdicts of `verify`, kept, and found again for ever.

A verdict is about one build of a view (the number of its schema, see `Place`) in one project: it stays with that build
when a rebuild or a roll-back gives it another name, and is never said of another. Nothing of a view is changed here:
what differs is named, told to readers (freshness.py), and an operator's to see to.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg
from msgspec import Struct
from msgspec.structs import replace
from psycopg_pool import PoolTimeout

from ledger.postgres import Connection, Pool, queries
from ledger.telemetry import counter
from projections import VIEWS
from projections.projector import Troubles
from projections.replay import DEFINITIONS
from projections.verify import Drift, Verdict, verify

if TYPE_CHECKING:
    from prometheus_client import Metric

log = logging.getLogger(__name__)

SQL = queries("projections", "proof")

DRIFTS_KEPT = 20
VALUE_CHARACTERS_KEPT = 500
"""Of what differs, so many are kept with their values, each so long at most: all are counted."""

AGAIN_SECONDS = 3600.0
"""A part is proven no sooner than so long after it was, whether it has moved or not: what this looks for does not come
with events, but behind their back."""

REST = 9.0
"""Times as long as it works: proofs take a tenth of a processor at most, however much there is to prove. To prove all
views of a million events takes a processor a minute and a half: with its rests that is a quarter of an hour, and of ten
million events three hours. No snapshot is held for longer than a slice takes, and none while it rests (verify.py)."""

LOOK_SECONDS = 5.0
PARTS_AT_ONCE = 100


class Proof(Struct, kw_only=True):
    """A verdict that was kept, found by a proof that began at `verified_at` and took `seconds`."""

    verdict: Verdict
    verified_at: datetime
    seconds: float


async def prove(pool: Pool, schema: str, project: str | None = None) -> list[Verdict]:
    """Verify one build of a view, in one project or in all, and keep what is found; raises psycopg's errors."""
    return [verdict async for verdict, _ in _proofs(pool, schema, project)]


class Proven:
    """What this process has proven, by view and by what was found."""

    def __init__(self) -> None:
        self.verdicts = Counter({(view, verdict): 0 for view in DEFINITIONS for verdict in ("holds", "differs")})

    def families(self) -> Iterator["Metric"]:
        said = "Proofs of a project's part of a view, by what was found."
        yield counter("muniment_proofs", said, self.verdicts, "view", "verdict")


async def verify_for_ever(pool: Pool, proven: Proven) -> None:
    """Prove every view of every project again and again, those first that were proven longest ago. Ends when cancelled.

    Killed anywhere, what was not kept is proven again. What the database cannot do, it will try again.
    """
    troubles = Troubles(log.warning)
    while True:
        due: list[tuple[str, str]] = []
        with _telling(troubles, "views"):
            due = await _due(pool)
        for view, project in due:
            with _telling(troubles, f"{view} of {project}"):
                async for verdict, is_news in _proofs(pool, view, project, rest=REST):
                    proven.verdicts[view, "holds" if verdict.holds else "differs"] += 1
                    if is_news and verdict.drifts:
                        first = verdict.drifts[0]
                        log.error("%s; %d values differ, the first: %s", verdict, verdict.drifted, first)
        await asyncio.sleep(LOOK_SECONDS)


@contextmanager
def _telling(troubles: Troubles, part: str) -> Iterator[None]:
    """Say what goes wrong, and go on: others can be proven."""
    failing = ""
    try:
        yield
    except (PoolTimeout, psycopg.Error) as error:
        failing = f"{part} cannot be proven now: {error}"
    troubles.say(part, failing)


async def _due(pool: Pool) -> list[tuple[str, str]]:
    """The parts of views that are to be proven next; what was found of builds that are gone is forgotten."""
    versions = [VIEWS[view].VERSION for view in DEFINITIONS]
    values = {"views": list(DEFINITIONS), "versions": versions, "seconds": AGAIN_SECONDS, "limit": PARTS_AT_ONCE}
    async with pool.connection() as connection:
        await connection.execute(SQL.forget)
        return await (await connection.execute(SQL.due, values)).fetchall()


async def latest(connection: Connection, schemas: Collection[str], project: str | None = None) -> list[Proof]:
    """What was last found of these builds of views, by project; nothing of those that were never verified."""
    values = {"schemas": list(schemas), "project": project}
    rows = await (await connection.execute(SQL.latest, values)).fetchall()
    return [_proof(*row) for row in rows]


def _proof(drifts: str, verified_at: datetime, seconds: float, *found: Any) -> Proof:
    named = msgspec.json.decode(drifts, type=list[Drift])
    verdict = Verdict(**dict(zip(Verdict.__struct_fields__, (*found, named), strict=True)))
    return Proof(verdict=verdict, verified_at=verified_at, seconds=seconds)


async def _proofs(
    pool: Pool, schema: str, project: str | None, rest: float = 0.0
) -> AsyncIterator[tuple[Verdict, bool]]:
    """Each verdict, when it is kept, and whether it is another than the last one."""
    began = monotonic()
    async for verdict in verify(pool, schema, project, rest=rest):
        said = {name: getattr(verdict, name) for name in verdict.__struct_fields__}
        said["drifts"] = msgspec.json.encode([_shortened(drift) for drift in verdict.drifts[:DRIFTS_KEPT]]).decode()
        said["seconds"] = monotonic() - began
        async with pool.connection() as connection:
            rows = await (await connection.execute(SQL.keep, said)).fetchall()
        yield verdict, rows == [(True,)]
        began = monotonic()


def _shortened(drift: Drift) -> Drift:
    key = drift.key[:VALUE_CHARACTERS_KEPT]
    return replace(drift, key=key, stored=_short(drift.stored), replayed=_short(drift.replayed))


def _short(value: str | None) -> str | None:
    return value and value[:VALUE_CHARACTERS_KEPT].replace("\0", "\ufffd")
