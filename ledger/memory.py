"""What this process knows of one ledger, true at `size`.

Streams and open items as they are after `size` events, and the commands answered here not long ago. It is
only ever a copy: what another process changed is forgotten under the lock, before anything is decided on it,
and nothing becomes known before it is durable. Losing all of it costs a query.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from time import monotonic
from typing import Any, NamedTuple
from uuid import UUID

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from msgspec.structs import replace

from ledger.batch import REFUSALS_PER_MINUTE_MAX, Batch
from ledger.entry import Recorded
from ledger.errors import IdempotencyKeyReused
from ledger.known import NotLoaded
from ledger.pending import Pending, Verdict
from ledger.receipt import Receipt
from ledger.record import RecordedFact
from ledger.replay import ANSWERED_AS_IT_IS, fold_all
from ledger.store import CommandRow, Ledger, Locked, OpenItem

STREAMS_MAX = 50_000
ROOTS_MAX = 50_000
RECENT_MAX = 32_768
RECENT_ENTRY_BYTES_MAX = 4_096
ANSWERED_SECONDS = 1.0
"""How long after the database was last seen to be at this history answers are given without asking it."""
TAIL_EVENTS_MAX = 10_000
"""How far behind another process's appends it is still worth to forget stream by stream."""

Key = tuple[str, str]


class Recent(NamedTuple):
    """A command answered here not long ago; without its receipt where that would be large to keep."""

    row: CommandRow
    receipt: Receipt | None


class Refusals:
    """How many refusals each principal has had recorded within the last minute, in this process."""

    def __init__(self) -> None:
        self._window = MovingWindowRateLimiter(MemoryStorage())
        self._limit = RateLimitItemPerMinute(REFUSALS_PER_MINUTE_MAX)

    def left(self, ledger_id: UUID, principal: str) -> int:
        return self._window.get_window_stats(self._limit, str(ledger_id), principal).remaining

    def add(self, ledger_id: UUID, principal: str) -> None:
        self._window.hit(self._limit, str(ledger_id), principal)


