"""The rules of a task: every command in every state, and what time, approvals and sessions do to it."""

from typing import Any, get_args

import pytest
from uuid_utils.compat import uuid7

from ledger import task
from ledger.commands import (
    CancelTask,
    ChangeSession,
    ClaimTasks,
    Command,
    CompleteTask,
    RedriveTask,
    Start,
    SubmitTask,
)
from ledger.events import (
    AttemptFailed,
    AttemptLost,
    Fact,
    LateResultRefused,
    SessionActivated,
    SessionCancelled,
    SessionCompleted,
    SessionExpired,
    SessionFailed,
    TaskCancelled,
    TaskClaimed,
    TaskCompleted,
    TaskExpired,
    TaskQueued,
    TaskRedriven,
    TaskResumed,
    TaskRetryScheduled,
    TaskSubmitted,
    TaskSuspended,
)
from ledger.queue import OPEN_ITEMS_MAX
from ledger.store import OpenItem
from ledger.system import ExpireTask, QueueTask, ResumeTask
from ledger.values import SYSTEM, stamp
from tests.ledger.given import (
    DEADLINE,
    NOW,
    OPENED,
    SESSION,
    Given,
    by_its_id,
    given,
    later,
    on,
)
from tests.ledger.tasks import (
    ANOTHER,
    APPROVAL,
    CLAIMED,
    ENDS_AT,
    LEASE,
    LEASE_UNTIL,
    OPERATOR,
    RETRY_AT,
    STATES,
    STRANGER,
    SUBMITTED,
    TASK,
    claim,
    claimed_in,
    complete,
    fail,
    history_of,
    in_every_open_state,
    in_every_state,
    late,
    lose,
)

# Every command in every state


@in_every_state
def test_the_history_of_each_state_leads_to_it(state: str) -> None:
    held = history_of(state).streams[TASK]
    assert held.state == state
    assert (held.lease_id is not None) == (held.holder is not None) == (state == "running")
    assert set(get_args(task.State)) == set(STATES)


@in_every_state
def test_a_task_is_claimed_by_kind_or_by_id_only_while_it_is_queued(state: str) -> None:
    for command in (claim(), ClaimTasks(worker="w-1", task_id=TASK)):
        outcome = history_of(state).when(command)
        if state != "queued":
            outcome.then()
            assert claimed_in(outcome) == []
            continue
        (event,) = outcome.events
        lease_id = event.data.lease_id
        outcome.then(on(TASK, TaskClaimed(attempt=1, worker="w-1", lease_id=lease_id, lease_until=LEASE_UNTIL)))
        (held,) = outcome.state
        assert (held.state, held.worker, held.lease_id, held.attempts_left) == ("running", "w-1", lease_id, 2)


@in_every_state
def test_a_claim_that_comes_by_nothing_leaves_no_trace(state: str) -> None:
    outcome = history_of(state).when(claim("other.kind"))
    outcome.then()
    receipt: Any = outcome.verdict
    assert (receipt.status, receipt.state, outcome.batch.append.commands) == (200, (), [])


@in_every_state
def test_a_result_counts_only_while_the_lease_is_in_force(state: str) -> None:
    outcome = history_of(state).when(complete(result={"sent": 1}, is_error=True))
    if state == "running":
        outcome.then(TaskCompleted(lease_id=LEASE, result={"sent": 1}, is_error=True))
        assert (outcome.state.state, outcome.state.result, outcome.state.is_error) == ("completed", {"sent": 1}, True)
        assert (outcome.state.lease_id, outcome.state.holder) == (None, None)
        assert outcome.state.result_version == 3
    else:
        late(outcome, LateResultRefused(lease_id=LEASE, outcome="completed", result={"sent": 1}))


@in_every_state
def test_a_failure_counts_only_while_the_lease_is_in_force(state: str) -> None:
    outcome = history_of(state).when(fail(error="no route"))
    if state == "running":
        failed, scheduled = [event.data for event in outcome.events]
        assert failed == AttemptFailed(attempt=1, lease_id=LEASE, error="no route")
        assert isinstance(scheduled, TaskRetryScheduled)
        assert (outcome.state.state, outcome.state.lease_id) == ("retrying", None)
    else:
        late(outcome, LateResultRefused(lease_id=LEASE, outcome="failed", result="no route"))


@in_every_state
def test_a_task_is_cancelled_until_it_has_ended(state: str) -> None:
    outcome = history_of(state).when(CancelTask(task_id=TASK, reason="stop"))
    if state in task.OPEN:
        assert outcome.then(TaskCancelled(reason="stop")).state.lease_id is None
    else:
        allowed = ("queued",) if state == "dead" else ()
        outcome.refused("invalid_transition", command="CancelTask", id=TASK, current_state=state, allowed=allowed)


