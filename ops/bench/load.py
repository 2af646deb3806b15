"""64 connections that each send the next request when the last was answered. A program of the bench.

Told: port, token, connections, seconds, and what: nothing | commands | sessions | batches; or `again` or `once`,
and the file of requests that are sent for that long, or all of them once. Requests are made before the clock
starts, and answers only looked at as far as needed to know that they are right: the less this does, the less
it takes from the server beside it.
"""

import asyncio
import gc
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ops.bench import mix
from ops.bench.committing import WARM_UP_SECONDS, summary
from ops.bench.stage import answer, told, wait_for_word

BATCH_COMMANDS = 100


class Connection(asyncio.Protocol):
    """One keep-alive HTTP/1.1 connection (RFC 9112) whose answers all have a Content-Length."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self._unit: Iterator[bytes] = iter(())
        self._received = b""
        self._sent_at = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send_next(self) -> None:
        assert self.run is not None
        assert self._transport is not None
        self._sent_at = time.perf_counter()
        request = self._next_request() if self._sent_at < self.run.until else None
        if request is None:
            self.run.connection_done()
        else:
            self._transport.write(request)

    def _next_request(self) -> bytes | None:
        """The next of its unit, else the first of another; a unit begun in one run goes on in the next."""
        assert self.run is not None
        request = next(self._unit, None)
        if request is None:
            self._unit = iter(next(self.run.supply, ()))
            request = next(self._unit, None)
        return request

    def data_received(self, data: bytes) -> None:
        received = self._received = self._received + data if self._received else data
        head_end = received.find(b"\r\n\r\n")
        if head_end < 0:
            return
        at = received.find(b"ontent-length: ", 0, head_end)
        length = int(received[at + 15 : received.find(b"\r\n", at)]) if at > 0 else 0
        if len(received) < head_end + 4 + length:
            return
        self._received = b""
        assert self.run is not None
        self.run.answered(received, time.perf_counter() - self._sent_at)
        self.send_next()

    def connection_lost(self, error: Exception | None) -> None:
        if self.run is not None:
            self.run.fail(error or ConnectionError("the server closed a connection"))


class Run:
    """One stretch of time, on all connections; a unit of requests stays on one, which sends it in order."""

    def __init__(self, supply: Iterator[list[bytes]], items: int) -> None:
        self.supply = supply
        self.until = 0.0
        self.taken_ms: list[float] = []
        self._items = items
        self._busy = 0
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def on(self, connections: list[Connection], seconds: float) -> float:
        """How long it really took, to the last answer."""
        begun = time.perf_counter()
        self.until, self._busy = begun + seconds, len(connections)
        for connection in connections:
            connection.run = self
            connection.send_next()
        await self._over
        return time.perf_counter() - begun

    def answered(self, received: bytes, seconds: float) -> None:
        good = received.startswith((b"HTTP/1.1 200", b"HTTP/1.1 201"))
        if not good or (self._items > 1 and received.count(b'"status":20') != self._items):
            self.fail(ValueError(f"not what was asked for: {received[:2000]!r}"))
        self.taken_ms.append(seconds * 1000)

    def connection_done(self) -> None:
        self._busy -= 1
        if not self._busy and not self._over.done():
            self._over.set_result(None)

    def fail(self, error: Exception) -> None:
        if not self._over.done():
            self._over.set_exception(error)


def requests(what: str, token: str) -> Iterator[list[bytes]]:
    """Units of requests of one kind, without end."""
    units = mix.units()
    while True:
        if what == "nothing":
            yield [request(b"GET", b"/", token)]
        elif what == "commands":
            yield [request(b"POST", b"/commands", token, mix.body(command)) for command in next(units)]
        elif what == "sessions":
            yield [request(b"POST", b"/sessions", token, mix.session_body(next(units)))]
        else:
            taken = itertools.islice(units, BATCH_COMMANDS // mix.UNIT_COMMANDS)
            bodies = b",".join(mix.body(command) for unit in taken for command in unit)
            yield [request(b"POST", b"/commands", token, b"[%b]" % bodies)]


def request(method: bytes, path: bytes, token: str, body: bytes = b"") -> bytes:
    head = b"%b %b HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer %b\r\n" % (method, path, token.encode())
    if body:
        head += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
    return head + b"\r\n" + body


async def main(
    port: int, token: str, connections: int, seconds: float, what: str, kept: list[list[bytes]] | None = None
) -> None:
    opened = []
    for _ in range(connections):
        _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
        opened.append(connection)
    supply = itertools.cycle(kept) if kept else requests(what, token)
    items = BATCH_COMMANDS if what == "batches" else 1
    warm_up = Run(supply, items)
    if what == "once" and kept:
        ahead, seconds = kept, float("inf")
    else:
        took = await warm_up.on(opened, min(WARM_UP_SECONDS, seconds))
        units = len(warm_up.taken_ms) / (1 if what in ("nothing", "sessions", "batches") else mix.UNIT_COMMANDS)
        ahead = list(itertools.islice(supply, int(units / took * seconds * 2) + connections))
    gc.collect()
    gc.freeze()
    run = Run(iter(ahead), items)
    wait_for_word()
    took = await run.on(opened, seconds)
    sent = (len(warm_up.taken_ms) + len(run.taken_ms)) * items
    answer(**summary(run.taken_ms, took, items), sent=sent)


if __name__ == "__main__":
    known = told()
    if "file" in known:
        known["kept"] = msgspec.json.decode(Path(known.pop("file")).read_bytes(), type=list[list[bytes]])
    asyncio.run(main(**known))
