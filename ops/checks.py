"""What the doctor looks at: a check is one function that yields findings, and says what it saw also where all is well.

Nothing is ever changed: what must be refused is tried in a transaction that is rolled back, and no key is made.
"""

import os
import shutil
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psycopg
from msgspec import Struct
from psycopg import sql
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from api.idempotency import TIMEOUT_SECONDS
from ledger.errors import ClockSkew
from ledger.postgres import CLOCK_SKEW_MAX_SECONDS, Clock, Connection, is_pooled, queries
from ledger.programs import OLDEST_MAJOR
from ledger.project_key import ProjectKey, UnusableKey, read_key_file
from ledger.settings import Settings
from ops.integrity import recompute
from ops.migrate import MigrationError, pending, phase, refuse_changes, shipped
from projections import VIEWS, health

SQL = queries("ops", "checks")

Level = Literal["ok", "warning", "problem"]

ROLES = ["muniment_api", "muniment_worker"]
GIB = 2**30
FREE_BYTES_WANTED = 5 * GIB
FREE_BYTES_LEAST = GIB
LAG_SECONDS_MAX = 10.0
FAULTS_SHOWN = 10
CONNECT_SECONDS_MAX = 5


class Finding(NamedTuple):
    """What one check saw, with values; `advice` is what to do, unless it is ok."""

    check: str
    level: Level
    seen: str
    advice: str = ""


class Patient(Struct, frozen=True):
    """What is examined. `connection` is made with DATABASE_URL, `owner` with MIGRATE_DATABASE_URL if that is known."""

    settings: Settings
    connection: Connection
    owner: Connection | None
    last: int


Findings = AsyncIterator[Finding]


async def connect(url: str) -> Connection:
    """A connection to look with."""
    # Without prepared statements: a pooler may bear none, and what it bears stays there when we go.
    return await Connection.connect(url, autocommit=True, connect_timeout=CONNECT_SECONDS_MAX, prepare_threshold=None)


async def _rows(connection: Connection, query: bytes, **values: Any) -> list[tuple[Any, ...]]:
    return await (await connection.execute(query, values or None)).fetchall()


# What needs no database


async def mode(settings: Settings) -> Findings:
    """What the settings come to."""
    database = "embedded" if settings.embedded else "DATABASE_URL"
    yield Finding("settings", "ok", f"{settings.mode} mode, MUNIMENT_HOME {settings.home}, database: {database}")
    if settings.mode == "production" and not settings.oidc_issuer_url:
        yield Finding(
            "settings",
            "warning",
            "OIDC_ISSUER_URL is not set, and production takes no other tokens: an API answers every caller 401",
            "set OIDC_ISSUER_URL and OIDC_AUDIENCE where the API runs; a worker needs neither",
        )


async def redis(settings: Settings) -> Findings:
    """Whether the copy of receipts can be had; nothing goes wrong without it."""
    if not settings.redis_url or not settings.idempotency_enabled:
        why = "REDIS_URL is not set" if not settings.redis_url else "IDEMPOTENCY_ENABLED is false"
        yield Finding("redis", "ok", f"{why}: the ledger alone answers replays")
        return
    client = Redis.from_url(
        settings.redis_url,
        socket_timeout=TIMEOUT_SECONDS,
        socket_connect_timeout=TIMEOUT_SECONDS,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
    )
    try:
        memory: dict[str, Any] = await client.info("memory")
    except (RedisError, OSError) as error:
        advice = "start it or correct REDIS_URL; until then replays are slower, and nothing else is amiss"
        yield Finding("redis", "warning", f"it does not answer: {error}", advice)
        return
    finally:
        await client.aclose()
    used, most, policy = memory.get("used_memory", 0), memory.get("maxmemory", 0), memory.get("maxmemory_policy")
    seen = f"it answers; {_size(used)} of {_size(most) if most else 'any number of bytes'} used, policy {policy}"
    if most and policy == "noeviction":
        advice = "set its maxmemory-policy to volatile-lru: when it is full it takes no new copies"
        yield Finding("redis", "warning", seen, advice)
    else:
        yield Finding("redis", "ok", seen)


async def disk(settings: Settings) -> Findings:
    """Room where this machine keeps data. The disk of a server of your own cannot be seen from here."""
    there = settings.home
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    seen = f"{_size(free)} free at {there}"
    level = _room(free) if settings.embedded else "ok"
    yield Finding("disk", level, seen, "" if level == "ok" else "make room: PostgreSQL stops when none is left")


def _room(free_bytes: int) -> Level:
    if free_bytes < FREE_BYTES_LEAST:
        return "problem"
    return "warning" if free_bytes < FREE_BYTES_WANTED else "ok"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / 2**20:.1f} MiB"


