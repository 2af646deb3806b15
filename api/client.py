"""The Python client: commands in, answers out, over HTTP.

Every command has an id before it is first sent, made here (UUIDv7) unless the caller gave one. Whatever
is lost on the way is sent again under the same id, so a command happens once however often it is sent;
an answer that is final is never asked for again. What goes wrong is raised as the class of `ledger.errors`
that the server raised. The server's own parts are never imported here: this is how others see it.
"""

import asyncio
import ipaddress
import random
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count, islice
from string import Formatter
from types import TracebackType
from typing import Any
from urllib.parse import quote
from uuid import UUID

import httpx
import msgspec
from msgspec import UNSET, Struct
from uuid_utils.compat import uuid7

from ledger.commands import AnnotateSession, CancelSession, ChangeSession, Command, OpenSession, Record
from ledger.errors import ERRORS, BodyTooLarge, MalformedRequest, MunimentError, StoreUnavailable

BATCH_COMMANDS_MAX = 1000
BATCH_BYTES_MAX = 8 * 1024 * 1024
PAGE_ITEMS_MAX = 200
PAGE_EVENTS_MAX = 1000
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
WAIT_TIMEOUT_SECONDS = 30.0

Json = dict[str, Any]

# Whether the server saw the request is not known after these, and need not be: the command id decides.
_LOST = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError)
_TRY_AGAIN = (429, 503)
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


class Answer(Struct, frozen=True, kw_only=True):
    """What became of one command.

    `body` is the session or the record as the command left it, or the problem where it was refused.
    `positions` are those of the events it appended, now or, if it is `replayed`, when it was first given.
    `command_id` is None where it could not be read.
    """

    command_id: str | None
    status: int
    body: Any
    replayed: bool = False
    positions: list[int] = []
    location: str | None = None
    etag: str | None = None

    @property
    def error(self) -> MunimentError | None:
        """Why it was refused, or None."""
        return error_of(self.status, self.body) if self.status >= 400 else None


_answers = msgspec.json.Decoder(list[Answer])
_objects = msgspec.json.Decoder(Json)


