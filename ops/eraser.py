"""The eraser: destroys the keys whose erasure is on record, where whoever recorded it did not live to.

It decides nothing: what is destroyed is what events say, so it may be done twice, or by several. A key that was retired
without such an event stays: what it sealed is readable. Once an hour all erasures there ever were are gone through,
so that keys which a backup brought back go again.
"""

import asyncio
import logging
from collections.abc import Collection
from uuid import UUID

from ledger import store
from ledger.errors import MunimentError
from ledger.postgres import Connection, Pool
from ledger.replay import fold_all
from ledger.subjects import stream_of
from ledger.vault import Vault
from projections import audit
from projections.projector import TROUBLE, Troubles

log = logging.getLogger(__name__)

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
            if loop.time() < all_at:
                await finish(pool, vault)
            else:
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
                    destroyed += await _erase(connection, vault, project_id, ledger.ledger_id, some)
    if destroyed:
        log.info("%d keys were destroyed whose erasure is on record", destroyed)
    return destroyed


async def erase_all(pool: Pool, vault: Vault) -> int:
    """Destroy every key that any event says is to be destroyed; how many there were still."""
    destroyed = 0
    async with pool.connection() as connection:
        for ledger_id, project_id, is_foreign, *_ in await (
            await connection.execute(store.SQL.list_ledgers)
        ).fetchall():
            after = 0
            while not is_foreign:
                wanted = audit.Filter(type="SubjectErased")
                found = await audit.search(connection, ledger_id, wanted, limit=ERASURES_MAX, after=after)
                if not found:
                    break
                events = await store.read_positions(connection, ledger_id, found)
                subjects = {event.decode().event.data.subject for event in events}  # type: ignore[attr-defined]
                destroyed += await _erase(connection, vault, project_id, ledger_id, subjects)
                after = found[-1]
    if destroyed:
        log.warning("%d keys were there whose erasure is on record, as after a restore: they are destroyed", destroyed)
    return destroyed


async def _erase(
    connection: Connection, vault: Vault, project_id: str, ledger_id: UUID, subjects: Collection[str]
) -> int:
    """Destroy the keys of these subjects, as far as their last erasures say."""
    erasures = fold_all(await store.read_streams(connection, ledger_id, map(stream_of, subjects))).values()
    return await vault.destroy(project_id, {erasure.subject: erasure.through for erasure in erasures})
