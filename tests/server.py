"""The service as its own processes, as `muniment up` starts them, for tests that kill and restart it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import quote
from uuid import uuid4

import httpx
import psycopg
from psycopg import sql

from api.auth import development_token
from ledger.embedded import EmbeddedServer
from ledger.entry import Recorded
from tests.check import check_ledger
from tests.conftest import TEMPLATE, Database, database_of

STARTED_WITHIN_SECONDS = 60


class Server:
    """An API process, and a worker if views are read, over one database. A context manager.

    It keeps its address when it is killed and started again.
    """

    def __init__(self, database: Database, home: Path, commands: Sequence[str] = ("api",)) -> None:
        self.home = home
        self.keys_dir = home / "keys"
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.database = database
        self._commands = commands
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """What a `muniment` command needs to find this server, its database and its keys."""
        ours = {"MUNIMENT_MODE": "development", "MUNIMENT_HOME": str(self.home), "PORT": str(self.port)}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MUNIMENT_")}
        return inherited | ours | {"DATABASE_URL": self.database.api}

    def token(self, project: str, subject: str = "tester", roles: Sequence[str] = ("agent",)) -> str:
        return development_token(self.keys_dir, project=project, subject=subject, kind="service", roles=list(roles))

    def start(self) -> None:
        """Start what is to run; returns once the API answers."""
        for command in self._commands:
            user = self.database.worker if command == "worker" else self.database.api
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "ops.cli", command],
                    env=self.environment | {"DATABASE_URL": user},
                    start_new_session=True,
                )
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.kill()
            raise

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + STARTED_WITHIN_SECONDS
        with httpx.Client(base_url=self.url, trust_env=False) as client:
            while True:
                with suppress(httpx.TransportError):
                    client.get("/health/live")
                    return
                assert time.monotonic() < deadline, "the API did not answer in time"
                assert all(process.poll() is None for process in self.processes), "a process ended while it started"
                time.sleep(0.02)

    def stop(self) -> list[int]:
        """Ask every process to end, and return how each did."""
        for process in self.processes:
            process.terminate()
        return [process.wait() for process in self.processes]

    def kill(self) -> None:
        """End every process at once, without a chance to finish anything."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.processes = []

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


@contextmanager
def shared_server(postgres: EmbeddedServer, home: Path, commands: Sequence[str] = ("api",)) -> Iterator[Server]:
    """A server over a fresh database, for all tests of a module: each takes a project of its own."""
    name = f"shared_{uuid4().hex}"
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        connection.execute(create.format(sql.Identifier(name), sql.Identifier(TEMPLATE)))
        try:
            with Server(database_of(postgres, name), home, commands) as server:
                yield server
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def history(server: Server, project: str) -> list[Recorded]:
    """What a project's ledger holds, after everything in the database was checked, as of one moment: the server
    may be at work."""
    one_moment = quote("-c default_transaction_isolation=serializable")
    return check_ledger(f"{server.database.owner}&options={one_moment}").get(project, [])


def new_project() -> str:
    return f"p-{uuid4().hex[:12]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port
