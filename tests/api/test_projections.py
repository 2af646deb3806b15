"""Views over HTTP: operators of the project `operators` see how they do, and have them rebuilt, and nobody else."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import psycopg
import pytest

from api.app import create_app
from ledger.operations import OPERATORS, stream_of
from ledger.settings import Settings
from projections import VIEWS
from tests.api.conftest import Token, problem_of, running
from tests.check import check_ledger, of_type
from tests.conftest import Database
from tests.projections.conftest import deadline

ASKED = ("rebuild", "cancel", "rollback", "verify")


def header(token: Token, *roles: str, subject: str = "ana", project: str = OPERATORS) -> dict[str, str]:
    return token(*roles, subject=subject, project=project, kind="human")


@pytest.fixture
async def operator(settings: Settings, token: Token) -> AsyncIterator[httpx.AsyncClient]:
    """Ana, an operator of the project `operators`."""
    async with running(create_app(settings), header(token, "operator")) as client:
        yield client


async def fill(client: httpx.AsyncClient, token: Token, events: int) -> None:
    """So many events in the project `demo`: sessions, one after another."""
    commands = [{"type": "OpenSession", "agent_role": "x"} for _ in range(events)]
    answer = await client.post("/commands", json=commands, headers=token("agent"))
    assert {item["status"] for item in answer.json()} == {201}


async def view_when(client: httpx.AsyncClient, name: str, state: str) -> dict[str, Any]:
    """The view, as soon as it is in that state and nothing more is to be done."""
    with deadline(60) as check:
        while True:
            check()
            view: dict[str, Any] = (await client.get(f"/projections/{name}")).json()
            if view["state"] == state and all(one["outcome"] for one in view["requests"]):
                return view
            await asyncio.sleep(0.02)


def told(database: Database) -> list[tuple[str, str]]:
    """By whom which events of the operators' ledger are."""
    history = check_ledger(database.owner)[OPERATORS]
    return [(event.type, event.actor.sub) for _, event in history]


@pytest.mark.usefixtures("worker")
async def test_a_view_is_rebuilt_from_the_asking_to_the_switch_and_who_and_why_and_what_came_of_it_is_on_record(
    operator: httpx.AsyncClient, token: Token, database: Database
) -> None:
    await fill(operator, token, 500)
    asked = await operator.post(
        "/projections/sessions/rebuild", json={"reason": "new words"}, headers={"Idempotency-Key": "r-1"}
    )
    assert (asked.status_code, asked.headers["location"]) == (202, "/projections/sessions")
    assert (asked.json()["state"], asked.json()["requests"][0]["reason"]) == ("rebuilding", "new words")
    progress = []
    with deadline(60) as check:
        while (view := (await operator.get("/projections/sessions")).json())["state"] == "rebuilding":
            check()
            if view["rebuild"]:
                progress.append(view["rebuild"])
            await asyncio.sleep(0.005)
    seen = [one for one in progress if one["state"] in ("filling", "comparing")]
    assert [one["events_done"] for one in seen] == sorted(one["events_done"] for one in seen)
    assert {one["asked_by"] for one in seen} == {"muniment-development#ana"}
    assert any(one["events_per_second"] and one["eta_seconds"] is not None for one in seen if one["events_done"])
    (request,) = view["requests"]
    assert (view["state"], request["outcome"], view["keeps_replaced"]) == ("switched", "switched", True)
    assert (request["asked_by"]["sub"], request["reason"]) == ("ana", "new words")
    assert view["rebuild"]["state"] == "switched"
    assert request["replayed"]["digest"] == view["rebuild"]["digest"]
    assert request["replayed"]["rows"] == 500
    switched = (await operator.get("/events?type=ViewSwitched")).json()["events"][0]
    assert (switched["reason"], switched["causation_id"]) == ("new words", request["event_id"])
    assert switched["data"]["asked_by"] == {"issuer": "muniment-development", "sub": "ana"}
    assert told(database) == [("RebuildRequested", "ana"), ("ViewSwitched", "system")]


