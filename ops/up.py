"""`muniment up`: PostgreSQL if none is given, migrations, then an API and a worker, watched until the end.

Invariant: whichever way it ends, it leaves no process behind. SIGINT, SIGTERM and SIGHUP stop everything in
order; killed outright, its children notice that the pipe it held is closed and end by themselves, and the
next start adopts the PostgreSQL that remains. Nothing about requests or views may be known here.
"""

import asyncio
import errno
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from ipaddress import ip_address
from pathlib import Path

import httpx

from ledger.embedded import EmbeddedServer
from ledger.settings import Settings
from ops import OperatorError
from ops.keys_database import migrate_keys
from ops.migrate import DatabaseUnreachable, migrate
from ops.serve import STOP_SECONDS

HEALTHY_SECONDS_MAX = 60
DEATHS_MAX = 5
DEATHS_WITHIN_SECONDS = 60
SUPERVISED = "--supervised"


class UpError(OperatorError):
    """Muniment cannot be brought up, or not be kept up; the message says why and what to do."""


async def up(settings: Settings) -> None:
    """Run everything until a signal asks to stop; raises `UpError` if it cannot be brought up or kept up."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Under nohup, a hang-up is to be ignored.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await _free_port(settings)
    if not settings.embedded:
        await _run(settings, None, stop)
        return
    server = EmbeddedServer(settings.home)
    say(f"starting PostgreSQL {server.programs.version} in {server.data}")
    try:
        # In a thread, so that the signals above are heard; not cut short, so that none is half started.
        await asyncio.to_thread(server.start)
        await _run(settings, server, stop)
    finally:
        await asyncio.to_thread(server.stop)


async def _run(settings: Settings, server: EmbeddedServer | None, stop: asyncio.Event) -> None:
    reached = await _migrate(settings, server)
    if stop.is_set():
        return
    api = Child("api", _environment(settings, server, "muniment_api"), settings.drain_seconds)
    worker = Child("worker", _environment(settings, server, "muniment_worker"), 0)

    async def keep_all() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(api.keep())
            group.create_task(worker.keep())
            group.create_task(_announce(settings, reached))
            if server:
                group.create_task(_keep_postgres(server))
            elif not reached:
                group.create_task(_migrate_later(settings))

    kept = asyncio.create_task(keep_all())
    asked = asyncio.create_task(stop.wait())
    await asyncio.wait([kept, asked], return_when=asyncio.FIRST_COMPLETED)
    say("stopping")
    asked.cancel()
    kept.cancel()
    try:
        await kept
    except asyncio.CancelledError:
        pass
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    finally:
        await asyncio.gather(api.end(), worker.end())


async def _migrate(settings: Settings, server: EmbeddedServer | None) -> bool:
    """Whether the database could be reached; if so, it is at this version (or its owner sees to that)."""
    owner = server.url() if server else settings.migrate_database_url
    if owner is None:
        say("MIGRATE_DATABASE_URL is not set: not migrating (`muniment migrate` does it)")
        return True
    try:
        # On a server of our own nothing else runs, of whatever version.
        await _migrate_all(settings, owner, after=server is not None)
    except DatabaseUnreachable as error:
        say(f"{error}\nStarting without it: commands and reads answer 503 until it is there")
        return False
    return True


async def _migrate_all(settings: Settings, owner: str, *, after: bool = False) -> None:
    names = await migrate(owner, settings.deployment, after=after)
    if settings.migrate_keys_database_url:
        names += await migrate_keys(settings.migrate_keys_database_url, settings.deployment)
    for name in names:
        say(f"migrated {name}")


async def _migrate_later(settings: Settings) -> None:
    while True:
        await asyncio.sleep(2)
        with suppress(DatabaseUnreachable):
            await _migrate_all(settings, settings.migrate_database_url or "")
            say("the database is there")
            return


class Child:
    """One of our own commands as a process, started again when it dies."""

    def __init__(self, command: str, environment: Mapping[str, str], drain_seconds: int) -> None:
        self.command = command
        self._stop_seconds = drain_seconds + STOP_SECONDS + 5
        self._environment = environment
        self._process: Process | None = None

    async def keep(self) -> None:
        """Keep it running for ever; raises `UpError` when it dies too often."""
        deaths: list[float] = []
        while True:
            self._process = await asyncio.create_subprocess_exec(
                # -P: a folder named ops or api where we happen to stand must not be taken for ours.
                *(sys.executable, "-P", "-m", "ops.cli", self.command, SUPERVISED),
                stdin=asyncio.subprocess.PIPE,  # nothing is written; it closes when we are gone
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches only us, and we end it when it is time
            )
            code = await self._process.wait()
            await self._kill_group()
            deaths = [at for at in deaths if at > time.monotonic() - DEATHS_WITHIN_SECONDS] + [time.monotonic()]
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            say(f"the {self.command} (process {self._process.pid}) {how}")
            if len(deaths) >= DEATHS_MAX:
                raise UpError(
                    f"The {self.command} died {DEATHS_MAX} times within {DEATHS_WITHIN_SECONDS} s: what it said "
                    f"above tells why"
                )
            await asyncio.sleep(0.5 * len(deaths))  # not a wait for anything: it spares the machine
            say(f"starting the {self.command} again")

    async def end(self) -> None:
        """Stop it and all that it started: kindly, then after a while by force."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            self._process.terminate()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), self._stop_seconds)
        await self._kill_group()
        await self._process.wait()

    async def _kill_group(self) -> None:
        """Kill what it has left of what it started, and give that a moment to be gone."""
        # It leads the session it was started in, so its group has its number and nobody else's processes.
        if self._process is None:
            return
        deadline = time.monotonic() + 0.2
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self._process.pid, signal.SIGKILL)
                await asyncio.sleep(0.01)


