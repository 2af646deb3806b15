"""The store by itself: all of a batch or nothing of it, in dense positions, for ever."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from uuid_utils.compat import uuid7

from ledger import store
from ledger.entry import Event, decode, encode
from ledger.events import FactRecorded
from ledger.merkle import leaf_hash
from ledger.postgres import Connection, Pool
from ledger.store import Append, CommandRow, EventRow, Ledger, OpenItem
from ledger.values import SYSTEM, stamp
from tests.check import check_ledger
from tests.conftest import Database

NOW = datetime(2026, 11, 21, 9, tzinfo=UTC)
TABLES = ("ledgers", "events", "payloads", "commands", "open_items")


@pytest.fixture
async def connection(pool: Pool) -> AsyncIterator[Connection]:
    async with pool.connection() as connection:
        yield connection


@pytest.fixture
async def ledger(connection: Connection) -> Ledger:
    return await store.create_ledger(connection, "demo")


def batch_of(ledger: Ledger, *ids: UUID, seen: int = 0, at: datetime = NOW, body: Any = None) -> Append:
    """One command that records one fact in each of these new streams."""
    batch = Append(ledger_id=ledger.ledger_id, seen=seen, recorded_at=at)
    for number, stream_id in enumerate(ids, 1):
        event = Event(
            v=1,
            project="demo",
            ledger=ledger.ledger_id,
            event_id=uuid7(),
            stream_type="record",
            stream_id=stream_id,
            stream_version=1,
            type="FactRecorded",
            schema_version=1,
            occurred_at=stamp(at),
            recorded_at=stamp(at),
            actor=SYSTEM,
            command_id=str(stream_id),
            correlation_id="x",
            data=FactRecorded(kind="note", body=body),
        )
        entry, payload = encode(event)
        position = seen + number
        row = CommandRow(SYSTEM.principal, str(stream_id), b"f", "Record", stream_id, 201, position, 1, seen + len(ids))
        batch.events.append(EventRow(stream_id, 1, event.type, entry, leaf_hash(entry), payload))
        batch.commands.append(row)
    return batch


def whole_batch(ledger: Ledger, seen: int, at: datetime = NOW) -> Append:
    """A batch that writes to every table."""
    batch = batch_of(ledger, uuid7(), uuid7(), seen=seen, at=at, body="x" * 70_000)
    item = uuid7()
    batch.opened[item] = OpenItem(item, "session", uuid7(), uuid7())
    return batch


def contents(database: Database) -> dict[str, list[Any]]:
    with psycopg.connect(database.owner) as connection:
        return {
            table: sorted(connection.execute(f"SELECT t::text FROM ledger.{table} t").fetchall()) for table in TABLES
        }


# All or nothing


async def test_an_append_writes_every_table_in_one_transaction(
    connection: Connection, ledger: Ledger, database: Database
) -> None:
    batch = whole_batch(ledger, 0)
    assert await store.append(connection, batch)
    found = contents(database)
    assert {table: len(rows) for table, rows in found.items()} == {
        "ledgers": 1, "events": 2, "payloads": 2, "commands": 2, "open_items": 1
    }  # fmt: skip
    assert await store.head(connection, ledger.ledger_id) == (2, NOW, ledger.epoch)
    later = Append(ledger_id=ledger.ledger_id, seen=2, recorded_at=NOW, closed=set(batch.opened))
    later.commands.append(batch.commands[0]._replace(command_id="close", first_position=0, event_count=0))
    assert await store.append(connection, later)
    assert contents(database)["open_items"] == []


@pytest.mark.parametrize(
    ("seen", "minutes"),
    [(1, 0), (3, 0), (-1, 0), (0, 0), (2, -1)],
    ids=["older", "newer", "negative", "first", "early"],
)
async def test_an_append_that_misses_writes_nothing_at_all(
    connection: Connection, ledger: Ledger, database: Database, seen: int, minutes: int
) -> None:
    """Decided on another size than the ledger has, or at a time before its last."""
    assert await store.append(connection, whole_batch(ledger, 0))
    before = contents(database)
    missed = whole_batch(ledger, seen, NOW + timedelta(minutes=minutes))
    missed.closed = {UUID(row[0].split(",")[1]) for row in before["open_items"]}
    assert not await store.append(connection, missed)
    assert contents(database) == before


async def test_an_append_to_no_ledger_writes_nothing(
    connection: Connection, ledger: Ledger, database: Database
) -> None:
    assert not await store.append(connection, batch_of(ledger._replace(ledger_id=uuid7()), uuid7()))
    assert contents(database)["events"] == []


@pytest.mark.parametrize("taken", ["stream", "command"])
async def test_an_append_that_meets_a_taken_id_writes_nothing_at_all(
    connection: Connection, ledger: Ledger, database: Database, taken: str
) -> None:
    first = whole_batch(ledger, 0)
    assert await store.append(connection, first)
    before = contents(database)
    second = whole_batch(ledger, 2)
    if taken == "stream":
        second.events[1] = second.events[1]._replace(stream_id=first.events[0].stream_id)
    else:
        second.commands[1] = second.commands[1]._replace(command_id=first.commands[0].command_id)
    with pytest.raises(psycopg.errors.UniqueViolation):
        await store.append(connection, second)
    assert contents(database) == before
    assert await store.append(connection, whole_batch(ledger, 2)), "and the connection is fit for use"


@pytest.mark.parametrize(
    "spoiled",
    [
        lambda row: row._replace(entry=b"x" * 65536),
        lambda row: row._replace(leaf=b"x" * 31),
        lambda row: row._replace(stream_version=0),
    ],
    ids=["entry", "leaf", "version"],
)
async def test_a_row_that_could_not_be_proven_is_not_stored(
    connection: Connection, ledger: Ledger, database: Database, spoiled: Any
) -> None:
    batch = whole_batch(ledger, 0)
    batch.events[1] = spoiled(batch.events[1])
    with pytest.raises(psycopg.errors.CheckViolation):
        await store.append(connection, batch)
    assert contents(database)["events"] == []


async def test_an_append_inside_a_transaction_is_undone_with_it_and_its_positions_come_back(
    connection: Connection, ledger: Ledger, pool: Pool, database: Database
) -> None:
    async with connection.transaction(force_rollback=True):
        assert await store.append(connection, whole_batch(ledger, 0))
        async with pool.connection() as reader:
            assert await store.read_after(reader, ledger.ledger_id, 0, 10) == []
    assert await store.head(connection, ledger.ledger_id) == (0, ledger.last_recorded_at, ledger.epoch)
    stream_id = uuid7()
    assert await store.append(connection, batch_of(ledger, stream_id))
    (stored,) = await store.read_after(connection, ledger.ledger_id, 0, 10)
    assert (stored.position, stored.decode().event.stream_id) == (1, stream_id)
    check_ledger(database.owner)


# One at a time


async def test_of_two_appends_decided_on_one_size_the_second_waits_and_misses(
    connection: Connection, ledger: Ledger, pool: Pool, database: Database
) -> None:
    async with pool.connection() as other:
        async with connection.transaction():
            assert await store.append(connection, whole_batch(ledger, 0))
            second = asyncio.create_task(store.append(other, whole_batch(ledger, 0)))
            await waiting_for_a_lock(database, 1)
        assert not await second
    check_ledger_rows(database, events=2, open_items=1)


async def test_a_lock_holds_everyone_else_off_and_then_tells_what_they_did(
    connection: Connection, ledger: Ledger, pool: Pool, database: Database
) -> None:
    mine, theirs = uuid7(), uuid7()
    first = batch_of(ledger, mine)
    assert await store.append(connection, first)
    leaf = first.events[0].leaf
    keys = [(SYSTEM.principal, str(mine)), (SYSTEM.principal, str(theirs))]
    async with pool.connection() as other:
        async with other.transaction():
            assert await store.append(other, batch_of(ledger, theirs, seen=1))

            async def look() -> store.Locked:
                async with connection.transaction():
                    return await store.lock(connection, ledger.ledger_id, 1, leaf, 100, keys)

            looking = asyncio.create_task(look())
            await waiting_for_a_lock(database, 1)
        locked = await looking
    assert (locked.head.size, locked.changed, set(locked.commands)) == (2, [theirs], set(keys))


async def test_ledgers_do_not_wait_for_each_other(
    connection: Connection, ledger: Ledger, pool: Pool, database: Database
) -> None:
    async with pool.connection() as other:
        second = await store.create_ledger(other, "second")
        async with connection.transaction():
            assert await store.append(connection, batch_of(ledger, uuid7()))
            async with asyncio.timeout(5):
                assert await store.append(other, batch_of(second, uuid7()))


async def test_all_who_meet_a_new_project_agree_on_one_ledger(pool: Pool, database: Database) -> None:
    async def meet() -> Ledger:
        async with pool.connection() as connection:
            return await store.create_ledger(connection, "new")

    ledgers = await asyncio.gather(*(meet() for _ in range(12)))
    assert len({ledger.ledger_id for ledger in ledgers}) == 1


async def waiting_for_a_lock(database: Database, backends: int) -> None:
    async with await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as connection:
        query = """SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock'"""
        async with asyncio.timeout(10):
            while await (await connection.execute(query)).fetchone() != (backends,):  # noqa: ASYNC110  (it tells nobody)
                await asyncio.sleep(0.01)


