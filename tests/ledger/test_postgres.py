"""How Muniment talks to PostgreSQL: arrays packed by hand, errors said as ours, the database's clock."""

import asyncio
import math
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg_pool import PoolTimeout

from ledger import postgres
from ledger.commands import OpenSession
from ledger.committer import Committer
from ledger.embedded import EmbeddedServer
from ledger.errors import ClockSkew, StoreUnavailable
from ledger.postgres import (
    Clock,
    Pool,
    Statement,
    bigint,
    bigints,
    byteas,
    open_pool,
    queries,
    smallints,
    store_errors,
    texts,
    timestamptz,
    uuids,
)
from ledger.values import Actor, moment
from tests.check import check_ledger
from tests.conftest import Database

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
ARRAYS: list[tuple[str, Callable[[Iterable[Any]], Any], st.SearchStrategy[list[Any]]]] = [
    ("uuid[]", uuids, st.lists(st.none() | st.uuids())),
    ("text[]", texts, st.lists(TEXT)),
    ("bytea[]", byteas, st.lists(st.binary(max_size=50))),
    ("smallint[]", smallints, st.lists(st.integers(-(2**15), 2**15 - 1))),
    ("bigint[]", bigints, st.lists(st.integers(-(2**63), 2**63 - 1))),
]


@pytest.mark.parametrize(("name", "packed", "values"), ARRAYS, ids=[name for name, _, _ in ARRAYS])
def test_an_array_arrives_as_it_was_packed(postgres: EmbeddedServer, name: str, packed: Any, values: Any) -> None:
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:

        @settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
        @given(values)
        def arrives(sent: list[Any]) -> None:
            query = f"SELECT a::text = b::text, pg_typeof(a)::text, b FROM (SELECT %s AS a, %s::{name} AS b) AS x"
            row = connection.execute(query.encode(), [packed(sent), sent]).fetchone()
            assert row == (True, name, sent)

        arrives()
        assert connection.execute("SELECT cardinality(%s)", [packed([])]).fetchone() == (0,)


def test_a_number_that_does_not_fit_is_not_cut() -> None:
    for packed, value in ((smallints, 2**15), (bigints, 2**63)):
        with pytest.raises(struct.error):
            packed([value])


def test_named_queries_are_read_without_their_comments() -> None:
    for name in ("store", "vault", "recorder"):
        for query, text in vars(queries("ledger", name)).items():
            assert text.strip(), query
            assert b"--" not in text


# A statement past psycopg's execute

SIZE = Statement("size", b"SELECT octet_length(%(value)s::bytea)::bigint, %(number)s::bigint, %(time)s::timestamptz")
DIVIDE = Statement("divide", b"SELECT 1 / %(number)s::bigint")


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    async with open_pool(database.api, connections_max=1) as pool:
        yield pool


async def test_a_statement_sends_its_values_packed_and_more_than_a_socket_takes_at_once(pool: Pool) -> None:
    now = datetime.now(UTC)
    async with pool.connection() as connection:
        for length in (0, 20 * 2**20, 1):
            values = {"value": b"x" * length, "number": bigint(-7), "time": timestamptz(now)}
            result = await SIZE.run(connection, values)
            assert [result.get_value(0, i) for i in range(3)] == [bigint(length), bigint(-7), timestamptz(now)]
            cursor = await connection.execute("SELECT %s::timestamptz", [now], binary=True)
            assert cursor.pgresult is not None
            assert cursor.pgresult.get_value(0, 0) == timestamptz(now)


async def test_a_statement_raises_what_execute_would_and_the_connection_goes_on(pool: Pool) -> None:
    async with pool.connection() as connection:
        with pytest.raises(psycopg.errors.DivisionByZero):
            await DIVIDE.run(connection, {"number": bigint(0)})
        assert (await DIVIDE.run(connection, {"number": bigint(1)})).get_value(0, 0) == bigint(1)


async def test_a_statement_outlives_the_rollback_after_which_psycopg_deallocates_it(pool: Pool) -> None:
    async with pool.connection() as connection:
        for _ in range(3):
            await connection.execute("SELECT 1", prepare=True)
            await DIVIDE.run(connection, {"number": bigint(1)})
            with suppress(psycopg.errors.DivisionByZero):
                async with connection.transaction():
                    await DIVIDE.run(connection, {"number": bigint(0)})
            async with connection.transaction():
                await connection.execute("SELECT 1", prepare=True)  # here psycopg sends what it put off
                await DIVIDE.run(connection, {"number": bigint(1)})


async def test_a_cancelled_statement_leaves_no_answer_to_the_next(pool: Pool) -> None:
    sleep = Statement("sleep", b"SELECT pg_sleep(60 * %(number)s::bigint)")

    async def slept() -> None:
        async with pool.connection() as connection:
            await sleep.run(connection, {"number": bigint(0)})
            asleep.set()
            await sleep.run(connection, {"number": bigint(1)})

    asleep = asyncio.Event()
    job = asyncio.create_task(slept())
    await asleep.wait()
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    async with pool.connection() as connection:
        assert (await DIVIDE.run(connection, {"number": bigint(1)})).get_value(0, 0) == bigint(1)


