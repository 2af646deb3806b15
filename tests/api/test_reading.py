"""Reading over HTTP with a real worker behind it: fresh, filtered, paged, in every form, or the reason why not."""

import asyncio
import csv
import io
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest

from ops.serve import STOP_SECONDS
from tests.api.conftest import Token, problem_of
from tests.check import check_ledger
from tests.conftest import Database
from tests.server import Server

pytestmark = pytest.mark.usefixtures("worker")


async def opened(client: httpx.AsyncClient, **fields: Any) -> str:
    response = await client.post("/sessions", json={"agent_role": "finance"} | fields)
    assert response.status_code == 201, response.text
    session_id: str = response.json()["session_id"]
    return session_id


async def got(client: httpx.AsyncClient, path: str, **parameters: Any) -> dict[str, Any]:
    response = await client.get(path, params=parameters)
    assert response.status_code == 200, response.text
    assert "view-behind" not in response.headers
    answer: dict[str, Any] = response.json()
    return answer


# Sessions


async def test_a_read_shows_what_was_written_just_before(client: httpx.AsyncClient) -> None:
    for number in range(1, 6):
        session_id = await opened(client, labels={"n": str(number)})
        listed = await client.get("/sessions")
        assert listed.headers["ledger-position"] == str(number)
        assert "view-behind" not in listed.headers
        assert listed.json()["sessions"][0]["session_id"] == session_id
        assert listed.json()["total"] == number


async def test_one_session_is_the_same_wherever_it_is_read(client: httpx.AsyncClient) -> None:
    secret = {"$personal": {"subject": "c-9", "value": {"name": "Grace"}}}
    created = await client.post("/sessions", json={"agent_role": "x", "metadata": {"who": secret}, "task_id": "T"})
    path = created.headers["location"]
    one = await client.get(path)
    assert (one.status_code, one.content) == (200, created.content)
    assert one.headers["etag"] == created.headers["etag"]
    assert one.headers["ledger-id"] == created.headers["ledger-id"]
    assert one.headers["ledger-position"] == "1"
    assert one.json()["metadata"] == {"who": {"name": "Grace"}}
    assert (await got(client, "/sessions"))["sessions"] == [created.json()]


async def test_sessions_are_found_by_state_role_label_and_time(client: httpx.AsyncClient) -> None:
    first = await opened(client, agent_role="a", labels={"team": "red", "tier": "1"})
    second = await opened(client, agent_role="b", labels={"team": "red"})
    await client.put(f"/sessions/{second}", json={"status": "active"})
    times = {s["session_id"]: s["opened_at"] for s in (await got(client, "/sessions"))["sessions"]}

    async def found(**filters: Any) -> list[str]:
        return [s["session_id"] for s in (await got(client, "/sessions", **filters))["sessions"]]

    assert await found() == [second, first]
    assert await found(state="active") == [second]
    assert await found(agent_role="a") == [first]
    assert await found(label="team:red") == [second, first]
    assert await found(label="tier=1") == [first]
    assert await found(label="team:red", state="pending") == [first]
    assert await found(since=times[second]) == [second]
    assert await found(until=times[second]) == [first]
    assert await found(state="failed") == []


async def test_pages_of_sessions_are_whole_by_number_and_by_cursor(client: httpx.AsyncClient) -> None:
    items = [{"type": "OpenSession", "agent_role": "x"} for _ in range(7)]
    await client.post("/commands", json=items)
    everything = [s["session_id"] for s in (await got(client, "/sessions", page_size=200))["sessions"]]
    assert len(everything) == 7
    numbered = []
    for page in (1, 2, 3):
        answer = await got(client, "/sessions", page=page, page_size=3)
        assert (answer["total"], answer["total_is_exact"], answer["page"], answer["page_size"]) == (7, True, page, 3)
        numbered += [s["session_id"] for s in answer["sessions"]]
    assert numbered == everything
    followed: list[str] = []
    after: dict[str, str] = {}
    while True:
        answer = await got(client, "/sessions", limit=2, **after)
        followed += [s["session_id"] for s in answer["sessions"]]
        if answer["next"] is None:
            break
        after = {"after": answer["next"]}
    assert followed == everything


