"""What watching costs: commands over HTTP while a process is scraped, and to one that sends traces.

As a program of its own, it is a collector that throws away what it is sent; asked, it says how often it was.
"""

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import Request, urlopen

from ops.bench import serving
from ops.bench.serving import Server, settled
from ops.bench.stage import BenchError, Figures, Measure, Stage
from ops.serve import end_with_supervisor

SCRAPED_EVERY_SECONDS = 1.0
TRACED = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"}
_KEPT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
"""A caller whose trace is kept, whatever the share."""


@contextmanager
def telemetry(stage: Stage) -> Iterator[dict[str, Measure]]:
    """A process with traces of one in a hundred, and one without, which is scraped or not; each has a worker."""
    plain, sampled = stage.new_database(), stage.new_database()
    with (
        collector() as address,
        serving.worker(stage, plain),
        serving.worker(stage, sampled, OTEL_EXPORTER_OTLP_ENDPOINT=address, **TRACED),
    ):
        with serving.api(stage, sampled, OTEL_EXPORTER_OTLP_ENDPOINT=address, **TRACED) as tried:
            _get(f"http://127.0.0.1:{tried.port}/status", authorization=f"Bearer {tried.token}", traceparent=_KEPT)
        if _get(address) == b"0":
            raise BenchError("the API sent no traces, though its caller's was to be kept")
        with (
            serving.api(stage, plain) as silent,
            serving.api(stage, sampled, OTEL_EXPORTER_OTLP_ENDPOINT=address, **TRACED) as traced,
        ):

            def measure(server: Server, database: str) -> Figures:
                settled(stage, database)
                return server.load("commands")[0]

            def scraped() -> Figures:
                with scraping(silent):
                    return measure(silent, plain)

            yield {
                "commands, unwatched": partial(measure, silent, plain),
                "commands, scraped": scraped,
                "commands, traced": partial(measure, traced, sampled),
            }


@contextmanager
def scraping(server: Server) -> Iterator[None]:
    """As Prometheus does it."""
    over = threading.Event()

    def scrape() -> None:
        while True:
            _get(f"http://127.0.0.1:{server.port}/metrics")
            if over.wait(SCRAPED_EVERY_SECONDS):
                return

    with ThreadPoolExecutor(1) as aside:
        scraped = aside.submit(scrape)
        try:
            yield
        finally:
            over.set()
        scraped.result()


def _get(address: str, **headers: str) -> bytes:
    with urlopen(Request(address, headers=headers), timeout=10) as answer:  # noqa: S310  (this machine's)
        body: bytes = answer.read()
    return body


@contextmanager
def collector() -> Iterator[str]:
    """The address of something that takes traces."""
    port = serving.free_port()
    with serving.process([sys.executable, "-P", "-m", "ops.bench.telemetry", str(port)], {}) as running:
        serving.wait_for(port, running)
        yield f"http://127.0.0.1:{port}"


class Collector(BaseHTTPRequestHandler):
    """Whatever comes (OTLP over HTTP), it is taken."""

    protocol_version = "HTTP/1.1"
    taken = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        Collector.taken += 1
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"%d" % Collector.taken)

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *said: object) -> None:
        """Nothing."""


if __name__ == "__main__":
    end_with_supervisor()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Collector).serve_forever()
