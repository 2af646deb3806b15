"""Bad input of every kind, over real connections to a real server: each gets its documented error, and nothing
it sends keeps the next request from its answer."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psycopg
import pytest
from psycopg import sql

from api.auth import development_token
from ledger.embedded import EmbeddedServer
from tests.api.conftest import problem_of
from tests.check import check_ledger
from tests.conftest import TEMPLATE, Database, database_of

SERVER = """
import sys
from pathlib import Path
from granian.constants import Interfaces
from granian.server import Server
Server("api.app:create_app", factory=True, uds=Path(sys.argv[1]), interface=Interfaces.ASGI, websockets=False).serve()
"""


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Server:
    """A granian process over a database, reached through a socket in the file system."""

    def __init__(self, path: Path, token: str, database: Database) -> None:
        self.path, self.token, self.database = path, token, database

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Return once it answers."""
        while process.poll() is None:
            with suppress(FileNotFoundError, ConnectionRefusedError):
                assert self.send(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n").status == 200
                return
            time.sleep(0.05)
        raise AssertionError("the server ended")

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.token}"}
        transport = httpx.HTTPTransport(uds=str(self.path))
        return httpx.Client(transport=transport, base_url="http://muniment", headers=headers, timeout=30)

    def send(self, *pieces: bytes, end: bool = False) -> Reply:
        """Send bytes as they are, and read one answer; `end` says that no more will come."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(self.path))
            received = b""
            try:
                for piece in pieces:
                    connection.sendall(piece)
                if end:
                    connection.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it answered before it had everything
            while not _complete(received):
                try:
                    more = connection.recv(65_536)
                except ConnectionResetError:
                    break
                if not more:
                    break
                received += more
        return _parsed(received)

    def request(self, line: str, body: bytes = b"", *headers: str) -> Reply:
        """One request with a token; Content-Length and JSON's Content-Type unless `headers` say otherwise."""
        sent = [line, "Host: x", f"Authorization: Bearer {self.token}", *headers]
        named = {header.partition(":")[0].lower() for header in headers}
        if "content-length" not in named and "transfer-encoding" not in named:
            sent.append(f"Content-Length: {len(body)}")
        if "content-type" not in named:
            sent.append("Content-Type: application/json")
        return self.send("\r\n".join([*sent, "", ""]).encode("latin-1") + body)


def _complete(received: bytes) -> bool:
    head, found, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    return bool(found) and length is not None and len(body) >= int(length[1])


def _parsed(received: bytes) -> Reply:
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Reply(int(status.split()[1]), headers, body) if received else Reply(0, {}, b"")


@pytest.fixture(scope="module")
def shared(postgres: EmbeddedServer) -> Iterator[Database]:
    """One database for this module: what is refused leaves nothing in it."""
    name = sql.Identifier("test_hostile")
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(name, sql.Identifier(TEMPLATE)))
        yield database_of(postgres, "test_hostile")
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


