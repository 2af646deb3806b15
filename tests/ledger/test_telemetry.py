"""What is counted, and the traces of commands: from whoever asked, through the commit that they share, into a view."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler

from ledger.commands import OpenSession, Record
from ledger.committer import Committer
from ledger.postgres import Pool, open_pool
from ledger.receipt import Receipt
from ledger.telemetry import Histogram, histogram
from ledger.tracing import Tracing
from ledger.values import Actor
from ledger.vault import Vault
from projections import VIEWS, Projector
from tests.check import check_ledger
from tests.conftest import Database

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03"
"""Of a caller who keeps the trace, with a flag that is not ours to know (W3C Trace Context Level 2)."""
UNKEPT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


def traced(exporter: InMemorySpanExporter, sampler: Sampler | None = None) -> Tracing:
    provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider)


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(spans: InMemorySpanExporter) -> Tracing:
    return traced(spans)


@pytest.fixture
async def traced_committer(pool: Pool, tmp_path: Path, tracing: Tracing) -> AsyncIterator[Committer]:
    vault = Vault(tmp_path / "keys", pool, create_keys=True)
    committer = Committer(pool, vault, create_ledgers=True, tracing=tracing)
    yield committer
    await committer.close()


async def record(committer: Committer, agent: Actor, tracing: Tracing, traceparent: str | None = None) -> Receipt:
    """As a request does it."""
    headers = [(b"traceparent", traceparent.encode())] if traceparent else []
    scope = {"headers": headers, "method": "POST", "path": "/records"}
    with tracing.request("Record", scope) as say_status:
        receipt = await committer.submit("demo", Record(kind="a"), agent, traceparent=traceparent)
        say_status(receipt.status)
    return receipt


def named(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == name]


def trace_of(span: ReadableSpan) -> int:
    return identity(span)[0]


def links(span: ReadableSpan) -> set[tuple[int, int]]:
    return {(link.context.trace_id, link.context.span_id) for link in span.links}


def identity(span: ReadableSpan) -> tuple[int, int]:
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


# Counting


def test_a_histogram_counts_what_is_at_most_a_bound() -> None:
    measured = Histogram((1, 2, 4))
    for one in (0.5, 1, 1.5, 4, 5):
        measured.add(one)
    samples = {(s.name, s.labels.get("le")): s.value for s in histogram("m", "", {(): measured}).samples}
    assert [samples["m_bucket", le] for le in ("1.0", "2.0", "4.0", "+Inf")] == [2, 3, 4, 5]
    assert (samples["m_count", None], samples["m_sum", None]) == (5, 12)


async def test_whoever_waits_for_another_under_the_same_id_is_counted_too(committer: Committer, agent: Actor) -> None:
    same = [committer.submit("demo", Record(kind="a", command_id="one"), agent) for _ in range(3)]
    await asyncio.gather(*same)
    assert committer.commits.commands == {("Record", "ok"): 3}
    assert (committer.commits.replays, committer.commits.events, committer.waiting) == (2, 1, 0)


async def test_a_batch_that_another_process_overtook_is_counted_as_decided_twice(
    committer: Committer, another: Committer, agent: Actor
) -> None:
    for _ in range(5):  # until it believes to be alone
        await committer.submit("demo", OpenSession(agent_role="a"), agent)
    assert committer.commits.redecided == 0
    await another.submit("demo", OpenSession(agent_role="a"), agent)
    await committer.submit("demo", OpenSession(agent_role="a"), agent)
    assert committer.commits.redecided == 1


# Traces


async def test_commands_and_the_commit_that_they_share_link_to_each_other(
    traced_committer: Committer, agent: Actor, tracing: Tracing, spans: InMemorySpanExporter
) -> None:
    first = await record(traced_committer, agent, tracing)
    receipts = await asyncio.gather(*(record(traced_committer, agent, tracing) for _ in range(3)))
    requests, commits = named(spans, "Record"), named(spans, "commit")
    assert len({trace_of(span) for span in [*requests, *commits]}) == 4 + len(commits)
    assert set().union(*map(links, commits)) == set(map(identity, requests))
    for request in requests:
        assert links(request) == {identity(commit) for commit in commits if identity(request) in links(commit)}
        assert len(links(request)) == 1
    told = {span.events[0].attributes["muniment.first_position"] for span in requests if span.events[0].attributes}
    assert told == {receipt.first_position for receipt in [first, *receipts]}


async def test_an_event_leads_to_its_trace_and_a_trace_to_its_events(
    traced_committer: Committer, agent: Actor, tracing: Tracing, spans: InMemorySpanExporter, database: Database
) -> None:
    own = await record(traced_committer, agent, tracing)
    callers = await record(traced_committer, agent, tracing, CALLER)
    history = check_ledger(database.owner)["demo"]
    by_position = {
        span.events[0].attributes["muniment.first_position"]: span
        for span in named(spans, "Record")
        if span.events[0].attributes
    }
    ours, theirs = by_position[own.first_position], by_position[callers.first_position]
    trace_id, span_id = identity(ours)
    kept = (f"00-{trace_id:032x}-{span_id:016x}-01", f"00-{trace_id:032x}-{span_id:016x}-03")
    assert history[own.first_position - 1].event.traceparent in kept
    assert history[callers.first_position - 1].event.traceparent == CALLER, "as it was received"
    assert f"{trace_of(theirs):032x}" == CALLER.split("-")[1]
    assert theirs.parent is not None
    assert f"{theirs.parent.span_id:016x}" == CALLER.split("-")[2]


async def test_a_projection_links_to_the_traces_of_its_events(
    traced_committer: Committer, agent: Actor, tracing: Tracing, spans: InMemorySpanExporter, database: Database
) -> None:
    await record(traced_committer, agent, tracing, CALLER)
    receipt = await record(traced_committer, agent, tracing, CALLER)
    ledger = await traced_committer.ledger("demo")
    assert ledger is not None
    async with open_pool(database.worker, connections_max=2) as pool:
        projector = Projector(pool, VIEWS, tracing=tracing)
        while await projector.advance(ledger.ledger_id):
            pass
    (projection,) = named(spans, "project")
    assert [f"{trace:032x}" for trace, _ in links(projection)] == [CALLER.split("-")[1]]
    assert projection.attributes is not None
    assert projection.attributes["muniment.last_position"] == receipt.first_position
    assert projection.parent is None
    assert projector.projected.events["audit",] == 2


async def test_what_the_caller_does_not_keep_is_not_kept_but_stored_as_received(
    traced_committer: Committer, agent: Actor, tracing: Tracing, spans: InMemorySpanExporter, database: Database
) -> None:
    await record(traced_committer, agent, tracing, UNKEPT)
    assert not spans.get_finished_spans()
    (recorded,) = check_ledger(database.owner)["demo"]
    assert recorded.event.traceparent == UNKEPT


async def test_a_commit_is_kept_for_the_one_command_that_is(
    pool: Pool, tmp_path: Path, agent: Actor, database: Database
) -> None:
    spans = InMemorySpanExporter()
    tracing = traced(spans, ParentBased(ALWAYS_OFF))
    committer = Committer(pool, Vault(tmp_path / "keys", pool, create_keys=True), create_ledgers=True, tracing=tracing)
    sent = [record(committer, agent, tracing, CALLER if n == 7 else None) for n in range(20)]
    await asyncio.gather(*sent)
    await committer.close()
    (request,), (commit,) = named(spans, "Record"), named(spans, "commit")
    assert links(commit) == {identity(request)}
    kept = [event.traceparent for _, event in check_ledger(database.owner)["demo"]]
    assert sorted(kept, key=str) == [CALLER, *[None] * 19]


@pytest.mark.parametrize(
    ("module", "unwanted"),
    # redis-py, which the API has, looks for OpenTelemetry by itself.
    [
        ("ops.worker", {"opentelemetry", "prometheus_client"}),
        ("api.app", {"opentelemetry.exporter", "prometheus_client"}),
    ],
)
def test_where_nothing_asks_for_it_nothing_of_it_is_loaded(module: str, unwanted: set[str]) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.split())
    assert module in loaded
    assert not unwanted & loaded
