"""What a large ledger costs those who read and append: the same questions to a small one and to a large one.

Both are filled by commands, and their views by a worker. As a program of the bench it asks one question, one at a time;
told: port, token, url, project, seconds, and which question.
"""

import asyncio
import gc
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from urllib.parse import quote
from uuid import UUID

import psycopg
import uvloop
from msgspec import Struct
from msgspec.structs import replace

from ledger import store
from ledger.events import SessionOpened
from ledger.postgres import Connection, open_pool
from ledger.values import moment, stamp
from ops.bench import approvals, mix, serving
from ops.bench.caller import connect
from ops.bench.committing import committing, summary
from ops.bench.serving import PROJECT, Server, settled
from ops.bench.stage import Figures, Measure, Stage, answer, kept_stage, run, told, wait_for_word

SMALL_EVENTS = 100_000
AGENTS = [replace(mix.AGENT, sub=f"agent-{number}") for number in range(1000)]
EVENTS_AN_APPROVAL = 100
CALLERS = 256
APPENDERS = 32
FILLED_SECONDS_MAX = 4 * 3600
KNOWN_EVENTS = 2000
PAGE = 20


class Known(Struct):
    """What a reader has heard of: some of what is in the ledger, from all of it. A ticket's number is a word of its own
    session's opening only."""

    session_ids: list[UUID]
    tickets: list[str]
    times: list[str]


def _some_session(known: Known, chance: random.Random) -> str:
    return f"/sessions/{chance.choice(known.session_ids)}"


def _by_time(known: Known, chance: random.Random) -> str:
    since = chance.choice(known.times)
    until = stamp(moment(since) + timedelta(minutes=1))
    return f"/events?since={quote(since)}&until={quote(until)}&limit={PAGE}"


QUESTIONS: dict[str, Callable[[Known, random.Random], str]] = {
    "a session by its id": _some_session,
    "the first page of sessions": lambda known, chance: f"/sessions?page_size={PAGE}",
    "the first page of pending approvals": lambda known, chance: f"/approvals?state=pending&limit={PAGE}",
    "audit by actor": lambda known, chance: f"/events?actor={chance.choice(AGENTS).sub}&order=desc&limit={PAGE}",
    "audit by time": _by_time,
    "audit search for a rare word": lambda known, chance: (
        f"/audit/search?q={chance.choice(known.tickets)}&limit={PAGE}"
    ),
}
"""Of each, what is asked for is drawn anew every time."""