def check_ledger_rows(database: Database, **counts: int) -> None:
    found = contents(database)
    assert {table: len(found[table]) for table in counts} == counts


# Reading


async def test_what_is_read_is_what_was_written_in_order(connection: Connection, ledger: Ledger) -> None:
    ids = [uuid7() for _ in range(5)]
    batch = batch_of(ledger, *ids, body={"é": "x" * 70_000})
    assert await store.append(connection, batch)
    stored = await store.read_after(connection, ledger.ledger_id, 1, 3)
    assert [(row.position, row.entry) for row in stored] == [(n, batch.events[n - 1].entry) for n in (2, 3, 4)]
    some = await store.read_positions(connection, ledger.ledger_id, [5, 1, 9, 1])
    assert [row.position for row in some] == [1, 5]
    streams = await store.read_streams(connection, ledger.ledger_id, [ids[4], ids[0], uuid7()])
    assert [recorded.position for recorded in streams] == [1, 5]
    assert streams[0].event == decode(batch.events[0].entry, batch.events[0].payload)
    assert await store.read_after(connection, uuid7(), 0, 10) == []


async def test_a_command_is_found_by_whoever_gave_it_and_its_id(connection: Connection, ledger: Ledger) -> None:
    batch = batch_of(ledger, uuid7())
    assert await store.append(connection, batch)
    (row,) = batch.commands
    wanted = [(row.principal, row.command_id), ("else", row.command_id), (row.principal, "else")]
    assert await store.find_commands(connection, ledger.ledger_id, wanted) == {wanted[0]: row}
    assert await store.find_commands(connection, ledger.ledger_id, []) == {}
    assert await store.find_commands(connection, uuid7(), wanted) == {}


