"""What operators watch: `/metrics`, in the form that Prometheus reads.

These are this process's own counts, and what the database knows for all processes: how far the views are behind, what
is being rebuilt, what waits for people, what is still to be erased. A worker has no HTTP server of its own unless it
is given a port, so what there is one of is told here, by every API process alike. Where the database does not answer,
that part is left out.

Open, as `/health` is, for nothing here is of a project or a person, and a scrape needs no identity; where more than
operators reach the API, METRICS_TOKEN closes it.
"""

import asyncio
import hmac
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

import psycopg

from api.health import DATABASE_SECONDS_MAX, probing
from api.http import Answer, Api, Call, Requests
from api.resources import destroyed
from ledger import store
from ledger.errors import MunimentError, Unauthenticated
from ledger.postgres import Connection
from ledger.replay import fold_all
from ledger.subjects import stream_of
from ledger.telemetry import Exposed, counter, gauge, histogram, of_pool, of_process
from ledger.values import moment
from projections import VIEWS, approvals, health
from projections.freshness import log_health
from projections.rebuild import next_of, progress

if TYPE_CHECKING:
    from prometheus_client import Metric

APPROVALS_MAX = 10_000
"""How many that wait are looked at; where there are more, the count stops here, and everybody knows enough."""

ERASURES_MAX = 500
"""How many of a project that may not be finished are looked at."""

AGES = ((60, "under 1 min"), (600, "1 to 10 min"), (3600, "10 to 60 min"), (86_400, "1 to 24 h"), (None, "over 24 h"))
"""Upper bounds in seconds, and what is under one and not under the bound before."""


@probing("/metrics", {200: {"text/plain": str}})
async def get_metrics(call: Call) -> Answer:
    """What Prometheus reads of this process; 401 without METRICS_TOKEN, where one is set."""
    from prometheus_client.exposition import choose_encoder

    call.read_headers()
    api = call.api
    if api.metrics_token is not None:
        sent = call.headers.get(b"authorization", b"")
        if not hmac.compare_digest(sent, b"Bearer " + api.metrics_token.encode()):
            raise Unauthenticated(why="The metrics are for those who know the METRICS_TOKEN of this deployment")
    shared = await _shared(api)
    sources = (of_process, partial(_of_process, api), api.committer.commits.families, partial(of_pool, api.pool))
    encode, media_type = choose_encoder(call.headers.get(b"accept", b"").decode("latin-1"))
    return Answer(200, encode(Exposed(*sources, lambda: shared)), media_type=media_type.encode())


def _of_process(api: Api) -> Iterator["Metric"]:
    """What this process knows besides its commits."""
    yield gauge("muniment_build_info", "Which release this is.", {(version("muniment"),): 1}, "version")
    yield gauge("muniment_queue_commands", "Commands taken in and not yet answered.", {(): api.committer.waiting})
    yield from _of_requests(api.requests)
    if api.copy is not None:
        yield counter("muniment_copy_replays", "Commands answered by the copy in Redis.", {(): api.copy.replays})


def _of_requests(requests: Requests) -> Iterator["Metric"]:
    operations = {(name,): seconds for (name,), seconds in requests.seconds.items()}
    yield counter("muniment_http_requests", "Requests that were answered.", requests.answers, "operation", "status")
    yield histogram("muniment_http_request_seconds", "From a request to its answer.", operations, "operation")


async def _shared(api: Api) -> list["Metric"]:
    """What is the same whichever process is asked."""
    families: list[Metric] = []
    up = 1
    try:
        async with asyncio.timeout(DATABASE_SECONDS_MAX), api.pool.connection() as connection:
            families += [
                *(*await _of_views(connection), *await _of_logs(connection), *await _of_approvals(connection)),
            ]
    except (TimeoutError, psycopg.Error):
        up = 0
    families.append(gauge("muniment_database_up", "Whether the database answers.", {(): up}))
    families += await _of_keys(api)
    if api.copy is not None:
        connected = float(await api.copy.connected())
        families.append(gauge("muniment_redis_up", "Whether Redis answers.", {(): connected}))
    return families


