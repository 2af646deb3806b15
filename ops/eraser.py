"""The eraser: destroys the keys whose erasure is on record, where whoever recorded it did not live to.

It decides nothing: what is destroyed is what events say, so it may be done twice, or by several. A key that was retired
without such an event stays: what it sealed is readable. Once an hour all erasures there ever were are gone through,
so that keys which a backup brought back go again.
"""

import asyncio
import logging
from collections.abc import Iterable
from uuid import UUID

from ledger import store
from ledger.errors import MunimentError
from ledger.postgres import Connection, Pool, fetch, queries
from ledger.replay import fold_all
from ledger.subjects import STREAMS, stream_of
from ledger.vault import Vault
from projections.projector import TROUBLE, Troubles

log = logging.getLogger(__name__)

SQL = queries("ops", "eraser")

LOOK_SECONDS = 1.0
ALL_SECONDS = 3600.0
ERASURES_MAX = 500
"""How many are read at once."""


async def erase_for_ever(pool: Pool, vault: Vault) -> None:
    """See to it again and again. Without a database, wait for one. Ends when cancelled."""
    loop = asyncio.get_running_loop()
    all_at = loop.time()
    troubles = Troubles(log.warning)
    while True:
        try:
            await finish(pool, vault)
            if loop.time() >= all_at:
                await erase_all(pool, vault)
                all_at = loop.time() + ALL_SECONDS
            troubles.say("erasures", "")
        except (*TROUBLE, MunimentError) as error:
            troubles.say("erasures", f"what is to be erased will be looked for again: {error}")
        await asyncio.sleep(LOOK_SECONDS)


async def finish(pool: Pool, vault: Vault) -> int:
    """Destroy the keys that were retired and that an event says are to be destroyed; how many there were."""
    destroyed = 0
    for project_id, subjects in (await vault.undestroyed()).items():
        async with pool.connection() as connection:
            ledger = await store.find_ledger(connection, project_id)
            if ledger is not None:
                for begin in range(0, len(subjects), ERASURES_MAX):
                    some = subjects[begin : begin + ERASURES_MAX]
                    destroyed += await _erase(connection, vault, project_id, ledger.ledger_id, map(stream_of, some))
    if destroyed:
        log.info("%d keys were destroyed whose erasure is on record", destroyed)
    return destroyed


async def erase_all(pool: Pool, vault: Vault) -> int:
    """Destroy every key that any event says is to be destroyed; how many there were still."""
    destroyed = 0
    async with pool.connection() as connection:
        for ledger_id, project_id, is_foreign, *_ in await fetch(connection, store.SQL.list_ledgers):
            after, end = STREAMS
            while not is_foreign:
                rows = await fetch(
                    connection, SQL.erased, ledger_id=ledger_id, after=after, end=end, limit=ERASURES_MAX
                )
                if not rows:
                    break
                streams = [stream_id for (stream_id,) in rows]
                destroyed += await _erase(connection, vault, project_id, ledger_id, streams)
                after = streams[-1]
    if destroyed:
        log.warning("%d keys were there whose erasure is on record, as after a restore: they are destroyed", destroyed)
    return destroyed


async def _erase(
    connection: Connection, vault: Vault, project_id: str, ledger_id: UUID, streams: Iterable[UUID]
) -> int:
    """Destroy the keys of the subjects of these streams, as far as their last erasures say."""
    erasures = fold_all(await store.read_streams(connection, ledger_id, streams)).values()
    return await vault.destroy(project_id, {erasure.subject: erasure.through for erasure in erasures})
