"""Checkpoints, and the signed notes that carry them: C2SP signed-note, tlog-checkpoint, tlog-cosignature, tlog-proof.

    <origin>                                         the text of a checkpoint: which log,
    <size>                                           how many leaves,
    <base64 of the root>                             and the root of the tree over them

    — <name> <base64 of key id and signature>        one line a signature; the log's own has its origin as name

Nothing here reads a clock or keeps a key. What does not verify is not returned: see `Note.verified`.
"""

import re
from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from collections.abc import Collection
from datetime import UTC, datetime
from hashlib import sha256
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import UNSET, Struct, UnsetType

from ledger.merkle import HASH_BYTES
from ledger.values import Stamp

ED25519 = 1
"""C2SP signed-note: an Ed25519 signature of the text."""
COSIGNATURE = 4
"""C2SP tlog-cosignature, cosignature/v1: a witness's, with the time at which it saw the checkpoint."""

NOTE_BYTES_MAX = 1_000_000
SIGNATURES_MAX = 100
HASHES_MAX = 63
"""Of a proof: a tree is never higher."""

UNSIGNED = "no key that is known here has signed the note"
_NAME = re.compile(r"[^\s+]+")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")
_PROOF = "c2sp.org/tlog-proof@v1"


class InvalidNote(ValueError):
    """This is no note, or not one that can be believed; the message says why."""


class VerifierKey(NamedTuple):
    """What a signature is checked with, and whose name it has: `<name>+<id>+<base64 of type and key>`."""

    name: str
    type: int
    public: bytes

    @property
    def id(self) -> bytes:
        return sha256(self.name.encode() + b"\n" + bytes([self.type]) + self.public).digest()[:4]

    def __str__(self) -> str:
        return f"{self.name}+{self.id.hex()}+{_base64(bytes([self.type]) + self.public)}"

    @classmethod
    def parse(cls, text: str) -> "VerifierKey":
        """Raises InvalidNote for what is no key, or one of a type that is not known here."""
        name, _, rest = text.partition("+")
        written_id, _, written = rest.partition("+")
        try:
            data = b64decode(written, validate=True)
        except (NotBase64, ValueError):
            data = b""
        if len(data) != 33 or data[0] not in (ED25519, COSIGNATURE) or not _NAME.fullmatch(name):
            raise InvalidNote(f"{text!r} is not a verifier key of a type known here (1 or 4, Ed25519)")
        key = cls(name, data[0], data[1:])
        if key.id.hex() != written_id or str(key) != text:
            raise InvalidNote(f"the key {text!r} has not the id {written_id}")
        return key

    def check(self, text: str, signature: bytes) -> datetime | None:
        """When a witness signed; None for a log's own. Raises InvalidNote where this key did not."""
        at = None
        message = text.encode()
        if self.type == COSIGNATURE:
            if len(signature) != 72:
                raise InvalidNote(f"the signature of {self.name} has not the length of a cosignature")
            seconds = int.from_bytes(signature[:8])
            message, signature = _cosigned(text, seconds), signature[8:]
            try:
                at = datetime.fromtimestamp(seconds, UTC) if seconds else None
            except (OverflowError, ValueError, OSError):
                at = None
            if at is None:
                raise InvalidNote(f"the signature of {self.name} is of no time")
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, message)
        except (InvalidSignature, ValueError):
            raise InvalidNote(f"the signature of {self.name} ({self.id.hex()}) is not one of this text") from None
        return at


class ShownKey(Struct, kw_only=True, omit_defaults=True, rename={"from_": "from"}):
    """A key of the log, as C2SP signed-note writes it: it signed `from` then on, `until` it was retired."""

    vkey: str
    from_: Stamp
    until: Stamp | UnsetType = UNSET


class ShownKeys(Struct):
    """The keys of the log, the oldest first; retired ones too, for what they have signed."""

    keys: list[ShownKey]


class SignerKey(NamedTuple):
    """What signs. `seed`: the 32 bytes of RFC 8032 s5.1.5."""

    name: str
    type: int
    seed: bytes

    @property
    def verifier(self) -> VerifierKey:
        return VerifierKey(self.name, self.type, self._private.public_key().public_bytes_raw())

    @property
    def _private(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.seed)

    def sign(self, text: str, at: datetime | None = None) -> "Signature":
        """Sign a text; as a witness, which must say when it is, the text of a checkpoint."""
        if self.type == COSIGNATURE:
            assert at is not None
            seconds = int(at.timestamp())
            made = seconds.to_bytes(8) + self._private.sign(_cosigned(text, seconds))
        else:
            made = self._private.sign(text.encode())
        return Signature(self.name, self.verifier.id, made)

    def __repr__(self) -> str:
        return f"SignerKey({self.verifier})"


class Signature(NamedTuple):
    """One line of a note: the signature is whatever follows the key's id."""

    name: str
    key_id: bytes
    signature: bytes

    def __str__(self) -> str:
        return f"\u2014 {self.name} {_base64(self.key_id + self.signature)}\n"

    @classmethod
    def parse(cls, line: str) -> "Signature":
        """A line without its end. Raises InvalidNote."""
        dash, _, rest = line.partition(" ")
        name, _, written = rest.partition(" ")
        try:
            data = b64decode(written, validate=True)
        except (NotBase64, ValueError):
            data = b""
        if dash != "\u2014" or not _NAME.fullmatch(name) or len(data) < 5:
            raise InvalidNote(f"{line!r} is not a line with a signature")
        return cls(name, data[:4], data[4:])