class Client:
    """A connection to one Muniment server as the caller whom `token` names. An async context manager.

    `patience_seconds` bounds how long one call keeps trying while the server cannot be reached, answers
    503, or asks to slow down (429); then it raises what it was last told. Nothing else is tried again.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        patience_seconds: float = 60.0,
        timeout_seconds: float = 30.0,
        connections_max: int = 32,
    ) -> None:
        self.url = url.rstrip("/")
        self.ledger_id: str | None = None
        """The ledger that answered last. If it changes, positions have started again."""
        self._patience_seconds = patience_seconds
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token.strip()}", "Accept": "application/json"},
            timeout=httpx.Timeout(timeout_seconds, connect=min(5.0, timeout_seconds), pool=None),
            limits=httpx.Limits(max_connections=connections_max, max_keepalive_connections=connections_max),
            trust_env=not _is_loopback(self.url),  # a proxy cannot reach this machine's own servers
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    # Commands

    async def command(self, command: Command) -> Answer:
        """Give one command; raises its refusal.

        A command without an id is given one and keeps it: giving the same object again, after an error,
        cannot make it happen twice.
        """
        (answer,) = await self.send([command])
        if answer.error:
            raise answer.error
        return answer

    async def send(self, commands: Iterable[Command]) -> list[Answer]:
        """Give many commands in order, in as few requests as they fit in; an answer for each, in order.

        A refused command does not stop the others and is not raised: look at `answer.error`. From the
        first one that could not be decided yet (429, 503) all are sent again, so their order holds.
        """
        waiting = deque((command.command_id, text) for command, text in map(_encoded, commands))
        answers: list[Answer] = []
        tries = _Tries(self._patience_seconds)
        while waiting:
            batch = _first_batch(waiting)
            if not batch:
                answers.append(_too_large(str(waiting.popleft()[0])))
                continue
            response = await self._exchange("POST", "/commands", content=b"[%b]" % b",".join(batch))
            decided: list[Answer] = _decoded(response, _answers)
            if len(decided) != len(batch):
                raise _strange(response)
            for answer in decided:
                if answer.status in _TRY_AGAIN:
                    error = error_of(answer.status, answer.body)
                    await tries.pause(error, float(error.retry_after_seconds or 0))
                    break
                answers.append(answer)
                waiting.popleft()
            else:
                tries = _Tries(self._patience_seconds)
        return answers

    async def open_session(self, agent_role: str, **fields: Any) -> Answer:
        """Open a session; `fields` are those of `OpenSession`."""
        return await self.command(OpenSession(agent_role=agent_role, **fields))

    async def change_session(self, session_id: UUID, **fields: Any) -> Answer:
        """Change a session's status, work or metadata; `fields` are those of `ChangeSession`."""
        return await self.command(ChangeSession(session_id=session_id, **fields))

    async def cancel(self, session_id: UUID, **fields: Any) -> Answer:
        """Cancel a session; `fields` are those of `CancelSession`."""
        return await self.command(CancelSession(session_id=session_id, **fields))

    async def annotate(self, session_id: UUID, text: str | Json, **fields: Any) -> Answer:
        """Add a remark to a session; `text` may be a `$personal` value."""
        return await self.command(AnnotateSession(session_id=session_id, text=text, **fields))  # type: ignore[arg-type]

    async def record(self, kind: str, **fields: Any) -> Answer:
        """Record a fact; `fields` are those of `Record`."""
        return await self.command(Record(kind=kind, **fields))

    async def receipt(self, command_id: str, *, principal: str | None = None) -> Json:
        """What became of a command: {status, positions, body}. Raises NotFound if it was never recorded."""
        return await self._get(f"/commands/{quote(command_id, safe='')}", {"principal": principal})

    # Reading. Filters are the query parameters of the route; None leaves one out.

    async def get_session(self, session_id: UUID, **parameters: Any) -> Json:
        return await self._get(f"/sessions/{session_id}", parameters)

    async def get_record(self, record_id: UUID, **parameters: Any) -> Json:
        return await self._get(f"/records/{record_id}", parameters)

    def list_sessions(self, *, limit: int | None = None, **filters: Any) -> AsyncIterator[Json]:
        """The sessions, at most `limit` of them, page by page as they are asked for."""
        return self._pages("/sessions", "sessions", filters, limit, PAGE_ITEMS_MAX)

    def list_records(self, *, limit: int | None = None, **filters: Any) -> AsyncIterator[Json]:
        return self._pages("/records", "records", filters, limit, PAGE_ITEMS_MAX)

    def events(self, *, after: int = 0, limit: int | None = None, **filters: Any) -> AsyncIterator[Json]:
        """The events after a position, in order, to the end of the ledger as it is when that is reached."""
        return self._pages("/events", "events", {"after": after} | filters, limit, PAGE_EVENTS_MAX)

    def session_events(self, session_id: UUID, *, limit: int | None = None, **filters: Any) -> AsyncIterator[Json]:
        """Everything of a session: its own events and those of its records."""
        return self._pages(f"/sessions/{session_id}/events", "events", filters, limit, PAGE_EVENTS_MAX)

    def search(self, q: str, *, limit: int | None = None, **filters: Any) -> AsyncIterator[Json]:
        """The events that hold the plain words `q`."""
        return self._pages("/audit/search", "events", {"q": q} | filters, limit, PAGE_ITEMS_MAX)

    async def wait(self, position: int, *, timeout_seconds: float = WAIT_TIMEOUT_SECONDS) -> None:
        """Return when every view shows what was appended up to `position`; raises ViewBehind if it does not."""
        deadline = time.monotonic() + timeout_seconds
        for path in ("/sessions", "/records", "/events"):
            await self._get(path, {"limit": 1, "min_position": position}, deadline - time.monotonic())

    async def _pages(
        self, path: str, plural: str, filters: Json, limit: int | None, page_max: int
    ) -> AsyncIterator[Json]:
        left = limit
        while left is None or left > 0:
            page = await self._get(path, filters | {"limit": page_max if left is None else min(left, page_max)})
            for item in page[plural]:
                yield item
            if page["next"] is None:
                return
            left = None if left is None else left - len(page[plural])
            filters = filters | {"after": page["next"]}

    # The wire

    async def _get(self, path: str, parameters: Json, patience_seconds: float | None = None) -> Json:
        sent = {name: _parameter(value) for name, value in parameters.items() if value is not None}
        response = await self._exchange("GET", path, params=sent, patience_seconds=patience_seconds)
        body: Json = _decoded(response, _objects)
        return body

    async def _exchange(
        self,
        method: str,
        path: str,
        *,
        content: bytes | None = None,
        params: dict[str, Any] | None = None,
        patience_seconds: float | None = None,
    ) -> httpx.Response:
        """Send until it is answered, always the same bytes. Raises the problem it was answered with."""
        tries = _Tries(self._patience_seconds if patience_seconds is None else patience_seconds)
        headers = {"Content-Type": "application/json"} if content else {}
        while True:
            try:
                response = await self._http.request(method, path, content=content, params=params, headers=headers)
            except _LOST as lost:
                why = f"{self.url} did not answer ({str(lost) or type(lost).__name__})"
                await tries.pause(StoreUnavailable(why=why), 0.0)
                continue
            self.ledger_id = response.headers.get("ledger-id", self.ledger_id)
            if response.status_code < 300:
                return response
            error = error_of(response.status_code, response)
            if response.status_code not in _TRY_AGAIN:
                raise error
            await tries.pause(error, _retry_after_seconds(response))


class _Tries:
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


def _encoded(command: Command) -> tuple[Command, bytes]:
    if command.command_id is UNSET:
        command.command_id = str(uuid7())
    return command, msgspec.json.encode(command)


def _first_batch(waiting: Iterable[tuple[Any, bytes]]) -> list[bytes]:
    """As many from the front as one request may carry; none if the first is too large by itself."""
    batch: list[bytes] = []
    size = 2
    for _, text in islice(waiting, BATCH_COMMANDS_MAX):
        size += len(text) + 1
        if size > BATCH_BYTES_MAX:
            break
        batch.append(text)
    return batch


def _too_large(command_id: str) -> Answer:
    """What the server would say of a command that no request can carry."""
    error = BodyTooLarge(limit_bytes=BATCH_BYTES_MAX)
    body = {"status": error.status, "code": error.code, "title": error.title, "detail": error.detail} | error.params
    return Answer(command_id=command_id, status=error.status, body=body)


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


def _decoded(response: httpx.Response, decoder: msgspec.json.Decoder[Any]) -> Any:
    try:
        return decoder.decode(response.content)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise _strange(response) from None


def _strange(response: httpx.Response) -> Problem:
    detail = f"{response.url} gave something else than Muniment answers: is it a Muniment server?"
    return Problem(response.status_code, "unknown_problem", "Not an answer", detail)


def _retry_after_seconds(response: httpx.Response) -> float:
    """Retry-After in either of its forms (RFC 9110 s10.2.3); 0 where it says nothing."""
    said = response.headers.get("retry-after", "")
    with suppress(ValueError, OverflowError):
        if said.isdecimal():
            return float(said)
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    return 0.0


def _parameter(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
