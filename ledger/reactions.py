"""The table of follow-ups: an event, and the system's commands on other streams that belong to it.

They run in the same commit as their trigger, with its event id as their cause, and are bounded by what a
session may have open.
"""

from collections.abc import Callable, Iterator
from typing import Any

from ledger.commands import CancelSession, Command
from ledger.events import Event, Fact, SessionCancelled
from ledger.queue import World


def _cancel_children(event: Event[SessionCancelled], world: World) -> Iterator[Command]:
    if not event.data.cascade or event.root_session_id is None:
        return
    for item in list(world.open_items(event.root_session_id).values()):  # each cancel takes one out
        if item.session_id == event.stream_id:
            yield CancelSession(session_id=item.item_id, reason=event.data.reason, cascade=True)


REACTIONS: dict[type[Fact], Callable[[Event[Any], World], Iterator[Command]]] = {SessionCancelled: _cancel_children}
