"""What must be reached, and the table that says whether it was."""

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Literal, TypeAlias

import msgspec

from ops.bench.scale import QUESTIONS, SMALL_EVENTS
from ops.bench.stage import Figures

Results: TypeAlias = Mapping[str, Sequence[Figures] | str]
"""For each measure its rounds, or why there are none."""


class Row(msgspec.Struct, frozen=True):
    """`over` / `under` is to be at least `at_least`, or, of times, at most; without `under` it is `over` alone.

    What is compared is the rate, and of `over` alone the p99, unless `of` says otherwise.
    """

    text: str
    over: str
    under: str | None
    at_least: float | None = None
    aim: float | None = None
    of: Literal["p99_ms", "p95_ms", "seconds", "cpu_us", "rate"] | None = None

    @property
    def compared(self) -> str:
        return self.of or ("p99_ms" if self.under is None else "rate")

    @property
    def is_time(self) -> bool:
        return self.compared != "rate"


PUBLISHED: list[tuple[str, str, float, Literal["cpu_us"] | None]] = [
    ("", "", 0.9, None),
    (", 1,000 events/s: processor time of all processes", "steadily, ", 1.11, "cpu_us"),
]
QUEUES = ("procrastinate", "pgqueuer", "pg-boss")

ROWS = {
    "committer": [
        Row("in process, 32 callers / pgbench, 32 clients", "committer, 32 callers", "pgbench, 32 clients", 1.3, 1.6),
        Row(
            "in process, 32 callers / eventsourcing's stock PostgreSQL application",
            *("committer, 32 callers", "eventsourcing stock, 32 callers", 20, 25),
        ),
        Row(
            "in process, 256 callers / pgbench's own 1,000-row-statement ceiling",
            *("committer, 256 callers", "pgbench, 1,000 rows a statement", 0.45, 0.7),
        ),
        Row("1 caller / pgbench, 1 client", "committer, 1 caller", "pgbench, 1 client", 0.45, 0.6),
    ],
    "replays": [
        Row("10 % replays, young ids / none", "10 % young replays, 32 callers", "no replays, 32 callers", 0.8, 0.9),
        Row("10 % replays, old ids / none", "10 % old replays, 32 callers", "no replays, 32 callers", 0.6, 0.7),
    ],
    "processes": [
        Row("two processes on one ledger / one", "two processes, 16 callers each", "one process, 32 callers", 0.5, 0.8),
    ],
    "http": [
        Row("`POST /commands` / a bare Litestar app's no-op GET", "POST /commands", "GET, bare Litestar", 0.7, 0.85),
        Row("`POST /sessions` / a bare Litestar app's no-op GET", "POST /sessions", "GET, bare Litestar", 0.45, 0.55),
        Row(
            "HTTP, 100 commands a request, commands/s / pgbench rows/s, 32 clients",
            *("POST /commands, 100 a request", "pgbench, 32 clients, servers up", 1.5, 2.1),
        ),
    ],
    "visible": [
        Row("commit to visible in every view, p99 at 2,000 events/s (ms, absolute)", "visible", None, 20, 10),
    ],
    "pending": [
        Row(
            "5,000 pending approvals of 100,000: a page of the slowest list, p99 (ms, absolute)",
            "pending",
            None,
            50,
            20,
        ),
    ],
    "tasks": [
        Row(
            "tasks submitted over HTTP by 32 callers, one a call (a second, absolute)",
            "tasks submitted",
            None,
            1000,
            of="rate",
        ),
        Row(
            "tasks from submitted to completed over HTTP, 100 workers (a second, absolute)",
            "tasks, HTTP",
            None,
            500,
            of="rate",
        ),
        Row(
            "from sending a task until one of 100 waiting workers has it, p95 (ms, absolute)",
            "tasks, all wait",
            None,
            50,
            of="p95_ms",
        ),
        *(Row(f"tasks over HTTP / {peer}", "tasks, HTTP", peer, 1) for peer in QUEUES),
        *(Row(f"tasks in process / {peer}", "tasks, in process", peer, 1) for peer in QUEUES),
    ],
    "agents": [
        Row("119 agents at work, the kind of call that is slowest, p99 (ms, absolute)", "119 agents", None, 100),
        Row("from sending a vote until the agent that waits has it, p99 (ms, absolute)", "decisions", None, 50),
    ],
    "redis": [
        Row("replays of old ids over HTTP, with the Redis copy / without", "replays, Redis copy", "replays, no Redis"),
    ],
    "rebuilding": [
        Row(
            "sessions filled from a million events / a pure-SQL aggregation over jsonb of the same rows",
            *("sessions filled", "sessions by SQL over jsonb", 0.6, 0.8),
        ),
        Row(
            "all views filled, as many at once as there are processors (events a second, absolute)",
            *("all views filled", None, 50_000),
            of="rate",
        ),
        Row(
            "memory of the process that fills, when a quarter is taken / at the end",
            *("MB at a quarter", "MB at the end", 0.9),
        ),
        Row(
            "command p99 at 1,000 events/s while sessions are rebuilt / without",
            *("commands, sessions rebuilt", "commands, nothing rebuilt", 2),
            of="p99_ms",
        ),
        Row(
            "the longest read within half a second of the switch (ms, absolute)",
            *("reads at the switch, the longest", None, 50),
        ),
    ],
    "burst": [
        Row(
            "from the end of a burst until every view has all of it (s, absolute)",
            "backlog of a burst",
            None,
            60,
            of="seconds",
        ),
        Row(
            "commit to visible in every view, p99 at half the sustained rate (ms, absolute)",
            "visible at half the sustained rate",
            None,
            50,
        ),
    ],
    "telemetry": [
        Row("`POST /commands`, scraped every second / not at all", "commands, scraped", "commands, unwatched", 0.94),
        Row("`POST /commands`, traces of 1 % sent / none", "commands, traced", "commands, unwatched", 0.88),
        Row(
            "`POST /commands`, scraped every second / not at all: processor time of the API",
            *("commands, scraped", "commands, unwatched", 1.06),
            of="cpu_us",
        ),
        Row(
            "`POST /commands`, traces of 1 % sent / none: processor time of the API",
            *("commands, traced", "commands, unwatched", 1.14),
            of="cpu_us",
        ),
    ],
    "publishing": [
        *(
            Row(f"appends to {what}{more}", f"{kind}{over}", f"{kind}{under}", goal, of=of)
            for what, over, under in (
                ("one ledger, published / not", "one ledger, published", "one ledger, not published"),
                ("one ledger, cosigned by two / not published", "one ledger, cosigned", "one ledger, not published"),
                ("100 ledgers, published / not", "many ledgers, published", "many ledgers, not published"),
            )
            for more, kind, goal, of in PUBLISHED
        ),
        *(
            Row(f"from commit to covered by a checkpoint, p99 at {load} (ms, absolute)", f"covered, {load}", None, 2000)
            for load in ("2,000 events/s", "100 commands a request")
        ),
    ],
    "proofs": [
        Row("an inclusion proof over HTTP out of the large ledger, p99 (ms, absolute)", "inclusion proof", None, 10),
        Row(
            "events of a mirror verified (a second of one core, absolute)", "mirror verified", None, 100_000, of="rate"
        ),
    ],
    "erasing": [
        Row("an erasure over HTTP, p99 (ms, absolute)", "erasures", None),
        Row("reads of a record, with a sealed value / with none", "records, sealed", "records, plain"),
        Row("reads of a record, with a value that was erased / with none", "records, erased", "records, plain"),
    ],
    "scale": [
        *(
            Row(
                f"{question}: p99 in the large ledger / in the small one",
                *(f"{question}, large", f"{question}, small", 2),
                of="p99_ms",
            )
            for question in QUESTIONS
        ),
        Row("appends to the large ledger / to the small one", "appends, large", "appends, small", 0.8),
    ],
}