@pytest.mark.usefixtures("worker")
async def test_it_is_answered_again_under_its_id_and_two_who_ask_get_one(
    operator: httpx.AsyncClient, token: Token, database: Database
) -> None:
    await fill(operator, token, 10)
    bo = header(token, "operator", subject="bo")
    asking = [
        operator.post("/projections/audit/rebuild", json={}, headers=who | {"Idempotency-Key": "r-1"})
        for who in (header(token, "operator"), bo)
    ]
    answers = await asyncio.gather(*asking)
    assert sorted(answer.status_code for answer in answers) == [200, 202]
    assert len({answer.json()["requests"][0]["event_id"] for answer in answers}) == 1
    await view_when(operator, "audit", "switched")
    (first,) = [answer for answer in answers if answer.status_code == 202]
    sender = first.request.headers["authorization"]
    again = await operator.post(
        "/projections/audit/rebuild", json={}, headers={"Authorization": sender, "Idempotency-Key": "r-1"}
    )
    assert (again.status_code, again.headers["idempotent-replayed"]) == (202, "true")
    assert again.json() == first.json()
    other = await operator.post(
        "/projections/audit/verify", json={}, headers={"Authorization": sender, "Idempotency-Key": "r-1"}
    )
    assert problem_of(other)["code"] == "idempotency_key_reused"
    assert [event for event, _ in told(database)] == ["RebuildRequested", "ViewSwitched"]


@pytest.mark.usefixtures("worker")
async def test_what_is_not_possible_is_refused_with_what_is(operator: httpx.AsyncClient, database: Database) -> None:
    for verb in ("cancel", "rollback"):
        refused = problem_of(await operator.post(f"/projections/tasks/{verb}", json={}))
        assert (refused["code"], refused["status"]) == ("invalid_transition", 422)
        assert "while tasks is built. From there it can become: rebuilding" in refused["detail"]
    assert (await operator.post("/projections/tasks/rebuild", json={})).status_code == 202
    await view_when(operator, "tasks", "switched")
    assert (await operator.post("/projections/tasks/rollback", json={"reason": "no better"})).status_code == 202
    view = await view_when(operator, "tasks", "built")
    assert [one["outcome"] for one in view["requests"]] == ["switched", "rolled_back"]
    assert problem_of(await operator.post("/projections/tasks/rollback"))["code"] == "invalid_transition"
    assert len(of_type(check_ledger(database.owner)[OPERATORS], "CommandRefused")) == 3


@pytest.mark.usefixtures("worker")
async def test_a_row_that_was_changed_behind_the_back_of_a_view_is_found_and_named(
    operator: httpx.AsyncClient, token: Token, database: Database
) -> None:
    await fill(operator, token, 3)
    await operator.get("/sessions", headers=token("agent"))
    assert (await operator.post("/projections/sessions/verify", json={"project": "demo"})).status_code == 202
    view = await view_when(operator, "sessions", "built")
    (proof,) = view["proofs"]
    assert (view["requests"][0]["holds"], view["proven"], view["differing"]) == (True, 1, 0)
    assert proof["statement"].startswith(f"I am replay(ledger {proof['ledger_id']}, position 3, code version ")
    assert proof["statement"].endswith(f", digest {proof['digest']}")
    async with await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as owner:
        await owner.execute("UPDATE sessions.sessions SET state = 'lost' WHERE position = 2")
    assert (await operator.post("/projections/sessions/verify", json={"reason": "alarm"})).status_code == 202
    view = await view_when(operator, "sessions", "built")
    (request,) = view["requests"]
    assert (request["holds"], request["replayed"]["drifted_projects"]) == (False, ["demo"])
    (proof,) = [one for one in view["proofs"] if one["project_id"] == "demo"]
    (drift,) = proof["drifts"]
    assert (drift["field"], drift["stored"], drift["replayed"]) == ("state", "lost", "pending")
    assert (drift["event"]["position"], drift["event"]["type"]) == (2, "SessionOpened")
    async with await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as owner:
        await owner.execute("UPDATE sessions.sessions SET state = 'pending' WHERE position = 2")
    assert [event for event, _ in told(database)] == ["VerificationRequested", "ViewVerified"] * 2


