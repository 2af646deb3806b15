"""Backups of the embedded server: made while it runs, whole or not there, put back where nothing is."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from ledger.commands import OpenSession, Record
from ledger.committer import Committer
from ledger.embedded import EmbeddedServer
from ledger.entry import Recorded
from ledger.postgres import open_pool
from ledger.values import Actor
from ledger.vault import Vault
from ops import OperatorError
from ops.backup import backup, restore
from ops.migrate import migrate
from tests.check import check_ledger
from tests.conftest import Database, database_of, fastest_directory, new_home

AGENT = Actor(issuer="https://id.example", sub="a", kind="agent", assurance="authenticated", roles=("agent",))


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory for homes and backups; whatever server is left in it is killed."""
    place = new_home(fastest_directory())
    yield place
    for home in place.glob("*/postgres"):
        if pid := EmbeddedServer(home.parent).pid:
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(place)


@pytest.fixture
def server(place: Path, use_home: None) -> Iterator[EmbeddedServer]:
    """A running server of the home in `place`, with something recorded in it."""
    with EmbeddedServer(place / "home") as server:
        asyncio.run(migrate(server.url()))
        asyncio.run(record(database_of(server, "muniment"), place / "home", 10))
        yield server


@pytest.fixture
def use_home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUNIMENT_HOME", str(place / "home"))
    for name in ("MUNIMENT_MODE", "DATABASE_URL", "MUNIMENT_KEYS_DIR"):
        monkeypatch.delenv(name, raising=False)


async def record(database: Database, home: Path, count: int, stop: asyncio.Event | None = None) -> None:
    """Append `count` events, or so many again and again until `stop` is set."""
    async with open_pool(database.api, connections_max=4) as pool:
        committer = Committer(pool, Vault(home / "keys", pool, create_keys=True), create_ledgers=True)
        opened = await committer.submit("demo", OpenSession(agent_role="finance"), AGENT)
        while True:
            body = {"customer": {"$personal": {"subject": "c-9", "value": "Mia Li"}}}
            commands = [Record(kind="note", session_id=opened.target, body=body) for _ in range(count - 1)]
            await asyncio.gather(*[committer.submit("demo", command, AGENT) for command in commands])
            if stop is None or stop.is_set():
                break
        await committer.close()


def history(home: Path) -> list[Recorded]:
    """What is recorded in a home, after all of it was checked."""
    with EmbeddedServer(home) as server:
        return check_ledger(server.url())["demo"]


