"""What whoever speaks to a server does to itself: it may be cancelled anywhere, and goes on."""

import asyncio
from contextlib import suppress

from api.wire import Wire


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Each request with `{}`, until who asks goes away."""
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    writer.close()


async def test_a_request_that_was_cancelled_at_any_step_keeps_no_other_from_being_answered() -> None:
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for steps in range(60):
            wire = Wire(url, "token", patience_seconds=0, timeout_seconds=30, connections_max=1)
            for _ in range(3):  # over a connection that is new, and one that is kept open
                asking = asyncio.ensure_future(wire.exchange("GET", "/"))
                for _ in range(steps):
                    await asyncio.sleep(0)
                asking.cancel()
                await asyncio.wait([asking])
                async with asyncio.timeout(30):
                    assert (await wire.exchange("GET", "/")).text == "{}"
            await wire.close()
