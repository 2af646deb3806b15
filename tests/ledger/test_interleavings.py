"""Anything, in any order, at any time, on two processes at once: whatever comes of it is lawful.

Hypothesis gives waves of commands that run at the same moment on two committers of one ledger, lets time pass and
asks again what was asked before. Afterwards the history is judged by its events alone, not by the rules' own fold.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from ledger.approval import Approval, due
from ledger.commands import (
    BeginUse,
    CancelApproval,
    CancelSession,
    CancelTask,
    CastVote,
    ChangeSession,
    ClaimTasks,
    Command,
    CompleteTask,
    EditApproval,
    FailTask,
    OpenSession,
    PresentApproval,
    RecordOutcome,
    RedriveTask,
    RequestApproval,
    RevokeApproval,
    Start,
    SubmitTask,
    SuspendTask,
    WithdrawApproval,
    WithdrawVote,
)
from ledger.committer import Committer
from ledger.entry import Event, Recorded, canonical
from ledger.errors import MunimentError, RateLimited
from ledger.pending import Verdict
from ledger.postgres import open_pool
from ledger.receipt import Receipt
from ledger.session import Session
from ledger.syntax import read_command
from ledger.system import Due, ExpireTask, LoseAttempt, QueueTask
from ledger.task import Task
from ledger.values import SYSTEM, Action, Actor, Principal, Quorum, Voter
from ledger.vault import Vault
from tests.check import check_ledger
from tests.conftest import Database

FAR = "9999-12-31T23:59:59.999999Z"


def actor(sub: str, *roles: str, kind: Any = "human", **fields: Any) -> Actor:
    return Actor(issuer="https://id.example", sub=sub, kind=kind, assurance="authenticated", roles=roles, **fields)


def principal(who: Actor) -> Principal:
    return Principal(who.issuer, who.sub)


ANA, BEN, EVE = actor("ana", "approver"), actor("ben", "approver", "finance"), actor("eve", "finance")
AGENTS = [
    actor("agent-1", "agent", kind="agent"),
    actor("agent-2", "agent", kind="agent", on_behalf_of=(principal(ANA),)),
]
OPERATOR, IMPORTER = actor("olga", "operator"), actor("ida", "importer", "agent", kind="service")
ACTORS = [*AGENTS, ANA, BEN, EVE, OPERATOR, IMPORTER]
ACTIONS = [Action(tool="refund", arguments={"amount": amount}) for amount in (1, "1", 1.5)]


class Intent(NamedTuple):
    """What somebody is about to do, to whichever things there will be then."""

    what: str
    who: int
    process: int
    one: int
    other: int


class Asked(NamedTuple):
    """A command that was given, and what became of it."""

    command: bytes
    command_id: str
    who: Actor
    verdict: Verdict


def soon(milliseconds: int) -> datetime:
    return datetime.now(UTC) + timedelta(milliseconds=milliseconds)


class Things:
    """What has been met so far, to be named by number."""

    def __init__(self) -> None:
        self.states: dict[UUID, Any] = {}
        self.leases: list[tuple[UUID, UUID]] = []
        self.executions: list[tuple[UUID, UUID]] = []

    def meet(self, state: Any) -> None:
        for one in state if isinstance(state, tuple) else (state,):
            match one:
                case Session():
                    self.states[one.session_id] = one
                case Task():
                    self.states[one.task_id] = one
                    if one.lease_id:
                        self.leases.append((one.task_id, one.lease_id))
                case Approval():
                    self.states[one.approval_id] = one
                    self.executions += [(one.approval_id, e.execution_id) for e in one.executions]

    def pick(self, kind: type[Any], number: int) -> Any:
        of_kind = [state for state in self.states.values() if isinstance(state, kind)]
        return of_kind[number % len(of_kind)] if of_kind else None

    def who(self, intent: Intent) -> Actor:
        """Somebody who may do this, mostly."""
        if intent.who % 8 == 0:
            return ACTORS[intent.who // 8 % len(ACTORS)]
        if intent.what in PEOPLE:
            return (ANA, BEN, EVE)[intent.who % 3]
        if intent.what in ("redrive_task", "cancel"):
            return OPERATOR
        approval, task = self.pick(Approval, intent.one), self.pick(Task, intent.one)
        whose = None
        if intent.what in ("begin_use", "record_outcome", "withdraw"):
            whose = approval and approval.requester
        elif intent.what in ("complete_task", "fail_task", "suspend_task"):
            whose = task and task.holder
        return next((agent for agent in AGENTS if principal(agent) == whose), AGENTS[intent.who % 3 // 2])

    def command(self, intent: Intent) -> Command | None:
        """The command that is meant, if there is what it needs."""
        session, task = self.pick(Session, intent.one), self.pick(Task, intent.one)
        approval = self.pick(Approval, intent.one)
        make = MAKE[intent.what]
        needed = {"session": session, "task": task, "approval": approval}
        for name in make.__annotations__.keys() & needed.keys():
            if needed[name] is None:
                return None
        told = {name: value for name, value in needed.items() if name in make.__annotations__}
        return make(self, intent.other, **told)


def lease(things: Things, number: int, task: Task) -> UUID:
    """Its own lease, mostly; else one of any task's."""
    if task.lease_id and number % 3:
        return task.lease_id
    return things.leases[number % len(things.leases)][1] if things.leases else uuid4()


