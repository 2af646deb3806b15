"""The store as an eventsourcing recorder: that library's applications, projections and tools over our tables.

It writes only to ledgers marked foreign for life, whose events are opaque to Muniment, and reads any.
Notification id = position. It keeps the store's discipline: the ledger's row is locked to commit, so
positions are dense and in commit order; no table is locked and none is created (migrations/ does that).
The one sync module: nothing of Muniment's own may write through it, and it must not know a rule.

A foreign event's entry is format 1 like any other (ledger/events.py), so the leaf binds all of it: `type` is
the library's topic, `data` is {"state": <the stored bytes, base64>}, the actor is who the application says it
is, and all events of one insert share a `command_id`. A state too large for an entry stands beside it.
`stream_version` is the originator version plus one, for theirs may be 0.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from threading import Thread
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID

import msgspec
import psycopg
from eventsourcing import persistence
from eventsourcing.persistence import Notification, StoredEvent, TrackingRecorder
from eventsourcing.utils import retry, strtobool
from msgspec import Struct
from psycopg_pool import ConnectionPool
from uuid_utils.compat import uuid7

from ledger import store
from ledger.commands import ProjectId
from ledger.entry import Event, encode, whole
from ledger.merkle import leaf_hash
from ledger.postgres import bigints, byteas, queries, tells_of_missed_standby, texts, uuids
from ledger.values import Actor, stamp

SQL = queries("ledger", "recorder")

ATTEMPTS_MAX = 10
ATTEMPT_PAUSE_SECONDS = 0.2
POLL_SECONDS = 0.1
BIGINT_MAX = 2**63 - 1
NO_TRACKING = "A ledger keeps no tracking records: keep them with the view they are of"


class Connection(psycopg.Connection[tuple[Any, ...]]):
    """Remembers being told that a commit did not reach the synchronous standby (see ledger/postgres.py)."""

    standby_missed = False


Pool: TypeAlias = ConnectionPool[Connection]


class Opaque(Struct, frozen=True):
    """What an event of a foreign ledger holds; only its application can read it."""

    state: bytes


class Row(NamedTuple):
    position: int
    stream_id: UUID
    stream_version: int
    type: str
    entry: bytes
    payload: bytes | None


_decoder = msgspec.json.Decoder(Event[Opaque])
_again = retry((persistence.InterfaceError, persistence.OperationalError), ATTEMPTS_MAX, ATTEMPT_PAUSE_SECONDS)


def open_pool(conninfo: str, connections_max: int = 10) -> Pool:
    """Connections for recorders; a context manager. Opens without a server and waits 30 s for one when used."""

    def configure(connection: Connection) -> None:
        def heed(notice: psycopg.errors.Diagnostic) -> None:
            connection.standby_missed |= tells_of_missed_standby(notice)

        connection.add_notice_handler(heed)
        if _is_pooled(connection):
            connection.prepare_threshold = None

    return ConnectionPool(
        conninfo,
        connection_class=Connection,
        kwargs={"autocommit": True},
        configure=configure,
        min_size=1,
        max_size=connections_max,
        open=True,
    )


def _is_pooled(connection: psycopg.Connection[Any]) -> bool:
    """As in ledger/postgres.py: then nothing is prepared, and nothing listened to."""
    return connection.execute("SELECT pg_backend_pid()", prepare=False).fetchone() != (connection.info.backend_pid,)


class LedgerAggregateRecorder(persistence.AggregateRecorder):
    """The streams of one project's ledger, for what has no order of its own beyond them, such as snapshots.

    `create` makes the ledger, foreign, where the project has none. Raises ProgrammingError without one.
    `application` is recorded as the actor of what is inserted.
    """

    def __init__(
        self, pool: Pool, project_id: str, *, create: bool = False, application: str = "eventsourcing"
    ) -> None:
        self._pool = pool
        self._project_id = msgspec.convert(project_id, ProjectId)
        self._actor = Actor(issuer="eventsourcing", sub=application, kind="service", assurance="asserted")
        with self._connection() as connection:
            if create:
                new = {"ledger_id": uuid7(), "project_id": project_id, "is_foreign": True}
                connection.execute(store.SQL.create_ledger, new)
            row = connection.execute(store.SQL.find_ledger, {"project_id": project_id}).fetchone()
        if row is None:
            raise persistence.ProgrammingError(f"The project {project_id} has no ledger: have it made (create=True)")
        self.ledger_id: UUID = row[0]
        self.is_foreign: bool = row[1]

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Sequence[int] | None:
        """Append all of the events or none. Raises IntegrityError where a version is taken, ProgrammingError
        on a ledger that is not foreign, DataError for an originator id that is no UUID or a version below 0."""
        self._insert(stored_events, kwargs)
        return None

    @_again
    def select_events(
        self,
        originator_id: UUID | str,
        *,
        gt: int | None = None,
        lte: int | None = None,
        desc: bool = False,
        limit: int | None = None,
    ) -> Sequence[StoredEvent]:
        """A stream's events, with gt < version <= lte. Of a native ledger: topic is our type, state the whole event."""
        shift = 1 if self.is_foreign else 0
        values = {
            "stream_id": _stream_id(originator_id),
            "after": -1 if gt is None else gt + shift,
            "until": BIGINT_MAX if lte is None else lte + shift,
            "limit": limit,
        }
        rows = self._read(SQL.read_stream_backwards if desc else SQL.read_stream, values)
        return [StoredEvent(*self._theirs(row)) for row in rows]

    def _insert(self, stored_events: Sequence[StoredEvent], options: dict[str, Any]) -> Sequence[int] | None:
        """The positions. A commit whose answer was lost is found again by its command id: never done twice,
        never reported as a conflict."""
        if options.get("tracking") is not None:
            raise persistence.NotSupportedError(NO_TRACKING)
        if not stored_events:
            return None
        command_id = str(uuid7())
        with _their_errors():
            for attempt in count(1):
                try:
                    return self._append_once(command_id, stored_events, again=attempt > 1)
                except (psycopg.OperationalError, psycopg.InterfaceError):
                    # It may have been committed, or be about to be. Trying again waits for the same row lock, so
                    # one of the two comes second, and that one meets the unique index.
                    if attempt == ATTEMPTS_MAX:
                        raise
                    time.sleep(ATTEMPT_PAUSE_SECONDS)
        raise AssertionError("unreachable")

    def _append_once(self, command_id: str, stored_events: Sequence[StoredEvent], *, again: bool) -> Sequence[int]:
        try:
            return self._append(command_id, stored_events)
        except psycopg.errors.UniqueViolation:
            positions = self._find(command_id, stored_events) if again else None
            if positions is None:
                raise
            return positions

    def _append(self, command_id: str, stored_events: Sequence[StoredEvent]) -> Sequence[int]:
        with self._pool.connection() as connection:
            with connection.transaction():
                seen, recorded_at = self._lock(connection)
                rows = [
                    self._row(command_id, position, recorded_at, event)
                    for position, event in enumerate(stored_events, seen + 1)
                ]
                beside = [(row.position, row.payload) for row in rows if row.payload is not None]
                connection.execute(
                    SQL.append,
                    {
                        "ledger_id": self.ledger_id,
                        "seen": seen,
                        "event_count": len(rows),
                        "recorded_at": recorded_at,
                        "streams": uuids(row.stream_id for row in rows),
                        "versions": bigints(row.stream_version for row in rows),
                        "types": texts(row.type for row in rows),
                        "entries": byteas(row.entry for row in rows),
                        "leaves": byteas(leaf_hash(row.entry) for row in rows),
                        "positions": bigints(position for position, _ in beside),
                        "payloads": byteas(payload for _, payload in beside),
                    },
                    prepare=True,
                )
            _heed_standby(connection)
            # Committed. Dying here loses only the hint; whoever listens also polls.
            connection.execute(SQL.announce, {"ledger_id": self.ledger_id}, prepare=True)
        return list(range(seen + 1, seen + 1 + len(rows)))

    def _find(self, command_id: str, stored_events: Sequence[StoredEvent]) -> Sequence[int] | None:
        """Where the events of this command are, if it is they that took the place of `stored_events`."""
        first = stored_events[0]
        where = {
            "ledger_id": self.ledger_id,
            "stream_id": first.originator_id,
            "after": first.originator_version,
            "until": first.originator_version + 1,
            "limit": 1,
        }
        with self._pool.connection() as connection:
            with connection.transaction():
                self._lock(connection)
                rows = connection.execute(SQL.read_stream, where).fetchall()
            _heed_standby(connection)
        for position, *_, entry, payload in rows:
            if _decoder.decode(whole(entry, payload)).command_id == command_id:
                return list(range(position, position + len(stored_events)))
        return None

    def _lock(self, connection: Connection) -> tuple[int, datetime]:
        row = connection.execute(SQL.lock, {"ledger_id": self.ledger_id}, prepare=True).fetchone()
        assert row is not None
        is_foreign, seen, now = row
        if not is_foreign:
            raise persistence.ProgrammingError(
                f"The ledger of project {self._project_id} is Muniment's own, and eventsourcing may only read it: "
                "record through Muniment's API, or use another project, whose ledger is foreign"
            )
        return seen, now

    def _row(self, command_id: str, position: int, recorded_at: datetime, event: StoredEvent) -> Row:
        stream_id = _stream_id(event.originator_id)
        if event.originator_version < 0:
            raise persistence.DataError(f"The originator version {event.originator_version} is below 0")
        entry, payload = encode(
            Event(
                v=1,
                project=self._project_id,
                ledger=self.ledger_id,
                event_id=uuid7(),
                stream_type="aggregate",
                stream_id=stream_id,
                stream_version=event.originator_version + 1,
                type=event.topic,
                schema_version=1,
                occurred_at=stamp(recorded_at),
                recorded_at=stamp(recorded_at),
                actor=self._actor,
                command_id=command_id,
                correlation_id=command_id,
                data=Opaque(event.state),
            )
        )
        return Row(position, stream_id, event.originator_version + 1, event.topic, entry, payload)

    def _theirs(self, row: Row) -> tuple[UUID, int, str, bytes]:
        text = whole(row.entry, row.payload)
        if not self.is_foreign:
            return row.stream_id, row.stream_version, row.type, text
        return row.stream_id, row.stream_version - 1, row.type, _decoder.decode(text).data.state

    def _read(self, sql: Any, values: dict[str, Any]) -> list[Row]:
        with self._connection() as connection:
            cursor = connection.execute(sql, {"ledger_id": self.ledger_id, **values}, prepare=True, binary=True)
            return [Row(*row) for row in cursor.fetchall()]

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        with _their_errors(), self._pool.connection() as connection:
            yield connection


