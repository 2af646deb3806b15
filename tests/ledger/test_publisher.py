"""What is published is what was recorded, for ever: whatever dies, goes back or is tampered with on the way."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import httpx
import psycopg
import pytest
from psycopg import sql
from uuid_utils.compat import uuid7

from ledger import store, tree
from ledger.checkpoint import COSIGNATURE, Checkpoint, Note, SignerKey, check_checkpoint
from ledger.embedded import EmbeddedServer
from ledger.merkle import Edge, check_consistency, leaf_hash
from ledger.postgres import Pool, open_pool
from ledger.publisher import Publisher, Refused
from ledger.signing import LogFiles
from ledger.store import Append, EventRow
from ledger.tree import LEAVES_AT_ONCE
from ledger.witness import Witness, Witnesses
from tests.check import check_logs
from tests.conftest import Database, database_of
from tests.ledger.test_hostile import cancel_the_wait, reconfigure

NOW = datetime(2026, 11, 21, 9, tzinfo=UTC)


class Logged(NamedTuple):
    """A ledger, and who publishes it."""

    pool: Pool
    database: Database
    keys: LogFiles
    ledger_id: UUID

    def publisher(self) -> Publisher:
        """One that remembers nothing."""
        return Publisher(self.pool, self.keys)

    async def append(self, count: int, kind: bytes = b"event") -> None:
        async with self.pool.connection() as connection:
            size = (await store.head(connection, self.ledger_id)).size
            batch = Append(ledger_id=self.ledger_id, seen=size, recorded_at=NOW)
            entries = [b"%b %d" % (kind, position) for position in range(size + 1, size + count + 1)]
            batch.events = [EventRow(uuid7(), 1, "Anything", one, leaf_hash(one), None) for one in entries]
            assert await store.append(connection, batch)

    async def published(self) -> Checkpoint:
        """What is served; it is signed by the keys of the log."""
        async with self.pool.connection() as connection:
            log = await tree.log_of(connection, self.ledger_id)
            assert log is not None
            keys = [key.vkey for key in await tree.keys_of(connection, log.origin)]
        checkpoint = check_checkpoint(Note.parse(log.published), keys)
        assert (checkpoint.origin, checkpoint.size) == (log.origin, log.published_size)
        return checkpoint

    def row(self, locked: str = "") -> dict[str, Any]:
        with psycopg.connect(self.database.owner, row_factory=psycopg.rows.dict_row) as owner:
            return owner.execute(f"SELECT * FROM ledger.logs {locked}".encode()).fetchone() or {}

    def tamper(self, *statements: str) -> None:
        """As an owner who knows what they do."""
        with psycopg.connect(self.database.owner) as owner:
            owner.execute("SET session_replication_role = replica")
            for statement in statements:
                owner.execute(statement.encode())


@cache
def root(size: int) -> bytes:
    edge = Edge()
    edge.extend([leaf_hash(b"event %d" % position) for position in range(1, size + 1)])
    return edge.root


@pytest.fixture
async def logged(database: Database, tmp_path: Path) -> AsyncIterator[Logged]:
    async with open_pool(database.worker) as pool:
        keys = LogFiles(tmp_path / "keys")
        async with pool.connection() as connection:
            ledger = await store.create_ledger(connection, "demo", is_foreign=True)
            await tree.add_key(connection, 1, keys.make(1))
        yield Logged(pool, database, keys, ledger.ledger_id)
    check_logs(database.owner)


async def test_what_was_recorded_is_published(logged: Logged) -> None:
    publisher = logged.publisher()
    for count in (1, 254, 1, 1, 700):
        await logged.append(count)
        await publisher.publish(logged.ledger_id)
        published = await logged.published()
        assert published.root == root(published.size)
    assert published.size == 957
    assert published.origin == f"localhost/{logged.ledger_id}"
    assert Note.parse(logged.keys.last_signed(logged.ledger_id) or b"").text == published.text


async def test_where_nothing_was_recorded_since_nothing_changes(logged: Logged) -> None:
    await logged.append(3)
    await logged.publisher().publish(logged.ledger_id)
    before = logged.row()
    await logged.publisher().publish(logged.ledger_id)
    assert logged.row() == before


async def test_an_empty_ledger_has_no_checkpoint(logged: Logged) -> None:
    await logged.publisher().publish(logged.ledger_id)
    async with logged.pool.connection() as connection:
        assert await tree.log_of(connection, logged.ledger_id) is None


async def test_a_backlog_is_integrated_in_steps_and_published_once(logged: Logged) -> None:
    await logged.append(2 * LEAVES_AT_ONCE + 10)
    publisher = logged.publisher()
    await publisher.publish(logged.ledger_id)
    assert (await logged.published()).root == root(2 * LEAVES_AT_ONCE + 10)
    assert publisher.published.latency.counts.count(1) == 1


async def test_who_appends_never_waits_for_it(logged: Logged) -> None:
    """Nor does it wait for an append that is on its way, and holds the row of the ledger."""
    await logged.append(5)
    async with logged.pool.connection() as appending, appending.transaction():
        await store.lock(appending, logged.ledger_id, -1, None, 0, [])
        await logged.publisher().publish(logged.ledger_id)
    assert (await logged.published()).size == 5


async def test_killed_on_any_line_it_goes_on_and_signs_nothing_else(logged: Logged, tmp_path: Path) -> None:
    arguments = [logged.database.worker, str(tmp_path / "keys"), str(logged.ledger_id)]
    line = [sys.executable, "-P", "-m", "tests.ledger.dying", *arguments]
    seen: dict[int, str] = {}
    dying = await asyncio.create_subprocess_exec(*line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert dying.stdin
    assert dying.stdout
    try:
        for number in range(1, 500):
            await logged.append(30)
            dying.stdin.write(b"%d\n" % number)
            died = await dying.stdout.readline()
            assert died, "it ended otherwise"
            # Whatever anybody could have seen by then is one history. The server may still be letting go of its lock.
            row = logged.row(" FOR UPDATE")
            last = logged.keys.last_signed(logged.ledger_id)
            for note in (row.get("signed"), row.get("published"), last and last.decode()):
                if note:
                    checkpoint = Checkpoint.parse(Note.parse(note.encode()).text)
                    assert seen.setdefault(checkpoint.size, checkpoint.text) == checkpoint.text
                    assert checkpoint.root == root(checkpoint.size)
            check_logs(logged.database.owner)
            if died == b"0\n":
                break
    finally:
        dying.stdin.close()
        await dying.wait()
    assert number > 60, "it died on all lines of its way"
    assert (await logged.published()).size == number * 30


async def test_what_was_signed_when_it_died_is_published_as_it_is(logged: Logged) -> None:
    await logged.append(10)
    await logged.publisher().publish(logged.ledger_id)
    signed = logged.row()["signed"]
    logged.tamper("UPDATE ledger.logs SET published_size = 0, published = NULL, published_at = NULL")
    await logged.publisher().publish(logged.ledger_id)
    assert logged.row()["published"] == logged.row()["signed"] == signed


async def test_two_publishers_at_once_sign_one_history(logged: Logged) -> None:
    publishers = [logged.publisher() for _ in range(3)]
    before = Checkpoint("", 0, Edge().root)
    for count in (1, 300, 7, 5_000, 20):
        await logged.append(count)
        await asyncio.gather(*(one.publish(logged.ledger_id) for one in publishers))
        now = await logged.published()
        async with logged.pool.connection() as connection:
            proof = await tree.prove_consistency(connection, logged.ledger_id, before.size, now.size)
        check_consistency(before.size, before.root, now.size, now.root, proof)
        before = now
    assert before.size == 5_328


async def test_while_one_signs_another_leaves_the_log_alone(logged: Logged) -> None:
    await logged.append(10)
    await logged.publisher().publish(logged.ledger_id)
    await logged.append(10)
    async with logged.pool.connection() as signing, signing.transaction():
        await signing.execute("SELECT FROM ledger.logs FOR UPDATE")
        await logged.publisher().publish(logged.ledger_id)
        assert (await logged.published()).size == 10
    await logged.publisher().publish(logged.ledger_id)
    assert (await logged.published()).size == 20


async def test_what_the_standby_has_not_confirmed_is_shown_to_nobody(
    durable_server: EmbeddedServer, tmp_path: Path
) -> None:
    """The server has committed what was signed; a standby that is promoted then would not know of it."""
    database = database_of(durable_server, "muniment")
    async with (
        open_pool(database.worker) as pool,
        await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as owner,
    ):
        keys = LogFiles(tmp_path / "keys")
        async with pool.connection() as connection:
            ledger = await store.create_ledger(connection, "demo", is_foreign=True)
            await tree.add_key(connection, 1, keys.make(1))
        logged = Logged(pool, database, keys, ledger.ledger_id)
        await logged.append(5)
        publisher = logged.publisher()
        await publisher.publish(ledger.ledger_id)
        await logged.append(5)
        await owner.execute("SET synchronous_commit = off")  # this connection waits for no standby
        await reconfigure(owner, "SET synchronous_standby_names = 'nobody'")
        publishing = asyncio.create_task(publisher.publish(ledger.ledger_id))
        await cancel_the_wait(owner)
        with pytest.raises(psycopg.OperationalError, match="the standby has not confirmed"):
            await publishing
        assert logged.row()["size"] == 10
        assert (await logged.published()).size == 5
        assert Checkpoint.parse(Note.parse(keys.last_signed(ledger.ledger_id) or b"").text).size == 5
        await reconfigure(owner, "RESET synchronous_standby_names")
        await publisher.publish(ledger.ledger_id)
        assert (await logged.published()).size == 10


# What was signed is not taken back


async def test_a_database_that_was_put_back_is_refused(logged: Logged, postgres: EmbeddedServer) -> None:
    await logged.append(300)
    await logged.publisher().publish(logged.ledger_id)
    older = f"{logged.database.name}_backup"
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as server:
        await logged.pool.close()
        names = sql.Identifier(older), sql.Identifier(logged.database.name)
        server.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(*names))
        try:
            async with open_pool(logged.database.worker) as pool:
                later = logged._replace(pool=pool)
                await later.append(5)
                await later.publisher().publish(logged.ledger_id)
            async with open_pool(postgres.url("muniment_worker", older)) as pool:
                back = logged._replace(pool=pool)
                for count, why in ((0, "of 305 events was signed, and 300 are there"), (100, "first 305 events are")):
                    if count:  # it grew again meanwhile
                        await back.append(count, b"another")
                    with pytest.raises(Refused, match=f"history was rolled back: .*{why}"):
                        await back.publisher().publish(logged.ledger_id)
                elsewhere = logged.keys.path(1).parent / "signed"
                elsewhere.rename(elsewhere.with_suffix(".away"))
                with pytest.raises(Refused, match="first 305 events are others"):  # and a worker elsewhere knows of it
                    await back.publisher().publish(logged.ledger_id)
                assert (await back.published()).size == 300
                async with pool.connection() as connection:
                    log = await tree.log_of(connection, logged.ledger_id)
                    assert log is not None
                    assert "rolled back" in (log.refused or "")
        finally:
            server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(names[0]))


async def test_what_a_database_only_forgot_to_have_signed_it_signs_again(logged: Logged) -> None:
    """As a standby may that takes over: the events are there, the last commits of the publisher are not."""
    await logged.append(3 * LEAVES_AT_ONCE)
    await logged.publisher().publish(logged.ledger_id)
    kept = logged.keys.last_signed(logged.ledger_id)
    logged.tamper("DELETE FROM ledger.tiles", "DELETE FROM ledger.logs")
    await logged.append(7)
    await logged.publisher().publish(logged.ledger_id)
    assert (await logged.published()).root == root(3 * LEAVES_AT_ONCE + 7)
    assert logged.keys.last_signed(logged.ledger_id) != kept
    assert logged.row()["contradicted_by"] is None


async def test_who_is_wrongly_told_of_another_history_goes_on(logged: Logged) -> None:
    await logged.append(20)
    await logged.publisher().publish(logged.ledger_id)
    logged.tamper("UPDATE ledger.logs SET contradicted_by = signed, refused = 'so it was said'")
    for count in (0, 5):
        await logged.append(count)
        await logged.publisher().publish(logged.ledger_id)
        assert (logged.row()["contradicted_by"], logged.row()["refused"]) == (None, None)


CHANGES = {
    "the last events are gone": (
        "DELETE FROM ledger.events WHERE position > 690",
        "UPDATE ledger.ledgers SET size = 690",
    ),
    "a leaf that is not in a tile yet": ("UPDATE ledger.events SET leaf = sha256('forged') WHERE position = 700",),
    "two events behind the tiles changed places": (
        "UPDATE ledger.events SET position = 1000000 + 698 + 699 - position WHERE position IN (698, 699)",
        "UPDATE ledger.events SET position = position - 1000000 WHERE position > 1000000",
    ),
    "a hash of a tile": ("UPDATE ledger.tiles SET hashes = overlay(hashes placing sha256('forged') from 33)",),
    "a tile is gone": ("DELETE FROM ledger.tiles",),
    "a tile is of less": ("UPDATE ledger.tiles SET hashes = substring(hashes for 32)",),
    "an event that was not integrated is gone": ("DELETE FROM ledger.events WHERE position = 705",),
    "the signature is another's": ("UPDATE ledger.logs SET signed = replace(signed, ' ', '  ')",),
    "another checkpoint was signed": (
        "UPDATE ledger.logs SET signed = 'x' || signed",
        "UPDATE ledger.logs SET signed = substring(signed from 2 for 20)",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
async def test_what_was_changed_behind_its_back_is_not_signed(logged: Logged, what: str) -> None:
    await logged.append(700)
    publisher = logged.publisher()
    await publisher.publish(logged.ledger_id)
    kept = logged.keys.last_signed(logged.ledger_id)
    await logged.append(10)
    logged.tamper(*CHANGES[what])
    for one in (publisher, logged.publisher()):
        with pytest.raises(Refused):
            await one.publish(logged.ledger_id)
    assert logged.keys.last_signed(logged.ledger_id) == kept
    assert logged.row()["refused"]
    logged.tamper("TRUNCATE ledger.logs")  # nothing is left to be checked


async def test_a_tree_rewritten_with_all_that_depends_on_it_is_refused_by_what_lies_beside_the_key(
    logged: Logged,
) -> None:
    """Whoever has the database and the key, but not the worker's files, makes another history of it and signs that."""
    await logged.append(300)
    publisher = logged.publisher()
    await publisher.publish(logged.ledger_id)
    kept = logged.keys.last_signed(logged.ledger_id)
    assert kept is not None
    logged.tamper(
        "UPDATE ledger.events SET leaf = sha256('forged') WHERE position = 7",
        "TRUNCATE ledger.logs",
        "TRUNCATE ledger.tiles",
    )
    forger = LogFiles(logged.keys.path(1).parent)
    path = logged.keys.path(1).parent / "signed" / str(logged.ledger_id)
    path.rename(path.with_suffix(".away"))
    await Publisher(logged.pool, forger).publish(logged.ledger_id)
    path.with_suffix(".away").rename(path)
    for one in (publisher, logged.publisher()):
        with pytest.raises(Refused, match="the first 300 events are others"):
            await one.publish(logged.ledger_id)
    logged.tamper("TRUNCATE ledger.logs")


