"""The rules of a session: one agent at work, until it ends or its time runs out.

pending -> active | expired | cancelled; active -> completed | failed | expired | cancelled. A terminal
state never changes; it may still be annotated. Pure: no clock, no I/O, no view, and no personal field is
ever looked into.
"""

from collections.abc import Callable
from typing import Any, Literal
from uuid import UUID

from msgspec import UNSET, Struct, field
from msgspec.structs import replace

from ledger.commands import AnnotateSession, CancelSession, ChangeSession, Command, OpenSession
from ledger.entry import Event, canonical
from ledger.errors import (
    AlreadyExists,
    InvalidTransition,
    MalformedRequest,
    NotFound,
    OpenWork,
    SessionFull,
    UnknownParent,
)
from ledger.events import (
    Fact,
    SessionActivated,
    SessionAnnotated,
    SessionCancelled,
    SessionCompleted,
    SessionExpired,
    SessionFailed,
    SessionMetadataChanged,
    SessionOpened,
    SessionTaskBound,
)
from ledger.queue import OPEN_ITEMS_MAX, World
from ledger.store import OpenItem
from ledger.system import ExpireSession
from ledger.values import AgentDescription, Json, Stamp, stamp

State = Literal["pending", "active", "completed", "failed", "expired", "cancelled"]
TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})
ALLOWED: dict[str, tuple[str, ...]] = {
    "pending": ("active", "cancelled"),
    "active": ("completed", "failed", "cancelled"),
}
"""What a caller may turn each state into. Only the system expires."""


class Session(Struct, frozen=True, kw_only=True):
    """A session as of some event. `metadata_event_id` and `metadata_version` say which event its metadata
    came from: sealed values in it are bound to that place."""

    session_id: UUID
    agent_role: str
    state: State
    task_id: str | None
    metadata: Json
    metadata_event_id: UUID
    metadata_version: int
    labels: dict[str, str] = field(default_factory=dict)
    agent: AgentDescription | None
    parent_session_id: UUID | None
    root_session_id: UUID
    external_id: str | None
    version: int
    opened_at: Stamp
    updated_at: Stamp
    expires_at: Stamp


def decide(session: Session | None, command: Command, world: World) -> list[Fact]:
    """The facts that `command` makes of `session`; none if it changes nothing. Raises its refusal."""
    if isinstance(command, OpenSession):
        return [_open(session, command, world)]
    if session is None:
        raise NotFound(what="session", id=command.target)
    match command:
        case ChangeSession():
            return _change(session, command, world)
        case CancelSession():
            _require(session, "CancelSession", "cancelled")
            return [SessionCancelled(reason=command.reason, cascade=command.cascade)]
        case AnnotateSession():
            return [SessionAnnotated(text=command.text)]
        case ExpireSession():
            return [SessionExpired(deadline=command.deadline)] if command == due(session, world.now) else []
        case _:
            raise TypeError(f"{type(command).__name__} is not a session's command")


def due(session: Session, now: Stamp) -> ExpireSession | None:
    """The expiry that must come before anything else is decided on this session."""
    if session.state in TERMINAL or session.expires_at > now:
        return None
    return ExpireSession(session_id=session.session_id, deadline=session.expires_at)


def item(session: Session) -> OpenItem | None:
    """What it is among the open items of its root: a child that has not ended."""
    if session.parent_session_id is None or session.state in TERMINAL:
        return None
    return OpenItem(session.session_id, "session", session.parent_session_id, session.root_session_id)


def _open(session: Session | None, command: OpenSession, world: World) -> SessionOpened:
    if session is not None:
        raise AlreadyExists(what="session", id=session.session_id)
    if command.parent_session_id:
        parent = world.stream(command.parent_session_id)
        if not isinstance(parent, Session):
            raise UnknownParent(what="session", id=command.parent_session_id)
        if len(world.open_items(parent.root_session_id)) >= OPEN_ITEMS_MAX:
            raise SessionFull(id=parent.root_session_id, limit=OPEN_ITEMS_MAX)
    expires_at = stamp(command.expires_at) if command.expires_at else world.idle_deadline
    if expires_at <= world.now:
        raise MalformedRequest([{"pointer": "/expires_at", "detail": "it is not in the future"}])
    return SessionOpened(
        agent_role=command.agent_role,
        expires_at=expires_at,
        task_id=command.task_id,
        metadata=command.metadata,
        labels=command.labels,
        parent_session_id=command.parent_session_id,
        agent=command.agent,
    )


def _change(session: Session, command: ChangeSession, world: World) -> list[Fact]:
    facts: list[Fact] = []
    if command.task_id is not UNSET and command.task_id != session.task_id:
        facts.append(SessionTaskBound(task_id=command.task_id))
    if command.metadata is not UNSET and canonical(command.metadata) != canonical(session.metadata):
        facts.append(SessionMetadataChanged(metadata=command.metadata))
    if command.status is not UNSET and command.status != session.state:
        _require(session, "ChangeSession", command.status)
        if command.status == "completed":
            _require_no_open_work(session, command, world)
        facts.append(_ENDING[command.status](command))
    elif facts and session.state in TERMINAL:
        _require(session, "ChangeSession", session.state)
    return facts


def _require_no_open_work(session: Session, command: ChangeSession, world: World) -> None:
    if command.force and command.reason:
        return
    items = world.open_items(session.root_session_id).values()
    count = sum(item.session_id == session.session_id and item.item_type in ("task", "approval") for item in items)
    if count:
        raise OpenWork(id=session.session_id, count=count)


def _require(session: Session, command: str, wanted: str) -> None:
    allowed = ALLOWED.get(session.state, ())
    if wanted not in allowed:
        raise InvalidTransition(command=command, id=session.session_id, current_state=session.state, allowed=allowed)


_ENDING: dict[str, Callable[[ChangeSession], Fact]] = {
    "active": lambda _: SessionActivated(),
    "completed": lambda _: SessionCompleted(),
    "failed": lambda command: SessionFailed(reason=command.reason),
    "cancelled": lambda command: SessionCancelled(reason=command.reason),
}


def evolve(session: Session | None, event: Event[Any]) -> Session:
    """`session` after `event`."""
    data = event.data
    if isinstance(data, SessionOpened):
        return Session(
            session_id=event.stream_id,
            agent_role=data.agent_role,
            state="pending",
            task_id=data.task_id,
            metadata=data.metadata,
            metadata_event_id=event.event_id,
            metadata_version=event.stream_version,
            labels=data.labels,
            agent=data.agent,
            parent_session_id=data.parent_session_id,
            root_session_id=event.root_session_id or event.stream_id,
            external_id=event.external_id,
            version=event.stream_version,
            opened_at=event.recorded_at,
            updated_at=event.recorded_at,
            expires_at=data.expires_at,
        )
    assert session is not None, "a session's history begins with SessionOpened"
    changed: dict[str, Any]
    match data:
        case SessionActivated():
            changed = {"state": "active"}
        case SessionCompleted():
            changed = {"state": "completed"}
        case SessionFailed():
            changed = {"state": "failed"}
        case SessionExpired():
            changed = {"state": "expired"}
        case SessionCancelled():
            changed = {"state": "cancelled"}
        case SessionTaskBound():
            changed = {"task_id": data.task_id}
        case SessionMetadataChanged():
            place = {"metadata_event_id": event.event_id, "metadata_version": event.stream_version}
            changed = {"metadata": data.metadata, **place}
        case SessionAnnotated():
            changed = {}
        case _:
            raise TypeError(f"{event.type} is not a session's event")
    return replace(session, version=event.stream_version, updated_at=event.recorded_at, **changed)
