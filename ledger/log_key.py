"""The rules of the keys that sign checkpoints, as operators see them: which there are, since when, until when.

One state for all of them: there must be one that signs. Where their secret halves are is no matter of the ledger's
(signing.py). Pure: no clock, no I/O.
"""

from typing import Any, ClassVar
from uuid import UUID

from msgspec import Struct
from msgspec.structs import replace

from ledger.commands import Command
from ledger.entry import Event
from ledger.errors import AlreadyExists, InvalidTransition, NotFound
from ledger.events import Fact
from ledger.log_events import LogKeyAdded, LogKeyRetired
from ledger.operations import LOG_KEYS, OPERATORS, AddLogKey, RetireLogKey
from ledger.queue import World
from ledger.values import Stamp


class Key(Struct, frozen=True, kw_only=True):
    """One key; `public` in hex."""

    number: int
    public: str
    added_at: Stamp
    retired_at: Stamp | None = None


class LogKeys(Struct, frozen=True, kw_only=True):
    """All keys as of some event, in the order in which they came."""

    session_id: ClassVar[None] = None
    root_session_id: ClassVar[None] = None

    log_key_id: UUID = LOG_KEYS
    keys: tuple[Key, ...] = ()
    version: int = 0
    updated_at: Stamp = ""

    def find(self, number: int) -> Key | None:
        return next((key for key in self.keys if key.number == number), None)


def decide(keys: LogKeys | None, command: Command, world: World) -> list[Fact]:
    """The facts that `command` makes; none where it is so already. Raises its refusal."""
    if world.project_id != OPERATORS:
        raise NotFound(what="log_key", id=world.target)
    now = keys or LogKeys()
    match command:
        case AddLogKey(number=number, public=public):
            if any((key.number == number) != (key.public == public) for key in now.keys):
                raise AlreadyExists(what="log_key", id=number)
            return [] if now.find(number) else [LogKeyAdded(number=number, public=public)]
        case RetireLogKey(number=number):
            key = now.find(number)
            if key is None:
                raise NotFound(what="log_key", id=number)
            if key.retired_at is None and not any(k.retired_at is None and k is not key for k in now.keys):
                only = {"id": f"key {number}", "current_state": "the only one that signs", "allowed": ("one of two",)}
                raise InvalidTransition(command="RetireLogKey", **only)
            return [LogKeyRetired(number=number)] if key.retired_at is None else []
        case _:
            raise TypeError(f"{type(command).__name__} is not a command about keys")


def evolve(keys: LogKeys | None, event: Event[Any]) -> LogKeys:
    """`keys` after `event`."""
    data, before = event.data, keys or LogKeys()
    if isinstance(data, LogKeyAdded):
        after = (*before.keys, Key(number=data.number, public=data.public, added_at=event.recorded_at))
    else:
        at = event.recorded_at
        after = tuple(replace(key, retired_at=at) if key.number == data.number else key for key in before.keys)
    return replace(before, keys=after, version=event.stream_version, updated_at=event.recorded_at)


def due(keys: LogKeys, now: Stamp) -> None:
    """Never: no key ends by itself."""


def item(keys: LogKeys) -> None:
    """Never: they are under no session."""
