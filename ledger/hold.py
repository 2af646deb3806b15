"""The rules of a hold: placed -> released. While one is in force, its subject cannot be erased.

Pure: no clock, no I/O, and a subject is known by its pseudonym alone. A hold whose `until` has come is in force no
more, and nobody need do anything about it.
"""

from typing import Any, ClassVar, Literal
from uuid import UUID

from msgspec import Struct
from msgspec.structs import replace

from ledger.commands import Command
from ledger.entry import Event
from ledger.errors import AlreadyExists, InvalidTransition, MalformedRequest, NotFound
from ledger.events import Fact, HoldPlaced, HoldReleased
from ledger.queue import World
from ledger.store import OpenItem
from ledger.subjects import PlaceHold, ReleaseHold, stream_of
from ledger.values import Principal, Stamp, stamp


class Hold(Struct, frozen=True, kw_only=True):
    """A hold as of its last event. `subject` is the pseudonym of whom it keeps from being erased."""

    session_id: ClassVar[None] = None
    root_session_id: ClassVar[None] = None

    hold_id: UUID
    subject: str
    state: Literal["placed", "released"] = "placed"
    reason: str
    until: Stamp | None
    placed_by: Principal
    placed_at: Stamp
    released_by: Principal | None = None
    released_reason: str | None = None
    version: int
    updated_at: Stamp


def in_force(hold: Hold, now: Stamp) -> bool:
    """Whether it prevents an erasure at `now`."""
    return hold.state == "placed" and (hold.until is None or now < hold.until)


def decide(hold: Hold | None, command: Command, world: World) -> list[Fact]:
    """The facts that `command` makes of `hold`. Raises its refusal."""
    match command:
        case PlaceHold():
            if hold is not None:
                raise AlreadyExists(what="hold", id=hold.hold_id)
            until = stamp(command.until) if command.until is not None else None
            if until is not None and until <= world.now:
                raise MalformedRequest(
                    [{"pointer": "/until", "detail": f"it is not after the time at which it is placed, {world.now}"}]
                )
            return [HoldPlaced(subject=command.subject, reason=command.reason, until=until)]
        case ReleaseHold():
            if hold is None:
                raise NotFound(what="hold", id=command.target)
            if hold.state == "released":
                raise InvalidTransition(command="ReleaseHold", id=hold.hold_id, current_state=hold.state, allowed=())
            return [HoldReleased(subject=hold.subject, reason=command.reason)]
        case _:
            raise TypeError(f"{type(command).__name__} is not a hold's command")


def evolve(hold: Hold | None, event: Event[Any]) -> Hold:
    """`hold` after `event`."""
    data, by = event.data, Principal.of(event.actor)
    if isinstance(data, HoldPlaced):
        return Hold(
            hold_id=event.stream_id,
            subject=data.subject,
            reason=data.reason,
            until=data.until,
            placed_by=by,
            placed_at=event.recorded_at,
            version=event.stream_version,
            updated_at=event.recorded_at,
        )
    assert hold is not None
    assert isinstance(data, HoldReleased)
    now: dict[str, Any] = {"version": event.stream_version, "updated_at": event.recorded_at}
    return replace(hold, state="released", released_by=by, released_reason=data.reason, **now)


def due(hold: Hold, now: Stamp) -> None:
    """Never: a hold that ends by itself leaves no event."""


def item(hold: Hold) -> OpenItem | None:
    """Open under its subject until it is released."""
    return OpenItem(hold.hold_id, "hold", None, stream_of(hold.subject)) if hold.state == "placed" else None
