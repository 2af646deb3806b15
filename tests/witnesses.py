"""A log in memory, and witnesses of it as processes of their own, as `muniment witness` runs them."""

import os
import socket
import ssl
import subprocess
import sys
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from types import TracebackType

import httpx

from ledger.checkpoint import ED25519, Checkpoint, Note, SignerKey, VerifierKey
from ledger.merkle import Edge, Run, consistency, joined, leaf_hash, node_hash, subtrees
from ledger.witness import Witness
from ops.witness import opened

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Asking by plain HTTP needs no certificates, and reading those of the system takes longer than all that is asked."""


class Log:
    """Entries, and whatever its key says of them."""

    def __init__(self, origin: str, seed: int = 0, entries: int = 0) -> None:
        self.key = SignerKey(origin, ED25519, bytes([seed]) * 32)
        self.leaves: list[bytes] = []
        self.grow(entries)

    @property
    def origin(self) -> str:
        return self.key.name

    @property
    def vkey(self) -> VerifierKey:
        return self.key.verifier

    def grow(self, count: int, kind: str = "entry") -> None:
        first = len(self.leaves)
        self.leaves += [leaf_hash(f"{kind} {index}".encode()) for index in range(first, first + count)]

    def fork(self, at: int, size: int) -> "Log":
        """The same log, with another history from `at` on."""
        other = Log(self.origin, self.key.seed[0])
        other.leaves = self.leaves[:at]
        other.grow(size - at, "forged")
        return other

    def checkpoint(self, size: int | None = None) -> Checkpoint:
        edge = Edge()
        leaves = self.leaves[:size]
        edge.extend(leaves)
        return Checkpoint(self.origin, len(leaves), edge.root)

    def note(self, size: int | None = None) -> Note:
        text = self.checkpoint(size).text
        return Note(text, (self.key.sign(text),))

    def proof(self, old: int, new: int) -> list[bytes]:
        return [
            joined([self._hash(Run(node.index << node.level, node.index + 1 << node.level)) for node in subtrees(run)])
            for run in consistency(old, new)
        ]

    async def prove(self, old: int, new: int) -> list[bytes]:
        return self.proof(old, new)

    def _hash(self, run: Run) -> bytes:
        level = self.leaves[run.first : run.end]
        while len(level) > 1:
            level = [node_hash(*pair) for pair in zip(level[::2], level[1::2], strict=True)]
        return level[0]


def body(old: int, proof: Sequence[bytes], note: Note | str) -> bytes:
    """A request for a cosignature, as C2SP tlog-witness has it."""
    hashes = "".join(f"{b64encode(one).decode()}\n" for one in proof)
    return f"old {old}\n{hashes}\n{note}".encode()


class RunningWitness:
    """A witness in a directory of its own. A context manager; it keeps its address when it is killed and started.

    `http` is for asking it while it runs.
    """

    def __init__(self, home: Path, name: str = "witness.example.org") -> None:
        self.home = home
        self.url = ""
        self._port = "0"
        self.key = VerifierKey.parse(self.muniment("init", name))

    def muniment(self, command: str, *arguments: str) -> str:
        """What `muniment witness <command>` prints. Raises AssertionError with what it complains of."""
        line = [sys.executable, "-P", "-m", "ops.cli", "witness", command, *arguments, "--home", str(self.home)]
        ended = subprocess.run(line, capture_output=True, text=True, check=False)
        assert not ended.returncode, ended.stderr
        return ended.stdout.strip()

    @property
    def address(self) -> Witness:
        return Witness(self.url, self.key)

    def start(self) -> None:
        """Returns once it listens."""
        line = [sys.executable, "-P", "-m", "ops.cli", "witness", "run", "--home", str(self.home), "--port", self._port]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=os.environ)
        assert self.process.stdout
        said = self.process.stdout.readline()
        assert " listens on " in said, "it ended while it started"
        self.url = said.split()[-1]
        self._port = self.url.rpartition(":")[2]

    def kill(self) -> None:
        """At once, without a chance to finish anything."""
        self.process.kill()
        self._ended()

    def dial(self) -> socket.socket:
        """A line on which anything may be said."""
        return socket.create_connection(("127.0.0.1", int(self._port)), timeout=30)

    def trust(self, log: Log) -> None:
        """As `add-log` does it, while it runs or not."""
        with opened(self.home) as same:
            same.add_log(log.vkey)

    def post(self, content: bytes) -> httpx.Response:
        return self.http.post("/add-checkpoint", content=content)

    def add(self, log: Log, old: int, size: int) -> httpx.Response:
        """Send the log's checkpoint of that size, as it should be sent."""
        return self.post(body(old, log.proof(old, size), log.note(size)))

    def shown(self, log: Log) -> httpx.Response:
        return self.http.get(f"/{sha256(log.origin.encode()).hexdigest()}/checkpoint")

    def stop(self) -> int:
        self.process.terminate()
        return self._ended()

    def _ended(self) -> int:
        code = self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()
        return code

    def __enter__(self) -> "RunningWitness":
        self.start()
        # A new connection each time: a kept one gives way when there are too many.
        single = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(base_url=self.url, trust_env=False, verify=NO_TLS, timeout=30, limits=single)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        self.kill()
