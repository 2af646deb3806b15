"""The PostgreSQL that Muniment starts itself: its directory, its start, its users, its stop.

Invariant: a data directory is served by at most one server, and by one of the major version that made it.
Any number of processes may use the server; the last to leave stops it, and one whose users were all killed
is adopted by the next start. It listens on a Unix socket only, in a directory that only its account may
enter, which is why it asks for no password. Only entry points may import this module; it must never run a
migration or know a table.
"""

import fcntl
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import psycopg
from msgspec import structs
from psycopg import sql
from psycopg.pq import PGconn, Ping

from ledger.programs import EmbeddedError, Programs, account_for, account_name, find_programs
from ledger.settings import Settings

OWNER = "muniment"
"""The superuser of the cluster, who runs the migrations; also the name of the database."""

_SOCKET = ".s.PGSQL.5432"
_SOCKET_PATH_BYTES_MAX = 107  # sockaddr_un.sun_path, less its closing zero
_STOP_SECONDS = 60
_START_SECONDS = 600  # recovery after a crash reads back up to max_wal_size of log
# Above the largest process id of any system we run on: a process that cannot exist.
_NO_PROCESS = 2**31 - 1

_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    # A refused statement is answered to whoever sent it; in the log it could fill the disk.
    "log_min_error_statement": "panic",
}
_DURABLE = {
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "shared_buffers": "256MB",
    "max_wal_size": "2GB",
    "random_page_cost": "1.1",
}
_THROW_AWAY = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "64MB"}


