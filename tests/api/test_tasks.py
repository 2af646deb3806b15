"""Tasks over HTTP: submitted, claimed at once or after a wait, kept, ended; and read as they were recorded."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest

from api.app import create_app
from ledger.settings import Settings
from tests.api.conftest import Token, problem_of, running
from tests.check import check_ledger, of_type
from tests.conftest import Database

Json = dict[str, Any]
LONG_SECONDS = 30


@pytest.fixture(autouse=True)
def whole(database: Database) -> Any:
    """Whatever a test did, the ledger holds afterwards."""
    yield
    check_ledger(database.owner)


async def post(client: httpx.AsyncClient, path: str, status: int = 200, **body: Any) -> Json:
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    answer: Json = response.json()
    return answer


async def submitted(client: httpx.AsyncClient, kind: str = "mail.send", **fields: Any) -> Json:
    return await post(client, "/tasks", 201, kind=kind, **fields)


async def claimed(client: httpx.AsyncClient, *kinds: str, **fields: Any) -> list[Json]:
    answer = await post(client, "/tasks/claim", worker="w", kinds=kinds or ["mail.send"], **fields)
    tasks: list[Json] = answer["tasks"]
    return tasks


def waiting(client: httpx.AsyncClient, *kinds: str, seconds: int = LONG_SECONDS) -> asyncio.Task[httpx.Response]:
    """A claim that waits."""
    body = {"worker": "w", "kinds": kinds or ["mail.send"]}
    return asyncio.create_task(client.post("/tasks/claim", params={"wait_seconds": seconds}, json=body))


# Submitting and claiming


async def test_work_is_submitted_claimed_and_completed(client: httpx.AsyncClient) -> None:
    response = await client.post("/tasks", json={"kind": "mail.send", "payload": {"to": "a"}, "priority": 7})
    task = response.json()
    assert response.headers["location"] == f"/tasks/{task['task_id']}"
    assert (task["state"], task["attempt"], task["version"]) == ("queued", 0, 1)
    assert not [name for name in task if name.endswith("_event_id")]
    (work,) = await claimed(client)
    assert work | {"lease_id": "", "lease_until": ""} == {
        "task_id": task["task_id"],
        "kind": "mail.send",
        "payload": {"to": "a"},
        "attempt": 1,
        "lease_id": "",
        "lease_until": "",
        "session_id": None,
        "approval_id": None,
        "decision": None,
    }
    done = await post(client, f"/tasks/{task['task_id']}/complete", lease_id=work["lease_id"], result={"id": 9})
    assert (done["state"], done["result"], done["version"]) == ("completed", {"id": 9}, 3)


async def test_a_claim_without_work_says_so_and_leaves_its_id_free(client: httpx.AsyncClient) -> None:
    asked = {"worker": "w", "kinds": ["mail.send"], "command_id": "claim-1"}
    empty = await client.post("/tasks/claim", json=asked)
    assert (empty.status_code, empty.json()) == (200, {"tasks": []})
    assert "etag" not in empty.headers
    task = await submitted(client)
    first, again = [await client.post("/tasks/claim", json=asked) for _ in range(2)]
    assert first.json()["tasks"][0]["task_id"] == task["task_id"]
    assert again.content == first.content
    assert again.headers["idempotent-replayed"] == "true"
    remembered = (await client.get("/commands/claim-1")).json()
    assert remembered["body"] == first.json()
    assert remembered["positions"] == [2]


async def test_a_task_is_claimed_by_its_id_in_a_list_of_commands_too(client: httpx.AsyncClient) -> None:
    task = await submitted(client)
    claim = {"type": "ClaimTasks", "worker": "w", "task_id": task["task_id"]}
    first, second = (await client.post("/commands", json=[claim, claim])).json()
    assert [one["attempt"] for one in first["body"]["tasks"]] == [1]
    assert second["body"] == {"tasks": []}
    assert "etag" not in first


async def test_personal_values_of_payloads_results_and_errors_are_readable_again(client: httpx.AsyncClient) -> None:
    def mia(subject: str = "c-9") -> Json:
        return {"$personal": {"subject": subject, "value": "Mia"}}

    task = await submitted(client, payload={"to": mia()}, backoff_seconds=0)
    assert task["payload"] == {"to": "Mia"}
    path = f"/tasks/{task['task_id']}"
    (work,) = await claimed(client)
    assert work["payload"] == {"to": "Mia"}
    await post(client, f"{path}/fail", lease_id=work["lease_id"], error={"of": mia("c-8")})
    (again,) = (await waiting(client)).json()["tasks"]
    assert again["attempt"] == 2
    done = await post(client, f"{path}/complete", lease_id=again["lease_id"], result=[mia("c-7")])
    assert (done["payload"], done["result"]) == ({"to": "Mia"}, ["Mia"])
    read = (await client.get(path, params={"min_position": 0})).json()
    assert read == done
    attempts = (await client.get(f"{path}/attempts")).json()["attempts"]
    assert [(a["number"], a["outcome"], a["error"]) for a in attempts] == [
        (1, "failed", {"of": "Mia"}),
        (2, "completed", None),
    ]


async def test_work_for_a_role_is_accepted(client: httpx.AsyncClient) -> None:
    routed = await client.post("/tasks/route", json={"role": "finance", "kind": "refund", "payload": 1})
    assert routed.status_code == 202
    assert routed.headers["location"] == f"/tasks/{routed.json()['task_id']}"
    assert routed.json()["kind"] == "finance.refund"
    assert len(await claimed(client, "finance.refund")) == 1
    keyed = {"Idempotency-Key": "k"}
    one = await client.post("/tasks/route", json={"role": "a", "kind": "b"}, headers=keyed)
    same = await client.post("/tasks", json={"kind": "a.b"}, headers=keyed)
    assert (same.status_code, same.content) == (201, one.content)
    long = await client.post("/tasks/route", json={"role": "r" * 60, "kind": "k" * 60})
    assert problem_of(long)["errors"][0]["pointer"] == "/kind"


async def test_a_failed_task_comes_to_the_dead_letters_and_back(
    client: httpx.AsyncClient, token: Token, worker: None
) -> None:
    task = await submitted(client, max_attempts=1)
    await submitted(client, "other.kind")
    path = f"/tasks/{task['task_id']}"
    (work,) = await claimed(client)
    assert [t["worker"] for t in (await client.get("/tasks", params={"worker": "w"})).json()["tasks"]] == ["w"]
    dead = await post(client, f"{path}/fail", lease_id=work["lease_id"], error="no route")
    assert dead["state"] == "dead"
    letters = (await client.get("/dead-letters")).json()
    assert letters == {"tasks": [dead], "next": None}
    refused = await client.post(f"{path}/redrive", json={"reason": "mended"})
    assert problem_of(refused)["code"] == "forbidden"
    back = await client.post(f"{path}/redrive", json={"reason": "mended"}, headers=token("operator"))
    assert back.json()["state"] == "queued"
    assert (await client.get("/dead-letters")).json()["tasks"] == []
    listed = (await client.get("/tasks", params={"state": "queued", "limit": 1})).json()
    assert [t["kind"] for t in listed["tasks"]] == ["other.kind"]
    onward = (await client.get("/tasks", params={"state": "queued", "after": listed["next"]})).json()
    assert [t["task_id"] for t in onward["tasks"]] == [task["task_id"]]


async def test_what_comes_too_late_is_refused_on_the_record_of_the_task(
    client: httpx.AsyncClient, database: Database
) -> None:
    task = await submitted(client)
    path = f"/tasks/{task['task_id']}"
    await claimed(client)
    key = {"Idempotency-Key": "k"}
    late = await client.post(f"{path}/complete", json={"lease_id": str(uuid4()), "result": 1}, headers=key)
    assert problem_of(late)["code"] == "lease_lost"
    again = await client.post(f"{path}/complete", json={"lease_id": str(uuid4())}, headers=key)
    assert problem_of(again)["code"] == "idempotency_key_reused"
    history = check_ledger(database.owner)["demo"]
    assert [event.stream_id for event in of_type(history, "LateResultRefused")] == [UUID(task["task_id"])]
    assert not of_type(history, "CommandRefused")


async def test_a_heartbeat_keeps_the_lease_and_is_no_event(
    client: httpx.AsyncClient, token: Token, database: Database
) -> None:
    task = await submitted(client)
    (work,) = await claimed(client, lease_seconds=1)
    path = f"/tasks/{task['task_id']}"

    def lease_until() -> Any:
        with psycopg.connect(database.owner) as connection:
            return connection.execute("SELECT lease_until FROM ledger.tasks").fetchone()

    before = lease_until()
    kept = await client.post(f"{path}/heartbeat", json={"lease_id": work["lease_id"], "lease_seconds": 600})
    assert (kept.status_code, kept.content) == (204, b"")
    assert lease_until() > before
    for lease_id, where in ((str(uuid4()), path), (work["lease_id"], f"/tasks/{uuid4()}")):
        lost = await client.post(f"{where}/heartbeat", json={"lease_id": lease_id})
        assert problem_of(lost)["code"] == "lease_lost"
    stranger = token("agent", subject="agent-8")
    lost = await client.post(f"{path}/heartbeat", json={"lease_id": work["lease_id"]}, headers=stranger)
    assert problem_of(lost)["code"] == "lease_lost"
    assert problem_of(await client.post(f"{path}/heartbeat", json={"lease": 1}))["code"] == "malformed_request"
    await post(client, f"{path}/complete", lease_id=work["lease_id"])
    late = await client.post(f"{path}/heartbeat", json={"lease_id": work["lease_id"]})
    assert problem_of(late)["code"] == "lease_lost"
    assert len(check_ledger(database.owner)["demo"]) == 3


@pytest.mark.parametrize(
    ("role", "may"),
    [
        ("agent", {"read", "submit", "claim", "heartbeat", "complete", "cancel"}),
        ("operator", {"read", "cancel", "redrive"}),
        ("auditor", {"read"}),
        ("approver", {"read"}),
        ("importer", set()),
    ],
)
async def test_each_role_may_do_with_tasks_what_is_its_own(
    client: httpx.AsyncClient, token: Token, role: str, may: set[str]
) -> None:
    task = await submitted(client)
    (work,) = await claimed(client)
    dead = await submitted(client, "dead.one", max_attempts=1)
    (died,) = await claimed(client, "dead.one")
    await post(client, f"/tasks/{dead['task_id']}/fail", lease_id=died["lease_id"])
    path, lease = f"/tasks/{task['task_id']}", {"lease_id": work["lease_id"]}
    sent = {
        "submit": ("/tasks", {"kind": "a.b"}),
        "claim": ("/tasks/claim", {"worker": "w", "kinds": ["nothing.of-this"]}),
        "heartbeat": (f"{path}/heartbeat", lease),
        "complete": (f"{path}/complete", lease),
        "cancel": (f"/tasks/{task['task_id']}/cancel", {}),
        "redrive": (f"/tasks/{dead['task_id']}/redrive", {"reason": "mended"}),
    }
    client.headers.update(token(role))  # the same principal, or nothing of it were its own
    done = {name for name, (to, body) in sent.items() if (await client.post(to, json=body)).status_code != 403}
    read = [(await client.get(to)).status_code for to in ("/tasks", path, f"{path}/attempts", "/dead-letters")]
    assert set(read) in ({200}, {403})
    assert done | ({"read"} if read[0] == 200 else set()) == may


async def test_a_task_of_another_project_does_not_exist(client: httpx.AsyncClient, token: Token) -> None:
    task = await submitted(client)
    (work,) = await claimed(client)
    path, other = f"/tasks/{task['task_id']}", token("agent", "operator", project="other")
    await client.post("/tasks", json={"kind": "a.b"}, headers=other)
    for read in (path, f"{path}/attempts"):
        assert problem_of(await client.get(read, headers=other))["code"] == "not_found"
    for verb, body in (("cancel", {}), ("complete", {"lease_id": work["lease_id"]}), ("redrive", {"reason": "x"})):
        assert problem_of(await client.post(f"{path}/{verb}", json=body, headers=other))["code"] == "not_found"
    theirs = await client.post("/tasks/claim", json={"worker": "w", "kinds": ["mail.send"]}, headers=other)
    assert theirs.json() == {"tasks": []}
    kept = await client.post(f"{path}/heartbeat", json={"lease_id": work["lease_id"]}, headers=other)
    assert problem_of(kept)["code"] == "lease_lost"


# Waiting for work


@pytest.fixture
def never_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits is woken, or misses what it waits for: nobody looks now and then."""
    monkeypatch.setattr("api.line.LOOK_SECONDS", 600)
    monkeypatch.setattr("api.reading.LOOK_SECONDS", 600)


