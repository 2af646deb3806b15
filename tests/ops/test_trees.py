"""`muniment verify database`: whatever an owner changes, in events or in the log over them, is named."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ledger.checkpoint import COSIGNATURE, Note, VerifierKey
from ledger.commands import ChangeSession, OpenSession, Record
from ledger.operations import OPERATORS, AddLogKey, RetireLogKey
from ledger.postgres import open_pool
from ledger.signing import LogFiles
from ledger.tree import Log
from ledger.values import Actor
from ledger.vault import Vault
from ops.integrity import Integrity, recompute
from ops.seals import open_all
from ops.trees import compare_keys, recompute_logs
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
    said = "300 positions of 1 projects, and 1 logs: all recomputed, all whole"
    assert ended.stdout.splitlines()[1:] == [said]
    assert ended.stdout.startswith("operators: it says nothing of the keys that sign, so that whoever wrote them")
    ledger.tamper("UPDATE ledger.events SET entry = entry || ' ' WHERE position = 17")
    ended = await asyncio.to_thread(ledger.muniment, "verify", "database")
    assert (ended.returncode, ended.stdout.splitlines()[0]) == (1, "demo: 17: its leaf is not the hash of its bytes")


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


async def test_sealed_values_are_opened_a_batch_at_a_time_and_each_that_does_not_open_is_named(ledger: Ledger) -> None:
    values = [{"$personal": {"subject": f"c-{n}", "value": n}} for n in range(60)]
    positions = [(await ledger.give(Record(kind="a", body=value))).first_position for value in values]

    async def opened() -> tuple[int, list[str], int]:
        found = Integrity()
        async with open_pool(ledger.database.api, connections_max=1) as keys:
            count = await open_all(ledger.pool, Vault(ledger.home / "keys", keys, create_keys=False), found)
            return count, found.faults, keys.get_stats()["requests_num"]

    count, faults, asked = await opened()
    assert (count, faults) == (60, [])
    assert asked < 6
    broken = positions[7], positions[41]
    ledger.tamper(
        f"""UPDATE ledger.events
            SET entry = convert_to(replace(convert_from(entry, 'UTF8'), '"box":"', '"box":"A'), 'UTF8')
            WHERE position IN {broken}""",
        f"UPDATE ledger.events SET entry = '\"$sealed\"' WHERE position = {positions[20]}",
        f"UPDATE ledger.events SET entry = convert_to(repeat('[', 9999) || '\"$sealed\"' || repeat(']', 9999), 'UTF8')"
        f" WHERE position = {positions[21]}",
    )
    async with ledger.pool.connection() as connection:
        whole = await recompute(connection)
    for position in (positions[20], positions[21]):
        assert [fault for fault in whole.faults if fault.startswith(f"demo: {position}: its bytes are no event")]
    count, faults, asked = await opened()
    assert [fault.split(":")[1].strip() for fault in faults] == [f"{position}" for position in broken]
    assert asked < 50


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


# Whose signatures are believed

OPERATOR = Actor(issuer="muniment-terminal", sub="ops@here", kind="human", assurance="asserted", roles=("operator",))


async def on_record(ledger: Ledger) -> None:
    """The key that signs, as `muniment keys` would have it on record."""
    key = VerifierKey.parse(await ledger.key())
    operators = ledger._replace(project=OPERATORS)
    await operators.give(AddLogKey(number=1, public=key.public.hex()), OPERATOR)


async def compared(ledger: Ledger, *, production: bool = True) -> Integrity:
    found = Integrity()
    async with ledger.pool.connection() as connection:
        await compare_keys(connection, found, may_be_made=not production)
    return found


async def test_keys_that_operators_added_and_retired_are_the_keys_of_the_database(ledger: Ledger) -> None:
    for arguments in (["add"], ["retire", 1], ["add"]):
        ended = await asyncio.to_thread(ledger.muniment, "keys", *arguments)
        assert ended.returncode == 0, ended.stderr
    assert await compared(ledger) == Integrity()
    assert await compared(ledger, production=False) == Integrity()


async def test_a_key_that_a_worker_made_by_itself_is_noted_in_development_and_a_fault_in_production(
    ledger: Ledger,
) -> None:
    found = await compared(ledger, production=False)
    assert (found.faults, len(found.notes)) == ([], 1)
    found = await compared(ledger)
    assert found.notes == []
    expected = "operators: key 1 signs by what is in the database, and no event of this ledger added it"
    assert found.faults == [expected]


FORGED_KEYS = {
    "INSERT INTO ledger.log_keys (number, public, added_at) VALUES (2, sha256('x'), now())": [
        "operators: key 2 signs by what is in the database, and no event of this ledger added it"
    ],
    "UPDATE ledger.log_keys SET public = sha256('x')": [
        "operators: key 1 has the public half 2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881, and"
    ],
    "UPDATE ledger.log_keys SET retired_at = now() + interval '1 hour'": ["operators: key 1 signs until 20"],
    "DELETE FROM ledger.log_keys": ["operators: key 1 was added, and is not in the database"],
    "UPDATE ledger.events SET entry = '{}' WHERE type = 'LogKeyAdded'": ["operators: what it says of the keys"],
    "UPDATE ledger.events SET type = 'Unheard' WHERE type = 'LogKeyAdded'": ["operators: what it says of the keys"],
}


@pytest.mark.parametrize("statement", FORGED_KEYS)
@pytest.mark.parametrize("production", [True, False])
async def test_a_key_that_is_not_as_operators_left_it_is_named(
    ledger: Ledger, statement: str, production: bool
) -> None:
    await on_record(ledger)
    ledger.tamper(statement)
    found = await compared(ledger, production=production)
    assert len(found.faults) == len(FORGED_KEYS[statement]), found
    assert found.faults[0].startswith(FORGED_KEYS[statement][0])


async def test_a_retirement_that_was_taken_back_is_named(ledger: Ledger) -> None:
    await on_record(ledger)
    operators = ledger._replace(project=OPERATORS)
    second = LogFiles(ledger.home / "keys").make(2)
    await operators.give(AddLogKey(number=2, public=second.hex()), OPERATOR)
    await operators.give(RetireLogKey(number=1), OPERATOR)
    ended = await asyncio.to_thread(ledger.muniment, "keys", "retire", 1)  # which brings the table to that
    assert (ended.returncode, await compared(ledger)) == (0, Integrity())
    ledger.tamper("UPDATE ledger.log_keys SET retired_at = NULL")
    (found,) = (await compared(ledger)).faults
    assert found.startswith("operators: key 1 signs until further notice by what is in the database, and until 20")


def resigned(log: Log, forged: LogFiles) -> list[str]:
    """What a forger writes who has no key but one of their own."""
    text = Note.parse(log.published).text
    note = Note(text, (forged.signer(log.origin, 1, forged.make(1)).sign(text),))
    return [f"UPDATE ledger.logs SET signed = '{note}', published = '{note}'"]


async def test_only_the_keys_that_are_given_are_believed_whatever_the_database_has(
    ledger: Ledger, tmp_path: Path
) -> None:
    key = await ledger.key()
    await on_record(ledger)
    ended = await asyncio.to_thread(ledger.muniment, "verify", "database", "--key", key)
    assert (ended.returncode, ended.stderr) == (0, "")
    # Another key, on record as the first is, and a log that is signed anew by it.
    forged = LogFiles(tmp_path / "forger")
    public = forged.make(1).hex()
    first = VerifierKey.parse(key).public.hex()
    ledger.tamper(
        f"UPDATE ledger.log_keys SET public = decode('{public}', 'hex')",
        f"""UPDATE ledger.events SET entry =
            convert_to(replace(convert_from(entry, 'UTF8'), '{first}', '{public}'), 'UTF8')
            WHERE type = 'LogKeyAdded'""",
        "UPDATE ledger.events SET leaf = sha256('\\000'::bytea || entry)",
        *resigned(await ledger.publish(), forged),
    )
    ended = await asyncio.to_thread(ledger.muniment, "verify", "database")
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    ended = await asyncio.to_thread(ledger.muniment, "verify", "database", "--key", key)
    assert ended.returncode == 1
    unknown = "no key that is known here has signed the note"
    assert ended.stdout.splitlines() == [f"demo: its checkpoint, {what}: {unknown}" for what in ("signed", "published")]


async def test_a_key_that_is_none_is_refused(ledger: Ledger) -> None:
    witness = VerifierKey("witness.example", COSIGNATURE, bytes(32))
    for text, said in (("x", "is not a verifier key"), (str(witness), "is the key of a witness")):
        ended = await asyncio.to_thread(ledger.muniment, "verify", "database", "--key", text)
        assert (ended.returncode, said in ended.stderr) == (1, True), ended.stderr


# What should be there


AGED = """UPDATE ledger.ledgers SET created_at = now() - interval '1 hour';
    UPDATE ledger.log_keys SET added_at = now() - interval '1 hour'"""
NO_LOG = "DELETE FROM ledger.logs; DELETE FROM ledger.tiles"
EMPTY_LOG = """DELETE FROM ledger.tiles;
    UPDATE ledger.logs SET size = 0, signed = NULL, published_size = 0, published = NULL, published_at = NULL"""
MISSED = (
    "demo: it has 300 events, and no log that has signed any: it was removed, or no worker has signed since they came"
)


@pytest.mark.parametrize(
    ("statements", "expected"),
    [
        (
            ["DELETE FROM ledger.logs"],
            ["demo: tiles of its tree are there, and no log that has signed anything"],
        ),
        ([NO_LOG], []),  # it may come any moment
        ([NO_LOG, AGED], [MISSED]),
        ([EMPTY_LOG, AGED], [MISSED]),
        ([EMPTY_LOG, AGED, "UPDATE ledger.logs SET refused = 'no key'"], []),
    ],
)
async def test_a_log_that_is_gone_is_missed(ledger: Ledger, statements: list[str], expected: list[str]) -> None:
    ledger.tamper(*statements)
    found = Integrity()
    async with ledger.pool.connection() as connection:
        await recompute_logs(connection, found)
    assert [fault[: len(start)] for fault, start in zip(found.faults, expected, strict=True)] == expected


async def test_a_log_that_is_gone_is_missed_where_others_are_there(ledger: Ledger) -> None:
    other = ledger._replace(project="other")
    await other.give(Record(kind="message.user"))
    assert await faults(ledger) == []
    ledger.tamper(AGED)
    (found,) = await faults(ledger)
    assert found.startswith("other: it has 1 events, and no log")
    await other.publish()
    async with ledger.pool.connection() as connection:
        whole = Integrity()
        assert await recompute_logs(connection, whole) == 2
    assert whole.faults == []
