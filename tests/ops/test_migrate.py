"""Migrations: applied once, in order, whole; what was applied is never edited unnoticed."""

import asyncio
import hashlib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from ledger.embedded import EmbeddedServer
from ops.migrate import DatabaseUnreachable, MigrationError, check, migrate, phase, schema, shipped
from tests.conftest import Database
from tests.ops.pooler import PgBouncer

ONE = {"0001_one.sql": "CREATE TABLE one (n int); INSERT INTO one VALUES (1);"}
TWO = ONE | {"0002_two.sql": "CREATE TABLE two (n int);"}
BEFORE = "-- Three.\n-- When: before the code\n\n"
AFTER = "-- Three.\n-- When: after the code: no more is read there.\n\n"


@pytest.fixture
def empty(postgres: EmbeddedServer) -> Iterator[str]:
    """The URL of a database that nothing was migrated in."""
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE empty")
        yield postgres.url(database="empty")
        connection.execute("DROP DATABASE empty WITH (FORCE)")


async def ask(url: str, query: str) -> list[tuple[object, ...]]:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        return await (await connection.execute(query.encode())).fetchall()


async def test_a_migration_is_applied_once(empty: str) -> None:
    assert await migrate(empty, migrations=ONE) == ["0001_one.sql"]
    assert await migrate(empty, migrations=TWO) == ["0002_two.sql"]
    assert await migrate(empty, migrations=TWO) == []
    assert await ask(empty, "SELECT count(*) FROM one") == [(1,)]
    digest = hashlib.sha256(ONE["0001_one.sql"].encode()).digest()
    assert (await ask(empty, "SELECT sha256 FROM muniment.migrations ORDER BY name"))[0] == (digest,)


async def test_migrators_at_the_same_moment_take_turns(empty: str) -> None:
    slow = {"0001_slow.sql": "SELECT pg_sleep(0.2); CREATE TABLE slow (n int);"}
    applied = await asyncio.gather(*[migrate(empty, migrations=slow) for _ in range(4)])
    assert sorted(map(len, applied)) == [0, 0, 0, 1]


async def test_a_file_that_fails_leaves_nothing_of_itself(empty: str) -> None:
    broken = ONE | {"0002_two.sql": "CREATE TABLE two (n int); SELECT no_such_function();"}
    with pytest.raises(MigrationError, match=r"0002_two\.sql failed, and nothing of it was applied.*no_such_function"):
        await migrate(empty, migrations=broken)
    assert await ask(empty, "SELECT name FROM muniment.migrations") == [("0001_one.sql",)]
    assert await migrate(empty, migrations=TWO) == ["0002_two.sql"]


async def test_an_edited_file_is_noticed(empty: str) -> None:
    await migrate(empty, migrations=ONE)
    with pytest.raises(MigrationError, match=r"0001_one\.sql was edited after it was applied"):
        await migrate(empty, migrations={"0001_one.sql": "CREATE TABLE one (n bigint);"})


# Before the code, and after


async def test_what_an_older_version_needs_is_taken_away_last(empty: str) -> None:
    assert await migrate(empty, migrations=TWO) == list(TWO)
    newer = TWO | {"0003_three.sql": BEFORE + "CREATE TABLE three (n int);", "0004_four.sql": AFTER + "DROP TABLE one;"}
    assert await migrate(empty, migrations=newer) == ["0003_three.sql"]
    assert await migrate(empty, migrations=newer) == []
    assert await ask(empty, "SELECT count(*) FROM one") == [(1,)]
    assert await migrate(empty, migrations=newer, after=True) == ["0004_four.sql"]
    assert await ask(empty, "SELECT to_regclass('one')") == [(None,)]


async def test_where_no_version_was_before_everything_is_applied_at_once(empty: str) -> None:
    newer = TWO | {"0003_three.sql": AFTER + "DROP TABLE one;"}
    assert await migrate(empty, migrations=newer) == list(newer)