# What the database says


async def server(patient: Patient) -> Findings:
    """Which PostgreSQL, as whom, and whether it can be written."""
    ((user, is_super, standby, read_only, size),) = await _rows(patient.connection, SQL.server)
    version = patient.connection.info.server_version
    seen = f"PostgreSQL {version // 10000}.{version % 10000}, as {user}, {_size(size)}"
    if version < OLDEST_MAJOR * 10000:
        yield Finding("server", "problem", seen, f"upgrade it: {OLDEST_MAJOR} is the oldest that works")
    elif standby or read_only:
        why = "it is a standby" if standby else "its transactions are read-only"
        yield Finding("server", "problem", f"{seen}; {why}", "let DATABASE_URL lead to the primary: commands get 503")
    elif is_super and patient.settings.mode == "production":
        yield Finding("server", "warning", f"{seen}, a superuser", f"connect as one of {', '.join(ROLES)}")
    else:
        yield Finding("server", "ok", seen)


async def schema(patient: Patient) -> Findings:
    """Whether the database is at this version, and this deployment's."""
    try:
        missing = await pending(patient.connection, shipped())
    except MigrationError as error:
        yield Finding("schema", "problem", str(error), "no process starts on it until then")
        return
    except psycopg.errors.UndefinedTable:
        missing = list(shipped())
    wanted = shipped()
    if needed := [name for name in missing if phase(wanted[name]) == "before"]:
        yield Finding("schema", "problem", f"not applied yet: {', '.join(needed)}", "run `muniment migrate`")
        return
    if missing:
        advice = "run `muniment migrate --after` as soon as no older version runs any more"
        yield Finding("schema", "warning", f"left for after the code: {', '.join(missing)}", advice)
    ((name,),) = await _rows(patient.connection, b"SELECT name FROM muniment.deployment")
    if patient.settings.deployment not in (None, name):
        seen = f"it belongs to the deployment {name!r}, and MUNIMENT_DEPLOYMENT is {patient.settings.deployment!r}"
        yield Finding("schema", "problem", seen, f"set it to {name!r}, or use another database")
    else:
        yield Finding("schema", "ok", f"{len(wanted) - len(missing)} migrations are applied; deployment {name!r}")
    for (index,) in await _rows(patient.connection, SQL.invalid_indexes):
        yield Finding(
            "schema", "warning", f"the index {index} was never finished", f"REINDEX INDEX CONCURRENTLY {index}"
        )


async def roles(patient: Patient) -> Findings:
    """Whether what was recorded cannot be changed, tried as each role, and each role has its settings."""
    ((user, *_),) = await _rows(patient.connection, SQL.server)
    found = dict(await _rows(patient.connection, SQL.role_settings, roles=ROLES))
    for role in ROLES:
        if role not in found:
            yield Finding("roles", "problem", f"there is no {role}", "CREATE ROLE as migrations/0001_ledger.sql does")
            continue
        kept = dict(entry.partition("=")[::2] for entry in found[role])
        if (kept.get("jit"), kept.get("plan_cache_mode")) != ("off", "force_generic_plan"):
            advice = f"ALTER ROLE {role} SET jit = off; ALTER ROLE {role} SET plan_cache_mode = force_generic_plan"
            yield Finding("roles", "warning", f"{role} has lost its settings: commands cost twice as much", advice)
        if kept.get("idle_in_transaction_session_timeout", "0") == "0":
            advice = f"ALTER ROLE {role} SET idle_in_transaction_session_timeout = '60s'"
            yield Finding(
                "roles", "warning", f"{role} may stop in a transaction and hold up its ledger for ever", advice
            )
    yield await _tried(user, patient.connection)
    for role in sorted(found.keys() - {user}):
        yield await _tried(role, patient.owner)
    async for finding in _refusals(patient.connection):
        yield finding


async def _refusals(connection: Connection) -> Findings:
    """What should refuse changes in that database, and does not."""
    for role, table, rights in await _rows(connection, SQL.rights, roles=ROLES):
        advice = f"REVOKE {rights} ON {table} FROM {role}"
        yield Finding("roles", "problem", f"{role} was granted {rights} on {table}", advice)
    for table, trigger, exists in await _rows(connection, SQL.triggers):
        advice = f"ALTER TABLE {table} ENABLE TRIGGER {trigger}"
        if not exists:
            advice = f"CREATE TRIGGER {trigger} on it again, as migrations/schema.sql has it"
        state = "does not fire" if exists else "is missing"
        yield Finding("roles", "problem", f"the trigger {trigger} on {table} {state}", advice)


