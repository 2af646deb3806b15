"""What the tests of tasks begin with: one task, and the history that leads to each state."""

from typing import Any
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from ledger import task
from ledger.commands import (
    ClaimTasks,
    CompleteTask,
    FailTask,
)
from ledger.events import (
    AttemptFailed,
    Fact,
    TaskCancelled,
    TaskClaimed,
    TaskCompleted,
    TaskDeadLettered,
    TaskExpired,
    TaskRetryScheduled,
    TaskSubmitted,
    TaskSuspended,
)
from ledger.system import LoseAttempt
from ledger.values import Actor, stamp
from tests.ledger.given import (
    NOW,
    Given,
    Outcome,
    by_its_id,
    given,
    later,
    on,
)

TASK, OTHER, APPROVAL, ANOTHER = (UUID(f"0199a7c2-0000-7000-8000-0000000001{n:02}") for n in range(4))
LEASE, STALE = uuid7(), uuid7()
STRANGER = Actor(issuer="https://id.example", sub="agent-8", kind="agent", assurance="authenticated", roles=("agent",))
OPERATOR = Actor(issuer="https://id.example", sub="o-1", kind="human", assurance="authenticated", roles=("operator",))
LEASE_UNTIL = stamp(later(NOW, seconds=60))
RETRY_AT = stamp(later(NOW, seconds=2))
ENDS_AT = stamp(later(NOW, seconds=90))

SUBMITTED = TaskSubmitted(kind="mail.send", run_at=NOW, deadline_at=ENDS_AT)
CLAIMED = TaskClaimed(attempt=1, worker="w-1", lease_id=LEASE, lease_until=LEASE_UNTIL)
SUSPENDED = TaskSuspended(lease_id=LEASE, approval_id=APPROVAL)
STATES: dict[str, tuple[Fact, ...]] = {
    "queued": (SUBMITTED,),
    "running": (SUBMITTED, CLAIMED),
    "waiting": (SUBMITTED, CLAIMED, SUSPENDED),
    "retrying": (SUBMITTED, CLAIMED, AttemptFailed(attempt=1, lease_id=LEASE), TaskRetryScheduled(run_at=RETRY_AT)),
    "completed": (SUBMITTED, CLAIMED, TaskCompleted(lease_id=LEASE)),
    "dead": (SUBMITTED, CLAIMED, AttemptFailed(attempt=1, lease_id=LEASE), TaskDeadLettered(attempts=1)),
    "cancelled": (SUBMITTED, TaskCancelled()),
    "expired": (SUBMITTED, TaskExpired(deadline=ENDS_AT)),
}
in_every_state = pytest.mark.parametrize("state", STATES)
in_every_open_state = pytest.mark.parametrize("state", task.OPEN)
in_every_state_without_a_lease = pytest.mark.parametrize("state", [state for state in STATES if state != "running"])


def history_of(state: str, now: str = NOW) -> Given:
    return given(on(TASK, *STATES[state]), now=now)


def claim(*kinds: str, **fields: Any) -> ClaimTasks:
    return ClaimTasks(worker="w-1", kinds=kinds or ("mail.send",), **fields)


def complete(lease_id: UUID = LEASE, **fields: Any) -> CompleteTask:
    return CompleteTask(task_id=TASK, lease_id=lease_id, **fields)


def fail(lease_id: UUID = LEASE, **fields: Any) -> FailTask:
    return FailTask(task_id=TASK, lease_id=lease_id, **fields)


def lose(lease_id: UUID = LEASE, deadline: str = LEASE_UNTIL) -> LoseAttempt:
    return by_its_id(LoseAttempt(task_id=TASK, lease_id=lease_id, deadline=deadline))


def late(outcome: Outcome, *facts: Fact) -> None:
    """It was refused with lease_lost, and that is these facts of the task: no CommandRefused."""
    receipt: Any = outcome.verdict
    assert (receipt.status, receipt.refusal.code, receipt.state) == (409, "lease_lost", None)
    assert [(event.stream_id, event.data) for event in outcome.events] == [(TASK, fact) for fact in facts]


def claimed_in(outcome: Outcome) -> list[UUID]:
    """The tasks that a claim was answered with, in order."""
    receipt: Any = outcome.verdict
    return [claimed.task_id for claimed in receipt.state]


def claimed_as(attempt: int) -> TaskClaimed:
    return TaskClaimed(attempt=attempt, worker="w", lease_id=LEASE, lease_until=LEASE_UNTIL)
