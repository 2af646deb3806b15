"""Proof that a view is what it says: `I am replay(ledger, position P, code version V), digest H`.

The replay is independent of how views are written: it reads whole streams, or one event after another, folds them by
the rules, and states again what the rows must be. It walks ledger and view side by side in one snapshot, in one order,
and holds a stream at a time, so its memory does not grow with the ledger. The digest of either side is over its
rows in that order. Nothing here writes.
"""

import hashlib
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any, NamedTuple
from uuid import UUID

from msgspec import Struct, field

from ledger import approval, session, task
from ledger.entry import Event, Recorded, canonical
from ledger.events import FACTS, FactRecorded
from ledger.postgres import Connection, Pool, queries
from ledger.store import Stored
from projections.projector import in_schema, view_of
from projections.segments import COUNTED, EVERY, SPAN_BITS
from projections.terms import common_term, event_terms, event_words, id_term, place_terms, term

SQL = queries("projections", "verify")

DRIFTS_MAX = 1000
"""How many differences are named for a project; all are counted."""

READ_ROWS = 100
"""At a time: of the largest events that is 100 MiB."""

Row = tuple[Any, ...]


class Setter(Struct, frozen=True):
    """The event that should have set a value."""

    position: int
    type: str
    event_id: str


class Drift(Struct, frozen=True, kw_only=True):
    """One value that is not what a replay makes of it; `field` is `*` where a whole row is missing or too many."""

    table: str
    key: str
    field: str
    stored: str | None
    replayed: str | None
    event: Setter | None


class Verdict(Struct, kw_only=True):
    """What was found of one view in one project, as of `position`."""

    view: str
    project_id: str
    ledger_id: UUID
    position: int
    code_version: str
    rows: int = 0
    digest: str = ""
    replay_digest: str = ""
    drifted: int = 0
    drifts: list[Drift] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.drifted and self.digest == self.replay_digest

    def __str__(self) -> str:
        return (
            f"{self.view} of {self.project_id} is "
            f"{'' if self.holds else 'not '}replay(ledger {self.ledger_id}, position {self.position}, "
            f"code {self.code_version}), digest {self.digest}"
        )


class Table(NamedTuple):
    """A table to be compared. The first `key` columns of a row say which it is, the very first what it is made of."""

    name: str
    key: int


class Definition(NamedTuple):
    """What a view must have: its tables, the streams that its rows are made of (None: single events), and how."""

    tables: tuple[Table, ...]
    stream_type: str | None
    rows: Callable[[int, Any], dict[str, list[Row]]]


async def verify(pool: Pool, schema: str, project: str | None = None) -> AsyncIterator[Verdict]:
    """Compare one build of a view with a replay, project by project; raises psycopg's errors."""
    async with pool.connection() as connection:
        values = {"schema": schema, "project": project}
        places = await (await connection.execute(SQL.places, values)).fetchall()
        for ledger_id, project_id in places:
            verdict = None
            while verdict is None:
                async with connection.transaction():
                    await connection.execute(SQL.snapshot)
                    verdict = await _compare(connection, schema, ledger_id, project_id)
            yield verdict


async def _compare(connection: Connection, schema: str, ledger_id: UUID, project_id: str) -> Verdict | None:
    """None where the view was switched meanwhile: names are looked up as they are now, not as in the snapshot."""
    view = view_of(schema)
    values = {"schema": schema, "view": view, "ledger_id": ledger_id}
    place = await (await connection.execute(SQL.place, values)).fetchone()
    skipped = {position for (position,) in await (await connection.execute(SQL.skips, values)).fetchall()}
    verdict = Verdict(
        view=view,
        project_id=project_id,
        ledger_id=ledger_id,
        position=place[0] if place else 0,
        code_version=code_version(),
    )
    definition = DEFINITIONS[view]
    tables = [_Compared(connection, ledger_id, schema, table, verdict) for table in definition.tables]
    async for key, events in _groups(connection, ledger_id, definition, verdict.position):
        history = _History(definition, events, skipped)
        for table in tables:
            await table.compare(key, history)
        if history.failure:
            _add(verdict, history.failure)
    for table in tables:
        await table.finish()
    if place != await (await connection.execute(SQL.place, values)).fetchone():
        return None
    verdict.digest = _joined(table.stored_digest for table in tables)
    verdict.replay_digest = _joined(table.replay_digest for table in tables)
    return verdict


def _joined(digests: Iterator[Any]) -> str:
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


@cache
def code_version() -> str:
    """The release, and a digest of the code that rules and views are made of."""
    digest = hashlib.sha256()
    for package in ("ledger", "projections"):
        for entry in sorted(files(package).iterdir(), key=lambda entry: entry.name):
            if entry.name.endswith((".py", ".sql")):
                digest.update(entry.name.encode() + b"\0" + entry.read_bytes() + b"\0")
    return f"{version('muniment')}+{digest.hexdigest()[:12]}"


# The replay


