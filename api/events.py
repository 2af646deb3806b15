"""The audit trail over HTTP: every event as it was recorded, in place, as JSON, NDJSON or CSV.

An event is shown as its stored bytes say it, with its position before them; only sealed values are opened, for
whoever may read. Without a filter the trail comes from the ledger itself and needs no view.
"""

import csv
import io
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import parse_qsl, urlencode
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from api.http import JSON, Answer, Call
from api.reading import SEEN, Fresh, Listing, fresh, given, head, or_none, reading, seen
from api.resources import SEALED
from ledger import store
from ledger.commands import Moment
from ledger.entry import canonical, whole
from ledger.errors import NotFound
from ledger.store import Stored
from ledger.values import Actor, Count, Line, Ref, Stamp
from ledger.vault import Place
from projections import audit

LIMIT_MAX = 1000
PAGE_BYTES_MAX = 16 * 1024 * 1024
FETCH_EVENTS = 100
NDJSON, CSV = b"application/x-ndjson", b"text/csv"


class ShownEvent(Struct, kw_only=True, omit_defaults=True):
    """An event in its place. What is absent was not given."""

    position: Count
    v: int
    project: str
    ledger: UUID
    event_id: UUID
    stream_type: str
    stream_id: UUID
    stream_version: int
    type: str
    schema_version: int
    occurred_at: Stamp
    recorded_at: Stamp
    actor: Actor
    command_id: str
    correlation_id: str
    data: dict[str, Any]
    session_id: UUID | None = None
    root_session_id: UUID | None = None
    causation_id: UUID | None = None
    traceparent: str | None = None
    external_id: str | None = None
    refs: list[Ref] = []
    reason: Any = None


class Events(Struct, kw_only=True):
    """A part of the audit trail. A page is also cut where it grows large; `next` leads on."""

    events: list[ShownEvent]
    next: str | None


class Listed(Listing, kw_only=True, forbid_unknown_fields=True):
    """Which part of the audit trail."""

    limit: Annotated[int, Meta(ge=1, le=LIMIT_MAX, description="How many at most.")] = 50
    order: Literal["asc", "desc"] = "asc"


class Found(Listed, kw_only=True, forbid_unknown_fields=True):
    """Which events; all that is given must hold."""

    type: Annotated[Line, Meta(description="Such as `SessionOpened`.")] | UnsetType = UNSET
    stream: Annotated[UUID, Meta(description="The id of a session, a record or a refusal.")] | UnsetType = UNSET
    session: Annotated[UUID, Meta(description="Everything that belongs to this session.")] | UnsetType = UNSET
    actor: Annotated[Line, Meta(description="`sub` or `issuer#sub`.")] | UnsetType = UNSET
    ref: Annotated[Line, Meta(description="`type:id`, such as `invoice:9`.")] | UnsetType = UNSET
    correlation: Annotated[Line, Meta(description="What it belongs to.")] | UnsetType = UNSET
    since: Annotated[Moment, Meta(description="Recorded then or later.")] | UnsetType = UNSET
    until: Annotated[Moment, Meta(description="Recorded before.")] | UnsetType = UNSET


class Page(NamedTuple):
    """Where the events of a page stand, and whether there are more."""

    positions: Sequence[int]
    more: bool


async def find(call: Call, query: Listed, wanted: audit.Filter) -> Page:
    """The events that the audit view finds."""
    async with call.connection() as connection:
        assert call.ledger_id is not None
        found = await audit.search(
            connection,
            call.ledger_id,
            wanted,
            limit=query.limit + 1,
            after=or_none(query.after),
            order=query.order,
        )
    return Page(found[: query.limit], len(found) > query.limit)


def stretch(query: Listed, head: int) -> Page:
    """The next events of the whole trail: positions are dense, so nothing need be looked for."""
    if query.order == "asc":
        first = 1 if query.after is UNSET else query.after + 1
        last = min(head, first + query.limit - 1)
        return Page(range(first, last + 1), last < head)
    last = head if query.after is UNSET else min(head, query.after - 1)
    first = max(1, last - query.limit + 1)
    return Page(range(last, first - 1, -1), first > 1)


async def no_events(call: Call, query: Listed, **beside: Any) -> Answer:
    """What a project without a ledger has, in the form that is asked for."""
    return await show(call, Page((), False), [], **beside)


async def show(call: Call, page: Page, headers: list[tuple[bytes, bytes]], **beside: Any) -> Answer:
    """A page in the form that is asked for; in JSON with what belongs `beside` it."""
    shown: list[tuple[int, bytes]] = []
    size = 0
    async for event in _read(call, page.positions):
        shown.append(event)
        size += len(event[1])
        if size > PAGE_BYTES_MAX:
            break
    more = page.more or len(shown) < len(page.positions)
    after = shown[-1][0] if more and shown else None
    events = [event for _, event in shown]
    form = _form(call.headers.get(b"accept", b""))
    if form != JSON and after is not None:
        query = [pair for pair in parse_qsl(call.scope["query_string"].decode()) if pair[0] != "after"]
        address = f"{call.scope['path']}?{urlencode([*query, ('after', after)])}"
        headers = [*headers, (b"link", f'<{address}>; rel="next"'.encode())]
    headers = [*headers, (b"vary", b"Accept")]
    if form == NDJSON:
        return Answer(200, b"".join(event + b"\n" for event in events), headers, NDJSON)
    if form == CSV:
        return Answer(200, _table(events), headers, CSV + b"; charset=utf-8; header=present")
    end = {"next": None if after is None else str(after), **beside}
    return Answer(200, b'{"events":[' + b",".join(events) + b"]," + msgspec.json.encode(end)[1:], headers)