@pytest.fixture(scope="module")
def server(shared: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home, database = tmp_path_factory.mktemp("server"), shared
    environment = {"MUNIMENT_MODE": "development", "MUNIMENT_HOME": str(home), "DATABASE_URL": database.api}
    token = development_token(home / "keys", project="demo", subject="agent-7")
    with tempfile.TemporaryDirectory(prefix="muniment-") as directory:  # a socket's path must be short
        server = Server(Path(directory) / "socket", token, database)
        with subprocess.Popen([sys.executable, "-c", SERVER, server.path], env=os.environ | environment) as process:
            try:
                server.wait(process)
                yield server
            finally:
                process.send_signal(signal.SIGTERM)
                ended = process.wait(30)
    assert ended == 0
    check_ledger(database.owner)


def refused(reply: Reply, status: int, code: str) -> dict[str, Any]:
    """The problem of a reply that is exactly this refusal."""
    problem = problem_of(httpx.Response(reply.status, headers=reply.headers, content=reply.body))
    assert (reply.status, problem["code"]) == (status, code)
    return problem


# Bodies


DEEP = b'{"agent_role":"x","metadata":{"x":' + b"[" * 5000 + b"]" * 5000 + b"}}"


@pytest.mark.parametrize(
    ("body", "code", "pointer"),
    [
        (b"", "malformed_request", ""),
        (b" ", "malformed_request", ""),
        (b"{", "malformed_request", ""),
        (b"null", "malformed_request", ""),
        (b'"agent_role"', "malformed_request", ""),
        (b"[1,2]", "malformed_request", ""),
        (b'{"agent_role":"x"} {}', "malformed_request", ""),
        (b'{"agent_role":"x",}', "malformed_request", ""),
        (b"{'agent_role':'x'}", "malformed_request", ""),
        (b'\xef\xbb\xbf{"agent_role":"x"}', "malformed_request", ""),
        (b'{"agent_role":"\xff"}', "malformed_request", ""),
        (b'{"agent_role":"\xed\xa0\x80"}', "malformed_request", ""),
        (b'{"agent_role":"\\ud800"}', "malformed_request", ""),
        (b'{"agent_role":"\\u0000"}', "malformed_request", "/agent_role"),
        (b'{"agent_role":"a\\nb"}', "malformed_request", "/agent_role"),
        (b'{"agent_role":"a\\n"}', "malformed_request", "/agent_role"),
        (b'{"agent_role":""}', "malformed_request", "/agent_role"),
        (b'{"agent_role":"' + b"x" * 10_000 + b'"}', "malformed_request", "/agent_role"),
        (b'{"agent_role":7}', "malformed_request", "/agent_role"),
        (b'{"agent_role":null}', "malformed_request", "/agent_role"),
        (b'{"agent_role":"x","colour":"red"}', "malformed_request", "/colour"),
        (b'{"agent_role":"x","metadata":[]}', "malformed_request", "/metadata"),
        (b'{"agent_role":"x","metadata":{"x":"' + b"y" * 17_000 + b'"}}', "malformed_request", "/metadata"),
        (b'{"agent_role":"x","labels":{"a":1}}', "malformed_request", None),
        (b'{"agent_role":"x","session_id":"x"}', "malformed_request", "/session_id"),
        (b'{"agent_role":"x","expires_at":"tomorrow"}', "malformed_request", "/expires_at"),
        (b'{"agent_role":"x","expires_at":"2020-01-01T00:00:00Z"}', "malformed_request", "/expires_at"),
        (b'{"agent_role":"x","expires_at":"9999-12-31T23:59:59-14:00"}', "malformed_request", "/expires_at"),
        (b'{"agent_role":"x","occurred_at":"9999-01-01T00:00:00Z"}', "malformed_request", "/occurred_at"),
        (b'{"agent_role":"x","occurred_at":"0001-01-01T00:00:00+14:00"}', "malformed_request", "/occurred_at"),
        (b'{"agent_role":"x","command_id":"a b"}', "malformed_request", "/command_id"),
        (b'{"agent_role":"x","command_id":"a\\r\\nSet-Cookie: b"}', "malformed_request", "/command_id"),
        (b'{"agent_role":"x","type":"Record"}', "malformed_request", "/type"),
        (b'{"agent_role":"x","agent_role":"y"}', "malformed_request", ""),
        (b'{"agent_role":"x","metadata":{"a":1,"b":{"a":1,"a":2}}}', "malformed_request", ""),
        (b'{"agent_role":"x","metadata":{"$sealed":1}}', "malformed_request", "/metadata/$sealed"),
        (b'{"agent_role":"x","metadata":{"a":{"$personal":1}}}', "malformed_request", "/metadata/a/$personal"),
        (b'{"agent_role":"x","metadata":{"x":9007199254740993}}', "number_out_of_range", "/metadata/x"),
        (b'{"agent_role":"x","metadata":{"x":[0,-9007199254740993]}}', "number_out_of_range", "/metadata/x/1"),
        (b'{"agent_role":"x","metadata":{"x":1e400}}', "number_out_of_range", None),
        (b'{"agent_role":"x","metadata":{"x":1' + b"0" * 400 + b"}}", "number_out_of_range", None),
        (b'{"agent_role":"x","metadata":{"x":NaN}}', "malformed_request", ""),
        (b'{"agent_role":"x","metadata":{"x":Infinity}}', "malformed_request", ""),
        (DEEP, "malformed_request", None),
    ],
    ids=lambda value: value[:40].decode("latin-1") if isinstance(value, bytes) else None,
)
def test_a_body_that_cannot_be_read_is_refused_by_pointer(
    server: Server, body: bytes, code: str, pointer: str | None
) -> None:
    problem = refused(server.request("POST /sessions HTTP/1.1", body), 400, code)
    assert problem["errors"][0]["detail"]
    if pointer is not None:
        assert problem["errors"][0]["pointer"] == pointer
    assert len(problem["detail"]) < 1000


def test_odd_but_possible_text_is_kept_as_it_is(server: Server) -> None:
    odd = "\x00 \u2028 \ufffe \U0001f600 \u0301 </script> =1+1 \"'; DROP TABLE --"
    with server.client() as client:
        created = client.post("/sessions", json={"agent_role": "x", "metadata": {odd: [odd, 1.5, 2**53 - 1, None]}})
        assert created.status_code == 201
        assert created.json()["metadata"] == {odd: [odd, 1.5, 2**53 - 1, None]}
        assert client.get(created.headers["location"]).json()["metadata"] == {odd: [odd, 1.5, 2**53 - 1, None]}


# Sizes


def test_a_body_over_its_limit_is_refused_whatever_its_length_says(server: Server) -> None:
    for path, limit in (("/sessions", 2**20), ("/commands", 8 * 2**20), ("/records", 8 * 2**20)):
        line = f"POST {path} HTTP/1.1"
        problem = refused(server.request(line, b" " * (limit + 1)), 413, "body_too_large")
        assert problem["limit_bytes"] == limit
        announced = server.request(line, b"", f"Content-Length: {limit + 1}")
        refused(announced, 413, "body_too_large")
        fits = server.request(line, b" " * limit)
        refused(fits, 400, "malformed_request")


def test_a_body_in_pieces_without_an_end_is_refused_at_its_limit(server: Server) -> None:
    head = (
        f"POST /sessions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.token}\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    ).encode()
    chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    refused(server.send(head, *[chunk] * 40), 413, "body_too_large")


def test_a_body_in_pieces_is_one_body(server: Server) -> None:
    pieces = [b'{"agent', b'_role"', b':"x"}']
    body = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"
    assert server.request("POST /sessions HTTP/1.1", body, "Transfer-Encoding: chunked").status == 201


def test_a_caller_who_hangs_up_in_the_middle_harms_nobody(server: Server) -> None:
    head = (
        f"POST /sessions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.token}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    ).encode()
    reply = server.send(head, b'{"agent_role":', end=True)
    assert reply.status in (0, 400)
    with server.client() as client:
        assert client.get("/status").status_code == 200


# Types of bodies


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Type: text/plain",),
        ("Content-Type: application/x-www-form-urlencoded",),
        ("Content-Type: application/json; charset=utf-16",),
        ("Content-Type: application/json; charset=latin-1",),
        ("Content-Type: application/jsonp",),
        ("Content-Type: ",),
        ("Content-Type: \xff",),
        ("Content-Encoding: gzip",),
        ("Content-Encoding: br",),
    ],
)
def test_only_json_in_utf8_is_read(server: Server, headers: tuple[str, ...]) -> None:
    for path in ("/sessions", "/commands", "/records"):
        refused(server.request(f"POST {path} HTTP/1.1", b"{}", *headers), 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "stated",
    [
        "application/json",
        "Application/JSON ; Charset=UTF-8",
        'application/json;charset="utf-8"',
        "application/json;v=1",
    ],
)
def test_json_by_any_of_its_names_is_read(server: Server, stated: str) -> None:
    body = b'{"agent_role":"x"}'
    assert server.request("POST /sessions HTTP/1.1", body, f"Content-Type: {stated}").status == 201


# Addresses and methods


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/sessions/../../etc/passwd",
        "/delegations",
        "/tasks/x/lease",
        "/events/stream",
        "/docs/VENDOR.txt",
        "/docs/%2e%2e",
    ],
)
def test_what_is_not_there_is_not_found(server: Server, path: str) -> None:
    refused(server.request(f"GET {path} HTTP/1.1"), 404, "not_found")


