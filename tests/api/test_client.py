"""The client against real servers, killed ones, cut connections, and servers that say strange things."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from string import Formatter
from typing import Any
from uuid import UUID, uuid4

import httpx
import msgspec
import pytest

from api.answers import BATCH_BYTES_MAX, Answer
from api.auth import development_token
from api.client import Client
from api.problems import problem
from api.wire import Problem, error_of
from ledger.checkpoint import Checkpoint, InclusionProof, Note, VerifierKey, check_checkpoint
from ledger.commands import AnnotateSession, ChangeSession, Command, OpenSession, Record, Start
from ledger.embedded import EmbeddedServer
from ledger.errors import (
    ERRORS,
    BodyTooLarge,
    IdempotencyKeyReused,
    InvalidTransition,
    MalformedRequest,
    MunimentError,
    NotFound,
    RateLimited,
    StoreUnavailable,
    Unauthenticated,
    ViewBehind,
)
from ledger.merkle import check_consistency
from ledger.values import Quorum
from ledger.verify import Trust, verify_proof
from tests.check import of_type
from tests.conftest import database_of
from tests.server import Server, history, new_project, shared_server


@pytest.fixture(scope="module")
def server(postgres: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with shared_server(postgres, tmp_path_factory.mktemp("server"), ("api", "worker")) as server:
        yield server


@pytest.fixture
def project() -> str:
    return new_project()


@pytest.fixture
async def client(server: Server, project: str) -> AsyncIterator[Client]:
    async with Client(server.url, server.token(project)) as client:
        yield client


def facts(server: Server, project: str) -> list[Any]:
    """What the records of a project say, in order."""
    return [event.data.body for event in of_type(history(server, project), "FactRecorded")]


# Commands


async def test_a_command_is_answered_with_what_it_did(client: Client, server: Server, project: str) -> None:
    opened = await client.open_session("support", labels={"team": "a"})
    assert (opened.status, opened.replayed, opened.positions, opened.etag) == (201, False, [1], '"1"')
    assert opened.body["labels"] == {"team": "a"}
    session_id = UUID(opened.body["session_id"])
    assert opened.location == f"/sessions/{session_id}"
    assert (await client.change_session(session_id, status="active")).body["state"] == "active"
    assert (await client.annotate(session_id, "a remark")).positions == [3]
    recorded = await client.record("tool.called", session_id=session_id, body={"x": [1, None]})
    assert recorded.body["body"] == {"x": [1, None]}
    assert (await client.cancel(session_id, reason="enough")).body["state"] == "cancelled"
    assert client.ledger_id == str(next(iter(history(server, project))).event.ledger)


async def test_a_command_given_again_is_done_once(client: Client, server: Server, project: str) -> None:
    command = OpenSession(agent_role="support")
    first, second = await client.command(command), await client.command(command)
    assert UUID(first.command_id).version == 7
    assert (first.replayed, second.replayed) == (False, True)
    assert first.body == second.body
    assert (await client.receipt(str(first.command_id)))["body"] == first.body
    assert len(history(server, project)) == 1


async def test_a_refusal_is_raised_as_the_error_it_is(client: Client) -> None:
    session_id = UUID((await client.open_session("support")).body["session_id"])
    with pytest.raises(InvalidTransition, match="not possible while") as refused:
        await client.change_session(session_id, status="completed")
    assert refused.value.params["current_state"] == "pending"
    assert refused.value.params["allowed"] == ["active", "cancelled"]
    with pytest.raises(NotFound):
        await client.annotate(uuid4(), "to nobody")
    with pytest.raises(NotFound):
        await client.receipt("never-sent")
    with pytest.raises(MalformedRequest) as malformed:
        await client.record("Not A Kind")
    assert malformed.value.errors[0]["pointer"] == "/kind"
    await client.record("a.fact", command_id="once")
    with pytest.raises(IdempotencyKeyReused):
        await client.record("another.fact", command_id="once")
    async with Client(client.url, "no token") as stranger:
        with pytest.raises(Unauthenticated, match=r"Send a valid token"):
            await stranger.open_session("support")


@pytest.mark.parametrize("code", ERRORS)
def test_every_error_is_the_same_on_this_side(code: str) -> None:
    kind = ERRORS[code]
    if issubclass(kind, MalformedRequest):
        error: MunimentError = kind([{"pointer": "/a", "detail": "wrong"}])
    else:
        fields = {name for _, name, _, _ in Formatter().parse(kind.template) if name}
        error = kind(**{name: f"some {name}" for name in fields})
    for remembered in (False, True):
        body = msgspec.json.decode(msgspec.json.encode(problem(error, remembered=remembered)))
        seen = error_of(error.status, body)
        assert type(seen) is kind
        assert seen.params.keys() == error.params.keys()
        assert (
            seen.detail.removesuffix(" This answer is remembered for this id; to try again, use a new one")
            == error.detail
        )


def test_what_no_error_of_ours_says_is_a_readable_problem() -> None:
    newer = error_of(
        409, {"code": "from_the_future", "title": "New", "detail": "Something new.", "status": 409, "x": 1}
    )
    assert isinstance(newer, Problem)
    assert (newer.code, newer.status, newer.params["x"]) == ("from_the_future", 409, 1)
    assert str(newer) == "409 New: Something new."
    partly = error_of(422, {"code": "invalid_transition", "title": "T", "detail": "Said otherwise.", "status": 422})
    assert isinstance(partly, InvalidTransition)
    assert "Said otherwise." in str(partly)
    assert (
        str(error_of(502, httpx.Response(502, text="<h1>Bad gateway</h1>"))) == "502 Bad Gateway: <h1>Bad gateway</h1>"
    )


async def test_every_command_of_tasks_and_approvals_has_its_call(client: Client, server: Server, project: str) -> None:
    people = [
        development_token(server.keys_dir, project=project, subject=name, kind="human", roles=["approver", "operator"])
        for name in ("ann", "bo")
    ]
    action = {"tool": "refund", "arguments": {"amount": "12.50"}}
    async with Client(client.url, people[0]) as ann, Client(client.url, people[1]) as bo:
        routed = UUID((await client.route_task("finance", "refund", max_attempts=1)).body["task_id"])
        (task,) = await client.claim_tasks("w", kinds=("finance.refund",))
        lease_id = UUID(task["lease_id"])
        await client.heartbeat(routed, lease_id, lease_seconds=90)
        asked = (await client.request_approval(action, task_id=routed, quorum=Quorum(approve=2))).body
        approval_id, digest = UUID(asked["approval_id"]), asked["request_digest"]
        assert (await client.suspend_task(routed, lease_id, approval_id)).body["state"] == "waiting"
        decided = asyncio.create_task(client.wait_for_decision(approval_id))
        await ann.present(approval_id, "web")
        await ann.vote(approval_id, "approve", digest, reason="looks right")
        await ann.withdraw_vote(approval_id)
        await ann.vote(approval_id, "approve", digest)
        await bo.vote(approval_id, "approve", digest)
        assert (await decided)["state"] == "approved"
        execution_id = uuid4()
        begun = await client.begin_use(approval_id, execution_id, action, audience="gateway")
        assert begun.body["use_token"]
        used = await client.record_outcome(approval_id, execution_id, "ok", result={"id": 9})
        assert used.body["state"] == "executed"
        (task,) = await client.claim_tasks("w", kinds=("finance.refund",))
        assert task["decision"] == "approved"
        assert (await client.fail_task(routed, UUID(task["lease_id"]), "no")).body["state"] == "dead"
        assert [attempt["outcome"] for attempt in await client.list_attempts(routed)] == ["suspended", "failed"]
        assert (await ann.redrive_task(routed, "mended")).body["state"] == "queued"
        assert (await client.cancel_task(routed)).body["state"] == "cancelled"
        started = (await client.submit_task("a.b", start=Start(worker="w"))).body
        done = await client.complete_task(UUID(started["task_id"]), UUID(started["lease_id"]), [1])
        assert (await client.wait_for_task(UUID(started["task_id"])))["result"] == done.body["result"] == [1]

        withdrawn, cancelled, revoked, edited = [
            UUID((await client.request_approval({"tool": "t"}, call_key=str(n))).body["approval_id"]) for n in range(4)
        ]
        assert (await client.withdraw(withdrawn)).body["state"] == "withdrawn"
        assert (await ann.cancel_approval(cancelled)).body["state"] == "cancelled"
        digest = (await client.get_approval(revoked))["request_digest"]
        await ann.vote(revoked, "approve", digest)
        assert (await ann.revoke(revoked)).body["state"] == "revoked"
        later = asyncio.create_task(client.wait_for_decision(edited))
        superseded = (await ann.edit(edited, {"tool": "u"})).body
        instead = UUID(superseded["superseded_by"])
        await bo.vote(instead, "deny", (await client.get_approval(instead))["request_digest"])
        assert ((await later)["approval_id"], (await later)["state"]) == (str(instead), "denied")
    with pytest.raises(TimeoutError):
        await client.wait_for_decision(
            (await client.request_approval({"tool": "t"})).body["approval_id"], timeout_seconds=0.2
        )
    assert [one["state"] async for one in client.list_approvals(order="asc")] == [
        "executed",
        "withdrawn",
        "cancelled",
        "revoked",
        "superseded",
        "denied",
        "pending",
    ]
    assert [one["state"] async for one in client.list_tasks(order="asc")] == ["cancelled", "completed"]
    assert [one async for one in client.list_dead_letters()] == []


# Many commands


async def test_many_commands_are_decided_in_order_across_requests(client: Client, server: Server, project: str) -> None:
    session_id = uuid4()
    commands: list[Command] = [OpenSession(agent_role="support", session_id=session_id)]
    commands += [Record(kind="a.fact", session_id=session_id, body=n) for n in range(1200)]
    commands += [
        ChangeSession(session_id=session_id, status="completed"),
        AnnotateSession(session_id=session_id, text="x"),
    ]
    answers = await client.send(commands)
    assert [answer.command_id for answer in answers] == [command.command_id for command in commands]
    assert [answer.status for answer in answers] == [201] * 1201 + [422, 200]
    assert isinstance(answers[1201].error, InvalidTransition)
    assert [answer.positions for answer in answers] == [[n] for n in range(1, 1204)]
    assert [answer.replayed for answer in await client.send(commands)] == [True] * 1203
    assert facts(server, project) == list(range(1200))


async def test_large_commands_are_split_by_size_and_one_too_large_is_refused_alone(client: Client) -> None:
    sizes = [1_000_000] * 20 + [BATCH_BYTES_MAX] + [10]
    answers = await client.send(Record(kind="a.fact", body="x" * size) for size in sizes)
    assert [answer.status for answer in answers] == [201] * 20 + [413, 201]
    assert isinstance(answers[20].error, BodyTooLarge)
    assert await client.send([]) == []


async def test_the_limit_on_refusals_is_raised_when_waiting_is_over(server: Server, project: str) -> None:
    async with Client(server.url, server.token(project), patience_seconds=0.5) as client:
        refused = [AnnotateSession(session_id=uuid4(), text="x", command_id=f"c{n}") for n in range(3)]
        assert [type(answer.error) for answer in await client.send(refused)] == [NotFound] * 3
        session_id = UUID((await client.open_session("support")).body["session_id"])
        wrong = [ChangeSession(session_id=session_id, status="completed") for _ in range(61)]
        with pytest.raises(RateLimited):
            await client.send(wrong)


# Reading


async def test_what_was_sent_is_read_back(client: Client) -> None:
    opened = await client.open_session("support", labels={"team": "a"}, external_id="mine")
    session_id = UUID(opened.body["session_id"])
    recorded = await client.record("a.fact", session_id=session_id, body={"words": "rare zebra"})
    await client.wait(2)
    assert await client.get_session(session_id) == opened.body
    assert await client.get_record(UUID(recorded.body["record_id"])) == recorded.body
    assert [session["external_id"] async for session in client.list_sessions(label="team:a")] == ["mine"]
    assert [session async for session in client.list_sessions(state="completed")] == []
    assert [record["body"] async for record in client.list_records(session_id=session_id)] == [{"words": "rare zebra"}]
    of_session = [event["type"] async for event in client.session_events(session_id)]
    assert of_session == ["SessionOpened", "FactRecorded"]
    assert [event["position"] async for event in client.search("zebra")] == [2]
    with pytest.raises(NotFound):
        await client.get_session(uuid4())


async def test_a_list_is_read_page_by_page_to_its_end_or_limit(client: Client) -> None:
    await client.send(Record(kind="a.fact", body=n) for n in range(1100))
    await client.wait(1100)
    positions = [event["position"] async for event in client.events()]
    assert positions == list(range(1, 1101))
    assert [event["position"] async for event in client.events(after=1000, limit=3)] == [1001, 1002, 1003]
    assert [event["position"] async for event in client.events(after=1099)] == [1100]
    assert [event async for event in client.events(after=1100)] == []
    assert [event async for event in client.events(limit=0)] == []
    bodies = [record["body"] async for record in client.list_records(limit=450)]
    assert len(bodies) == len(set(bodies)) == 450


async def test_waiting_for_what_never_comes_ends(client: Client) -> None:
    await client.record("a.fact")
    with pytest.raises(ViewBehind):
        await client.wait(1000, timeout_seconds=1.5)


# Servers that come and go


@asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """A TCP server at some address of this machine; its URL."""

    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.close()

    listener = await asyncio.start_server(closing, "127.0.0.1", 0)
    host, port = listener.sockets[0].getsockname()
    try:
        yield f"http://{host}:{port}"
    finally:
        listener.close()


async def request(reader: asyncio.StreamReader) -> bytes:
    """One whole request."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return head + await reader.readexactly(int(length[1]) if length else 0)


