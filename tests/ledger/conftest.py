"""A committer over a fresh database, and someone to give commands."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ledger.committer import Committer
from ledger.postgres import Pool, open_pool
from ledger.values import Actor
from ledger.vault import Vault
from tests.conftest import Database


@pytest.fixture
def agent() -> Actor:
    return Actor(issuer="https://id.example", sub="agent-7", kind="agent", assurance="authenticated", roles=("agent",))


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    async with open_pool(database.api, connections_max=4) as pool:
        yield pool


@pytest.fixture
async def committer(pool: Pool, tmp_path: Path) -> AsyncIterator[Committer]:
    """A process's committer. Make a second one with `another` to have a second process's view."""
    committer = Committer(pool, Vault(tmp_path, pool, create_keys=True), create_ledgers=True)
    yield committer
    await committer.close()


@pytest.fixture
async def another(pool: Pool, tmp_path: Path) -> AsyncIterator[Committer]:
    """A second committer with caches of its own over the same database, as another process has."""
    committer = Committer(pool, Vault(tmp_path, pool, create_keys=True), create_ledgers=True)
    yield committer
    await committer.close()
