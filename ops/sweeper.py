"""The sweeper: gives the commands that are due because time ran out.

It finds what is due in a view and leaves every decision to the ledger: a command that comes too late, or twice,
changes nothing. Nothing waits for it to be right; a command applies due expiry by itself.
"""

import asyncio
import logging
from collections.abc import Sequence

import psycopg
from psycopg_pool import PoolTimeout

from ledger.batch import expiry_command_id
from ledger.commands import ExpireSession
from ledger.committer import Committer
from ledger.events import SYSTEM
from ledger.postgres import Pool
from projections import sessions

log = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0
SWEEP_SESSIONS_MAX = 500
MORE_SECONDS = 0.1
"""Between two sweeps where one was not enough: meanwhile the view learns what was done."""


async def sweep_for_ever(pool: Pool, committer: Committer) -> None:
    """Every second expire what is due. Without a database, wait for one. Ends when cancelled."""
    failing: dict[str, str] = {}
    while True:
        due: list[sessions.Due] = []
        try:
            async with pool.connection() as connection:
                due = await sessions.due(connection, SWEEP_SESSIONS_MAX)
            failures = await expire(committer, due)
        except (psycopg.Error, PoolTimeout) as error:
            failures = {"every project": f"what is due cannot be read: {error}"}
        for project_id, why in failures.items():
            if failing.get(project_id) != why:
                log.warning("Sessions of %s could not be expired, and will be tried again: %s", project_id, why)
        failing = failures
        await asyncio.sleep(MORE_SECONDS if len(due) == SWEEP_SESSIONS_MAX and not failures else SWEEP_SECONDS)


async def expire(committer: Committer, due: Sequence[sessions.Due]) -> dict[str, str]:
    """Have these sessions expired; answers, by project, why some could not be.

    All at once: what concerns one ledger is committed in few batches, and one ledger's trouble is not another's.
    """
    answers = await asyncio.gather(*(_expire(committer, one) for one in due), return_exceptions=True)
    failures: dict[str, str] = {}
    for one, answer in zip(due, answers, strict=True):
        if isinstance(answer, Exception):
            failures[one.project_id] = f"{type(answer).__name__}: {answer}"
    return failures


async def _expire(committer: Committer, due: sessions.Due) -> None:
    command = ExpireSession(session_id=due.session_id, deadline=due.deadline)
    command.command_id = expiry_command_id(command)
    await committer.submit(due.project_id, command, SYSTEM)
