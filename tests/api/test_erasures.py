"""Erasing over HTTP: afterwards nothing anywhere tells what was said of the subject, and all else is as it was."""

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import redis
from psycopg import sql

from api.app import create_app
from api.client import Client
from ledger.embedded import EmbeddedServer
from ledger.errors import Held
from ledger.postgres import open_pool
from ledger.settings import Settings
from ledger.subjects import stream_of
from ledger.vault import Vault
from ops.eraser import erase_all, finish
from projections import VIEWS
from projections.proof import prove
from tests.api.conftest import Token, problem_of, running, settings_of
from tests.check import check_ledger, of_type
from tests.conftest import Database, database_of
from tests.server import Server, new_project

SECRET, SUBJECT = "Mia-Li-3818", "mia.li@example.com"
MARK = {"$personal": {"subject": SUBJECT, "value": SECRET}}
ERASED = {"$erased": True}


def operator(token: Token, *roles: str, **more: Any) -> dict[str, str]:
    return token(*(roles or ("operator",)), subject="ana", kind="human", **more)


async def erase(client: httpx.AsyncClient, token: Token, subject: str = SUBJECT, **sent: Any) -> httpx.Response:
    body = {"subject": subject, "ground": "she asked", **sent}
    return await client.post("/erasures", json=body, headers=operator(token))


async def erased(client: httpx.AsyncClient, token: Token, subject: str = SUBJECT) -> dict[str, Any]:
    answer = await erase(client, token, subject)
    assert answer.status_code == 201, answer.text
    body: dict[str, Any] = answer.json()
    return body


# Everything that was said of somebody, in every form that there is


async def say(client: httpx.AsyncClient, token: Token) -> list[tuple[str, httpx.Response]]:
    """A person in every place where one may be; the commands, each with its path and what it was answered."""
    agent, approver = token("agent"), token("approver", subject="bo", kind="human")
    said: list[tuple[str, httpx.Response]] = []

    async def post(path: str, body: Any, who: dict[str, str] = agent) -> dict[str, Any]:
        answer = await client.post(path, json=body | {"command_id": f"c-{len(said)}"}, headers=who)
        assert answer.status_code < 300, answer.text
        said.append((path, answer))
        told: dict[str, Any] = answer.json()
        return told

    session = await post("/sessions", {"agent_role": "x", "metadata": {"who": MARK}})
    at = {"session_id": session["session_id"]}
    await post(f"/sessions/{session['session_id']}/annotations", {"text": MARK})
    await post("/records", {"kind": "a", "body": {"deep": [MARK, {"by": MARK}]}} | at)
    await post("/records", {"kind": "large", "body": [MARK, "x" * 70_000]} | at)
    task = await post("/tasks", {"kind": "k", "payload": MARK, "start": {"worker": "w"}} | at)
    await post(f"/tasks/{task['task_id']}/fail", {"lease_id": task["lease_id"], "error": MARK})
    action = {"tool": "refund", "arguments": {"to": MARK}}
    approval = await post("/approvals", {"action": action, "summary": MARK, "reason": MARK} | at)
    vote = {"verdict": "deny", "reason": MARK, "digest_seen": approval["request_digest"]}
    await post(f"/approvals/{approval['approval_id']}/votes", vote, approver)
    return said


PATHS = (
    *("/sessions", "/records", "/tasks", "/approvals", "/events?limit=1000", "/audit/search?q=refund"),
    *("/sessions?as_of_position=9", "/tasks?as_of_position=9", "/approvals?as_of_position=9"),
)


