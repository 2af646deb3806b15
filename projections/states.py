"""The states that a view keeps: what the rules' own `evolve` makes of each stream, and nothing else.

So what a view shows and what commands are decided on cannot differ. A state is kept as its exact bytes; personal
values in it stay sealed.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import UUID

import msgspec

from ledger.entry import Event, Recorded, canonical
from ledger.postgres import Connection, uuids
from projections.projector import Memory, in_schema

REMEMBERED_MAX = 2_000
REMEMBERED_BYTES_MAX = 8 * 1024
"""A larger state is read again when its stream goes on: 2,000 of the largest would be gigabytes."""

S = TypeVar("S")


class Kept(NamedTuple, Generic[S]):
    """A state with its bytes, and what it was before the batch, if anything. `position` is that of its stream's first
    event: the order in which things were made."""

    position: int
    before: S | None
    state: S
    content: bytes


class States(Generic[S]):
    """The states of one stream type. Of the view's `sql`, `get` reads the bytes of one by its id, and `load` position
    and bytes of those in `%(ids)s`."""

    def __init__(
        self,
        stream_type: str,
        state: type[S],
        evolve: Callable[[Any, Event[Any]], S],
        is_open: Callable[[S], bool],
        sql: Any,
    ) -> None:
        self._stream_type = stream_type
        self._decoder = msgspec.json.Decoder(state)
        self._evolve = evolve
        self._is_open = is_open
        self._sql = sql

    def decode(self, content: bytes) -> S:
        return self._decoder.decode(content)

    async def get(self, connection: Connection, ledger_id: UUID, stream_id: UUID) -> S | None:
        """The state as the view has it."""
        values = {"ledger_id": ledger_id, f"{self._stream_type}_id": stream_id}
        row = await (await connection.execute(self._sql.get, values, prepare=True, binary=True)).fetchone()
        return self.decode(row[0]) if row else None

    async def page(
        self, connection: Connection, parts: Sequence[bytes], values: dict[str, Any], limit: int
    ) -> tuple[list[S], int | None]:
        """Up to `limit` states of the list that `parts` make together, and the position to go on after, if there is
        more."""
        given = {name: column(value) if isinstance(value, str) else value for name, value in values.items()}
        cursor = await connection.execute(b"\n".join(parts), given | {"limit": limit + 1}, prepare=True, binary=True)
        rows = await cursor.fetchall()
        return [self.decode(content) for _, content in rows[:limit]], rows[limit - 1][0] if len(rows) > limit else None

    async def after(
        self, connection: Connection, ledger_id: UUID, batch: Sequence[Recorded], memory: Memory
    ) -> dict[UUID, Kept[S]]:
        """What `batch` made of the streams it goes on with, by id. It remembers those that are open."""
        events = [recorded for recorded in batch if recorded.event.stream_type == self._stream_type]
        if not events:
            return {}
        begun = {event.stream_id for _, event in events if event.stream_version == 1}
        gone_on = {event.stream_id for _, event in events} - begun
        before = {key: memory[key] for key in gone_on if key in memory}
        if len(before) < len(gone_on):
            before |= await self._load(connection, ledger_id, memory.schema, gone_on - before.keys())
        after = dict(before)
        for position, event in events:
            first, state = after.get(event.stream_id, (position, None))
            after[event.stream_id] = first, self._evolve(state, event)
        kept = {
            key: Kept(first, before[key][1] if key in before else None, state, canonical(state))
            for key, (first, state) in after.items()
        }
        self._remember(memory, kept)
        return kept

    async def _load(
        self, connection: Connection, ledger_id: UUID, schema: str, ids: Collection[UUID]
    ) -> dict[UUID, tuple[int, S]]:
        values = {"ledger_id": ledger_id, "ids": uuids(ids)}
        cursor = await connection.execute(in_schema(self._sql.load, schema), values, prepare=True, binary=True)
        return {key: (position, self.decode(content)) for key, position, content in await cursor.fetchall()}

    def _remember(self, memory: Memory, kept: dict[UUID, Kept[S]]) -> None:
        if len(memory) > REMEMBERED_MAX:
            memory.clear()
        for key, (position, _, state, content) in kept.items():
            memory.pop(key, None)
            if self._is_open(state) and len(content) <= REMEMBERED_BYTES_MAX:
                memory[key] = position, state


def column(text: str) -> str:
    """PostgreSQL's text cannot hold a NUL, and an index entry only so much; the state's own bytes are whole."""
    return text.replace("\0", "\ufffd")[:255]
