"""Spans: what was in which state is found again, at a cost that does not grow with what came since; and a view that an
older release built is built again while it serves."""

import asyncio
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from ledger.embedded import EmbeddedServer
from ledger.events import (
    ApprovalDenied,
    ApprovalGranted,
    SessionActivated,
    SessionCompleted,
    TaskClaimed,
    TaskCompleted,
    TaskDeadLettered,
    TaskRedriven,
)
from ledger.past import Past
from ledger.postgres import Connection, Pool
from ledger.session import State as SessionState
from ledger.task import State as TaskState
from ledger.values import moment
from ops.migrate import migrate, shipped
from projections import VIEWS, Projector, approvals, rebuild, sessions, spans, tasks
from projections.projector import Overtaken
from projections.verify import verify
from tests.check import check_views
from tests.conftest import Database
from tests.projections.conftest import LATER, History, deadline, project_all, rows_read
from tests.projections.test_rebuild import damaging, rebuilding, rebuilt

STATES: dict[str, tuple[str, ...]] = {
    "sessions": get_args(SessionState),
    "tasks": get_args(TaskState),
    "approvals": ("pending", "approved", "denied"),
}


def past(history: History, position: int) -> Past:
    return Past(position, moment(history.time(position)))


class Pages(NamedTuple):
    """The first page of each state: the ids on it. And how many there were, where that is said, or are on them; and how
    many rows of the view all of it read."""

    ids: dict[str | None, list[UUID]]
    told: int
    read: int


async def pages_then(connection: Connection, history: History, view: str, position: int) -> Pages:
    module: Any = VIEWS[view]
    found: dict[str | None, list[UUID]] = {}
    told = 0
    async with connection.transaction():
        before = await rows_read(connection, view)
        for state in (None, *STATES[view]):
            page = await module.search_past(
                connection,
                history.ledger_id,
                past(history, position),
                module.Filter(state=state),
                limit=20,
                reached=history.size,
            )
            found[state] = [getattr(one, f"{view[:-1]}_id") for one in getattr(page, view)]
            told += getattr(page, "total", len(found[state]))
        return Pages(found, told, await rows_read(connection, view) - before)


async def test_each_state_that_was_left_has_its_span_however_many_a_batch_makes(
    history: History, projector: Projector, reader: Connection
) -> None:
    task_id = history.submit()
    history.add(TaskClaimed(attempt=1, worker="w", lease_id=task_id, lease_until=LATER), task_id)
    history.open()
    history.add(TaskDeadLettered(attempts=1), task_id)
    await project_all(projector, history)
    history.add(TaskRedriven(), task_id)
    await project_all(projector, history)
    cursor = await reader.execute(
        "SELECT state, since, until, position, class FROM tasks.spans WHERE stream_id = %s ORDER BY since", [task_id]
    )
    assert await cursor.fetchall() == [("queued", 1, 2, 1, 0), ("running", 2, 4, 1, 1), ("dead", 4, 5, 1, 2)]
    cursor = await reader.execute("SELECT state, state_since FROM tasks.tasks")
    assert await cursor.fetchall() == [("queued", 5)]


def _busy(history: History, count: int) -> None:
    """Sessions, tasks and approvals that come and go, each a while after the one before."""
    going: list[tuple[UUID, UUID, UUID]] = []
    for n in range(count):
        session_id = history.open("rare" if n % 50 == 0 else "common", labels={"n": str(n % 10)})
        going.append((session_id, history.submit(), history.ask()))
        history.add(SessionActivated(), session_id)
        if n % 3:
            session_id, task_id, approval_id = going.pop(0)
            history.add(TaskClaimed(attempt=1, worker="w", lease_id=task_id, lease_until=LATER), task_id)
            history.add(SessionCompleted(), session_id)
            history.add(TaskCompleted(lease_id=task_id, result=1), task_id)
            history.add(ApprovalGranted(approved_until=LATER) if n % 2 else ApprovalDenied(), approval_id)


