"""What a process counts while it works, in the form that Prometheus reads.

Plain numbers, added up a batch at a time by whoever does the work; Prometheus' library is met only when somebody
asks for them. They begin at nothing with the process. No project, person or id is ever a label: what is counted is
the same for a thousand tenants, and tells nothing about one.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from ledger.entry import Recorded
from ledger.errors import MunimentError
from ledger.pending import Pending, Verdict
from ledger.postgres import Pool
from ledger.receipt import Receipt
from ledger.tracing import Tracing

if TYPE_CHECKING:
    from prometheus_client import Metric

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of what is measured in seconds."""

COMMANDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Upper bounds of the size of a batch."""

Labels = TypeVar("Labels", bound=tuple[str, ...])
"""Their values, in the order in which they are named."""


class Histogram:
    """How many values were at most each of `bounds`, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Commits:
    """What became of the commands of this process, and what their commits took."""

    def __init__(self, tracing: Tracing | None = None) -> None:
        self.tracing = tracing
        self.commands: Counter[tuple[str, str]] = Counter()
        self.latency = Histogram()
        self.batch = Histogram(COMMANDS)
        self.commit = Histogram()
        self.replays = 0
        self.events = 0
        self.redecided = 0

    @asynccontextmanager
    async def committing(self, pendings: Sequence[Pending]) -> AsyncGenerator[None]:
        """Measure one append, from asking for a connection to hearing that it is durable, or that it missed."""
        began = monotonic()
        span = self.tracing and self.tracing.commit([p.span for p in pendings if p.span is not None])
        try:
            yield
        finally:
            self.commit.add(monotonic() - began)
            self.batch.add(len(pendings))
            if span:
                span.set_attribute("muniment.batch.commands", len(pendings))
                span.end()

    def answered(self, verdicts: Iterable[tuple[Pending, Verdict]]) -> None:
        """Count the commands that are being answered now."""
        now = monotonic()
        commands, latency = self.commands, self.latency
        for pending, verdict in verdicts:
            error: MunimentError | None
            if isinstance(verdict, Receipt):
                error = verdict.refusal
                self.replays += verdict.replayed
            else:
                error = verdict
            code = "ok" if error is None else error.code
            commands[type(pending.command).__name__, code] += 1
            latency.add(now - pending.since)
            if pending.span is not None:
                assert self.tracing is not None
                self.tracing.answered(pending, code, verdict)

    def families(self) -> Iterator["Metric"]:
        yield counter("muniment_commands", "Commands that were answered.", self.commands, "type", "code")
        yield histogram("muniment_command_seconds", "From taking a command in to its answer.", {(): self.latency})
        yield counter("muniment_replays", "Commands answered again, as the ledger has them.", {(): self.replays})
        yield counter("muniment_events", "Events that were recorded.", {(): self.events})
        yield histogram("muniment_batch_commands", "Commands that were sent in one transaction.", {(): self.batch})
        yield histogram("muniment_commit_seconds", "One append, with its wait for a connection.", {(): self.commit})
        yield counter(
            "muniment_batches_redecided",
            "Batches that missed and were decided again, under the ledger's lock.",
            {(): self.redecided},
        )


class Projected:
    """What the projector of this process has done."""

    def __init__(self, tracing: Tracing | None = None) -> None:
        self.tracing = tracing
        self.events: Counter[tuple[str]] = Counter()
        self.batch = Histogram()

    @contextmanager
    def projecting(self, names: Sequence[str], batch: Sequence[Recorded]) -> Iterator[None]:
        """Measure one batch on its way into these views; what fails is not counted, for it is tried again."""
        began = monotonic()
        span = self.tracing and self.tracing.projection(names, batch)
        try:
            yield
            self.batch.add(monotonic() - began)
            for name in names:
                self.events[name,] += len(batch)
        finally:
            if span:
                span.end()

    def families(self) -> Iterator["Metric"]:
        yield counter("muniment_projected_events", "Events that were brought into a view.", self.events, "view")
        yield histogram("muniment_projection_seconds", "One batch of events into one or more views.", {(): self.batch})


class Published:
    """What the publisher of this process has done."""

    def __init__(self) -> None:
        self.events = 0
        self.refusals = 0
        self.latency = Histogram()

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Measure how a checkpoint that is signed gets published; what fails is not counted, for it is tried again."""
        began = monotonic()
        yield
        self.latency.add(monotonic() - began)

    def families(self) -> Iterator["Metric"]:
        yield counter("muniment_integrated_events", "Events that were made part of a tree.", {(): self.events})
        yield histogram("muniment_publication_seconds", "A signed checkpoint, until it is served.", {(): self.latency})
        yield counter(
            "muniment_publication_refusals", "Checkpoints that were not signed or published.", {(): self.refusals}
        )


class Exposed:
    """What Prometheus's library asks: all families of these sources, as they are at that moment."""

    def __init__(self, *sources: Callable[[], Iterable["Metric"]]) -> None:
        self._sources = sources

    def collect(self) -> Iterator["Metric"]:
        for source in self._sources:
            yield from source()


def of_pool(pool: Pool) -> Iterator["Metric"]:
    """How busy the connections are."""
    stats = pool.get_stats()
    idle = stats.get("pool_available", 0)
    connections = {("idle",): idle, ("busy",): stats.get("pool_size", 0) - idle}
    waited = stats.get("requests_wait_ms", 0) / 1000
    yield gauge("muniment_pool_connections", "Connections to the database.", connections, "state")
    yield gauge("muniment_pool_connections_max", "Connections that there may be.", {(): pool.max_size})
    yield gauge("muniment_pool_waiting", "Who waits for a connection.", {(): stats.get("requests_waiting", 0)})
    yield counter("muniment_pool_wait_seconds", "How long all who had to wait for one did.", {(): waited})
    yield counter("muniment_pool_errors", "Who got no connection in time.", {(): stats.get("requests_errors", 0)})
    yield counter("muniment_pool_lost", "Connections found broken.", {(): stats.get("connections_lost", 0)})


def of_process() -> Iterator["Metric"]:
    """Its memory, processor time and open files, under the names that they have everywhere."""
    from prometheus_client import ProcessCollector

    yield from ProcessCollector(registry=None).collect()


def counter(name: str, help_: str, values: Mapping[Labels, float], *labels: str) -> "Metric":
    """A family of sums that only grow; the format adds `_total` to their name."""
    from prometheus_client.core import CounterMetricFamily

    return _filled(CounterMetricFamily(name, help_, labels=labels), values)


def gauge(name: str, help_: str, values: Mapping[Labels, float], *labels: str) -> "Metric":
    """A family of what is so now."""
    from prometheus_client.core import GaugeMetricFamily

    return _filled(GaugeMetricFamily(name, help_, labels=labels), values)


def histogram(name: str, help_: str, values: Mapping[Labels, Histogram], *labels: str) -> "Metric":
    """A family of histograms."""
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(name, help_, labels=labels)
    for said, one in list(values.items()):
        counted, buckets = 0, []
        for bound, count in zip((*map(str, map(float, one.bounds)), "+Inf"), one.counts, strict=True):
            counted += count
            buckets.append((bound, counted))
        family.add_metric(said, buckets, one.sum)
    return family


def _filled(family: Any, values: Mapping[Labels, float]) -> "Metric":
    for said, value in list(values.items()):  # a copy: the worker's are read by another thread
        family.add_metric(said, value)
    filled: Metric = family
    return filled
