"""Rules, tested as history -> command -> new history or refusal: `given(...).when(...).then(...)`.

It decides in a real batch, over a history in memory: no database, no clock. What a batch adds to the rules
(due expiry first, follow-ups, the record of a refusal) is therefore part of what is tested.
"""

from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast
from uuid import UUID

from msgspec import UNSET
from uuid_utils.compat import uuid7

from ledger.batch import RULES, Batch
from ledger.commands import Command
from ledger.entry import Event, canonical, decode
from ledger.errors import MunimentError
from ledger.events import Fact, SessionOpened
from ledger.known import Offer, Queue
from ledger.pending import Pending, Verdict
from ledger.postgres import Pool
from ledger.project_key import ProjectKey
from ledger.receipt import Receipt
from ledger.store import OpenItem
from ledger.system import Due
from ledger.task import Task, queued
from ledger.values import Actor, moment
from ledger.vault import Vault

SESSION = UUID("0199a7c2-0000-7000-8000-000000000001")
RECORD = UUID("0199a7c2-0000-7000-8000-000000000002")
LEDGER = UUID("0199a7b0-0000-7000-8000-000000000003")
AGENT = Actor(issuer="https://id.example", sub="agent-7", kind="agent", assurance="authenticated", roles=("agent",))
NOW = "2026-11-21T09:00:00.000000Z"
DEADLINE = "2026-11-28T09:00:00.000000Z"
OPENED = SessionOpened(agent_role="finance", expires_at=DEADLINE)

VAULT = Vault(Path("/nonexistent"), cast("Pool", None), create_keys=False)  # its pool is for keys of people
VAULT._projects["demo"] = ProjectKey("demo", bytes(32))


class By(NamedTuple):
    """A fact of somebody else's than AGENT."""

    actor: Actor
    fact: Fact


def by(actor: Actor, fact: Fact) -> By:
    return By(actor, fact)


D = TypeVar("D", bound=Due)


def by_its_id(command: D) -> D:
    """What is due, as every sweeper gives it."""
    command.command_id = command.due_id
    return command


class On(NamedTuple):
    """Facts of another stream than SESSION."""

    stream_id: UUID
    facts: tuple[Fact | By, ...]


def on(stream_id: UUID, *facts: Fact | By) -> On:
    return On(stream_id, facts)


class Offers(Mapping[Offer, list[UUID]]):
    """What the queue would offer: all that could be claimed by kind and session, the first of them first."""

    def __init__(self, given: "Given") -> None:
        self._given = given

    def __getitem__(self, offer: Offer) -> list[UUID]:
        kinds, session_id = offer
        rows = [queued(state) for state in self._given.streams.values() if isinstance(state, Task)]
        fit = [row for row in rows if row and row.kind in kinds and session_id in (None, row.session_id)]
        fit = [row for row in fit if row.state in ("queued", "retrying")]
        return [row.task_id for row in sorted(fit, key=lambda row: (row.rank, row.run_at))]

    def __iter__(self) -> Iterator[Offer]:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError


