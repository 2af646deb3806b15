"""Projects and tokens from the command line, as an operator types them."""

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jwt
import psycopg
import pytest

from api.auth import DEVELOPMENT_ISSUER, Tokens, development_verifier
from ledger.commands import OpenSession
from ledger.committer import Committer
from ledger.embedded import EmbeddedServer
from ledger.errors import UnknownProject
from ledger.postgres import open_pool
from ledger.values import Actor
from ledger.vault import Vault
from tests.conftest import Database, database_of

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def muniment(database: Database, tmp_path: Path) -> Run:
    """Runs the command against this test's database and home; settings are given by name."""

    def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        ours = {"MUNIMENT_HOME": str(tmp_path), "DATABASE_URL": database.api} | settings
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MUNIMENT_")}
        return subprocess.run(
            [sys.executable, "-P", "-m", "ops.cli", *arguments],
            env=kept | ours,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_a_project_is_created_once_with_its_key(muniment: Run, database: Database, tmp_path: Path) -> None:
    first = muniment("project", "create", "acme")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("acme is created: ledger ")
    key = tmp_path / "keys" / "acme.key"
    secret = key.read_bytes()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert sorted(file.name for file in key.parent.iterdir()) == ["acme.key", "use-tokens.secret"]
    again = muniment("project", "create", "acme")
    assert again.stdout.splitlines()[0] == first.stdout.splitlines()[0].replace("is created", "exists already")
    assert key.read_bytes() == secret
    with psycopg.connect(database.owner) as connection:
        assert connection.execute("SELECT project_id, size FROM ledger.ledgers").fetchall() == [("acme", 0)]


def test_projects_are_listed_with_their_ledgers(muniment: Run) -> None:
    assert "There is no project yet" in muniment("project", "list").stdout
    created = [muniment("project", "create", name).stdout.splitlines()[0].split()[-1] for name in ("zeta", "acme")]
    lines = [line.split() for line in muniment("project", "list").stdout.splitlines()]
    assert [(line[0], line[1], line[2]) for line in lines] == [("acme", created[1], "0"), ("zeta", created[0], "0")]


@pytest.mark.parametrize("name", ["A", "a", "Acme", "acme_1", "a" * 64, "", "acme/..", "acme\n"])
def test_a_name_that_no_project_can_have_is_refused(muniment: Run, tmp_path: Path, name: str) -> None:
    refused = muniment("project", "create", name)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"muniment: {name!r} cannot name a project: 2 to 63 of a-z")
    assert not (tmp_path / "keys").exists()


async def test_a_created_project_takes_commands_where_no_project_is_made_by_itself(
    muniment: Run, database: Database, tmp_path: Path
) -> None:
    created = muniment("project", "create", "acme", MUNIMENT_MODE="production")
    assert created.returncode == 0, created.stderr
    actor = Actor(issuer="i", sub="s", kind="agent", assurance="authenticated", roles=("agent",))
    async with open_pool(database.api, 2) as pool:
        committer = Committer(pool, Vault(tmp_path / "keys", pool, create_keys=False), create_ledgers=False)
        assert (await committer.submit("acme", OpenSession(agent_role="support"), actor)).first_position == 1
        with pytest.raises(UnknownProject):
            await committer.submit("other", OpenSession(agent_role="support"), actor)
        await committer.close()


def test_a_database_without_tables_is_said(muniment: Run, postgres: EmbeddedServer) -> None:
    refused = muniment("project", "list", DATABASE_URL=postgres.url(database="postgres"))
    assert (refused.returncode, refused.stderr) == (
        1,
        "muniment: the database has no tables of Muniment yet: run `muniment migrate`\n",
    )


def test_a_database_that_does_not_answer_is_said(muniment: Run) -> None:
    refused = muniment("project", "list", DATABASE_URL="postgresql://x@127.0.0.1:9/x?connect_timeout=1")
    assert refused.returncode == 1
    assert "No database connection was to be had" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_embedded_database_is_used_where_none_is_named(muniment: Run, durable_server: EmbeddedServer) -> None:
    home = str(durable_server.data.parents[1])
    assert muniment("project", "create", "acme", MUNIMENT_HOME=home, DATABASE_URL="").returncode == 0
    with psycopg.connect(database_of(durable_server, "muniment").owner) as connection:
        assert connection.execute("SELECT project_id FROM ledger.ledgers").fetchall() == [("acme",)]


# Tokens


async def test_a_token_says_who_it_is_for_and_how_long(muniment: Run, tmp_path: Path) -> None:
    arguments = (
        "--project",
        "acme",
        "--subject",
        "Ann Ex",
        "--kind",
        "human",
        "--role",
        "auditor",
        "--role",
        "operator",
    )
    made = muniment("token", *arguments, "--lifetime", "12h")
    assert made.returncode == 0, made.stderr
    (token,) = made.stdout.split("\n")[:-1]
    caller = await Tokens({DEVELOPMENT_ISSUER: development_verifier(tmp_path / "keys")}).caller(
        f"Bearer {token}".encode()
    )
    assert (caller.project_id, caller.actor.sub, caller.actor.kind) == ("acme", "Ann Ex", "human")
    assert caller.actor.roles == ("auditor", "operator")
    expires_at = jwt.decode(token, options={"verify_signature": False})["exp"]
    assert abs(expires_at - time.time() - 12 * 3600) < 120


async def test_a_token_is_an_agents_for_thirty_days_unless_said_otherwise(muniment: Run, tmp_path: Path) -> None:
    token = muniment("token", "--project", "acme", "--subject", "a").stdout.strip()
    caller = await Tokens({DEVELOPMENT_ISSUER: development_verifier(tmp_path / "keys")}).caller(
        f"Bearer {token}".encode()
    )
    assert (caller.actor.kind, caller.actor.roles) == ("agent", ("agent",))
    expires_at = jwt.decode(token, options={"verify_signature": False})["exp"]
    assert abs(expires_at - time.time() - 30 * 24 * 3600) < 120


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--project", "Acme", "--subject", "a"), "no server would accept such a token"),
        (("--project", "acme", "--subject", ""), "no server would accept such a token"),
        (("--project", "acme", "--subject", "a", "--lifetime", "0s"), "at least one second"),
        (("--project", "acme", "--subject", "a", "--role", "king"), "king"),
        (("--project", "acme", "--subject", "a", "--kind", "dog"), "dog"),
        (("--project", "acme"), "--subject"),
    ],
)
def test_a_token_that_cannot_be_is_refused(muniment: Run, arguments: tuple[str, ...], said: str) -> None:
    refused = muniment("token", *arguments)
    assert refused.returncode != 0
    assert said in refused.stderr + refused.stdout
    assert "eyJ" not in refused.stdout
    assert "Traceback" not in refused.stderr


def test_production_has_no_development_tokens(muniment: Run, tmp_path: Path) -> None:
    refused = muniment("token", "--project", "acme", "--subject", "a", MUNIMENT_MODE="production")
    assert refused.returncode == 1
    assert "worth nothing" in refused.stderr
    assert not (tmp_path / "keys").exists()
