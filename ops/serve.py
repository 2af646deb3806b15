"""One API process: granian around `api.app:create_app`, which reads the environment itself.

Invariant: no process outlives its purpose. granian answers requests in a process of its own, which ends
when granian's main process is gone, also if that was killed. Told to end by SIGTERM, it goes on for a while but is not
ready, so that what balances the load sends no more; then it listens no longer, answers what is in flight, and whoever
waits for a change at once. So it does at Ctrl-C.
"""

import asyncio
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from granian.constants import Interfaces
from granian.log import LogLevels
from granian.server import Server

from ledger.settings import Settings
from ledger.tracing import open_tracing
from ops.logs import GRANIAN, write_log

if TYPE_CHECKING:
    from api.app import Application

STOP_SECONDS = 10
"""How long requests in flight may take to end once it no longer listens."""


def serve(settings: Settings) -> None:
    """Answer HTTP on `settings.host`:`settings.port` until SIGTERM or SIGINT."""
    granian_log = GRANIAN if settings.mode == "production" else None
    stop_seconds = settings.drain_seconds + STOP_SECONDS
    serve_application("ops.serve:application", settings.host, settings.port, granian_log, stop_seconds)


def serve_application(
    factory: str, host: str, port: int, log: dict[str, Any] | None = None, stop_seconds: int = STOP_SECONDS
) -> None:
    """The same for any application; the bench's peer must be served as ours is."""
    # Not fork: by then this process has threads, whose locks a fork copies as they are.
    multiprocessing.set_start_method("spawn", force=True)
    Server(
        factory,
        factory=True,
        address=host,
        port=port,
        interface=Interfaces.ASGI,
        workers=1,
        workers_kill_timeout=stop_seconds,
        websockets=False,
        log_level=LogLevels.warning,
        log_dictconfig=log,
    ).serve()


def application() -> Any:
    """The application, in the process that granian made for it."""
    from api.app import create_app

    if parent := multiprocessing.parent_process():
        end_after(parent.join)
    settings = Settings.from_environment(os.environ)
    tracing = open_tracing("muniment-api") if settings.traces else None
    write_log(settings.mode, tracing)
    app = create_app(settings, tracing)
    # By then granian listens to the signals.
    app.on_startup.append(partial(drain_before_the_end, app, settings.drain_seconds))
    # What is made by now stays, and so does most of what requests leave in the caches: looking through all of
    # it for cycles, of which requests make none, costs a tenth of a command.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    return app


def drain_before_the_end(app: "Application", seconds: int) -> None:
    """Have `app` drain for so long at SIGTERM before it ends, and then let nobody wait any longer.

    Granian, which has a handler for each, takes SIGTERM and SIGINT for the end. Its SIGTERM is replaced. A Ctrl-C is
    kept from this process: its main process hears it, and takes it for a failure if this one ends before it was told.
    """
    os.setpgrp()
    loop, granian_ends = asyncio.get_running_loop(), signal.getsignal(signal.SIGINT)

    def end(*signalled: Any) -> None:
        app.end_waits()  # else granian would wait for them too
        granian_ends(*signalled)  # type: ignore[operator, misc]

    def drain() -> None:
        app.drain()
        loop.call_later(seconds, signal.raise_signal, signal.SIGINT)

    signal.signal(signal.SIGINT, end)
    loop.add_signal_handler(signal.SIGTERM, drain)


def end_after(other_ended: Callable[[], object]) -> None:
    """End this process in good order once `other_ended`, which waits for another one, returns."""

    def wait() -> None:
        other_ended()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="end-after", daemon=True).start()


def end_with_supervisor() -> None:
    """In a child of `muniment up`: end when that is gone, however it went; it holds our stdin open."""
    end_after(lambda: os.read(0, 1))
