"""The door of a witness, and those who stand in it."""

import asyncio
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest

from ops.listener import BODY_BYTES_MAX, CONNECTIONS_MAX, HEAD_BYTES_MAX, Answer, Listener, Request
from tests.witnesses import Log, RunningWitness, body


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWitness]:
    with RunningWitness(tmp_path_factory.mktemp("witness") / "home") as running:
        yield running


@pytest.fixture
def log(witness: RunningWitness, request: pytest.FixtureRequest) -> Log:
    """A log of this test's own, ten entries long, that is witnessed."""
    made = Log(f"ledger.example.com/{abs(hash(request.node.nodeid))}", entries=10)
    witness.trust(made)
    return made


def said(witness: RunningWitness, *parts: bytes) -> bytes:
    """Everything that is answered to this, up to the end of the connection."""
    with witness.dial() as line:
        for part in parts:
            line.sendall(part)
        line.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: line.recv(65536), b""))


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /x HTTP/1.1\r\nHost: w\r\n\r\n", 404),
        (b"POST /0/add-checkpoint HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 404),
        (b"GET /%064d/checkpoint/ HTTP/1.1\r\n\r\n" % 0, 404),
        (b"GET /%064d/checkpoint HTTP/1.1\r\n\r\n" % 0, 404),
        (b"GET /add-checkpoint HTTP/1.1\r\n\r\n", 405),
        (b"PUT /%064d/checkpoint HTTP/1.1\r\nContent-Length: 0\r\n\r\n" % 0, 405),
        (b"POST /add-checkpoint HTTP/1.1\r\n\r\n", 400),
        (b"POST /add-checkpoint HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST /add-checkpoint HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST /add-checkpoint HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx", 400),
        (b"POST /add-checkpoint HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /add-checkpoint HTTP/1.1\r\nContent-Length: 1_0\r\n\r\n0123456789", 400),
        (b"POST /add-checkpoint HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (BODY_BYTES_MAX + 1), 413),
        (b"POST /add-checkpoint HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % 10**17, 413),
        (b"POST /add-checkpoint HTTP/1.1\r\nContent-Length : 0\r\n\r\n", 400),
        (b"POST /add-checkpoint HTTP/1.1\r\nX: a\r\n b\r\n\r\n", 400),
        (b"POST /add-checkpoint HTTP/2.0\r\n\r\n", 400),
        (b"POST add-checkpoint HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"POST /add-checkpoint HTTP/1.1\r\nX:%s\0\r\n\r\n" % (b" " * (HEAD_BYTES_MAX - 100)), 400),
        (b"POST /add-checkpoint HTTP/1.1\r\nX:x%sx\r\n\r\n" % (b" " * (HEAD_BYTES_MAX - 100)), 400),
        (b"GET / HTTP/1.1\r\nX: %s\r\n\r\n" % (b"x" * HEAD_BYTES_MAX), 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * HEAD_BYTES_MAX, 431),
    ],
)
def test_a_request_that_is_none_has_its_status(witness: RunningWitness, request_: bytes, status: int) -> None:
    answer = said(witness, request_)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    assert answer.count(b"HTTP/1.1 ") == 1, "what followed was taken for another request"
    assert (b"\r\nAllow: " in answer) == (status == 405)


def test_what_is_too_long_is_answered_although_it_is_sent(witness: RunningWitness) -> None:
    content = b"x" * (128 * BODY_BYTES_MAX)  # more than lies on the way
    head = b"POST /add-checkpoint HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(content)
    assert said(witness, head, content).startswith(b"HTTP/1.1 413 ")


def test_the_longest_body_is_read(witness: RunningWitness) -> None:
    assert witness.post(b"x" * BODY_BYTES_MAX).status_code == 400


def test_a_connection_is_kept_for_more_requests(witness: RunningWitness, log: Log) -> None:
    content = body(0, [], log.note(3))
    request = b"POST /add-checkpoint HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(content), content)
    answer = said(
        witness, request, b"GET / HTTP/1.1\r\n\r\n", request, b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"
    )
    assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == [b"200", b"404", b"409", b"404"]
    assert answer.count(b"\r\nConnection: close\r\n") == 1


def test_who_asks_before_sending_a_body_is_told_to_go_on(witness: RunningWitness, log: Log) -> None:
    content = body(0, [], log.note(3))
    head = b"POST /add-checkpoint HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(content)
    with witness.dial() as line:
        line.sendall(head)
        assert line.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        line.sendall(content)
        assert line.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    "beginning", [b"", b"POST /add-ch", b"POST /add-checkpoint HTTP/1.1\r\nContent-Length: 9\r\n\r\nold"]
)
def test_any_number_of_clients_that_say_nothing_more_keep_nobody_out(
    witness: RunningWitness, log: Log, beginning: bytes
) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(witness.dial()) for _ in range(CONNECTIONS_MAX + 40)]
        for line in silent:
            line.sendall(beginning)
        assert witness.add(log, 0, 7).status_code == 200
        assert witness.shown(log).status_code == 200
        silent[0].settimeout(10)
        with suppress(ConnectionResetError):
            assert silent[0].recv(1) == b"", "who has been waited for longest gave way"
        silent[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            silent[-1].recv(1)


def test_clients_that_drip_keep_nobody_out(witness: RunningWitness, log: Log) -> None:
    stop = threading.Event()
    with ExitStack() as stack, ThreadPoolExecutor(1) as threads:
        dripping = [stack.enter_context(witness.dial()) for _ in range(CONNECTIONS_MAX)]

        def drip() -> None:
            while not stop.is_set():
                for line in dripping:
                    with suppress(OSError):
                        line.sendall(b"P")

        threads.submit(drip)
        try:
            for old in range(9):
                assert witness.add(log, old, old + 1).status_code == 200
        finally:
            stop.set()


async def test_who_is_too_slow_is_left() -> None:
    asked: list[Request] = []

    def answer(request: Request) -> Answer:
        asked.append(request)
        raise AssertionError

    server = await Listener(answer, exchange_seconds=0.05).listen("127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\nx")
        assert await reader.read() == b""
        writer.close()
    assert not asked
