"""What follows from an event on other streams: in the same commit, by the system, with the event as its cause."""

from typing import Any
from uuid import UUID, uuid5

import pytest
from msgspec.structs import replace
from uuid_utils.compat import uuid7

from ledger.commands import (
    CancelApproval,
    CancelSession,
    CancelTask,
    ChangeSession,
    Command,
    EditApproval,
    FailTask,
    RequestApproval,
    SuspendTask,
    WithdrawApproval,
)
from ledger.events import (
    ApprovalCancelled,
    ApprovalDenied,
    ApprovalExpired,
    ApprovalGranted,
    ApprovalRequested,
    ApprovalSuperseded,
    ApprovalWithdrawn,
    Fact,
    SessionActivated,
    SessionCancelled,
    SessionExpired,
    SessionOpened,
    TaskCancelled,
    TaskClaimed,
    TaskResumed,
    TaskSubmitted,
    TaskSuspended,
)
from ledger.queue import OPEN_ITEMS_MAX
from ledger.system import ExpireApproval, ExpireSession, ExpireTask
from ledger.values import SYSTEM, Actor, Quorum, moment, stamp
from tests.ledger.approvals import (
    ACTION,
    ANA,
    ANOTHER,
    APPROVAL,
    ASKED,
    EXPIRES_AT,
    GRANTED,
    OPERATOR,
    TASK,
    ask,
    asked,
    begin,
    vote,
    voted,
)
from tests.ledger.given import AGENT, DEADLINE, NOW, OPENED, SESSION, Given, On, Outcome, by_its_id, given, later, on

LEASE, CHILD = uuid7(), uuid7()
SUBMITTED = TaskSubmitted(kind="mail.send", run_at=NOW)
CLAIMED = TaskClaimed(attempt=1, worker="w-1", lease_id=LEASE, lease_until=stamp(later(NOW, seconds=60)))
SUSPENDED = TaskSuspended(lease_id=LEASE, approval_id=APPROVAL)
RUNNING = on(TASK, SUBMITTED, CLAIMED)
FOR_TASK = asked(RUNNING, task_id=TASK)
WAITING = (RUNNING, on(APPROVAL, FOR_TASK), on(TASK, SUSPENDED))


def caused(outcome: Outcome) -> list[tuple[str, str | None]]:
    """Each event, and which event of the same commit was its cause."""
    types = {event.event_id: event.type for event in outcome.events}
    return [(event.type, types.get(event.causation_id) if event.causation_id else None) for event in outcome.events]


# A decision, and the task that waits for it


DECISIONS: list[tuple[str, Command, Any, Fact]] = [
    ("approved", vote(on=FOR_TASK), ANA, GRANTED),
    ("denied", vote("deny", on=FOR_TASK), ANA, ApprovalDenied()),
    ("withdrawn", WithdrawApproval(approval_id=APPROVAL), AGENT, ApprovalWithdrawn()),
    ("cancelled", CancelApproval(approval_id=APPROVAL), OPERATOR, ApprovalCancelled(cause="operator")),
    (
        "expired",
        ExpireApproval(approval_id=APPROVAL, deadline=EXPIRES_AT),
        SYSTEM,
        ApprovalExpired(deadline=EXPIRES_AT),
    ),
]


@pytest.mark.parametrize(("decision", "command", "who", "fact"), DECISIONS)
def test_any_final_decision_resumes_the_task_that_waits_for_it(
    decision: str, command: Command, who: Any, fact: Fact
) -> None:
    now = EXPIRES_AT if decision == "expired" else NOW
    outcome = given(*WAITING, now=now).when(command, who)
    resumed = outcome.events[-1]
    decided = outcome.events[-2]
    assert (decided.stream_id, decided.data) == (APPROVAL, fact)
    assert (resumed.stream_id, resumed.data) == (TASK, TaskResumed(approval_id=APPROVAL, decision=decision))
    assert (resumed.actor, resumed.causation_id) == (SYSTEM, decided.event_id)
    assert resumed.correlation_id == decided.correlation_id
    assert resumed.command_id == str(uuid5(decided.event_id, str(TASK)))
    task = outcome.batch.stream(TASK)
    assert (task.state, task.decision, task.attempts_left) == ("queued", decision, 2)
    receipt: Any = outcome.verdict
    assert receipt.seen_position == outcome.batch.size, "the answer has seen what followed"


