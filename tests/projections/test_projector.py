"""The projector: nothing lost, nothing doubled, nothing skipped, whatever happens to it."""

import asyncio
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import psycopg
import pytest
from uuid_utils.compat import uuid7

from ledger import news, store
from ledger.entry import Recorded
from ledger.events import (
    ApprovalDenied,
    ApprovalExpired,
    ApprovalGranted,
    ApprovalLapsed,
    ApprovalPresented,
    ApprovalUseBegun,
    ApprovalUseCompleted,
    AttemptFailed,
    CommandRefused,
    Fact,
    FactRecorded,
    LateResultRefused,
    SessionActivated,
    SessionAnnotated,
    SessionCompleted,
    SessionMetadataChanged,
    SessionTaskBound,
    TaskClaimed,
    TaskCompleted,
    TaskDeadLettered,
    TaskQueued,
    TaskRedriven,
    TaskResumed,
    TaskRetryScheduled,
    TaskSuspended,
    VoteCast,
    VoteWithdrawn,
)
from ledger.postgres import Connection, Pool, open_pool
from projections import VIEWS, Projector, audit, caught_up, projector, sessions
from projections.projector import Memory, Overtaken
from tests.check import check_views
from tests.conftest import Database
from tests.projections.conftest import DIGEST, LATER, History, NewHistory, deadline, project_all, running

Choose = Callable[[random.Random], Fact]


def _of_session(chance: random.Random) -> Fact:
    return chance.choice(
        (
            SessionActivated(),
            SessionAnnotated(text="seen"),
            SessionTaskBound(task_id=str(chance.random())),
            SessionMetadataChanged(metadata={"b": chance.random(), "a": 1}),
            SessionCompleted(),
        )
    )


def _of_task(chance: random.Random) -> Fact:
    lease_id, approval_id = uuid7(), uuid7()
    return chance.choice(
        (
            TaskClaimed(attempt=1, worker=chance.choice("ab"), lease_id=lease_id, lease_until=LATER),
            AttemptFailed(attempt=1, lease_id=lease_id, error={"n": chance.random()}),
            TaskRetryScheduled(run_at=LATER),
            TaskQueued(),
            TaskSuspended(lease_id=lease_id, approval_id=approval_id),
            TaskResumed(approval_id=approval_id, decision="denied"),
            TaskCompleted(lease_id=lease_id, result={"n": chance.random()}),
            LateResultRefused(lease_id=lease_id, outcome="completed"),
            TaskDeadLettered(attempts=1),
            TaskRedriven(),
        )
    )


def _of_approval(chance: random.Random) -> Fact:
    execution_id = uuid7()
    return chance.choice(
        (
            ApprovalPresented(channel="chat"),
            VoteCast(verdict="approve", digest_seen=DIGEST, reason={"n": chance.random()}),
            VoteWithdrawn(),
            ApprovalGranted(approved_until=History.time(chance.randrange(10**6))),
            ApprovalUseBegun(execution_id=execution_id, outcome_by=History.time(chance.randrange(10**6))),
            ApprovalUseCompleted(execution_id=execution_id, outcome="ok"),
            ApprovalDenied(),
            ApprovalExpired(deadline=LATER),
            ApprovalLapsed(approved_until=LATER),
        )
    )


def add_at_random(history: History, count: int, seed: int) -> None:
    """Stage events of every kind on streams that are begun on the way; not all of it could come of commands."""
    chance = random.Random(seed)
    begun: dict[Choose, list[UUID]] = {_of_session: [], _of_task: [], _of_approval: []}
    for _ in range(count):
        session_id = chance.choice(begun[_of_session] or [None])
        choose, choice = chance.choice(list(begun)), chance.random()
        if choice < 0.05:
            history.add(CommandRefused(command_type="X", status=422, code="x", params={}, attempted={}))
        elif choice < 0.35:
            history.add(FactRecorded(kind="tool.called", body={"n": chance.random()}), session_id=session_id)
        elif choice < 0.8 and begun[choose]:
            history.add(choose(chance), chance.choice(begun[choose]))
        elif choose is _of_session:
            role = chance.choice(["writer", "reader"])
            begun[choose].append(history.open(role, labels={"n": str(chance.randrange(3))}))
        elif choose is _of_task:
            begun[choose].append(history.submit(session_id=session_id))
        else:
            begun[choose].append(history.ask(session_id=session_id, risk=chance.choice(["low", "critical"]), uses=5))