# Freshness


async def test_a_view_that_is_behind_says_by_how_much_and_a_single_thing_is_never_behind(
    client: httpx.AsyncClient, database: Database
) -> None:
    session_id = await opened(client)
    await got(client, "/sessions")
    with psycopg.connect(database.worker) as blocker:
        blocker.execute("SELECT FROM projections.positions FOR UPDATE")
        await client.put(f"/sessions/{session_id}", json={"status": "active"})
        for path in ("/sessions", "/records", "/audit/search", f"/sessions/{session_id}/events"):
            began = asyncio.get_running_loop().time()
            behind = await client.get(path)
            assert behind.status_code == 200
            assert (behind.headers["ledger-position"], behind.headers["view-behind"]) == ("1", "1")
            assert asyncio.get_running_loop().time() - began >= 0.25
        assert (await client.get("/sessions", params={"min_position": 0})).headers["view-behind"] == "1"
        late = await client.get("/sessions", params={"min_position": 2})
        assert (late.status_code, problem_of(late)["code"]) == (503, "view_behind")
        one = await client.get(f"/sessions/{session_id}")
        assert (one.json()["state"], one.headers["ledger-position"]) == ("active", "2")
        assert (await client.get(f"/sessions/{session_id}", params={"min_position": 2})).status_code == 200
        # The trail itself needs no view.
        trail = await client.get("/events")
        assert ([e["position"] for e in trail.json()["events"]], trail.headers["ledger-position"]) == ([1, 2], "2")
        blocker.rollback()
    assert (await client.get("/sessions", params={"min_position": 2})).json()["sessions"][0]["state"] == "active"


async def test_a_position_that_was_never_reached_is_view_behind(client: httpx.AsyncClient) -> None:
    session_id = await opened(client)
    for path in ("/sessions", "/events", "/events/1", f"/sessions/{session_id}", "/audit/search"):
        late = await client.get(path, params={"min_position": 99})
        assert (late.status_code, problem_of(late)["code"]) == (503, "view_behind")


async def test_a_project_without_a_ledger_is_empty(client: httpx.AsyncClient) -> None:
    for path, name in (("/sessions", "sessions"), ("/records", "records"), ("/events", "events")):
        answer = await client.get(path)
        assert (answer.json()[name], answer.json()["next"]) == ([], None)
        assert answer.headers["ledger-position"] == "0"
        assert "ledger-id" not in answer.headers
        assert (await client.get(path, params={"min_position": 1})).status_code == 503
    assert (await got(client, "/sessions", limit=7))["page_size"] == 7
    assert (await got(client, "/audit/search", q="x"))["facets"]["counted"] == 0
    assert (await got(client, "/audit/search", facets=False))["facets"] is None
    for path in ("/events", "/audit/search"):
        lines = await client.get(path, headers={"Accept": "application/x-ndjson"})
        assert (lines.headers["content-type"], lines.content) == ("application/x-ndjson", b"")
        table = await client.get(path, headers={"Accept": "text/csv"})
        assert table.headers["content-type"] == "text/csv; charset=utf-8; header=present"
        assert table.text.startswith("position,recorded_at,")
        assert table.text.count("\r\n") == 1
    assert (await client.get(f"/sessions/{uuid4()}")).status_code == 404


# Waiting for a change


async def test_what_is_unchanged_is_not_sent_again(client: httpx.AsyncClient) -> None:
    path = f"/sessions/{await opened(client)}"
    etag = (await client.get(path)).headers["etag"]
    for known in (etag, f"W/{etag}", f'"77", {etag}', "*"):
        same = await client.get(path, headers={"If-None-Match": known})
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag)
        assert "content-type" not in same.headers
    assert (await client.get(path, headers={"If-None-Match": '"77"'})).status_code == 200