def test_a_vote_that_decides_nothing_resumes_nothing() -> None:
    two = asked(RUNNING, task_id=TASK, quorum=Quorum(approve=2))
    history = given(RUNNING, on(APPROVAL, two), on(TASK, SUSPENDED))
    assert [event.type for event in history.when(vote(on=two), ANA).events] == ["VoteCast"]


def test_a_late_vote_is_refused_and_the_task_resumed_by_the_expiry() -> None:
    outcome = given(*WAITING, now=EXPIRES_AT).when(vote(on=FOR_TASK), ANA)
    resumed = on(TASK, TaskResumed(approval_id=APPROVAL, decision="expired"))
    outcome.refused("approval_expired", on(APPROVAL, ApprovalExpired(deadline=EXPIRES_AT)), resumed)


def test_an_edit_has_the_task_wait_for_what_stands_instead() -> None:
    edit = EditApproval(approval_id=APPROVAL, action=ACTION, new_approval_id=ANOTHER)
    outcome = given(*WAITING).when(edit, ANA)
    superseded, requested, suspended = outcome.events
    assert (suspended.stream_id, suspended.data) == (TASK, TaskSuspended(approval_id=ANOTHER))
    assert suspended.causation_id == superseded.event_id
    history = outcome.taken()
    assert history.streams[ANOTHER].task_id == TASK
    late = [event.type for event in history.when(vote(on=FOR_TASK), ANA).events]
    assert late == ["CommandRefused"], "what was superseded is decided no more"
    seen = requested.data.request_digest
    outcome = history.when(vote(approval_id=ANOTHER, digest_seen=seen), ANA)
    assert outcome.events[-1].data == TaskResumed(approval_id=ANOTHER, decision="approved")


def test_a_decision_is_nothing_to_a_task_that_does_not_wait_for_it() -> None:
    resumed = on(TASK, SUSPENDED, TaskResumed(approval_id=APPROVAL, decision="withdrawn"))
    for beside in (
        RUNNING,
        resumed,
        on(TASK, SUSPENDED, TaskSuspended(approval_id=ANOTHER)),
        on(TASK, TaskCancelled()),
    ):
        facts = beside if beside is not RUNNING else on(TASK)
        outcome = given(RUNNING, on(APPROVAL, FOR_TASK), facts).when(vote(on=FOR_TASK), ANA)
        assert [event.type for event in outcome.events] == ["VoteCast", "ApprovalGranted"]
        assert len(outcome.batch.append.commands) == 1, "nor does it leave a trace"


def test_a_task_waits_only_for_an_approval_of_its_own_and_never_for_history() -> None:
    suspend = SuspendTask(task_id=TASK, lease_id=LEASE, approval_id=APPROVAL)
    given(RUNNING, on(APPROVAL, ASKED)).when(suspend).turned_away("not_found")
    given(RUNNING).when(suspend).turned_away("not_found")
    imported = ApprovalRequested(
        **{name: getattr(FOR_TASK, name) for name in FOR_TASK.__struct_fields__} | {"imported": True}
    )
    given(RUNNING, on(APPROVAL, imported)).when(suspend).refused("not_usable", id=APPROVAL)


def test_a_task_that_comes_to_wait_after_the_decision_goes_on_at_once() -> None:
    suspend = SuspendTask(task_id=TASK, lease_id=LEASE, approval_id=APPROVAL)
    pending = given(RUNNING, on(APPROVAL, FOR_TASK))
    assert pending.when(suspend).then(SUSPENDED).state.state == "waiting"
    decided = given(RUNNING, on(APPROVAL, FOR_TASK, voted(ANA, "deny"), ApprovalDenied()))
    resumed = TaskResumed(approval_id=APPROVAL, decision="denied")
    assert decided.when(suspend).then(SUSPENDED, resumed).state.state == "queued"


def test_a_task_that_comes_to_wait_for_what_was_superseded_waits_for_what_stands_instead() -> None:
    suspend = SuspendTask(task_id=TASK, lease_id=LEASE, approval_id=APPROVAL)
    history = given(RUNNING, on(APPROVAL, FOR_TASK, ApprovalSuperseded(by=ANOTHER)), on(ANOTHER, FOR_TASK))
    history.when(suspend).then(TaskSuspended(lease_id=LEASE, approval_id=ANOTHER))


# The end of a session


IN_SESSION = asked(OPENED, session_id=SESSION)
ENDINGS = pytest.mark.parametrize("ending", ["completed", "failed", "cancelled", "expired"])


def end(history: Given, ending: Any, session_id: UUID = SESSION) -> Outcome:
    if ending == "expired":
        return history.at(DEADLINE).when(by_its_id(ExpireSession(session_id=session_id, deadline=DEADLINE)), SYSTEM)
    return history.when(ChangeSession(session_id=session_id, status=ending, force=True, reason="over"))


