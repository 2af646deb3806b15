"""`muniment project` and `muniment token`: ledgers for projects, and who may use them in development.

A project is its ledger and its key file; both are made once and neither is ever made again. A development
token is worth something only to a server in development mode with the same keys directory. Nothing here
speaks HTTP: an operator at the machine needs no token.
"""

import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Annotated, Literal

import msgspec
import psycopg
from cyclopts import App, Parameter

from api.auth import LIFETIME_SECONDS, Kind, development_token
from api.use_tokens import Signer
from ledger import store
from ledger.commands import ProjectId
from ledger.embedded import running_database
from ledger.postgres import Pool, open_keys_pool, open_pool, store_errors
from ledger.settings import Settings
from ledger.vault import Vault

Role = Literal["agent", "approver", "auditor", "operator", "importer"]

project = App(name="project", help="Create and list projects: each is a ledger of its own.")


@project.command(name="create")
async def create(name: str, /) -> None:
    """Create a project's ledger and its key file, and the one that signs use tokens, unless they are there.

    Uses the database at DATABASE_URL, else the one in MUNIMENT_HOME. In development a project's first
    command does the same.

    Parameters
    ----------
    name
        2 to 63 of a-z, 0-9 and `-`, not beginning with `-`. It can never be renamed or used again.
    """
    try:
        msgspec.convert(name, ProjectId)
    except msgspec.ValidationError:
        sys.exit(f"muniment: {name!r} cannot name a project: 2 to 63 of a-z, 0-9 and -, not beginning with -")
    settings = local_settings(any_mode=True)
    async with _database(settings) as pool:
        # The key first: a ledger without its key could not take a command. Dying between the two leaves a
        # key that nothing depends on yet, and the next create takes it.
        async with open_keys_pool(settings.keys_database_url, pool) as keys:
            await Vault(settings.keys_dir, keys, create_keys=True).open(name)
        await Signer(settings.keys_dir, pool, create_key=True).open()
        async with pool.connection() as connection:
            known = await store.find_ledger(connection, name)
            ledger = known or await store.create_ledger(connection, name)
    print(f"{name} {'exists already' if known else 'is created'}: ledger {ledger.ledger_id}")
    print(f"Its key is {settings.keys_dir / f'{name}.key'}: keep a copy; every node needs it, and no other opens it.")


@project.command(name="list")
async def list_projects() -> None:
    """List the projects: name, ledger, number of events."""
    async with _database(local_settings(any_mode=True)) as pool, pool.connection() as connection:
        cursor = await connection.execute(store.SQL.list_ledgers)
        rows = await cursor.fetchall()
    width = max((len(row[1]) for row in rows), default=0)
    for ledger_id, name, is_foreign, size, *_ in rows:
        print(f"{name:<{width}}  {ledger_id}  {size:>12,} events{'  (foreign)' if is_foreign else ''}")
    if not rows:
        print("There is no project yet: `muniment project create NAME`, or in development just send a command.")


def token(
    *,
    project: str,
    subject: str,
    kind: Kind = "agent",
    role: Annotated[tuple[Role, ...], Parameter(negative=(), show_default="agent")] = ("agent",),
    lifetime: Annotated[timedelta, Parameter(show_default="30 days")] = timedelta(seconds=LIFETIME_SECONDS),
) -> None:
    """Print a development token: `Authorization: Bearer <token>`.

    It works with a server in development mode (`make up`) that has the same MUNIMENT_HOME; production
    accepts none.

    Parameters
    ----------
    project
        The project it is for. In development its first command creates it.
    subject
        Who it is for: the `sub` of the actor that events will name.
    kind
        What that is.
    role
        What it may do; give it several times for several roles.
    lifetime
        How long it is valid, such as `12h` or `30d`.
    """
    seconds = int(lifetime.total_seconds())
    if seconds < 1:
        sys.exit("muniment: a lifetime is at least one second")
    print(local_token(project, subject, kind, role, seconds))


def local_token(
    project: str, subject: str, kind: Kind, roles: tuple[str, ...], lifetime_seconds: int = LIFETIME_SECONDS
) -> str:
    """A development token for the server of this machine. Ends the program where no server would accept it."""
    keys_dir = local_settings().keys_dir
    try:
        return development_token(
            keys_dir, project=project, subject=subject, kind=kind, roles=roles, lifetime_seconds=lifetime_seconds
        )
    except msgspec.ValidationError as error:
        sys.exit(f"muniment: no server would accept such a token: {error}")


def local_settings(*, any_mode: bool = False) -> Settings:
    """The settings as `make up` reads them: in development, unless the environment says otherwise.

    Ends the program where that is production, unless in `any_mode`. Raises InvalidSettings.
    """
    settings = Settings.from_environment({"MUNIMENT_MODE": "development"} | _said())
    if settings.mode != "development" and not any_mode:
        sys.exit(
            "muniment: MUNIMENT_MODE is production, where development tokens are worth nothing: "
            "run this, and the server it is for, with MUNIMENT_MODE=development"
        )
    return settings


def _said() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if value}


@asynccontextmanager
async def _database(settings: Settings) -> AsyncGenerator[Pool]:
    """The database, as the API uses it; the embedded one is started where it does not run."""
    with running_database(settings, "muniment_api") as reached:
        async with open_pool(reached.database_url, 1) as pool:
            try:
                with store_errors():
                    yield pool
            except (psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedTable):
                sys.exit("muniment: the database has no tables of Muniment yet: run `muniment migrate`")