async def test_waiting_ends_with_the_change_and_not_with_another_ones(client: httpx.AsyncClient) -> None:
    path = f"/sessions/{await opened(client)}"
    loop = asyncio.get_running_loop()
    headers = {"If-None-Match": '"1"'}
    began = loop.time()
    waits = asyncio.create_task(client.get(path, params={"wait_seconds": 30}, headers=headers))
    await opened(client)
    await asyncio.sleep(0.1)
    assert not waits.done()
    await client.put(path, json={"status": "active"})
    changed = await waits
    assert (changed.status_code, changed.json()["state"], changed.headers["etag"]) == (200, "active", '"2"')
    assert loop.time() - began < 5
    began = loop.time()
    same = await client.get(path, params={"wait_seconds": 1}, headers={"If-None-Match": '"2"'})
    assert same.status_code == 304
    assert 0.9 < loop.time() - began < 3


async def test_a_process_that_is_to_end_answers_those_who_wait(database: Database, tmp_path: Path) -> None:
    with Server(database, tmp_path) as server:
        headers = {"Authorization": f"Bearer {server.token('demo')}", "If-None-Match": '"1"'}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=70, trust_env=False) as client:
            path = f"/sessions/{await opened(client)}"
            waits = asyncio.create_task(client.get(path, params={"wait_seconds": 60}))
            await several_looks(database)
            began = time.monotonic()
            assert await asyncio.to_thread(server.stop) == [0]
            assert time.monotonic() - began < STOP_SECONDS
            same = await waits
            assert (same.status_code, same.headers["etag"]) == (304, '"1"')


async def several_looks(database: Database) -> None:
    """Return when somebody waits: only then a process looks where its ledger stands again and again."""
    looks = """SELECT query_start FROM pg_stat_activity
               WHERE query LIKE '%parked_position IS NOT NULL%' AND usename = 'muniment_api'"""
    seen: set[Any] = set()
    with psycopg.connect(database.owner, autocommit=True) as connection:
        while len(seen) < 3:
            seen.update(connection.execute(looks).fetchall())
            await asyncio.sleep(0.01)


# Records


async def test_records_are_found_by_what_they_are_about(client: httpx.AsyncClient, token: Token) -> None:
    session_id, task_id = await opened(client), str(uuid4())
    sent = [
        {"kind": "tool.called", "session_id": session_id, "status": "error", "refs": [{"type": "inv", "id": "9"}]},
        {"kind": "model.called", "session_id": session_id, "external_id": "x-1"},
        {"kind": "tool.called", "task_id": task_id},
    ]
    one, two, three = [i["body"]["record_id"] for i in (await client.post("/records", json=sent)).json()]
    child = {"kind": "guardrail.tripped", "parent_record_id": one}
    other = await client.post("/records", json=child, headers=token("agent", subject="agent-8"))
    four = other.json()["record_id"]

    async def found(**filters: Any) -> list[str]:
        return [r["record_id"] for r in (await got(client, "/records", **filters))["records"]]

    assert await found() == [four, three, two, one]
    assert await found(order="asc") == [one, two, three, four]
    assert await found(session_id=session_id) == [two, one]
    assert await found(kind="tool.called") == [three, one]
    assert await found(task_id=task_id) == [three]
    assert await found(parent_record_id=one) == [four]
    assert await found(status="error") == [one]
    assert await found(external_id="x-1") == [two]
    assert await found(ref="inv:9") == [one]
    assert await found(actor="agent-8") == await found(actor="muniment-development#agent-8") == [four]
    assert await found(kind="tool.called", session_id=session_id) == [one]
    assert await found(until="2020-01-01T00:00:00Z") == []


async def test_pages_of_records_are_whole(client: httpx.AsyncClient) -> None:
    await client.post("/records", json=[{"kind": "a", "body": n} for n in range(7)])
    for order in ("asc", "desc"):
        bodies: list[int] = []
        after: dict[str, str] = {}
        while True:
            page = await got(client, "/records", limit=3, order=order, **after)
            bodies += [record["body"] for record in page["records"]]
            if page["next"] is None:
                break
            after = {"after": page["next"]}
        assert bodies == (list(range(7)) if order == "asc" else list(range(6, -1, -1)))