async def _tried(role: str, connection: Connection | None) -> Finding:
    """Whether `role` is refused to change what was recorded; `connection` may be able to act as it."""
    try:
        if connection is not None:
            async with connection.transaction(force_rollback=True):
                await connection.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role)))
                await refuse_changes(connection)
            return Finding("roles", "ok", f"{role} is refused to update or delete what was recorded (tried)")
    except MigrationError as error:
        return Finding("roles", "problem", str(error), "nothing of what was tried stays")
    except psycopg.errors.InsufficientPrivilege:
        pass  # to act as it, that is
    return Finding("roles", "ok", f"{role} was not tried, which needs the owner's MIGRATE_DATABASE_URL")


async def durability(patient: Patient) -> Findings:
    """Whether what is acknowledged survives a power failure."""
    now = dict(await _rows(patient.connection, SQL.durability))
    well = True
    for name in ("fsync", "full_page_writes"):
        if now[name] != "on":
            well = False
            advice = f"set {name} = on in the server's configuration: a power failure may cost what was acknowledged"
            yield Finding("durability", "problem", f"{name} is {now[name]}", advice)
    commits = [("this connection", now["synchronous_commit"])]
    commits += await _rows(patient.connection, SQL.commit_settings, roles=ROLES)
    for who, value in commits:
        if value == "off":
            well = False
            advice = (
                "set synchronous_commit = on, or remove the setting: commands are acknowledged before they are durable"
            )
            yield Finding("durability", "problem", f"synchronous_commit is off for {who}", advice)
    if now["data_checksums"] != "on":
        advice = "stop the server and run `pg_checksums --enable`: a disk that returns other bytes then shows"
        yield Finding("durability", "warning", "the server keeps no checksums of its pages", advice)
    if well:
        standby = f"; waits for standbys {now['synchronous_standby_names']}" if now["synchronous_standby_names"] else ""
        yield Finding("durability", "ok", f"fsync on, synchronous_commit {now['synchronous_commit']}{standby}")


async def clock(patient: Patient) -> Findings:
    """Whether this machine and the database agree on the time, and no ledger has a time to come."""
    measured = Clock()
    await measured.measure(patient.connection)
    try:
        ahead = (measured.now() - datetime.now(UTC)).total_seconds()
        yield Finding("clock", "ok", f"the database's is {ahead:+.3f} s from this machine's")
    except ClockSkew as error:
        ahead = error.params["offset_seconds"]
        seen = f"the database's is {ahead:+.1f} s from this machine's, and {CLOCK_SKEW_MAX_SECONDS} s are the most"
        yield Finding("clock", "problem", seen, "set both clocks by NTP: until then commands here are answered 503")
    now = datetime.now(UTC).timestamp() + ahead
    for project, last in await _rows(patient.connection, SQL.latest):
        if last.timestamp() > now + CLOCK_SKEW_MAX_SECONDS:
            advice = "set the database's clock right; else wait: its times go on from there"
            yield Finding("clock", "problem", f"{project} has events of {last}, a time to come", advice)


async def lag(patient: Patient) -> Findings:
    """How far each view is behind, and why."""
    healths = await health(patient.connection, VIEWS)
    if all(view.state == "stopped" for view in healths.values()):
        yield Finding("lag", "problem", "no worker runs", "start `muniment worker`: no view is built, nothing expires")
    for name, view in healths.items():
        seen = f"{name} is {view.lag_events:,} events and {view.lag_seconds:.1f} s behind"
        if view.parked_projects:
            where = ", ".join(view.parked_projects)
            advice = "`muniment projections parked` tells at which event and why; the ledger and other views go on"
            yield Finding("lag", "problem", f"{name} is parked before an event of {where}; {seen}", advice)
        elif view.lag_seconds > LAG_SECONDS_MAX:
            advice = "look at the worker's log and the load of the database; more than one worker does not speed it up"
            yield Finding("lag", "warning", seen, advice)
        else:
            yield Finding("lag", "ok", seen)


async def logs(patient: Patient) -> Findings:
    """Whether what is recorded is signed and published."""
    ((signing,),) = await _rows(patient.connection, SQL.log_keys)
    known = await _rows(patient.connection, SQL.logs)
    if not signing and known and patient.settings.mode == "production":
        advice = "`muniment keys add`, where the worker runs: until then no checkpoint is published, and nothing proven"
        yield Finding("logs", "warning", "there is no key to sign with", advice)
        return
    for project, _, refused in known:
        if refused is not None:
            advice = "ops/runbooks/log-refused.md; commands and reads go on"
            yield Finding("logs", "problem", f"the log of {project} does not go on: {refused}", advice)
    if not any(refused for *_, refused in known):
        behind = sum(lag for _, lag, _ in known)
        yield Finding("logs", "ok", f"{len(known)} logs, signed by {signing} keys, {behind:,} events not published yet")