async def everything(client: httpx.AsyncClient, token: Token, said: list[tuple[str, httpx.Response]]) -> dict[str, str]:
    """All that an auditor, and whoever gave the commands, can be told, by where it is told."""
    auditor = operator(token, "auditor", "agent")
    told = {path: (await client.get(path, headers=auditor)).text for path in PATHS}
    for form in ("application/x-ndjson", "text/csv"):
        told[form] = (await client.get("/events?limit=1000", headers=auditor | {"Accept": form})).text
    for path, answer in said:
        sent = answer.request
        headers = {"Authorization": sent.headers["authorization"], "Content-Type": "application/json"}
        again = await client.post(path, content=sent.content, headers=headers)
        assert again.headers["idempotent-replayed"] == "true"
        assert again.status_code == answer.status_code
        told[f"again {path}"] = again.text
        if "location" in answer.headers:
            one = answer.headers["location"]
            told[one] = (await client.get(one, headers=auditor)).text
            told[f"{one} then"] = (await client.get(f"{one}?as_of_position=9", headers=auditor)).text
        by = (await client.get(f"/commands/{answer.headers['command-id']}", headers=headers)).text
        told[f"command {path}"] = by
    return told


def leaves(database: Database) -> list[Any]:
    with psycopg.connect(database.owner) as connection:
        return connection.execute("SELECT position, leaf, entry FROM ledger.events ORDER BY position").fetchall()


