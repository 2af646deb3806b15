"""Real processes, killed, stopped, raced and lied to: what was acknowledged is there, once, and nothing is torn.

Run as a program this file is one such process (see `main`): it gives random commands of the fixed mix and
writes each answer to its standard output the moment it has it, so that whoever killed it can look for them.
"""

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
import psycopg
import pytest
from msgspec import Struct, structs
from uuid_utils.compat import uuid7

from ledger import store
from ledger.commands import AnnotateSession, ChangeSession, Command, OpenSession, Record
from ledger.committer import Committer
from ledger.embedded import EmbeddedServer
from ledger.entry import Event, Recorded, canonical
from ledger.errors import StoreUnavailable
from ledger.postgres import open_pool
from ledger.receipt import Receipt
from ledger.replay import recall
from ledger.syntax import read_command
from ledger.values import Actor, moment
from ledger.vault import Vault
from tests.check import check_ledger
from tests.conftest import Database, database_of
from tests.ledger.given import Given

SESSIONS = [UUID(f"0199a7c2-0000-7000-8000-{number:012d}") for number in range(8)]
HOME = Path(__file__).parents[2]


class Answer(Struct, frozen=True):
    """What a process was told, as it wrote it down."""

    command_id: str
    principal: str
    command: str
    status: int
    target: UUID | None
    first: int
    count: int
    seen: int
    replayed: bool
    code: str | None = None
    version: int | None = None


# The process


def agent(name: str) -> Actor:
    return Actor(issuer="https://id.example", sub=name, kind="agent", assurance="authenticated", roles=("agent",))


def command_ids(dice: random.Random) -> str:
    """Ids as callers make them up: young, old, of no age, odd, and from the future."""
    odd = f"{dice.choice('~:@+-._')}{dice.random()}"
    ahead = str(UUID(int=(uuid7().int + (3_600_000 << 80))))
    return dice.choice([str(uuid7()), str(uuid7()), str(uuid7()), str(uuid4()), odd, ahead])


def random_command(dice: random.Random) -> Command:
    """The fixed mix (20 % open, 40 % record, 20 % change, 20 % annotate), on few sessions."""
    session_id = dice.choice(SESSIONS)
    new = UUID(int=dice.getrandbits(128), version=4)
    pick = dice.random()
    if pick < 0.2:
        child = OpenSession(agent_role="sub", session_id=new, parent_session_id=session_id)
        return dice.choice(
            [OpenSession(agent_role="finance"), child, OpenSession(agent_role="x", session_id=session_id)]
        )
    if pick < 0.6:
        body = "x" * 70_000 if dice.random() < 0.02 else {"n": dice.random()}
        return Record(kind="tool.called", session_id=session_id, body=body)
    if pick < 0.8:
        change = ChangeSession(session_id=session_id, task_id=str(dice.randint(1, 3)))
        return dice.choice([change, ChangeSession(session_id=session_id, status="active")])
    return AnnotateSession(session_id=session_id, text=str(dice.random()))


async def submit(committer: Committer, asked: bytes, command_id: str, who: Actor) -> Receipt:
    """Ask, with the same id, until there is an answer."""
    while True:
        command = read_command(asked)
        command.command_id = command_id
        try:
            return await committer.submit("demo", command, who)
        except StoreUnavailable:
            await asyncio.sleep(0.01)


def write_down(asked: bytes, who: Actor, receipt: Receipt) -> None:
    """Into the pipe, whole (a line is shorter than PIPE_BUF), before anything else is done."""
    answer = Answer(
        command_id=receipt.command_id,
        principal=who.principal,
        command=asked.decode() if len(asked) < 2048 else "",
        status=receipt.status,
        target=receipt.target,
        first=receipt.first_position,
        count=receipt.event_count,
        seen=receipt.seen_position,
        replayed=receipt.replayed,
        code=receipt.refusal.code if receipt.refusal else None,
        version=receipt.state.version if receipt.state else None,
    )
    os.write(1, msgspec.json.encode(answer) + b"\n")


