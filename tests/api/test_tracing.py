"""Traces of real processes, sent to a collector: one command, from its request through its commit to the views."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.conftest import Database
from tests.server import Server

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SAID = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


class Collector:
    """Takes spans by OTLP over HTTP, and hands them on with the name of the service that sent them."""

    def __init__(self) -> None:
        self._spans: Queue[tuple[str, Span]] = Queue()
        self._seen: list[tuple[str, Span]] = []

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self._spans.put((named["service.name"], span))

    def span(self, service: str, name: str) -> Span:
        """The first one of that name, once it comes."""
        while True:
            for sender, span in self._seen:
                if (sender, span.name) == (service, name):
                    return span
            self._seen.append(self._spans.get(timeout=30))


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            collector.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_command_is_traced_from_its_request_to_its_views(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting() as (collector, endpoint):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        # Of what nobody asked to keep, nothing is.
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
        with Server(database, tmp_path, ("api", "worker")) as server:
            headers = {"Authorization": f"Bearer {server.token('demo')}"}
            with httpx.Client(base_url=server.url, trust_env=False, headers=headers) as client:
                client.post("/records", json={"kind": "unkept"}).raise_for_status()
                posted = client.post("/records", json={"kind": "a"}, headers={"traceparent": SAID})
                shown = client.get("/events/2", params={"min_position": 2})
            request = collector.span("muniment-api", "Record")
            commit = collector.span("muniment-api", "commit")
            projection = collector.span("muniment-worker", "project")
            assert server.stop() == [0, 0]
    assert (posted.status_code, shown.json()["traceparent"]) == (201, SAID)
    assert request.trace_id.hex() == TRACE_ID
    attributes = {attribute.key: attribute.value for attribute in request.events[0].attributes}
    assert attributes["muniment.command_id"].string_value == posted.headers["command-id"]
    assert attributes["muniment.first_position"].int_value == 2
    assert [link.span_id for link in commit.links] == [request.span_id]
    assert [link.span_id for link in request.links] == [commit.span_id]
    assert [link.trace_id.hex() for link in projection.links] == [TRACE_ID]
