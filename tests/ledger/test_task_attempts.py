"""Who gets which task when, and what comes of each attempt: leases, late results, retries and dead letters."""

from typing import Any
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from ledger import task
from ledger.commands import (
    ClaimTasks,
    SubmitTask,
)
from ledger.events import (
    AttemptFailed,
    AttemptLost,
    Fact,
    LateResultRefused,
    SessionActivated,
    TaskCompleted,
    TaskDeadLettered,
    TaskExpired,
    TaskQueued,
    TaskRedriven,
    TaskRetryScheduled,
    TaskSubmitted,
)
from ledger.system import QueueTask
from ledger.values import SYSTEM, stamp
from tests.ledger.given import (
    NOW,
    OPENED,
    SESSION,
    given,
    later,
    on,
    pending_of,
)
from tests.ledger.tasks import (
    CLAIMED,
    ENDS_AT,
    LEASE,
    LEASE_UNTIL,
    OTHER,
    RETRY_AT,
    STALE,
    STATES,
    STRANGER,
    SUBMITTED,
    TASK,
    claim,
    claimed_as,
    claimed_in,
    complete,
    fail,
    history_of,
    late,
    lose,
)

# Claiming


def submitted(task_id: UUID, *, kind: str = "mail.send", wait: float = 0, **fields: Any) -> Any:
    """A task that may run `wait` seconds before (or, below zero, after) NOW."""
    return on(task_id, TaskSubmitted(kind=kind, run_at=stamp(later(NOW, seconds=-wait)), **fields))


def test_a_claim_names_kinds_or_a_task_and_not_both() -> None:
    for command in (
        ClaimTasks(worker="w", task_id=TASK, kinds=("mail.send",)),
        ClaimTasks(worker="w"),
    ):
        error: Any = given(submitted(TASK)).when(command).turned_away("malformed_request")
        assert [told["pointer"] for told in error.errors] == ["/kinds"]


def test_a_claim_gets_as_many_of_its_kinds_as_it_asked_for() -> None:
    tasks = [uuid7() for _ in range(6)]
    kinds = ["a", "b", "c", "a", "b", "c"]
    history = given(*(submitted(i, kind=kind) for i, kind in zip(tasks, kinds, strict=True)))
    outcome = history.when(claim("a", "b", "b", n=3))
    wanted = [tasks[n] for n in (0, 1, 3, 4)]
    assert claimed_in(outcome) == wanted[:3]
    assert len({event.data.lease_id for event in outcome.events}) == 3
    assert claimed_in(history.when(claim("a", "b", n=100))) == wanted


def test_a_claim_may_keep_to_one_session() -> None:
    history = given(OPENED, SessionActivated(), submitted(TASK))
    assert claimed_in(history.when(claim(session_id=SESSION))) == [TASK]
    for command in (claim(session_id=OTHER), ClaimTasks(worker="w", task_id=TASK, session_id=OTHER)):
        assert claimed_in(history.when(command)) == []


@pytest.mark.parametrize(("waited", "first"), [(59, "urgent"), (60.5, "old"), (0, "urgent"), (3600, "old")])
def test_a_step_of_priority_is_worth_a_minute_so_that_nothing_starves(waited: float, first: str) -> None:
    history = given(submitted(TASK, wait=waited, priority=5), submitted(OTHER, wait=0, priority=6))
    assert claimed_in(history.when(claim())) == [{"old": TASK, "urgent": OTHER}[first]]


def test_of_equal_rank_the_one_that_could_run_first_is_first_and_then_the_one_submitted_first() -> None:
    history = given(submitted(OTHER, wait=0, priority=6), submitted(TASK, wait=60, priority=5))
    assert claimed_in(history.when(claim(n=2))) == [TASK, OTHER]
    tasks = [uuid7() for _ in range(5)]
    assert claimed_in(given(*map(submitted, tasks)).when(claim(n=5))) == tasks


def test_what_may_not_run_yet_is_not_handed_out() -> None:
    history = given(submitted(TASK, wait=-1, priority=9))
    assert claimed_in(history.when(claim())) == []
    assert claimed_in(history.when(ClaimTasks(worker="w", task_id=TASK))) == []
    history.recorded_at = later(NOW, seconds=1)
    assert claimed_in(history.when(claim())) == [TASK]


def test_the_most_urgent_is_first_also_of_what_was_submitted_just_now() -> None:
    history = given(submitted(TASK, priority=3))
    batch = history.batch()
    batch.decide(pending_of(SubmitTask(kind="mail.send", priority=1, command_id="1")))
    urgent: Any = batch.decide(pending_of(SubmitTask(kind="mail.send", priority=9, command_id="2")))
    claims: list[Any] = [batch.decide(pending_of(claim(command_id=str(n)))) for n in range(3, 7)]
    got = [[claimed.task_id for claimed in receipt.state] for receipt in claims]
    assert got[:2] == [[urgent.target], [TASK]]
    assert [len(tasks) for tasks in got] == [1, 1, 1, 0]


def test_one_claim_never_gets_a_task_twice_that_came_back_just_now() -> None:
    history = history_of("retrying", now=RETRY_AT)
    outcome = history.when(claim(n=5))
    assert claimed_in(outcome) == [TASK]
    assert [event.type for event in outcome.events] == ["TaskQueued", "TaskClaimed"]
    assert outcome.events[0].actor == SYSTEM
    assert outcome.events[0].command_id == QueueTask(task_id=TASK, deadline=RETRY_AT).due_id


