"""Whether what was recorded is whole: recomputed from the stored bytes, believing nothing that stands beside them.

Of each event: its place, the hash of its bytes, the columns made from them, its place in its stream, and the row
of the command that made it. What is looked at is read in short statements and never changes once it is there, so
traffic may go on meanwhile. Nothing here writes, and nothing knows what an event means.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import islice, pairwise
from typing import Any, NamedTuple
from uuid import UUID

from msgspec import Struct, field

from ledger.adoption import LOG, name_at
from ledger.entry import Event, Recorded, decode
from ledger.errors import UpgradeRequired
from ledger.events import CommandRefused, LateResultRefused
from ledger.merkle import leaf_hash
from ledger.postgres import Connection, queries, texts, uuids
from ledger.store import SQL as STORE
from ledger.store import CommandRow, Stored
from ledger.values import stamp
from ledger.verify import UNREADABLE

SQL = queries("ops", "integrity")

EVENTS_MAX = 500
"""How many events are read at once; one may have up to 8 MiB of data beside it."""
FAULTS_MAX = 100
NO_EVENT = (*UNREADABLE, KeyError)
"""What reading bytes raises that are no event."""


class Integrity(Struct):
    """What was looked at, and what is wrong: one sentence each, with project and position; the first FAULTS_MAX.

    `notes` is what is not wrong, and must be known.
    """

    ledgers: int = 0
    positions: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, project_id: str, faults: Iterable[str]) -> None:
        room = FAULTS_MAX - len(self.faults)
        self.faults += [f"{project_id}: {fault}" for fault in islice(faults, room)]


class _Ledger(NamedTuple):
    ledger_id: UUID
    project_id: str
    is_foreign: bool
    size: int
    last_recorded_at: datetime
    last_position: int
    epoch: UUID
    adoptions: list[Recorded]


class _Row(NamedTuple):
    position: int
    stream_id: UUID
    stream_version: int
    type: str
    entry: bytes
    leaf: bytes
    payload: bytes | None
    before: int | None
    """The position of the event before it in its stream."""


async def recompute(connection: Connection, last: int | None = None) -> Integrity:
    """Look at the last `last` positions of every ledger; None: at all, which also finds what two commands claim.

    Raises psycopg's errors.
    """
    found = Integrity()
    for row in await (await connection.execute(SQL.ledgers)).fetchall():
        ledger = _Ledger(*(*row, await _adoptions(connection, row[0])))
        found.ledgers += 1
        if ledger.last_position != ledger.size:
            found.add(ledger.project_id, [f"its size is {ledger.size}, its last event is at {ledger.last_position}"])
        await _recompute(connection, ledger, 0 if last is None else max(0, ledger.size - last), found)
        if last is None and not ledger.is_foreign:
            values = {"ledger_id": ledger.ledger_id, "size": ledger.size}
            ((made, impossible),) = await (await connection.execute(SQL.commands, values)).fetchall()
            if made != ledger.size:
                found.add(ledger.project_id, [f"its commands made {made} events, and it has {ledger.size}"])
            if impossible:
                found.add(ledger.project_id, [f"{impossible} of its commands have positions that cannot be"])
    return found


async def _recompute(connection: Connection, ledger: _Ledger, after: int, found: Integrity) -> None:
    """Look at the events after position `after`."""
    previous: Recorded | None = None
    while after < ledger.size:
        values = {"ledger_id": ledger.ledger_id, "after": after, "size": ledger.size, "limit": EVENTS_MAX}
        rows = [_Row(*row) for row in await (await connection.execute(SQL.events, values)).fetchall()]
        found.positions += len(rows)
        places = [row.position for row in rows]
        found.add(ledger.project_id, _gaps([after, *places, *([] if rows else [ledger.size + 1])]))
        found.add(ledger.project_id, (f"{row.position}: {what}" for row in rows for what in _row_faults(row)))
        after = places[-1] if rows else ledger.size
        if ledger.is_foreign:
            continue  # what stands in its events is opaque to us, and no command of ours made them
        events: list[Recorded] = []
        for row in rows:
            found.add(ledger.project_id, (f"{row.position}: {what}" for what in _event_faults(ledger, row, events)))
        found.add(ledger.project_id, _command_faults(events, await _commands(connection, ledger, events)))
        found.add(ledger.project_id, _time_faults(ledger, [*([previous] if previous else []), *events]))
        previous = events[-1] if events else previous


async def _adoptions(connection: Connection, ledger_id: UUID) -> list[Recorded]:
    """When it came to be called as it is now, as far as that can be read: what cannot is a fault of its own."""
    values = {"ledger_id": ledger_id, "stream_ids": uuids([LOG])}
    found = []
    for row in await (await connection.execute(STORE.read_streams, values)).fetchall():
        with suppress(UpgradeRequired, *NO_EVENT):
            found.append(Stored(*row).decode())
    return found


async def _commands(
    connection: Connection, ledger: _Ledger, events: Iterable[Recorded]
) -> dict[tuple[str, str], CommandRow]:
    """The rows of the commands that these events name. Not as a prepared statement: a pooler may bear none."""
    keys = {(event.actor.principal, event.command_id) for _, event in events}
    principals, command_ids = texts(principal for principal, _ in keys), texts(name for _, name in keys)
    values = {"ledger_id": ledger.ledger_id, "principals": principals, "command_ids": command_ids}
    rows = [CommandRow(*row) for row in await (await connection.execute(STORE.find_commands, values)).fetchall()]
    return {(row.principal, row.command_id): row for row in rows}


def _gaps(places: Sequence[int]) -> Iterator[str]:
    for one, next_ in pairwise(places):
        if next_ != one + 1:
            yield f"positions {one + 1} to {next_ - 1} are missing"


def _row_faults(row: _Row) -> Iterator[str]:
    if row.leaf != leaf_hash(row.entry):
        yield "its leaf is not the hash of its bytes"


def _event_faults(ledger: _Ledger, row: _Row, events: list[Recorded]) -> Iterator[str]:
    """What is wrong with one event, which joins `events` if it can be read at all."""
    try:
        event = decode(row.entry, row.payload)
    except UpgradeRequired as error:
        yield f"a newer version of Muniment wrote it: {error}"
        return
    except NO_EVENT as error:
        yield f"its bytes are no event: {error}"
        return
    events.append(Recorded(row.position, event))
    if (event.stream_id, event.stream_version, event.type) != (row.stream_id, row.stream_version, row.type):
        yield (
            f"its row says {row.type}, version {row.stream_version} of {row.stream_id}, and its bytes say "
            f"{event.type}, version {event.stream_version} of {event.stream_id}"
        )
    if (event.project, event.ledger) != (ledger.project_id, name_at(row.position, ledger.adoptions, ledger.epoch)):
        yield f"its bytes were written for project {event.project}, ledger {event.ledger}"
    if row.stream_version > 1 and not (row.before and row.before < row.position):
        yield f"version {row.stream_version - 1} of its stream {row.stream_id} does not come before it"


def _time_faults(ledger: _Ledger, events: Sequence[Recorded]) -> Iterator[str]:
    for (_, one), (position, next_) in pairwise(events):
        if next_.recorded_at < one.recorded_at:
            yield f"{position}: it was recorded at {next_.recorded_at}, and the one before it at {one.recorded_at}"
    if events and events[-1].event.recorded_at > stamp(ledger.last_recorded_at):
        yield f"{events[-1].position}: it was recorded after {stamp(ledger.last_recorded_at)}, the ledger's last time"


def _command_faults(events: Sequence[Recorded], commands: Mapping[tuple[str, str], CommandRow]) -> Iterator[str]:
    """Whether each event belongs to the command it names, and the command's row tells of it as it is."""
    streams: dict[CommandRow, set[UUID]] = defaultdict(set)
    for position, event in events:
        row = commands.get((event.actor.principal, event.command_id))
        if row is None:
            yield f"{position}: there is no command {event.command_id} of {event.actor.principal}, which made it"
            continue
        streams[row].add(event.stream_id)
        if position not in row.positions or row.seen_position < row.positions[-1]:
            yield (
                f"{position}: its command {row.command_id} made {row.event_count} events from {row.first_position} "
                f"on, having seen {row.seen_position}, by its row"
            )
        if row.status >= 400 and not _is_refusal(event, row):
            yield f"{position}: its command {row.command_id} was refused with {row.status}, by its row"
    first, last = (events[0].position, events[-1].position) if events else (0, 0)
    for row, about in streams.items():
        whole = row.event_count > 0 and first <= row.first_position and row.positions[-1] <= last
        if whole and row.status < 400 and row.target is not None and row.target not in about:
            yield f"{row.first_position}: its command {row.command_id} is about {row.target}, by its row"


def _is_refusal(event: Event[Any], row: CommandRow) -> bool:
    fact = event.data
    if isinstance(fact, CommandRefused):
        return (fact.status, fact.command_type) == (row.status, row.type)
    return isinstance(fact, LateResultRefused) and event.stream_id == row.target
