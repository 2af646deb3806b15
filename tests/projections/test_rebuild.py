"""Rebuilding views: aside, compared, switched in one moment, and back; nobody who reads or writes notices."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from uuid_utils.compat import uuid7

from ledger.events import FactRecorded, SessionActivated, SessionAnnotated, SessionMetadataChanged
from ledger.postgres import Connection, Pool, open_pool
from projections import VIEWS, Projector, audit, caught_up, rebuild, sessions
from projections.filling import FILL_EVENTS, Filling
from projections.projector import Overtaken
from projections.rebuild import Impossible, Rebuild, begin, cancel, latest, parked, rebuild_for_ever, retry, roll_back
from projections.verify import verify
from tests.check import check_views
from tests.conftest import Database
from tests.projections.conftest import History, NewHistory, deadline, project_all, running
from tests.projections.test_projector import add_at_random, places

Read = Callable[[Connection, History], Awaitable[str]]


async def rebuilt(connection: Connection, view: str) -> Rebuild:
    """The rebuild of `view`, when it has ended."""
    with deadline(60) as check:
        while True:
            check()
            (one,) = [one for one in await latest(connection) if one.view == view]
            if one.state not in rebuild.UNDER_WAY:
                return one
            await asyncio.sleep(0.02)


async def schemas(connection: Connection, view: str) -> set[str]:
    cursor = await connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE %s", [f"{view}%"])
    return {name for (name,) in await cursor.fetchall()}


@asynccontextmanager
async def rebuilding(pool: Pool) -> AsyncIterator[None]:
    """The worker's job, for as long as the block runs."""
    job = asyncio.create_task(rebuild_for_ever(pool))
    try:
        yield
    finally:
        job.cancel()
        await asyncio.wait([job])
        assert job.cancelled()


@asynccontextmanager
async def damaging(database: Database) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    async with await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as owner:
        yield owner


async def newest_session(connection: Connection, history: History) -> str:
    page = await sessions.search(connection, history.ledger_id, sessions.Filter(), limit=1)
    return page.sessions[0].opened_at


async def newest_event(connection: Connection, history: History) -> str:
    (position,) = await audit.search(connection, history.ledger_id, audit.Filter(), limit=1, order="desc")
    return history.time(position)


@pytest.mark.parametrize(("view", "read"), [("sessions", newest_session), ("audit", newest_event)])
async def test_a_view_is_rebuilt_and_rolled_back_while_it_is_written_and_read_all_the_time(
    view: str, read: Read, database: Database, pool: Pool, history: History, reader: Connection
) -> None:
    add_at_random(history, 1500, 1)
    history.open()
    await history.write()
    reads = 0
    ended = asyncio.Event()

    async def write() -> None:
        while not ended.is_set():
            add_at_random(history, 5, history.size)
            history.open()
            await history.write()
            await asyncio.sleep(0.01)

    async def read_on(api: Pool) -> None:
        nonlocal reads
        while not ended.is_set():
            fresh = await caught_up(api, view, history.ledger_id, timeout_seconds=20)
            async with api.connection() as connection:
                assert await read(connection, history) >= history.time(fresh.head), "no reader is taken back"
            reads += 1

    async with open_pool(database.api, 3) as api, running(Projector(pool, VIEWS)), asyncio.TaskGroup() as traffic:
        for _ in range(2):
            traffic.create_task(read_on(api))
        traffic.create_task(write())
        async with rebuilding(pool), pool.connection() as connection:
            for _ in range(2):
                assert await begin(connection, view, "ana", "because")
                assert (await rebuilt(connection, view)).state == "switched"
                before = reads
                await roll_back(pool, view, "ana", "because")
                with deadline() as check:
                    while reads < before + 10:
                        check()
                        await asyncio.sleep(0.01)
        ended.set()
    async with running(Projector(pool, VIEWS)):
        for name in VIEWS:
            await caught_up(pool, name, history.ledger_id, min_position=history.size, timeout_seconds=30)
    check_views(database.owner)


