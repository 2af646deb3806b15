"""Files of recorded agent runs, read a run at a time.

A file is a JSON list of runs, one run, a bare list of messages, or a run a line (JSON lines); or gzip of
any of these. A run is `{"messages": [...]}` or `{"traj": [...]}`, or a bare list of messages. What cannot
be read is told by place and reason, and the rest goes on: nothing is ever left out in silence. What the
messages mean is not known here (ops/runs.py).
"""

import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ledger.commands import EXACT_INTEGER_MAX

CHUNK_CHARACTERS = 1 << 16
MESSAGES_KEYS = ("messages", "traj")


class Unusable(NamedTuple):
    """Something that was not taken: where it stands, and why."""

    where: str
    reason: str


class Run(NamedTuple):
    """One recorded run. `name` is `<file>#<index>`, counted from 0; `about` is all it says but its messages."""

    name: str
    where: str
    messages: list[Any]
    about: dict[str, Any]


class Transcript:
    """One file of runs. Memory holds one run at a time, except for a file that is a single run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read_bytes = 0
        """How far it has been read, of `size_bytes`."""

    @property
    def size_bytes(self) -> int:
        """As it is now; 0 where there is none."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def runs(self) -> Iterator[Run | Unusable]:
        """Every run, and everything that is not one, in the order of the file."""
        try:
            with self.path.open("rb") as file:
                for index, (place, value) in enumerate(_places(file, self.path.name)):
                    self.read_bytes = file.tell() if not file.closed and file.seekable() else self.read_bytes
                    where = f"{self.path} {place}".rstrip()
                    if isinstance(value, Unusable):
                        yield Unusable(f"{where} {value.where}".rstrip(), value.reason)
                    else:
                        yield _run(value, f"{_short(self.path.name)}#{index}", where)
        except OSError as error:
            yield Unusable(str(self.path), f"it cannot be read on: {error.strerror or error}")
        self.read_bytes = self.size_bytes


