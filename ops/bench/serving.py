"""The servers that HTTP is measured on: an API process and a worker as `muniment up` runs them, and the bare app."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from api.auth import development_token
from ops.bench.stage import BenchError, Figures, Stage, environment, run
from ops.up import SUPERVISED
from projections import VIEWS

CONNECTIONS = 64
STARTED_SECONDS_MAX = 60
PROJECT = "bench"
SETTLED_SECONDS_MAX = 120

_BEHIND = """
SELECT v.view, l.size - coalesce(p.position, 0)
FROM ledger.ledgers l CROSS JOIN unnest(%s::text[]) AS v (view)
LEFT JOIN projections.positions p ON p.ledger_id = l.ledger_id AND p.view = v.view
WHERE l.project_id = %s AND coalesce(p.position, 0) < l.size
"""


class Server:
    """Something that answers HTTP on `port`."""

    def __init__(self, stage: Stage, port: int, token: str, pid: int) -> None:
        self._stage, self.port, self.token, self._pid = stage, port, token, pid

    def load(self, what: str, connections: int = CONNECTIONS, seconds: float | None = None) -> tuple[Figures, int]:
        """What was answered each second, and how many items were sent in all, warm-up included."""
        return self._load(connections, seconds, what=what)

    def send_all(self, file: Path) -> None:
        """Send each request in `file` once."""
        self._load(what="once", file=str(file))

    def send_again(self, file: Path) -> Figures:
        """Send the requests in `file` again and again."""
        return self._load(what="again", file=str(file))[0]

    def meet(self, program: str, **told: Any) -> tuple[Figures, int]:
        """What a program measured of this server, and what it sent in all; the CPU time is the server's."""
        worked = cpu_seconds(self._pid)
        (figures,) = run((program, {"port": self.port} | told))
        worked = cpu_seconds(self._pid) - worked
        sent: int = figures.pop("sent")
        return Figures(**figures | {"cpu_seconds": worked * figures["count"] / sent}), sent

    def _load(self, connections: int = CONNECTIONS, seconds: float | None = None, **told: str) -> tuple[Figures, int]:
        seconds = seconds or self._stage.seconds
        return self.meet("load", token=self.token, connections=connections, seconds=seconds, **told)


@contextmanager
def bare(stage: Stage) -> Iterator[Server]:
    """A Litestar application that does nothing."""
    port = free_port()
    with process([sys.executable, "-P", "-m", "ops.bench.bare", str(port)], {}) as running:
        wait_for(port, running)
        yield Server(stage, port, "none", running.pid)


@contextmanager
def api(stage: Stage, database: str, **settings: str) -> Iterator[Server]:
    """One API process of Muniment."""
    port = free_port()
    token = development_token(stage.keys, project=PROJECT, subject="bench", kind="agent", roles=("agent",))
    told = ours(stage) | {"DATABASE_URL": stage.api(database), "PORT": str(port)} | settings
    with process([sys.executable, "-P", "-m", "ops.cli", "api", SUPERVISED], told) as running:
        wait_for(port, running)
        yield Server(stage, port, token, running.pid)


@contextmanager
def worker(stage: Stage, database: str, **settings: str) -> Iterator[int]:
    """The id of one worker process of Muniment: every view follows."""
    told = ours(stage) | {"DATABASE_URL": stage.worker(database)} | settings
    with process([sys.executable, "-P", "-m", "ops.cli", "worker", SUPERVISED], told) as running:
        yield running.pid


def settled(stage: Stage, database: str, seconds_max: float = SETTLED_SECONDS_MAX) -> float:
    """Return when the views have caught up, so that nobody is measured against the work of the one before; how long
    that took, in seconds."""
    begun = time.monotonic()
    with psycopg.connect(stage.owner(database), autocommit=True) as connection:
        while behind := connection.execute(_BEHIND, [list(VIEWS), PROJECT]).fetchall():
            if time.monotonic() - begun > seconds_max:
                raise BenchError(f"the views did not catch up within {seconds_max:g} s: {behind}")
            time.sleep(0.05)
    return time.monotonic() - begun


def ours(stage: Stage) -> dict[str, str]:
    home = str(stage.directory / "home")
    return {"MUNIMENT_MODE": "development", "MUNIMENT_HOME": home, "MUNIMENT_KEYS_DIR": str(stage.keys)}


@contextmanager
def process(command: list[str], settings: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with this block, and by itself should the bench be killed: its input closes then."""
    running = subprocess.Popen(command, env=environment(**settings), stdin=subprocess.PIPE)
    try:
        yield running
        if running.poll() is not None:
            raise BenchError(f"{' '.join(command[2:])} ended by itself; what it said stands above")
    finally:
        running.terminate()
        try:
            running.wait(20)
        except subprocess.TimeoutExpired:
            running.kill()
        running.communicate()


def cpu_seconds(pid: int) -> float:
    """What a process and its children, those that ended too, have used so far; 0 where the system does not say
    (proc(5))."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    own = sum(map(int, stat[11:15])) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_seconds(int(child)) for child in children)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_for(port: int, running: subprocess.Popen[bytes]) -> None:
    """Return once something listens."""
    deadline = time.monotonic() + STARTED_SECONDS_MAX
    while time.monotonic() < deadline and running.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise BenchError(f"no server came up on port {port}; what it said stands above")
