"""What a message in the OpenAI format says, in whichever of its forms: calls, results, errors, whom it is about.

Other agents' logs differ: calls of the older kind, arguments that are no JSON, results in parts. Nothing is dropped.
"""

import re
from collections.abc import Iterator
from typing import Any

from ledger.personal import SUBJECT_CHARACTERS_MAX
from ops.transcripts import Run, parse

Json = dict[str, Any]

SUBJECT_KEYS = frozenset({"userid", "customerid"})
_ERROR = re.compile(r"\s*(error|exception|traceback)\b", re.IGNORECASE)


def tool_calls(message: Json) -> Iterator[tuple[Any, Any, Any, Json]]:
    """The calls in a message, in any of their forms: id, name, arguments, and what else is said of it."""
    made = message.get("tool_calls") or []
    if legacy := message.get("function_call"):
        made = [*(made if isinstance(made, list) else [made]), {"function": legacy}]
    for call in made if isinstance(made, list) else [made]:
        if not isinstance(call, dict):
            yield None, None, call, {}
            continue
        inner = next((call[key] for key in ("function", "custom") if isinstance(call.get(key), dict)), call)
        arguments = inner.get("arguments", inner.get("input"))
        used = ("id", "type", "function", "custom", "name", "arguments", "input")
        yield call.get("id"), inner.get("name"), arguments, {k: v for k, v in (call | inner).items() if k not in used}


def opened(value: Any) -> Any:
    """The object or list that a text is the JSON of; any other value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    try:
        return parse(value)
    except ValueError:
        return value


def part(part: Any) -> Any:
    is_text = isinstance(part, dict) and isinstance(part.get("text"), str)
    return part | {"text": opened(part["text"])} if is_text else part


def is_error(message: Json, result: Any) -> bool:
    if isinstance(said := message.get("is_error"), bool):
        return said
    if message.get("status") == "error" or (isinstance(result, dict) and bool(result.get("error"))):
        return True
    return isinstance(result, str) and bool(_ERROR.match(result))


def subject(run: Run) -> str | None:
    """The customer: the first user id in what the run says of itself, else in the arguments of its calls."""
    arguments = (opened(call[2]) for m in run.messages if isinstance(m, dict) for call in tool_calls(m))
    for value in (run.about, *arguments):
        for found in _user_ids(value):
            return found
    return None


def _user_ids(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            is_id = isinstance(item, str | int) and not isinstance(item, bool)
            if is_id and letters(name) in SUBJECT_KEYS and 1 <= len(str(item)) <= SUBJECT_CHARACTERS_MAX:
                yield str(item)
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from _user_ids(item)


def letters(key: str) -> str:
    """A key however it is written: `firstName`, `first-name` and `First name` are one."""
    return re.sub(r"[\s_-]+", "", key).lower()


def line(value: Any) -> str | None:
    """A text or number as one line of text, where it can be one."""
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    return text if 1 <= len(text) <= 255 and text.isprintable() else None
