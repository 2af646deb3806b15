"""The past: every answer about it is what was answered then, however often, and whatever has happened since."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from uuid import uuid4

import httpx
import psycopg
import pytest

from ledger.commands import Status
from ledger.postgres import Pool, open_pool
from ledger.session import State as SessionState
from ledger.task import State as TaskState
from ledger.values import moment, stamp
from projections import rebuild
from tests.api.asking import ACTION, People, asked, path_of, post, read, voted
from tests.api.conftest import Token, problem_of
from tests.check import check_ledger
from tests.conftest import Database
from tests.projections.conftest import deadline

pytestmark = pytest.mark.usefixtures("worker")

Json = dict[str, Any]
Told = dict[tuple[int, str], Any]


@pytest.fixture(autouse=True)
def whole(database: Database) -> Any:
    """Whatever a test did, the ledger holds afterwards."""
    yield
    check_ledger(database.owner)


@pytest.fixture
def people(token: Token) -> People:
    return People(token)


@pytest.fixture
async def operating(database: Database) -> AsyncIterator[Pool]:
    async with open_pool(database.worker, 2) as pool:
        yield pool


def of(path: str, **parameters: Any) -> httpx.URL:
    """`path`, which may have some, with these parameters."""
    return httpx.URL(path).copy_merge_params(parameters)


async def told(client: httpx.AsyncClient, path: str, **parameters: Any) -> Any:
    """What a read answers, with its version: but for how long is left, which is of the moment that is asked about."""
    response = await client.get(of(path, **parameters))
    if response.status_code == 404:
        return 404
    assert response.status_code == 200, response.text
    body = response.json()
    for approval in body.get("approvals", [body]):
        approval.pop("seconds_left", None)
    return body, response.headers.get("etag")


# Everything that was ever answered

LISTS = (
    "/sessions?page_size=200",
    "/sessions?page_size=3",
    "/sessions?page_size=3&page=2&state=active",
    "/sessions?agent_role=writer",
    "/sessions?label=team:red&page_size=2",
    "/tasks?limit=200",
    "/tasks?limit=3&order=asc",
    "/tasks?worker=w1",
    "/dead-letters",
    "/approvals?limit=200",
    "/approvals?order=asc&limit=3",
    "/approvals?order=risk",
    "/approvals?order=expires_at&limit=2",
    "/approvals?role=approver",
    "/approvals?tool=bank.transfer&state=pending",
    *(f"/sessions?state={state}" for state in get_args(SessionState)),
    *(f"/sessions?label=team:red&state={state}&page_size=2" for state in ("pending", "active", "cancelled")),
    *(f"/sessions?agent_role=writer&state={state}" for state in ("active", "completed")),
    *(f"/tasks?state={state}" for state in get_args(TaskState)),
    *(f"/tasks?kind=mail.send&state={state}&limit=2" for state in ("queued", "running", "completed")),
    *(f"/approvals?state={state}" for state in ("pending", "approved", "denied", "executing", "executed", "cancelled")),
    *(f"/approvals?risk=low&state={state}&order=asc&limit=2" for state in ("pending", "approved", "withdrawn")),
)


class Crowd:
    """Agents and people who do whatever is possible, by chance."""

    def __init__(self, client: httpx.AsyncClient, people: People, seed: int) -> None:
        self.client, self.people, self.chance = client, people, random.Random(seed)
        self.sessions: list[str] = []
        self.tasks: dict[str, str | None] = {}
        self.approvals: list[str] = []
        self.records: list[str] = []

    @property
    def paths(self) -> list[str]:
        ids = {"sessions": self.sessions, "tasks": self.tasks, "approvals": self.approvals, "records": self.records}
        return [f"/{plural}/{one}" for plural, some in ids.items() for one in some] + [
            f"/tasks/{one}/attempts" for one in self.tasks
        ]

    @property
    def lists(self) -> list[str]:
        """Those of one session's things too."""
        of_session = [f"/{plural}?session_id={self.sessions[0]}" for plural in ("tasks", "approvals")]
        states = {"tasks": "queued", "approvals": "pending"}
        return [*LISTS, *of_session, *(f"{path}&state={states[path[1:].split('?')[0]]}&limit=1" for path in of_session)]

    async def send(self, path: str, by: Any = None, method: str = "POST", **body: Any) -> Json:
        response = await self.client.request(method, path, json=body, headers=by)
        assert response.status_code < 500, response.text
        assert response.status_code not in (400, 404), response.text
        answer: Json = response.json() if response.status_code < 400 else {}
        return answer

    def one(self, some: Any) -> str:
        chosen: str = self.chance.choice(list(some)[-6:])
        return chosen

    async def act(self) -> None:
        choices: list[Callable[[], Awaitable[None]]] = [self.open, self.submit, self.ask]
        if self.sessions:
            choices += [self.change_session, self.change_session, self.record, self.submit, self.ask]
        if self.tasks:
            choices += [self.claim, self.end_attempt, self.end_attempt, self.gate]
        if self.approvals:
            choices += [self.decide, self.decide, self.use]
        await self.chance.choice(choices)()

    async def open(self) -> None:
        role, team = self.chance.choice(["writer", "reader"]), self.chance.choice(["red", "blue"])
        self.sessions.append(
            (await self.send("/sessions", agent_role=role, labels={"team": team, "every": "1"}))["session_id"]
        )

    async def change_session(self) -> None:
        path = f"/sessions/{self.one(self.sessions)}"
        secret = {"$personal": {"subject": "c-9", "value": self.chance.random()}}
        changes: list[Json] = [{"status": status} for status in get_args(Status) if status != "expired"]
        changes += [{"status": "active"}, {"task_id": "T"}, {"metadata": {"by": secret}}]
        if self.chance.random() < 0.2:
            await self.send(f"{path}/annotations", text="seen")
        else:
            reason = {"force": True, "reason": "x"}
            await self.send(path, method="PUT", **self.chance.choice(changes), **reason)

    async def record(self) -> None:
        made = await self.send("/records", kind="note", session_id=self.one(self.sessions), body={"n": 1})
        self.records.append(made["record_id"])

    async def submit(self) -> None:
        session = {"session_id": self.one(self.sessions)} if self.sessions else {}
        kind = self.chance.choice(["mail.send", "file.copy"])
        limits: Json = {"backoff_seconds": 3600, "max_attempts": self.chance.choice([1, 3])}
        made = await self.send("/tasks", kind=kind, **session, **limits)
        if made:
            self.tasks[made["task_id"]] = None

    async def claim(self) -> None:
        worker = self.chance.choice(["w1", "w2"])
        kinds = self.chance.choice([["mail.send"], ["file.copy", "mail.send"]])
        answer = await self.send("/tasks/claim", worker=worker, kinds=kinds, n=2, lease_seconds=3600)
        self.tasks |= {task["task_id"]: task["lease_id"] for task in answer["tasks"]}

    async def end_attempt(self) -> None:
        task_id = self.one(self.tasks)
        path, lease_id = f"/tasks/{task_id}", self.tasks[task_id]
        chance = self.chance.random()
        if lease_id is None:
            await self.send(f"{path}/cancel" if chance < 0.3 else f"{path}/redrive", self.people.operator, reason="x")
        elif chance < 0.5:
            await self.send(f"{path}/complete", lease_id=lease_id, result={"n": 1})
        else:
            await self.send(f"{path}/fail", lease_id=lease_id, error={"n": 1}, retryable=chance < 0.8)

    async def gate(self) -> None:
        held = [task_id for task_id, lease_id in self.tasks.items() if lease_id]
        if held:
            task_id = self.one(held)
            approval = await self.send("/approvals", task_id=task_id, action=ACTION)
            if approval:
                self.approvals.append(approval["approval_id"])
                gate = {"lease_id": self.tasks[task_id], "approval_id": approval["approval_id"]}
                await self.send(f"/tasks/{task_id}/suspend", **gate)

    async def ask(self) -> None:
        session = {"session_id": self.one(self.sessions)} if self.sessions else {}
        what: Json = {"risk": self.chance.choice(["low", "high", "critical"]), "uses": self.chance.choice([1, 2])}
        if approval := await self.send("/approvals", action=ACTION, call_key=str(uuid4()), **session, **what):
            self.approvals.append(approval["approval_id"])

    async def decide(self) -> None:
        path = f"/approvals/{self.one(self.approvals)}"
        approval = (await self.client.get(path)).json()
        chance = self.chance.random()
        if chance < 0.6:
            seen = {"verdict": self.chance.choice(["approve", "deny"]), "digest_seen": approval["request_digest"]}
            await self.send(f"{path}/votes", self.people.ann, **seen)
        elif chance < 0.7:
            await self.send(f"{path}/presentations", self.people.ben, channel="chat")
        elif chance < 0.8 and approval["state"] == "pending":
            edited = await self.send(f"{path}/edit", self.people.ben, action=ACTION | {"target": "invoice:10"})
            self.approvals += [edited["superseded_by"]] if edited.get("superseded_by") else []
        else:
            await self.send(f"{path}/{self.chance.choice(['withdraw', 'cancel'])}", self._who(chance), reason="x")

    def _who(self, chance: float) -> Any:
        return self.people.operator if chance > 0.9 else None

    async def use(self) -> None:
        path = f"/approvals/{self.one(self.approvals)}"
        approval = (await self.client.get(path)).json()
        if approval["state"] == "executing":
            execution_id = approval["executions"][-1]["execution_id"]
            await self.send(f"{path}/uses/{execution_id}/outcome", outcome="ok")
        elif approval["state"] == "approved":
            await self.send(f"{path}/uses", execution_id=str(uuid4()), action=approval["action"])


