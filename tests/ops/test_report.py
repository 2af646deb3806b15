"""The page of a bundle tells whatever stands in its entries, and does what none of them says."""

import copy
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from ledger.checkpoint import Checkpoint, Signed
from ledger.entry import encode
from ledger.evidence import Asked, Inventory, Manifest
from ledger.verify import Verdict
from ops.report import Told, report, report_of, visible
from tests.ledger.golden import GOLDEN, event_of
from tests.ledger.written import LOG, ORIGIN, entries, reader

FACTS = [event_of(fact) for fact, *_ in GOLDEN]
EVENTS: list[dict[str, Any]] = [msgspec.json.decode(encode(event)[0]) for event in FACTS]
SIGNED = Signed(Checkpoint(ORIGIN, 500, bytes(32)), {LOG.verifier: None})
ODD: list[Any] = [None, [], {}, 7, "{0.__class__}{x!r:>9}", ["x"], {"x": [1]}, True]


def manifest(count: int) -> Manifest:
    return msgspec.structs.replace(
        Inventory(Asked(first=1, last=count), SIGNED.checkpoint).manifest(), runs=((1, count),), entries=count
    )


def page(events: list[dict[str, Any]]) -> str:
    told = [Told(position, event) for position, event in enumerate(events, 1)]
    return report(manifest(len(events)), SIGNED, str(LOG.verifier), told)


def changed(event: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """With each of its fields, and each of those of its data, missing, or odd."""
    for path in [(name,) for name in event] + [("data", name) for name in event["data"]]:
        for value in [..., *ODD]:
            one = copy.deepcopy(event)
            *parents, last = path
            inside = one[parents[0]] if parents else one
            if value is ...:
                del inside[last]
            else:
                inside[last] = value
            yield one


def test_every_fact_is_told() -> None:
    said = page(EVENTS)
    assert "asked for approval (risk " in said
    assert "It is no event" not in said


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event["type"])
def test_an_event_of_an_odd_shape_is_told_among_the_others(event: dict[str, Any]) -> None:
    whole = [one for one in EVENTS if one["stream_type"] in (event["stream_type"], "record")]
    for one in changed(event):
        same = [one if other is event else other | {"stream_id": one.get("stream_id")} for other in whole]
        assert f'id="p{len(same)}"' in page(same)


def test_a_type_is_never_a_format() -> None:
    said = page([EVENTS[0] | {"type": "Session{0.__class__}{data}%s$title"}])
    assert "session{0.__class__}{data}%s$title" in said


def test_an_entry_of_any_bytes_is_told() -> None:
    deep = EVENTS[0] | {"reason": None, "data": {}}
    odd = [
        b"",
        b"[]",
        b'"x"',
        msgspec.json.encode(deep).replace(b'"data":{}', b'"data":{"x":' + b"[" * 900 + b"]" * 900 + b"}"),
        msgspec.json.encode(deep).replace(b'"data":{}', b'"data":{"x":' + b"[" * 90_000 + b"]" * 90_000 + b"}"),
        msgspec.json.encode(deep).replace(b'"data":{}', b'"data":{"x":' + b"9" * 5_000 + b"}"),
        msgspec.json.encode(deep | {"data_sha256": "0" * 64}),
        *entries(2),
    ]
    files = {f"entries/{position}.json": entry for position, entry in enumerate(odd, 1)}
    said = report_of(manifest(len(odd)), Verdict(signed=SIGNED), reader(files | {f"payload/{'0' * 64}": b""}))
    assert f'id="p{len(odd)}"' in said
    assert "number 2" in said


@pytest.mark.parametrize(
    "hidden", ["\x1b", "\x00", "\x9b", "\u202e", "\u2066", "\u2028", "\ufeff", "\ud800", "\U000e0041"]
)
def test_what_cannot_be_seen_is_shown_to_be_there(hidden: str) -> None:
    assert visible(f"a{hidden}b") == "a\ufffdb"
    assert visible("Zoë\t\u05d0 \U0001f600\n") == "Zoë\t\u05d0 \U0001f600\n"
