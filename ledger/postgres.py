"""How Muniment talks to PostgreSQL: pools, named queries, the database's clock, driver errors as ours.

No session state may be set on a connection: a transaction pooler may stand between, and hand the next transaction to
another connection of the server. What a role needs is set on the role, by the migrations; a pooler is noticed, and then
nothing is prepared. SQL lives in `.sql` files beside the module that owns it, and values are always bound.
"""

import asyncio
import itertools
import re
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from types import SimpleNamespace
from typing import Any, TypeAlias, TypeVar, cast
from uuid import UUID

import psycopg
from psycopg import AsyncConnection, AsyncTransaction
from psycopg.abc import Query
from psycopg.adapt import Dumper, Transformer
from psycopg.pq import ExecStatus, Format
from psycopg.pq.abc import PGconn, PGresult
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from ledger.errors import ClockSkew, StoreUnavailable

KEYS_CONNECTIONS_MAX = 4

CLOCK_SKEW_MAX_SECONDS = 2.0
CLOCK_CHECK_SECONDS = 15.0
CLOCK_SET_SECONDS = 0.1


class Connection(AsyncConnection[tuple[Any, ...]]):
    """A connection that remembers being told that a commit did not reach the synchronous standby.

    The server then has committed locally and says so in a warning, not an error; such a commit must not
    be acknowledged as it stands.
    """

    standby_missed = False
    prepared: Mapping["Statement", bytes] = {}
    """The `Statement`s that the server knows on this connection, by what name."""

    @asynccontextmanager
    async def transaction(self, *args: Any, **kwargs: Any) -> AsyncIterator[AsyncTransaction]:
        """psycopg's. After a ROLLBACK that deallocates its own prepared statements, and ours with them."""
        try:
            async with super().transaction(*args, **kwargs) as transaction:
                yield transaction
        except BaseException:
            self.prepared = {}
            raise


P = TypeVar("P", bound="Packed")
Pool: TypeAlias = AsyncConnectionPool[Connection]


def tells_of_missed_standby(notice: psycopg.errors.Diagnostic) -> bool:
    """Known by its place in the server's source, for its text is in the server's language and it has no code."""
    return notice.severity_nonlocalized == "WARNING" and notice.source_function == "SyncRepWaitForLSN"


async def _configure(connection: Connection) -> None:
    def heed(notice: psycopg.errors.Diagnostic) -> None:
        connection.standby_missed |= tells_of_missed_standby(notice)

    connection.add_notice_handler(heed)
    if await is_pooled(connection):
        connection.prepare_threshold = None


async def is_pooled(connection: AsyncConnection[Any]) -> bool:
    """Whether a pooler answers in the server's place, so that the next transaction may be on another connection.

    A pooler gives its clients numbers of its own to cancel by, in place of that of the server's process (PostgreSQL,
    "Message Flow", BackendKeyData). Whether it bears prepared statements and LISTEN nobody could find out but by luck:
    while nobody else is there, each transaction comes to the same connection. So neither is used behind one.
    """
    row = await (await connection.execute("SELECT pg_backend_pid()", prepare=False)).fetchone()
    return row != (connection.info.backend_pid,)


@asynccontextmanager
async def open_pool(conninfo: str, connections_max: int = 8) -> AsyncGenerator[Pool]:
    """A pool that starts without a server and recovers by itself when one appears."""
    pool: Pool = AsyncConnectionPool(
        conninfo,
        connection_class=Connection,
        kwargs={"autocommit": True, "connect_timeout": 5},
        configure=_configure,
        min_size=min(2, connections_max),
        max_size=connections_max,
        timeout=5.0,
        reconnect_timeout=10.0,
        open=False,
    )
    await pool.open(wait=False)
    try:
        yield pool
    finally:
        await pool.close(timeout=5.0)


@asynccontextmanager
async def open_keys_pool(conninfo: str | None, pool: Pool) -> AsyncGenerator[Pool]:
    """Where the data keys are: a database of their own, if there is one, or that of `pool`.

    Never its connections: who erases asks for the keys while it holds one of those, and as many erasures as there are
    connections would wait for each other.
    """
    assert isinstance(pool.conninfo, str)
    async with open_pool(conninfo or pool.conninfo, KEYS_CONNECTIONS_MAX) as keys:
        yield keys


TROUBLE = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.InternalError)
"""The database's own trouble, nobody's command: lost connections, a server that only reads (SQLSTATE class 25)."""


@contextmanager
def store_errors() -> Iterator[None]:
    """Say a driver's error as StoreUnavailable, without its text: that may hold SQL or an address."""
    try:
        yield
    except PoolTimeout as error:
        raise StoreUnavailable(why="No database connection was to be had within 5 s") from error
    except TROUBLE as error:
        raise StoreUnavailable(why="The database did not answer, or not as one that can be written") from error


