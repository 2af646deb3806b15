"""The worker's job that publishes: soon, seldom, whatever goes away under it; and the keys that operators give it."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import httpx
import psycopg
import pytest

from ledger import tree
from ledger.checkpoint import Checkpoint, Note, check_checkpoint
from ledger.commands import Record
from ledger.committer import Committer
from ledger.postgres import Pool, open_pool
from ledger.project_key import read_key_file
from ledger.publisher import Publisher
from ledger.signing import LogFiles
from ledger.tree import Log
from ledger.values import Actor
from ledger.vault import Vault
from ledger.witness import Witnesses
from ops.publishing import Publishing
from tests.check import check_ledger, check_logs
from tests.conftest import Database
from tests.ops.test_worker import worker
from tests.projections.conftest import deadline
from tests.witnesses import RunningWitness

AGENT = Actor(issuer="https://id.example", sub="a", kind="agent", assurance="authenticated", roles=("agent",))


class Said(NamedTuple):
    code: int
    out: str
    err: str


async def keys(*arguments: str, url: str, home: Path, mode: str = "development") -> Said:
    """What `muniment keys` says."""
    environment = {"PATH": os.environ["PATH"], "MUNIMENT_HOME": str(home), "DATABASE_URL": url, "MUNIMENT_MODE": mode}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ops.cli", "keys", *arguments),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return Said(process.returncode or 0, out.decode(), err.decode())


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    async with open_pool(database.worker, connections_max=6) as pool:
        yield pool


@pytest.fixture
async def committer(pool: Pool, tmp_path: Path) -> AsyncIterator[Committer]:
    committer = Committer(pool, Vault(tmp_path / "keys", pool, create_keys=True), create_ledgers=True)
    yield committer
    await committer.close()


@asynccontextmanager
async def publishing(
    pool: Pool, home: Path, *, listen_to: str | None = None, seconds: float = 0.1, witnesses: Witnesses | None = None
) -> AsyncIterator[Publisher]:
    files = LogFiles(home / "keys")
    async with httpx.AsyncClient(trust_env=False) as http:
        publisher = Publisher(pool, files, *((witnesses, http) if witnesses else ()))
        job = asyncio.create_task(Publishing(pool, publisher, seconds, listen_to=listen_to, first_key=files).run())
        try:
            yield publisher
        finally:
            job.cancel()
            await asyncio.wait([job])


async def record(committer: Committer, count: int = 1, project: str = "demo") -> UUID:
    await committer.submit_all(project, [Record(kind="note", body={"n": n}) for n in range(count)], AGENT)
    ledger = await committer.ledger(project)
    assert ledger is not None
    return ledger.ledger_id


async def covered(pool: Pool, ledger_id: UUID, size: int) -> Log:
    """The log, as soon as that many events are published."""
    with deadline(30) as check:
        while True:
            check()
            async with pool.connection() as connection:
                log = await tree.log_of(connection, ledger_id)
            if log is not None and log.published_size >= size:
                return log
            await asyncio.sleep(0.01)


async def refusal(pool: Pool, wanted: Callable[[str | None], bool]) -> str | None:
    """Why a log does not go on, as soon as it is what is wanted."""
    with deadline(30) as check:
        while True:
            check()
            async with pool.connection() as connection:
                cursor = await connection.execute("SELECT refused FROM ledger.logs")
                found: list[str | None] = [why for (why,) in await cursor.fetchall() if wanted(why)]
            if found:
                return found[0]
            await asyncio.sleep(0.02)


async def test_what_is_recorded_is_published_soon_in_every_project(
    pool: Pool, committer: Committer, database: Database, tmp_path: Path
) -> None:
    async with publishing(pool, tmp_path, listen_to=database.worker):
        for size in (1, 2, 3):
            for project in ("demo", "other"):
                ledger_id = await record(committer, project=project)
                log = await covered(pool, ledger_id, size)
                assert log.origin == f"localhost/{ledger_id}"
    check_ledger(database.owner)


async def test_a_log_rests_between_two_checkpoints(
    pool: Pool, committer: Committer, database: Database, tmp_path: Path
) -> None:
    async with publishing(pool, tmp_path, listen_to=database.worker, seconds=60) as publisher:
        await covered(pool, await record(committer), 1)
        other = await record(committer, project="other")
        await covered(pool, other, 1)
        await record(committer, 5)
        await record(committer, project="third")
        ledger = await committer.ledger("third")
        assert ledger is not None
        await covered(pool, ledger.ledger_id, 1)
        assert sum(publisher.published.latency.counts) == 3


async def test_without_listening_it_looks_by_itself(pool: Pool, committer: Committer, tmp_path: Path) -> None:
    async with publishing(pool, tmp_path):
        await covered(pool, await record(committer), 1)
        await covered(pool, await record(committer), 2)


async def test_it_goes_on_where_the_database_was_away(
    pool: Pool, committer: Committer, database: Database, tmp_path: Path
) -> None:
    async with publishing(pool, tmp_path, listen_to=database.worker):
        ledger_id = await record(committer, 3)
        await covered(pool, ledger_id, 3)
        let_go(database)
        async with open_pool(database.worker, connections_max=2) as again:
            committer_again = Committer(again, Vault(tmp_path / "keys", again, create_keys=True), create_ledgers=True)
            await record(committer_again, 3)
            await committer_again.close()
            await covered(again, ledger_id, 6)
    check_logs(database.owner)


async def test_a_database_put_back_under_it_is_noticed_before_anything_is_written(
    pool: Pool, committer: Committer, database: Database, tmp_path: Path
) -> None:
    async with publishing(pool, tmp_path, listen_to=database.worker):
        await covered(pool, await record(committer, 300), 300)
        put_back(database, 100)
        let_go(database)  # as a server that was stopped for it does
        async with open_pool(database.worker, connections_max=2) as again:
            why = await refusal(again, lambda why: why is not None)
    assert why == "history was rolled back: a checkpoint of 300 events was signed, and 100 are there"


def put_back(database: Database, size: int) -> None:
    """As it was when there were so many events, and nothing was signed yet."""
    with psycopg.connect(database.owner) as owner:
        owner.execute("SET session_replication_role = replica")
        owner.execute("DELETE FROM ledger.logs")
        owner.execute("DELETE FROM ledger.tiles")
        owner.execute("DELETE FROM ledger.events WHERE position > %s", [size])
        owner.execute("DELETE FROM ledger.commands WHERE first_position > %s", [size])
        owner.execute("UPDATE ledger.ledgers SET size = %s", [size])


def let_go(database: Database) -> None:
    """Have the server end every connection."""
    with psycopg.connect(database.owner, autocommit=True) as owner:
        others = b"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
        owner.execute(others + b" AND pid <> pg_backend_pid()")


# Witnesses


async def test_what_is_published_is_cosigned(pool: Pool, committer: Committer, tmp_path: Path) -> None:
    ledger_id = await record(committer, 3)
    with RunningWitness(tmp_path / "witness") as witness:
        async with pool.connection() as connection:
            await tree.add_key(connection, 1, LogFiles(tmp_path / "keys").make(1))
            (key,) = await tree.keys_of(connection, f"localhost/{ledger_id}")
        witness.muniment("add-log", str(key.vkey))
        async with publishing(pool, tmp_path, witnesses=Witnesses(1, (witness.address,))):
            for size in (3, 300):
                log = await covered(pool, ledger_id, size)
                checkpoint = check_checkpoint(Note.parse(log.published), [key.vkey], [witness.key], 1)
                assert checkpoint.size == size
                if size == 3:
                    await record(committer, 297)


async def test_a_worker_is_told_by_its_settings_how_often_with_which_keys_and_who_cosigns(
    pool: Pool, committer: Committer, database: Database, tmp_path: Path
) -> None:
    ledger_id = await record(committer, 3)
    files = LogFiles(tmp_path / "log-keys")
    with RunningWitness(tmp_path / "witness") as witness:
        async with pool.connection() as connection:
            await tree.add_key(connection, 1, files.make(1))
            (key,) = await tree.keys_of(connection, f"localhost/{ledger_id}")
        witness.muniment("add-log", str(key.vkey))
        named = {"quorum": 1, "witnesses": [{"url": witness.url, "vkey": str(witness.key)}]}
        (tmp_path / "witnesses.json").write_text(json.dumps(named))
        settings = {
            "MUNIMENT_WITNESSES": str(tmp_path / "witnesses.json"),
            "MUNIMENT_LOG_KEYS_DIR": str(tmp_path / "log-keys"),
            "MUNIMENT_CHECKPOINT_SECONDS": "0.5",
        }
        async with worker(database.worker, tmp_path, None, **settings):
            log = await covered(pool, ledger_id, 3)
        assert check_checkpoint(Note.parse(log.published), [key.vkey], [witness.key], 1).size == 3
    assert not (tmp_path / "keys" / "log-1.secret").exists()


async def test_below_the_quorum_the_older_checkpoint_stays_and_it_is_said(
    pool: Pool, committer: Committer, tmp_path: Path
) -> None:
    ledger_id = await record(committer, 3)
    with RunningWitness(tmp_path / "witness") as witness:
        async with pool.connection() as connection:
            await tree.add_key(connection, 1, LogFiles(tmp_path / "keys").make(1))
            (key,) = await tree.keys_of(connection, f"localhost/{ledger_id}")
        witness.muniment("add-log", str(key.vkey))
        async with publishing(pool, tmp_path, witnesses=Witnesses(1, (witness.address,))):
            before = await covered(pool, ledger_id, 3)
            witness.kill()
            await record(committer, 4)
            why = await refusal(pool, lambda why: why is not None)
            assert "too few witnesses" in (why or "")
            assert witness.key.name in (why or "")
            assert (await covered(pool, ledger_id, 3)).published == before.published
            witness.start()
            await covered(pool, ledger_id, 7)
            assert await refusal(pool, lambda why: why is None) is None


async def test_a_database_put_back_under_a_witness_is_refused_before_anything_is_signed(
    pool: Pool, committer: Committer, database: Database, tmp_path: Path
) -> None:
    """The worker is on another machine now: nothing lies beside its keys."""
    ledger_id = await record(committer, 300)
    with RunningWitness(tmp_path / "witness") as witness:
        async with pool.connection() as connection:
            await tree.add_key(connection, 1, LogFiles(tmp_path / "keys").make(1))
            (key,) = await tree.keys_of(connection, f"localhost/{ledger_id}")
        witness.muniment("add-log", str(key.vkey))
        witnesses = Witnesses(1, (witness.address,))
        async with publishing(pool, tmp_path, witnesses=witnesses):
            await covered(pool, ledger_id, 300)
        put_back(database, 100)
        elsewhere = tmp_path / "elsewhere"
        (elsewhere / "keys").mkdir(parents=True, mode=0o700)
        secret = read_key_file(LogFiles(tmp_path / "keys").path(1))
        assert secret is not None
        LogFiles(elsewhere / "keys").path(1).write_bytes(secret)
        LogFiles(elsewhere / "keys").path(1).chmod(0o600)
        async with publishing(pool, elsewhere, witnesses=witnesses):
            why = await refusal(pool, lambda why: "rolled back" in (why or ""))
        assert why == "history was rolled back: a checkpoint of 300 events was signed, and 100 are there"
        async with pool.connection() as connection:
            ((signed,),) = await (await connection.execute("SELECT signed FROM ledger.logs")).fetchall()
        assert signed is None


# Keys


async def test_in_production_an_operator_says_which_key_signs(database: Database, tmp_path: Path) -> None:
    empty = await keys("list", url=database.worker, home=tmp_path)
    assert (empty.out, "muniment keys add" in empty.err) == ("", True)
    added = await keys("add", "--reason", "the first", url=database.worker, home=tmp_path)
    assert added.code == 0, added.err
    assert "log-1.secret" in added.out
    second = await keys("add", url=database.worker, home=tmp_path)
    assert "key 2 signs" in second.out
    retired = await keys("retire", "1", "--reason", "it follows", url=database.worker, home=tmp_path)
    assert retired.code == 0, retired.err
    last = await keys("retire", "2", url=database.worker, home=tmp_path)
    assert last.code == 1
    assert "the only one that signs" in last.err
    shown = await keys("list", "--project", "operators", url=database.worker, home=tmp_path)
    first, other = shown.out.splitlines()
    assert " until " in first
    assert " until " not in other
    histories = check_ledger(database.owner)
    told = [(event.type, event.reason) for _, event in histories["operators"] if event.stream_type == "log_key"]
    assert told == [("LogKeyAdded", "the first"), ("LogKeyAdded", None), ("LogKeyRetired", "it follows")]


async def test_a_terminal_that_died_on_its_way_is_followed_by_one_that_ends_it(
    pool: Pool, database: Database, tmp_path: Path
) -> None:
    made = LogFiles(tmp_path / "keys").make(1)  # and nobody was told
    added = await keys("add", url=database.worker, home=tmp_path)
    assert made.hex() in added.out
    with psycopg.connect(database.owner) as owner:  # it was told, and not followed
        owner.execute("SET session_replication_role = replica")
        owner.execute("DELETE FROM ledger.log_keys")
    again = await keys("add", url=database.worker, home=tmp_path)
    assert made.hex() in again.out
    async with pool.connection() as connection:
        (key,) = await tree.keys_of(connection)
    assert key.vkey.public == made
    check_ledger(database.owner)


async def test_what_a_worker_made_by_itself_is_on_record_once_an_operator_comes(
    pool: Pool, committer: Committer, database: Database, tmp_path: Path
) -> None:
    async with publishing(pool, tmp_path):
        ledger_id = await record(committer)
        await covered(pool, ledger_id, 1)
        second = await keys("add", url=database.worker, home=tmp_path)
        assert "key 2 signs" in second.out, second.err
        with deadline(30) as check:
            while True:
                check()
                log = await covered(pool, ledger_id, 1)
                if len(Note.parse(log.published).signatures) == 2:
                    break
                await asyncio.sleep(0.02)
        assert Checkpoint.parse(Note.parse(log.published).text).size == 1
    histories = check_ledger(database.owner)
    numbers: list[Any] = [event.data for _, event in histories["operators"]]
    assert [fact.number for fact in numbers] == [1, 2]


async def test_in_production_a_key_that_no_operator_added_is_not_put_on_record(
    pool: Pool, database: Database, tmp_path: Path
) -> None:
    async with pool.connection() as connection:
        await tree.add_key(connection, 1, LogFiles(tmp_path / "elsewhere").make(1))
    added = await keys("add", url=database.worker, home=tmp_path, mode="production")
    assert (added.code, "the key 1 in the database was added by no operator" in added.err) == (1, True)
    assert not (tmp_path / "keys" / "log-2.secret").exists()
    assert check_ledger(database.owner).get("operators", []) == []


async def test_the_api_cannot_say_which_key_signs(database: Database) -> None:
    async with open_pool(database.api) as pool, pool.connection() as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await tree.add_key(connection, 1, bytes(32))
