"""Agents that work as agents do, from a session's opening to its close, each with a person who decides. A program of
the bench.

Told: port, keys, url, project, agents, seconds, `what`. `work`: each agent does one piece of work after the other,
without a pause; what it measured is of the kind of call that was the slowest, what each took is said on the way, and
afterwards everything that was acknowledged is looked for in the ledger. `decision`: each agent waits for the answer to
a request of its own, one of them is decided now and then; how long from sending the vote until that agent has it.
"""

import asyncio
import sys
import time
from collections import defaultdict, deque
from contextlib import AsyncExitStack
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID

import uvloop
from uuid_utils.compat import uuid7

from api.auth import DEVELOPMENT_ISSUER, Kind, development_token
from ledger import store
from ledger.postgres import Connection, open_pool
from ledger.replay import fold_all
from ops.bench.caller import Caller, connect
from ops.bench.committing import summary
from ops.bench.stage import answer, told, wait_for_word

KIND = "booking.change"
ACTION = {
    "tool": "change_flight",
    "arguments": {"reservation_id": "NO6JO3", "payment": {"amount": "114.00", "currency": "USD"}},
    "target": "booking/NO6JO3",
}
SUMMARY = "Change the flight to the day after, and charge the difference to the card of the booking."
WAIT_SECONDS = 20
DECIDED_EVERY_SECONDS = 0.02
LOOKED_FOR_AT_ONCE = 1000

Json = dict[str, Any]


class Log:
    """What was acknowledged, and how long each kind of call took."""

    def __init__(self) -> None:
        self.taken_ms: defaultdict[str, list[float]] = defaultdict(list)
        self.commands: dict[tuple[str, str], int] = {}
        """By principal and command id: the status of the answer."""
        self.ends_as: dict[UUID, str] = {}
        """By stream: the state that it was last said to be in."""


class Somebody:
    """An agent, or who decides for it: a principal with a connection."""

    def __init__(self, caller: Caller, sub: str, log: Log) -> None:
        self._caller, self._principal, self._log = caller, f"{DEVELOPMENT_ISSUER}#{sub}", log

    async def command(self, call: str, method: str, path: str, **said: Any) -> Json:
        command_id = str(uuid7())
        begun = time.perf_counter()
        said_back: Json = await self._caller.ask(method, path, {"command_id": command_id, **said})
        self._log.taken_ms[call].append((time.perf_counter() - begun) * 1000)
        self._log.commands[self._principal, command_id] = 201 if call in CREATING else 200
        return said_back

    async def changed(self, approval: Json) -> Json:
        """The approval, once it is not as it was."""
        path = f"/approvals/{approval['approval_id']}?wait_seconds={WAIT_SECONDS}"
        while True:
            now: Json | None = await self._caller.ask("GET", path, known=f'"{approval["version"]}"')
            if now is not None:
                return now


CREATING = ("open", "submit", "request")


class Pair(Somebody):
    """An agent, and who decides what it asks for."""

    def __init__(self, caller: Caller, sub: str, log: Log, approver: Somebody) -> None:
        super().__init__(caller, sub, log)
        self._approver = approver

    async def request(self, **of: Any) -> Json:
        return await self.command("request", "POST", "/approvals", action=ACTION, summary=SUMMARY, **of)

    async def vote(self, approval: Json) -> None:
        path = f"/approvals/{approval['approval_id']}/votes"
        await self._approver.command("vote", "POST", path, verdict="approve", digest_seen=approval["request_digest"])

    async def work(self) -> None:
        """One piece of work, from beginning to end. Raises ValueError where anything is not as it should be."""
        session_id, task_id = uuid7(), uuid7()
        session, task = f"/sessions/{session_id}", f"/tasks/{task_id}"
        await self.command("open", "POST", "/sessions", session_id=session_id, agent_role="airline-support")
        await self.command("activate", "PUT", session, status="active")
        await self.command("submit", "POST", "/tasks", task_id=task_id, session_id=session_id, kind=KIND)
        claim = {"worker": "bench", "kinds": [KIND], "session_id": session_id}
        (mine,) = (await self.command("claim", "POST", "/tasks/claim", **claim))["tasks"]
        if mine["task_id"] != str(task_id):
            raise ValueError(f"{mine['task_id']} is of another session")
        asked = await self.request(session_id=session_id, task_id=task_id)
        decided, _ = await asyncio.gather(self.changed(asked), self.vote(asked))
        if decided["state"] != "approved":
            raise ValueError(f"It is {decided['state']}, not approved")
        uses, execution_id = f"/approvals/{asked['approval_id']}/uses", uuid7()
        await self.command("use", "POST", uses, execution_id=execution_id, action=ACTION)
        used = await self.command("outcome", "POST", f"{uses}/{execution_id}/outcome", outcome="ok")
        done = await self.command("complete", "POST", f"{task}/complete", lease_id=mine["lease_id"])
        closed = await self.command("close", "PUT", session, status="completed")
        ends = {session_id: closed["state"], task_id: done["state"], UUID(asked["approval_id"]): used["state"]}
        if list(ends.values()) != ["completed", "completed", "executed"]:
            raise ValueError(f"It ended otherwise: {ends}")
        self._log.ends_as |= ends


