"""Tasks that do nothing, submitted and worked on by many at once, one a call. A program of the bench.

Told: project, submitters, workers, jobs, `what`, and `by`: `http` (with port and token), `client` (the Python client,
with the same) or `committer` (in this process, with url and keys). What: `submit`, nobody works; `all`, from the first
submitted to the last completed, while as many work as are told; `idle`, how long it takes from sending a task until one
of the workers, who all wait for one, has it.
"""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Protocol
from uuid import UUID

import uvloop
from uuid_utils.compat import uuid7

from api.client import Client
from api.line import Line
from ledger import store
from ledger.commands import ClaimTasks, CompleteTask, SubmitTask
from ledger.known import offer
from ops.bench import mix
from ops.bench.caller import Caller, connect
from ops.bench.committing import committing, summary
from ops.bench.stage import answer, told, wait_for_word

KIND = "nothing"
PAYLOAD = {"reservation_id": "NO6JO3", "passengers": 2}
WAIT_SECONDS = 20
SUBMITTED_EVERY_SECONDS = 0.02
WARM_UP_JOBS = 200


class Handed:
    """What was handed out to the workers, and when all that is expected is done. `at`: when one had it."""

    def __init__(self) -> None:
        self.at: dict[UUID, float] = {}
        self.all = asyncio.Event()
        self._left = 0

    def expect(self, tasks: int) -> None:
        self._left = tasks
        self.all.clear()

    def take(self, task_id: UUID) -> None:
        """Raises ValueError if somebody has it already."""
        if task_id in self.at:
            raise ValueError(f"{task_id} was leased twice")
        self.at[task_id] = time.perf_counter()

    def done(self) -> None:
        self._left -= 1
        if not self._left:
            self.all.set()


class Hands(Protocol):
    """Who submits a task, or works until it is cancelled."""

    async def submit(self, task_id: UUID) -> None: ...
    async def work(self, handed: Handed) -> None: ...


class HttpHands:
    """Over a connection of their own."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def submit(self, task_id: UUID) -> None:
        said = {"command_id": str(uuid7()), "task_id": task_id, "kind": KIND, "payload": PAYLOAD}
        await self._caller.ask("POST", "/tasks", said)

    async def work(self, handed: Handed) -> None:
        while True:
            said: dict[str, Any] = {"command_id": str(uuid7()), "worker": "bench", "kinds": [KIND]}
            claimed = await self._caller.ask("POST", f"/tasks/claim?wait_seconds={WAIT_SECONDS}", said)
            for task in claimed["tasks"]:
                handed.take(UUID(task["task_id"]))
                said = {"command_id": str(uuid7()), "lease_id": task["lease_id"]}
                await self._caller.ask("POST", f"/tasks/{task['task_id']}/complete", said)
                handed.done()


class ClientHands:
    """By a Python client of their own, as if each were a process."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def submit(self, task_id: UUID) -> None:
        await self._client.command(SubmitTask(task_id=task_id, kind=KIND, payload=PAYLOAD))

    async def work(self, handed: Handed) -> None:
        async for task in self._client.work(kinds=[KIND], worker="bench"):
            handed.take(task.task_id)
            await task.complete()
            handed.done()


class CommitterHands:
    """In this process; who finds nothing waits in line, as over HTTP."""

    def __init__(self, submit: Callable[[Any], Awaitable[Any]], line: Line, ledger_id: UUID) -> None:
        self._submit, self._line, self._ledger_id = submit, line, ledger_id

    async def submit(self, task_id: UUID) -> None:
        await self._submit(SubmitTask(task_id=task_id, kind=KIND, payload=PAYLOAD))

    async def work(self, handed: Handed) -> None:
        loop = asyncio.get_running_loop()
        never: asyncio.Future[None] = loop.create_future()
        wanted = offer(_claim())
        while True:
            claimed = await self._submit(_claim())
            for task in claimed.state:
                handed.take(task.task_id)
                await self._submit(CompleteTask(task_id=task.task_id, lease_id=task.lease_id))
                handed.done()
            if not claimed.state:
                async with self._line.turn(self._ledger_id, wanted, 1, loop.time() + WAIT_SECONDS, never):
                    pass


def _claim() -> ClaimTasks:
    return ClaimTasks(worker="bench", kinds=(KIND,))


# Who takes part