@pytest.mark.usefixtures("never_looking")
async def test_who_waits_gets_work_as_soon_as_it_comes(client: httpx.AsyncClient) -> None:
    worker = waiting(client)
    await in_line(client)
    task = await submitted(client)
    (work,) = (await worker).json()["tasks"]
    assert work["task_id"] == task["task_id"]


@pytest.mark.usefixtures("never_looking")
async def test_of_many_who_wait_each_task_calls_one(client: httpx.AsyncClient) -> None:
    workers = [waiting(client) for _ in range(40)]
    others = [waiting(client, "other.kind") for _ in range(5)]
    await in_line(client)
    tasks = [{"type": "SubmitTask", "kind": "mail.send"} for _ in range(40)]
    await client.post("/commands", json=tasks[:1])
    done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 1
    await client.post("/commands", json=tasks[1:])
    taken = [work["task_id"] for worker in workers for work in (await worker).json()["tasks"]]
    assert len(set(taken)) == len(taken) == 40
    assert not any(other.done() for other in others)
    await client.post("/commands", json=[{"type": "SubmitTask", "kind": "other.kind"} for _ in range(5)])
    assert [len(other.json()["tasks"]) for other in await asyncio.gather(*others)] == [1] * 5


async def test_work_that_another_process_submits_is_found(
    client: httpx.AsyncClient, settings: Settings, token: Token
) -> None:
    await submitted(client, "first.of-all")
    async with running(create_app(settings), token("agent", subject="another")) as elsewhere:
        worker = waiting(client)
        await in_line(client)
        task = await submitted(elsewhere)
        assert [work["task_id"] for work in (await worker).json()["tasks"]] == [task["task_id"]]


