"""What independent witnesses say of a log's checkpoint (C2SP tlog-witness, the asking side).

A witness is believed in two things: its own signature of exactly this text, and a checkpoint that it shows and the log
itself has signed. Such a one that is not the beginning of the tree that we have proves that history was rolled back, or
forked: RolledBack. Its mere word that it has followed the log to where this history does not reach is taken for the
same, but is no proof. Whatever else it says, or does not say in time, costs no more than its line.
"""

import asyncio
import logging
import re
from base64 import b64encode
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from hashlib import sha256
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import httpx
import msgspec
from msgspec import Struct

from ledger.checkpoint import (
    COSIGNATURE,
    Checkpoint,
    InvalidNote,
    Note,
    Signature,
    VerifierKey,
    check_checkpoint,
)
from ledger.merkle import InvalidProof, check_consistency
from ledger.settings import InvalidSettings

log = logging.getLogger(__name__)

ASK_SECONDS = 5.0
"""How long the quorum is waited for."""
GRACE_SECONDS = 0.3
"""How long the others are waited for once there is a quorum."""
SILENT_SECONDS = 60.0
"""For so long after one did not answer in time it is waited for GRACE_SECONDS only, when it is asked what it knows."""
ATTEMPTS = 3
ANSWER_BYTES_MAX = 256 * 1024

T = TypeVar("T")
Prove: TypeAlias = Callable[[int, int], Awaitable[list[bytes]]]
"""The proof of consistency from an older size to a newer one. Called by several at once, and at times cancelled."""


class Witness(NamedTuple):
    """Where it is asked, and what its signatures are checked with."""

    url: str
    key: VerifierKey


class Witnesses(NamedTuple):
    """Who is asked, and how many must have signed before a checkpoint is published."""

    quorum: int
    known: tuple[Witness, ...]

    @property
    def keys(self) -> list[VerifierKey]:
        return [witness.key for witness in self.known]


class RolledBack(Exception):
    """A witness has cosigned a checkpoint of this log that the history here does not contain.

    `shown` is that checkpoint, as the log itself has signed it; None where the witness says a size and shows nothing.
    So it is also where another publisher of this log went on meanwhile: that must be excluded before it is believed.
    """

    def __init__(self, witness: str, size: int, shown: Note | None, why: str) -> None:
        self.witness = witness
        self.size = size
        self.shown = shown
        how = "shows one, signed by the log," if shown else "says so, and shows none"
        super().__init__(f"the witness {witness} has cosigned a checkpoint of size {size} ({how}): {why}")


class Cosigned(NamedTuple):
    """A note with one line more for each witness that signed it, and of each other one why there is none."""

    note: Note
    missing: dict[str, str]
    enough: bool


class _NoLine(Exception):
    """This witness has not signed; the message says why."""