async def check_all(connection: Connection, history: History) -> None:
    """Assert that each view has come to the end, and is what a replay makes of it, row by row."""
    assert await places(connection, history) == dict.fromkeys(VIEWS, (history.size, None))
    check_views(connection.info.dsn)
    events = [row.decode().event for row in await store.read_after(connection, history.ledger_id, 0, 1_000_000)]
    found = await audit.facets(connection, history.ledger_id, audit.Filter())
    counted = events[-audit.FACETS_EVENTS_MAX :]
    assert found.types == Counter(event.type for event in counted)
    assert found.actors == Counter(event.actor.principal for event in counted)


async def fetch(connection: Connection, query: str, history: History) -> list[tuple[Any, ...]]:
    cursor = await connection.execute(query.encode() + b" WHERE ledger_id = %s", [history.ledger_id])
    return await cursor.fetchall()


async def places(connection: Connection, history: History) -> dict[str, tuple[int, int | None]]:
    """By view: its position, and that of the event it is parked before."""
    rows = await fetch(connection, "SELECT view, position, parked_position FROM projections.positions", history)
    return {view: (position, parked) for view, position, parked in rows}


async def test_every_view_equals_a_replay_however_the_events_were_cut_into_batches(
    history: History, projector: Projector, reader: Connection
) -> None:
    for seed, count in enumerate((1, 2, 3, 50, 1, 400, 1200, 7)):
        add_at_random(history, count, seed)
        await project_all(projector, history)
        await check_all(reader, history)


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM tasks.tasks WHERE position = (SELECT max(position) FROM tasks.tasks)",
        "UPDATE tasks.tasks SET worker = 'someone'",
        "UPDATE approvals.approvals SET due_at = now()",
        "UPDATE approvals.approvals SET roles = roles || '{other}'",
        "UPDATE sessions.sessions SET session = session || ' '",
        "UPDATE sessions.labels SET state = 'lost'",
        "DELETE FROM records.segments",
        "UPDATE projections.positions SET position = position - 1 WHERE view = 'audit'",
    ],
)
async def test_the_check_of_the_views_notices(
    damage: str, database: Database, history: History, projector: Projector
) -> None:
    add_at_random(history, 60, 5)
    await project_all(projector, history)
    check_views(database.owner)
    async with await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as owner:
        await owner.execute(damage)
    with pytest.raises(AssertionError, match="is what a replay makes of it"):
        check_views(database.owner)


async def test_a_projector_killed_at_any_moment_loses_nothing_and_doubles_nothing(
    database: Database, pool: Pool, history: History, reader: Connection
) -> None:
    code = (
        "import asyncio\n"
        "from ledger.postgres import open_pool\n"
        "from projections import VIEWS, Projector\n"
        "async def main():\n"
        f"    async with open_pool({database.worker!r}) as pool:\n"
        f"        await Projector(pool, VIEWS, listen_to={database.worker!r}).run()\n"
        "asyncio.run(main())\n"
    )
    chance = random.Random(4)
    moved: set[int] = set()
    for round_ in range(6):
        add_at_random(history, 3000, round_)
        await history.write()
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
        before = (await caught_up(pool, "audit", history.ledger_id, min_position=0)).position
        with deadline() as check:
            while (at := (await caught_up(pool, "audit", history.ledger_id, min_position=0)).position) == before:
                check()
                await asyncio.sleep(0)
        moved.add(at)
        await asyncio.sleep(chance.random() / 10)  # not a wait for anything: the moment of death
        process.send_signal(signal.SIGKILL)
        await process.wait()
    assert len(moved) == 6
    assert (await caught_up(pool, "audit", history.ledger_id, min_position=0)).behind > 0, "it died on the way"
    async with running(Projector(pool, VIEWS)):
        for view in VIEWS:
            await caught_up(pool, view, history.ledger_id, min_position=history.size, timeout_seconds=60)
    await check_all(reader, history)