@asynccontextmanager
async def committing(conninfo: str, keys: Path) -> AsyncIterator[Committer]:
    async with open_pool(conninfo, connections_max=4) as pool:
        committer = Committer(pool, Vault(keys, pool, create_keys=True), create_ledgers=True)
        yield committer
        await committer.close()


async def load(conninfo: str, keys: Path, seed: int, callers: int, commands: int) -> None:
    """`callers` that give `commands` commands between them, or as many as they can until killed."""
    dice = random.Random(seed)
    left = iter(range(commands))

    async def caller(committer: Committer) -> None:
        for _ in left:
            who = agent(f"{seed}-{dice.randint(0, 10**9)}")  # so that nobody has too many refusals
            asked = canonical(random_command(dice))
            write_down(asked, who, await submit(committer, asked, command_ids(dice), who))

    async with committing(conninfo, keys) as committer:
        await asyncio.gather(*(caller(committer) for _ in range(callers)))


def killed_again_and_again(conninfo: str, keys: Path, seed: int, rounds: int) -> None:
    """Children that load until they are killed, each at a moment of its own: forked, to have many."""
    dice = random.Random(seed)
    for number in range(rounds):
        child = os.fork()
        if child == 0:
            asyncio.run(load(conninfo, keys, seed * 1000 + number, 16, 10**9))
        time.sleep(dice.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


async def race(conninfo: str, keys: Path, seed: int, commands: int) -> None:
    """32 callers that each give the same commands, in the same order, under the same ids."""
    dice = random.Random(seed)
    asked = [canonical(random_command(dice)) for _ in range(commands)]

    async def caller(committer: Committer) -> None:
        for number, command in enumerate(asked):
            who = agent("racer")
            write_down(command, who, await submit(committer, command, f"race-{number}", who))

    async with committing(conninfo, keys) as committer:
        await asyncio.gather(*(caller(committer) for _ in range(32)))


def main(task: str, conninfo: str, keys: str, seed: str, size: str) -> None:
    if task == "killed":
        killed_again_and_again(conninfo, Path(keys), int(seed), int(size))
        return
    print("ready", flush=True)
    sys.stdin.readline()  # so that several begin together
    if task == "load":
        asyncio.run(load(conninfo, Path(keys), int(seed), 16, int(size)))
    else:
        asyncio.run(race(conninfo, Path(keys), int(seed), int(size)))


# Its tests


class Running:
    """This file, run as a program by another process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def begin(self) -> None:
        """Return when it has been told to begin."""
        assert self._process.stdout
        assert self._process.stdin
        assert await self._process.stdout.readline() == b"ready\n"
        self._process.stdin.write(b"\n")
        await self._process.stdin.drain()

    async def answers(self) -> list[Answer]:
        """Everything that it wrote down until it ended; a last line cut short was no answer."""
        assert self._process.stdout
        told = await self._process.stdout.read()
        return [msgspec.json.decode(line, type=Answer) for line in told.split(b"\n")[:-1]]


@asynccontextmanager
async def running(task: str, conninfo: str, keys: Path, *, seed: int, size: int) -> AsyncIterator[Running]:
    """One process; it is gone when this is left, whatever happened."""
    arguments = ["-m", "tests.ledger.test_hostile", task, conninfo, str(keys), str(seed), str(size)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=HOME, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield Running(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def open_sessions(conninfo: str, keys: Path) -> None:
    """The sessions that all processes work on."""
    async with committing(conninfo, keys) as committer:
        for session_id in SESSIONS:
            await committer.submit("demo", OpenSession(agent_role="shared", session_id=session_id), agent("first"))


async def assert_all_there(conninfo: str, answers: list[Answer]) -> None:
    """Whoever remembers nothing finds every acknowledged command, with the same answer."""
    assert answers
    async with open_pool(conninfo, connections_max=1) as pool, pool.connection() as connection:
        ledger = await store.find_ledger(connection, "demo")
        assert ledger is not None
        wanted = [(answer.principal, answer.command_id) for answer in answers]
        rows = await store.find_commands(connection, ledger.ledger_id, wanted)
        assert [key for key in wanted if key not in rows] == [], "acknowledged, and not there"
        receipts = await recall(connection, ledger.ledger_id, [rows[key] for key in wanted])
    for answer, found in zip(answers, receipts, strict=True):
        assert (found.status, found.target, found.seen_position) == (answer.status, answer.target, answer.seen)
        assert (found.first_position, found.event_count) == (answer.first, answer.count)
        assert (found.refusal.code if found.refusal else None) == answer.code
        assert (found.state.version if found.state else None) == answer.version


def told_by(event: Event[Any]) -> tuple[Any, ...]:
    """What an event says, but for what is this project's secret: a refusal's stream has its keyed fingerprint."""
    return event.stream_id if event.stream_type != "refusal" else None, event.stream_version, event.data


def assert_verdicts_stand(history: list[Recorded], answers: list[Answer]) -> None:
    """Decided again, alone, on the ledger as it was at that moment, each command comes out the same."""
    ledger = Given()
    ledger.ledger_id = history[0].event.ledger
    for answer in sorted(answers, key=lambda answer: answer.first - 1 if answer.count else answer.seen):
        if not answer.command:
            continue
        decided_at = answer.first - 1 if answer.count else answer.seen
        while ledger.size < decided_at:
            ledger.take(history[ledger.size].event)
        made = [recorded.event for recorded in history[decided_at : decided_at + answer.count]]
        ledger.recorded_at = moment((made[0] if made else history[decided_at - 1].event).recorded_at)
        command = read_command(answer.command.encode())
        command.command_id = answer.command_id
        outcome = ledger.when(command, agent(answer.principal.partition("#")[2]), target=answer.target)
        assert [told_by(event) for event in outcome.events] == [told_by(event) for event in made], answer
        assert outcome.verdict.status == answer.status


async def test_two_processes_on_the_same_streams_give_no_verdict_that_does_not_stand(
    database: Database, tmp_path: Path
) -> None:
    await open_sessions(database.api, tmp_path)
    async with (
        running("load", database.api, tmp_path, seed=1, size=1200) as one,
        running("load", database.api, tmp_path, seed=2, size=1200) as other,
    ):
        await asyncio.gather(one.begin(), other.begin())
        told = await asyncio.gather(one.answers(), other.answers())
    assert [len(answers) for answers in told] == [1200, 1200]
    assert_verdicts_stand(check_ledger(database.owner)["demo"], told[0] + told[1])
    await assert_all_there(database.api, told[0] + told[1])


async def test_what_was_acknowledged_before_a_kill_is_there(database: Database, tmp_path: Path) -> None:
    """Two lines of children on one ledger, each killed at a random moment: twenty kills."""
    await open_sessions(database.api, tmp_path)
    async with (
        running("killed", database.api, tmp_path, seed=3, size=10) as one,
        running("killed", database.api, tmp_path, seed=4, size=10) as other,
    ):
        told = await asyncio.gather(one.answers(), other.answers())
    check_ledger(database.owner)
    await assert_all_there(database.api, told[0] + told[1])


async def test_what_was_acknowledged_before_the_server_was_killed_is_there(
    durable_server: EmbeddedServer, tmp_path: Path
) -> None:
    database = database_of(durable_server, "muniment")
    await open_sessions(database.api, tmp_path)
    dice = random.Random(5)
    async with running("load", database.api, tmp_path, seed=5, size=5000) as process:
        await process.begin()
        answering = asyncio.create_task(process.answers())
        for _ in range(3):
            await asyncio.sleep(dice.uniform(0.1, 0.4))  # no position is waited for: any moment must do
            assert not answering.done()
            assert durable_server.pid is not None
            os.kill(durable_server.pid, signal.SIGKILL)
            await asyncio.to_thread(durable_server.start)
        answers = await answering
    assert len(answers) == 5000, "whoever was told to try again did, and was answered"
    assert_verdicts_stand(check_ledger(database.owner)["demo"], answers)
    await assert_all_there(database.api, answers)


# Stopped


IDLE_SECONDS_MAX = 2


async def test_who_stops_with_the_ledger_locked_stops_nobody_else_for_long(database: Database, tmp_path: Path) -> None:
    await open_sessions(database.api, tmp_path)
    async with await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as connection:
        # As the migrations have it, but for the number: 10 s would be long to wait here.
        role = f"ALTER ROLE muniment_api IN DATABASE {database.name}"
        await connection.execute(f"{role} SET idle_in_transaction_session_timeout = '{IDLE_SECONDS_MAX}s'".encode())
        async with (
            committing(database.api, tmp_path) as committer,
            running("load", f"{database.api}&application_name=victim", tmp_path, seed=6, size=3000) as victim,
        ):

            async def note(command_id: str) -> Receipt:
                return await submit(committer, canonical(Record(kind="note")), command_id, agent("other"))

            await victim.begin()
            answering = asyncio.create_task(victim.answers())
            for number in range(2):
                await stop_with_the_ledger_locked(connection, victim.pid, note)
                began = time.monotonic()
                async with asyncio.timeout(IDLE_SECONDS_MAX + 5):
                    assert (await note(f"held-up-{number}")).status == 201
                assert time.monotonic() - began > IDLE_SECONDS_MAX / 2, "it was held up, so the ledger was locked"
                os.kill(victim.pid, signal.SIGCONT)
            answers = await answering
    assert len(answers) == 3000
    assert_verdicts_stand(check_ledger(database.owner)["demo"], answers)
    await assert_all_there(database.api, answers)


async def stop_with_the_ledger_locked(
    connection: psycopg.AsyncConnection[Any], pid: int, note: Callable[[str], Awaitable[Receipt]]
) -> None:
    """Stop process `pid` at one of the moments at which it has the ledger locked and the server waits for it."""
    query = """SELECT count(*) FROM pg_stat_activity WHERE application_name = 'victim' AND wait_event = 'ClientRead'
               AND backend_xid IS NOT NULL"""
    async with asyncio.timeout(20):
        while True:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.05)  # what it had sent has been done by then
            if await (await connection.execute(query)).fetchone() == (1,):
                return
            os.kill(pid, signal.SIGCONT)
            await note(f"note-{uuid4()}")  # while others append it takes the locked path
            await asyncio.sleep(random.uniform(0, 0.02))


# Raced


async def test_a_command_raced_through_two_processes_has_one_effect_and_one_first_answer(
    database: Database, tmp_path: Path
) -> None:
    """Each process has 32 callers, and all 64 give the same ten commands in the same order."""
    await open_sessions(database.api, tmp_path)
    async with (
        running("race", database.api, tmp_path, seed=7, size=10) as one,
        running("race", database.api, tmp_path, seed=7, size=10) as other,
    ):
        await asyncio.gather(one.begin(), other.begin())
        told = await asyncio.gather(one.answers(), other.answers())
    answers = [*told[0], *told[1]]
    assert len(answers) == 640
    by_id: dict[str, list[Answer]] = {}
    for answer in answers:
        by_id.setdefault(answer.command_id, []).append(answer)
    assert len(by_id) == 10
    for same in by_id.values():
        assert len(same) == 64
        assert sum(not answer.replayed for answer in same) == 1
        assert len({structs.replace(answer, replayed=True) for answer in same}) == 1
    history = check_ledger(database.owner)["demo"]
    assert len(history) == len(SESSIONS) + sum(same[0].count for same in by_id.values())
    await assert_all_there(database.api, answers)


# Lied to


@pytest.mark.parametrize("path", ["optimistic", "exact"])
async def test_a_commit_that_its_standby_has_not_confirmed_is_not_acknowledged(
    durable_server: EmbeddedServer, tmp_path: Path, path: str
) -> None:
    """The standby is not there; then someone cancels the wait for it. The server has committed by then."""
    database = database_of(durable_server, "muniment")
    await open_sessions(database.api, tmp_path)
    async with (
        await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as connection,
        committing(database.api, tmp_path) as committer,
        committing(database.api, tmp_path) as another,
    ):
        await connection.execute("SET synchronous_commit = off")  # this connection waits for no standby
        # Each believes that it is alone on the ledger, and the last one rightly.
        for process in (another, committer) if path == "optimistic" else (committer, another):
            for _ in range(5):
                await process.submit("demo", Record(kind="note"), agent("other"))
        await reconfigure(connection, "SET synchronous_standby_names = 'nobody'")

        def order() -> Record:
            return Record(kind="order", command_id="order~81")

        asking = [asyncio.create_task(committer.submit("demo", order(), agent("a")))]
        for _ in range(3):
            await cancel_the_wait(connection)
            assert not any(task.done() for task in asking), "acknowledged without its standby"
            # Whoever asks meanwhile, here or elsewhere, is told nothing that might not last.
            asking += [
                asyncio.create_task(process.submit("demo", order(), agent("a"))) for process in (committer, another)
            ]
        assert await committed(connection) == 1, "it is there, for those who look at this server alone"
        await reconfigure(connection, "RESET synchronous_standby_names")
        receipts = await asyncio.wait_for(asyncio.gather(*asking), 10)
        assert len({receipt.positions for receipt in receipts}) == 1
        assert sum(not receipt.replayed for receipt in receipts) >= 1
        assert (await another.submit("demo", order(), agent("a"))).positions == receipts[0].positions
        assert await committed(connection) == 1
    check_ledger(database.owner)


async def reconfigure(connection: psycopg.AsyncConnection[Any], change: str) -> None:
    """Return when the server, not only its configuration file, has the change."""
    shown = await (await connection.execute("SHOW synchronous_standby_names")).fetchone()
    await connection.execute(f"ALTER SYSTEM {change}".encode())
    await connection.execute("SELECT pg_reload_conf()")
    async with asyncio.timeout(10):
        while await (await connection.execute("SHOW synchronous_standby_names")).fetchone() == shown:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def cancel_the_wait(connection: psycopg.AsyncConnection[Any]) -> None:
    """Cancel every wait for a standby, once there is one."""
    query = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    async with asyncio.timeout(10):
        while not await (await connection.execute(query)).fetchall():  # noqa: ASYNC110  (it tells nobody)
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # an acknowledgement, were there one, would be here by then


async def committed(connection: psycopg.AsyncConnection[Any]) -> int:
    query = "SELECT count(*) FROM ledger.commands WHERE command_id = 'order~81'"
    row = await (await connection.execute(query)).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("days", [-400, -1, 1, 400, 2_900_000])
async def test_an_id_that_lies_about_its_age_is_known_again_everywhere(
    database: Database, tmp_path: Path, days: int
) -> None:
    """Command ids and stream ids of version 7 from long ago or from the future; every outcome there is."""
    lying = [UUID(int=uuid7().int + ((days * 86_400_000) << 80)) for _ in range(2)]
    who = agent("liar")

    def commands() -> list[Command]:
        return [
            OpenSession(agent_role="finance", session_id=lying[0]),
            ChangeSession(session_id=lying[0], status="active", expected_version=1),
            ChangeSession(session_id=lying[0], status="active"),
            ChangeSession(session_id=lying[0], status="pending"),
            Record(kind="note", record_id=lying[1], session_id=lying[0]),
            Record(kind="note", record_id=lying[1]),
        ]

    async def ask(process: Committer) -> list[tuple[Any, ...]]:
        receipts = []
        for number, command in enumerate(commands()):
            command.command_id = str(UUID(int=lying[0].int + number + 1))
            receipts.append(await process.submit("demo", command, who))
        return [(r.status, r.target, r.positions, r.seen_position, r.state) for r in receipts]

    async with committing(database.api, tmp_path) as one, committing(database.api, tmp_path) as other:
        for process in (other, one):
            for _ in range(5):  # until each believes that it is alone
                await process.submit("demo", Record(kind="note"), who)
        first = await ask(one)
        assert [status for status, *_ in first] == [201, 200, 200, 422, 201, 409]
        assert await ask(other) == first
        for _ in range(5):
            await other.submit("demo", Record(kind="note"), who)
        assert await ask(other) == first
        assert await ask(one) == first
    assert len(check_ledger(database.owner)["demo"]) == 15 + 5


if __name__ == "__main__":
    main(*sys.argv[1:])