async def signing(patient: Patient) -> Findings:
    """Whether what signs checkpoints is for the worker alone, as far as the user that asks can tell."""
    settings = patient.settings
    if settings.mode != "production":
        return
    ((user, *_),) = await _rows(patient.connection, SQL.server)
    directory = settings.log_keys_dir
    readable = [path.name for path in sorted(directory.glob("log-*.secret")) if os.access(path, os.R_OK)]
    advice = (
        "set MUNIMENT_LOG_KEYS_DIR to a directory that the worker alone sees, and move log-*.secret and the directory "
        "`signed` there: whoever takes over an API could sign any history with it"
    )
    if user == "muniment_api" and readable:
        yield Finding(
            "signing", "warning", f"who runs the API here can read {', '.join(readable)} in {directory}", advice
        )
    elif user != "muniment_api" and directory == settings.keys_dir:
        yield Finding("signing", "warning", f"what signs is in {directory}, with the keys that the API reads", advice)
    else:
        yield Finding("signing", "ok", f"of what signs, {len(readable)} keys can be read here, in {directory}")


async def keys(patient: Patient) -> Findings:
    """Whether each project's key file is here, and is the one it began with."""
    directory = patient.settings.keys_dir
    if patient.settings.keys_database_url is None:
        known = await _rows(patient.connection, SQL.project_keys)
    else:
        async with await connect(patient.settings.keys_database_url) as connection:
            known = await _rows(connection, SQL.project_keys)
            async for finding in _refusals(connection):
                yield finding
    good = 0
    for project, key_id in known:
        try:
            seen = _key_fault(directory / f"{project}.key", project, key_id)
        except UnusableKey as error:
            seen = str(error)
        if seen:
            advice = "put the original there, from a backup or another node: its commands and sealed values need it"
            yield Finding("keys", "problem", seen, advice)
        else:
            good += 1
    if good == len(known):
        yield Finding("keys", "ok", f"{good} project keys in {directory}, each the one its project began with")


def _key_fault(path: Path, project: str, key_id: bytes) -> str:
    secret = read_key_file(path)
    if secret is None:
        return f"the key file {path} is missing"
    return "" if ProjectKey(project, secret).key_id == key_id else f"{path} is not the key that {project} began with"


async def pooler(patient: Patient) -> Findings:
    """Whether a pooler stands between here and the database: nothing is prepared or listened to through one."""
    settings = patient.settings
    url, direct_url = settings.database_url, settings.database_direct_url
    pooled = direct_pooled = await is_pooled(patient.connection)
    if direct_url != url:
        async with await connect(direct_url) as direct:
            direct_pooled = await is_pooled(direct)
    if direct_pooled:
        name = "DATABASE_URL" if direct_url == url else "DATABASE_DIRECT_URL"
        seen = f"{name} leads through a pooler, where LISTEN hears nothing: waits and views rely on polling"
        advice = "set DATABASE_DIRECT_URL to the database itself; DATABASE_URL may stay as it is"
        yield Finding("pooler", "warning", seen, advice)
    else:
        through = "a pooler" if pooled else "nothing"
        yield Finding("pooler", "ok", f"DATABASE_URL leads through {through}, DATABASE_DIRECT_URL through nothing")
    if patient.owner is not None and await is_pooled(patient.owner):
        seen = "MIGRATE_DATABASE_URL leads through a pooler, where `muniment migrate` refuses to work"
        yield Finding("pooler", "problem", seen, "set it to the database itself")


async def integrity(patient: Patient) -> Findings:
    """Whether what was recorded is what was written."""
    found = await recompute(patient.connection, patient.last or None)
    advice = (
        "keep a copy of the database as it is, find out who had the owner's rights, and compare with a backup: "
        "Muniment itself changes nothing that was recorded"
    )
    for fault in found.faults[:FAULTS_SHOWN]:
        yield Finding("integrity", "problem", fault, advice)
    if len(found.faults) > FAULTS_SHOWN:
        yield Finding("integrity", "problem", f"and {len(found.faults) - FAULTS_SHOWN} more", advice)
    if not found.faults:
        part = "all" if not patient.last else f"the last {patient.last:,}"
        seen = f"{found.positions:,} positions of {found.ledgers} projects are whole ({part} of each, recomputed)"
        yield Finding("integrity", "ok", seen)


ON_MACHINE: tuple[Callable[[Settings], Findings], ...] = (mode, redis, disk)
IN_DATABASE: tuple[Callable[[Patient], Findings], ...] = (
    *(server, schema, roles, durability, clock, keys, signing, lag, logs, pooler, integrity),
)