@in_every_state
def test_an_operator_redrives_a_dead_task_and_no_other(state: str) -> None:
    outcome = history_of(state).when(RedriveTask(task_id=TASK, reason="mended"), OPERATOR)
    if state == "dead":
        redriven = outcome.then(TaskRedriven(reason="mended")).state
        assert (redriven.state, redriven.run_at, redriven.attempts_left) == ("queued", NOW, 3)
    else:
        outcome.refused("invalid_transition", command="RedriveTask", current_state=state)


@in_every_state
def test_the_time_to_try_again_comes_once_and_only_for_what_waits_for_it(state: str) -> None:
    queue = by_its_id(QueueTask(task_id=TASK, deadline=RETRY_AT))
    outcome = history_of(state, now=RETRY_AT).when(queue, SYSTEM)
    outcome.then(*[TaskQueued()] if state == "retrying" else [])
    history_of(state).when(QueueTask(task_id=TASK, deadline=RETRY_AT), SYSTEM).then()
    other = QueueTask(task_id=TASK, deadline=LEASE_UNTIL)
    assert not any(e.command_id == "asked" for e in history_of(state, now=LEASE_UNTIL).when(other, SYSTEM).events)


@in_every_state
def test_the_deadline_ends_whatever_has_not_ended_once(state: str) -> None:
    expire = by_its_id(ExpireTask(task_id=TASK, deadline=ENDS_AT))
    history_of(state).when(ExpireTask(task_id=TASK, deadline=ENDS_AT), SYSTEM).then()
    outcome = history_of(state, now=ENDS_AT).when(expire, SYSTEM)
    outcome.then(*[TaskExpired(deadline=ENDS_AT)] if state in task.OPEN else [])
    assert len(outcome.batch.append.commands) == (state in task.OPEN)


@in_every_state
def test_an_attempt_is_lost_only_while_its_lease_is_in_force(state: str) -> None:
    history = history_of(state, now=LEASE_UNTIL)
    history.leases[TASK] = LEASE_UNTIL if state == "running" else None
    lost = [event.data for event in history.when(lose(), SYSTEM).events if event.type == "AttemptLost"]
    assert lost == [AttemptLost(attempt=1, lease_id=LEASE, lease_until=LEASE_UNTIL)] * (state == "running")


@in_every_state
def test_a_decision_resumes_only_what_waits_for_that_approval(state: str) -> None:
    resume = ResumeTask(task_id=TASK, approval_id=APPROVAL, decision="denied")
    outcome = history_of(state).when(resume, SYSTEM)
    if state == "waiting":
        resumed = outcome.then(TaskResumed(approval_id=APPROVAL, decision="denied")).state
        assert (resumed.state, resumed.decision) == ("queued", "denied")
    else:
        outcome.then()
    history_of(state).when(ResumeTask(task_id=TASK, approval_id=ANOTHER, decision="denied"), SYSTEM).then()


@in_every_state
def test_an_id_is_submitted_once(state: str) -> None:
    command = SubmitTask(kind="mail.send", task_id=TASK)
    expected = {"what": "task", "id": TASK}
    history_of(state).when(command).refused("already_exists", **expected)


@pytest.mark.parametrize(
    "command",
    [
        complete(),
        fail(),
        ClaimTasks(worker="w", task_id=TASK),
        CancelTask(task_id=TASK),
        RedriveTask(task_id=TASK, reason="x"),
        ExpireTask(task_id=TASK, deadline=NOW),
    ],
)
def test_a_task_that_is_not_there_is_not_found_and_that_leaves_no_trace(command: Command) -> None:
    given().when(command, SYSTEM).turned_away("not_found", what="task", id=TASK)


def test_only_an_operator_redrives_and_an_operator_may_cancel() -> None:
    history_of("dead").when(RedriveTask(task_id=TASK, reason="x")).refused("forbidden")
    history_of("running").when(CancelTask(task_id=TASK), OPERATOR).then(TaskCancelled())
    history_of("queued").when(claim(), OPERATOR).refused("forbidden")


# Submitting


def test_a_task_is_submitted_as_it_was_asked_for() -> None:
    run_at, ends_at = later(NOW, hours=1), later(NOW, hours=2)
    fields: dict[str, Any] = {"payload": {"to": [1]}, "priority": 9, "max_attempts": 7, "backoff_seconds": 11}
    asked = SubmitTask(kind="mail.send", task_id=TASK, run_at=run_at, deadline_at=ends_at, external_id="x", **fields)
    submitted = TaskSubmitted(kind="mail.send", run_at=stamp(run_at), deadline_at=stamp(ends_at), **fields)
    state = given().when(asked).then(submitted).state
    assert (state.state, state.version, state.attempt, state.attempts_left) == ("queued", 1, 0, 7)
    assert (state.kind, state.payload, state.external_id) == ("mail.send", {"to": [1]}, "x")
    assert (state.submitted_at, state.session_id, state.root_session_id) == (NOW, None, None)


