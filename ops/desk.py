"""Where an operator at a terminal commands the operators' ledger: asks something of a view, and hears what came of it.

It is asked as it is over HTTP, by a command to the operators' ledger; but nobody vouches for who asks: whoever may use
the database and the key may ask, and is called as their machine calls them (`assurance` asserted).
"""

import asyncio
import getpass
import socket
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import NamedTuple

import psycopg

from ledger import store
from ledger.commands import Command
from ledger.committer import Committer
from ledger.embedded import running_database
from ledger.operations import OPERATORS, OfView
from ledger.postgres import Connection, Pool, open_keys_pool, open_pool, store_errors
from ledger.receipt import Receipt
from ledger.settings import Settings
from ledger.values import Actor
from ledger.vault import Vault
from ledger.view import Request
from ops import OperatorError
from ops.projects import local_settings
from projections import VIEWS, freshness
from projections.requests import views

ISSUER = "muniment-terminal"
"""Who says that someone at a terminal is who they are: nobody but the terminal."""

LOOK_SECONDS = 0.2
WORKER_SECONDS = 10.0
"""How long to wait for a worker where none runs."""


class DeskError(OperatorError):
    """What was asked at a terminal cannot be done; the message says why."""


class Desk:
    """Where an operator at a terminal asks, and hears what came of it."""

    def __init__(self, settings: Settings, pool: Pool, committer: Committer) -> None:
        self.settings = settings
        self.pool = pool
        self._committer = committer
        self._actor = Actor(
            issuer=ISSUER,
            sub=f"{getpass.getuser()}@{socket.gethostname()}",
            kind="human",
            roles=("operator",),
            assurance="asserted",
        )
        self._waits_until: float | None = None

    async def ask(self, command: OfView) -> tuple[Request, bool]:
        """What is asked for by that command, and whether it was not before. Raises DeskError where it is refused."""
        receipt = await self.give(command)
        return receipt.state.asking(command), receipt.event_count > 0

    async def give(self, command: Command, project: str = OPERATORS) -> Receipt:
        """Give a command to the operators' ledger, or to that of a project. Raises DeskError where it is refused."""
        receipt = await self._committer.submit(project, command, self._actor)
        if receipt.refusal is not None:
            raise DeskError(str(receipt.refusal))
        return receipt

    async def done(self, command: OfView) -> Request:
        """Ask, and wait for what comes of it. Raises DeskError where it cannot be done."""
        request, _ = await self.ask(command)
        assert isinstance(command.view, str)
        while True:
            if (ended := await self.outcome(command.view, request)) is not None:
                break
            await asyncio.sleep(LOOK_SECONDS)
        if ended.outcome == "failed" and command.asked != "rebuild":
            raise DeskError(ended.because or "it failed")
        return ended

    async def outcome(self, view: str, request: Request) -> Request | None:
        """What came of it, as soon as that is known. Raises DeskError where no worker runs that would do it."""
        async with self.pool.connection() as connection:
            _, states = await views(connection)
            found = states[view].find(request.request)
            if found is None:
                raise DeskError(f"what came of that was followed by more: see the events after {request.event_id}")
            if found.outcome is not None:
                return found
            stopped = (await freshness.health(connection, [view]))[view].state == "stopped"
        now = time.monotonic()
        self._waits_until = (self._waits_until or now + WORKER_SECONDS) if stopped else None
        if self._waits_until is not None and now > self._waits_until:
            raise DeskError(
                "it is asked for, and is done as soon as a worker runs: none does. `muniment worker` is one"
            )
        return None


@asynccontextmanager
async def connected() -> AsyncGenerator[Connection]:
    """A connection to look with."""
    async with reached() as (_, pool), pool.connection() as connection:
        yield connection


class Reached(NamedTuple):
    settings: Settings
    pool: Pool


@asynccontextmanager
async def open_desk(view: str | None = None) -> AsyncGenerator[Desk]:
    """A desk, about that view if one is named. The operators' ledger is made at its first use. Raises DeskError,
    UnusableKey."""
    if view is not None and view not in VIEWS:
        raise DeskError(f"there is no view {view!r}: there are {', '.join(VIEWS)}")
    async with reached() as (settings, pool), open_keys_pool(settings.keys_database_url, pool) as keys:
        vault = Vault(settings.keys_dir, keys, create_keys=True)
        async with pool.connection() as connection:
            is_new = await store.find_ledger(connection, OPERATORS) is None
        await vault.open(OPERATORS)  # as `project create` does: a ledger without its key could not take a command
        if is_new:
            print(
                f"The ledger of the project {OPERATORS} is made; its key is {settings.keys_dir / f'{OPERATORS}.key'}: "
                "keep a copy, and give it to every node",
                file=sys.stderr,
            )
        committer = Committer(pool, vault, create_ledgers=True)
        try:
            yield Desk(settings, pool, committer)
        finally:
            await committer.close()


@asynccontextmanager
async def reached() -> AsyncGenerator[Reached]:
    """The database, as the worker uses it; what is wrong with that is said in a sentence."""
    with running_database(local_settings(any_mode=True), "muniment_worker") as settings:
        async with open_pool(settings.database_url, 4) as pool:
            try:
                with store_errors():
                    yield Reached(settings, pool)
            except psycopg.errors.InsufficientPrivilege as error:
                raise DeskError(
                    "who asks must be let in as an API or a worker is (muniment_api, muniment_worker): name one in "
                    "DATABASE_URL"
                ) from error
            except (
                psycopg.errors.InvalidSchemaName,
                psycopg.errors.UndefinedTable,
                psycopg.errors.UndefinedColumn,
            ) as error:
                raise DeskError("the database is not at this version: run `muniment migrate`") from error