class Given:
    """A ledger of these facts, as a batch knows it."""

    project_id = "demo"

    def __init__(self, *history: Fact | On, now: str = NOW) -> None:
        self.ledger_id = LEDGER
        self.size = 0
        self.epoch, self.leaf = LEDGER, None
        self.recorded_at = moment(now)
        self.streams: dict[UUID, Any] = {}
        self.items: dict[UUID, dict[UUID, OpenItem]] = {}
        self.leases: dict[UUID, str | None] = {}
        self.retired: dict[str, int] = {}
        for stream_id, facts in (part if isinstance(part, On) else On(SESSION, (part,)) for part in history):
            for fact in facts:
                self._record(stream_id, *(fact if isinstance(fact, By) else By(AGENT, fact)))

    def _record(self, stream_id: UUID, actor: Actor, fact: Fact) -> None:
        before = self.streams.get(stream_id)
        # A task or an approval belongs to the session that there is, if there is one.
        session_id = stream_id if fact.stream_type == "session" else SESSION if SESSION in self.streams else None
        above: UUID | None = getattr(fact, "parent_session_id", None) or session_id
        parent = self.streams.get(above) if above else None
        event: Event[Any] = Event(
            v=1,
            project=self.project_id,
            ledger=LEDGER,
            event_id=uuid7(),
            stream_type=fact.stream_type,
            stream_id=stream_id,
            stream_version=before.version + 1 if before else 1,
            type=type(fact).__name__,
            schema_version=1,
            occurred_at=NOW,
            recorded_at=NOW,
            actor=actor,
            command_id="before",
            correlation_id="before",
            data=fact,
            session_id=session_id,
            root_session_id=getattr(parent, "root_session_id", session_id),
        )
        self.take(event)

    def take(self, event: Event[Any]) -> None:
        """This happened next."""
        self.size += 1
        if event.stream_type not in RULES:
            return
        rules, before = RULES[event.stream_type][0], self.streams.get(event.stream_id)
        state = self.streams[event.stream_id] = rules.evolve(before, event)
        if before is not None and (item := rules.item(before)):
            del self.items[item.root_session_id][item.item_id]
        if item := rules.item(state):
            self.items.setdefault(item.root_session_id, {})[item.item_id] = item

    # What a batch asks of it

    def knows(self, stream_id: UUID) -> bool:
        return True

    def stream(self, stream_id: UUID) -> Any:
        return self.streams.get(stream_id)

    def open_items(self, root: UUID) -> Mapping[UUID, OpenItem]:
        return self.items.get(root, {})

    def refusals_left(self, principal: str) -> int:
        return 60

    # And then

    def when(
        self, command: Command, by: Actor = AGENT, *, expected_version: int | None = None, target: UUID | None = None
    ) -> "Outcome":
        """Have it decided. Its id is taken out of it, as the committer does; `target` is what it would mint."""
        batch = self.batch()
        return Outcome(self, batch, batch.decide(pending_of(command, by, expected_version, target)))

    def at(self, now: str) -> "Given":
        """What is decided from here on is decided at `now`."""
        self.recorded_at = moment(now)
        return self

    def batch(self, seconds_later: float = 0) -> Batch:
        """An empty batch on this history."""
        at = self.recorded_at + timedelta(seconds=seconds_later)
        return Batch(self, at, VAULT, Queue(Offers(self), self.leases, self.retired), session_retention_days=7)


def pending_of(
    command: Command, by: Actor = AGENT, expected_version: int | None = None, target: UUID | None = None
) -> Pending:
    command_id = "asked" if command.command_id is UNSET else command.command_id
    command.command_id = UNSET
    return Pending(
        command=command,
        actor=by,
        principal=by.principal,
        command_id=command_id,
        target=command.target or target or uuid7(),
        canonical=canonical(command),
        fingerprint=b"",
        expected_version=expected_version,
    )


class Outcome:
    """What became of the command: the events that follow, and the answer."""

    def __init__(self, history: Given, batch: Batch, verdict: Verdict) -> None:
        self._history = history
        self.verdict = verdict
        self.batch = batch
        self.events: list[Event[Any]] = [decode(row.entry, row.payload, row.type) for row in batch.append.events]
        self.state: Any = verdict.state if isinstance(verdict, Receipt) else None

    def then(self, *facts: Fact | On) -> "Outcome":
        """Exactly these facts followed, each on SESSION (or the record) unless it says `on`, and it was taken."""
        assert isinstance(self.verdict, Receipt), self.verdict
        assert self.verdict.refusal is None, self.verdict.refusal
        self._followed(facts)
        return self

    def refused(self, code: str, *facts: Fact | On, **params: Any) -> "Outcome":
        """It was refused so, with at least these params, after these facts (of expiry), and that is on record."""
        assert isinstance(self.verdict, Receipt), f"{self.verdict!r} leaves no trace"
        refusal = self.verdict.refusal
        assert refusal is not None, self.events
        refused: Any = self.events.pop().data
        assert (refusal.code, refused.code, refused.status) == (code, code, self.verdict.status)
        assert params.items() <= refusal.params.items()
        self._followed(facts)
        return self

    def turned_away(self, code: str, *facts: Fact | On, **params: Any) -> MunimentError:
        """It was refused so, and no trace of it is left; but these facts (of expiry) stay."""
        assert isinstance(self.verdict, MunimentError), self.events
        assert self.verdict.code == code
        assert params.items() <= self.verdict.params.items()
        self._followed(facts)
        return self.verdict

    def taken(self) -> Given:
        """The ledger that it was decided on, now that this has happened."""
        for event in self.events:
            self._history.take(event)
        return self._history

    def _followed(self, facts: tuple[Fact | On, ...]) -> None:
        expected = [part if isinstance(part, On) else On(self.target, (part,)) for part in facts]
        flat = [(stream_id, fact) for stream_id, told in expected for fact in told]
        assert [(event.stream_id, event.data) for event in self.events] == flat

    @property
    def target(self) -> UUID:
        target = self.verdict.target if isinstance(self.verdict, Receipt) else SESSION
        assert target is not None
        return target


def given(*history: Fact | On, now: str = NOW) -> Given:
    return Given(*history, now=now)


def later(text: str, **units: float) -> Any:
    """The moment that is so much after a stamp."""
    return moment(text) + timedelta(**units)