async def test_every_answer_about_the_past_is_the_one_that_was_given_then(
    client: httpx.AsyncClient, people: People, operating: Pool
) -> None:
    crowd = Crowd(client, people, seed=7)
    then: Told = {}
    times: dict[int, str] = {}
    for _ in range(16):
        for _ in range(crowd.chance.randrange(1, 6)):
            await crowd.act()
        (last,) = (await client.get("/events?order=desc&limit=1")).json()["events"]
        position = last["position"]
        times[position] = last["recorded_at"]
        for path in [*crowd.paths, *crowd.lists]:
            then[position, path] = await told(client, path, min_position=position)
    assert len(then) > 800
    counted = {path: {str(then[at, path]) for at in times if (at, path) in then} for path in LISTS}
    assert len([path for path, answers in counted.items() if len(answers) > 3]) > 15, "there was much to tell apart"
    for (position, path), answer in then.items():
        assert await told(client, path, as_of_position=position) == answer, (position, path)
        if crowd.chance.random() < 0.3:
            assert await told(client, path, as_of=times[position]) == answer, (position, path)
    async with operating.connection() as connection:
        for view in ("sessions", "tasks", "approvals"):
            await rebuild.begin(connection, view, "ana", "because")
            with deadline() as check:
                while [one.state for one in await rebuild.latest(connection) if one.view == view] != ["switched"]:
                    check()
                    await asyncio.sleep(0.05)
    for (position, path), answer in crowd.chance.sample(list(then.items()), 400):
        assert await told(client, path, as_of_position=position) == answer, (position, path)
    for path in crowd.paths:
        begun = min(position for position, known in then if known == path)
        assert await told(client, path, as_of_position=0) == 404
        for position in [at for at in times if at < begun]:
            assert await told(client, path, as_of_position=position) == 404


