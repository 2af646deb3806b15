"""`muniment verify database`: all that was recorded, computed again from the stored bytes, and the logs over it.

What integrity.py looks at, of every event and every command; then of each log the tree over those events, hash by hash,
and whether what was signed and published is its root, by the log's keys; and whether those are the keys that operators
added. Nothing is changed.
"""

import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple
from uuid import UUID

from cyclopts import Parameter

from ledger import tree
from ledger.checkpoint import ED25519, Checkpoint, InvalidNote, Note, VerifierKey
from ledger.errors import UpgradeRequired
from ledger.log_key import Key
from ledger.merkle import EMPTY_ROOT, HASH_BYTES, TILE_HASHES, TILE_LEVELS, Edge, Run, Tile, parted
from ledger.operations import OPERATORS
from ledger.postgres import Connection, fetch, open_keys_pool, queries
from ledger.tree import Damaged, LogKey
from ledger.vault import Vault
from ledger.verify import Trust, read_checkpoint
from ops import OperatorError
from ops.desk import reached
from ops.integrity import FAULTS_MAX, NO_EVENT, Integrity, recompute
from ops.log_keys import told
from ops.seals import open_all

SQL = queries("ops", "trees")


async def database(
    *held: Path,
    key: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    open_seals: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Recompute all that is in the database: each leaf, tile, root, signature, position, version and command.

    The service may run meanwhile. Ends with 1 if something is wrong.

    Parameters
    ----------
    held
        Checkpoints that were kept elsewhere. Only they tell of a database that was put back to an older state, with
        what it had signed till then.
    key
        A key that signs (`<origin>+<id>+<base64>`, as `muniment keys list --project` shows it) that you have from
        elsewhere; may be given again. Those alone are believed, whatever keys the database has. A key signs the logs of
        all projects, so that of any of them will do.
    open_seals
        Open every personal value too, with the key files of this machine: one that was moved to another place does not
        open there. Nothing that is opened is shown or kept.
    """
    try:
        notes = [Note.parse(path.read_bytes()) for path in held]
    except (OSError, InvalidNote) as error:
        raise OperatorError(f"That is no checkpoint: {error}") from None
    try:
        believed = [_log_key(text) for text in key]
    except InvalidNote as error:
        raise OperatorError(str(error)) from None
    async with reached() as (settings, pool), open_keys_pool(settings.keys_database_url, pool) as keys:
        async with pool.connection() as connection:
            found = await recompute(connection)
            logs = await recompute_logs(connection, found, notes, believed)
            await compare_keys(connection, found, may_be_made=settings.mode == "development")
        sealed = 0
        if open_seals:
            sealed = await open_all(pool, Vault(settings.keys_dir, keys, create_keys=False), found)
    for line in (*found.faults, *found.notes):
        print(line)
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


async def recompute_logs(
    connection: Connection, found: Integrity, held: Collection[Note] = (), believed: Collection[VerifierKey] = ()
) -> int:
    """Look at the tree of every ledger, and at what its log said of it. Answers how many logs there are.

    `believed` are the keys to go by; none: those that the database has. Raises psycopg's errors.
    """
    async with connection.transaction():
        # As of one moment: a publisher may be at work.
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        logs = [_Log(*row) for row in await fetch(connection, SQL.logs)]
        for log in logs:
            found.add(log.project_id or str(log.ledger_id), await _faults(connection, log, held, believed))
        for project, events, has_tiles in await fetch(connection, SQL.unlogged):
            found.add(project, [_unlogged(events, has_tiles)])
    missing = {_origin(note) for note in held} - {log.origin for log in logs}
    for origin in sorted(missing):
        found.add(origin, ["there is no such log, and you hold a checkpoint of it"])
    return len(logs)


def _unlogged(events: int, has_tiles: bool) -> str:
    if has_tiles:
        return "tiles of its tree are there, and no log that has signed anything"
    why = "it was removed, or no worker has signed since they came"
    return f"it has {events} events, and no log that has signed any: {why}"


async def _faults(
    connection: Connection, log: _Log, held: Collection[Note], believed: Collection[VerifierKey]
) -> list[str]:
    if log.events is None:
        return [f"the log {log.origin} is of no ledger that is there"]
    faults = [] if log.origin == log.name else [f"its log is called {log.origin}, and should be {log.name}"]
    if log.events < log.size:
        faults.append(f"it has {log.events} events, and its log has signed {log.size}")
    keys = [VerifierKey(log.origin, ED25519, key.public) for key in believed]
    trust = Trust(keys or [key.vkey for key in await tree.keys_of(connection, log.origin)])
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
            end = min(size, first + tree.LEAVES_AT_ONCE)
            (leaves,) = await tree.read_leaves(connection, log.ledger_id, [Run(first, end)])
            for level, hashes in edge.extend(parted(leaves)):
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
        for place, (found, expected) in enumerate(zip(parted(one), parted(other), strict=False)):
            if found != expected:
                first = (index * TILE_HASHES + place << TILE_LEVELS * level) + 1
                last = first + (1 << TILE_LEVELS * level) - 1
                yield f"{where}: hash {place} is not that of positions {first} to {last}"


# The keys that checkpoints are believed by


async def compare_keys(connection: Connection, found: Integrity, *, may_be_made: bool) -> None:
    """Compare the keys that the database has with those that events of the operators' ledger added and retired.

    `may_be_made`: a worker may have made the first key, as it does in development, without an event. That is believed
    only where the operators' ledger has no event of any key, and it is noted then. Raises psycopg's errors.
    """
    async with connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        there = await tree.keys_of(connection)
        try:
            known = await told(connection)
        except (UpgradeRequired, *NO_EVENT) as error:
            found.add(OPERATORS, [f"what it says of the keys that sign cannot be read: {error}"])
            return
    if may_be_made and there and not known.keys:
        found.notes.append(
            f"{OPERATORS}: it says nothing of the keys that sign, so that whoever wrote them into the database is "
            "believed (in development a worker makes the first; `muniment keys add` has it on record)"
        )
        return
    stored = {key.number: key for key in there}
    for number in sorted({*stored, *(key.number for key in known.keys)}):
        found.add(OPERATORS, _key_faults(number, stored.get(number), known.find(number)))


def _key_faults(number: int, stored: LogKey | None, told: Key | None) -> Iterator[str]:
    """What is wrong with one key, as the database has it and as events tell of it: one of them has it."""
    if told is None:
        yield f"key {number} signs by what is in the database, and no event of this ledger added it"
    elif stored is None:
        yield f"key {number} was added, and is not in the database; if `muniment keys add` was cut short, give it again"
    else:
        public = stored.vkey.public.hex()
        if public != told.public:
            yield f"key {number} has the public half {public}, and the key that was added {told.public}"
        # A key that a worker made, and that was retired before its own time by this ledger's clock, ends as it began.
        until = told.retired_at and max(told.retired_at, stored.from_)
        if stored.until != until:
            yield (
                f"key {number} signs until {stored.until or 'further notice'} by what is in the database, and until "
                f"{until or 'further notice'} by this ledger's events; if `muniment keys retire` was cut short, give "
                "it again"
            )


def _log_key(text: str) -> VerifierKey:
    key = VerifierKey.parse(text)
    if key.type != ED25519:
        raise InvalidNote(f"{text!r} is the key of a witness, and not of a log")
    return key


def _origin(note: Note) -> str:
    return note.text.partition("\n")[0]
