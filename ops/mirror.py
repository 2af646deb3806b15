"""`muniment publish`: a project's log as plain files, for a web server, a CDN or an object store (C2SP tlog-tiles).

What is copied is what the log has published, and beside it the payloads and keys that a verifier needs. A file that is
there is never changed, but for the checkpoint and the keys, and for partial files, which go when the full one is there.
The checkpoint is replaced last: so whoever reads meanwhile finds all that it speaks of, and a run that was killed is
gone on with from the one that is there. Nothing is verified here but that it is the same log: see `muniment verify`.
"""

import os
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from uuid import UUID

import msgspec

from ledger import store, tree
from ledger.checkpoint import Checkpoint, InvalidNote, Note
from ledger.merkle import EMPTY_ROOT, TILE_HASHES, Tile, tile_path, tiles
from ledger.postgres import Connection, fetch, queries
from ledger.tree import Damaged, Log, LogKey
from ops import OperatorError
from ops.desk import connected

SQL = queries("ops", "mirror")

TILES_AT_ONCE = 16


class MirrorError(OperatorError):
    """A log cannot be copied there; the message says why."""


async def publish(directory: Path, /, *, project: str) -> None:
    """Write a project's log as files that any web server can give out, or bring what is there up to date.

    Whoever has them can verify them without this service (`muniment verify DIRECTORY`), and read every entry: personal
    values are sealed in it, and stay so. Run it as often as the copy should follow; it writes what is new.

    Parameters
    ----------
    directory
        Where to. It is made if it does not exist; else it must be a mirror of the same log, or empty.
    project
        Whose log it is.
    """
    async with connected() as connection:
        ledger = await store.find_ledger(connection, project)
        log = await tree.log_of(connection, ledger.ledger_id) if ledger else None
        if ledger is None or log is None:
            raise MirrorError(f"{project} has no log yet: it has one a moment after its first event, if a worker signs")
        try:
            was = await write(connection, ledger.ledger_id, log, directory)
        except Damaged as error:
            raise MirrorError(f"What is stored of {project} is damaged: {error} (muniment verify database)") from None
        except OSError as error:
            raise MirrorError(f"{directory} cannot be written: {error}") from None
    print(f"{directory}: {log.published_size:,} entries of {log.origin}, {log.published_size - was:,} of them new")


async def write(connection: Connection, ledger_id: UUID, log: Log, directory: Path) -> int:
    """Bring a mirror to what `log` has published. Answers how many entries it had before.

    Raises MirrorError where it is a mirror of something else, Damaged and OSError.
    """
    here = _opened(directory)
    was = here.size if here else 0
    if here is not None:
        await _refuse_other(connection, ledger_id, log, here)
    for (position,) in await fetch(connection, SQL.beside, ledger_id=ledger_id, after=was, size=log.published_size):
        ((payload,),) = await fetch(connection, SQL.payload, ledger_id=ledger_id, position=position)
        _put(directory / "payload" / sha256(payload).hexdigest(), payload)
    some: list[Tile] = []
    for tile in tiles(log.published_size, was):
        some.append(tile)
        if len(some) == TILES_AT_ONCE:
            await _copy(connection, ledger_id, directory, some)
            some = []
    await _copy(connection, ledger_id, directory, some)
    _put(directory / "keys.json", encode_keys(await tree.keys_of(connection, log.origin)))
    # Dying before this leaves files beside an older checkpoint, which speaks of none of them. They must be on the disk
    # before one that does.
    os.sync()
    _put(directory / "checkpoint", log.published)
    for path in _parts_of_full(directory, was, log.published_size):
        shutil.rmtree(path, ignore_errors=True)
    return was


def encode_keys(keys: list[LogKey]) -> bytes:
    """A log's keys as they are told to whoever asks."""
    told = [{"vkey": str(key.vkey), "from": key.from_} | ({"until": key.until} if key.until else {}) for key in keys]
    return msgspec.json.encode({"keys": told})


def _opened(directory: Path) -> Checkpoint | None:
    """What a mirror has; None where it is new, and made now."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        return Checkpoint.parse(Note.parse((directory / "checkpoint").read_bytes()).text)
    except InvalidNote as error:
        raise MirrorError(f"{directory / 'checkpoint'} is no checkpoint: {error}") from None
    except FileNotFoundError:
        # A mirror that was killed before its first checkpoint has these, and is begun again.
        if others := {path.name for path in directory.iterdir()} - {"tile", "payload", "keys.json"}:
            raise MirrorError(
                f"{directory} has files of others, and no checkpoint ({min(others)}): name an empty directory"
            ) from None
        return None


async def _refuse_other(connection: Connection, ledger_id: UUID, log: Log, here: Checkpoint) -> None:
    """Refuse to go on from a checkpoint that is not the beginning of what the log has now: it may be evidence."""
    if here.origin != log.origin:
        raise MirrorError(f"The mirror is of {here.origin}, and this is {log.origin}: name another directory")
    if here.size > log.published_size:
        raise MirrorError(
            f"The mirror has {here.size:,} entries and the log {log.published_size:,}: it was rolled back. Keep the "
            "mirror as it is: it shows what is gone"
        )
    root = await tree.root_of(connection, ledger_id, here.size) if here.size else EMPTY_ROOT
    if root != here.root:
        raise MirrorError(
            f"The log's first {here.size:,} entries are not those of the mirror, whose checkpoint it signed: keep the "
            "mirror as it is, and look with `muniment verify` at what differs"
        )


async def _copy(connection: Connection, ledger_id: UUID, directory: Path, some: list[Tile]) -> None:
    """Entries before their hashes, and tiles from below: as their order is."""
    hashes = await tree.read_tiles(connection, ledger_id, some)
    for tile in some:
        if tile.level == 0:
            entries = await tree.read_entries(connection, ledger_id, tile.index * TILE_HASHES, tile.width)
            bundle = b"".join(len(entry).to_bytes(2) + entry for entry in entries)
            _put(directory / "tile/entries" / tile_path(tile.index, tile.width), bundle)
        _put(directory / "tile" / tile.path, hashes[tile])


def _put(path: Path, content: bytes) -> None:
    """Whole under its name, or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    draft.replace(path)


def _parts_of_full(directory: Path, was: int, size: int) -> Iterator[Path]:
    """The directories of partial files of the older size, where the full one is there by now."""
    level = 0
    while was:
        index, width = divmod(was, TILE_HASHES)
        if width and size // TILE_HASHES > index:
            for kind in (str(level), *(["entries"] if level == 0 else [])):
                yield directory / "tile" / kind / f"{tile_path(index)}.p"
        level, was, size = level + 1, was // TILE_HASHES, size // TILE_HASHES
