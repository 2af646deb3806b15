"""Personal values open for whoever has the keys, at their place, and for nobody else."""

import asyncio
import hmac
import os
import resource
import stat
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import psycopg
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.sql import SQL, Composed, Identifier
from psycopg_pool import AsyncConnectionPool

from ledger.errors import MalformedRequest, StoreUnavailable
from ledger.personal import check, subjects
from ledger.postgres import Connection, Pool, open_pool, queries
from ledger.project_key import UnusableKey, write_once
from ledger.vault import BrokenSeal, Place, Unprepared, Vault

PLACE = Place(
    project_id="demo",
    stream_id=UUID("0199a7c2-0000-7000-8000-000000000001"),
    stream_version=7,
    event_id=UUID("0199a7c3-0000-7000-8000-000000000002"),
    path="/data",
)
SECRET_VALUE = "mia.li3818@example.com"
SECRET_SUBJECT = "mia_li_3818"
ERASED = {"$erased": True}

MakeVault = Callable[..., Awaitable[Vault]]


def personal(value: Any, subject: str = SECRET_SUBJECT) -> dict[str, Any]:
    return {"$personal": {"subject": subject, "value": value}}


@pytest.fixture
async def make_vault(database: Any, tmp_path: Path) -> AsyncIterator[MakeVault]:
    """Vaults as separate processes have them: each its own pool and memory, on one database."""
    async with AsyncExitStack() as stack:

        async def make(keys_dir: Path = tmp_path / "keys", create_keys: bool = True, **options: Any) -> Vault:
            pool = await stack.enter_async_context(open_pool(database.api, 2))
            return Vault(keys_dir, pool, create_keys=create_keys, **options)

        yield make


@pytest.fixture
async def vault(make_vault: MakeVault) -> Vault:
    return await make_vault()


def as_stored(value: Any) -> Any:
    """`value` after a trip through the bytes of an entry."""
    return msgspec.json.decode(msgspec.json.encode(value))


async def seal(vault: Vault, value: Any, where: Place = PLACE) -> Any:
    check(value, "")
    held = await vault.prepare(where.project_id, subjects(value))
    sealed = vault.seal(where.project_id, value, where)
    del held
    return as_stored(sealed)


async def sql(database: Any, statement: str | Composed, *values: Any) -> list[tuple[Any, ...]]:
    """What the database's owner can do that the service cannot."""
    async with await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as connection:
        cursor = await connection.execute(statement, values)
        return await cursor.fetchall() if cursor.description else []


# Sealing and unsealing

numbers = st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | st.text()
names = st.text().filter(lambda name: name not in ("$personal", "$sealed", "$erased"))
plain = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=12
)
marked = st.builds(personal, plain, st.text(min_size=1, max_size=255))
documents = st.recursive(
    scalars | marked,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


def bare(value: Any) -> Any:
    """`value` as a reader sees it: the markers gone, what they marked in their place."""
    if isinstance(value, list):
        return [bare(item) for item in value]
    if isinstance(value, dict):
        if "$personal" in value:
            return value["$personal"]["value"]
        return {name: bare(item) for name, item in value.items()}
    return value


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=documents)
async def test_any_json_comes_back_as_it_was_sealed(vault: Vault, document: Any) -> None:
    before = msgspec.json.encode(document)
    sealed = await seal(vault, document)
    assert b'"$personal"' not in msgspec.json.encode(sealed)
    assert await vault.unseal("demo", sealed, PLACE) == bare(document)
    assert msgspec.json.encode(document) == before, "the caller's value was changed"


async def test_another_process_opens_what_this_one_sealed(vault: Vault, make_vault: MakeVault) -> None:
    sealed = await seal(vault, {"customer": {"email": personal(SECRET_VALUE)}, "seats": [personal([1, 2], "u2"), 3]})
    other = await make_vault(create_keys=False)
    opened = await other.unseal("demo", sealed, PLACE)
    assert opened == {"customer": {"email": SECRET_VALUE}, "seats": [[1, 2], 3]}


async def test_a_sealed_value_has_the_form_of_the_contract(vault: Vault) -> None:
    sealed = await seal(vault, personal(SECRET_VALUE))
    box = sealed["$sealed"]
    assert list(sealed) == ["$sealed"]
    assert list(box) == ["subject", "key", "nonce", "box"]
    assert box["key"] == 1
    assert len(box["subject"]) == 32
    assert len(b64decode(box["nonce"], validate=True)) == 12
    assert len(b64decode(box["box"], validate=True)) == len(msgspec.json.encode(SECRET_VALUE)) + 16


