"""A ledger that a restore has rolled back goes on: under another id, with another log, and everybody can see it."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from uuid_utils.compat import uuid7

import ledger.committer
from ledger import publisher, tree
from ledger.adoption import LOG, AdoptLedger
from ledger.checkpoint import Checkpoint, Note, check_checkpoint
from ledger.commands import OpenSession
from ledger.committer import Committer
from ledger.errors import AlreadyExists, InternalError, InvalidTransition, StoreUnavailable
from ledger.postgres import Pool, open_pool
from ledger.publisher import Publisher, Refused
from ledger.signing import LogFiles
from ledger.store import Ledger
from ledger.values import Actor
from ledger.vault import Vault
from projections import VIEWS, audit
from projections.projector import Projector
from tests.check import check_ledger
from tests.conftest import Database
from tests.ops.test_publishing import AGENT, Said, put_back, record
from tests.projections.conftest import deadline

OPERATOR = Actor(issuer="https://id.example", sub="ana", kind="human", assurance="asserted", roles=("operator",))
REASON = "the disk was lost, and the backup was of noon"


async def muniment(*arguments: str, url: str, home: Path) -> Said:
    environment = {"PATH": os.environ["PATH"], "MUNIMENT_HOME": str(home), "DATABASE_URL": url}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "ops.cli", *arguments),
        env={**environment, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return Said(process.returncode or 0, out.decode(), err.decode())


class Node:
    """A process that takes commands, and one that publishes."""

    def __init__(self, pool: Pool, home: Path) -> None:
        self.pool = pool
        self.committer = Committer(pool, Vault(home / "keys", pool, create_keys=True), create_ledgers=True)
        self.publisher = Publisher(pool, LogFiles(home / "keys"))

    async def ledger(self, project: str = "demo") -> Ledger:
        found = await self.committer.ledger(project)
        assert found is not None
        return found

    async def publish(self) -> Checkpoint:
        """What is published then; it is signed by the keys of the log."""
        ledger_id = (await self.ledger()).ledger_id
        await self.publisher.publish(ledger_id)
        async with self.pool.connection() as connection:
            log = await tree.log_of(connection, ledger_id)
            assert log is not None
            keys = [key.vkey for key in await tree.keys_of(connection, log.origin)]
        return check_checkpoint(Note.parse(log.published), keys)

    async def rebuild(self, database: Database) -> None:
        """Have views of what is there."""
        await Projector(self.pool, VIEWS).advance((await self.ledger()).ledger_id)


@asynccontextmanager
async def node(database: Database, home: Path) -> AsyncIterator[Node]:
    async with open_pool(database.worker, connections_max=4) as pool:
        made = Node(pool, home)
        async with pool.connection() as connection:
            await tree.add_key(connection, 1, LogFiles(home / "keys").make(1))
        yield made
        await made.committer.close()


async def rolled_back(one: Node, database: Database) -> tuple[Ledger, Checkpoint]:
    """Its log has signed 300 events, of which 100 are left, and the publisher says so."""
    await record(one.committer, 300)
    before = await one.publish()
    put_back(database, 100)
    with pytest.raises(
        Refused, match="history was rolled back: a checkpoint of 300 events was signed, and 100 are there"
    ):
        await one.publish()
    return await one.ledger(), before


async def test_what_is_left_is_adopted_and_goes_on_under_another_name(database: Database, tmp_path: Path) -> None:
    async with node(database, tmp_path) as one:
        was, before = await rolled_back(one, database)
        said = await muniment("ledger", "adopt", "demo", "--reason", REASON, url=database.worker, home=tmp_path)
        assert said.code == 0, said.err
        await record(one.committer, 5)  # by a process that was there all along
        now = await one.ledger()
        assert (now.ledger_id, now.epoch != was.epoch) == (was.ledger_id, True)
        after = await one.publish()
        assert (after.origin, after.size) == (f"localhost/{now.epoch}", 106)
        await one.rebuild(database)
        async with one.pool.connection() as connection:
            found = await audit.search(connection, now.ledger_id, audit.Filter(), limit=1000)
        assert len(found) == 106, "all of it is found"
        for arguments in (("publish", str(tmp_path / "mirror"), "--project", "demo"), ("verify", "database")):
            said_too = await muniment(*arguments, url=database.worker, home=tmp_path)
            assert said_too.code == 0, said_too
        keys = await muniment("keys", "list", "--project", "demo", url=database.worker, home=tmp_path)
        verified = await muniment(
            *("verify", str(tmp_path / "mirror"), "--key", keys.out.split()[1]), url="", home=tmp_path / "nothing"
        )
    assert verified.code == 0, verified
    assert f"history begins anew at position 101: {before.origin} went before" in verified.out
    history = check_ledger(database.owner)["demo"]
    told: Any = history[100].event
    assert (told.type, told.ledger, told.reason, told.stream_id) == ("LedgerAdopted", now.epoch, REASON, LOG)
    assert (told.data.adopted, told.actor.assurance) == (was.epoch, "asserted")
    assert Checkpoint.parse(Note.parse(told.data.checkpoint.encode()).text) == before
    assert {event.ledger for _, event in history[:100]} == {was.epoch}
    assert {event.ledger for _, event in history[100:]} == {now.epoch}
    assert f"ledger {was.epoch} goes on as {now.epoch}, from position 101 on" in said.out
    assert "the last 200 are lost" in said.out


async def test_a_ledger_may_be_adopted_again(database: Database, tmp_path: Path) -> None:
    names: list[UUID] = []
    async with node(database, tmp_path) as one:
        await rolled_back(one, database)
        for size in (101, 102):
            names.append((await one.ledger()).epoch)
            said = await muniment("ledger", "adopt", "--all", "--reason", REASON, url=database.worker, home=tmp_path)
            assert said.code == 0, said.err
            await record(one.committer, 50)
            assert (await one.publish()).size == size + 50
            if size == 101:
                lose(database, 101)
                with pytest.raises(Refused, match="a checkpoint of 151 events was signed, and 101 are there"):
                    await one.publish()
    history = check_ledger(database.owner)["demo"]
    told: list[Any] = [event.data for _, event in history if event.type == "LedgerAdopted"]
    assert [data.adopted for data in told] == names


def lose(database: Database, size: int) -> None:
    """Put back the events alone, and the log as it was when it had begun over them."""
    with psycopg.connect(database.owner) as owner:
        owner.execute("SET session_replication_role = replica")
        owner.execute("DELETE FROM ledger.events WHERE position > %s", [size])
        owner.execute("DELETE FROM ledger.commands WHERE first_position > %s", [size])
        owner.execute("DELETE FROM ledger.tiles")
        owner.execute(
            "UPDATE ledger.logs SET size = 0, signed = NULL, published_size = 0, published = NULL, published_at = NULL"
        )
        owner.execute("UPDATE ledger.ledgers SET size = %s", [size])


async def test_a_log_that_goes_on_is_not_adopted(database: Database, tmp_path: Path) -> None:
    async with node(database, tmp_path) as one:
        await record(one.committer, 3)
        before = await one.publish()
        said = await muniment("ledger", "adopt", "demo", "--reason", REASON, url=database.worker, home=tmp_path)
        assert (said.code, "nobody says that history was rolled back" in said.err) == (1, True)
        every = await muniment("ledger", "adopt", "--all", "--reason", REASON, url=database.worker, home=tmp_path)
        assert (every.code, "nothing to adopt" in every.out) == (0, True)
        neither = await muniment("ledger", "adopt", "--reason", REASON, url=database.worker, home=tmp_path)
        assert neither.code == 1
        assert await one.publish() == before
    check_ledger(database.owner)


@pytest.mark.parametrize(
    "changes",
    [
        "signed = NULL, published = NULL, published_size = 0, published_at = NULL, origin = 'localhost/another'",
        "signed = NULL, published = NULL, published_size = 0, published_at = NULL",
        "signed = NULL",
    ],
)
async def test_no_other_log_is_put_in_the_place_of_one(database: Database, tmp_path: Path, changes: str) -> None:
    async with node(database, tmp_path) as one:
        await rolled_back(one, database)
        await record(one.committer, 1)
        with psycopg.connect(database.owner) as owner:
            owner.execute("SET session_replication_role = replica")
            owner.execute("UPDATE ledger.logs SET size = 1, signed = contradicted_by")
        for url in (database.worker, database.owner):
            with (
                psycopg.connect(url) as connection,
                pytest.raises(psycopg.errors.InsufficientPrivilege, match="it only grows"),
            ):
                connection.execute(f"UPDATE ledger.logs SET {changes}".encode())
        with psycopg.connect(database.api) as api, pytest.raises(psycopg.errors.InsufficientPrivilege):
            api.execute("UPDATE ledger.ledgers SET epoch = gen_random_uuid()")


async def test_a_log_that_nothing_contradicts_any_more_is_left_as_it_is(database: Database, tmp_path: Path) -> None:
    """An operator looked, and then it was judged anew: all of the adoption is taken back, or none."""
    async with node(database, tmp_path) as one:
        await record(one.committer, 3)
        before, ledger = await one.publish(), await one.ledger()
        adopting = AdoptLedger(ledger=uuid7(), adopted=ledger.epoch, checkpoint="a note", reason=REASON)
        with pytest.raises(InternalError):
            await one.committer.submit("demo", adopting, OPERATOR)
        await record(one.committer, 1)
        after = await one.publish()
        assert (after.origin, after.size) == (before.origin, 4)
    check_ledger(database.owner)


async def test_an_operator_who_means_another_epoch_is_refused(database: Database, tmp_path: Path) -> None:
    async with node(database, tmp_path) as one:
        await rolled_back(one, database)
        adopting = AdoptLedger(ledger=uuid7(), adopted=uuid7(), checkpoint="a note", reason=REASON)
        receipt = await one.committer.submit("demo", adopting, OPERATOR)
        assert isinstance(receipt.refusal, InvalidTransition)
    check_ledger(database.owner)


async def test_what_contradicts_the_log_before_says_nothing_of_the_one_after(
    database: Database, tmp_path: Path
) -> None:
    """A publisher may have waited for a witness while the ledger was adopted."""
    async with node(database, tmp_path) as one:
        was, _ = await rolled_back(one, database)
        note = LogFiles(tmp_path / "keys").last_signed(was.epoch)
        assert note is not None
        await muniment("ledger", "adopt", "demo", "--reason", REASON, url=database.worker, home=tmp_path)
        async with one.pool.connection() as connection:
            late = {"ledger_id": was.ledger_id, "why": "rolled back", "note": note.decode()}
            await connection.execute(publisher.SQL.refuse, late)
        assert (await one.publish()).size == 101
    check_ledger(database.owner)


@pytest.mark.parametrize(
    ("reason", "role", "why"),
    [("", "worker", "the reason"), ("x" * 100_000, "worker", "the reason"), (REASON, "api", "muniment_worker")],
    ids=["no reason", "a long reason", "not the worker"],
)
async def test_what_cannot_be_done_is_said(
    database: Database, tmp_path: Path, reason: str, role: str, why: str
) -> None:
    async with node(database, tmp_path) as one:
        await rolled_back(one, database)
        url = getattr(database, role)
        said = await muniment("ledger", "adopt", "--all", "--reason", reason, url=url, home=tmp_path)
        assert (said.code, why in said.err, "Traceback" in said.err) == (1, True, False), said.err
    assert "LedgerAdopted" not in {event.type for _, event in check_ledger(database.owner)["demo"]}


async def test_nobody_else_begins_the_stream_of_the_log(database: Database, tmp_path: Path) -> None:
    async with node(database, tmp_path) as one:
        receipt = await one.committer.submit("demo", OpenSession(agent_role="a", session_id=LOG), AGENT)
        assert isinstance(receipt.refusal, AlreadyExists)


async def test_a_process_that_only_reads_comes_to_know_the_name(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(database, tmp_path) as one, open_pool(database.worker, connections_max=2) as pool:
        was, _ = await rolled_back(one, database)
        other = Node(pool, tmp_path)
        assert (await other.ledger()).epoch == was.epoch
        await muniment("ledger", "adopt", "demo", "--reason", REASON, url=database.worker, home=tmp_path)
        monkeypatch.setattr(ledger.committer, "LOOK_SECONDS", 0.0)
        with deadline(30) as check:
            while (await other.ledger()).epoch == was.epoch:
                check()
                await asyncio.sleep(0.01)
        await other.committer.close()
    check_ledger(database.owner)


# What a process knows of a history that is no more


async def test_a_process_that_outlives_its_ledger_finds_the_one_that_there_is(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(database, tmp_path) as one:
        await record(one.committer, 3)
        before = await one.ledger()
        put_back(database, 0)
        with psycopg.connect(database.owner) as owner:
            owner.execute("SET session_replication_role = replica")
            owner.execute("DELETE FROM ledger.ledgers")
        monkeypatch.setattr(ledger.committer, "LOOK_SECONDS", 0.0)
        with deadline(60) as check:
            while await one.committer.ledger("demo") is not None:
                check()
                with suppress(StoreUnavailable):
                    await one.committer.submit("demo", OpenSession(agent_role="a"), AGENT)
        await record(one.committer, 3)
        assert (await one.ledger()).ledger_id != before.ledger_id
    check_ledger(database.owner)


@pytest.mark.parametrize("grown", [0, 50, 100, 150], ids="grown by {} events".format)
async def test_a_process_that_outlives_a_restore_decides_on_what_is_there(
    database: Database, tmp_path: Path, grown: int
) -> None:
    """It has seen 200 events, of which 100 are left; another has recorded more since. What it knew of streams, answers
    and sizes is of another history."""
    async with node(database, tmp_path) as one, open_pool(database.worker, connections_max=2) as pool:
        other = Node(pool, tmp_path)
        await record(one.committer, 100)
        lost = OpenSession(agent_role="a", command_id="lost")
        opened = await one.committer.submit("demo", lost, AGENT)
        await record(one.committer, 99)
        put_back(database, 100)
        if grown:
            await record(other.committer, grown)
        await record(one.committer, 7)
        again = await one.committer.submit("demo", OpenSession(agent_role="a", command_id="lost"), AGENT)
        assert (again.replayed, again.status) == (False, 201)
        assert again.state.session_id != opened.state.session_id
        await record(other.committer, 3)
        await other.committer.close()
    history = check_ledger(database.owner)["demo"]
    assert len(history) == 100 + grown + 7 + 1 + 3
