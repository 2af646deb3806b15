"""Through a pooler of transactions, and without LISTEN: all of it works, and nothing is left on its connections."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, aclosing
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from eventsourcing.persistence import StoredEvent
from litestar import Litestar

from api.app import create_app
from api.auth import development_token
from ledger import news, recorder
from ledger.postgres import Statement, bigint, is_pooled, open_pool
from ops.worker import work
from tests.api.conftest import running, settings_of
from tests.check import check_ledger
from tests.conftest import Database
from tests.ops.everything import EVERY, given, pair_of, until
from tests.ops.pooler import CONNECTIONS, PgBouncer
from tests.server import Server

ADD = Statement("add", b"SELECT 1 + %(number)s::bigint")

SESSION_STATE = {
    "prepared statements": "SELECT name FROM pg_prepared_statements",
    "channels": "SELECT pg_listening_channels()",
    "cursors": "SELECT name FROM pg_cursors WHERE name <> ''",
    "advisory locks": "SELECT objid FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
    "temporary tables": "SELECT relname FROM pg_class WHERE relnamespace = pg_my_temp_schema()",
    # The pooler itself keeps some of a client's settings with its connection.
    "settings": "SELECT name, setting FROM pg_settings WHERE source = 'session' AND setting <> reset_val"
    " AND name NOT IN ('application_name', 'client_encoding')",
}


@pytest.fixture
def pooled(pgbouncer: PgBouncer, database: Database) -> Database:
    """A fresh database, reached through the pooler but by its owner."""
    return pgbouncer.pooling(database)


def left_behind(url: str) -> dict[str, list[Any]]:
    """What there is, on any connection that the pooler has for this user, that belongs to a connection."""
    found: dict[str, list[Any]] = {}
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):  # each has a transaction open, so each has another of the server's connections
            client = stack.enter_context(psycopg.connect(url, prepare_threshold=None))
            for what, query in SESSION_STATE.items():
                if rows := client.execute(query.encode()).fetchall():
                    found.setdefault(what, []).extend(rows)
    return found


# Through a pooler


async def test_every_command_and_every_list_come_through_few_connections_without_listening(
    pooled: Database, tmp_path: Path
) -> None:
    with Server(pooled, tmp_path, ("api", "worker")) as server:
        async with pair_of("demo", server) as pair:
            giving = (pair.give_every_command() for _ in range(6))
            await asyncio.gather(*giving, *(pair.read_every_list() for _ in range(6)))
            rebuild = [sys.executable, "-P", "-m", "ops.cli", "projections", "rebuild", "sessions", "--reason", "test"]
            environment = server.environment | {"DATABASE_URL": pooled.worker}
            rebuilt = await asyncio.to_thread(subprocess.run, rebuild, env=environment, capture_output=True, text=True)
            assert rebuilt.returncode == 0, rebuilt.stderr
            there = await pair.read_every_list()
        assert {name: n for name, n in there.items() if name not in ("events", "found")} == {
            "sessions": 12,
            "records": 6,
            "tasks": 6,
            "dead": 0,
            "approvals": 6,
        }
        server.stop()
    assert given(pooled.owner) >= EVERY
    assert len(check_ledger(pooled.owner)["demo"]) == there["events"]
    for url in (pooled.api, pooled.worker):
        assert left_behind(url) == {}


async def test_what_is_left_on_a_connection_is_found(pooled: Database) -> None:
    with psycopg.connect(pooled.api, autocommit=True) as client:
        for leaving in ("LISTEN ledger", "SET jit = on", "SELECT pg_advisory_lock(1)", "PREPARE one AS SELECT 1"):
            client.execute(leaving.encode())
        assert sorted(left_behind(pooled.api)) == ["advisory locks", "channels", "prepared statements", "settings"]
        client.execute("DISCARD ALL")
        assert left_behind(pooled.api) == {}


async def test_a_statement_comes_to_any_connection_of_the_server(pooled: Database) -> None:
    async with open_pool(pooled.api, 2) as pool, pool.connection() as one, pool.connection() as other:
        for _ in range(3):
            assert await ADD.fetch(one, {"number": bigint(1)}) == [(2,)]
            async with other.transaction():  # it holds the connection that the other had, which gets the next
                for _ in range(10):
                    await other.execute("SELECT 1", prepare=True)
                assert await ADD.fetch(one, {"number": bigint(2)}) == [(3,)]
                await one.execute("SELECT 1", prepare=True)
    assert left_behind(pooled.api) == {}


async def test_a_pooler_is_told_from_the_database_itself(pooled: Database, database: Database) -> None:
    for url, expected in ((pooled.api, True), (database.api, False)):
        async with open_pool(url, 1) as pool, pool.connection() as connection:
            assert await is_pooled(connection) is expected
            assert (connection.prepare_threshold is None) is expected


def test_applications_of_eventsourcing_come_through_it(pooled: Database) -> None:
    with recorder.open_pool(pooled.api, 2) as pool:
        events = recorder.LedgerRecorder(pool, "theirs", create=True)
        with events.subscribe(gt=0) as subscription:
            for version in range(3):
                events.insert_events([StoredEvent(uuid4(), version, "theirs:Opened", b"{}")])
            assert [next(subscription).id for _ in range(3)] == [1, 2, 3]
    assert left_behind(pooled.api) == {}


# Without LISTEN


@pytest.fixture
async def apps(pooled: Database, tmp_path: Path) -> AsyncIterator[list[Litestar]]:
    """Two processes' worth of the API, which hear of nothing; and a worker, which does not either."""
    stop = asyncio.Event()
    worker = asyncio.create_task(work(settings_of(pooled, tmp_path, DATABASE_URL=pooled.worker), stop))
    yield [create_app(settings_of(pooled, tmp_path)) for _ in range(2)]
    stop.set()
    await worker


