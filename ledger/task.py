"""The rules of a task: work that is handed out by lease, or that must be gated by an approval.

queued -> running | waiting (started, then suspended) | cancelled | expired; running -> completed | retrying | dead |
waiting | cancelled | expired; retrying -> queued; waiting -> queued. Completed, cancelled and expired end it; dead is
left only by redrive. Who holds the lease in force, and nobody else, says what came of an attempt: a lease ends by
its result, or once it was seen under the ledger's lock that no heartbeat came in time. Pure: no clock, no I/O, and no
personal field is ever looked into.
"""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any, Literal
from uuid import UUID

from msgspec import UNSET, Struct
from msgspec.structs import replace

from ledger import approval
from ledger.commands import (
    CancelTask,
    ClaimTasks,
    Command,
    CompleteTask,
    FailTask,
    RedriveTask,
    SubmitTask,
    SuspendTask,
)
from ledger.entry import Event
from ledger.errors import (
    AlreadyExists,
    InvalidTransition,
    LeaseLost,
    MalformedRequest,
    MunimentError,
    NotFound,
    NotUsable,
    SessionFull,
)
from ledger.events import (
    AttemptFailed,
    AttemptLost,
    Fact,
    LateResultRefused,
    TaskCancelled,
    TaskClaimed,
    TaskCompleted,
    TaskDeadLettered,
    TaskExpired,
    TaskQueued,
    TaskRedriven,
    TaskResumed,
    TaskRetryScheduled,
    TaskSubmitted,
    TaskSuspended,
)
from ledger.queue import OPEN_ITEMS_MAX, On, RefusedOnRecord, World
from ledger.session import Session
from ledger.store import OpenItem, QueuedTask
from ledger.system import Due, ExpireTask, LoseAttempt, QueueTask, ResumeTask
from ledger.values import Principal, Stamp, moment, stamp

State = Literal["queued", "running", "waiting", "retrying", "completed", "dead", "cancelled", "expired"]
OPEN = ("queued", "running", "waiting", "retrying")
ALLOWED: dict[str, tuple[str, ...]] = {
    "queued": ("running", "cancelled"),
    "running": ("completed", "retrying", "dead", "waiting", "cancelled"),
    "waiting": ("cancelled",),
    "retrying": ("cancelled",),
    "dead": ("queued",),
}
"""What a caller may turn each state into."""

AGING_SECONDS = 60
"""One step of priority is worth this much waiting: so nothing starves."""

BACKOFF_SECONDS_MAX = 3600


class Task(Struct, frozen=True, kw_only=True):
    """A task as of some event. `payload_event_id` and `payload_version` say which event its payload came from, and
    `result_…` its result: sealed values in them are bound to those places."""

    task_id: UUID
    kind: str
    state: State
    payload: Any
    payload_event_id: UUID
    payload_version: int
    priority: int
    attempt: int
    max_attempts: int
    attempts_left: int
    backoff_seconds: int
    run_at: Stamp
    deadline_at: Stamp | None
    session_id: UUID | None
    root_session_id: UUID | None
    worker: str | None = None
    holder: Principal | None = None
    lease_id: UUID | None = None
    lease_until: Stamp | None = None
    approval_id: UUID | None = None
    decision: str | None = None
    resumed: bool = False
    result: Any = None
    is_error: bool = False
    result_event_id: UUID | None = None
    result_version: int | None = None
    external_id: str | None
    version: int
    submitted_at: Stamp
    updated_at: Stamp


# What becomes of a command


def decide(task: Task | None, command: Command, world: World) -> Sequence[Fact | On]:
    """The facts that `command` makes of `task`; none if it changes nothing. Raises its refusal."""
    if isinstance(command, SubmitTask):
        return _submit(task, command, world)
    if isinstance(command, ClaimTasks):
        return _claim(task, command, world)
    if task is None:
        raise NotFound(what="task", id=command.target)
    match command:
        case CompleteTask():
            if not _holds(task, command.lease_id, world):
                raise _late(task, command.lease_id, "completed", command.result)
            return [TaskCompleted(lease_id=command.lease_id, result=command.result, is_error=command.is_error)]
        case FailTask():
            if not _holds(task, command.lease_id, world):
                raise _late(task, command.lease_id, "failed", command.error)
            return [
                AttemptFailed(
                    attempt=task.attempt, lease_id=command.lease_id, error=command.error, retryable=command.retryable
                ),
                _after_attempt(task, world.now, retryable=command.retryable),
            ]
        case SuspendTask():
            return _suspend(task, command, world)
        case CancelTask():
            _require(task, command, OPEN)
            return [TaskCancelled(reason=command.reason)]
        case RedriveTask():
            _require(task, command, ("dead",))
            if task.session_id is not None and task.root_session_id is not None:
                _require_room(task.root_session_id, world)
            return [TaskRedriven(reason=command.reason)]
        case _:
            return _follow(task, command, world)