def long(question: ApprovalRequested) -> ApprovalRequested:
    """The same, with time beyond that of the session."""
    return replace(question, expires_at=stamp(later(DEADLINE, days=1)))


@ENDINGS
def test_the_end_of_a_session_ends_what_is_open_in_it(ending: str) -> None:
    task = on(TASK, SUBMITTED)
    outcome = end(given(OPENED, SessionActivated(), task, on(APPROVAL, long(IN_SESSION))), ending)
    ended, *followed = outcome.events
    assert [(event.stream_id, event.data) for event in followed] == [
        (TASK, TaskCancelled(reason="session ended")),
        (APPROVAL, ApprovalCancelled(cause="session_ended")),
    ]
    assert {(event.actor, event.causation_id, event.correlation_id) for event in followed} == {
        (SYSTEM, ended.event_id, ended.correlation_id)
    }
    assert outcome.batch.append.closed == {TASK, APPROVAL}


@ENDINGS
def test_what_was_granted_stays_granted_when_the_session_ends(ending: str) -> None:
    forever = ApprovalGranted(approved_until=stamp(later(DEADLINE, days=1)))
    history = given(OPENED, SessionActivated(), on(APPROVAL, IN_SESSION, voted(ANA), forever))
    outcome = end(history, ending)
    assert [event.stream_id for event in outcome.events] == [SESSION]
    assert outcome.taken().when(begin()).state.state == "executing"


def test_what_is_open_in_other_sessions_stays_open() -> None:
    below = on(CHILD, SessionOpened(agent_role="sub", expires_at=DEADLINE, parent_session_id=SESSION))
    history = given(OPENED, SessionActivated(), below).when(ask(session_id=CHILD)).taken()
    assert [event.type for event in end(history, "completed").events] == ["SessionCompleted"]
    history = given(OPENED, SessionActivated(), below).when(ask(session_id=SESSION)).taken()
    assert [event.type for event in end(history, "cancelled", CHILD).events] == ["SessionCancelled"]


@ENDINGS
def test_a_task_of_others_goes_on_when_the_session_that_asked_for_it_ends(ending: str) -> None:
    """A worker asked in a session of its own; the task is not that session's."""
    history = given(RUNNING, OPENED, SessionActivated())
    expires_at = later(DEADLINE, days=1)
    history = history.when(ask(session_id=SESSION, task_id=TASK, expires_at=expires_at)).taken()
    history = history.when(SuspendTask(task_id=TASK, lease_id=LEASE, approval_id=APPROVAL)).taken()
    outcome = end(history, ending)
    assert caused(outcome)[1:] == [
        ("ApprovalCancelled", outcome.events[0].type),
        ("TaskResumed", "ApprovalCancelled"),
    ]
    assert outcome.events[-1].data == TaskResumed(approval_id=APPROVAL, decision="cancelled")


def test_a_question_counts_as_open_work() -> None:
    history = given(OPENED, SessionActivated(), on(APPROVAL, IN_SESSION))
    complete = ChangeSession(session_id=SESSION, status="completed")
    history.when(complete).refused("open_work", id=SESSION, count=1)
    granted = given(OPENED, SessionActivated(), on(APPROVAL, IN_SESSION, voted(ANA), GRANTED))
    assert granted.when(complete).state.state == "completed"


def test_what_ends_by_itself_at_that_instant_is_not_ended_twice() -> None:
    at_the_same_time = asked(OPENED, session_id=SESSION, expires_at=moment(DEADLINE))
    history = given(OPENED, on(APPROVAL, at_the_same_time), now=DEADLINE)
    outcome = history.when(by_its_id(ExpireSession(session_id=SESSION, deadline=DEADLINE)), SYSTEM)
    outcome.then(SessionExpired(deadline=DEADLINE), on(APPROVAL, ApprovalExpired(deadline=DEADLINE)))


# The end of a task


ENDS_AT = stamp(later(NOW, seconds=90))
ENDINGS_OF_A_TASK: list[tuple[Command, Actor, str, str]] = [
    (CancelTask(task_id=TASK), AGENT, NOW, "TaskCancelled"),
    (ExpireTask(task_id=TASK, deadline=ENDS_AT), SYSTEM, ENDS_AT, "TaskExpired"),
    (FailTask(task_id=TASK, lease_id=LEASE, retryable=False), AGENT, NOW, "TaskDeadLettered"),
]
ENDING_SOON = on(TASK, TaskSubmitted(kind="mail.send", run_at=NOW, deadline_at=ENDS_AT), CLAIMED)


