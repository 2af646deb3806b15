"""`muniment publish`: a copy that anybody can verify, that follows its log, and that never follows another."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from api.app import create_app
from ledger.checkpoint import Checkpoint, Note, VerifierKey
from ledger.commands import OpenSession, Record
from ledger.settings import Settings
from ledger.verify import Trust, Verdict, verify_log
from ops.copies import in_directory
from ops.mirror import MirrorError, write
from tests.api.conftest import Token, running, settings, token
from tests.conftest import Database
from tests.ops.published import LARGE, Ledger, files_of, publishing

__all__ = ["settings", "token"]  # fixtures


@pytest.fixture
async def ledger(database: Database, tmp_path: Path) -> AsyncIterator[Ledger]:
    async with publishing(database, tmp_path) as ledger:
        yield ledger


async def grow(ledger: Ledger, count: int) -> None:
    for n in range(count):
        await ledger.give(Record(kind="message.user", body={"content": f"number {n}"}))


async def publish(ledger: Ledger, directory: Path) -> None:
    log = await ledger.publish()
    async with ledger.pool.connection() as connection:
        await write(connection, await ledger.ledger_id(), log, directory)


async def looked_at(ledger: Ledger, directory: Path, *held: Checkpoint) -> Verdict:
    return verify_log(in_directory(directory), Trust([VerifierKey.parse(await ledger.key())]), held)


def checkpoint(directory: Path) -> Checkpoint:
    return Checkpoint.parse(Note.parse((directory / "checkpoint").read_bytes()).text)


async def test_a_mirror_is_verified_by_its_files_alone(ledger: Ledger, tmp_path: Path) -> None:
    await grow(ledger, 5)
    await ledger.give(Record(kind="message.user", body={"content": LARGE}))
    await publish(ledger, tmp_path / "log")
    seen = await looked_at(ledger, tmp_path / "log")
    assert (seen.faults, seen.entries, seen.payloads) == ([], 6, 1)
    names = set(files_of(tmp_path / "log"))
    assert {"checkpoint", "keys.json", "tile/0/000.p/6", "tile/entries/000.p/6"} < names
    assert len([name for name in names if name.startswith("payload/")]) == 1


async def test_a_mirror_follows_its_log_and_serves_what_it_served(ledger: Ledger, tmp_path: Path) -> None:
    directory = tmp_path / "log"
    held: list[Checkpoint] = []
    kept: dict[str, bytes] = {}
    for count in (3, 250, 10, 1, 300):
        await grow(ledger, count)
        await publish(ledger, directory)
        seen = await looked_at(ledger, directory, *held)
        assert (seen.faults, seen.entries) == ([], checkpoint(directory).size)
        held.append(checkpoint(directory))
        now = files_of(directory)
        for path, content in kept.items():
            if path in now and path not in ("checkpoint", "keys.json"):
                assert now[path] == content, f"{path} was changed"
            elif path not in now:  # a part goes when the full one is there
                assert now[path.partition(".p/")[0]].startswith(content)
        kept = now
    assert [one.size for one in held] == [3, 253, 263, 264, 564]


async def test_a_mirror_has_the_very_files_that_the_service_serves(
    ledger: Ledger, tmp_path: Path, settings: Settings, token: Token
) -> None:
    await grow(ledger, 300)
    await ledger.give(Record(kind="message.user", body={"content": LARGE}))
    await publish(ledger, tmp_path / "log")
    files = files_of(tmp_path / "log")
    async with running(create_app(settings), token("auditor")) as client:
        keys = (await client.get("/ledger/demo/keys")).json()
        assert msgspec.json.decode(files.pop("keys.json")) == keys
        for path, content in files.items():
            response = await client.get(f"/ledger/demo/{path}")
            assert (response.status_code, response.content) == (200, content), path


async def test_the_command_writes_what_the_other_verifies(ledger: Ledger, tmp_path: Path) -> None:
    await grow(ledger, 3)
    key = await ledger.key()
    ended = await asyncio.to_thread(ledger.muniment, "publish", tmp_path / "log", "--project", "demo")
    assert ended.returncode == 0, ended.stderr
    assert "3 entries of localhost/" in ended.stdout
    ended = await asyncio.to_thread(ledger.muniment, "verify", tmp_path / "log", "--key", key)
    assert (ended.returncode, "3 entries, 0 with data beside them: whole" in ended.stdout) == (0, True)
    ended = await asyncio.to_thread(ledger.muniment, "publish", tmp_path / "other", "--project", "nobody")
    assert (ended.returncode, "nobody has no log yet" in ended.stderr) == (1, True)


async def test_nothing_new_is_nothing_written(ledger: Ledger, tmp_path: Path) -> None:
    await grow(ledger, 3)
    await publish(ledger, tmp_path / "log")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "log/tile").rglob("*")}
    await publish(ledger, tmp_path / "log")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "log/tile").rglob("*")} == before


async def test_a_mirror_of_another_history_is_kept_as_it_is(ledger: Ledger, tmp_path: Path) -> None:
    await grow(ledger, 3)
    await publish(ledger, tmp_path / "log")
    log = await ledger.publish()
    ledger.tamper("UPDATE ledger.events SET leaf = sha256('x') WHERE position = 2")
    before = files_of(tmp_path / "log")
    async with ledger.pool.connection() as connection:
        with pytest.raises(MirrorError, match="first 3 entries are not those of the mirror"):
            await write(connection, await ledger.ledger_id(), log, tmp_path / "log")
    assert files_of(tmp_path / "log") == before


async def test_a_mirror_that_has_more_than_the_log_shows_a_roll_back(ledger: Ledger, tmp_path: Path) -> None:
    await grow(ledger, 3)
    older = await ledger.publish()
    await grow(ledger, 2)
    await publish(ledger, tmp_path / "log")
    async with ledger.pool.connection() as connection:
        with pytest.raises(MirrorError, match="it was rolled back"):
            await write(connection, await ledger.ledger_id(), older, tmp_path / "log")


async def test_another_directory_is_not_written_over(ledger: Ledger, tmp_path: Path) -> None:
    await ledger.give(OpenSession(agent_role="finance"))
    tmp_path.joinpath("mine").mkdir()
    tmp_path.joinpath("mine/thesis.tex").write_text("dear to me")
    with pytest.raises(MirrorError, match="has files of others"):
        await publish(ledger, tmp_path / "mine")
    await publish(ledger, tmp_path / "log")
    path = tmp_path / "log/checkpoint"
    path.write_bytes(path.read_bytes().replace(b"localhost/", b"elsewhere/", 1))
    before = files_of(tmp_path / "log")
    with pytest.raises(MirrorError, match=r"of another log: elsewhere/.*and this is localhost/.*Name a new directory"):
        await publish(ledger, tmp_path / "log")
    assert files_of(tmp_path / "log") == before


async def test_of_two_at_once_one_writes_and_the_other_says_so(ledger: Ledger, tmp_path: Path) -> None:
    await grow(ledger, 600)
    log, ledger_id = await ledger.publish(), await ledger.ledger_id()

    async def written() -> int:
        async with ledger.pool.connection() as connection:
            return await write(connection, ledger_id, log, tmp_path / "log")

    one, other = await asyncio.gather(written(), written(), return_exceptions=True)
    assert one == 0
    assert isinstance(other, MirrorError)
    assert "Another `muniment publish` is writing to" in str(other)
    assert await written() == 600
    assert (await looked_at(ledger, tmp_path / "log")).faults == []


async def test_a_run_that_was_killed_before_its_first_checkpoint_is_begun_again(ledger: Ledger, tmp_path: Path) -> None:
    await grow(ledger, 3)
    await publish(ledger, tmp_path / "log")
    for name in ("checkpoint", "keys.json"):  # as they are called until they are whole
        (tmp_path / "log" / name).rename(tmp_path / "log" / f".{name}")
    await publish(ledger, tmp_path / "log")
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == ["checkpoint", "keys.json", "tile"]
    assert (await looked_at(ledger, tmp_path / "log")).faults == []


async def test_all_is_on_the_disk_before_a_checkpoint_speaks_of_it(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    fsync = os.fsync

    def remembered(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    await grow(ledger, 300)
    await ledger.give(Record(kind="message.user", body={"content": LARGE}))
    log, directory = await ledger.publish(), tmp_path / "mirrors/log"
    monkeypatch.setattr(os, "fsync", remembered)
    async with ledger.pool.connection() as connection:
        await write(connection, await ledger.ledger_id(), log, directory)
    checkpoint = synced.index(directory / ".checkpoint")
    files = [directory / path for path in files_of(directory) if path != "checkpoint"]
    assert len(files) > 5
    assert {path.with_name(f".{path.name}") for path in files} <= set(synced[:checkpoint])
    names = {parent for path in files for parent in path.parents if parent.is_relative_to(tmp_path / "mirrors")}
    last = max(index for index, path in enumerate(synced) if path.name in {f".{file.name}" for file in files})
    assert names <= set(synced[last:checkpoint])
    assert directory in synced[checkpoint:]
