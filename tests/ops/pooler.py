"""A real PgBouncer that pools transactions, as a process of its own.

The machine's own, else Debian's package and the libraries it needs, unpacked once into pytest's cache: nothing is
installed, and no rights are needed.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from urllib.parse import quote

import msgspec
import psycopg
import pytest

from ledger.embedded import OWNER, EmbeddedServer
from tests.conftest import Database

PORT = 6432
CONNECTIONS = 3
ANSWER_SECONDS_MAX = 20.0
PRIVATE = ("Dir::State::lists", "Dir::Cache")
"""What `apt-get update` writes: for a machine that never asked what there is, or long ago."""


class Program(NamedTuple):
    """PgBouncer, and where the libraries are that it was unpacked with."""

    path: Path
    libraries: str


def installed(cache: Path) -> Program:
    """PgBouncer. Where it cannot be had the test is skipped, and in CI it fails."""
    machines = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if machines:
        return Program(Path(machines), "")
    there = cache / "debian"
    if not there.exists():
        # Aside, then renamed: a run that was stopped leaves nothing half done, and of two the first decides.
        aside = Path(tempfile.mkdtemp(dir=cache))
        try:
            _unpack(aside)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip()
            reason = f"pgbouncer is not installed, and Debian's package could not be had: {said}"
            shutil.rmtree(aside)
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        try:
            aside.rename(there)
        except OSError:
            shutil.rmtree(aside)
    libraries = {str(path.parent) for path in there.rglob("*.so.*")}
    return Program(there / "usr/sbin/pgbouncer", ":".join(sorted(libraries)))


def _unpack(directory: Path) -> None:
    """Raises OSError or CalledProcessError."""
    known: list[str] = []
    try:
        _run("apt-get", "download", "pgbouncer", directory=directory)
    except subprocess.CalledProcessError:
        known = [f"-o{name}={directory / name}" for name in PRIVATE]
        (directory / PRIVATE[0] / "partial").mkdir(parents=True)
        (directory / PRIVATE[1] / "archives/partial").mkdir(parents=True)
        _run("apt-get", "update", *known, directory=directory)
        _run("apt-get", "download", "pgbouncer", *known, directory=directory)
    needed = re.findall(r"Depends: (lib\S+)", _run("apt-cache", "depends", "pgbouncer", *known, directory=directory))
    there = _run("dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", directory=directory)
    if missing := [name for name in needed if f"{name} installed" not in there.splitlines()]:
        _run("apt-get", "download", *missing, *known, directory=directory)
    for package in directory.glob("*.deb"):
        _run("dpkg-deb", "--extract", str(package), str(directory), directory=directory)


def _run(program: str, *arguments: str, directory: Path) -> str:
    command = [program, *(["-oAPT::Sandbox::User="] if program == "apt-get" else []), *arguments]
    environment = os.environ | {"LC_ALL": "C"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=True).stdout


class PgBouncer:
    """A PgBouncer before `server`, with CONNECTIONS of that for each user of a database. A context manager."""

    def __init__(self, program: Program, server: EmbeddedServer) -> None:
        self._program = program
        self._server = server

    def url(self, user: str, database: str) -> str:
        """A connection string through it."""
        return f"postgresql://{quote(user)}@/{quote(database)}?host={quote(str(self._directory))}&port={PORT}"

    def pooling(self, database: Database) -> Database:
        """The same database, reached through it."""
        api, worker = (self.url(user, database.name) for user in ("muniment_api", "muniment_worker"))
        return msgspec.structs.replace(database, api=api, worker=worker)

    def __enter__(self) -> "PgBouncer":
        self._directory = Path(tempfile.mkdtemp(prefix="pgbouncer-"))
        account = self._server.programs.account
        settings = {
            "pool_mode": "transaction",
            "default_pool_size": CONNECTIONS,
            "max_client_conn": 200,
            "auth_type": "trust",
            "auth_file": self._directory / "users",
            "admin_users": OWNER,
            "listen_port": PORT,
            "unix_socket_dir": self._directory,
            "logfile": self._directory / "log",
        } | ({"user": account.pw_name} if account else {})
        lines = ["[databases]", f"* = host={self._server.socket_directory} port=5432", "[pgbouncer]"]
        lines += [f"{name} = {value}" for name, value in settings.items()]
        (self._directory / "ini").write_text("\n".join([*lines, ""]))
        (self._directory / "users").write_text(f'"{OWNER}" ""\n"muniment_api" ""\n"muniment_worker" ""\n')
        if account:  # it refuses to be root; what it then is must reach its files
            for path in (self._directory, *self._directory.iterdir()):
                os.chown(path, account.pw_uid, account.pw_gid)
        self._process = subprocess.Popen(
            [self._program.path, "--quiet", self._directory / "ini"],
            env=os.environ | {"LD_LIBRARY_PATH": self._program.libraries},
        )
        self._wait_until_it_answers()
        return self

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS_MAX
        while True:
            with suppress(psycopg.OperationalError):
                psycopg.connect(self.url(OWNER, "pgbouncer")).close()
                return
            assert self._process.poll() is None, "PgBouncer ended while it started"
            assert time.monotonic() < deadline, "PgBouncer did not answer in time"
            time.sleep(0.02)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._directory)