async def test_a_record_is_the_same_wherever_it_is_read(client: httpx.AsyncClient) -> None:
    large = {"text": "x" * 100_000, "who": {"$personal": {"subject": "c-9", "value": "Grace"}}}
    created = await client.post("/records", json={"kind": "a", "body": large})
    one = await client.get(created.headers["location"])
    assert (one.content, one.headers["etag"]) == (created.content, '"1"')
    assert one.json()["body"]["who"] == "Grace"
    assert (await got(client, "/records"))["records"] == [created.json()]
    assert (await client.get(created.headers["location"], headers={"If-None-Match": '"1"'})).status_code == 304


# Events


async def trail(client: httpx.AsyncClient) -> str:
    """Six events: a session with a person's name in it, changed, refused, recorded, and another one."""
    secret = {"$personal": {"subject": "c-9", "value": "Grace"}}
    session_id = await opened(client, metadata={"who": secret}, correlation_id="run-1")
    await client.put(f"/sessions/{session_id}", json={"status": "active", "reason": secret})
    await client.put(f"/sessions/{session_id}", json={"status": "expired", "reason": secret})
    await client.post("/records", json={"kind": "a", "session_id": session_id, "body": {"animal": "Zebra"}})
    await client.post("/records", json={"kind": "b", "refs": [{"type": "inv", "id": "9"}]})
    await opened(client)
    return session_id


async def test_the_trail_is_the_stored_bytes_in_their_place(client: httpx.AsyncClient, database: Database) -> None:
    await trail(client)
    page = await got(client, "/events")
    history = check_ledger(database.owner)["demo"]
    assert [e["position"] for e in page["events"]] == [1, 2, 3, 4, 5, 6]
    for shown, (position, event) in zip(page["events"], history, strict=True):
        assert (shown["position"], shown["event_id"], shown["type"]) == (position, str(event.event_id), event.type)
        one = await client.get(f"/events/{position}")
        assert one.json() == shown
    assert page["events"][0]["data"]["metadata"] == {"who": "Grace"}
    assert page["events"][1]["reason"] == "Grace"
    assert page["events"][2]["data"]["attempted"]["reason"] == "Grace"


@pytest.mark.parametrize("named", ["0", "7", "-1", "1.0", "x", "1e0", "9" * 30, "²"])
async def test_a_position_that_is_none_has_no_event(client: httpx.AsyncClient, named: str) -> None:
    await trail(client)
    missing = await client.get(f"/events/{named}")
    assert (missing.status_code, problem_of(missing)["code"]) == (404, "not_found")


async def test_events_are_found_by_what_they_are_about(client: httpx.AsyncClient) -> None:
    session_id = await trail(client)
    times = [e["recorded_at"] for e in (await got(client, "/events"))["events"]]

    async def found(path: str = "/events", **filters: Any) -> list[int]:
        return [e["position"] for e in (await got(client, path, **filters))["events"]]

    assert await found(type="SessionOpened") == [1, 6]
    assert await found(stream=session_id) == [1, 2]
    assert await found(session=session_id) == await found(f"/sessions/{session_id}/events") == [1, 2, 3, 4]
    assert await found(actor="agent-7", order="desc", limit=2) == [6, 5]
    assert await found(actor="someone") == []
    assert await found(ref="inv:9") == [5]
    assert await found(correlation="run-1") == [1]
    assert await found(since=times[3], until=times[5]) == [n for n in (4, 5, 6) if times[n - 1] < times[5]]
    assert await found(type="FactRecorded", session=session_id) == [4]
    assert await found("/audit/search", q="zebra") == [4]
    assert await found("/audit/search", q="Zebra' | & !x:*") == []
    assert await found("/audit/search", q="Grace") == []
    assert await found("/audit/search") == [6, 5, 4, 3, 2, 1]


async def test_a_search_counts_what_it_finds(client: httpx.AsyncClient) -> None:
    await trail(client)
    facets = (await got(client, "/audit/search", q="agent-7", limit=1))["facets"]
    assert facets == {
        "types": {"SessionOpened": 2, "FactRecorded": 2, "SessionActivated": 1, "CommandRefused": 1},
        "actors": {"muniment-development#agent-7": 6},
        "counted": 6,
        "is_exact": True,
    }
    assert (await got(client, "/audit/search", facets=False))["facets"] is None