@pytest.mark.parametrize(("command", "who", "now", "ending"), ENDINGS_OF_A_TASK)
@pytest.mark.parametrize("history", [(), (OPENED, SessionActivated())])
def test_the_end_of_a_task_ends_what_was_asked_for_it(
    command: Any, who: Any, now: str, ending: str, history: tuple[Fact, ...]
) -> None:
    question = asked(*history, ENDING_SOON, task_id=TASK)
    beside = asked(*history, ENDING_SOON, task_id=TASK)
    granted = on(uuid7(), question, voted(ANA), GRANTED)
    open_ones = (on(APPROVAL, question), on(ANOTHER, beside), granted)
    outcome = given(*history, ENDING_SOON, *open_ones, now=now).when(command, who)
    cancelled = [event for event in outcome.events if event.type == "ApprovalCancelled"]
    assert [(event.stream_id, event.data) for event in cancelled] == [
        (approval_id, ApprovalCancelled(cause="task_ended")) for approval_id in (APPROVAL, ANOTHER)
    ]
    assert {cause for kind, cause in caused(outcome) if kind == "ApprovalCancelled"} == {ending}
    assert {event.actor for event in cancelled} == {SYSTEM}


@pytest.mark.parametrize(("command", "who", "now", "ending"), ENDINGS_OF_A_TASK[:2])
def test_what_a_waiting_task_waits_for_ends_with_it_in_whatever_session_it_was_asked(
    command: Any, who: Any, now: str, ending: str
) -> None:
    history = given(ENDING_SOON, OPENED)
    history = history.when(ask(session_id=SESSION, task_id=TASK)).taken()
    history = history.when(SuspendTask(task_id=TASK, lease_id=LEASE, approval_id=APPROVAL)).taken()
    outcome = history.at(now).when(command, who)
    assert caused(outcome) == [(ending, None), ("ApprovalCancelled", ending)]
    assert len(outcome.batch.append.commands) == 2


def test_a_failed_attempt_that_is_tried_again_ends_nothing() -> None:
    question = asked(RUNNING, task_id=TASK)
    outcome = given(RUNNING, on(APPROVAL, question)).when(FailTask(task_id=TASK, lease_id=LEASE))
    assert [event.type for event in outcome.events] == ["AttemptFailed", "TaskRetryScheduled"]


# A family


def test_a_cascade_takes_the_work_of_those_below_along_level_by_level() -> None:
    below = on(CHILD, SessionOpened(agent_role="sub", expires_at=DEADLINE, parent_session_id=SESSION))
    history = given(OPENED, below)
    history = history.when(ask(session_id=CHILD)).taken()
    history = history.when(RequestApproval(action=ACTION, approval_id=ANOTHER, session_id=SESSION)).taken()
    outcome = history.when(CancelSession(session_id=SESSION, reason="stop", cascade=True))
    fact = SessionCancelled(reason="stop", cascade=True)
    ended = ApprovalCancelled(cause="session_ended")
    outcome.then(fact, on(ANOTHER, ended), on(CHILD, fact), on(APPROVAL, ended))
    root, _, child, below_child = outcome.events
    assert (child.causation_id, below_child.causation_id) == (root.event_id, child.event_id)
    assert {event.correlation_id for event in outcome.events} == {str(SESSION)}
    assert outcome.batch.open_items(SESSION) == {}


def test_what_follows_is_bounded_by_what_may_be_open() -> None:
    tasks = [uuid7() for _ in range(OPEN_ITEMS_MAX // 2)]
    questions = {task_id: uuid7() for task_id in tasks}
    history: list[On] = []
    for task_id, approval_id in questions.items():
        waiting = TaskSuspended(lease_id=LEASE, approval_id=approval_id)
        history += [on(task_id, SUBMITTED, CLAIMED, waiting)]
        history += [on(approval_id, replace(IN_SESSION, task_id=task_id))]
    full = given(OPENED, *history)
    assert len(full.items[SESSION]) == OPEN_ITEMS_MAX
    full.when(ask(session_id=SESSION)).refused("session_full")
    outcome = full.when(CancelSession(session_id=SESSION, cascade=True))
    assert len(outcome.events) == 1 + OPEN_ITEMS_MAX, "each open item ended once"
    assert {event.causation_id for event in outcome.events[1:]} <= {event.event_id for event in outcome.events}
    assert outcome.batch.open_items(SESSION) == {}
