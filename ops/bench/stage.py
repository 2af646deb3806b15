"""What everything is measured on: one durable server, a fresh migrated database for each part, programs.

Whoever is measured runs in a process of its own, which gets ready, says so, and goes when it is told; so
nobody pays for another's start, memory or garbage.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psycopg
from psycopg import sql

from ledger.embedded import OWNER, EmbeddedServer
from ops.migrate import migrate

PATIENCE_SECONDS = 300


class Figures(msgspec.Struct, frozen=True):
    """What one program measured in one round."""

    count: int
    seconds: float
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    cpu_seconds: float | None = None
    """What the measured process itself used; PostgreSQL's share is not in it."""

    @property
    def rate(self) -> float:
        return self.count / self.seconds

    @property
    def cpu_us(self) -> float | None:
        return self.cpu_seconds / self.count * 1e6 if self.cpu_seconds else None


Measure = Callable[[], Figures]


class BenchError(Exception):
    """A figure could not be had, and the message says why."""


class Stage:
    """A server that is thrown away at the end. `seconds`: how long each measurement takes; `events`: how large a large
    ledger is, and `keep`: a directory where that is kept for a later run."""

    def __init__(self, directory: Path, seconds: float, events: int = 0, keep: Path | None = None) -> None:
        self.directory = directory
        self.seconds = seconds
        self.events = events
        self.keep = keep
        self.server = EmbeddedServer(directory / "home", durable=True)
        self.keys = directory / "keys"
        self._databases = 0

    def new_database(self, name: str | None = None) -> str:
        """The name of a fresh database with our tables, for one ledger's worth of measuring."""
        self._databases += 1
        name = name or f"bench_{self._databases}"
        with psycopg.connect(self.server.url(), autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(name)))
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.migrated(name)

    def migrated(self, database: str) -> str:
        """The name of a database whose tables are those of today."""
        asyncio.run(migrate(self.server.url(OWNER, database)))
        return database

    def owner(self, database: str) -> str:
        return self.server.url(OWNER, database)

    def api(self, database: str) -> str:
        return self.server.url("muniment_api", database)

    def worker(self, database: str) -> str:
        return self.server.url("muniment_worker", database)

    def size(self, database: str, project_id: str) -> int:
        """How many events a project's ledger has."""
        with psycopg.connect(self.owner(database)) as connection:
            found = connection.execute("SELECT size FROM ledger.ledgers WHERE project_id = %s", [project_id]).fetchone()
        return found[0] if found else 0

    def settings(self) -> dict[str, str]:
        """How durable the server is, in its own words."""
        names = (
            "server_version",
            "fsync",
            "synchronous_commit",
            "full_page_writes",
            "wal_sync_method",
            "shared_buffers",
        )
        with psycopg.connect(self.server.url()) as connection:
            rows = [connection.execute("SELECT current_setting(%s)", [name]).fetchone() for name in names]
        return {name: str(row[0]) for name, row in zip(names, rows, strict=True) if row}


@contextmanager
def open_stage(seconds: float, events: int = 0, keep: Path | None = None) -> Iterator[Stage]:
    """A stage on a real disk: a temporary directory is often in memory, where nothing is durable."""
    roots = [Path(root) for root in ("/var/tmp", tempfile.gettempdir())]  # noqa: S108  (mkdtemp, mode 0700)
    directory = Path(tempfile.mkdtemp(prefix="muniment-bench-", dir=next(root for root in roots if root.is_dir())))
    try:
        with _on(Stage(directory, seconds, events, keep)) as stage:
            yield stage
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def kept_stage(directory: Path, seconds: float) -> Iterator[Stage]:
    """A stage in a directory that stays, with whatever databases an earlier run left there."""
    directory.mkdir(parents=True, exist_ok=True)
    with _on(Stage(directory.resolve(), seconds)) as stage:
        yield stage


@contextmanager
def _on(stage: Stage) -> Iterator[Stage]:
    stage.directory.chmod(0o711)  # as root, the server runs under another account
    (stage.directory / "home").mkdir(exist_ok=True)
    with stage.server:
        yield stage


class Program:
    """One of the bench's own programs, started and waiting for the word."""

    def __init__(self, module: str, told: dict[str, Any]) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"ops.bench.{module}", json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> "Program":
        if self._line() != "ready":
            raise BenchError(f"{self._module} did not get ready; what it says stands above")
        return self

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def figures(self) -> dict[str, Any]:
        line = self._line()
        if self._process.wait(PATIENCE_SECONDS) or not line:
            raise BenchError(f"{self._module} failed; what it says stands above")
        figures: dict[str, Any] = json.loads(line)
        return figures

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def run(*programs: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What each program measured; they get ready one after the other and go at the same moment."""
    with ExitStack() as ends:
        started = []
        for module, told in programs:
            started.append(Program(module, told))
            ends.callback(started[-1].end)
            started[-1].ready()
        for program in started:
            program.go()
        return [program.figures() for program in started]


def wait_for_word() -> None:
    """In a program: say that it is ready, and return when it is told to go."""
    print("ready", flush=True)
    if sys.stdin.readline() != "go\n":
        sys.exit("the bench is gone")


def told() -> Any:
    """In a program: what it was told."""
    return json.loads(sys.argv[1])


def answer(**figures: Any) -> None:
    """In a program: what it measured."""
    print(json.dumps(figures), flush=True)


def environment(**ours: str) -> dict[str, str]:
    """For a process of Muniment: this one's environment without what configures another Muniment."""
    foreign = ("MUNIMENT_", "DATABASE_", "MIGRATE_DATABASE_", "REDIS_", "OIDC_", "IDEMPOTENCY_", "OTEL_")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | ours
