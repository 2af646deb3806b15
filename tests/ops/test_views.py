"""`muniment projections`: what an operator types, and what comes of it."""

import asyncio
import getpass
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest

from api.app import create_app
from api.auth import development_token
from ledger.commands import OpenSession, Record
from ledger.committer import Committer
from ledger.events import SessionActivated
from ledger.operations import OPERATORS
from ledger.postgres import Pool, open_pool
from ledger.values import SYSTEM, Actor
from ledger.vault import Vault
from projections import VIEWS, caught_up
from tests.api.conftest import running as serving
from tests.api.conftest import settings_of
from tests.check import check_ledger
from tests.conftest import Database
from tests.ops.test_worker import worker
from tests.projections.conftest import History

AGENT = Actor(issuer="https://id.example", sub="a", kind="agent", assurance="authenticated", roles=("agent",))


class Said(NamedTuple):
    code: int
    out: str
    err: str


async def muniment(*arguments: str, url: str, home: Path) -> Said:
    environment = {"PATH": os.environ["PATH"], "MUNIMENT_HOME": str(home), "DATABASE_URL": url}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ops.cli", "projections", *arguments),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return Said(process.returncode or 0, out.decode(), err.decode())


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    async with open_pool(database.worker, connections_max=4) as pool:
        yield pool


@pytest.fixture
async def filled(pool: Pool, database: Database, tmp_path: Path) -> AsyncIterator[None]:
    """A project with some events, and a worker that has them in all views."""
    committer = Committer(pool, Vault(tmp_path / "keys", pool, create_keys=True), create_ledgers=True)
    await committer.submit_all(
        "demo", [OpenSession(agent_role="x"), *(Record(kind="note", body={"n": n}) for n in range(20))], AGENT
    )
    ledger = await committer.ledger("demo")
    await committer.close()
    assert ledger is not None
    async with worker(database.worker, tmp_path):
        for view in VIEWS:
            await caught_up(pool, view, ledger.ledger_id, min_position=21, timeout_seconds=30)
        yield


async def poison(pool: Pool) -> None:
    """An event of a session that was never opened: the view of sessions cannot take it."""
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT ledger_id, size FROM ledger.ledgers WHERE project_id = 'demo'")
        ((ledger_id, size),) = await cursor.fetchall()
        await connection.execute("UPDATE ledger.ledgers SET last_recorded_at = '2026-01-01' WHERE project_id = 'demo'")
    history = History(pool, ledger_id, "demo")
    history.size = size
    history.add(SessionActivated())
    await history.write()


async def test_a_view_is_rebuilt_verified_and_rolled_back(database: Database, filled: None, tmp_path: Path) -> None:
    async def run(*arguments: str) -> Said:
        return await muniment(*arguments, url=database.worker, home=tmp_path)

    rebuilt = await run("rebuild", "audit", "--reason", "new words")
    assert rebuilt.code == 0, rebuilt
    assert rebuilt.out.startswith("audit: switched; asked for by muniment-terminal#")
    assert "(new words)" in rebuilt.out
    assert "of 22 events" in rebuilt.err, "those of the project, and the one that asks for this"
    listed = await run("list")
    assert [line.split()[0] for line in listed.out.splitlines() if not line.startswith(" ")] == list(VIEWS)
    assert "what it replaced is kept" in listed.out
    verified = await run("verify", "audit")
    assert verified.code == 0
    assert "audit of demo is replay(ledger " in verified.out
    assert "audit has nothing of a project nobody" in (await run("verify", "audit", "--project", "nobody")).err
    assert (await run("rollback", "audit", "--reason", "it was no better")).code == 0
    again = await run("rollback", "audit")
    assert again.code == 1
    assert "RollBackView is not possible while audit is built" in again.err
    assert "it was no better" in (await run("list")).out
    assert (await run("verify", "audit")).code == 0
    assert "CancelRebuild is not possible while audit is built" in (await run("cancel", "audit")).err
    history = check_ledger(database.owner)[OPERATORS]
    who = f"{getpass.getuser()}@{socket.gethostname()}"
    assert [(event.type, event.actor.sub, event.reason) for _, event in history] == [
        ("RebuildRequested", who, "new words"),
        ("ViewSwitched", "system", "new words"),
        ("VerificationRequested", who, None),
        ("ViewVerified", "system", None),
        ("VerificationRequested", who, None),
        ("ViewRequestFailed", "system", None),
        ("RollBackRequested", who, "it was no better"),
        ("ViewRolledBack", "system", "it was no better"),
        ("CommandRefused", who, None),
        ("VerificationRequested", who, None),
        ("ViewVerified", "system", None),
        ("CommandRefused", who, None),
    ]
    assert {event.actor.assurance for _, event in history if event.actor != SYSTEM} == {"asserted"}


