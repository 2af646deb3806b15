"""Every error as `application/problem+json` (RFC 9457): one way in, whatever went wrong.

A problem is a pure function of its error, so a remembered refusal reads today as it read then. The
members beyond RFC 9457 are `code`, the error's params, and `errors` on a 400. A stack trace, SQL, a path
of this machine or a driver's words never stand in one; what is not the caller's doing goes to the log.
"""

import logging
from html import escape
from typing import Any

import msgspec
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException
from psycopg.errors import InvalidSchemaName, UndefinedColumn, UndefinedFunction, UndefinedTable

from ledger.errors import (
    ERRORS,
    InternalError,
    MalformedRequest,
    MethodNotAllowed,
    MunimentError,
    NotFound,
    StoreUnavailable,
    Unauthenticated,
)
from ledger.project_key import UnusableKey
from ledger.tree import Damaged
from ledger.vault import BrokenSeal

log = logging.getLogger(__name__)

MEDIA_TYPE = b"application/problem+json"
REMEMBERED = " This answer is remembered for this id; to try again, use a new one"
_WORDS_ONLY = frozenset({"summary", "why"})
"""Params that are sentences, and stand in `detail` already."""


class FieldError(msgspec.Struct):
    """One thing that is wrong. `pointer` is a JSON pointer into the body (RFC 6901; empty for the whole of
    it), or the name of a query parameter or a header."""

    pointer: str
    detail: str


class Problem(msgspec.Struct, kw_only=True):
    """What went wrong (RFC 9457): `detail` says what happened, with values, and what to do. Further members
    hold the values that `detail` speaks of, such as `current_state`, `command` and `allowed`."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    errors: list[FieldError] | msgspec.UnsetType = msgspec.UNSET


def problem(error: MunimentError, *, remembered: bool = False) -> dict[str, Any]:
    """`error` as the members of a problem; `remembered` where it is a recorded refusal."""
    # In one order, whether the error comes from a rule or from the ledger: a replay is the same bytes.
    members = {name: error.params[name] for name in sorted(error.params) if name not in _WORDS_ONLY}
    members |= {
        "type": f"/docs/problems#{error.code}",
        "title": error.title,
        "status": error.status,
        "code": error.code,
        "detail": error.detail + (REMEMBERED if remembered else ""),
    }
    if isinstance(error, MalformedRequest):
        members["errors"] = error.errors
    return members


def headers_of(error: MunimentError) -> list[tuple[bytes, bytes]]:
    """The headers that HTTP wants beside such an error."""
    if isinstance(error, Unauthenticated):
        return [(b"www-authenticate", b"Bearer")]  # RFC 6750 s3
    if isinstance(error, MethodNotAllowed):
        return [(b"allow", ", ".join(error.params["allowed"]).encode())]
    if error.retry_after_seconds is not None:
        return [(b"retry-after", b"%d" % error.retry_after_seconds)]
    return []


def as_error(raised: Exception, method: str, path: str) -> MunimentError:
    """What the caller is told of whatever was raised; what is not the caller's doing is logged here."""
    match raised:
        case MunimentError():
            return raised
        case NotFoundException():
            return NotFound(what="address", id=path[:200])
        case MethodNotAllowedException():
            allowed = sorted((raised.headers or {}).get("allow", "").split(", "))
            return MethodNotAllowed(method=method[:20], allowed=allowed)
        case HTTPException() if raised.status_code < 500:
            return MalformedRequest([{"pointer": "", "detail": raised.detail}])
        case UnusableKey():
            log.error("%s %s: %s", method, path, raised)
            return StoreUnavailable(why="The key of this project is not usable here; its operator must act")
        case UndefinedTable() | UndefinedColumn() | UndefinedFunction() | InvalidSchemaName():
            log.error("%s %s: the database is not of this release: %s", method, path, raised)
            return StoreUnavailable(why="The database is not set up for this release: run `muniment migrate`")
        case BrokenSeal():
            log.error("%s %s: %s", method, path, raised)
            return InternalError(why="A sealed value in this answer was altered, or moved from another place")
        case Damaged():
            log.error("%s %s: %s", method, path, raised)
            return InternalError(why="What is stored of this ledger is not all there, or was altered")
        case _:
            log.error("%s %s failed", method, path, exc_info=raised)
            return InternalError(why="This request met an error that nobody foresaw")


def page() -> bytes:
    """The page that the `type` of every problem points into."""
    errors = sorted(ERRORS.values(), key=lambda error: (error.status, error.code))
    rows = "".join(
        f'<dt id="{error.code}"><code>{error.status} {error.code}</code> {escape(error.title)}</dt>'
        f"<dd>{escape(error.template)}</dd>"
        for error in errors
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Problems</title>'
        '<link rel="stylesheet" href="/docs/page.css"><h1>Problems</h1>'
        "<p>Every error is <code>application/problem+json</code> with one of these codes. "
        f"Words in braces are filled in, and are members of the problem too.</p><dl>{rows}</dl></html>"
    ).encode()
