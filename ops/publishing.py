"""Which log is brought to its end, and when: one job of the worker's, for all ledgers.

Woken by NOTIFY and, as the net, by looking now and then. A ledger that was published rests before it is again, so that
however much is written there is a checkpoint in so many seconds, and no more; where nothing is written there is none.
What one log is refused for, or waits for, is not another's.
"""

import asyncio
import logging
from contextlib import suppress
from uuid import UUID

from ledger import news, tree
from ledger.postgres import Connection, Pool
from ledger.project_key import UnusableKey
from ledger.publisher import SQL, Publisher, Refused
from ledger.signing import LogFiles
from projections.projector import TROUBLE, Troubles

log = logging.getLogger(__name__)

LEDGERS_AT_ONCE = 4
POLL_SECONDS = 0.5
RETRY_SECONDS = 1.0


class Publishing:
    """See the module. `listen_to`, a connection string without a pooler between, only makes it quicker; `first_key`:
    where there is no key to sign with, make one, as nobody does in production."""

    def __init__(
        self, pool: Pool, publisher: Publisher, seconds: float, *, listen_to: str | None, first_key: LogFiles | None
    ) -> None:
        self._pool = pool
        self._publisher = publisher
        self._seconds = seconds
        self._listen_to = listen_to
        self._first_key = first_key
        self._say = Troubles(log.warning).say
        # A ledger is here while it waits, is worked on, or rests; True: it grew since it was last published.
        self._busy: dict[UUID, bool] = {}
        self._waiting: asyncio.Queue[UUID] = asyncio.Queue()
        self._look = asyncio.Event()
        self._look_at_all = True

    async def run(self) -> None:
        """Until cancelled; it may be run again."""
        self._busy.clear()
        self._waiting = asyncio.Queue()
        self._anew()
        async with asyncio.TaskGroup() as jobs:
            jobs.create_task(self._poll())
            if self._listen_to:
                jobs.create_task(self._listen(self._listen_to))
            for _ in range(LEDGERS_AT_ONCE):
                jobs.create_task(self._work())

    def _anew(self) -> None:
        """Look whether every log is still what was signed: it may be another database that answers, an older one."""
        self._publisher.forget()
        self._look_at_all = True
        self._look.set()

    def _wake(self, ledger_id: UUID) -> None:
        if ledger_id in self._busy:
            self._busy[ledger_id] = True
        else:
            self._busy[ledger_id] = False
            self._waiting.put_nowait(ledger_id)

    async def _listen(self, conninfo: str) -> None:
        async for ledger_id in news.announced(conninfo):
            if ledger_id is None:
                self._anew()
            else:
                self._wake(ledger_id)

    async def _poll(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._look.clear()
            began = loop.time()
            try:
                async with self._pool.connection() as connection:
                    await self._find(connection)
                self._say("database", "")
                # Where there are very many ledgers, looking costs: then it is done less often.
                pause = max(POLL_SECONDS, 20 * (loop.time() - began))
            except TROUBLE as error:
                self._say("database", f"what is to be published cannot be read: {error}")
                pause = RETRY_SECONDS
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):  # wait_for may lose a cancellation
                    await self._look.wait()

    async def _find(self, connection: Connection) -> None:
        if self._first_key is not None and not await tree.keys_of(connection):
            await make_first_key(connection, self._first_key)
        values = {"keys": await self._publisher.usable(connection), "all": self._look_at_all}
        cursor = await connection.execute(SQL.behind, values, prepare=True)
        self._look_at_all = False
        for (ledger_id,) in await cursor.fetchall():
            self._wake(ledger_id)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            ledger_id = await self._waiting.get()
            self._busy[ledger_id] = False
            rest = self._seconds
            try:
                await self._publisher.publish(ledger_id)
                self._say(ledger_id, "")
            except Refused as error:
                self._say(ledger_id, f"the log of ledger {ledger_id} does not go on: {error}")
                rest = max(rest, RETRY_SECONDS)
            except TROUBLE as error:
                self._say(ledger_id, f"the log of ledger {ledger_id} cannot be written: {error}")
                self._busy[ledger_id] = True
                rest = max(rest, RETRY_SECONDS)
            self._tell()
            loop.call_later(rest, self._rested, ledger_id)

    def _rested(self, ledger_id: UUID) -> None:
        if self._busy.pop(ledger_id, False):
            self._wake(ledger_id)

    def _tell(self) -> None:
        """What is no reason to publish nothing, but must be known."""
        for name, why in self._publisher.silent.items():
            self._say(name, why and f"the witness {name} has not signed: {why}")
        why = self._publisher.unkept
        self._say("beside the keys", why and f"that a database is put back will be noticed by witnesses alone: {why}")


async def make_first_key(connection: Connection, keys: LogFiles) -> None:
    """The first key of a deployment, made by itself. Dying between its file and its row, the file is taken up again."""
    with suppress(UnusableKey):
        await tree.add_key(connection, 1, await asyncio.to_thread(keys.make, 1))
