"""What processes tell each other of a ledger that grew: a hint by NOTIFY, and what came since by a look.

Nothing is wrong where a hint is lost: whoever listens looks now and then as well.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from typing import NamedTuple
from uuid import UUID

import psycopg

from ledger.postgres import Connection, Statement, bigint, is_pooled, queries, uuid, uuids

LISTEN_AGAIN_SECONDS = 1.0
"""How soon to listen again when the connection was lost."""

SQL = queries("ledger", "news")
_announce = Statement("announce", SQL.announce)
_news = Statement("news", SQL.news)


async def announce(connection: Connection, ledger_ids: Iterable[UUID]) -> None:
    """Tell whoever listens that these ledgers grew."""
    await _announce.run(connection, {"ledger_ids": ",".join(map(str, ledger_ids)).encode()})


async def announced(conninfo: str) -> AsyncGenerator[UUID | None]:
    """The ledgers that are announced from now on; None where some may have been missed, at first too.

    For ever, but behind a pooler: there it ends, and nothing is heard. A LISTEN would stay on a connection that others
    are given next, who would be told instead.
    """
    while True:
        with suppress(psycopg.Error):
            async with await psycopg.AsyncConnection.connect(conninfo, autocommit=True) as connection:
                if await is_pooled(connection):
                    return
                await connection.execute("LISTEN ledger")
                yield None
                async for notify in connection.notifies():
                    for ledger_id in notify.payload.split(","):
                        with suppress(ValueError):
                            yield UUID(ledger_id)
        await asyncio.sleep(LISTEN_AGAIN_SECONDS)


class News(NamedTuple):
    """What came after a position: the size it goes up to, which streams of those asked about grew, and whether there
    is work to offer."""

    size: int
    streams: list[UUID]
    work: bool


async def read_news(connection: Connection, ledger_id: UUID, after: int | None, stream_ids: Iterable[UUID]) -> News:
    """What came after position `after`, or lately; of very much, the last part."""
    values = {
        "ledger_id": uuid(ledger_id),
        "after": None if after is None else bigint(after),
        "stream_ids": uuids(stream_ids),
    }
    return News(*(await _news.fetch(connection, values))[0])