async def _groups(
    connection: Connection, ledger_id: UUID, definition: Definition, position: int
) -> AsyncIterator[tuple[Any, list[Stored]]]:
    """What rows are made of, in order: the events of each stream, or each event."""
    types = [name for name, fact in FACTS.items() if fact.stream_type == definition.stream_type]
    query = SQL.events if definition.stream_type is None else SQL.streams
    key, events = None, list[Stored]()
    async with connection.cursor("replayed") as cursor:
        cursor.itersize = READ_ROWS
        await cursor.execute(query, {"ledger_id": ledger_id, "types": types, "position": position}, binary=True)
        async for begins, *row in cursor:
            if begins != key and events:
                yield key, events
                events = []
            key = begins
            events.append(Stored(*row))
    if events:
        yield key, events


class _History:
    """The events of one group, and the rows that a view must have after each of them."""

    def __init__(self, definition: Definition, stored: list[Stored], skipped: set[int]) -> None:
        self._definition = definition
        self._events: list[Recorded] = []
        self.failure: Drift | None = None
        state: Any = None
        evolve = EVOLVE.get(definition.stream_type or "")
        for row in stored:
            try:
                recorded = row.decode()
                state = evolve(state, recorded.event) if evolve else recorded.event
            except Exception as error:  # noqa: BLE001  (whatever it is, the view cannot have passed it either)
                if row.position not in skipped:
                    said = f"{type(error).__name__}: {error}"
                    event = Setter(row.position, row.type, "")
                    self.failure = Drift(
                        table="*", key=f"event {row.position}", field="*", stored=None, replayed=said, event=event
                    )
                    break
            else:
                self._events.append(recorded)
        self.rows = self._rows(state)

    def _rows(self, state: Any) -> dict[str, list[Row]]:
        return self._definition.rows(self._events[0].position, state) if self._events else {}

    def set_by(self, table: Table, key: Row, column: int | None) -> Setter | None:
        """The last event that changed this value, or made the row."""
        state: Any = None
        evolve = EVOLVE.get(self._definition.stream_type or "")
        before, setter = None, None
        for position, event in self._events:
            state = evolve(state, event) if evolve else event
            rows = [row for row in self._rows(state).get(table.name, []) if row[: table.key] == key]
            value = (rows[0][column] if column is not None else "there",) if rows else None
            if value is not None and value != before:
                setter = Setter(position, event.type, str(event.event_id))
            before = value
        return setter


# The comparison


class _Compared:
    """One table of the view beside what it must be, both in the order of the groups."""

    def __init__(self, connection: Connection, ledger_id: UUID, schema: str, table: Table, verdict: Verdict) -> None:
        self._table = table
        self._verdict = verdict
        self._rows = _stored(connection, ledger_id, schema, table)
        self._ahead: Row | None = None
        self._columns: Sequence[str] = ()
        self.stored_digest, self.replay_digest = hashlib.sha256(), hashlib.sha256()

    async def compare(self, group: Any, history: _History) -> None:
        """Compare the rows of one group; what the view has before it should not be there."""
        expected = sorted(history.rows.get(self._table.name, []))
        for row in expected:
            self.replay_digest.update(canonical(row))
        missing = {row[: self._table.key]: row for row in expected}
        async for columns, row in self._upto(group):
            should = missing.pop(row[: self._table.key], None)
            if should is None:
                self._differs(row, "*", row, None, None)
            elif row != should:
                for n, name in enumerate(columns):
                    if row[n] != should[n]:
                        setter = history.set_by(self._table, row[: self._table.key], n)
                        self._differs(row, name, row[n], should[n], setter)
        for row in missing.values():
            self._differs(row, "*", None, row, history.set_by(self._table, row[: self._table.key], None))

    async def finish(self) -> None:
        """What is left in the view should not be there."""
        async for _, row in self._upto(None):
            self._differs(row, "*", row, None, None)

    async def _upto(self, group: Any) -> AsyncIterator[tuple[Sequence[str], Row]]:
        while True:
            if self._ahead is None:
                found = await anext(self._rows, None)
                if found is None:
                    return
                self._columns, self._ahead = found
            if group is not None and self._ahead[0] > group:
                return
            row, self._ahead = self._ahead, None
            self._verdict.rows += 1
            self.stored_digest.update(canonical(row))
            yield self._columns, row

    def _differs(self, row: Row, name: str, stored: Any, replayed: Any, event: Setter | None) -> None:
        drift = Drift(
            table=self._table.name,
            key=" ".join(map(str, row[: self._table.key])),
            field=name,
            stored=_shown(stored),
            replayed=_shown(replayed),
            event=event,
        )
        _add(self._verdict, drift)


def _add(verdict: Verdict, drift: Drift) -> None:
    verdict.drifted += 1
    if len(verdict.drifts) < DRIFTS_MAX:
        verdict.drifts.append(drift)


def _shown(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, tuple):
        return ", ".join(_shown(one) or "null" for one in value)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