async def test_a_reader_never_sees_a_later_event_before_an_earlier_one(
    pool: Pool, connection: Connection, ledger: Ledger, database: Database
) -> None:
    """Three writers that overlap as much as they can, and a reader that takes what is there."""
    done = False

    async def write() -> None:
        for _ in range(40):
            async with pool.connection() as mine, mine.transaction():
                head = (await store.lock(mine, ledger.ledger_id, -1, None, 0, [("x", "x")])).head
                assert await store.append(mine, batch_of(ledger, uuid7(), uuid7(), seen=head.size))

    async def read() -> int:
        position = 0
        while True:
            was_done = done
            rows = await store.read_after(connection, ledger.ledger_id, position, 100)
            assert [row.position for row in rows] == list(range(position + 1, position + 1 + len(rows)))
            position += len(rows)
            if was_done and not rows:
                return position

    reading = asyncio.create_task(read())
    await asyncio.gather(*(write() for _ in range(3)))
    done = True
    assert await reading == 240
    check_ledger(database.owner)


# For ever


CHANGES = [
    *(
        f"{change} ledger.{table}{rest}"
        for table in ("events", "payloads", "commands")
        for change, rest in [
            ("UPDATE", " SET ledger_id = ledger_id"),
            ("UPDATE", " SET ledger_id = ledger_id WHERE false"),
            ("DELETE FROM", ""),
            ("DELETE FROM", " WHERE false"),
            ("TRUNCATE", ""),
        ]
    ),
    "TRUNCATE ledger.ledgers, ledger.events, ledger.payloads, ledger.commands CASCADE",
    "DELETE FROM ledger.ledgers",
    "MERGE INTO ledger.events e USING (SELECT 1) s ON true WHEN MATCHED THEN DELETE",
    """INSERT INTO ledger.events SELECT * FROM ledger.events
       ON CONFLICT (ledger_id, position) DO UPDATE SET entry = 'x'""",
]
TAKINGS = [
    "UPDATE ledger.ledgers SET project_id = 'other'",
    "UPDATE ledger.ledgers SET ledger_id = gen_random_uuid()",
    "UPDATE ledger.ledgers SET is_foreign = true",
    "UPDATE ledger.ledgers SET created_at = now()",
    "ALTER TABLE ledger.events DISABLE TRIGGER append_only",
    "DROP TRIGGER append_only ON ledger.events",
    "ALTER TABLE ledger.events ADD COLUMN x int",
    "DROP TABLE ledger.events",
    "DROP SCHEMA ledger CASCADE",
    "CREATE TABLE ledger.more (x int)",
    "CREATE OR REPLACE FUNCTION ledger.refuse_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
    "SET session_replication_role = replica",
    "SET ROLE muniment",
]


async def refused(session: psycopg.AsyncConnection[Any], statement: str) -> bool:
    try:
        await session.execute(statement.encode())
    except psycopg.errors.InsufficientPrivilege as error:
        return "append-only" in str(error) or "permission denied" in str(error) or "must be owner" in str(error)
    return False


@pytest.mark.parametrize("role", ["api", "worker", "owner"])
async def test_what_is_written_is_changed_by_nobody(
    connection: Connection, ledger: Ledger, database: Database, role: str
) -> None:
    assert await store.append(connection, whole_batch(ledger, 0))
    before = contents(database)
    async with await psycopg.AsyncConnection.connect(getattr(database, role), autocommit=True) as session:
        assert [statement for statement in CHANGES if not await refused(session, statement)] == []
    assert contents(database) == before


@pytest.mark.parametrize("role", ["api", "worker"])
async def test_the_service_cannot_give_itself_the_right(ledger: Ledger, database: Database, role: str) -> None:
    async with await psycopg.AsyncConnection.connect(getattr(database, role), autocommit=True) as session:
        assert [statement for statement in TAKINGS if not await refused(session, statement)] == []