Crew = Callable[[], Awaitable[Hands]]


@asynccontextmanager
async def by_http(port: int, token: str, **_: Any) -> AsyncIterator[Crew]:
    async def hands() -> Hands:
        caller = await connect(port, token)
        ends.callback(caller.close)
        return HttpHands(caller)

    async with AsyncExitStack() as ends:
        yield hands


@asynccontextmanager
async def by_client(port: int, token: str, **_: Any) -> AsyncIterator[Crew]:
    async def hands() -> Hands:
        return ClientHands(await ends.enter_async_context(Client(f"http://127.0.0.1:{port}", token)))

    async with AsyncExitStack() as ends:
        yield hands


@asynccontextmanager
async def by_committer(url: str, keys: str, project: str, **_: Any) -> AsyncIterator[Crew]:
    async def submit(command: Any) -> Any:
        receipt = await committer.submit(project, command, mix.AGENT)
        if receipt.refusal is not None:
            raise receipt.refusal
        return receipt

    async def hands() -> Hands:
        return CommitterHands(submit, line, ledger.ledger_id)

    async with committing(url, keys) as committer:
        async with committer.pool.connection() as connection:
            ledger = await store.create_ledger(connection, project)
        line = Line(committer)
        yield hands
        await line.closed()


BY: dict[str, Callable[..., AbstractAsyncContextManager[Crew]]] = {
    "http": by_http,
    "client": by_client,
    "committer": by_committer,
}

# What is measured


@asynccontextmanager
async def at_work(workers: list[Hands]) -> AsyncIterator[Handed]:
    """They all work, or wait for work, until the end of the context."""
    handed = Handed()
    async with asyncio.TaskGroup() as group:
        working = [group.create_task(hands.work(handed)) for hands in workers]
        yield handed
        for one in working:
            one.cancel()


async def submit(submitters: list[Hands], jobs: int) -> list[float]:
    """How long each took, in ms."""
    taken_ms: list[float] = []

    async def call(hands: Hands) -> None:
        for _ in left:
            begun = time.perf_counter()
            await hands.submit(uuid7())
            taken_ms.append((time.perf_counter() - begun) * 1000)

    left = iter(range(jobs))
    await asyncio.gather(*map(call, submitters))
    return taken_ms


async def complete(submitters: list[Hands], handed: Handed, jobs: int) -> list[float]:
    """How long each took to be submitted, in ms; all are completed."""
    handed.expect(jobs)
    taken_ms = await submit(submitters, jobs)
    await handed.all.wait()
    return taken_ms


async def trickle(submitters: list[Hands], handed: Handed, jobs: int) -> list[float]:
    """How long each took from being sent until a worker had it, in ms, when they come so slowly that all wait."""
    sent_at: dict[UUID, float] = {}
    begun = time.perf_counter()
    handed.expect(jobs)
    for number in range(jobs):
        await asyncio.sleep(begun + number * SUBMITTED_EVERY_SECONDS - time.perf_counter())
        task_id = uuid7()
        sent_at[task_id] = time.perf_counter()
        await submitters[number % len(submitters)].submit(task_id)
    await handed.all.wait()
    return [(handed.at[task_id] - sent) * 1000 for task_id, sent in sent_at.items()]


async def main(by: str, what: str, submitters: int, workers: int, jobs: int, **told: Any) -> None:
    async with BY[by](**told) as crew:
        submitting = [await crew() for _ in range(submitters)]
        async with at_work([await crew() for _ in range(workers)]) as handed:
            warmed_up = min(WARM_UP_JOBS, jobs)
            await (complete(submitting, handed, warmed_up) if workers else submit(submitting, warmed_up))
            gc.collect()
            gc.freeze()
            wait_for_word()
            begun, worked = time.perf_counter(), time.process_time()
            if what == "submit":
                taken_ms = await submit(submitting, jobs)
            elif what == "all":
                taken_ms = await complete(submitting, handed, jobs)
            else:
                taken_ms = await trickle(submitting, handed, jobs)
            took, worked = time.perf_counter() - begun, time.process_time() - worked
    p95_ms = sorted(taken_ms)[int(len(taken_ms) * 0.95)]
    answer(**summary(taken_ms, took), p95_ms=p95_ms, cpu_seconds=worked, sent=jobs + warmed_up)


if __name__ == "__main__":
    uvloop.run(main(**told()))
