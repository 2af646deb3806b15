"""What is stored, made into what it means: a state from its events, a receipt from its command's row."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any
from uuid import UUID

from ledger import store
from ledger.batch import RULES
from ledger.commands import Receipt
from ledger.entry import Recorded
from ledger.errors import ERRORS, MunimentError
from ledger.events import CommandRefused
from ledger.postgres import Connection
from ledger.store import CommandRow


def fold(history: Iterable[Recorded]) -> Any:
    """The state of one stream after `history`; None if that is empty.

    A stream without rules (a refusal) has no state: its last event stands for it.
    """
    state: Any = None
    for _, event in history:
        rules = RULES.get(event.stream_type)
        state = rules[0].evolve(state, event) if rules else event
    return state


def fold_all(history: Iterable[Recorded]) -> dict[UUID, Any]:
    """The states of several streams, whose events come stream by stream."""
    return {stream: fold(events) for stream, events in groupby(history, lambda r: r.event.stream_id)}


async def recall(connection: Connection, ledger_id: UUID, rows: Sequence[CommandRow]) -> list[Receipt]:
    """The receipts of commands answered before, in the order of `rows`; two queries for all of them.

    An answer is a function of the row, the command's events, and the target folded to `seen_position`.
    """
    refused = [row for row in rows if row.status >= 400]
    targets = {row.target for row in rows if row.status < 400 and row.target is not None}
    refusals: dict[int, MunimentError] = {}
    for stored in (
        await store.read_positions(connection, ledger_id, [r.first_position for r in refused]) if refused else []
    ):
        fact = stored.decode().event.data
        assert isinstance(fact, CommandRefused)
        refusals[stored.position] = ERRORS[fact.code](**fact.params)
    histories: dict[UUID, list[Recorded]] = {}
    for recorded in await store.read_streams(connection, ledger_id, targets) if targets else []:
        histories.setdefault(recorded.event.stream_id, []).append(recorded)

    def receipt(row: CommandRow) -> Receipt:
        history = histories.get(row.target, []) if row.target is not None else []
        return Receipt(
            command_id=row.command_id,
            type=row.type,
            status=row.status,
            target=row.target,
            first_position=row.first_position,
            event_count=row.event_count,
            seen_position=row.seen_position,
            state=None if row.status >= 400 else fold(r for r in history if r.position <= row.seen_position),
            refusal=refusals.get(row.first_position) if row.status >= 400 else None,
            replayed=True,
        )

    return [receipt(row) for row in rows]