async def test_who_waits_in_vain_is_told_so_in_time(client: httpx.AsyncClient) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert (await waiting(client, seconds=1)).json() == {"tasks": []}
    assert 0.9 < loop.time() - began < 3
    for parameters in ({"wait_seconds": 61}, {"wait": 1}):
        refused = await client.post("/tasks/claim", params=parameters, json={"worker": "w", "kinds": ["a"]})
        assert problem_of(refused)["code"] == "malformed_request"


async def test_who_has_gone_away_takes_no_work_from_the_others(client: httpx.AsyncClient) -> None:
    gone = waiting(client)
    await in_line(client)
    gone.cancel()
    await asyncio.wait([gone])
    task = await submitted(client)
    assert [work["task_id"] for work in await claimed(client)] == [task["task_id"]]


async def test_a_process_that_is_to_end_answers_those_who_wait_for_work(settings: Settings, token: Token) -> None:
    app = create_app(settings)
    async with running(app, token("agent")) as client:
        workers = [waiting(client) for _ in range(3)]
        await in_line(client)
        app.end_waits()
        assert [(await worker).json() for worker in workers] == [{"tasks": []}] * 3


async def in_line(client: httpx.AsyncClient) -> None:
    """Return when those who asked before found nothing, and wait: what is asked after them is decided after them."""
    assert await claimed(client, "nothing.of-this") == []


# Waiting for a change


@pytest.mark.usefixtures("never_looking")
async def test_who_waits_for_a_task_sees_it_end_at_once(client: httpx.AsyncClient) -> None:
    for _ in range(20):
        task = await submitted(client, start={"worker": "w"})
        path = f"/tasks/{task['task_id']}"
        etag = (await client.get(path)).headers["etag"]
        waits = asyncio.create_task(
            client.get(path, params={"wait_seconds": LONG_SECONDS}, headers={"If-None-Match": etag})
        )
        await client.get(path)
        await post(client, f"{path}/complete", lease_id=task["lease_id"])
        assert (await waits).json()["state"] == "completed"
