"""The command `muniment`: what an operator types, and how each failure is said.

Invariant: an error an operator can cause or mend ends in one clear message and a non-zero code, never in a
traceback. What a command does is in the module it calls; nothing but wiring may be here.
"""

import asyncio
import os
import signal
import sys
from importlib.metadata import version
from types import FrameType
from typing import Annotated, Any

from cyclopts import App, Parameter

from ledger.errors import MunimentError
from ledger.programs import EmbeddedError
from ledger.project_key import UnusableKey
from ledger.settings import InvalidSettings, Settings
from ops import OperatorError

_SETTINGS = """
**Settings** are environment variables. Those of secrets (the URLs below) may instead be given as
`…_FILE`, the name of a file that holds the value.

| variable | meaning |
|---|---|
| MUNIMENT_MODE | `production` (default) or `development` (accepts development tokens) |
| MUNIMENT_HOME | where data is kept; default `~/.local/share/muniment` |
| MUNIMENT_KEYS_DIR | where key files are kept; default `keys` in MUNIMENT_HOME |
| MUNIMENT_LOG_KEYS_DIR | where a worker has the keys that sign checkpoints; default MUNIMENT_KEYS_DIR |
| MUNIMENT_DEPLOYMENT | the name in every log's origin, fixed by the first migration; default `localhost` |
| DATABASE_URL | PostgreSQL 15 or newer, or `embedded` (the default in development) |
| DATABASE_DIRECT_URL | the same database without a transaction pooler; default DATABASE_URL |
| MIGRATE_DATABASE_URL | the same database as its owner; default DATABASE_URL in development |
| KEYS_DATABASE_URL | where the keys of personal values are; default DATABASE_URL |
| MIGRATE_KEYS_DATABASE_URL | the same as its owner; default KEYS_DATABASE_URL in development |
| MUNIMENT_CHECKPOINT_SECONDS | at most one checkpoint of a ledger in so many; default 1, at least 0.1 |
| MUNIMENT_WITNESSES | a file with who must cosign checkpoints, `{"quorum": 1, "witnesses": [{"url": …, "vkey": …}]}` |
| REDIS_URL | a Redis or Valkey that makes replays faster; default none |
| IDEMPOTENCY_ENABLED, IDEMPOTENCY_TTL_SECONDS | the copy in Redis; default true and 86400 |
| SESSION_RETENTION_DAYS | when an idle session expires; default 7 |
| OIDC_ISSUER_URL, OIDC_AUDIENCE | whose access tokens are accepted, and for whom they must be |
| OIDC_PROJECT_CLAIM, OIDC_ROLES_CLAIM, OIDC_KIND_CLAIM | claims, or dotted paths; default `project`, `roles`, `kind` |
| HOST, PORT | where the API listens; default 127.0.0.1 and 8088 |
| DRAIN_SECONDS | how long the API goes on, unready, after SIGTERM; default 5, in development 0 |
| METRICS_TOKEN | the bearer token that the API's `/metrics` asks for; default: none, it is open |
| OTEL_EXPORTER_PROMETHEUS_HOST, …_PORT | where a worker has its `/metrics`; default `localhost`, and nowhere |
| OTEL_EXPORTER_OTLP_ENDPOINT | where traces go, by OTLP over HTTP; default: no traces |
"""

app = App(
    name="muniment",
    version=version("muniment"),
    help="Muniment: an event-sourced, tamper-evident audit ledger for AI agents.",
    help_format="markdown",
    help_epilogue=_SETTINGS,
)

# By name, and imported when called: a command starts faster when it does not load all others.
app.command("ops.projects:project", name="project")
app.command("ops.projects:token", name="token")
app.command("ops.importing:importing", name="import")
app.command("ops.views:projections", name="projections")
app.command("ops.log_keys:keys", name="keys")
app.command("ops.adoption:ledger", name="ledger")
app.command("ops.doctor:doctor", name="doctor")
app.command("ops.witness:witness", name="witness")
app.command("ops.backup:backup", name="backup")
app.command("ops.backup:restore", name="restore")
app.command("ops.mirror:publish", name="publish")
app.command("ops.evidence:evidence", name="evidence")
app.command("ops.verification:verify", name="verify")

