"""Work from the worker's side: claimed, kept while it goes on, ended; a part of the Python client.

A task is in a worker's hands by lease. Here each lease is renewed every half of its time until the task is completed,
failed or suspended; whose lease is lost stops, for somebody else may have the task by then. Nothing is claimed
ahead of what there are hands for, and nothing is kept here: a worker that dies leaves its leases to run out.
"""

import asyncio
import logging
import math
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any
from uuid import UUID

from uuid_utils.compat import uuid7

from api.answers import Answer
from api.wire import PAUSE_SECONDS, Json
from ledger.commands import Command, CompleteTask, FailTask, SuspendTask
from ledger.errors import LeaseLost, MunimentError, StoreUnavailable

if TYPE_CHECKING:
    from api.client import Client

log = logging.getLogger(__name__)

WAIT_SECONDS = 20
"""How long one claim waits at the server."""
GIVE_BACK_SECONDS = 5


class Assignment:
    """A task in this worker's hands, its lease renewed until it is completed, failed or suspended.

    Each of these raises LeaseLost if the lease was lost before; then `lost` says why, and what was done is for
    nothing: the ledger has refused it, and somebody else may be at it. To hear of that at once, work inside it::

        async with task:
            await task.complete(await send(task.payload))

    As with `asyncio.timeout`, what runs in there is cancelled when the lease is lost, and goes on behind the block.
    An error that leaves the block fails the attempt, by the name of its class alone, and is raised.
    """

    def __init__(self, client: "Client", claimed: Json, *, lease_seconds: int, asked_at: float) -> None:
        self.task_id = UUID(claimed["task_id"])
        self.lease_id = UUID(claimed["lease_id"])
        self.kind: str = claimed["kind"]
        self.payload: Any = claimed["payload"]
        self.attempt: int = claimed["attempt"]
        self.session_id = None if claimed["session_id"] is None else UUID(claimed["session_id"])
        self.approval_id = None if claimed["approval_id"] is None else UUID(claimed["approval_id"])
        self.decision: str | None = claimed["decision"]
        """What became of `approval_id`, if the task waited for it."""
        self.lost: MunimentError | None = None
        self._client = client
        self._lease_seconds = lease_seconds
        self._one_at_a_time = asyncio.Lock()
        self._inside: asyncio.Task[Any] | None = None
        self._cancelled_before = 0
        self._interrupted = False
        self.held: asyncio.Task[None] = asyncio.create_task(self._keep(asked_at))
        """Done when the task is not in these hands any more."""

    async def complete(self, result: Any = None, *, is_error: bool = False) -> Answer:
        """Say what came out of it."""
        return await self._end(
            CompleteTask(task_id=self.task_id, lease_id=self.lease_id, result=result, is_error=is_error)
        )

    async def fail(self, error: Any = None, *, retryable: bool = True) -> Answer:
        """Say that the attempt failed; it is tried again, if it is `retryable` and has attempts left."""
        return await self._end(FailTask(task_id=self.task_id, lease_id=self.lease_id, error=error, retryable=retryable))

    async def suspend(self, approval_id: UUID) -> Answer:
        """Wait for an approval of this task without holding it; a worker gets it again with the `decision`."""
        return await self._end(SuspendTask(task_id=self.task_id, lease_id=self.lease_id, approval_id=approval_id))

    def let_go(self) -> None:
        """Renew the lease no longer: it runs out, unless the task ends before."""
        self.held.cancel()

    async def _end(self, command: Command) -> Answer:
        # Not while a heartbeat is on its way: it would find no lease any more, and take that for a loss.
        async with self._one_at_a_time:
            try:
                answer = await self._client.command(command)
            except LeaseLost as lost:
                self.lost = self.lost or lost
                self.let_go()
                raise
            self.let_go()
            return answer

    async def _keep(self, asked_at: float) -> None:
        # It may have been leased at any time since it was asked for: what was waited for may be half the lease.
        renewed_at, pause_seconds = time.monotonic(), asked_at + self._lease_seconds / 2 - time.monotonic()
        while self.lost is None:
            await asyncio.sleep(pause_seconds)
            async with self._one_at_a_time:
                sent_at = time.monotonic()
                try:
                    async with asyncio.timeout(renewed_at + self._lease_seconds - sent_at):
                        await self._client.heartbeat(
                            self.task_id,
                            self.lease_id,
                            lease_seconds=self._lease_seconds,
                            patience_seconds=math.inf,
                        )
                except TimeoutError:
                    self.lost = StoreUnavailable(why="The lease has run out, as far as can be known here")
                except MunimentError as error:
                    self.lost = error
            renewed_at, pause_seconds = sent_at, self._lease_seconds / 2
        log.warning("The lease of task %s is lost: %s", self.task_id, self.lost)
        self._interrupt()

    def _interrupt(self) -> None:
        if self._inside is not None:
            self._interrupted = True
            self._inside.cancel()

    async def __aenter__(self) -> "Assignment":
        self._inside = asyncio.current_task()
        assert self._inside is not None
        self._cancelled_before = self._inside.cancelling()
        if self.lost is not None:
            self._interrupt()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        inside, self._inside = self._inside, None
        assert inside is not None
        if self._interrupted:
            if error is None:
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)  # where nothing in the block was waited for, it comes here
            # By this lease alone, or by somebody else as well? asyncio.timeout tells them apart like this.
            return inside.uncancel() <= self._cancelled_before and kind is asyncio.CancelledError
        if self.lost is not None:
            return kind is LeaseLost
        if error is not None and not self.held.done():
            with suppress(MunimentError, TimeoutError):  # then the lease runs out
                async with asyncio.timeout(GIVE_BACK_SECONDS):
                    await self.fail(type(error).__name__)
        return False


