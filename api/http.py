"""One request as it is read, and one answer as it is given; the same for every route.

Owns headers, bodies within their limit, and what a route says of itself (`Operation`, from which OpenAPI is
made). A body is read before anything else is asked, and no further than its limit; what cannot be read is
refused by name. Nothing here knows a resource, and nothing here decides.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from time import monotonic
from typing import Any, TypeVar
from uuid import UUID

import msgspec
from litestar.enums import HttpMethod
from litestar.types import HTTPScope, Receive, Scope, Send
from msgspec import Struct, field

from api.auth import Caller, Tokens
from api.idempotency import Copy
from api.line import Line
from api.problems import MEDIA_TYPE, as_error, headers_of, problem
from api.use_tokens import Signer
from ledger.committer import Committer
from ledger.errors import (
    BodyTooLarge,
    MalformedRequest,
    MunimentError,
    NotFound,
    UnknownProject,
    UnsupportedMediaType,
)
from ledger.postgres import Connection, Pool, store_errors
from ledger.syntax import pointer
from ledger.telemetry import Histogram
from ledger.tracing import Tracing
from ledger.vault import Vault

BODY_BYTES_MAX = 1024 * 1024
BATCH_BODY_BYTES_MAX = 8 * 1024 * 1024
BODY_SECONDS_MAX = 60.0

READ = [HttpMethod.GET, HttpMethod.HEAD]
JSON = b"application/json"
Headers = dict[bytes, bytes]
Q = TypeVar("Q", bound=Struct)

_ONCE = frozenset(
    b"authorization causation-id content-encoding content-length content-type correlation-id "
    b"idempotency-key if-match if-none-match traceparent".split()
)

encode = msgspec.json.Encoder().encode


class Requests:
    """What was answered, by the name of the operation."""

    def __init__(self) -> None:
        self.answers: Counter[tuple[str, str]] = Counter()
        self.seconds: defaultdict[tuple[str], Histogram] = defaultdict(Histogram)

    def answered(self, operation: str, status: int, seconds: float) -> None:
        self.answers[operation, str(status)] += 1
        self.seconds[operation,].add(seconds)


class Api(Struct, kw_only=True):
    """What every route works with; made once a process, in `api.app`."""

    pool: Pool
    vault: Vault
    committer: Committer
    tokens: Tokens
    copy: Copy | None
    line: Line
    signer: Signer
    creates_ledgers: bool
    metrics_token: str | None = None
    tracing: Tracing | None = None
    requests: Requests = field(default_factory=Requests)
    draining: bool = False
    """Whether this process will soon end: then it is not ready, and lets no connection be used twice."""
    ending: bool = False
    """Whether this process was told to end: then nobody waits any longer for what may come."""


class Answer(Struct):
    """What is sent back: an ASGI application of two messages."""

    status: int
    body: bytes = b""
    headers: list[tuple[bytes, bytes]] = []
    media_type: bytes = JSON

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = self.headers
        if self.status not in (204, 304):
            headers = [(b"content-type", self.media_type), (b"content-length", b"%d" % len(self.body)), *headers]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        body = b"" if scope["method"] == "HEAD" else self.body  # type: ignore[typeddict-item]
        await send({"type": "http.response.body", "body": body, "more_body": False})


class Operation(Struct, frozen=True, kw_only=True):
    """What a route promises, for OpenAPI. `summary` and `description` come from a docstring."""

    tag: str
    name: str
    doc: str
    answers: dict[int, Any]
    """By status: the type of the body (None: no body; a tuple: one of these), or that by media type."""
    sends: tuple[str, ...] = ()
    """The headers that its answers may have."""
    refusals: tuple[type[MunimentError], ...] = ()
    query: type[Struct] | None = None
    headers: type[Struct] | None = None
    body: Any = None
    body_required: bool = True
    items_max: int = 0
    """How many bodies may come as a list; 0: none, it is always one."""
    open: bool = False
    """Whether it asks for no token."""


class Call:
    """One request on its way: who calls, what was sent, and the ledger that it is about."""

    __slots__ = ("api", "caller", "command_id", "headers", "ledger_id", "scope")

    api: Api
    caller: Caller
    headers: Headers
    ledger_id: UUID | None
    command_id: str | None
    """What its sender calls the command, once that was read."""

    def __init__(self, scope: HTTPScope) -> None:
        self.scope = scope
        self.api = scope["litestar_app"].state._state["api"]
        self.ledger_id = None
        self.command_id = None

    async def answer(self, work: Callable[["Call"], Awaitable[Answer]]) -> Answer:
        """What `work` answers, or the problem that it met; with the id of the ledger it is about."""
        began = monotonic()
        operation = self.scope["route_handler"].opt["operation"].name
        tracing = self.api.tracing
        if tracing is None:
            answer = await self._answer(work)
        else:
            with tracing.request(operation, self.scope) as say_status:
                answer = await self._answer(work)
                say_status(answer.status)
        self.api.requests.answered(operation, answer.status, monotonic() - began)
        return answer

    async def _answer(self, work: Callable[["Call"], Awaitable[Answer]]) -> Answer:
        try:
            answer = await work(self)
        except Exception as raised:  # noqa: BLE001 - whatever it is, the caller gets a problem and the log the rest
            answer = refuse(as_error(raised, self.scope["method"], self.scope["path"]))
            if self.command_id is not None:
                answer.headers.append((b"command-id", self.command_id.encode()))
        if self.ledger_id is not None and (epoch := self.api.committer.epoch(self.caller.project_id)):
            answer.headers.append((b"ledger-id", str(epoch).encode()))
        return answer

    def read_headers(self) -> None:
        """Have the request's headers by name. Raises MalformedRequest where one that must stand alone is
        there twice: which of two is meant is not ours to choose."""
        sent = self.scope["headers"]
        self.headers = dict(sent)
        if len(self.headers) != len(list(sent)):
            names = [name for name, _ in sent]
            twice = sorted(name.decode() for name in _ONCE if names.count(name) > 1)
            if twice:
                raise MalformedRequest(
                    [{"pointer": name, "detail": "it is there twice; send it once"} for name in twice]
                )

    async def authenticate(self) -> None:
        """Raises Unauthenticated, StoreUnavailable."""
        sent, tokens = self.headers.get(b"authorization", b""), self.api.tokens
        # Nearly always it was verified a moment ago, and then nothing is waited for.
        self.caller = tokens.known(sent) or await tokens.caller(sent)

    async def find_ledger(self) -> UUID | None:
        """The ledger of the caller's project; in development it may have none yet. Raises UnknownProject."""
        ledger = await self.api.committer.ledger(self.caller.project_id)
        if ledger is None and not self.api.creates_ledgers:
            raise UnknownProject(project=self.caller.project_id)
        self.ledger_id = ledger.ledger_id if ledger else None
        return self.ledger_id

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[Connection]:
        """A connection to read with. Raises StoreUnavailable."""
        with store_errors():
            async with self.api.pool.connection() as connection:
                yield connection

    def path_id(self, name: str, what: str) -> UUID:
        """The id in the path. One that is no UUID names nothing: NotFound."""
        return uuid_of(self.scope["path_params"][name], what)

    async def read_body(self, receive: Receive, limit_bytes: int) -> bytes:
        """The whole body. Raises BodyTooLarge without reading on, and MalformedRequest if it does not arrive."""
        stated = self.headers.get(b"content-length")
        length = -1 if stated is None else int(stated[:20]) if stated.isdigit() else limit_bytes + 1
        if length > limit_bytes:
            raise BodyTooLarge(limit_bytes=limit_bytes)
        message: Any = await receive()
        if message["type"] == "http.request":
            body: bytes = message["body"]
            # A server may hand over all of a body before it knows that this was its end.
            if len(body) == length or (len(body) <= limit_bytes and not message.get("more_body")):
                return body
        return await _read_on(message, receive, limit_bytes)

    def require_json(self, body: bytes) -> None:
        """Raises UnsupportedMediaType unless the body is JSON in UTF-8, as it stands."""
        encoding = self.headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding not in (b"identity", b""):
            raise UnsupportedMediaType(media_type=f"encoded as {_shown(encoding)}")
        stated = self.headers.get(b"content-type")
        if stated == JSON or (stated is None and not body):
            return
        if stated is None:
            raise UnsupportedMediaType(media_type="of no stated type")
        name, *parameters = [part.strip().lower() for part in stated.split(b";")]
        charsets = [p.partition(b"=")[2].strip(b'" ') for p in parameters if p.startswith(b"charset")]
        if name != JSON or any(charset not in (b"utf-8", b"utf8") for charset in charsets):
            raise UnsupportedMediaType(media_type=_shown(stated))


