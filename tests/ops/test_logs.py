"""The log in production: one JSON object a line, which leads to its trace."""

import json
import logging

from opentelemetry.sdk.trace import TracerProvider

from ledger.tracing import Tracing
from ops.logs import JsonLines


def record(message: str, *args: object, error: BaseException | None = None) -> logging.LogRecord:
    exc_info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("api.problems", logging.ERROR, "file", 1, message, args, exc_info)


def test_a_line_is_one_object_whatever_is_said() -> None:
    line = JsonLines().format(record("%s\n%s", "one", 'two "three" \udc80'))
    assert "\n" not in line
    told = json.loads(line)
    assert told["time"].endswith("+00:00")
    assert told | {"time": None} == {
        "time": None,
        "level": "ERROR",
        "logger": "api.problems",
        "message": 'one\ntwo "three" \udc80',
    }


def test_an_exception_is_told_with_where_it_came_from() -> None:
    try:
        raise ValueError("no")
    except ValueError as error:
        told = json.loads(JsonLines().format(record("it failed", error=error)))
    assert told["exception"].startswith("Traceback")
    assert told["exception"].endswith("ValueError: no")


def test_what_is_said_on_behalf_of_a_request_has_its_trace() -> None:
    tracing = Tracing(TracerProvider(shutdown_on_exit=False))
    lines = JsonLines(tracing)
    scope = {"headers": [], "method": "GET", "path": "/"}
    with tracing.request("get_health", scope):
        assert tracing.current() is not None
        ids = tracing.ids()
        told = json.loads(lines.format(record("hello")))
    assert (told["trace_id"], told["span_id"]) == ids
    assert "trace_id" not in json.loads(lines.format(record("hello")))