async def test_an_older_version_bears_what_comes_before_the_code_and_not_what_comes_after(empty: str) -> None:
    await migrate(empty, migrations=ONE)
    newer = TWO | {"0003_three.sql": AFTER + "DROP TABLE one;"}
    await migrate(empty, migrations=newer)
    assert await migrate(empty, migrations=ONE) == []
    await migrate(empty, migrations=newer, after=True)
    with pytest.raises(MigrationError, match=r"has 0003_three\.sql, which this version of Muniment does not"):
        await migrate(empty, migrations=ONE)


async def test_a_version_that_was_left_out_is_noticed(empty: str) -> None:
    await migrate(empty, migrations=ONE)
    newest = ONE | {"0002_two.sql": AFTER + "DROP TABLE one;", "0003_three.sql": BEFORE + "CREATE TABLE three (n int);"}
    with pytest.raises(MigrationError, match=r"0002_two\.sql is to be applied when no older.*run `muniment migrate"):
        await migrate(empty, migrations=newest)
    assert await migrate(empty, migrations=newest, after=True) == ["0002_two.sql", "0003_three.sql"]


async def test_a_database_that_a_version_without_phases_migrated_gets_them(empty: str) -> None:
    await migrate(empty, migrations=ONE)
    with psycopg.connect(empty, autocommit=True) as connection:
        connection.execute("ALTER TABLE muniment.migrations DROP COLUMN phase")
    assert await migrate(empty, migrations=TWO) == ["0002_two.sql"]
    assert await ask(empty, "SELECT DISTINCT phase FROM muniment.migrations") == [("before",)]


async def test_nothing_is_migrated_through_a_pooler(empty: str, pgbouncer: PgBouncer) -> None:
    with pytest.raises(MigrationError, match="MIGRATE_DATABASE_URL leads through a pooler"):
        await migrate(pgbouncer.url("muniment", "empty"), migrations=ONE)
    assert await ask(empty, "SELECT to_regclass('one')") == [(None,)]


async def test_a_file_slipped_in_between_is_refused(empty: str) -> None:
    later = {"0001_one.sql": ONE["0001_one.sql"], "0003_three.sql": "SELECT 1;"}
    await migrate(empty, migrations=later)
    with pytest.raises(MigrationError, match=r"0002_two\.sql comes before 0003_three\.sql, which is applied"):
        await migrate(empty, migrations=dict(sorted((TWO | later).items())))


async def test_a_statement_that_bears_no_transaction_gets_none(empty: str) -> None:
    index = TWO | {"0003_index.sql": "-- no-transaction\nCREATE INDEX CONCURRENTLY IF NOT EXISTS i ON two (n);"}
    await migrate(empty, migrations=TWO)
    assert await migrate(empty, migrations=index) == ["0003_index.sql"]
    assert await ask(empty, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'i'::regclass") == [(True,)]


async def test_a_migration_gives_up_rather_than_make_everyone_wait(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.migrate._LOCK_TIMEOUT", "50ms")
    await migrate(empty, migrations=ONE)
    async with await psycopg.AsyncConnection.connect(empty) as reader:
        await reader.execute("SELECT * FROM one")
        with pytest.raises(MigrationError, match=r"waited 50ms for a lock.*try again"):
            await migrate(empty, migrations=ONE | {"0002_two.sql": "ALTER TABLE one ADD COLUMN m int;"})


async def test_a_database_belongs_to_one_deployment(empty: str) -> None:
    await migrate(empty, "ledger.example.com", migrations=ONE)
    await migrate(empty, migrations=ONE)
    await migrate(empty, "ledger.example.com", migrations=ONE)
    with pytest.raises(MigrationError, match=r"belongs to the deployment 'ledger\.example\.com'"):
        await migrate(empty, "other.example.com", migrations=TWO)
    assert await ask(empty, "SELECT name FROM muniment.deployment") == [("ledger.example.com",)]
    assert await ask(empty, "SELECT name FROM muniment.migrations") == [("0001_one.sql",)]


async def test_only_the_owner_migrates(database: Database) -> None:
    with pytest.raises(MigrationError, match=r"'muniment_api' may not migrate.*MIGRATE_DATABASE_URL"):
        await migrate(database.api)


async def test_a_database_that_is_not_there_may_be_there_later() -> None:
    with pytest.raises(DatabaseUnreachable):
        await migrate("postgresql://nobody@127.0.0.1:1/none")


async def test_what_is_shipped_is_what_the_template_has(database: Database) -> None:
    assert await ask(database.api, "SELECT name FROM muniment.migrations ORDER BY name") == [(n,) for n in shipped()]


def test_every_migration_says_why_and_when_and_which_locks() -> None:
    for name, text in shipped().items():
        header = text[: text.index("\n\n")]
        assert "-- Why: " in header, name
        assert "-- Locks: " in header, name
        if name > "0007":  # those before made the first schema there was
            assert f"-- When: {phase(text)} the code" in header, name


async def test_migrating_again_after_the_roles_exist_works(postgres: EmbeddedServer, empty: str) -> None:
    """Roles belong to the whole server, so a second database on it finds them there."""
    assert await migrate(empty) == list(shipped())


def test_schema_sql_is_the_sum_of_the_migrations(postgres: EmbeddedServer, database: Database) -> None:
    written = files("migrations").joinpath("schema.sql")
    assert isinstance(written, Path)
    first, _, _ = written.read_text("utf-8").partition("\n")
    if f"PostgreSQL {postgres.programs.major}." not in first:
        pytest.skip(f"majors of PostgreSQL dump differently, and this is {postgres.programs.major}")
    assert written.read_text("utf-8") == schema(postgres, database.name), "run `make schema`"


def test_a_database_name_is_quoted_where_it_must_be(postgres: EmbeddedServer) -> None:
    name = "o'dd name/100%"
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        with psycopg.connect(postgres.url(database=name)) as there:
            assert there.info.dbname == name
        connection.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(name)))


