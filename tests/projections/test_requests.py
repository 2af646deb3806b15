"""What operators ask of views is done, and what came of it is said once, wherever a worker was killed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psycopg
import pytest
from uuid_utils.compat import uuid7

from ledger.committer import Committer
from ledger.events import SessionActivated
from ledger.operations import (
    OPERATORS,
    CancelRebuild,
    OfView,
    RebuildView,
    RetryParked,
    RollBackView,
    SkipEvent,
    VerifyView,
)
from ledger.postgres import Pool
from ledger.values import SYSTEM, Actor
from ledger.vault import Vault
from ledger.view import Request
from projections import VIEWS, Projector, caught_up
from projections.rebuild import begin, latest, parked, roll_back, skip
from projections.requests import Follower, views
from tests.check import check_views
from tests.conftest import Database
from tests.projections.conftest import History, deadline, project_all, running
from tests.projections.test_projector import add_at_random
from tests.projections.test_rebuild import damaging, rebuilding, rebuilt, schemas

ANA = Actor(issuer="https://id.example", sub="ana", kind="human", assurance="authenticated", roles=("operator",))


@pytest.fixture
async def committer(pool: Pool, tmp_path: Path) -> AsyncIterator[Committer]:
    """Where operators ask; it makes their ledger."""
    committer = Committer(pool, Vault(tmp_path / "keys", pool, create_keys=True), create_ledgers=True)
    yield committer
    await committer.close()


@asynccontextmanager
async def following(pool: Pool, keys: Path) -> AsyncIterator[None]:
    """The worker's job, for as long as the block runs; with a committer of its own, as in another process."""
    committer = Committer(pool, Vault(keys, pool, create_keys=False), create_ledgers=False)
    job = asyncio.create_task(Follower(pool, committer).follow())
    try:
        yield
    finally:
        job.cancel()
        await asyncio.wait([job])
        assert job.cancelled()
        await committer.close()


async def ask(committer: Committer, command: OfView, actor: Actor = ANA) -> Request:
    """What was asked, as the ledger has it."""
    receipt = await committer.submit(OPERATORS, command, actor)
    assert receipt.refusal is None
    request: Request = receipt.state.open[-1]
    return request


async def outcome(pool: Pool, view: str, request: Request) -> Request:
    """What came of it, when that is said."""
    with deadline(60) as check:
        while True:
            check()
            async with pool.connection() as connection:
                found = (await views(connection))[1][view].find(request.request)
            assert found is not None
            if found.outcome is not None:
                return found
            await asyncio.sleep(0.02)


def told(database: Database) -> list[str]:
    """What the operators' ledger says, in order."""
    with psycopg.connect(database.owner) as connection:
        rows = connection.execute(
            "SELECT e.type FROM ledger.events AS e JOIN ledger.ledgers AS l USING (ledger_id)"
            " WHERE l.project_id = 'operators' ORDER BY e.position"
        ).fetchall()
    return [name for (name,) in rows]


async def test_what_was_switched_before_a_worker_was_killed_is_said_by_the_next_and_once(
    database: Database, pool: Pool, history: History, committer: Committer, tmp_path: Path
) -> None:
    add_at_random(history, 300, 1)
    async with running(Projector(pool, VIEWS)):
        await history.write()
        asked = await ask(committer, RebuildView(view="tasks", reason="new words"))
        async with following(pool, tmp_path / "keys"):
            with deadline() as check:
                while not await _begun(pool):
                    check()
                    await asyncio.sleep(0.01)
        async with rebuilding(pool), pool.connection() as connection:
            ended = await rebuilt(connection, "tasks")
        assert (ended.state, ended.request) == ("switched", asked.request)
        assert told(database) == ["RebuildRequested"]
        async with AsyncExitStack() as workers:
            for _ in range(3):
                await workers.enter_async_context(following(pool, tmp_path / "keys"))
            said = await outcome(pool, "tasks", asked)
        assert (said.outcome, said.reason) == ("switched", "new words")
        assert said.replayed is not None
        assert (said.replayed.digest, said.replayed.rows) == (ended.digest, ended.rows_compared)
        async with pool.connection() as connection:
            assert not await begin(connection, "tasks", "ana", "by one who stalled", asked.request)
    assert told(database) == ["RebuildRequested", "ViewSwitched"]
    check_views(database.owner)