NOTES = {
    "tasks": [
        "- tasks: 10,000 that do nothing (fewer in rounds under 3 s), from the first submitted to the last on record",
        "  as completed; 32 submit and 100 work at the same time, all in one process, one job a call; a job handed out",
        "  twice is a failure.",
        "  Over HTTP an API process and a worker with every view run beside them; in process there is neither.",
        "  On the same server, each time in a new database: five of procrastinate's workers with concurrency 20; five",
        "  of pgqueuer's queue managers with batches of one, on asyncpg; 100 loops of pg-boss's fetch and complete,",
        "  for its own worker sleeps after each job, in its last release for Node 20. The Python client: a tenth of",
        "  the tasks, and a client for each who submits or works",
    ],
    "agents": [
        "- agents: each opens a session, submits and claims a task, asks, is answered, uses it, completes and closes,",
        "  again and again without a pause, beside a person who decides; all that was acknowledged is then looked for",
        "  in the ledger",
    ],
    "rebuilding": [
        "- rebuilding: a million events (fewer in rounds under 3 s) in one ledger, views that have taken all of them,",
        "  and a worker; the aggregation is of the same rows as jsonb, made before, into a table without an index; to",
        "  fill is from the request to rebuild until all events are in the build, in the view's own rows, with",
        "  its primary keys; sessions rebuilt is until the switch, with indexes and the comparison with a replay",
    ],
    "burst": [
        "- burst: 100 commands a request on 16 connections for a minute (as long as 20 measurements); the sustained",
        "  rate is what came in it, by the time from its begin until every view had all of it",
    ],
    "telemetry": [
        "- telemetry: one command a request; what is counted is counted in either case, and traces are sent to a",
        "  collector on this machine",
    ],
    "publishing": [
        "- publishing: 32 callers in a process of their own, or one for each of 100 ledgers (fewer in rounds under",
        "  1 s), and a worker with every view; where it does not publish, all else is the same. Processor time is that",
        "  of callers, worker and PostgreSQL for as long, and until views and logs have it all. Two witnesses run on",
        "  this machine too. Covered: from when an event can first be seen, while the views follow as well",
    ],
    "proofs": [
        "- proofs: of a ledger of as many events as --events says, one at a time; the mirror is of as many, or of a",
        "  million where that is less, and what it takes is the processor time of `muniment verify`, from start to end",
    ],
    "scale": [
        f"- the small ledger has {SMALL_EVENTS:,} events (or a tenth of the large one's), the other one as many as",
        "  --events says, and each what the rounds append; a session to five events; over HTTP, one question at a time",
    ],
}
"""What was compared, where the row does not say it."""


