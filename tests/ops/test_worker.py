"""Workers as processes: one runner a job, another when it dies, and everything that is due done once."""

import asyncio
import copy
import os
import random
import re
import signal
import sys
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import IO, Any

import psycopg
import pytest
from psycopg.sql import SQL, Identifier
from uuid_utils.compat import uuid7

from ledger.commands import (
    BeginUse,
    CastVote,
    Command,
    FailTask,
    OpenSession,
    Record,
    RequestApproval,
    Start,
    SubmitTask,
)
from ledger.committer import Committer
from ledger.embedded import EmbeddedServer
from ledger.postgres import Pool, open_pool
from ledger.receipt import Receipt
from ledger.session import Session
from ledger.system import ExpireSession, Overdue
from ledger.values import SYSTEM, Action, Actor
from ledger.vault import Vault
from ops.lease import LEASE_SECONDS, run_alone
from ops.sweeper import overdue, sweep
from ops.worker import work
from projections import VIEWS, Projector, audit, caught_up, sessions
from tests.api.conftest import settings_of
from tests.check import check_ledger, of_type, states
from tests.conftest import Database, database_of

AGENT = Actor(issuer="https://id.example", sub="a", kind="agent", assurance="authenticated", roles=("agent",))

JOBS = ("projector", "sweeper", "rebuilder", "follower", "publisher", "verifier", "eraser")


