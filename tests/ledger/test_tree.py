"""The stored tree is the tree: what is read of it is what RFC 9162 makes of the events; what is missing is named."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from uuid import UUID

import psycopg
import pytest
from uuid_utils.compat import uuid7

from ledger import store, tree
from ledger.checkpoint import ED25519, SignerKey, VerifierKey
from ledger.merkle import Edge, Node, Tile, check_consistency, check_inclusion, leaf_hash, tiles
from ledger.postgres import Connection, open_pool
from ledger.store import Append, EventRow
from tests.conftest import Database

NOW = datetime(2026, 11, 21, 9, tzinfo=UTC)
SIZE = 66_000
"""Three levels of tiles, the uppermost with one hash."""
ENTRIES = [b"event %d" % number for number in range(1, SIZE + 1)]
LEAVES = [leaf_hash(entry) for entry in ENTRIES]


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[Connection]:
    async with open_pool(database.worker) as pool, pool.connection() as connection:
        yield connection


async def a_ledger(connection: Connection, size: int = SIZE) -> UUID:
    """A ledger of `size` events, of which nothing is stored but that."""
    ledger_id = (await store.create_ledger(connection, "demo", is_foreign=True)).ledger_id
    batch = Append(ledger_id=ledger_id, seen=0, recorded_at=NOW)
    rows = zip(ENTRIES[:size], LEAVES, strict=False)
    batch.events = [EventRow(uuid7(), 1, "Anything", entry, leaf, None) for entry, leaf in rows]
    assert await store.append(connection, batch)
    return ledger_id


async def grow(connection: Connection, ledger_id: UUID, *sizes: int) -> None:
    """Store the tree in steps: up to each of these sizes."""
    at = 0
    for size in sizes:
        edge = await tree.read_edge(connection, ledger_id, at)
        await tree.extend(connection, ledger_id, edge, at, b"".join(LEAVES[at:size]))
        at = size


async def a_tree(connection: Connection) -> UUID:
    ledger_id = await a_ledger(connection)
    await grow(connection, ledger_id, 1, 255, 256, 700, 65_535, 65_536, SIZE)
    return ledger_id


def root(size: int) -> bytes:
    edge = Edge()
    edge.extend(LEAVES[:size])
    return edge.root


@pytest.mark.parametrize("steps", [(SIZE,), (1, 300, 512, 513, 5_000, SIZE), (256, 65_536, SIZE)])
async def test_the_tree_is_the_same_in_whatever_steps_it_grew(connection: Connection, steps: tuple[int, ...]) -> None:
    ledger_id = await a_ledger(connection)
    await grow(connection, ledger_id, *steps)
    everything = Edge()
    full = everything.extend(LEAVES)
    expected = {(level, hashes) for level, hashes in full if level}
    expected |= {(level, b"".join(hashes)) for level, hashes in enumerate(everything.levels) if level and hashes}
    rows = await (await connection.execute("SELECT level, hashes FROM ledger.tiles")).fetchall()
    assert set(rows) == expected
    assert len(rows) == len(expected)
    assert (await tree.read_edge(connection, ledger_id, SIZE)).levels == everything.levels


async def test_every_size_that_was_published_has_its_root_and_its_tiles(connection: Connection) -> None:
    ledger_id = await a_tree(connection)
    for size in (1, 2, 255, 256, 257, 700, 65_535, 65_536, 65_537, SIZE):
        assert await tree.root_of(connection, ledger_id, size) == root(size)
        assert (await tree.read_edge(connection, ledger_id, size)).root == root(size)
        edge = Edge()
        full = edge.extend(LEAVES[:size])
        for tile in list(tiles(size))[-3:]:
            there = [hashes for level, hashes in full if level == tile.level]
            expected = [*there, b"".join(edge.levels[tile.level])][tile.index]
            assert await tree.read_tile(connection, ledger_id, tile) == expected
    assert await tree.read_tile(connection, ledger_id, Tile(0, 1, 3)) == b"".join(LEAVES[256:259])
    assert await tree.read_tile(connection, ledger_id, Tile(1, 0, 2)) == root(256) + _node(LEAVES[256:512])


def _node(leaves: list[bytes]) -> bytes:
    edge = Edge()
    edge.extend(leaves)
    return edge.root


async def test_proofs_are_made_of_what_is_stored(connection: Connection) -> None:
    ledger_id = await a_tree(connection)
    for size, index in ((1, 0), (2, 1), (257, 256), (700, 299), (65_536, 65_535), (SIZE, 0), (SIZE, 40_000)):
        proof = await tree.prove_inclusion(connection, ledger_id, index, size)
        check_inclusion(LEAVES[index], index, proof, size, root(size))
    for old, new in ((0, 1), (1, 2), (255, 256), (256, 700), (700, 65_537), (65_537, SIZE), (SIZE, SIZE)):
        proof = await tree.prove_consistency(connection, ledger_id, old, new)
        check_consistency(old, root(old), new, root(new), proof)
    with pytest.raises(ValueError, match="none with index"):
        await tree.prove_inclusion(connection, ledger_id, 700, 700)
    with pytest.raises(ValueError, match="no beginning"):
        await tree.prove_consistency(connection, ledger_id, 701, 700)


async def test_entries_are_the_bytes_that_were_hashed(connection: Connection) -> None:
    ledger_id = await a_ledger(connection, 300)
    assert await tree.read_entries(connection, ledger_id, 256, 44) == ENTRIES[256:300]
    with pytest.raises(tree.Damaged, match="of the 45 events from position 257 on there are 44"):
        await tree.read_entries(connection, ledger_id, 256, 45)


async def test_what_is_not_there_is_named(connection: Connection, database: Database) -> None:
    ledger_id = await a_tree(connection)
    with pytest.raises(tree.Damaged, match="of the 256 events from position 65793 on there are 208"):
        await tree.read_tile(connection, ledger_id, Tile(0, 257))
    with pytest.raises(tree.Damaged, match=r"tile 1/001\.p/2 has 1 hashes"):
        await tree.read_tile(connection, ledger_id, Tile(1, 1, 2))
    with pytest.raises(tree.Damaged, match="tile 2/001"):
        await tree.read_hashes(connection, ledger_id, [Node(16, 256)], 257 << 16)
    with psycopg.connect(database.owner) as owner:
        owner.execute("ALTER TABLE ledger.events DISABLE TRIGGER append_only")
        owner.execute("DELETE FROM ledger.events WHERE position = 300")
    with pytest.raises(tree.Damaged, match="of the 256 events from position 257 on there are 255"):
        await tree.prove_inclusion(connection, ledger_id, 300, SIZE)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE ledger.tiles SET hashes = overlay(hashes placing '\\x00'::bytea from 1) WHERE level = 1",
        "UPDATE ledger.tiles SET hashes = substring(hashes for 32) WHERE level = 1 AND index = 0",
        "UPDATE ledger.tiles SET index = index + 1000",
        "DELETE FROM ledger.tiles",
        "TRUNCATE ledger.tiles",
        "UPDATE ledger.log_keys SET public = sha256('')",
        "DELETE FROM ledger.log_keys",
    ],
)
async def test_not_even_the_owner_changes_it_by_a_slip_of_the_hand(
    connection: Connection, database: Database, change: str
) -> None:
    await a_tree(connection)
    await connection.execute("INSERT INTO ledger.log_keys (number, public, added_at) VALUES (1, sha256('1'), now())")
    with (
        psycopg.connect(database.owner) as owner,
        pytest.raises(psycopg.errors.InsufficientPrivilege, match=r"refused|may grow|may be retired once"),
    ):
        owner.execute(change.encode())


async def test_the_api_reads_the_tree_and_cannot_write_it(connection: Connection, database: Database) -> None:
    ledger_id = await a_tree(connection)
    async with open_pool(database.api) as pool, pool.connection() as api:
        assert await tree.root_of(api, ledger_id, SIZE) == root(SIZE)
        assert await tree.log_of(api, ledger_id) is None
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await grow(api, ledger_id, 256)


async def test_keys_are_told_with_when_they_came_and_went(connection: Connection) -> None:
    first, second = (SignerKey("log", ED25519, bytes([number]) * 32).verifier.public for number in (1, 2))
    insert = "INSERT INTO ledger.log_keys (number, public, added_at, retired_at) VALUES (%s, %s, %s, %s)"
    await connection.execute(insert, [2, second, NOW, None])
    await connection.execute(insert, [1, first, NOW, NOW])
    keys = await tree.keys_of(connection, "localhost/a-ledger")
    assert [(key.number, key.vkey, key.from_, key.until) for key in keys] == [
        (1, VerifierKey("localhost/a-ledger", ED25519, first), "2026-11-21T09:00:00.000000Z", keys[0].from_),
        (2, VerifierKey("localhost/a-ledger", ED25519, second), "2026-11-21T09:00:00.000000Z", None),
    ]
