"""Readers wait for what was there when they asked, no longer, and are told what is missing."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from ledger.errors import StoreUnavailable, ViewBehind
from ledger.events import FactRecorded, SessionActivated
from ledger.postgres import Connection, Pool, open_pool
from ledger.values import stamp
from ops.lease import run_alone
from projections import VIEWS, Freshness, Projector, caught_up, health
from projections.freshness import HEAD_SECONDS_MAX
from tests.conftest import Database
from tests.projections.conftest import History, NewHistory, deadline, project_all, running


async def timed(waiting: Any) -> tuple[Any, float]:
    loop = asyncio.get_running_loop()
    began = loop.time()
    return await waiting, loop.time() - began


async def test_a_view_that_is_there_is_not_waited_for(pool: Pool, history: History, projector: Projector) -> None:
    history.add(FactRecorded(kind="k"))
    await project_all(projector, history)
    for wanted in (None, 0, 1):
        assert await caught_up(pool, "audit", history.ledger_id, min_position=wanted) == Freshness(1, 1, False)


async def test_a_reader_waits_for_the_head_it_met_and_not_for_what_came_after(
    pool: Pool, history: History, projector: Projector
) -> None:
    history.add(FactRecorded(kind="k"))
    await history.write()
    waiting = asyncio.create_task(caught_up(pool, "audit", history.ledger_id, timeout_seconds=20))
    await asyncio.sleep(0.05)  # let it look, and wait
    assert not waiting.done()
    for name in ("audit", "records"):
        await project_all(Projector(pool, {name: VIEWS[name]}), history)
    history.add(FactRecorded(kind="k"))
    await history.write()
    fresh = await waiting
    assert (fresh.position, fresh.head, fresh.behind) == (1, 1, 0)


async def test_after_a_quarter_of_a_second_it_is_answered_as_it_is(pool: Pool, history: History) -> None:
    for _ in range(3):
        history.add(FactRecorded(kind="k"))
    await history.write()
    fresh, seconds = await timed(caught_up(pool, "sessions", history.ledger_id))
    assert (fresh.position, fresh.head, fresh.behind) == (0, 3, 3)
    assert seconds >= HEAD_SECONDS_MAX


async def test_a_position_that_is_not_reached_in_time_is_an_error_and_0_never_waits(
    pool: Pool, history: History
) -> None:
    history.add(FactRecorded(kind="k"))
    await history.write()
    with pytest.raises(ViewBehind) as behind:
        await caught_up(pool, "audit", history.ledger_id, min_position=7, timeout_seconds=0.02)
    assert behind.value.params == {"view": "audit", "position": 0, "wanted": 7}
    fresh, seconds = await timed(caught_up(pool, "audit", history.ledger_id, min_position=0))
    assert fresh.behind == 1
    assert seconds < HEAD_SECONDS_MAX


async def test_a_position_that_is_yet_to_come_is_waited_for(pool: Pool, history: History) -> None:
    async with running(Projector(pool, VIEWS)):
        waiting = asyncio.create_task(caught_up(pool, "audit", history.ledger_id, min_position=2, timeout_seconds=20))
        for _ in range(2):
            history.add(FactRecorded(kind="k"))
            await history.write()
        assert (await waiting).position == 2


async def test_a_parked_view_is_not_waited_for(pool: Pool, history: History, projector: Projector) -> None:
    history.add(SessionActivated())
    history.add(FactRecorded(kind="k"))
    await project_all(projector, history)
    fresh = await caught_up(pool, "sessions", history.ledger_id, timeout_seconds=1000)
    assert fresh == Freshness(0, 2, True)
    with pytest.raises(ViewBehind):
        await caught_up(pool, "sessions", history.ledger_id, min_position=1, timeout_seconds=1000)
    assert (await caught_up(pool, "audit", history.ledger_id)).behind == 0


async def test_many_who_wait_ask_the_database_once_for_all(database: Database, history: History, pool: Pool) -> None:
    history.add(FactRecorded(kind="k"))
    await history.write()
    async with open_pool(database.api, 1) as few:
        waiting = [
            asyncio.create_task(caught_up(few, view, history.ledger_id, timeout_seconds=20))
            for view in VIEWS
            for _ in range(300)
        ]
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.sleep(0.1)  # let them wait
        waiting[0].cancel()
        async with running(Projector(pool, VIEWS)):
            answers = await asyncio.gather(*waiting[1:])
        looks = few.get_stats()["requests_num"]
        assert {fresh.behind for fresh in answers} == {0}
        assert looks <= (loop.time() - began) / 0.003 + 3


async def test_a_reader_sees_what_was_committed_before_it_asked_even_while_others_wait(
    pool: Pool, history: History
) -> None:
    async with running(Projector(pool, VIEWS)):
        idle = [
            asyncio.create_task(caught_up(pool, "audit", history.ledger_id, min_position=10**9, timeout_seconds=30))
            for _ in range(20)
        ]
        for size in range(1, 30):
            history.add(FactRecorded(kind="k"))
            await history.write()
            fresh = await caught_up(pool, "audit", history.ledger_id, timeout_seconds=20)
            assert (fresh.head, fresh.behind) == (size, 0)
        for waiting in idle:
            waiting.cancel()


async def test_without_a_database_it_says_so(history: History) -> None:
    async with open_pool("postgresql://nobody@/nothing?host=/nowhere", 1) as pool:
        pool.timeout = 0.05
        with pytest.raises(StoreUnavailable):
            await caught_up(pool, "audit", history.ledger_id)


async def test_health_tells_how_far_behind_what_is_parked_and_whether_anyone_works(
    pool: Pool, new_history: NewHistory, projector: Projector, reader: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {view.state for view in (await health(reader, VIEWS)).values()} == {"stopped"}
    sound, broken = await new_history("sound"), await new_history("broken")
    monkeypatch.setattr(History, "time", staticmethod(lambda position: stamp(datetime.now(UTC))))
    working = asyncio.create_task(run_alone(pool, "projector", asyncio.Event().wait))  # type: ignore[arg-type]
    with deadline() as check:
        while (await health(reader, VIEWS))["audit"].state != "running":
            check()
    sound.add(FactRecorded(kind="k", body={"recorded_at": "not this"}))
    await project_all(projector, sound)
    assert (await health(reader, VIEWS))["audit"].lag_seconds == 0
    broken.add(FactRecorded(kind="k"))
    broken.add(SessionActivated())
    broken.add(FactRecorded(kind="k"))
    await project_all(projector, broken)
    for _ in range(5):
        sound.add(FactRecorded(kind="k", body={"recorded_at": "not this"}))
    await sound.write()
    await asyncio.sleep(0.05)  # so that the lag is something
    report = await health(reader, VIEWS)
    assert {name: (view.lag_events, view.state, view.parked_projects) for name, view in report.items()} == {
        "sessions": (7, "degraded", ["broken"]),
        "records": (5, "running", []),
        "tasks": (5, "running", []),
        "approvals": (5, "running", []),
        "audit": (5, "running", []),
    }
    assert 0.05 <= report["audit"].lag_seconds <= report["sessions"].lag_seconds < 20
    working.cancel()
    await asyncio.wait([working])
    assert {view.state for view in (await health(reader, VIEWS)).values()} == {"stopped"}