def position_of(call: Call) -> int:
    """The position that the path names; 0, which no event has, where it names none."""
    named = call.scope["path_params"]["position"]
    return int(named) if named.isascii() and named.isdigit() and len(named) < 20 else 0


async def _read(call: Call, positions: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
    """The events at these positions, in this order, a few at a time."""
    for begin in range(0, len(positions), FETCH_EVENTS):
        assert call.ledger_id is not None
        wanted = positions[begin : begin + FETCH_EVENTS]
        async with call.connection() as connection:
            stored = await store.read_positions(connection, call.ledger_id, wanted)
        readable = dict(zip((row.position for row in stored), await _readable(call, stored), strict=True))
        for position in wanted:
            yield position, readable[position]


class _Where(Struct):
    stream_id: UUID
    stream_version: int
    event_id: UUID


async def _readable(call: Call, stored: Sequence[Stored]) -> list[bytes]:
    """Each event as JSON with its position, personal values opened; all keys in one go. Raises BrokenSeal."""
    entries = [whole(row.entry, row.payload) for row in stored]
    sealed = [index for index, entry in enumerate(entries) if SEALED in entry]
    if sealed:
        project_id = call.caller.project_id
        places = [msgspec.json.decode(entries[index], type=_Where) for index in sealed]
        values = [
            (msgspec.json.decode(entries[index]), Place(project_id, at.stream_id, at.stream_version, at.event_id, ""))
            for index, at in zip(sealed, places, strict=True)
        ]
        for index, opened in zip(sealed, await call.api.vault.unseal_all(project_id, values), strict=True):
            entries[index] = canonical(opened)
    return [b'{"position":%d,' % row.position + entry[1:] for row, entry in zip(stored, entries, strict=True)]


def _form(accept: bytes) -> bytes:
    """The form that is preferred (RFC 9110 s12.5.1); JSON where none of ours is named."""
    best, weight = JSON, 0.0
    for part in accept.lower().split(b","):
        name, *parameters = [piece.strip() for piece in part.split(b";")]
        quality = next((p[2:] for p in parameters if p.startswith(b"q=")), b"1")
        try:
            asked = float(quality)
        except ValueError:
            continue
        if name in (JSON, NDJSON, CSV) and asked > weight:
            best, weight = name, asked
    return best


COLUMNS = (
    *("position", "recorded_at", "occurred_at", "type", "stream_type", "stream_id", "stream_version", "session_id"),
    *("issuer", "sub", "kind", "command_id", "correlation_id", "causation_id", "external_id", "refs", "reason", "data"),
    "event_id",
)


def _table(events: Sequence[bytes]) -> bytes:
    """RFC 4180, with a header line."""
    out = io.StringIO(newline="")
    table = csv.writer(out)
    table.writerow(COLUMNS)
    for event in events:
        fields = msgspec.json.decode(event)
        fields |= {name: fields["actor"][name] for name in ("issuer", "sub", "kind")}
        fields["refs"] = " ".join(f"{ref['type']}:{ref['id']}" for ref in fields.get("refs", ()))
        table.writerow([_cell(fields.get(name)) for name in COLUMNS])
    return out.getvalue().encode()


def _cell(value: Any) -> str | int:
    """A value as a cell. What a spreadsheet would run as a formula gets a `'` before it."""
    if value is None:
        return ""
    if isinstance(value, int):
        return value
    text = value if isinstance(value, str) else canonical(value).decode()
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


FORMS = {"application/json": Events, "application/x-ndjson": str, "text/csv": str}
SENDS = (*SEEN, "Link")


@reading(
    "/events",
    tag="events",
    query=Found,
    answers={200: FORMS},
    sends=SENDS,
    empty=no_events,
)
async def list_events(call: Call, query: Found) -> Answer:
    """The audit trail: every event of the project, oldest first unless `order` says otherwise.

    As JSON, or as `Accept` says: `application/x-ndjson` (an event a line) or `text/csv`, whose next page is
    in the header Link."""
    wanted = given(query, audit.Filter)
    if wanted != audit.Filter():
        at = await fresh(call, "audit", query)
        return await show(call, await find(call, query, wanted), seen(at))
    at = await head(call, query, "audit")
    return await show(call, stretch(query, at.head), [(b"ledger-position", b"%d" % at.head)])


@reading("/events/{position:str}", tag="events", answers={200: ShownEvent}, sends=("Ledger-Position",), query=Fresh)
async def get_event(call: Call, query: Fresh) -> Answer:
    """One event, by its position."""
    at = await head(call, query, "audit")
    position = position_of(call)
    if not 1 <= position <= at.head:
        raise NotFound(what="event", id=call.scope["path_params"]["position"][:100])
    event = [shown async for _, shown in _read(call, [position])]
    return Answer(200, event[0], [(b"ledger-position", b"%d" % at.head)])


ROUTES = [list_events, get_event]
