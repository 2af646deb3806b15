"""The states that a view keeps: what the rules' own `evolve` makes of each stream, and nothing else.

So what a view shows and what commands are decided on cannot differ. A state is kept as its exact bytes; personal
values in it stay sealed.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar
from uuid import UUID

import msgspec

from ledger import store
from ledger.entry import Event, Recorded, canonical
from ledger.past import Past
from ledger.postgres import Connection, uuids
from ledger.replay import fold_all
from projections.projector import Memory, in_schema
from projections.spans import Span

REMEMBERED_MAX = 2_000
REMEMBERED_BYTES_MAX = 8 * 1024
"""A larger state is read again when its stream goes on: 2,000 of the largest would be gigabytes."""


class Stateful(Protocol):
    @property
    def state(self) -> str: ...


S = TypeVar("S", bound=Stateful)


class Known(NamedTuple, Generic[S]):
    """A state. `position` is that of its stream's first event: the order in which things were made. `since` is that of
    the event by which what it calls its `state` became what it is; 0 where an earlier version did not keep that."""

    position: int
    since: int
    state: S


class Kept(NamedTuple, Generic[S]):
    """A state with its bytes, what it was before the batch, if anything, and the spans that ended in the batch."""

    position: int
    since: int
    before: S | None
    state: S
    content: bytes
    spans: list[Span]


class States(Generic[S]):
    """The states of one stream type. Of the view's `sql`, `get` reads the bytes of one by its id, and `load` position,
    since when, and bytes of those in `%(ids)s`."""

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

    async def as_of(
        self, connection: Connection, ledger_id: UUID, stream_ids: Sequence[UUID], position: int
    ) -> list[S]:
        """What the events up to `position` made of these streams, which had begun by then, in this order; one query."""
        states = fold_all(await store.read_streams(connection, ledger_id, stream_ids, upto=position))
        return [states[stream_id] for stream_id in stream_ids]

    async def past_page(
        self,
        connection: Connection,
        ledger_id: UUID,
        past: Past,
        query: Callable[[bool], bytes],
        values: dict[str, Any],
        *,
        limit: int,
        after: int | None,
        holds: Callable[[S], bool],
    ) -> tuple[list[S], int | None]:
        """Up to `limit` states of a list as of `past`, and the position to go on after, if there is more.

        `query`, with `after` or without, says which things to look at, in order: position and id. What they were is
        what their events say, and which of them belong in the list is for `holds`.
        """
        given = {name: column(value) if isinstance(value, str) else value for name, value in values.items()}
        given |= {"ledger_id": ledger_id, "as_of": past.position, "limit": limit + 1}
        shown: list[tuple[int, S]] = []
        while len(shown) <= limit:
            cursor = await connection.execute(
                query(after is not None), given | {"after": after}, prepare=True, binary=True
            )
            rows = await cursor.fetchall()
            states = await self.as_of(connection, ledger_id, [stream_id for _, stream_id in rows], past.position)
            shown += [(row[0], state) for row, state in zip(rows, states, strict=True) if holds(state)]
            if len(rows) <= limit:
                break
            after = rows[-1][0]
        return [state for _, state in shown[:limit]], shown[limit - 1][0] if len(shown) > limit else None

    async def after(
        self, connection: Connection, ledger_id: UUID, batch: Sequence[Recorded], memory: Memory
    ) -> dict[UUID, Kept[S]]:
        """What `batch` made of the streams it goes on with, by id. It remembers those that are open."""
        # By number: a UUID is hashed and compared in Python.
        histories: dict[int, list[Recorded]] = {}
        for recorded in batch:
            if recorded.event.stream_type == self._stream_type:
                histories.setdefault(recorded.event.stream_id.int, []).append(recorded)
        firsts = [history[0].event for history in histories.values()]
        gone_on = {event.stream_id for event in firsts if event.stream_version > 1}
        before: dict[UUID, Known[S]] = {key: memory[key] for key in gone_on if key in memory}
        if len(before) < len(gone_on):
            before |= await self._load(connection, ledger_id, memory.schema, gone_on - before.keys())
        kept = {
            event.stream_id: self._go_on(before.get(event.stream_id) if event.stream_version > 1 else None, history)
            for event, history in zip(firsts, histories.values(), strict=True)
        }
        self._remember(memory, kept)
        return kept

    def _go_on(self, before: Known[S] | None, history: Sequence[Recorded]) -> Kept[S]:
        """What the events of one stream made of it."""
        first, since, state = before or (history[0].position, history[0].position, None)
        spans: list[Span] = []
        for position, event in history:
            was, state = state, self._evolve(state, event)
            if was is not None and state.state != was.state:
                if since:
                    spans.append(Span(event.stream_id, first, was.state, since, position))
                since = position
        assert state is not None
        return Kept(first, since, before.state if before else None, state, canonical(state), spans)

    async def _load(
        self, connection: Connection, ledger_id: UUID, schema: str, ids: Collection[UUID]
    ) -> dict[UUID, Known[S]]:
        values = {"ledger_id": ledger_id, "ids": uuids(ids)}
        cursor = await connection.execute(in_schema(self._sql.load, schema), values, prepare=True, binary=True)
        rows = await cursor.fetchall()
        return {key: Known(position, since or 0, self.decode(content)) for key, position, since, content in rows}

    def _remember(self, memory: Memory, kept: dict[UUID, Kept[S]]) -> None:
        if len(memory) > REMEMBERED_MAX:
            memory.clear()
        for key, one in kept.items():
            memory.pop(key, None)
            if self._is_open(one.state) and len(one.content) <= REMEMBERED_BYTES_MAX:
                memory[key] = Known(one.position, one.since, one.state)


def column(text: str) -> str:
    """PostgreSQL's text cannot hold a NUL, and an index entry only so much; the state's own bytes are whole."""
    return text.replace("\0", "\ufffd")[:255]