class Note(NamedTuple):
    """A text, its end of line included, and who says to have signed it: nothing is verified yet."""

    text: str
    signatures: tuple[Signature, ...]

    def __str__(self) -> str:
        return f"{self.text}\n{''.join(map(str, self.signatures))}"

    @classmethod
    def parse(cls, content: bytes) -> "Note":
        """Raises InvalidNote."""
        if len(content) > NOTE_BYTES_MAX:
            raise InvalidNote(f"a note of more than {NOTE_BYTES_MAX:,} bytes")
        try:
            whole = content.decode()
        except UnicodeDecodeError:
            raise InvalidNote("the note is not UTF-8") from None
        if _CONTROL.search(whole):
            raise InvalidNote("the note has control characters")
        text, separator, lines = whole.rpartition("\n\n")
        if not separator or not lines.endswith("\n"):
            raise InvalidNote("the note does not end with lines of signatures behind an empty line")
        signatures = lines.removesuffix("\n").split("\n")
        if len(signatures) > SIGNATURES_MAX:
            raise InvalidNote(f"the note has more than {SIGNATURES_MAX} signatures")
        return cls(text + "\n", tuple(map(Signature.parse, signatures)))

    def verified(self, keys: Collection[VerifierKey]) -> dict[VerifierKey, datetime | None]:
        """Which of `keys` signed it, and of a witness when: lines of others mean nothing. Raises InvalidNote where a
        line says to be of one of `keys`, and is not, and where there is no line of any of them."""
        known = {(key.name, key.id): key for key in keys}
        found: dict[VerifierKey, datetime | None] = {}
        for line in self.signatures:
            key = known.get((line.name, line.key_id))
            if key is not None and key not in found:
                found[key] = key.check(self.text, line.signature)
        if not found:
            raise InvalidNote(UNSIGNED)
        return found


class Checkpoint(NamedTuple):
    """How a log stood: `root` is that of the tree over its first `size` leaves."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        return f"{self.origin}\n{self.size}\n{_base64(self.root)}\n"

    @classmethod
    def parse(cls, text: str) -> "Checkpoint":
        """The text of a note; lines that extend it are left aside. Raises InvalidNote."""
        origin, size, root, *_ = [*text.split("\n"), "", ""]
        if not origin or not re.fullmatch(r"0|[1-9][0-9]{0,18}", size, re.ASCII):
            raise InvalidNote("this is not the text of a checkpoint: origin, size, root")
        return cls(origin, int(size), read_hash(root))


def read_hash(line: str) -> bytes:
    """A hash as checkpoints and proofs have it. Raises InvalidNote."""
    try:
        one = b64decode(line, validate=True)
    except (NotBase64, ValueError):
        one = b""
    if len(one) != HASH_BYTES or _base64(one) != line:
        raise InvalidNote(f"{line!r} is not the base64 of a hash")
    return one


class InclusionProof(NamedTuple):
    """C2SP tlog-proof: that one entry stands at `index` of a log, for who has nothing but its keys."""

    index: int  # type: ignore[assignment]  # as in merkle.py
    hashes: tuple[bytes, ...]
    checkpoint: Note
    extra: bytes = b""

    def __str__(self) -> str:
        extra = f"extra {_base64(self.extra)}\n" if self.extra else ""
        hashes = "".join(f"{_base64(one)}\n" for one in self.hashes)
        return f"{_PROOF}\n{extra}index {self.index}\n{hashes}\n{self.checkpoint}"

    @classmethod
    def parse(cls, content: bytes) -> "InclusionProof":
        """Raises InvalidNote."""
        head, separator, note = content.partition(b"\n\n")
        try:
            first, *lines = head.decode("ascii").split("\n")
        except UnicodeDecodeError:
            first, lines = "", []
        extra = b""
        if lines and lines[0].startswith("extra "):
            try:
                extra = b64decode(lines.pop(0).removeprefix("extra "), validate=True)
            except (NotBase64, ValueError):
                raise InvalidNote("what the proof has as extra is not base64") from None
        index = re.fullmatch(r"index (0|[1-9][0-9]{0,18})", lines[0], re.ASCII) if lines else None
        if first != _PROOF or index is None or not separator or len(lines) > HASHES_MAX + 1:
            raise InvalidNote("this is not a proof of inclusion")
        return cls(int(index[1]), tuple(map(read_hash, lines[1:])), Note.parse(note), extra)


class Signed(NamedTuple):
    """A checkpoint, and which of the keys that are trusted have signed it; a witness says when."""

    checkpoint: Checkpoint
    by: dict[VerifierKey, datetime | None]


def check_checkpoint(
    note: Note, log: Collection[VerifierKey], witnesses: Collection[VerifierKey] = (), quorum: int = 0
) -> Checkpoint:
    """A checkpoint that its log has signed, and `quorum` of `witnesses`. Raises InvalidNote."""
    return check_signed(note, log, witnesses, quorum).checkpoint


def check_signed(
    note: Note, log: Collection[VerifierKey], witnesses: Collection[VerifierKey] = (), quorum: int = 0
) -> Signed:
    """The same, and who did. `log`: keys of logs, of which those with the name of this one count."""
    checkpoint = Checkpoint.parse(note.text)
    own = [key for key in log if key.name == checkpoint.origin and key.type != COSIGNATURE]
    if not own:
        raise InvalidNote(f"the checkpoint is of {checkpoint.origin!r}, of which no key is known here")
    by = note.verified([*own, *witnesses])
    if by.keys().isdisjoint(own):
        raise InvalidNote(UNSIGNED)
    seen = {key.public for key in witnesses if by.get(key) is not None}
    if len(seen) < quorum:
        raise InvalidNote(f"{len(seen)} of {len(witnesses)} witnesses have signed it, but {quorum} must")
    return Signed(checkpoint, by)


def _cosigned(text: str, seconds: int) -> bytes:
    return f"cosignature/v1\ntime {seconds}\n{text}".encode()


def _base64(data: bytes) -> str:
    return b64encode(data).decode()