async def _begun(pool: Pool) -> bool:
    async with pool.connection() as connection:
        return bool(await latest(connection))


async def test_what_was_rolled_back_before_a_worker_was_killed_is_not_rolled_back_again(
    database: Database, pool: Pool, history: History, committer: Committer, tmp_path: Path
) -> None:
    add_at_random(history, 100, 1)
    async with running(Projector(pool, VIEWS)):
        await history.write()
        async with rebuilding(pool), following(pool, tmp_path / "keys"):
            await outcome(pool, "audit", await ask(committer, RebuildView(view="audit")))
        asked = await ask(committer, RollBackView(view="audit", reason="no better"))
        await roll_back(pool, "audit", "ana", "no better", asked.request)
        async with following(pool, tmp_path / "keys"):
            assert (await outcome(pool, "audit", asked)).outcome == "rolled_back"
        async with pool.connection() as connection:
            assert await schemas(connection, "audit") == {"audit"}
    assert told(database) == ["RebuildRequested", "ViewSwitched", "RollBackRequested", "ViewRolledBack"]
    check_views(database.owner)


async def test_a_roll_back_to_what_is_not_there_any_more_fails_and_says_why(
    database: Database, pool: Pool, history: History, committer: Committer, tmp_path: Path
) -> None:
    add_at_random(history, 100, 1)
    async with running(Projector(pool, VIEWS)):
        await history.write()
        async with rebuilding(pool), following(pool, tmp_path / "keys"):
            await outcome(pool, "audit", await ask(committer, RebuildView(view="audit")))
            async with damaging(database) as owner:
                await owner.execute("DROP SCHEMA audit_old CASCADE")
                await owner.execute("DELETE FROM projections.positions WHERE view = 'audit_old'")
            said = await outcome(pool, "audit", await ask(committer, RollBackView(view="audit")))
    assert said.outcome == "failed"
    assert (said.because or "").startswith("there is nothing to roll audit back to")
    assert told(database)[-1] == "ViewRequestFailed"


async def test_one_that_waits_for_another_is_cancelled_at_once_and_both_leave_nothing_behind(
    database: Database, pool: Pool, history: History, committer: Committer, tmp_path: Path
) -> None:
    add_at_random(history, 3000, 1)
    async with running(Projector(pool, VIEWS)):
        await history.write()
        first = await ask(committer, RebuildView(view="audit"))
        second = await ask(committer, RebuildView(view="sessions"))
        async with following(pool, tmp_path / "keys"):
            await ask(committer, CancelRebuild(view="sessions", reason="wrong one"))
            said = await outcome(pool, "sessions", second)
            assert (said.outcome, said.cancelled_by) == ("cancelled", said.asked_by)
            await ask(committer, CancelRebuild(view="audit"))
            assert (await outcome(pool, "audit", first)).outcome == "cancelled"
            async with rebuilding(pool), pool.connection() as connection:
                with deadline() as check:
                    while await schemas(connection, "audit") | await schemas(connection, "sessions") != {
                        "audit",
                        "sessions",
                    }:
                        check()
                        await asyncio.sleep(0.02)
    assert sorted(told(database)) == sorted(["RebuildRequested", "RebuildCancelRequested", "RebuildCancelled"] * 2)


async def test_a_rebuild_that_fails_says_why(
    database: Database, pool: Pool, history: History, committer: Committer, tmp_path: Path
) -> None:
    history.open()
    history.add(SessionActivated(), uuid7())  # of a session that was never opened
    await project_all(Projector(pool, VIEWS), history)
    async with damaging(database) as owner:
        await owner.execute("UPDATE projections.positions SET position = 2, parked_position = NULL")
    async with rebuilding(pool), following(pool, tmp_path / "keys"):
        said = await outcome(pool, "sessions", await ask(committer, RebuildView(view="sessions")))
    assert said.outcome == "failed"
    assert (said.because or "").startswith("event 2 of demo cannot be taken: ")


