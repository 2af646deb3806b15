"""One batch: commands decided in order on what this process knows, and the rows that would record them.

Pure computation: no I/O, and the only time is the one it is told. Nothing decided here is true
until the store has appended it, so a batch that misses is thrown away and decided again; a caller's command
keeps its ids then. A command sees the effects of those before it.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid5

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from ledger import adoption, approval, erasure, hold, log_key, record, session, task, view
from ledger.commands import ClaimTasks, Command
from ledger.entry import Event, encode
from ledger.errors import (
    AlreadyExists,
    Forbidden,
    MalformedRequest,
    MunimentError,
    NotFound,
    PreconditionFailed,
    RateLimited,
)
from ledger.events import Fact
from ledger.known import Known, NotLoaded, Offers, Queue
from ledger.log_events import LedgerAdopted
from ledger.merkle import leaf_hash
from ledger.operations import OPERATORS, may_be_of_a_view
from ledger.pending import Pending, Verdict
from ledger.queue import On, RefusedOnRecord, Rules, Same
from ledger.reactions import REACTIONS
from ledger.receipt import Receipt, said
from ledger.store import Append, CommandRow, EventRow, OpenItem
from ledger.subjects import may_be_of_a_subject
from ledger.values import SYSTEM, Actor, Stamp, stamp
from ledger.vault import Place, Vault

RULES: dict[str, tuple[Rules, type[Any]]] = {
    "session": (session, session.Session),
    "record": (record, record.RecordedFact),
    "task": (task, task.Task),
    "approval": (approval, approval.Approval),
    "view": (view, view.View),
    "log_key": (log_key, log_key.LogKeys),
    "hold": (hold, hold.Hold),
    "subject": (erasure, erasure.Erasure),
    "log": (adoption, adoption.Epochs),
}
"""By stream type: its rules, and the state they work on."""

RULES_OF: dict[type[Any], Rules] = {state: rules for rules, state in RULES.values()}

REFUSALS_PER_MINUTE_MAX = 60
"""Recorded refusals of one principal a minute, so that nobody fills a ledger with noise."""

CLAIM_AHEAD_SECONDS = 5
"""How far ahead of the ledger's clock a caller's `occurred_at` may be."""


_UNREAD = object()


class Batch:
    """Commands decided together. It is the `World` that their rules see."""

    def __init__(
        self,
        known: Known,
        recorded_at: datetime,
        vault: Vault,
        queue: Queue,
        *,
        session_retention_days: int,
    ) -> None:
        self._known = known
        self.project_id = known.project_id
        self.ledger_id = known.ledger_id
        self.epoch = known.epoch
        self._vault = vault
        self._retention = timedelta(days=session_retention_days)
        self.recorded_at = recorded_at
        self.now: Stamp = stamp(recorded_at)
        self._idle_deadline: Stamp | None = None
        self.size = known.size
        self.append = Append(ledger_id=known.ledger_id, seen=known.size, leaf=known.leaf, recorded_at=recorded_at)
        self.streams: dict[UUID, Any] = {}
        self.items: dict[UUID, dict[UUID, OpenItem]] = {}
        self.receipts: dict[tuple[str, str], Receipt] = {}
        self.refused: Counter[str] = Counter()
        self._queue = queue
        self._offers = Offers(queue, self._is_offered)
        self._deciding: Pending | None = None

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

    @property
    def leaf(self) -> bytes | None:
        """Of the last event, once this batch is appended."""
        return self.append.events[-1].leaf if self.append.events else self.append.leaf

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

    def open_items(self, root: UUID) -> Mapping[UUID, OpenItem]:
        items = self.items.get(root)
        return self._known.open_items(root) if items is None else items

    @property
    def actor(self) -> Actor:
        assert self._deciding is not None
        return self._deciding.actor

    @property
    def target(self) -> UUID:
        assert self._deciding is not None
        return self._deciding.target

    def mint(self, name: str) -> UUID:
        assert self._deciding is not None
        return self._deciding.mint(name)

    def keyed(self, text: bytes) -> bytes:
        return self._vault.fingerprint(self.project_id, text)

    def offered(self, command: ClaimTasks) -> Sequence[UUID]:
        return self._offers.to(command)

    def _is_offered(self, task_id: UUID) -> bool:
        return self.stream(task_id).state in ("queued", "retrying")

    def lease_until(self, task_id: UUID) -> Stamp | None:
        try:
            return self._queue.leases[task_id]
        except KeyError:
            raise NotLoaded(under_lock=task_id) from None

    def retired(self, subject: str) -> int:
        try:
            return self._queue.retired[subject]
        except KeyError:
            raise NotLoaded(under_lock=subject) from None

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
        if isinstance(command, ClaimTasks) and command.kinds is not UNSET:
            for stream_id in self.offered(command):
                self._expired(stream_id)
        state = self._expired(pending.target)
        earlier = self.receipts.get(pending.key)
        if earlier is not None:  # a sweeper's command, which the line above or a neighbour has just done
            return replace(earlier, replayed=True)
        try:
            self._admit(pending, state)
            facts = self._facts(pending, state)
        except MunimentError as refusal:
            return self._refuse(pending, refusal) if refusal.recorded else refusal
        except RefusedOnRecord as late:
            return self._refuse(pending, late.refusal, late.fact)
        except Same as same:
            row = self._row(pending, 200, 0, 0)._replace(target=same.stream_id)
            self.append.commands.append(row)
            return self._receipt(pending, row, self.stream(same.stream_id))
        return self._effect(pending, state, facts)

    def _expired(self, stream_id: UUID) -> Any:
        """The state of a stream after its expiry, if that is due: it never waits for the sweeper, and it comes
        first, also when the command is then refused."""
        state = self.stream(stream_id)
        if state is not None and (rules := RULES_OF.get(type(state))):
            while due := rules.due(state, self.now):
                pending = self._system(due, due.due_id)
                state = self._effect(pending, state, self._facts(pending, state)).state
        return state

    def _facts(self, pending: Pending, state: Any) -> Sequence[Fact | On]:
        self._deciding = pending
        return RULES[pending.command.stream_type][0].decide(state, pending.command, self)

    def _admit(self, pending: Pending, state: Any) -> None:
        """Refuse a command that this actor may not give, or not on what is really there."""
        command, actor = pending.command, pending.actor
        if command.roles is not None and actor is not SYSTEM and command.roles.isdisjoint(actor.roles):
            raise Forbidden(action=type(command).__name__, needed=sorted(command.roles), roles=list(actor.roles))
        claimed = command.occurred_at
        if claimed is not UNSET and claimed > self.recorded_at + timedelta(seconds=CLAIM_AHEAD_SECONDS):
            detail = f"it is in the future: it is {self.now} here"
            raise MalformedRequest([{"pointer": "/occurred_at", "detail": detail}])
        if state is not None and not isinstance(state, RULES[command.stream_type][1]):
            taken = AlreadyExists if command.creates else NotFound
            raise taken(what=command.stream_type, id=pending.target)
        begun = pending.target if command.creates else getattr(command, "new_approval_id", None)
        if isinstance(begun, UUID) and command.stream_type != "subject" and self._is_kept(begun):
            raise AlreadyExists(what=command.stream_type, id=begun)
        if pending.expected_version is not None:
            if state is None and not command.creates:
                raise NotFound(what=command.stream_type, id=pending.target)
            version = state.version if state is not None else 0
            if version != pending.expected_version:
                raise PreconditionFailed(id=pending.target, expected=pending.expected_version, current=version)

    def _is_kept(self, stream_id: UUID) -> bool:
        """Whether no caller may begin a stream of that name: it is kept for a subject, for the log, or for a view."""
        if may_be_of_a_subject(stream_id) or stream_id == adoption.LOG:
            return True
        return self.project_id == OPERATORS and may_be_of_a_view(stream_id)

    def _effect(self, pending: Pending, state: Any, facts: Sequence[Fact | On]) -> Receipt:
        """Record the facts, and then, in the same commit, what follows from them, level by level."""
        if not facts and (pending.actor is SYSTEM or isinstance(pending.command, ClaimTasks)):
            # Too early, too late, or nothing to be had: no trace, for the same id may find something the next time.
            return said(self._row(pending, 200, 0, 0), () if isinstance(pending.command, ClaimTasks) else state)
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
        if isinstance(pending.command, ClaimTasks):
            claimed = (part.stream_id if isinstance(part, On) else pending.target for part in facts)
            return self._receipt(pending, self.append.commands[row], tuple(map(self.stream, claimed)))
        return self._receipt(pending, self.append.commands[row], self.stream(pending.target))

    def _record(self, pending: Pending, state: Any, facts: Sequence[Fact | On]) -> list[Event[Any]]:
        first = self.size + 1
        events = []
        for index, part in enumerate(facts):
            if isinstance(part, On):
                events.append(self._stage(pending, part.stream_id, self.stream(part.stream_id), part.fact, index))
            else:
                events.append(self._stage(pending, pending.target, state, part, index))
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
            facts = self._facts(pending, state)
        except MunimentError:
            return  # it ended by itself, just now
        followed = self._record(pending, state, facts)
        self._receipt(pending, self.append.commands[-1], self.stream(target))
        yield from ((pending, follow_up) for follow_up in followed)

    def _system(self, command: Command, command_id: str) -> Pending:
        return Pending.of_system(command, command_id, self.keyed)

    def _refuse(self, pending: Pending, refusal: MunimentError, fact: Fact | None = None) -> Verdict:
        """A refusal is a fact too: one event, `fact` in the command's own stream or one in a stream of the refusal's.
        Too many a minute are not."""
        if self.refusals_left(pending.principal) <= 0:
            return RateLimited(limit=REFUSALS_PER_MINUTE_MAX)
        self.refused[pending.principal] += 1
        if fact is not None:
            self._stage(pending, pending.target, self.stream(pending.target), fact, 0)
        else:
            # The keyed fingerprint is in it, or a stranger could compute the id and take it first.
            name = f"{pending.principal}\n{pending.command_id}\n{pending.fingerprint.hex()}"
            self._stage(pending, uuid5(self.ledger_id, name), None, pending.refused(refusal), 0)
        row = self._row(pending, refusal.status, self.size, 1)
        self.append.commands.append(row)
        return self._receipt(pending, row, None, refusal)

    # Rows

    def _stage(self, pending: Pending, stream_id: UUID, before: Any, fact: Fact, index: int) -> Event[Any]:
        """Give one fact its place in a stream, after `before`, and its bytes. Returns the event as it was decided,
        before sealing."""
        command = pending.command
        stream_type = fact.stream_type
        if isinstance(fact, LedgerAdopted):
            self.epoch = self.append.epoch = fact.ledger
        session_id, root_session_id = self._session_of(pending, before, fact)
        event: Event[Any] = Event(
            v=1,
            project=self.project_id,
            ledger=self.epoch,
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
            rules = RULES[stream_type][0]
            after = self.streams[stream_id] = rules.evolve(before, sealed)
            if before is not None:
                self._keep_item(rules.item(before), rules.item(after))
            elif isinstance(after, session.Session) and after.parent_session_id is None:
                self.items[stream_id] = {}  # nothing can be open yet under what is new
            else:
                self._keep_item(None, rules.item(after))
            if stream_type == "task":
                self._keep_task(before, after)
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
        if before is not None:
            return before.session_id, before.root_session_id
        session_id = pending.target if command.stream_type == "session" else getattr(command, "session_id", None)
        if isinstance(session_id, UUID):
            state = self.stream(session_id)
            if isinstance(state, session.Session):
                return session_id, state.root_session_id
            if fact.stream_type == "refusal":
                return None, None
            parent = self.stream(parent_id) if (parent_id := getattr(command, "parent_session_id", None)) else None
            return session_id, parent.root_session_id if parent is not None else session_id
        # What is asked for a task belongs to the session of the task; what stands instead of something, to its.
        of = getattr(command, "task_id", None) or command.target
        state = self.stream(of) if isinstance(of, UUID) and self.knows(of) else None
        return getattr(state, "session_id", None), getattr(state, "root_session_id", None)

    def _keep_item(self, before: OpenItem | None, after: OpenItem | None) -> None:
        if before == after:
            return
        item = after or before
        assert item is not None
        with suppress(NotLoaded):  # what was never read needs no keeping
            items = self._items_of(item.root_session_id)
            items.pop(item.item_id, None)
            if after is not None:
                items[after.item_id] = after
        if after is not None:
            self.append.closed.discard(item.item_id)
            self.append.opened[item.item_id] = after
        else:
            self.append.opened.pop(item.item_id, None)
            self.append.closed.add(item.item_id)

    def _keep_task(self, before: task.Task | None, after: task.Task) -> None:
        self.append.tasks[after.task_id] = task.queued(after)
        if after.state == "queued" and (before is None or before.state != "queued"):
            self._offers.add(after.kind, after.task_id)

    def _items_of(self, root: UUID) -> dict[UUID, OpenItem]:
        return self.items.setdefault(root, dict(self.open_items(root)))

    def _row(self, pending: Pending, status: int, first: int, count: int) -> CommandRow:
        kind = type(pending.command).__name__
        key, mark = pending.key, pending.fingerprint
        target = pending.target if pending.command.creates else pending.command.target
        return CommandRow(*key, mark, kind, target, status, first if count else 0, count, self.size)

    def _receipt(self, pending: Pending, row: CommandRow, state: Any, refusal: MunimentError | None = None) -> Receipt:
        receipt = self.receipts[pending.key] = said(row, state, refusal)
        return receipt


def _given(value: Any) -> Any:
    return None if value is UNSET else value
