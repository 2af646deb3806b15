"""The line of those who wait for work: first come, first served, and only as many called as there is work for.

One look at the queue serves all of this process who wait; it is taken when work came in here, and now and then, for
what came in elsewhere or whose time has come. A look locks nothing and promises nothing: who is called claims, and
may find that others were quicker. Nothing here is kept: whose process dies comes again.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from uuid import UUID

from ledger import store
from ledger.committer import Committer
from ledger.errors import ClockSkew, StoreUnavailable
from ledger.known import Offer
from ledger.postgres import store_errors

LOOK_SECONDS = 0.5
PAUSE_SECONDS = 0.005
"""Between two looks, so that work which comes in by one is handed out by several."""
OFFERS_MAX = 1000

Wanted = tuple[UUID, Offer]
"""A ledger, and what is looked for in it."""

Turn = asyncio.Future[None]
"""Done when its owner is called, and cancelled when nobody will be any more."""


class Line:
    """See the module."""

    def __init__(self, committer: Committer) -> None:
        self._committer = committer
        self._turns: defaultdict[Wanted, dict[Turn, int]] = defaultdict(dict)
        """The turns of those who wait, in order, and for how many tasks each; and of those who are claiming."""
        self._stirred: set[Wanted] = set()
        self._stirring: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._job: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def turn(
        self, ledger_id: UUID, offer: Offer, n: int, until: float, gone: asyncio.Future[None]
    ) -> AsyncGenerator[bool]:
        """Wait to be called to claim `n` tasks at most; whether it was, before `until` (the loop's time) and before it
        was `gone`. Until the context ends, what it was called for is not offered to the next."""
        loop = asyncio.get_running_loop()
        turn: Turn = loop.create_future()
        wanted = ledger_id, offer
        turns = self._turns[wanted]
        turns[turn] = n
        self._stir(wanted)
        if self._job is None or self._job.done():
            self._job = asyncio.create_task(self._run())
        try:
            await asyncio.wait([turn, gone], timeout=until - loop.time(), return_when=asyncio.FIRST_COMPLETED)
            yield turn.done() and not turn.cancelled() and not gone.done()
        finally:
            del turns[turn]
            if not turns:
                del self._turns[wanted]
            self._stir(wanted)  # what it did not take is for the next

    def end(self) -> None:
        """Nobody who waits now waits any longer, and nobody is called."""
        for turns in self._turns.values():
            for turn in turns:
                turn.cancel()

    async def closed(self) -> None:
        """Return when nothing looks any more."""
        self.end()
        if self._job is not None:
            await self._job

    def _stir(self, wanted: Wanted) -> None:
        self._stirred.add(wanted)
        if not self._stirring.done():
            self._stirring.set_result(None)

    async def _run(self) -> None:
        loop, watch = asyncio.get_running_loop(), self._committer.watch
        look_at_all = loop.time()
        while self._turns:
            if loop.time() >= look_at_all:
                self._stirred.update(self._turns)
                look_at_all = loop.time() + LOOK_SECONDS
            stirred, self._stirred, self._stirring = self._stirred, set(), loop.create_future()
            # Asked for before the look: what comes in after it is not missed.
            grown = {ledger_id: watch.changed(ledger_id) for ledger_id, _ in self._turns}
            with suppress(StoreUnavailable, ClockSkew):  # who waits is told of it, if it lasts, when it comes again
                await self._look(stirred)
            await asyncio.sleep(PAUSE_SECONDS)
            rest_seconds = max(0.0, look_at_all - loop.time())
            either = [self._stirring, *grown.values()]
            await asyncio.wait(either, timeout=rest_seconds, return_when=asyncio.FIRST_COMPLETED)
            ledgers = {ledger_id for ledger_id, future in grown.items() if future.done()}
            self._stirred.update(wanted for wanted in self._turns if wanted[0] in ledgers)

    async def _look(self, stirred: set[Wanted]) -> None:
        clock = self._committer.clock
        with store_errors():
            async with self._committer.pool.connection() as connection:
                if clock.stale:
                    await clock.measure(connection)
                now = clock.now()
                for wanted in stirred & self._turns.keys():
                    ledger_id, (kinds, session_id) = wanted
                    turns = self._turns.get(wanted, {})  # they may have left meanwhile
                    limit = min(sum(turns.values()), OFFERS_MAX)
                    offered = await store.read_offers(connection, ledger_id, kinds, session_id, now, limit)
                    _call(turns, len(offered))


def _call(turns: dict[Turn, int], tasks: int) -> None:
    """Call the first who wait, as long as there are tasks left for them beside those who are claiming already."""
    tasks -= sum(n for turn, n in turns.items() if turn.done())
    for turn, n in turns.items():
        if tasks <= 0:
            return
        if not turn.done():
            turn.set_result(None)
            tasks -= n
