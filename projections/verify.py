"""Proof that a view is what it says: `I am replay(ledger, position P, code version V), digest H`.

The replay is independent of how views are written: it reads whole streams, or one event after another, folds them by
the rules, and states again what the rows must be. It walks ledger and view side by side, in one order, and holds a
stream at a time, so its memory does not grow with the ledger. Nothing here writes.

It walks in slices, each in a snapshot of its own. In each a view is compared as it is then; what was found is said as
of the first, at P: a stream that went on since has in the digests the rows that it had at P, if those of now are what
the replay makes of it now, and what came after P is no part of them. The digest of either side is over its rows in
the order of the walk, so it depends on the ledger up to P alone, and not on where the slices were cut.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from time import monotonic
from typing import Any
from uuid import UUID

from msgspec import Struct, field

from ledger.entry import Recorded, canonical
from ledger.postgres import Connection, Pool, queries
from ledger.store import Stored
from ledger.values import Replayed
from projections import VIEWS
from projections.projector import view_of
from projections.replay import DEFINITIONS, EVOLVE, Definition, Row, Table
from projections.slices import Slice, groups, rows

SQL = queries("projections", "verify")

DRIFTS_MAX = 1000
"""How many differences are named for a project; all are counted."""

NAMED_MAX = 100
"""Projects in which a view differs from a replay, that are named in a sum."""

SLICE_SECONDS = 3.0
"""While a snapshot is held, nothing that changes meanwhile can be cleaned up, and the few rows that change with every
batch (a ledger's size, where a view stands) take longer and longer to reach. One that was held for a minute, at 1,000
commands/s, made commands wait twice as long; a replay of ten million events takes ten minutes."""


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

    def __str__(self) -> str:
        by = f"set by event {self.event.position} ({self.event.type} {self.event.event_id})" if self.event else ""
        where = f"{self.table} [{self.key}]"
        if self.field == "*":
            return f"{where} {'is missing' if self.stored is None else 'is too many'}: {by or 'no event says so'}"
        return f"{where} {self.field}: {self.stored!r}, a replay makes {self.replayed!r}, {by or 'no event says so'}"


class Verdict(Struct, kw_only=True):
    """What was found of one view in one project, as of `position`; `schema` is the number of the build's schema."""

    view: str
    project_id: str
    ledger_id: UUID
    position: int
    code_version: str
    schema: int
    rows: int = 0
    digest: str = ""
    replay_digest: str = ""
    drifted: int = 0
    drifts: list[Drift] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.drifted and self.digest == self.replay_digest

    @property
    def statement(self) -> str:
        """What this part of the view is, or is not."""
        return (
            f"{'' if self.holds else 'not '}replay(ledger {self.ledger_id}, position {self.position}, "
            f"code version {self.code_version}), digest {self.digest}"
        )

    def __str__(self) -> str:
        return f"{self.view} of {self.project_id} is {self.statement}"


def summed_up(verdicts: Sequence[Verdict]) -> Replayed:
    """What all of them say together, of one build of a view."""
    heads, digests = hashlib.sha256(), hashlib.sha256()
    for verdict in verdicts:
        heads.update(f"{verdict.project_id} {verdict.ledger_id} {verdict.position}\n".encode())
        digests.update(f"{verdict.project_id} {verdict.digest}\n".encode())
    return Replayed(
        code_version=code_version(),
        heads_digest=f"sha256:{heads.hexdigest()}",
        digest=f"sha256:{digests.hexdigest()}",
        rows=sum(verdict.rows for verdict in verdicts),
        projects=len(verdicts),
        drifted=sum(max(verdict.drifted, not verdict.holds) for verdict in verdicts),
        drifted_projects=tuple(verdict.project_id for verdict in verdicts if not verdict.holds)[:NAMED_MAX],
    )


async def verify(pool: Pool, schema: str, project: str | None = None, *, rest: float = 0.0) -> AsyncGenerator[Verdict]:
    """Compare one build of a view with a replay, project by project; raises psycopg's errors. One of another version
    than this code has other rows than a replay by this code: of that nothing is said.

    After each slice it rests for `rest` times as long as that took.
    """
    async with pool.connection() as connection:
        version = VIEWS[view_of(schema)].VERSION
        cursor = await connection.execute(SQL.places, {"schema": schema, "project": project, "version": version})
        places = await cursor.fetchall()
    for ledger_id, project_id in places:
        comparison = _Comparison(schema, ledger_id, project_id)
        while comparison.verdict is None:
            began = monotonic()
            try:
                async with pool.connection() as connection, connection.transaction():
                    await connection.execute(SQL.snapshot)
                    await comparison.go_on(connection)
            except _Moved:
                comparison = _Comparison(schema, ledger_id, project_id)
            took = monotonic() - began
            if comparison.verdict is not None:
                yield comparison.verdict
            await asyncio.sleep(rest * took)


class _Moved(Exception):
    """The view was switched meanwhile, or begun anew: names are looked up as they are now, not as in the snapshot."""


class _Comparison:
    """One build of a view in one project, beside a replay. `verdict` is there after the last slice."""

    def __init__(self, schema: str, ledger_id: UUID, project_id: str) -> None:
        view = view_of(schema)
        self.verdict: Verdict | None = None
        self._schema = schema
        self._names = {"schema": schema, "view": view, "ledger_id": ledger_id}
        self._definition = DEFINITIONS[view]
        self._found = Verdict(
            view=view, project_id=project_id, ledger_id=ledger_id, position=-1, code_version=code_version(), schema=0
        )
        self._start: Any = UUID(int=0) if self._definition.stream_type else -(2**62)
        self._last = UUID(int=0)
        self._tables = [_Compared(table, self._found) for table in self._definition.tables]

    async def go_on(self, connection: Connection) -> None:
        """Compare the next slice, in the snapshot of the transaction that is open. Raises _Moved."""
        found = self._found
        position, number = await self._place(connection)
        if found.position < 0:
            found.position, found.schema = position, number
            for (stream_id,) in await (await connection.execute(SQL.last, self._names)).fetchall():
                self._last = stream_id
        elif (number, True) != (found.schema, position >= found.position):
            raise _Moved
        goes_on_at = await self._compare(connection, position)
        if (await self._place(connection))[1] != number:
            raise _Moved
        if goes_on_at is not None:
            self._start = goes_on_at
            return
        found.digest = _joined(table.stored_digest for table in self._tables)
        found.replay_digest = _joined(table.replay_digest for table in self._tables)
        self.verdict = found

    async def _place(self, connection: Connection) -> tuple[int, int]:
        row = await (await connection.execute(SQL.place, self._names)).fetchone()
        return (row[0], row[1]) if row else (0, 0)

    async def _compare(self, connection: Connection, reached: int) -> Any:
        """Compare from where the last slice ended. Answers where this one did, or None at the end."""
        skips = await (await connection.execute(SQL.skips, self._names)).fetchall()
        skipped = {position for (position,) in skips}
        found, definition = self._found, self._definition
        until = 0.0
        part = Slice(found.ledger_id, self._start, found.position, reached, self._last)
        async with AsyncExitStack() as cursors:
            for table in self._tables:
                stored = rows(connection, self._schema, table.name, part)
                table.begin(await cursors.enter_async_context(aclosing(stored)))
            replayed = groups(connection, definition.stream_type, part)
            async for key, events in await cursors.enter_async_context(aclosing(replayed)):
                if until and monotonic() > until:
                    for table in self._tables:
                        await table.come_to(key)
                    return key
                history = _History(definition, found.ledger_id, events, skipped, found.position)
                for table in self._tables:
                    await table.compare(key, history)
                if history.failure:
                    _add(found, history.failure)
                until = until or monotonic() + SLICE_SECONDS  # from the first on, which has waited for sorting
            for table in self._tables:
                await table.come_to(None)
        return None


def _joined(digests: Iterator[Any]) -> str:
    joined = hashlib.sha256(b"".join(digest.digest() for digest in digests))
    return f"sha256:{joined.hexdigest()}"


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


class _History:
    """The events of one group, the `rows` that a view must have after them, and those that it had at `position`."""

    def __init__(
        self, definition: Definition, ledger_id: UUID, stored: list[Stored], skipped: set[int], position: int
    ) -> None:
        self._definition, self._ledger_id = definition, ledger_id
        self._events: list[Recorded] = []
        self.failure: Drift | None = None
        state: Any = None
        evolve = EVOLVE.get(definition.stream_type or "")
        for row in stored:
            try:
                recorded = row.decode()
                state = evolve(state, recorded) if evolve else recorded.event
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
        self.rows = self.rows_before = self._rows(state)
        if self._events and self._events[-1].position > position:
            self._then(position)

    def _then(self, position: int) -> None:
        state: Any = None
        evolve = EVOLVE[self._definition.stream_type or ""]
        events = [recorded for recorded in self._events if recorded.position <= position]
        for recorded in events:
            state = evolve(state, recorded)
        self.rows_before = self._rows(state) if events else {}

    def _rows(self, state: Any) -> dict[str, list[Row]]:
        first = self._events[0].position if self._events else 0
        return self._definition.rows(self._ledger_id, first, state) if self._events else {}

    def set_by(self, table: Table, key: Row, column: int | None) -> Setter | None:
        """The last event that changed this value, or made the row."""
        state: Any = None
        evolve = EVOLVE.get(self._definition.stream_type or "")
        before, setter = None, None
        for recorded in self._events:
            position, event = recorded
            state = evolve(state, recorded) if evolve else event
            rows = [row for row in self._rows(state).get(table.name, []) if row[: table.key] == key]
            value = (rows[0][column] if column is not None else "there",) if rows else None
            if value is not None and value != before:
                setter = Setter(position, event.type, str(event.event_id))
            before = value
        return setter


# The comparison


class _Compared:
    """One table of the view beside what it must be, both in the order of the groups."""

    def __init__(self, table: Table, verdict: Verdict) -> None:
        self.name = table.name
        self.stored_digest, self.replay_digest = hashlib.sha256(), hashlib.sha256()
        self._table = table
        self._verdict = verdict
        self._rows: AsyncIterator[tuple[Sequence[str], Row]]
        self._ahead: tuple[Sequence[str], Row] | None = None

    def begin(self, rows: AsyncIterator[tuple[Sequence[str], Row]]) -> None:
        """Go on with these, those of the next slice."""
        self._rows, self._ahead = rows, None

    async def compare(self, group: Any, history: _History) -> None:
        """Compare the rows of one group."""
        await self.come_to(group)
        there = [found async for found in self._while(lambda key: key == group)]
        stored, should_be = [row for _, row in there], sorted(history.rows.get(self.name, []))
        before = should_be if history.rows_before is history.rows else sorted(history.rows_before.get(self.name, []))
        if stored == should_be:
            stored = before
        else:
            self._name(there, should_be, history)
        for row in before:
            self.replay_digest.update(canonical(row))
        self._has(stored)

    async def come_to(self, group: Any) -> None:
        """What the view has before a group, or still has at the end, should not be there."""
        async for _, row in self._while(lambda key: group is None or key < group):
            self._differs(row, "*", row, None, None)
            self._has([row])

    async def _while(self, holds: Callable[[Any], bool]) -> AsyncIterator[tuple[Sequence[str], Row]]:
        while True:
            found = self._ahead or await anext(self._rows, None)
            if found is None or not holds(found[1][0]):
                self._ahead = found
                return
            self._ahead = None
            yield found

    def _has(self, rows: Sequence[Row]) -> None:
        self._verdict.rows += len(rows)
        for row in rows:
            self.stored_digest.update(canonical(row))

    def _name(self, there: Sequence[tuple[Sequence[str], Row]], should_be: Sequence[Row], history: _History) -> None:
        """Say in what the rows of a group are not what they should be."""
        missing = {row[: self._table.key]: row for row in should_be}
        for columns, row in there:
            should = missing.pop(row[: self._table.key], None)
            if should is None:
                self._differs(row, "*", row, None, None)
                continue
            for n, column in enumerate(columns):
                if row[n] != should[n]:
                    setter = history.set_by(self._table, row[: self._table.key], n)
                    self._differs(row, column, row[n], should[n], setter)
        for row in missing.values():
            self._differs(row, "*", None, row, history.set_by(self._table, row[: self._table.key], None))

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