def open_session(_: Things, n: int) -> Command:
    return OpenSession(agent_role="finance", expires_at=soon(300) if n % 5 == 0 else None)


def change_session(_: Things, n: int, session: Session) -> Command:
    status: Any = ("active", "completed", "failed")[n % 3]
    return ChangeSession(session_id=session.session_id, status=status, force=n % 2 == 0, reason="so")


def cancel_session(_: Things, n: int, session: Session) -> Command:
    return CancelSession(session_id=session.session_id, cascade=n % 2 == 0)


def submit_task(things: Things, n: int) -> Command:
    session = things.pick(Session, n) if n % 2 else None
    return SubmitTask(
        kind=f"kind-{n % 2}",
        session_id=session.session_id if session else None,
        max_attempts=1 + n % 2,
        backoff_seconds=0,
        deadline_at=soon(400) if n % 5 == 0 else None,
        start=Start(worker="w", lease_seconds=1) if n % 3 == 0 else None,
    )


def claim_tasks(_: Things, n: int) -> Command:
    return ClaimTasks(worker="w", kinds=("kind-0", "kind-1")[: 1 + n % 2], n=1 + n % 3, lease_seconds=1)


def claim_task(_: Things, n: int, task: Task) -> Command:
    return ClaimTasks(worker="w", task_id=task.task_id, lease_seconds=1 + n % 2)


def complete_task(things: Things, n: int, task: Task) -> Command:
    return CompleteTask(task_id=task.task_id, lease_id=lease(things, n, task), result=n)


def fail_task(things: Things, n: int, task: Task) -> Command:
    return FailTask(task_id=task.task_id, lease_id=lease(things, n, task), error="no", retryable=n % 4 != 0)


def suspend_task(things: Things, n: int, task: Task) -> Command | None:
    mine = [a for a in things.states.values() if isinstance(a, Approval) and a.task_id == task.task_id]
    approval = mine[n % len(mine)] if mine else things.pick(Approval, n)
    if approval is None:
        return None
    return SuspendTask(task_id=task.task_id, lease_id=lease(things, n + 1, task), approval_id=approval.approval_id)


def cancel_task(_: Things, n: int, task: Task) -> Command:
    return CancelTask(task_id=task.task_id, reason=str(n))


def redrive_task(_: Things, n: int, task: Task) -> Command:
    return RedriveTask(task_id=task.task_id, reason=str(n))


