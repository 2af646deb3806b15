"""Sessions over HTTP."""

from typing import Annotated, Any, Literal
from uuid import UUID

from msgspec import UNSET, Meta, Struct, UnsetType

from api import resources
from api.commands import commanding
from api.events import FORMS, Listed, find, show
from api.http import Answer, Call, encode
from api.reading import (
    LIMIT_MAX,
    SEEN,
    Dated,
    Single,
    SingleHeaders,
    as_of,
    dated,
    fresh,
    given,
    knows,
    or_none,
    reached,
    reading,
    replay,
    seen,
    single,
)
from ledger import store
from ledger.commands import AnnotateSession, CancelSession, ChangeSession, Moment, OpenSession, Status
from ledger.errors import MalformedRequest, NotFound
from ledger.postgres import Connection
from ledger.session import Session
from ledger.values import Line
from projections import approvals, audit, sessions


class SessionQuery(Dated, kw_only=True, forbid_unknown_fields=True):
    """Which sessions, and which part of the list."""

    state: Status | UnsetType = UNSET
    agent_role: Line | UnsetType = UNSET
    label: Annotated[Line, Meta(description="`key:value` or `key=value`.")] | UnsetType = UNSET
    since: Annotated[Moment, Meta(description="Opened then or later.")] | UnsetType = UNSET
    until: Annotated[Moment, Meta(description="Opened before.")] | UnsetType = UNSET
    page: Annotated[int, Meta(ge=1, le=10_001, description="Up to 10,000 sessions deep; `after` leads further.")] = 1
    page_size: Annotated[int, Meta(ge=1, le=LIMIT_MAX)] = 20
    limit: Annotated[int, Meta(ge=1, le=LIMIT_MAX, description="Another name of `page_size`.")] | UnsetType = UNSET
    after: (
        Annotated[str, Meta(max_length=100, description="Go on after this: `next` of the page before.")] | UnsetType
    ) = UNSET
    order: Annotated[Literal["desc"], Meta(description="Newest first, always.")] = "desc"


class SessionPage(Struct, kw_only=True):
    """A part of a list of sessions. Beyond 10,000 the total is not counted, and `next` is the way on."""

    sessions: list[Session]
    total: int
    total_is_exact: bool
    page: int
    page_size: int
    next: str | None


async def _no_sessions(call: Call, query: SessionQuery) -> Answer:
    counted = {"total": 0, "total_is_exact": True, "page": query.page, "page_size": _page_size(query)}
    return Answer(200, encode({"sessions": [], **counted, "next": None}))


def _page_size(query: SessionQuery) -> int:
    return query.page_size if query.limit is UNSET else query.limit


@reading(
    "/sessions",
    tag="sessions",
    query=SessionQuery,
    answers={200: SessionPage},
    sends=SEEN,
    empty=_no_sessions,
)
async def list_sessions(call: Call, query: SessionQuery) -> Answer:
    """Sessions, newest first."""
    page_size = _page_size(query)
    if query.after is not UNSET and query.page != 1:
        raise MalformedRequest([{"pointer": "page", "detail": "`after` says where to go on; send one of them"}])
    part: dict[str, Any] = {
        "limit": page_size,
        "offset": (query.page - 1) * page_size,
        "after": or_none(query.after),
    }
    wanted = given(query, sessions.Filter)
    assert call.ledger_id is not None
    if (then := await as_of(call, query)) is not None:
        at = await knows(call, "sessions", then)
        await reached(call, "approvals", then)
        async with call.connection() as connection:
            page = await sessions.search_past(connection, call.ledger_id, then, wanted, reached=at.position, **part)
            shown = [session.session_id for session in page.sessions]
            waited_on = await approvals.waited_on(connection, call.ledger_id, then, shown)
        return await _listed(call, query, page, waited_on, dated(at, then))
    at = await fresh(call, "sessions", query)
    async with call.connection() as connection:
        page = await sessions.search(connection, call.ledger_id, wanted, **part)
        shown = [session.session_id for session in page.sessions]
        waited_on = await store.read_waited_on(connection, call.ledger_id, shown)
    return await _listed(call, query, page, waited_on, seen(at))


async def _listed(
    call: Call,
    query: SessionQuery,
    page: sessions.Page,
    waited_on: dict[UUID, list[UUID]],
    headers: list[tuple[bytes, bytes]],
) -> Answer:
    sessions_shown = await resources.reveal(call.api.vault, call.caller.project_id, page.sessions)
    for item, session in zip(sessions_shown, page.sessions, strict=True):
        item["waiting_on"] = waited_on.get(session.session_id, [])
    shown = {
        "sessions": sessions_shown,
        "total": page.total,
        "total_is_exact": page.total_is_exact,
        "page": query.page,
        "page_size": _page_size(query),
        "next": page.next,
    }
    return Answer(200, encode(shown), headers)


@reading(
    "/sessions/{session_id:str}",
    tag="sessions",
    query=Single,
    headers=SingleHeaders,
    answers={200: Session, 304: None},
    sends=("Ledger-Position", "ETag"),
)
async def get_session(call: Call, query: Single) -> Answer:
    """One session, as it is now or was; with the approvals that it waits on, which are not of its version."""
    then = await as_of(call, query)
    if then is not None:
        await reached(call, "approvals", then)

    async def waiting_on(connection: Connection, session: Session) -> dict[str, Any]:
        assert call.ledger_id is not None
        if then is None:
            waited_on = await store.read_waited_on(connection, call.ledger_id, [session.session_id])
        else:
            waited_on = await approvals.waited_on(connection, call.ledger_id, then, [session.session_id])
        return {"waiting_on": waited_on.get(session.session_id, [])}

    return await single(call, query, "session", sessions.get, waiting_on, then)


@reading(
    "/sessions/{session_id:str}/events",
    tag="sessions",
    query=Listed,
    answers={200: FORMS},
    sends=(*SEEN, "Link"),
)
async def get_session_events(call: Call, query: Listed) -> Answer:
    """Everything of a session: its own events, and those of what belongs to it."""
    session_id = call.path_id("session_id", "session")
    assert call.ledger_id is not None
    at = await fresh(call, "audit", query)
    async with call.connection() as connection:
        known = await sessions.get(connection, call.ledger_id, session_id)
        if known is None and await replay(connection, call.ledger_id, "session", session_id) is None:
            raise NotFound(what="session", id=session_id)
    return await show(call, await find(call, query, audit.Filter(session=session_id)), seen(at))


ROUTES = [
    commanding("POST", "/sessions", OpenSession),
    list_sessions,
    get_session,
    commanding("PUT", "/sessions/{session_id:str}", ChangeSession, "session_id"),
    commanding("POST", "/sessions/{session_id:str}/cancel", CancelSession, "session_id"),
    commanding("POST", "/sessions/{session_id:str}/annotations", AnnotateSession, "session_id"),
    get_session_events,
]