async def _of_keys(api: Api) -> list["Metric"]:
    """What is where the keys are, which may be another database."""
    families: list[Metric] = []
    up = 1
    try:
        async with asyncio.timeout(DATABASE_SECONDS_MAX):
            families += await _of_erasures(api)
    except (TimeoutError, MunimentError, psycopg.Error):
        up = 0
    return [*families, gauge("muniment_keys_up", "Whether it can be seen which keys are to be destroyed.", {(): up})]


async def _of_erasures(api: Api) -> list["Metric"]:
    """Erasures that are on record, while keys are there still that they are of. A key that is retired alone counts for
    nothing: its erasure was refused, or is about to be recorded."""
    since: list[datetime] = []
    for project_id, subjects in (await api.vault.undestroyed()).items():
        async with api.pool.connection() as connection:
            ledger = await store.find_ledger(connection, project_id)
            if ledger is None:
                continue
            streams = [stream_of(subject) for subject in subjects[:ERASURES_MAX]]
            erasures = list(fold_all(await store.read_streams(connection, ledger.ledger_id, streams)).values())
        done = await destroyed(api.vault, project_id, erasures)
        since += [moment(one.erased_at) for one, gone in zip(erasures, done, strict=True) if not gone]
    waited = max(((datetime.now(UTC) - at).total_seconds() for at in since), default=0.0)
    return [
        gauge("muniment_erasures_unfinished", "Erasures of which keys are there still.", {(): len(since)}),
        gauge(
            "muniment_erasures_unfinished_seconds",
            "How long ago the oldest of them was recorded.",
            {(): max(0.0, waited)},
        ),
    ]


async def _of_views(connection: Connection) -> list["Metric"]:
    views = await health(connection, VIEWS)
    builds = await progress(connection)
    runs = all(view.state != "stopped" for view in views.values())
    lags = {(name,): view.lag_events for name, view in views.items()}
    waits = {(name,): view.lag_seconds for name, view in views.items()}
    parked = {(name,): len(view.parked_projects) for name, view in views.items()}
    drifted = {(name,): view.drifted for name, view in views.items()}
    ages = {(name,): view.proof_age_seconds for name, view in views.items()}
    done = {(name,): builds[next_of(name)].taken for name in VIEWS if next_of(name) in builds}
    wanted = {(name,): builds[next_of(name)].total for name in VIEWS if next_of(name) in builds}
    return [
        gauge("muniment_projector_up", "Whether a worker builds the views.", {(): runs}),
        gauge("muniment_view_lag_events", "Events that are not in the view yet.", lags, "view"),
        gauge("muniment_view_lag_seconds", "How long the first of them has waited.", waits, "view"),
        gauge("muniment_view_parked_projects", "Projects whose part stands before a bad event.", parked, "view"),
        gauge("muniment_view_drifted_values", "Values that are not what a replay makes of them.", drifted, "view"),
        gauge("muniment_view_proof_age_seconds", "How long ago the oldest proof of a part began.", ages, "view"),
        gauge("muniment_rebuild_events_done", "Events in the build that is being made.", done, "view"),
        gauge("muniment_rebuild_events_wanted", "Events that there are for it.", wanted, "view"),
    ]


async def _of_logs(connection: Connection) -> list["Metric"]:
    logs = await log_health(connection)
    lag, waits = {(): logs.lag_events}, {(): logs.lag_seconds}
    return [
        gauge("muniment_publisher_up", "Whether a worker publishes checkpoints.", {(): logs.state != "stopped"}),
        gauge("muniment_log_lag_events", "Events that no published checkpoint covers yet.", lag),
        gauge("muniment_log_lag_seconds", "How long the first of them has waited.", waits),
        gauge("muniment_logs_refused", "Logs that do not go on, for what /health says.", {(): logs.refusals}),
    ]


async def _of_approvals(connection: Connection) -> list["Metric"]:
    waits = await approvals.waits(connection, APPROVALS_MAX)
    bounds = [bound for bound, _ in AGES if bound is not None]
    counted = Counter(bisect_right(bounds, seconds) for seconds in waits)
    pending = {(age,): counted[index] for index, (_, age) in enumerate(AGES)}
    oldest = max(waits, default=0.0)
    return [
        gauge("muniment_approvals_pending", "Approvals that wait for people, by how long they have.", pending, "age"),
        gauge("muniment_approvals_oldest_seconds", "How long the oldest of them has waited.", {(): oldest}),
    ]


ROUTES = [get_metrics]
