"""Approvals over HTTP: asked for, decided by people, used as approved; and bound to exactly what was asked."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import rfc8785

from api.app import create_app
from tests.api.asking import ACTION, ISSUER, LONG_SECONDS, People, asked, later, path_of, post, principal, read, voted
from tests.api.conftest import Token, problem_of, running, settings_of
from tests.check import check_ledger, of_type
from tests.conftest import Database

Json = dict[str, Any]


@pytest.fixture(autouse=True)
def whole(database: Database) -> Iterator[None]:
    """Whatever a test did, the ledger holds afterwards."""
    yield
    check_ledger(database.owner)


@pytest.fixture
def people(token: Token) -> People:
    return People(token)


# The whole story


async def test_an_action_is_asked_about_shown_approved_by_two_used_and_its_outcome_told(
    client: httpx.AsyncClient, people: People, database: Database
) -> None:
    response = await client.post("/approvals", json={"action": ACTION, "risk": "high", "quorum": {"approve": 2}})
    approval = response.json()
    assert response.status_code == 201
    assert response.headers["location"] == path_of(approval)
    assert response.headers["etag"] == '"1"'
    assert (approval["state"], approval["action"], approval["risk"]) == ("pending", ACTION, "high")
    assert approval["requester"] == principal("agent-7")

    await post(client, f"{path_of(approval)}/presentations", people.ann, channel="mail")
    once = await voted(client, approval, people.ann, reason="It is due")
    assert once["state"] == "pending"
    assert [(vote["voter"], vote["verdict"], vote["reason"]) for vote in once["votes"]] == [
        (principal("ann"), "approve", "It is due")
    ]
    twice = await voted(client, approval, people.ben)
    assert (twice["state"], twice["uses_left"]) == ("approved", 1)
    assert twice["approved_until"] > twice["decided_at"]

    execution = str(uuid4())
    begun = await post(client, f"{path_of(approval)}/uses", execution_id=execution, action=ACTION, audience="bank")
    assert (begun["state"], begun["uses_left"]) == ("executing", 0)
    outcome = f"{path_of(approval)}/uses/{execution}/outcome"
    done = await post(client, outcome, outcome="ok", result={"id": 81})
    assert done["state"] == "executed"
    assert [(one["execution_id"], one["outcome"]) for one in done["executions"]] == [(execution, "ok")]
    assert await read(client, approval) == done
    assert [event.type for _, event in check_ledger(database.owner)["demo"]] == [
        "ApprovalRequested",
        "ApprovalPresented",
        "VoteCast",
        "VoteCast",
        "ApprovalGranted",
        "ApprovalUseBegun",
        "ApprovalUseCompleted",
    ]


async def test_a_pending_approval_says_who_may_still_vote_and_what_becomes_of_it(
    client: httpx.AsyncClient, people: People
) -> None:
    task = await post(client, "/tasks", status=201, kind="pay", start={"worker": "w"})
    approval = await asked(client, task_id=task["task_id"], quorum={"approve": 2, "roles": ["approver", "finance"]})
    assert 86_390 < approval["seconds_left"] <= 86_400
    assert approval["may_still_vote"] == {"roles": ["approver", "finance"], "excluded": [principal("agent-7")]}
    assert approval["on_deny"]["decision"] == "denied"
    assert approval["on_expiry"]["decision"] == "expired"
    assert {approval[name]["resumes_task_id"] for name in ("on_deny", "on_expiry")} == {task["task_id"]}
    assert not {"match", "root", "request_event_id", "request_version"} & approval.keys()
    after = await voted(client, approval, people.ann)
    assert after["may_still_vote"]["excluded"] == [principal("agent-7"), principal("ann")]
    decided = await voted(client, approval, people.ben, "deny")
    assert decided["state"] == "denied"
    assert {decided[name] for name in ("may_still_vote", "on_deny", "on_expiry")} == {None}
    assert decided["seconds_left"] is None


@pytest.mark.parametrize("decision", ["denied", "approved", "withdrawn", "cancelled"])
async def test_what_waits_for_it_goes_on_and_is_told_the_decision(
    client: httpx.AsyncClient, people: People, decision: str
) -> None:
    task = await post(client, "/tasks", status=201, kind="pay", start={"worker": "w"})
    approval = await asked(client, task_id=task["task_id"])
    suspend = {"lease_id": task["lease_id"], "approval_id": approval["approval_id"]}
    waiting = await post(client, f"/tasks/{task['task_id']}/suspend", **suspend)
    assert (waiting["state"], waiting["approval_id"]) == ("waiting", approval["approval_id"])
    if decision in ("withdrawn", "cancelled"):
        verb, by = ("withdraw", None) if decision == "withdrawn" else ("cancel", people.operator)
        await post(client, f"{path_of(approval)}/{verb}", by, reason="not needed")
    else:
        await voted(client, approval, people.ann, {"denied": "deny", "approved": "approve"}[decision])
    assert (await read(client, approval))["state"] == decision
    (work,) = (await post(client, "/tasks/claim", worker="w", kinds=["pay"]))["tasks"]
    assert (work["approval_id"], work["decision"]) == (approval["approval_id"], decision)


async def test_an_edit_supersedes_the_request_and_keeps_who_asked(client: httpx.AsyncClient, people: People) -> None:
    approval = await asked(client, quorum={"approve": 2})
    changed = ACTION | {"arguments": {"to": "DE02 1203", "amount": 10}}
    new_id = str(uuid4())
    old = await post(client, f"{path_of(approval)}/edit", people.ann, action=changed, new_approval_id=new_id)
    assert (old["state"], old["superseded_by"], old["approval_id"]) == ("superseded", new_id, approval["approval_id"])
    new = await read(client, {"approval_id": new_id})
    assert (new["state"], new["action"], new["supersedes"]) == ("pending", changed, approval["approval_id"])
    assert (new["requester"], new["edited_by"]) == (principal("agent-7"), principal("ann"))
    assert new["may_still_vote"]["excluded"] == [principal("agent-7"), principal("ann")]
    refused = await client.post(
        f"/approvals/{new_id}/votes",
        json={"verdict": "approve", "digest_seen": new["request_digest"]},
        headers=people.ann,
    )
    assert problem_of(refused)["code"] == "not_eligible"


async def test_a_vote_can_be_taken_back_while_nothing_is_decided(client: httpx.AsyncClient, people: People) -> None:
    approval = await asked(client, quorum={"approve": 2})
    await voted(client, approval, people.ann)
    mine = f"{path_of(approval)}/votes/mine"
    gone = await client.delete(mine, headers=people.ann)
    assert (gone.status_code, gone.json()["votes"]) == (200, [])
    nothing = await client.delete(mine, headers=people.ben | {"Idempotency-Key": "k"})
    assert (nothing.status_code, nothing.headers["etag"]) == (200, gone.headers["etag"])
    await voted(client, approval, people.ann, "deny")
    late = await client.delete(mine, headers=people.ann)
    assert problem_of(late)["code"] == "invalid_transition"


async def test_an_approval_that_is_not_being_used_can_be_revoked(client: httpx.AsyncClient, people: People) -> None:
    approval = await asked(client)
    await voted(client, approval, people.ann)
    revoked = await post(client, f"{path_of(approval)}/revoke", people.operator, reason="stop")
    assert revoked["state"] == "revoked"
    use = {"execution_id": str(uuid4()), "action": ACTION}
    assert problem_of(await client.post(f"{path_of(approval)}/uses", json=use))["code"] == "invalid_transition"


# Asking again


async def test_who_asks_again_is_answered_with_the_approval_as_it_is_now(
    client: httpx.AsyncClient, people: People
) -> None:
    body, key = {"action": ACTION, "call_key": "call-1"}, {"Idempotency-Key": "k-1"}
    first = await client.post("/approvals", json=body, headers=key)
    approval = first.json()
    same = await client.post("/approvals", json=body)
    assert (same.status_code, same.json()["approval_id"]) == (200, approval["approval_id"])
    assert (same.json()["state"], "location" in same.headers) == ("pending", False)
    await voted(client, approval, people.ann)
    again = await client.post("/approvals", json=body, headers=key)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (201, "true")
    assert (again.json()["state"], again.headers["etag"]) == ("approved", '"3"')
    remembered = (await client.get("/commands/k-1")).json()
    assert (remembered["status"], remembered["body"]["state"]) == (201, "approved")
    granted = await client.post("/approvals", json=body)
    assert (granted.status_code, granted.json()["state"]) == (200, "approved")
    other = await client.post("/approvals", json=body | {"action": ACTION | {"target": "invoice:10"}})
    assert (other.status_code, other.json()["approval_id"] == approval["approval_id"]) == (201, False)


async def test_every_other_answer_is_the_same_again(client: httpx.AsyncClient, people: People) -> None:
    approval = await asked(client, quorum={"approve": 2})
    vote = {"verdict": "approve", "digest_seen": approval["request_digest"]}
    keyed = people.ann | {"Idempotency-Key": "v-1"}
    first = await client.post(f"{path_of(approval)}/votes", json=vote, headers=keyed)
    await voted(client, approval, people.ben)
    again = await client.post(f"{path_of(approval)}/votes", json=vote, headers=keyed)
    assert again.content == first.content
    assert again.headers["idempotent-replayed"] == "true"


async def test_a_copy_in_redis_changes_neither(
    database: Database, tmp_path: Path, token: Token, people: People, valkey: str
) -> None:
    settings = settings_of(database, tmp_path, REDIS_URL=valkey)
    body, key = {"action": ACTION}, {"Idempotency-Key": "k-1"}
    async with running(create_app(settings), token("agent")) as client:
        await client.post("/records", json={"kind": "the.first"})  # of a project that is not known nothing is copied
        approval = (await client.post("/approvals", json=body, headers=key)).json()
        voted_on = await voted(client, approval, people.ann, command_id="v-1", reason="yes")
        use: Json = {"execution_id": str(uuid4()), "action": ACTION, "command_id": "u-1"}
        begun = await post(client, f"{path_of(approval)}/uses", **use)
    async with running(create_app(settings), token("agent")) as client:
        again = await client.post("/approvals", json=body, headers=key)
        assert (again.status_code, again.json()["state"]) == (201, "executing")
        assert await voted(client, approval, people.ann, command_id="v-1", reason="yes") == voted_on
        assert await post(client, f"{path_of(approval)}/uses", **use) == begun
        assert begun["use_token"]


async def test_a_list_of_commands_is_answered_as_their_routes_would(client: httpx.AsyncClient, people: People) -> None:
    approval = await asked(client)
    of = {"approval_id": approval["approval_id"]}
    vote = {"type": "CastVote", "verdict": "approve", "digest_seen": approval["request_digest"]} | of
    (cast,) = (await client.post("/commands", json=[vote], headers=people.ann)).json()
    assert (cast["status"], cast["body"]["state"], cast["etag"]) == (200, "approved", '"3"')
    execution = str(uuid4())
    use = {"type": "BeginUse", "execution_id": execution, "action": ACTION} | of
    told = {"type": "RecordOutcome", "execution_id": execution, "outcome": "failed"} | of
    begun, done = (await client.post("/commands", json=[use, told])).json()
    assert begun["body"]["use_token"]
    assert (done["body"]["state"], done["body"]["executions"][0]["outcome"]) == ("executed", "failed")
    assert "use_token" not in done["body"]


# What is refused


class Refused:
    """Sends a command twice under one id, and sees that it is refused so, both times, and recorded once."""

    def __init__(self, client: httpx.AsyncClient, database: Database) -> None:
        self._client = client
        self._database = database

    async def __call__(self, status: int, code: str, path: str, by: Any = None, **body: Any) -> Json:
        command_id = str(uuid4())
        headers = (by or {}) | {"Idempotency-Key": command_id}
        first, again = [await self._client.post(path, json=body, headers=headers) for _ in range(2)]
        problem = problem_of(first)
        assert (first.status_code, problem["code"]) == (status, code)
        assert again.content == first.content
        assert again.headers["idempotent-replayed"] == "true"
        recorded = of_type(check_ledger(self._database.owner)["demo"], "CommandRefused")
        assert [(event.data.status, event.data.code) for event in recorded if event.command_id == command_id] == [
            (status, code)
        ]
        return problem


@pytest.fixture
def refused(client: httpx.AsyncClient, database: Database) -> Refused:
    return Refused(client, database)


async def test_nobody_votes_who_may_not(
    client: httpx.AsyncClient, token: Token, people: People, refused: Refused
) -> None:
    approval = await asked(client, quorum={"approve": 2})
    votes, vote = f"{path_of(approval)}/votes", {"verdict": "approve", "digest_seen": approval["request_digest"]}
    oneself = token("approver", subject="agent-7", kind="human")
    await refused(403, "self_approval_forbidden", votes, oneself, **vote)
    await refused(403, "not_eligible", votes, token("approver", subject="bot", kind="agent"), **vote)
    await refused(403, "not_eligible", votes, token("auditor", subject="eve", kind="human"), **vote)
    await refused(409, "digest_mismatch", votes, people.ann, **vote | {"digest_seen": approval["action_digest"]})
    await refused(409, "digest_mismatch", votes, people.ann, verdict="approve")
    await refused(403, "not_eligible", votes, people.ann, **vote, voter={"issuer": ISSUER, "sub": "ben"})
    await voted(client, approval, people.ann)
    assert (await voted(client, approval, people.ann))["version"] == 2, "the same again is no event"
    problem = await refused(409, "already_voted", votes, people.ann, **vote | {"verdict": "deny"})
    assert problem["verdict"] == "approve"


async def test_whoever_has_the_role_that_it_takes_votes_and_is_answered(
    client: httpx.AsyncClient, token: Token
) -> None:
    approval = await asked(client, quorum={"roles": ["finance"]})
    fay = token("finance", subject="fay", kind="human")
    assert (await voted(client, approval, fay, command_id="v-1"))["state"] == "approved"
    seen = {"verdict": "approve", "digest_seen": approval["request_digest"], "command_id": "v-1"}
    again = await client.post(f"{path_of(approval)}/votes", json=seen, headers=fay)
    assert problem_of(again)["code"] == "forbidden", "who is no reader is told once"


async def test_what_was_approved_runs_once_as_it_was_approved(
    client: httpx.AsyncClient, people: People, refused: Refused, token: Token
) -> None:
    approval = await asked(client)
    uses = f"{path_of(approval)}/uses"
    use: Json = {"execution_id": str(uuid4()), "action": ACTION}
    await refused(422, "invalid_transition", uses, **use)
    await voted(client, approval, people.ann)
    await refused(403, "forbidden", uses, token("agent", subject="another"), **use)
    changed = ACTION | {"arguments": {"to": "DE02 1203", "amount": 12.51}}
    await refused(409, "digest_mismatch", uses, **use | {"action": changed})
    await post(client, uses, **use)
    assert (await post(client, uses, **use))["version"] == 4, "the same execution is begun once"
    await refused(409, "execution_started", uses, **use | {"execution_id": str(uuid4())})
    await refused(409, "execution_started", f"{path_of(approval)}/revoke", people.operator)
    assert problem_of(await client.post(f"{uses}/{uuid4()}/outcome", json={"outcome": "ok"}))["code"] == "not_found"
    outcome = f"{uses}/{use['execution_id']}/outcome"
    disagreeing = await client.post(outcome, json={"outcome": "ok", "execution_id": str(uuid4())})
    assert problem_of(disagreeing)["errors"][0]["pointer"] == "/execution_id"
    assert problem_of(await client.post(f"{uses}/x/outcome", json={"outcome": "ok"}))["code"] == "not_found"
    await post(client, outcome, outcome="ok")
    await refused(409, "uses_exhausted", uses, **use | {"execution_id": str(uuid4())})


async def test_a_vote_after_the_time_is_too_late(
    client: httpx.AsyncClient, people: People, refused: Refused, worker: None
) -> None:
    approval = await asked(client, expires_at=later(seconds=2))
    waits, known = {"wait_seconds": LONG_SECONDS}, {"If-None-Match": '"1"'}
    expired = (await client.get(path_of(approval), params=waits, headers=known)).json()
    assert (expired["state"], expired["seconds_left"]) == ("expired", None)
    vote = {"verdict": "approve", "digest_seen": approval["request_digest"]}
    await refused(410, "approval_expired", f"{path_of(approval)}/votes", people.ann, **vote)


async def test_imported_history_is_told_by_importers_and_never_used(
    client: httpx.AsyncClient, people: People, refused: Refused
) -> None:
    long_ago: Json = {"expires_at": "2019-01-02T00:00:00Z", "occurred_at": "2019-01-01T00:00:00Z", "imported": True}
    await refused(403, "forbidden", "/approvals", action=ACTION, **long_ago)
    approval = await post(client, "/approvals", people.importer, 201, action=ACTION, **long_ago)
    assert (approval["imported"], approval["may_still_vote"], approval["on_expiry"]) == (True, None, None)
    assert approval["seconds_left"] is None
    shown_by = await post(client, "/records", status=201, kind="message.user", body="yes")
    vote: Json = {"verdict": "approve", "voter": {"issuer": "mail", "sub": "cy", "evidence": shown_by["record_id"]}}
    await refused(403, "not_eligible", f"{path_of(approval)}/votes", people.ann, **vote)
    granted = await post(client, f"{path_of(approval)}/votes", people.importer, **vote)
    assert granted["state"] == "approved"
    assert [(one["voter"]["sub"], one["evidence"]) for one in granted["votes"]] == [("cy", shown_by["record_id"])]
    use = {"execution_id": str(uuid4()), "action": ACTION}
    await refused(409, "not_usable", f"{path_of(approval)}/uses", **use)


async def test_each_route_is_for_its_roles(
    client: httpx.AsyncClient, people: People, refused: Refused, token: Token
) -> None:
    approval = await asked(client)
    path, auditor = path_of(approval), token("auditor", subject="eve", kind="human")
    await refused(403, "forbidden", f"{path}/presentations", channel="mail")
    await refused(403, "forbidden", f"{path}/edit", action=ACTION)
    await refused(403, "forbidden", f"{path}/cancel", people.ann)
    await refused(403, "forbidden", f"{path}/withdraw", token("agent", subject="another"))
    await refused(403, "forbidden", f"{path}/revoke")
    await refused(403, "forbidden", "/approvals", auditor, action=ACTION)
    for nobody in (token(subject="nobody"), token("finance", subject="fay", kind="human"), people.importer):
        answer = await client.delete(f"{path}/votes/mine", headers=nobody)
        assert problem_of(answer)["code"] == "not_eligible"
    assert (await client.get(path, headers=auditor)).status_code == 200


async def test_an_approval_of_another_project_does_not_exist(client: httpx.AsyncClient, token: Token) -> None:
    approval = await asked(client)
    elsewhere = token("agent", "approver", "operator", subject="ann", kind="human", project="other")
    await client.post("/records", json={"kind": "a.b"}, headers=elsewhere)
    vote = {"verdict": "approve", "digest_seen": approval["request_digest"]}
    for verb, body in (("votes", vote), ("cancel", {}), ("uses", {"execution_id": str(uuid4()), "action": ACTION})):
        answer = await client.post(f"{path_of(approval)}/{verb}", json=body, headers=elsewhere)
        assert problem_of(answer)["code"] == "not_found"
    assert problem_of(await client.get(path_of(approval), headers=elsewhere))["code"] == "not_found"
    unread = await client.get(path_of(approval), headers=token("importer"))
    assert problem_of(unread)["code"] == "forbidden"


# What it commits to


def digest(salt: str, fields: Any) -> str:
    return f"sha256:{sha256(bytes.fromhex(salt) + rfc8785.dumps(fields)).hexdigest()}"


@pytest.mark.parametrize("marked", [False, True])
async def test_whoever_may_read_it_comes_to_the_same_digests(
    client: httpx.AsyncClient, people: People, database: Database, marked: bool
) -> None:
    def mia(value: Any) -> Any:
        return {"$personal": {"subject": "c-9", "value": value}} if marked else value

    asks = {
        "action": ACTION | {"arguments": {"to": mia("Mia Li"), "amount": 1.0, "note": "€ 😀"}},
        "summary": mia("Pay Mia Li"),
        "reason": mia("Mia Li asked"),
        "risk": "critical",
        "quorum": {"approve": 2, "deny": 2, "roles": ["approver", "finance"]},
    }
    approval = await asked(client, **asks)
    voted_on = await voted(client, approval, people.ann, reason=mia("I know Mia Li"))
    read_again = await read(client, approval, min_position=0)
    assert read_again | {"seconds_left": 0} == voted_on | {"seconds_left": 0}
    assert (read_again["summary"], read_again["reason"]) == ("Pay Mia Li", "Mia Li asked")
    assert read_again["votes"][0]["reason"] == "I know Mia Li"
    assert read_again["action_digest"] == digest(read_again["salts"]["action"], read_again["action"])
    seen = {name: read_again[name] for name in ("action", "summary", "reason", "risk", "quorum", "expires_at")}
    assert read_again["request_digest"] == digest(read_again["salts"]["request"], seen)
    at_rest = repr([event for _, event in check_ledger(database.owner)["demo"]])
    assert ("Mia Li" in at_rest, read_again["salts"]["action"] in at_rest) == (not marked, not marked)
    await voted(client, approval, people.ben)
    plain = asks["action"] | {"arguments": {"to": "Mia Li", "amount": 1, "note": "€ 😀"}}
    begun = await post(client, f"{path_of(approval)}/uses", execution_id=str(uuid4()), action=plain)
    assert begun["state"] == "executing"
