"""Traces, where OpenTelemetry's own settings (`OTEL_*`) ask for them; else nothing of it is even imported.

A command's trace is its caller's, where that was said. Many commands share one commit, and many events one batch of a
projection, so each of those begins a trace of its own, linked to the traces of all that is in it. The way back is in
the spans: a command's says its id and its positions; and an event says its trace, as `traceparent`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from threading import Thread
from typing import TYPE_CHECKING, Any

from ledger.entry import Recorded
from ledger.pending import Pending, Verdict
from ledger.receipt import Receipt

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

LINKS_MAX = 128
"""As many as the SDK keeps of one span."""

LAST_SECONDS_MAX = 3.0
"""How long the last spans may take when the process ends; without a collector they are lost."""


def open_tracing(service: str) -> "Tracing":
    """Traces as the environment says, sent as those of `service` unless it names another."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": service}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


class Tracing:
    """The spans of this process."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        class LinkedSampler(Sampler):
            """What is linked is traced, for what it is linked to is; the rest as `configured`."""

            def should_sample(
                self,
                parent_context: Any,
                trace_id: int,
                name: str,
                kind: Any = None,
                attributes: Any = None,
                links: Any = None,
                trace_state: Any = None,
            ) -> SamplingResult:
                if links:
                    return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes)
                return configured.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

            def get_description(self) -> str:
                return f"LinkedSampler({configured.get_description()})"

        configured = provider.sampler
        provider.sampler = LinkedSampler()
        self._provider = provider
        self._trace = trace
        self._nowhere = Context()
        self._tracer = provider.get_tracer("muniment", version("muniment"))
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def request(self, name: str, scope: Mapping[str, Any]) -> Iterator[Callable[[int], None]]:
        """The span of one HTTP request: its caller's child, where the caller says who that is. It is to be told the
        status of the answer."""
        said = {key.decode(): value.decode("latin-1") for key, value in scope["headers"] if key in _SAID}
        context = self._propagator.extract(said) if said else self._nowhere
        span = self._tracer.start_span(name, context, self._trace.SpanKind.SERVER)
        if not said and not span.is_recording():
            yield _nobody_asks  # most requests, where few are kept: for them this is all
            return
        with self._trace.use_span(span, end_on_exit=True):
            if span.is_recording():
                span.set_attribute("http.request.method", scope["method"])
                span.set_attribute("url.path", scope["path"])
            yield lambda status: self._end(span, status)

    def _end(self, span: "Span", status: int) -> None:
        """OpenTelemetry's conventions for HTTP: what is the caller's mistake is no error of the server's."""
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)

    def current(self) -> "Span | None":
        """The span that is now, if it is kept."""
        span = self._trace.get_current_span()
        return span if span.is_recording() else None

    def ids(self) -> tuple[str, str] | None:
        """The trace and the span that are now, for a line of the log."""
        context = self._trace.get_current_span().get_span_context()
        return (f"{context.trace_id:032x}", f"{context.span_id:016x}") if context.is_valid else None

    def commit(self, spans: Sequence["Span"]) -> "Span | None":
        """A span for a commit with commands of these spans; None where there are none. Each links to the other."""
        if not spans:
            return None
        distinct = list(dict.fromkeys(spans))[:LINKS_MAX]
        span = self._linked("commit", [one.get_span_context() for one in distinct])
        for one in distinct:
            if one.is_recording():  # who asked may have gone
                one.add_link(span.get_span_context())
        return span

    def answered(self, pending: Pending, code: str, verdict: Verdict) -> None:
        """Say in the span of a command where in the ledger to look."""
        said: dict[str, Any] = {
            "muniment.command_type": type(pending.command).__name__,
            "muniment.command_id": pending.command_id,
            "muniment.code": code,
            "muniment.replayed": isinstance(verdict, Receipt) and verdict.replayed,
        }
        if isinstance(verdict, Receipt) and verdict.event_count:
            said["muniment.first_position"] = verdict.first_position
            said["muniment.last_position"] = verdict.positions[-1]
        if pending.span.is_recording():  # who asked may have gone
            pending.span.add_event("command", said)

    def projection(self, names: Sequence[str], batch: Sequence[Recorded]) -> "Span | None":
        """A span for events on their way into views; None where none of them is of a trace that is kept."""
        said = dict.fromkeys(r.event.traceparent for r in batch if r.event.traceparent is not None)
        contexts = [self.context(traceparent) for traceparent in islice(filter(_may_be_kept, said), LINKS_MAX)]
        kept = [context for context in contexts if context.trace_flags.sampled]
        if not kept:
            return None
        span = self._linked("project", kept)
        span.set_attribute("muniment.views", list(names))
        span.set_attribute("muniment.project", batch[0].event.project)
        span.set_attribute("muniment.first_position", batch[0].position)
        span.set_attribute("muniment.last_position", batch[-1].position)
        return span

    def context(self, traceparent: str) -> Any:
        """The span that a `traceparent` names."""
        carried = self._propagator.extract({"traceparent": traceparent})
        return self._trace.get_current_span(carried).get_span_context()

    def close(self) -> None:
        """Send what is left, if somebody takes it soon."""
        last = Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        last.start()
        last.join(LAST_SECONDS_MAX)

    def _linked(self, name: str, contexts: Sequence[Any]) -> "Span":
        return self._tracer.start_span(name, self._nowhere, links=[self._trace.Link(context) for context in contexts])


_SAID = (b"traceparent", b"tracestate")
_ODD = frozenset("13579bdf")


def _may_be_kept(traceparent: str) -> bool:
    """By the last bit of its flags (W3C Trace Context s3.2.2.5). To read all of it costs as much as to project an
    event, and where every caller says one, few of them are of a trace that is kept."""
    return traceparent[54:55] in _ODD


def _nobody_asks(status: int) -> None:
    """The status of an answer whose span is not kept."""


def traceparent_of(span: "Span") -> str:
    """A span as W3C Trace Context names it."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