async def test_no_process_starts_on_another_deployments_database(database: Database) -> None:
    await check(database.api, "localhost", production=True)
    with pytest.raises(MigrationError, match="belongs to the deployment 'localhost'"):
        await check(database.api, "ledger.example", production=True)


async def test_production_refuses_a_database_that_lets_it_change_what_was_recorded(database: Database) -> None:
    for url in (database.api, database.worker, database.owner):
        await check(url, None, production=True)
    with psycopg.connect(database.owner) as connection:
        connection.execute("ALTER TABLE ledger.commands DISABLE TRIGGER append_only")
    await check(database.api, None, production=True)
    with pytest.raises(MigrationError, match=r"lets .* change ledger\.commands"):
        await check(database.owner, None, production=True)
    await check(database.owner, None, production=False)


async def test_a_database_away_or_still_empty_is_no_reason_not_to_start(empty: str) -> None:
    await check(empty, "localhost", production=True)
    await check("postgresql://nobody@127.0.0.1:1/none", "localhost", production=True)


async def test_no_process_starts_on_another_versions_schema(database: Database) -> None:
    last = list(shipped())[-1]
    with psycopg.connect(database.owner, autocommit=True) as connection:
        connection.execute("DELETE FROM muniment.migrations WHERE name = %s", [last])
        with pytest.raises(MigrationError, match=rf"older than this version.*{last}: run `muniment migrate`"):
            await check(database.api, None, production=False)
        connection.execute("INSERT INTO muniment.migrations (name, sha256) VALUES (%s, '')", [last])
        with pytest.raises(MigrationError, match=f"{last} was edited after it was applied"):
            await check(database.api, None, production=False)
        connection.execute("ALTER TABLE muniment.migrations DROP COLUMN phase")  # as before there were phases
        with pytest.raises(MigrationError, match=f"{last} was edited after it was applied"):
            await check(database.api, None, production=False)
        connection.execute("ALTER TABLE muniment.migrations ADD COLUMN phase text NOT NULL DEFAULT 'before'")
        digest = hashlib.sha256(shipped()[last].encode()).digest()
        connection.execute("UPDATE muniment.migrations SET sha256 = %s WHERE name = %s", [digest, last])
        connection.execute("INSERT INTO muniment.migrations (name, sha256) VALUES ('9999_later.sql', '')")
        await check(database.api, None, production=False)  # it was to come before the code, and this is older code
        connection.execute("UPDATE muniment.migrations SET phase = 'after' WHERE name = '9999_later.sql'")
        with pytest.raises(MigrationError, match=r"has 9999_later\.sql, .*Run that version or a later one"):
            await check(database.api, None, production=False)
