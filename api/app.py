"""The composition root of the API: start reading here.

`create_app` is what an ASGI server calls in each of its processes. Everything is made once, in `serving`,
and handed on; the process starts without PostgreSQL and without Redis, and each recovers by itself. What a
route does is in the module of its resource; nothing is decided here.
"""

import asyncio
import os
import re
from collections import defaultdict
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from litestar import Litestar, Request, Response, route
from litestar.datastructures import State
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler
from litestar.types import LifeSpanReceive, LifeSpanScope, LifeSpanSend, Receive, Scope, Send

from api import (
    approvals,
    audit,
    commands,
    docs,
    erasures,
    events,
    health,
    log,
    metrics,
    openapi,
    projections,
    records,
    sessions,
    tasks,
)
from api.auth import DEVELOPMENT_ISSUER, Tokens, development_verifier
from api.http import Answer, Api, refuse
from api.idempotency import Copy
from api.line import Line
from api.oidc import provider
from api.problems import as_error
from api.use_tokens import Signer
from ledger.committer import Committer
from ledger.embedded import EmbeddedServer
from ledger.postgres import open_keys_pool, open_pool
from ledger.settings import Settings
from ledger.tracing import Tracing
from ledger.vault import Vault

CONNECTIONS_MAX = 8
PARAMETER = re.compile(r"\{(\w+):str\}")
RESOURCES = (
    sessions,
    records,
    tasks,
    approvals,
    commands,
    events,
    audit,
    log,
    erasures,
    projections,
    health,
    metrics,
    docs,
)


@asynccontextmanager
async def serving(app: Litestar, settings: Settings, tracing: Tracing | None) -> AsyncGenerator[None]:
    """What every route works with, from the first request to the last."""
    conninfo = EmbeddedServer(settings.home).url("muniment_api") if settings.embedded else settings.database_url
    development = settings.mode == "development"
    async with (
        open_pool(conninfo, CONNECTIONS_MAX) as pool,
        open_keys_pool(settings.keys_database_url, pool) as keys,
        provider(settings) as verifiers,
    ):
        vault = Vault(settings.keys_dir, keys, create_keys=development)
        committer = Committer(
            pool,
            vault,
            create_ledgers=development,
            session_retention_days=settings.session_retention_days,
            tracing=tracing,
        )
        line = Line(committer)
        copy = None
        if settings.redis_url and settings.idempotency_enabled:
            copy = Copy(settings.redis_url, vault, ttl_seconds=settings.idempotency_ttl_seconds)
        if development:
            verifiers[DEVELOPMENT_ISSUER] = development_verifier(settings.keys_dir)
        app.state.api = Api(
            pool=pool,
            vault=vault,
            committer=committer,
            tokens=Tokens(verifiers),
            copy=copy,
            line=line,
            signer=Signer(settings.keys_dir, pool, create_key=development),
            creates_ledgers=development,
            metrics_token=settings.metrics_token,
            tracing=tracing,
        )
        direct = conninfo if settings.embedded else settings.database_direct_url
        listening = asyncio.create_task(committer.watch.listen(direct))
        try:
            yield
        finally:
            listening.cancel()
            # What was accepted is finished and answered before anything goes away.
            await line.closed()
            await committer.close()
            if copy is not None:
                await copy.close()
            if tracing is not None:
                tracing.close()


def problem_response(request: Request[Any, Any, Any], raised: Exception) -> Response[bytes]:
    """What Litestar itself refuses (an unknown path, a method), as a problem like any other."""
    answer = refuse(as_error(raised, request.scope["method"], request.scope["path"]))
    request.app.state.api.requests.answers["unknown", str(answer.status)] += 1
    headers = {name.decode(): value.decode() for name, value in answer.headers}
    return Response(answer.body, status_code=answer.status, headers=headers, media_type=answer.media_type.decode())


class Application(Litestar):
    """Litestar, but for what is sent to a route of commands whose address has at most one parameter, its second part.

    To find such a route and to make a Request for it costs as much as our own flow, which asks for neither. What
    that flow does not know (another method, a slash at the end) goes Litestar's way to the same route.
    """

    def __init__(self, routes: Sequence[HTTPRouteHandler], **settings: Any) -> None:
        super().__init__(routes, **settings)
        self._submissions = {
            (str(method), PARAMETER.sub("{}", path)): (handler, PARAMETER.findall(path))
            for handler in routes
            if "submission" in handler.opt
            for path in handler.paths
            for method in handler.http_methods
        }

    def __call__(
        self, scope: Scope | LifeSpanScope, receive: Receive | LifeSpanReceive, send: Send | LifeSpanSend
    ) -> Coroutine[Any, Any, None]:
        known: Any = scope
        found, parts = None, []
        if known["type"] == "http":
            if self.state._state["api"].draining:
                send = _closing(known, send)
            method, path = known["method"], known["path"]
            parts = path.split("/", 3)
            found = self._submissions.get((method, path))
            if found is None and len(parts) > 2 and parts[2]:
                found = self._submissions.get((method, "/".join([*parts[:2], "{}", *parts[3:]])))
        if found is None:
            return super().__call__(scope, receive, send)
        handler, parameters = found
        known["litestar_app"], known["route_handler"] = self, handler
        known["path_params"] = dict(zip(parameters, parts[2:], strict=False))
        answer: Coroutine[Any, Any, None] = handler.opt["submission"](known, receive, send)
        return answer

    def drain(self) -> None:
        """Be unready from now on, so that what balances the load sends to others; what is sent here is answered."""
        self.state.api.draining = True

    def end_waits(self) -> None:
        """Have those who wait for a change answered at once; it may be called from a signal handler."""
        self.state.api.ending = True
        self.state.api.line.end()


def _closing(scope: Scope, send: Any) -> Send:
    """`send`, saying that the connection ends with this answer; of HTTP/2 there is nothing to say (RFC 9113 s8.2.2)."""
    if not scope["http_version"].startswith("1"):
        return send  # type: ignore[no-any-return]

    async def close(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = message | {"headers": [*message["headers"], (b"connection", b"close")]}
        await send(message)

    return close


def options(routes: Sequence[HTTPRouteHandler]) -> list[HTTPRouteHandler]:
    """OPTIONS for every address: what is possible there. Litestar's own knows one route of several."""
    possible: dict[str, set[str]] = defaultdict(lambda: {"OPTIONS"})
    for handler in routes:
        for path in handler.paths:
            possible[path].update(map(str, handler.http_methods))

    def handler_of(path: str, methods: set[str]) -> HTTPRouteHandler:
        @route(path, http_method=HttpMethod.OPTIONS, name=f"options {path}")
        async def tell() -> Answer:
            return Answer(204, b"", [(b"allow", ", ".join(sorted(methods)).encode())])

        return tell

    return [handler_of(path, methods) for path, methods in possible.items()]


def create_app(settings: Settings | None = None, tracing: Tracing | None = None) -> Application:
    """The API as an ASGI application; settings come from the environment unless given. At its end it closes
    `tracing`."""
    known = settings or Settings.from_environment(os.environ)
    routes = [route for module in RESOURCES for route in module.ROUTES]
    return Application(
        [*options(routes), *routes],
        state=State({"openapi": msgspec.json.encode(openapi.document(routes))}),
        lifespan=[lambda app: serving(app, known, tracing)],
        exception_handlers={Exception: problem_response},
        openapi_config=None,
        logging_config=None,
    )