async def test_what_a_view_cannot_take_is_tried_again_and_skipped_and_neither_is_said_twice(
    database: Database, pool: Pool, history: History, committer: Committer, tmp_path: Path
) -> None:
    history.open()
    history.add(SessionActivated(), uuid7())
    await history.write()
    async with running(Projector(pool, VIEWS)), pool.connection() as connection:
        with deadline() as check:
            while not (found := [one for one in await parked(connection) if one.view == "sessions"]):
                check()
                await asyncio.sleep(0.01)
        async with following(pool, tmp_path / "keys"):
            await outcome(pool, "sessions", await ask(committer, RetryParked(view="sessions", project="demo")))
            with deadline() as check:
                while (again := [one for one in await parked(connection) if one.view == "sessions"]) in ([], found):
                    check()
                    await asyncio.sleep(0.01)
            assert [one.position for one in again] == [2]
            wrong = SkipEvent(view="sessions", project="demo", position=1, reason="x")
            said = await outcome(pool, "sessions", await ask(committer, wrong))
            assert (said.outcome, said.because) == ("failed", "sessions of demo is not parked before event 1")
        asked = await ask(committer, SkipEvent(view="sessions", project="demo", position=2, reason="of no session"))
        await skip(connection, "sessions", "demo", 2, "ana", "of no session")  # and then the worker was killed
        await caught_up(pool, "sessions", history.ledger_id, min_position=2, timeout_seconds=20)
        async with following(pool, tmp_path / "keys"):
            assert (await outcome(pool, "sessions", asked)).outcome == "skipped"
    assert told(database) == [
        *("ParkedRetryRequested", "ParkedRetried"),
        *("EventSkipRequested", "ViewRequestFailed"),
        *("EventSkipRequested", "EventSkipped"),
    ]


async def test_the_system_asks_as_operators_do_and_what_it_asks_twice_is_done_once(
    database: Database, pool: Pool, history: History, committer: Committer, tmp_path: Path
) -> None:
    def asking() -> RebuildView:
        return RebuildView(view="tasks", reason="a new release", command_id="tasks of release 2")

    add_at_random(history, 50, 1)
    async with running(Projector(pool, VIEWS)):
        await history.write()
        async with rebuilding(pool), following(pool, tmp_path / "keys"):
            said = await outcome(pool, "tasks", await ask(committer, asking(), SYSTEM))
            assert (said.outcome, str(said.asked_by)) == ("switched", "muniment#system")
            assert (await committer.submit(OPERATORS, asking(), SYSTEM)).replayed
    assert told(database) == ["RebuildRequested", "ViewSwitched"]


async def test_without_the_key_of_that_ledger_it_waits_for_it(
    database: Database, pool: Pool, committer: Committer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with following(pool, tmp_path / "elsewhere"):
        asked = await ask(committer, VerifyView(view="audit"))
        with deadline() as check:
            while "will be tried again: The key of this project is not usable here" not in caplog.text:
                check()
                await asyncio.sleep(0.01)
        assert told(database) == ["VerificationRequested"]
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        (tmp_path / "keys" / "operators.key").rename(tmp_path / "elsewhere" / "operators.key")
        assert (await outcome(pool, "audit", asked)).outcome == "verified"
    assert told(database) == ["VerificationRequested", "ViewVerified"]


async def test_a_reason_with_a_character_that_no_text_of_the_database_can_hold_stops_nothing(
    pool: Pool, history: History, committer: Committer, tmp_path: Path
) -> None:
    add_at_random(history, 30, 1)
    async with running(Projector(pool, VIEWS)), rebuilding(pool), following(pool, tmp_path / "keys"):
        await history.write()
        for command, came_of_it in (
            (RebuildView(view="tasks", reason="a\0b"), "switched"),
            (RollBackView(view="tasks", reason="a\0b"), "rolled_back"),
            (SkipEvent(view="tasks", project="demo", position=1, reason="a\0b"), "failed"),
            (VerifyView(view="tasks", reason="a\0b"), "verified"),
        ):
            said = await outcome(pool, "tasks", await ask(committer, command))
            assert (said.outcome, said.reason) == (came_of_it, "a\0b")