def queries(package: str, name: str) -> Any:
    """The named queries of `<package>/<name>.sql`: each begins with a `-- name:` line."""
    text = files(package).joinpath(f"{name}.sql").read_text("utf-8")
    parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)[1:]
    return SimpleNamespace(**{key: _plain(sql) for key, sql in zip(parts[::2], parts[1::2], strict=True)})


async def fetch(connection: Connection, query: Any, **values: Any) -> list[tuple[Any, ...]]:
    """The rows of a query. Raises psycopg's errors."""
    return await (await connection.execute(query, values)).fetchall()


def _plain(sql: str) -> Query:
    return "\n".join(line for line in sql.splitlines() if line and not line.lstrip().startswith("--")).encode()


class Statement:
    """One statement of the hot path, whose values are packed already, past psycopg's `execute`.

    That converts, prepares and waits in Python, which costs more than deciding what an append writes. This is
    libpq's extended query as it stands, prepared once a connection (libpq, "Asynchronous Command Processing"), or
    each time anew where psycopg is to prepare nothing either. The SQL says the type of every value, as a cast.
    Cancelled while it waits, it leaves a busy connection, which the pool throws away.
    """

    def __init__(self, name: str, sql: bytes) -> None:
        self._name = name.encode()
        self._values = list(dict.fromkeys(_NAMED.findall(sql)))
        self._sql = _NAMED.sub(lambda match: b"$%d" % (self._values.index(match[1]) + 1), sql)
        self._formats = [Format.BINARY] * len(self._values)
        self._keys = [name.decode() for name in self._values]

    async def run(self, connection: Connection, values: Mapping[str, bytes | None]) -> PGresult:
        """The result, in binary form. Raises psycopg's errors."""
        pgconn = connection.pgconn
        given = [values[key] for key in self._keys]
        if connection.prepare_threshold is None:
            pgconn.send_query_params(self._sql, given, None, self._formats, Format.BINARY)
            return await _result(pgconn)
        name = connection.prepared.get(self)
        if name is None:
            name = b"%b_%d" % (self._name, next(_numbers))  # nobody says whether an older one is still there
            pgconn.send_prepare(name, self._sql)
            await _result(pgconn)
            connection.prepared = {**connection.prepared, self: name}
        pgconn.send_query_prepared(name, given, self._formats, Format.BINARY)
        return await _result(pgconn)

    async def fetch(self, connection: Connection, values: Mapping[str, bytes | None]) -> list[tuple[Any, ...]]:
        """The rows, as psycopg reads them. Raises psycopg's errors."""
        return _rows(await self.run(connection, values))

    def fetch_blocking(self, connection: Connection, values: Mapping[str, bytes | None]) -> list[tuple[Any, ...]]:
        """The same, for a thread of its own: it waits in libpq, and takes what is large from the server while this
        process thinks, not a few kilobytes whenever there are some."""
        pgconn = connection.pgconn
        given = [values[key] for key in self._keys]
        if connection.prepare_threshold is None:
            result = pgconn.exec_params(self._sql, given, None, self._formats, Format.BINARY)
        else:
            name = connection.prepared.get(self)
            if name is None:
                name = b"%b_%d" % (self._name, next(_numbers))
                _succeeded(pgconn.prepare(name, self._sql))
                connection.prepared = {**connection.prepared, self: name}
            result = pgconn.exec_prepared(name, cast("Any", given), self._formats, Format.BINARY)
        return _rows(_succeeded(result))


_numbers = itertools.count()
_NAMED = re.compile(rb"%\((\w+)\)s")


async def _result(pgconn: PGconn) -> PGresult:
    """The result of the one statement that was sent."""
    loop = asyncio.get_running_loop()
    while pgconn.flush():  # more than the socket takes at once; what the server says meanwhile must be read
        await _until(loop.add_writer, loop.remove_writer, pgconn.socket)
        pgconn.consume_input()
    results: list[PGresult] = []
    while True:
        while pgconn.is_busy():
            await _until(loop.add_reader, loop.remove_reader, pgconn.socket)
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:
            break
        results.append(result)
    return _succeeded(results[-1])


def _succeeded(result: PGresult) -> PGresult:
    if result.status not in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
        raise psycopg.errors.error_from_result(result)
    return result


def _rows(result: PGresult) -> list[tuple[Any, ...]]:
    reader = Transformer()
    reader.set_pgresult(result)
    return reader.load_rows(0, result.ntuples, tuple)


