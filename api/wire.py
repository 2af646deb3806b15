"""How a Muniment server is spoken to: a request is sent until it is answered, and a problem is read as what it is.

Always the same bytes are sent again, so whoever gives a command an id gives it once. What goes wrong is raised as
the class of `ledger.errors` that the server raised. Nothing here knows a route.
"""

import asyncio
import ipaddress
import random
import re
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from string import Formatter
from typing import Any

import httpx
import msgspec

from ledger.errors import ERRORS, MalformedRequest, MunimentError, StoreUnavailable

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
TRY_AGAIN = (429, 503)

PAUSE_SECONDS = 0.1
"""Between two that wait: a server that is to end answers those at once."""

Json = dict[str, Any]

# Whether the server saw the request is not known after these, and need not be: the command id decides.
_LOST = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError)
_PROBLEM_MEMBERS = {"type", "title", "status", "code", "detail", "instance", "errors"}


class Problem(MunimentError):
    """An answer that no class of `ledger.errors` says: a proxy's, or a newer server's.

    `code`, `status`, `title` and `params` are as answered; `detail` is readable.
    """

    code, status, title = "unknown_problem", 500, "An answer that this client does not know"
    template = "{said}"

    def __init__(self, status: int, code: str, title: str, detail: str, **members: Any) -> None:
        vars(self).update(code=code, status=status, title=title)
        super().__init__(said=f"{status} {title}: {detail}" if detail else f"{status} {title}", **members)


class Wire:
    """The connections to one server, as the caller whom `token` names.

    `patience_seconds` bounds how long one request is tried while the server cannot be reached, answers 503, or asks
    to slow down (429); then what it was last told is raised. Nothing else is tried again.
    """

    def __init__(
        self, url: str, token: str, *, patience_seconds: float, timeout_seconds: float, connections_max: int
    ) -> None:
        self.url = url.rstrip("/")
        self.ledger_id: str | None = None
        self.patience_seconds = patience_seconds
        self._timeout_seconds = timeout_seconds
        self._settings: Json = {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {token.strip()}", "Accept": "application/json"},
            "limits": httpx.Limits(max_connections=1),
            "trust_env": not _is_loopback(self.url),  # a proxy cannot reach this machine's own servers
            "verify": httpx.create_ssl_context(),  # once, for it takes longer than many requests
        }
        self._room = asyncio.Semaphore(connections_max)
        self._all: list[httpx.AsyncClient] = []
        self._free: list[httpx.AsyncClient] = []
        self._closing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        await asyncio.gather(*(connection.aclose() for connection in self._all), *self._closing)

    @asynccontextmanager
    async def _connection(self) -> AsyncGenerator[httpx.AsyncClient]:
        """A connection of one's own, the one that was used last if it is free. Not a pool of httpx's: that looks
        through all of its connections for each request, which with a hundred takes 40 ms."""
        async with self._room:
            connection = self._free.pop() if self._free else self._another()
            try:
                yield connection
            except asyncio.CancelledError:
                # Where that met it between two of its steps, httpx takes it for one that is in use, for ever.
                self._all.remove(connection)
                closing = asyncio.create_task(connection.aclose())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
                raise
            except BaseException:
                self._free.append(connection)
                raise
            else:
                self._free.append(connection)

    def _another(self) -> httpx.AsyncClient:
        connection = httpx.AsyncClient(**self._settings)
        self._all.append(connection)
        return connection

    async def exchange(
        self,
        method: str,
        path: str,
        *,
        content: bytes | None = None,
        params: Json | None = None,
        headers: dict[str, str] | None = None,
        patience_seconds: float | None = None,
        wait_seconds: float = 0.0,
    ) -> httpx.Response:
        """Send until it is answered. Raises the problem it was answered with. `wait_seconds` is how long the server
        was asked to wait before it answers."""
        tries = Tries(self.patience_seconds if patience_seconds is None else patience_seconds)
        headers = (headers or {}) | ({"Content-Type": "application/json"} if content else {})
        seconds = self._timeout_seconds
        timeout = httpx.Timeout(seconds + wait_seconds, connect=min(5.0, seconds), pool=None)
        while True:
            try:
                async with self._connection() as connection:
                    response = await connection.request(
                        method, path, content=content, params=params, headers=headers, timeout=timeout
                    )
            except _LOST as lost:
                why = f"{self.url} did not answer ({str(lost) or type(lost).__name__})"
                await tries.pause(StoreUnavailable(why=why), 0.0)
                continue
            self.ledger_id = response.headers.get("ledger-id", self.ledger_id)
            if response.status_code < 300 or response.status_code == 304:
                return response
            error = error_of(response.status_code, response)
            if response.status_code not in TRY_AGAIN:
                raise error
            await tries.pause(error, _retry_after_seconds(response))


