"""Two processes on one ledger, racing for what only one may have: a task, a lease, a vote in time, one use."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from ledger import store
from ledger.commands import (
    BeginUse,
    CancelTask,
    CastVote,
    ClaimTasks,
    Command,
    CompleteTask,
    OpenSession,
    RequestApproval,
    RevokeApproval,
    Start,
    SubmitTask,
    SuspendTask,
)
from ledger.committer import Committer
from ledger.errors import MunimentError
from ledger.pending import Verdict
from ledger.receipt import Receipt
from ledger.system import ExpireApproval, LoseAttempt
from ledger.task import Task
from ledger.values import SYSTEM, Action, Actor, Quorum, moment, stamp
from tests.check import check_ledger, of_type, states
from tests.conftest import Database

ACTION = Action(tool="refund", arguments={"invoice": 9})

pytestmark = pytest.mark.usefixtures("database")


def actor(sub: str, *roles: str, kind: Any = "agent") -> Actor:
    return Actor(issuer="https://id.example", sub=sub, kind=kind, assurance="authenticated", roles=roles or ("agent",))


ANA, BEN = (actor(sub, "approver", kind="human") for sub in ("ana", "ben"))


async def give(committer: Committer, command: Command, who: Actor) -> Verdict:
    try:
        return await committer.submit("demo", command, who)
    except MunimentError as error:
        return error


async def given(committer: Committer, command: Command, who: Actor) -> Receipt:
    verdict = await give(committer, command, who)
    assert isinstance(verdict, Receipt)
    assert verdict.refusal is None, verdict.refusal
    return verdict


def said(verdict: Verdict) -> str:
    """`done`, or the code of the refusal."""
    refusal = verdict.refusal if isinstance(verdict, Receipt) else verdict
    return refusal.code if refusal else "done"


async def race(*runners: tuple[Committer, Command, Actor]) -> list[str]:
    """What becomes of commands given at the same time, whoever is taken first."""
    order = random.sample(range(len(runners)), len(runners))
    verdicts = await asyncio.gather(*(give(*runners[n]) for n in order))
    return [said(verdict) for _, verdict in sorted(zip(order, verdicts, strict=True), key=lambda pair: pair[0])]


async def approved(committer: Committer, who: Actor, **fields: Any) -> UUID:
    """An approval that may be used."""
    asked = (await given(committer, RequestApproval(action=ACTION, **fields), who)).state
    vote = CastVote(approval_id=asked.approval_id, verdict="approve", digest_seen=asked.request_digest)
    assert (await given(committer, vote, ANA)).state.state == "approved"
    return UUID(str(asked.approval_id))


async def until(time: datetime) -> None:
    """Return when it is `time`, or soon after."""
    await asyncio.sleep(max(0.0, (time - datetime.now(UTC)).total_seconds()))


# Claims


async def test_many_workers_of_two_processes_get_every_task_once(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    kinds = ("mail.send", "pay.out", "order.ship")
    for process, kind in zip((committer, another, committer), kinds, strict=True):
        commands = [SubmitTask(kind=kind, priority=n % 10) for n in range(100)]
        assert {said(verdict) for verdict in await process.submit_all("demo", commands, agent)} == {"done"}
    met: Counter[UUID] = Counter()

    async def work(process: Committer, name: str, n: int) -> None:
        empty = 0
        while empty < 2:
            wanted = tuple(random.sample(kinds, random.randint(1, 3)))
            verdict = await given(process, ClaimTasks(worker=name, kinds=wanted, n=n), agent)
            claimed: Sequence[Task] = verdict.state
            empty = 0 if claimed else empty + (len(wanted) == 3)
            for task in claimed:
                met[task.task_id] += 1
                assert task.lease_id is not None
                done = CompleteTask(task_id=task.task_id, lease_id=task.lease_id, result=name)
                assert (await given(process, done, agent)).state.state == "completed"

    workers = [work(process, f"w-{n}", 1 + n % 4) for n in range(10) for process in (committer, another)]
    await asyncio.gather(*workers)
    assert len(met) == 300
    assert set(met.values()) == {1}
    history = check_ledger(database.owner)["demo"]
    assert len(of_type(history, "TaskClaimed")) == len(of_type(history, "TaskCompleted")) == 300


async def test_a_claim_that_is_asked_again_is_answered_again_by_either_process(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    for _ in range(5):
        await given(committer, SubmitTask(kind="mail.send"), agent)

    def claim() -> ClaimTasks:
        return ClaimTasks(worker="w-1", kinds=("mail.send",), n=3, command_id="claim-1")

    first = await given(committer, claim(), agent)
    for task in first.state[:1]:  # what has become of it since does not change the answer
        await given(another, CompleteTask(task_id=task.task_id, lease_id=task.lease_id), agent)
    for process in (committer, another):
        again = await given(process, claim(), agent)
        assert again.replayed
        assert again.state == first.state
    assert len(of_type(check_ledger(database.owner)["demo"], "TaskClaimed")) == 3


async def test_a_claim_that_found_nothing_is_not_remembered(
    committer: Committer, agent: Actor, database: Database
) -> None:
    def claim() -> ClaimTasks:
        return ClaimTasks(worker="w-1", kinds=("mail.send",), command_id="claim-1")

    assert (await given(committer, claim(), agent)).state == ()
    await given(committer, SubmitTask(kind="mail.send"), agent)
    assert len((await given(committer, claim(), agent)).state) == 1
    check_ledger(database.owner)


async def test_the_reaper_and_a_heartbeat_never_both_win(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    """Leases that end while they are renewed: what the heartbeat was told holds."""
    tasks = []
    for _ in range(40):
        submitted = await given(
            committer, SubmitTask(kind="a", start=Start(worker="w-1", lease_seconds=1), max_attempts=1), agent
        )
        tasks.append(submitted.state)
    ledger = await committer.ledger("demo")
    assert ledger is not None

    async def beat(task: Task) -> datetime | None:
        assert task.lease_id is not None
        ends_at = datetime.now(UTC) + timedelta(seconds=30)
        async with committer.pool.connection() as connection:
            return await store.heartbeat(
                connection, ledger.ledger_id, task.task_id, task.lease_id, agent.principal, ends_at
            )

    def lose(task: Task) -> LoseAttempt:
        assert task.lease_id is not None
        assert task.lease_until is not None
        return LoseAttempt(task_id=task.task_id, lease_id=task.lease_id, deadline=task.lease_until)

    last = moment(tasks[-1].lease_until)
    renewed: dict[UUID, bool] = {}

    async def contend(task: Task) -> None:
        await until(last + timedelta(seconds=random.uniform(0, 0.03)))
        heard, _ = await asyncio.gather(beat(task), give(another, lose(task), SYSTEM))
        renewed[task.task_id] = heard is not None

    await asyncio.gather(*map(contend, tasks))
    history = check_ledger(database.owner)["demo"]
    lost = {event.stream_id for event in of_type(history, "AttemptLost")}
    assert all(renewed[task.task_id] != (task.task_id in lost) for task in tasks)
    for task in tasks:
        result = await give(committer, CompleteTask(task_id=task.task_id, lease_id=task.lease_id), agent)
        assert said(result) == ("done" if renewed[task.task_id] else "lease_lost")
    check_ledger(database.owner)


async def test_a_lost_attempt_is_offered_to_another_and_what_comes_late_is_kept_without_effect(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    task = (await given(committer, SubmitTask(kind="a", start=Start(worker="slow", lease_seconds=1)), agent)).state
    lose = LoseAttempt(task_id=task.task_id, lease_id=task.lease_id, deadline=task.lease_until)
    await until(moment(task.lease_until))
    assert said(await give(another, lose, SYSTEM)) == "done"
    verdicts = await race(
        (committer, CompleteTask(task_id=task.task_id, lease_id=task.lease_id, result="late"), agent),
        (another, CompleteTask(task_id=task.task_id, lease_id=task.lease_id, result="later"), agent),
    )
    assert verdicts == ["lease_lost", "lease_lost"]
    history = check_ledger(database.owner)["demo"]
    assert sorted(event.data.result for event in of_type(history, "LateResultRefused")) == ["late", "later"]
    assert of_type(history, "CommandRefused") == []


# Decisions


async def test_a_vote_and_the_expiry_of_its_request_never_both_count(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    outcomes: Counter[str] = Counter()

    async def one() -> None:
        expires_at = datetime.now(UTC) + timedelta(seconds=1)
        asked = (await given(committer, RequestApproval(action=ACTION, expires_at=expires_at), agent)).state
        await until(expires_at + timedelta(seconds=random.uniform(-0.04, 0.04)))
        vote = CastVote(approval_id=asked.approval_id, verdict="approve", digest_seen=asked.request_digest)
        expire = ExpireApproval(approval_id=asked.approval_id, deadline=stamp(expires_at))
        voted, _ = await race((committer, vote, ANA), (another, expire, SYSTEM))
        outcomes[voted] += 1

    while len(outcomes) < 2:  # until the race was one
        await asyncio.gather(*(one() for _ in range(60)))
    assert set(outcomes) == {"done", "approval_expired"}
    history = check_ledger(database.owner)["demo"]
    for stream in _by_stream(history).values():
        types = [event.type for event in stream]
        assert not {"ApprovalGranted", "ApprovalExpired"} <= set(types)
        if "VoteCast" in types:
            vote, request = stream[types.index("VoteCast")], stream[0]
            assert vote.recorded_at < request.data.expires_at


def _by_stream(history: Any) -> dict[UUID, list[Any]]:
    streams: dict[UUID, list[Any]] = {}
    for _, event in history:
        if event.stream_type == "approval":
            streams.setdefault(event.stream_id, []).append(event)
    return streams


async def test_what_is_revoked_is_not_used_and_what_is_used_is_not_revoked(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    winners: Counter[str] = Counter()
    for _ in range(60):
        approval_id = await approved(committer, agent)
        use = BeginUse(approval_id=approval_id, execution_id=uuid4(), action=ACTION)
        revoke = RevokeApproval(approval_id=approval_id, reason="wrong account")
        processes = random.sample([committer, another], 2)
        verdicts = await race((processes[0], use, agent), (processes[1], revoke, BEN))
        assert verdicts in (["done", "execution_started"], ["invalid_transition", "done"])
        winners[verdicts[0]] += 1
    assert len(winners) == 2, "the race was one"
    history = check_ledger(database.owner)["demo"]
    assert len(of_type(history, "CommandRefused")) == 60


async def test_one_use_is_begun_once_whoever_asks_where(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    for _ in range(20):
        approval_id = await approved(committer, agent)
        uses = [BeginUse(approval_id=approval_id, execution_id=uuid4(), action=ACTION) for _ in range(4)]
        verdicts = await race(
            *((process, use, agent) for process, use in zip((committer, another) * 2, uses, strict=True))
        )
        assert Counter(verdicts) == {"done": 1, "execution_started": 3}
    history = check_ledger(database.owner)["demo"]
    assert len(of_type(history, "ApprovalUseBegun")) == 20


async def test_one_person_counts_once_whatever_process_hears_the_vote(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    for _ in range(20):
        request = RequestApproval(action=ACTION, quorum=Quorum(approve=2))
        asked = (await given(committer, request, agent)).state

        def vote(verdict: Any = "approve") -> CastVote:
            seen = asked.request_digest  # noqa: B023  (it is called before the next round)
            return CastVote(approval_id=asked.approval_id, verdict=verdict, digest_seen=seen)  # noqa: B023

        assert await race((committer, vote(), ANA), (another, vote(), ANA), (another, vote(), ANA)) == ["done"] * 3
        assert said(await give(committer, vote("deny"), ANA)) == "already_voted"
        assert (await given(another, vote(), BEN)).state.state == "approved"
    history = check_ledger(database.owner)["demo"]
    assert len(of_type(history, "VoteCast")) == 40


async def test_a_decision_and_a_suspension_that_cross_leave_no_task_waiting(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    """The worker says that it waits at the moment at which somebody decides: it goes on, whichever came first."""
    for _ in range(40):
        session = (await given(committer, OpenSession(agent_role="finance"), agent)).state
        submit = SubmitTask(kind="a", session_id=session.session_id, start=Start(worker="w-1"))
        task = (await given(committer, submit, agent)).state
        request = RequestApproval(action=ACTION, task_id=task.task_id)
        asked = (await given(committer, request, agent)).state
        vote = CastVote(approval_id=asked.approval_id, verdict="deny", digest_seen=asked.request_digest)
        suspend = SuspendTask(task_id=task.task_id, lease_id=task.lease_id, approval_id=asked.approval_id)
        processes = random.sample([committer, another], 2)
        assert await race((processes[0], suspend, agent), (processes[1], vote, ANA)) == ["done", "done"]
        claimed = await given(processes[0], ClaimTasks(worker="w-2", task_id=task.task_id), agent)
        (again,) = claimed.state
        assert (again.decision, again.attempt) == ("denied", 1)
    check_ledger(database.owner)


async def test_a_cancelled_task_and_its_result_never_both_count(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    winners: Counter[str] = Counter()
    for _ in range(40):
        task = (await given(committer, SubmitTask(kind="a", start=Start(worker="w-1")), agent)).state
        complete = CompleteTask(task_id=task.task_id, lease_id=task.lease_id, result="x" * 10)
        processes = random.sample([committer, another], 2)
        verdicts = await race((processes[0], complete, agent), (processes[1], CancelTask(task_id=task.task_id), agent))
        assert verdicts in (["done", "invalid_transition"], ["lease_lost", "done"])
        winners[verdicts[0]] += 1
    assert len(winners) == 2, "the race was one"
    ended = Counter(state.state for state in states(check_ledger(database.owner)["demo"]).values())
    assert ended == {"completed": winners["done"], "cancelled": winners["lease_lost"]}