async def test_the_same_value_is_never_sealed_the_same_way_twice(vault: Vault) -> None:
    sealed = await seal(vault, [personal(SECRET_VALUE)] * 2)
    first, second = sealed[0]["$sealed"], sealed[1]["$sealed"]
    assert first["nonce"] != second["nonce"]
    assert first["box"] != second["box"]


async def test_one_subject_has_different_pseudonyms_in_two_projects(vault: Vault) -> None:
    there = msgspec.structs.replace(PLACE, project_id="other")
    mine, theirs = await seal(vault, personal(1)), await seal(vault, personal(1), there)
    assert mine["$sealed"]["subject"] != theirs["$sealed"]["subject"]


async def test_a_box_with_any_bit_flipped_does_not_open(vault: Vault) -> None:
    sealed = await seal(vault, personal(SECRET_VALUE))
    for part in ("nonce", "box"):
        content = b64decode(sealed["$sealed"][part])
        for bit in range(len(content) * 8):
            altered = bytearray(content)
            altered[bit // 8] ^= 1 << bit % 8
            box = sealed["$sealed"] | {part: b64encode(altered).decode()}
            with pytest.raises(BrokenSeal):
                await vault.unseal("demo", {"$sealed": box}, PLACE)


async def test_a_box_with_any_character_changed_does_not_open(vault: Vault) -> None:
    """Also where base64 would decode to the same bytes: padding, its unused bits, stray characters."""
    sealed = await seal(vault, personal([1, 2]))  # 21 bytes, 28 characters; one more makes the padding
    padded = await seal(vault, personal([1, 22]))
    assert padded["$sealed"]["box"].endswith("=")
    for box in (sealed["$sealed"], padded["$sealed"]):
        for part in ("nonce", "box"):
            text = box[part]
            changes = [text[:i] + c + text[i + 1 :] for i in range(len(text)) for c in "AQgw9_=\n é" if c != text[i]]
            for changed in [*changes, text + "=", text + "\n", text[:-4], ""]:
                with pytest.raises(BrokenSeal):
                    await vault.unseal("demo", {"$sealed": box | {part: changed}}, PLACE)


@pytest.mark.parametrize(
    "change",
    [
        lambda box: box | {"note": 1},
        lambda box: {k: v for k, v in box.items() if k != "nonce"},
        lambda box: box | {"key": "1"},
        lambda box: box | {"subject": box["subject"].upper()},
        lambda box: box | {"subject": "\0" * 32},
        lambda box: [box],
        lambda box: None,
    ],
)
async def test_a_box_of_another_shape_is_broken_not_erased(vault: Vault, change: Callable[[Any], Any]) -> None:
    sealed = await seal(vault, personal({"subject": "x"}, "AbC"))
    with pytest.raises(BrokenSeal):
        await vault.unseal("demo", {"$sealed": change(sealed["$sealed"])}, PLACE)


async def test_a_name_beside_a_box_breaks_it(vault: Vault) -> None:
    sealed = await seal(vault, personal(1))
    with pytest.raises(BrokenSeal):
        await vault.unseal("demo", sealed | {"note": 1}, PLACE)


async def test_a_box_of_one_subject_does_not_open_as_anothers(vault: Vault) -> None:
    mine, theirs = await seal(vault, [personal(1, "a"), personal(2, "b")])
    swapped = {"$sealed": mine["$sealed"] | {"subject": theirs["$sealed"]["subject"]}}
    with pytest.raises(BrokenSeal):
        await vault.unseal("demo", swapped, PLACE)


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"stream_id": UUID(int=PLACE.stream_id.int ^ 1)},
        {"event_id": UUID(int=PLACE.event_id.int ^ 1)},
        {"stream_id": PLACE.event_id, "event_id": PLACE.stream_id},
        {"stream_version": 8},
        {"stream_version": 7 + 2**32},
        {"path": "/dat"},
        {"path": "/data/metadata"},
        {"path": "/Data"},
    ],
)
async def test_a_sealed_value_opens_only_at_its_place(vault: Vault, elsewhere: dict[str, Any]) -> None:
    sealed = await seal(vault, {"name": personal(SECRET_VALUE)})
    moved = msgspec.structs.replace(PLACE, **elsewhere)
    with pytest.raises(BrokenSeal, match="altered, or moved") as raised:
        await vault.unseal("demo", sealed, moved)
    assert f"{moved.path}/name" in str(raised.value)
    assert await vault.unseal("demo", sealed, PLACE) == {"name": SECRET_VALUE}