async def test_a_statement_tells_that_the_server_ended_its_connection(pool: Pool, database: Database) -> None:
    async with pool.connection() as connection:
        await DIVIDE.run(connection, {"number": bigint(1)})
        with psycopg.connect(database.owner, autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(%s, 5000)", [connection.info.backend_pid])
        with pytest.raises(psycopg.OperationalError):
            await DIVIDE.run(connection, {"number": bigint(1)})


# Errors


@pytest.mark.parametrize("error", [psycopg.OperationalError("at 10.0.0.7: SELECT x"), PoolTimeout("in 5 s, 10.0.0.7")])
def test_an_error_of_the_driver_is_told_without_its_text(error: Exception) -> None:
    with pytest.raises(StoreUnavailable) as told, store_errors():
        raise error
    assert "10.0.0.7" not in told.value.detail
    assert (told.value.status, told.value.retry_after_seconds) == (503, 1)
    assert told.value.__cause__ is error


@pytest.mark.parametrize("error", [psycopg.errors.UniqueViolation(), psycopg.errors.UndefinedTable(), ValueError()])
def test_an_error_that_trying_again_does_not_mend_is_not_told_as_one_that_does(error: Exception) -> None:
    with pytest.raises(type(error)), store_errors():
        raise error


async def test_a_pool_starts_without_a_server_and_recovers_when_there_is_one(postgres: EmbeddedServer) -> None:
    nowhere = postgres.url(database="not_made_yet")
    async with open_pool(nowhere, connections_max=2) as pool:
        with pytest.raises(StoreUnavailable), store_errors():
            async with pool.connection(timeout=0.5):
                pass
        with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
            connection.execute("CREATE DATABASE not_made_yet TEMPLATE template0")
            try:
                async with asyncio.timeout(20), pool.connection(timeout=20) as made:
                    assert made.autocommit
                    assert (await (await made.execute("SELECT 1")).fetchone()) == (1,)
            finally:
                await pool.close()
                connection.execute("DROP DATABASE not_made_yet WITH (FORCE)")


async def test_each_role_has_what_it_needs_without_any_session_state(database: Database) -> None:
    shown: dict[str, tuple[Any, ...]] = {}
    for conninfo in (database.api, database.worker):
        async with await psycopg.AsyncConnection.connect(conninfo) as connection:
            row = await (
                await connection.execute(
                    """SELECT current_user, current_setting('jit'), current_setting('plan_cache_mode'),
                       current_setting('idle_in_transaction_session_timeout'), current_setting('statement_timeout')"""
                )
            ).fetchone()
            assert row is not None
            shown[row[0]] = row[1:]
    assert shown["muniment_api"] == ("off", "force_generic_plan", "10s", "30s")
    assert shown["muniment_worker"][0] == "off"


# The clock


def lying(database: Database, seconds: float) -> None:
    """Have every new connection of the API find a clock that is so far off, before the true one."""
    with psycopg.connect(database.owner, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA IF NOT EXISTS lies")
        connection.execute("GRANT USAGE ON SCHEMA lies TO muniment_api")
        connection.execute(
            f"""CREATE OR REPLACE FUNCTION lies.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
                RETURN pg_catalog.clock_timestamp() + interval '{seconds} s'"""
        )
        connection.execute(
            f"ALTER ROLE muniment_api IN DATABASE {database.name} SET search_path = lies, pg_catalog, public"
        )


async def measured(pool: Pool) -> Clock:
    clock = Clock()
    async with pool.connection() as connection:
        await clock.measure(connection)
    assert not clock.stale
    return clock


@pytest.mark.parametrize("seconds", [0, 1.5, -1.5])
async def test_the_time_is_the_databases(database: Database, seconds: float) -> None:
    lying(database, seconds)
    async with open_pool(database.api, connections_max=1) as pool:
        clock = await measured(pool)
    assert math.isclose((clock.now() - datetime.now(UTC)).total_seconds(), seconds, abs_tol=0.2)
    assert clock.now().tzinfo is UTC


@pytest.mark.parametrize("seconds", [2.5, -2.5, 86400])
async def test_a_clock_more_than_2_seconds_off_is_not_used(database: Database, seconds: float) -> None:
    lying(database, seconds)
    async with open_pool(database.api, connections_max=1) as pool:
        clock = await measured(pool)
    with pytest.raises(ClockSkew) as error:
        clock.now()
    assert math.isclose(error.value.params["offset_seconds"], seconds, abs_tol=0.2)
    assert (error.value.status, error.value.recorded) == (503, False)


async def test_under_a_lying_clock_nothing_is_recorded_until_it_is_mended(
    committer: Committer, pool: Pool, agent: Actor, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await committer.submit("demo", OpenSession(agent_role="finance"), agent)
    lying(database, 3600)
    await pool.drain()  # a role's settings are read when a connection is made
    monkeypatch.setattr(postgres, "CLOCK_CHECK_SECONDS", 0.0)  # so that it looks again at once
    for _ in range(5):
        with pytest.raises(ClockSkew):
            await committer.submit("demo", OpenSession(agent_role="finance", command_id="later"), agent)
    lying(database, 0)
    await pool.drain()
    later = await committer.submit("demo", OpenSession(agent_role="finance", command_id="later"), agent)
    assert (first.first_position, later.first_position, later.replayed) == (1, 2, False)
    history = check_ledger(database.owner)["demo"]
    assert all(abs(time.time() - moment(event.recorded_at).timestamp()) < 60 for _, event in history)


@pytest.mark.parametrize("step_seconds", [-600, 600])
async def test_a_clock_that_is_set_never_reaches_the_ledger(
    committer: Committer, agent: Actor, database: Database, monkeypatch: pytest.MonkeyPatch, step_seconds: float
) -> None:
    """The clock of this node is set while commands come in, and later set right again."""

    async def opened(times: int) -> None:
        for _ in range(times):
            await committer.submit("demo", OpenSession(agent_role="finance"), agent)

    await opened(6)
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() + step_seconds)
    with pytest.raises(ClockSkew):
        await opened(3)  # what was counted from before is still true; then it is noticed
    monkeypatch.undo()
    await opened(3)
    history = check_ledger(database.owner)["demo"]
    assert 9 <= len(history) <= 11
    assert all(abs(true() - moment(event.recorded_at).timestamp()) < 60 for _, event in history)
