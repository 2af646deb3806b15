"""A bundle says of its entries what they are, and nothing that cannot be computed from them again."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import msgspec
import pytest

from ledger.checkpoint import ED25519, SignerKey
from ledger.events import FactRecorded
from ledger.evidence import Asked, Inventory, Manifest, verify_bundle
from ledger.verify import FAULTS_MAX, Stated
from tests.ledger.written import (
    LARGE,
    ORIGIN,
    TRUST,
    Files,
    checkpoint_of,
    entries,
    event,
    payload_path,
    proof_of,
    reader,
    signed,
)

HISTORY = entries(40, 4)
SESSION = UUID("0199a7c2-0000-7000-8000-000000000001")
STRETCH = Asked(first=3, last=7)


def bundle(asked: Asked, positions: Sequence[int], history: Sequence[bytes] = HISTORY) -> Files:
    found = Inventory(asked, checkpoint_of(history))
    note = signed(checkpoint_of(history))
    files: Files = {"checkpoint": note}
    for position in positions:
        found.take(position, Stated.of(history[position - 1]))
        files[f"entries/{position}.json"] = history[position - 1]
        files[f"proofs/{position}.tlog-proof"] = proof_of(history, position, note)
    return files | {"manifest.json": found.manifest().encode()}


def looked_at(files: Files) -> tuple[list[str], Manifest | None]:
    found, manifest = verify_bundle(reader(files), files, TRUST)
    assert (found.faulty == 0) == (found.faults == [])
    return [str(fault) for fault in found.faults], manifest


def state(files: Files) -> tuple[str, tuple[str, ...]]:
    faults, manifest = looked_at(files)
    assert (faults, manifest is None) == ([], False)
    assert manifest is not None
    return manifest.completeness.state, manifest.completeness.missing


def test_a_stretch_is_proven_to_be_whole() -> None:
    assert state(bundle(STRETCH, range(3, 8))) == ("proven", ())


def test_what_is_missing_from_a_stretch_is_a_gap_that_is_named() -> None:
    assert state(bundle(STRETCH, [4, 5, 7])) == ("gap", ("positions 3 to 3", "positions 6 to 6"))


def at(position: int) -> str:
    return f"2026-11-21T09:00:00.{position:06}Z"


@pytest.mark.parametrize(
    ("since", "until", "positions"),
    [
        (at(3), at(8), range(2, 9)),  # those before and behind are here
        (None, at(8), range(1, 9)),  # there is none before the first
        (at(35), None, range(34, 41)),  # and none behind the last
        (at(35), "2027-01-01T00:00:00.000000Z", range(34, 41)),
        (None, "2027-01-01T00:00:00.000000Z", range(1, 41)),
    ],
)
def test_a_time_is_proven_by_those_beside_it(since: str | None, until: str | None, positions: range) -> None:
    asked = Asked(first=int(since[-5:-1]) if since else 1, last=7 if until == at(8) else 40, since=since, until=until)
    assert state(bundle(asked, positions)) == ("proven", ())


@pytest.mark.parametrize(
    ("since", "until", "positions"),
    [
        (at(3), at(8), range(3, 9)),  # the one before is not here
        (at(3), at(8), range(2, 8)),  # nor the one behind
        (at(2), at(8), range(2, 9)),  # it is here, and of that time
        (at(3), at(9), range(2, 9)),
        (None, at(8), range(2, 9)),  # whatever is before would be of that time
        (at(3), None, range(2, 9)),
    ],
)
def test_of_a_time_whose_neighbours_are_not_outside_of_it_nothing_is_established(
    since: str | None, until: str | None, positions: range
) -> None:
    asked = Asked(first=3, last=7, since=since, until=until)
    assert state(bundle(asked, positions)) == ("not_established", ())


def test_a_neighbour_whose_time_is_none_is_not_outside() -> None:
    history = [*HISTORY[:1], HISTORY[1].replace(at(2).encode(), b"!" * 27), *HISTORY[2:]]
    files = bundle(Asked(first=3, last=7, since=at(3), until=at(8)), range(2, 9), history)
    assert state(files)[0] == "not_established"


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"first": 1},
        {"last": 1},
        {"first": 0, "last": 1},
        {"first": 2, "last": 1},
        {"session": str(SESSION), "approval": str(SESSION)},
        {"session": str(SESSION), "first": 1, "last": 2},
        {"session": str(SESSION), "since": at(1)},
        {"since": at(1)},
        {"first": 1, "last": 2, "since": "yesterday"},
    ],
)
def test_what_was_asked_for_has_one_form(asked: dict[str, Any]) -> None:
    faults, manifest = looked_at(with_manifest(bundle(STRETCH, range(3, 8)), asked=asked))
    assert (len(faults), manifest) == (1, None)
    assert faults[0].startswith("manifest.json: ")


def test_a_stretch_does_not_end_behind_the_log() -> None:
    files = bundle(Asked(first=38, last=41), range(38, 41))
    assert looked_at(files)[0] == ["manifest.json: it asks for positions that the log has not (expected 40, found 41)"]


@pytest.mark.parametrize("runs", [[[3, 7], [3, 7]], [[3, 5], [5, 7]], [[6, 7], [3, 5]], [[7, 3]], [[0, 7]]])
def test_runs_follow_each_other(runs: list[list[int]]) -> None:
    faults, _ = looked_at(with_manifest(bundle(STRETCH, range(3, 8)), runs=runs))
    assert faults == ["manifest.json: its runs of positions do not follow each other"]


@pytest.mark.parametrize(
    "name", ["entries/8.json", "entries/03.json", "payload/0", "readme.txt", "", "/entries/3.json"]
)
def test_a_file_that_nothing_is_about_is_a_fault(name: str) -> None:
    files = bundle(STRETCH, range(3, 8)) | {"keys.json": b"{}", "report.html": b"all is well"}
    assert looked_at(files)[0] == []
    assert looked_at(files | {name: b"{}"})[0] == [
        f"{name}: nothing in the bundle is about it, and it was not looked at"
    ]


def test_of_a_session_a_version_that_is_missing_is_a_gap() -> None:
    assert state(bundle(Asked(session=SESSION), [4, 8, 12, 5, 9][:3])) == ("not_established", ())
    gap = state(bundle(Asked(session=SESSION), [4, 12]))
    assert gap[0] == "gap"
    assert gap[1][0].startswith("versions 2 to 2 of ")


def test_counts_times_and_runs_are_those_of_the_entries() -> None:
    _, manifest = looked_at(bundle(Asked(session=SESSION), [1, 2, 3, 5]))
    assert manifest is not None
    assert (manifest.entries, manifest.runs, manifest.streams) == (4, ((1, 3), (5, 5)), 3)
    assert manifest.types == {"SessionAnnotated": 4}
    assert (manifest.first_recorded_at, manifest.last_recorded_at) == (
        "2026-11-21T09:00:00.000001Z",
        "2026-11-21T09:00:00.000005Z",
    )


def with_manifest(files: Files, **fields: Any) -> Files:
    said = msgspec.json.decode(files["manifest.json"])
    return files | {"manifest.json": msgspec.json.encode(said | fields)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("entries", 6),
        ("streams", 1),
        ("types", {"VoteCast": 5}),
        ("last_recorded_at", "2027-01-01T00:00:00.000000Z"),
        ("size", 41),
        ("origin", "another.example/log"),
        ("completeness", {"state": "gap", "because": "it is so"}),
        ("asked", {"first": 3, "last": 6}),
        ("asked", {"first": 3, "last": 8}),
        ("asked", {"session": str(SESSION)}),
    ],
)
def test_a_manifest_that_says_something_else_than_its_entries_is_found_out(name: str, value: Any) -> None:
    faults, _ = looked_at(with_manifest(bundle(STRETCH, range(3, 8)), **{name: value}))
    assert faults
    assert all(fault.startswith("manifest.json: it says of ") for fault in faults)


def test_a_gap_cannot_be_told_as_whole() -> None:
    whole, gap = bundle(STRETCH, range(3, 8)), bundle(STRETCH, [3, 4, 6, 7])
    faults, _ = looked_at(gap | {"manifest.json": whole["manifest.json"]})
    assert faults[0] == "5: entries/5.json is missing"
    assert any(fault.startswith("manifest.json: it says of completeness") for fault in faults)


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :]


@pytest.mark.parametrize("path", ["entries/3.json", "proofs/3.tlog-proof", "checkpoint"])
def test_each_byte_of_a_file_is_found_changed_and_named(path: str) -> None:
    files = bundle(Asked(first=3, last=3), [3])
    for at in range(len(files[path])):
        faults, _ = looked_at(files | {path: flipped(files[path], at)})
        assert faults
        assert any(fault.startswith(("3: ", path)) for fault in faults), faults


def test_a_proof_of_another_entry_or_another_checkpoint_is_none() -> None:
    files = bundle(STRETCH, range(3, 8))
    for other in (
        files["proofs/4.tlog-proof"],
        proof_of(HISTORY[:30], 3),
        proof_of(HISTORY[:30], 3, files["checkpoint"]),
    ):
        faults, _ = looked_at(files | {"proofs/3.tlog-proof": other})
        assert len(faults) == 1
        assert faults[0].startswith(("3: ", "proofs/3.tlog-proof: "))


def test_entries_that_changed_places_are_found() -> None:
    files = bundle(STRETCH, range(3, 8))
    files["entries/3.json"], files["entries/4.json"] = files["entries/4.json"], files["entries/3.json"]
    faults, _ = looked_at(files)
    assert {fault[:2] for fault in faults} >= {"3:", "4:"}


def test_a_checkpoint_of_another_key_is_not_believed() -> None:
    forger = SignerKey(ORIGIN, ED25519, bytes(range(1, 33)))
    files = bundle(STRETCH, range(3, 8)) | {"checkpoint": signed(checkpoint_of(HISTORY), log=forger)}
    assert looked_at(files)[0] == ["checkpoint: no key that is known here has signed the note"]


def test_data_beside_an_entry_is_looked_at() -> None:
    entry, payload = event(1, fact=FactRecorded(kind="k", body=LARGE), stream=9, version=1)
    assert payload is not None
    files = bundle(Asked(first=1, last=1), [1], [entry]) | {payload_path(payload): payload}
    assert state(files) == ("proven", ())
    faults, _ = looked_at(files | {payload_path(payload): payload[:-1]})
    assert faults[0].startswith("1: the data beside it is not what it was recorded with")


@pytest.mark.parametrize("path", ["manifest.json", "checkpoint", "entries/3.json", "proofs/3.tlog-proof"])
def test_what_is_missing_is_named(path: str) -> None:
    files = bundle(STRETCH, range(3, 8))
    del files[path]
    faults, _ = looked_at(files)
    assert path in faults[0]
    assert "is missing" in faults[0]


def test_a_manifest_that_promises_without_end_is_not_followed_for_ever() -> None:
    files = with_manifest(bundle(STRETCH, range(3, 8)), runs=[[1, 2**60]])
    faults, _ = looked_at(files)
    assert len(faults) == FAULTS_MAX


def test_an_empty_bundle_shows_nothing_and_says_so() -> None:
    assert state(bundle(Asked(first=3, last=4), [])) == ("gap", ("positions 3 to 4",))