def test_a_claim_does_not_get_what_is_past_its_deadline() -> None:
    outcome = history_of("queued", now=ENDS_AT).when(claim())
    outcome.then(on(TASK, TaskExpired(deadline=ENDS_AT)))
    assert claimed_in(outcome) == []


# Leases


def test_a_stranger_who_knows_the_lease_cannot_use_it() -> None:
    late(history_of("running").when(complete(), STRANGER), LateResultRefused(lease_id=LEASE, outcome="completed"))
    late(history_of("running").when(fail(), STRANGER), LateResultRefused(lease_id=LEASE, outcome="failed"))


def test_the_holder_cannot_use_a_lease_that_it_has_lost() -> None:
    late(history_of("running").when(complete(STALE)), LateResultRefused(lease_id=STALE, outcome="completed"))


def test_a_late_result_changes_nothing_but_the_version() -> None:
    history = history_of("cancelled")
    before = history.streams[TASK]
    (event,) = history.when(complete(result=1)).events
    history.take(event)
    after = history.streams[TASK]
    assert (after.state, after.result, after.version) == ("cancelled", None, before.version + 1)


def test_a_result_counts_until_somebody_saw_that_no_heartbeat_came() -> None:
    history_of("running", now=stamp(later(LEASE_UNTIL, seconds=20))).when(complete()).then(
        TaskCompleted(lease_id=LEASE)
    )


@pytest.mark.parametrize("until", [None, stamp(later(LEASE_UNTIL, microseconds=1)), ENDS_AT])
def test_an_attempt_whose_lease_was_renewed_is_not_lost(until: str | None) -> None:
    history = history_of("running", now=LEASE_UNTIL)
    history.leases[TASK] = until
    outcome = history.when(lose(), SYSTEM)
    outcome.then()
    assert outcome.batch.append.commands == []


def test_a_lost_attempt_says_when_its_lease_really_ended() -> None:
    renewed = stamp(later(LEASE_UNTIL, seconds=5))
    history = history_of("running", now=stamp(later(LEASE_UNTIL, seconds=6)))
    history.leases[TASK] = renewed
    outcome = history.when(lose(), SYSTEM)
    lost, scheduled = [event.data for event in outcome.events]
    assert lost == AttemptLost(attempt=1, lease_id=LEASE, lease_until=renewed)
    assert isinstance(scheduled, TaskRetryScheduled)
    assert (outcome.state.state, outcome.state.lease_id, outcome.state.holder) == ("retrying", None, None)


# Attempts


def test_a_backoff_doubles_and_its_jitter_is_the_same_each_time() -> None:
    waits = []
    for attempt in (1, 2, 3, 10, 60):
        held = given(on(TASK, SUBMITTED, claimed_as(attempt))).streams[TASK]
        waits.append(task.backoff_seconds(held))
        assert waits[-1] == task.backoff_seconds(held)
    for wait, base in zip(waits, (2, 4, 8, 1024, 3600), strict=True):
        assert base <= wait <= base * 1.5
    jitters = {task.backoff_seconds(given(on(uuid7(), SUBMITTED, CLAIMED)).streams.popitem()[1]) for _ in range(20)}
    assert len(jitters) == 20, "those who fail together do not come back together"


def test_a_failed_attempt_is_tried_again_after_its_backoff() -> None:
    outcome = history_of("running").when(fail())
    scheduled: Any = outcome.events[-1].data
    wait = task.backoff_seconds(history_of("running").streams[TASK])
    assert scheduled.run_at == stamp(later(NOW, seconds=wait))
    assert outcome.state.run_at == scheduled.run_at


def test_without_backoff_it_is_tried_again_at_another_time_than_any_before() -> None:
    history = given(on(TASK, TaskSubmitted(kind="mail.send", run_at=NOW, backoff_seconds=0), CLAIMED))
    assert history.when(fail()).state.run_at > NOW


@pytest.mark.parametrize(("attempts", "retryable", "is_dead"), [(1, True, False), (3, True, True), (1, False, True)])
def test_a_task_is_dead_when_no_attempt_is_left_or_none_can_help(attempts: int, retryable: bool, is_dead: bool) -> None:
    tries: list[Fact] = []
    for attempt in range(1, attempts):
        retried = (AttemptFailed(attempt=attempt, lease_id=LEASE), TaskRetryScheduled(run_at=NOW), TaskQueued())
        tries += [claimed_as(attempt), *retried]
    history = given(on(TASK, SUBMITTED, *tries, claimed_as(attempts)))
    outcome = history.when(fail(retryable=retryable))
    assert (outcome.state.state == "dead") == is_dead
    if is_dead:
        outcome.then(
            AttemptFailed(attempt=attempts, lease_id=LEASE, retryable=retryable), TaskDeadLettered(attempts=attempts)
        )


def test_the_last_attempt_can_be_lost_too() -> None:
    submitted = TaskSubmitted(kind="mail.send", run_at=NOW, max_attempts=1)
    history = given(on(TASK, submitted, CLAIMED), now=LEASE_UNTIL)
    history.leases[TASK] = LEASE_UNTIL
    history.when(lose(), SYSTEM).then(
        AttemptLost(attempt=1, lease_id=LEASE, lease_until=LEASE_UNTIL), TaskDeadLettered(attempts=1)
    )


def test_a_redriven_task_has_all_its_attempts_again_and_goes_on_counting() -> None:
    history = given(on(TASK, *STATES["dead"], TaskRedriven()))
    outcome = history.when(claim())
    (claimed,) = outcome.state
    assert (claimed.attempt, claimed.attempts_left) == (2, 2)
