"""The rules of erasing a subject: it is done as often as it is asked for, unless a hold is in force.

An erasure is on record before it is done (`vault.py` destroys, and `ops/eraser.py` what nobody lived to). The event
says up to which of the subject's keys. That number is read, and those keys retired, under the ledger's lock: so
whatever was sealed before the event was sealed under one of them, and nothing after it is. Pure: no clock, no I/O, no
key.
"""

from typing import Any, ClassVar

from msgspec import Struct

from ledger.commands import Command
from ledger.entry import Event
from ledger.errors import Held
from ledger.events import Fact, SubjectErased
from ledger.hold import in_force
from ledger.queue import World
from ledger.subjects import EraseSubject, stream_of
from ledger.values import Principal, Stamp


class Erasure(Struct, frozen=True, kw_only=True):
    """The last erasure of a subject (its pseudonym): all that was sealed for it before. `version` counts them.

    `through` is the number of the last of its keys that were destroyed; 0 where it had none.
    """

    session_id: ClassVar[None] = None
    root_session_id: ClassVar[None] = None

    subject: str
    ground: str
    through: int
    erased_by: Principal
    erased_at: Stamp
    version: int


def decide(erasure: Erasure | None, command: Command, world: World) -> list[Fact]:
    """The fact that `command` makes. Raises Held."""
    if not isinstance(command, EraseSubject):
        raise TypeError(f"{type(command).__name__} is not a command about erasing")
    subject = command.subject
    for hold_id in sorted(world.open_items(stream_of(subject))):
        if in_force(world.stream(hold_id), world.now):
            raise Held(subject=subject, hold_id=hold_id)
    # Where older keys were restored, some may be missing that an erasure before was of: it never counts back.
    through = max(world.retired(subject), erasure.through if erasure else 0)
    return [SubjectErased(subject=subject, ground=command.ground, through=through)]


def evolve(erasure: Erasure | None, event: Event[Any]) -> Erasure:
    """The erasure that `event` is: it is known whole, whatever was before."""
    data = event.data
    return Erasure(
        subject=data.subject,
        ground=data.ground,
        through=data.through,
        erased_by=Principal.of(event.actor),
        erased_at=event.recorded_at,
        version=event.stream_version,
    )


def due(erasure: Erasure, now: Stamp) -> None:
    """Never: nothing is erased because its time has come."""


def item(erasure: Erasure) -> None:
    """Never: nothing about it is open."""
