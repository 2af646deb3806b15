"""How far the views have come: waiting until one has caught up, and saying how far all are behind.

A reader sees at least what was committed when it asked, or is told how much is missing. However many wait in
this process, one query at a time looks for all of them. Nothing here writes.
"""

import asyncio
from collections.abc import Collection
from datetime import datetime
from typing import NamedTuple
from uuid import UUID
from weakref import WeakKeyDictionary

import msgspec
from msgspec import Struct

from ledger.errors import ViewBehind
from ledger.postgres import Connection, Pool, queries, store_errors, texts, uuids
from ledger.values import Stamp, moment

SQL = queries("projections", "freshness")

HEAD_SECONDS_MAX = 0.25
POSITION_SECONDS_MAX = 1.0
LOOK_SECONDS = 0.003


class Freshness(NamedTuple):
    """Where a view stands, against where its ledger stood when it was asked."""

    position: int
    head: int
    is_parked: bool
    is_drifted: bool = False

    @property
    def behind(self) -> int:
        """How many events that were there when it was asked are not in the view."""
        return max(0, self.head - self.position)

    @property
    def state(self) -> str | None:
        """What makes more of it than late: drifted, or parked; None where it does well."""
        return "drifted" if self.is_drifted else "parked" if self.is_parked else None


class Health(Struct, kw_only=True, frozen=True):
    """How a view does over all ledgers.

    `lag_seconds` is how long the first event that is not in it has waited. `state`: running; degraded where a
    part is parked, in the projects named; drifted where the last proof of a part found rows that are not what a replay
    makes of them, so many values in all; stopped where no worker runs. `proof_age_seconds` is how long ago the proof
    began that is longest ago, of all parts; of one that was never proven, how long its ledger is there.
    """

    lag_events: int
    lag_seconds: float
    state: str
    parked_projects: list[str]
    drifted_projects: list[str]
    drifted: int
    proof_age_seconds: float


