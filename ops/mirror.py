"""`muniment publish`: a project's log as plain files, for a web server, a CDN or an object store (C2SP tlog-tiles).

What is copied is what the log has published, and beside it the payloads and keys that a verifier needs. A file that is
there is never changed, but for the checkpoint and the keys, and for partial files, which go when the full one is
there. The checkpoint is replaced last, when the others are on the disk: so whoever reads meanwhile finds all that it
speaks of, and a run that was killed is gone on with from the one that is there. One at a time writes to a directory.
Nothing is verified here but that it is the same log: see `muniment verify`.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from uuid import UUID

import msgspec

from ledger import store, tree
from ledger.checkpoint import Checkpoint, InvalidNote, Note
from ledger.merkle import EMPTY_ROOT, TILE_HASHES, Tile, tile_path, tiles
from ledger.postgres import Connection, fetch, queries
from ledger.tree import Damaged, Log
from ops import OperatorError
from ops.desk import connected

SQL = queries("ops", "mirror")

TILES_AT_ONCE = 16
PAYLOADS_AT_ONCE = 16
"""Each has up to 8 MiB."""
FILES_AT_ONCE = 16
"""So many wait for the disk together, which then costs no more than one sync of all of it."""


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
    with _alone(directory):
        here = _opened(directory)
        was = here.size if here else 0
        if here is not None:
            await _refuse_other(connection, ledger_id, log, here)
        files = _Files(directory)
        await _copy_payloads(connection, ledger_id, files, was, log.published_size)
        new = list(tiles(log.published_size, was))
        for first in range(0, len(new), TILES_AT_ONCE):
            await _copy(connection, ledger_id, files, new[first : first + TILES_AT_ONCE])
        keys = await tree.keys_of(connection, log.origin)
        files.put({"keys.json": msgspec.json.encode(tree.shown(keys))})
        # Dying before this leaves files beside an older checkpoint, which speaks of none of them. They must be on the
        # disk, and their names too, before one that does.
        files.settle()
        files.put({"checkpoint": log.published})
        files.settle()
        for path in _parts_of_full(directory, was, log.published_size):
            shutil.rmtree(path, ignore_errors=True)
    return was


def _opened(directory: Path) -> Checkpoint | None:
    """What a mirror has; None where it is new."""
    try:
        return Checkpoint.parse(Note.parse((directory / "checkpoint").read_bytes()).text)
    except InvalidNote as error:
        raise MirrorError(f"{directory / 'checkpoint'} is no checkpoint: {error}") from None
    except FileNotFoundError:
        # A mirror that was killed before its first checkpoint has these, and is begun again.
        ours = {"tile", "payload", "keys.json", _draft("keys.json"), _draft("checkpoint")}
        if others := {path.name for path in directory.iterdir()} - ours:
            raise MirrorError(
                f"{directory} has files of others, and no checkpoint ({min(others)}): name an empty directory"
            ) from None
        return None


async def _refuse_other(connection: Connection, ledger_id: UUID, log: Log, here: Checkpoint) -> None:
    """Refuse to go on from a checkpoint that is not the beginning of what the log has now: it may be evidence."""
    if here.origin != log.origin:
        raise MirrorError(
            f"The mirror is of another log: {here.origin}, and this is {log.origin} (a ledger that was adopted after a "
            "restore begins a new log). Name a new directory for this one, and keep the mirror as it is: it shows what "
            "the other had signed"
        )
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


async def _copy_payloads(connection: Connection, ledger_id: UUID, files: "_Files", was: int, size: int) -> None:
    positions = [
        position for (position,) in await fetch(connection, SQL.beside, ledger_id=ledger_id, after=was, size=size)
    ]
    for first in range(0, len(positions), PAYLOADS_AT_ONCE):
        some: dict[str, bytes] = {}
        for position in positions[first : first + PAYLOADS_AT_ONCE]:
            ((payload,),) = await fetch(connection, SQL.payload, ledger_id=ledger_id, position=position)
            some[f"payload/{sha256(payload).hexdigest()}"] = payload
        files.put(some)


async def _copy(connection: Connection, ledger_id: UUID, files: "_Files", some: list[Tile]) -> None:
    """Tiles, and the entries of those that are of level 0."""
    hashes = await tree.read_tiles(connection, ledger_id, some)
    written: dict[str, bytes] = {}
    for tile in some:
        if tile.level == 0:
            entries = await tree.read_entries(connection, ledger_id, tile.index * TILE_HASHES, tile.width)
            bundle = b"".join(len(entry).to_bytes(2) + entry for entry in entries)
            written[f"tile/entries/{tile_path(tile.index, tile.width)}"] = bundle
        written[f"tile/{tile.path}"] = hashes[tile]
    files.put(written)


# On the disk


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep others from writing there, which is made if it is not there; the lock goes with the process.

    Raises MirrorError where somebody is at it, and OSError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise MirrorError(f"Another `muniment publish` is writing to {directory}: let it end, then ask again") from None
    finally:
        os.close(descriptor)


class _Files:
    """What is written into a mirror's directory, several files at a time. Every method raises OSError."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._changed: set[Path] = {directory.parent}
        """Directories in which there are names that may not be on the disk yet."""

    def put(self, files: Mapping[str, bytes]) -> None:
        """Each whole under its name, or not there; its name is not durable yet."""
        paths = [self._directory / name for name in files]
        for parent in {path.parent for path in paths}:
            parent.mkdir(parents=True, exist_ok=True)
            while parent != self._directory.parent:
                self._changed.add(parent)
                parent = parent.parent
        with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
            list(threads.map(_put, paths, files.values()))

    def settle(self) -> None:
        """All that was put is durable on return."""
        for path in self._changed:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._changed.clear()


def _put(path: Path, content: bytes) -> None:
    draft = path.with_name(_draft(path.name))
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _draft(name: str) -> str:
    """What a file is called until it is whole. Of one that was never renamed the next run makes use."""
    return f".{name}"


def _parts_of_full(directory: Path, was: int, size: int) -> Iterator[Path]:
    """The directories of partial files of the older size, where the full one is there by now."""
    level = 0
    while was:
        index, width = divmod(was, TILE_HASHES)
        if width and size // TILE_HASHES > index:
            for kind in (str(level), *(["entries"] if level == 0 else [])):
                yield directory / "tile" / kind / f"{tile_path(index)}.p"
        level, was, size = level + 1, was // TILE_HASHES, size // TILE_HASHES