async def _until(watch: Any, unwatch: Any, socket: int) -> None:
    """Return when the socket is ready."""
    ready = asyncio.get_running_loop().create_future()
    watch(socket, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        unwatch(socket)


class Clock:
    """This process's idea of the database's time.

    Several nodes write one ledger, so they must agree on the time; the database's is the one they share.
    `now` costs no query: the offset is measured now and then, and in between time is counted by the clock
    that nobody sets. A time from the future, once recorded, would hold up the ledger's until it has come.
    """

    def __init__(self) -> None:
        self._offset_seconds = 0.0
        self._monotonic_offset_seconds = time.time() - time.monotonic()
        self._measured_at = float("-inf")

    def now(self) -> datetime:
        """The time, aware. Raises ClockSkew where this node's clock is not to be trusted."""
        if abs(self._offset_seconds) > CLOCK_SKEW_MAX_SECONDS:
            raise ClockSkew(offset_seconds=round(self._offset_seconds, 1))
        return datetime.fromtimestamp(time.monotonic() + self._monotonic_offset_seconds, UTC)

    @property
    def stale(self) -> bool:
        """Whether it is time to measure: also when this node's clock was set, or slept, since it was measured."""
        elapsed = time.monotonic() - self._measured_at
        set_by = time.time() + self._offset_seconds - time.monotonic() - self._monotonic_offset_seconds
        return elapsed > CLOCK_CHECK_SECONDS or abs(set_by) > CLOCK_SET_SECONDS

    async def measure(self, connection: Connection) -> None:
        """Compare with the database; of three tries, the quickest answer says most."""
        tries: list[tuple[float, float]] = []
        for _ in range(3):
            before = time.time()
            row = await (await connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8")).fetchone()
            after = time.time()
            assert row is not None
            tries.append((after - before, row[0] - (before + after) / 2))
        self._offset_seconds = min(tries)[1]
        self._measured_at = time.monotonic()
        self._monotonic_offset_seconds = time.time() + self._offset_seconds - self._measured_at


class Packed(bytes):
    """A one-dimensional PostgreSQL array in its binary form, packed by hand.

    psycopg's own list dumper costs more than the rest of an append together. Layout: number of dimensions,
    has-nulls flag, element type, length, lower bound, then each element as its length and its bytes; a null
    is the length -1 (PostgreSQL, `array_recv` in src/backend/utils/adt/arrayfuncs.c).
    """


class Uuids(Packed): ...


class Texts(Packed): ...


class Byteas(Packed): ...


class Smallints(Packed): ...


class Bigints(Packed): ...


class Tsvectors(Packed): ...


class Timestamptzs(Packed): ...


# Element type and array type of each (pg_type.dat; they never change).
_OIDS: dict[type[Packed], tuple[int, int]] = {
    Uuids: (2950, 2951),
    Texts: (25, 1009),
    Byteas: (17, 1001),
    Smallints: (21, 1005),
    Bigints: (20, 1016),
    Timestamptzs: (1184, 1185),
    Tsvectors: (3614, 3643),
}
_NULL = b"\xff\xff\xff\xff"
_head = struct.Struct(">iiiii").pack
_length = struct.Struct(">i").pack
_smallint = struct.Struct(">ih").pack
_bigint = struct.Struct(">iq").pack


def uuid(value: UUID) -> bytes:
    """One uuid, packed for a `Statement`."""
    return value.bytes


def bigint(value: int) -> bytes:
    """One bigint, packed."""
    return value.to_bytes(8, "big", signed=True)


def timestamptz(moment: datetime) -> bytes:
    """One timestamptz, packed: microseconds since 2000 (`timestamptz_recv`)."""
    return bigint((moment - _EPOCH) // _MICROSECOND)


_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def _pack(cls: type[P], elements: list[bytes]) -> P:
    return cls(_head(1, 1, _OIDS[cls][0], len(elements), 1) + b"".join(elements))


def uuids(values: Iterable[UUID | None]) -> Uuids:
    return _pack(Uuids, [_NULL if v is None else b"\0\0\0\x10" + v.bytes for v in values])


def texts(values: Iterable[str]) -> Texts:
    return _pack(Texts, [_length(len(b)) + b for b in [v.encode() for v in values]])


def byteas(values: Iterable[bytes | None]) -> Byteas:
    return _pack(Byteas, [_NULL if v is None else _length(len(v)) + v for v in values])


def smallints(values: Iterable[int]) -> Smallints:
    return _pack(Smallints, [_smallint(2, v) for v in values])


def timestamptzs(values: Iterable[datetime | None]) -> Timestamptzs:
    return _pack(Timestamptzs, [_NULL if v is None else b"\0\0\0\x08" + timestamptz(v) for v in values])


def bigints(values: Iterable[int]) -> Bigints:
    return _pack(Bigints, [_bigint(8, v) for v in values])


def _register(cls: type[Packed], array_oid: int) -> None:
    class PackedDumper(Dumper):
        format = Format.BINARY
        oid = array_oid

        def dump(self, obj: Any) -> bytes:
            return bytes(obj)

    psycopg.adapters.register_dumper(cls, PackedDumper)


for _cls, (_, _array_oid) in _OIDS.items():
    _register(_cls, _array_oid)