def test_a_task_has_defaults_and_an_id_of_version_7() -> None:
    outcome = given().when(SubmitTask(kind="mail.send")).then(TaskSubmitted(kind="mail.send", run_at=NOW))
    assert outcome.target.version == 7
    assert (outcome.state.priority, outcome.state.max_attempts, outcome.state.backoff_seconds) == (5, 3, 2)


def test_a_time_that_has_passed_already_is_now() -> None:
    asked = SubmitTask(kind="mail.send", run_at=later(NOW, days=-1))
    given().when(asked).then(TaskSubmitted(kind="mail.send", run_at=NOW))


@pytest.mark.parametrize(("run_seconds", "deadline_seconds"), [(0, 0), (0, -5), (10, 10), (10, 9)])
def test_a_deadline_before_the_task_may_run_is_malformed(run_seconds: float, deadline_seconds: float) -> None:
    run_at, deadline_at = later(NOW, seconds=run_seconds), later(NOW, seconds=deadline_seconds)
    asked = SubmitTask(kind="mail.send", run_at=run_at, deadline_at=deadline_at)
    error: Any = given().when(asked).turned_away("malformed_request")
    assert [told["pointer"] for told in error.errors] == ["/deadline_at"]


def test_with_start_it_is_submitted_and_claimed_by_the_caller_in_one_commit() -> None:
    asked = SubmitTask(kind="mail.send", task_id=TASK, start=Start(worker="me", lease_seconds=5))
    outcome = given().when(asked)
    lease_id, until = outcome.state.lease_id, stamp(later(NOW, seconds=5))
    outcome.then(
        TaskSubmitted(kind="mail.send", run_at=NOW),
        TaskClaimed(attempt=1, worker="me", lease_id=lease_id, lease_until=until),
    )
    assert (outcome.state.state, outcome.state.attempts_left) == ("running", 2)
    after = outcome.taken()
    assert claimed_in(after.when(claim(), STRANGER)) == [], "it is never offered to another"
    after.when(complete(lease_id)).then(TaskCompleted(lease_id=lease_id))


def test_what_starts_now_cannot_start_later() -> None:
    asked = SubmitTask(kind="mail.send", start=Start(worker="me"), run_at=later(NOW, seconds=1))
    error: Any = given().when(asked).turned_away("malformed_request")
    assert [told["pointer"] for told in error.errors] == ["/run_at"]


# Time


@pytest.mark.parametrize("command", [complete(), fail()])
def test_the_deadline_comes_before_a_result(command: Command) -> None:
    outcome = history_of("running", now=ENDS_AT).when(command)
    said: Any = "completed" if isinstance(command, CompleteTask) else "failed"
    late(outcome, TaskExpired(deadline=ENDS_AT), LateResultRefused(lease_id=LEASE, outcome=said))
    assert outcome.events[0].actor == SYSTEM


@in_every_open_state
def test_the_deadline_comes_before_a_cancel(state: str) -> None:
    history_of(state, now=ENDS_AT).when(CancelTask(task_id=TASK)).refused(
        "invalid_transition", TaskExpired(deadline=ENDS_AT), current_state="expired"
    )


def test_a_task_without_a_deadline_never_expires() -> None:
    history = given(on(TASK, TaskSubmitted(kind="mail.send", run_at=NOW)), now=stamp(later(NOW, days=4000)))
    assert claimed_in(history.when(claim())) == [TASK]


# Approvals


def test_a_superseded_approval_is_waited_for_no_more_but_the_one_instead() -> None:
    resume = ResumeTask(task_id=TASK, approval_id=APPROVAL, decision="superseded", instead=ANOTHER)
    outcome = history_of("waiting").when(resume, SYSTEM)
    held = outcome.then(TaskSuspended(approval_id=ANOTHER)).state
    assert (held.state, held.approval_id) == ("waiting", ANOTHER)


def test_a_resumed_task_goes_on_with_the_attempt_that_was_suspended() -> None:
    resumed = TaskResumed(approval_id=APPROVAL, decision="approved")
    history = given(on(TASK, *STATES["waiting"], resumed))
    (claimed,) = history.when(claim()).state
    assert (claimed.attempt, claimed.attempts_left, claimed.decision) == (1, 2, "approved")
    assert claimed.lease_id != LEASE
    late(history.when(complete()), LateResultRefused(lease_id=LEASE, outcome="completed"))


