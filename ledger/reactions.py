"""The table of follow-ups: an event, and the system's commands on other streams that belong to it.

They run in the same commit as their trigger, with its event id as their cause, and are bounded by what a
session may have open.
"""

from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

from ledger import approval
from ledger.commands import CancelSession, CancelTask, Command
from ledger.entry import Event
from ledger.events import (
    ApprovalCancelled,
    ApprovalDenied,
    ApprovalExpired,
    ApprovalGranted,
    ApprovalSuperseded,
    ApprovalWithdrawn,
    Fact,
    SessionCancelled,
    SessionCompleted,
    SessionExpired,
    SessionFailed,
    TaskCancelled,
    TaskDeadLettered,
    TaskExpired,
)
from ledger.queue import World
from ledger.store import OpenItem
from ledger.system import EndApproval, ResumeTask


def _open_items(root: UUID, world: World) -> list[OpenItem]:
    """What is open under a root, before any follow-up takes something out."""
    return list(world.open_items(root).values())


def _end_work(event: Event[Any], world: World) -> Iterator[Command]:
    """With a session end its questions and its tasks; a grant was given, and stays."""
    assert event.root_session_id is not None
    for item in _open_items(event.root_session_id, world):
        if item.session_id == event.stream_id and item.item_type == "approval":
            yield EndApproval(approval_id=item.item_id, cause="session_ended")
        elif item.session_id == event.stream_id and item.item_type == "task":
            yield CancelTask(task_id=item.item_id, reason="session ended")


def _cancel_session(event: Event[SessionCancelled], world: World) -> Iterator[Command]:
    yield from _end_work(event, world)
    if not event.data.cascade or event.root_session_id is None:
        return
    children = {i.item_id: i for i in _open_items(event.root_session_id, world) if i.item_type == "session"}
    for item in children.values():
        above: UUID | None = item.session_id
        # What has ended may have left children that live on: they are below whoever it was below.
        while above and above != event.stream_id and above not in children:
            above = world.stream(above).parent_session_id
        if above == event.stream_id:
            yield CancelSession(session_id=item.item_id, reason=event.data.reason, cascade=True)


def _end_questions(event: Event[Any], world: World) -> Iterator[Command]:
    """Nobody needs to decide any more what a task was to be allowed: what it waits for, in whatever session that was
    asked, and what else was asked for it."""
    ended = world.stream(event.stream_id)
    items = _open_items(ended.root_session_id or ended.task_id, world)
    asked = [item.item_id for item in items if item.task_id == ended.task_id and item.item_type == "approval"]
    waited_for = world.stream(ended.approval_id) if ended.approval_id else None
    if waited_for is not None and waited_for.state == "pending":
        asked.append(ended.approval_id)
    for approval_id in dict.fromkeys(asked):
        yield EndApproval(approval_id=approval_id, cause="task_ended")


def _resume(event: Event[Any], world: World) -> Iterator[Command]:
    """A task that waits for this decision goes on, whichever it is; or waits for what stands instead of it."""
    decided: approval.Approval = world.stream(event.stream_id)
    waiting = world.stream(decided.task_id) if decided.task_id else None
    if waiting is not None and waiting.state == "waiting" and waiting.approval_id == decided.approval_id:
        yield ResumeTask(
            task_id=waiting.task_id,
            approval_id=decided.approval_id,
            decision=approval.decision(decided),
            instead=decided.superseded_by,
        )


REACTIONS: dict[type[Fact], Callable[[Event[Any], World], Iterator[Command]]] = {
    SessionCompleted: _end_work,
    SessionFailed: _end_work,
    SessionExpired: _end_work,
    SessionCancelled: _cancel_session,
    TaskCancelled: _end_questions,
    TaskExpired: _end_questions,
    TaskDeadLettered: _end_questions,
    ApprovalGranted: _resume,
    ApprovalDenied: _resume,
    ApprovalExpired: _resume,
    ApprovalWithdrawn: _resume,
    ApprovalCancelled: _resume,
    ApprovalSuperseded: _resume,
}