class Cosigners:
    """Asks witnesses. Remembers, to save a question, up to where each of them has followed which log."""

    def __init__(self, http: httpx.AsyncClient, witnesses: Witnesses) -> None:
        http.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=()))  # else they would fill the memory here
        self._http = http
        self._witnesses = witnesses
        self._sizes: dict[tuple[VerifierKey, str], int] = {}
        self._silent_until: dict[VerifierKey, float] = {}

    async def cosign(self, note: Note, keys: Collection[VerifierKey], prove: Prove) -> Cosigned:
        """Have a checkpoint signed that the log has signed, and durably stored as signed: all witnesses are asked at
        once. `keys`: all that the log ever had.

        Raises RolledBack, and what `prove` raises. Takes ASK_SECONDS at most, GRACE_SECONDS once there is a quorum.
        """
        lines, missing = [], {}
        async with _asking(self._ask(one, note, keys, prove) for one in self._witnesses.known) as asked:
            await self._wait(asked)
            for task, witness in zip(asked, self._witnesses.known, strict=True):
                why = task.exception() if task.done() else _NoLine("it did not answer in time")
                if why is None:
                    lines.append(task.result())
                elif isinstance(why, _NoLine):
                    missing[witness.key.name] = str(why)
                else:
                    raise why
        return Cosigned(Note(note.text, (*note.signatures, *lines)), missing, len(lines) >= self._witnesses.quorum)

    async def check(
        self, checkpoint: Checkpoint, note: Note | None, keys: Collection[VerifierKey], prove: Prove
    ) -> tuple[dict[str, str], list[RolledBack]]:
        """Whether what each witness cosigned last is a beginning of the tree of this checkpoint, before more is signed;
        `note` is the checkpoint as it was signed, if it was.

        Answers of each that could not say why, and what those know that contradicts it. Raises what `prove` raises.
        """
        now = asyncio.get_running_loop().time

        async def confront(witness: Witness) -> str | RolledBack | None:
            # One that is down must not hold up each of very many logs.
            patience = GRACE_SECONDS if self._silent_until.get(witness.key, 0.0) > now() else ASK_SECONDS
            try:
                async with asyncio.timeout(patience):
                    if note is None:
                        await self._confront(witness, checkpoint, keys, prove)
                    else:
                        # What it shows may be as of some time ago: what it answers to what is signed already is not.
                        await self._ask(witness, note, keys, prove)
            except TimeoutError:
                if patience == ASK_SECONDS:
                    self._silent_until[witness.key] = now() + SILENT_SECONDS
                return "it did not answer in time"
            except _NoLine as why:
                return str(why)
            except RolledBack as error:
                return error
            return None

        async with _asking(map(confront, self._witnesses.known)) as asked:
            said = await asyncio.gather(*asked)
        names = [witness.key.name for witness in self._witnesses.known]
        silent = {name: why for name, why in zip(names, said, strict=True) if isinstance(why, str)}
        return silent, [error for error in said if isinstance(error, RolledBack)]

    async def _wait(self, asked: Collection["asyncio.Task[Signature]"]) -> None:
        """For all; for a quorum and a little; or until it is too late."""
        now = asyncio.get_running_loop().time
        until, waiting = now() + ASK_SECONDS, set(asked)
        while waiting:
            signed = sum(task.done() and task.exception() is None for task in asked)
            if signed >= self._witnesses.quorum:
                until = min(until, now() + GRACE_SECONDS)
            done, waiting = await asyncio.wait(
                waiting, timeout=max(0, until - now()), return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                return

    async def _ask(self, witness: Witness, note: Note, keys: Collection[VerifierKey], prove: Prove) -> Signature:
        """Its line. Raises _NoLine, RolledBack, and what `prove` raises."""
        checkpoint = Checkpoint.parse(note.text)
        place = witness.key, checkpoint.origin
        for _ in range(ATTEMPTS):
            old = min(self._sizes.get(place, 0), checkpoint.size)
            proof = await prove(old, checkpoint.size) if 0 < old < checkpoint.size else []
            hashes = "".join(f"{b64encode(one).decode()}\n" for one in proof)
            content = f"old {old}\n{hashes}\n{note}".encode()
            status, answer = await self._exchange("POST", f"{witness.url}/add-checkpoint", content)
            if status == httpx.codes.OK:
                line = _line(witness.key, note.text, answer)
                self._sizes[place] = checkpoint.size
                return line
            if status == httpx.codes.UNPROCESSABLE_ENTITY:
                await self._confront(witness, checkpoint, keys, prove)
            if status != httpx.codes.CONFLICT:
                raise _NoLine(f"it answered {status}: {_shortened(answer)}")
            size = _size(answer)
            if size > checkpoint.size:
                with suppress(_NoLine):
                    await self._confront(witness, checkpoint, keys, prove)
                raise RolledBack(witness.key.name, size, None, f"there are {checkpoint.size} leaves")
            if size < old:
                log.warning("the witness %s has forgotten %s from %d to %d", witness.key.name, place[1], size, old)
            self._sizes[place] = size
        raise _NoLine(f"{ATTEMPTS} times it said that it is at another size")

    async def _confront(
        self, witness: Witness, checkpoint: Checkpoint, keys: Collection[VerifierKey], prove: Prove
    ) -> None:
        """Compare what it shows. Raises RolledBack where that is no beginning of ours, _NoLine where it shows nothing
        that can be compared."""
        path = sha256(checkpoint.origin.encode()).hexdigest()
        status, answer = await self._exchange("GET", f"{witness.url}/{path}/checkpoint")
        if status == httpx.codes.NOT_FOUND:
            return
        if status != httpx.codes.OK:
            raise _NoLine(f"it answered {status} when asked what it cosigned last: {_shortened(answer)}")
        try:
            note = Note.parse(answer)
            shown = check_checkpoint(note, [key for key in keys if key.name == checkpoint.origin])
        except InvalidNote as error:
            raise _NoLine(f"it shows a checkpoint that is not one of this log: {error}") from None
        if shown.size > checkpoint.size:
            raise RolledBack(witness.key.name, shown.size, note, f"there are {checkpoint.size} leaves")
        proof = await prove(shown.size, checkpoint.size) if 0 < shown.size < checkpoint.size else []
        try:
            check_consistency(shown.size, shown.root, checkpoint.size, checkpoint.root, proof)
        except InvalidProof as error:
            raise RolledBack(
                witness.key.name, shown.size, note, f"the leaves up to there are others: {error}"
            ) from None

    async def _exchange(self, method: str, url: str, content: bytes | None = None) -> tuple[int, bytes]:
        """Status and body. Asks again where the connection that was kept open is open no longer. Raises _NoLine."""
        for attempt in range(2):
            try:
                return await self._exchanged(method, url, content)
            except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
                # Also of an address that it sends us to, which is read although nobody goes there.
                lost = isinstance(error, httpx.RemoteProtocolError | httpx.ReadError | httpx.WriteError)
                if attempt or not lost:
                    raise _NoLine(f"it cannot be reached: {str(error) or type(error).__name__}") from None
        raise AssertionError

    async def _exchanged(self, method: str, url: str, content: bytes | None) -> tuple[int, bytes]:
        # Nothing packed: what is small on the way might be large here.
        async with self._http.stream(method, url, content=content, headers={"accept-encoding": "identity"}) as response:
            answer = b""
            async for part in response.aiter_raw():
                answer += part
                if len(answer) > ANSWER_BYTES_MAX:
                    raise _NoLine(f"it answered more than {ANSWER_BYTES_MAX:,} bytes")
            return response.status_code, answer


@asynccontextmanager
async def _asking(questions: Iterable[Coroutine[None, None, T]]) -> "AsyncGenerator[list[asyncio.Task[T]]]":
    """All at once; none goes on beyond the block."""
    asked = [asyncio.create_task(question) for question in questions]
    try:
        yield asked
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


def _line(key: VerifierKey, text: str, answer: bytes) -> Signature:
    """The line of this key, which signed this text. Raises _NoLine."""
    try:
        lines = [Signature.parse(line) for line in answer.decode().removesuffix("\n").split("\n")]
        line = next((line for line in lines if (line.name, line.key_id) == (key.name, key.id)), None)
        at = key.check(text, line.signature) if line else None
    except (InvalidNote, UnicodeDecodeError) as error:
        raise _NoLine(f"it answered what is not its signature: {error}") from None
    if line is None:
        raise _NoLine("it answered without a signature of the key that is known of it")
    if at is None:
        raise _NoLine("it does not say when it signed")
    return line


def _size(answer: bytes) -> int:
    size = re.fullmatch(rb"(0|[1-9][0-9]{0,18})\n", answer)
    if size is None:
        raise _NoLine(f"it answered 409, but no size: {_shortened(answer)}")
    return int(size[1])


def _shortened(answer: bytes) -> str:
    return repr(answer[:200].decode("utf-8", "replace").strip())


# --- who they are --------------------------------------------------------------------------------------------


class _Named(Struct, forbid_unknown_fields=True):
    url: str
    vkey: str


class _File(Struct, forbid_unknown_fields=True):
    quorum: int
    witnesses: list[_Named]


def read_witnesses(path: Path) -> Witnesses:
    """Who is named in a file: `{"quorum": 2, "witnesses": [{"url": "https://…", "vkey": "…"}, …]}`.

    Raises InvalidSettings.
    """
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
        known = tuple(Witness(_url(one.url), VerifierKey.parse(one.vkey)) for one in file.witnesses)
    except (OSError, msgspec.MsgspecError, httpx.InvalidURL, ValueError) as error:
        raise InvalidSettings([f"the witnesses in {path} cannot be read: {error}"]) from None
    problems = [f"{one.key} is the key of a log, not of a witness" for one in known if one.key.type != COSIGNATURE]
    # Under two names one witness is still one.
    if len({one.key.public for one in known}) < len(known) or len({one.key.name for one in known}) < len(known):
        problems.append("two witnesses have the same key, or the same name")
    if not 0 <= file.quorum <= len(known):
        problems.append(f"a quorum of {file.quorum} cannot be had of {len(known)} witnesses")
    if problems:
        raise InvalidSettings([f"the witnesses in {path}: {problem}" for problem in problems])
    return Witnesses(file.quorum, known)


def _url(text: str) -> str:
    url = httpx.URL(text)
    if url.scheme not in ("https", "http") or not url.host or url.query or url.fragment:
        raise ValueError(f"{text!r} is not the address of a witness, such as https://witness.example.org")
    return str(url).removesuffix("/")