class LedgerRecorder(LedgerAggregateRecorder, persistence.ApplicationRecorder):
    """One project's ledger as an application's sequence: the notification id is the position, dense from 1."""

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Sequence[int] | None:
        return self._insert(stored_events, kwargs)

    @_again
    def select_notifications(
        self,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
    ) -> Sequence[Notification]:
        after = 0 if start is None else start - 1 if inclusive_of_start else start
        until = BIGINT_MAX if stop is None else stop
        types = texts(topics) if topics else None
        rows = self._read(SQL.read_ledger, {"after": after, "until": until, "types": types, "limit": limit})
        return [Notification(*self._theirs(row), id=row.position) for row in rows]

    @_again
    def max_notification_id(self) -> int | None:
        with self._connection() as connection:
            row = connection.execute(store.SQL.head, {"ledger_id": self.ledger_id}, prepare=True).fetchone()
        assert row is not None
        return row[0] or None

    def subscribe(self, gt: int | None = None, topics: Sequence[str] = ()) -> "LedgerSubscription":
        return LedgerSubscription(self, gt, topics)

    def listen(self) -> psycopg.Connection[Any]:
        """A connection of the caller's own that hears of appends. Behind a pooler it hears nothing."""
        assert isinstance(self._pool.conninfo, str)
        connection = psycopg.connect(self._pool.conninfo, autocommit=True)
        if not _is_pooled(connection):
            connection.execute(SQL.listen)
        return connection


