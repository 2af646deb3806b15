"""Who waits for a change, and is woken: by what this process appends, and by what other processes announce.

A wake-up is a hint and nothing more: whoever is woken looks, and whoever was not looks now and then. So nothing here
is kept, and nothing is wrong where nobody listens.
"""

import asyncio
from contextlib import suppress
from uuid import UUID
from weakref import WeakValueDictionary

import psycopg
from psycopg_pool import PoolTimeout

from ledger import news
from ledger.postgres import Pool
from ledger.store import Append

ANNOUNCE_SECONDS = 0.005
"""Between two NOTIFYs: each passes a lock that the whole server shares."""

LOOK_SECONDS = 0.01
"""Between two looks at what others have announced."""


class Watch:
    """See the module. One a process."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._awaited: WeakValueDictionary[UUID, asyncio.Future[None]] = WeakValueDictionary()
        self._appended: set[UUID] = set()
        self._announcing: asyncio.Task[None] | None = None
        self._grown: set[UUID] = set()
        self._heard = asyncio.Event()
        self._seen: dict[UUID, int] = {}

    def changed(self, what: UUID) -> asyncio.Future[None]:
        """Done once the stream `what` grows, or the ledger `what` has new work to offer.

        To be asked for before one looks, or what comes in between is missed. All who wait share it: not to be
        awaited or cancelled, but waited for (`asyncio.wait`).
        """
        future = self._awaited.get(what)
        if future is None:
            future = self._awaited[what] = asyncio.get_running_loop().create_future()
        return future

    def appended(self, append: Append) -> None:
        """Wake whoever waits here for what this process appended, and tell the others soon."""
        if self._awaited:
            for event in append.events:
                self._wake(event.stream_id)
            if any(task is not None and task.state == "queued" for task in append.tasks.values()):
                self._wake(append.ledger_id)
        self._appended.add(append.ledger_id)
        if self._announcing is None or self._announcing.done():
            self._announcing = asyncio.create_task(self._announce())

    async def listen(self, conninfo: str) -> None:
        """Wake whoever waits here for what other processes announce, until cancelled; `conninfo` has no pooler
        between."""
        async with asyncio.TaskGroup() as jobs:
            jobs.create_task(self._look_for_ever())
            async for ledger_id in news.announced(conninfo):
                if ledger_id is not None:
                    self._grown.add(ledger_id)
                    self._heard.set()

    async def closed(self) -> None:
        """Return when what was appended has been announced."""
        if self._announcing is not None:
            await self._announcing

    def _wake(self, what: UUID) -> None:
        if future := self._awaited.pop(what, None):
            future.set_result(None)

    async def _announce(self) -> None:
        while self._appended:
            ledger_ids, self._appended = self._appended, set()
            with suppress(psycopg.Error, PoolTimeout):  # only a hint is lost
                async with self._pool.connection() as connection:
                    await news.announce(connection, ledger_ids)
            await asyncio.sleep(ANNOUNCE_SECONDS)

    async def _look_for_ever(self) -> None:
        while True:
            await self._heard.wait()
            self._heard.clear()
            ledger_ids, self._grown = self._grown, set()
            for ledger_id in ledger_ids if self._awaited else ():
                with suppress(psycopg.Error, PoolTimeout):  # they look for themselves
                    await self._look(ledger_id)
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self, ledger_id: UUID) -> None:
        async with self._pool.connection() as connection:
            found = await news.read_news(connection, ledger_id, self._seen.get(ledger_id), set(self._awaited))
        self._seen[ledger_id] = found.size
        for stream_id in found.streams:
            self._wake(stream_id)
        if found.work:
            self._wake(ledger_id)