@asynccontextmanager
async def worker(url: str, home: Path, log: IO[bytes] | None = None, **settings: str) -> AsyncIterator[Process]:
    """A worker process; killed when the block ends, if it still runs."""
    environment = {
        "PATH": os.environ["PATH"],
        "MUNIMENT_MODE": "development",
        "MUNIMENT_HOME": str(home),
        "DATABASE_URL": url,
        **settings,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ops.cli", "worker"), env=environment, stderr=log or asyncio.subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Ask again and again until it is true; fails when it never is."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not (answer := await condition()):
        assert asyncio.get_running_loop().time() < deadline, "it never came"
        await asyncio.sleep(0.02)
    return answer


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    async with open_pool(database.worker, connections_max=6) as pool:
        yield pool


@asynccontextmanager
async def committing(pool: Pool, home: Path) -> AsyncIterator[Committer]:
    committer = Committer(pool, Vault(home / "keys", pool, create_keys=True), create_ledgers=True)
    try:
        yield committer
    finally:
        await committer.close()


@pytest.fixture
async def committer(pool: Pool, tmp_path: Path) -> AsyncIterator[Committer]:
    async with committing(pool, tmp_path) as committer:
        yield committer


async def holders(pool: Pool) -> dict[str, str]:
    """By job: the process id of who holds its lease now."""
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT job, holder FROM projections.leases WHERE until > clock_timestamp()")
        return {job: holder.split(":")[1] for job, holder in await cursor.fetchall()}


async def test_of_two_workers_one_runs_each_job_and_the_other_takes_over_when_it_is_killed(
    database: Database, pool: Pool, committer: Committer, tmp_path: Path
) -> None:
    await committer.submit("demo", OpenSession(agent_role="x"), AGENT)
    ledger = await committer.ledger("demo")
    assert ledger is not None
    async with worker(database.worker, tmp_path) as first:
        await until(lambda: _is(holders(pool), dict.fromkeys(JOBS, str(first.pid))))
        async with worker(database.worker, tmp_path) as second:
            await caught_up(pool, "audit", ledger.ledger_id, min_position=1, timeout_seconds=20)
            first.send_signal(signal.SIGKILL)
            killed_at = asyncio.get_running_loop().time()
            await until(lambda: _is(holders(pool), dict.fromkeys(JOBS, str(second.pid))))
            assert asyncio.get_running_loop().time() - killed_at < LEASE_SECONDS + 4
            await committer.submit("demo", OpenSession(agent_role="y"), AGENT)
            await caught_up(pool, "audit", ledger.ledger_id, min_position=2, timeout_seconds=20)
            second.send_signal(signal.SIGTERM)
            assert await second.wait() == 0
    assert await holders(pool) == {}, "a worker that is asked to stop leaves its leases to the next at once"


async def _is(answer: Any, expected: Any) -> bool:
    return bool(await answer == expected)


async def test_a_stalled_holder_loses_the_lease_and_its_work_is_stopped(pool: Pool) -> None:
    began: list[str] = []
    ended: list[str] = []

    async def work() -> None:
        began.append("x")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("x")

    holding = asyncio.create_task(run_alone(pool, "job", work))
    waiting = asyncio.create_task(run_alone(pool, "job", work))

    await until(lambda: _value(len(began) == 1))
    async with pool.connection() as connection:
        await connection.execute("UPDATE projections.leases SET fence = fence + 1, until = '-infinity'")
    await until(lambda: _value((len(began), len(ended)) == (2, 1)))
    for task in (holding, waiting):
        task.cancel()
    await asyncio.wait([holding, waiting])
    assert len(began) == len(ended)


async def _value(value: Any) -> Any:
    return value


async def test_what_a_job_raises_ends_it_and_leaves_the_lease(pool: Pool) -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run_alone(pool, "job", fail)
    assert await holders(pool) == {}


async def test_a_job_that_cannot_be_stopped_ends_the_worker(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.lease.STOP_SECONDS_MAX", 0.1)
    end = asyncio.Event()

    async def deaf() -> None:
        with suppress(asyncio.CancelledError):
            await end.wait()
        await end.wait()

    async def taken_away() -> bool:
        async with pool.connection() as connection:
            lost = await connection.execute("UPDATE projections.leases SET fence = fence + 1 WHERE job = 'job'")
            return lost.rowcount == 1

    running = asyncio.create_task(run_alone(pool, "job", deaf))
    await until(taken_away)
    with pytest.raises(AssertionError, match="job goes on although it lost the lease"):
        await running
    end.set()


@contextmanager
def only_reading(database: Database) -> Iterator[None]:
    """Meanwhile whoever connects finds a server that only reads, as after a failover; no worker stays connected."""
    name = Identifier(database.name)
    leave = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND usename = 'muniment_worker'"
    with psycopg.connect(database.owner, autocommit=True) as connection:
        connection.execute(SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(name))
        connection.execute(leave, [database.name])
        yield
        connection.execute(SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(name))
        connection.execute(leave, [database.name])


async def test_a_server_that_only_reads_for_a_while_ends_no_job(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def met(what: str) -> bool:
        assert not working.done(), "a job has ended"
        return re.search(rf"the {what} of ledger \S+ cannot be written: cannot execute", caplog.text) is not None

    async def caught_up_again() -> bool:
        async with writing.connection() as connection:
            published = (
                "SELECT e.size = l.published_size FROM ledger.ledgers AS e JOIN ledger.logs AS l USING (ledger_id)"
            )
            cursor = await connection.execute(published)
            return await cursor.fetchall() == [(True,)]

    stop, settings = asyncio.Event(), settings_of(database, tmp_path, DATABASE_URL=database.worker)
    working = asyncio.create_task(work(settings, stop))
    # Somebody writes all the same, so that there is something to do.
    async with (
        open_pool(f"{database.api}&options=-c%20default_transaction_read_only%3Doff", 4) as writing,
        committing(writing, tmp_path) as committer,
    ):
        await committer.submit("demo", OpenSession(agent_role="x"), AGENT)
        await until(caught_up_again)
        with only_reading(database):
            await committer.submit("demo", OpenSession(agent_role="y"), AGENT)
            for job in ("views", "log"):
                await until(partial(met, job))
        await until(caught_up_again)
        ledger = await committer.ledger("demo")
        assert ledger is not None
        await caught_up(writing, "audit", ledger.ledger_id, min_position=2, timeout_seconds=20)
    stop.set()
    await working


NUMBER = 12
ANA = Actor(issuer="https://id.example", sub="ana", kind="human", assurance="authenticated", roles=("approver",))


def _soon(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


async def make_everything_due(committer: Committer) -> dict[str, int]:
    """Of each kind of time some that have run out 2 seconds from now, and some that have not; answers with how many
    events of each type the end of those times is."""
    soon = _soon(2)
    action = Action(tool="refund")
    opened = [OpenSession(agent_role="x", expires_at=soon) for _ in range(NUMBER)]
    await committer.submit_all("demo", [*opened, OpenSession(agent_role="later")], AGENT)
    submitted: list[Command] = [
        *(SubmitTask(kind="lost", backoff_seconds=0, start=Start(worker="w", lease_seconds=1)) for _ in range(NUMBER)),
        *(SubmitTask(kind="late", deadline_at=soon) for _ in range(NUMBER)),
        SubmitTask(kind="later"),
    ]
    await committer.submit_all("demo", submitted, AGENT)
    fails = [SubmitTask(kind="failed", backoff_seconds=1, start=Start(worker="w")) for _ in range(NUMBER)]
    tasks = [receipt.state for receipt in await taken(committer, fails)]
    await taken(committer, [FailTask(task_id=task.task_id, lease_id=task.lease_id) for task in tasks])
    asks = [RequestApproval(action=action, expires_at=soon) for _ in range(NUMBER)]
    grants = [RequestApproval(action=action, valid_for_seconds=1) for _ in range(NUMBER)]
    uses = [RequestApproval(action=action, outcome_within_seconds=1) for _ in range(NUMBER)]
    await taken(committer, [*asks, RequestApproval(action=action)])
    asked = [receipt.state for receipt in await taken(committer, [*grants, *uses])]
    votes = [CastVote(approval_id=a.approval_id, verdict="approve", digest_seen=a.request_digest) for a in asked]
    await taken(committer, votes, ANA)
    begun = [BeginUse(approval_id=a.approval_id, execution_id=uuid7(), action=action) for a in asked[NUMBER:]]
    await taken(committer, begun)
    return {
        "SessionExpired": NUMBER,
        "AttemptLost": NUMBER,
        "TaskQueued": 2 * NUMBER,  # the failed ones, and the lost ones a moment later
        "TaskExpired": NUMBER,
        "ApprovalExpired": NUMBER,
        "ApprovalLapsed": NUMBER,
        "ApprovalOutcomeUnknown": NUMBER,
    }


async def taken(committer: Committer, commands: Sequence[Command], by: Actor = AGENT) -> list[Receipt]:
    receipts = [receipt for receipt in await committer.submit_all("demo", commands, by) if isinstance(receipt, Receipt)]
    assert len(receipts) == len(commands)
    assert {receipt.refusal for receipt in receipts} == {None}
    return receipts


async def ended(pool: Pool, expected: dict[str, int]) -> bool:
    """Whether so many events of these types are there."""
    async with pool.connection() as connection:
        cursor = await connection.execute(
            "SELECT type, count(*) FROM ledger.events WHERE type = ANY(%s) GROUP BY type", [list(expected)]
        )
        return dict(await cursor.fetchall()) == expected


async def test_what_is_due_is_done_by_itself_and_once(
    database: Database, pool: Pool, committer: Committer, tmp_path: Path
) -> None:
    expected = await make_everything_due(committer)
    async with worker(database.worker, tmp_path), worker(database.worker, tmp_path):
        await until(lambda: ended(pool, expected))
        # Once more in its own time: what it does now would be done twice.
        await committer.submit("demo", OpenSession(agent_role="x", expires_at=_soon(0.2)), AGENT)
        await until(lambda: ended(pool, expected | {"SessionExpired": NUMBER + 1}))
    history = check_ledger(database.owner)["demo"]
    due = [event for event_type in expected for event in of_type(history, event_type)]
    assert {event.actor for event in due} == {SYSTEM}
    left: dict[str, Counter[str]] = {type(state).__name__: Counter() for state in states(history).values()}
    for state in states(history).values():
        left[type(state).__name__][state.state] += 1
    assert left == {
        "Session": {"expired": NUMBER + 1, "pending": 1},
        "Task": {"queued": 2 * NUMBER + 1, "expired": NUMBER},
        "Approval": {"expired": NUMBER, "lapsed": NUMBER, "executed": NUMBER, "pending": 1},
    }


async def test_sweepers_in_any_number_of_processes_do_what_is_due_once(
    database: Database, pool: Pool, committer: Committer, tmp_path: Path
) -> None:
    expected = await make_everything_due(committer)
    ledger = await committer.ledger("demo")
    assert ledger is not None
    async with committing(pool, tmp_path) as another, pool.connection() as connection:
        projecting = asyncio.create_task(Projector(pool, VIEWS, listen_to=database.worker).run())

        async def found() -> dict[str, int]:
            return Counter(type(one.command).__name__ for one in await overdue(connection))

        late = {"ExpireTask", "LoseAttempt", "QueueTask", "ExpireSession"}
        late |= {"ExpireApproval", "LapseApproval", "MissOutcome"}
        await until(lambda: _is(found(), dict.fromkeys(late, NUMBER)))
        due = await overdue(connection)
        answers = await asyncio.gather(*(sweep(one, copy.deepcopy(due)) for one in (committer, another) * 3))
        assert answers == [{}] * 6
        assert await ended(pool, expected | {"TaskQueued": NUMBER})
        await until(lambda: _is(found(), {"QueueTask": NUMBER}))  # those whose lease was lost
        again = await overdue(connection)
        assert await sweep(another, [*copy.deepcopy(due), *again]) == {}
        assert await ended(pool, expected)
        await until(lambda: _is(found(), {}))
        projecting.cancel()
        await asyncio.wait([projecting])
    check_ledger(database.owner)


async def test_one_project_that_cannot_be_written_does_not_hold_up_the_others(
    database: Database, pool: Pool, committer: Committer, tmp_path: Path
) -> None:
    soon = _soon(2)
    due = []
    for project_id in ("broken", "sound"):
        receipt = await committer.submit(project_id, OpenSession(agent_role="x", expires_at=soon), AGENT)
        assert receipt.target is not None
        command = ExpireSession(session_id=receipt.target, deadline=receipt.state.expires_at)
        due.append(Overdue(project_id, command))
    await asyncio.sleep(2.2)  # it is the time itself that is waited for
    (tmp_path / "keys" / "broken.key").unlink()
    async with committing(pool, tmp_path) as another:
        failures = await sweep(another, due)
    assert list(failures) == ["broken"]
    history = check_ledger(database.owner)
    assert len(of_type(history["sound"], "SessionExpired")) == 1
    assert of_type(history["broken"], "SessionExpired") == []


async def test_a_worker_starts_without_postgresql_and_works_when_it_is_there(
    durable_server: EmbeddedServer, tmp_path: Path
) -> None:
    database = database_of(durable_server, "muniment")
    async with open_pool(database.worker, 4) as pool, committing(pool, tmp_path) as committer:
        await committer.submit("demo", OpenSession(agent_role="x"), AGENT)
        ledger = await committer.ledger("demo")
    assert ledger is not None
    durable_server.stop()
    said = tmp_path / "worker.log"
    with said.open("wb") as log:
        async with worker(database.worker, tmp_path, log):
            await until(lambda: _value(b"waiting for the database" in said.read_bytes()))
            await asyncio.to_thread(durable_server.start)
            async with open_pool(database.worker, 4) as pool:
                await caught_up(pool, "audit", ledger.ledger_id, min_position=1, timeout_seconds=40)


async def test_killing_everything_under_load_leaves_the_views_as_a_replay_makes_them(
    durable_server: EmbeddedServer, tmp_path: Path
) -> None:
    database = database_of(durable_server, "muniment")
    chance = random.Random(7)
    for round_ in range(3):
        async with (
            open_pool(database.worker, 6) as pool,
            committing(pool, tmp_path) as committer,
            worker(database.worker, tmp_path) as process,
        ):
            for _ in range(40):
                session_id = uuid7()
                commands = [
                    OpenSession(agent_role=f"role-{round_}", session_id=session_id),
                    *(Record(kind="note", session_id=session_id, body={"n": n}) for n in range(5)),
                ]
                await committer.submit_all("demo", commands, AGENT)
            ledger = await committer.ledger("demo")
            assert ledger is not None
            await caught_up(pool, "audit", ledger.ledger_id, min_position=240 * round_ + 1, timeout_seconds=40)
            await asyncio.sleep(chance.random() / 20)  # not a wait for anything: the moment of death
            process.kill()
            assert durable_server.pid is not None
            os.kill(durable_server.pid, signal.SIGKILL)
        await asyncio.to_thread(durable_server.start)
    assert ledger is not None
    async with open_pool(database.worker, 6) as pool, worker(database.worker, tmp_path):
        for view in ("audit", "records", "sessions"):
            await caught_up(pool, view, ledger.ledger_id, min_position=720, timeout_seconds=60)
        async with pool.connection() as connection:
            found = await sessions.search(connection, ledger.ledger_id, sessions.Filter(), limit=200)
            replayed = states(check_ledger(database.owner)["demo"])
            assert {s.session_id: s for s in found.sessions} == {
                key: state for key, state in replayed.items() if isinstance(state, Session)
            }
            everything = await audit.search(connection, ledger.ledger_id, audit.Filter(), limit=1000)
            assert everything == list(range(1, 721))