async def test_pages_of_the_past_lead_on_in_the_past(client: httpx.AsyncClient, people: People) -> None:
    items = [{"type": "OpenSession", "agent_role": "x"} for _ in range(7)]
    requests = [{"type": "RequestApproval", "action": ACTION, "call_key": str(n)} for n in range(7)]
    await client.post("/commands", json=[*items, *requests])
    position = 14
    sessions = [s["session_id"] for s in (await client.get("/sessions?page_size=200")).json()["sessions"]]
    approvals = [a["approval_id"] for a in (await client.get("/approvals?order=asc")).json()["approvals"]]
    for session_id in sessions[::2]:
        await client.put(f"/sessions/{session_id}", json={"status": "active"})
    for approval_id in approvals[::2]:
        await client.post(f"/approvals/{approval_id}/withdraw", json={})
    await client.post("/commands", json=[*items, *requests])

    async def followed(path: str, plural: str, named: str) -> list[str]:
        found: list[str] = []
        after: Json = {}
        while True:
            response = await client.get(of(path, as_of_position=position, limit=2, **after))
            assert response.headers["ledger-position"] == str(position)
            page = response.json()
            found += [one[named] for one in page[plural]]
            if page["next"] is None:
                return found
            assert len(page[plural]) == 2
            after = {"after": page["next"]}

    assert await followed("/sessions", "sessions", "session_id") == sessions
    assert await followed("/sessions?state=pending", "sessions", "session_id") == sessions
    assert await followed("/approvals?state=pending&order=asc", "approvals", "approval_id") == approvals
    assert await followed("/approvals?state=pending", "approvals", "approval_id") == approvals[::-1]
    assert await followed("/approvals?order=risk", "approvals", "approval_id") == approvals
    assert await followed("/approvals?order=expires_at", "approvals", "approval_id") == approvals
    page = (await client.get(f"/sessions?as_of_position={position}&page=3&page_size=3&state=pending")).json()
    assert ([s["session_id"] for s in page["sessions"]], page["total"]) == (sessions[6:], 7)