def _follow(task: Task, command: Command, world: World) -> list[Fact]:
    """What the system's own commands make of it; nothing if they come too early or too late."""
    match command:
        case ExpireTask():
            return [TaskExpired(deadline=command.deadline)] if command == due(task, world.now) else []
        case QueueTask():
            return [TaskQueued()] if command == due(task, world.now) else []
        case LoseAttempt():
            if task.state != "running" or task.lease_id != command.lease_id:
                return []
            lease_until = world.lease_until(task.task_id)
            if lease_until is None or lease_until > world.now:
                return []
            lost = AttemptLost(attempt=task.attempt, lease_id=command.lease_id, lease_until=lease_until)
            return [lost, _after_attempt(task, world.now, retryable=True)]
        case ResumeTask():
            if task.state != "waiting" or task.approval_id != command.approval_id:
                return []
            if command.instead is not None:
                return [TaskSuspended(approval_id=command.instead)]
            return [TaskResumed(approval_id=command.approval_id, decision=command.decision)]
        case _:
            raise TypeError(f"{type(command).__name__} is not a task's command")


def due(task: Task, now: Stamp) -> Due | None:
    """What must come before anything else is decided on this task. A lease is not among it: what events say of its
    end is not all there is to know."""
    if task.state in OPEN and task.deadline_at is not None and task.deadline_at <= now:
        return ExpireTask(task_id=task.task_id, deadline=task.deadline_at)
    if task.state == "retrying" and task.run_at <= now:
        return QueueTask(task_id=task.task_id, deadline=task.run_at)
    return None


def item(task: Task) -> OpenItem | None:
    """What it is among the open items of its root; without a session it is among nobody's."""
    if task.session_id is None or task.root_session_id is None or task.state not in OPEN:
        return None
    return OpenItem(task.task_id, "task", task.session_id, task.root_session_id)


def queued(task: Task) -> QueuedTask | None:
    """Its row in the queue, as long as it is open."""
    if task.state not in OPEN:
        return None
    return QueuedTask(
        task_id=task.task_id,
        kind=task.kind,
        session_id=task.session_id,
        state=task.state,
        rank=_rank(task),
        run_at=moment(task.run_at),
        deadline_at=None if task.deadline_at is None else moment(task.deadline_at),
        lease_id=task.lease_id,
        lease_until=None if task.lease_until is None else moment(task.lease_until),
        holder="" if task.holder is None else str(task.holder),
    )


def _rank(task: Task) -> datetime:
    """The lower, the earlier it is handed out."""
    return moment(task.run_at) - timedelta(seconds=task.priority * AGING_SECONDS)


def _submit(task: Task | None, command: SubmitTask, world: World) -> list[Fact]:
    if task is not None:
        raise AlreadyExists(what="task", id=task.task_id)
    if command.session_id is not None:
        session = world.stream(command.session_id)
        if not isinstance(session, Session):
            raise NotFound(what="session", id=command.session_id)
        if session.state not in ("pending", "active"):
            raise InvalidTransition(
                command="SubmitTask", id=session.session_id, current_state=session.state, allowed=()
            )
        _require_room(session.root_session_id, world)
    run_at = max(stamp(command.run_at), world.now) if command.run_at else world.now
    deadline_at = stamp(command.deadline_at) if command.deadline_at else None
    if deadline_at is not None and deadline_at <= run_at:
        raise _malformed("/deadline_at", "it is not after the time from which the task may run")
    facts: list[Fact] = [
        TaskSubmitted(
            kind=command.kind,
            payload=command.payload,
            priority=command.priority,
            max_attempts=command.max_attempts,
            backoff_seconds=command.backoff_seconds,
            run_at=run_at,
            deadline_at=deadline_at,
        )
    ]
    if command.start is not None:
        if run_at > world.now:
            raise _malformed("/run_at", "with `start` it begins now")
        lease_id = command.start.lease_id or world.mint("lease")
        facts.append(_claimed(1, command.start.worker, lease_id, world.now, command.start.lease_seconds))
    return facts


