"""Ledgers written by hand, event by event, and projectors over them."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from ledger import store
from ledger.entry import Event, encode
from ledger.events import ApprovalRequested, Fact, SessionOpened, TaskSubmitted
from ledger.merkle import leaf_hash
from ledger.postgres import Connection, Pool, open_pool
from ledger.store import Append, EventRow
from ledger.values import Actor, Principal, Quorum, Ref, stamp
from projections import VIEWS, Projector
from tests.conftest import Database

BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)
AGENT = Actor(issuer="https://id.example", sub="agent-7", kind="agent", assurance="authenticated", roles=("agent",))
DIGEST = f"sha256:{'0' * 64}"
LATER = "2036-01-01T00:00:00.000000Z"


class History:
    """Writes one ledger. Each event is recorded one second after the one before."""

    def __init__(self, pool: Pool, ledger_id: UUID, project_id: str) -> None:
        self.pool = pool
        self.ledger_id = ledger_id
        self.project_id = project_id
        self.size = 0
        self._versions: dict[UUID, int] = defaultdict(int)
        self._staged: list[tuple[str, Event[Any]]] = []

    def add(
        self,
        fact: Fact,
        stream_id: UUID | None = None,
        *,
        session_id: UUID | None = None,
        actor: Actor = AGENT,
        refs: tuple[Ref, ...] = (),
        **envelope: Any,
    ) -> UUID:
        """Stage one event; answers its stream's id."""
        stream_id = stream_id or uuid7()
        if fact.stream_type == "session":
            session_id = stream_id
        self._versions[stream_id] += 1
        command_id = envelope.pop("command_id", str(uuid7()))
        event: Event[Any] = Event(
            v=1,
            project=self.project_id,
            ledger=self.ledger_id,
            event_id=uuid7(),
            stream_type=fact.stream_type,
            stream_id=stream_id,
            stream_version=self._versions[stream_id],
            type=type(fact).__name__,
            schema_version=1,
            occurred_at=self.time(self.size + len(self._staged) + 1),
            recorded_at=self.time(self.size + len(self._staged) + 1),
            actor=actor,
            command_id=command_id,
            correlation_id=envelope.pop("correlation_id", str(session_id) if session_id else command_id),
            data=fact,
            session_id=session_id,
            root_session_id=session_id,
            refs=refs,
            **envelope,
        )
        self._staged.append((event.type, event))
        return stream_id

    def add_bytes(self, type_: str, entry: bytes) -> None:
        """Stage an event whose bytes are whatever they are."""
        self._staged.append((type_, entry))  # type: ignore[arg-type]

    def open(self, agent_role: str = "helper", *, stream_id: UUID | None = None, **fields: Any) -> UUID:
        return self.add(SessionOpened(agent_role=agent_role, expires_at=LATER, **fields), stream_id)

    def submit(self, kind: str = "email", *, session_id: UUID | None = None, **fields: Any) -> UUID:
        return self.add(TaskSubmitted(kind=kind, run_at=self.time(0), **fields), session_id=session_id)

    def ask(self, tool: str = "refund", *, session_id: UUID | None = None, **fields: Any) -> UUID:
        asked: dict[str, Any] = {
            "action": {"tool": tool, "arguments": {"amount": 1.0}},
            "requester": Principal(AGENT.issuer, AGENT.sub),
            "risk": "medium",
            "quorum": Quorum(),
            "expires_at": LATER,
            "valid_for_seconds": 900,
            "uses": 1,
            "outcome_within_seconds": 300,
            "action_digest": DIGEST,
            "request_digest": DIGEST,
            "salts": {},
            "root": None if session_id else uuid7(),
        }
        return self.add(ApprovalRequested(**asked | fields), session_id=session_id)

    async def write(self) -> int:
        """Append what is staged; answers the position of the last event."""
        rows = [
            EventRow(uuid7(), 1, type_, event, leaf_hash(event), None)
            if isinstance(event, bytes)
            else EventRow(event.stream_id, event.stream_version, type_, *_stored(event))
            for type_, event in self._staged
        ]
        last = BEGINNING + timedelta(seconds=self.size + len(rows))
        batch = Append(ledger_id=self.ledger_id, seen=self.size, recorded_at=last, events=rows)
        async with self.pool.connection() as connection:
            assert await store.append(connection, batch)
        self.size += len(rows)
        self._staged.clear()
        return self.size

    @staticmethod
    def time(position: int) -> str:
        """When the event at `position` was recorded."""
        return stamp(BEGINNING + timedelta(seconds=position))


def _stored(event: Event[Any]) -> tuple[bytes, bytes, bytes | None]:
    entry, payload = encode(event)
    return entry, leaf_hash(entry), payload


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    """Connections as the worker has them."""
    async with open_pool(database.worker, connections_max=8) as pool:
        yield pool


@pytest.fixture
async def reader(database: Database) -> AsyncIterator[Connection]:
    """A connection as the API has it."""
    async with open_pool(database.api, connections_max=1) as pool, pool.connection() as connection:
        yield connection


NewHistory = Callable[..., Awaitable[History]]


@pytest.fixture
def new_history(pool: Pool) -> NewHistory:
    """Makes a project with an empty ledger."""

    async def make(project_id: str = "demo") -> History:
        async with pool.connection() as connection:
            ledger = await store.create_ledger(connection, project_id)
        return History(pool, ledger.ledger_id, project_id)

    return make


@pytest.fixture
async def history(new_history: NewHistory) -> History:
    return await new_history()


@pytest.fixture
def projector(pool: Pool) -> Projector:
    """A projector that does nothing by itself: `await project_all(projector, history)`."""
    return Projector(pool, VIEWS)


async def project_all(projector: Projector, history: History) -> None:
    """Write what is staged and project until nothing moves any more."""
    await history.write()
    while await projector.advance(history.ledger_id):
        pass


@asynccontextmanager
async def running(projector: Projector) -> AsyncIterator[None]:
    """The projector's own loop, for as long as the block runs."""
    job = asyncio.create_task(projector.run())
    try:
        yield
    finally:
        job.cancel()
        await asyncio.wait([job])


@contextmanager
def deadline(seconds: float = 20) -> Iterator[Callable[[], None]]:
    """Call what it gives while waiting for something: it fails the test when that never comes."""
    until = asyncio.get_running_loop().time() + seconds

    def check() -> None:
        assert asyncio.get_running_loop().time() < until, "it never came"

    yield check


async def rows_read(connection: Connection, schema: str) -> int:
    """How many rows of a view this connection has read, whatever it did with them. To be asked in a transaction."""
    cursor = await connection.execute(
        "SELECT sum(seq_tup_read + idx_tup_fetch) FROM pg_stat_xact_user_tables WHERE schemaname = %s", [schema]
    )
    return int((await cursor.fetchall())[0][0])
