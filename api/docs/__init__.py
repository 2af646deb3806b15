"""The documentation, served from here alone: the OpenAPI document, a viewer for it, and what each problem means.

The viewer is vendored (VENDOR.txt) and everything a page loads comes from this server, which its
Content-Security-Policy makes the browser enforce.
"""

from importlib.resources import files
from typing import Any

from litestar import Request, route
from litestar.exceptions import NotFoundException
from litestar.params import FromPath

from api import problems
from api.http import JSON, READ, Answer, Operation

HTML = b"text/html; charset=utf-8"
_SCRIPT, _STYLE = b"text/javascript; charset=utf-8", b"text/css; charset=utf-8"
_FILES = {
    "swagger-ui-bundle.js": _SCRIPT,
    "start.js": _SCRIPT,
    "swagger-ui.css": _STYLE,
    "page.css": _STYLE,
}
# The viewer sets style attributes and has its pictures in data: URLs; scripts are files of ours only.
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
]


def _page(body: bytes, media_type: bytes = HTML) -> Answer:
    return Answer(200, body, list(_HEADERS), media_type)


@route("/docs", http_method=READ)
async def docs() -> Answer:
    return _page(files("api.docs").joinpath("index.html").read_bytes())


@route("/docs/problems", http_method=READ)
async def docs_of_problems() -> Answer:
    return _page(problems.page())


@route("/docs/{name:str}", http_method=READ)
async def docs_file(name: FromPath[str]) -> Answer:
    if name not in _FILES:
        raise NotFoundException
    return _page(files("api.docs").joinpath(name).read_bytes(), _FILES[name])


@route(
    "/openapi.json",
    http_method=READ,
    opt={
        "operation": Operation(
            tag="about", name="openapi", doc="This document.", answers={200: dict[str, Any]}, open=True
        )
    },
)
async def openapi_json(request: Request[Any, Any, Any]) -> Answer:
    return Answer(200, request.app.state.openapi, [(b"cache-control", b"no-cache")], JSON)


ROUTES = [openapi_json, docs, docs_of_problems, docs_file]
