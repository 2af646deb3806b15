"""Where commands go in: one committer a process, one writer a ledger.

It turns a caller's command into a pending one (its id, its fingerprint, its data keys in memory) and
hands it to the writer of its project's ledger, whose group commit answers. Nothing is decided here.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from contextvars import Context
from time import monotonic
from uuid import UUID

from msgspec import UNSET
from uuid_utils.compat import uuid7

from ledger import store
from ledger.commands import Command
from ledger.entry import canonical
from ledger.errors import MunimentError, UnknownProject
from ledger.memory import Refusals
from ledger.pending import Pending, Verdict
from ledger.postgres import TROUBLE, Clock, Pool, store_errors
from ledger.project_key import key_errors
from ledger.receipt import Receipt
from ledger.replay import recall
from ledger.store import Ledger
from ledger.subjects import OfSubject
from ledger.telemetry import Commits
from ledger.tracing import Tracing, traceparent_of
from ledger.values import Actor
from ledger.vault import Vault
from ledger.watch import Watch
from ledger.writer import Writer

LOOK_SECONDS = 5.0
"""How long what a ledger is called may be that of another process's past, where nothing is recorded here."""


class Committer:
    """Where commands go in, for every project. See `submit`."""

    def __init__(
        self,
        pool: Pool,
        vault: Vault,
        *,
        create_ledgers: bool,
        session_retention_days: int = 7,
        tracing: Tracing | None = None,
    ) -> None:
        self.pool = pool
        self.vault = vault
        self.clock = Clock()
        self.watch = Watch(pool)
        self.refusals = Refusals()
        self.commits = Commits(tracing)
        self.session_retention_days = session_retention_days
        self._create_ledgers = create_ledgers
        self._writers: dict[str, Writer] = {}
        self._opening: dict[tuple[str, bool], asyncio.Task[Writer]] = {}
        self._looked_at: dict[UUID, float] = {}
        self._looking: set[asyncio.Task[None]] = set()

    async def submit(
        self, project_id: str, command: Command, actor: Actor, *, traceparent: str | None = None
    ) -> Receipt:
        """Have `command` decided and, if it changes anything, durably recorded; then its receipt.

        Takes `command_id` (minted if absent) and `expected_version` out of the command. A refusal that
        is recorded comes as a Receipt with `refusal`; any other is raised as its MunimentError, and then
        nothing happened and the id is free, except that after StoreUnavailable the outcome may be
        unknown: the same id asked again tells.
        """
        writer = await self._writer(project_id)
        self._look(writer)
        verdict = writer.submit(await self._pending(project_id, command, actor, traceparent))
        if isinstance(verdict, asyncio.Future):
            verdict = await verdict
        if isinstance(verdict, MunimentError):
            raise verdict
        return verdict

    async def submit_all(
        self, project_id: str, commands: Sequence[Command], actor: Actor, *, traceparent: str | None = None
    ) -> list[Verdict]:
        """As `submit` for each, in order: a later one sees the effects of those before it."""
        writer = await self._writer(project_id)
        self._look(writer)
        pendings = [await self._pending(project_id, command, actor, traceparent) for command in commands]
        answers = [writer.submit(pending) for pending in pendings]
        return [await answer if isinstance(answer, asyncio.Future) else answer for answer in answers]

    async def receipt(self, project_id: str, principal: str, command_id: str) -> Receipt | None:
        """What became of a command of `principal`, if it was ever answered and recorded."""
        ledger = await self.ledger(project_id)
        if ledger is None:
            return None
        with store_errors():
            async with self.pool.connection() as connection:
                rows = await store.find_commands(connection, ledger.ledger_id, [(principal, command_id)])
                return next(iter(await recall(connection, ledger.ledger_id, list(rows.values()))), None)

    async def ledger(self, project_id: str) -> Ledger | None:
        """The project's ledger, if it has one. Its size is as of when this process first met it."""
        with suppress(UnknownProject):
            writer = await self._writer(project_id, create=False)
            self._look(writer)
            return writer.ledger
        return None

    def epoch(self, project_id: str) -> UUID | None:
        """What the ledger of the project is called outside. Where another process has begun that, it is known at the
        next commit here, or some seconds later. None where it is gone."""
        writer = self._writers.get(project_id)
        return writer.ledger.epoch if writer else None

    @property
    def waiting(self) -> int:
        """How many commands were taken in and are not answered."""
        return sum(len(writer.waiting) for writer in self._writers.values())

    async def close(self) -> None:
        """Finish what was accepted; then nothing is on its way any more."""
        await asyncio.gather(*self._looking)
        await asyncio.gather(*(writer.drained() for writer in self._writers.values()))
        await self.watch.closed()

    async def _writer(self, project_id: str, *, create: bool = True) -> Writer:
        writer = self._writers.get(project_id)
        if writer is not None:
            return writer
        # All who ask meanwhile share one attempt: with the database away they wait at once, not in turn.
        key = (project_id, create)
        opening = self._opening.get(key)
        if opening is None:
            opening = self._opening[key] = asyncio.create_task(self._open(project_id, create))
            opening.add_done_callback(lambda _: self._opening.pop(key))
        return await asyncio.shield(opening)

    async def _open(self, project_id: str, create: bool) -> Writer:
        with store_errors():
            async with self.pool.connection() as connection:
                ledger = await store.find_ledger(connection, project_id)
                if ledger is None and create and self._create_ledgers:
                    ledger = await store.create_ledger(connection, project_id)
        if ledger is None or ledger.is_foreign:
            raise UnknownProject(project=project_id)
        with key_errors():
            await self.vault.open(project_id)
        writer = Writer(
            project_id,
            ledger,
            pool=self.pool,
            vault=self.vault,
            clock=self.clock,
            refusals=self.refusals,
            session_retention_days=self.session_retention_days,
            announce=self.watch.appended,
            commits=self.commits,
        )
        return self._writers.setdefault(project_id, writer)

    def _look(self, writer: Writer) -> None:
        """Have a writer know what its ledger is called by now, unless that was looked for a moment ago: where nothing
        is recorded here, nobody else would notice that another process has begun an epoch of it."""
        now = monotonic()
        if now > self._looked_at.get(writer.ledger_id, 0.0) + LOOK_SECONDS:
            self._looked_at[writer.ledger_id] = now
            job = asyncio.create_task(self._look_now(writer), context=Context())
            self._looking.add(job)
            job.add_done_callback(self._looking.discard)

    async def _look_now(self, writer: Writer) -> None:
        try:
            async with self.pool.connection() as connection:
                epoch = (await store.head(connection, writer.ledger_id)).epoch
            writer.ledger = writer.ledger._replace(epoch=epoch)
        except store.Gone:
            # Whoever asks next finds out which ledger the project has, if any.
            self._writers = {name: one for name, one in self._writers.items() if one is not writer}
        except TROUBLE:
            pass  # it is asked again

    async def _pending(self, project_id: str, command: Command, actor: Actor, traceparent: str | None) -> Pending:
        command_id = command.command_id if command.command_id is not UNSET else str(uuid7())
        expected = command.expected_version
        command.command_id = command.expected_version = UNSET
        if isinstance(command, OfSubject):
            command.subject = self.vault.pseudonym(project_id, command.subject)
        asked = canonical(command)
        keys = await self.vault.prepare_for(project_id, asked)
        target = command.target
        tracing = self.commits.tracing
        span = tracing.current() if tracing else None
        return Pending(
            command=command,
            actor=actor,
            principal=actor.principal,
            command_id=command_id,
            target=uuid7() if target is None else target,
            canonical=asked,
            fingerprint=self.vault.fingerprint(project_id, asked),
            expected_version=None if expected is UNSET else expected,
            traceparent=traceparent_of(span) if span and traceparent is None else traceparent,
            data_keys=keys,
            since=monotonic(),
            span=span,
        )
