"""The shared flow of every command: ids, headers, replays, lists, refusals; exact to the header."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from api.app import create_app
from ledger.embedded import EmbeddedServer
from ledger.settings import Settings
from tests.api.conftest import Token, problem_of, running, settings_of
from tests.check import check_ledger, of_type
from tests.conftest import Database

OPEN = {"agent_role": "finance", "metadata": {"ticket": "T-81"}, "labels": {"team": "a"}}


async def opened(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/sessions", json=OPEN | fields)
    assert response.status_code == 201, response.text
    session: dict[str, Any] = response.json()
    return session


async def test_a_created_session_is_answered_whole(client: httpx.AsyncClient, database: Database) -> None:
    response = await client.post("/sessions", json=OPEN, headers={"Idempotency-Key": "k-1"})
    session = response.json()
    assert response.status_code == 201
    assert session == {
        "session_id": session["session_id"],
        "agent_role": "finance",
        "state": "pending",
        "status": "pending",
        "task_id": None,
        "metadata": {"ticket": "T-81"},
        "labels": {"team": "a"},
        "agent": None,
        "parent_session_id": None,
        "root_session_id": session["session_id"],
        "external_id": None,
        "waiting_on": [],
        "version": 1,
        "opened_at": session["opened_at"],
        "updated_at": session["opened_at"],
        "expires_at": session["expires_at"],
    }
    assert UUID(session["session_id"]).version == 7
    history = check_ledger(database.owner)["demo"]
    assert dict(response.headers) == {
        "content-type": "application/json",
        "content-length": str(len(response.content)),
        "etag": '"1"',
        "location": f"/sessions/{session['session_id']}",
        "ledger-position": "1",
        "command-id": "k-1",
        "ledger-id": str(history[0].event.ledger),
    }


async def test_a_change_says_its_last_position_and_no_location(client: httpx.AsyncClient) -> None:
    session = await opened(client)
    change = {"status": "active", "task_id": "T-1", "metadata": {"a": 1}}
    response = await client.put(f"/sessions/{session['session_id']}", json=change)
    assert (response.status_code, response.headers["ledger-position"], response.headers["etag"]) == (200, "4", '"4"')
    assert UUID(response.headers["command-id"]).version == 7
    assert "location" not in response.headers
    assert response.json()["state"] == response.json()["status"] == "active"


async def test_a_command_that_changes_nothing_says_the_position_it_saw(client: httpx.AsyncClient) -> None:
    session = await opened(client)
    await opened(client)
    response = await client.put(f"/sessions/{session['session_id']}", json={"status": "pending"})
    assert (response.status_code, response.headers["ledger-position"], response.headers["etag"]) == (200, "2", '"1"')


async def test_a_null_task_unbinds_it_and_an_absent_one_does_not(client: httpx.AsyncClient) -> None:
    session = await opened(client, task_id="T-1")
    path = f"/sessions/{session['session_id']}"
    assert (await client.put(path, json={"status": "active"})).json()["task_id"] == "T-1"
    assert (await client.put(path, json={"task_id": None})).json()["task_id"] is None


@pytest.mark.parametrize(("action", "body", "state"), [("cancel", {}, "cancelled"), ("cancel", None, "cancelled")])
async def test_cancelling_needs_no_body(
    client: httpx.AsyncClient, action: str, body: dict[str, Any] | None, state: str
) -> None:
    session = await opened(client)
    response = await client.post(f"/sessions/{session['session_id']}/{action}", json=body)
    assert (response.status_code, response.json()["state"]) == (200, state)


async def test_an_annotation_is_an_event_in_any_state(client: httpx.AsyncClient, database: Database) -> None:
    path = f"/sessions/{(await opened(client))['session_id']}"
    await client.post(f"{path}/cancel")
    response = await client.post(f"{path}/annotations", json={"text": "why it was"})
    assert (response.status_code, response.json()["version"]) == (200, 3)
    assert of_type(check_ledger(database.owner)["demo"], "SessionAnnotated")[0].data.text == "why it was"


async def test_a_record_is_answered_whole(client: httpx.AsyncClient) -> None:
    session = await opened(client)
    body = {"kind": "tool.called", "session_id": session["session_id"], "body": {"rows": [1, 2.5]}, "status": "ok"}
    response = await client.post("/records", json=body | {"refs": [{"type": "invoice", "id": "9"}]})
    record = response.json()
    assert response.status_code == 201
    assert response.headers["location"] == f"/records/{record['record_id']}"
    assert response.headers["etag"] == '"1"'
    assert {k: record[k] for k in body} == body
    assert record["refs"] == [{"type": "invoice", "id": "9"}]
    assert (record["actor"]["sub"], record["actor"]["assurance"]) == ("agent-7", "authenticated")


# Ids and replays


@pytest.mark.parametrize("key", ["k-1", '"k-1"'])
async def test_a_replay_is_the_first_answer_again(client: httpx.AsyncClient, key: str, database: Database) -> None:
    first = await client.post("/sessions", json=OPEN, headers={"Idempotency-Key": "k-1"})
    session_id = first.json()["session_id"]
    await client.put(f"/sessions/{session_id}", json={"status": "active"})
    again = await client.post("/sessions", json=OPEN, headers={"Idempotency-Key": key})
    assert again.content == first.content
    assert again.headers.pop("idempotent-replayed") == "true"
    assert again.headers == first.headers
    assert len(check_ledger(database.owner)["demo"]) == 2


async def test_a_replay_is_the_same_by_whichever_route_and_process(
    client: httpx.AsyncClient, settings: Settings, token: Token
) -> None:
    first = await client.post("/sessions", json=OPEN | {"command_id": "k-1"})
    path = f"/sessions/{first.json()['session_id']}"
    change = {"status": "active", "reason": "go"}
    changed = await client.put(path, json=change, headers={"Idempotency-Key": "k-2"})
    async with running(create_app(settings), token("agent")) as other:
        same = {"type": "OpenSession", "command_id": "k-1"} | OPEN
        again = await other.post("/commands", json=same)
        assert (again.status_code, again.content) == (201, first.content)
        named = {"type": "ChangeSession", "session_id": first.json()["session_id"], "command_id": "k-2"} | change
        again = await other.post("/commands", json=named)
        assert (again.status_code, again.content) == (200, changed.content)
        assert again.headers["idempotent-replayed"] == "true"


async def test_a_remembered_refusal_is_the_same_bytes_in_every_process(
    client: httpx.AsyncClient, settings: Settings, token: Token, database: Database
) -> None:
    path = f"/sessions/{(await opened(client))['session_id']}"
    refused = await client.put(path, json={"status": "completed", "command_id": "k-1"})
    problem = problem_of(refused)
    assert (problem["code"], problem["current_state"], problem["command"]) == (
        "invalid_transition",
        "pending",
        "ChangeSession",
    )
    assert problem["allowed"] == ["active", "cancelled"]
    assert problem["detail"].endswith("remembered for this id; to try again, use a new one")
    assert (refused.status_code, refused.headers["ledger-position"], refused.headers["command-id"]) == (422, "2", "k-1")
    await client.put(path, json={"status": "active"})
    async with running(create_app(settings), token("agent")) as other:
        again = await other.put(path, json={"status": "completed", "command_id": "k-1"})
    assert (again.status_code, again.content) == (422, refused.content)
    assert again.headers["idempotent-replayed"] == "true"
    assert [e.type for _, e in check_ledger(database.owner)["demo"]] == [
        "SessionOpened",
        "CommandRefused",
        "SessionActivated",
    ]


async def test_an_id_used_for_another_command_is_refused_and_not_recorded(
    client: httpx.AsyncClient, database: Database
) -> None:
    await client.post("/sessions", json=OPEN, headers={"Idempotency-Key": "k-1"})
    response = await client.post("/sessions", json={"agent_role": "other"}, headers={"Idempotency-Key": "k-1"})
    assert (response.status_code, problem_of(response)["code"]) == (422, "idempotency_key_reused")
    assert len(check_ledger(database.owner)["demo"]) == 1


async def test_duplicates_at_once_through_two_processes_happen_once(
    client: httpx.AsyncClient, settings: Settings, token: Token, database: Database
) -> None:
    async with running(create_app(settings), token("agent")) as other:
        sent = [c.post("/sessions", json=OPEN, headers={"Idempotency-Key": "k-1"}) for c in (client, other) * 32]
        answers = await asyncio.gather(*sent)
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert len(check_ledger(database.owner)["demo"]) == 1


async def test_an_answer_that_is_not_recorded_says_which_command_it_is_for(client: httpx.AsyncClient) -> None:
    path = f"/sessions/{(await opened(client))['session_id']}"
    named = {"Idempotency-Key": "k-1"}
    unrecorded = {
        400: await client.put(path, json={"status": "nothing"}, headers=named),
        404: await client.put(f"/sessions/{uuid4()}", json={"command_id": "k-1"}),
        412: await client.put(path, json={"status": "active"}, headers=named | {"If-Match": '"7"'}),
    }
    for status, answer in unrecorded.items():
        assert (answer.status_code, answer.headers["command-id"]) == (status, "k-1")
    await client.post("/sessions", json=OPEN, headers=named)
    reused = await client.post("/commands", json={"type": "Record", "kind": "a", "command_id": "k-1"})
    assert (reused.status_code, reused.headers["command-id"]) == (422, "k-1")
    for body in ({"status": "nothing"}, {"status": "nothing", "command_id": "k-2"}):
        assert "command-id" not in (await client.put(path, json=body)).headers


async def test_two_principals_do_not_share_ids(client: httpx.AsyncClient, token: Token) -> None:
    mine = await client.post("/sessions", json=OPEN, headers={"Idempotency-Key": "k-1"})
    theirs = await client.post("/sessions", json=OPEN, headers={"Idempotency-Key": "k-1"} | token("agent", subject="b"))
    assert theirs.status_code == 201
    assert theirs.json()["session_id"] != mine.json()["session_id"]


# What headers say


@pytest.mark.parametrize(
    ("headers", "fields", "pointer"),
    [
        ({"Idempotency-Key": "a"}, {"command_id": "b"}, "/command_id"),
        ({"If-Match": '"1"'}, {"expected_version": 2}, "/expected_version"),
        ({"Correlation-Id": "a"}, {"correlation_id": "b"}, "/correlation_id"),
        ({"Causation-Id": str(UUID(int=1))}, {"causation_id": str(UUID(int=2))}, "/causation_id"),
        ({"Idempotency-Key": ""}, {}, "Idempotency-Key"),
        ({"Idempotency-Key": "two words"}, {}, "Idempotency-Key"),
        ({"Idempotency-Key": "k" * 256}, {}, "Idempotency-Key"),
        ({"Idempotency-Key": '"k'}, {}, "Idempotency-Key"),
        ({"If-Match": 'W/"1"'}, {}, "If-Match"),
        ({"If-Match": "1"}, {}, "If-Match"),
        ({"If-Match": '"1", "2"'}, {}, "If-Match"),
        ({"If-Match": '"-1"'}, {}, "If-Match"),
        ({"If-Match": f'"{2**70}"'}, {}, "If-Match"),
        ({"Correlation-Id": "c" * 129}, {}, "Correlation-Id"),
        ({"Causation-Id": "no-uuid"}, {}, "Causation-Id"),
    ],
)
async def test_headers_that_cannot_be_meant_are_named(
    client: httpx.AsyncClient, headers: dict[str, str], fields: dict[str, Any], pointer: str
) -> None:
    response = await client.post("/sessions", json=OPEN | fields, headers=headers)
    assert response.status_code == 400
    assert problem_of(response)["errors"][0]["pointer"] == pointer


async def test_a_command_takes_no_query(client: httpx.AsyncClient) -> None:
    for path in ("/sessions", "/records", "/commands"):
        response = await client.post(f"{path}?dry_run=true", json=OPEN)
        assert problem_of(response)["errors"][0]["pointer"] == "dry_run"


async def test_a_header_that_must_stand_alone_is_refused_twice(client: httpx.AsyncClient) -> None:
    twice = [("Idempotency-Key", "a"), ("idempotency-key", "b"), ("Content-Type", "application/json")]
    response = await client.post("/sessions", content=b"{}", headers=twice)
    assert problem_of(response)["errors"] == [
        {"pointer": "idempotency-key", "detail": "it is there twice; send it once"}
    ]


async def test_if_match_holds_a_command_to_the_version_it_was_meant_for(client: httpx.AsyncClient) -> None:
    path = f"/sessions/{(await opened(client))['session_id']}"
    change = {"status": "active", "command_id": "k-1"}
    changed = await client.put(path, json=change, headers={"If-Match": '"1"'})
    assert (changed.status_code, changed.headers["etag"]) == (200, '"2"')
    late = await client.put(path, json={"status": "completed"}, headers={"If-Match": '"1"'})
    problem = problem_of(late)
    assert (late.status_code, problem["code"], problem["expected"], problem["current"]) == (
        412,
        "precondition_failed",
        1,
        2,
    )
    # Checked after the replay look-up, and no part of what makes the command the same.
    again = await client.put(path, json=change, headers={"If-Match": '"7"'})
    assert (again.status_code, again.headers["idempotent-replayed"]) == (200, "true")
    assert (await client.put(path, json={"task_id": "x"}, headers={"If-Match": "*"})).status_code == 200
    for several in ('W/"3"', '"3", "4"', "3"):
        unclear = problem_of(await client.put(path, json={"task_id": "y"}, headers={"If-Match": several}))
        assert unclear["errors"][0]["detail"].startswith("it is one ETag as it was given")


async def test_what_a_command_belongs_to_comes_from_headers_too(client: httpx.AsyncClient, database: Database) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03"
    cause = uuid4()
    headers = {b"Correlation-Id": "run é".encode(), b"Causation-Id": str(cause).encode()}
    headers[b"traceparent"] = traceparent.encode()
    await client.post("/sessions", json=OPEN, headers=headers)
    await client.post("/sessions", json=OPEN, headers={"traceparent": traceparent + "-" + "x" * 7_000})
    await client.post("/records", json=[{"kind": "a", "correlation_id": "own"}, {"kind": "b"}], headers=headers)
    (first, second, own, given) = [event for _, event in check_ledger(database.owner)["demo"]]
    assert (first.correlation_id, first.causation_id, first.traceparent) == ("run é", cause, traceparent)
    assert second.traceparent is None
    assert (own.correlation_id, given.correlation_id, given.causation_id) == ("own", "run é", cause)


@pytest.mark.parametrize("named", ["%00", "a%00b", "%20", "x" * 256])
async def test_what_cannot_be_a_command_id_names_no_command(client: httpx.AsyncClient, named: str) -> None:
    await opened(client)
    assert problem_of(await client.get(f"/commands/{named}"))["code"] == "not_found"


async def test_a_target_in_the_body_must_be_the_one_in_the_path(client: httpx.AsyncClient) -> None:
    session_id = (await opened(client))["session_id"]
    same = await client.put(f"/sessions/{session_id}", json={"session_id": session_id, "status": "active"})
    assert same.status_code == 200
    other = str(uuid4())
    response = await client.put(f"/sessions/{session_id}", json={"session_id": other, "status": "active"})
    detail = f"it is {other}, and the path says {session_id}: make them agree, or send one of them"
    assert problem_of(response)["errors"] == [{"pointer": "/session_id", "detail": detail}]


@pytest.mark.parametrize(
    "named", ["x", "..%2f..%2fetc", "00000000000000000000000000000000", "9" * 10_000, "%00", "é", "{}", "*"]
)
async def test_an_id_that_is_none_names_nothing(client: httpx.AsyncClient, named: str, database: Database) -> None:
    await opened(client)
    response = await client.put(f"/sessions/{named}", json={"status": "active"})
    assert (response.status_code, problem_of(response)["code"]) == (404, "not_found")
    assert len(response.content) < 1000
    assert len(check_ledger(database.owner)["demo"]) == 1


# Lists


async def test_a_list_is_decided_in_order_and_each_item_stands_for_itself(
    client: httpx.AsyncClient, database: Database
) -> None:
    session_id = str(uuid4())
    items: list[Any] = [
        {"type": "OpenSession", "session_id": session_id, "agent_role": "x", "command_id": "a"},
        {"type": "ChangeSession", "session_id": session_id, "status": "active", "expected_version": 1},
        {"type": "Record", "kind": "NOT A KIND", "command_id": "bad"},
        {"type": "ChangeSession", "session_id": session_id, "status": "expired", "command_id": "no"},
        {"type": "ChangeSession", "session_id": str(uuid4()), "status": "active"},
        17,
        {"type": "OpenSession", "session_id": session_id, "agent_role": "x", "command_id": "a"},
        {"type": "OpenSession", "session_id": session_id, "agent_role": "y", "command_id": "a"},
        {"type": "Record", "kind": "done", "session_id": session_id},
    ]
    response = await client.post("/commands", json=items)
    answers = response.json()
    assert response.status_code == 200
    assert [a["status"] for a in answers] == [201, 200, 400, 422, 404, 400, 201, 422, 201]
    assert [a["positions"] for a in answers] == [[1], [2], [], [3], [], [], [1], [], [4]]
    assert [a["replayed"] for a in answers] == [False] * 6 + [True, False, False]
    assert answers[0]["command_id"] == "a"
    assert answers[2]["command_id"] == "bad"
    assert answers[4]["command_id"] is answers[5]["command_id"] is None
    assert answers[2]["body"]["errors"][0]["pointer"] == "/kind"
    assert answers[3]["body"]["code"] == "invalid_transition"
    assert answers[7]["body"]["code"] == "idempotency_key_reused"
    assert answers[0]["location"] == f"/sessions/{session_id}"
    assert (answers[1]["etag"], "location" in answers[1]) == ('"2"', False)
    assert answers[6]["body"] == answers[0]["body"]
    assert len(check_ledger(database.owner)["demo"]) == 4


async def test_a_list_of_records_is_created_when_all_of_it_is(client: httpx.AsyncClient) -> None:
    assert (await client.post("/records", json=[{"kind": "a"}, {"kind": "b"}])).status_code == 201
    mixed = await client.post("/records", json=[{"kind": "a"}, {"kind": "B"}])
    assert (mixed.status_code, [item["status"] for item in mixed.json()]) == (200, [201, 400])
    other = await client.post("/records", json=[{"type": "OpenSession", "agent_role": "x"}])
    assert [item["status"] for item in other.json()] == [400]


@pytest.mark.parametrize(
    ("body", "headers", "pointer"),
    [
        ("[]", {}, ""),
        ("[" + ",".join(["1"] * 1001) + "]", {}, ""),
        ("[1,", {}, ""),
        ("[1]", {"Idempotency-Key": "a"}, "Idempotency-Key"),
        ("[1]", {"If-Match": '"1"'}, "If-Match"),
    ],
)
async def test_a_list_that_is_none_is_refused_whole(
    client: httpx.AsyncClient, body: str, headers: dict[str, str], pointer: str
) -> None:
    sent = headers | {"Content-Type": "application/json"}
    response = await client.post("/commands", content=body, headers=sent)
    assert response.status_code == 400
    assert problem_of(response)["errors"][0]["pointer"] == pointer


async def test_a_thousand_commands_fit_in_one_list(client: httpx.AsyncClient, database: Database) -> None:
    response = await client.post("/commands", json=[{"type": "Record", "kind": "a"}] * 1000)
    assert [item["positions"] for item in response.json()] == [[n] for n in range(1, 1001)]
    assert len(check_ledger(database.owner)["demo"]) == 1000


# What became of a command


async def test_one_can_ask_what_became_of_a_command(client: httpx.AsyncClient, token: Token) -> None:
    done = await client.post("/sessions", json=OPEN, headers={"Idempotency-Key": "k-1"})
    asked = await client.get("/commands/k-1")
    assert asked.json() == {
        "command_id": "k-1",
        "type": "OpenSession",
        "status": 201,
        "positions": [1],
        "body": done.json(),
    }
    assert asked.headers["ledger-id"] == done.headers["ledger-id"]
    assert problem_of(await client.get("/commands/k-2"))["code"] == "not_found"
    assert (await client.get("/commands/k-1", headers=token("agent", subject="b"))).status_code == 404
    mine = {"principal": "muniment-development#agent-7"}
    for role, status in [("auditor", 200), ("operator", 200), ("agent", 403), ("approver", 403)]:
        answer = await client.get("/commands/k-1", params=mine, headers=token(role, subject="b"))
        assert answer.status_code == status


async def test_a_refused_command_can_be_asked_for(client: httpx.AsyncClient) -> None:
    path = f"/sessions/{(await opened(client))['session_id']}"
    refused = await client.put(path, json={"status": "completed"}, headers={"Idempotency-Key": "no"})
    asked = (await client.get("/commands/no")).json()
    assert (asked["status"], asked["positions"], asked["body"]) == (422, [2], refused.json())


# Personal values


async def test_personal_values_are_sealed_at_rest_and_readable_in_answers(
    client: httpx.AsyncClient, database: Database
) -> None:
    secret = {"$personal": {"subject": "customer-9", "value": "Grace Hopper"}}
    session = await client.post("/sessions", json=OPEN | {"metadata": {"name": secret, "n": 1}, "command_id": "a"})
    assert session.json()["metadata"] == {"name": "Grace Hopper", "n": 1}
    again = await client.post("/sessions", json=OPEN | {"metadata": {"name": secret, "n": 1}, "command_id": "a"})
    assert again.content == session.content
    path = f"/sessions/{session.json()['session_id']}"
    assert (await client.put(path, json={"status": "active"})).json()["metadata"]["name"] == "Grace Hopper"
    record = await client.post("/records", json={"kind": "a", "body": [secret, {"deep": secret}]})
    assert record.json()["body"] == ["Grace Hopper", {"deep": "Grace Hopper"}]
    listed = await client.post("/commands", json=[{"type": "Record", "kind": "a", "body": secret}])
    assert listed.json()[0]["body"]["body"] == "Grace Hopper"
    for _, event in check_ledger(database.owner)["demo"]:
        assert "Grace" not in str(event)


# Who may


async def test_a_role_that_may_not_is_refused_on_the_record(
    client: httpx.AsyncClient, token: Token, database: Database
) -> None:
    await opened(client)
    auditor = token("auditor", subject="ann", kind="human")
    response = await client.post("/sessions", json=OPEN, headers=auditor | {"Idempotency-Key": "k-1"})
    problem = problem_of(response)
    assert (response.status_code, problem["code"], problem["needed"], problem["roles"]) == (
        403,
        "forbidden",
        ["agent"],
        ["auditor"],
    )
    assert response.headers["ledger-position"] == "2"
    assert of_type(check_ledger(database.owner)["demo"], "CommandRefused")[0].data.status == 403


async def test_a_replay_is_for_those_who_may_still_read_it(client: httpx.AsyncClient, token: Token) -> None:
    await client.post("/sessions", json=OPEN, headers={"Idempotency-Key": "k-1"})
    demoted = await client.post("/sessions", json=OPEN, headers={"Idempotency-Key": "k-1"} | token("importer"))
    assert (demoted.status_code, problem_of(demoted)["code"]) == (403, "forbidden")
    assert "session_id" not in demoted.text


async def test_another_projects_things_do_not_exist(client: httpx.AsyncClient, token: Token) -> None:
    session_id = (await opened(client))["session_id"]
    other = token("agent", project="other")
    change = {"status": "active"}
    theirs = await client.put(f"/sessions/{session_id}", json=change, headers=other)
    nobodys = await client.put(f"/sessions/{uuid4()}", json=change, headers=other)
    assert theirs.status_code == nobodys.status_code == 404
    assert problem_of(theirs).keys() == problem_of(nobodys).keys()
    # Not even as a name that is taken.
    assert (await client.post("/sessions", json=OPEN | {"session_id": session_id}, headers=other)).status_code == 201


async def test_only_so_many_refusals_a_minute_are_recorded(client: httpx.AsyncClient, database: Database) -> None:
    path = f"/sessions/{(await opened(client))['session_id']}"
    answers = [await client.put(path, json={"status": "completed"}) for _ in range(62)]
    assert [a.status_code for a in answers] == [422] * 60 + [429] * 2
    assert problem_of(answers[-1])["code"] == "rate_limited"
    assert (await client.put(path, json={"status": "active"})).status_code == 200
    assert len(of_type(check_ledger(database.owner)["demo"], "CommandRefused")) == 60


async def test_production_knows_no_development_token_and_no_unmade_project(
    database: Database, tmp_path: Any, token: Token
) -> None:
    settings = settings_of(database, tmp_path, MUNIMENT_MODE="production")
    async with running(create_app(settings), token("agent")) as client:
        response = await client.post("/sessions", json=OPEN)
        assert (response.status_code, problem_of(response)["code"]) == (401, "unauthenticated")
        assert response.headers["www-authenticate"] == "Bearer"


async def test_however_many_answers_of_a_list_are_sealed_the_keys_are_asked_for_once(
    settings: Settings, token: Token, database: Database, postgres: EmbeddedServer
) -> None:
    def questions() -> int:
        return postgres.log.read_text().count("execute find_data_keys")

    with psycopg.connect(database.owner, autocommit=True) as connection:
        connection.execute(SQL("ALTER DATABASE {} SET log_statement = 'all'").format(Identifier(database.name)))
    async with running(create_app(settings), token("agent")) as client:
        whom = [{"$personal": {"subject": f"c-{n}", "value": n}} for n in range(20)]
        opening = [{"type": "OpenSession", "agent_role": "x", "metadata": {"who": who}} for who in whom]
        opened = [item["body"] for item in (await client.post("/commands", json=opening)).json()]
        assert [session["metadata"]["who"] for session in opened] == list(range(20))
        starting: list[Any] = [
            {"type": "ChangeSession", "session_id": s["session_id"], "status": "active"} for s in opened
        ]
        asked = questions()
        answers = (
            await client.post("/commands", json=[*starting, {"type": "OpenSession", "agent_role": "x"}, {}])
        ).json()
        assert [item["status"] for item in answers] == [*[200] * 20, 201, 400]
        assert [item["body"]["metadata"]["who"] for item in answers[:20]] == list(range(20))
        assert questions() - asked == 1
