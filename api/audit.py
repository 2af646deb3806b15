"""Searching the audit trail over HTTP: words, filters, and how many of what there are."""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType

from api.events import Events, Found, find, no_events, show
from api.http import Answer, Call
from api.reading import SEEN, fresh, given, reading, seen
from projections import audit


class SearchQuery(Found, kw_only=True, forbid_unknown_fields=True):
    """What to look for."""

    q: (
        Annotated[str, Meta(min_length=1, max_length=1000, description="Plain words, all of which must be there.")]
        | UnsetType
    ) = UNSET
    order: Literal["asc", "desc"] = "desc"
    facets: Annotated[bool, Meta(description="Whether to count what is found by type and actor.")] = True


class SearchPage(Events, kw_only=True):
    """What was found, newest first unless asked otherwise, and how many of what there are."""

    facets: audit.Facets | None


NOTHING = audit.Facets(types={}, actors={}, counted=0, is_exact=True)


@reading(
    "/audit/search",
    tag="events",
    query=SearchQuery,
    answers={200: SearchPage},
    sends=SEEN,
    empty=lambda call, query: no_events(call, query, facets=NOTHING if query.facets else None),
)
async def search_audit(call: Call, query: SearchQuery) -> Answer:
    """Find events by words and filters. Personal values are not searched."""
    wanted = given(query, audit.Filter)
    at = await fresh(call, "audit", query)
    facets: Any = None
    if query.facets:
        async with call.connection() as connection:
            assert call.ledger_id is not None
            facets = await audit.facets(connection, call.ledger_id, wanted)
    return await show(call, await find(call, query, wanted), seen(at), facets=facets)


ROUTES = [search_audit]
