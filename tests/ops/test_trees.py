"""`muniment verify database`: whatever an owner changes, in events or in the log over them, is named."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ledger.checkpoint import Note
from ledger.commands import ChangeSession, OpenSession, Record
from ops.integrity import Integrity, recompute
from ops.trees import recompute_logs
from tests.conftest import Database
from tests.ops.published import LARGE, Ledger, publishing


@pytest.fixture
async def ledger(database: Database, tmp_path: Path) -> AsyncIterator[Ledger]:
    async with publishing(database, tmp_path / "home") as ledger:
        session = (await ledger.give(OpenSession(agent_role="finance"))).target
        assert session
        await ledger.give(ChangeSession(session_id=session, status="active"))
        await ledger.give(Record(kind="message.user", body={"content": LARGE}))
        for n in range(297):
            await ledger.give(Record(kind="message.user", body={"content": f"number {n}"}))
        await ledger.publish()
        yield ledger


async def faults(ledger: Ledger, *held: Note) -> list[str]:
    found = Integrity()
    async with ledger.pool.connection() as connection:
        assert await recompute_logs(connection, found, held) == 1
    return found.faults


async def test_a_log_that_was_published_again_and_again_is_whole(ledger: Ledger) -> None:
    held = [Note.parse((await ledger.publish()).published)]
    for count in (1, 220, 5):
        for n in range(count):
            await ledger.give(Record(kind="message.user", body={"content": f"more {n}"}))
        held.append(Note.parse((await ledger.publish()).published))
        assert await faults(ledger, *held) == []
    await ledger.give(Record(kind="message.user"))  # which is not published
    assert await faults(ledger, *held) == []


CHANGED = {
    "UPDATE ledger.events SET leaf = sha256('x') WHERE position = 17": [
        "demo: its tile 1/000: hash 0 is not that of positions 1 to 256",
        "demo: its first 300 events are not those of its checkpoint, signed",
        "demo: its first 300 events are not those of its checkpoint, published",
    ],
    "UPDATE ledger.events SET leaf = sha256('x') WHERE position = 299": [
        "demo: its first 300 events are not those of its checkpoint, signed",
        "demo: its first 300 events are not those of its checkpoint, published",
    ],
    "UPDATE ledger.tiles SET hashes = sha256('x')": ["demo: its tile 1/000: hash 0 is not that of positions 1 to 256"],
    "UPDATE ledger.tiles SET hashes = hashes || sha256('x')": ["demo: its tile 1/000 has 2 hashes, and should have 1"],
    "DELETE FROM ledger.tiles": ["demo: its tile 1/000 has 0 hashes, and should have 1"],
    "DELETE FROM ledger.events WHERE position = 17": ["demo: its tree cannot be made: of the 300 events"],
    "DELETE FROM ledger.events WHERE position = 300; UPDATE ledger.ledgers SET size = 299": [
        "demo: it has 299 events, and its log has signed 300",
        "demo: its tree cannot be made: of the 300 events from position 1 on there are 299",
    ],
    "UPDATE ledger.logs SET published = replace(published, '300', '299')": [
        "demo: its checkpoint, published: the signature of"
    ],
    "UPDATE ledger.logs SET origin = 'elsewhere'": ["demo: its log is called elsewhere, and should be localhost/"],
    "UPDATE ledger.logs SET size = 301": ["demo: it has 300 events, and its log has signed 301"],
    "UPDATE ledger.logs SET published_size = 299": ["demo: its checkpoint, published, is of 300 entries of"],
    "UPDATE ledger.log_keys SET public = sha256('x')": [
        "demo: its checkpoint, signed: no key that is known here has signed the note",
        "demo: its checkpoint, published: no key that is known here has signed the note",
    ],
}


@pytest.mark.parametrize("statement", CHANGED)
async def test_what_an_owner_changed_is_named(ledger: Ledger, statement: str) -> None:
    ledger.tamper(*statement.split("; "))
    found = await faults(ledger)
    for fault, expected in zip(found, CHANGED[statement], strict=False):
        assert fault.startswith(expected)
    assert len(found) >= len(CHANGED[statement]), found


async def test_the_command_ends_well_where_all_is_whole_and_names_what_is_not(ledger: Ledger, tmp_path: Path) -> None:
    held = tmp_path / "checkpoint"
    held.write_bytes((await ledger.publish()).published)
    ended = await asyncio.to_thread(ledger.muniment, "verify", "database", held)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "300 positions of 1 projects, and 1 logs: all recomputed, all whole\n"
    ledger.tamper("UPDATE ledger.events SET entry = entry || ' ' WHERE position = 17")
    ended = await asyncio.to_thread(ledger.muniment, "verify", "database")
    assert (ended.returncode, ended.stdout) == (1, "demo: 17: its leaf is not the hash of its bytes\n")


async def test_a_sealed_value_that_was_moved_is_named_though_all_was_hashed_and_signed(ledger: Ledger) -> None:
    def personal(value: str) -> dict[str, Any]:
        return {"content": {"$personal": {"subject": "c-9", "value": value}}}

    one = await ledger.give(Record(kind="message.user", body=personal("Ann Arbor")))
    other = await ledger.give(Record(kind="message.user", body=personal("Bob Berlin")))
    moved = f"""UPDATE ledger.events AS e SET entry = convert_to(replace(
            convert_from(e.entry, 'UTF8'),
            (convert_from(e.entry, 'UTF8')::json #>> '{{data,body,content,$sealed,box}}'),
            (convert_from(o.entry, 'UTF8')::json #>> '{{data,body,content,$sealed,box}}')), 'UTF8')
        FROM ledger.events AS o WHERE e.position = {one.first_position} AND o.position = {other.first_position}"""
    ended = await asyncio.to_thread(ledger.muniment, "verify", "database", "--open-seals")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "2 entries with sealed values: what was not erased opens where it stands" in ended.stdout
    ledger.tamper(moved, "UPDATE ledger.events SET leaf = sha256('\\000'::bytea || entry)")
    await ledger.publish()
    assert await faults(ledger) == []
    ended = await asyncio.to_thread(ledger.muniment, "verify", "database", "--open-seals")
    assert ended.returncode == 1
    assert ended.stdout.startswith(f"demo: {one.first_position}: The sealed value at /data/body/content of event")
    assert "does not open there" in ended.stdout


async def test_each_bit_of_each_signature_is_looked_at(ledger: Ledger) -> None:
    log = await ledger.publish()
    line = log.published.decode().split("\n")[4]
    for at in range(len("\u2014 ") + len(log.origin), len(line)):
        other = line[:at] + ("B" if line[at] == "A" else "A") + line[at + 1 :]
        ledger.tamper(f"UPDATE ledger.logs SET published = replace(published, '{line}', '{other}')")
        assert [fault[:32] for fault in await faults(ledger)] == ["demo: its checkpoint, published:"]
        ledger.tamper(f"UPDATE ledger.logs SET published = replace(published, '{other}', '{line}')")


async def test_a_rewritten_history_with_its_tree_made_anew_is_not_what_is_held(ledger: Ledger) -> None:
    held = Note.parse((await ledger.publish()).published)
    # The events of another time, in order, hashed, signed and published by the log's own key.
    ledger.tamper(
        "UPDATE ledger.events SET leaf = sha256('\\000'::bytea || 'another') WHERE position = 299",
        "UPDATE ledger.events SET entry = 'another' WHERE position = 299",
        "DELETE FROM ledger.logs",
        "DELETE FROM ledger.tiles",
    )
    await ledger.forgetful().publish()
    assert await faults(ledger) == []
    (found,) = await faults(ledger, held)
    assert found.startswith("demo: its first 300 events are not those of its checkpoint, held by you")


async def test_a_database_that_was_put_back_is_found_by_what_is_held(ledger: Ledger) -> None:
    await ledger.give(Record(kind="message.user"))
    held = Note.parse((await ledger.publish()).published)
    ledger.tamper(
        "DELETE FROM ledger.events WHERE position = 301",
        "DELETE FROM ledger.commands WHERE first_position = 301",
        "UPDATE ledger.ledgers SET size = 300",
        "DELETE FROM ledger.logs",
        "DELETE FROM ledger.tiles",
    )
    await ledger.forgetful().publish()
    assert await faults(ledger) == []
    (found,) = await faults(ledger, held)
    assert found == "demo: its checkpoint, held by you, has 301 entries, and here are 300: it was rolled back"


async def test_a_checkpoint_of_a_log_that_is_not_here_is_told(ledger: Ledger) -> None:
    held = Note.parse((await ledger.publish()).published)
    (found,) = await faults(ledger, held._replace(text=held.text.replace("localhost/", "elsewhere/")))
    assert "there is no such log, and you hold a checkpoint of it" in found


async def test_the_leaves_of_entries_are_recomputed_too(ledger: Ledger) -> None:
    ledger.tamper("UPDATE ledger.events SET entry = entry || ' ' WHERE position = 17")
    async with ledger.pool.connection() as connection:
        found = await recompute(connection)
    assert found.faults == ["demo: 17: its leaf is not the hash of its bytes"]
