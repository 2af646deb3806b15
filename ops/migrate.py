"""Migrations: plain SQL files applied in order, once, and never edited after.

Invariant: the database's schema is exactly the sum of the files it lists, each with the digest it had when
it was applied. One transaction a file: a kill leaves a file wholly applied or not at all. Every migrator
of a database waits for the one before it. No table of Muniment's may be known here but its own two.

A file that begins with `-- no-transaction` holds one statement that PostgreSQL refuses inside a transaction
(CREATE INDEX CONCURRENTLY). It may be run again after a kill, so it must bear that (IF NOT EXISTS).

A file says when it is applied. `-- When: before the code` is one that an older version does not notice, so it comes
first, while that version runs and may even be started again. `-- When: after the code` takes away what an older version
needs: it comes last, when none runs any more, and none starts after it.
"""

import asyncio
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import psycopg
from psycopg import AsyncConnection, sql

from ledger.embedded import EmbeddedServer
from ledger.postgres import is_pooled
from ops import OperatorError

NO_TRANSACTION = "-- no-transaction\n"
DEFAULT_DEPLOYMENT = "localhost"
_WHEN = re.compile(r"^-- When: (before|after) the code\b", re.MULTILINE)
_NAME = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
# Any number, the same in every version: whoever migrates this database holds it.
_ADVISORY_LOCK = 7_160_110_231_942_021
# A migration that has to wait for a long query makes every query after it wait too: better to give up.
_LOCK_TIMEOUT = "5s"

_OWN_TABLES = """
CREATE SCHEMA IF NOT EXISTS muniment;
CREATE TABLE IF NOT EXISTS muniment.migrations (
    name text PRIMARY KEY,
    sha256 bytea NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE muniment.migrations ADD COLUMN IF NOT EXISTS phase text NOT NULL DEFAULT 'before';
CREATE TABLE IF NOT EXISTS muniment.deployment (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    name text NOT NULL
);
GRANT USAGE ON SCHEMA muniment TO public;
GRANT SELECT ON muniment.migrations, muniment.deployment TO public;
"""


class MigrationError(OperatorError):
    """The database cannot be brought to this version; the message says why and what to do."""


class DatabaseUnreachable(MigrationError):
    """No connection could be made; later it may be."""


def shipped() -> dict[str, str]:
    """The migrations of this version: file name to SQL, in the order they are applied."""
    found = {
        entry.name: entry.read_text("utf-8").replace("\r\n", "\n")
        for entry in files("migrations").iterdir()
        if entry.name.endswith(".sql") and entry.name != "schema.sql"
    }
    for number, name in enumerate(sorted(found), start=1):
        match = _NAME.fullmatch(name)
        if not match or int(match[1]) != number:
            raise MigrationError(f"migrations/{name} should be called {number:04}_<what_it_does>.sql")
    return dict(sorted(found.items()))


async def migrate(
    url: str,
    deployment: str | None = None,
    migrations: Mapping[str, str] | None = None,
    *,
    after: bool = False,
) -> list[str]:
    """Bring the database at `url` to this version, as its owner; answers the names of the files applied.

    What is for after the code is left, unless `after`, or no version was here before. `deployment` is stored by the
    first call (None: `DEFAULT_DEPLOYMENT`); later calls must agree with it or give None. Raises `MigrationError` if
    they do not, if a file that was applied has been edited or is gone, if a file fails; files before the failing one
    stay applied. `DatabaseUnreachable` if it cannot connect.
    """
    wanted = shipped() if migrations is None else migrations
    try:
        connection = await AsyncConnection.connect(url, autocommit=True, connect_timeout=10)
    except psycopg.OperationalError as error:
        raise DatabaseUnreachable(f"The database cannot be reached: {error}") from error
    async with connection:
        if await is_pooled(connection):
            raise MigrationError(
                "MIGRATE_DATABASE_URL leads through a pooler, where nothing keeps two migrations apart: name the "
                "database itself"
            )
        # A lock of the connection, so that it spans the transactions; it goes when the connection goes.
        await connection.execute("SELECT pg_advisory_lock(%s)", [_ADVISORY_LOCK])
        await connection.execute("SET client_min_messages = warning")
        try:
            await connection.execute(_OWN_TABLES)
        except psycopg.errors.InsufficientPrivilege as error:
            raise MigrationError(
                f"{connection.info.user!r} may not migrate this database ({error.diag.message_primary}): "
                f"MIGRATE_DATABASE_URL must name its owner"
            ) from error
        await _settle_deployment(connection, deployment)
        missing = await pending(connection, wanted)
        if not after and len(missing) < len(wanted):
            missing = _before(missing, wanted)
        await connection.execute(f"SET lock_timeout = '{_LOCK_TIMEOUT}'")
        for name in missing:
            await _apply(connection, name, wanted[name])
    return missing


