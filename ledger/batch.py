"""One batch: commands decided in order on what this process knows, and the rows that would record them.

Pure computation: no I/O, and the only time is the one it is told. Nothing decided here is true
until the store has appended it, so a batch that misses is thrown away and decided again; a caller's command
keeps its ids then. A command sees the effects of those before it.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from types import ModuleType
from typing import Any, Protocol
from uuid import UUID, uuid5

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from ledger import record, session
from ledger.commands import Command, ExpireSession, Receipt
from ledger.entry import Event, canonical, encode, leaf_hash
from ledger.errors import (
    AlreadyExists,
    Forbidden,
    MalformedRequest,
    MunimentError,
    NotFound,
    PreconditionFailed,
    RateLimited,
)
from ledger.events import SYSTEM, CommandRefused, Fact, Stamp, stamp
from ledger.pending import Pending, Verdict
from ledger.queue import closes, opened
from ledger.reactions import REACTIONS
from ledger.store import Append, CommandRow, EventRow, OpenItem
from ledger.vault import Place, Vault

RULES: dict[str, tuple[ModuleType, type[Any]]] = {
    "session": (session, session.Session),
    "record": (record, record.RecordedFact),
}
"""By stream type: the module with `decide` and `evolve`, and the state they work on."""

REFUSALS_PER_MINUTE_MAX = 60
"""Recorded refusals of one principal a minute, so that nobody fills a ledger with noise."""

CLAIM_AHEAD_SECONDS = 5
"""How far ahead of the ledger's clock a caller's `occurred_at` may be."""


class NotLoaded(Exception):
    """A decision needs a stream, or a root session's open items, that this process has not read yet."""

    def __init__(self, *, stream: UUID | None = None, root: UUID | None = None) -> None:
        self.stream, self.root = stream, root


_UNREAD = object()


class Known(Protocol):
    """What a batch is decided on: what this process knows of a ledger of `size` events, or a batch on its
    way there, which will have made it that size."""

    project_id: str
    ledger_id: UUID
    size: int
    recorded_at: datetime

    def knows(self, stream_id: UUID) -> bool:
        """Whether `stream` can tell."""
        ...

    def stream(self, stream_id: UUID) -> Any:
        """The state of a stream, None where there is none. Raises NotLoaded."""
        ...

    def open_items(self, root_session_id: UUID) -> Mapping[UUID, OpenItem]:
        """What is open under a root session. Raises NotLoaded."""
        ...

    def refusals_left(self, principal: str) -> int:
        """How many refusals of this principal may still be recorded within this minute."""
        ...


def expiry_command_id(command: ExpireSession) -> str:
    """Made from stream and deadline, so that any number of sweepers do it once."""
    return str(uuid5(command.session_id, f"expire {command.deadline}"))