async def test_a_sealed_value_opens_only_at_its_field(vault: Vault) -> None:
    sealed = await seal(
        vault, {"a": {"b": personal(1)}, "a/b": personal(2), "a~1b": personal(3), "l": [personal(4), 0]}
    )
    for moved in (
        {"a": {"b": sealed["a/b"]}},
        {"a/b": sealed["a"]["b"]},
        {"a/b": sealed["a~1b"]},
        {"a~1b": sealed["a/b"]},
        {"l": [0, sealed["l"][0]]},
        {"l": {"1": sealed["l"][0]}},
    ):
        with pytest.raises(BrokenSeal):
            await vault.unseal("demo", moved, PLACE)


async def test_a_part_opens_by_its_own_pointer(vault: Vault) -> None:
    sealed = await seal(vault, {"metadata": {"a/b": personal(SECRET_VALUE)}})
    there = msgspec.structs.replace(PLACE, path="/data/metadata/a~1b")
    assert await vault.unseal("demo", sealed["metadata"]["a/b"], there) == SECRET_VALUE


async def test_a_value_of_another_project_does_not_open_even_under_the_same_key_file(
    vault: Vault, tmp_path: Path
) -> None:
    sealed = await seal(vault, personal(SECRET_VALUE))
    copy = tmp_path / "keys" / "other.key"
    copy.write_bytes((tmp_path / "keys" / "demo.key").read_bytes())
    copy.chmod(0o600)
    await vault.prepare("other", [SECRET_SUBJECT])
    there = msgspec.structs.replace(PLACE, project_id="other")
    assert await vault.unseal("other", sealed, there) == ERASED  # that pseudonym has no keys there
    with pytest.raises(ValueError, match="none in project"):
        await vault.unseal("demo", sealed, there)


async def test_a_subject_that_is_not_prepared_cannot_be_sealed(vault: Vault) -> None:
    await vault.open("demo")
    with pytest.raises(Unprepared, match="not prepared"):
        vault.seal("demo", personal(1), PLACE)


# Keys of subjects


async def test_a_destroyed_key_reads_erased_and_the_rest_stays_readable(
    vault: Vault, make_vault: MakeVault, database: Any
) -> None:
    sealed = await seal(vault, {"gone": personal({"deep": [SECRET_VALUE]}, "a"), "kept": personal(2, "b")})
    pseudonym = sealed["gone"]["$sealed"]["subject"]
    assert await vault.destroy("demo", {pseudonym: 1}) == 1
    for reader in (vault, await make_vault()):
        assert await reader.unseal("demo", sealed, PLACE) == {"gone": ERASED, "kept": 2}
    assert await vault.destroy("demo", {pseudonym: 1}) == 0


async def test_after_destruction_new_values_get_a_new_key_and_old_ones_stay_erased(
    vault: Vault, make_vault: MakeVault, database: Any
) -> None:
    old = await seal(vault, personal("old"))
    await sql(database, "UPDATE keys.data_keys SET retired = true, wrapped = NULL")
    later = await make_vault()
    new = await seal(later, personal("new"))
    assert new["$sealed"]["key"] == 2
    assert await later.unseal("demo", [old], PLACE) == [ERASED]
    assert await later.unseal("demo", new, PLACE) == "new"
    assert await vault.unseal("demo", new, PLACE) == "new", "a key made elsewhere later is looked up"


@pytest.mark.parametrize("restored", [0, 1])
async def test_where_older_keys_were_restored_no_new_key_takes_the_number_of_one_that_was_destroyed(
    make_vault: MakeVault, database: Any, restored: int
) -> None:
    before = await make_vault()
    old = [await seal(before, personal("old"))]
    pseudonym = old[0]["$sealed"]["subject"]
    await before.destroy("demo", {pseudonym: 1})
    before.give_up("demo", [pseudonym])
    old.append(await seal(before, personal("old")))
    await sql(database, "ALTER TABLE keys.data_keys DISABLE TRIGGER USER")
    await sql(database, "DELETE FROM keys.data_keys WHERE key > %s", restored)
    after = await make_vault()
    assert await after.destroy("demo", {pseudonym: 2}) == 0
    new = await seal(after, personal("new"))
    assert new["$sealed"]["key"] == 3
    assert [await after.unseal("demo", one, PLACE) for one in (*old, new)] == [ERASED, ERASED, "new"]


async def test_a_key_that_this_database_never_had_reads_erased(vault: Vault) -> None:
    sealed = await seal(vault, personal(SECRET_VALUE))
    unknown_subject = {"$sealed": sealed["$sealed"] | {"subject": "0" * 32}}
    unknown_number = {"$sealed": sealed["$sealed"] | {"key": 2**40}}
    assert await vault.unseal("demo", [unknown_subject, unknown_number], PLACE) == [ERASED, ERASED]


