"""`muniment up` as its user meets it: real processes, real signals, real kills; and what a wheel holds."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import ZipFile

import httpx
import pytest

from ledger.embedded import EmbeddedServer
from tests.conftest import Database, fastest_directory, new_home

ROOT = Path(__file__).parents[2]
MUNIMENT = Path(sys.executable).with_name("muniment")


class Up:
    """A running `muniment up`, its output line by line."""

    def __init__(self, home: Path, port: int, **environ: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.home = home
        self.said: list[str] = []
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self.process = subprocess.Popen(
            [MUNIMENT, "up"],
            cwd="/",
            env=kept | {"MUNIMENT_MODE": "development", "MUNIMENT_HOME": str(home), "PORT": str(port)} | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def hear(self, words: str) -> None:
        """Read on until a line has `words`."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.said.append(line.rstrip("\n"))
            if words in line:
                return
        raise AssertionError(f"ended without saying {words!r}:\n" + "\n".join(self.said))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        self.said += self.process.communicate(timeout=40)[0].splitlines()
        return self.process.returncode

    @property
    def children(self) -> dict[str, int]:
        """The process ids of the two commands it keeps."""
        return {command: pid for pid in tree(self.process.pid) if (command := command_of(pid))}


def command_of(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return words[-3].decode() if b"--supervised" in words else ""


def tree(pid: int) -> list[int]:
    """Every living process that descends from `pid`."""
    try:
        below = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except FileNotFoundError:
        return []
    return below + [deeper for child in below for deeper in tree(child)]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def until(fact: Callable[[], bool]) -> None:
    """Wait for something that announces itself to nobody."""
    deadline = time.monotonic() + 30
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def start(port: int) -> Iterator[Callable[..., Up]]:
    """Starts `muniment up` in one home; whatever a test leaves of it is killed."""
    home = new_home(fastest_directory())
    started: list[Up] = []

    def start(**environ: str) -> Up:
        started.append(Up(home, port, **environ))
        return started[-1]

    yield start
    for up in started:
        for pid in [up.process.pid, *tree(up.process.pid)]:
            if lives(pid):
                os.kill(pid, signal.SIGKILL)
        up.process.communicate()
    if postmaster := EmbeddedServer(home).pid:
        os.kill(postmaster, signal.SIGKILL)
    shutil.rmtree(home)


def health(up: Up) -> str:
    try:
        return str(httpx.get(f"{up.url}/health").json()["status"])
    except httpx.TransportError:
        return "absent"


def test_up_says_where_everything_is_and_serves(start: Callable[..., Up]) -> None:
    up = start()
    up.hear("stop     Ctrl-C")
    said = "\n".join(up.said)
    assert f"API      {up.url}\n" in said
    assert f"docs     {up.url}/docs\n" in said
    assert f"data     {up.home}  (MUNIMENT_HOME)" in said
    assert "token --project demo" in said
    assert health(up) == "healthy"
    assert up.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_process_behind(start: Callable[..., Up], number: signal.Signals) -> None:
    up = start()
    up.hear("is up")
    processes = tree(up.process.pid)
    assert set(up.children) == {"api", "worker"}
    assert EmbeddedServer(up.home).pid in processes
    assert up.stop(number) == 0
    assert not [pid for pid in processes if lives(pid)]
    assert EmbeddedServer(up.home).pid is None


def test_a_signal_during_the_start_leaves_no_process_behind(start: Callable[..., Up]) -> None:
    up = start()
    up.hear("PostgreSQL")
    assert up.stop() == 0
    assert EmbeddedServer(up.home).pid is None


def test_killed_outright_its_children_end_and_the_next_start_adopts_postgresql(start: Callable[..., Up]) -> None:
    up = start()
    up.hear("is up")
    postmaster = EmbeddedServer(up.home).pid
    ours = [pid for child in up.children.values() for pid in (child, *tree(child))]
    up.process.kill()
    until(lambda: not [pid for pid in ours if lives(pid)])
    again = start()
    again.hear("is up")
    assert EmbeddedServer(up.home).pid == postmaster
    assert health(again) == "healthy"
    assert again.stop() == 0
    assert postmaster
    assert not lives(postmaster)


def test_what_dies_is_started_again(start: Callable[..., Up]) -> None:
    up = start()
    up.hear("is up")
    for command in ("api", "worker"):
        before = up.children[command]
        os.kill(before, signal.SIGKILL)
        up.hear(f"the {command} (process {before}) was killed by SIGKILL")
        up.hear(f"starting the {command} again")
        until(lambda command=command, before=before: up.children.get(command, before) != before)  # type: ignore[misc]
    until(lambda: health(up) == "healthy")
    postmaster = EmbeddedServer(up.home).pid
    assert postmaster
    os.kill(postmaster, signal.SIGKILL)
    up.hear("PostgreSQL is back")
    until(lambda: health(up) == "healthy")
    assert up.stop() == 0


def test_a_second_one_on_the_same_port_is_told_so(start: Callable[..., Up]) -> None:
    first = start()
    first.hear("is up")
    second = start()
    second.hear("is in use by another program: stop it, or set PORT")
    assert second.process.wait() == 1
    assert health(first) == "healthy"
    assert first.stop() == 0


def test_with_a_database_of_your_own_it_starts_none(start: Callable[..., Up], database: Database) -> None:
    up = start(DATABASE_URL=database.owner)
    up.hear("is up")
    assert health(up) == "healthy"
    assert up.stop() == 0
    assert not (up.home / "postgres").exists()


def test_without_its_database_it_starts_and_says_so(start: Callable[..., Up]) -> None:
    up = start(DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    up.hear("The database cannot be reached")
    up.hear("is up")
    assert health(up) == "unhealthy"
    assert httpx.get(f"{up.url}/health/live").status_code == 200
    assert up.stop() == 0


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MUNIMENT, *arguments], env={"PATH": os.environ["PATH"]} | environ, capture_output=True, text=True, check=False
    )