async def test_a_row_that_was_changed_is_named(database: Database, filled: None, tmp_path: Path) -> None:
    async with await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as owner:
        await owner.execute("UPDATE sessions.sessions SET state = 'lost'")
    said = await muniment("verify", "sessions", "--project", "demo", url=database.worker, home=tmp_path)
    assert said.code == 1
    assert "sessions of demo is not replay(" in said.out
    assert "state: 'lost', a replay makes 'pending', set by event 1 (SessionOpened " in said.out


async def test_what_is_parked_is_listed_tried_again_and_skipped(
    database: Database, pool: Pool, filled: None, tmp_path: Path
) -> None:
    async def run(*arguments: str) -> Said:
        return await muniment("parked", *arguments, url=database.worker, home=tmp_path)

    assert "sessions is not parked" in (await run("retry", "sessions")).err
    await poison(pool)
    while not (listed := await run()).out.startswith("sessions of demo, before event 22 (SessionActivated), since "):
        assert listed.out == "nothing is parked\n"
    tried = await run("retry", "sessions")
    assert tried.code == 0
    assert "sessions of demo is parked before event 22: " in tried.out
    assert (await run("skip", "sessions", "--project", "demo", "--position", "22")).code == 2, "without a reason"
    skipped = await run("skip", "sessions", "--project", "demo", "--position", "22", "--reason", "of no session")
    assert (skipped.code, skipped.out) == (0, "sessions of demo goes on\n")
    assert (await run()).out == "nothing is parked\n"


async def test_without_the_key_of_the_operators_ledger_nothing_is_asked(
    database: Database, filled: None, tmp_path: Path
) -> None:
    assert (await muniment("verify", "audit", url=database.worker, home=tmp_path)).code == 0
    (tmp_path / "keys" / "operators.key").unlink()
    said = await muniment("verify", "audit", url=database.worker, home=tmp_path)
    assert said.code == 1
    assert "operators.key is missing, and project operators has begun with it" in said.err
    assert "Traceback" not in said.err
    assert len(check_ledger(database.owner)[OPERATORS]) == 2


async def test_what_is_asked_at_a_terminal_and_over_http_is_one_and_the_same(
    database: Database, filled: None, tmp_path: Path
) -> None:
    token = development_token(tmp_path / "keys", project=OPERATORS, subject="ana", kind="human", roles=["operator"])
    app = create_app(settings_of(database, tmp_path))
    async with serving(app, {"Authorization": f"Bearer {token}"}) as client:
        terminal = asyncio.create_task(muniment("rebuild", "audit", url=database.worker, home=tmp_path))
        http = await client.post("/projections/audit/rebuild", json={"reason": "from afar"})
        assert http.status_code in (200, 202)
        said = await terminal
        assert said.code == 0, said
        view = (await client.get("/projections/audit")).json()
        assert view["state"] == "switched"
        told = [event.type for _, event in check_ledger(database.owner)[OPERATORS]]
        # Whoever came second came while that was under way, or after: then there were two.
        assert told in (["RebuildRequested", "ViewSwitched"], ["RebuildRequested", "ViewSwitched"] * 2)
        assert ("is being rebuilt already" in said.err) == (http.status_code == 202 and len(told) == 2)
        assert (await client.post("/projections/audit/verify", json={})).status_code == 202
        assert (await muniment("verify", "audit", url=database.worker, home=tmp_path)).code == 0
        assert (await client.get("/projections/audit")).json()["requests"][-1]["holds"]


async def test_what_cannot_be_done_is_said_in_a_sentence(database: Database, tmp_path: Path) -> None:
    async def said(*arguments: str) -> str:
        answer = await muniment(*arguments, url=database.api, home=tmp_path)
        assert answer.code == 1
        assert "Traceback" not in answer.err
        return answer.err

    assert "there is no view 'nonsense'" in await said("rebuild", "nonsense")
    assert "it is asked for, and is done as soon as a worker runs: none does" in await said("rebuild", "audit")
    async with await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as owner:
        await owner.execute("REVOKE SELECT ON ledger.ledgers FROM muniment_api")
    assert "who asks must be let in as an API or a worker is" in await said("rebuild", "audit")