def _claim(task: Task | None, command: ClaimTasks, world: World) -> Sequence[Fact | On]:
    by_kind, by_id = command.kinds is not UNSET, command.task_id is not UNSET
    if by_kind == by_id:
        raise _malformed("/kinds", "a claim names either `kinds` or one `task_id`")
    if by_id:
        if task is None:
            raise NotFound(what="task", id=command.task_id)
        return [_attempt(task, command, world)] if _is_offered(task, command, world.now) else []
    tasks = [task for task in map(world.stream, world.offered(command)) if _is_offered(task, command, world.now)]
    tasks.sort(key=lambda task: (_rank(task), task.run_at, task.submitted_at))
    return [On(task.task_id, _attempt(task, command, world)) for task in tasks[: command.n]]


def _is_offered(task: Task, command: ClaimTasks, now: Stamp) -> bool:
    if task.state != "queued" or task.run_at > now:
        return False
    if command.session_id is not None and task.session_id != command.session_id:
        return False
    return command.kinds is UNSET or task.kind in command.kinds


def _attempt(task: Task, command: ClaimTasks, world: World) -> TaskClaimed:
    """What a resumed task is claimed for is the attempt that was suspended."""
    number = task.attempt if task.resumed else task.attempt + 1
    lease_id = world.mint(f"lease {task.task_id}")
    return _claimed(number, command.worker, lease_id, world.now, command.lease_seconds)


def _claimed(attempt: int, worker: str, lease_id: UUID, now: Stamp, lease_seconds: int) -> TaskClaimed:
    lease_until = stamp(moment(now) + timedelta(seconds=lease_seconds))
    return TaskClaimed(attempt=attempt, worker=worker, lease_id=lease_id, lease_until=lease_until)


def _suspend(task: Task, command: SuspendTask, world: World) -> list[Fact]:
    if not _holds(task, command.lease_id, world):
        raise _late(task, command.lease_id, "suspended")
    asked = command.approval_id
    seen: Any = world.stream(asked)
    while isinstance(seen, approval.Approval) and seen.superseded_by is not None:
        asked, seen = seen.superseded_by, world.stream(seen.superseded_by)
    if not isinstance(seen, approval.Approval) or seen.task_id != task.task_id:
        raise NotFound(what="approval of this task", id=command.approval_id)
    if seen.imported:
        raise NotUsable(id=asked)
    suspended = TaskSuspended(lease_id=command.lease_id, approval_id=asked)
    if seen.state == "pending":
        return [suspended]
    # It was decided before the worker could say that it waits.
    return [suspended, TaskResumed(approval_id=asked, decision=approval.decision(seen))]


def _holds(task: Task, lease_id: UUID, world: World) -> bool:
    """Whether the lease is in force, and the actor's own."""
    return task.state == "running" and task.lease_id == lease_id and task.holder == Principal.of(world.actor)


def _late(
    task: Task, lease_id: UUID, outcome: Literal["completed", "failed", "suspended"], result: Any = None
) -> RefusedOnRecord:
    fact = LateResultRefused(lease_id=lease_id, outcome=outcome, result=result)
    return RefusedOnRecord(LeaseLost(id=task.task_id, lease_id=lease_id), fact)


def _after_attempt(task: Task, now: Stamp, *, retryable: bool) -> Fact:
    if not retryable or task.attempts_left <= 0:
        return TaskDeadLettered(attempts=task.attempt)
    # Never at once: the command that queues it again is known by this time, which no later attempt may have as well.
    wait = max(timedelta(seconds=backoff_seconds(task)), timedelta(microseconds=1))
    return TaskRetryScheduled(run_at=stamp(moment(now) + wait))


