"""What a batch has to read before it can be decided: streams, what is open, and the queue.

What is read is remembered; what only the ledger's lock makes sure of is answered, for one batch. Reads go by the
connection that holds the lock where one does, for then nobody else appends. Nothing is decided here.
"""

from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import datetime
from typing import Any
from uuid import UUID

from msgspec import UNSET

from ledger import store
from ledger.approval import Approval
from ledger.commands import ClaimTasks
from ledger.known import Queue, offer
from ledger.memory import Memory
from ledger.pending import Pending
from ledger.postgres import Connection, Pool
from ledger.session import Session
from ledger.system import LoseAttempt
from ledger.task import Task
from ledger.values import stamp


class Reader:
    """See the module. One a ledger."""

    def __init__(self, pool: Pool, memory: Memory, ledger_id: UUID) -> None:
        self._pool, self._memory, self.ledger_id = pool, memory, ledger_id

    async def load(self, connection: Connection | None, stream_ids: set[UUID]) -> None:
        async with self._connected(connection) as connected:
            self._memory.learn(stream_ids, await store.read_streams(connected, self.ledger_id, stream_ids))

    async def load_items(self, connection: Connection | None, batch: list[Pending], root: UUID) -> set[UUID]:
        """Read what this root has open, and the roots of all sessions and tasks that the batch is about: its other
        commands will ask for those. Returns the streams in them that are not known yet."""
        states = self._named(batch)
        roots = {root, *(state.root_session_id for state in states if isinstance(state, Session))}
        roots |= {state.root_session_id or state.task_id for state in states if isinstance(state, Task)}
        roots.difference_update(self._memory.items)
        async with self._connected(connection) as connected:
            items = await store.read_open_items(connected, self.ledger_id, roots)
        self._memory.learn_items(roots, items)
        return {item.item_id for item in items if not self._memory.knows(item.item_id)}

    def _named(self, batch: list[Pending]) -> list[Any]:
        """The states of the streams that a batch names, where they are known."""
        named = {stream_id for p in batch for stream_id in (p.target, *p.command.reads)}
        return [self._memory.stream(stream_id) for stream_id in named if self._memory.knows(stream_id)]

    def beside(self, batch: list[Pending]) -> set[UUID]:
        """The tasks of the approvals, and the approvals of the tasks, that a batch names: what follows from its other
        commands will ask for those."""
        states = self._named(batch)
        beside = {state.task_id for state in states if isinstance(state, Approval)}
        beside |= {state.approval_id for state in states if isinstance(state, Task)}
        return {stream_id for stream_id in beside if stream_id is not None}

    async def read_queue(self, connection: Connection, batch: list[Pending], now: datetime) -> Queue:
        """What the claims of a batch may have, and when the leases that it may lose really end."""
        commands = [pending.command for pending in batch]
        claims = [c for c in commands if isinstance(c, ClaimTasks) and c.kinds is not UNSET]
        # What one of them is offered another may have taken, or a neighbour that is no claim.
        limit = sum(claim.n for claim in claims) + len(commands) - len(claims)
        offers = {
            (kinds, session_id): await store.read_offers(connection, self.ledger_id, kinds, session_id, now, limit)
            for kinds, session_id in dict.fromkeys(map(offer, claims))
        }
        leased = [command.task_id for command in commands if isinstance(command, LoseAttempt)]
        ends = await store.lock_leases(connection, self.ledger_id, leased) if leased else {}
        leases = {task_id: stamp(end) if (end := ends.get(task_id)) else None for task_id in leased}
        return Queue(offers, leases)

    def _connected(self, connection: Connection | None) -> AbstractAsyncContextManager[Connection]:
        return self._pool.connection() if connection is None else nullcontext(connection)