def test_impossible_settings_stop_the_start() -> None:
    ended = run("up", PORT="eighty", MUNIMENT_MOOD="production", DATABASE_URL="embedded")
    assert ended.returncode == 1
    assert "PORT is 'eighty'" in ended.stderr
    assert "MUNIMENT_MOOD is not a setting" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_migrate_brings_a_database_to_this_version_and_then_has_nothing_to_do(database: Database) -> None:
    ended = run("migrate", MIGRATE_DATABASE_URL=database.owner, DATABASE_URL=database.api)
    assert (ended.returncode, ended.stdout) == (0, "nothing to migrate\n")
    ended = run("migrate", DATABASE_URL=database.api)
    assert ended.returncode == 1
    assert ended.stderr.startswith("muniment: MIGRATE_DATABASE_URL is not set, and production needs it")


def test_help_names_every_command_and_every_setting() -> None:
    said = run("--help").stdout
    for word in ("up", "migrate", "api", "worker", "MUNIMENT_HOME", "DATABASE_URL", "REDIS_URL", "SESSION_RETENTION"):
        assert word in said
    for command in ("up", "migrate", "api", "worker"):
        assert run(command, "--help").stdout.startswith(f"Usage: muniment {command}")


def test_a_wheel_holds_all_that_the_programs_read(tmp_path: Path) -> None:
    uv = ROOT / ".uv" / "bin" / "uv"
    if not uv.exists():
        pytest.skip("the environment was not made by `make setup`")
    subprocess.run([uv, "build", "--wheel", "--offline", "-o", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    packaged = {name for name in tracked if name.split("/")[0] in ("ledger", "projections", "api", "ops", "migrations")}
    installed = {str(path.relative_to(tmp_path / "installed")) for path in (tmp_path / "installed").rglob("*")}
    assert packaged <= installed
    assert not [name for name in installed if name.startswith("tests")]
    asked = "import json, ops, ops.migrate; print(json.dumps([ops.__file__, sorted(ops.migrate.shipped())]))"
    told = subprocess.run(
        [sys.executable, "-P", "-c", asked], env={"PYTHONPATH": str(tmp_path / "installed")}, capture_output=True
    )
    where, migrations = json.loads(told.stdout)
    assert where.startswith(str(tmp_path))
    assert "0001_ledger.sql" in migrations
