"""Who waits is woken: by this process at once, by another as soon as it announces, and by nothing else."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from ledger.commands import AnnotateSession, ClaimTasks, OpenSession, Record, SubmitTask
from ledger.committer import Committer
from ledger.postgres import Connection
from ledger.values import Actor
from tests.conftest import Database

SOON_SECONDS = 5
NEVER_SECONDS = 0.3


@pytest.fixture
async def listening(committer: Committer, database: Database) -> AsyncIterator[Committer]:
    """The committer, which hears what others announce."""
    job = asyncio.create_task(committer.watch.listen(database.api))
    async with await Connection.connect(database.owner, autocommit=True) as connection, asyncio.timeout(10):
        query = "SELECT count(*) FROM pg_stat_activity WHERE query = 'LISTEN ledger' AND datname = current_database()"
        while await (await connection.execute(query)).fetchone() != (1,):  # noqa: ASYNC110  (it tells nobody)
            await asyncio.sleep(0.01)
    yield committer
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job


async def woken(future: asyncio.Future[None], within_seconds: float = SOON_SECONDS) -> bool:
    await asyncio.wait([future], timeout=within_seconds)
    return future.done()


async def nothing_more(listening: Committer, another: Committer, agent: Actor) -> None:
    """Return when nothing that was appended until now can wake anybody any more."""
    marker = (await another.submit("demo", OpenSession(agent_role="marker"), agent)).target
    assert marker
    heard = listening.watch.changed(marker)
    await another.submit("demo", AnnotateSession(session_id=marker, text="x"), agent)
    assert await woken(heard)


async def test_who_waits_for_a_stream_is_woken_by_what_is_appended_to_it_and_to_no_other(
    committer: Committer, another: Committer, listening: Committer, agent: Actor
) -> None:
    for process in (committer, another):
        one, other = [await process.submit("demo", OpenSession(agent_role="a"), agent) for _ in range(2)]
        assert one.target
        assert other.target
        await nothing_more(listening, another, agent)
        waits, waits_too = listening.watch.changed(one.target), listening.watch.changed(other.target)
        await process.submit("demo", AnnotateSession(session_id=one.target, text="x"), agent)
        assert await woken(waits)
        assert not await woken(waits_too, NEVER_SECONDS)


async def test_who_waits_for_work_is_woken_where_there_is_some(
    committer: Committer, another: Committer, listening: Committer, agent: Actor
) -> None:
    await nothing_more(listening, another, agent)
    ledger = await committer.ledger("demo")
    assert ledger is not None
    for process in (committer, another):
        waits = listening.watch.changed(ledger.ledger_id)
        await process.submit("demo", SubmitTask(kind="mail.send"), agent)
        assert await woken(waits)
        await nothing_more(listening, another, agent)
        waits = listening.watch.changed(ledger.ledger_id)
        await process.submit("demo", ClaimTasks(worker="w-1", kinds=("mail.send",)), agent)
        await process.submit("demo", Record(kind="note"), agent)
        assert not await woken(waits, NEVER_SECONDS)


async def test_all_who_wait_for_one_thing_are_woken_and_each_once(committer: Committer, agent: Actor) -> None:
    opened = await committer.submit("demo", OpenSession(agent_role="a"), agent)
    assert opened.target
    waits = [committer.watch.changed(opened.target) for _ in range(3)]
    assert len(set(map(id, waits))) == 1
    await committer.submit("demo", AnnotateSession(session_id=opened.target, text="x"), agent)
    assert await woken(waits[0])
    assert not committer.watch.changed(opened.target).done()


async def test_listening_goes_on_after_its_connection_was_lost(
    committer: Committer, another: Committer, listening: Committer, agent: Actor, database: Database
) -> None:
    opened = await another.submit("demo", OpenSession(agent_role="a"), agent)
    assert opened.target
    async with await Connection.connect(database.owner, autocommit=True) as connection:
        await connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query = 'LISTEN ledger'")
    waits = listening.watch.changed(opened.target)
    async with asyncio.timeout(20):
        while not waits.done():
            await another.submit("demo", AnnotateSession(session_id=opened.target, text="x"), agent)
            await asyncio.wait([waits], timeout=0.2)
