"""What a batch is decided on: what is known of a ledger, and what only its lock makes sure of.

A decision that needs what is not known says so (`NotLoaded`); the writer reads it and has the batch decided again.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import chain, islice
from typing import Any, Protocol
from uuid import UUID

from msgspec import UNSET, Struct

from ledger.commands import ClaimTasks
from ledger.store import OpenItem
from ledger.values import Stamp

Offer = tuple[frozenset[str], UUID | None]
"""What claims look for: tasks of these kinds, within one session or anywhere."""


def offer(command: ClaimTasks) -> Offer:
    assert command.kinds is not UNSET
    return frozenset(command.kinds), command.session_id


class Queue(Struct, frozen=True):
    """What was read under the ledger's lock, for one batch: which tasks are on offer, when leases end, and up to which
    of a subject's keys were retired."""

    offers: Mapping[Offer, Sequence[UUID]] = {}
    leases: Mapping[UUID, Stamp | None] = {}
    retired: Mapping[str, int] = {}

    @property
    def tasks(self) -> Iterable[UUID]:
        return chain(self.leases, *self.offers.values())


class Offers:
    """What a batch has for those who claim: what `queue` has, and what the batch itself has queued, as far as
    `is_open` says that it is to be had still."""

    def __init__(self, queue: Queue, is_open: Callable[[UUID], bool]) -> None:
        self._queue = queue
        self._is_open = is_open
        self._of: dict[Offer, deque[UUID]] = {}
        self._queued: dict[str, deque[UUID]] = {}

    def add(self, kind: str, task_id: UUID) -> None:
        """This task was queued just now."""
        self._queued.setdefault(kind, deque()).append(task_id)

    def to(self, command: ClaimTasks) -> Sequence[UUID]:
        """As many as it wants, the most urgent first, and all that were queued just now. Raises NotLoaded."""
        wanted = offer(command)
        stored = self._queue.offers.get(wanted)
        if stored is None:
            raise NotLoaded(under_lock=command)
        left = self._left(self._of.setdefault(wanted, deque(stored)), command.n)
        for kind in wanted[0]:  # in no order of theirs
            left += self._left(self._queued.get(kind, deque()), None)
        return list(dict.fromkeys(left))  # one whose time to be tried again has just come is among both

    def _left(self, offered: deque[UUID], wanted: int | None) -> list[UUID]:
        while offered and not self._is_open(offered[0]):
            offered.popleft()
        return list(islice(filter(self._is_open, offered), wanted))


class NotLoaded(Exception):
    """A decision needs a stream, or a root's open items, that this process has not read yet; or what can only be
    read under the ledger's lock: what is on offer, how long a lease really runs, or which keys a subject has."""

    def __init__(
        self, *, stream: UUID | None = None, root: UUID | None = None, under_lock: UUID | ClaimTasks | str | None = None
    ) -> None:
        self.stream, self.root, self.under_lock = stream, root, under_lock


class Known(Protocol):
    """What a batch is decided on: what this process knows of a ledger of `size` events, or a batch on its
    way there, which will have made it that size."""

    project_id: str
    ledger_id: UUID
    epoch: UUID
    size: int
    recorded_at: datetime

    @property
    def leaf(self) -> bytes | None:
        """Of its last event, where that is known."""
        ...

    def knows(self, stream_id: UUID) -> bool:
        """Whether `stream` can tell."""
        ...

    def stream(self, stream_id: UUID) -> Any:
        """The state of a stream, None where there is none. Raises NotLoaded."""
        ...

    def open_items(self, root: UUID) -> Mapping[UUID, OpenItem]:
        """What is open under a root, as `World` has it. Raises NotLoaded."""
        ...

    def refusals_left(self, principal: str) -> int:
        """How many refusals of this principal may still be recorded within this minute."""
        ...