def test_a_very_long_address_is_refused(server: Server) -> None:
    reply = server.request(f"GET /sessions/{'9' * 10_000} HTTP/1.1")
    refused(reply, 404, "not_found")
    assert len(reply.body) < 1000


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/sessions", {"GET", "HEAD", "OPTIONS", "POST"}),
        ("PATCH", "/sessions/x", {"GET", "HEAD", "OPTIONS", "PUT"}),
        ("GET", "/commands", {"OPTIONS", "POST"}),
        ("HEAD", "/commands", {"OPTIONS", "POST"}),
        ("TRACE", "/events", {"GET", "HEAD", "OPTIONS"}),
        ("BREW", "/health", {"GET", "HEAD", "OPTIONS"}),
        ("POST", "/health", {"GET", "HEAD", "OPTIONS"}),
    ],
)
def test_a_method_that_is_not_possible_is_told_which_are(
    server: Server, method: str, path: str, allowed: set[str]
) -> None:
    with server.client() as client:
        reply = client.request(method, path)
    assert reply.status_code == 405
    assert set(reply.headers["allow"].split(", ")) == allowed
    if method != "HEAD":
        assert problem_of(reply)["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/commands", "OPTIONS, POST"),
        ("/sessions", "GET, HEAD, OPTIONS, POST"),
        ("/sessions/x", "GET, HEAD, OPTIONS, PUT"),
        ("/health", "GET, HEAD, OPTIONS"),
    ],
)
def test_every_address_tells_what_is_possible_there(server: Server, path: str, allowed: str) -> None:
    with server.client() as client:
        reply = client.options(path)
    assert (reply.status_code, reply.headers["allow"], reply.content) == (204, allowed, b"")


