"""`muniment backup` and `muniment restore`, for the PostgreSQL that Muniment runs itself.

A backup is a directory: `data`, which pg_basebackup copied from the running server, with the digest of each file,
and `keys` if they were asked for. Whatever has the name that was asked for is whole: it appears there by a rename,
after a server was started on a copy of it and every position in it recomputed. A restore does the same in the home
it is for, and a rename puts it in place; killed before that, either leaves a directory that nothing uses.
"""

import asyncio
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import msgspec
import psycopg
from msgspec import Struct, structs

from ledger.embedded import EmbeddedServer
from ledger.postgres import Connection
from ledger.project_key import write_once
from ledger.settings import Settings
from ops import OperatorError
from ops.integrity import Integrity, recompute
from ops.migrate import pending, shipped
from ops.projects import local_settings

DATA, KEYS = "data", "keys"
FAULTS_SHOWN = 10


class BackupError(OperatorError):
    """A backup cannot be made or restored; the message says why and what to do."""


class Contents(NamedTuple):
    """What a server that was started on a copy told."""

    integrity: Integrity
    projects: list[str]
    """Those that began with a key file."""
    pending: list[str]

    def __str__(self) -> str:
        return f"{self.integrity.positions:,} positions of {self.integrity.ledgers} projects, all recomputed"


def backup(directory: Path, /, *, with_keys: bool = False) -> None:
    """Copy the database that Muniment runs itself to a new directory, while it runs, and check the copy.

    It takes the size of the database there, and once more while it is checked. A server of your own has tools of
    its own: pg_basebackup, pg_dump, or its provider's snapshots.

    Parameters
    ----------
    directory
        Where to. It must not exist yet; the directory it is in must.
    with_keys
        Copy the key files too. Whoever has such a backup can read every personal value in it, and sign use
        tokens; without it, sealed values are safe with the backup, and lost if the key files are. Keep those
        apart then.
    """
    settings = _embedded(local_settings(any_mode=True))
    directory = directory.absolute()
    if directory.exists():
        raise BackupError(f"{directory} exists, and nothing is overwritten: name another directory")
    server = EmbeddedServer(settings.home)
    if not server.data.exists():
        raise BackupError(f"There is nothing to back up: no database of Muniment is in {settings.home}")
    with _draft(directory.parent, f"{directory.name}.unfinished-") as draft:
        with server:
            # As ourselves and not as the server's account, which may not enter the directory.
            structs.replace(server.programs, account=None).run(
                *("pg_basebackup", f"--dbname={server.url()}", f"--pgdata={draft / DATA}"),
                *("--checkpoint=fast", "--manifest-checksums=SHA256", "--no-password"),
            )
        if with_keys:
            _copy_keys(settings.keys_dir, draft / KEYS)
        check_digests(draft / DATA)
        with _draft(directory.parent, f"{directory.name}.checked-") as home:
            contents = asyncio.run(_contents(_lay_out(draft / DATA, EmbeddedServer(home, durable=False))))
        if contents.integrity.faults:
            kept = directory.with_name(f"{directory.name}.damaged")
            draft.rename(kept)
            raise BackupError(_damaged(f"What is recorded in {settings.home}", contents) + f". The copy is {kept}")
        # Dying before this leaves a directory beside it, which nothing uses and which may be removed.
        _put(draft, directory)
    print(f"{directory}: {contents}")
    if with_keys:
        print("The key files are in it: whoever has it can read everything")
    else:
        print(f"The key files are not in it: keep a copy of {settings.keys_dir} too, apart from it")


def restore(directory: Path, /) -> None:
    """Put a backup into MUNIMENT_HOME, which must have no database yet, once it was checked there.

    What came after the backup is not in it: positions are given again, and what was erased since can be read.

    Parameters
    ----------
    directory
        What `muniment backup` made.
    """
    settings = _embedded(local_settings(any_mode=True))
    source, target = directory.absolute() / DATA, EmbeddedServer(settings.home)
    if not source.joinpath("PG_VERSION").exists():
        raise BackupError(f"{directory} is no backup: it has no {DATA}/PG_VERSION")
    _refuse_other_major(source, target)
    if there := sorted(target.data.parent.glob("*/PG_VERSION")):
        raise BackupError(
            f"{there[0].parent} holds a database, and nothing is restored over one: set MUNIMENT_HOME to another "
            f"directory, or stop Muniment and move that one away"
        )
    check_digests(source)
    keys = directory.absolute() / KEYS
    clashes = [name for name, content in _keys(keys) if _differs(settings.keys_dir / name, content)]
    if clashes:
        raise BackupError(
            f"{settings.keys_dir} has other key files than the backup: {', '.join(clashes)}. None was replaced; move "
            f"them away if nothing needs them"
        )
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _draft(settings.home, "restored-") as home:
        restored = _lay_out(source, EmbeddedServer(home))
        contents = asyncio.run(_contents(restored))
        if contents.integrity.faults:
            raise BackupError(_damaged(f"What is recorded in {directory}", contents) + ". Nothing was restored")
        _copy_keys(keys, settings.keys_dir)
        target.data.parent.mkdir(mode=0o700, exist_ok=True)
        # Dying before this leaves keys that nothing depends on yet: the next restore finds the same and goes on.
        _put(restored.data, target.data)
    print(f"{settings.home}: {contents}")
    if contents.pending:
        print("It was made by an older version: run `muniment migrate` (`make up` does so by itself)")
    if missing := [name for name in contents.projects if not (settings.keys_dir / f"{name}.key").exists()]:
        print(f"Put the key files of these projects into {settings.keys_dir} before you start: {', '.join(missing)}")