def backoff_seconds(task: Task) -> float:
    """Twice as long after each attempt; what else is added, up to a half, depends on task and attempt alone, so
    that those who failed together do not come back together, and a replay comes to the same."""
    base = min(task.backoff_seconds * 2 ** min(task.attempt - 1, 20), BACKOFF_SECONDS_MAX)
    chance = int.from_bytes(sha256(b"%b %d" % (task.task_id.bytes, task.attempt)).digest()[:4], "big") / 2**32
    return float(base * (1 + chance / 2))


def _require(task: Task, command: Command, states: Sequence[str]) -> None:
    if task.state not in states:
        possible = ALLOWED.get(task.state, ())
        raise InvalidTransition(
            command=type(command).__name__, id=task.task_id, current_state=task.state, allowed=possible
        )


def _require_room(root_session_id: UUID, world: World) -> None:
    if len(world.open_items(root_session_id)) >= OPEN_ITEMS_MAX:
        raise SessionFull(id=root_session_id, limit=OPEN_ITEMS_MAX)


def _malformed(pointer: str, detail: str) -> MunimentError:
    return MalformedRequest([{"pointer": pointer, "detail": detail}])


# What a task is after an event


def evolve(task: Task | None, event: Event[Any]) -> Task:
    """`task` after `event`."""
    data = event.data
    if isinstance(data, TaskSubmitted):
        return Task(
            task_id=event.stream_id,
            kind=data.kind,
            state="queued",
            payload=data.payload,
            payload_event_id=event.event_id,
            payload_version=event.stream_version,
            priority=data.priority,
            attempt=0,
            max_attempts=data.max_attempts,
            attempts_left=data.max_attempts,
            backoff_seconds=data.backoff_seconds,
            run_at=data.run_at,
            deadline_at=data.deadline_at,
            session_id=event.session_id,
            root_session_id=event.root_session_id,
            external_id=event.external_id,
            version=event.stream_version,
            submitted_at=event.recorded_at,
            updated_at=event.recorded_at,
        )
    assert task is not None, "a task's history begins with TaskSubmitted"
    changed = _CHANGED[type(data)](task, event)
    return replace(task, version=event.stream_version, updated_at=event.recorded_at, **changed)


_NO_LEASE: dict[str, Any] = {"lease_id": None, "lease_until": None, "holder": None, "worker": None}


def _claimed_by(task: Task, event: Event[TaskClaimed]) -> dict[str, Any]:
    claimed = event.data
    return {
        "state": "running",
        "attempt": claimed.attempt,
        "attempts_left": task.attempts_left - (claimed.attempt > task.attempt),
        "worker": claimed.worker,
        "holder": Principal.of(event.actor),
        "lease_id": claimed.lease_id,
        "lease_until": claimed.lease_until,
        "resumed": False,
    }


def _completed(_: Task, event: Event[TaskCompleted]) -> dict[str, Any]:
    place = {"result_event_id": event.event_id, "result_version": event.stream_version}
    return {"state": "completed", "result": event.data.result, "is_error": event.data.is_error, **place, **_NO_LEASE}


_CHANGED: dict[type[Fact], Callable[[Task, Event[Any]], dict[str, Any]]] = {
    TaskQueued: lambda _, __: {"state": "queued"},
    TaskClaimed: _claimed_by,
    TaskCompleted: _completed,
    AttemptFailed: lambda _, __: {"decision": None, "approval_id": None, **_NO_LEASE},
    AttemptLost: lambda _, __: {"decision": None, "approval_id": None, **_NO_LEASE},
    TaskRetryScheduled: lambda _, event: {"state": "retrying", "run_at": event.data.run_at},
    TaskDeadLettered: lambda _, __: {"state": "dead"},
    TaskSuspended: lambda _, event: {
        "state": "waiting",
        "approval_id": event.data.approval_id,
        "decision": None,
        **_NO_LEASE,
    },
    TaskResumed: lambda _, event: {"state": "queued", "decision": event.data.decision, "resumed": True},
    TaskCancelled: lambda _, __: {"state": "cancelled", **_NO_LEASE},
    TaskExpired: lambda _, __: {"state": "expired", **_NO_LEASE},
    TaskRedriven: lambda task, event: {
        "state": "queued",
        "run_at": event.recorded_at,
        "attempts_left": task.max_attempts,
    },
    LateResultRefused: lambda _, __: {},
}
"""What each event changes, beyond version and time."""