async def gathered(ends: AsyncExitStack, port: int, keys: str, project: str, agents: int, log: Log) -> list[Pair]:
    async def connected(sub: str, kind: Kind, role: str) -> Caller:
        token = development_token(Path(keys), project=project, subject=sub, kind=kind, roles=(role,))
        caller = await connect(port, token)
        ends.callback(caller.close)
        return caller

    pairs = []
    for number in range(agents):
        agent, person = f"agent-{number}", f"person-{number}"
        approver = Somebody(await connected(person, "human", "approver"), person, log)
        pairs.append(Pair(await connected(agent, "agent", "agent"), agent, log, approver))
    return pairs


async def work(pairs: list[Pair], seconds: float) -> None:
    """Each one piece of work at least."""

    async def go_on(pair: Pair) -> None:
        await pair.work()
        while time.perf_counter() < until:
            await pair.work()

    until = time.perf_counter() + seconds
    await asyncio.gather(*map(go_on, pairs))


async def decide(pairs: list[Pair], seconds: float) -> list[float]:
    """How long each agent that waited had to wait from its vote's sending on, in ms."""
    waiting: deque[tuple[Pair, Json, asyncio.Task[float]]] = deque()

    async def wait(pair: Pair, asked: Json) -> float:
        await pair.changed(asked)
        return time.perf_counter()

    async def ask(pair: Pair) -> None:
        asked = await pair.request()
        waiting.append((pair, asked, asyncio.create_task(wait(pair, asked))))

    for pair in pairs:
        await ask(pair)
    taken_ms: list[float] = []
    begun = time.perf_counter()
    for number in range(int(seconds / DECIDED_EVERY_SECONDS)):
        await asyncio.sleep(begun + number * DECIDED_EVERY_SECONDS - time.perf_counter())
        pair, asked, answered = waiting.popleft()
        sent = time.perf_counter()
        await pair.vote(asked)
        taken_ms.append((await answered - sent) * 1000)
        await ask(pair)
    for pair, asked, answered in waiting:
        await pair.vote(asked)
        await answered
    return taken_ms


async def look_for(connection: Connection, ledger_id: UUID, log: Log) -> None:
    """Raises ValueError for what was acknowledged and is not in the ledger as it was said."""
    commands, streams = iter(log.commands.items()), iter(log.ends_as.items())
    while some := dict(islice(commands, LOOKED_FOR_AT_ONCE)):
        found = await store.find_commands(connection, ledger_id, list(some))
        for key, status in some.items():
            if key not in found or found[key].status != status:
                raise ValueError(f"{key} was answered with {status}, and the ledger has {found.get(key)}")
    while ends := dict(islice(streams, LOOKED_FOR_AT_ONCE)):
        states = fold_all(await store.read_streams(connection, ledger_id, ends))
        for stream_id, state in ends.items():
            if stream_id not in states or states[stream_id].state != state:
                raise ValueError(f"{stream_id} was said to be {state}, and is {states.get(stream_id)}")


async def main(port: int, keys: str, url: str, project: str, agents: int, seconds: float, what: str) -> None:
    log = Log()
    async with AsyncExitStack() as ends, open_pool(url, 1) as pool, pool.connection() as connection:
        pairs = await gathered(ends, port, keys, project, agents, log)
        await work(pairs, 0)
        log.taken_ms.clear()
        before = len(log.commands)
        wait_for_word()
        begun = time.perf_counter()
        if what == "work":
            await work(pairs, seconds)
        else:
            decided_ms = await decide(pairs, seconds)
        took = time.perf_counter() - begun
        ledger = await store.find_ledger(connection, project)
        assert ledger is not None
        await look_for(connection, ledger.ledger_id, log)
    if what == "decision":
        answer(**summary(decided_ms, took), sent=len(decided_ms))
        return
    measured = {call: summary(taken_ms, took) for call, taken_ms in log.taken_ms.items()}
    for call, figures in measured.items():
        told_apart = f"p50 {figures['p50_ms']:.1f} ms, p99 {figures['p99_ms']:.1f} ms"
        print(f"    {call}: {told_apart}", file=sys.stderr, flush=True)
    slowest = max(measured.values(), key=lambda figures: figures["p99_ms"])
    answer(**slowest | {"count": len(log.commands) - before}, sent=len(log.commands))


if __name__ == "__main__":
    uvloop.run(main(**told()))