class LedgerSubscription(persistence.ListenNotifySubscription[LedgerRecorder]):
    """Notifications as they are committed: woken by NOTIFY, and polling ten times a second as the net."""

    def __init__(self, recorder: LedgerRecorder, gt: int | None, topics: Sequence[str]) -> None:
        super().__init__(recorder, gt, topics)
        self._listener = Thread(target=self._listen)
        self._listener.start()

    def __exit__(self, *args: object, **kwargs: Any) -> None:
        try:
            super().__exit__(*args, **kwargs)
        finally:
            self._listener.join()

    def _listen(self) -> None:
        wake = self._has_been_notified.set
        ledger_id = str(self._recorder.ledger_id)
        while not self._has_been_stopped:
            try:
                with self._recorder.listen() as connection:
                    while not self._has_been_stopped:
                        wake()
                        for notice in connection.notifies(timeout=POLL_SECONDS):
                            if ledger_id in notice.payload:
                                wake()
            except psycopg.OperationalError:
                # The reader meets the same trouble and says so if it lasts; this thread only wakes it.
                wake()
                time.sleep(POLL_SECONDS)


class Factory(persistence.InfrastructureFactory[TrackingRecorder]):
    """`PERSISTENCE_MODULE=ledger.recorder` gives an eventsourcing application a ledger.

    `DATABASE_URL`: as the role muniment_api. `LEDGER_PROJECT`: whose ledger. `LEDGER_CREATE` (default no): make it
    where there is none. Snapshots, if enabled, go to the ledger of a project of their own,
    `<LEDGER_PROJECT>-snapshots`: they too are kept for ever.
    """

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self._project_id = self._required("LEDGER_PROJECT")
        self._pool = open_pool(self._required("DATABASE_URL"))

    def application_recorder(self) -> LedgerRecorder:
        return LedgerRecorder(self._pool, self._project_id, **self._options())

    def aggregate_recorder(self, purpose: str = "events") -> LedgerAggregateRecorder:
        return LedgerAggregateRecorder(self._pool, f"{self._project_id}-{purpose}", **self._options())

    def tracking_recorder(self, tracking_recorder_class: type[TrackingRecorder] | None = None) -> TrackingRecorder:
        raise persistence.NotSupportedError(NO_TRACKING)

    def process_recorder(self) -> persistence.ProcessRecorder:
        raise persistence.NotSupportedError(NO_TRACKING)

    def close(self) -> None:
        self._pool.close()

    def _required(self, name: str) -> str:
        value = self.env.get(name)
        if not isinstance(value, str) or not value:
            raise persistence.InfrastructureFactoryError(f"{name} is not set: ledger.recorder needs it")
        return value

    def _options(self) -> dict[str, Any]:
        create = strtobool(self.env.get("LEDGER_CREATE") or "no")
        return {"create": create, "application": self.env.name or "eventsourcing"}


def _stream_id(originator_id: UUID | str) -> UUID:
    if not isinstance(originator_id, UUID):
        raise persistence.DataError(f"The originator id {originator_id!r} is no UUID, and a ledger's streams are UUIDs")
    return originator_id


def _heed_standby(connection: Connection) -> None:
    """A commit that did not reach the standby is one whose outcome is unknown."""
    if connection.standby_missed:
        connection.standby_missed = False
        raise psycopg.OperationalError("the commit was not confirmed by the synchronous standby")


@contextmanager
def _their_errors() -> Iterator[None]:
    """The driver's errors as the library's: both carry the names of PEP 249."""
    try:
        yield
    except psycopg.Error as error:
        names = (cls.__name__ for cls in type(error).__mro__)
        kind = next((getattr(persistence, name) for name in names if hasattr(persistence, name)), None)
        raise (kind or persistence.PersistenceError)(str(error)) from error
