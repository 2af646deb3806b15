"""Whether it works: for load balancers, for people, and for callers who ask with their token.

Unhealthy (503) means that commands cannot be accepted; what only reads or replays miss is degraded. The open
routes name no project.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, Literal

import psycopg
from litestar import Request, route
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from api.http import READ, Answer, Api, Call, Operation, encode
from ledger import store
from ledger.errors import ClockSkew, StoreUnavailable, Unauthenticated
from ledger.operations import OPERATORS
from ledger.postgres import Connection
from projections import VIEWS, health
from projections.freshness import log_health

VERSION = version("muniment")
DATABASE_SECONDS_MAX = 2.0
AWAY = (ClockSkew, TimeoutError, psycopg.Error)


class ViewHealth(Struct):
    """How far a view is behind. `state`: running, degraded (a part of it is parked), drifted (a part of it is not what
    a replay makes of it) or stopped (no worker)."""

    lag_events: int
    lag_seconds: float
    state: str


class LogsHealth(Struct):
    """How far the published checkpoints are behind. `state`: running, degraded (logs do not go on: `refused` says why)
    or stopped (no worker)."""

    lag_events: int
    lag_seconds: float
    state: str
    refused: list[str]


class Health(Struct, kw_only=True):
    """Whether commands are accepted (all but unhealthy), and what is amiss."""

    status: Literal["healthy", "degraded", "unhealthy"]
    version: str
    database: Literal["connected", "disconnected"]
    redis: Literal["connected", "disconnected", "disabled"]
    projections: dict[str, ViewHealth]
    logs: LogsHealth | None


class Status(Struct):
    status: Literal["ok"]
    version: str


class Probe(Struct):
    status: Literal["alive", "ready", "unready"]


def probing(path: str, answers: dict[int, Any], *, is_open: bool = True) -> Callable[[Any], HTTPRouteHandler]:
    """Make a GET route (and HEAD) that is about this process and not about a project."""

    def route_of(function: Callable[[Call], Awaitable[Answer]]) -> HTTPRouteHandler:
        async def handler(request: Request[Any, Any, Any]) -> Answer:
            return await Call(request.scope).answer(function)

        operation = Operation(
            tag="about",
            name=function.__name__,
            doc=function.__doc__ or "",
            answers=answers,
            refusals=() if is_open else (Unauthenticated, StoreUnavailable),
            open=is_open,
        )
        return route(path, http_method=READ, name=operation.name, opt={"operation": operation})(handler)

    return route_of


@probing("/health", {200: Health, 503: Health})
async def get_health(call: Call) -> Answer:
    """Whether everything works, and how far the views and the checkpoints are behind."""
    known = await _derived(call.api)
    views, logs = known or ({}, None)
    redis: Any = "disabled"
    if call.api.copy is not None:
        redis = "connected" if await call.api.copy.connected() else "disconnected"
    states = [logs.state if logs else "", *(view.state for view in views.values())]
    well = redis != "disconnected" and all(state == "running" for state in states)
    shown = Health(
        status="unhealthy" if known is None else "healthy" if well else "degraded",
        version=VERSION,
        database="disconnected" if known is None else "connected",
        redis=redis,
        projections=views,
        logs=logs,
    )
    return Answer(503 if known is None else 200, encode(shown))


@probing("/health/live", {200: Probe})
async def get_live(call: Call) -> Answer:
    """Whether the process answers at all; it asks nothing of the database."""
    return Answer(200, encode(Probe("alive")))


@probing("/health/ready", {200: Probe, 503: Probe})
async def get_ready(call: Call) -> Answer:
    """Whether to send requests here: whether commands are accepted, and will be in a moment."""
    ready = not call.api.draining and await _accepts(call.api)
    return Answer(200 if ready else 503, encode(Probe("ready" if ready else "unready")))


@probing("/status", {200: Status}, is_open=False)
async def get_status(call: Call) -> Answer:
    """Whether this token is accepted here."""
    call.read_headers()
    await call.authenticate()
    return Answer(200, encode(Status("ok", VERSION)))


@asynccontextmanager
async def _reached(api: Api) -> AsyncIterator[Connection]:
    """A connection to the database, whose clock this process's agrees with. Raises one of AWAY."""
    async with asyncio.timeout(DATABASE_SECONDS_MAX), api.pool.connection() as connection:
        clock = api.committer.clock
        if clock.stale:  # where no command comes, nobody else would notice that it was set right
            await clock.measure(connection)
        clock.now()
        yield connection


async def _accepts(api: Api) -> bool:
    """Whether commands can be accepted. It looks at no view and no log: whoever balances load asks this every second,
    and what is slow there is no reason to send commands elsewhere."""
    try:
        async with _reached(api) as connection:
            await store.find_ledger(connection, OPERATORS)  # any ledger does, or none: a schema without them does not
    except AWAY:
        return False
    return True


async def _derived(api: Api) -> tuple[dict[str, ViewHealth], LogsHealth] | None:
    """How the views do, and the logs; None where commands cannot be accepted."""
    try:
        async with _reached(api) as connection:
            known, logs = await health(connection, VIEWS), await log_health(connection)
    except AWAY:
        return None
    views = {name: ViewHealth(view.lag_events, view.lag_seconds, view.state) for name, view in known.items()}
    return views, LogsHealth(logs.lag_events, logs.lag_seconds, logs.state, logs.refused)


ROUTES = [get_health, get_live, get_ready, get_status]