@pytest.mark.parametrize("view", VIEWS)
async def test_what_was_built_aside_is_in_all_the_same_as_what_it_replaces(
    view: str, pool: Pool, new_history: NewHistory, reader: Connection, database: Database
) -> None:
    described = """
        SELECT c.relname, c.relkind, c.reloptions, a.attname, format_type(a.atttypid, a.atttypmod), a.attstorage,
            a.attnotnull, regexp_replace(pg_get_indexdef(c.oid), ' ON [a-z_]+\\.', ' ON '),
            has_schema_privilege('muniment_api', c.relnamespace, 'USAGE'),
            c.relkind <> 'r' OR has_table_privilege('muniment_api', c.oid, 'SELECT'), pg_get_userbyid(c.relowner)
        FROM pg_class AS c LEFT JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND c.relkind = 'r'
        WHERE c.relnamespace = %s::regnamespace AND c.relkind IN ('r', 'i') ORDER BY c.relname, a.attname"""
    one, other = await new_history("one"), await new_history("other")
    projector = Projector(pool, VIEWS)
    for n, history in enumerate((one, other)):
        add_at_random(history, 300, n)
        await project_all(projector, history)
    async with pool.connection() as connection:
        before = await (await connection.execute(described, [view])).fetchall()
        async with rebuilding(pool):
            assert await begin(connection, view, "ana", "because")
            ended = await rebuilt(connection, view)
        assert await (await connection.execute(described, [view])).fetchall() == before
        assert await (await connection.execute(described, [f"{view}_old"])).fetchall() == before
    assert (ended.state, ended.asked_by, ended.reason, ended.has_old) == ("switched", "ana", "because", True)
    assert ended.rows_compared
    assert ended.digest
    assert ended.heads_digest
    check_views(database.owner)


async def test_a_rebuild_mends_what_was_changed_behind_the_back_of_the_view(
    database: Database, pool: Pool, history: History
) -> None:
    session_id = history.open()
    add_at_random(history, 200, 1)
    await project_all(Projector(pool, VIEWS), history)
    async with damaging(database) as owner:
        await owner.execute(
            """UPDATE sessions.sessions SET agent_role = 'wrong',
                session = convert_to(replace(convert_from(session, 'UTF8'), '"helper"', '"wrong"'), 'UTF8')"""
        )
    # This one takes the wrong state for the right one, and remembers it.
    projector = Projector(pool, VIEWS)
    history.add(SessionAnnotated(text="x"), session_id)
    await project_all(projector, history)
    async with rebuilding(pool), pool.connection() as connection:
        await begin(connection, "sessions", "ana", "drift")
        assert (await rebuilt(connection, "sessions")).state == "switched"
    history.add(SessionActivated(), session_id)
    await history.write()
    with pytest.raises(Overtaken):
        await projector.advance(history.ledger_id)
    await project_all(projector, history)
    check_views(database.owner)


