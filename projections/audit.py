"""The view `audit`: every event, to be found by type, stream, session, actor, ref, correlation, time and words.

It answers with positions, and the ledger holds what stands there: the view keeps the terms an event is found
by (`terms.py`) and what facets count. A sealed value is never among them.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from msgspec import Struct

from ledger.events import Recorded
from ledger.postgres import Connection, bigints, queries, texts, tsvectors
from projections.projector import Memory
from projections.terms import (
    Index,
    Order,
    event_terms,
    event_words,
    has,
    has_actor,
    has_words,
    stretches,
    term,
)

SQL = queries("projections", "audit")
WRITE = SQL.write

FACETS_EVENTS_MAX = 10_000
"""How many of the newest events found are counted."""

FACET_VALUES_MAX = 100

_index = Index("audit", "events")


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

    def conditions(self) -> list[str]:
        """The filter in the words of the index, but for its times. Raises MalformedRequest for a `q` without words."""
        named = {
            "type": self.type,
            "stream": self.stream,
            "session": self.session,
            "ref": self.ref,
            "correlation": self.correlation,
        }
        conditions = [has(kind, value) for kind, value in named.items() if value is not None]
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


async def project(connection: Connection, ledger_id: UUID, batch: Sequence[Recorded], memory: Memory) -> dict[str, Any]:
    """What brings the view from just before `batch` to just after it: the values of WRITE."""
    events = [event for _, event in batch]
    return {
        "event_positions": bigints(position for position, _ in batch),
        "event_times": texts(event.recorded_at for event in events),
        "event_types": texts(event.type for event in events),
        "event_principals": texts(event.actor.principal.replace("\0", "\ufffd") for event in events),
        "event_terms": tsvectors(_terms(ledger_id, recorded) for recorded in batch),
    }


def _terms(ledger_id: UUID, recorded: Recorded) -> set[bytes]:
    position, event = recorded
    terms = event_words(event)
    terms.update(event_terms(ledger_id, position, event))
    terms.add(term("type", event.type))
    terms.add(term("stream", event.stream_id))
    terms.add(term("correlation", event.correlation_id))
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
    return await _index.search(
        connection,
        ledger_id,
        wanted.conditions(),
        since=wanted.since,
        until=wanted.until,
        after=after,
        limit=limit,
        order=order,
    )


async def facets(connection: Connection, ledger_id: UUID, wanted: Filter) -> Facets:
    """Counts over what `search` would find, of the newest FACETS_EVENTS_MAX at most."""
    conditions = wanted.conditions()
    first, end = await _index.bounds(connection, ledger_id, wanted.since, wanted.until)
    types: Counter[str] = Counter()
    actors: Counter[str] = Counter()
    left = FACETS_EVENTS_MAX
    for stretch in stretches(ledger_id, first, end, "desc"):
        values = {
            "ledger_id": ledger_id,
            "query": " & ".join([*conditions, stretch.span]),
            "first": stretch.first,
            "end": stretch.end,
            "limit": left,
        }
        counting = SQL.count_found if conditions else SQL.count
        for type_, principal, count in await (await connection.execute(counting, values, prepare=True)).fetchall():
            types[type_] += count
            actors[principal] += count
            left -= count
        if left <= 0:
            break
    return Facets(
        types=dict(types.most_common(FACET_VALUES_MAX)),
        actors=dict(actors.most_common(FACET_VALUES_MAX)),
        counted=types.total(),
        is_exact=left > 0,
    )