async def test_vaults_that_race_to_create_keys_agree(make_vault: MakeVault, database: Any) -> None:
    vaults = [await make_vault() for _ in range(3)]
    people = [f"u{number}" for number in range(60)]
    ways = [people, people[::-1], people[30:] + people[:30]]
    await asyncio.gather(*(v.prepare("demo", way) for v in vaults for way in ways))
    assert await sql(database, "SELECT count(*), max(key) FROM keys.data_keys") == [(60, 1)]
    for sealer in vaults:
        sealed = as_stored(sealer.seal("demo", [personal(p, p) for p in people], PLACE))
        for reader in vaults:
            assert await reader.unseal("demo", sealed, PLACE) == people


async def test_processes_that_create_the_same_keys_never_wait_for_each_other_in_a_circle(database: Any) -> None:
    create = queries("ledger", "vault").create_data_keys
    low, high = "0" * 32, "f" * 32

    async def insert(connection: psycopg.AsyncConnection[Any], names: list[str]) -> None:
        keys = {"numbers": [1] * len(names), "wrapped": [bytes(60)] * len(names)}
        await connection.execute(create, {"project_id": "demo", "subjects": names, **keys})

    async with (
        await psycopg.AsyncConnection.connect(database.api) as first,
        await psycopg.AsyncConnection.connect(database.api) as second,
    ):
        await insert(first, [low])
        blocked = asyncio.create_task(insert(second, [high, low]))
        waiting = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
        while not await sql(database, waiting, second.info.backend_pid):
            assert not blocked.done()
        await insert(first, [high])  # deadlocks, had the second taken the high one before it waited
        await first.commit()
        await blocked


class CountingPool(AsyncConnectionPool[Connection]):
    """It knows how often a connection was asked for, which is once a query."""

    queries = 0

    def connection(self, *args: Any, **kwargs: Any) -> Any:
        self.queries += 1
        return super().connection(*args, **kwargs)


async def test_keys_in_memory_cost_no_query_to_seal_and_to_open_is_always_a_single_query(
    vault: Vault, database: Any, tmp_path: Path
) -> None:
    people = [f"u{number}" for number in range(50)]
    rows = [(await seal(vault, personal(p, p)), PLACE) for p in people]
    pool = CountingPool(database.api, connection_class=Connection, min_size=1, kwargs={"autocommit": True}, open=False)
    async with pool:
        reader = Vault(tmp_path / "keys", pool, create_keys=False)
        await reader.open("demo")
        pool.queries = 0
        assert await reader.unseal_all("demo", rows) == people
        assert pool.queries == 1
        await reader.prepare("demo", people)
        assert pool.queries == 2
        await reader.prepare("demo", people)
        assert pool.queries == 2
        assert await reader.unseal_all("demo", rows) == people
        assert pool.queries == 3, "whether they are there still is asked each time"
        assert await reader.unseal_all("demo", [({"plain": 1}, PLACE)]) == [{"plain": 1}]
        assert pool.queries == 3
        assert await asyncio.gather(*(reader.unseal("demo", *row) for row in rows)) == people
        assert pool.queries == 4, "those who ask at once ask together"


async def test_a_key_that_is_held_is_not_forgotten_and_others_are(make_vault: MakeVault) -> None:
    vault = await make_vault(subjects_max=2)
    held = await vault.prepare("demo", ["a", "b", "c"])
    await vault.prepare("demo", ["d", "e", "f"])
    for subject in "abc":
        vault.seal("demo", personal(1, subject), PLACE)
    del held
    forgotten = []
    for subject in "abcdef":
        try:
            vault.seal("demo", personal(1, subject), PLACE)
        except Unprepared:
            forgotten.append(subject)
    assert forgotten[:3] == ["a", "b", "c"]
    assert len(forgotten) == 4
    sealed = [(await seal(vault, personal(s, s)), PLACE) for s in "abcdef"]
    assert await vault.unseal_all("demo", sealed) == list("abcdef")


async def test_the_service_may_neither_change_nor_delete_a_key(vault: Vault, database: Any) -> None:
    await seal(vault, personal(1))
    change, delete, empty = SQL("UPDATE {} SET created_at = now()"), SQL("DELETE FROM {}"), SQL("TRUNCATE {}")
    for user in (database.api, database.worker):
        async with await psycopg.AsyncConnection.connect(user, autocommit=True) as connection:
            for table in (Identifier("keys", "data_keys"), Identifier("keys", "project_keys")):
                for statement in (change, delete, empty):
                    with pytest.raises(psycopg.errors.InsufficientPrivilege):
                        await connection.execute(statement.format(table))