async def left(url: str) -> list[str]:
    """The names of the files that are to be applied once no older version runs any more."""
    async with await AsyncConnection.connect(url, autocommit=True, connect_timeout=10) as connection:
        return await pending(connection, shipped())


def phase(text: str) -> str:
    """When a file is applied: `before` the code of its version, or `after`."""
    header, _, _ = text.partition("\n\n")
    said = _WHEN.search(header)
    return said[1] if said else "before"


def _before(missing: list[str], wanted: Mapping[str, str]) -> list[str]:
    """Those of the `missing` files that an older version bears. Raises `MigrationError` if they are not the first."""
    bearable = [name for name in missing if phase(wanted[name]) == "before"]
    for first, name in zip(missing, bearable, strict=False):
        if first != name:
            raise MigrationError(
                f"{first} is to be applied when no older version runs any more, and {name} comes after it: a version "
                f"was left out. Stop every process, then run `muniment migrate --after`"
            )
    return bearable


async def check(url: str, deployment: str | None, *, production: bool, wanted: Mapping[str, str] | None = None) -> None:
    """Refuse to start on a database that one must not work on; one that cannot be reached yet is no reason.

    Raises `MigrationError` if it is another deployment's, if its schema is not this version's and, in production,
    if the role of `url` could change what was recorded.
    """
    try:
        connection = await AsyncConnection.connect(url, autocommit=True, connect_timeout=5, prepare_threshold=None)
    except psycopg.OperationalError:
        return
    async with connection:
        try:
            if deployment:
                await _agree(connection, deployment)
            wanted = shipped() if wanted is None else wanted
            missing = await pending(connection, wanted)
            if missing == list(wanted):
                return  # nothing of it yet, as where there are no tables
            if needed := [name for name in missing if phase(wanted[name]) == "before"]:
                raise MigrationError(
                    f"The database's schema is older than this version of Muniment, without {', '.join(needed)}: "
                    f"run `muniment migrate`"
                )
            if production:
                await refuse_changes(connection)
        except psycopg.errors.UndefinedTable:
            return  # not migrated yet: every answer is 503 until it is


_UPDATE, _DELETE = "UPDATE {} SET ledger_id = ledger_id WHERE false", "DELETE FROM {} WHERE false"
_REFUSED = {
    _UPDATE: ("ledger.events", "ledger.payloads", "ledger.commands"),
    _DELETE: (
        *("ledger.events", "ledger.payloads", "ledger.commands", "ledger.ledgers"),
        *("ledger.logs", "ledger.tiles", "ledger.log_keys", "keys.data_keys"),
    ),
}
"""What is refused whatever the row: by triggers of the statement, which speak up although none is touched. Where a row
may change in one way or another, that is for triggers of the row."""


async def refuse_changes(connection: AsyncConnection[Any]) -> None:
    """Try to change what was recorded, as the role that `connection` has now; nothing stays of what is tried.

    Raises `MigrationError` where it is not refused.
    """
    for attempt, tables in _REFUSED.items():
        for table in tables:
            try:
                async with connection.transaction(force_rollback=True):
                    await connection.execute(sql.SQL(attempt).format(sql.Identifier(*table.split("."))))
            except psycopg.errors.InsufficientPrivilege:
                continue
            who = await (await connection.execute("SELECT current_user")).fetchone()
            raise MigrationError(
                f"This database lets {who[0] if who else '?'!r} change {table}, and in production Muniment does not "
                f"start on such a one: connect as muniment_api or muniment_worker, and put the triggers back"
            )