async def test_what_was_refused_is_published_once_it_is_mended(logged: Logged) -> None:
    await logged.append(300)
    publisher = logged.publisher()
    await publisher.publish(logged.ledger_id)
    logged.tamper("UPDATE ledger.ledgers SET size = 299")
    with pytest.raises(Refused, match="a checkpoint of 300 events was signed, and 299 are there"):
        await publisher.publish(logged.ledger_id)
    assert "299 are there" in logged.row()["refused"]
    logged.tamper("UPDATE ledger.ledgers SET size = 300")
    await publisher.publish(logged.ledger_id)
    assert logged.row()["refused"] is None


async def test_a_ledger_that_is_not_here_is_nothing_to_do(logged: Logged) -> None:
    """Anybody who may send a NOTIFY may name any."""
    nobody = Witnesses(0, (Witness("http://127.0.0.1:9", SignerKey("w", COSIGNATURE, bytes(32)).verifier),))
    async with httpx.AsyncClient(trust_env=False) as http:
        await Publisher(logged.pool, logged.keys, nobody, http).publish(uuid7())


# Keys


async def test_without_a_key_nothing_is_signed_and_it_says_what_to_do(database: Database, tmp_path: Path) -> None:
    async with open_pool(database.worker) as pool:
        async with pool.connection() as connection:
            ledger = await store.create_ledger(connection, "demo", is_foreign=True)
        logged = Logged(pool, database, LogFiles(tmp_path), ledger.ledger_id)
        await logged.append(1)
        with pytest.raises(Refused, match="muniment keys add"):
            await logged.publisher().publish(ledger.ledger_id)
        assert logged.row()["signed"] is None