@pytest.mark.parametrize("path", ["/events", "/events?type=FactRecorded", "/audit/search?facets=false"])
@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_pages_of_events_are_whole_in_every_form(client: httpx.AsyncClient, path: str, order: str) -> None:
    await client.post("/records", json=[{"kind": "a"} for _ in range(7)])
    whole = list(range(1, 8)) if order == "asc" else list(range(7, 0, -1))
    positions: list[int] = []
    address = str(httpx.URL(path).copy_merge_params({"limit": "3", "order": order}))
    url: str | None = address
    while url:
        page = (await client.get(url)).json()
        positions += [e["position"] for e in page["events"]]
        url = str(httpx.URL(address).copy_set_param("after", page["next"])) if page["next"] else None
    assert positions == whole
    positions, url = [], address
    while url:
        lines = await client.get(url, headers={"Accept": "application/x-ndjson"})
        assert lines.headers["content-type"] == "application/x-ndjson"
        positions += [httpx.Response(200, content=line).json()["position"] for line in lines.text.splitlines()]
        url = lines.links.get("next", {}).get("url")
    assert positions == whole


async def test_a_large_page_is_cut_and_goes_on(client: httpx.AsyncClient) -> None:
    body = "x" * 1_000_000
    for _ in range(3):
        assert (await client.post("/records", json=[{"kind": "a", "body": body}] * 7)).status_code == 201
    first = await got(client, "/events", limit=1000)
    rest = await got(client, "/events", limit=1000, after=first["next"])
    assert [e["position"] for e in first["events"] + rest["events"]] == list(range(1, 22))
    assert len(first["events"]) == 17
    assert rest["next"] is None


async def test_a_table_runs_no_formula(client: httpx.AsyncClient) -> None:
    await client.post("/sessions", json={"agent_role": "x", "external_id": '=HYPERLINK("http://x","y")'})
    await client.post("/sessions", json={"agent_role": "x", "external_id": '-1, "two"', "correlation_id": "@x"})
    table = await client.get("/events", headers={"Accept": "text/csv;q=0.9, application/json;q=0.1"})
    assert table.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    assert table.content.endswith(b"\r\n")
    one, two = csv.DictReader(io.StringIO(table.text, newline=""), strict=True)
    assert one["external_id"] == '\'=HYPERLINK("http://x","y")'
    assert (two["external_id"], two["correlation_id"], two["position"]) == ('\'-1, "two"', "'@x", "2")
    assert one["data"].startswith("{")


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("*/*", "application/json"),
        ("", "application/json"),
        ("text/html", "application/json"),
        ("application/x-ndjson;q=0, application/json", "application/json"),
        ("text/csv;q=0.2, application/x-ndjson;q=0.3", "application/x-ndjson"),
        ("text/csv;q=x", "application/json"),
        ("Application/X-NDJSON", "application/x-ndjson"),
        ("TEXT/CSV;Q=0.2, Application/X-NDJSON;Q=0.3", "application/x-ndjson"),
    ],
)
async def test_the_form_is_the_preferred_one(client: httpx.AsyncClient, accept: str, form: str) -> None:
    await opened(client)
    answer = await client.get("/events", headers={"Accept": accept})
    assert (answer.headers["content-type"], answer.headers["vary"]) == (form, "Accept")


# Who may read, and what cannot be asked


