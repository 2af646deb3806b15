"""The rules of a ledger's epochs: an operator adopts a history that a restore has rolled back, and it goes on.

Its log has signed what is no longer there, and whoever holds that can show it: that log signs nothing more. From the
event that says so on, the ledger has another id and another log. What came before stays as it is, under the id that it
was recorded with; which log went before, and the last that it signed, the event tells. Pure: no clock, no I/O.
"""

from collections.abc import Iterable
from typing import Any, ClassVar
from uuid import UUID, uuid5

from msgspec import Struct

from ledger.commands import Command, Text
from ledger.entry import Event, Recorded
from ledger.errors import InvalidTransition
from ledger.events import Fact
from ledger.log_events import LedgerAdopted
from ledger.operations import VIEWS
from ledger.queue import World
from ledger.values import Stamp

LOG = uuid5(VIEWS, "log")
"""The one stream, of every ledger, of what became of its log. Frozen; no caller may begin it."""


class AdoptLedger(Command, kw_only=True, tag=True):
    """Go on with the ledger that is called `adopted` as it is now, under the id `ledger`. It is given where the
    database is, and never over HTTP; and refused where its log goes on."""

    stream_type = "log"
    roles = frozenset({"operator"})

    ledger: UUID
    adopted: UUID
    checkpoint: str
    """The signed note of the log before that shows what is lost."""
    reason: Text

    @property
    def target(self) -> UUID | None:
        return LOG


class Epochs(Struct, frozen=True, kw_only=True):
    """How often a ledger was adopted, and what it has been called since."""

    session_id: ClassVar[None] = None
    root_session_id: ClassVar[None] = None

    log_id: UUID = LOG
    ledger: UUID
    version: int
    updated_at: Stamp


def decide(epochs: Epochs | None, command: Command, world: World) -> list[Fact]:
    """The facts that `command` makes. Raises its refusal."""
    if not isinstance(command, AdoptLedger):
        raise TypeError(f"{type(command).__name__} is not a command about a log")
    if command.adopted != world.epoch:
        raise InvalidTransition(command="AdoptLedger", id=str(world.epoch), current_state="adopted", allowed=())
    return [LedgerAdopted(ledger=command.ledger, adopted=command.adopted, checkpoint=command.checkpoint)]


def evolve(epochs: Epochs | None, event: Event[Any]) -> Epochs:
    """`epochs` after `event`."""
    return Epochs(ledger=event.data.ledger, version=event.stream_version, updated_at=event.recorded_at)


def due(epochs: Epochs, now: Stamp) -> None:
    """Never: no epoch ends by itself."""


def item(epochs: Epochs) -> None:
    """Never: they are under no session."""


def name_at(position: int, adoptions: Iterable[Recorded], now: UUID) -> UUID:
    """What a ledger that is called `now` was called when the event at `position` was recorded."""
    told = ((at, event.data) for at, event in adoptions if isinstance(event.data, LedgerAdopted))
    return next((one.adopted for at, one in told if position < at), now)
