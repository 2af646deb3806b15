"""Operators at random, workers killed at random, under load: what the operators' ledger says came of it, came of it."""

import asyncio
import random
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from ledger.commands import AnnotateSession, OpenSession, Record
from ledger.committer import Committer
from ledger.entry import Event
from ledger.errors import RateLimited
from ledger.events import Fact
from ledger.operations import OPERATORS, CancelRebuild, OfView, RebuildView, RollBackView, VerifyView
from ledger.postgres import Pool, open_pool
from ledger.values import Actor
from ledger.vault import Vault
from projections import VIEWS, caught_up, sessions
from projections.requests import views
from tests.check import check_ledger
from tests.conftest import Database
from tests.projections.conftest import deadline

SECONDS = 15
EVENTS = 1500
ASKED = ("RebuildRequested", "RollBackRequested", "VerificationRequested")
AGENT = Actor(issuer="https://id.example", sub="a", kind="agent", assurance="authenticated", roles=("agent",))

WORKER = """
import asyncio, sys
from pathlib import Path
from ledger.committer import Committer
from ledger.postgres import open_pool
from ledger.vault import Vault
from projections import VIEWS, Projector
from projections.rebuild import rebuild_for_ever
from projections.requests import Follower

async def main():
    async with open_pool(sys.argv[1], 10) as pool:
        vault = Vault(Path(sys.argv[2]), pool, create_keys=False)
        follower = Follower(pool, Committer(pool, vault, create_ledgers=False))
        async with asyncio.TaskGroup() as jobs:
            jobs.create_task(Projector(pool, VIEWS).run())
            jobs.create_task(rebuild_for_ever(pool, follower.renew))
            jobs.create_task(follower.follow())

asyncio.run(main())
"""
"""What a worker does, without the leases that would have the next one wait for seconds."""

WATCHED = """
CREATE TABLE public.renamed (number bigint GENERATED ALWAYS AS IDENTITY, schema oid, name text);
CREATE FUNCTION public.note_rename() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO public.renamed (schema, name) SELECT objid, object_identity FROM pg_event_trigger_ddl_commands();
END $$;
CREATE EVENT TRIGGER note_rename ON ddl_command_end WHEN TAG IN ('ALTER SCHEMA') EXECUTE FUNCTION public.note_rename();
"""
"""What really became of views: which schema was given whose name, in order."""


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    async with open_pool(database.worker, connections_max=6) as pool:
        yield pool


@pytest.fixture
async def committer(pool: Pool, tmp_path: Path) -> AsyncIterator[Committer]:
    committer = Committer(pool, Vault(tmp_path / "keys", pool, create_keys=True), create_ledgers=True)
    yield committer
    await committer.close()


async def operate(committer: Committer, who: str, rng: random.Random, ended: asyncio.Event) -> None:
    """Ask for this and that, as someone does who does not look first."""
    actor = Actor(issuer="i", sub=who, kind="human", assurance="authenticated", roles=("operator",))
    kinds: list[type[OfView]] = [RebuildView] * 6 + [RollBackView] * 3 + [CancelRebuild, VerifyView]
    while not ended.is_set():
        command = rng.choice(kinds)(view=rng.choice(["sessions", "tasks"]), reason=f"{who} thought so")
        with suppress(RateLimited):
            await committer.submit(OPERATORS, command, actor)
        await asyncio.sleep(rng.uniform(0, 0.8))


async def act(committer: Committer, rng: random.Random, ended: asyncio.Event) -> None:
    """An agent that goes on with its sessions, and begins new ones."""
    opened = []
    while not ended.is_set():
        receipt = await committer.submit("demo", OpenSession(agent_role="x", labels={"n": str(rng.random())}), AGENT)
        assert receipt.target is not None
        opened.append(receipt.target)
        await committer.submit("demo", AnnotateSession(session_id=rng.choice(opened), text="again"), AGENT)
        await committer.submit("demo", Record(kind="note", body={"n": rng.random()}), AGENT)
        await asyncio.sleep(0.03)


async def read(url: str, committer: Committer, ended: asyncio.Event) -> None:
    """Somebody who reads, and is never told of less than before."""
    ledger = await committer.ledger("demo")
    assert ledger is not None
    newest = ""
    async with open_pool(url, 1) as api, api.connection() as connection:
        while not ended.is_set():
            page = await sessions.search(connection, ledger.ledger_id, sessions.Filter(), limit=1)
            if page.sessions:
                assert page.sessions[0].opened_at >= newest
                newest = page.sessions[0].opened_at
            await asyncio.sleep(0.005)


