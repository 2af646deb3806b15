"""What decisions read besides their own stream, kept in the append transaction.

A rule sees the `World` and nothing else: the time of its batch, other streams by id, and what is open
under a session. Everything here can be rebuilt from the events; nothing here is a view, for a view may be
behind and a decision may not.
"""

from collections.abc import Mapping
from typing import Any, Protocol
from uuid import UUID

from ledger.entry import Event
from ledger.events import Fact, SessionCancelled, SessionCompleted, SessionExpired, SessionFailed, SessionOpened, Stamp
from ledger.store import OpenItem

OPEN_ITEMS_MAX = 1000
"""Open items under one root session, so that what a single cancel can set off is bounded."""


class World(Protocol):
    """What a rule may see. The same for every command of a batch, but for what those before it did."""

    @property
    def now(self) -> Stamp:
        """The recorded_at of what is decided now: never decreasing within a ledger."""
        ...

    @property
    def idle_deadline(self) -> Stamp:
        """When a session opened now ends, unless it says otherwise."""
        ...

    def stream(self, stream_id: UUID) -> Any:
        """The state of another stream that the command named, or None where there is none."""
        ...

    def open_items(self, root_session_id: UUID) -> Mapping[UUID, OpenItem]:
        """What is open anywhere under a root session."""
        ...


def opened(event: Event[Fact]) -> OpenItem | None:
    """The open item that this event begins."""
    data = event.data
    if isinstance(data, SessionOpened) and data.parent_session_id and event.root_session_id:
        return OpenItem(event.stream_id, "session", data.parent_session_id, event.root_session_id)
    return None


def closes(event: Event[Fact]) -> bool:
    """Whether this event ends its stream's being open."""
    return type(event.data) in _ENDINGS


_ENDINGS = (SessionCompleted, SessionFailed, SessionExpired, SessionCancelled)