async def _settle_deployment(connection: AsyncConnection[Any], deployment: str | None) -> None:
    await connection.execute(
        "INSERT INTO muniment.deployment (name) VALUES (%s) ON CONFLICT DO NOTHING",
        [deployment or DEFAULT_DEPLOYMENT],
    )
    if deployment:
        await _agree(connection, deployment)


async def _agree(connection: AsyncConnection[Any], deployment: str) -> None:
    row = await (await connection.execute("SELECT name FROM muniment.deployment")).fetchone()
    if row and row[0] != deployment:
        raise MigrationError(
            f"This database belongs to the deployment {row[0]!r} and MUNIMENT_DEPLOYMENT is {deployment!r}: "
            f"set it to {row[0]!r}, or use another database. The name is part of every log's origin and never changes"
        )


async def pending(connection: AsyncConnection[Any], wanted: Mapping[str, str]) -> list[str]:
    """Those of the `wanted` files that are still to be applied. Raises `MigrationError` where that cannot be, or where
    a newer version has taken away what the one of `wanted` needs."""
    # Where no version that knows of phases has migrated yet, there is no such column.
    known = "SELECT name, sha256, to_jsonb(m) ->> 'phase' FROM muniment.migrations AS m ORDER BY name"
    rows = await (await connection.execute(known)).fetchall()
    for name, digest, phase_ in rows:
        if name not in wanted:
            if phase_ == "before":
                continue  # of a newer version, and made to be borne by this one
            raise MigrationError(
                f"The database has {name}, which this version of Muniment does not: it was migrated by a newer "
                f"version, for good. Run that version or a later one"
            )
        if digest != _digest(wanted[name]):
            raise MigrationError(
                f"{name} was edited after it was applied to this database: restore the file, and put the change "
                f"into a new migration"
            )
    applied = {name for name, _, _ in rows}
    missing = [name for name in wanted if name not in applied]
    if applied and missing and missing[0] < max(applied):
        raise MigrationError(f"{missing[0]} comes before {max(applied)}, which is applied: give it a later number")
    return missing


async def _apply(connection: AsyncConnection[Any], name: str, text: str) -> None:
    record = "INSERT INTO muniment.migrations (name, sha256, phase) VALUES (%s, %s, %s)"
    try:
        if text.startswith(NO_TRANSACTION):
            await connection.execute(text.encode())
            # Killed here, the file runs again: see above.
            await connection.execute(record, [name, _digest(text), phase(text)])
        else:
            async with connection.transaction():
                await connection.execute(text.encode())
                await connection.execute(record, [name, _digest(text), phase(text)])
    except psycopg.errors.LockNotAvailable as error:
        raise MigrationError(
            f"{name} waited {_LOCK_TIMEOUT} for a lock that a long-running query holds, and gave up so that "
            f"others need not wait behind it. Nothing of it was applied: try again"
        ) from error
    except psycopg.Error as error:
        raise MigrationError(f"{name} failed, and nothing of it was applied: {error}") from error


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def schema(server: EmbeddedServer, database: str) -> str:
    """The whole schema of `database` as `migrations/schema.sql` shows it: for reading, never applied."""
    dump = subprocess.run(
        [server.programs.bin / "pg_dump", "--schema-only", "--no-owner", server.url(database=database)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # What differs from one machine or minor version to the next says nothing about the schema.
    noise = re.compile(r"--|SET |SELECT pg_catalog\.set_config|\\(un)?restrict ")
    lines = [line for line in dump.splitlines() if not noise.match(line)]
    body = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return (
        f"-- The sum of the migrations, written by `make schema` with PostgreSQL {server.programs.major}.\n\n{body}\n"
    )


def _write_schema() -> None:
    with tempfile.TemporaryDirectory() as home, EmbeddedServer(Path(home), durable=False) as server:
        asyncio.run(migrate(server.url()))
        sys.stdout.write(schema(server, "muniment"))


if __name__ == "__main__":
    _write_schema()
