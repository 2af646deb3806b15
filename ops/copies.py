"""Where copies of a log are read from: a directory, or a zip file, made by nobody knows whom.

No link in the place of a file is followed, nothing waited for or unpacked, and no name in them commands a terminal.
"""

import os
import stat
import struct
import zlib
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile

from ledger.verify import Read
from ops import OperatorError
from ops.report import visible

FILE_BYTES_MAX = 256 * 1024 * 1024
"""No file of a log is that large: what is, was made to fill the memory of who looks at it."""

UNREADABLE_ARCHIVE = (BadZipFile, EOFError, RuntimeError, ValueError, struct.error, zlib.error)
"""What is raised of a file that is no zip file, or one of a kind that is not known."""


class VerificationError(OperatorError):
    """What was given cannot be looked at; the message says why."""

    def __init__(self, message: str) -> None:
        super().__init__(on_a_line(message))


def on_a_line(text: str) -> str:
    """What may be printed of something that is looked at."""
    return visible(text).translate({9: "\ufffd", 10: "\ufffd"})


def in_directory(directory: Path) -> Read:
    """The files of a directory. It raises VerificationError where something else has the name of one."""

    def read(path: str) -> bytes:
        try:
            # Nothing that stands there for a file is waited for, or followed.
            file = os.open(directory / path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except NotADirectoryError:
            raise FileNotFoundError(path) from None
        try:
            status = os.fstat(file)
            if stat.S_ISDIR(status.st_mode):
                raise FileNotFoundError(path)
            if not stat.S_ISREG(status.st_mode) or status.st_size > FILE_BYTES_MAX:
                raise VerificationError(f"{directory / path} cannot be read: it is no file that a log has")
            with os.fdopen(file, "rb", closefd=False) as opened:
                return opened.read()
        finally:
            os.close(file)

    return read


def opened(path: Path) -> ZipFile:
    """Raises VerificationError."""
    try:
        return ZipFile(path)
    except UNREADABLE_ARCHIVE as error:
        raise VerificationError(f"{path} cannot be read: {error}") from None


def in_archive(archive: ZipFile) -> Read:
    """The files of a zip file, which are in it as they are. Raises VerificationError where they are not, and so may be
    of any size."""
    files = archive.infolist()
    if any(one.compress_type != ZIP_STORED for one in files):
        raise VerificationError(f"{archive.filename} cannot be read: a bundle's files are stored, and not compressed")
    if sum(max(one.file_size, one.compress_size) for one in files) > archive.start_dir:
        raise VerificationError(f"{archive.filename} cannot be read: its files are larger than it is")

    def read(path: str) -> bytes:
        try:
            one = archive.getinfo(path)
        except KeyError:
            raise FileNotFoundError(path) from None
        if one.file_size > FILE_BYTES_MAX:
            raise VerificationError(f"{archive.filename} cannot be read: {path} is no file that a log has")
        try:
            return archive.read(one)
        except UNREADABLE_ARCHIVE:
            return b""  # by its own checksum it is not what was written: then it is nothing that a proof is about

    return read
