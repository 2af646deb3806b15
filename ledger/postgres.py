"""How Muniment talks to PostgreSQL: pools, named queries, the database's clock, driver errors as ours.

No session state may be set on a connection: a transaction pooler may stand between. What a role needs
is set on the role, by the migrations. SQL lives in `.sql` files beside the module that owns it, and values
are always bound.
"""

import re
import struct
import time
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from importlib.resources import files
from types import SimpleNamespace
from typing import Any, TypeAlias, TypeVar
from uuid import UUID

import psycopg
from psycopg import AsyncConnection
from psycopg.abc import Query
from psycopg.adapt import Dumper
from psycopg.pq import Format
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from ledger.errors import ClockSkew, StoreUnavailable

CLOCK_SKEW_MAX_SECONDS = 2.0
CLOCK_CHECK_SECONDS = 15.0
CLOCK_SET_SECONDS = 0.1


class Connection(AsyncConnection[tuple[Any, ...]]):
    """A connection that remembers being told that a commit did not reach the synchronous standby.

    The server then has committed locally and says so in a warning, not an error; such a commit must not
    be acknowledged as it stands.
    """

    standby_missed = False


P = TypeVar("P", bound="Packed")
Pool: TypeAlias = AsyncConnectionPool[Connection]


def tells_of_missed_standby(notice: psycopg.errors.Diagnostic) -> bool:
    """Known by its place in the server's source, for its text is in the server's language and it has no code."""
    return notice.severity_nonlocalized == "WARNING" and notice.source_function == "SyncRepWaitForLSN"


async def _configure(connection: Connection) -> None:
    def heed(notice: psycopg.errors.Diagnostic) -> None:
        connection.standby_missed |= tells_of_missed_standby(notice)

    connection.add_notice_handler(heed)


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


def _plain(sql: str) -> Query:
    return "\n".join(line for line in sql.splitlines() if line and not line.lstrip().startswith("--")).encode()


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


# Element type and array type of each (pg_type.dat; they never change).
_OIDS: dict[type[Packed], tuple[int, int]] = {
    Uuids: (2950, 2951),
    Texts: (25, 1009),
    Byteas: (17, 1001),
    Smallints: (21, 1005),
    Bigints: (20, 1016),
    Tsvectors: (3614, 3643),
}
_head = struct.Struct(">iiiii").pack
_length = struct.Struct(">i").pack
_smallint = struct.Struct(">ih").pack
_bigint = struct.Struct(">iq").pack


def _pack(cls: type[P], elements: list[bytes]) -> P:
    return cls(_head(1, 1, _OIDS[cls][0], len(elements), 1) + b"".join(elements))


def uuids(values: Iterable[UUID | None]) -> Uuids:
    return _pack(Uuids, [b"\xff\xff\xff\xff" if v is None else b"\0\0\0\x10" + v.bytes for v in values])


def texts(values: Iterable[str]) -> Texts:
    return _pack(Texts, [_length(len(b)) + b for b in [v.encode() for v in values]])


def byteas(values: Iterable[bytes]) -> Byteas:
    return _pack(Byteas, [_length(len(v)) + v for v in values])


def smallints(values: Iterable[int]) -> Smallints:
    return _pack(Smallints, [_smallint(2, v) for v in values])


def bigints(values: Iterable[int]) -> Bigints:
    return _pack(Bigints, [_bigint(8, v) for v in values])


def tsvectors(values: Iterable[Collection[bytes]]) -> Tsvectors:
    """Each some different lexemes without positions: how many, then each closed by a NUL and a count of 0.

    There must be one at least, each of 1 to 2,046 bytes of UTF-8 without a NUL (`tsvectorrecv` in
    src/backend/utils/adt/tsvector.c).
    """
    packed = [_length(len(v)) + b"\0\0\0".join(v) + b"\0\0\0" for v in values]
    return _pack(Tsvectors, [_length(len(b)) + b for b in packed])


def _register(cls: type[Packed], array_oid: int) -> None:
    class PackedDumper(Dumper):
        format = Format.BINARY
        oid = array_oid

        def dump(self, obj: Any) -> bytes:
            return bytes(obj)

    psycopg.adapters.register_dumper(cls, PackedDumper)


for _cls, (_, _array_oid) in _OIDS.items():
    _register(_cls, _array_oid)
