"""Whether it works: for load balancers, for people, and for callers who ask with their token.

Unhealthy (503) means that commands cannot be accepted; what only reads or replays miss is degraded. The open
routes name no project.
"""

import asyncio
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any, Literal

import psycopg
from litestar import Request, route
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct
from psycopg_pool import PoolTimeout

from api.http import READ, Answer, Api, Call, Operation, encode
from ledger.errors import ClockSkew, StoreUnavailable, Unauthenticated
from projections import VIEWS, health

VERSION = version("muniment")
DATABASE_SECONDS_MAX = 2.0


class ViewHealth(Struct):
    """How far a view is behind. `state`: running, degraded (a part of it is parked), drifted (a part of it is not what
    a replay makes of it) or stopped (no worker)."""

    lag_events: int
    lag_seconds: float
    state: str


class Health(Struct, kw_only=True):
    """Whether commands are accepted (all but unhealthy), and what is amiss."""

    status: Literal["healthy", "degraded", "unhealthy"]
    version: str
    database: Literal["connected", "disconnected"]
    redis: Literal["connected", "disconnected", "disabled"]
    projections: dict[str, ViewHealth]


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
    """Whether everything works, and how far the views are behind."""
    views = await _views(call.api)
    redis: Any = "disabled"
    if call.api.copy is not None:
        redis = "connected" if await call.api.copy.connected() else "disconnected"
    well = redis != "disconnected" and all(view.state == "running" for view in (views or {}).values())
    shown = Health(
        status="unhealthy" if views is None else "healthy" if well else "degraded",
        version=VERSION,
        database="disconnected" if views is None else "connected",
        redis=redis,
        projections=views or {},
    )
    return Answer(503 if views is None else 200, encode(shown))


@probing("/health/live", {200: Probe})
async def get_live(call: Call) -> Answer:
    """Whether the process answers at all; it asks nothing of the database."""
    return Answer(200, encode(Probe("alive")))


@probing("/health/ready", {200: Probe, 503: Probe})
async def get_ready(call: Call) -> Answer:
    """Whether to send requests here: whether commands are accepted, and will be in a moment."""
    ready = not call.api.draining and await _views(call.api) is not None
    return Answer(200 if ready else 503, encode(Probe("ready" if ready else "unready")))


@probing("/status", {200: Status}, is_open=False)
async def get_status(call: Call) -> Answer:
    """Whether this token is accepted here."""
    call.read_headers()
    await call.authenticate()
    return Answer(200, encode(Status("ok", VERSION)))


async def _views(api: Api) -> dict[str, ViewHealth] | None:
    """How the views do; None where commands cannot be accepted."""
    try:
        async with asyncio.timeout(DATABASE_SECONDS_MAX), api.pool.connection() as connection:
            clock = api.committer.clock
            if clock.stale:  # where no command comes, nobody else would notice that it was set right
                await clock.measure(connection)
            clock.now()
            known = await health(connection, VIEWS)
    except (ClockSkew, TimeoutError, PoolTimeout, psycopg.Error):
        return None
    return {name: ViewHealth(view.lag_events, view.lag_seconds, view.state) for name, view in known.items()}


ROUTES = [get_health, get_live, get_ready, get_status]