# Stories


async def test_what_was_pending_at_that_time(client: httpx.AsyncClient, people: People) -> None:
    first, second = await asked(client, risk="low"), await asked(client, risk="high", call_key="b")
    await voted(client, first, people.ann)
    at = (await read(client, first))["updated_at"]
    third = await asked(client, call_key="c")
    await voted(client, second, people.ann, "deny")
    await client.post(f"{path_of(third)}/withdraw", json={})
    assert (await client.get("/approvals?state=pending")).json()["approvals"] == []
    answer = (await client.get("/approvals", params={"state": "pending", "as_of": at})).json()["approvals"]
    assert [one["approval_id"] for one in answer] == [second["approval_id"]]
    assert answer[0]["votes"] == []
    before = stamp(moment(at) - timedelta(microseconds=1))
    answer = (await client.get("/approvals", params={"order": "risk", "as_of": before})).json()["approvals"]
    assert [one["approval_id"] for one in answer] == [second["approval_id"], first["approval_id"]]
    offset = moment(at).astimezone().isoformat()
    assert (await client.get("/approvals", params={"as_of": offset})).json() == (
        await client.get("/approvals", params={"as_of": at})
    ).json()


async def test_how_much_time_was_left_is_told_as_of_then_and_every_time_the_same(
    client: httpx.AsyncClient, people: People
) -> None:
    approval = await asked(client, expires_at=stamp(datetime.now(UTC) + timedelta(seconds=1000)))
    requested, expires = moment(approval["requested_at"]), moment(approval["expires_at"])
    await voted(client, approval, people.ann)
    await asyncio.sleep(2)
    for parameters, at in (
        ({"as_of_position": 1}, requested),
        ({"as_of": stamp(requested + timedelta(milliseconds=1))}, requested + timedelta(milliseconds=1)),
    ):
        answers = [await client.get(path_of(approval), params=parameters) for _ in range(3)]
        assert len({answer.content for answer in answers}) == 1
        assert answers[0].json()["seconds_left"] == int((expires - at).total_seconds())
        (listed,) = (await client.get("/approvals", params=parameters)).json()["approvals"]
        assert listed == answers[0].json()


