"""A transaction pooler, as small as one can be: one server connection for all clients, each for a transaction.

Like PgBouncer it answers a connection itself, with process numbers of its own (PostgreSQL, "Message Flow").
"""

import os
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def pooling_transactions(server: Path) -> Iterator[Path]:
    """A pooler before the server that listens in the directory `server`; the directory that it listens in itself."""
    with tempfile.TemporaryDirectory(prefix="pooler-") as name, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(Path(name) / ".s.PGSQL.5432"))
        listener.listen()
        pool = _Pool(server / ".s.PGSQL.5432")
        threading.Thread(target=pool.accept, args=[listener], daemon=True).start()
        yield Path(name)
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        pool.close()


class _Pool:
    def __init__(self, server: Path) -> None:
        self._address = str(server)
        self._turn = threading.Lock()
        self._server: socket.SocketIO | None = None
        self._greeting = b""

    def accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client = listener.accept()[0]
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    def _serve(self, client: socket.socket) -> None:
        with client, client.makefile("rwb", buffering=0) as stream, suppress(OSError, struct.error):
            (length,) = struct.unpack(">i", stream.read(4))
            startup = struct.pack(">i", length) + stream.read(length - 4)
            with self._turn:
                if self._server is None:
                    self._connect(startup)
            key = b"K" + struct.pack(">iii", 12, 1_000_000 + client.fileno(), int.from_bytes(os.urandom(2)))
            stream.write(self._greeting + key + b"Z\0\0\0\5I")
            while self._transaction(stream):
                pass

    def _connect(self, startup: bytes) -> None:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address)
        server = connection.makefile("rwb", buffering=0)
        connection.close()  # the file keeps it open
        server.write(startup)
        while (message := _message(server))[:1] != b"Z":
            if message[:1] != b"K":
                self._greeting += message
        self._server = server

    def _transaction(self, stream: socket.SocketIO) -> bool:
        """Pass on one transaction; False where the client has gone."""
        message = _message(stream)
        with self._turn:
            server = self._server
            assert server is not None
            while message[:1] != b"X":
                server.write(message)
                if message[:1] in (b"Q", b"S"):
                    while (answer := _message(server))[:1] != b"Z":
                        stream.write(answer)
                    stream.write(answer)
                    if answer[-1:] == b"I":
                        return True
                message = _message(stream)
        return False


def _message(stream: socket.SocketIO) -> bytes:
    head = _exactly(stream, 5)
    return head + _exactly(stream, struct.unpack(">i", head[1:])[0] - 4)


def _exactly(stream: socket.SocketIO, length: int) -> bytes:
    read = b""
    while len(read) < length:
        part = stream.read(length - len(read))
        if not part:
            raise OSError("the other side has gone")
        read += part
    return read