async def test_readers_have_a_role_and_see_their_own_project(client: httpx.AsyncClient, token: Token) -> None:
    session_id = await trail(client)
    paths = ["/sessions", f"/sessions/{session_id}", "/records", "/events", "/events/1", "/audit/search"]
    for path in [*paths, f"/sessions/{session_id}/events"]:
        for role in ("agent", "approver", "auditor", "operator"):
            assert (await client.get(path, headers=token(role, subject="b"))).status_code == 200
        for headers in (token("importer"), token()):
            refused = await client.get(path, headers=headers)
            assert (refused.status_code, problem_of(refused)["code"]) == (403, "forbidden")
        anonymous = await client.get(path, headers={"Authorization": "Bearer x"})
        assert (anonymous.status_code, anonymous.headers["www-authenticate"]) == (401, "Bearer")
    await client.post("/sessions", json={"agent_role": "x"}, headers=token("agent", project="other"))
    other = token("auditor", project="other")
    assert (await client.get(f"/sessions/{session_id}", headers=other)).status_code == 404
    assert (await client.get(f"/sessions/{session_id}/events", headers=other)).status_code == 404
    assert (await client.get("/events/2", headers=other)).status_code == 404
    assert len((await client.get("/events", headers=other)).json()["events"]) == 1


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/sessions?page=0", "page"),
        ("/sessions?page=x", "page"),
        ("/sessions?page=1000", "page"),
        ("/sessions?page_size=201", "page_size"),
        ("/sessions?page_size=0", "page_size"),
        ("/sessions?limit=", "limit"),
        ("/sessions?state=open", "state"),
        ("/sessions?state=null", "state"),
        ("/sessions?label=none", "label"),
        ("/sessions?agent_role=%00", "agent_role"),
        ("/sessions?after=zz", "after"),
        ("/sessions?after=1-2-3", "after"),
        ("/sessions?after=99999999999999999999999-1", "after"),
        ("/sessions?after=1-1&page=2", "page"),
        ("/sessions?since=yesterday", "since"),
        ("/sessions?since=1700000000", "since"),
        ("/sessions?since=0.5", "since"),
        ("/sessions?since=2026-01-01T00:00:00", "since"),
        ("/sessions?page=1&page=2", "page"),
        ("/sessions?colour=red", "colour"),
        ("/sessions?min_position=-1", "min_position"),
        ("/records?kind=NO", "kind"),
        ("/records?session_id=x", "session_id"),
        ("/records?limit=201", "limit"),
        ("/events?limit=1001", "limit"),
        ("/events?after=x", "after"),
        ("/events?order=up", "order"),
        ("/events/1?after=1", "after"),
        ("/audit/search?q=", "q"),
        ("/audit/search?q=%20.", "q"),
        ("/audit/search?facets=perhaps", "facets"),
        ("/commands/x?principal=", "principal"),
        ("/sessions?%ff=1", ""),
        ("/sessions?a=%ff", ""),
        ("/sessions?" + "a&" * 51, ""),
    ],
)
async def test_a_parameter_that_cannot_be_meant_is_named(client: httpx.AsyncClient, path: str, named: str) -> None:
    await opened(client)
    refused = await client.get(path)
    assert refused.status_code == 400
    problem = problem_of(refused)
    assert (problem["code"], problem["errors"][0]["pointer"]) == ("malformed_request", named)


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.999999-14:00"])
async def test_the_ends_of_time_are_times_too(client: httpx.AsyncClient, moment: str) -> None:
    await opened(client)
    for path in ("/sessions", "/records", "/events", "/audit/search"):
        for name in ("since", "until"):
            assert (await client.get(path, params={name: moment})).status_code == 200


async def test_asking_for_the_head_only_says_the_same_without_a_body(client: httpx.AsyncClient) -> None:
    session_id = await trail(client)
    for path in ("/sessions", f"/sessions/{session_id}", "/events", "/health", "/openapi.json", "/nothing"):
        whole, head = await client.get(path), await client.head(path)
        assert (head.status_code, head.content) == (whole.status_code, b"")
        assert head.headers["content-type"] == whole.headers["content-type"]


async def test_the_total_is_exact_up_to_ten_thousand_and_the_cursor_leads_further(
    client: httpx.AsyncClient, database: Database
) -> None:
    await opened(client)
    await got(client, "/sessions")
    with psycopg.connect(database.worker, autocommit=True) as connection:
        # More rows than a test could open sessions for; the view is disposable, and so is this database.
        connection.execute(
            """INSERT INTO sessions.sessions
               SELECT ledger_id, gen_random_uuid(), position + n, opened_at, expires_at,
                      state, agent_role, session
               FROM sessions.sessions, generate_series(1, 10000) AS n"""
        )
    page = await got(client, "/sessions", page=1, page_size=200)
    assert (page["total"], page["total_is_exact"]) == (10_000, False)
    seen, after = len(page["sessions"]), page["next"]
    while after:
        page = await got(client, "/sessions", page_size=200, after=after)
        seen, after = seen + len(page["sessions"]), page["next"]
    assert seen == 10_001
