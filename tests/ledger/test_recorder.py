"""eventsourcing's own test cases on our tables, and what they do not ask: bytes, refusals, lost commits."""

import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, ClassVar
from unittest import TestCase
from urllib.parse import quote
from uuid import UUID, uuid4

import msgspec
import psycopg
import pytest
from eventsourcing import persistence
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from eventsourcing.persistence import StoredEvent
from eventsourcing.projection import ApplicationSubscription
from eventsourcing.tests import persistence as theirs
from psycopg_pool import ConnectionPool
from uuid_utils.compat import uuid7

from ledger import store
from ledger.embedded import EmbeddedServer
from ledger.entry import ENTRY_BYTES_MAX, Event, encode
from ledger.events import SessionAnnotated
from ledger.merkle import leaf_hash
from ledger.recorder import Connection, LedgerAggregateRecorder, LedgerRecorder, open_pool
from ledger.values import SYSTEM
from tests.conftest import Database


@pytest.fixture
def pool(database: Database) -> Iterator[ConnectionPool[Connection]]:
    with open_pool(database.api) as pool:
        yield pool


@pytest.fixture
def recorder(pool: ConnectionPool[Connection]) -> LedgerRecorder:
    return LedgerRecorder(pool, "theirs", create=True)


def stored(originator_id: UUID, version: int, state: bytes = b"state", topic: str = "topic") -> StoredEvent:
    return StoredEvent(originator_id, version, topic, state)


# Their cases, as they are.


class OnALedger(TestCase):
    recorder_class: type[LedgerAggregateRecorder] = LedgerRecorder

    @pytest.fixture(autouse=True)
    def _ledger(self, pool: ConnectionPool[Connection], database: Database) -> Iterator[None]:
        self._pool = pool
        yield
        check_ledgers(database)

    def create_recorder(self) -> Any:
        return self.recorder_class(self._pool, "theirs", create=True)


class TestAggregateRecorder(OnALedger, theirs.AggregateRecorderTestCase):
    recorder_class = LedgerAggregateRecorder


class TestApplicationRecorder(OnALedger, theirs.ApplicationRecorderTestCase[LedgerRecorder]):
    def test_insert_subscribe(self) -> None:
        self.optional_test_insert_subscribe()


class TestNonInterleavingNotificationIds(OnALedger, theirs.NonInterleavingNotificationIDsBaseCase):
    pass


def check_ledgers(database: Database) -> None:
    """Positions dense, sizes right, every leaf the hash of its entry."""
    with psycopg.connect(database.owner) as connection:
        rows = connection.execute(
            "SELECT l.size, count(e.position), coalesce(max(e.position), 0),"
            " bool_and(e.leaf = sha256('\\x00'::bytea || e.entry)) FROM ledger.ledgers l"
            " LEFT JOIN ledger.events e USING (ledger_id) GROUP BY l.ledger_id"
        ).fetchall()
    for size, events, last, leaves_match in rows:
        assert size == events == last
        assert leaves_match is not False


# The bytes.


def test_the_entry_binds_everything_the_library_was_told(recorder: LedgerRecorder, database: Database) -> None:
    originator_id = uuid4()
    recorder.insert_events([stored(originator_id, 0, b"\x00\xff", "app:Opened"), stored(originator_id, 1)])
    with psycopg.connect(database.api) as connection:
        rows = connection.execute(
            "SELECT entry, leaf, stream_version, type FROM ledger.events ORDER BY position"
        ).fetchall()
    entry = msgspec.json.decode(rows[0][0])
    assert entry["data"] == {"state": "AP8="}
    assert entry["type"] == "app:Opened" == rows[0][3]
    assert entry["stream_id"] == str(originator_id)
    assert entry["stream_version"] == 1 == rows[0][2]
    assert entry["stream_type"] == "aggregate"
    assert entry["project"] == "theirs"
    assert entry["ledger"] == str(recorder.ledger_id)
    assert entry["actor"] == {
        "issuer": "eventsourcing", "sub": "eventsourcing", "kind": "service", "assurance": "asserted",
    }  # fmt: skip
    assert entry["command_id"] == msgspec.json.decode(rows[1][0])["command_id"]
    assert rows[0][0] == msgspec.json.encode(entry, order="sorted")
    assert rows[0][1] == hashlib.sha256(b"\x00" + rows[0][0]).digest()


def test_times_never_go_back_even_if_the_clock_does(recorder: LedgerRecorder, database: Database) -> None:
    future = "2099-01-01T00:00:00.000000Z"
    with psycopg.connect(database.owner) as connection:
        connection.execute("UPDATE ledger.ledgers SET last_recorded_at = %s", [future])
    recorder.insert_events([stored(uuid4(), 1)])
    with psycopg.connect(database.api) as connection:
        row = connection.execute("SELECT entry FROM ledger.events").fetchone()
    assert row is not None
    assert msgspec.json.decode(row[0])["recorded_at"] == future