async def test_the_approvals_that_a_session_waited_on_are_told_with_it(
    client: httpx.AsyncClient, people: People
) -> None:
    session = await post(client, "/sessions", status=201, agent_role="x")
    path = f"/sessions/{session['session_id']}"
    approval = await asked(client, session_id=session["session_id"])
    await voted(client, approval, people.ann)
    assert (await client.get(path)).json()["waiting_on"] == []
    for position, waiting_on in ((1, []), (2, [approval["approval_id"]]), (4, [])):
        answer = await client.get(path, params={"as_of_position": position})
        assert (answer.json()["waiting_on"], answer.headers["ledger-position"]) == (waiting_on, str(position))
        (listed,) = (await client.get("/sessions", params={"as_of_position": position})).json()["sessions"]
        assert listed == answer.json()


async def test_a_time_just_gone_is_waited_for_until_nothing_can_be_recorded_in_it_any_more(
    client: httpx.AsyncClient,
) -> None:
    session = await post(client, "/sessions", status=201, agent_role="x")
    path = f"/sessions/{session['session_id']}"
    loop = asyncio.get_running_loop()
    began = loop.time()
    asking = asyncio.create_task(client.get(path, params={"as_of": session["opened_at"]}))
    assert (await asking).json()["state"] == "pending"
    assert loop.time() - began > 1, "until the clocks of all who write are past it"
    await client.put(path, json={"status": "active"})
    await client.put(path, json={"metadata": {"n": 1}})
    at = (await client.get("/events/2")).json()["recorded_at"]
    began = loop.time()
    assert (await client.get(path, params={"as_of": at})).json()["state"] == "active"
    assert loop.time() - began < 1, "what has been followed by another event is settled"


async def test_what_is_on_its_way_for_long_is_waited_for_as_it_may_be_of_a_time_that_is_asked_about(
    client: httpx.AsyncClient, database: Database
) -> None:
    for _ in range(10):  # by then the writer knows that it is alone, and decides ahead of the append
        await post(client, "/sessions", status=201, agent_role="x")
    with psycopg.connect(database.owner) as blocker:
        blocker.execute("SELECT FROM ledger.ledgers FOR UPDATE")
        late = asyncio.create_task(post(client, "/sessions", status=201, agent_role="x"))
        await asyncio.sleep(0.3)
        at = stamp(datetime.now(UTC))
        asking = asyncio.create_task(client.get("/sessions", params={"as_of": at}))
        await asyncio.wait([asking], timeout=4)
        blocker.rollback()
    assert (await late)["opened_at"] < at
    first, again = await asking, await client.get("/sessions", params={"as_of": at})
    assert first.json() == again.json()
    assert again.json()["total"] == 11


async def test_an_event_that_holds_a_nul_is_no_hindrance(client: httpx.AsyncClient) -> None:
    session = await post(client, "/sessions", status=201, agent_role="x", metadata={"a\0": "\0 \\u0000 \\"})
    await client.put(f"/sessions/{session['session_id']}", json={"status": "active"})
    for parameters in ({"as_of": session["opened_at"]}, {"as_of_position": 1}):
        answer = await client.get("/sessions", params=parameters)
        (listed,) = answer.json()["sessions"]
        assert (listed["state"], listed["metadata"]) == ("pending", session["metadata"])


