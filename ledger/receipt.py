"""What became of a command, and all that its answer is made from."""

from typing import Any
from uuid import UUID

from msgspec import Struct

from ledger.errors import MunimentError
from ledger.store import CommandRow


class Receipt(Struct, frozen=True, kw_only=True):
    """What became of a command. Every answer, first or replayed, is made from this and nothing else.

    `state` is the target folded to `seen_position`; `refusal` is set when the command was refused and
    the refusal recorded. A command that appended nothing has `event_count` 0 and `first_position` 0.
    """

    command_id: str
    type: str
    status: int
    target: UUID | None
    first_position: int
    event_count: int
    seen_position: int
    state: Any = None
    refusal: MunimentError | None = None
    replayed: bool = False

    @property
    def positions(self) -> range:
        return range(self.first_position, self.first_position + self.event_count)


def said(row: CommandRow, state: Any, refusal: MunimentError | None = None, *, replayed: bool = False) -> Receipt:
    """The receipt of the command that did what `row` says."""
    return Receipt(
        command_id=row.command_id,
        type=row.type,
        status=row.status,
        target=row.target,
        first_position=row.first_position,
        event_count=row.event_count,
        seen_position=row.seen_position,
        state=state,
        refusal=refusal,
        replayed=replayed,
    )
