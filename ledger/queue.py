"""What decisions read besides their own stream, kept in the append transaction.

A rule sees the `World` and nothing else: who asks, the time of its batch, other streams by id, what is open
under a root, and what is on offer. Everything here can be rebuilt from the events; nothing here is a view, for a
view may be behind and a decision may not.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from ledger.commands import ClaimTasks, Command
from ledger.entry import Event
from ledger.errors import MunimentError
from ledger.events import Fact
from ledger.store import OpenItem
from ledger.system import Due
from ledger.values import Actor, Stamp

OPEN_ITEMS_MAX = 1000
"""Open items under one root, so that what a single cancel can set off is bounded."""


class World(Protocol):
    """What a rule may see. The same for every command of a batch, but for what those before it did."""

    project_id: str
    """Whose ledger this is."""

    epoch: UUID
    """What that is called now (adoption.py)."""

    @property
    def now(self) -> Stamp:
        """The recorded_at of what is decided now: never decreasing within a ledger."""
        ...

    @property
    def idle_deadline(self) -> Stamp:
        """When a session opened now ends, unless it says otherwise."""
        ...

    @property
    def actor(self) -> Actor:
        """Who gives the command that is being decided."""
        ...

    @property
    def target(self) -> UUID:
        """The stream that the command being decided is about: named by the caller, or minted for it."""
        ...

    def mint(self, name: str) -> UUID:
        """A new id, the same each time this command is decided."""
        ...

    def keyed(self, text: bytes) -> bytes:
        """HMAC-SHA-256 of `text` under a key of the project: for salts, and to compare what must not be kept."""
        ...

    def stream(self, stream_id: UUID) -> Any:
        """The state of another stream that the command named, or None where there is none."""
        ...

    def offered(self, command: ClaimTasks) -> Sequence[UUID]:
        """The tasks that `command` may claim, in the order in which they are to be handed out: some may not be to be
        had any more, which their states tell."""
        ...

    def lease_until(self, task_id: UUID) -> Stamp | None:
        """When the task's lease really ends, heartbeats included; None if it has none."""
        ...

    def retired(self, subject: str) -> int:
        """The number of the last key that a subject (its pseudonym) has now: nothing more is sealed under it, nor under
        those before; 0 if it has none."""
        ...

    def open_items(self, root: UUID) -> Mapping[UUID, OpenItem]:
        """What is open anywhere under a root: the topmost session, or what stands for it where there is none."""
        ...


class On(NamedTuple):
    """A fact of another stream than the command's own."""

    stream_id: UUID
    fact: Fact


class RefusedOnRecord(Exception):
    """A refusal that is a fact of the stream itself, instead of one in a stream of refusals."""

    def __init__(self, refusal: MunimentError, fact: Fact) -> None:
        self.refusal, self.fact = refusal, fact


class Same(Exception):
    """What was asked for is there already, as another stream: the answer is that one, as it is now."""

    def __init__(self, stream_id: UUID) -> None:
        self.stream_id = stream_id


class Rules(Protocol):
    """What the module of a stream type has: pure functions of a state, a command or an event, and the World."""

    def decide(self, state: Any, command: Command, world: World) -> Sequence[Fact | On]:
        """The facts that `command` makes; none if it changes nothing. Raises its refusal."""
        ...

    def evolve(self, state: Any, event: Event[Any]) -> Any:
        """`state` after `event`."""
        ...

    def due(self, state: Any, now: Stamp) -> Due | None:
        """What must come before anything else is decided on it, because its time has come."""
        ...

    def item(self, state: Any) -> OpenItem | None:
        """What it is among the open items of its root, if it is open."""
        ...