def at_rest(database: Database) -> str:
    """Every row of every table."""
    with psycopg.connect(database.owner) as connection:
        tables = connection.execute(
            "SELECT schemaname, tablename FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        ).fetchall()
        rows = [
            connection.execute(sql.SQL("SELECT t::text FROM {} AS t").format(sql.Identifier(*table))).fetchall()
            for table in tables
        ]
        # What is bytes reads as hexadecimal digits there.
        bytes_ = connection.execute(
            "SELECT entry FROM ledger.events UNION ALL SELECT data FROM ledger.payloads"
        ).fetchall()
    return str(rows) + str(bytes_)


FORMS = [
    form for said in (SECRET, SUBJECT) for form in (said, said.encode().hex(), b64encode(said.encode()).decode()[:-4])
]


@pytest.mark.usefixtures("worker")
async def test_nothing_tells_of_a_subject_that_was_erased_and_every_proof_and_view_holds(
    database: Database, tmp_path: Path, token: Token, valkey: str, capfd: pytest.CaptureFixture[str]
) -> None:
    copied = settings_of(database, tmp_path, REDIS_URL=valkey)
    async with (
        running(create_app(copied), {}) as client,
        running(create_app(settings_of(database, tmp_path)), {}) as other,
    ):
        said = await say(client, token)
        for process in (client, other):
            before = await everything(process, token, said)
            assert {where for where, text in before.items() if SECRET not in text} <= {"/tasks?as_of_position=9"}
        was = leaves(database)
        erasure = await erased(client, token)
        for process in (other, client):
            for where, text in (await everything(process, token, said)).items():
                assert SECRET not in text, where
                assert "$erased" in text or "erased" in text or where == "/tasks?as_of_position=9", where
        assert leaves(database)[: len(was)] == was, "a byte of what was recorded has changed"
        # The digest that people voted on stays what it was, though nobody can compute it any more.
        again = next(answer for path, answer in said if path == "/approvals").json()
        approval = (await client.get(f"/approvals/{again['approval_id']}", headers=operator(token))).json()
        assert approval["request_digest"] == again["request_digest"]
        stored = at_rest(database)
        copies = redis.Redis.from_url(valkey)
        names = copies.keys()
        stored += str([(name, copies.get(name)) for name in names])
    check_ledger(database.owner)
    async with open_pool(database.worker) as pool:
        for view in VIEWS:
            assert all(verdict.holds for verdict in await prove(pool, view))
    logged = capfd.readouterr()
    for form in FORMS:
        assert form not in stored
        assert form not in logged.out + logged.err
    assert erasure["subject"] in stored, "what looks for the pseudonym would find it"
    assert len(names) > 4, "it had copies of answers"


# What is answered


@pytest.fixture
async def another(settings: Settings, token: Token) -> AsyncIterator[httpx.AsyncClient]:
    """A second process of the API."""
    async with running(create_app(settings), token("agent")) as client:
        yield client


async def recorded(client: httpx.AsyncClient, value: Any = MARK) -> str:
    answer = await client.post("/records", json={"kind": "a", "body": value})
    assert answer.status_code == 201
    return str(answer.headers["location"])


async def body_of(client: httpx.AsyncClient, path: str) -> Any:
    return (await client.get(path)).json()["body"]


async def test_an_erasure_is_answered_as_it_was_recorded_and_again_under_its_id(
    client: httpx.AsyncClient, another: httpx.AsyncClient, token: Token, database: Database
) -> None:
    path = await recorded(client)
    assert await body_of(another, path) == SECRET
    first = await erase(client, token, command_id="e-1")
    told = first.json()
    assert first.status_code == 201
    assert told.keys() == {"subject", "ground", "through", "erased_by", "erased_at", "version", "destroyed"}
    assert (told["ground"], told["through"], told["version"], told["destroyed"]) == ("she asked", 1, 1, True)
    assert told["erased_by"]["sub"] == "ana"
    assert first.headers["location"] == f"/erasures/{told['subject']}"
    assert [await body_of(process, path) for process in (client, another)] == [ERASED, ERASED]
    later = await recorded(another)
    again = await erase(another, token, command_id="e-1")
    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["idempotent-replayed"] == "true"
    assert await body_of(client, later) == SECRET, "a replay erases no more than the first did"
    reused = await erase(client, token, subject="c-8", command_id="e-1")
    assert problem_of(reused)["code"] == "idempotency_key_reused"
    assert (await client.get("/commands/e-1", headers=operator(token))).json()["body"] == told
    assert len(of_type(check_ledger(database.owner)["demo"], "SubjectErased")) == 1


@pytest.mark.usefixtures("worker")
async def test_erasures_and_holds_are_listed_for_operators_and_auditors(
    client: httpx.AsyncClient, token: Token
) -> None:
    auditor = operator(token, "auditor")
    for path, plural in (("/erasures", "erasures"), ("/holds", "holds")):
        assert (await client.get(path, headers=auditor)).json() == {plural: [], "next": None}
    names = [f"c-{n}" for n in range(3)]
    erasures = [await erased(client, token, name) for name in (*names, "c-0")]
    held = {"subject": "c-1", "reason": "case 7"}
    holds = [(await client.post("/holds", json=held, headers=operator(token))).json() for _ in range(2)]
    await client.post(f"/holds/{holds[0]['hold_id']}/release", json={"reason": "x"}, headers=operator(token))
    listed = (await client.get("/erasures?limit=3", headers=auditor)).json()
    assert listed["erasures"] == erasures[:0:-1]
    rest = (await client.get(f"/erasures?after={listed['next']}", headers=operator(token))).json()
    assert rest == {"erasures": erasures[:1], "next": None}
    own = (await client.get("/erasures?subject=c-0&order=asc", headers=auditor)).json()["erasures"]
    assert own == [erasures[0], erasures[3]]
    assert [one["version"] for one in own] == [1, 2]
    last = await client.get(f"/erasures/{erasures[0]['subject']}", headers=auditor)
    assert (last.json(), last.headers["etag"]) == (erasures[3], '"2"')
    shown = (await client.get("/holds", headers=auditor)).json()["holds"]
    assert [(one["hold_id"], one["state"], one["in_force"]) for one in shown] == [
        (holds[1]["hold_id"], "placed", True),
        (holds[0]["hold_id"], "released", False),
    ]
    assert (await client.get("/holds?subject=c-2", headers=auditor)).json()["holds"] == []
    assert len((await client.get("/holds?subject=c-1", headers=auditor)).json()["holds"]) == 2
    one = await client.get(f"/holds/{holds[1]['hold_id']}", headers=auditor)
    assert (one.json(), one.headers["etag"]) == (holds[1], '"1"')
    for path in ("/erasures", "/holds", f"/erasures/{erasures[0]['subject']}", f"/holds/{holds[1]['hold_id']}"):
        assert problem_of(await client.get(path))["code"] == "forbidden"
        elsewhere = await client.get(path, headers=operator(token, project="other"))
        assert elsewhere.status_code == (200 if path in ("/erasures", "/holds") else 404), path
        assert "c-1" not in elsewhere.text
    assert (await client.get("/erasures/nobody", headers=auditor)).status_code == 404


async def test_a_hold_is_a_clear_conflict_until_it_is_released(client: httpx.AsyncClient, token: Token) -> None:
    path = await recorded(client)
    placed = await client.post("/holds", json={"subject": SUBJECT, "reason": "case 7"}, headers=operator(token))
    hold = placed.json()
    assert (placed.status_code, placed.headers["location"]) == (201, f"/holds/{hold['hold_id']}")
    refused = await erase(client, token, command_id="e-1")
    problem = problem_of(refused)
    assert (refused.status_code, problem["code"], problem["hold_id"]) == (409, "held", hold["hold_id"])
    assert hold["hold_id"] in problem["detail"]
    assert SUBJECT not in refused.text
    assert await body_of(client, path) == SECRET
    release = f"/holds/{hold['hold_id']}/release"
    freed = await client.post(release, json={"reason": "closed"}, headers=operator(token))
    assert (freed.status_code, freed.json()["state"], freed.json()["in_force"]) == (200, "released", False)
    twice = await client.post(release, json={"reason": "closed"}, headers=operator(token))
    assert problem_of(twice)["code"] == "invalid_transition"
    assert problem_of(await erase(client, token, command_id="e-1"))["code"] == "held", "it is remembered for its id"
    await erased(client, token)
    assert await body_of(client, path) == ERASED


async def test_who_may_not_erase_and_what_cannot_be_read_is_refused(
    client: httpx.AsyncClient, token: Token, database: Database
) -> None:
    path = await recorded(client)
    for roles in (("agent",), ("auditor",), ("approver", "importer")):
        who = operator(token, *roles)
        for route, said in (("/erasures", {"ground": "x"}), ("/holds", {"reason": "x"})):
            refused = await client.post(route, json={"subject": SUBJECT, **said}, headers=who)
            assert problem_of(refused)["code"] == "forbidden"
    bad: list[dict[str, Any]] = [{}, {"subject": SUBJECT}, {"subject": "", "ground": "x"}]
    for body in (*bad, {"subject": SUBJECT, "ground": MARK}):
        assert problem_of(await client.post("/erasures", json=body, headers=operator(token)))["code"] == (
            "malformed_request"
        )
    listed = await client.post("/commands", json=[{"type": "EraseSubject", "subject": SUBJECT, "ground": "x"}])
    assert listed.json()[0]["status"] == 400, "no list of commands takes it"
    assert await body_of(client, path) == SECRET
    assert SUBJECT not in at_rest(database)


async def test_another_projects_subject_is_another(client: httpx.AsyncClient, token: Token) -> None:
    path = await recorded(client)
    answer = await client.post(
        "/erasures", json={"subject": SUBJECT, "ground": "x"}, headers=operator(token, project="other")
    )
    assert (answer.status_code, answer.json()["through"]) == (201, 0)
    assert await body_of(client, path) == SECRET


# Dying, and coming back


async def test_what_died_between_the_event_and_its_doing_is_finished_by_a_worker(
    durable_server: EmbeddedServer, tmp_path: Path
) -> None:
    database = database_of(durable_server, "muniment")
    with psycopg.connect(database.owner, autocommit=True) as owner:
        # Destroying waits here for as long as this test holds the lock.
        owner.execute(
            "CREATE FUNCTION keys.wait() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN PERFORM pg_advisory_xact_lock(42); RETURN NEW; END'"
        )
        owner.execute(
            "CREATE TRIGGER waits BEFORE UPDATE ON keys.data_keys FOR EACH ROW WHEN (NEW.wrapped IS NULL)"
            " EXECUTE FUNCTION keys.wait()"
        )
        owner.execute("SELECT pg_advisory_lock(42)")
        with Server(database, tmp_path) as server:
            async with Client(
                server.url, server.token("demo", roles=("agent", "operator")), patience_seconds=0
            ) as client:
                record = await client.record("a", body=MARK)
                dying = asyncio.create_task(client.erase_subject(SUBJECT, "she asked"))
                waiting = "FROM pg_stat_activity WHERE wait_event = 'advisory'"
                while owner.execute(f"SELECT count(*) {waiting}").fetchone() != (1,):
                    assert not dying.done()
                    await asyncio.sleep(0.01)
                server.kill()
                with pytest.raises(Exception, match="did not answer"):
                    await dying
            owner.execute(f"SELECT pg_terminate_backend(pid, 10000) {waiting}")
            owner.execute("DROP TRIGGER waits ON keys.data_keys")
            owner.execute("SELECT pg_advisory_unlock(42)")
    history = check_ledger(database.owner)["demo"]
    (event,) = of_type(history, "SubjectErased")
    assert event.stream_id == stream_of(event.data.subject)
    async with open_pool(database.worker) as pool:
        vault = Vault(tmp_path / "keys", pool, create_keys=False)
        sealed = of_type(history, "FactRecorded")[0]
        assert await vault.undestroyed() == {"demo": [event.data.subject]}
        assert await finish(pool, vault) == 1
        assert await vault.undestroyed() == {}
        assert sealed.data.body["$sealed"]["subject"] == event.data.subject
        assert await finish(pool, vault) == 0
    with Server(database, tmp_path) as server:
        async with Client(server.url, server.token("demo")) as client:
            assert (await client.get_record(record.body["record_id"]))["body"] == ERASED
    # Not in a table's file, nor in the write-ahead log, nor in what PostgreSQL and Muniment say and keep.
    files = [file for home in (durable_server.log.parent, tmp_path) for file in home.rglob("*") if file.is_file()]
    assert any(file.parent.name == "pg_wal" for file in files)
    assert [file for file in files for said in (SECRET, SUBJECT) if said.encode() in file.read_bytes()] == []


async def test_keys_that_a_restore_brings_back_go_again_whatever_the_views_know(
    client: httpx.AsyncClient, token: Token, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.eraser.ERASURES_MAX", 1)
    old, kept = await recorded(client), await recorded(client, {"$personal": {"subject": "c-7", "value": "Bo"}})
    other = await recorded(client, {"$personal": {"subject": "c-8", "value": "Cy"}})
    with psycopg.connect(database.owner, autocommit=True) as owner:
        backup = owner.execute("SELECT project_id, subject, key, wrapped FROM keys.data_keys").fetchall()
        erasure = await erased(client, token)
        await erased(client, token, "c-8")
        new = await recorded(client)
        owner.execute("ALTER TABLE keys.data_keys DISABLE TRIGGER USER")
        for project_id, subject, key, wrapped in backup:
            values = (wrapped, project_id, subject, key)
            restored = "UPDATE keys.data_keys SET wrapped = %s, retired = false"
            owner.execute(f"{restored} WHERE project_id = %s AND subject = %s AND key = %s", values)
        owner.execute("ALTER TABLE keys.data_keys ENABLE TRIGGER USER")
    assert await body_of(client, old) == SECRET
    shown = await client.get(f"/erasures/{erasure['subject']}", headers=operator(token))
    assert shown.json()["destroyed"] is False
    async with open_pool(database.worker) as pool:
        vault = Vault(tmp_path / "keys", pool, create_keys=False)
        assert await erase_all(pool, vault) == 2
        assert await erase_all(pool, vault) == 0
    bodies = [await body_of(client, path) for path in (old, other, kept, new)]
    assert bodies == [ERASED, ERASED, "Bo", SECRET]
    shown = await client.get(f"/erasures/{erasure['subject']}", headers=operator(token))
    assert shown.json()["destroyed"] is True


async def test_the_client_erases_and_holds(settings: Settings, database: Database, tmp_path: Path) -> None:
    with Server(database, tmp_path, ("api", "worker")) as server:
        project = new_project()
        async with Client(server.url, server.token(project, roles=("agent", "operator"))) as client:
            record = await client.record("a", body=MARK)
            hold = await client.place_hold(SUBJECT, "case 7")
            with pytest.raises(Held) as refused:
                await client.erase_subject(SUBJECT, "she asked")
            assert refused.value.params["hold_id"] == hold["hold_id"]
            await client.release_hold(hold["hold_id"], "closed")
            erasure = await client.erase_subject(SUBJECT, "she asked")
            assert (await client.get_record(record.body["record_id"]))["body"] == ERASED
            assert [one async for one in client.list_erasures()] == [erasure]
            assert [one["state"] async for one in client.list_holds()] == ["released"]
