"""Work from the worker's side, against a real server: kept over its lease, lost, drained, broken off."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

from api.auth import development_token
from api.client import Client
from api.work import Assignment, Work
from ledger.embedded import EmbeddedServer
from ledger.errors import LeaseLost, Unauthenticated
from tests.check import of_type
from tests.server import Server, history, new_project, shared_server

LEASE_SECONDS = 1


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


def work_of(client: Client, concurrency: int = 1, lease_seconds: int = LEASE_SECONDS) -> Work:
    return client.work(["mail.send"], "mailer-1", concurrency=concurrency, lease_seconds=lease_seconds)


async def submitted(client: Client, *payloads: Any, **fields: Any) -> list[UUID]:
    answers = [await client.submit_task("mail.send", payload=payload, **fields) for payload in payloads]
    return [UUID(answer.body["task_id"]) for answer in answers]


async def leases_run_out(client: Client, leases: int) -> None:
    """Return when so many leases, as short as those of the work here, began and were lost, one after the other."""
    for _ in range(leases):
        lost = await client.submit_task("nobody.keeps-it", max_attempts=1)
        await client.claim_tasks("w", kinds=("nobody.keeps-it",), lease_seconds=LEASE_SECONDS)
        assert (await client.wait_for_task(lost.body["task_id"]))["state"] == "dead"


async def test_tasks_come_one_after_the_other_and_their_results_are_recorded(client: Client) -> None:
    first, second = await submitted(client, {"to": "a"}, {"to": "b"})
    work = work_of(client, lease_seconds=60)
    async for task in work:
        async with task:
            assert (await client.get_task(task.task_id))["worker"] == "mailer-1"
            await task.complete({"sent": task.payload["to"]})
        if task.task_id == second:
            work.drain()
    assert [(await client.wait_for_task(task_id))["result"] for task_id in (first, second)] == [
        {"sent": "a"},
        {"sent": "b"},
    ]


async def test_who_waits_for_work_is_given_it_when_it_comes(client: Client) -> None:
    work = work_of(client)
    tasks = aiter(work)
    coming = asyncio.ensure_future(anext(tasks))
    await client.claim_tasks("w", kinds=("nothing.of-this",))
    (task_id,) = await submitted(client, 1)
    task = await coming
    assert (task.task_id, task.kind, task.payload, task.attempt) == (task_id, "mail.send", 1, 1)
    await task.complete()


async def test_a_task_that_takes_longer_than_its_lease_is_kept(client: Client, server: Server, project: str) -> None:
    (task_id,) = await submitted(client, 1)
    work = work_of(client)
    async for task in work:
        async with task:
            await leases_run_out(client, 2)
            assert (await task.complete("done")).body["attempt"] == 1
        work.drain()
    assert task_id not in {event.stream_id for event in of_type(history(server, project), "AttemptLost")}


async def test_who_has_lost_a_task_is_stopped_and_goes_on_with_the_next(client: Client) -> None:
    await submitted(client, "first", "second")
    work, seen = work_of(client), []
    async for task in work:
        async with task:
            seen.append(task)
            if task.payload == "first":
                await client.cancel_task(task.task_id)
                await asyncio.get_running_loop().create_future()
            await task.complete()
            work.drain()
    assert [task.payload for task in seen] == ["first", "second"]
    assert isinstance(seen[0].lost, LeaseLost)
    assert seen[1].lost is None


async def test_whose_result_comes_too_late_is_told(client: Client, server: Server, project: str) -> None:
    await submitted(client, "first", "second")
    work, lost = work_of(client, lease_seconds=60), []
    async for task in work:
        if task.payload == "first":
            await client.cancel_task(task.task_id)
            with pytest.raises(LeaseLost):
                await task.complete("too late")
            lost.append(task.lost)
            continue
        async with task:
            await client.cancel_task(task.task_id)
            work.drain()
            await task.complete("too late as well")
            pytest.fail("it goes on behind the block")
        lost.append(task.lost)
    assert [type(error) for error in lost] == [LeaseLost] * 2
    assert [event.data.result for event in of_type(history(server, project), "LateResultRefused")] == [
        "too late",
        "too late as well",
    ]


@pytest.mark.parametrize("waits", [True, False])
async def test_who_begins_with_a_task_that_is_lost_already_does_not_go_far(client: Client, waits: bool) -> None:
    await submitted(client, 1)
    tasks = aiter(work_of(client))
    task = await anext(tasks)
    await client.cancel_task(task.task_id)
    await asyncio.wait([task.held])
    async with task:
        if waits:
            await asyncio.get_running_loop().create_future()
    await asyncio.sleep(0)  # nothing is left of it behind the block
    assert isinstance(task.lost, LeaseLost)


async def test_who_is_cancelled_by_others_is_cancelled(client: Client) -> None:
    await submitted(client, 1)
    begun = asyncio.Event()

    async def do() -> None:
        async for task in work_of(client, lease_seconds=60):
            async with task:
                begun.set()
                await asyncio.get_running_loop().create_future()

    doing = asyncio.create_task(do())
    await begun.wait()
    doing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await doing
    (task,) = [task async for task in client.list_tasks()]
    (attempt,) = await client.list_attempts(task["task_id"])
    assert (task["state"], attempt["outcome"], attempt["error"]) == ("retrying", "failed", "CancelledError")


async def test_an_error_fails_the_attempt_and_is_raised(client: Client) -> None:
    (task_id,) = await submitted(client, 1, max_attempts=1)

    async def do() -> None:
        async for task in work_of(client, lease_seconds=60):
            async with task:
                raise ValueError("Mia's address is wrong")

    with pytest.raises(ValueError, match="Mia"):
        await do()
    assert (await client.wait_for_task(task_id))["state"] == "dead"
    assert [attempt["error"] for attempt in await client.list_attempts(task_id)] == ["ValueError"]


async def test_who_cannot_reach_the_server_stops_when_the_lease_has_run_out(
    postgres: EmbeddedServer, tmp_path: Path, project: str
) -> None:
    with shared_server(postgres, tmp_path) as server:
        async with Client(server.url, server.token(project)) as client:
            await submitted(client, 1)
            tasks = aiter(work_of(client))
            task = await anext(tasks)
            async with task:
                await asyncio.to_thread(server.kill)
                await asyncio.get_running_loop().create_future()
            assert task.lost is not None
            assert task.held.done()


async def test_who_may_not_work_is_told(server: Server, client: Client) -> None:
    async with Client(server.url, "no token") as stranger:
        with pytest.raises(Unauthenticated):
            await anext(aiter(work_of(stranger)))


# Ending


async def test_who_drains_finishes_what_is_in_hand_and_takes_nothing_more(client: Client) -> None:
    await submitted(client, 1, 2, 3)
    work, in_hand = work_of(client, 2), []
    drained = asyncio.Event()

    async def do(task: Assignment) -> None:
        async with task:
            await drained.wait()
            await leases_run_out(client, 1)
            await task.complete()

    async with asyncio.TaskGroup() as group:
        async for task in work:
            in_hand.append(group.create_task(do(task)))
            if len(in_hand) == 2:
                work.drain()
                drained.set()
    states = [task["state"] async for task in client.list_tasks(kind="mail.send", order="asc")]
    assert states == ["completed", "completed", "queued"]


async def test_who_drains_while_waiting_for_work_ends_at_once(client: Client) -> None:
    work = work_of(client)
    ended = asyncio.ensure_future(anext(aiter(work), None))
    await client.claim_tasks("w", kinds=("nothing.of-this",))
    async with asyncio.timeout(10):
        work.drain()
        assert await ended is None


async def test_sigterm_drains_all_work_of_the_process(client: Client) -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    await submitted(client, 1, 2)

    async def do(work: Work, signals: bool) -> int:
        done = 0
        async for task in work:
            async with task:
                if signals:
                    os.kill(os.getpid(), signal.SIGTERM)
                await task.complete()
                done += 1
        return done

    one, other = work_of(client), client.work(["other.kind"], "w")
    assert tuple(await asyncio.gather(do(one, True), do(other, False))) == (1, 0)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


async def test_who_breaks_off_gives_back_what_was_not_begun(client: Client) -> None:
    tasks = await submitted(client, 1, 2, 3, max_attempts=1)
    async with aclosing(aiter(work_of(client, 3, lease_seconds=60))) as handed:  # type: ignore[type-var]
        first = await anext(handed)
    assert first.held.cancelling()
    await first.complete()
    assert [(await client.wait_for_task(task_id))["state"] for task_id in tasks] == ["completed", "dead", "dead"]


# Waiting for people


async def test_a_task_that_waits_for_an_approval_comes_again_with_the_decision(
    client: Client, server: Server, project: str
) -> None:
    human = development_token(server.keys_dir, project=project, subject="ann", kind="human", roles=["approver"])
    await submitted(client, {"amount": 12})
    work, decisions = work_of(client, lease_seconds=60), []
    async with Client(server.url, human) as ann:
        async for task in work:
            decisions.append((task.attempt, task.decision))
            if task.decision is None:
                asked = await client.request_approval({"tool": "refund"}, task_id=task.task_id)
                await task.suspend(asked.body["approval_id"])
                await ann.vote(asked.body["approval_id"], "approve", asked.body["request_digest"])
            else:
                await task.complete()
                work.drain()
    assert decisions == [(1, None), (1, "approved")]


# Who has gone away


async def test_who_hangs_up_while_waiting_takes_no_work(client: Client, server: Server, project: str) -> None:
    headers = {"Authorization": f"Bearer {server.token(project)}"}
    body = {"worker": "gone", "kinds": ["mail.send"]}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, trust_env=False) as other:
        for _ in range(3):
            waits = asyncio.create_task(other.post("/tasks/claim", params={"wait_seconds": 60}, json=body))
            await client.claim_tasks("w", kinds=("nothing.of-this",))
            waits.cancel()
            await asyncio.wait([waits])
    await submitted(client, 1)
    (task,) = await client.claim_tasks("still-here", kinds=("mail.send",), wait_seconds=10)
    assert (await client.get_task(task["task_id"]))["worker"] == "still-here"