def request_approval(things: Things, n: int) -> Command:
    session, task = things.pick(Session, n), things.pick(Task, n)
    return RequestApproval(
        action=ACTIONS[n % len(ACTIONS)],
        session_id=session.session_id if session and n % 2 else None,
        task_id=task.task_id if task and n % 3 else None,
        call_key="call" if n % 4 else None,
        quorum=Quorum(approve=1 + n % 2, deny=1 + n // 2 % 2, roles=("approver", "finance")),
        expires_at=soon(200) if n % 5 == 0 else None,
        valid_for_seconds=1 if n % 7 == 0 else 900,
        uses=1 + n % 3,
        outcome_within_seconds=1,
        imported=n % 11 == 0,
    )


def cast_vote(_: Things, n: int, approval: Approval) -> Command:
    voter = Voter(issuer="elsewhere", sub=f"v-{n % 3}") if approval.imported and n % 5 else None
    seen = approval.request_digest if n % 7 else approval.action_digest
    verdict: Any = "deny" if n % 4 == 0 else "approve"
    return CastVote(approval_id=approval.approval_id, verdict=verdict, digest_seen=seen, voter=voter)


def begin_use(things: Things, n: int, approval: Approval) -> Command:
    execution_id = things.executions[n % len(things.executions)][1] if things.executions and n % 5 == 0 else uuid4()
    action = ACTIONS[n % len(ACTIONS)] if n % 4 == 0 else read_action(approval)
    return BeginUse(approval_id=approval.approval_id, execution_id=execution_id, action=action)


def read_action(approval: Approval) -> Action:
    return Action(**approval.action)


def record_outcome(things: Things, n: int, approval: Approval) -> Command:
    mine = [execution_id for approval_id, execution_id in things.executions if approval_id == approval.approval_id]
    outcome: Any = ("ok", "failed")[n % 2]
    execution_id = mine[n % len(mine)] if mine else uuid4()
    return RecordOutcome(approval_id=approval.approval_id, execution_id=execution_id, outcome=outcome)


def edit_approval(_: Things, n: int, approval: Approval) -> Command:
    return EditApproval(approval_id=approval.approval_id, action=ACTIONS[n % len(ACTIONS)])


def sweep(_: Things, n: int, task: Task) -> Command | None:
    if task.lease_id and task.lease_until:
        return LoseAttempt(task_id=task.task_id, lease_id=task.lease_id, deadline=task.lease_until)
    if task.deadline_at and n % 2:
        return ExpireTask(task_id=task.task_id, deadline=task.deadline_at)
    return QueueTask(task_id=task.task_id, deadline=task.run_at) if task.state == "retrying" else None


def sweep_approval(_: Things, n: int, approval: Approval) -> Command | None:
    return due(approval, FAR)


def about_approval(kind: type[Any], **fields: Any) -> Callable[..., Command]:
    def make(_: Things, n: int, approval: Approval) -> Command:
        command: Command = kind(approval_id=approval.approval_id, **fields)
        return command

    return make


MAKE: dict[str, Callable[..., Command | None]] = {
    make.__name__: make
    for make in (
        *(open_session, change_session, cancel_session, submit_task, claim_tasks, claim_task, complete_task),
        *(fail_task, suspend_task, cancel_task, redrive_task, request_approval, cast_vote, begin_use),
        *(record_outcome, edit_approval, sweep, sweep_approval),
    )
} | {
    "present": about_approval(PresentApproval, channel="console"),
    "withdraw_vote": about_approval(WithdrawVote),
    "withdraw": about_approval(WithdrawApproval),
    "cancel": about_approval(CancelApproval),
    "revoke": about_approval(RevokeApproval),
}
OFTEN = ["request_approval", "cast_vote", "cast_vote", "cast_vote", "begin_use", "begin_use", "claim_tasks"]
PEOPLE = {"cast_vote", "withdraw_vote", "edit_approval", "present", "revoke"}
RARE = {"cancel_session", "cancel", "withdraw", "cancel_task"}


def intents(seed: int) -> list[Intent]:
    """Up to a dozen things that are about to be done at once."""
    dice = random.Random(seed)
    whats = [*MAKE, *OFTEN, *OFTEN]
    wave = [
        Intent(dice.choice(whats), dice.randrange(1000), dice.randrange(2), dice.randrange(1000), dice.randrange(1000))
        for _ in range(dice.randint(1, 12))
    ]
    return [intent for intent in wave if intent.what not in RARE or intent.other % 4 == 0]  # they end too much


class Processes(NamedTuple):
    """Two committers on one database, and the loop that they run in."""

    runner: asyncio.Runner
    committers: tuple[Committer, Committer]
    database: Database


class Interleaving(RuleBasedStateMachine):
    """One ledger, and whatever may be done to it."""

    processes: Processes

    def __init__(self) -> None:
        super().__init__()
        self.project_id = f"p-{uuid4()}"
        self.things = Things()
        self.asked: list[Asked] = []

    @initialize()
    def begin(self) -> None:
        for what in ("open_session", "submit_task", "request_approval"):
            self.together([Intent(what, n + 1, n % 2, n, 7 * n + 2) for n in range(3)])

    @rule(seed=st.integers(0, 2**64 - 1), then_ms=st.sampled_from([0, 0, 0, 0, 10, 20, 100, 250, 1100]))
    def wave(self, seed: int, then_ms: int) -> None:
        self.together(intents(seed))
        self.processes.runner.run(asyncio.sleep(then_ms / 1000))

    def together(self, wave: list[Intent]) -> None:
        """Give these commands at the same moment."""
        asked = []
        for intent in wave:
            command = self.things.command(intent)
            if command is None:
                continue
            who = SYSTEM if isinstance(command, Due) else self.things.who(intent)
            command_id = command.due_id if isinstance(command, Due) else str(uuid4())
            asked.append((command, command_id, who, intent.process))

        async def give() -> list[Asked]:
            return await asyncio.gather(*(self.give(*one) for one in asked))

        for answered in self.processes.runner.run(give()):
            self.asked.append(answered)
            if isinstance(answered.verdict, Receipt):
                self.things.meet(answered.verdict.state)

    @rule(number=st.integers(0, 1000), process=st.integers(0, 1))
    def ask_again(self, number: int, process: int) -> None:
        """The same id gets the same answer, whichever process it reaches, whatever has happened since."""
        mine = [asked for asked in self.asked if asked.who is not SYSTEM and isinstance(asked.verdict, Receipt)]
        if not mine:
            return
        before = mine[number % len(mine)]
        first = before.verdict
        assert isinstance(first, Receipt)
        command = read_command(before.command)
        again = self.processes.runner.run(self.give(command, before.command_id, before.who, process)).verdict
        if isinstance(command, ClaimTasks) and not first.state:  # it found nothing, and is not remembered
            if isinstance(again, Receipt):
                self.things.meet(again.state)
                self.asked.append(before._replace(verdict=again))
            return
        assert isinstance(again, Receipt)
        assert again.replayed
        assert (again.status, again.target, again.positions) == (first.status, first.target, first.positions)
        assert (again.refusal and again.refusal.code) == (first.refusal and first.refusal.code)
        if not isinstance(command, RequestApproval):  # that one is answered as it is now
            assert again.state == first.state

    async def give(self, command: Command, command_id: str, who: Actor, process: int) -> Asked:
        text = canonical(command)
        command.command_id = command_id
        try:
            verdict: Verdict = await self.processes.committers[process].submit(self.project_id, command, who)
        except MunimentError as error:
            verdict = error
        return Asked(text, command_id, who, verdict)

    def teardown(self) -> None:
        history = check_ledger(self.processes.database.owner).get(self.project_id, [])
        streams: dict[UUID, list[Event[Any]]] = {}
        for _, event in history:
            streams.setdefault(event.stream_id, []).append(event)
        for stream in streams.values():
            if stream[0].stream_type == "approval":
                assert_approved_lawfully(stream)
            elif stream[0].stream_type == "task":
                assert_worked_lawfully(stream)
        assert_refusals_recorded_once(history, self.asked)


# What is lawful, by the events alone


DECIDED = ("Granted", "Denied", "Expired", "Withdrawn", "Cancelled", "Superseded")


def assert_approved_lawfully(stream: list[Event[Any]]) -> None:
    request = stream[0].data
    excluded = {request.requester, *request.on_behalf_of}
    votes: dict[Principal, str] = {}
    decisions: list[str] = []
    begun, open_execution, granted, ended = 0, None, None, False
    for event in stream[1:]:
        name, data = event.type.removeprefix("Approval"), event.data
        if name in ("VoteCast", "VoteWithdrawn", *DECIDED):
            assert not decisions, "nothing is decided twice, nor voted on afterwards"
        match name:
            case "VoteCast":
                voter = Principal(data.voter.issuer, data.voter.sub) if data.voter else principal(event.actor)
                assert voter not in votes, "one vote a person"
                assert voter not in excluded
                assert request.imported or not excluded & {*event.actor.on_behalf_of}
                assert request.imported or (event.actor.kind, event.actor.assurance) == ("human", "authenticated")
                assert request.imported or event.recorded_at < request.expires_at
                votes[voter] = data.verdict
            case "VoteWithdrawn":
                del votes[principal(event.actor)]
            case "Granted":
                granted = data.approved_until
                assert Counter(votes.values())["approve"] >= request.quorum.approve
                assert Counter(votes.values())["deny"] < request.quorum.deny
            case "Denied":
                assert Counter(votes.values())["deny"] >= request.quorum.deny
            case "UseBegun":
                begun += 1
                assert granted is not None
                assert event.recorded_at < granted
                assert not ended
                assert open_execution is None
                assert begun <= request.uses
                assert principal(event.actor) == request.requester
                open_execution = data.execution_id
            case "UseCompleted" | "OutcomeUnknown":
                assert data.execution_id == open_execution
                open_execution = None
            case "Revoked" | "Lapsed":
                assert granted is not None
                assert open_execution is None
                ended = True
        if name in DECIDED:
            decisions.append(name)
    assert not request.imported or begun == 0


def assert_worked_lawfully(stream: list[Event[Any]]) -> None:
    lease_id, holder, ended, attempts = None, None, False, 0
    for event in stream:
        name, data = event.type, event.data
        assert not ended or name in ("LateResultRefused", "TaskRedriven"), f"{name} after the end"
        match name:
            case "TaskClaimed":
                assert lease_id is None, "never two leases at once"
                lease_id, holder = data.lease_id, principal(event.actor)
                attempts = max(attempts, data.attempt)
            case "TaskCompleted" | "AttemptFailed":
                assert (data.lease_id, principal(event.actor)) == (lease_id, holder)
                lease_id, ended = None, name == "TaskCompleted"
            case "AttemptLost":
                assert data.lease_id == lease_id
                assert data.lease_until <= event.recorded_at
                lease_id = None
            case "TaskSuspended":
                assert data.lease_id == lease_id
                lease_id = None
            case "TaskCancelled" | "TaskExpired" | "TaskDeadLettered":
                lease_id, ended = None, True
            case "TaskRedriven":
                ended = False
            case "LateResultRefused":
                assert (data.lease_id, principal(event.actor)) != (lease_id, holder)
    redriven = sum(event.type == "TaskRedriven" for event in stream)
    assert attempts <= stream[0].data.max_attempts * (1 + redriven)


def assert_refusals_recorded_once(history: list[Recorded], asked: list[Asked]) -> None:
    recorded = Counter(
        (event.actor.principal, event.command_id)
        for _, event in history
        if event.type in ("CommandRefused", "LateResultRefused")
    )
    refused = {
        (one.who.principal, one.command_id)
        for one in asked
        if (isinstance(one.verdict, Receipt) and one.verdict.refusal)
    }
    assert recorded == dict.fromkeys(refused, 1)
    for one in asked:
        if isinstance(one.verdict, MunimentError):
            assert one.verdict.status < 500, one
            assert not one.verdict.recorded or isinstance(one.verdict, RateLimited)


@contextmanager
def processes(database: Database, keys: Path) -> Iterator[Processes]:
    with asyncio.Runner() as runner:
        pools = [open_pool(database.api, connections_max=4) for _ in range(2)]
        opened = [runner.run(pool.__aenter__()) for pool in pools]
        one, other = (Committer(pool, Vault(keys, pool, create_keys=True), create_ledgers=True) for pool in opened)
        yield Processes(runner, (one, other), database)
        for committer, pool in zip((one, other), pools, strict=True):
            runner.run(committer.close())
            runner.run(pool.__aexit__(None, None, None))


def test_whatever_is_done_on_two_processes_is_lawful(database: Database, tmp_path: Path) -> None:
    with processes(database, tmp_path) as both:

        class OnBoth(Interleaving):
            processes = both

        run_state_machine_as_test(
            OnBoth,
            settings=settings(
                max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