def _embedded(settings: Settings) -> Settings:
    if settings.embedded:
        return settings
    raise BackupError(
        "DATABASE_URL names a PostgreSQL of your own, and this is for the one that Muniment runs itself: use "
        "pg_basebackup, pg_dump and pg_dumpall --roles-only, or your provider's snapshots, and copy the key files of "
        f"{settings.keys_dir} apart from them"
    )


@contextmanager
def _draft(parent: Path, prefix: str) -> Iterator[Path]:
    """A directory of our own in `parent`, and so on the disk it is for; gone when the block ends, unless renamed."""
    try:
        draft = Path(mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        raise BackupError(f"No directory can be made in {parent}: {error.strerror}") from None
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _put(draft: Path, directory: Path) -> None:
    """Give `draft` its name, durably, unless something has it by now."""
    if directory.exists():
        raise BackupError(f"{directory} was made meanwhile, and nothing is overwritten: try again with another name")
    draft.rename(directory)
    descriptor = os.open(directory.parent, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.close(descriptor)


def _lay_out(source: Path, server: EmbeddedServer) -> EmbeddedServer:
    """A server of a new home, whose data is a copy of `source`."""
    shutil.copytree(source, server.data, symlinks=True)
    if account := server.programs.account:
        for path in (server.data, *server.data.rglob("*")):
            os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
    return server


async def _contents(server: EmbeddedServer) -> Contents:
    """Start `server`, which replays the log that was copied with it, and look at everything recorded there.

    Raises MigrationError where a newer version migrated it.
    """
    with server:
        async with await Connection.connect(server.url(), autocommit=True) as connection:
            try:
                missing = await pending(connection, shipped())
                projects = await (await connection.execute("SELECT project_id FROM keys.project_keys")).fetchall()
                return Contents(await recompute(connection), sorted(name for (name,) in projects), missing)
            except (psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedTable):
                raise BackupError("There is nothing recorded in it: it has no tables of Muniment yet") from None


def _damaged(where: str, contents: Contents) -> str:
    faults = contents.integrity.faults
    shown = "; ".join(faults[:FAULTS_SHOWN]) + (" …" if len(faults) > FAULTS_SHOWN else "")
    return f"{where} is damaged: {shown}. Keep it as it is, and see ops/runbooks/doctor.md, `integrity`"


def _refuse_other_major(source: Path, target: EmbeddedServer) -> None:
    made_by, here = source.joinpath("PG_VERSION").read_text().strip(), target.programs
    if made_by != str(here.major):
        raise BackupError(
            f"{source.parent} is of PostgreSQL {made_by}, and the programs found here ({here.bin}) are PostgreSQL "
            f"{here.version}, which cannot read it. Restore it with the programs of PostgreSQL {made_by} (those that "
            f"Muniment had when it was made, or your system's package), and move it to {here.major} from there with "
            f"PostgreSQL's pg_upgrade, which needs the programs of both"
        )


# --- files ---------------------------------------------------------------------------------------------------


class _File(Struct, rename={"path": "Path", "checksum": "Checksum"}):
    path: str
    checksum: str


class _Manifest(Struct, rename={"files": "Files"}):
    files: list[_File]


def check_digests(data: Path) -> None:
    """Compare each file with what pg_basebackup wrote down of it (the log has checksums of its own, which its replay
    checks). PostgreSQL's pg_verifybackup does the same, and crashes as the embedded distribution has it.

    Raises `BackupError` naming the first that is missing or another.
    """
    try:
        manifest = msgspec.json.decode(data.joinpath("backup_manifest").read_bytes(), type=_Manifest)
        for file in manifest.files:
            with data.joinpath(file.path).open("rb") as content:
                if file_digest(content, "sha256").hexdigest() != file.checksum:
                    raise BackupError(f"{data / file.path} is not as it was copied: take another backup")
    except (OSError, msgspec.MsgspecError) as error:
        raise BackupError(f"{data} is not whole: {error}. Take another backup") from None


def _keys(directory: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(directory.glob("[!.]*")):
        if path.is_file():  # what was last signed is in a directory of its own, and is not to be as old as a backup
            yield path.name, path.read_bytes()


def _differs(path: Path, content: bytes) -> bool:
    return path.exists() and path.read_bytes() != content


def _copy_keys(source: Path, target: Path) -> None:
    """Copy the key files, if any, that are not in `target` yet."""
    for name, content in _keys(source):
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_once(target / name, content)
