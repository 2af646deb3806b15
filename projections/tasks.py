"""The view `tasks`: every task as it is now, to be listed by kind, state, session, worker and time.

The dead letters are its tasks in the state `dead`. What came of each attempt is read from the task's own events:
the view keeps no second copy of it.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import msgspec
from msgspec import Struct

from ledger import store
from ledger.entry import Event, Recorded
from ledger.events import (
    AttemptFailed,
    AttemptLost,
    Fact,
    TaskCancelled,
    TaskClaimed,
    TaskCompleted,
    TaskExpired,
    TaskSuspended,
)
from ledger.past import Past
from ledger.postgres import Connection, bigints, byteas, queries, texts, timestamptzs, uuids
from ledger.task import OPEN, Task, evolve
from ledger.values import Stamp, moment
from projections import spans
from projections.projector import Memory
from projections.segments import Order
from projections.states import States, column

SQL = queries("projections", "tasks")
WRITE = SQL.write + b", " + spans.write("tasks", "task")
VERSION = 2

_tasks = States("task", Task, evolve, lambda task: task.state in OPEN, SQL)
get = _tasks.get


class Filter(Struct, kw_only=True, frozen=True):
    """Which tasks: all that is given must hold. `worker` is who has it in hand now; the times are of submission."""

    kind: str | None = None
    state: str | None = None
    session_id: UUID | None = None
    worker: str | None = None
    since: datetime | None = None
    until: datetime | None = None


class Page(Struct, kw_only=True, frozen=True):
    """A part of a list; `next` is the position to go on after, if there is more."""

    tasks: list[Task]
    next: int | None


Outcome = Literal["completed", "failed", "lost", "suspended", "cancelled", "expired"]


class Attempt(Struct, kw_only=True, frozen=True):
    """One lease of a task, and what came of it; nothing yet while `outcome` is None.

    What is resumed after an approval goes on under its number, with another lease. Sealed values in `error` are
    bound to the event `error_event_id`, the stream's `error_version`-th.
    """

    number: int
    worker: str
    lease_id: UUID
    claimed_at: Stamp
    ended_at: Stamp | None = None
    outcome: Outcome | None = None
    error: Any = None
    error_event_id: UUID | None = None
    error_version: int | None = None


OUTCOMES: dict[type[Fact], Outcome] = {
    TaskCompleted: "completed",
    AttemptFailed: "failed",
    AttemptLost: "lost",
    TaskSuspended: "suspended",
    TaskCancelled: "cancelled",
    TaskExpired: "expired",
}
"""What ends an attempt, if one is running."""


async def project(
    connection: Connection, ledger_id: UUID, batch: Sequence[Recorded], memory: Memory
) -> dict[str, bytes]:
    """What brings the view from just before `batch` to just after it: the values of WRITE."""
    kept = await _tasks.after(connection, ledger_id, batch, memory)
    if not kept:
        return {}
    tasks = [one.state for one in kept.values()]
    return {
        "task_ids": uuids(kept),
        "task_positions": bigints(one.position for one in kept.values()),
        "task_submitted_ats": timestamptzs(moment(task.submitted_at) for task in tasks),
        "task_kinds": texts(column(task.kind) for task in tasks),
        "task_states": texts(task.state for task in tasks),
        "task_sinces": bigints(one.since for one in kept.values()),
        "task_session_ids": uuids(task.session_id for task in tasks),
        "task_workers": texts(column(task.worker or "") for task in tasks),
        "tasks": byteas(one.content for one in kept.values()),
        **spans.columns("task", (span for one in kept.values() for span in one.spans)),
    }


async def search(
    connection: Connection,
    ledger_id: UUID,
    wanted: Filter,
    *,
    limit: int,
    after: int | None = None,
    order: Order = "desc",
) -> Page:
    """Up to `limit` tasks beyond the position `after`, in the order they were submitted or the other way."""
    values = {name: value for name, value in msgspec.structs.asdict(wanted).items() if value is not None}
    parts = [SQL.list, *(getattr(SQL, name) for name in values)]
    if after is not None:
        parts.append(getattr(SQL, f"after_{order}"))
        values["after"] = after
    parts.append(getattr(SQL, order))
    tasks, following = await _tasks.page(connection, parts, values | {"ledger_id": ledger_id}, limit)
    return Page(tasks=tasks, next=following)


async def search_past(
    connection: Connection,
    ledger_id: UUID,
    past: Past,
    wanted: Filter,
    *,
    limit: int,
    after: int | None = None,
    order: Order = "desc",
    reached: int,
) -> Page:
    """The same, as of `past`; the view has `reached` that position. `worker` is who had it in hand then."""
    if wanted.worker is not None:
        if wanted.state not in (None, "running"):
            return Page(tasks=[], next=None)  # nobody has in hand what does not run
        wanted = msgspec.structs.replace(wanted, state="running")
    values = {name: value for name, value in msgspec.structs.asdict(wanted).items() if value is not None}
    filters = [getattr(SQL, name) for name in values if name not in ("state", "worker")]
    tasks, following = await _tasks.past_page(
        connection,
        ledger_id,
        past,
        lambda going_on: _past_list(wanted, filters, order, going_on),
        values | {"classes": reached.bit_length()},
        limit=limit,
        after=after,
        holds=lambda task: (
            wanted.state in (None, task.state)
            and (wanted.worker is None or column(task.worker or "") == column(wanted.worker))
        ),
    )
    return Page(tasks=tasks, next=following)


def _past_list(wanted: Filter, filters: list[bytes], order: Order, going_on: bool) -> bytes:
    """What there was: in any state; of a few, what may have been in one; in one since before, or in a span of it."""
    in_order: bytes = getattr(SQL, order)
    end = [*filters, *([getattr(SQL, f"after_{order}")] if going_on else []), in_order]
    if wanted.state is None:
        return b"\n".join([SQL.then, *end])
    if wanted.session_id is not None:
        return b"\n".join([SQL.then, SQL.perhaps_then, *end])
    of = [SQL.then_of.replace(b"{filters}", b"\n".join(filters))] if filters else []
    return spans.united([SQL.then, SQL.since_then, *end], spans.part("tasks", of, order, going_on)) + b"\n" + in_order


async def attempts(
    connection: Connection, ledger_id: UUID, task_id: UUID, past: Past | None = None
) -> list[Attempt] | None:
    """Every attempt of the task that there was then, or is now, in order, from the ledger itself; None where there is
    no such task."""
    upto = past.position if past else None
    events = [recorded.event for recorded in await store.read_streams(connection, ledger_id, [task_id], upto=upto)]
    return _attempts(events) if events and events[0].stream_type == "task" else None


def _attempts(events: Iterable[Event[Any]]) -> list[Attempt]:
    made: list[Attempt] = []
    for event in events:
        data = event.data
        if isinstance(data, TaskClaimed):
            made.append(
                Attempt(number=data.attempt, worker=data.worker, lease_id=data.lease_id, claimed_at=event.recorded_at)
            )
        elif made and made[-1].outcome is None and (outcome := OUTCOMES.get(type(data))):
            ended: dict[str, Any] = {"ended_at": event.recorded_at, "outcome": outcome}
            if isinstance(data, AttemptFailed):
                place = {"error_event_id": event.event_id, "error_version": event.stream_version}
                ended |= {"error": data.error, **place}
            made[-1] = msgspec.structs.replace(made[-1], **ended)
    return made
