"""A caller over HTTP that costs next to nothing: what it took would be taken from the server beside it."""

import asyncio
from typing import Any, cast

import msgspec

LONGEST_ANSWER_SECONDS = 60


class Caller(asyncio.Protocol):
    """Somebody with a token, and one keep-alive HTTP/1.1 connection (RFC 9112), on which one thing is asked at a time.

    Only for answers with a Content-Length, or without a body.
    """

    def __init__(self, token: str) -> None:
        self._head = b" HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nAuthorization: Bearer %b\r\n" % (
            token.encode()
        )
        self._received = b""
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._transport: asyncio.Transport | None = None

    async def ask(self, method: str, path: str, said: Any = None, *, known: str | None = None) -> Any:
        """What was answered; None if it is still what is `known`, an entity tag. Raises ValueError if it was refused,
        and ConnectionError."""
        body = await self.fetch(method, path, said, known=known)
        return msgspec.json.decode(body) if body else None

    async def fetch(self, method: str, path: str, said: Any = None, *, known: str | None = None) -> bytes:
        """The same, as it was answered, whatever it is."""
        status, body = await self._exchange(self._request(method, path, said, known))
        if status >= 400:
            raise ValueError(f"{method} {path} was answered with {status}: {body.decode()}")
        return body

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _request(self, method: str, path: str, said: Any, known: str | None) -> bytes:
        body = b"" if said is None else msgspec.json.encode(said)
        condition = b"" if known is None else b"If-None-Match: %b\r\n" % known.encode()
        start = f"{method} {path}".encode()
        return b"%b%b%bContent-Length: %d\r\n\r\n%b" % (start, self._head, condition, len(body), body)

    async def _exchange(self, request: bytes) -> tuple[int, bytes]:
        assert self._transport is not None
        assert self._answer is None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            async with asyncio.timeout(LONGEST_ANSWER_SECONDS):
                return await self._answer
        finally:
            self._answer = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

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
        assert self._answer is not None
        self._answer.set_result((int(received[9:12]), received[head_end + 4 :]))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionError("the server closed a connection"))


async def connect(port: int, token: str) -> Caller:
    loop = asyncio.get_running_loop()
    _, caller = await loop.create_connection(lambda: Caller(token), "127.0.0.1", port)
    return caller
