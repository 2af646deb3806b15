"""THE event store: append, read a stream, read a ledger after a position, look up a command.

One ledger per project. Positions are dense and in commit order, because an append states the size it was
decided on and holds the ledger's row to commit: a rollback gives its positions back, and nobody sees 8
before 7. Rules and caches are not here; whoever appends has decided already.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple
from uuid import UUID

import psycopg
from msgspec import Struct, field
from uuid_utils.compat import uuid7

from ledger.entry import Recorded, decode
from ledger.postgres import (
    Connection,
    Statement,
    bigint,
    bigints,
    byteas,
    queries,
    smallints,
    texts,
    timestamptz,
    timestamptzs,
    uuid,
    uuids,
)

SQL = queries("ledger", "store")
_append = Statement("append", SQL.append)
_queue_tasks = Statement("append_tasks", SQL.append_tasks)
_close_tasks = Statement("close_tasks", SQL.close_tasks)
_head = Statement("head", SQL.head)
_lock = Statement("lock", SQL.lock)
_stands = Statement("stands", SQL.stands)
_changes = Statement("changes", SQL.changes)
_find_commands = Statement("find_commands", SQL.find_commands)
_offers = Statement("offers", SQL.offers)
_leases = Statement("leases", SQL.leases)


class Gone(psycopg.OperationalError):
    """The ledger is not in this database: it was put back to a time before it."""


class Ledger(NamedTuple):
    """A project's ledger and where it stands. `epoch` is what it is called outside: the `Ledger-Id` of an
    answer, another one once it was adopted (adoption.py), while `ledger_id` is for ever."""

    ledger_id: UUID
    is_foreign: bool
    size: int
    last_recorded_at: datetime
    epoch: UUID


class Head(NamedTuple):
    """Where a ledger stands: the position of its last event, the time of it, and what the ledger is called by then."""

    size: int
    last_recorded_at: datetime
    epoch: UUID


class Stored(NamedTuple):
    """An event as its bytes, in its place; `payload` is its data where that stands beside the entry."""

    position: int
    type: str
    entry: bytes
    payload: bytes | None

    def decode(self) -> Recorded:
        """Raises UpgradeRequired where a newer release wrote it."""
        return Recorded(self.position, decode(self.entry, self.payload, self.type))


class Locked(NamedTuple):
    """What a ledger is when it has just been locked. See `lock`."""

    head: Head
    leaf: bytes | None
    changed: list[UUID] | None
    commands: dict[tuple[str, str], "CommandRow"]


class EventRow(NamedTuple):
    stream_id: UUID
    stream_version: int
    type: str
    entry: bytes
    leaf: bytes
    payload: bytes | None


class CommandRow(NamedTuple):
    """What a command did; see SPEC §5 "Idempotency, exactly"."""

    principal: str
    command_id: str
    fingerprint: bytes
    type: str
    target: UUID | None
    status: int
    first_position: int
    event_count: int
    seen_position: int

    @property
    def positions(self) -> range:
        return range(self.first_position, self.first_position + self.event_count)


class OpenItem(NamedTuple):
    """Something open under a root: a child session, a task, an approval that is pending, or a grant still to be used;
    under a subject, a hold.

    `match` tells a request for the same thing.
    """

    item_id: UUID
    item_type: Literal["session", "task", "approval", "grant", "hold"]
    session_id: UUID | None
    root_session_id: UUID
    task_id: UUID | None = None
    match: bytes | None = None


class QueuedTask(NamedTuple):
    """An open task, as claims look for it. `lease_until` is what its last claim said: a heartbeat moves it on in the
    table, where only the ledger's lock makes sure of it.
    """

    task_id: UUID
    kind: str
    session_id: UUID | None
    state: str
    rank: datetime
    run_at: datetime
    deadline_at: datetime | None
    lease_id: UUID | None
    lease_until: datetime | None
    holder: str
    """The principal whose lease it is; empty where it has none."""


class DueTask(NamedTuple):
    """An open task whose time has run out: that of its lease, of its wait for another try, or its own."""

    project_id: str
    task_id: UUID
    verb: Literal["lose", "queue", "expire"]
    lease_id: UUID | None
    deadline: datetime


class Append(Struct, kw_only=True):
    """One batch as rows: decided on a ledger of `seen` events, all of it or nothing. `leaf` is that of the last
    of them, where it is known; `epoch`, where the batch begins one."""

    ledger_id: UUID
    seen: int
    leaf: bytes | None = None
    epoch: UUID | None = None
    recorded_at: datetime
    events: list[EventRow] = field(default_factory=list)
    commands: list[CommandRow] = field(default_factory=list)
    opened: dict[UUID, OpenItem] = field(default_factory=dict)
    closed: set[UUID] = field(default_factory=set)
    tasks: dict[UUID, QueuedTask | None] = field(default_factory=dict)


async def create_ledger(connection: Connection, project_id: str, is_foreign: bool = False) -> Ledger:
    """The ledger of a project, made now unless it is there."""
    await connection.execute(
        SQL.create_ledger, {"ledger_id": uuid7(), "project_id": project_id, "is_foreign": is_foreign}
    )
    ledger = await find_ledger(connection, project_id)
    assert ledger is not None
    return ledger


async def find_ledger(connection: Connection, project_id: str) -> Ledger | None:
    cursor = await connection.execute(SQL.find_ledger, {"project_id": project_id})
    row = await cursor.fetchone()
    return Ledger(*row) if row else None


async def head(connection: Connection, ledger_id: UUID) -> Head:
    """Where the ledger stands. Raises Gone."""
    return Head(*await _row_of(_head, connection, ledger_id))


async def stands(connection: Connection, ledger_id: UUID, size: int, leaf: bytes | None) -> bool:
    """Whether the ledger has `size` events, and that leaf at its end. Raises Gone."""
    known = {"size": bigint(size), "leaf": leaf}
    return bool((await _row_of(_stands, connection, ledger_id, known))[0])


async def _row_of(
    statement: Statement, connection: Connection, ledger_id: UUID, values: Mapping[str, bytes | None] = {}
) -> tuple[Any, ...]:
    rows = await statement.fetch(connection, {"ledger_id": uuid(ledger_id), **values})
    if not rows:
        raise Gone(f"there is no ledger {ledger_id} here")
    return rows[0]


async def lock(
    connection: Connection,
    ledger_id: UUID,
    seen: int,
    leaf: bytes | None,
    changed_max: int,
    keys: Sequence[tuple[str, str]],
) -> Locked:
    """Lock the ledger until the transaction ends: nobody else appends; and tell what one must know then.

    That is where it stands, the leaf there, the streams that changed after position `seen` (looking at `changed_max`
    events), and which of the commands `keys` were answered. None instead of streams where the event at `seen` is not
    the one whose leaf is `leaf`: it is another history, of a database that was put back. Each statement sees what was
    committed before it, so those after the lock see everything.

    No pipeline: psycopg ends one with a Flush, after which the server counts no idle time, and a process that
    was stopped there would hold the ledger for ever. Nor would it be quicker.
    """
    head = Head(*await _row_of(_lock, connection, ledger_id))
    values = {
        "ledger_id": uuid(ledger_id),
        "size": bigint(head.size),
        "after": bigint(seen),
        "limit": bigint(changed_max if 0 <= seen < head.size else 0),
    }
    ((last, there, changed),) = await _changes.fetch(connection, values)
    commands = await find_commands(connection, ledger_id, keys)
    return Locked(head, last, changed if there == leaf else None, commands)


async def append(connection: Connection, batch: Append) -> bool:
    """Append `batch`; False, with nothing written, if the ledger has moved on since it was decided.

    One statement, its own transaction unless one is open. Dying before it commits leaves nothing; dying
    after leaves everything, and the command ids find it. Raises UniqueViolation where a command id or a
    stream id was believed new and is not.
    """
    beside = [(batch.seen + i, e.payload) for i, e in enumerate(batch.events, 1) if e.payload is not None]
    if not (beside or batch.opened or batch.closed or batch.tasks or batch.epoch):
        return await _append_rows(connection, batch)
    async with connection.transaction():
        if not await _append_rows(connection, batch):
            return False
        if beside:
            positions, payloads = zip(*beside, strict=True)
            rows = {"ledger_id": batch.ledger_id, "positions": bigints(positions), "payloads": byteas(payloads)}
            await connection.execute(SQL.append_payloads, rows)
        await _append_open_items(connection, batch)
        await _append_tasks(connection, batch)
        if batch.epoch is not None:
            values = {"ledger_id": batch.ledger_id, "epoch": batch.epoch}
            await connection.execute(SQL.adopt, values)
            begun = await connection.execute(SQL.begin_log, values)
            if begun.rowcount != 1:
                raise RuntimeError("what contradicted the log is gone: it goes on by itself")
    return True


async def _append_rows(connection: Connection, batch: Append) -> bool:
    streams, versions, types, entries, leaves, _ = zip(*batch.events, strict=True) if batch.events else ((),) * 6
    commands: Any = zip(*batch.commands, strict=True) if batch.commands else ((),) * 9
    principals, command_ids, fingerprints, command_types, targets, statuses, firsts, counts, seens = commands
    result = await _append.run(
        connection,
        {
            "ledger_id": uuid(batch.ledger_id),
            "seen": bigint(batch.seen),
            "leaf": batch.leaf,
            "recorded_at": timestamptz(batch.recorded_at),
            "event_count": bigint(len(batch.events)),
            "streams": uuids(streams),
            "versions": bigints(versions),
            "types": texts(types),
            "entries": byteas(entries),
            "leaves": byteas(leaves),
            "principals": texts(principals),
            "command_ids": texts(command_ids),
            "fingerprints": byteas(fingerprints),
            "command_types": texts(command_types),
            "targets": uuids(targets),
            "statuses": smallints(statuses),
            "firsts": bigints(firsts),
            "counts": bigints(counts),
            "seens": bigints(seens),
        },
    )
    return result.get_value(0, 0) == bigint(1)


async def _append_open_items(connection: Connection, batch: Append) -> None:
    if batch.opened:
        items, types, sessions, roots, tasks, matches = zip(*batch.opened.values(), strict=True)
        rows = {
            "item_ids": uuids(items),
            "item_types": texts(types),
            "sessions": uuids(sessions),
            "roots": uuids(roots),
            "tasks": uuids(tasks),
            "matches": byteas(matches),
        }
        await connection.execute(SQL.append_open_items, {"ledger_id": batch.ledger_id, **rows})
    if batch.closed:
        await connection.execute(SQL.close_open_items, {"ledger_id": batch.ledger_id, "item_ids": uuids(batch.closed)})


async def _append_tasks(connection: Connection, batch: Append) -> None:
    opened = [task for task in batch.tasks.values() if task is not None]
    if opened:
        tasks, kinds, sessions, states, ranks, runs, deadlines, leases, ends, holders = zip(*opened, strict=True)
        rows: dict[str, bytes] = {
            "ledger_id": uuid(batch.ledger_id),
            "tasks": uuids(tasks),
            "kinds": texts(kinds),
            "sessions": uuids(sessions),
            "states": texts(states),
            "ranks": timestamptzs(ranks),
            "runs": timestamptzs(runs),
            "deadlines": timestamptzs(deadlines),
            "leases": uuids(leases),
            "ends": timestamptzs(ends),
            "holders": texts(holders),
        }
        await _queue_tasks.run(connection, rows)
    if len(opened) < len(batch.tasks):
        closed = [task_id for task_id, task in batch.tasks.items() if task is None]
        await _close_tasks.run(connection, {"ledger_id": uuid(batch.ledger_id), "tasks": uuids(closed)})


async def read_offers(
    connection: Connection, ledger_id: UUID, kinds: Iterable[str], session_id: UUID | None, now: datetime, limit: int
) -> list[UUID]:
    """Up to `limit` tasks of these kinds that may be claimed at `now`, in the order in which they are handed out."""
    values = {
        "ledger_id": uuid(ledger_id),
        "kinds": texts(kinds),
        "session_id": None if session_id is None else uuid(session_id),
        "now": timestamptz(now),
        "limit": bigint(limit),
    }
    return [task_id for (task_id,) in await _offers.fetch(connection, values)]


async def lock_leases(connection: Connection, ledger_id: UUID, task_ids: Iterable[UUID]) -> dict[UUID, datetime | None]:
    """When the leases of these tasks end; nobody renews them until the transaction ends."""
    values = {"ledger_id": uuid(ledger_id), "tasks": uuids(task_ids)}
    return dict(await _leases.fetch(connection, values))


async def heartbeat(
    connection: Connection, ledger_id: UUID, task_id: UUID, lease_id: UUID, holder: str, lease_until: datetime
) -> datetime | None:
    """Renew a lease, never to an earlier end; answers when it ends. None if it is not in force any more, or not the
    lease of the principal `holder`."""
    lease = {"ledger_id": ledger_id, "task_id": task_id, "lease_id": lease_id, "holder": holder}
    values = lease | {"lease_until": lease_until}
    row = await (await connection.execute(SQL.heartbeat, values, prepare=True)).fetchone()
    return row[0] if row else None


async def due_tasks(connection: Connection, limit: int) -> list[DueTask]:
    """Up to `limit` of each kind, of any project, the longest overdue first."""
    cursor = await connection.execute(SQL.due_tasks, {"limit": limit}, prepare=True)
    return [DueTask(*row) for row in await cursor.fetchall()]


async def read_streams(
    connection: Connection, ledger_id: UUID, stream_ids: Iterable[UUID], *, upto: int | None = None
) -> list[Recorded]:
    """All events of these streams, or those up to a position, each stream in its order."""
    values = {"ledger_id": ledger_id, "stream_ids": uuids(stream_ids), "upto": upto}
    rows = await _read(connection, SQL.read_streams if upto is None else SQL.read_streams_upto, values)
    return [row.decode() for row in rows]


async def read_after(connection: Connection, ledger_id: UUID, after: int, limit: int) -> list[Stored]:
    """Up to `limit` events in order, from position `after` + 1 on."""
    return await _read(connection, SQL.read_after, {"ledger_id": ledger_id, "after": after, "limit": limit})


async def read_positions(connection: Connection, ledger_id: UUID, positions: Iterable[int]) -> list[Stored]:
    """The events at these positions, in order."""
    return await _read(connection, SQL.read_positions, {"ledger_id": ledger_id, "positions": bigints(positions)})


async def _read(connection: Connection, sql: Any, values: dict[str, Any]) -> list[Stored]:
    cursor = await connection.execute(sql, values, prepare=True, binary=True)
    return [Stored(*row) for row in await cursor.fetchall()]


async def find_commands(
    connection: Connection, ledger_id: UUID, keys: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], CommandRow]:
    """The commands of these (principal, command id) that were answered before."""
    if not keys:
        return {}
    principals, command_ids = zip(*keys, strict=True)
    values = {"ledger_id": uuid(ledger_id), "principals": texts(principals), "command_ids": texts(command_ids)}
    rows = [CommandRow(*row) for row in await _find_commands.fetch(connection, values)]
    return {(row.principal, row.command_id): row for row in rows}


async def read_open_items(connection: Connection, ledger_id: UUID, roots: Iterable[UUID]) -> list[OpenItem]:
    """What is open under these roots."""
    cursor = await connection.execute(SQL.open_items, {"ledger_id": ledger_id, "roots": uuids(roots)}, prepare=True)
    return [OpenItem(*row) for row in await cursor.fetchall()]


async def read_waited_on(
    connection: Connection, ledger_id: UUID, session_ids: Collection[UUID]
) -> dict[UUID, list[UUID]]:
    """The pending approvals that each of these sessions waits on; those that wait on none are not named."""
    values = {"ledger_id": ledger_id, "sessions": uuids(session_ids)}
    waited_on: dict[UUID, list[UUID]] = {}
    cursor = await connection.execute(SQL.waited_on, values, prepare=True)
    for session_id, approval_id in await cursor.fetchall():
        waited_on.setdefault(session_id, []).append(approval_id)
    return waited_on


async def deployment(connection: Connection) -> str:
    """What this deployment is called, since its database was first migrated."""
    row = await (await connection.execute(SQL.deployment)).fetchone()
    assert row is not None
    name: str = row[0]
    return name
