"""The sweeper: gives the commands that are due because time ran out.

It finds what is due in views and in the queue, and leaves every decision to the ledger: a command that comes too
early, too late or twice changes nothing. Nothing waits for it to be right; a command applies due expiry by itself.
Only a lease that nobody renewed is given up by nothing else.
"""

import asyncio
import logging
from collections.abc import Sequence

import psycopg
from psycopg_pool import PoolTimeout

from ledger import store
from ledger.committer import Committer
from ledger.postgres import Connection, Pool
from ledger.system import Due, ExpireTask, LoseAttempt, Overdue, QueueTask
from ledger.values import SYSTEM, stamp
from projections import approvals, sessions

log = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0
SWEEP_MAX = 500
"""Of each kind in one sweep."""

MORE_SECONDS = 0.1
"""Between two sweeps where one was not enough: meanwhile the views learn what was done."""


async def sweep_for_ever(pool: Pool, committer: Committer) -> None:
    """Every second see to what is due. Without a database, wait for one. Ends when cancelled."""
    failing: dict[str, str] = {}
    while True:
        due: list[Overdue] = []
        try:
            async with pool.connection() as connection:
                due = await overdue(connection)
            failures = await sweep(committer, due)
        except (psycopg.Error, PoolTimeout) as error:
            failures = {"every project": f"what is due cannot be read: {error}"}
        for project_id, why in failures.items():
            if failing.get(project_id) != why:
                log.warning("What is due in %s could not be done, and will be tried again: %s", project_id, why)
        failing = failures
        await asyncio.sleep(MORE_SECONDS if len(due) >= SWEEP_MAX and not failures else SWEEP_SECONDS)


async def overdue(connection: Connection) -> list[Overdue]:
    """What is due in any project: sessions and approvals by their views, tasks by the queue."""
    tasks = [Overdue(one.project_id, _of_task(one)) for one in await store.due_tasks(connection, SWEEP_MAX)]
    return [*await sessions.due(connection, SWEEP_MAX), *tasks, *await approvals.due(connection, SWEEP_MAX)]


def _of_task(due: store.DueTask) -> Due:
    deadline = stamp(due.deadline)
    if due.lease_id is not None:
        return LoseAttempt(task_id=due.task_id, deadline=deadline, lease_id=due.lease_id)
    kind = QueueTask if due.verb == "queue" else ExpireTask
    return kind(task_id=due.task_id, deadline=deadline)


async def sweep(committer: Committer, due: Sequence[Overdue]) -> dict[str, str]:
    """Have all of it done; answers, by project, why some could not be.

    All at once: what concerns one ledger is committed in few batches, and one ledger's trouble is not another's.
    """
    answers = await asyncio.gather(*(_submit(committer, one) for one in due), return_exceptions=True)
    failures: dict[str, str] = {}
    for one, answer in zip(due, answers, strict=True):
        if isinstance(answer, Exception):
            failures[one.project_id] = f"{type(answer).__name__}: {answer}"
    return failures


async def _submit(committer: Committer, due: Overdue) -> None:
    due.command.command_id = due.command.due_id
    await committer.submit(due.project_id, due.command, SYSTEM)