@pytest.mark.parametrize("size", [0, 1, ENTRY_BYTES_MAX * 3 // 4 - 1000, ENTRY_BYTES_MAX, 2_000_000])
def test_a_state_of_any_size_comes_back_as_it_was(recorder: LedgerRecorder, database: Database, size: int) -> None:
    originator_id, state = uuid4(), bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    recorder.insert_events([stored(originator_id, 1), stored(originator_id, 2, state), stored(originator_id, 3)])
    assert [e.state for e in recorder.select_events(originator_id)] == [b"state", state, b"state"]
    assert [n.state for n in recorder.select_notifications(2, 1)] == [state]
    with psycopg.connect(database.api) as connection:
        beside = connection.execute("SELECT position FROM ledger.payloads").fetchall()
    assert beside == ([(2,)] if size >= ENTRY_BYTES_MAX else [])
    check_ledgers(database)


# Whose ledger it is.


def append_natively(database: Database, project_id: str, text: str) -> tuple[UUID, bytes]:
    """One event as Muniment writes it, large enough here and there to stand beside its entry."""
    ledger_id, session_id, now = uuid7(), uuid7(), "2026-11-21T09:00:00.000000Z"
    with psycopg.connect(database.api) as connection:
        new = {"ledger_id": ledger_id, "project_id": project_id, "is_foreign": False}
        connection.execute(store.SQL.create_ledger, new)
        written = Event(
            v=1, project=project_id, ledger=ledger_id, event_id=uuid7(), stream_type="session",
            stream_id=session_id, stream_version=1, type="SessionAnnotated", schema_version=1, occurred_at=now,
            recorded_at=now, actor=SYSTEM, command_id="c", correlation_id="c", data=SessionAnnotated(text=text),
        )  # fmt: skip
        entry, payload = encode(written)
        connection.execute(
            "INSERT INTO ledger.events VALUES (%s, 1, %s, 1, 'SessionAnnotated', %s, %s)",
            [ledger_id, session_id, entry, leaf_hash(entry)],
        )
        if payload is not None:
            connection.execute("INSERT INTO ledger.payloads VALUES (%s, 1, %s)", [ledger_id, payload])
        connection.execute("UPDATE ledger.ledgers SET size = 1 WHERE ledger_id = %s", [ledger_id])
    return session_id, msgspec.json.encode(written, order="sorted")


@pytest.mark.parametrize("text", ["seen", "long " * 20_000])
def test_a_native_ledger_is_read_as_our_types_and_whole_entries(
    pool: ConnectionPool[Connection], database: Database, text: str
) -> None:
    session_id, whole = append_natively(database, "ours", text)
    recorder = LedgerRecorder(pool, "ours")
    expected = persistence.Notification(session_id, 1, "SessionAnnotated", whole, id=1)
    assert recorder.select_notifications(None, 10) == [expected]
    assert recorder.select_events(session_id) == [StoredEvent(session_id, 1, "SessionAnnotated", whole)]
    assert recorder.select_events(session_id, gt=1) == []
    assert recorder.max_notification_id() == 1


def test_a_native_ledger_is_never_written_to(pool: ConnectionPool[Connection], database: Database) -> None:
    append_natively(database, "ours", "seen")
    recorder = LedgerRecorder(pool, "ours", create=True)
    with pytest.raises(persistence.ProgrammingError, match="only read it"):
        recorder.insert_events([stored(uuid4(), 1)])
    assert recorder.max_notification_id() == 1


def test_a_ledger_stays_foreign_for_life(recorder: LedgerRecorder, database: Database) -> None:
    assert recorder.is_foreign
    with psycopg.connect(database.api) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("UPDATE ledger.ledgers SET is_foreign = false")


def test_a_project_without_a_ledger_is_named(pool: ConnectionPool[Connection]) -> None:
    with pytest.raises(persistence.ProgrammingError, match="project nobody has no ledger"):
        LedgerRecorder(pool, "nobody")
    with pytest.raises(msgspec.ValidationError):
        LedgerRecorder(pool, "No Project", create=True)


def test_two_projects_do_not_see_each_other(pool: ConnectionPool[Connection]) -> None:
    one, other = (LedgerRecorder(pool, name, create=True) for name in ("one", "other"))
    originator_id = uuid4()
    assert one.insert_events([stored(originator_id, 1)]) == [1]
    assert other.insert_events([stored(originator_id, 1), stored(originator_id, 2)]) == [1, 2]
    assert len(one.select_events(originator_id)) == 1
    assert other.max_notification_id() == 2


# What cannot be recorded.


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (StoredEvent("customer-1", 1, "t", b""), persistence.DataError),
        (StoredEvent(UUID(int=1), -1, "t", b""), persistence.DataError),
        (StoredEvent(UUID(int=1), 1, "nul\0", b""), persistence.DataError),
    ],
)
def test_what_a_ledger_cannot_hold_is_refused_and_nothing_is_written(
    recorder: LedgerRecorder, wrong: StoredEvent, error: type[Exception]
) -> None:
    with pytest.raises(error):
        recorder.insert_events([stored(uuid4(), 1), wrong])
    assert recorder.max_notification_id() is None


