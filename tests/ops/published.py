"""A ledger whose log is published, by a publisher of the test's own, which signs when it is told to."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import psycopg

from ledger import store, tree
from ledger.commands import Command
from ledger.committer import Committer
from ledger.postgres import Pool, open_pool
from ledger.publisher import Publisher
from ledger.receipt import Receipt
from ledger.signing import LogFiles
from ledger.tree import Log
from ledger.values import Actor
from ledger.vault import Vault
from tests.conftest import Database

AGENT = Actor(issuer="https://id.example", sub="agent-7", kind="agent", assurance="authenticated", roles=("agent",))
LARGE = "x" * 100_000


class Ledger(NamedTuple):
    """A project, and what it takes to write and to publish it."""

    database: Database
    home: Path
    pool: Pool
    committer: Committer
    publisher: Publisher
    project: str

    async def give(self, command: Command, actor: Actor = AGENT) -> Receipt:
        return await self.committer.submit(self.project, command, actor)

    async def ledger_id(self) -> UUID:
        async with self.pool.connection() as connection:
            ledger = await store.find_ledger(connection, self.project)
        assert ledger is not None
        return ledger.ledger_id

    async def publish(self) -> Log:
        """All that is there now."""
        ledger_id = await self.ledger_id()
        async with self.pool.connection() as connection:
            head = await store.head(connection, ledger_id)
        while True:
            await self.publisher.publish(ledger_id)
            async with self.pool.connection() as connection:
                log = await tree.log_of(connection, ledger_id)
            if log is not None and log.published_size >= head.size:
                return log
            await asyncio.sleep(0.01)  # a worker is at it

    def forgetful(self) -> "Ledger":
        """The same, with a publisher that knows nothing of what was signed but what the database says."""
        shutil.rmtree(self.home / "keys/signed")
        return self._replace(publisher=Publisher(self.pool, LogFiles(self.home / "keys")))

    async def key(self) -> str:
        async with self.pool.connection() as connection:
            (key,) = await tree.keys_of(connection, (await self.publish()).origin)
        return str(key.vkey)

    def tamper(self, *statements: str) -> None:
        """As an owner who knows what they do."""
        with psycopg.connect(self.database.owner) as owner:
            owner.execute("SET session_replication_role = replica")
            for statement in statements:
                owner.execute(statement.encode())

    def muniment(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """A command, as an operator types it."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MUNIMENT_")}
        line = [sys.executable, "-P", "-m", "ops.cli", *map(str, arguments)]
        return subprocess.run(line, env=inherited | self.environ, capture_output=True, text=True, check=False)

    @property
    def environ(self) -> dict[str, str]:
        ours = {"MUNIMENT_MODE": "development", "MUNIMENT_HOME": str(self.home), "DATABASE_URL": self.database.worker}
        return ours | {"MIGRATE_DATABASE_URL": self.database.owner}


@asynccontextmanager
async def publishing(database: Database, home: Path, project: str = "demo") -> AsyncIterator[Ledger]:
    async with open_pool(database.worker, connections_max=4) as pool:
        keys = LogFiles(home / "keys")
        (home / "keys").mkdir(mode=0o700, parents=True, exist_ok=True)
        async with pool.connection() as connection:
            await tree.add_key(connection, 1, keys.make(1))
        committer = Committer(pool, Vault(home / "keys", pool, create_keys=True), create_ledgers=True)
        yield Ledger(database, home, pool, committer, Publisher(pool, keys), project)
        await committer.close()


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