@contextmanager
def scale(stage: Stage) -> Iterator[dict[str, Measure]]:
    """A small ledger and a large one, each with an API process and a worker. What is appended to the one as to the
    other also stays there, so that both are read as what is being written is: the latest pages are never tidy."""
    with ExitStack() as ends:
        home = ends.enter_context(kept_stage(stage.keep, stage.seconds)) if stage.keep else stage
        databases = {"small": home.new_database(), "large": kept(home, f"events_{stage.events}")}
        for database, events in (
            (databases["small"], min(SMALL_EVENTS, stage.events // 10)),
            (databases["large"], stage.events),
        ):
            ends.enter_context(serving.worker(home, database))
            filled(home, database, events)
        servers = {size: ends.enter_context(serving.api(home, database)) for size, database in databases.items()}
        measures: dict[str, Measure] = {
            f"{question}, {size}": partial(_ask, home, servers[size], database, question)
            for question in QUESTIONS
            for size, database in databases.items()
        }
        yield measures | {f"appends, {size}": partial(_append, home, database) for size, database in databases.items()}


def _ask(stage: Stage, server: Server, database: str, question: str) -> Figures:
    settled(stage, database)
    told = {"token": server.token, "url": stage.api(database), "project": PROJECT}
    return server.meet("scale", **told, seconds=stage.seconds, question=question)[0]


def _append(stage: Stage, database: str) -> Figures:
    settled(stage, database)
    told = {"url": stage.api(database), "keys": str(stage.keys), "project": PROJECT, "callers": APPENDERS}
    (figures,) = run(("committing", told | {"seconds": stage.seconds, "replays": 0.0, "old": False}))
    del figures["replayed"]
    return Figures(**figures)


# Filling


def kept(stage: Stage, database: str) -> str:
    """The database of that name: what an earlier run left, as it is, or a new one."""
    with psycopg.connect(stage.server.url()) as connection:
        there = connection.execute("SELECT FROM pg_database WHERE datname = %s", [database]).rowcount
    return stage.migrated(database) if there else stage.new_database(database)


def filled(stage: Stage, database: str, events: int) -> None:
    """Have a ledger of so many events, all in the views, and the planner know. What is there is gone on with."""
    if (size := stage.size(database, PROJECT)) >= events:
        return
    begun = time.monotonic()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)  # as in the API's process: else a third of the time went into looking for cycles
    uvloop.run(fill(stage.api(database), str(stage.keys), size, events))
    settled(stage, database, FILLED_SECONDS_MAX)
    with psycopg.connect(stage.owner(database), autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")
    print(f"{events - size:,} events in {time.monotonic() - begun:,.0f} s", file=sys.stderr, flush=True)


async def fill(url: str, keys: str, size: int, events: int) -> None:
    """Approvals, one in twenty of them pending; then the mix, by a thousand agents, in sessions that do not expire."""
    if not size:
        await approvals.fill(url, keys, PROJECT, events // EVENTS_AN_APPROVAL)
    async with committing(url, keys) as committer:
        ledger = await committer.ledger(PROJECT)
        assert ledger is not None
        units = enumerate(itertools.islice(mix.units(), max(0, events - ledger.size) // mix.UNIT_COMMANDS + 1))

        async def call() -> None:
            for number, (opened, *others) in units:
                unit = [replace(opened, expires_at=approvals.EXPIRY), *others]
                for verdict in await committer.submit_all(PROJECT, unit, AGENTS[number % len(AGENTS)]):
                    refusal = verdict if isinstance(verdict, Exception) else verdict.refusal
                    if refusal is not None:
                        raise refusal

        await asyncio.gather(*(call() for _ in range(CALLERS)))


# Asking


async def look_around(connection: Connection, project: str) -> Known:
    """Something of everything, from anywhere in the ledger."""
    ledger = await store.find_ledger(connection, project)
    assert ledger is not None
    chance = random.Random(7)  # noqa: S311  (the same in every run)
    positions = sorted({chance.randint(1, ledger.size) for _ in range(KNOWN_EVENTS)})
    events = [row.decode().event for row in await store.read_positions(connection, ledger.ledger_id, positions)]
    opened = [event.data for event in events if isinstance(event.data, SessionOpened)]
    tickets = [str(session.metadata["ticket"]).partition("-")[2] for session in opened if session.metadata]
    return Known(
        session_ids=[event.session_id for event in events if event.session_id is not None],
        tickets=[number for number in tickets if int(number) >= len(AGENTS)] or tickets,  # below, agents have it too
        times=[event.recorded_at for event in events],
    )


async def main(port: int, token: str, url: str, project: str, seconds: float, question: str) -> None:
    async with open_pool(url, 1) as pool, pool.connection() as connection:
        known = await look_around(connection, project)
    caller = await connect(port, token)
    ask, chance, taken_ms = QUESTIONS[question], random.Random(11), list[float]()  # noqa: S311  (as above)
    await caller.ask("GET", ask(known, chance))
    wait_for_word()
    begun = time.perf_counter()
    while (now := time.perf_counter()) < begun + seconds:
        await caller.ask("GET", ask(known, chance))
        taken_ms.append((time.perf_counter() - now) * 1000)
    took = time.perf_counter() - begun
    caller.close()
    answer(**summary(taken_ms, took), sent=len(taken_ms))


if __name__ == "__main__":
    asyncio.run(main(**told()))