async def test_a_key_is_retired_then_destroyed_and_nobody_takes_that_back(vault: Vault, database: Any) -> None:
    await seal(vault, [personal(1, "a"), personal(1, "b")])
    changes = [
        "UPDATE keys.data_keys SET wrapped = NULL",
        "UPDATE keys.data_keys SET retired = true, key = key + 7",
        "UPDATE keys.data_keys SET retired = true, wrapped = set_byte(wrapped, 0, get_byte(wrapped, 0) # 1)",
        "DELETE FROM keys.data_keys",
        "TRUNCATE keys.data_keys",
    ]
    back = [
        "UPDATE keys.data_keys SET retired = false",
        f"UPDATE keys.data_keys SET wrapped = '\\x{60 * '00'}'",
        "DELETE FROM keys.data_keys",
    ]
    for allowed, refused in ((None, changes), ("SET retired = true", changes), ("SET wrapped = NULL", back)):
        if allowed:
            await sql(database, f"UPDATE keys.data_keys {allowed}")
        for change in refused[1 if allowed else 0 :]:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                await sql(database, change)


async def test_nothing_more_is_sealed_under_a_retired_key_though_it_opens_what_it_sealed(
    vault: Vault, make_vault: MakeVault
) -> None:
    old = await seal(vault, personal("old"))
    pseudonym = vault.pseudonym("demo", SECRET_SUBJECT)
    other = await make_vault()
    assert await other.retire("demo", pseudonym) == 1
    assert await other.retire("demo", pseudonym) == 1
    assert await other.retire("demo", "f" * 32) == 0
    vault.seal("demo", personal("x"), PLACE)  # it has the key, and cannot know yet
    vault.give_up("demo", [pseudonym])
    with pytest.raises(Unprepared):
        vault.seal("demo", personal("x"), PLACE)
    new = await seal(vault, personal("new"))
    assert new["$sealed"]["key"] == 2
    for reader in (vault, other):
        assert await reader.unseal_all("demo", [(old, PLACE), (new, PLACE)]) == ["old", "new"]
    assert await other.undestroyed() == {"demo": [pseudonym]}
    assert await other.first_keys("demo", [pseudonym]) == {pseudonym: 1}
    await other.destroy("demo", {pseudonym: 1})
    assert await other.undestroyed() == {}
    assert await other.first_keys("demo", [pseudonym]) == {pseudonym: 2}
    assert await vault.unseal_all("demo", [(old, PLACE), (new, PLACE)]) == [ERASED, "new"]
    assert (await seal(vault, personal("newer")))["$sealed"]["key"] == 2


class PausingConnection(Connection):
    """It holds back what a query found, until it may go on."""

    found, go_on = asyncio.Event(), asyncio.Event()

    async def execute(self, *args: Any, **kwargs: Any) -> Any:
        cursor = await super().execute(*args, **kwargs)
        self.found.set()
        await self.go_on.wait()
        return cursor


async def test_what_was_found_before_a_key_was_given_up_is_not_sealed_with_after(
    vault: Vault, database: Any, tmp_path: Path
) -> None:
    await seal(vault, personal("old"))
    pool: Pool = AsyncConnectionPool(database.api, connection_class=PausingConnection, min_size=1, open=False)
    async with pool:
        late = Vault(tmp_path / "keys", pool, create_keys=False)
        PausingConnection.found, PausingConnection.go_on = asyncio.Event(), asyncio.Event()
        PausingConnection.go_on.set()
        await late.open("demo")
        PausingConnection.found.clear()
        PausingConnection.go_on.clear()
        preparing = asyncio.create_task(late.prepare("demo", [SECRET_SUBJECT]))
        await PausingConnection.found.wait()
        await vault.retire("demo", vault.pseudonym("demo", SECRET_SUBJECT))
        late.give_up_all("demo")
        PausingConnection.go_on.set()
        held = await preparing
        assert late.seal("demo", personal("new"), PLACE)["$sealed"]["key"] == 2
        del held


async def test_a_wrapped_key_that_was_altered_or_moved_is_refused(
    vault: Vault, make_vault: MakeVault, database: Any
) -> None:
    a, b = await seal(vault, [personal(1, "a"), personal(2, "b")])
    a, b = a["$sealed"]["subject"], b["$sealed"]["subject"]
    await sql(database, "ALTER TABLE keys.data_keys DISABLE TRIGGER USER")
    await sql(
        database,
        "UPDATE keys.data_keys AS k SET wrapped = o.wrapped FROM keys.data_keys AS o "
        "WHERE k.subject = %s AND o.subject = %s",
        a,
        b,
    )
    with pytest.raises(UnusableKey, match=rf"Data key 1 of subject {a} .* does not unwrap"):
        await (await make_vault()).prepare("demo", ["a"])
    await sql(database, "UPDATE keys.data_keys SET wrapped = set_byte(wrapped, 59, get_byte(wrapped, 59) # 1)")
    with pytest.raises(UnusableKey, match="does not unwrap"):
        await (await make_vault()).prepare("demo", ["b"])


