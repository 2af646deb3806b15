"""An upgrade while traffic flows: the version before works on the new schema, and beside the new version.

It is run from its own tree, out of this repository's history, with the packages that are installed here.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from ledger.embedded import EmbeddedServer
from ledger.postgres import open_pool
from ops.migrate import migrate
from projections import VIEWS
from projections.verify import verify
from tests.check import check_ledger
from tests.conftest import Database, database_of
from tests.ops.everything import EVERY, Pair, given, pair_of, until
from tests.server import Server

VERSION_BEFORE = "10cff794fb484e225e9970f9734cf4c5b04aa7ec"
"""The last commit of the version that is upgraded from. Each release names the one before it."""

REPOSITORY = Path(__file__).parents[2]

VERIFY = """
import asyncio, sys
from ledger.postgres import open_pool
from projections import VIEWS
from projections.verify import verify

async def main():
    async with open_pool(sys.argv[1], 2) as pool:
        for view in VIEWS:
            async for verdict in verify(pool, view):
                print(verdict, verdict.position, *verdict.drifts[:3])
                if not verdict.holds:
                    sys.exit(1)

asyncio.run(main())
"""


WORK = """
import os
import uvloop
from ledger.settings import Settings
from ops.worker import run

uvloop.run(run(Settings.from_environment(os.environ)))
"""


@pytest.fixture(scope="session")
def tree_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The version before. Skips where the history does not reach so far back."""
    archive = ["git", "-C", str(REPOSITORY), "archive", VERSION_BEFORE]
    try:
        packed = subprocess.run(archive, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode().strip() or error
        pytest.skip(f"the version before, {VERSION_BEFORE[:7]}, is not in the history that is here: {said}")
    tree = tmp_path_factory.mktemp("before")
    subprocess.run(["tar", "-x", "-C", tree], input=packed, check=True)
    return tree


@pytest.fixture
def database(postgres: EmbeddedServer, tree_before: Path) -> Iterator[Database]:
    """A database that the version before has migrated."""
    database = database_of(postgres, "upgraded")
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database.name)))
        try:
            assert run(tree_before, "-m", "ops.cli", "migrate", MIGRATE_DATABASE_URL=database.owner)
            yield database
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(database.name)))


def run(tree: Path, *arguments: str, **environment: str) -> str:
    """What the code of `tree` says."""
    known = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tree), "MUNIMENT_MODE": "development"} | environment
    known = {"DATABASE_URL": "postgresql://nobody@/none"} | known
    ended = subprocess.run([sys.executable, "-P", *arguments], env=known, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


class ServerBefore(Server):
    """The version before."""

    def __init__(self, tree: Path, database: Database, home: Path) -> None:
        super().__init__(database, home, ("api", "worker"))
        self._tree = tree
        assert run(tree, "-c", "import ops; print(ops.__file__)").startswith(str(tree))

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"PYTHONPATH": str(self._tree)}

    def start(self) -> None:
        with chdir(self._tree):  # the HTTP server looks there first
            super().start()

    @contextmanager
    def waiting_worker(self) -> Iterator[None]:
        """Another worker, as if it had waited for its turn since before the migration: now none would start."""
        environment = self.environment | {"DATABASE_URL": self.database.worker}
        with subprocess.Popen([sys.executable, "-P", "-c", WORK], env=environment) as worker:
            try:
                yield
            finally:
                worker.terminate()


async def at_work(pair: Pair, rounds: int = 1) -> None:
    """Every command is given, and every list is read meanwhile; none may fail."""
    await asyncio.gather(
        *(pair.give_every_command() for _ in range(rounds)), *(pair.read_every_list() for _ in range(rounds * 2))
    )


def size_of(database: Database) -> int:
    with psycopg.connect(database.owner) as connection:
        ((size,),) = connection.execute("SELECT size FROM ledger.ledgers WHERE project_id = 'demo'").fetchall()
        assert isinstance(size, int)
        return size


async def shown(pair: Pair, database: Database) -> None:
    """Return when the views show all that there is."""
    await pair.person.wait(size_of(database))


async def views_are_of_this_version(database: Database) -> bool:
    async with await psycopg.AsyncConnection.connect(database.owner) as connection:
        versions = await (await connection.execute("SELECT view, version FROM projections.versions")).fetchall()
        return {(name, view.VERSION) for name, view in VIEWS.items()} <= set(versions)


async def test_the_version_before_works_on_the_new_schema_and_beside_the_new_version(
    database: Database, tree_before: Path, tmp_path: Path
) -> None:
    with ServerBefore(tree_before, database, tmp_path) as before:
        async with pair_of("demo", before) as pair:
            working = asyncio.create_task(at_work(pair))
            await migrate(database.owner)
            await working
            await at_work(pair)
            await shown(pair, database)
        run(tree_before, "-c", VERIFY, database.worker)
        with Server(database, tmp_path, ("api", "worker")) as after:
            async with pair_of("demo", before, after) as pair:
                await at_work(pair, 2)  # the older worker builds the views
                before.processes[1].terminate()
                await at_work(pair, 2)  # now the newer one does
                await until(lambda: views_are_of_this_version(database))
                before.processes[0].terminate()
            async with pair_of("demo", after) as pair:
                await at_work(pair)
                await shown(pair, database)
                there = await pair.read_every_list()
            run(REPOSITORY, "-c", VERIFY, database.worker)
            run(tree_before, "-c", VERIFY, database.worker)
    assert (there["sessions"], there["records"], there["tasks"], there["approvals"]) == (14, 7, 7, 7)
    assert given(database.owner) >= EVERY
    assert len(check_ledger(database.owner)["demo"]) == there["events"]


async def test_an_older_worker_that_takes_over_leaves_no_view_other_than_a_replay_makes_it(
    database: Database, tree_before: Path, tmp_path: Path
) -> None:
    before = ServerBefore(tree_before, database, tmp_path)
    with before:
        async with pair_of("demo", before) as pair:
            await at_work(pair)
            await shown(pair, database)
            await migrate(database.owner)
            before.processes[1].terminate()
            with Server(database, tmp_path, ("api", "worker")) as after:
                await until(lambda: views_are_of_this_version(database))
                after.stop()
            with before.waiting_worker():
                await at_work(pair)
                size = size_of(database)
                assert [e["position"] async for e in pair.person.events(after=size - 1, min_position=size)] == [size]
            with Server(database, tmp_path, ("api", "worker")):
                await shown(pair, database)
                await until(lambda: whole(database))


async def whole(database: Database) -> bool:
    """Whether every view is what a replay by this version makes of it."""
    async with open_pool(database.worker, 2) as pool:
        return all([verdict.holds for view in VIEWS async for verdict in verify(pool, view)])