def test_tracking_is_refused_rather_than_forgotten(recorder: LedgerRecorder) -> None:
    with pytest.raises(persistence.NotSupportedError):
        recorder.insert_events([stored(uuid4(), 1)], tracking=persistence.Tracking("upstream", 1))
    assert recorder.max_notification_id() is None


# Trouble.


class Cut:
    """A wire to the server that breaks at the next commit, as `at_commit` says."""

    def __init__(self, directory: Path, server: Path) -> None:
        self.directory, self._server = directory, server
        self.at_commit: Callable[[socket.socket, socket.socket, bytes], None] | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / server.name))
        self._listener.listen()
        self._threads = [Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def armed(self) -> bool:
        return self.at_commit is not None

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._threads.append(Thread(target=self._connect, args=(client,)))
                self._threads[-1].start()

    def _connect(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server:
            server.connect(str(self._server))
            back = Thread(target=self._carry, args=(server, client, False))
            back.start()
            self._carry(client, server, True)
            back.join()

    def _carry(self, one: socket.socket, other: socket.socket, outward: bool) -> None:
        with suppress(OSError):
            while words := one.recv(65536):
                if outward and b"COMMIT" in words and self.at_commit is not None:
                    last, self.at_commit = self.at_commit, None
                    last(one, other, words)
                    break
                other.sendall(words)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def cut(postgres: EmbeddedServer) -> Iterator[Cut]:
    with TemporaryDirectory() as directory:  # a socket's path must be short
        wire = Cut(Path(directory), next(postgres.socket_directory.glob(".s.PGSQL.*[0-9]")))
        yield wire
        wire.close()


@pytest.fixture
def far_recorder(cut: Cut, postgres: EmbeddedServer, database: Database) -> Iterator[LedgerRecorder]:
    """A recorder at the other end of the wire."""
    through = database.api.replace(quote(str(postgres.socket_directory), safe=""), quote(str(cut.directory), safe=""))
    with open_pool(through) as pool:
        yield LedgerRecorder(pool, "theirs", create=True)


def test_a_commit_that_was_never_heard_is_done_again(cut: Cut, far_recorder: LedgerRecorder) -> None:
    originator_id = uuid4()
    cut.at_commit = lambda client, server, words: None
    assert far_recorder.insert_events([stored(originator_id, 1), stored(originator_id, 2)]) == [1, 2]
    assert not cut.armed
    assert far_recorder.max_notification_id() == 2


def test_a_commit_whose_answer_was_lost_is_found_and_not_done_again(cut: Cut, far_recorder: LedgerRecorder) -> None:
    originator_id = uuid4()

    def unheard(client: socket.socket, server: socket.socket, words: bytes) -> None:
        client.shutdown(socket.SHUT_RDWR)
        server.sendall(words)

    cut.at_commit = unheard
    assert far_recorder.insert_events([stored(originator_id, 1), stored(originator_id, 2)]) == [1, 2]
    assert not cut.armed
    assert far_recorder.max_notification_id() == 2
    assert [e.originator_version for e in far_recorder.select_events(originator_id)] == [1, 2]


def test_whoever_came_first_meanwhile_is_a_conflict_even_with_the_same_content(
    cut: Cut, far_recorder: LedgerRecorder, pool: ConnectionPool[Connection]
) -> None:
    same = [stored(uuid4(), 1)]
    near_recorder = LedgerRecorder(pool, "theirs")

    def overtaken(client: socket.socket, server: socket.socket, words: bytes) -> None:
        server.shutdown(socket.SHUT_RDWR)  # its transaction ends, and the lock with it
        near_recorder.insert_events(same)

    cut.at_commit = overtaken
    with pytest.raises(persistence.IntegrityError):
        far_recorder.insert_events(same)
    assert near_recorder.max_notification_id() == 1


def test_a_commit_the_standby_did_not_confirm_is_not_acknowledged(durable_server: EmbeddedServer) -> None:
    """The server commits locally, says so in a warning, and the standby may be promoted without it."""
    waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"

    def seen(tried: "Future[None]") -> Any:
        return owner.execute(waiting).fetchone() or tried.done()

    def is_gone(pid: Any) -> bool:
        return bool(owner.execute(waiting).fetchone() != pid)

    with (
        psycopg.connect(durable_server.url(), autocommit=True) as owner,
        open_pool(durable_server.url("muniment_api")) as pool,
        ThreadPoolExecutor() as threads,
    ):
        recorder = LedgerRecorder(pool, "theirs", create=True)
        owner.execute("SET synchronous_commit = off")  # this connection waits for no standby
        owner.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        owner.execute("SELECT pg_reload_conf()")
        while True:  # the server takes its time to heed that
            tried = threads.submit(commit, durable_server.url())
            pid = until(partial(seen, tried))
            if pid is not True:
                owner.execute("SELECT pg_cancel_backend(%s)", pid)
                tried.result(30)
                break
        answer = threads.submit(recorder.insert_events, [stored(uuid4(), 1)])
        for _ in range(2):  # the insert, then the look-up that asks whether it is safe by now
            pid = until(lambda: owner.execute(waiting).fetchone())
            owner.execute("SELECT pg_cancel_backend(%s)", pid)
            until(partial(is_gone, pid))
        assert not answer.done()
        owner.execute("ALTER SYSTEM RESET synchronous_standby_names")
        owner.execute("SELECT pg_reload_conf()")
        assert answer.result(30) == [1]
        assert recorder.max_notification_id() == 1


def commit(conninfo: str) -> None:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("SELECT pg_logical_emit_message(true, 'a commit', '')")


def until(condition: Callable[[], Any]) -> Any:
    """What `condition` answers once it is true; a server's own state can only be asked for."""
    deadline = time.monotonic() + 30
    while not (answer := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return answer


# An application that runs on it.


class Dog(Aggregate):
    @event("Registered")
    def __init__(self, name: str) -> None:
        self.name = name
        self.tricks: list[str] = []

    @event("TrickLearned")
    def learn(self, trick: str) -> None:
        self.tricks.append(trick)


class Kennel(Application[UUID]):
    snapshotting_intervals: ClassVar = {Dog: 3}

    def register(self, name: str) -> UUID:
        dog = Dog(name)
        self.save(dog)
        return dog.id

    def teach(self, dog_id: UUID, *tricks: str) -> None:
        dog: Dog = self.repository.get(dog_id)
        for trick in tricks:
            dog.learn(trick)
        self.save(dog)


@pytest.fixture
def environment(database: Database) -> dict[str, str]:
    return {
        "PERSISTENCE_MODULE": "ledger.recorder",
        "DATABASE_URL": database.api,
        "LEDGER_PROJECT": "kennel",
        "LEDGER_CREATE": "yes",
        "IS_SNAPSHOTTING_ENABLED": "yes",
    }


def test_an_eventsourcing_application_runs_on_a_ledger(environment: dict[str, str], database: Database) -> None:
    with Kennel(environment) as kennel:
        fido = kennel.register("Fido")
        kennel.teach(fido, "roll over", "play dead", "fetch")
        kennel.teach(kennel.register("Rex"), "sit")
    with Kennel(environment) as kennel:  # another process, later
        dog: Dog = kennel.repository.get(fido)
        assert (dog.name, dog.tricks, dog.version) == ("Fido", ["roll over", "play dead", "fetch"], 4)
        assert kennel.snapshots is not None
        assert [s.originator_version for s in kennel.snapshots.get(fido)] == [3]
        section = kennel.notification_log["1,10"]
        assert [item.id for item in section.items] == [1, 2, 3, 4, 5, 6]
        assert section.items[1].topic.endswith("Dog.TrickLearned")
        stale: Dog = kennel.repository.get(fido)
        kennel.teach(fido, "bow")
        stale.learn("beg")
        with pytest.raises(persistence.IntegrityError):
            kennel.save(stale)
    check_ledgers(database)


def test_a_projection_follows_the_application_while_it_runs(environment: dict[str, str]) -> None:
    with Kennel(environment) as kennel, ApplicationSubscription(kennel) as subscription:
        fido = kennel.register("Fido")
        names = [type(next(subscription)[0]).__qualname__]
        kennel.teach(fido, "sit")  # woken by what is committed while it waits
        happened, tracking = next(subscription)
        names.append(type(happened).__qualname__)
    assert names == ["Dog.Registered", "Dog.TrickLearned"]
    assert tracking.notification_id == 2


def test_a_factory_says_what_it_lacks(database: Database) -> None:
    with pytest.raises(persistence.InfrastructureFactoryError, match="LEDGER_PROJECT"):
        Kennel({"PERSISTENCE_MODULE": "ledger.recorder", "DATABASE_URL": database.api})