async def test_a_connection_cut_after_the_request_was_sent_costs_nothing(server: Server, project: str) -> None:
    cut: Counter[bytes] = Counter()

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = await request(reader)
        body = sent.partition(b"\r\n\r\n")[2]
        upstream, onward = await asyncio.open_connection("127.0.0.1", server.port)
        onward.write(sent.replace(b"Connection: keep-alive", b"Connection: close"))
        answer = await upstream.read()  # so the server has done what was asked
        onward.close()
        cut[body] += 1
        if cut[body] == 1:
            writer.write(answer[: len(answer) // 2])
            writer.transport.abort()
        elif cut[body] == 2:
            writer.transport.abort()
        else:
            writer.write(answer)
            await writer.drain()

    async with listening(proxy) as url, Client(url, server.token(project)) as client:
        answers = await asyncio.gather(*(client.record("a.fact", body=n) for n in range(20)))
        listed = await client.send(Record(kind="a.fact", body=n) for n in range(20, 40))
    assert [answer.body["body"] for answer in answers] == list(range(20))
    assert all(answer.replayed for answer in [*answers, *listed])
    assert all(times == 3 for times in cut.values())
    assert sorted(facts(server, project)) == list(range(40))


async def test_commands_outlive_a_server_that_is_killed_and_started_again(
    postgres: EmbeddedServer, tmp_path: Path, project: str
) -> None:
    with shared_server(postgres, tmp_path) as server:
        await give_while_it_dies(server, project)
        assert sorted(facts(server, project)) == list(range(400))


async def give_while_it_dies(server: Server, project: str) -> None:
    async with Client(server.url, server.token(project), patience_seconds=60) as client:
        first = asyncio.Event()

        async def give(number: int) -> Answer:
            answer = await client.record("a.fact", body=number)
            if number == 5:
                first.set()
            return answer

        async def give_many(lane: int) -> list[Answer]:
            return [await give(number) for number in range(lane, 400, 8)]

        lanes = asyncio.gather(*(give_many(lane) for lane in range(8)))
        await first.wait()
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        answers = [answer for lane in await lanes for answer in lane]
    assert {answer.status for answer in answers} == {201}


async def test_a_server_that_is_not_there_is_said_when_patience_ends() -> None:
    async with Client("http://127.0.0.1:9", "t", patience_seconds=0.3) as client:
        with pytest.raises(StoreUnavailable, match=r"http://127\.0\.0\.1:9 did not answer"):
            await client.open_session("support")


async def test_a_database_that_is_away_for_a_while_only_delays(
    durable_server: EmbeddedServer, tmp_path: Path, project: str
) -> None:
    with Server(database_of(durable_server, "muniment"), tmp_path) as server:
        token = server.token(project)
        async with Client(server.url, token) as client, Client(server.url, token, patience_seconds=0.1) as impatient:
            await client.record("a.fact", body=1)
            await asyncio.to_thread(durable_server.stop)
            with pytest.raises(StoreUnavailable):
                await impatient.record("a.fact", body=2)
            second = asyncio.create_task(client.record("a.fact", body=3))
            await asyncio.to_thread(durable_server.start)
            assert (await second).body["body"] == 3
        assert facts(server, project) == [1, 3]


def scripted(
    *answers: bytes,
) -> tuple[list[bytes], Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]]:
    """A server that gives these answers in turn, and what it was asked."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await request(reader)).partition(b"\r\n\r\n")[2])
        head, _, body = answers[min(len(asked), len(answers)) - 1].partition(b"\n\n")
        length = b"Content-Length: %d\r\n" % len(body)
        writer.write(
            b"HTTP/1.1 " + head.replace(b"\n", b"\r\n") + b"\r\nConnection: close\r\n" + length + b"\r\n" + body
        )
        await writer.drain()

    return asked, serve


BUSY = b'503 Busy\nRetry-After: 0\n\n{"code": "store_unavailable", "title": "", "status": 503, "detail": "Busy"}'
SLOW_DOWN = b'429 Slow\nRetry-After: 0\n\n{"code": "rate_limited", "title": "", "status": 429, "limit": 60}'
DONE = b'200 OK\n\n[{"command_id": "c", "status": 201, "body": {"record_id": "r"}}]'


async def test_busy_and_slow_down_are_tried_again_with_the_same_bytes() -> None:
    asked, serve = scripted(BUSY, SLOW_DOWN, BUSY, DONE)
    async with listening(serve) as url, Client(url, "t") as client:
        answer = await client.record("a.fact")
    assert answer.body == {"record_id": "r"}
    assert len(asked) == 4
    assert len(set(asked)) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 412, 413, 415, 422, 500, 502, 504])
async def test_nothing_else_is_tried_again(status: int) -> None:
    asked, serve = scripted(b"%d Status\nRetry-After: 0\n\nwords" % status, DONE)
    async with listening(serve) as url, Client(url, "t") as client:
        with pytest.raises(Problem, match=f"^{status} Status: words$"):
            await client.record("a.fact")
    assert len(asked) == 1


@pytest.mark.parametrize("when", ["3600", "Fri, 31 Dec 2999 23:59:59 GMT"])
async def test_who_is_asked_to_wait_longer_than_patience_does_not_wait(when: str) -> None:
    asked, serve = scripted(BUSY.replace(b"Retry-After: 0", f"Retry-After: {when}".encode()), DONE)
    async with listening(serve) as url, Client(url, "t", patience_seconds=5) as client:
        with pytest.raises(StoreUnavailable):
            await client.record("a.fact")
    assert len(asked) == 1


async def test_retry_after_is_heeded() -> None:
    asked, serve = scripted(BUSY.replace(b"Retry-After: 0", b"Retry-After: 1"), DONE)
    async with listening(serve) as url, Client(url, "t") as client:
        began = asyncio.get_running_loop().time()
        await client.record("a.fact")
        assert asyncio.get_running_loop().time() - began >= 1
    assert len(asked) == 2


async def test_items_that_could_not_be_decided_are_sent_again_with_all_that_follow() -> None:
    def items(*statuses: int) -> bytes:
        busy = {"code": "store_unavailable", "title": "", "status": 503, "detail": "Busy"}
        listed = [
            {"command_id": "c", "status": s, "positions": [], "body": busy if s == 503 else {}, "replayed": False}
            for s in statuses
        ]
        return b"200 OK\n\n" + msgspec.json.encode(listed)

    asked, serve = scripted(items(201, 503, 404), items(201, 201))
    async with listening(serve) as url, Client(url, "t") as client:
        answers = await client.send(Record(kind="a.fact", body=n) for n in range(3))
    assert [answer.status for answer in answers] == [201, 201, 201]
    assert [[item["body"] for item in msgspec.json.decode(body)] for body in asked] == [[0, 1, 2], [1, 2]]


@pytest.mark.parametrize("said", ["<html>Please log in</html>", "[]", "[1]", "null", "\udcff"])
async def test_an_answer_of_something_else_is_said(said: str) -> None:
    _, serve = scripted(b"200 OK\n\n" + said.encode(errors="surrogateescape"))
    async with listening(serve) as url, Client(url, "t") as client:
        with pytest.raises(Problem, match="is it a Muniment server"):
            await client.record("a.fact")
        with pytest.raises(Problem, match="is it a Muniment server"):
            await client.get_session(uuid4())


async def test_a_token_from_one_line_of_a_file_may_end_in_a_line_break(server: Server, project: str) -> None:
    async with Client(server.url + "/", server.token(project) + "\n") as client:
        assert (await client.open_session("support")).status == 201


# The log


async def test_what_was_recorded_is_proven_a_moment_later(client: Client, server: Server, project: str) -> None:
    recorded = await client.record("note", body={"n": 1})
    position = recorded.positions[0]
    proof = InclusionProof.parse(await client.prove(position))
    keys = [VerifierKey.parse(key["vkey"]) for key in await client.log_keys(project)]
    older = Checkpoint.parse(proof.checkpoint.text)
    await client.record("note", body={"n": 2})
    await client.prove(position + 1)
    newer = check_checkpoint(Note.parse(await client.log_file(project, "checkpoint")), keys)
    hashes = await client.prove_consistency(project, older.size, newer.size)
    check_consistency(older.size, older.root, newer.size, newer.root, hashes)
    async with Client(server.url, server.token(project, roles=["auditor"])) as auditor:
        bundle = await auditor.log_file(project, f"tile/entries/000.p/{position}")
    entry = bundle[2 : 2 + int.from_bytes(bundle[:2])]
    proven, signed = verify_proof(str(proof).encode(), entry, Trust(keys))
    assert (proven, signed.checkpoint) == (position, older)
    with pytest.raises(NotFound):
        await client.log_file(project, "tile/0/0")
    with pytest.raises(NotFound):
        await client.log_file("another", "checkpoint")