class Batch:
    """Commands decided together. It is the `World` that their rules see."""

    def __init__(
        self,
        known: Known,
        recorded_at: datetime,
        vault: Vault,
        *,
        session_retention_days: int,
    ) -> None:
        self._known = known
        self.project_id = known.project_id
        self.ledger_id = known.ledger_id
        self._vault = vault
        self._retention = timedelta(days=session_retention_days)
        self.recorded_at = recorded_at
        self.now: Stamp = stamp(recorded_at)
        self._idle_deadline: Stamp | None = None
        self.size = known.size
        self.append = Append(ledger_id=known.ledger_id, seen=known.size, recorded_at=recorded_at)
        self.streams: dict[UUID, Any] = {}
        self.items: dict[UUID, dict[UUID, OpenItem]] = {}
        self.receipts: dict[tuple[str, str], Receipt] = {}
        self.refused: Counter[str] = Counter()

    def rebase(self, known: Known) -> None:
        """What this batch was decided on has become part of `known`: let go of it."""
        self._known = known

    def move_on(self, moment: datetime) -> None:
        """What is decided from here on is decided, and recorded, at `moment`."""
        self.recorded_at = self.append.recorded_at = moment
        self.now, self._idle_deadline = stamp(moment), None

    def believe_absent(self, stream_ids: Iterable[UUID]) -> None:
        """Take it that these streams, which are not known, do not exist."""
        self.streams.update(dict.fromkeys(stream_ids))

    # The world of a rule

    @property
    def idle_deadline(self) -> Stamp:
        if self._idle_deadline is None:
            self._idle_deadline = stamp(self.recorded_at + self._retention)
        return self._idle_deadline

    def knows(self, stream_id: UUID) -> bool:
        return stream_id in self.streams or self._known.knows(stream_id)

    def stream(self, stream_id: UUID) -> Any:
        state = self.streams.get(stream_id, _UNREAD)
        return self._known.stream(stream_id) if state is _UNREAD else state

    def open_items(self, root_session_id: UUID) -> Mapping[UUID, OpenItem]:
        items = self.items.get(root_session_id)
        return self._known.open_items(root_session_id) if items is None else items

    def refusals_left(self, principal: str) -> int:
        return self._known.refusals_left(principal) - self.refused[principal]

    # Deciding

    def decide(self, pending: Pending) -> Verdict:
        """What becomes of one command, after all that were decided before it in this batch.

        A recorded refusal is a Receipt; one that leaves no trace is returned as its error. Raises NotLoaded.
        """
        command = pending.command
        for stream_id in command.reads:
            self._expired(stream_id)
        state = self._expired(pending.target)
        earlier = self.receipts.get(pending.key)
        if earlier is not None:  # a sweeper's command, which the line above or a neighbour has just done
            return replace(earlier, replayed=True)
        try:
            self._admit(pending, state)
            facts = RULES[command.stream_type][0].decide(state, command, self)
        except MunimentError as refusal:
            return self._refuse(pending, refusal) if refusal.recorded else refusal
        return self._effect(pending, state, facts)

    def _expired(self, stream_id: UUID) -> Any:
        """The state of a stream after its expiry, if that is due: it never waits for the sweeper, and it comes
        first, also when the command is then refused."""
        state = self.stream(stream_id)
        if isinstance(state, session.Session):
            expiry = session.due(state, self.now)
            if expiry is not None:
                pending = self._system(expiry, expiry_command_id(expiry))
                return self._effect(pending, state, session.decide(state, expiry, self)).state
        return state

    def _admit(self, pending: Pending, state: Any) -> None:
        """Refuse a command that this actor may not give, or not on what is really there."""
        command, actor = pending.command, pending.actor
        if actor is not SYSTEM and command.roles.isdisjoint(actor.roles):
            raise Forbidden(action=type(command).__name__, needed=sorted(command.roles), roles=list(actor.roles))
        claimed = command.occurred_at
        if claimed is not UNSET and claimed > self.recorded_at + timedelta(seconds=CLAIM_AHEAD_SECONDS):
            detail = f"it is in the future: it is {self.now} here"
            raise MalformedRequest([{"pointer": "/occurred_at", "detail": detail}])
        if state is not None and not isinstance(state, RULES[command.stream_type][1]):
            taken = AlreadyExists if command.creates else NotFound
            raise taken(what=command.stream_type, id=pending.target)
        if pending.expected_version is not None:
            if state is None and not command.creates:
                raise NotFound(what=command.stream_type, id=pending.target)
            version = state.version if state is not None else 0
            if version != pending.expected_version:
                raise PreconditionFailed(id=pending.target, expected=pending.expected_version, current=version)

    def _effect(self, pending: Pending, state: Any, facts: list[Fact]) -> Receipt:
        """Record the facts, and then, in the same commit, what follows from them, level by level."""
        if not facts and pending.actor is SYSTEM:
            # Too early, or too late: it leaves no trace, for the same id may be right the next time.
            return _said(self._row(pending, 200, 0, 0), state)
        row = len(self.append.commands)
        after = self.size + len(facts)
        triggers = deque((pending, event) for event in self._record(pending, state, facts))
        while triggers:
            cause, event = triggers.popleft()
            if reaction := REACTIONS.get(type(event.data)):
                for command in reaction(event, self):
                    triggers.extend(self._react(cause, event, command))
        if self.size > after:  # the answer has seen what followed
            self.append.commands[row] = self.append.commands[row]._replace(seen_position=self.size)
        return self._receipt(pending, self.append.commands[row], self.stream(pending.target))

    def _record(self, pending: Pending, state: Any, facts: list[Fact]) -> list[Event[Any]]:
        first = self.size + 1
        events = []
        for index, fact in enumerate(facts):
            events.append(self._stage(pending, state, fact, index))
            state = self.streams[pending.target]
        status = 201 if pending.command.creates else 200
        self.append.commands.append(self._row(pending, status, first, len(facts)))
        return events

    def _react(self, cause: Pending, event: Event[Any], command: Command) -> Iterator[tuple[Pending, Event[Any]]]:
        target = command.target
        assert target is not None
        pending = self._system(command, str(uuid5(event.event_id, str(target))))
        pending.causation_id, pending.correlation_id = event.event_id, event.correlation_id
        pending.traceparent = cause.traceparent
        state = self._expired(target)
        try:
            facts = RULES[command.stream_type][0].decide(state, command, self)
        except MunimentError:
            return  # it ended by itself, just now
        followed = self._record(pending, state, facts)
        self._receipt(pending, self.append.commands[-1], self.stream(target))
        yield from ((pending, follow_up) for follow_up in followed)

    def _system(self, command: Command, command_id: str) -> Pending:
        target = command.target
        assert target is not None
        asked = canonical(command)
        return Pending(
            command=command,
            actor=SYSTEM,
            principal=SYSTEM.principal,
            command_id=command_id,
            target=target,
            canonical=asked,
            fingerprint=self._vault.fingerprint(self.project_id, asked),
        )

    def _refuse(self, pending: Pending, refusal: MunimentError) -> Verdict:
        """A refusal is a fact of its own: one event, in its own stream. Too many a minute are not."""
        if self.refusals_left(pending.principal) <= 0:
            return RateLimited(limit=REFUSALS_PER_MINUTE_MAX)
        self.refused[pending.principal] += 1
        command = pending.command
        attempted = msgspec.json.decode(pending.canonical)
        del attempted["type"]
        fact = CommandRefused(
            command_type=type(command).__name__,
            target=command.target,
            status=refusal.status,
            code=refusal.code,
            params=msgspec.to_builtins(refusal.params),
            attempted=attempted,
        )
        self._stage(pending, None, fact, 0)
        row = self._row(pending, refusal.status, self.size, 1)
        self.append.commands.append(row)
        return self._receipt(pending, row, None, refusal)

    # Rows

    def _stage(self, pending: Pending, before: Any, fact: Fact, index: int) -> Event[Any]:
        """Give one fact its place, after `before`, and its bytes. Returns the event as it was decided, before
        sealing."""
        command = pending.command
        stream_type = fact.stream_type
        stream_id = pending.target
        if stream_type == "refusal":
            # The keyed fingerprint is in it, or a stranger could compute the id and take it first.
            name = f"{pending.principal}\n{pending.command_id}\n{pending.fingerprint.hex()}"
            stream_id = uuid5(self.ledger_id, name)
        session_id, root_session_id = self._session_of(pending, before, fact)
        event: Event[Any] = Event(
            v=1,
            project=self.project_id,
            ledger=self.ledger_id,
            event_id=pending.event_id(index),
            stream_type=stream_type,
            stream_id=stream_id,
            stream_version=1 if before is None else before.version + 1,
            type=type(fact).__name__,
            schema_version=fact.schema_version,
            occurred_at=self.now if command.occurred_at is UNSET else stamp(command.occurred_at),
            recorded_at=self.now,
            actor=pending.actor,
            command_id=pending.command_id,
            correlation_id=_given(command.correlation_id)
            or pending.correlation_id
            or (str(root_session_id) if root_session_id else pending.command_id),
            data=fact,
            session_id=session_id,
            root_session_id=root_session_id,
            causation_id=_given(command.causation_id) or pending.causation_id,
            traceparent=pending.traceparent,
            external_id=_given(command.external_id),
            refs=command.refs,
            reason=None if "reason" in fact.__struct_fields__ else getattr(command, "reason", None),
        )
        sealed = self._seal(event) if b"$personal" in pending.canonical else event
        entry, payload = encode(sealed)
        self.size += 1
        self.append.events.append(
            EventRow(stream_id, event.stream_version, event.type, entry, leaf_hash(entry), payload)
        )
        if stream_type != "refusal":
            self.streams[stream_id] = RULES[stream_type][0].evolve(before, sealed)
        self._keep_items(sealed)
        return event

    def _seal(self, event: Event[Any]) -> Event[Any]:
        place = Place(
            project_id=event.project,
            stream_id=event.stream_id,
            stream_version=event.stream_version,
            event_id=event.event_id,
            path="",
        )

        def seal(value: Any, path: str) -> Any:
            return self._vault.seal(event.project, msgspec.to_builtins(value), replace(place, path=path))

        fields = {name: getattr(event.data, name) for name in event.data.personal}
        data = replace(event.data, **{name: seal(value, f"/data/{name}") for name, value in fields.items()})
        return replace(event, data=data, reason=seal(event.reason, "/reason"))

    def _session_of(self, pending: Pending, before: Any, fact: Fact) -> tuple[UUID | None, UUID | None]:
        """The session an event belongs to, and the root above it."""
        command = pending.command
        if isinstance(before, session.Session):
            return before.session_id, before.root_session_id
        session_id = pending.target if command.stream_type == "session" else getattr(command, "session_id", None)
        if not isinstance(session_id, UUID):
            return None, None
        state = self.stream(session_id)
        if isinstance(state, session.Session):
            return session_id, state.root_session_id
        if fact.stream_type == "refusal":
            return None, None
        parent = self.stream(parent_id) if (parent_id := getattr(command, "parent_session_id", None)) else None
        return session_id, parent.root_session_id if parent is not None else session_id

    def _keep_items(self, event: Event[Any]) -> None:
        item = opened(event)
        if item is not None:
            self._items_of(item.root_session_id)[item.item_id] = item
            self.append.opened[item.item_id] = item
        elif closes(event):
            state = self.streams[event.stream_id]
            if state.parent_session_id is None:
                return
            with suppress(NotLoaded):  # what was never read needs no keeping
                self._items_of(state.root_session_id).pop(event.stream_id, None)
            if self.append.opened.pop(event.stream_id, None) is None:
                self.append.closed.add(event.stream_id)

    def _items_of(self, root_session_id: UUID) -> dict[UUID, OpenItem]:
        return self.items.setdefault(root_session_id, dict(self.open_items(root_session_id)))

    def _row(self, pending: Pending, status: int, first: int, count: int) -> CommandRow:
        kind = type(pending.command).__name__
        key, mark, target = pending.key, pending.fingerprint, pending.target
        return CommandRow(*key, mark, kind, target, status, first if count else 0, count, self.size)

    def _receipt(self, pending: Pending, row: CommandRow, state: Any, refusal: MunimentError | None = None) -> Receipt:
        receipt = self.receipts[pending.key] = _said(row, state, refusal)
        return receipt


def _said(row: CommandRow, state: Any, refusal: MunimentError | None = None) -> Receipt:
    return Receipt(
        command_id=row.command_id,
        type=row.type,
        status=row.status,
        target=row.target,
        first_position=row.first_position,
        event_count=row.event_count,
        seen_position=row.seen_position,
        state=state,
        refusal=refusal,
    )


def _given(value: Any) -> Any:
    return None if value is UNSET else value