Supervised = Annotated[bool, Parameter(show=False, negative=())]


@app.command(name="up")
async def _up() -> None:
    """Run Muniment here: PostgreSQL unless DATABASE_URL is set, migrations, the API and a worker.

    Prints where it listens and where its data is. Ctrl-C or SIGTERM stops all of it.
    """
    from ops.up import up

    await up(_settings())


@app.command(name="migrate")
async def _migrate(*, after: Annotated[bool, Parameter(negative=())] = False) -> None:
    """Bring the database to this version; does nothing where it is there already.

    Needs the rights of the database's owner: MIGRATE_DATABASE_URL (of that of the keys, where they have one of their
    own: MIGRATE_KEYS_DATABASE_URL). Run it before a new version starts, while the
    older one runs.

    Parameters
    ----------
    after
        Apply also what an older version does not bear. For when none runs any more.
    """
    from ledger.embedded import OWNER, running_database
    from ops.keys_database import migrate_keys
    from ops.migrate import MigrationError, left, migrate

    with running_database(_settings(), OWNER) as settings:
        url = settings.migrate_database_url
        if url is None:
            raise MigrationError("MIGRATE_DATABASE_URL is not set, and production needs it to migrate: name the owner")
        applied = await migrate(url, settings.deployment, after=after)
        if settings.keys_database_url:
            if settings.migrate_keys_database_url is None:
                raise MigrationError("MIGRATE_KEYS_DATABASE_URL is not set: name the owner of the keys' database")
            applied += await migrate_keys(settings.migrate_keys_database_url, settings.deployment)
        later = await left(url)
    print("\n".join(f"migrated {name}" for name in applied) or "nothing to migrate")
    if later:
        print(f"left until no older version runs: {', '.join(later)} (`muniment migrate --after`)")


@app.command(name="api")
def _api(*, supervised: Supervised = False) -> None:
    """Run one API process, on HOST:PORT. Any number may run on one database.

    The database must have been migrated.
    """
    from ledger.embedded import running_database
    from ops.serve import end_with_supervisor, serve

    if supervised:
        end_with_supervisor()
    with running_database(_settings(), "muniment_api") as settings:
        if settings.database_url != os.environ.get("DATABASE_URL"):
            os.environ["DATABASE_URL"] = settings.database_url
            os.environ.pop("DATABASE_URL_FILE", None)
        asyncio.run(_check(settings))
        serve(settings)


@app.command(name="worker")
def _worker(*, supervised: Supervised = False) -> None:
    """Run one worker process: it builds the views, expires what is due and publishes logs. Any number may run.

    They agree among themselves who does what; when one dies another takes over. The database must have
    been migrated.
    """
    import uvloop

    from ledger.embedded import running_database
    from ops.serve import end_with_supervisor
    from ops.worker import run

    if supervised:
        end_with_supervisor()
    with running_database(_settings(), "muniment_worker") as settings:
        asyncio.run(_check(settings))
        uvloop.run(run(settings))


async def _check(settings: Settings) -> None:
    from ops.keys_database import check_keys
    from ops.migrate import check

    await check(settings.database_url, settings.deployment, production=settings.mode == "production")
    await check_keys(settings.database_url, settings.keys_database_url, settings.deployment)


def _settings() -> Settings:
    return Settings.from_environment(os.environ)


def _end(number: int, frame: FrameType | None) -> Any:
    sys.exit(128 + number)  # an exception, so that what was started is stopped on the way out


def main() -> None:
    """The entry point: run the command in `sys.argv`."""
    signal.signal(signal.SIGTERM, _end)
    try:
        app()
    except InvalidSettings as error:
        sys.exit(f"Muniment cannot run with these settings:\n{error}")
    except (EmbeddedError, MunimentError, OperatorError, UnusableKey) as error:
        sys.exit(f"muniment: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