async def test_two_projectors_at_once_make_the_same_views_as_one(
    pool: Pool, new_history: NewHistory, reader: Connection
) -> None:
    histories = [await new_history(f"project-{n}") for n in range(5)]
    async with running(Projector(pool, VIEWS)), running(Projector(pool, VIEWS)):
        for round_ in range(10):
            for n, history in enumerate(histories):
                add_at_random(history, 20, 10 * n + round_)
                await history.write()
        for history in histories:
            for view in VIEWS:
                await caught_up(pool, view, history.ledger_id, min_position=history.size, timeout_seconds=30)
    for history in histories:
        await check_all(reader, history)


async def test_a_missing_event_is_noticed_and_nothing_after_it_is_projected(
    database: Database, history: History, projector: Projector, reader: Connection
) -> None:
    add_at_random(history, 20, 1)
    await history.write()
    async with await psycopg.AsyncConnection.connect(database.owner) as owner:
        await owner.execute("ALTER TABLE ledger.events DISABLE TRIGGER append_only")
        await owner.execute("DELETE FROM ledger.events WHERE position = 8")
    await project_all(projector, history)
    assert await places(reader, history) == dict.fromkeys(VIEWS, (7, 8))
    (reason,) = {row[0] for row in await fetch(reader, "SELECT parked_reason FROM projections.positions", history)}
    assert reason == "Gap: event 8 is not there; the next one is 9"


