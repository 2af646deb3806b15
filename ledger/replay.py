"""What is stored, made into what it means: a state from its events, a receipt from its command's row."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any
from uuid import UUID

from ledger import store
from ledger.batch import RULES
from ledger.entry import Event, Recorded
from ledger.errors import ERRORS, LeaseLost, MunimentError
from ledger.events import CommandRefused, LateResultRefused
from ledger.postgres import Connection
from ledger.receipt import Receipt, said
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


def _refusal(event: Event[Any]) -> MunimentError:
    fact = event.data
    if isinstance(fact, LateResultRefused):
        return LeaseLost(id=event.stream_id, lease_id=fact.lease_id)
    assert isinstance(fact, CommandRefused)
    return ERRORS[fact.code](**fact.params)


def fold_all(history: Iterable[Recorded]) -> dict[UUID, Any]:
    """The states of several streams, whose events come stream by stream."""
    return {stream: fold(events) for stream, events in groupby(history, lambda r: r.event.stream_id)}


ANSWERED_AS_IT_IS = "RequestApproval"
"""The one command whose answer, when it comes again, is its target as that is now (SPEC s4)."""


async def recall(connection: Connection, ledger_id: UUID, rows: Sequence[CommandRow]) -> list[Receipt]:
    """The receipts of commands answered before, in the order of `rows`; two queries for all of them.

    An answer is a function of the row, the command's events, and what they are about folded to `seen_position`.
    """
    positions = [row.first_position for row in rows if row.status >= 400]
    positions += [position for row in rows if _claimed(row) for position in row.positions]
    events = {r.position: r.event for r in await _read(connection, ledger_id, positions)}
    claimed = {row: [events[position].stream_id for position in row.positions] for row in rows if _claimed(row)}
    streams = {row.target for row in rows if row.status < 400 and row.target is not None}
    streams.update(stream_id for ids in claimed.values() for stream_id in ids)
    histories: dict[UUID | None, list[Recorded]] = {}
    for recorded in await store.read_streams(connection, ledger_id, streams) if streams else []:
        histories.setdefault(recorded.event.stream_id, []).append(recorded)

    def state(row: CommandRow, stream_id: UUID | None) -> Any:
        as_it_is = row.type == ANSWERED_AS_IT_IS
        return fold(r for r in histories.get(stream_id, ()) if as_it_is or r.position <= row.seen_position)

    def receipt(row: CommandRow) -> Receipt:
        if row.status >= 400:
            return said(row, None, _refusal(events[row.first_position]), replayed=True)
        answered = tuple(state(row, i) for i in claimed[row]) if row in claimed else state(row, row.target)
        return said(row, answered, replayed=True)

    return [receipt(row) for row in rows]


def _claimed(row: CommandRow) -> bool:
    """Whether its answer is what it claimed, not its target."""
    return row.type == "ClaimTasks" and row.status < 400


async def _read(connection: Connection, ledger_id: UUID, positions: Sequence[int]) -> list[Recorded]:
    stored = await store.read_positions(connection, ledger_id, positions) if positions else []
    return [one.decode() for one in stored]