async def test_no_plaintext_and_no_key_is_in_the_database(vault: Vault, database: Any, tmp_path: Path) -> None:
    sealed = await seal(vault, {"email": personal(SECRET_VALUE)})
    tables = await sql(
        database,
        "SELECT schemaname, tablename FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')",
    )
    assert ("keys", "data_keys") in tables
    every_row = [SQL("SELECT t::text FROM {} AS t").format(Identifier(*table)) for table in tables]
    at_rest = "\n".join([str(sealed)] + [str(await sql(database, query)) for query in every_row])
    assert sealed["email"]["$sealed"]["subject"] in at_rest
    project_key = (tmp_path / "keys" / "demo.key").read_bytes()
    for secret in (SECRET_VALUE, SECRET_SUBJECT):
        for form in (secret, secret.encode().hex(), b64encode(secret.encode()).decode()[:-4]):
            assert form not in at_rest
    assert project_key.hex() not in at_rest
    assert str(tmp_path) not in at_rest


async def test_a_database_that_does_not_answer_is_said_so(tmp_path: Path) -> None:
    pool = AsyncConnectionPool(
        f"host={tmp_path} dbname=none", connection_class=Connection, min_size=1, timeout=0.1, open=False
    )
    await pool.open(wait=False)
    try:
        with pytest.raises(StoreUnavailable):
            await Vault(tmp_path / "keys", pool, create_keys=True).prepare("demo", ["a"])
        assert not (tmp_path / "keys").exists(), "a key was made for a project that may have one already"
    finally:
        await pool.close()


# Keys of projects


async def test_a_key_file_is_made_for_its_owner_alone(vault: Vault, tmp_path: Path) -> None:
    await vault.open("demo")
    directory = tmp_path / "keys"
    assert [path.name for path in directory.iterdir()] == ["demo.key"]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "demo.key").stat().st_mode) == 0o600
    assert len((directory / "demo.key").read_bytes()) == 32


RACER = """
import sys
from pathlib import Path
from ledger.project_key import create_key_file
print("ready", flush=True)
sys.stdin.readline()
print(create_key_file(Path(sys.argv[1])).hex(), flush=True)
"""


