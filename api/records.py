"""Records over HTTP."""

from typing import Annotated, Literal
from uuid import UUID

from msgspec import UNSET, Meta, Struct, UnsetType

from api import resources
from api.commands import commanding
from api.http import Answer, Call, encode
from api.reading import SEEN, Listing, Single, SingleHeaders, as_of, fresh, given, or_none, reading, seen, single
from ledger.commands import Kind, Moment, Record
from ledger.record import RecordedFact
from ledger.values import Line
from projections import records


class RecordQuery(Listing, kw_only=True, forbid_unknown_fields=True):
    """Which records, and which part of the list."""

    session_id: UUID | UnsetType = UNSET
    task_id: UUID | UnsetType = UNSET
    approval_id: UUID | UnsetType = UNSET
    parent_record_id: UUID | UnsetType = UNSET
    kind: Kind | UnsetType = UNSET
    status: Literal["ok", "error"] | UnsetType = UNSET
    external_id: Line | UnsetType = UNSET
    actor: Annotated[Line, Meta(description="`sub` or `issuer#sub`.")] | UnsetType = UNSET
    ref: Annotated[Line, Meta(description="`type:id`, such as `invoice:9`.")] | UnsetType = UNSET
    since: Annotated[Moment, Meta(description="Recorded then or later.")] | UnsetType = UNSET
    until: Annotated[Moment, Meta(description="Recorded before.")] | UnsetType = UNSET
    order: Literal["asc", "desc"] = "desc"


class RecordPage(Struct, kw_only=True):
    """A part of a list of records; `next` leads on."""

    records: list[RecordedFact]
    next: str | None


async def _no_records(call: Call, query: RecordQuery) -> Answer:
    return Answer(200, encode({"records": [], "next": None}))


@reading(
    "/records",
    tag="records",
    query=RecordQuery,
    answers={200: RecordPage},
    sends=SEEN,
    empty=_no_records,
)
async def list_records(call: Call, query: RecordQuery) -> Answer:
    """Records, newest first unless `order` says otherwise."""
    at = await fresh(call, "records", query)
    async with call.connection() as connection:
        assert call.ledger_id is not None
        page = await records.search(
            connection,
            call.ledger_id,
            given(query, records.Filter),
            limit=query.limit,
            after=or_none(query.after),
            order=query.order,
        )
    shown = {
        "records": await resources.reveal(call.api.vault, call.caller.project_id, page.records),
        "next": None if page.next is None else str(page.next),
    }
    return Answer(200, encode(shown), seen(at))


@reading(
    "/records/{record_id:str}",
    tag="records",
    query=Single,
    headers=SingleHeaders,
    answers={200: RecordedFact, 304: None},
    sends=("Ledger-Position", "ETag"),
)
async def get_record(call: Call, query: Single) -> Answer:
    """One record."""
    return await single(call, query, "record", records.get, then=await as_of(call, query))


ROUTES = [commanding("POST", "/records", Record, listed=True), list_records, get_record]