async def kill_again_and_again(url: str, keys: Path, rng: random.Random, ended: asyncio.Event) -> None:
    """One worker after another, none of which ends by itself; the last is left to do what is left."""
    while True:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, url, str(keys))
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), rng.uniform(1, 6) if not ended.is_set() else None)
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGKILL)
            await process.wait()
        assert process.returncode == -signal.SIGKILL, "a worker died of something else"


async def seen(pool: Pool, types: set[str]) -> None:
    """Return when the operators' ledger has all of these: on a slow machine that takes longer."""
    with deadline(60) as check:
        while True:
            check()
            async with pool.connection() as connection:
                cursor = await connection.execute("SELECT DISTINCT type FROM ledger.events")
                if types <= {name for (name,) in await cursor.fetchall()}:
                    return
            await asyncio.sleep(0.2)


async def settled(pool: Pool) -> None:
    with deadline(90) as check:
        while True:
            check()
            async with pool.connection() as connection:
                _, states = await views(connection)
            if not any(view.open for view in states.values()):
                return
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("seed", [1])
async def test_whatever_is_asked_while_workers_are_killed_has_one_answer_and_that_is_true(
    seed: int, database: Database, pool: Pool, committer: Committer, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    with psycopg.connect(database.owner, autocommit=True) as owner:
        owner.execute(WATCHED)
        first: dict[str, int] = dict(owner.execute("SELECT nspname, oid FROM pg_namespace").fetchall())
    await committer.submit_all("demo", [OpenSession(agent_role="x") for _ in range(EVENTS)], AGENT)
    ended, idle = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as jobs:
        killing = jobs.create_task(kill_again_and_again(database.worker, tmp_path / "keys", rng, ended))
        jobs.create_task(act(committer, rng, idle))
        jobs.create_task(read(database.api, committer, idle))
        operating = [jobs.create_task(operate(committer, who, rng, ended)) for who in ("ana", "bo")]
        await asyncio.sleep(SECONDS)
        await seen(pool, {"ViewSwitched", "ViewVerified", "RebuildCancelled", "CommandRefused"})
        ended.set()
        await asyncio.gather(*operating)
        await settled(pool)
        idle.set()
        ledger = await committer.ledger("demo")
        assert ledger is not None
        for view in VIEWS:
            await caught_up(pool, view, ledger.ledger_id, timeout_seconds=30)
        killing.cancel()
    history = [event for _, event in check_ledger(database.owner)[OPERATORS]]
    with psycopg.connect(database.owner) as owner:
        renamed = owner.execute("SELECT name, schema FROM public.renamed ORDER BY number").fetchall()
        begun: dict[str, int] = dict(owner.execute("SELECT view, number FROM projections.rebuilds").fetchall())
    for view in VIEWS:
        events = [event for event in history if getattr(event.data, "view", None) == view]
        check_answers(events)
        became = what_became([schema for name, schema in renamed if name == view], first[view])
        told = [event.type for event in events if event.type in ("ViewSwitched", "ViewRolledBack")]
        assert told == became, "what is told of a view is what happened to it, in that order"
        asked = [event for event in events if event.type == "RebuildRequested"]
        assert begun.get(view, 0) == len(asked), "each rebuild that was asked for was begun once"


def check_answers(events: list[Event[Fact]]) -> None:
    """Each request has one answer, which comes after it, and by the system."""
    answers: dict[int, list[Event[Fact]]] = defaultdict(list)
    for event in events:
        if hasattr(event.data, "asked_by"):
            answers[event.data.request].append(event)  # type: ignore[attr-defined]
    asked = {event.stream_version: event for event in events if event.type in ASKED}
    assert sorted(answers) == sorted(asked)
    for number, (answer, *more) in answers.items():
        assert not more, "one answer"
        assert answer.stream_version > number
        assert (answer.actor.sub, answer.causation_id) == ("system", asked[number].event_id)
        assert answer.data.asked_by.sub == asked[number].actor.sub  # type: ignore[attr-defined]
        assert answer.type != "ViewVerified" or answer.data.holds  # type: ignore[attr-defined]
        if answer.type == "ViewRequestFailed":
            assert "nothing to roll" in answer.data.because  # type: ignore[attr-defined]
        if answer.type == "RebuildCancelled":
            assert any(e.type == "RebuildCancelRequested" and e.data.request == number for e in events)  # type: ignore[attr-defined]


def what_became(schemas: list[int], first: int) -> list[str]:
    """Of the schemas that were one after another the view: which was new, and which had been it before."""
    seen = {first}
    became = []
    for schema in schemas:
        became.append("ViewRolledBack" if schema in seen else "ViewSwitched")
        seen.add(schema)
    return became