async def test_nobody_else_sees_any_of_it_or_has_it_done(
    operator: httpx.AsyncClient, token: Token, database: Database
) -> None:
    await fill(operator, token, 1)
    for path in ("/projections", "/projections/sessions"):
        for roles in (("agent",), ("auditor",), ("approver",), ("importer",)):
            assert problem_of(await operator.get(path, headers=header(token, *roles)))["code"] == "forbidden"
        for role in ("operator", "auditor", "agent"):
            answer = await operator.get(path, headers=header(token, role, project="demo"))
            assert problem_of(answer)["code"] == "not_found"
    for verb in ASKED:
        for role in ("agent", "auditor", "approver", "importer"):
            answer = await operator.post(f"/projections/sessions/{verb}", json={}, headers=header(token, role))
            assert problem_of(answer)["code"] == "forbidden"
        for role in ("operator", "auditor", "agent"):
            there = header(token, role, project="demo")
            answer = await operator.post(f"/projections/sessions/{verb}", json={}, headers=there)
            assert problem_of(answer)["code"] == "not_found"
    for kind in ("RebuildView", "SettleRequest"):
        for project in ("demo", OPERATORS):
            said = {"type": kind, "view": "sessions", "request": 1, "outcome": "retried"}
            answer = await operator.post("/commands", json=said, headers=header(token, "operator", project=project))
            assert problem_of(answer)["code"] == "malformed_request"
    histories = check_ledger(database.owner)
    assert len(histories["demo"]) == 1
    assert {event.type for _, event in histories[OPERATORS]} == {"CommandRefused"}


async def test_there_are_these_views_and_no_others(operator: httpx.AsyncClient) -> None:
    listed = (await operator.get("/projections")).json()
    assert [view["view"] for view in listed["projections"]] == list(VIEWS)
    assert {view["health"] for view in listed["projections"]} == {"stopped"}
    assert all(view["build_version"] == view["release_version"] for view in listed["projections"])
    for path in ("/projections/nonsense", "/projections/sessions_next"):
        assert problem_of(await operator.get(path))["code"] == "not_found"
        assert problem_of(await operator.post(f"{path}/rebuild", json={}))["code"] == "not_found"
    assert problem_of(await operator.post("/projections/sessions/rebuild", json={"view": "audit"}))["code"] == (
        "malformed_request"
    )
    assert (await operator.post("/projections/sessions/skip", json={})).status_code == 404


async def test_a_reason_about_a_person_is_sealed_and_shown_to_operators(
    operator: httpx.AsyncClient, database: Database
) -> None:
    reason = {"$personal": {"subject": "p-1", "value": "asked by Mia Li"}}
    asked = await operator.post("/projections/sessions/verify", json={"reason": reason})
    assert asked.json()["requests"][0]["reason"] == "asked by Mia Li"
    assert (await operator.get("/projections/sessions")).json()["requests"][0]["reason"] == "asked by Mia Li"
    with psycopg.connect(database.owner) as connection:
        entries = connection.execute("SELECT string_agg(convert_from(entry, 'UTF8'), '') FROM ledger.events").fetchone()
    assert entries is not None
    assert "Mia" not in entries[0]


async def test_before_anything_is_asked_there_is_no_ledger_and_views_are_shown_all_the_same(
    operator: httpx.AsyncClient, token: Token
) -> None:
    for path in ("/projections", "/projections/audit"):
        answer = await operator.get(path)
        assert (answer.status_code, answer.headers["ledger-position"]) == (200, "0")
        assert "ledger-id" not in answer.headers
        answer = await operator.get(path, headers=header(token, "auditor"))
        assert problem_of(answer)["code"] == "forbidden"


async def test_nobody_takes_the_place_of_a_view_in_the_ledger_of_operators(
    operator: httpx.AsyncClient, token: Token, database: Database
) -> None:
    agent = header(token, "agent")
    place = str(stream_of("audit"))
    action = {"tool": "refund"}
    for path, said in (
        ("/sessions", {"session_id": place, "agent_role": "x"}),
        ("/records", {"record_id": place, "kind": "a"}),
        ("/tasks", {"task_id": place, "kind": "mail.send"}),
        ("/approvals", {"approval_id": place, "action": action}),
    ):
        assert problem_of(await operator.post(path, json=said, headers=agent))["code"] == "already_exists"
    asked = (await operator.post("/approvals", json={"action": action}, headers=agent)).json()
    edit = {"action": {"tool": "other"}, "new_approval_id": place}
    path = f"/approvals/{asked['approval_id']}/edit"
    edited = await operator.post(path, json=edit, headers=header(token, "approver", subject="bo"))
    assert problem_of(edited)["code"] == "already_exists"
    elsewhere = await operator.post("/sessions", json={"session_id": place, "agent_role": "x"}, headers=token("agent"))
    assert elsewhere.status_code == 201
    assert (await operator.post("/projections/audit/verify", json={})).status_code == 202
    check_ledger(database.owner)
