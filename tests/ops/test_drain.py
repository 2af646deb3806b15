"""A process is told to end while others use it: what balances the load goes elsewhere, and nobody's answer is lost."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
from uuid_utils.compat import uuid7

from ops.serve import STOP_SECONDS
from tests.conftest import Database
from tests.server import Server, history

DRAIN_SECONDS = 2
SENDERS = 12


@pytest.fixture
def servers(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Server]]:
    """Two API processes over one database, with the same keys."""
    monkeypatch.setenv("DRAIN_SECONDS", str(DRAIN_SECONDS))
    with Server(database, tmp_path) as one, Server(database, tmp_path) as other:
        yield [one, other]


class Balancer:
    """Spreads senders over servers, as what balances connections does: who is connected stays where it is; who is not
    goes to a server that is ready by its probe."""

    def __init__(self, servers: list[Server]) -> None:
        self.ready = list(servers)
        self.acknowledged: list[str] = []
        self.by: Counter[Server] = Counter()
        self._servers = servers
        self._headers = {"Authorization": f"Bearer {servers[0].token('demo')}"}

    async def probe(self) -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            while True:
                for server in self._servers:
                    try:
                        ready = (await client.get(f"{server.url}/health/ready")).status_code == 200
                    except httpx.TransportError:
                        ready = False
                    if ready != (server in self.ready):
                        (self.ready.append if ready else self.ready.remove)(server)
                await asyncio.sleep(DRAIN_SECONDS / 20)

    async def send(self, number: int) -> None:
        """Send command after command for ever; raises what a sender sees whose answer is lost."""
        while True:
            server = self.ready[number % len(self.ready)]
            async with httpx.AsyncClient(base_url=server.url, headers=self._headers, trust_env=False) as client:
                kept = True
                while kept:
                    command_id = str(uuid7())
                    sent = {"kind": "note", "command_id": command_id}
                    answer = await client.post("/records", json=sent)
                    assert answer.status_code == 201, answer.text
                    self.acknowledged.append(command_id)
                    self.by[server] += 1
                    kept = answer.headers.get("connection") != "close"

    async def until(self, more: int, *servers: Server) -> None:
        """Return when so many more commands were acknowledged by each of these."""
        wanted = {server: self.by[server] + more for server in servers}
        await until(lambda: all(self.by[server] >= wanted[server] for server in servers))


@asynccontextmanager
async def under_load(servers: list[Server]) -> AsyncIterator[Balancer]:
    """Senders at work; the first whose answer is lost ends the test."""
    balancer = Balancer(servers)
    async with asyncio.TaskGroup() as group:
        jobs = [group.create_task(balancer.probe()), *(group.create_task(balancer.send(n)) for n in range(SENDERS))]
        await balancer.until(20, *servers)
        yield balancer
        for job in jobs:
            job.cancel()


async def until(fact: Callable[[], bool]) -> None:
    while True:
        if fact():
            return
        await asyncio.sleep(0.01)


async def ended(server: Server) -> int:
    return await asyncio.to_thread(server.processes[0].wait)


async def test_of_two_one_ends_and_no_answer_is_lost(servers: list[Server]) -> None:
    one, other = servers
    async with under_load(servers) as balancer:
        told_at = time.monotonic()
        # To its whole group, as some supervisors do: its own child is told twice then, and drains no less for it.
        os.killpg(one.processes[0].pid, signal.SIGTERM)
        assert await ended(one) == 0
        took = time.monotonic() - told_at
        before = balancer.by[one]
        await balancer.until(50, other)
        assert balancer.by[one] == before
    assert DRAIN_SECONDS <= took < DRAIN_SECONDS + STOP_SECONDS
    recorded = [one.event.command_id for one in history(other, "demo")]
    # Who was cancelled at the end of this test never heard of its last command.
    assert not set(balancer.acknowledged) - set(recorded)
    assert len(set(recorded)) == len(recorded)


async def test_while_it_drains_it_is_alive_but_not_ready_and_takes_commands(servers: list[Server]) -> None:
    server = servers[0]
    headers = {"Authorization": f"Bearer {server.token('demo')}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, trust_env=False, timeout=70) as client:
        session = await client.post("/sessions", json={"agent_role": "x"})
        assert "connection" not in session.headers
        path, seen = session.headers["location"], {"If-None-Match": '"1"'}
        waits = asyncio.create_task(client.get(path, params={"wait_seconds": 60}, headers=seen))
        server.processes[0].terminate()
        while (ready := await client.get("/health/ready")).status_code == 200:
            pass
        assert (ready.status_code, ready.json()) == (503, {"status": "unready"})
        for path in ("/health/live", "/nowhere"):
            answer = await client.get(path)
            assert (answer.status_code, answer.headers["connection"]) == (200 if "live" in path else 404, "close")
        answer = await client.post("/records", json={"kind": "note"})
        assert (answer.status_code, answer.headers["connection"]) == (201, "close")
        assert not waits.done()
        assert (await waits).status_code == 304
        assert await ended(server) == 0
        with pytest.raises(httpx.ConnectError):
            await client.get("/health/live")


async def test_who_sends_on_to_one_that_ends_finds_everything_once_when_it_is_back(
    database: Database, tmp_path: Path
) -> None:
    """Nobody balances here, and no time is given: some are cut off, and send the same command again."""
    with Server(database, tmp_path) as server:
        headers = {"Authorization": f"Bearer {server.token('demo')}"}
        sent: list[str] = []
        acknowledged: list[str] = []

        async def send(command_id: str, client: httpx.AsyncClient) -> None:
            answer = await client.post("/records", json={"kind": "note", "command_id": command_id})
            assert answer.status_code in (200, 201), answer.text
            acknowledged.append(command_id)

        async def send_until_it_is_gone() -> None:
            async with httpx.AsyncClient(base_url=server.url, headers=headers, trust_env=False) as client:
                with suppress(httpx.TransportError):
                    while True:
                        sent.append(str(uuid7()))
                        await send(sent[-1], client)

        sending = [asyncio.create_task(send_until_it_is_gone()) for _ in range(SENDERS)]
        await until(lambda: len(acknowledged) >= 100)
        assert await asyncio.to_thread(server.stop) == [0]
        await asyncio.gather(*sending)
        assert not set(acknowledged) - {recorded.event.command_id for recorded in history(server, "demo")}
        server.kill()
        await asyncio.to_thread(server.start)
        unheard = set(sent) - set(acknowledged)
        assert len(unheard) == SENDERS
        async with httpx.AsyncClient(base_url=server.url, headers=headers, trust_env=False) as client:
            for command_id in unheard:
                await send(command_id, client)
        assert Counter(recorded.event.command_id for recorded in history(server, "demo")) == Counter(sent)


async def test_ctrl_c_which_all_its_processes_hear_ends_it_as_well(database: Database, tmp_path: Path) -> None:
    with Server(database, tmp_path) as server:
        os.killpg(server.processes[0].pid, signal.SIGINT)
        assert await ended(server) == 0
