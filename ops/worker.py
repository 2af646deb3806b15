"""The worker: one process that builds the views and expires what is due.

Any number may run on one database: each job has one runner at a time (`ops/lease.py`), and any worker may be it.
It starts without PostgreSQL and recovers by itself. Nothing is lost when it is killed; what a job does may not
stand here.
"""

import asyncio
import gc
import logging
import signal

from ledger.committer import Committer
from ledger.postgres import open_pool
from ledger.settings import Settings
from ledger.vault import Vault
from ops.lease import run_alone
from ops.sweeper import sweep_for_ever
from projections import VIEWS, Projector

CONNECTIONS_MAX = 10


async def run(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT; then finish the commands that were given, let the leases go, and return.

    Raises what no worker should go on after: a fault of ours.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # it says again and again what we say once
    # As in the API's process (serve.py): looking through all that stays would hold up the views for 40 ms at a time.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    await work(settings, stop)


async def work(settings: Settings, stop: asyncio.Event) -> None:
    """As `run`, until `stop` is set."""
    async with open_pool(settings.database_url, CONNECTIONS_MAX) as pool:
        committer = Committer(
            pool,
            Vault(settings.keys_dir, pool, create_keys=False),
            create_ledgers=False,
            session_retention_days=settings.session_retention_days,
        )
        projector = Projector(pool, VIEWS, listen_to=settings.database_direct_url)
        try:
            async with asyncio.TaskGroup() as group:
                jobs = [
                    group.create_task(run_alone(pool, "projector", projector.run)),
                    group.create_task(run_alone(pool, "sweeper", lambda: sweep_for_ever(pool, committer))),
                ]
                await stop.wait()
                # A batch of the projector's that is cut short here is undone, position and all.
                for job in jobs:
                    job.cancel()
        finally:
            await committer.close()
