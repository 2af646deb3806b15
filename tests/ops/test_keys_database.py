"""The keys in a database of their own: nothing of them is in the ledger's, and nothing starts where they are missed."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest

from api.client import Client
from ledger.commands import Record
from ledger.committer import Committer
from ledger.embedded import EmbeddedServer
from ledger.errors import StoreUnavailable
from ledger.postgres import open_pool
from ledger.receipt import Receipt
from ledger.subjects import EraseSubject
from ledger.values import Actor
from ledger.vault import Vault
from ops.keys_database import check_keys, files, migrate_keys
from ops.migrate import MigrationError, migrate
from tests.conftest import Database, database_of
from tests.server import Server

ROOT = Path(__file__).parents[2]
MARK = {"$personal": {"subject": "c-9", "value": "Mia Li"}}


@pytest.fixture
async def keys(postgres: EmbeddedServer) -> AsyncIterator[Database]:
    """A database that has the keys alone."""
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE keys_alone")
        database = database_of(postgres, "keys_alone")
        assert await migrate_keys(database.owner, None) == list(files())
        assert await migrate_keys(database.owner, None) == []
        yield database
        connection.execute("DROP DATABASE keys_alone WITH (FORCE)")


def rows(url: str, query: str) -> int:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    count: int = row[0]
    return count


@contextmanager
def keys_away(postgres: EmbeddedServer) -> Iterator[None]:
    """Meanwhile nobody is let into the database of the keys."""
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        connection.execute("ALTER DATABASE keys_alone ALLOW_CONNECTIONS false")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'keys_alone'")
        yield
        connection.execute("ALTER DATABASE keys_alone ALLOW_CONNECTIONS true")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, keys: Database) -> Database:
    """What is started now has its keys there."""
    monkeypatch.setenv("KEYS_DATABASE_URL", keys.api)
    return keys


async def test_what_is_sealed_is_in_one_database_and_what_opens_it_in_another(
    database: Database, elsewhere: Database, tmp_path: Path
) -> None:
    with Server(database, tmp_path, ("api", "worker")) as server:
        async with Client(server.url, server.token("demo", roles=("agent", "operator"))) as client:
            record = await client.record("a", body=MARK)
            assert (await client.get_record(record.body["record_id"]))["body"] == "Mia Li"
            assert rows(elsewhere.owner, "SELECT count(*) FROM keys.data_keys WHERE wrapped IS NOT NULL") == 1
            assert (await client.erase_subject("c-9", "she asked"))["destroyed"] is True
            assert (await client.get_record(record.body["record_id"]))["body"] == {"$erased": True}
    assert rows(elsewhere.owner, "SELECT count(*) FROM keys.data_keys WHERE wrapped IS NOT NULL") == 0
    assert rows(database.owner, "SELECT count(*) FROM keys.data_keys") == 0
    assert rows(database.owner, "SELECT count(*) FROM keys.project_keys") == 0


def as_the_page_says(title: str) -> str:
    """The commands of the first block under that, as an operator would paste them."""
    page = (ROOT / "ops/runbooks/erasure.md").read_text("utf-8")
    block = page.partition(f"## {title}\n")[2].partition("```console\n")[2].partition("```")[0]
    return re.sub(r"^\$ ", "", block, flags=re.MULTILINE)


async def test_keys_move_to_a_database_of_their_own_as_the_page_says(
    database: Database, postgres: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def recorded(client: Client, name: str) -> UUID:
        answer = await client.record("a", body={"$personal": {"subject": name, "value": f"of {name}"}})
        return UUID(answer.body["record_id"])

    server = Server(database, tmp_path, ("api", "worker"))
    with server, psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE keys_moved")
        async with Client(server.url, server.token("demo", roles=("agent", "operator"))) as client:
            records = {name: await recorded(client, name) for name in ("ann", "bob", "cid")}
            await client.erase_subject("cid", "she asked before")
    moved = database_of(postgres, "keys_moved")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "muniment").write_text(f'#!/bin/sh\nexec {sys.executable} -P -m ops.cli "$@"\n')
    (programs / "muniment").chmod(0o755)
    named = {"MIGRATE_DATABASE_URL": database.owner, "MIGRATE_KEYS_DATABASE_URL": moved.owner}
    named |= {"KEYS_DATABASE_URL": moved.api, "PATH": f"{programs}:{postgres.programs.bin}:{os.environ['PATH']}"}
    commands = ["bash", "-euo", "pipefail", "-c", as_the_page_says("Keys in a database of their own")]
    done = await asyncio.to_thread(
        subprocess.run, commands, env=server.environment | named, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    for table in ("keys.data_keys", "keys.project_keys"):
        assert rows(database.owner, f"SELECT pg_relation_size('{table}')") == 0, "a copy of a key is there still"
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="never comes back"):
        rows(database.owner, "DELETE FROM keys.data_keys")
    monkeypatch.setenv("KEYS_DATABASE_URL", moved.api)
    with Server(database, tmp_path, ("api", "worker")) as server:
        async with Client(server.url, server.token("demo", roles=("agent", "operator"))) as client:

            async def body(name: str) -> Any:
                return (await client.get_record(records[name]))["body"]

            assert [await body(name) for name in ("ann", "bob", "cid")] == ["of ann", "of bob", {"$erased": True}]
            assert (await client.erase_subject("ann", "she asked after"))["destroyed"] is True
            records["dan"] = await recorded(client, "dan")
            assert [await body(name) for name in ("ann", "bob", "dan")] == [{"$erased": True}, "of bob", "of dan"]
    assert rows(moved.owner, "SELECT count(*) FROM keys.data_keys WHERE wrapped IS NOT NULL") == 2
    assert rows(database.owner, "SELECT count(*) FROM keys.data_keys") == 0
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        connection.execute("DROP DATABASE keys_moved WITH (FORCE)")


async def test_nothing_starts_where_the_keys_are_in_both_databases_or_in_neither(
    database: Database, keys: Database, tmp_path: Path
) -> None:
    with Server(database, tmp_path) as server:
        async with Client(server.url, server.token("demo")) as client:
            await client.record("a", body=MARK)
    await check_keys(database.api, None, None)
    with pytest.raises(MigrationError, match=r"has keys too, that of demo"):
        await check_keys(database.api, keys.api, None)
    with psycopg.connect(database.owner, autocommit=True) as connection:
        moved = connection.execute("SELECT project_id, key_id FROM keys.project_keys").fetchall()
        connection.execute("ALTER TABLE keys.data_keys DISABLE TRIGGER USER")
        connection.execute("TRUNCATE keys.data_keys, keys.project_keys")
    with pytest.raises(MigrationError, match=r"no key of it: set KEYS_DATABASE_URL"):
        await check_keys(database.api, None, None)
    with psycopg.connect(keys.owner, autocommit=True) as connection:
        connection.execute("INSERT INTO keys.project_keys VALUES (%s, %s)", moved[0])
    await check_keys(database.api, keys.api, None)


async def test_a_database_of_keys_that_is_not_migrated_is_refused_and_one_that_is_away_is_waited_for(
    database: Database, postgres: EmbeddedServer, tmp_path: Path
) -> None:
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE keys_old")
        old = database_of(postgres, "keys_old")
        await migrate(old.owner, None, dict(list(files().items())[:2]))
        with pytest.raises(MigrationError, match="schema is older"):
            await check_keys(database.api, old.api, None)
        connection.execute("DROP DATABASE keys_old WITH (FORCE)")
    await check_keys(database.api, f"host={tmp_path} dbname=none", None)


async def test_where_the_keys_are_away_an_erasure_fails_and_what_was_given_with_it_does_not(
    database: Database, keys: Database, postgres: EmbeddedServer, tmp_path: Path
) -> None:
    both = Actor(issuer="i", sub="ana", kind="human", assurance="authenticated", roles=("agent", "operator"))
    erasing = EraseSubject(subject="c-9", ground="she asked")
    async with open_pool(database.api, 2) as pool, open_pool(keys.api, 2) as away:
        committer = Committer(pool, Vault(tmp_path, away, create_keys=True), create_ledgers=True)
        await committer.submit("demo", Record(kind="a", body=MARK), both)
        with keys_away(postgres):
            many = [Record(kind="before", body=MARK), erasing, Record(kind="after", body=MARK)]
            before, erasure, after = await committer.submit_all("demo", many, both)
        assert isinstance(erasure, StoreUnavailable)
        assert isinstance(before, Receipt)
        assert isinstance(after, Receipt)
        assert [one.state.kind for one in (before, after)] == ["before", "after"]
        await committer.close()


async def test_where_the_keys_are_away_a_list_is_answered_but_for_what_is_sealed(
    database: Database, elsewhere: Database, postgres: EmbeddedServer, tmp_path: Path
) -> None:
    with Server(database, tmp_path) as server:
        sent_by = {"Authorization": f"Bearer {server.token('demo')}"}
        async with httpx.AsyncClient(base_url=server.url, headers=sent_by) as client:
            opening = [{"type": "OpenSession", "agent_role": "a", "metadata": {"who": who}} for who in (MARK, "it")]
            opened = [item["body"]["session_id"] for item in (await client.post("/commands", json=opening)).json()]
            starting = [{"type": "ChangeSession", "session_id": one, "status": "active"} for one in opened]
            with keys_away(postgres):
                sealed, plain = (await client.post("/commands", json=starting, timeout=30)).json()
    assert (sealed["status"], sealed["body"]["code"], sealed["positions"]) == (503, "store_unavailable", [3])
    assert (plain["status"], plain["body"]["metadata"]) == (200, {"who": "it"})