def test_an_address_is_the_same_with_a_slash_at_its_end_and_is_no_pattern(server: Server) -> None:
    for path in ("/commands", "/commands/"):
        body = b'{"type":"OpenSession","agent_role":"x","command_id":"slash"}'
        assert server.request(f"POST {path} HTTP/1.1", body).status == 201
    refused(server.request("PUT /sessions/{session_id:str} HTTP/1.1", b"{}"), 404, "not_found")


# Headers


def test_headers_cannot_be_injected(server: Server) -> None:
    reply = server.request("POST /sessions HTTP/1.1", b'{"agent_role":"x"}', 'Idempotency-Key: "a%0d%0aX-Evil:1"')
    refused(reply, 400, "malformed_request")
    created = server.request("POST /sessions HTTP/1.1", b'{"agent_role":"x"}', "Correlation-Id: a\tb")
    refused(created, 400, "malformed_request")
    assert "x-evil" not in reply.headers


def test_two_authorizations_are_none(server: Server) -> None:
    reply = server.request("GET /status HTTP/1.1", b"", "Authorization: Bearer other")
    refused(reply, 400, "malformed_request")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n\r\n\r\n\r\n",
        b"POST /commands HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /commands HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /commands HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /sessions HTTP/1.1\r\nHost: \x00\r\n\r\n",
        b"GET /" + b"a" * 1_000_000,
    ],
    ids=range(8),
)
def test_what_is_no_http_harms_nobody(server: Server, sent: bytes) -> None:
    reply = server.send(sent, end=True)
    assert reply.status == 0 or 400 <= reply.status < 500
    with server.client() as client:
        assert client.get("/status").status_code == 200


async def test_a_body_that_does_not_arrive_in_time_is_not_waited_for(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.http.BODY_SECONDS_MAX", 0.05)

    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    late = await client.post("/sessions", content=drip(), headers={"Content-Type": "application/json"})
    assert (late.status_code, problem_of(late)["code"]) == (400, "malformed_request")
