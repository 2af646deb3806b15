"""The log: in production a JSON object a line, for machines that collect it; else words for who sits before it.

A line has `time`, `level`, `logger` and `message`; `trace_id` and `span_id` where it was written on behalf of a request
and traces are on; `exception` where there was one. No personal value may be logged, sealed or not.
"""

import json
import logging
from datetime import UTC, datetime

from ledger.settings import Mode
from ledger.tracing import Tracing

WORDS = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonLines(logging.Formatter):
    """See the module."""

    def __init__(self, tracing: Tracing | None = None) -> None:
        super().__init__()
        self._tracing = tracing

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self._tracing is not None and (ids := self._tracing.ids()):
            line["trace_id"], line["span_id"] = ids
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


GRANIAN = {"formatters": {name: {"()": "ops.logs.JsonLines"} for name in ("generic", "access")}}
"""The same for the HTTP server's own few lines."""


def write_log(mode: Mode, tracing: Tracing | None) -> None:
    """Have what this process logs written to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(tracing) if mode == "production" else logging.Formatter(WORDS))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # it says again and again what we say once
