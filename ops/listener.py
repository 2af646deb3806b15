"""HTTP/1.1 for a small program that strangers reach: requests are answered one by one, and nobody keeps others out.

What a client may cost is bounded: HEAD_BYTES_MAX and BODY_BYTES_MAX of memory, EXCHANGE_SECONDS for a request and its
answer, and CONNECTIONS_MAX of them at once: beyond that, whoever has been waited for longest gives way to who comes.
TLS, and bodies of unknown length, are left to a proxy before it. Nothing here knows what is asked, or answered.
"""

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import NamedTuple

HEAD_BYTES_MAX = 16 * 1024
BODY_BYTES_MAX = 256 * 1024
CONNECTIONS_MAX = 256
EXCHANGE_SECONDS = 30.0

_REQUEST = re.compile(r"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.([01])", re.ASCII)
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\r\n\x00]*)", re.ASCII)


class Request(NamedTuple):
    """What is asked; `path` is as it was sent."""

    method: str
    path: str
    body: bytes = b""


class Answer(NamedTuple):
    """What is said to it."""

    status: HTTPStatus
    text: str
    content_type: str = "text/plain; charset=utf-8"
    allow: str = ""
    """Of what is asked of it wrongly: how it may be asked."""


class _Refused(Exception):
    """This is no request that can be read on from: it is answered, and the connection ends."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        self.answer = Answer(status, text + "\n")


class Listener:
    """`answer` is called with one request after another, never with two at once, and must not wait for anybody."""

    def __init__(self, answer: Callable[[Request], Answer], exchange_seconds: float = EXCHANGE_SECONDS) -> None:
        self._answer = answer
        self._exchange_seconds = exchange_seconds
        # Who has been waited for longest comes first: `answer` waits for nobody, so everyone here is waited for.
        self._open: dict[asyncio.StreamWriter, None] = {}

    async def listen(self, host: str, port: int) -> asyncio.Server:
        """Begin. Raises OSError where it cannot listen there."""
        # As many as `backlog` come in before those are read that came before: fewer than would push each other out.
        backlog = CONNECTIONS_MAX // 2
        return await asyncio.start_server(self._serve, host, port, limit=HEAD_BYTES_MAX, backlog=backlog)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= CONNECTIONS_MAX:
            longest = next(iter(self._open))
            del self._open[longest]
            longest.transport.abort()
        try:
            # Whoever goes, is too slow, had to give way, or is here when all ends, has no answer: nothing more to it.
            with suppress(EOFError, ConnectionError, TimeoutError, asyncio.CancelledError):
                goes_on = True
                while goes_on:
                    self._open.pop(writer, None)
                    self._open[writer] = None
                    async with asyncio.timeout(self._exchange_seconds):
                        goes_on = await self._exchange(reader, writer)
        finally:
            self._open.pop(writer, None)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Read a request and answer it; whether another one may follow."""
        try:
            request, goes_on = await _read(reader, writer)
            answer = self._answer(request)
        except _Refused as refused:
            answer, goes_on = refused.answer, False
        content = answer.text.encode()
        fields = [f"Content-Type: {answer.content_type}", f"Content-Length: {len(content)}"]
        if answer.allow:
            fields.append(f"Allow: {answer.allow}")
        if not goes_on:
            fields.append("Connection: close")
        head = [f"HTTP/1.1 {answer.status.value} {answer.status.phrase}", *fields, "", ""]
        writer.write("\r\n".join(head).encode() + content)
        await writer.drain()
        if not goes_on:
            # Closing on what is still being sent would reset the connection, and take the answer away again.
            writer.write_eof()
            while await reader.read(HEAD_BYTES_MAX):
                pass
        return goes_on


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[Request, bool]:
    """A request, and whether another one may follow. Raises _Refused."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise _Refused(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the head of a request has at most {HEAD_BYTES_MAX} bytes"
        ) from None
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    request = _REQUEST.fullmatch(first)
    matches = [_FIELD.fullmatch(line) for line in lines]
    if request is None or None in matches:
        raise _Refused(HTTPStatus.BAD_REQUEST, "this is not a request of HTTP/1.1")
    fields: dict[str, str] = {}
    for name, value in ((match[1], match[2].strip(" \t")) for match in matches if match):
        # What is said twice is a list (RFC 9110 s5.3), which no length is.
        fields[name.lower()] = f"{fields[name.lower()]}, {value}" if name.lower() in fields else value
    length = _length(fields)
    if fields.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = await reader.readexactly(length)
    goes_on = request[3] == "1" and "close" not in fields.get("connection", "").lower()
    return Request(request[1], request[2], body), goes_on


def _length(fields: dict[str, str]) -> int:
    """Of the body, which there must be no doubt about (RFC 9112 s6.3). Raises _Refused."""
    if "transfer-encoding" in fields:
        raise _Refused(HTTPStatus.LENGTH_REQUIRED, "say the length of the body: Content-Length")
    length = fields.get("content-length", "0")
    if not re.fullmatch(r"[0-9]{1,18}", length, re.ASCII):
        raise _Refused(HTTPStatus.BAD_REQUEST, "this is not the length of a body")
    if int(length) > BODY_BYTES_MAX:
        raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {BODY_BYTES_MAX} bytes")
    return int(length)
