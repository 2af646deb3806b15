"""The rules of a record: a plain fact, written once, in a stream of its own. It has no state to change."""

from typing import Any, Literal
from uuid import UUID

from msgspec import Struct

from ledger import session
from ledger.commands import Command, Record
from ledger.entry import Event
from ledger.errors import AlreadyExists, NotFound, UnknownParent
from ledger.events import Fact, FactRecorded
from ledger.queue import World
from ledger.values import Actor, Artifact, Ref, Stamp, Usage, stamp


class RecordedFact(Struct, frozen=True, kw_only=True):
    """A record as it was written. `event_id` is the place that sealed values in `body` are bound to."""

    record_id: UUID
    event_id: UUID
    kind: str
    session_id: UUID | None
    task_id: UUID | None
    approval_id: UUID | None
    parent_record_id: UUID | None
    status: Literal["ok", "error"] | None
    started_at: Stamp | None
    ended_at: Stamp | None
    body: Any
    usage: Usage | None
    artifacts: tuple[Artifact, ...]
    refs: tuple[Ref, ...]
    external_id: str | None
    actor: Actor
    version: int
    occurred_at: Stamp
    recorded_at: Stamp


def decide(record: RecordedFact | None, command: Command, world: World) -> list[Fact]:
    """The fact that `command` records; in any state of its session. Raises its refusal."""
    assert isinstance(command, Record)
    if record is not None:
        raise AlreadyExists(what="record", id=record.record_id)
    if command.session_id and not isinstance(world.stream(command.session_id), session.Session):
        raise NotFound(what="session", id=command.session_id)
    if command.parent_record_id and not isinstance(world.stream(command.parent_record_id), RecordedFact):
        raise UnknownParent(what="record", id=command.parent_record_id)
    return [
        FactRecorded(
            kind=command.kind,
            task_id=command.task_id,
            approval_id=command.approval_id,
            parent_record_id=command.parent_record_id,
            status=command.status,
            started_at=stamp(command.started_at) if command.started_at else None,
            ended_at=stamp(command.ended_at) if command.ended_at else None,
            body=command.body,
            usage=command.usage,
            artifacts=command.artifacts,
        )
    ]


def evolve(record: RecordedFact | None, event: Event[Any]) -> RecordedFact:
    """The record that `event` is."""
    assert record is None, "a record is written once"
    data: FactRecorded = event.data
    return RecordedFact(
        record_id=event.stream_id,
        event_id=event.event_id,
        kind=data.kind,
        session_id=event.session_id,
        task_id=data.task_id,
        approval_id=data.approval_id,
        parent_record_id=data.parent_record_id,
        status=data.status,
        started_at=data.started_at,
        ended_at=data.ended_at,
        body=data.body,
        usage=data.usage,
        artifacts=data.artifacts,
        refs=event.refs,
        external_id=event.external_id,
        actor=event.actor,
        version=event.stream_version,
        occurred_at=event.occurred_at,
        recorded_at=event.recorded_at,
    )


def due(record: RecordedFact, now: Stamp) -> None:
    """Never: it is done."""


def item(record: RecordedFact) -> None:
    """Never: it is done."""
