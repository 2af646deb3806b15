"""The group commit of one ledger: pending commands -> decide -> one append -> receipts.

One batch in flight, no timer: while a batch is on its way the next one is decided on top of it, as it comes in.
Decisions are optimistic. A batch is appended on condition that the ledger has the size it was decided on;
where another process was quicker it is decided again under the ledger's lock, and the writer stays on that
exact path until it has been alone for a while. Even a batch that appends nothing checks the size, so no
answer is ever given on a stale cache. Nothing is acknowledged before its commit is durable; re-deciding
happens here and nowhere else.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from contextvars import Context
from uuid import UUID

import psycopg
from msgspec.structs import replace
from psycopg_pool import PoolTimeout

from ledger import store
from ledger.batch import Batch
from ledger.errors import ClockSkew, IdempotencyKeyReused, MunimentError, StoreUnavailable
from ledger.flight import BATCH_BYTES_MAX, BATCH_COMMANDS_MAX, Flight, apart
from ledger.known import Known, NotLoaded, Queue
from ledger.memory import TAIL_EVENTS_MAX, Key, Memory, Refusals
from ledger.past import SETTLED_SECONDS
from ledger.pending import Pending, Verdict
from ledger.postgres import TROUBLE, Clock, Connection, Pool, store_errors
from ledger.reader import Reader
from ledger.receipt import Receipt
from ledger.replay import fold_all, recall
from ledger.store import Append, CommandRow, Ledger, Locked
from ledger.subjects import EraseSubject, may_be_of_a_subject
from ledger.telemetry import Commits
from ledger.vault import Unprepared, Vault

log = logging.getLogger(__name__)

QUEUE_COMMANDS_MAX = 20_000
ALONE_AFTER_BATCHES = 3
RECOVERY_SECONDS = 5.0


class OutcomeUnknown(Exception):
    """The commit was sent, and whether it is durable was not said."""


class Overtaken(Exception):
    """Something was recorded that this process did not expect; under the lock it will be seen."""


class Writer:
    """The one that appends to a ledger in this process."""

    def __init__(
        self,
        project_id: str,
        ledger: Ledger,
        *,
        pool: Pool,
        vault: Vault,
        clock: Clock,
        refusals: Refusals,
        session_retention_days: int,
        announce: Callable[[Append], None],
        commits: Commits,
    ) -> None:
        self.ledger = ledger
        self.ledger_id = ledger.ledger_id
        self._memory = Memory(project_id, ledger, refusals)
        self._pool, self._vault, self._clock = pool, vault, clock
        self._reader = Reader(pool, self._memory, ledger.ledger_id)
        self._session_retention_days = session_retention_days
        self._announce, self._commits = announce, commits
        self._queue: deque[Pending] = deque()
        self.waiting: dict[Key, Pending] = {}
        self._alone_batches = 0
        self._stirred = asyncio.Event()
        self._job: asyncio.Task[None] | None = None
        self._recalls: set[asyncio.Task[None]] = set()

    # Taking commands in

    def submit(self, pending: Pending) -> Verdict | asyncio.Future[Verdict]:
        """Queue a command; what became of it comes by itself. One under the id of a waiting one waits for that."""
        first = self.waiting.get(pending.key)
        verdict = self._memory.answered(pending) if first is None else None
        if verdict is None and len(self._queue) >= QUEUE_COMMANDS_MAX:
            verdict = StoreUnavailable(why="Too many commands are waiting already")
        if verdict is not None:
            self._commits.answered([(pending, verdict)])
            return verdict
        pending.answer = asyncio.get_running_loop().create_future()
        if first is None:
            self._enqueue(pending)
        else:
            first.rivals.append(pending)
        return pending.answer

    def _enqueue(self, pending: Pending) -> None:
        self.waiting[pending.key] = pending
        self._queue.append(pending)
        self._stirred.set()
        if self._job is None:
            # Not in the context of who came first: what is done here is done for all.
            self._job = asyncio.create_task(self._run(), context=Context())

    async def drained(self) -> None:
        """Return when nothing is on its way."""
        while self._job is not None or self._recalls:
            await asyncio.gather(*(job for job in (self._job, *self._recalls) if job))

    async def _run(self) -> None:
        """Have one batch on its way, and meanwhile decide the next on top of it, which grows until that has landed.

        Its append states the size that the other will have left, so if that one misses, so does this.
        """
        flight: Flight | None = None
        while self._queue or flight is not None:
            following: Flight | None = None
            exact: list[Pending] = []
            if flight is not None or self._alone_batches >= ALONE_AFTER_BATCHES:
                following, exact = await self._follow(flight)
            else:
                exact = self._take(BATCH_COMMANDS_MAX)
            if flight is not None and not await self._landed(flight):
                await self._settle(flight.fresh)
                exact = [*following.fresh, *exact] if following else exact
                following = None
            flight = following
            if flight is not None:
                flight.decided.rebase(self._memory)
                flight.job = asyncio.create_task(self._append(flight))
                flight.job.add_done_callback(lambda _: self._stirred.set())
            elif exact:
                await self._settle(exact)
            await asyncio.sleep(0)  # those just answered ask again before the next batch is taken
        self._job = None

    def _take(self, commands_max: int) -> list[Pending]:
        batch: list[Pending] = []
        size = 0
        while self._queue and len(batch) < commands_max and size < BATCH_BYTES_MAX:
            pending = self._queue.popleft()
            size += len(pending.canonical)
            batch.append(pending)
        return batch

    # The optimistic path

    async def _follow(self, flight: Flight | None) -> tuple[Flight | None, list[Pending]]:
        """Decide what comes in until `flight` has landed; without one half of what waits, at once, so that the rest
        is decided while that is on its way.

        Answers with what is to be sent next, or else with commands that only the exact path can decide.
        """
        following: Flight | None = None
        batch: list[Pending] = []
        try:
            while True:
                room = following.room if following else BATCH_COMMANDS_MAX
                batch = self._take(room if flight else min(room, (len(self._queue) + 1) // 2))
                if batch:
                    following = await self._extend(following, batch, flight.decided if flight else self._memory)
                    batch = []
                if flight is None or flight.job is None or flight.job.done():
                    break
                await self._stirred.wait()
                self._stirred.clear()
            if following is not None:
                await self._verify(following)
        except Exception as error:  # noqa: BLE001  (the exact path meets it again, and says so)
            exact = [*(following.fresh if following else ()), *batch]
            log.debug("%d commands go by the exact path: %r", len(exact), error)
            return None, exact
        return following, []

    async def _extend(self, flight: Flight | None, batch: list[Pending], on: Known) -> Flight | None:
        """Decide `batch` after what `flight` has already. No query, if nothing needs to be looked up."""
        rows = await self._find([pending for pending in batch if not self._memory.surely_new(pending)])
        fresh = [pending for pending in batch if pending.key not in rows] if rows else batch
        if fresh:
            absent = {p.target for p in fresh if p.command.creates and self._memory.minted_since(p.target)}
            flight = await self._decide(None, on, flight, fresh, absent)
        if rows:
            self._answer_again([pending for pending in batch if pending.key in rows], rows)
        return flight

    async def _verify(self, flight: Flight) -> None:
        """An error that leaves no trace meets no unique index, so only a look tells that it was answered before.
        Nor does a stream that its caller named, that was believed absent, and that this batch does not begin."""
        unbegun = {stream_id for stream_id in flight.absent if flight.decided.streams[stream_id] is None}
        if unbegun and any(pending.command.target in unbegun for pending in flight.fresh):
            raise Overtaken
        traceless = [p for p, v in zip(flight.fresh, flight.verdicts, strict=True) if isinstance(v, MunimentError)]
        if await self._find([pending for pending in traceless if self._memory.surely_new(pending)]):
            raise Overtaken

    async def _find(self, batch: list[Pending]) -> dict[Key, CommandRow]:
        """What was recorded of these commands before, all of it as old as what is known here.

        A younger one may be of a commit that still waits for its standby; under the lock we wait as well.
        """
        if not batch:
            return {}
        async with self._pool.connection() as connection:
            rows = await store.find_commands(connection, self.ledger_id, [pending.key for pending in batch])
        if any(row.seen_position > self._memory.size for row in rows.values()):
            raise Overtaken
        return rows

    async def _append(self, flight: Flight) -> bool:
        """Append, or where there is nothing to append check the size: False if another was quicker."""
        decided = flight.decided
        async with self._commits.committing(flight.fresh), self._pool.connection() as connection:
            connection.standby_missed = False
            if self._clock.stale:
                await self._clock.measure(connection)
            age = self._clock.now() - decided.recorded_at
            if age.total_seconds() > SETTLED_SECONDS / 2:
                return False  # by now somebody may have been told all that was recorded by that time (past.py)
            if decided.append.commands:
                unchanged = await store.append(connection, decided.append)
            else:
                unchanged = await store.stands(connection, self.ledger_id, decided.size, decided.leaf)
            if connection.standby_missed:
                raise OutcomeUnknown
        return unchanged

    async def _landed(self, flight: Flight) -> bool:
        """Answer what was on its way; False if it must be settled by the exact path."""
        assert flight.job is not None
        try:
            if await flight.job:
                self._accept(flight)
                return True
        except psycopg.errors.UniqueViolation:
            pass  # an id believed new was not: under the lock every id is looked up
        except PoolTimeout:
            pass  # nothing was sent
        except (*TROUBLE, OutcomeUnknown):
            for pending in flight.fresh:
                pending.outcome_unknown = True
        except Exception as error:  # noqa: BLE001  (the exact path meets it again, and says so)
            log.debug("%d commands go by the exact path: %r", len(flight.fresh), error)
        self._alone_batches = 0
        self._commits.redecided += 1
        return False

    # The exact path

    async def _settle(self, batch: list[Pending]) -> None:
        """Have every command of `batch` answered, one way or another."""
        for part in apart(batch):
            await self._settle_together(part)

    async def _settle_together(self, batch: list[Pending]) -> None:
        try:
            await self._commit(batch)
        except (StoreUnavailable, ClockSkew) as error:
            self._resolve((pending, error) for pending in batch)
        except Exception as error:
            if len(batch) == 1:
                self._resolve([(batch[0], batch[0].fault(error))])
                return
            # One command that cannot be decided or stored must not take its neighbours with it.
            log.exception("A batch of %d commands failed; trying them one by one", len(batch))
            for pending in batch:
                if pending.key in self.waiting:
                    await self._settle_together([pending])

    async def _commit(self, batch: list[Pending]) -> None:
        give_up_at = time.monotonic() + RECOVERY_SECONDS
        while True:
            try:
                await self._append_locked(batch)
            except Unprepared:
                # A subject of theirs was erased after its key was made ready: now it has another.
                for pending in batch:
                    pending.data_keys = await self._vault.prepare_for(self._memory.project_id, pending.canonical)
            except PoolTimeout as error:
                raise StoreUnavailable(why="No database connection was to be had") from error
            except (*TROUBLE, OutcomeUnknown) as error:
                # The batch may or may not be there. Under the lock, which waits for whoever still holds
                # the row, its command ids tell; until then nothing is repeated and nothing acknowledged.
                for pending in batch:
                    pending.outcome_unknown = True
                if time.monotonic() > give_up_at:
                    raise StoreUnavailable(why="The database did not say whether it committed") from error
                await asyncio.sleep(0.05)
            else:
                return

    async def _append_locked(self, batch: list[Pending]) -> None:
        """Nobody else appends while this batch is decided."""
        async with self._commits.committing(batch), self._pool.connection() as connection:
            connection.standby_missed = False
            if self._clock.stale:
                await self._clock.measure(connection)
            async with connection.transaction():
                keys = [pending.key for pending in batch]
                seen, leaf = self._memory.size, self._memory.leaf
                locked = await store.lock(connection, self.ledger_id, seen, leaf, TAIL_EVENTS_MAX, keys)
                await self._give_up_keys(connection, locked)
                alone = self._memory.catch_up(locked, self._clock.now().timestamp())
                self.ledger = self.ledger._replace(epoch=self._memory.epoch)
                self._alone_batches = self._alone_batches + 1 if alone else 0
                fresh = [pending for pending in batch if pending.key not in locked.commands]
                flight = await self._decide(connection, self._memory, None, fresh)
                if flight.decided.append.commands:
                    appended = await store.append(connection, flight.decided.append)
                    assert appended, "the ledger grew under its lock"
            # From here on the batch is durable, unless the server warned that its standby is not there.
            if connection.standby_missed:
                raise OutcomeUnknown
        self._accept(flight)
        self._answer_again([p for p in batch if p.key in locked.commands], locked.commands)

    async def _give_up_keys(self, connection: Connection, locked: Locked) -> None:
        """Seal nothing more under keys of subjects that another process erased since: what comes after an erasure is
        not of it."""
        project_id, seen = self._memory.project_id, self._memory.size
        if seen < 0 or locked.changed is None or locked.head.size - seen > TAIL_EVENTS_MAX:
            self._vault.give_up_all(project_id)
        elif changed := [stream_id for stream_id in locked.changed if may_be_of_a_subject(stream_id)]:
            erasures = fold_all(await store.read_streams(connection, self.ledger_id, changed))
            self._vault.give_up(project_id, [erasure.subject for erasure in erasures.values()])

    # Deciding

    async def _decide(
        self,
        connection: Connection | None,
        on: Known,
        flight: Flight | None,
        batch: list[Pending],
        absent: AbstractSet[UUID] = frozenset(),
    ) -> Flight:
        """Decide `batch` on what is known, after what `flight` has already; read first what is not known, on
        `connection` if its lock matters."""
        known = on if flight is None else flight.decided
        named = {stream_id for p in batch for stream_id in (p.target, *p.command.reads)}
        unknown = {stream_id for stream_id in named if not known.knows(stream_id)}
        absent = unknown & absent
        unknown -= absent
        queue = Queue()
        retired: dict[str, int] = {}
        while True:
            if unknown:
                await self._reader.load(connection, unknown)
            now = max(self._clock.now(), known.recorded_at)
            if flight is None:
                decided = Batch(on, now, self._vault, queue, session_retention_days=self._session_retention_days)
                flight = Flight(decided)
            else:
                flight.decided.move_on(now)
            try:
                flight.decide(batch, absent)
            except NotLoaded as missing:
                if missing.root and on is not self._memory:
                    raise  # the table does not know yet what the batch on its way closes under this root
                if missing.under_lock and connection is None:
                    raise
                batch = [*flight.fresh, *batch]
                if missing.stream:
                    unknown = {missing.stream, *(i for i in self._reader.beside(batch) if not on.knows(i))}
                elif missing.root:
                    unknown = await self._reader.load_items(connection, batch, missing.root)
                else:
                    assert connection is not None
                    if isinstance(subject := missing.under_lock, str):
                        retired[subject] = await self._vault.retire(self._memory.project_id, subject)
                    queue = replace(await self._reader.read_queue(connection, batch, now), retired=retired)
                    unknown = {task_id for task_id in queue.tasks if not on.knows(task_id)}
                absent, flight = flight.absent - unknown, None
            else:
                return flight

    # Answering

    def _accept(self, flight: Flight) -> None:
        """The batch is durable."""
        self._memory.accept(flight.decided)
        erasing = flight.fresh[-1].command if flight.fresh else None
        if isinstance(erasing, EraseSubject):  # the only one of its batch (flight.apart)
            self._vault.give_up(self._memory.project_id, [erasing.subject])
        if flight.decided.append.events:
            self._commits.events += len(flight.decided.append.events)
            self._announce(flight.decided.append)
        self._resolve(zip(flight.fresh, flight.verdicts, strict=True))

    def _resolve(self, answers: Iterable[tuple[Pending, Verdict]]) -> None:
        verdicts = list(answers)
        self._commits.answered(verdicts)
        for pending, verdict in verdicts:
            self.waiting.pop(pending.key, None)
            pending.resolve(verdict)
            if pending.rivals:
                self._resolve_rivals(pending, verdict)

    def _resolve_rivals(self, pending: Pending, verdict: Verdict) -> None:
        """What is recorded is the answer to them all, or to none of another content. What left no trace is
        no answer to anyone else: the next one is decided."""
        rivals, pending.rivals = pending.rivals, []
        for place, rival in enumerate(rivals):
            if isinstance(verdict, Receipt) and rival.fingerprint == pending.fingerprint:
                self._resolve([(rival, replace(verdict, replayed=True))])
            elif isinstance(verdict, Receipt):
                self._resolve([(rival, IdempotencyKeyReused(command_id=rival.command_id))])
            elif verdict.status >= 429:
                self._resolve([(rival, verdict)])
            else:
                rival.rivals = rivals[place + 1 :]
                self._enqueue(rival)
                return

    def _answer_again(self, batch: list[Pending], rows: dict[Key, CommandRow]) -> None:
        """Answer commands that were recorded before; apart, so that no batch waits for it."""
        same = [p for p in batch if p.fingerprint == rows[p.key].fingerprint]
        other = [p for p in batch if p.fingerprint != rows[p.key].fingerprint]
        self._resolve((p, IdempotencyKeyReused(command_id=p.command_id)) for p in other)
        if same:
            job = asyncio.create_task(self._recall(same, [rows[p.key] for p in same]))
            self._recalls.add(job)
            job.add_done_callback(self._recalls.discard)

    async def _recall(self, batch: list[Pending], rows: list[CommandRow]) -> None:
        try:
            with store_errors():
                async with self._pool.connection() as connection:
                    receipts = await recall(connection, self.ledger_id, rows)
        except StoreUnavailable as error:
            self._resolve((pending, error) for pending in batch)
            return
        except Exception as error:
            log.exception("%d commands could not be answered again", len(batch))
            self._resolve((pending, pending.fault(error)) for pending in batch)
            return
        for pending, receipt in zip(batch, receipts, strict=True):
            # A commit of ours whose outcome was not said: this is its first answer.
            self._resolve([(pending, replace(receipt, replayed=not pending.outcome_unknown))])