def rows(parts: Sequence[str], results: Results) -> list[str]:
    """The promises as a Markdown table: the median of the rounds' ratios, and how far they spread."""
    lines = ["| | measured | lowest - highest | at least | aim | |", "|---|---|---|---|---|---|"]
    for row in (row for part in parts for row in ROWS[part]):
        values = measured(row, results)
        goals = f"{_goal(row, row.at_least)} | {_goal(row, row.aim)}"
        if isinstance(values, str):
            lines.append(f"| {row.text} | {values} | | {goals} | not measured |")
            continue
        middle = median(values)
        spread = f"{_number(min(values))} - {_number(max(values))}"
        lines.append(f"| {row.text} | **{_number(middle)}** | {spread} | {goals} | {_verdict(row, middle)} |")
    return lines


def measured(row: Row, results: Results) -> list[float] | str:
    """The row's value in each round; or why there is none."""
    over = results[row.over]
    under = results[row.under] if row.under else over
    for figures in (over, under):
        if isinstance(figures, str):
            return figures
    assert not isinstance(over, str)
    assert not isinstance(under, str)
    values, others = ([getattr(one, row.compared) or 0.0 for one in rounds] for rounds in (over, under))
    if row.under is None:
        return values
    return [value / other for value, other in zip(values, others, strict=True)]


def _verdict(row: Row, value: float) -> str:
    if row.at_least is None:
        return ""
    sign = -1 if row.is_time else 1
    if row.aim is not None and sign * value >= sign * row.aim:
        return "aim reached"
    return "reached" if sign * value >= sign * row.at_least else "**missed**"


def _goal(row: Row, goal: float | None) -> str:
    if goal is None:
        return ""
    if not row.is_time:
        return f"{goal:g}"
    unit = "" if row.under else " s" if row.compared == "seconds" else " ms"
    return f"at most {goal:g}{unit}"


def figures(results: Results) -> list[str]:
    """What was measured, as a Markdown table: medians of the rounds. CPU is the measured process's own."""
    lines = ["| | a second | lowest - highest | p50 ms | p99 ms | CPU µs each |", "|---|---|---|---|---|---|"]
    for name, rounds in results.items():
        if isinstance(rounds, str):
            lines.append(f"| {name} | {rounds} | | | | |")
            continue
        rates = [one.rate for one in rounds]
        p50 = _middle([one.p50_ms for one in rounds if one.p50_ms])
        p99 = _middle([one.p99_ms for one in rounds if one.p99_ms])
        cpu = _middle([one.cpu_us for one in rounds if one.cpu_us])
        lines.append(
            f"| {name} | {median(rates):,.0f} | {min(rates):,.0f} - {max(rates):,.0f} | {p50} | {p99} | {cpu} |"
        )
    return lines


def _middle(values: list[float]) -> str:
    return _number(median(values)) if values else ""


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def machine(server: Mapping[str, str], directory: Path) -> list[str]:
    """On what it was measured."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    durable = ", ".join(f"{name} = {value}" for name, value in server.items() if name != "server_version")
    return [
        f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"- {os.cpu_count()} cores of {_cpu()}, {memory:.0f} GiB of memory, {platform.system()} {platform.release()},",
        f"  data on {_filesystem(directory)}; everything (load, peers, servers, PostgreSQL) on this one machine",
        f"- Python {platform.python_version()}, PostgreSQL {server['server_version']}: {durable}",
    ]


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _filesystem(directory: Path) -> str:
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "an unknown file system"
    around = [(len(point), kind) for point, kind in mounts if directory.is_relative_to(point)]
    return max(around)[1] if around else "an unknown file system"