class Tries:
    """The pauses between tries of one thing: longer each time, never in step with others', and bounded."""

    def __init__(self, patience_seconds: float) -> None:
        self._deadline = time.monotonic() + patience_seconds
        self._attempts = count()

    async def pause(self, error: MunimentError, at_least_seconds: float) -> None:
        """Wait for the next try; raises `error` where there is no time left for one."""
        grown = FIRST_PAUSE_SECONDS * 2.0 ** min(next(self._attempts), 16)
        pause_seconds = at_least_seconds + min(grown, LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1.0)  # noqa: S311
        if time.monotonic() + pause_seconds > self._deadline:
            raise error
        await asyncio.sleep(pause_seconds)


def decoded(response: httpx.Response, decoder: msgspec.json.Decoder[Any]) -> Any:
    """The body of an answer. Raises Problem where it is none of ours."""
    try:
        return decoder.decode(response.content)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise strange(response) from None


def strange(response: httpx.Response) -> Problem:
    detail = f"{response.url} gave something else than Muniment answers: is it a Muniment server?"
    return Problem(response.status_code, "unknown_problem", "Not an answer", detail)


def error_of(status: int, answered: Any) -> MunimentError:
    """The error behind a problem (RFC 9457), as the class the server raised, or as a Problem."""
    problem = answered
    if isinstance(answered, httpx.Response):
        with suppress(msgspec.MsgspecError, UnicodeDecodeError):
            problem = msgspec.json.decode(answered.content)
    if not isinstance(problem, dict) or "code" not in problem:
        reason = answered.reason_phrase if isinstance(answered, httpx.Response) else ""
        text = answered.text if isinstance(answered, httpx.Response) else str(answered)
        return Problem(status, "unknown_problem", reason or "An answer without a code", text[:200].strip())
    members = {name: value for name, value in problem.items() if name not in _PROBLEM_MEMBERS}
    text, title = str(problem.get("detail", "")), str(problem.get("title", ""))
    known = ERRORS.get(str(problem["code"]))
    with suppress(KeyError, TypeError, ValueError):  # a server of another release may say it with other members
        if known is not None and issubclass(known, MalformedRequest):
            return known(problem["errors"])
        if known is not None:
            return known(**_words(known.template, members, text) | members)
    return Problem(status, str(problem["code"]), title, text, **{k: v for k, v in members.items() if k != "said"})


def _words(template: str, members: Json, detail: str) -> Json:
    """The params that are sentences: they stand in `detail` and not among the members.

    In a detail of other words than ours the whole of it is the sentence.
    """
    pieces = list(Formatter().parse(template))
    pattern = "".join(
        re.escape(literal) + ("" if name is None else ".*" if name in members else f"(?P<{name}>.*)")
        for literal, name, _, _ in pieces
    )
    found = re.match(pattern, detail, re.DOTALL)
    return found.groupdict() if found else {name: detail for _, name, _, _ in pieces if name and name not in members}


def _retry_after_seconds(response: httpx.Response) -> float:
    """Retry-After in either of its forms (RFC 9110 s10.2.3); 0 where it says nothing."""
    said = response.headers.get("retry-after", "")
    with suppress(ValueError, OverflowError):
        if said.isdecimal():
            return float(said)
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    return 0.0


def _is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
