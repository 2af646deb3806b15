"""One API process: granian around `api.app:create_app`, which reads the environment itself.

Invariant: no process outlives its purpose. granian answers requests in a process of its own, which ends
when granian's main process is gone, also if that was killed; told to end, it first answers what is in flight,
and whoever waits for a change at once.
"""

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from granian.constants import Interfaces
from granian.log import LogLevels
from granian.server import Server

from ledger.settings import Settings
from ledger.tracing import open_tracing
from ops.logs import GRANIAN, write_log

STOP_SECONDS = 10
"""How long requests in flight may take to end after SIGTERM."""


def serve(settings: Settings) -> None:
    """Answer HTTP on `settings.host`:`settings.port` until SIGTERM or SIGINT."""
    granian_log = GRANIAN if settings.mode == "production" else None
    serve_application("ops.serve:application", settings.host, settings.port, granian_log)


def serve_application(factory: str, host: str, port: int, log: dict[str, Any] | None = None) -> None:
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
        workers_kill_timeout=STOP_SECONDS,
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
    # Granian hears the signals by then, and on one of them waits for what is in flight.
    app.on_startup.append(partial(before_the_signals, app.end_waits))
    # What is made by now stays, and so does most of what requests leave in the caches: looking through all of
    # it for cycles, of which requests make none, costs a tenth of a command.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    return app


def before_the_signals(act: Callable[[], object]) -> None:
    """Have `act` called when SIGTERM or SIGINT comes, and then what heard them so far."""
    for number in (signal.SIGTERM, signal.SIGINT):
        heard = signal.getsignal(number)

        def hear(*signalled: Any, heard: Any = heard) -> None:
            act()
            heard(*signalled)

        signal.signal(number, hear)


def end_after(other_ended: Callable[[], object]) -> None:
    """End this process in good order once `other_ended`, which waits for another one, returns."""

    def wait() -> None:
        other_ended()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="end-after", daemon=True).start()


def end_with_supervisor() -> None:
    """In a child of `muniment up`: end when that is gone, however it went; it holds our stdin open."""
    end_after(lambda: os.read(0, 1))