class Memory:
    """See the module. It is the `Known` that batches are decided on."""

    def __init__(self, project_id: str, ledger: Ledger, refusals: Refusals) -> None:
        self.project_id = project_id
        self.ledger_id = ledger.ledger_id
        self.epoch = ledger.epoch
        self.size = -1
        self.leaf: bytes | None = None
        self.recorded_at = ledger.last_recorded_at
        self.streams: dict[UUID, Any] = {}
        self.items: dict[UUID, dict[UUID, OpenItem]] = {}
        self._recent: dict[Key, Recent] = {}
        self._complete_since = float("inf")
        self._seen_at = 0.0
        self._refusals = refusals

    def knows(self, stream_id: UUID) -> bool:
        return stream_id in self.streams

    def stream(self, stream_id: UUID) -> Any:
        try:
            return self.streams[stream_id]
        except KeyError:
            raise NotLoaded(stream=stream_id) from None

    def open_items(self, root: UUID) -> Mapping[UUID, OpenItem]:
        try:
            return self.items[root]
        except KeyError:
            raise NotLoaded(root=root) from None

    def refusals_left(self, principal: str) -> int:
        return self._refusals.left(self.ledger_id, principal)

    def answered(self, pending: Pending) -> Verdict | None:
        """The answer to a command that was given here not long ago; None if that is not remembered whole."""
        recent = self._recent.get(pending.key)
        if recent is None or monotonic() > self._seen_at + ANSWERED_SECONDS:
            return None  # the database may have been put back to a time before it was recorded
        if recent.row.fingerprint != pending.fingerprint:
            return IdempotencyKeyReused(command_id=pending.command_id)
        if recent.row.type == ANSWERED_AS_IT_IS:
            return None
        return replace(recent.receipt, replayed=True) if recent.receipt is not None else None

    def surely_new(self, pending: Pending) -> bool:
        """Whether no command of this id can have been recorded, so far as honest clocks go.

        `_recent` holds every command since `_complete_since`, and a UUIDv7 made later was not recorded
        before. An id that lies about its age meets the unique index and is looked up after all.
        """
        if pending.key in self._recent or pending.outcome_unknown:
            return False
        text = pending.command_id
        if len(text) != 36 or text[14] != "7":
            return False
        try:
            return int(text[:8] + text[9:13], 16) / 1000 > self._complete_since
        except ValueError:
            return False

    def minted_since(self, named: UUID) -> bool:
        """Whether `named` is a UUIDv7 (RFC 9562 s5.7: 48 bits of Unix milliseconds) of after that."""
        return (named.int >> 76) & 0xF == 7 and (named.int >> 80) / 1000 > self._complete_since

    def learn(self, stream_ids: Iterable[UUID], history: Iterable[Recorded]) -> None:
        """Know these streams by their whole history; one without any is known not to exist.

        What was read may be ahead of `size`: then the append misses, and under the lock it cannot be.
        """
        self.streams.update(dict.fromkeys(stream_ids))
        self.streams.update(fold_all(history))

    def learn_items(self, roots: Iterable[UUID], items: Iterable[OpenItem]) -> None:
        """Know everything that is open under these roots."""
        self.items.update((root, {}) for root in roots)
        for item in items:
            self.items[item.root_session_id][item.item_id] = item

    def catch_up(self, locked: Locked, now: float) -> bool:
        """Forget what other processes changed since; True if there was nothing. `now`: Unix seconds."""
        head, changed = locked.head, locked.changed
        alone = head.size == self.size and changed is not None
        if not alone:
            self._complete_since = now
            self.items.clear()
            if self.size < 0 or changed is None or head.size - self.size > TAIL_EVENTS_MAX:
                self.streams.clear()
            if changed is None:
                self._recent.clear()  # what was answered here may be lost
            for stream_id in changed or ():
                self.streams.pop(stream_id, None)
        self.size, self.recorded_at, self.epoch = head
        self.leaf, self._seen_at = locked.leaf, monotonic()
        return alone

    def accept(self, decided: Batch) -> None:
        """The batch is durable: what it made is what is known from here on."""
        self._seen_at = monotonic()
        rows = decided.append.commands
        if not rows:
            return
        entries = decided.append.events
        for row in rows:
            key = (row.principal, row.command_id)
            first = row.first_position - decided.append.seen - 1
            small = row.event_count == 0 or (
                entries[first].payload is None and len(entries[first].entry) <= RECENT_ENTRY_BYTES_MAX
            )
            self._recent[key] = Recent(row, decided.receipts[key] if small else None)
        large = {e.stream_id for e in entries if e.payload is not None or len(e.entry) > RECENT_ENTRY_BYTES_MAX}
        for stream_id, state in decided.streams.items():
            self.streams.pop(stream_id, None)
            # A record never changes again, and what is large is not kept.
            if state is not None and stream_id not in large and not isinstance(state, RecordedFact):
                self.streams[stream_id] = state
        for root, items in decided.items.items():
            self.items.pop(root, None)
            self.items[root] = items
        for principal, count in decided.refused.items():
            for _ in range(count):
                self._refusals.add(self.ledger_id, principal)
        self.size, self.recorded_at = decided.size, decided.append.recorded_at
        self.leaf, self.epoch = decided.leaf, decided.epoch
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        if len(self.streams) > STREAMS_MAX:
            for stream_id in list(islice(self.streams, STREAMS_MAX // 4)):
                del self.streams[stream_id]
        if len(self.items) > ROOTS_MAX:
            for root in list(islice(self.items, ROOTS_MAX // 4)):
                del self.items[root]
        if len(self._recent) > RECENT_MAX:
            for key in list(islice(self._recent, RECENT_MAX // 4)):
                del self._recent[key]
            # Only what was recorded after the last one forgotten is still complete. That is not kept by
            # command: the time of this batch is later than all of them.
            self._complete_since = self.recorded_at.timestamp()
