"""The worker: one process that builds the views, rebuilds them, expires what is due, publishes the logs, and finishes
erasures.

Any number may run on one database: each job has one runner at a time (`ops/lease.py`), and any worker may be it.
It starts without PostgreSQL and recovers by itself. Nothing is lost when it is killed; what a job does may not
stand here.
"""

import asyncio
import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import httpx

from ledger.committer import Committer
from ledger.postgres import Pool, open_keys_pool, open_pool
from ledger.publisher import NO_WITNESSES, Publisher
from ledger.settings import Settings
from ledger.signing import LogFiles
from ledger.telemetry import Exposed, of_pool, of_process
from ledger.tracing import Tracing, open_tracing
from ledger.vault import Vault
from ledger.witness import read_witnesses
from ops import OperatorError
from ops.eraser import erase_for_ever
from ops.lease import run_alone
from ops.logs import write_log
from ops.publishing import Publishing
from ops.sweeper import sweep_for_ever
from projections import VIEWS, Projector
from projections.proof import Proven, verify_for_ever
from projections.rebuild import rebuild_for_ever
from projections.requests import Follower

CONNECTIONS_MAX = 10


class WorkerError(OperatorError):
    """The worker cannot run as it is asked to; the message says why."""


async def run(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT; then finish the commands that were given, let the leases go, and return.

    Raises what no worker should go on after: a fault of ours.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    tracing = open_tracing("muniment-worker") if settings.traces else None
    write_log(settings.mode, tracing)
    # As in the API's process (serve.py): looking through all that stays would hold up the views for 40 ms at a time.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    await work(settings, stop, tracing)


async def work(settings: Settings, stop: asyncio.Event, tracing: Tracing | None = None) -> None:
    """As `run`, until `stop` is set; then `tracing` is closed too."""
    witnesses = read_witnesses(settings.witnesses) if settings.witnesses else NO_WITNESSES
    async with (
        open_pool(settings.database_url, CONNECTIONS_MAX) as pool,
        open_keys_pool(settings.keys_database_url, pool) as keys,
        httpx.AsyncClient() as http,
    ):
        vault = Vault(settings.keys_dir, keys, create_keys=False)
        committer = Committer(
            pool,
            vault,
            create_ledgers=False,
            session_retention_days=settings.session_retention_days,
            tracing=tracing,
        )
        projector = Projector(pool, VIEWS, listen_to=settings.database_direct_url, tracing=tracing)
        follower = Follower(pool, committer)
        proven = Proven()
        publisher = Publisher(pool, LogFiles(settings.log_keys_dir), witnesses, http)
        publishing = _publishing(settings, pool, publisher)
        made = (
            *(committer.commits.families, projector.projected.families, proven.families),
            publisher.published.families,
        )
        sources = (of_process, *made, partial(of_pool, pool))
        try:
            with exposed(settings, Exposed(*sources)):
                async with asyncio.TaskGroup() as group:
                    jobs = [
                        group.create_task(run_alone(pool, "projector", projector.run)),
                        group.create_task(run_alone(pool, "sweeper", lambda: sweep_for_ever(pool, committer))),
                        group.create_task(run_alone(pool, "rebuilder", lambda: rebuild_for_ever(pool, follower.renew))),
                        group.create_task(run_alone(pool, "verifier", lambda: verify_for_ever(pool, proven))),
                        group.create_task(run_alone(pool, "follower", follower.follow)),
                        group.create_task(run_alone(pool, "publisher", publishing.run)),
                        group.create_task(run_alone(pool, "eraser", lambda: erase_for_ever(pool, vault))),
                    ]
                    await stop.wait()
                    # A batch of the projector's that is cut short here is undone, position and all.
                    for job in jobs:
                        job.cancel()
        finally:
            await committer.close()
            if tracing is not None:
                tracing.close()


def _publishing(settings: Settings, pool: Pool, publisher: Publisher) -> Publishing:
    """In production an operator says which key signs: `muniment keys add`."""
    return Publishing(
        pool,
        publisher,
        settings.checkpoint_seconds,
        listen_to=settings.database_direct_url,
        first_key=LogFiles(settings.log_keys_dir) if settings.mode == "development" else None,
    )


@contextmanager
def exposed(settings: Settings, metrics: Exposed) -> Iterator[None]:
    """Let Prometheus have these, in a thread of their own, where a port is set for that. Raises WorkerError."""
    if settings.worker_metrics_port is None:
        yield
        return
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(metrics)
    host, port = settings.worker_metrics_host, settings.worker_metrics_port
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise WorkerError(f"OTEL_EXPORTER_PROMETHEUS_PORT {host}:{port} cannot be listened on: {error}") from None
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
