"""The sweeper: gives the commands that are due because time ran out.

It finds what is due in a view and leaves every decision to the ledger: a command that comes too late, or twice,
changes nothing. Nothing waits for it to be right; a command applies due expiry by itself.
"""

import asyncio
import logging

import psycopg
from psycopg_pool import PoolTimeout

from ledger.batch import expiry_command_id
from ledger.commands import ExpireSession
from ledger.committer import Committer
from ledger.errors import MunimentError
from ledger.events import SYSTEM
from ledger.postgres import Pool
from projections import sessions

log = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0
SWEEP_SESSIONS_MAX = 500


async def sweep_for_ever(pool: Pool, committer: Committer) -> None:
    """Every second expire what is due. Without a database, wait for one. Ends when cancelled."""
    while True:
        try:
            async with pool.connection() as connection:
                due = await sessions.due(connection, SWEEP_SESSIONS_MAX)
        except (psycopg.Error, PoolTimeout) as error:
            log.warning("What is due cannot be read: %s", error)
            due = []
        await expire(committer, due)
        await asyncio.sleep(SWEEP_SECONDS)


async def expire(committer: Committer, due: list[sessions.Due]) -> None:
    """Have these sessions expired, all at once: each ledger commits what concerns it in a batch or few."""
    answers = await asyncio.gather(*(_expire(committer, one) for one in due), return_exceptions=True)
    for one, answer in zip(due, answers, strict=True):
        if isinstance(answer, MunimentError):
            log.warning("The session %s of %s could not be expired: %s", one.session_id, one.project_id, answer)
        elif isinstance(answer, BaseException):
            raise answer


async def _expire(committer: Committer, due: sessions.Due) -> None:
    command = ExpireSession(session_id=due.session_id, deadline=due.deadline)
    command.command_id = expiry_command_id(command)
    await committer.submit(due.project_id, command, SYSTEM)
