"""`muniment verify database`: all that was recorded, computed again from the stored bytes, and the logs over it.

What integrity.py looks at, of every event and every command; then of each log the tree over those events, hash by hash,
and whether what was signed and published is its root, by the log's keys. Nothing is changed.
"""

import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple
from uuid import UUID

from cyclopts import Parameter

from ledger import tree
from ledger.checkpoint import Checkpoint, InvalidNote, Note
from ledger.merkle import EMPTY_ROOT, HASH_BYTES, TILE_HASHES, TILE_LEVELS, Edge, Run, Tile
from ledger.postgres import Connection, fetch, open_keys_pool, queries
from ledger.tree import Damaged
from ledger.vault import Vault
from ledger.verify import Trust, read_checkpoint
from ops import OperatorError
from ops.desk import reached
from ops.integrity import FAULTS_MAX, Integrity, recompute
from ops.seals import open_all

SQL = queries("ops", "trees")

LEAVES_AT_ONCE = 64 * TILE_HASHES


async def database(*held: Path, open_seals: Annotated[bool, Parameter(negative=())] = False) -> None:
    """Recompute all that is in the database: each leaf, tile, root, signature, position, version and command.

    The service may run meanwhile. Ends with 1 if something is wrong.

    Parameters
    ----------
    held
        Checkpoints that were kept elsewhere. Only they tell of a database that was put back to an older state, with
        what it had signed till then.
    open_seals
        Open every personal value too, with the key files of this machine: one that was moved to another place does not
        open there. Nothing that is opened is shown or kept.
    """
    try:
        notes = [Note.parse(path.read_bytes()) for path in held]
    except (OSError, InvalidNote) as error:
        raise OperatorError(f"That is no checkpoint: {error}") from None
    async with reached() as (settings, pool), open_keys_pool(settings.keys_database_url, pool) as keys:
        async with pool.connection() as connection:
            found = await recompute(connection)
            logs = await recompute_logs(connection, found, notes)
        sealed = 0
        if open_seals:
            sealed = await open_all(pool, Vault(settings.keys_dir, keys, create_keys=False), found)
    for fault in found.faults:
        print(fault)
    if len(found.faults) == FAULTS_MAX:
        print(f"and perhaps more: the first {FAULTS_MAX} are told")
    if found.faults:
        sys.exit(1)
    print(f"{found.positions:,} positions of {found.ledgers} projects, and {logs} logs: all recomputed, all whole")
    if open_seals:
        print(f"{sealed:,} entries with sealed values: what was not erased opens where it stands")


class _Log(NamedTuple):
    ledger_id: UUID
    project_id: str | None
    events: int | None
    name: str
    origin: str
    size: int
    signed: str | None
    published_size: int
    published: str | None


async def recompute_logs(connection: Connection, found: Integrity, held: Collection[Note] = ()) -> int:
    """Look at the tree of every ledger, and at what its log said of it. Answers how many logs there are.

    Raises psycopg's errors.
    """
    async with connection.transaction():
        # As of one moment: a publisher may be at work.
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        logs = [_Log(*row) for row in await fetch(connection, SQL.logs)]
        for log in logs:
            found.add(log.project_id or str(log.ledger_id), await _faults(connection, log, held))
    missing = {_origin(note) for note in held} - {log.origin for log in logs}
    for origin in sorted(missing):
        found.add(origin, ["there is no such log, and you hold a checkpoint of it"])
    return len(logs)


async def _faults(connection: Connection, log: _Log, held: Collection[Note]) -> list[str]:
    if log.events is None:
        return [f"the log {log.origin} is of no ledger that is there"]
    faults = [] if log.origin == log.name else [f"its log is called {log.origin}, and should be {log.name}"]
    if log.events < log.size:
        faults.append(f"it has {log.events} events, and its log has signed {log.size}")
    trust = Trust([key.vkey for key in await tree.keys_of(connection, log.origin)])
    said: list[tuple[str, Checkpoint]] = []
    ours = [("signed", log.signed, log.size), ("published", log.published, log.published_size)]
    theirs = [("held by you", str(note), None) for note in held if _origin(note) == log.origin]
    for what, text, size in [*ours, *theirs]:
        if text is None:
            continue
        try:
            one = read_checkpoint(text.encode(), trust).checkpoint
        except InvalidNote as error:
            faults.append(f"its checkpoint, {what}: {error}")
            continue
        if (one.origin, one.size) != (log.origin, one.size if size is None else size):
            faults.append(f"its checkpoint, {what}, is of {one.size} entries of {one.origin}, not {size}")
        elif one.size > log.size:
            faults.append(
                f"its checkpoint, {what}, has {one.size} entries, and here are {log.size}: it was rolled back"
            )
        else:
            said.append((what, one))
    try:
        roots, tiles = await _made(connection, log, {one.size for _, one in said})
    except Damaged as error:
        return [*faults, f"its tree cannot be made: {error}"]
    stored = {
        (level, index): hashes for level, index, hashes in await fetch(connection, SQL.tiles, ledger_id=log.ledger_id)
    }
    faults += _tile_faults(stored, tiles)
    for what, one in said:
        if roots[one.size] != one.root:
            faults.append(
                f"its first {one.size} events are not those of its checkpoint, {what}: that has the root "
                f"{one.root.hex()}, and they {roots[one.size].hex()}"
            )
    return faults


async def _made(
    connection: Connection, log: _Log, sizes: set[int]
) -> tuple[dict[int, bytes], dict[tuple[int, int], bytes]]:
    """The roots at these sizes, and the tiles from level 1 on, of the tree over the leaves. Raises Damaged."""
    edge, roots = Edge(), {0: EMPTY_ROOT}
    tiles: dict[tuple[int, int], bytes] = {}
    full: dict[int, int] = defaultdict(int)
    first = 0
    for size in sorted({*sizes, log.size} - {0}):
        while first < size:
            end = min(size, first + LEAVES_AT_ONCE)
            (leaves,) = await tree.read_leaves(connection, log.ledger_id, [Run(first, end)])
            for level, hashes in edge.extend(_parted(leaves)):
                tiles[level, full[level]] = hashes
                full[level] += 1
            first = end
        roots[size] = edge.root
    tiles |= {(level, full[level]): b"".join(hashes) for level, hashes in enumerate(edge.levels) if hashes}
    return roots, {place: hashes for place, hashes in tiles.items() if place[0]}


def _tile_faults(stored: Mapping[tuple[int, int], bytes], made: Mapping[tuple[int, int], bytes]) -> Iterator[str]:
    for level, index in sorted({*stored, *made}):
        one, other = stored.get((level, index), b""), made.get((level, index), b"")
        where = f"its tile {Tile(level, index).path}"
        if len(one) != len(other):
            yield f"{where} has {len(one) // HASH_BYTES} hashes, and should have {len(other) // HASH_BYTES}"
        for place, (found, expected) in enumerate(zip(_parted(one), _parted(other), strict=False)):
            if found != expected:
                first = (index * TILE_HASHES + place << TILE_LEVELS * level) + 1
                last = first + (1 << TILE_LEVELS * level) - 1
                yield f"{where}: hash {place} is not that of positions {first} to {last}"


def _parted(hashes: bytes) -> list[bytes]:
    return [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]


def _origin(note: Note) -> str:
    return note.text.partition("\n")[0]