def test_a_backup_made_under_traffic_is_a_part_of_history_that_can_go_on(
    place: Path, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    database = database_of(server, "muniment")

    async def back_up_meanwhile() -> None:
        stop = asyncio.Event()
        traffic = asyncio.create_task(record(database, place / "home", 100, stop))
        await asyncio.to_thread(backup, place / "backup", with_keys=True)
        stop.set()
        await traffic

    asyncio.run(back_up_meanwhile())
    assert "The key files are in it" in capsys.readouterr().out
    original = check_ledger(database.owner)["demo"]
    monkeypatch.setenv("MUNIMENT_HOME", str(place / "new"))
    restore(place / "backup")
    restored = history(place / "new")
    assert 11 <= len(restored) < len(original)
    assert restored == original[: len(restored)]
    with EmbeddedServer(place / "new") as there:
        asyncio.run(record(database_of(there, "muniment"), place / "new", 5))
    assert len(history(place / "new")) == len(restored) + 5
    assert sorted(path.name for path in place.iterdir()) == ["backup", "home", "new"]
    assert sorted(path.name for path in (place / "new").iterdir()) == ["keys", "postgres"]


def test_keys_stay_out_unless_they_are_asked_for(
    place: Path, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backup(place / "backup")
    assert f"keep a copy of {place / 'home' / 'keys'} too" in capsys.readouterr().out
    secret = (place / "home" / "keys" / "demo.key").read_bytes()
    assert not [path for path in (place / "backup").rglob("*") if path.is_file() and secret in path.read_bytes()]
    monkeypatch.setenv("MUNIMENT_HOME", str(place / "new"))
    restore(place / "backup")
    assert "before you start: demo" in capsys.readouterr().out


def test_what_does_not_run_is_backed_up_too_and_does_not_run_after(place: Path, server: EmbeddedServer) -> None:
    server.stop()
    backup(place / "backup")
    assert server.pid is None


def test_nothing_is_ever_overwritten(place: Path, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    backup(place / "backup", with_keys=True)
    with pytest.raises(OperatorError, match="backup exists, and nothing is overwritten"):
        backup(place / "backup")
    with pytest.raises(OperatorError, match=r"holds a database, and nothing is restored over one"):
        restore(place / "backup")
    new = place / "new"
    monkeypatch.setenv("MUNIMENT_HOME", str(new))
    (new / "keys").mkdir(parents=True, mode=0o700)
    (new / "keys" / "demo.key").write_bytes(bytes(32))
    with pytest.raises(OperatorError, match=r"other key files than the backup: demo\.key\. None was replaced"):
        restore(place / "backup")
    assert (new / "keys" / "demo.key").read_bytes() == bytes(32)
    assert not (new / "postgres").exists()


def test_a_backup_that_is_not_whole_any_more_is_not_restored(
    place: Path, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(place / "backup")
    monkeypatch.setenv("MUNIMENT_HOME", str(place / "new"))
    control = place / "backup" / "data" / "global" / "pg_control"
    content = control.read_bytes()
    control.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(OperatorError, match="pg_control is not as it was copied"):
        restore(place / "backup")
    control.unlink()
    with pytest.raises(OperatorError, match=r"is not whole: .*pg_control"):
        restore(place / "backup")
    with pytest.raises(OperatorError, match="is no backup"):
        restore(place)
    assert not (place / "new").exists()


def test_another_major_version_is_told_what_to_do(
    place: Path, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(place / "backup")
    monkeypatch.setenv("MUNIMENT_HOME", str(place / "new"))
    (place / "backup" / "data" / "PG_VERSION").write_text("14\n")
    with pytest.raises(OperatorError, match=r"is of PostgreSQL 14, .* cannot read it\. Restore it with the programs"):
        restore(place / "backup")


def test_what_a_newer_version_migrated_is_not_restored(
    place: Path, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = "INSERT INTO muniment.migrations (name, sha256, phase) VALUES ('9999_later.sql', '', 'after')"
    removed = "DELETE FROM muniment.migrations WHERE name LIKE '9999%'"
    backup(place / "backup")
    monkeypatch.setenv("MUNIMENT_HOME", str(place / "new"))
    restore(place / "backup")
    with EmbeddedServer(place / "new") as there, psycopg.connect(there.url(), autocommit=True) as connection:
        connection.execute(later)
        with pytest.raises(OperatorError, match="migrated by a newer version"):
            backup(place / "later")
        connection.execute(removed)
    assert not (place / "later").exists()


def test_a_damaged_ledger_gets_no_backup_by_that_name_and_its_copy_is_kept(place: Path, server: EmbeddedServer) -> None:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("UPDATE ledger.events SET leaf = sha256('x') WHERE position = 3")
    with pytest.raises(OperatorError, match=r"is damaged: demo: 3: its leaf .*The copy is .*backup\.damaged"):
        backup(place / "backup")
    assert sorted(path.name for path in place.iterdir()) == ["backup.damaged", "home"]


def test_killed_it_leaves_no_backup(place: Path, server: EmbeddedServer) -> None:
    command = [sys.executable, "-P", "-m", "ops.cli", "backup", str(place / "backup")]
    process = subprocess.Popen(command, env=dict(os.environ), start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(place.glob("backup.checked-*")):  # it is copied by then, and being checked
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (place / "backup").exists()
    for home in place.glob("backup.checked-*"):
        if pid := EmbeddedServer(home).pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    backup(place / "backup")


@pytest.mark.usefixtures("use_home")
def test_a_home_without_a_database_has_nothing_to_back_up(place: Path) -> None:
    with pytest.raises(OperatorError, match="There is nothing to back up"):
        backup(place / "backup")
    assert list(place.iterdir()) == []


@pytest.mark.usefixtures("use_home")
def test_a_server_of_your_own_has_tools_of_its_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    for act in (backup, restore):
        with pytest.raises(OperatorError, match=r"DATABASE_URL names a PostgreSQL of your own.*pg_basebackup"):
            act(place / "backup")
