"""The view `records`: where each record stands, to be listed by session, kind, actor, ref and time.

A record is written once, and the ledger holds it: the view keeps no second copy of a body, only the terms it
is found by (`terms.py`). What is shown is read from the ledger and made by `ledger.record.evolve`.
"""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from msgspec import Struct

from ledger import record, store
from ledger.entry import Event, Recorded
from ledger.events import Fact, FactRecorded
from ledger.postgres import Connection, queries
from ledger.record import RecordedFact
from projections.projector import Memory
from projections.segments import Index, Order, pack
from projections.terms import Condition, common_term, event_terms, has, has_actor, id_term, term

WRITE = queries("projections", "records").write
VERSION = 1

_index = Index("records")


class Filter(Struct, kw_only=True, frozen=True):
    """Which records: all that is given must hold. `actor` is `sub` or `issuer#sub`, `ref` is `type:id`."""

    session_id: UUID | None = None
    task_id: UUID | None = None
    approval_id: UUID | None = None
    parent_record_id: UUID | None = None
    kind: str | None = None
    status: str | None = None
    external_id: str | None = None
    actor: str | None = None
    ref: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def conditions(self) -> list[Condition]:
        """The filter in the terms of the index, but for its times."""
        named = {
            "session": self.session_id,
            "task": self.task_id,
            "approval": self.approval_id,
            "parent": self.parent_record_id,
            "kind": self.kind,
            "status": self.status,
            "external": self.external_id,
            "ref": self.ref,
        }
        conditions = [has(kind, value) for kind, value in named.items() if value is not None]
        return conditions if self.actor is None else [*conditions, has_actor(self.actor)]


class Page(Struct, kw_only=True, frozen=True):
    """A part of a list; `next` is the position to go on after, if there is more."""

    records: list[RecordedFact]
    next: int | None


async def project(
    connection: Connection, ledger_id: UUID, batch: Sequence[Recorded], memory: Memory
) -> dict[str, bytes]:
    """What brings the view from just before `batch` to just after it: the values of WRITE."""
    firsts, times, terms = pack(ledger_id, batch, _terms)
    return {"record_firsts": firsts, "record_times": times, "record_terms": terms}


def _terms(event: Event[Fact]) -> set[bytes]:
    data = event.data
    if not isinstance(data, FactRecorded):
        return set()
    terms = {*event_terms(event), common_term("kind", data.kind)}
    if data.status is not None:
        terms.add(common_term("status", data.status))
    if event.external_id is not None:
        terms.add(term("external", event.external_id))
    ids = (("task", data.task_id), ("approval", data.approval_id), ("parent", data.parent_record_id))
    terms.update([id_term(kind, value) for kind, value in ids if value is not None])
    return terms


async def get(connection: Connection, ledger_id: UUID, record_id: UUID) -> RecordedFact | None:
    """The record, from the ledger itself: it is there as soon as it is recorded."""
    events = await store.read_streams(connection, ledger_id, [record_id])
    if len(events) != 1 or not isinstance(events[0].event.data, FactRecorded):
        return None
    return record.evolve(None, events[0].event)


async def search(
    connection: Connection,
    ledger_id: UUID,
    wanted: Filter,
    *,
    limit: int,
    after: int | None = None,
    order: Order = "desc",
) -> Page:
    """Up to `limit` records beyond the position `after`, in the order they were recorded or the other way."""
    found = _index.search(
        connection,
        ledger_id,
        wanted.conditions(),
        since=wanted.since,
        until=wanted.until,
        after=after,
        limit=limit + 1,
        order=order,
    )
    positions = [position async for segment in found for position in segment.positions]
    shown = positions[:limit]
    stored = {row.position: row for row in await store.read_positions(connection, ledger_id, shown)}
    return Page(
        records=[record.evolve(None, stored[position].decode().event) for position in shown],
        next=shown[-1] if len(positions) > limit else None,
    )