def test_what_was_resumed_and_then_failed_costs_one_attempt_in_all() -> None:
    resumed = TaskResumed(approval_id=APPROVAL, decision="approved")
    again = (AttemptFailed(attempt=1, lease_id=LEASE), TaskRetryScheduled(run_at=NOW), TaskQueued())
    history = given(on(TASK, *STATES["waiting"], resumed, CLAIMED, *again))
    (claimed,) = history.when(claim()).state
    assert (claimed.attempt, claimed.attempts_left, claimed.decision) == (2, 1, None)


# Sessions


def in_session(*facts: Fact, state: tuple[Fact, ...] = (OPENED, SessionActivated()), now: str = NOW) -> Given:
    return given(*state, on(TASK, *facts), now=now)


def test_a_task_belongs_to_the_session_that_asked_for_it() -> None:
    asked = SubmitTask(kind="mail.send", task_id=TASK, session_id=SESSION)
    outcome = given(OPENED).when(asked).then(TaskSubmitted(kind="mail.send", run_at=NOW))
    assert (outcome.state.session_id, outcome.state.root_session_id) == (SESSION, SESSION)
    assert outcome.events[0].correlation_id == str(SESSION)
    assert outcome.batch.append.opened == {TASK: OpenItem(TASK, "task", SESSION, SESSION)}


def test_a_task_for_a_session_that_is_not_there_is_not_found() -> None:
    asked = SubmitTask(kind="mail.send", session_id=SESSION)
    given().when(asked).turned_away("not_found", what="session", id=SESSION)
    given(on(SESSION, SUBMITTED)).when(asked).turned_away("not_found", what="session", id=SESSION)


@pytest.mark.parametrize(
    ("ending", "state"),
    [
        (SessionCompleted(), "completed"),
        (SessionFailed(), "failed"),
        (SessionCancelled(), "cancelled"),
        (SessionExpired(deadline=DEADLINE), "expired"),
    ],
)
def test_a_session_that_has_ended_asks_for_no_more_tasks(ending: Fact, state: str) -> None:
    asked = SubmitTask(kind="mail.send", session_id=SESSION)
    given(OPENED, SessionActivated(), ending).when(asked).refused(
        "invalid_transition", command="SubmitTask", current_state=state, allowed=()
    )


def test_time_runs_out_for_the_session_before_it_asks_for_a_task() -> None:
    asked = SubmitTask(kind="mail.send", session_id=SESSION)
    outcome = given(OPENED, now=DEADLINE).when(asked)
    outcome.refused("invalid_transition", on(SESSION, SessionExpired(deadline=DEADLINE)), current_state="expired")


@in_every_state
def test_a_session_is_completed_over_open_tasks_only_by_force_and_with_a_reason(state: str) -> None:
    def change(**fields: Any) -> ChangeSession:
        return ChangeSession(session_id=SESSION, status="completed", **fields)

    history = in_session(*STATES[state])
    if state in task.OPEN:
        for command in (change(), change(force=True), change(reason="done")):
            history.when(command).refused("open_work", id=SESSION, count=1)
        assert history.when(change(force=True, reason="done")).state.state == "completed"
    else:
        assert history.when(change()).state.state == "completed"


@in_every_open_state
@pytest.mark.parametrize("status", ["completed", "failed", "cancelled", "expired"])
def test_the_end_of_a_session_cancels_its_open_tasks_in_the_same_commit(status: Any, state: str) -> None:
    no_deadline = (TaskSubmitted(kind="mail.send", run_at=NOW), *STATES[state][1:])
    history = in_session(*no_deadline, now=DEADLINE if status == "expired" else NOW)
    change = ChangeSession(session_id=SESSION, status=status, force=True, reason="over")
    outcome = history.when(change)
    ended, *followed = [event for event in outcome.events if event.type != "TaskQueued"]
    (cancelled,) = (event for event in followed if event.type != "CommandRefused")
    assert (cancelled.type, cancelled.stream_id, cancelled.actor) == ("TaskCancelled", TASK, SYSTEM)
    assert cancelled.causation_id == ended.event_id
    assert TASK in outcome.batch.append.closed


def test_a_session_has_a_bound_on_its_open_tasks() -> None:
    history = in_session(*STATES["dead"])
    history.items[SESSION] = {i: OpenItem(i, "task", SESSION, SESSION) for i in (uuid7() for _ in range(1000))}
    assert OPEN_ITEMS_MAX == 1000
    asked = SubmitTask(kind="mail.send", session_id=SESSION)
    history.when(asked).refused("session_full", id=SESSION, limit=1000)
    history.when(RedriveTask(task_id=TASK, reason="x"), OPERATOR).refused("session_full", id=SESSION)
    history.items[SESSION].popitem()
    assert history.when(asked).state.state == "queued"
    assert history.when(RedriveTask(task_id=TASK, reason="x"), OPERATOR).state.state == "queued"


def test_a_task_of_no_session_is_among_no_open_items() -> None:
    assert given().when(SubmitTask(kind="mail.send")).batch.append.opened == {}