async def test_an_event_of_an_unknown_type_parks_its_project_and_no_other(
    pool: Pool, new_history: NewHistory, reader: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    broken, sound = await new_history("broken"), await new_history("sound")
    for history in (broken, sound):
        add_at_random(history, 10, 1)
        await history.write()
    broken.add_bytes("FromTheFuture", b'{"type":"FromTheFuture","schema_version":1}')
    add_at_random(broken, 10, 2)
    async with running(Projector(pool, VIEWS)):
        await broken.write()
        add_at_random(sound, 10, 2)
        await sound.write()
        for view in VIEWS:
            await caught_up(pool, view, sound.ledger_id, min_position=20, timeout_seconds=20)
            with deadline() as check:
                while not (await caught_up(pool, view, broken.ledger_id, timeout_seconds=0)).is_parked:
                    check()
    assert await places(reader, broken) == dict.fromkeys(VIEWS, (10, 11))
    assert await places(reader, sound) == dict.fromkeys(VIEWS, (20, None))
    assert "UpgradeRequired" in caplog.text


async def test_an_event_that_one_view_cannot_take_parks_that_view_alone(
    history: History, projector: Projector, reader: Connection
) -> None:
    add_at_random(history, 30, 1)
    history.add(SessionActivated(), uuid7())  # of a session that was never opened
    history.add(FactRecorded(kind="note"))
    await project_all(projector, history)
    assert await places(reader, history) == dict.fromkeys(VIEWS, (32, None)) | {"sessions": (30, 31)}


async def test_a_parked_view_goes_on_when_its_event_can_be_projected_at_last(
    pool: Pool, history: History, reader: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fastidious:
        """A view that refuses one event until it is told to take it."""

        def __init__(self) -> None:
            self.VERSION, self.WRITE = 1, b"nothing AS (SELECT)"
            self.refused: int | None = 13
            self.seen: list[int] = []

        async def project(
            self, connection: Connection, ledger_id: UUID, batch: Sequence[Recorded], memory: Memory
        ) -> dict[str, Any]:
            if self.refused in [position for position, _ in batch]:
                raise ValueError(f"not {self.refused}")
            self.seen += [position for position, _ in batch]
            return {}

    view = Fastidious()
    monkeypatch.setattr(projector, "RETRY_PARKED_SECONDS", 0.05)
    add_at_random(history, 40, 1)
    await history.write()
    async with running(Projector(pool, {**VIEWS, "fastidious": view})):
        with deadline() as check:
            while (await places(reader, history)).get("fastidious") != (12, 13):
                check()
                await asyncio.sleep(0.01)
        assert view.seen == list(range(1, 13))
        view.refused = None
        with deadline() as check:
            while (await places(reader, history))["fastidious"] != (40, None):
                check()
                await asyncio.sleep(0.01)
    assert view.seen == list(range(1, 41))
    assert await places(reader, history) == dict.fromkeys([*VIEWS, "fastidious"], (40, None))
    parked = set(await fetch(reader, "SELECT parked_reason, parked_at FROM projections.positions", history))
    assert parked == {(None, None)}


async def test_a_view_that_is_behind_catches_up_beside_the_others(
    pool: Pool, history: History, reader: Connection
) -> None:
    add_at_random(history, 2500, 1)
    early = Projector(pool, {"sessions": sessions})
    await project_all(early, history)
    add_at_random(history, 100, 2)
    await project_all(Projector(pool, VIEWS), history)
    await check_all(reader, history)


async def test_one_that_is_overtaken_in_one_view_forgets_what_it_remembers_of_all(
    pool: Pool, history: History, reader: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projector, "BATCH_EVENTS_MAX", 10)
    session_id = history.open()
    add_at_random(history, 29, 1)
    await project_all(Projector(pool, {"sessions": sessions}), history)
    overtaken = Projector(pool, VIEWS)
    history.add(SessionAnnotated(text="remembered"), session_id)
    await history.write()
    await overtaken.advance(history.ledger_id)
    assert await places(reader, history) == dict.fromkeys(VIEWS, (10, None)) | {"sessions": (31, None)}
    history.add(SessionActivated(), session_id)
    await project_all(Projector(pool, VIEWS), history)
    with pytest.raises(Overtaken):
        await overtaken.advance(history.ledger_id)
    history.add(SessionAnnotated(text="after"), session_id)
    await project_all(overtaken, history)
    await check_all(reader, history)


async def test_a_notice_wakes_it_and_without_notices_it_looks_by_itself(
    database: Database, pool: Pool, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_at_random(history, 1, 0)
    async with running(Projector(pool, VIEWS)):
        await history.write()
        await caught_up(pool, "audit", history.ledger_id, min_position=history.size, timeout_seconds=20)
    monkeypatch.setattr(projector, "POLL_SECONDS", 1000)
    add_at_random(history, 1, 1)
    async with running(Projector(pool, VIEWS, listen_to=database.worker)):
        await history.write()
        with deadline() as check:
            while (await caught_up(pool, "audit", history.ledger_id, timeout_seconds=0)).behind:
                check()
                async with pool.connection() as connection:
                    await connection.execute(news.SQL.announce, {"ledger_ids": f"nonsense,{history.ledger_id}"})


async def test_it_outlives_a_lost_connection(
    database: Database, pool: Pool, history: History, reader: Connection
) -> None:
    async with running(Projector(pool, VIEWS, listen_to=database.worker)), open_pool(database.api) as history.pool:
        for seed in range(5):
            add_at_random(history, 30, seed)
            await history.write()
            async with await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as owner:
                await owner.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'muniment_worker'"
                )
        for view in VIEWS:
            with deadline(60) as check:
                while (await places(reader, history)).get(view) != (history.size, None):
                    check()
                    await asyncio.sleep(0.05)
    await check_all(reader, history)


async def test_one_that_was_stopped_anywhere_may_be_run_again(pool: Pool, history: History, reader: Connection) -> None:
    again, other = Projector(pool, VIEWS), Projector(pool, VIEWS)
    for seed in range(20):
        add_at_random(history, 100, seed)
        await history.write()
        async with running(other if seed % 5 == 4 else again):
            await asyncio.sleep(seed / 1000)  # not a wait for anything: the moment when it is stopped
    async with running(again):
        for view in VIEWS:
            await caught_up(pool, view, history.ledger_id, min_position=history.size, timeout_seconds=30)
    await check_all(reader, history)


async def test_a_foreign_ledger_is_left_alone(pool: Pool, history: History, reader: Connection) -> None:
    async with pool.connection() as connection:
        ledger = await store.create_ledger(connection, "foreign", is_foreign=True)
    foreign = History(pool, ledger.ledger_id, "foreign")
    foreign.add_bytes("Whatever", b"opaque")
    await foreign.write()
    add_at_random(history, 5, 1)
    await history.write()
    async with running(Projector(pool, VIEWS)):
        await caught_up(pool, "audit", history.ledger_id, min_position=5, timeout_seconds=20)
    assert await places(reader, foreign) == {}


async def test_large_events_are_read_a_few_at_a_time(
    history: History, projector: Projector, reader: Connection
) -> None:
    for _ in range(40):
        history.add(FactRecorded(kind="big", body="word " * 200_000))
    await history.write()
    batches = []
    while events := await projector.advance(history.ledger_id):
        batches.append(events)
    assert sum(batches) == 40
    assert max(batches) < 20, "about sixteen of a mebibyte are 16 MiB"
    await check_all(reader, history)
