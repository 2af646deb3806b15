"""The stored tree of a ledger: what its log has published, and the hashes that proofs are made of.

Level 0 of the tree is not stored here: it is the leaves of the events. Above it, a tile is one row that grows
(`ledger.tiles`). Everything is read as of a size; that this size was published, the caller sees to. What is read is
only put together: whether it is what was signed, is for who signs (publisher.py) and for who verifies.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from uuid import UUID

from msgspec import UNSET, Struct

from ledger.checkpoint import ED25519, ShownKey, ShownKeys, VerifierKey
from ledger.merkle import (
    HASH_BYTES,
    TILE_HASHES,
    TILE_LEVELS,
    Edge,
    Node,
    Run,
    Tile,
    consistency,
    in_tile,
    inclusion,
    joined,
    parted,
    subtrees,
    tile_of,
)
from ledger.postgres import Connection, Statement, bigint, bigints, byteas, queries, uuid
from ledger.values import Stamp, stamp

LEAVES_AT_ONCE = 16 * TILE_HASHES
"""So many are hashed at once: 10 ms, for which the other jobs of the process wait."""

SQL = queries("ledger", "tree")
_leaves = Statement("leaves", SQL.leaves)
_tiles = Statement("tiles", SQL.tiles)
_entries = Statement("entries", SQL.entries)
_extend = Statement("extend", SQL.extend)


class Log(Struct, frozen=True, kw_only=True):
    """What a ledger's log serves: `published`, a signed note, is its checkpoint of `published_size` events.

    `refused` says why the publisher does not go on from there; null: it does.
    """

    origin: str
    published: bytes
    published_size: int
    published_at: Stamp
    refused: str | None


class LogKey(Struct, frozen=True, kw_only=True):
    """A key of a log: `vkey` checks what was signed `from_` then on, and `until` it was retired."""

    number: int
    vkey: VerifierKey
    from_: Stamp
    until: Stamp | None


class Damaged(Exception):
    """What is stored is not the tree that it should be; the message says where. An operator must act."""


async def log_of(connection: Connection, ledger_id: UUID) -> Log | None:
    """The log of a ledger; None before its first checkpoint is published."""
    row = await (await connection.execute(SQL.log_of, {"ledger_id": ledger_id}, prepare=True)).fetchone()
    if row is None:
        return None
    origin, published, size, at, refused = row
    return Log(
        origin=origin, published=published.encode(), published_size=size, published_at=stamp(at), refused=refused
    )


async def keys_of(connection: Connection, origin: str = "any") -> list[LogKey]:
    """The keys of the log that is called so, the oldest first; retired ones too, for what they have signed. Those of
    all logs are the same but for that name."""
    cursor = await connection.execute(SQL.keys, prepare=True)
    return [
        LogKey(
            number=number,
            vkey=VerifierKey(origin, ED25519, public),
            from_=stamp(added_at),
            until=stamp(retired_at) if retired_at else None,
        )
        for number, public, added_at, retired_at in await cursor.fetchall()
    ]


def shown(keys: Iterable[LogKey]) -> ShownKeys:
    """Keys as they are told to whoever asks."""
    return ShownKeys([ShownKey(vkey=str(key.vkey), from_=key.from_, until=key.until or UNSET) for key in keys])


async def add_key(connection: Connection, number: int, public: bytes, at: datetime | None = None) -> None:
    """Let a key sign from then on, or from now on, in every log; unless one is there that has its number."""
    await connection.execute(SQL.add_key, {"number": number, "public": public, "at": at})


async def retire_key(connection: Connection, number: int, at: datetime) -> None:
    """Let a key sign no more, from then on."""
    await connection.execute(SQL.retire_key, {"number": number, "at": at})


async def read_entries(connection: Connection, ledger_id: UUID, first: int, count: int) -> list[bytes]:
    """The entries from leaf index `first` on, `count` of them. Raises Damaged."""
    values = {"ledger_id": uuid(ledger_id), "first": bigint(first + 1), "last": bigint(first + count)}
    entries = [entry for (entry,) in await _entries.fetch(connection, values)]
    if len(entries) != count:
        raise Damaged(f"of the {count} events from position {first + 1} on there are {len(entries)}")
    return entries


async def read_payload(connection: Connection, ledger_id: UUID, digest: bytes, size: int) -> bytes | None:
    """The data that stands beside an entry, by its SHA-256; of the first `size` events alone."""
    values = {"ledger_id": ledger_id, "digest": digest, "size": size}
    row = await (await connection.execute(SQL.payload, values, prepare=True)).fetchone()
    return row[0] if row else None


async def read_tile(connection: Connection, ledger_id: UUID, tile: Tile) -> bytes:
    """The hashes of a tile, one behind the other. Raises Damaged."""
    return (await read_tiles(connection, ledger_id, [tile]))[tile]


async def read_tiles(connection: Connection, ledger_id: UUID, tiles: Iterable[Tile]) -> dict[Tile, bytes]:
    """The same of several, in two queries at most. Raises Damaged."""
    leaves: list[Tile] = []
    stored: list[Tile] = []
    for tile in tiles:
        (stored if tile.level else leaves).append(tile)
    found: dict[Tile, bytes] = {}
    if leaves:
        runs = await read_leaves(connection, ledger_id, [_run(tile) for tile in leaves])
        found |= zip(leaves, runs, strict=True)
    if stored:
        values = {
            "ledger_id": uuid(ledger_id),
            "levels": bigints(tile.level for tile in stored),
            "indexes": bigints(tile.index for tile in stored),
            "widths": bigints(tile.width * HASH_BYTES for tile in stored),
        }
        rows = {(level, index): hashes for level, index, hashes in await _tiles.fetch(connection, values)}
        for tile in stored:
            hashes = rows.get((tile.level, tile.index), b"")
            if len(hashes) != tile.width * HASH_BYTES:
                raise Damaged(f"tile {tile.path} has {len(hashes) / HASH_BYTES:g} hashes")
            found[tile] = hashes
    return found


async def read_leaves(connection: Connection, ledger_id: UUID, runs: Sequence[Run]) -> list[bytes]:
    """The leaf hashes of each run, one behind the other, in one query. Raises Damaged."""
    values = {
        "ledger_id": uuid(ledger_id),
        "firsts": bigints(run.first + 1 for run in runs),
        "lasts": bigints(run.end for run in runs),
    }
    found = dict(await _leaves.fetch(connection, values))
    for place, run in enumerate(runs, 1):
        if len(found[place]) != (run.end - run.first) * HASH_BYTES:
            there = len(found[place]) // HASH_BYTES
            raise Damaged(f"of the {run.end - run.first} events from position {run.first + 1} on there are {there}")
    return [found[place] for place in range(1, len(runs) + 1)]


async def read_hashes(connection: Connection, ledger_id: UUID, nodes: Collection[Node], size: int) -> dict[Node, bytes]:
    """The hashes of complete subtrees of the tree of `size` leaves, in two queries for all. Raises Damaged."""
    tiles = {node: tile_of(node, size) for node in nodes}
    hashes = await read_tiles(connection, ledger_id, dict.fromkeys(tiles.values()))
    return {node: in_tile(node, hashes[tile]) for node, tile in tiles.items()}


async def prove_inclusion(connection: Connection, ledger_id: UUID, index: int, size: int) -> list[bytes]:
    """That the leaf at `index` is of the tree of `size` leaves. Raises ValueError where it is not, and Damaged."""
    return await hashes_of(connection, ledger_id, inclusion(index, size), size)


async def prove_consistency(connection: Connection, ledger_id: UUID, old: int, new: int) -> list[bytes]:
    """That the tree of `old` leaves is the beginning of that of `new`. Raises ValueError where `new` is less, and
    Damaged."""
    return await hashes_of(connection, ledger_id, consistency(old, new), new)


async def root_of(connection: Connection, ledger_id: UUID, size: int) -> bytes:
    """The root of the tree over the first `size` leaves, from what is stored. Raises Damaged."""
    (root,) = await hashes_of(connection, ledger_id, [Run(0, size)], size)
    return root


async def root_beyond(connection: Connection, ledger_id: UUID, edge: Edge, size: int, grown: int) -> bytes:
    """The root of the tree over the first `grown` leaves, of which it is stored over the first `size`, whose edge is
    `edge`: from the leaves themselves. Raises Damaged."""
    edge = Edge(edge.levels)
    for first in range(size, grown, LEAVES_AT_ONCE):
        (leaves,) = await read_leaves(connection, ledger_id, [Run(first, min(first + LEAVES_AT_ONCE, grown))])
        edge.extend(parted(leaves))
    return edge.root


async def read_edge(connection: Connection, ledger_id: UUID, size: int) -> Edge:
    """What the tree of `size` leaves goes on from, in two queries. Raises Damaged."""
    tiles = []
    for level in range(-(-size.bit_length() // TILE_LEVELS)):
        index, width = divmod(size >> TILE_LEVELS * level, TILE_HASHES)
        tiles.append(Tile(level, index, width))
    found = await read_tiles(connection, ledger_id, [tile for tile in tiles if tile.width])
    return Edge([parted(found.get(tile, b"")) for tile in tiles])


async def extend(connection: Connection, ledger_id: UUID, edge: Edge, size: int, leaves: bytes) -> None:
    """Store what `leaves` make of the tree of `size` leaves, whose edge is `edge`: that goes on too."""
    full = edge.extend(parted(leaves))
    grown = size + len(leaves) // HASH_BYTES
    rows: list[tuple[int, int, bytes]] = []
    for level in range(1, len(edge.levels)):
        was, now = size >> TILE_LEVELS * level, grown >> TILE_LEVELS * level
        if was < now:
            contents = [hashes for of, hashes in full if of == level]
            if now % TILE_HASHES:
                contents.append(b"".join(edge.levels[level]))
            rows += [(level, index, hashes) for index, hashes in enumerate(contents, was // TILE_HASHES)]
    if rows:
        levels, indexes, hashes = zip(*rows, strict=True)
        values = {
            "ledger_id": uuid(ledger_id),
            "levels": bigints(levels),
            "indexes": bigints(indexes),
            "hashes": byteas(hashes),
        }
        await _extend.run(connection, values)


async def hashes_of(connection: Connection, ledger_id: UUID, runs: Sequence[Run], size: int) -> list[bytes]:
    """The hash of each run of the tree of `size` leaves, in two queries for all. Raises Damaged."""
    parts = [subtrees(run) for run in runs]
    hashes = await read_hashes(connection, ledger_id, [node for part in parts for node in part], size)
    return [joined([hashes[node] for node in part]) for part in parts]


def _run(tile: Tile) -> Run:
    first = tile.index * TILE_HASHES
    return Run(first, first + tile.width)
