"""Personal values as they are marked: finding them, and refusing what is marked wrongly.

Of the two forms a value has, `$personal` is what callers send and `$sealed` what is stored. Nothing here knows a key.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from ledger.errors import MalformedRequest

PERSONAL, SEALED, ERASED = "$personal", "$sealed", "$erased"
SUBJECT_CHARACTERS_MAX = 255
DEPTH_MAX = 100
ERRORS_MAX = 20


def subjects(value: Any) -> set[str]:
    """The subjects of the personal values inside `value`, which `check` has passed."""
    return {marked[PERSONAL]["subject"] for marked, _ in marks(value, PERSONAL, "")}


def check(value: Any, pointer: str) -> None:
    """Refuse malformed personal values inside `value` (decoded JSON), which stands at `pointer`.

    Raises MalformedRequest naming the first 20 things wrong. Also refused: the names `$sealed` and
    `$erased`, which are ours, and more than 100 levels of nesting.
    """
    wrong = list(islice(_faults(value, pointer, 0, within=False), ERRORS_MAX))
    if wrong:
        raise MalformedRequest(errors=[{"pointer": at, "detail": detail} for at, detail in wrong])


def _faults(value: Any, at: str, depth: int, *, within: bool) -> Iterator[tuple[str, str]]:
    if depth > DEPTH_MAX:
        yield at, f"nested more than {DEPTH_MAX} levels deep, too deep beside a personal value"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _faults(item, f"{at}/{index}", depth + 1, within=within)
    elif isinstance(value, dict) and PERSONAL in value:
        if within:
            yield at, "a $personal value cannot stand inside another; mark the parts side by side"
        elif len(value) > 1:
            yield at, "$personal must be the only name in its object; move the others out of it"
        else:
            yield from _inner_faults(value[PERSONAL], f"{at}/{PERSONAL}", depth + 1)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name in (SEALED, ERASED):
                yield f"{at}/{name}", f"the name {name} is reserved; choose another"
            else:
                yield from _faults(item, f"{at}/{step(name)}", depth + 1, within=within)


def _inner_faults(inner: Any, at: str, depth: int) -> Iterator[tuple[str, str]]:
    if not isinstance(inner, dict) or inner.keys() != {"subject", "value"}:
        yield at, 'it must be exactly {"subject": "<your subject id>", "value": <any JSON>}'
        return
    subject = inner["subject"]
    if not isinstance(subject, str) or not 1 <= len(subject) <= SUBJECT_CHARACTERS_MAX:
        yield f"{at}/subject", f"it must be a string of 1 to {SUBJECT_CHARACTERS_MAX} characters"
    yield from _faults(inner["value"], f"{at}/value", depth + 1, within=True)


def marks(value: Any, mark: str, at: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Every object inside `value` that has the name `mark`, and the pointer to it."""
    if isinstance(value, dict):
        if mark in value:
            yield value, at
        else:
            for name, item in value.items():
                yield from marks(item, mark, f"{at}/{step(name)}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from marks(item, mark, f"{at}/{index}")


def replaced(value: Any, mark: str, at: str, change: Callable[[dict[str, Any], str], Any]) -> Any:
    """A copy of `value` in which `change` has replaced every object that has the name `mark`."""
    if isinstance(value, dict):
        if mark in value:
            return change(value, at)
        return {
            name: replaced(item, mark, f"{at}/{step(name)}", change) if isinstance(item, dict | list) else item
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [replaced(item, mark, f"{at}/{i}", change) for i, item in enumerate(value)]
    return value


def step(name: str) -> str:
    """A name as one step of a JSON pointer (RFC 6901 s3)."""
    return name.replace("~", "~0").replace("/", "~1")
