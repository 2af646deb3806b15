"""The one flow of every read: who asks -> which parameters -> how fresh -> the answer.

A list is read from its view once that has caught up to the head seen on arrival, or says by how much it is
behind. A single thing never depends on a view: where that is behind, its stream is folded. Nothing is written.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl
from uuid import UUID

from litestar import Request, route
from litestar.handlers import HTTPRouteHandler
from msgspec import UNSET, Meta, Struct, UnsetType

from api import resources
from api.http import READ, Answer, Call, Operation, convert
from api.resources import Resource
from ledger import errors, past, store
from ledger.batch import RULES
from ledger.commands import Moment
from ledger.errors import MalformedRequest, NotFound
from ledger.past import Past
from ledger.postgres import Connection
from ledger.replay import fold
from ledger.values import Count, stamp
from projections import VIEWS, Freshness, caught_up, spans
from projections.freshness import HEAD_SECONDS_MAX

PARAMETERS_MAX = 50
LIMIT_MAX = 200
WAIT_SECONDS_MAX = 60
LOOK_SECONDS = 1.0
"""How often a change is looked for of which this process was not told."""

SETTLED_WITHIN_SECONDS = 10.0
"""How long to wait for a commit that may be of the time that is asked about."""

SEEN = ("Ledger-Position", "View-Behind", "View-State")
"""What an answer from a view says of that, see `seen`."""

REFUSALS = (
    errors.MalformedRequest,
    errors.Unauthenticated,
    errors.Forbidden,
    errors.UnknownProject,
    errors.NotFound,
    errors.StoreUnavailable,
    errors.ViewBehind,
    errors.UpgradeRequired,
)
"""Everything that a reader may be told instead of what was asked for."""

Q = TypeVar("Q", bound=Struct)
F = TypeVar("F", bound=Struct)
T = TypeVar("T")


class NoParameters(Struct, forbid_unknown_fields=True):
    """For routes that take none."""


class Fresh(Struct, kw_only=True, forbid_unknown_fields=True):
    """How fresh an answer must be."""

    min_position: (
        Annotated[Count, Meta(description="Wait up to 1 s until this position is in the answer; 0 never waits.")]
        | UnsetType
    ) = UNSET


class Dated(Fresh, kw_only=True, forbid_unknown_fields=True):
    """As of when. An answer about the past is the same however often it is asked for."""

    as_of: Annotated[Moment, Meta(description="As things were at this time.")] | UnsetType = UNSET
    as_of_position: Annotated[Count, Meta(description="As things were after this event.")] | UnsetType = UNSET


After: TypeAlias = Annotated[Count, Meta(description="Go on after this: the `next` of the page before.")]
Limit: TypeAlias = Annotated[int, Meta(ge=1, le=LIMIT_MAX, description="How many at most.")]


class Listing(Fresh, kw_only=True, forbid_unknown_fields=True):
    """Which part of a list."""

    after: After | UnsetType = UNSET
    limit: Limit = 50


class DatedListing(Dated, kw_only=True, forbid_unknown_fields=True):
    """Which part of a list, as of when."""

    after: After | UnsetType = UNSET
    limit: Limit = 50


class Single(Dated, kw_only=True, forbid_unknown_fields=True):
    """How to wait for one thing."""

    wait_seconds: Annotated[
        int,
        Meta(ge=0, le=WAIT_SECONDS_MAX, description="With If-None-Match: wait so long for a change before a 304."),
    ] = 0


class SingleHeaders(Struct, rename={"if_none_match": "If-None-Match"}):
    if_none_match: (
        Annotated[str, Meta(description='The ETag you have, such as `"3"`: 304 if it is still that.')] | UnsetType
    ) = UNSET


Work = Callable[[Call, Q], Awaitable[Answer]]


def readers(call: Call) -> None:
    """Raises Forbidden unless the caller may read what is recorded in the project."""
    call.caller.require_reader("Reading")


def reading(
    path: str,
    *,
    tag: str,
    answers: dict[int, Any],
    query: type[Q] = NoParameters,  # type: ignore[assignment]
    headers: type[Struct] | None = None,
    sends: tuple[str, ...] = (),
    empty: Work[Q] | None = None,
    require: Callable[[Call], None] = readers,
) -> Callable[[Work[Q]], HTTPRouteHandler]:
    """Make a GET route (and HEAD), for callers of whom `require` holds, of a function of the call and its parameters.

    `empty` is what a project that has no ledger yet is answered; without it the answer is 404.
    """

    def route_of(function: Work[Q]) -> HTTPRouteHandler:
        async def work(call: Call) -> Answer:
            call.read_headers()
            await call.authenticate()
            require(call)
            parameters = read_query(call.scope["query_string"], query)
            if await call.find_ledger() is not None:
                return await function(call, parameters)
            if empty is None:
                raise NotFound(what="ledger", id=call.caller.project_id)
            if isinstance(parameters, Fresh):
                _of_nothing(call, parameters, function.__name__)
            answer = await empty(call, parameters)
            answer.headers.append((b"ledger-position", b"0"))
            return answer

        async def handler(request: Request[Any, Any, Any]) -> Answer:
            return await Call(request.scope).answer(work)

        operation = Operation(
            tag=tag,
            name=function.__name__,
            doc=function.__doc__ or "",
            query=query,
            headers=headers,
            answers=answers,
            sends=("Ledger-Id", *sends),
            refusals=REFUSALS,
        )
        return route(path, http_method=READ, name=operation.name, opt={"operation": operation})(handler)

    return route_of


# Parameters


def read_query(query_string: bytes, parameters: type[Q]) -> Q:
    """The query parameters as `parameters` declares them. Raises MalformedRequest by name."""
    sent: dict[str, str] = {}
    if query_string:
        try:
            pairs = parse_qsl(query_string.decode("ascii"), True, errors="strict", max_num_fields=PARAMETERS_MAX)
        except ValueError:
            detail = f"the query is not percent-encoded UTF-8 of at most {PARAMETERS_MAX} parameters"
            raise MalformedRequest([{"pointer": "", "detail": detail}]) from None
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise MalformedRequest([{"pointer": name, "detail": "it is there twice; send it once"} for name in twice])
        sent = dict(pairs)
    return convert(sent, parameters)


def given(query: Struct, wanted: type[F]) -> F:
    """What `query` says of the fields that `wanted` has."""
    said = {name: getattr(query, name) for name in wanted.__struct_fields__ if hasattr(query, name)}
    return wanted(**{name: value for name, value in said.items() if value is not UNSET})


def or_none(value: T | UnsetType) -> T | None:
    return None if value is UNSET else value


# Freshness


async def fresh(call: Call, view: str, query: Fresh) -> Freshness:
    """Where `view` is, once it is as fresh as asked. Raises ViewBehind, StoreUnavailable."""
    assert call.ledger_id is not None
    return await caught_up(call.api.pool, view, call.ledger_id, min_position=or_none(query.min_position))


def seen(freshness: Freshness) -> list[tuple[bytes, bytes]]:
    """The headers SEEN, which say how fresh an answer is, and whether its view is well."""
    headers = [(b"ledger-position", b"%d" % freshness.position)]
    if freshness.behind:
        headers.append((b"view-behind", b"%d" % freshness.behind))
    if freshness.state:
        headers.append((b"view-state", freshness.state.encode()))
    return headers


async def head(call: Call, query: Fresh, view: str) -> Freshness:
    """Where the ledger stands, `min_position` at least, for what is read from the ledger and not from a view."""
    at = await _look(call, view)
    if query.min_position is UNSET or at.head >= query.min_position:
        return at
    return await fresh(call, view, query)


async def _look(call: Call, view: str) -> Freshness:
    assert call.ledger_id is not None
    return await caught_up(call.api.pool, view, call.ledger_id, timeout_seconds=0)


def _of_nothing(call: Call, query: Fresh, name: str) -> None:
    """What may be asked of a project that has no ledger yet. Raises ViewBehind, MalformedRequest, ClockSkew."""
    if query.min_position is not UNSET and query.min_position > 0:
        raise errors.ViewBehind(view=name, position=0, wanted=query.min_position)
    if isinstance(query, Dated) and _of_the_past(query):
        if query.as_of is not UNSET and query.as_of > call.api.committer.clock.now():
            raise _no_moment("as_of", "it is in the future")
        if query.as_of_position is not UNSET and query.as_of_position > 0:
            raise _no_moment("as_of_position", "it is in the future: nothing is recorded yet")


# The past


class ViewOfThePresent(errors.ViewBehind):
    """A view that was built by an earlier release, which kept nothing of the past."""

    title = "The view knows nothing of the past yet"
    template = "The view {view} is being built again by a newer release; until then it tells only what is. Ask again."


def _no_moment(name: str, detail: str) -> MalformedRequest:
    return MalformedRequest([{"pointer": name, "detail": detail}])


def _of_the_past(query: Dated) -> bool:
    """Raises MalformedRequest where what was asked for does not go together."""
    named = [name for name in ("as_of", "as_of_position") if getattr(query, name) is not UNSET]
    if len(named) == 2:
        detail = "both say when, and one may be of another moment than the other; send one"
        raise MalformedRequest([{"pointer": name, "detail": detail} for name in named])
    waits = {"min_position": query.min_position is not UNSET, "wait_seconds": getattr(query, "wait_seconds", 0) > 0}
    if named and any(waits.values()):
        detail = f"what is asked of the past (`{named[0]}`) is not waited for; send one of them"
        raise MalformedRequest([{"pointer": name, "detail": detail} for name, said in waits.items() if said])
    if query.as_of is not UNSET:
        try:
            query.as_of.astimezone(UTC)
        except OverflowError:
            raise _no_moment("as_of", "in UTC it is not within the years 1 to 9999") from None
    return bool(named)


async def as_of(call: Call, query: Dated) -> Past | None:
    """The moment of the past that is asked about; None where it is now. Raises MalformedRequest, StoreUnavailable.

    A time so young that something could still be recorded at it, or before, is waited for until it is not.
    """
    if not _of_the_past(query):
        return None
    assert call.ledger_id is not None
    if query.as_of is not UNSET:
        loop = asyncio.get_running_loop()
        until = loop.time() + SETTLED_WITHIN_SECONDS
        while True:
            async with call.connection() as connection:
                found = await past.find(connection, call.ledger_id, query.as_of)
            if query.as_of > found.now:
                raise _no_moment("as_of", f"it is in the future: it is {stamp(found.now)}")
            if not found.unsettled_seconds:
                return Past(found.position, query.as_of)
            if loop.time() >= until:
                raise errors.StoreUnavailable(why="What may be of that time is being written still")
            await asyncio.sleep(found.unsettled_seconds)
    assert query.as_of_position is not UNSET
    async with call.connection() as connection:
        at = await past.time_of(connection, call.ledger_id, query.as_of_position)
        if at is None and query.as_of_position:
            head = await store.head(connection, call.ledger_id)
            raise _no_moment("as_of_position", f"it is in the future: the last position is {head.size}")
    return Past(query.as_of_position, at or datetime.min.replace(tzinfo=UTC))


async def knows(call: Call, view: str, then: Past) -> Freshness:
    """Where `view` is, once that is far enough to list what was then. Raises ViewBehind, StoreUnavailable."""
    assert call.ledger_id is not None
    async with call.connection() as connection:
        if await spans.version(connection, view) < VIEWS[view].VERSION:
            raise ViewOfThePresent(view=view)
    return await reached(call, view, then)


async def reached(call: Call, view: str, then: Past) -> Freshness:
    """Where `view` is, once it has come to that moment; as long is waited as for the present."""
    assert call.ledger_id is not None
    wait: dict[str, Any] = {"min_position": then.position, "timeout_seconds": HEAD_SECONDS_MAX}
    return await caught_up(call.api.pool, view, call.ledger_id, **wait)


def dated(at: Freshness, then: Past) -> list[tuple[bytes, bytes]]:
    """The headers SEEN of an answer about the past, by a view that has come that far."""
    return seen(at._replace(position=then.position, head=then.position))


# One thing

Get = Callable[[Connection, UUID, UUID], Awaitable[Resource | None]]
Beside = Callable[[Connection, Any], Awaitable[dict[str, Any]]]


async def _nothing(connection: Connection, state: Any) -> dict[str, Any]:
    return {}


async def replay(connection: Connection, ledger_id: UUID, what: str, stream_id: UUID, then: Past | None = None) -> Any:
    """The state of a stream of the type `what`, as its own events make it, or made it then; None if there is, or was,
    no such one."""
    upto = None if then is None else then.position
    state = fold(await store.read_streams(connection, ledger_id, [stream_id], upto=upto))
    return state if isinstance(state, RULES[what][1]) else None


async def single(
    call: Call, query: Single, what: str, get: Get, beside: Beside = _nothing, then: Past | None = None
) -> Answer:
    """The one `what` (a stream type) that the path names, as of a head of the ledger: by `get` if its view is there
    already, and not known to be wrong, else from its stream; and what there is now `beside` it. With If-None-Match,
    once it has changed or the time is up, which it is as well when the process is to end. Or as it was `then`, and
    what was beside it. Raises NotFound."""
    stream_id, view, ledger_id = call.path_id(f"{what}_id", what), f"{what}s", call.ledger_id
    assert ledger_id is not None
    if then is not None:
        return await _past_single(call, what, stream_id, beside, then)
    loop = asyncio.get_running_loop()
    until = loop.time() + query.wait_seconds
    known = call.headers.get(b"if-none-match")
    changed: asyncio.Future[None] | None = None
    at = await head(call, query, view)
    while True:
        async with call.connection() as connection:
            if at.behind or at.is_drifted:
                state = await replay(connection, ledger_id, what, stream_id)
            else:
                state = await get(connection, ledger_id, stream_id)
            if state is None:
                raise NotFound(what=what, id=stream_id)
            known_beside = await beside(connection, state)
        etag = resources.etag(state)
        headers = [(b"etag", etag), (b"ledger-position", b"%d" % at.head)]
        if known is None or not matches(known, etag):
            shown = await resources.encode(call.api.vault, call.caller.project_id, state, known_beside)
            return Answer(200, shown, headers)
        was = at.head
        while changed is None or at.head == was:
            if loop.time() >= until or call.api.ending:
                return Answer(304, b"", headers)
            if changed is not None:
                await asyncio.wait([changed], timeout=min(LOOK_SECONDS, until - loop.time()))
            changed = call.api.committer.watch.changed(resources.identity(state))
            at = await _look(call, view)


async def _past_single(call: Call, what: str, stream_id: UUID, beside: Beside, then: Past) -> Answer:
    assert call.ledger_id is not None
    async with call.connection() as connection:
        state = await replay(connection, call.ledger_id, what, stream_id, then)
        if state is None:
            raise NotFound(what=what, id=stream_id)
        known_beside = await beside(connection, state)
    etag, known = resources.etag(state), call.headers.get(b"if-none-match")
    headers = [(b"etag", etag), (b"ledger-position", b"%d" % then.position)]
    if known is not None and matches(known, etag):
        return Answer(304, b"", headers)
    return Answer(200, await resources.encode(call.api.vault, call.caller.project_id, state, known_beside), headers)


def matches(known: bytes, etag: bytes) -> bool:
    """RFC 9110 s13.1.2: weak comparison with any of a list; `*` is any."""
    tags = [tag.strip().removeprefix(b"W/") for tag in known.split(b",")]
    return b"*" in tags or etag in tags
