"""Whatever happens to tasks in whatever order: never two leases at once, never an attempt too many."""

from collections import defaultdict
from datetime import timedelta
from typing import Any
from uuid import UUID

from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from uuid_utils.compat import uuid7

from ledger.commands import (
    CancelTask,
    ClaimTasks,
    Command,
    CompleteTask,
    FailTask,
    RedriveTask,
)
from ledger.entry import Event, decode
from ledger.events import (
    TaskClaimed,
    TaskSubmitted,
)
from ledger.system import Due, ExpireTask, LoseAttempt, QueueTask
from ledger.values import SYSTEM, stamp
from tests.ledger.given import (
    AGENT,
    NOW,
    Given,
    by_its_id,
    later,
    on,
    pending_of,
)
from tests.ledger.tasks import (
    LEASE_UNTIL,
    OPERATOR,
    STALE,
    claim,
)

TASKS = tuple(uuid7() for _ in range(5))
OFTEN = ("claim", "claim", "claim", "fail", "fail", "redrive")
SELDOM = ("claim one", "complete", "give up", "lose", "lose", "sweep", "cancel")
ENDS_A_LEASE = {"TaskCompleted", "AttemptFailed", "AttemptLost", "TaskSuspended", "TaskCancelled", "TaskExpired"}
PER_BATCH = st.lists(
    st.tuples(
        st.sampled_from((*OFTEN, *SELDOM)),
        st.integers(0, 50),
    ),
    min_size=1,
    max_size=5,
)
STORY = st.lists(st.tuples(st.sampled_from((0, 0.5, 3, 61)), PER_BATCH, st.booleans()), min_size=5, max_size=25)
SUBMITTALS = st.lists(
    st.builds(
        TaskSubmitted,
        kind=st.sampled_from(("a", "b")),
        run_at=st.sampled_from((NOW, LEASE_UNTIL)),
        priority=st.integers(0, 9),
        max_attempts=st.integers(1, 3),
        backoff_seconds=st.sampled_from((0, 1, 60)),
        deadline_at=st.sampled_from((None, None, stamp(later(NOW, seconds=300)))),
    ),
    min_size=len(TASKS),
    max_size=len(TASKS),
)


class Story(Given):
    """A ledger to which things happen batch after batch, and beside it the leases as the queue has them."""

    def __init__(self, submittals: list[TaskSubmitted]) -> None:
        super().__init__(*(on(i, fact) for i, fact in zip(TASKS, submittals, strict=True)))
        self.leases = dict.fromkeys(TASKS)
        self.events: dict[UUID, list[Event[Any]]] = defaultdict(list)
        self.issued: list[tuple[UUID, UUID, str]] = []
        self.command_ids: list[str] = []

    def command(self, what: str, number: int) -> Command:
        task_id = TASKS[number % len(TASKS)]
        held = self.streams[task_id]
        leased, lease_id, until = self.issued[number % len(self.issued)] if self.issued else (task_id, STALE, NOW)
        match what:
            case "claim":
                return claim(*(("a",), ("b",), ("a", "b"))[number % 3], n=1 + number % 4, lease_seconds=1 + number)
            case "claim one":
                return ClaimTasks(worker="w-2", task_id=task_id, lease_seconds=1 + number)
            case "complete":
                return CompleteTask(task_id=leased, lease_id=lease_id)
            case "fail" | "give up":
                return FailTask(task_id=leased, lease_id=lease_id, retryable=what == "fail")
            case "lose":
                return by_its_id(LoseAttempt(task_id=leased, lease_id=lease_id, deadline=until))
            case "sweep" if number % 2:
                return by_its_id(QueueTask(task_id=task_id, deadline=held.run_at))
            case "sweep":
                return by_its_id(ExpireTask(task_id=task_id, deadline=held.deadline_at or NOW))
            case "cancel":
                return CancelTask(task_id=task_id)
            case _:
                return RedriveTask(task_id=task_id, reason="again")

    def goes_on(self, seconds_later: float, commands: list[Command]) -> None:
        batch = self.batch(seconds_later)
        for number, command in enumerate(commands):
            by = SYSTEM if isinstance(command, Due) else OPERATOR if isinstance(command, RedriveTask) else AGENT
            if by is not SYSTEM:
                command.command_id = f"{self.size}-{number}"
            batch.decide(pending_of(command, by))
        for row in batch.append.events:
            event = decode(row.entry, row.payload, row.type)
            self.take(event)
            self.events[event.stream_id].append(event)
            if isinstance(event.data, TaskClaimed):
                self.issued.append((event.stream_id, event.data.lease_id, event.data.lease_until))
                self.leases[event.stream_id] = event.data.lease_until
        self.command_ids += [f"{row.principal} {row.command_id}" for row in batch.append.commands]
        self.recorded_at = batch.recorded_at


@settings(max_examples=300, deadline=None)
@for_all(SUBMITTALS, STORY)
def test_whatever_happens_in_whatever_order_the_rules_hold(submittals: list[TaskSubmitted], story: Any) -> None:
    ledger = Story(submittals)
    for seconds_later, steps, is_renewed in story:
        if is_renewed:
            for task_id, until in ledger.leases.items():
                ledger.leases[task_id] = until and max(until, stamp(ledger.recorded_at + timedelta(seconds=90)))
        ledger.goes_on(seconds_later, [ledger.command(*step) for step in steps])
    assert len(set(ledger.command_ids)) == len(ledger.command_ids), "what is due is done once"
    for task_id, events in ledger.events.items():
        if events[0].stream_type == "task":
            assert_the_rules_hold(events, ledger.streams[task_id].max_attempts)


def assert_the_rules_hold(events: list[Event[Any]], attempts_max: int) -> None:
    """Never two leases, never more attempts than there may be, and no way out of an end."""
    lease_id: UUID | None = None
    begun = 0
    end = ""
    for event in events:
        if event.type == "LateResultRefused":
            continue
        assert not end or (end, event.type) == ("TaskDeadLettered", "TaskRedriven"), f"{event.type} after {end}"
        end = event.type if event.type in ("TaskCompleted", "TaskCancelled", "TaskExpired", "TaskDeadLettered") else ""
        if isinstance(event.data, TaskClaimed):
            assert lease_id is None, "never two leases at once"
            lease_id, begun = event.data.lease_id, begun + 1
            assert begun <= attempts_max
        elif event.type in ENDS_A_LEASE:
            assert lease_id in (None, getattr(event.data, "lease_id", lease_id))
            lease_id = None
        elif event.type == "TaskRedriven":
            begun = 0
