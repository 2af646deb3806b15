"""A bare Litestar application whose one route does nothing: how fast HTTP is here when nothing happens.

Fixed: changing it makes the figures of before and after incomparable. `python -m ops.bench.bare PORT` serves
it exactly as ops/serve.py serves Muniment.
"""

import multiprocessing
import sys

from litestar import Litestar, get

from ops.serve import end_after, end_with_supervisor, serve_application


@get("/")
async def nothing() -> None:
    """Do nothing."""


def create_app() -> Litestar:
    if parent := multiprocessing.parent_process():
        end_after(parent.join)
    return Litestar([nothing], openapi_config=None, logging_config=None)


if __name__ == "__main__":
    end_with_supervisor()
    serve_application("ops.bench.bare:create_app", "127.0.0.1", int(sys.argv[1]))