async def _keep_postgres(server: EmbeddedServer) -> None:
    while True:
        await asyncio.sleep(1)
        if not await asyncio.to_thread(server.is_running):
            say("PostgreSQL is gone: starting it again")
            await asyncio.to_thread(server.start)
            say("PostgreSQL is back")


def _environment(settings: Settings, server: EmbeddedServer | None, user: str) -> dict[str, str]:
    """What a child is told: as we were, with the embedded server's address in place of the word for it."""
    environment = dict(os.environ)
    environment["MUNIMENT_HOME"] = str(settings.home)
    for name in ("MIGRATE_DATABASE_URL", "MIGRATE_DATABASE_URL_FILE"):
        environment.pop(name, None)  # a child has no use for the owner's rights
    if server:
        environment.pop("DATABASE_URL_FILE", None)
        environment["DATABASE_URL"] = server.url(user)
    return environment


async def _free_port(settings: Settings) -> None:
    """Make sure that who answers later is our API; waits a little for an earlier one that is on its way out."""
    deadline = time.monotonic() + 5
    while True:
        try:
            family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
            return
        except OSError as error:
            where = f"{settings.host}:{settings.port}"
            if error.errno != errno.EADDRINUSE:
                raise UpError(f"HOST:PORT {where} cannot be listened on: {error.strerror}") from None
            if time.monotonic() > deadline:
                raise UpError(f"{where} is in use by another program: stop it, or set PORT") from None
        await asyncio.sleep(0.1)


def address(settings: Settings) -> str:
    """The URL at which a program on this machine reaches the API."""
    host = settings.host
    with suppress(ValueError):
        ip = ip_address(host)
        if ip.is_unspecified:
            host = "127.0.0.1" if ip.version == 4 else "::1"
        if ip.version == 6:
            host = f"[{host}]"
    return f"http://{host}:{settings.port}"


async def _announce(settings: Settings, reached: bool) -> None:
    """Say where everything is, once the API is healthy, or at least there where the database is not."""
    path = "/health" if reached else "/health/live"
    deadline = time.monotonic() + HEALTHY_SECONDS_MAX
    async with httpx.AsyncClient(base_url=address(settings), trust_env=False, timeout=5) as client:
        while True:
            with suppress(httpx.TransportError):
                if (answer := await client.get(path)).status_code == 200:
                    break
                if time.monotonic() > deadline:
                    say(f"{address(settings)}{path} is not healthy yet: {answer.text}")
                    break
            if time.monotonic() > deadline:
                raise UpError(f"{address(settings)} did not answer within {HEALTHY_SECONDS_MAX} s")
            await asyncio.sleep(0.05)
    for line in _whereabouts(settings):
        say(line)


def _whereabouts(settings: Settings) -> list[str]:
    token = "from your OpenID provider (this is production mode)"  # noqa: S105 (no secret)
    if settings.mode == "development":
        program = os.path.relpath(Path(sys.argv[0]).absolute())
        token = f"{program} token --project demo --subject me --kind human --role operator"
    return [
        f"Muniment {version('muniment')} is up ({settings.mode} mode)",
        f"  API      {address(settings)}",
        f"  docs     {address(settings)}/docs",
        f"  data     {settings.home}  (MUNIMENT_HOME)",
        f"  a token  {token}",
        "  stop     Ctrl-C",
    ]


def say(text: str) -> None:
    """One line for the operator, at once."""
    with suppress(OSError):  # who was to read it has gone; what runs goes on
        print(text, flush=True)
