"""The keys that a deployment signs its checkpoints with: files of the worker's, which no API process reads.

One list for the logs of all projects: `log-1.secret`, `log-2.secret`, …, each the 32 bytes of an Ed25519 seed (RFC 8032
s5.1.5). A log's key has the log's origin as its name, so to a verifier each log has keys of its own. Which of them
sign, and since when, is in `ledger.log_keys`, which has their public halves and no more.

Beside them lies what was last signed for each ledger. It is written after the database has it and before anybody else
sees it, so a database that knows less was put back to an older state.
"""

import os
from pathlib import Path
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ledger.checkpoint import ED25519, Note, SignerKey
from ledger.project_key import UnusableKey, create_key_file, read_key_file


def public_of(seed: bytes) -> bytes:
    """The public half of a key."""
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


class LogFiles:
    """The files. Every method raises UnusableKey for one that is open to other users, or is no key."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._signed = directory / "signed"

    def path(self, number: int) -> Path:
        return self._directory / f"log-{number}.secret"  # a name that no project's key can have

    def make(self, number: int) -> bytes:
        """The public half of that key, which is made now, durably, unless it is there."""
        return public_of(create_key_file(self.path(number)))

    def signer(self, origin: str, number: int, public: bytes) -> SignerKey:
        """What signs for one log. Raises UnusableKey, also where the file is not here, or not of that public half."""
        seed = read_key_file(self.path(number))
        if seed is None:
            raise UnusableKey(
                f"The key file {self.path(number)} is missing: put it there from where it was made, or retire the key "
                f"(muniment keys retire {number})"
            )
        if public_of(seed) != public:
            raise UnusableKey(
                f"{self.path(number)} is not the key {number} that was added: put the original back from a backup"
            )
        return SignerKey(origin, ED25519, seed)

    def last_signed(self, ledger_id: UUID) -> bytes | None:
        """The note that was last signed here for a ledger. Raises OSError."""
        try:
            return self._signed.joinpath(str(ledger_id)).read_bytes()
        except FileNotFoundError:
            return None

    def keep_signed(self, ledger_id: UUID, note: Note) -> None:
        """Let that be the note that was last signed here. Durable on return. Raises OSError."""
        self._signed.mkdir(mode=0o700, exist_ok=True)
        path = self._signed / str(ledger_id)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        with draft.open("wb") as file:
            file.write(str(note).encode())
            file.flush()
            os.fsync(file.fileno())
        # Dying before this leaves the note before it, which is true of the same ledger; a draft is never read.
        draft.replace(path)
        directory = os.open(self._signed, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