async def _read_on(message: Any, receive: Receive, limit_bytes: int) -> bytes:
    """The rest of a body that comes in pieces, but no more of them than the limit and the time allow."""
    pieces, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            while True:
                if message["type"] != "http.request":
                    raise MalformedRequest([{"pointer": "", "detail": "the connection closed before its end"}])
                pieces.append(message["body"])
                size += len(message["body"])
                if size > limit_bytes:
                    raise BodyTooLarge(limit_bytes=limit_bytes)
                if not message.get("more_body"):
                    return b"".join(pieces)
                message = await receive()
    except TimeoutError:
        detail = f"it did not arrive within {BODY_SECONDS_MAX:.0f} s"
        raise MalformedRequest([{"pointer": "", "detail": detail}]) from None


async def gone(receive: Receive) -> None:
    """Return when the caller has gone away; to be asked for once the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass  # the end of a body whose last byte was here before it


def refuse(error: MunimentError, *, remembered: bool = False) -> Answer:
    """The answer that says `error`."""
    return Answer(error.status, encode(problem(error, remembered=remembered)), headers_of(error), MEDIA_TYPE)


def uuid_of(text: str, what: str) -> UUID:
    """The UUID that `text` is in its usual form. Anything else names nothing: NotFound."""
    try:
        if len(text) == 36:
            return msgspec.convert(text, UUID)
    except msgspec.ValidationError:
        pass
    raise NotFound(what=what, id=text[:100])


def convert(sent: dict[str, str], declared: type[Q]) -> Q:
    """Text values (headers, query parameters) as `declared` types them. Raises MalformedRequest by name."""
    try:
        read = msgspec.convert(sent, declared, strict=False)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `")
        at, detail = pointer(path).lstrip("/"), text
        if text.startswith("Object contains unknown field"):
            at = text.split("`")[1]
            detail = f"there is no such parameter; there are {', '.join(declared.__struct_encode_fields__) or 'none'}"
        elif text.startswith("Object missing required field"):
            at, detail = text.split("`")[1], "it must be there"
        raise MalformedRequest([{"pointer": at, "detail": detail}]) from None
    for name, text in sent.items():
        # To msgspec a number in text is a time as well, in seconds; here times are RFC 3339.
        if ":" not in text and isinstance(getattr(read, name, None), datetime):
            raise MalformedRequest([{"pointer": name, "detail": "it is no RFC 3339 time"}])
    return read


def _shown(header: bytes) -> str:
    return header[:100].decode("latin-1")