# What cannot be asked


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"as_of_position": 2}, ["as_of_position"]),
        ({"as_of": "2999-01-01T00:00:00Z"}, ["as_of"]),
        ({"as_of": "yesterday"}, ["as_of"]),
        ({"as_of": "5"}, ["as_of"]),
        ({"as_of": "2026-01-01T00:00:00"}, ["as_of"]),
        ({"as_of": "0001-01-01T00:00:00+14:00"}, ["as_of"]),
        ({"as_of": "9999-12-31T23:59:59-14:00"}, ["as_of"]),
        ({"as_of_position": -1}, ["as_of_position"]),
        ({"as_of_position": 1, "as_of": "2026-01-01T00:00:00Z"}, ["as_of", "as_of_position"]),
        ({"as_of_position": 1, "min_position": 1}, ["min_position"]),
        ({"as_of": "2026-01-01T00:00:00Z", "min_position": 0}, ["min_position"]),
    ],
)
async def test_what_makes_no_sense_of_the_past_is_named(
    client: httpx.AsyncClient, parameters: Json, named: list[str]
) -> None:
    session = await post(client, "/sessions", status=201, agent_role="x")
    for path in ("/sessions", "/tasks", "/approvals", "/dead-letters", f"/sessions/{session['session_id']}"):
        refused = await client.get(path, params=parameters)
        assert refused.status_code == 400
        assert [error["pointer"] for error in problem_of(refused)["errors"]] == named


async def test_the_past_is_not_waited_for(client: httpx.AsyncClient) -> None:
    session = await post(client, "/sessions", status=201, agent_role="x")
    path = f"/sessions/{session['session_id']}"
    refused = await client.get(path, params={"as_of_position": 1, "wait_seconds": 1})
    assert [error["pointer"] for error in problem_of(refused)["errors"]] == ["wait_seconds"]
    same = await client.get(path, params={"as_of_position": 1}, headers={"If-None-Match": '"1"'})
    assert (same.status_code, same.headers["ledger-position"]) == (304, "1")


async def test_before_anything_happened_there_was_nothing(client: httpx.AsyncClient) -> None:
    past: Json = {"as_of": "2001-01-01T00:00:00Z"}
    for parameters in (past, {"as_of_position": 0}):
        answer = await client.get("/sessions", params=parameters)
        assert (answer.json()["sessions"], answer.headers["ledger-position"]) == ([], "0")
    assert (await client.get("/tasks", params={"as_of_position": 1})).status_code == 400
    assert (await client.get("/tasks", params={"as_of": "2999-01-01T00:00:00Z"})).status_code == 400
    session = await post(client, "/sessions", status=201, agent_role="x")
    for parameters in (past, {"as_of_position": 0}):
        for path in ("/sessions", "/sessions?state=pending", "/tasks?state=queued", "/approvals?order=risk"):
            answer = await client.get(of(path, **parameters))
            assert (answer.status_code, answer.headers["ledger-position"], answer.json()["next"]) == (200, "0", None)
        assert (await client.get(f"/sessions/{session['session_id']}", params=parameters)).status_code == 404


async def test_a_view_that_has_not_come_so_far_says_so_and_single_things_need_none(
    client: httpx.AsyncClient, database: Database
) -> None:
    task = await post(client, "/tasks", status=201, kind="mail.send")
    await client.get("/tasks", params={"min_position": 1})
    with psycopg.connect(database.worker) as blocker:
        blocker.execute("SELECT FROM projections.positions FOR UPDATE")
        await post(client, f"/tasks/{task['task_id']}/cancel")
        late = await client.get("/tasks", params={"as_of_position": 2})
        assert (late.status_code, problem_of(late)["code"]) == (503, "view_behind")
        early = await client.get("/tasks?state=queued&as_of_position=1")
        assert [one["state"] for one in early.json()["tasks"]] == ["queued"]
        one = await client.get(f"/tasks/{task['task_id']}", params={"as_of_position": 2})
        assert (one.json()["state"], one.headers["etag"]) == ("cancelled", '"2"')
        blocker.rollback()
    with psycopg.connect(database.owner, autocommit=True) as owner:
        owner.execute("UPDATE projections.versions SET version = 1 WHERE view = 'tasks'")
        older = await client.get("/tasks", params={"as_of_position": 1})
        assert (older.status_code, problem_of(older)["code"]) == (503, "view_behind")
        assert "built again by a newer release" in older.json()["detail"]
        assert (await client.get("/tasks")).status_code == 200
        assert (await client.get(f"/tasks/{task['task_id']}", params={"as_of_position": 1})).json()["state"] == "queued"