async def caught_up(
    pool: Pool, view: str, ledger_id: UUID, *, min_position: int | None = None, timeout_seconds: float | None = None
) -> Freshness:
    """Wait until `view` has come to the head that the ledger has now, but 250 ms at most; then say where it is.

    With `min_position`, wait for that position, 1 s at most; 0 never waits. `timeout_seconds` overrides either.
    A parked view is not waited for. Raises ViewBehind where `min_position` is not reached; StoreUnavailable.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    watch = _watches.get(pool)
    if watch is None:
        watch = _watches[pool] = _Watch()
    seen = await watch.look(pool, view, ledger_id)
    head = seen.head
    if timeout_seconds is None:
        timeout_seconds = HEAD_SECONDS_MAX if min_position is None else POSITION_SECONDS_MAX
    wanted = head if min_position is None else min_position
    while seen.position < wanted and not seen.is_parked and loop.time() - began < timeout_seconds:
        # All wait for the same ticks, so that one look serves them all.
        await asyncio.sleep(LOOK_SECONDS - loop.time() % LOOK_SECONDS)
        seen = await watch.look(pool, view, ledger_id)
    if min_position is not None and seen.position < min_position:
        raise ViewBehind(view=view, position=seen.position, wanted=min_position)
    # The head as it was on arrival, unless what is answered is later: a reader is never told less than it gets.
    return seen._replace(head=max(head, seen.position))


class _Round:
    """One query for all who asked before it was sent."""

    def __init__(self) -> None:
        self.asked: set[tuple[str, UUID]] = set()
        self.answer: asyncio.Future[dict[tuple[str, UUID], Freshness]] = asyncio.get_running_loop().create_future()


class _Watch:
    """Looks for everyone in this process who reads through one pool, one query at a time."""

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()
        self._next: _Round | None = None
        self._rounds: set[asyncio.Task[None]] = set()

    async def look(self, pool: Pool, view: str, ledger_id: UUID) -> Freshness:
        """What is true at some time after now. Raises StoreUnavailable."""
        round_ = self._next
        if round_ is None:
            round_ = self._next = _Round()
            task = asyncio.create_task(self._run(pool, round_))
            self._rounds.add(task)
            task.add_done_callback(self._rounds.discard)
        round_.asked.add((view, ledger_id))
        # Who goes away must not take the answer from the others.
        return (await asyncio.shield(round_.answer))[view, ledger_id]

    async def _run(self, pool: Pool, round_: _Round) -> None:
        try:
            async with self._one_at_a_time:
                with store_errors():
                    async with pool.connection() as connection:
                        self._next = None  # whoever asks from here on must see what is committed by then
                        round_.answer.set_result(await _look(connection, round_.asked))
        except Exception as error:  # noqa: BLE001  (it is raised in each one who asked)
            if self._next is round_:
                self._next = None
            round_.answer.set_exception(error)
            round_.answer.exception()  # asked for here, in case all who waited have gone


_watches: WeakKeyDictionary[Pool, _Watch] = WeakKeyDictionary()


async def _look(connection: Connection, asked: Collection[tuple[str, UUID]]) -> dict[tuple[str, UUID], Freshness]:
    views, ledger_ids = zip(*asked, strict=True)
    values = {"views": texts(views), "ledger_ids": uuids(ledger_ids)}
    cursor = await connection.execute(SQL.look, values, prepare=True, binary=True)
    return {(view, ledger_id): Freshness(*found) for view, ledger_id, *found in await cursor.fetchall()}


class _Recorded(Struct):
    recorded_at: Stamp


async def health(connection: Connection, views: Collection[str]) -> dict[str, Health]:
    """How each of these views does, in three short queries."""
    values = {"views": texts(views)}
    runs, now = await _runs(connection, "projector")
    waits = dict.fromkeys(views, 0.0)
    for view, entry in await (await connection.execute(SQL.waiting, values)).fetchall():
        waits[view] = max(waits[view], _seconds_since(entry, now))
    found = {view: said for view, *said in await (await connection.execute(SQL.lag, values)).fetchall()}
    healths = {}
    for view in views:
        lag, parked, drifted, drifted_in, proof_age = found.get(view, (0, [], 0, [], 0.0))
        healths[view] = Health(
            lag_events=lag,
            lag_seconds=waits[view],
            state="stopped" if not runs else "drifted" if drifted else "degraded" if parked else "running",
            parked_projects=parked,
            drifted_projects=drifted_in,
            drifted=drifted,
            proof_age_seconds=proof_age,
        )
    return healths


class LogHealth(Struct, kw_only=True, frozen=True):
    """How publishing does over all ledgers. `lag_seconds` is how long the first event has waited that no published
    checkpoint covers. `state`: running; degraded where logs do not go on, each for one of the reasons in `refused`,
    which name no project; stopped where no worker runs.
    """

    lag_events: int
    lag_seconds: float
    state: str
    refusals: int
    refused: list[str]


async def log_health(connection: Connection) -> LogHealth:
    """How publishing does, in three short queries."""
    runs, now = await _runs(connection, "publisher")
    waiting = await (await connection.execute(SQL.log_waiting)).fetchall()
    ((lag, refusals, refused),) = await (await connection.execute(SQL.log_lag)).fetchall()
    return LogHealth(
        lag_events=lag,
        lag_seconds=max((_seconds_since(entry, now) for (entry,) in waiting), default=0.0),
        state="stopped" if not runs else "degraded" if refused else "running",
        refusals=refusals,
        refused=refused,
    )


async def _runs(connection: Connection, job: str) -> tuple[bool, datetime]:
    """Whether a worker does that job, and the time."""
    ((runs, now),) = await (await connection.execute(SQL.is_running, {"job": job})).fetchall()
    return runs, now


def _seconds_since(entry: bytes, now: datetime) -> float:
    try:
        recorded_at = moment(msgspec.json.decode(entry, type=_Recorded).recorded_at)
    except (msgspec.MsgspecError, ValueError):
        return 0.0  # its bytes are not what was written: a matter for whoever verifies the ledger
    return max(0.0, round((now - recorded_at).total_seconds(), 3))
