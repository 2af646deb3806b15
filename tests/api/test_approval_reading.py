"""Approvals as they are read: listed by what is urgent, waited for, and told with the session that waits on them."""

import asyncio
from collections.abc import Iterator
from statistics import median
from typing import Any

import httpx
import pytest

from api.app import create_app
from ledger.settings import Settings
from tests.api.asking import ISSUER, LONG_SECONDS, Json, People, asked, later, path_of, post, read, voted
from tests.api.conftest import Token, problem_of, running
from tests.check import check_ledger
from tests.conftest import Database


@pytest.fixture(autouse=True)
def whole(database: Database) -> Iterator[None]:
    """Whatever a test did, the ledger holds afterwards."""
    yield
    check_ledger(database.owner)


@pytest.fixture
def people(token: Token) -> People:
    return People(token)


async def test_approvals_are_listed_by_what_is_asked_for(
    client: httpx.AsyncClient, people: People, worker: None
) -> None:
    session = await post(client, "/sessions", status=201, agent_role="finance")
    task = await post(client, "/tasks", status=201, kind="pay")
    low = await asked(client, risk="low", expires_at=later(hours=1), session_id=session["session_id"])
    high = await asked(client, risk="high", summary={"$personal": {"subject": "c-9", "value": "Mia"}})
    mail = await asked(client, action={"tool": "mail.send"}, task_id=task["task_id"], quorum={"roles": ["finance"]})
    done = await asked(client)
    await voted(client, done, people.ann, "deny")

    async def listed(**parameters: Any) -> list[str]:
        answer = await client.get("/approvals", params=parameters)
        assert answer.status_code == 200, answer.text
        return [approval["approval_id"] for approval in answer.json()["approvals"]]

    names = {one["approval_id"]: name for name, one in {"low": low, "high": high, "mail": mail, "done": done}.items()}
    for parameters, expected in (
        ({}, ["done", "mail", "high", "low"]),
        ({"state": "pending", "order": "asc"}, ["low", "high", "mail"]),
        ({"state": "denied"}, ["done"]),
        ({"session_id": session["session_id"]}, ["low"]),
        ({"task_id": task["task_id"]}, ["mail"]),
        ({"tool": "mail.send"}, ["mail"]),
        ({"risk": "high"}, ["high"]),
        ({"role": "finance"}, ["mail"]),
        ({"requester": f"{ISSUER}#agent-7", "state": "denied"}, ["done"]),
        ({"requester": "nobody"}, []),
        ({"expires_before": later(hours=2)}, ["low"]),
        ({"state": "pending", "order": "risk"}, ["high", "mail", "low"]),
        ({"order": "expires_at"}, ["low", "high", "mail"]),
    ):
        assert [names[one] for one in await listed(**parameters)] == expected, parameters
    page = (await client.get("/approvals", params={"limit": 3})).json()
    for shown in page["approvals"]:  # the view has caught up, so it is read from there
        assert shown | {"seconds_left": 0} == await read(client, shown) | {"seconds_left": 0}
    assert page["approvals"][1]["summary"] is None
    assert page["approvals"][2]["summary"] == "Mia"
    assert await listed(limit=3, after=page["next"]) == [low["approval_id"]]
    decided = {"state": "denied"}
    for parameters in (decided | {"order": "risk"}, decided | {"role": "x"}, {"state": "open"}, {"until": later()}):
        assert problem_of(await client.get("/approvals", params=parameters))["code"] == "malformed_request"


async def test_a_project_without_a_ledger_has_no_approvals(client: httpx.AsyncClient, token: Token) -> None:
    empty = await client.get("/approvals", headers=token("approver", project="new"))
    assert empty.json() == {"approvals": [], "next": None}


async def test_a_session_says_which_approvals_it_waits_on(client: httpx.AsyncClient, people: People) -> None:
    session, other = [await post(client, "/sessions", status=201, agent_role="finance") for _ in range(2)]
    task = await post(client, "/tasks", status=201, kind="pay", session_id=other["session_id"])

    async def waiting_on() -> list[str]:
        answer: list[str] = (await client.get(f"/sessions/{session['session_id']}")).json()["waiting_on"]
        return answer

    assert await waiting_on() == []
    first = await asked(client, session_id=session["session_id"])
    # Asked in this session, for a task of another: it ends with the task, and this session waits on it.
    second = await asked(client, session_id=session["session_id"], task_id=task["task_id"])
    await asked(client, session_id=other["session_id"])
    assert await waiting_on() == [first["approval_id"], second["approval_id"]]
    await voted(client, first, people.ann)
    assert await waiting_on() == [second["approval_id"]], "a grant is nothing to wait on"


async def test_listed_sessions_say_so_as_well(client: httpx.AsyncClient, worker: None) -> None:
    session, other = [await post(client, "/sessions", status=201, agent_role="finance") for _ in range(2)]
    approval = await asked(client, session_id=session["session_id"])
    listed = (await client.get("/sessions")).json()["sessions"]
    assert {one["session_id"]: one["waiting_on"] for one in listed} == {
        session["session_id"]: [approval["approval_id"]],
        other["session_id"]: [],
    }


# Waiting


def waits_for(client: httpx.AsyncClient, approval: Json) -> asyncio.Task[httpx.Response]:
    """A read that is answered when the approval changes."""
    parameters, known = {"wait_seconds": LONG_SECONDS}, {"If-None-Match": f'"{approval["version"]}"'}
    return asyncio.create_task(client.get(path_of(approval), params=parameters, headers=known))


async def test_who_waits_for_a_decision_has_it_at_once(client: httpx.AsyncClient, people: People) -> None:
    loop, lags = asyncio.get_running_loop(), []
    for round_ in range(20):
        approval = await asked(client)
        waits = waits_for(client, approval)
        for _ in range(3):  # who asked before these has looked by now, and waits
            await read(client, approval)
        assert not waits.done()
        await voted(client, approval, people.ann, ("approve", "deny")[round_ % 2])
        began = loop.time()
        assert (await waits).json()["state"] == ("approved", "denied")[round_ % 2]
        lags.append(loop.time() - began)
    assert median(lags) < 0.05, "woken, not by looking now and then"


async def test_what_another_process_decides_is_found(
    client: httpx.AsyncClient, settings: Settings, people: People
) -> None:
    approval = await asked(client)
    async with running(create_app(settings), people.ann) as elsewhere:
        waits = waits_for(client, approval)
        await voted(elsewhere, approval, people.ann)
        assert (await waits).json()["state"] == "approved"
