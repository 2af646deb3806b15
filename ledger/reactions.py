"""The table of follow-ups: an event, and the system's commands on other streams that belong to it.

They run in the same commit as their trigger, with its event id as their cause, and are bounded by what a
session may have open.
"""

from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

from ledger.commands import CancelSession, Command
from ledger.entry import Event
from ledger.events import Fact, SessionCancelled
from ledger.queue import World


def _cancel_children(event: Event[SessionCancelled], world: World) -> Iterator[Command]:
    if not event.data.cascade or event.root_session_id is None:
        return
    open_items = dict(world.open_items(event.root_session_id))  # each cancel takes one out
    for item in open_items.values():
        above: UUID | None = item.session_id
        # What has ended may have left children that live on: they are below whoever it was below.
        while above and above != event.stream_id and above not in open_items:
            above = world.stream(above).parent_session_id
        if above == event.stream_id:
            yield CancelSession(session_id=item.item_id, reason=event.data.reason, cascade=True)


REACTIONS: dict[type[Fact], Callable[[Event[Any], World], Iterator[Command]]] = {SessionCancelled: _cancel_children}