async def test_two_keys_sign_while_one_follows_the_other(logged: Logged) -> None:
    await logged.append(3)
    await logged.publisher().publish(logged.ledger_id)
    old = Note.parse(logged.row()["published"].encode())
    async with logged.pool.connection() as connection:
        await tree.add_key(connection, 2, logged.keys.make(2))
    await logged.publisher().publish(logged.ledger_id)
    both = Note.parse(logged.row()["published"].encode())
    assert both.text == old.text
    assert both.signatures[0] == old.signatures[0]
    assert len(both.signatures) == 2
    async with logged.pool.connection() as connection:
        first, second = (key.vkey for key in await tree.keys_of(connection, f"localhost/{logged.ledger_id}"))
        await tree.retire_key(connection, 1, NOW)
    assert set(both.verified([first, second])) == {first, second}
    await logged.append(3)
    await logged.publisher().publish(logged.ledger_id)
    after = Note.parse(logged.row()["published"].encode())
    assert set(after.verified([first, second])) == {second}


async def test_a_key_that_is_not_here_yet_is_done_without(logged: Logged, tmp_path: Path) -> None:
    await logged.append(3)
    elsewhere = LogFiles(tmp_path / "elsewhere")
    async with logged.pool.connection() as connection:
        await tree.add_key(connection, 2, elsewhere.make(2))
    await logged.publisher().publish(logged.ledger_id)
    assert logged.row()["signed_by"] == [1]
    elsewhere.path(2).rename(logged.keys.path(2))
    await logged.publisher().publish(logged.ledger_id)
    assert logged.row()["signed_by"] == [1, 2]
    assert (await logged.published()).size == 3


async def test_a_key_that_was_replaced_does_not_sign(logged: Logged, tmp_path: Path) -> None:
    await logged.append(3)
    other = LogFiles(tmp_path / "elsewhere")
    other.make(1)
    other.path(1).replace(logged.keys.path(1))
    with pytest.raises(Refused, match="is not the key 1 that was added"):
        await logged.publisher().publish(logged.ledger_id)
    assert logged.row()["signed"] is None


async def test_where_nothing_can_be_kept_beside_the_keys_it_is_published_and_said(logged: Logged) -> None:
    await logged.append(3)
    publisher = logged.publisher()
    logged.keys.path(1).parent.joinpath("signed").symlink_to("nowhere")
    await publisher.publish(logged.ledger_id)
    assert (await logged.published()).size == 3
    assert "signed" in publisher.unkept
