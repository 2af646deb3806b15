"""How a command's bytes are read: strictly, and what is wrong with them is said by pointer.

An unknown field, a name given twice, a number that JSON cannot carry or a malformed personal value is refused
here, before anything is decided. Rules are never here; they decide on a command that was read.
"""

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from itertools import chain, islice
from typing import Any, NoReturn, Union

import msgspec
from msgspec import UNSET

from ledger.commands import COMMANDS, EXACT_INTEGER_MAX, Command
from ledger.entry import canonical
from ledger.errors import MalformedRequest, NumberOutOfRange
from ledger.personal import DEPTH_MAX, ERRORS_MAX, check, step

METADATA_BYTES_MAX = 16 * 1024
BODY_BYTES_MAX = 1024 * 1024
PERSONAL_TEXT_BYTES_MAX = 16 * 1024
"""A reason stands in the envelope, which has to fit its entry; so what it may hold is bounded, sealed or not."""

_any: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Union[COMMANDS])  # noqa: UP007  (a tuple of types)
_MOMENTS = ("occurred_at", "expires_at", "started_at", "ended_at", "run_at", "deadline_at")
_BYTES_MAX = {
    "metadata": METADATA_BYTES_MAX,
    "reason": PERSONAL_TEXT_BYTES_MAX,
    "text": PERSONAL_TEXT_BYTES_MAX,
    "summary": PERSONAL_TEXT_BYTES_MAX,
    "body": BODY_BYTES_MAX,
    "payload": BODY_BYTES_MAX,
    "result": BODY_BYTES_MAX,
    "error": BODY_BYTES_MAX,
    "action": BODY_BYTES_MAX,
}
_TEXTS = ("reason", "text", "summary")
# Sixteen digits in a row, whichever they are: a regular expression takes five times as long to find them.
_SAME_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBER = b"0" * 16
_TOO_LARGE = ("Number out of range", "Integer value out of range", f"Expected `int` <= {EXACT_INTEGER_MAX}")
_marked = re.compile(rb'"\$(personal|sealed|erased)"')


def read_command(body: bytes | msgspec.Raw, kind: type[Command] | None = None) -> Command:
    """The command in `body`, of the type it names or, where a route already says so, of `kind`.

    Raises MalformedRequest or NumberOutOfRange with a JSON pointer (RFC 6901) to what is wrong.
    """
    try:
        command = _any.decode(body) if kind is None else _decoder(kind).decode(body)
        encoded = canonical(command)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        explain(error, bytes(body))
    if encoded.count(b"[") + encoded.count(b"{") > DEPTH_MAX:
        _check_depth(msgspec.json.decode(encoded))
    _check_names(bytes(body))
    for name in _MOMENTS:
        if isinstance(moment := getattr(command, name, None), datetime):
            _check_moment(moment, f"/{name}")
    if _LONG_NUMBER in encoded.translate(_SAME_DIGITS):
        check_numbers(msgspec.json.decode(encoded))
    if _marked.search(encoded):
        check(msgspec.json.decode(encoded), "")
        if "$personal" in (getattr(command, "metadata", UNSET) or ()):
            _refuse("/metadata", "it is an object; `$personal` values stand inside it, not in its place")
    if len(encoded) > METADATA_BYTES_MAX:
        _check_sizes(command)
    return command


@cache
def _decoder(kind: type[Command]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def explain(error: Exception, body: bytes) -> NoReturn:
    """Raise what `error`, met while reading `body`, means to its sender."""
    if isinstance(error, RecursionError):
        _refuse("", "it is nested too deeply")
    if isinstance(error, UnicodeDecodeError):
        _refuse("", "it is not UTF-8")
    text, _, path = str(error).partition(" - at `")
    if text in _TOO_LARGE:
        raise NumberOutOfRange([{"pointer": pointer(path), "detail": "the number is too large; send it as a string"}])
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", text, re.DOTALL)
    if unknown:
        _refuse(f"{pointer(path)}/{step(unknown[1])}", "there is no such field")
    _refuse(pointer(path), text if isinstance(error, msgspec.ValidationError) else "it is not valid JSON")


def pointer(path: str) -> str:
    """msgspec's `$.labels[3].x` as a JSON pointer; a dictionary's key it does not tell, so there it ends."""
    steps = re.findall(r"\.([^.\[`]+)|\[(\d+)\]", path.split("[...]")[0].rstrip("`"))
    return "".join(f"/{name or index}".replace("~", "~0") for name, index in steps)


def check_numbers(value: Any) -> None:
    """Refuse integers that a reader using binary64 numbers would see changed (RFC 8259 s6)."""
    wrong = list(islice(_inexact(value, ""), ERRORS_MAX))
    if wrong:
        raise NumberOutOfRange(
            [{"pointer": p, "detail": "the integer is beyond 2^53-1; send it as a string"} for p in wrong]
        )


def _inexact(value: Any, at: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _inexact(item, f"{at}/{step(key)}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _inexact(item, f"{at}/{index}")
    elif isinstance(value, int) and abs(value) > EXACT_INTEGER_MAX:
        yield at


def _check_depth(value: Any) -> None:
    """Refuse what could be read here and not at some deeper place of the program: each level takes stack."""
    level = [value]
    for _ in range(DEPTH_MAX + 1):
        inside = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = list(chain.from_iterable(inside))
    if level:
        _refuse("", f"it is nested more than {DEPTH_MAX} levels deep")


def _check_names(body: bytes) -> None:
    """Refuse an object that says a name twice (RFC 8259 s4): one of the two would be lost to whoever reads the record.

    Read and written again it has fewer colons, for one in a text stays one, unless it was written as an escape.
    """
    kept = msgspec.json.encode(msgspec.json.decode(body))
    if kept.count(b":") != body.count(b":") or b"\\u003" in body:
        json.loads(body, object_pairs_hook=_each_once)


def _each_once(fields: list[tuple[str, Any]]) -> None:
    said = set()
    for name, _ in fields:
        if name in said:
            _refuse("", f"the name {name[:100]} is there twice in one object; send it once")
        said.add(name)


def _check_sizes(command: Command) -> None:
    for name, bytes_max in _BYTES_MAX.items():
        value = getattr(command, name, UNSET)
        counted_in_characters = isinstance(value, str) and name in _TEXTS
        if value is not UNSET and not counted_in_characters and len(canonical(value)) > bytes_max:
            _refuse(f"/{name}", f"it is over {bytes_max} bytes")


def _check_moment(value: datetime, at: str) -> None:
    try:
        value.astimezone(UTC)
    except OverflowError:
        _refuse(at, "in UTC it is not within the years 1 to 9999")


def _refuse(at: str, detail: str) -> NoReturn:
    raise MalformedRequest([{"pointer": at, "detail": detail}])