def test_processes_that_race_to_make_a_key_file_agree(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "demo.key"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    seen = {racer.communicate(timeout=30)[0].strip() for racer in racers}
    assert seen == {path.read_bytes().hex()}
    assert list(path.parent.iterdir()) == [path]


def test_a_disk_that_takes_a_part_of_a_key_file_keeps_none_of_it(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_once(tmp_path / "demo.key", bytes(32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


async def test_a_project_without_a_key_file_is_refused_where_none_may_be_made(
    make_vault: MakeVault, tmp_path: Path
) -> None:
    vault = await make_vault(create_keys=False)
    with pytest.raises(UnusableKey, match=r"has no key file .*demo\.key.*muniment project create demo"):
        await vault.open("demo")
    assert not (tmp_path / "keys").exists()


async def test_another_key_than_the_first_is_refused(vault: Vault, make_vault: MakeVault, tmp_path: Path) -> None:
    sealed = await seal(vault, personal(SECRET_VALUE))
    (tmp_path / "keys" / "demo.key").write_bytes(os.urandom(32))
    later = await make_vault()
    for attempt in (
        later.open("demo"),
        later.prepare("demo", [SECRET_SUBJECT]),
        later.unseal("demo", sealed, PLACE),
    ):
        with pytest.raises(UnusableKey, match="is not the key that project demo began with"):
            await attempt
    with pytest.raises(UnusableKey, match="not open"):
        later.fingerprint("demo", b"x")


async def test_two_nodes_with_keys_of_their_own_cannot_both_write_a_project(
    make_vault: MakeVault, tmp_path: Path
) -> None:
    nodes = [await make_vault(tmp_path / name) for name in ("one", "two")]
    outcomes = await asyncio.gather(*(node.open("demo") for node in nodes), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NoneType", "UnusableKey"]


async def test_a_lost_key_file_is_missed_and_not_replaced(vault: Vault, make_vault: MakeVault, tmp_path: Path) -> None:
    await vault.open("demo")
    path = tmp_path / "keys" / "demo.key"
    path.unlink()
    with pytest.raises(UnusableKey, match=r"demo\.key is missing, and project demo has begun with it"):
        await (await make_vault()).open("demo")
    assert not path.exists()


def _mode(mode: int) -> Callable[[Path], None]:
    return lambda path: path.chmod(mode)


def _content(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir(0o700)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_mode(0o644), r"open to other users \(mode 0644\): chmod it to 0600"),
        (_mode(0o640), r"open to other users \(mode 0640\)"),
        (_mode(0o620), r"open to other users \(mode 0620\)"),
        (_content(b""), "not 32 bytes long"),
        (_content(b"x" * 31), "not 32 bytes long"),
        (_content(b"x" * 33), "not 32 bytes long"),
        (_directory, "not a regular file"),
        (_fifo, "not a regular file"),
    ],
)
async def test_a_bad_key_file_is_refused_and_named(
    vault: Vault, make_vault: MakeVault, tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    await vault.open("demo")
    path = tmp_path / "keys" / "demo.key"
    spoil(path)
    with pytest.raises(UnusableKey, match=said) as raised:
        await (await make_vault()).open("demo")
    assert str(path) in str(raised.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
async def test_a_key_file_of_another_user_is_refused(vault: Vault, make_vault: MakeVault, tmp_path: Path) -> None:
    await vault.open("demo")
    os.chown(tmp_path / "keys" / "demo.key", 12345, -1)
    with pytest.raises(UnusableKey, match=r"belongs to another user \(uid 12345\)"):
        await (await make_vault()).open("demo")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file that is root's")
async def test_a_key_mounted_by_root_may_be_read_by_the_group_it_was_mounted_for(
    vault: Vault, make_vault: MakeVault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await vault.open("demo")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    path = tmp_path / "keys" / "demo.key"
    path.chmod(0o440)
    await (await make_vault()).open("demo")
    path.chmod(0o444)
    with pytest.raises(UnusableKey, match="chmod it to 0640"):
        await (await make_vault()).open("demo")


async def test_a_key_file_may_be_a_link_as_mounted_secrets_are(
    vault: Vault, make_vault: MakeVault, tmp_path: Path
) -> None:
    await vault.open("demo")
    path = tmp_path / "keys" / "demo.key"
    (tmp_path / "keys" / "demo.key").symlink_to(path.rename(tmp_path / "elsewhere"))
    await (await make_vault()).open("demo")


async def test_no_key_is_made_in_a_directory_that_others_may_enter(make_vault: MakeVault, tmp_path: Path) -> None:
    directory = tmp_path / "shared"
    directory.mkdir()
    directory.chmod(0o755)
    with pytest.raises(UnusableKey, match=r"shared is open to other users \(mode 0755\).*chmod it to 0700"):
        await (await make_vault(directory)).open("demo")
    assert not list(directory.iterdir())


async def test_a_keys_directory_that_cannot_be_made_is_named(make_vault: MakeVault, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnusableKey, match=r"demo\.key cannot be opened: Not a directory"):
        await (await make_vault(tmp_path / "file")).open("demo")


@pytest.mark.parametrize("project_id", ["../demo", "a/b", "Demo", "", "a", "demo\n", ".demo", "x" * 64])
async def test_what_is_no_project_id_names_no_file(vault: Vault, project_id: str) -> None:
    with pytest.raises(ValueError, match="no project id"):
        await vault.open(project_id)


async def test_a_fingerprint_depends_on_key_project_and_content(vault: Vault, make_vault: MakeVault) -> None:
    for project_id in ("demo", "other"):
        await vault.open(project_id)
    first = vault.fingerprint("demo", b"content")
    assert len(first) == 32
    again = await make_vault(create_keys=False)
    await again.open("demo")
    assert again.fingerprint("demo", b"content") == first
    assert len({first, vault.fingerprint("demo", b"Content"), vault.fingerprint("other", b"content")}) == 3


def test_a_fingerprint_needs_an_open_project(tmp_path: Path) -> None:
    pool = AsyncConnectionPool("", connection_class=Connection, open=False)
    with pytest.raises(UnusableKey, match="not open"):
        Vault(tmp_path, pool, create_keys=True).fingerprint("demo", b"content")


# The frozen format, recomputed here by RFC 5869 and RFC 2104 from the standard library alone


def derived(secret: bytes, purpose: str) -> bytes:
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, f"muniment {purpose} 1\0demo".encode() + b"\x01", "sha256")


async def test_the_keys_and_boxes_are_what_the_format_says(vault: Vault, database: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir(mode=0o700)
    secret, data_key = sha256(b"project").digest(), sha256(b"data").digest()
    (tmp_path / "keys" / "demo.key").write_bytes(secret)
    (tmp_path / "keys" / "demo.key").chmod(0o600)
    await vault.open("demo")
    assert vault.fingerprint("demo", b"command") == hmac.digest(derived(secret, "fingerprints"), b"command", "sha256")
    assert await sql(database, "SELECT key_id FROM keys.project_keys") == [(derived(secret, "key id")[:16],)]

    pseudonym = hmac.digest(derived(secret, "pseudonyms"), b"mia", "sha256")[:16].hex()
    assert pseudonym == "5630faa9f7cf6f90ba8a2df6dbf018d2"
    nonce = bytes(range(12))
    bound = f"muniment data key 1\0demo\0{pseudonym}\x001".encode()
    wrapped = nonce + AESGCM(derived(secret, "wrapping")).encrypt(nonce, data_key, bound)
    await sql(
        database,
        "INSERT INTO keys.data_keys (project_id, subject, key, wrapped) VALUES ('demo', %s, 1, %s)",
        pseudonym,
        wrapped,
    )
    place = (
        b"muniment sealed value 1\0"
        + bytes.fromhex("0199a7c2000070008000000000000001" + "0199a7c3000070008000000000000002" + "0000000000000007")
        + b"demo\0/data/metadata/name"
    )
    box = AESGCM(data_key).encrypt(nonce, b'"Mia Li"', place)
    assert b64encode(box).decode() == "kL/dz4AhPkdQNSulXB6uG/yfa01Uvo1B"
    sealed = {"subject": pseudonym, "key": 1, "nonce": b64encode(nonce).decode(), "box": b64encode(box).decode()}
    assert await vault.unseal("demo", {"metadata": {"name": {"$sealed": sealed}}}, PLACE) == {
        "metadata": {"name": "Mia Li"}
    }


# What a caller may send


@pytest.mark.parametrize(
    ("value", "pointers"),
    [
        (personal(1, ""), ["/m/$personal/subject"]),
        (personal(1, "x" * 256), ["/m/$personal/subject"]),
        ({"$personal": {"subject": 7, "value": 1}}, ["/m/$personal/subject"]),
        ({"$personal": {"subject": "a"}}, ["/m/$personal"]),
        ({"$personal": {"value": 1}}, ["/m/$personal"]),
        ({"$personal": {"subject": "a", "value": 1, "note": 2}}, ["/m/$personal"]),
        ({"$personal": "a"}, ["/m/$personal"]),
        ({"$personal": None}, ["/m/$personal"]),
        ({"$personal": [{"subject": "a", "value": 1}]}, ["/m/$personal"]),
        (personal(1) | {"note": 2}, ["/m"]),
        (personal({"inner": [personal(1)]}), ["/m/$personal/value/inner/0"]),
        (personal({"$sealed": 1}), ["/m/$personal/value/$sealed"]),
        ({"a": [{"$sealed": {}}], "b": {"$erased": True}}, ["/m/a/0/$sealed", "/m/b/$erased"]),
        ({"a/b": {"c~d": {"$personal": 1}}}, ["/m/a~1b/c~0d/$personal"]),
        ({"$sealed": {"$personal": 1}, "x": 1}, ["/m/$sealed"]),
        ({"ok": personal(1), "bad": [personal(1, ""), 2, personal(personal(1))]}, [
            "/m/bad/0/$personal/subject", "/m/bad/2/$personal/value"]),
    ],
)  # fmt: skip
def test_a_malformed_personal_value_is_refused_by_pointer(value: Any, pointers: list[str]) -> None:
    with pytest.raises(MalformedRequest) as raised:
        check(value, "/m")
    assert [error["pointer"] for error in raised.value.errors] == pointers
    assert all(error["detail"] for error in raised.value.errors)


@given(document=documents)
def test_every_well_formed_document_passes(document: Any) -> None:
    check(document, "/metadata")


def test_a_subject_of_255_characters_passes() -> None:
    check(personal(None, "é" * 255), "")


def test_a_refusal_is_short_however_much_is_wrong() -> None:
    with pytest.raises(MalformedRequest) as raised:
        check([{"$erased": 1}] * 10_000, "")
    assert len(raised.value.errors) == 20


@pytest.mark.parametrize("inside", [False, True])
def test_nesting_that_would_exhaust_the_stack_is_refused(inside: bool) -> None:
    deep: Any = 1 if inside else personal(1)
    for _ in range(900):
        deep = [deep]
    with pytest.raises(MalformedRequest, match="nested more than 100 levels"):
        check(personal(deep) if inside else deep, "/body")


async def test_what_check_passes_at_its_deepest_can_be_sealed(vault: Vault) -> None:
    deep: Any = personal(1)
    for _ in range(97):
        deep = {"a": deep}
    sealed = await seal(vault, deep)
    assert await vault.unseal("demo", sealed, PLACE) == bare(deep)


def test_the_subjects_of_a_value_are_found_wherever_they_stand() -> None:
    value = {"a": personal(1, "x"), "b": [personal(2, "y"), {"c": personal(3, "x")}], "d": "$personal"}
    assert subjects(value) == {"x", "y"}
    assert subjects("nothing") == set()