class EmbeddedServer:
    """The server of one home. A context manager: entering starts or joins it, leaving may stop it.

    `durable=False` is for servers that are thrown away: it gives up surviving a power failure.
    """

    def __init__(self, home: Path, *, durable: bool = True) -> None:
        self._durable = durable
        self._root = home / "postgres"
        self._users: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.log = self._root / "server.log"
        self.socket_directory = self._choose_socket_directory()
        self._where = self._root / "where"
        self._programs: Programs | None = None

    @property
    def programs(self) -> Programs:
        """The programs this server runs from; finds them when first asked."""
        if self._programs is None:
            there = [path.parent for path in sorted(self._root.glob("[0-9][0-9]/PG_VERSION"))]
            self._programs = find_programs(account_for(there))
        return self._programs

    @property
    def data(self) -> Path:
        """The data directory, named after the major version that made it."""
        return self._root / str(self.programs.major)

    @property
    def pid(self) -> int | None:
        """The process id of the living postmaster of this home, whoever started it."""
        if self._process is not None and self._process.poll() is None:
            return self._process.pid
        try:
            written = int(self._pid_file.read_text().partition("\n")[0])
        except (FileNotFoundError, ValueError):
            return None
        return written if self._serves(written) else None

    def url(self, user: str = OWNER, database: str = OWNER) -> str:
        """A connection string for `user`; host and port are given, so PGHOST and PGPORT change nothing."""
        host = quote(str(self.socket_directory), safe="")
        return f"postgresql://{quote(user)}@/{quote(database)}?host={host}&port=5432"

    @property
    def _pid_file(self) -> Path:
        return self.data / "postmaster.pid"

    def is_running(self) -> bool:
        """Whether it accepts connections at this moment."""
        return self._ping() == Ping.OK

    def start(self) -> None:
        """Start the server, or join or adopt the one that runs; returns when it accepts connections.

        Raises `EmbeddedError` when it cannot run, and never harms the data there.
        """
        self._make_root()
        with self._guard():
            self._bring_up()
            if self._users is None:
                self._users = self._lock("users.lock", fcntl.LOCK_SH)

    def stop(self) -> None:
        """Leave the server; the last to leave stops it, and returns when no process of it is left."""
        if self._users is None:
            return
        with self._guard():
            os.close(self._users)
            self._users = None
            if not self._others_use_it():
                self._halt()
                if self.socket_directory.parent != self._root:
                    shutil.rmtree(self.socket_directory, ignore_errors=True)

    def __enter__(self) -> "EmbeddedServer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # --- who uses it: two files, whose locks the kernel releases when their holder dies ----------------

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Held while the server is started or stopped: one at a time, whatever the process."""
        held = self._lock("start.lock", fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(held)

    def _lock(self, name: str, kind: int) -> int:
        # Not inheritable (Python's default): a child that kept the lock would keep the server up.
        descriptor = os.open(self._root / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, kind)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _others_use_it(self) -> bool:
        mine = self._users if self._users is not None else self._lock("users.lock", fcntl.LOCK_SH)
        try:
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            if mine == self._users:
                fcntl.flock(mine, fcntl.LOCK_SH)
            else:
                os.close(mine)
        return False

    # --- up and down: always under the guard -----------------------------------------------------------

    def _bring_up(self) -> None:
        state = self._ping()
        if state == Ping.REJECT:  # it recovers, or is on its way down
            state = self._settle(_START_SECONDS)
        if state == Ping.NO_RESPONSE and self.pid is not None:
            state = self._settle(10)  # its starter was killed before it listened, or its socket is gone
        if state == Ping.OK:
            return
        if self.pid is not None:
            self._halt()
        self._initialise()
        self._launch()
        self._create_database()

    def _ping(self) -> Ping:
        return Ping(PGconn.ping(self.url(database="postgres").encode()))

    def _settle(self, seconds: float) -> Ping:
        """Wait while the server starts or stops. It tells nobody when it has, so this keeps asking."""
        deadline = time.monotonic() + seconds
        while (state := self._ping()) != Ping.OK and self.pid is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        return state

    def _serves(self, pid: int) -> bool:
        """Whether process `pid` is this home's postmaster, and not a later process of that number."""
        if self._process is not None and self._process.pid == pid:
            return self._process.poll() is None
        if Path("/proc/self/cmdline").exists():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                return False
        else:
            asked = ["ps", "-o", "command=", "-p", str(pid)]
            command = subprocess.run(asked, capture_output=True, check=False).stdout
        # The one argument that names this home and no other.
        return os.fsencode(self.socket_directory) in command

    @contextmanager
    def _reached(self, directory: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
        """`directory` as the server's account can name it, and the descriptors it must be given for that.

        Root's homes are closed to other accounts all the way up, and opening them would not be ours to do.
        A process that is handed an open directory reaches it, and what is below, through /proc (proc(5)).
        """
        if self.programs.account is None:
            yield str(directory), ()
            return
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield f"/proc/self/fd/{descriptor}", (descriptor,)
        finally:
            os.close(descriptor)

    def _initialise(self) -> None:
        """Make the data directory aside, then rename it: a kill leaves a whole one or none."""
        if not self.data.exists():
            self._refuse_other_majors()
            unfinished = self._root / f"{self.programs.major}.new"
            shutil.rmtree(unfinished, ignore_errors=True)
            self._make_closed(unfinished)
            locale = ["--locale=C", "--lc-ctype=C.UTF-8"]
            if self.programs.major >= 17:  # the same order and the same case on every machine
                locale = ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
            arguments = [f"--username={OWNER}", "--encoding=UTF8", *locale, "--data-checksums", "--no-instructions"]
            arguments += ["--auth-local=trust", "--auth-host=reject", *([] if self._durable else ["--no-sync"])]
            with self._reached(unfinished) as (path, keep):
                self.programs.run("initdb", f"--pgdata={path}", *arguments, keep=keep)
            unfinished.rename(self.data)
            # Without this a power failure could take the name back, and with it all that follows.
            descriptor = os.open(self._root, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        made_by = self.data.joinpath("PG_VERSION").read_text().strip()
        if made_by != str(self.programs.major):
            raise self._other_major(self.data, made_by)

    def _refuse_other_majors(self) -> None:
        for path in sorted(self._root.glob("*/PG_VERSION")):
            if path.parent.suffix != ".new":
                raise self._other_major(path.parent, path.read_text().strip())

    def _other_major(self, directory: Path, made_by: str) -> EmbeddedError:
        here = self.programs
        return EmbeddedError(
            f"{directory} holds the data of PostgreSQL {made_by}, and the programs found here ({here.bin}) are "
            f"PostgreSQL {here.version}, which cannot read it. Nothing was changed. To keep the data, serve it with "
            f"PostgreSQL {made_by} and set DATABASE_URL, or move it to {self._root / str(here.major)} with "
            f"PostgreSQL's pg_upgrade, which needs the programs of both. To begin anew, set MUNIMENT_HOME to an "
            f"empty directory"
        )

    def _launch(self) -> None:
        if not self.socket_directory.exists():
            self._make_closed(self.socket_directory)
        self._check_socket_directory()
        self._clear_traces()
        settings = _SETTINGS | (_DURABLE if self._durable else _THROW_AWAY)
        settings["unix_socket_directories"] = str(self.socket_directory)
        if sys.platform == "darwin" and self._durable:
            settings["wal_sync_method"] = "fsync_writethrough"  # its fsync stops at the drive's cache
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        deadline = time.monotonic() + 20
        while True:
            with self.log.open("ab") as log, self._reached(self.data) as (path, keep):
                begin = log.tell()
                self._where.write_text(_process_namespace())
                self._process = self.programs.start("postgres", "-D", path, *arguments, keep=keep, output=log)
            if self._settle(_START_SECONDS) == Ping.OK:
                return
            told = self.log.read_bytes()[begin:].decode("utf-8", "replace")
            # The children of a killed postmaster need a moment to notice; until then they hold the data.
            if "shared memory block" not in told or time.monotonic() > deadline:
                raise EmbeddedError(f"PostgreSQL did not start. {self.log} ends:\n{told}")
            time.sleep(0.2)

    def _clear_traces(self) -> None:
        """Let a start pass the files of a server that was killed, though some process has its number by now.

        After a reboot, in a new container, or while its parent has not noticed, the number it left is taken,
        and PostgreSQL would refuse to start. Its pid file stays, with a number that nobody has: PostgreSQL
        goes on to test the shared memory named in it, which is what really tells that no server is left.
        """
        if self._pid_file.exists():
            if self._others_use_it() and self._where.read_text() != _process_namespace():
                raise EmbeddedError(
                    f"{self.data} is in use by a process whose server cannot be seen from here (in another "
                    "container?). Stop that one first, or set MUNIMENT_HOME to another directory"
                )
            _, _, rest = self._pid_file.read_text().partition("\n")
            self._pid_file.write_text(f"{_NO_PROCESS}\n{rest}")
        for name in (_SOCKET, f"{_SOCKET}.lock"):
            self.socket_directory.joinpath(name).unlink(missing_ok=True)

    def _halt(self) -> None:
        pid = self.pid
        for shutdown in (signal.SIGINT, signal.SIGQUIT):  # PostgreSQL's fast and immediate
            if pid is None or not self._serves(pid):
                return
            os.kill(pid, shutdown)
            deadline = time.monotonic() + _STOP_SECONDS
            while self._serves(pid) and time.monotonic() < deadline:
                time.sleep(0.01)
        if pid is not None and self._serves(pid):
            raise EmbeddedError(f"PostgreSQL (process {pid}) does not stop: see {self.log}")

    def _create_database(self) -> None:
        with psycopg.connect(self.url(database="postgres"), autocommit=True) as connection:
            found = connection.execute("SELECT FROM pg_database WHERE datname = %s", [OWNER])
            if not found.rowcount:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(OWNER)))

    # --- its directories -------------------------------------------------------------------------------

    def _make_root(self) -> None:
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self._root.stat().st_uid
        except OSError as error:
            raise EmbeddedError(f"{self._root} cannot be made: {error.strerror}") from None
        if owner != os.geteuid():
            raise EmbeddedError(
                f"{self._root} belongs to {account_name(owner)}, and this is {account_name(os.geteuid())}: run "
                f"Muniment as its owner, or set MUNIMENT_HOME to another directory"
            )

    def _choose_socket_directory(self) -> Path:
        inside = self._root / "run"
        if os.geteuid() != 0 and len(os.fsencode(inside / _SOCKET)) <= _SOCKET_PATH_BYTES_MAX:
            return inside
        # Too long a path, or one that the server's account could not walk.
        digest = hashlib.sha256(os.fsencode(self._root)).hexdigest()[:16]
        return Path("/tmp") / f"muniment-{os.geteuid()}-{digest}"  # noqa: S108 (its owner is checked)

    def _check_socket_directory(self) -> None:
        """In a directory where others may write, one of them could have been first."""
        found = self.socket_directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != self.programs.uid or found.st_mode & 0o077:
            raise EmbeddedError(
                f"{self.socket_directory} must be a directory of {account_name(self.programs.uid)}, closed to "
                f"all others (mode 0700), and is not: remove it"
            )

    def _make_closed(self, directory: Path) -> None:
        """Make `directory` for the server's account alone; a link or a directory that is there stays as it is."""
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
            if self.programs.account:
                os.chown(directory, self.programs.uid, self.programs.account.pw_gid)


def _process_namespace() -> str:
    """What process ids mean here: two containers that share a home do not see each other's servers."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


@contextmanager
def running_database(settings: Settings, user: str) -> Iterator[Settings]:
    """`settings` with real addresses: of the embedded server, as `user`, which runs for as long; else unchanged."""
    if not settings.embedded:
        yield settings
        return
    with EmbeddedServer(settings.home) as server:
        url = server.url(user)
        yield structs.replace(
            settings, database_url=url, database_direct_url=url, migrate_database_url=server.url(OWNER)
        )