async def test_a_page_of_the_past_reads_no_more_when_the_ledger_has_grown(
    history: History, projector: Projector, reader: Connection
) -> None:
    _busy(history, 60)
    await project_all(projector, history)
    position = history.size
    was = {view: await pages_then(reader, history, view, position) for view in STATES}
    for _ in range(4):
        _busy(history, 600)
        await project_all(projector, history)
    for view, pages in was.items():
        again = await pages_then(reader, history, view, position)
        halfway = await pages_then(reader, history, view, history.size // 2)
        assert again.ids == pages.ids
        for found in (again, halfway):
            assert found.read <= 2 * found.told + 250, (
                f"{view}: {found.read} rows for {found.told}, before {pages.read}"
            )


async def test_what_is_asked_for_besides_the_state_is_looked_for_among_what_was_in_it(
    history: History, projector: Projector, reader: Connection
) -> None:
    _busy(history, 400)
    await project_all(projector, history)
    position = history.size
    then = past(history, position)
    wanted = [
        sessions.Filter(state="active", agent_role="rare"),
        sessions.Filter(state="active", label="n=3"),
        sessions.Filter(state="completed", label="n=3", agent_role="common"),
        sessions.Filter(state="active", since=moment(history.time(position // 2))),
    ]
    shown = [await sessions.search(reader, history.ledger_id, one, limit=200) for one in wanted]
    of_tasks = tasks.Filter(state="queued", kind="email", until=moment(history.time(position // 2)))
    shown_tasks = await tasks.search(reader, history.ledger_id, of_tasks, limit=200, order="asc")
    urgent = approvals.Filter(tool="refund", requester="agent-7", risk="medium")
    shown_approvals = await approvals.search(reader, history.ledger_id, urgent, limit=200, order="risk")
    _busy(history, 1500)
    for session in shown[1].sessions:
        history.add(SessionCompleted(), session.session_id)
    await project_all(projector, history)
    options: dict[str, Any] = {"limit": 200, "reached": history.size}
    for one, page in zip(wanted, shown, strict=True):
        assert page.sessions
        async with reader.transaction():
            assert await sessions.search_past(reader, history.ledger_id, then, one, **options) == page
            assert await rows_read(reader, "sessions") < 5000
    assert await tasks.search_past(reader, history.ledger_id, then, of_tasks, order="asc", **options) == shown_tasks
    again = await approvals.search_past(reader, history.ledger_id, then, urgent, order="risk", **options)
    assert again == shown_approvals


# A release that changes what a view has


async def _as_version_1_left_it(database: Database) -> None:
    async with damaging(database) as owner:
        for view in STATES:
            await owner.execute(f"UPDATE {view}.{view} SET state_since = NULL".encode())
            await owner.execute(f"TRUNCATE {view}.spans".encode())
        await owner.execute("UPDATE projections.versions SET version = 1 WHERE view NOT IN ('records', 'audit')")


async def test_a_view_of_an_older_version_serves_while_it_is_built_again_and_then_knows_the_past(
    database: Database, pool: Pool, history: History
) -> None:
    _busy(history, 100)
    projector = Projector(pool, VIEWS)
    await project_all(projector, history)
    position = history.size
    async with pool.connection() as connection:
        expected = {view: (await pages_then(connection, history, view, position)).ids for view in STATES}
    await _as_version_1_left_it(database)
    _busy(history, 100)
    projector = Projector(pool, VIEWS)  # goes on with what it does not know all of
    await project_all(projector, history)
    async with pool.connection() as connection:
        shown = await sessions.search(connection, history.ledger_id, sessions.Filter(), limit=200)
        assert shown.total == 200
        assert [verdict async for verdict in verify(pool, "sessions")] == [], "other rows than this version makes"
        async with rebuilding(pool):
            for view in STATES:
                assert await spans.version(connection, view) in (1, VIEWS[view].VERSION)
                with deadline() as check:
                    while not [one for one in await rebuild.latest(connection) if one.view == view]:
                        check()
                        await asyncio.sleep(0.02)
                ended = await rebuilt(connection, view)
                assert ended.state == "switched", ended.ended_because
                assert re.fullmatch(r"release [0-9].*", ended.asked_by)
                assert ended.reason == "it is of version 1, and this release makes version 2"
                assert await spans.version(connection, view) == 2
                assert await spans.version(connection, f"{view}_old") == 1
        again = {view: (await pages_then(connection, history, view, position)).ids for view in STATES}
        assert again == expected
    _busy(history, 10)
    with pytest.raises(Overtaken):
        await project_all(projector, history)
    await project_all(projector, history)
    check_views(database.owner)


async def test_a_build_of_another_release_is_left_to_it_and_an_older_one_ends(pool: Pool, history: History) -> None:
    _busy(history, 5)
    await project_all(Projector(pool, VIEWS), history)
    async with pool.connection() as connection:
        await rebuild.begin(connection, "tasks", "release 9", "it is newer")
        await connection.execute("UPDATE projections.versions SET version = 99 WHERE view = 'tasks_next'")
        await rebuild.begin(connection, "sessions", "release 0", "it is older")
        await connection.execute(
            "UPDATE projections.versions SET version = 1 WHERE view IN ('sessions', 'sessions_next')"
        )
        async with rebuilding(pool):
            ended = await rebuilt(connection, "sessions")
            assert (ended.number, ended.state) == (2, "switched")
        (left,) = [one for one in await rebuild.latest(connection) if one.view == "tasks"]
        assert (left.state, left.asked_by) == ("filling", "release 9")


async def test_a_worker_of_a_release_before_cannot_write_into_what_this_one_builds(
    database: Database, pool: Pool, history: History
) -> None:
    _busy(history, 1)
    await project_all(Projector(pool, VIEWS), history)
    await _as_version_1_left_it(database)
    async with pool.connection() as connection:
        for view in STATES:
            await rebuild.begin(connection, view, "ana", "x")
            sinceless = sql.SQL("INSERT INTO {} SELECT * FROM {}").format(
                sql.Identifier(f"{view}_next", view), sql.Identifier(view, view)
            )
            with pytest.raises(psycopg.errors.CheckViolation):
                await connection.execute(sinceless)


@pytest.fixture
def earlier(postgres: EmbeddedServer) -> Iterator[str]:
    """The URL of an empty database."""
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE earlier")
        yield postgres.url(database="earlier")
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier("earlier")))


@pytest.mark.parametrize(("worked", "version"), [(False, 2), (True, 1)])
async def test_where_a_worker_ran_before_views_are_of_version_1_and_else_of_the_one_of_this_release(
    earlier: str, worked: bool, version: int
) -> None:
    before = {name: text for name, text in shipped().items() if name < "0007"}
    await migrate(earlier, migrations=before)
    with psycopg.connect(earlier, autocommit=True) as connection:
        if worked:
            connection.execute("INSERT INTO projections.leases VALUES ('projector', 'one', 1, now())")
        connection.execute("SELECT projections.make_schema('sessions_next')")
        connection.execute("INSERT INTO projections.rebuilds VALUES ('sessions', 1, 'filling', 'ana', 'x')")
    await migrate(earlier)
    with psycopg.connect(earlier) as connection:
        versions: dict[str, int] = dict(connection.execute("SELECT view, version FROM projections.versions").fetchall())
        assert versions == {"sessions": version, "tasks": version, "approvals": version, "records": 1, "audit": 1}
        assert connection.execute("SELECT to_regnamespace('sessions_next') IS NULL").fetchone() == (True,)
        assert connection.execute("SELECT state FROM projections.rebuilds").fetchall() == [("cancelled",)]
