"""`muniment witness`: an auditor's own memory of how logs stood, which signs what it sees (C2SP tlog-witness).

A small program for a machine that the ledger's operator does not run: its own key, its own store, and nothing of a
ledger but the checkpoints that are sent to it. The invariants: of two checkpoints of a log of which one is not the
beginning of the other it signs one at most, ever; and nothing is answered that is not stored, durably, before. So its
store is never to be put back from a copy: a witness that forgot signs again what it must not (make a new one instead).
"""

import asyncio
import logging
import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from ledger.checkpoint import (
    COSIGNATURE,
    ED25519,
    HASHES_MAX,
    Checkpoint,
    InvalidNote,
    Note,
    Signature,
    SignerKey,
    VerifierKey,
    read_hash,
)
from ledger.merkle import EMPTY_ROOT, InvalidProof, check_consistency
from ledger.project_key import create_key_file, read_key_file, write_once
from ops import OperatorError
from ops.listener import Answer, Listener, Request
from ops.logs import write_log

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS log_keys (vkey TEXT PRIMARY KEY, origin TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS checkpoints (origin_sha256 TEXT PRIMARY KEY, note TEXT NOT NULL);
"""
BUSY_SECONDS = 5.0
"""How long one process waits for another that writes in the store: `add-log` while the witness runs."""

Home = Annotated[Path, Parameter(help="Where the witness has its key and its store.")]
HOME = Path("~/.local/share/muniment-witness")

witness = App(
    name="witness",
    help="Run a witness: sign the checkpoints of logs, and never two that contradict.",
    help_epilogue="A witness reads none of Muniment's settings.",
)


# --- what it promises ----------------------------------------------------------------------------------------


class Witness:
    """One key and one store. The lock of the store, not of a thread, makes checking and storing one step: two
    processes on one store promise no less."""

    def __init__(self, key: SignerKey, store: sqlite3.Connection, home: Path) -> None:
        self.key = key
        self._store = store
        self._home = home

    def answer(self, request: Request) -> Answer:
        """`POST /add-checkpoint` and `GET /<sha256 of an origin>/checkpoint`."""
        shown = re.fullmatch(r"/([0-9a-f]{64})/checkpoint", request.path, re.ASCII)
        if shown is None and request.path != "/add-checkpoint":
            return _said(HTTPStatus.NOT_FOUND, "there is nothing here")
        if request.method != (allow := "GET" if shown else "POST"):
            return _said(HTTPStatus.METHOD_NOT_ALLOWED, f"this is for {allow}")._replace(allow=allow)
        try:
            return self.show(shown[1]) if shown else self.add_checkpoint(request.body)
        except (sqlite3.Error, OSError) as error:
            log.error("the store cannot be used, so nothing is cosigned: %s", error)
            return _said(HTTPStatus.INTERNAL_SERVER_ERROR, "the witness cannot use its store")

    def add_checkpoint(self, body: bytes) -> Answer:
        """Sign a checkpoint that follows the last one signed of its log; else the status that the protocol has for
        why not. Raises sqlite3.Error and OSError, and then nothing is signed."""
        try:
            old, proof, note = _read(body)
            checkpoint = Checkpoint.parse(note.text)
        except InvalidNote as error:
            return _said(HTTPStatus.BAD_REQUEST, str(error))
        with self._alone():
            keys = self._keys(checkpoint.origin)
            if not keys:
                return _said(HTTPStatus.NOT_FOUND, "the log is not one that is witnessed here")
            try:
                note.verified(keys)
            except InvalidNote as error:
                return _said(HTTPStatus.FORBIDDEN, str(error))
            if refused := self._refuse(old, proof, note, checkpoint):
                return refused
            signature = self.key.sign(note.text, datetime.now(UTC))
            signed = Note(note.text, (*_lines(note, keys), signature))
            self._store.execute(
                "INSERT INTO checkpoints VALUES (?, ?) ON CONFLICT DO UPDATE SET note = excluded.note",
                (_sha256(checkpoint.origin), str(signed)),
            )
        # It is committed, and on the disk: only from here on may anybody see it. Who dies before has not signed, for
        # nobody; who dies here, or whose answer is lost, is asked again, and says that it has this size: 409.
        return Answer(HTTPStatus.OK, str(signature))

    def _refuse(self, old: int, proof: list[bytes], note: Note, checkpoint: Checkpoint) -> Answer | None:
        """Why this, which its log has signed, is not to be cosigned."""
        if old > checkpoint.size:
            return _said(HTTPStatus.BAD_REQUEST, f"a tree of {checkpoint.size} leaves has none of {old} before it")
        stored = self._stored(_sha256(checkpoint.origin))
        last = Checkpoint.parse(stored.text) if stored else Checkpoint(checkpoint.origin, 0, EMPTY_ROOT)
        if stored and checkpoint.size == last.size and checkpoint.root != last.root:
            self._keep_contradiction(checkpoint.origin, stored, note)
        if old != last.size:
            return Answer(HTTPStatus.CONFLICT, f"{last.size}\n", "text/x.tlog.size")
        try:
            check_consistency(old, last.root, checkpoint.size, checkpoint.root, proof)
        except InvalidProof as error:
            log.warning("%s: size %d does not follow %d: %s", checkpoint.origin, checkpoint.size, old, error)
            return _said(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        return None

    def show(self, origin_sha256: str) -> Answer:
        """The last checkpoint that was cosigned, with both signatures. Raises sqlite3.Error."""
        stored = self._stored(origin_sha256)
        if stored is None:
            return _said(HTTPStatus.NOT_FOUND, "no checkpoint of that log was cosigned here")
        return Answer(HTTPStatus.OK, str(stored))

    def add_log(self, key: VerifierKey) -> None:
        """Believe what this key signs, of the log of its name."""
        with self._alone():
            self._store.execute("INSERT OR IGNORE INTO log_keys VALUES (?, ?)", (str(key), key.name))

    def remove_log(self, key: VerifierKey) -> bool:
        """Believe it no more; whether it was. What was cosigned is not forgotten."""
        with self._alone():
            return bool(self._store.execute("DELETE FROM log_keys WHERE vkey = ?", (str(key),)).rowcount)

    def logs(self) -> list[tuple[VerifierKey, Note | None]]:
        """Each key that is believed, and the last checkpoint of its log that was cosigned."""
        rows = self._store.execute("SELECT vkey FROM log_keys ORDER BY origin, vkey").fetchall()
        return [(key, self._stored(_sha256(key.name))) for key in (VerifierKey.parse(row[0]) for row in rows)]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A transaction that nobody else writes in meanwhile; durable on leaving."""
        self._store.execute("BEGIN IMMEDIATE")
        with self._store:
            yield

    def _keys(self, origin: str) -> list[VerifierKey]:
        rows = self._store.execute("SELECT vkey FROM log_keys WHERE origin = ?", (origin,)).fetchall()
        return [VerifierKey.parse(row[0]) for row in rows]

    def _stored(self, origin_sha256: str) -> Note | None:
        query = "SELECT note FROM checkpoints WHERE origin_sha256 = ?"
        row = self._store.execute(query, (origin_sha256,)).fetchone()
        return Note.parse(row[0].encode()) if row else None

    def _keep_contradiction(self, origin: str, cosigned: Note, refused: Note) -> None:
        """Both as files, for whoever has the log's key to see what it signed: of a log the first pair is enough."""
        directory = self._home / "contradictions"
        directory.mkdir(mode=0o700, exist_ok=True)
        if not list(directory.glob(f"{_sha256(origin)}-*.refused")):
            # The size is in the name: what died between the two is never paired with another one later.
            name = f"{_sha256(origin)}-{Checkpoint.parse(refused.text).size}"
            write_once(directory / f"{name}.cosigned", str(cosigned).encode())
            write_once(directory / f"{name}.refused", str(refused).encode())
        log.error("%s HAS SIGNED TWO TREES OF ONE SIZE: both are kept in %s", origin, directory)


def _read(body: bytes) -> tuple[int, list[bytes], Note]:
    """The old size, the proof from it and the note of a request. Raises InvalidNote."""
    head, _, note = body.partition(b"\n\n")
    first, *lines = head.decode("ascii", "replace").split("\n")
    old = re.fullmatch(r"old (0|[1-9][0-9]{0,18})", first, re.ASCII)
    if old is None or len(lines) > HASHES_MAX:
        raise InvalidNote(f"a request has `old <size>`, {HASHES_MAX} hashes at most, an empty line and a checkpoint")
    return int(old[1]), [read_hash(line) for line in lines], Note.parse(note)


def _lines(note: Note, keys: list[VerifierKey]) -> list[Signature]:
    """Of a note that is verified, the lines that were: of each key the first."""
    lines = {(line.name, line.key_id): line for line in reversed(note.signatures)}
    return [lines[key.name, key.id] for key in keys if (key.name, key.id) in lines]


def _said(status: HTTPStatus, text: str) -> Answer:
    return Answer(status, text + "\n")


def _sha256(origin: str) -> str:
    return sha256(origin.encode()).hexdigest()


# --- what an auditor types -----------------------------------------------------------------------------------


@witness.command(name="init")
def _init(name: str, /, *, home: Home = HOME) -> None:
    """Make a witness: its key and its empty store. Prints the key that others check its signatures with.

    Parameters
    ----------
    name
        What it is called in its signatures: an address without a scheme, such as witness.example.org.
    """
    if not re.fullmatch(r"[!-*,-~]+", name, re.ASCII):
        raise OperatorError(f"{name!r} cannot name a witness: letters, digits and signs, but no space and no +")
    home = home.expanduser()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    vkey_file, key_file, store_file = (home / f"witness.{suffix}" for suffix in ("vkey", "key", "db"))
    if vkey_file.exists():
        raise OperatorError(f"{home} has a witness already: {vkey_file.read_text('utf-8').strip()}")
    if key_file.exists() and not store_file.exists():
        raise OperatorError(f"{key_file} has a key, of which {store_file} must say what it signed: begin elsewhere")
    # In this order: a key without its store has forgotten what it signed. What died here before goes on.
    connect(store_file, "rwc", _SCHEMA).close()
    key = SignerKey(name, COSIGNATURE, create_key_file(key_file)).verifier
    write_once(vkey_file, f"{key}\n".encode())
    print(key)


@witness.command(name="add-log")
def _add_log(*vkey: str, home: Home = HOME) -> None:
    """Witness logs: believe what these keys sign. For a log that gets another key, both are added. At any time.

    Parameters
    ----------
    vkey
        The verifier keys of the logs, from who runs them: `<origin>+<id>+<key>`.
    """
    keys = [_log_key(one) for one in vkey]
    with opened(home) as witness:
        for key in keys:
            witness.add_log(key)
            print(f"{key.name} is witnessed")


@witness.command(name="remove-log")
def _remove_log(vkey: str, /, *, home: Home = HOME) -> None:
    """Believe a log's key no more. At any time.

    Parameters
    ----------
    vkey
        As it was added.
    """
    with opened(home) as witness:
        if not witness.remove_log(_log_key(vkey)):
            raise OperatorError(f"{vkey} is not a key that is believed here")


@witness.command(name="list")
def _list(*, home: Home = HOME) -> None:
    """Print this witness's own key, and of each log that it knows what it cosigned last, and when."""
    with opened(home) as witness:
        print(witness.key.verifier)
        for key, note in witness.logs():
            if note is None:
                print(f"{key}  nothing yet")
                continue
            size = Checkpoint.parse(note.text).size
            if at := note.verified([witness.key.verifier])[witness.key.verifier]:
                print(f"{key}  size {size}  {at:%Y-%m-%dT%H:%M:%SZ}")
    for path in sorted(home.expanduser().glob("contradictions/*.refused")):
        print(f"SIGNED TWICE: {path.with_suffix('')}.{{cosigned,refused}}")


@witness.command(name="run")
async def _run(*, home: Home = HOME, host: str = "127.0.0.1", port: int = 8089) -> None:
    """Answer logs, over HTTP without TLS: put a proxy before it that has a certificate.

    Parameters
    ----------
    host
        The address it listens on.
    port
        0 for any that is free.
    """
    write_log("production" if not sys.stderr.isatty() else "development", None)
    with opened(home) as witness:
        try:
            server = await Listener(witness.answer).listen(host, port)
        except OSError as error:
            raise OperatorError(f"it cannot listen on {host}, port {port}: {error.strerror}") from None
        address, port, *_ = server.sockets[0].getsockname()
        shown = f"[{address}]" if ":" in address else address
        print(f"{witness.key.name} listens on http://{shown}:{port}", flush=True)
        async with server:
            await asyncio.Event().wait()


def _log_key(vkey: str) -> VerifierKey:
    try:
        key = VerifierKey.parse(vkey)
    except InvalidNote as error:
        raise OperatorError(str(error)) from None
    if key.type != ED25519:
        raise OperatorError(f"{vkey} is the key of a witness, not of a log")
    return key


@contextmanager
def opened(home: Path) -> Iterator[Witness]:
    """The witness there. Raises OperatorError, also where its store is gone: it must not begin to remember anew."""
    home = home.expanduser()
    try:
        vkey = VerifierKey.parse(home.joinpath("witness.vkey").read_text("utf-8").strip())
    except FileNotFoundError:
        raise OperatorError(f"{home} has no witness: `muniment witness init NAME --home {home}`") from None
    except InvalidNote as error:
        raise OperatorError(f"{home / 'witness.vkey'}: {error}") from None
    seed = read_key_file(home / "witness.key")
    key = SignerKey(vkey.name, COSIGNATURE, seed or b"\0" * 32)
    if seed is None or key.verifier != vkey:
        raise OperatorError(f"{home / 'witness.key'} is not the key of {vkey}")
    with closing(connect(home / "witness.db", "rw")) as store:
        yield Witness(key, store, home)


def connect(path: Path, mode: str, schema: str = "") -> sqlite3.Connection:
    """The store, which loses no commit: FULL syncs also the journal when it is emptied, which is the commit, so that no
    power failure brings it back (SQLite's TRUNCATE; of a journal that is removed only EXTRA makes sure, and takes twice
    as long). Not a log beside it (WAL): whoever moved the one file would have it forget. Raises OperatorError."""
    try:
        store = sqlite3.connect(f"{path.as_uri()}?mode={mode}", BUSY_SECONDS, isolation_level=None, uri=True)
        store.execute("PRAGMA journal_mode = TRUNCATE")
        store.execute("PRAGMA synchronous = FULL")
        store.executescript(schema)
        store.execute("SELECT 1 FROM log_keys, checkpoints")
    except sqlite3.Error as error:
        raise OperatorError(
            f"{path} cannot be used: {error}. If it is lost, make a new witness, with another name, in another "
            "directory: this one no longer knows what it must not sign"
        ) from None
    return store
