"""A project's key: the file that holds it, and the keys derived from it.

One file of 32 random bytes a project, readable by the service alone. From it come what wraps the data
keys, the fingerprints of commands and the pseudonyms of subjects. The invariant: a key file appears
whole or not at all, is never written twice, and of two processes that make one the first decides.
Nothing here reads the database or knows which key a project began with; that is the vault's.
"""

import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ledger.errors import StoreUnavailable

log = logging.getLogger(__name__)

PROJECT_KEY_BYTES = 32
NONCE_BYTES = 12


class UnusableKey(Exception):
    """A key is missing, malformed, open to other users, or not the one that the project began with.

    Its operator must act; no caller can cause or mend it. The message names files: not for callers.
    """


@contextmanager
def key_errors() -> Iterator[None]:
    """A key that cannot be used is for the operator's log; the caller hears that nothing happened."""
    try:
        yield
    except UnusableKey as error:
        log.error("%s", error)
        raise StoreUnavailable(why="The key of this project is not usable here; its operator must act") from error


class ProjectKey:
    """The keys derived from a project's key by HKDF-SHA256 (RFC 5869). All labels are frozen.

    `key_id` (16 bytes) tells this key from any other and is no secret.
    """

    def __init__(self, project_id: str, secret: bytes) -> None:
        def derived(purpose: str) -> bytes:
            info = f"muniment {purpose} 1\0{project_id}".encode()
            return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)

        self.project_id = project_id
        self.key_id = derived("key id")[:16]
        self._wrapping = AESGCM(derived("wrapping"))
        # Copying a keyed HMAC costs less than keying one.
        self._fingerprints = HMAC(derived("fingerprints"), SHA256())
        self._pseudonyms = HMAC(derived("pseudonyms"), SHA256())

    def fingerprint(self, content: bytes) -> bytes:
        """HMAC-SHA-256 of `content`: 32 bytes."""
        mac = self._fingerprints.copy()
        mac.update(content)
        return mac.finalize()

    def pseudonym(self, subject: str) -> str:
        """What `subject` is called at rest: 128 bits of an HMAC-SHA-256, in hex."""
        mac = self._pseudonyms.copy()
        mac.update(subject.encode())
        return mac.finalize()[:16].hex()

    def new_wrapped(self, pseudonym: str, number: int) -> bytes:
        """A new random data key as it is stored; it unwraps for this subject and number only."""
        nonce, secret = os.urandom(NONCE_BYTES), os.urandom(32)
        return nonce + self._wrapping.encrypt(nonce, secret, self._bound_to(pseudonym, number))

    def unwrap(self, pseudonym: str, number: int, wrapped: bytes) -> AESGCM:
        """The data key behind `wrapped`. Raises UnusableKey."""
        nonce, box = wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:]
        try:
            secret = self._wrapping.decrypt(nonce, box, self._bound_to(pseudonym, number))
        except (InvalidTag, ValueError):
            raise UnusableKey(
                f"Data key {number} of subject {pseudonym} in project {self.project_id} does not "
                "unwrap: its row was altered, moved, or made under another project key. Restore "
                "keys.data_keys from a backup."
            ) from None
        return AESGCM(secret)

    def _bound_to(self, pseudonym: str, number: int) -> bytes:
        return f"muniment data key 1\0{self.project_id}\0{pseudonym}\0{number}".encode()


def read_key_file(path: Path) -> bytes | None:
    """The project key in `path`, None if there is no such file.

    Raises UnusableKey for a file that is not 32 bytes or that other users may read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnusableKey(f"The key file {path} cannot be opened: {error.strerror}.") from error
    try:
        _check_access(path, os.fstat(descriptor))
        secret = os.read(descriptor, PROJECT_KEY_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(secret) != PROJECT_KEY_BYTES:
        raise UnusableKey(
            f"The key file {path} is not {PROJECT_KEY_BYTES} bytes long, so it is no project key. "
            "Put the original back from a backup."
        )
    return secret


def _check_access(path: Path, status: os.stat_result) -> None:
    """PostgreSQL's rule for its `ssl_key_file`: 0600 if ours; 0640 if root's, as mounted secrets are."""
    if not stat.S_ISREG(status.st_mode):
        raise UnusableKey(f"The key file {path} is not a regular file.")
    if status.st_uid not in (os.geteuid(), 0):
        raise UnusableKey(
            f"The key file {path} belongs to another user (uid {status.st_uid}), who could read or "
            f"replace it: chown it to uid {os.geteuid()}."
        )
    allowed = 0o640 if status.st_uid != os.geteuid() else 0o600
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077 & ~allowed:
        raise UnusableKey(
            f"The key file {path} is open to other users (mode {mode:04o}): chmod it to "
            f"{allowed:04o}, and consider who may have read it."
        )


def create_key_file(path: Path) -> bytes:
    """The project key in `path`, made now unless another process was faster. Durable on return.

    Raises UnusableKey, also for a directory that other users may enter.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(path.parent.stat().st_mode)
        if mode & 0o077:
            raise UnusableKey(
                f"The keys directory {path.parent} is open to other users (mode {mode:04o}), so no "
                "key is made in it: chmod it to 0700."
            )
        write_once(path, os.urandom(PROJECT_KEY_BYTES))
    except OSError as error:
        raise UnusableKey(f"The key file {path} cannot be made: {error.strerror}.") from error
    secret = read_key_file(path)
    if secret is None:
        raise UnusableKey(f"The key file {path} was removed while it was being made.")
    return secret


def write_once(path: Path, content: bytes) -> None:
    """Make the file `path`, whole and durable, for our account alone, unless it is there. Raises OSError."""
    draft = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(content)  # all of it, or an error: a full disk may take a part
            file.flush()
            os.fsync(file.fileno())
        # A link, unlike a rename, never replaces. Dying before it leaves a draft that nothing uses;
        # dying after it, a second name of the key. Either may be removed.
        with suppress(FileExistsError):
            path.hardlink_to(draft)
    finally:
        draft.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
