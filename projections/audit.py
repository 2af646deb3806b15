"""The view `audit`: every event, to be found by type, stream, session, actor, ref, correlation, time and words.

It answers with positions, and the ledger holds what stands there: the view keeps the terms an event is found
by (`terms.py`) and what facets count. A sealed value is never among them.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from msgspec import Struct

from ledger.entry import Event, Recorded
from ledger.events import Fact
from ledger.postgres import Connection, queries
from projections.projector import Memory
from projections.segments import Index, Order, pack
from projections.terms import Condition, event_terms, event_words, has, has_actor, has_stream, has_words, place_terms

WRITE = queries("projections", "audit").write
VERSION = 1

FACETS_EVENTS_MAX = 10_000
"""How many of the newest events found are counted."""

FACET_VALUES_MAX = 100

_index = Index("audit")


class Filter(Struct, kw_only=True, frozen=True):
    """Which events: all that is given must hold.

    `actor` is `sub` or `issuer#sub`, `ref` is `type:id`; `q` is plain words, which must all be there.
    """

    type: str | None = None
    stream: UUID | None = None
    session: UUID | None = None
    actor: str | None = None
    ref: str | None = None
    correlation: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    q: str | None = None

    def conditions(self) -> list[Condition]:
        """The filter in the terms of the index, but for its times. Raises MalformedRequest for a `q` without words."""
        named = {
            "type": self.type,
            "session": self.session,
            "ref": self.ref,
            "correlation": self.correlation,
        }
        conditions = [has(kind, value) for kind, value in named.items() if value is not None]
        if self.stream is not None:
            conditions.append(has_stream(self.stream))
        if self.actor is not None:
            conditions.append(has_actor(self.actor))
        return conditions if self.q is None else [*conditions, *has_words(self.q)]


class Facets(Struct, kw_only=True, frozen=True):
    """How many events found are of each type and by each actor (`issuer#sub`), the most frequent first.

    `counted` events were counted; unless `is_exact` there may be more, older ones.
    """

    types: dict[str, int]
    actors: dict[str, int]
    counted: int
    is_exact: bool


async def project(
    connection: Connection, ledger_id: UUID, batch: Sequence[Recorded], memory: Memory
) -> dict[str, bytes]:
    """What brings the view from just before `batch` to just after it: the values of WRITE."""
    firsts, times, terms = pack(ledger_id, batch, _terms)
    return {"audit_firsts": firsts, "audit_times": times, "audit_terms": terms}


def _terms(event: Event[Fact]) -> set[bytes]:
    terms = event_words(event)
    terms.update(event_terms(event), place_terms(event))
    return terms


async def search(
    connection: Connection,
    ledger_id: UUID,
    wanted: Filter,
    *,
    limit: int,
    after: int | None = None,
    order: Order = "asc",
) -> list[int]:
    """Up to `limit` positions beyond the position `after`, in the order of the ledger or the other way."""
    found = _index.search(
        connection,
        ledger_id,
        wanted.conditions(),
        since=wanted.since,
        until=wanted.until,
        after=after,
        limit=limit,
        order=order,
    )
    return [position async for segment in found for position in segment.positions]


async def facets(connection: Connection, ledger_id: UUID, wanted: Filter) -> Facets:
    """Counts over what `search` would find, of the newest FACETS_EVENTS_MAX at most."""
    counted = 0
    counts: dict[str, Counter[str]] = {"type": Counter(), "principal": Counter()}
    async for segment in _index.search(
        connection,
        ledger_id,
        wanted.conditions(),
        since=wanted.since,
        until=wanted.until,
        limit=FACETS_EVENTS_MAX,
        order="desc",
        counting=True,
    ):
        await asyncio.sleep(0)  # all of it may take 50 ms, and others wait for this process
        counted += len(segment.positions)
        for name, count in segment.counts.items():
            kind, _, value = name.decode().partition(":")
            counts[kind][value] += count
    types, actors = (dict((+counter).most_common(FACET_VALUES_MAX)) for counter in counts.values())
    return Facets(types=types, actors=actors, counted=counted, is_exact=counted < FACETS_EVENTS_MAX)