class Work:
    """The tasks of some kinds, to be iterated over: each is claimed when there are hands for it.

    At most `concurrency` are in hand at once; the next comes when one of them is completed, failed, suspended, or
    lost. With more than one, whoever iterates sees to it that they go on side by side::

        async with asyncio.TaskGroup() as group:
            async for task in muniment.work(kinds=["mail.send"], worker="mailer-1", concurrency=8):
                group.create_task(send(task))

    `drain`, and SIGTERM in a process that heeds it in no other way, end it in order: nothing more is claimed, and the
    iteration ends once nothing is in hand any more. Who breaks it off lets go of what is in hand, and gives back what
    was claimed and not handed out. While the server cannot be reached, it is asked again and again.
    """

    def __init__(
        self,
        client: "Client",
        kinds: Sequence[str],
        worker: str,
        *,
        concurrency: int,
        lease_seconds: int,
        session_id: UUID | None,
    ) -> None:
        self._client = client
        self._worker = worker
        self._wanted: Json = {"kinds": tuple(kinds), "session_id": session_id}
        self._concurrency = concurrency
        self._lease_seconds = lease_seconds
        self._drained: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def drain(self) -> None:
        """Claim nothing more."""
        if not self._drained.done():
            self._drained.set_result(None)

    async def __aiter__(self) -> AsyncIterator[Assignment]:
        held: list[Assignment] = []
        to_hand_out: list[Assignment] = []
        with _sigterm.draining(self):
            try:
                while held or not self._drained.done():
                    if len(held) < self._concurrency and not self._drained.done():
                        to_hand_out = await self._claim(self._concurrency - len(held))
                        held += to_hand_out
                        while to_hand_out:
                            yield to_hand_out.pop(0)
                    else:
                        await asyncio.wait([task.held for task in held], return_when=asyncio.FIRST_COMPLETED)
                    held = [task for task in held if not task.held.done()]
            finally:
                for task in held:
                    task.let_go()
                await asyncio.gather(*(task.fail("NotBegun") for task in to_hand_out), return_exceptions=True)

    async def _claim(self, n: int) -> list[Assignment]:
        """Up to `n` tasks, after a while perhaps none."""
        asked_at, command_id = time.monotonic(), str(uuid7())
        claim = asyncio.create_task(
            self._client.claim_tasks(
                self._worker,
                n=n,
                lease_seconds=self._lease_seconds,
                wait_seconds=WAIT_SECONDS,
                patience_seconds=math.inf,
                command_id=command_id,
                **self._wanted,
            )
        )
        try:
            either: list[asyncio.Future[Any]] = [claim, self._drained]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            claimed = claim.result() if claim.done() else []
        finally:
            claim.cancel()
        if not claim.done():  # and the answer may have been on its way
            with suppress(MunimentError, TimeoutError):
                async with asyncio.timeout(GIVE_BACK_SECONDS):
                    claimed = (await self._client.receipt(command_id))["body"]["tasks"]
        elif not claimed:
            await asyncio.wait([self._drained], timeout=PAUSE_SECONDS)
        return [
            Assignment(self._client, task, lease_seconds=self._lease_seconds, asked_at=asked_at) for task in claimed
        ]


class _Sigterm:
    """SIGTERM in this process, as long as work goes on: all of it drains, unless something else heeds the signal."""

    def __init__(self) -> None:
        self._works: set[Work] = set()
        self._heeded_by: asyncio.AbstractEventLoop | None = None

    @contextmanager
    def draining(self, work: Work) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # which alone hears signals
            return
        if self._heeded_by is None and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            loop = asyncio.get_running_loop()
            with suppress(NotImplementedError):  # on this platform
                loop.add_signal_handler(signal.SIGTERM, self._drain)
                self._heeded_by = loop
        self._works.add(work)
        try:
            yield
        finally:
            self._works.discard(work)
            if not self._works and self._heeded_by is not None:
                self._heeded_by.remove_signal_handler(signal.SIGTERM)
                self._heeded_by = None

    def _drain(self) -> None:
        for work in self._works:
            work.drain()


_sigterm = _Sigterm()