def builders(parent: int) -> set[int]:
    """The processes that make a build for the process `parent`."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            started_by = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if started_by == parent and b"projections.build" in (path / "cmdline").read_bytes().split(b"\0"):
                found.add(int(path.name))
    return found


async def builder(parent: int, other_than: int = 0) -> int:
    with deadline() as check:
        while not (found := builders(parent) - {other_than}):
            check()
            await asyncio.sleep(0.01)
    return found.pop()


@pytest.mark.skipif(rebuild.AT_ONCE == 1, reason="this machine has one processor")
async def test_views_are_built_at_the_same_time_where_there_are_processors(
    database: Database, pool: Pool, history: History
) -> None:
    add_at_random(history, 300, 1)
    await project_all(Projector(pool, VIEWS), history)
    locked: set[str] = set()
    async with pool.connection() as connection, damaging(database) as other, rebuilding(pool):
        for view in ("sessions", "audit"):
            assert await begin(connection, view, "ana", "because")
        with deadline(60) as check:
            # While its place is locked, a build cannot end: the other is not begun because this one has.
            async with other.transaction():
                while locked != {"sessions_next", "audit_next"}:
                    check()
                    cursor = await other.execute(
                        "SELECT view FROM projections.positions WHERE view LIKE '%_next' FOR UPDATE SKIP LOCKED"
                    )
                    locked |= {view for (view,) in await cursor.fetchall()}
        assert [(await rebuilt(connection, view)).state for view in ("sessions", "audit")] == ["switched"] * 2


@pytest.mark.parametrize("whom", ["worker", "builder"])
@pytest.mark.parametrize("view", ["sessions", "audit"])
async def test_killed_anywhere_it_goes_on_from_where_it_was(
    view: str, whom: str, database: Database, pool: Pool, history: History
) -> None:
    code = (
        "import asyncio\n"
        "from ledger.postgres import open_pool\n"
        "from projections.rebuild import rebuild_for_ever\n"
        "async def main():\n"
        f"    async with open_pool({database.worker!r}) as pool:\n"
        "        await rebuild_for_ever(pool)\n"
        "asyncio.run(main())\n"
    )
    add_at_random(history, 18_000, 1)
    await project_all(Projector(pool, VIEWS), history)
    async with pool.connection() as connection:
        assert await begin(connection, view, "ana", "because")
        reached = [0]
        for _ in range(2):
            worker = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
            building = await builder(worker.pid)
            before = reached[-1]
            with deadline(60) as check:
                while reached[-1] == before:
                    check()
                    async with connection.transaction():  # while it stands still
                        cursor = await connection.execute(
                            "SELECT position FROM projections.positions WHERE view = %s FOR UPDATE", [f"{view}_next"]
                        )
                        at = [position for (position,) in await cursor.fetchall() if position > before]
                        if at:
                            reached += at
                            os.kill(worker.pid if whom == "worker" else building, signal.SIGKILL)
            if whom == "builder":
                await builder(worker.pid, other_than=building)
                worker.kill()
            await worker.wait()
        assert reached[-1] < history.size, "it was killed on the way"
        assert [one.state for one in await latest(connection)] == ["filling"]
        async with rebuilding(pool):
            assert (await rebuilt(connection, view)).state == "switched"
    check_views(database.owner)


async def test_streams_longer_and_events_larger_than_what_is_read_at_once_are_built_whole(
    database: Database, pool: Pool, history: History
) -> None:
    long = history.open()
    for n in range(3 * FILL_EVENTS):
        history.add(SessionActivated() if n == FILL_EVENTS else SessionAnnotated(text=str(n)), long)
    for n in range(20):
        stream_id = history.open(metadata={"n": n})
        history.add(SessionMetadataChanged(metadata={"large": str(n) * 1_000_000}), stream_id)
    await project_all(Projector(pool, VIEWS), history)
    async with pool.connection() as connection, rebuilding(pool):
        for view in ("sessions", "records"):
            await begin(connection, view, "ana", "because")
            assert (await rebuilt(connection, view)).state == "switched"
    check_views(database.owner)


async def test_what_is_written_while_a_build_is_filled_is_taken_by_the_projector(
    database: Database, pool: Pool, history: History
) -> None:
    streams = [history.open() for _ in range(FILL_EVENTS)]
    await project_all(Projector(pool, VIEWS), history)
    async with pool.connection() as connection:
        await begin(connection, "sessions", "ana", "because")
        filling = Filling(pool, "sessions_next")
        await filling.begin()
        for stream_id in streams:
            history.add(SessionActivated(), stream_id)
        await project_all(Projector(pool, VIEWS), history)
        await filling.run()
        assert await rebuild.reached(connection, "sessions_next") == {"demo": len(streams)}
        async with rebuilding(pool):
            assert (await rebuilt(connection, "sessions")).state == "switched"
    check_views(database.owner)


async def test_of_two_who_begin_one_at_once_one_does(pool: Pool, history: History) -> None:
    add_at_random(history, 20, 1)
    await project_all(Projector(pool, VIEWS), history)
    async with pool.connection() as one, pool.connection() as other:
        begun = await asyncio.gather(begin(one, "tasks", "ana", "x"), begin(other, "tasks", "bo", "y"))
        assert sorted(begun) == [False, True]
        (under_way,) = await latest(one)
        assert (under_way.number, under_way.asked_by) == (1, "ana" if begun[0] else "bo")
        async with rebuilding(pool), rebuilding(pool):
            assert (await rebuilt(one, "tasks")).state == "switched"


async def test_one_that_is_cancelled_leaves_nothing_behind(
    database: Database, pool: Pool, history: History, reader: Connection
) -> None:
    add_at_random(history, 6000, 1)
    await project_all(Projector(pool, VIEWS), history)
    async with pool.connection() as connection, rebuilding(pool):
        assert not await cancel(connection, "audit", "ana", "x")
        await begin(connection, "audit", "ana", "x")
        with deadline() as check:
            while not await rebuild.reached(connection, "audit_next"):
                check()
                await asyncio.sleep(0.002)
        assert await cancel(connection, "audit", "bo", "wrong one")
        with deadline() as check:
            while await schemas(connection, "audit") != {"audit"}:
                check()
                await asyncio.sleep(0.02)
        assert not await rebuild.reached(connection, "audit_next")
        (ended,) = await latest(connection)
        assert (ended.state, ended.ended_because) == ("cancelled", "cancelled by bo: wrong one")
        assert await begin(connection, "audit", "ana", "again")
        assert (await rebuilt(connection, "audit")).state == "switched"
    check_views(database.owner)


async def test_what_was_replaced_comes_back_once_and_as_fresh_as_what_replaced_it(
    database: Database, pool: Pool, history: History
) -> None:
    add_at_random(history, 200, 1)
    projector = Projector(pool, VIEWS)
    await project_all(projector, history)
    async with pool.connection() as connection:
        with pytest.raises(Impossible, match="nothing to roll tasks back to"):
            await roll_back(pool, "tasks", "ana", "x")
        await begin(connection, "tasks", "ana", "x")
        with pytest.raises(Impossible, match="nothing to roll tasks back to"):
            await roll_back(pool, "tasks", "ana", "x")
        async with rebuilding(pool):
            await rebuilt(connection, "tasks")
        add_at_random(history, 1200, 2)
        with pytest.raises(Overtaken):
            await project_all(projector, history)
        await project_all(projector, history)
        async with damaging(database) as owner:
            await owner.execute("UPDATE tasks.tasks SET kind = 'what the new build got wrong'")
        asked = [roll_back(pool, "tasks", who, "wrong") for who in ("ana", "bo")]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert sorted(map(type, answers), key=str) == sorted([type(None), Impossible], key=str)
        assert (await rebuild.reached(connection, "tasks"))["demo"] == history.size
        assert await schemas(connection, "tasks") == {"tasks"}
        (ended,) = await latest(connection)
        assert (ended.state, ended.has_old) == ("rolled_back", False)
    check_views(database.owner)


async def test_a_build_that_is_not_what_a_replay_makes_is_not_switched(
    database: Database, pool: Pool, history: History
) -> None:
    add_at_random(history, 100, 1)
    await project_all(Projector(pool, VIEWS), history)
    async with pool.connection() as connection:
        await begin(connection, "sessions", "ana", "x")
        await project_all(Projector(pool, {"sessions_next": sessions}), history)
        await connection.execute("UPDATE sessions_next.labels SET state = 'lost'")
        async with rebuilding(pool):
            ended = await rebuilt(connection, "sessions")
            with deadline() as check:
                while await schemas(connection, "sessions") != {"sessions"}:
                    check()
                    await asyncio.sleep(0.02)
    assert ended.state == "failed"
    assert "not what a replay makes" in (ended.ended_because or "")
    check_views(database.owner)


async def test_a_build_that_cannot_take_what_the_view_has_taken_is_not_switched(
    database: Database, pool: Pool, history: History
) -> None:
    history.open()
    history.add(SessionActivated(), uuid7())  # of a session that was never opened
    await project_all(Projector(pool, VIEWS), history)
    async with damaging(database) as owner:
        await owner.execute("UPDATE projections.positions SET position = 2, parked_position = NULL")
    async with pool.connection() as connection, rebuilding(pool):
        await begin(connection, "sessions", "ana", "x")
        ended = await rebuilt(connection, "sessions")
    assert ended.state == "failed"
    assert (ended.ended_because or "").startswith("event 2 of demo cannot be taken: ")


async def test_a_view_that_is_parked_is_rebuilt_up_to_there_and_its_other_projects_wholly(
    pool: Pool, new_history: NewHistory, reader: Connection
) -> None:
    broken, sound = await new_history("broken"), await new_history("sound")
    projector = Projector(pool, VIEWS)
    for history in (broken, sound):
        add_at_random(history, 30, 1)
    broken.add(SessionActivated(), uuid7())
    for history in (broken, sound):
        await project_all(projector, history)
    async with pool.connection() as connection, rebuilding(pool):
        await begin(connection, "sessions", "ana", "x")
        assert (await rebuilt(connection, "sessions")).state == "switched"
    assert (await places(reader, broken))["sessions"] == (30, 31)
    assert (await places(reader, sound))["sessions"] == (30, None)


async def test_an_event_that_a_view_cannot_take_is_tried_again_or_skipped_with_a_reason(
    database: Database, pool: Pool, history: History, reader: Connection
) -> None:
    add_at_random(history, 30, 1)
    history.add(SessionActivated(), uuid7())
    add_at_random(history, 10, 2)
    history.add_bytes("FromTheFuture", b'{"type":"FromTheFuture","schema_version":1}')
    history.add(FactRecorded(kind="last"))
    await history.write()

    async def until_parked(*expected: tuple[str, int]) -> None:
        with deadline() as check:
            while {(one.view, one.position) for one in await parked(reader)} != set(expected):
                check()
                await asyncio.sleep(0.01)

    others = [(view, 42) for view in VIEWS if view != "sessions"]
    async with running(Projector(pool, VIEWS)), pool.connection() as connection:
        await until_parked(("sessions", 31), *others)
        (since,) = [one.since for one in await parked(reader) if one.view == "sessions"]
        assert await retry(connection, "sessions", "demo") == {"demo": 30}
        with deadline() as check:
            while [one.since for one in await parked(reader) if one.view == "sessions"] in ([], [since]):
                check()
                await asyncio.sleep(0.01)
        with pytest.raises(Impossible, match="sessions of demo is not parked before event 32"):
            await rebuild.skip(connection, "sessions", "demo", 32, "ana", "wrong one")
        await rebuild.skip(connection, "sessions", "demo", 31, "ana", "of no session")
        await until_parked(("sessions", 42), *others)
        for view in VIEWS:
            await rebuild.skip(connection, view, "demo", 42, "ana", "of a newer version")
            await caught_up(pool, view, history.ledger_id, min_position=43, timeout_seconds=20)
        async with rebuilding(pool):
            for view in ("sessions", "audit"):
                await begin(connection, view, "ana", "x")
                assert (await rebuilt(connection, view)).state == "switched"
    assert await places(reader, history) | dict.fromkeys(["sessions_old", "audit_old"], None) == {
        **dict.fromkeys(VIEWS, (43, None)),
        **dict.fromkeys(["sessions_old", "audit_old"], None),
    }
    for view in VIEWS:
        async for verdict in verify(pool, view):
            assert verdict.holds, verdict.drifts


async def test_who_may_only_read_may_neither_begin_nor_switch(database: Database, reader: Connection) -> None:
    for refused in (
        "SELECT projections.make_schema('sessions_next')",
        "SELECT projections.rename_schema('sessions', 'sessions_old')",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await reader.execute(refused)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        await begin(reader, "sessions", "eve", "x")


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT projections.make_schema('elsewhere')",
        "SELECT projections.rename_schema('ledger', 'ledger_old')",
        "SELECT projections.rename_schema('sessions', 'audit_next')",
    ],
)
async def test_the_worker_may_rename_views_and_nothing_else(statement: str, pool: Pool) -> None:
    async with pool.connection() as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await connection.execute(statement.encode())