async def _stored(
    connection: Connection, ledger_id: UUID, schema: str, table: Table
) -> AsyncIterator[tuple[Sequence[str], Row]]:
    """The rows of a table, with the names of its columns."""
    sql = getattr(SQL, table.name)
    if table.name == "segments":
        sql = sql.replace(b"audit.segments", b"%b.segments" % view_of(schema).encode())
    async with connection.cursor(f"stored_{table.name}") as cursor:
        cursor.itersize = READ_ROWS
        await cursor.execute(in_schema(sql, schema), {"ledger_id": ledger_id}, binary=True)
        columns = [column.name for column in cursor.description or ()]
        async for row in cursor:
            if table.name == "segments":
                for said in _of_segment(*row):
                    yield ("position", "recorded_at", "terms"), said
            else:
                yield columns, tuple(tuple(value) if isinstance(value, list) else value for value in row)


def _of_segment(first: int, recorded_ats: list[str], vector: bytes) -> Iterator[Row]:
    """What a segment says of each event that has terms: `tsvectorsend` gives each lexeme up to a NUL, the number of
    its places, and these, with a weight in the upper two bits. Those without a place are the whole segment's."""
    everywhere: list[str] = []
    terms: dict[int, list[str]] = defaultdict(list)
    at = 4
    while at < len(vector):
        end = vector.index(b"\0", at)
        name = vector[at:end].decode("utf-8", "replace")
        (count,) = struct.unpack_from(">H", vector, end + 1)
        if not count:
            everywhere.append(name)
        for place in struct.unpack_from(f">{count}H", vector, end + 3):
            terms[place & 0x3FFF].append(name + ("", "C", "B", "A")[place >> 14])
        at = end + 3 + 2 * count
    times = dict(enumerate(recorded_ats, 1))
    for place in sorted(terms):
        yield first + place - 1, times.get(place), tuple(sorted(terms[place] + everywhere))


# What the rows must be


def _column(text: str | None) -> str | None:
    """As much of a text as a column can hold; the state has all of it."""
    return None if text is None else text.replace("\0", "\ufffd")[:255]


def _session_rows(position: int, state: session.Session) -> dict[str, list[Row]]:
    s, role = state, _column(state.agent_role)
    labels = {(_column(key), _column(value)) for key, value in s.labels.items()}
    return {
        "sessions": [(s.session_id, position, s.opened_at, s.expires_at, s.state, role, canonical(s))],
        "labels": [(s.session_id, key, value, s.opened_at, position, s.state, role) for key, value in labels],
    }


def _task_rows(position: int, state: task.Task) -> dict[str, list[Row]]:
    t = state
    row = t.task_id, position, t.submitted_at, _column(t.kind), t.state, t.session_id, _column(t.worker), canonical(t)
    return {"tasks": [row]}


def _approval_rows(position: int, state: approval.Approval) -> dict[str, list[Row]]:
    a, due = state, approval.next_due(state)
    row = (
        *(a.approval_id, position, a.state, a.session_id, a.task_id, _column(a.action["tool"])),
        *(("critical", "high", "medium", "low").index(a.risk), tuple(map(_column, a.quorum.roles))),
        *(_column(a.requester.issuer), _column(a.requester.sub)),
        *(a.expires_at, due.deadline if due else None, canonical(a)),
    )
    return {"approvals": [row]}


def _audit_rows(position: int, event: Event[Any]) -> dict[str, list[Row]]:
    return _indexed(position, event, {*event_words(event), *event_terms(event), *place_terms(event)})


def _record_rows(position: int, event: Event[Any]) -> dict[str, list[Row]]:
    fact = event.data
    if not isinstance(fact, FactRecorded):
        return {}
    named = {"status": fact.status, "external": event.external_id}
    ids = {"task": fact.task_id, "approval": fact.approval_id, "parent": fact.parent_record_id}
    terms = {*event_terms(event), common_term("kind", fact.kind)}
    terms |= {term(kind, value) for kind, value in named.items() if value is not None}
    terms |= {id_term(kind, value) for kind, value in ids.items() if value is not None}
    return _indexed(position, event, terms)


def _indexed(position: int, event: Event[Any], terms: set[bytes]) -> dict[str, list[Row]]:
    ledger = f"^{event.ledger.hex[-12:]}"
    spans = [ledger, *(f"{ledger}{bits}/{position >> bits:x}" for bits in SPAN_BITS)]
    counted = {f"{name.decode()}{'B' if name.startswith(COUNTED) else ''}" for name in {*terms, EVERY}}
    return {"segments": [(position, event.recorded_at, tuple(sorted([*spans, *counted])))]}


EVOLVE: dict[str, Callable[[Any, Event[Any]], Any]] = {
    "session": session.evolve,
    "task": task.evolve,
    "approval": approval.evolve,
}

DEFINITIONS = {
    "sessions": Definition((Table("sessions", 1), Table("labels", 3)), "session", _session_rows),
    "tasks": Definition((Table("tasks", 1),), "task", _task_rows),
    "approvals": Definition((Table("approvals", 1),), "approval", _approval_rows),
    "records": Definition((Table("segments", 1),), None, _record_rows),
    "audit": Definition((Table("segments", 1),), None, _audit_rows),
}