def _places(file: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    """The values in a file, and where in it each stands."""
    opened: Any = file
    unzipped = _Unzipped(file)
    if opened.peek(2)[:2] == b"\x1f\x8b":
        opened = io.BufferedReader(unzipped)
    wide = opened.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff")
    # A byte that is no character costs one character and not a run: `mended` shows it.
    encoding, errors = ("utf-16", "replace") if wide else ("utf-8-sig", "surrogateescape")
    by_line = name.removesuffix(".gz").endswith((".jsonl", ".ndjson"))
    with io.TextIOWrapper(opened, encoding, errors, newline="\n") as text:
        yield from _values(text, by_line)
    if unzipped.damage:
        yield "", Unusable("from here on", f"the compressed file is damaged: {unzipped.damage}")


class _Unzipped(io.RawIOBase):
    """gzip (RFC 1952), read as far as it can be: the log of an agent that was killed has no proper end."""

    def __init__(self, file: BinaryIO) -> None:
        self.damage = ""
        """What ended it before its end, once that has been met."""
        self._file = file
        self._member = zlib.decompressobj(zlib.MAX_WBITS | 16)

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        found = b""
        while not found and not self.damage:
            if self._member.eof:
                given = self._member.unused_data.lstrip(b"\0") or self._file.read(CHUNK_CHARACTERS)
                if not given:
                    break
                self._member = zlib.decompressobj(zlib.MAX_WBITS | 16)
            else:
                given = self._member.unconsumed_tail or self._file.read(CHUNK_CHARACTERS)
            try:
                found = self._member.decompress(given, len(target))
            except zlib.error as error:
                self.damage = str(error)
            if not (given or found or self._member.eof):
                self.damage = "it ends too early"
        target[: len(found)] = found
        return len(found)


def _run(value: Any, name: str, where: str) -> Run | Unusable:
    if isinstance(value, list) and any(_is_message(item) for item in value):
        return Run(name, where, value, {})
    if not isinstance(value, dict):
        return Unusable(where, f"it is {_article(value)}, neither a run nor a list of messages")
    for key in MESSAGES_KEYS:
        if isinstance(value.get(key), list):
            return Run(name, where, value[key], {k: v for k, v in value.items() if k != key})
    return Unusable(where, "it has no list of messages under `messages` or `traj`")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value and not any(key in value for key in MESSAGES_KEYS)


def _article(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _short(name: str) -> str:
    """A file's name as the head of external ids: one line, and short enough to leave room for the rest."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)[-200:]


# Values


def mended(value: Any) -> Any:
    """`value` with what is no character (half a surrogate pair, a byte that was not UTF-8) written as `\\udc..`."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [mended(item) for item in value]
    return {mended(k): mended(v) for k, v in value.items()} if isinstance(value, dict) else value


def _integer(text: str) -> int | str:
    """An integer that JSON readers agree on (RFC 8259 s6), else its digits."""
    return int(text) if len(text) <= 17 and abs(int(text)) <= EXACT_INTEGER_MAX else text


def _real(text: str) -> float | str:
    number = float(text)
    return number if abs(number) != float("inf") else text


_decoder = json.JSONDecoder(strict=False, parse_int=_integer, parse_float=_real, parse_constant=str)


def parse(text: str) -> Any:
    """The JSON value `text` is. A number that not every reader of JSON would read the same stays a text.

    Raises ValueError, also where it is nested too deeply.
    """
    try:
        return _decoder.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _values(text: io.TextIOBase, by_line: bool) -> Iterator[tuple[str, Any]]:
    """The items of a file and where each stands; `by_line` where its name says that a line is a value."""
    head = text.read(CHUNK_CHARACTERS)
    while head.isspace():
        head = text.read(CHUNK_CHARACTERS)
    first_line, line_ends, _ = head.lstrip().partition("\n")
    if not first_line:
        yield "", Unusable("", "it is empty")
    elif by_line or first_line[0] not in "[{" or (line_ends and _is_json(first_line)):
        yield from _line_values(head, text)
    elif first_line[0] == "[":
        yield from _list_values(head, text)
    else:
        yield from _document_values(head + text.read())


def _is_json(line: str) -> bool:
    try:
        parse(line)
    except ValueError:
        return False
    return True


def _line_values(head: str, text: io.TextIOBase) -> Iterator[tuple[str, Any]]:
    """A value a line; a line may also be a list of runs."""
    for number, line in enumerate(_lines(head, text), 1):
        try:
            value = parse(line) if line and not line.isspace() else []
        except ValueError as error:
            value = Unusable("", _not_json(error))
        if isinstance(value, list) and not any(map(_is_message, value)):
            yield from ((f"line {number} item {index}", item) for index, item in enumerate(value))
        else:
            yield f"line {number}", value


def _lines(head: str, text: io.TextIOBase) -> Iterator[str]:
    *lines, last = head.split("\n")
    yield from lines
    yield last + text.readline()
    yield from text


def _document_values(whole: str) -> Iterator[tuple[str, Any]]:
    """Values that span lines, one after the other; if the first one cannot be read, then a value a line."""
    at, index = _skip(whole, 0, _SPACE), 0
    while at < len(whole):
        try:
            value, at = _decoder.raw_decode(whole, at)
        except (ValueError, RecursionError) as error:
            if index == 0 and "\n" in whole.strip():
                yield from _line_values(whole, io.StringIO())
            else:
                yield f"item {index}", Unusable("and what follows it", _not_json(error))
            return
        at = _skip(whole, at, _SPACE)
        yield "" if index == 0 and at == len(whole) else f"item {index}", value
        index += 1


def _list_values(head: str, text: io.TextIOBase) -> Iterator[tuple[str, Any]]:
    """The items of a list; or the list itself, where they are messages."""
    messages: list[Any] = []
    for index, value in enumerate(_elements(head, text)):
        if not isinstance(value, Unusable) and (messages or (index == 0 and _is_message(value))):
            messages.append(value)
        else:
            yield f"item {index}", value
    if messages:
        yield "", messages


def _elements(head: str, text: io.TextIOBase) -> Iterator[Any]:
    """The elements of the list that begins in `head`, each as soon as it has been read whole."""
    buffer, at, passed, more = head, head.index("[") + 1, 0, CHUNK_CHARACTERS
    while True:
        at = _skip(buffer, at, _SPACE + ",")
        if buffer[at : at + 1] == "]":
            if (buffer[at + 1 :] + text.read(CHUNK_CHARACTERS)).strip():
                yield Unusable("and what follows it", "it stands after the end of the list")
            return
        problem = "the file ends within the list"
        try:
            value, end = _decoder.raw_decode(buffer, at)
            whole = end < len(buffer) or isinstance(value, dict | list)  # at the very end a number may go on
        except (ValueError, RecursionError) as error:
            whole, problem = False, _not_json(error, passed) if at < len(buffer) else problem
            more = more if _may_go_on(error, buffer) else 0
        if whole:
            yield value
            at, more = end, CHUNK_CHARACTERS
        elif added := text.read(more):
            buffer, passed, at = buffer[at:] + added, passed + at, 0
            more *= 2  # so that a large item, which is parsed anew each time, costs no square of its size
        else:
            yield Unusable("and what follows it", problem)
            return


def _may_go_on(error: Exception, buffer: str) -> bool:
    """Whether more text could mend it: it is wrong at the very end, or within a string that has no end yet."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos + len("-Infinity") >= len(buffer)


_SPACE = " \t\r\n"


def _skip(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at


def _not_json(error: Exception, passed: int = 0) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON: {error.msg.removesuffix(' at')} at character {passed + error.pos + 1}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