@pytest.fixture
async def clients(apps: list[Litestar], tmp_path: Path) -> AsyncIterator[list[httpx.AsyncClient]]:
    """An agent of each."""
    token = development_token(tmp_path / "keys", project="demo", subject="bot")
    async with AsyncExitStack() as stack:
        headers = {"Authorization": f"Bearer {token}"}
        yield [await stack.enter_async_context(running(app, headers)) for app in apps]


async def true_of(value: object) -> object:
    return value


async def opened(client: httpx.AsyncClient) -> tuple[str, dict[str, str]]:
    """A session: its address, and what asks for it once it has changed."""
    answer = await client.post("/sessions", json={"agent_role": "finance"})
    assert answer.status_code == 201
    return answer.headers["location"], {"If-None-Match": answer.headers["etag"]}


async def test_nothing_is_listened_to_through_a_pooler(pooled: Database, database: Database) -> None:
    assert [heard async for heard in news.announced(pooled.api)] == []
    async with aclosing(news.announced(database.api)) as heard:
        assert await anext(heard) is None  # now it listens
    assert left_behind(pooled.api) == {}


async def test_views_catch_up(clients: list[httpx.AsyncClient]) -> None:
    async def shown(sessions: int) -> bool:
        answer = await clients[1].get("/sessions")
        return "view-behind" not in answer.headers and len(answer.json()["sessions"]) == sessions

    for sessions in range(1, 6):
        await opened(clients[0])
        await until(partial(shown, sessions))


async def test_who_waits_for_a_change_is_answered(apps: list[Litestar], clients: list[httpx.AsyncClient]) -> None:
    address, as_it_was = await opened(clients[0])
    watch = apps[0].state.api.committer.watch
    began = asyncio.get_running_loop().time()
    waiting = asyncio.create_task(clients[0].get(address, params={"wait_seconds": 60}, headers=as_it_was))
    await until(lambda: true_of(watch._awaited))
    assert (await clients[1].put(address, json={"status": "active"})).status_code == 200
    assert (await waiting).json()["state"] == "active"
    assert asyncio.get_running_loop().time() - began < 20


async def test_who_waits_for_work_is_given_it(apps: list[Litestar], clients: list[httpx.AsyncClient]) -> None:
    claim = {"worker": "mailer-1", "kinds": ["mail.send"]}
    began = asyncio.get_running_loop().time()
    waiting = asyncio.create_task(clients[0].post("/tasks/claim", params={"wait_seconds": 60}, json=claim))
    await until(lambda: true_of(apps[0].state.api.line._turns))
    task = (await clients[1].post("/tasks", json={"kind": "mail.send"})).json()
    assert [claimed["task_id"] for claimed in (await waiting).json()["tasks"]] == [task["task_id"]]
    assert asyncio.get_running_loop().time() - began < 20


async def test_what_another_process_appends_is_noticed(pooled: Database, clients: list[httpx.AsyncClient]) -> None:
    address, _ = await opened(clients[0])
    for version in range(1, 11):
        client, note = clients[version % 2], {"text": "seen", "expected_version": version}
        assert (await client.post(f"{address}/annotations", json=note)).status_code == 200
        stale = await client.post(f"{address}/annotations", json=note)
        assert (stale.status_code, stale.json()["code"]) == (412, "precondition_failed")
    assert len(check_ledger(pooled.owner)["demo"]) == 11
