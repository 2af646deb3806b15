"""A stranger's look at a log: whatever is changed in what was signed is found, and named with its place."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ledger.checkpoint import ED25519, Checkpoint, InvalidNote, SignerKey
from ledger.events import FactRecorded
from ledger.merkle import InvalidProof
from ledger.verify import FAULTS_MAX, Trust, verify_growth, verify_proof
from tests.ledger.written import (
    LARGE,
    LOG,
    ORIGIN,
    TRUST,
    WITNESSES,
    Files,
    checkpoint_of,
    entries,
    event,
    faults,
    growth_of,
    looked_at,
    payload_path,
    proof_of,
    signed,
    written,
)

HISTORY = entries(5, 2)
LONG = entries(70_000, 1000)
"""Its tree has tiles of three levels, the last of each not full."""
OTHER = "0199a7b0-0000-7000-8000-00000000000f"
FORGER = SignerKey(ORIGIN, ED25519, bytes(range(1, 33)))


@pytest.fixture(scope="module")
def long() -> Files:
    return written(LONG)


def test_a_log_as_it_was_written_has_no_fault(long: Files) -> None:
    seen = looked_at(long, checkpoint_of(LONG[:1]), checkpoint_of(LONG[:256]), checkpoint_of(LONG[:69_999]))
    assert (seen.faults, seen.entries, seen.signed and seen.signed.checkpoint.size) == ([], 70_000, 70_000)
    assert seen.signed is not None
    assert {key.name for key in seen.signed.by} == {ORIGIN, "witness-1.example", "witness-2.example"}


@pytest.mark.parametrize("size", [0, 1, 2, 255, 256, 257, 512])
def test_logs_of_every_shape_have_none(size: int) -> None:
    assert faults(written(LONG[:size])) == []


# --- each byte -----------------------------------------------------------------------------------------------


def flipped(content: bytes, at: int, bit: int = 0) -> bytes:
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


def test_each_byte_of_each_entry_is_found_changed_and_its_position_named() -> None:
    files = written(HISTORY)
    path = "tile/entries/000.p/5"
    at = 0
    for position, entry in enumerate(HISTORY, 1):
        for byte in range(len(entry)):
            found = faults(files | {path: flipped(files[path], at + 2 + byte, byte % 8)})
            assert any(fault.startswith(f"{position}: its bytes are not those that were signed") for fault in found)
        at += 2 + len(entry)


@pytest.mark.parametrize("byte", [0, 1])
def test_a_length_that_is_changed_breaks_the_file(byte: int) -> None:
    files = written(HISTORY)
    path = "tile/entries/000.p/5"
    for bit in range(8):
        found = faults(files | {path: flipped(files[path], byte, bit)})
        assert any(fault.startswith((path, "1: its bytes")) for fault in found)


def test_each_byte_of_each_tile_is_found_changed_and_named() -> None:
    history = LONG[:300]
    files = written(history)
    for path, step in (("tile/0/000", 37), ("tile/0/001.p/44", 7), ("tile/1/000.p/1", 1)):
        for at in range(0, len(files[path]), step):
            (found,) = faults(files | {path: flipped(files[path], at, at % 8)})
            assert found.startswith(f"{path.removesuffix('.p/44')}"), found
            assert f"hash {at // 32} " in found


def test_each_byte_of_the_checkpoint_and_of_each_signature_is_found_changed() -> None:
    files = written(HISTORY)
    note = files["checkpoint"]
    for at in range(len(note)):
        for bit in range(8):
            (found,) = faults(files | {"checkpoint": flipped(note, at, bit)})
            assert found.startswith("checkpoint: "), (at, found)


def test_each_byte_of_a_proof_is_found_changed() -> None:
    proof = proof_of(HISTORY, 3)
    assert verify_proof(proof, HISTORY[2], TRUST)[0] == 3
    for at in range(len(proof)):
        with pytest.raises((InvalidNote, InvalidProof)):
            verify_proof(flipped(proof, at), HISTORY[2], TRUST)
    for at in range(len(HISTORY[2])):
        with pytest.raises(InvalidProof):
            verify_proof(proof, flipped(HISTORY[2], at), TRUST)


# --- history changed, and the tree made anew over it ---------------------------------------------------------

Change = Callable[[list[bytes]], list[bytes]]


def without(position: int) -> Change:
    return lambda history: history[: position - 1] + history[position:]


def swapped(one: int, other: int) -> Change:
    def change(history: list[bytes]) -> list[bytes]:
        history[one - 1], history[other - 1] = history[other - 1], history[one - 1]
        return history

    return change


def instead(position: int, **fields: Any) -> Change:
    def change(history: list[bytes]) -> list[bytes]:
        history[position - 1] = event(position, **fields)[0]
        return history

    return change


REWRITTEN: list[tuple[Change, str]] = [
    (without(100), "101: it is not the next version of the stream"),
    (without(1), "2: it is not the next version of the stream"),
    (swapped(100, 102), "100: it is not the next version of the stream"),
    (swapped(100, 101), "101: it was recorded before an entry that stands before it"),
    (instead(100, stream=0, version=49), "100: it is not the next version of the stream"),
    (instead(100, stream=0, version=51), "100: it is not the next version of the stream"),
    (instead(100, stream=0, version=50, recorded_at="2026-11-21T08:00:00.000000Z"), "100: it was recorded before"),
    (instead(100, stream=0, version=50, ledger=OTHER), "100: it was written for another ledger"),
]


@pytest.mark.parametrize(("change", "expected"), REWRITTEN)
def test_what_was_rewritten_and_signed_anew_contradicts_itself(change: Change, expected: str) -> None:
    """Even the operator's own keys do not help who takes out, moves or renumbers what was recorded."""
    history = change(entries(300, 2))
    found = faults(written(history))
    assert any(fault.startswith(expected) for fault in found), found


@pytest.mark.parametrize(
    "change", [without(100), without(300), swapped(100, 102), instead(100, stream=0, version=50, reason="none")]
)
@pytest.mark.parametrize("held", [100, 200, 300])
def test_what_was_rewritten_and_signed_anew_is_not_what_somebody_holds(change: Change, held: int) -> None:
    before = entries(310, 2)
    history = change(list(before))
    kept = checkpoint_of(before[:held])
    found = [fault for fault in faults(written(history), kept) if fault.startswith("root: ")]
    changed = history[:held] != before[:held]
    assert bool(found) == changed
    if changed:
        assert f"the first {held} entries are not those that were signed" in found[0]
        assert f"expected {kept.root.hex()}" in found[0]


def test_the_tail_that_is_gone_is_missing_from_what_was_signed() -> None:
    whole, cut = written(entries(300)), written(entries(290))
    assert faults(cut | {"checkpoint": whole["checkpoint"]})[:2] == [
        "tile/0/001.p/44: it is missing",
        "tile/entries/001.p/44: it is missing",
    ]


def test_a_history_that_was_rolled_back_is_shorter_than_what_somebody_holds() -> None:
    (found,) = faults(written(HISTORY[:4]), checkpoint_of(HISTORY))
    assert found == (
        "checkpoint: it ends before the one that is held: history was rolled back, or this is an older copy "
        "(expected 5, found 4)"
    )


@pytest.mark.parametrize("change", [without(100), swapped(3, 4), instead(200, stream=0, version=100, reason="none")])
def test_what_was_rewritten_under_the_old_checkpoint_has_another_root(change: Change) -> None:
    before = entries(300, 2)
    after = written(change(entries(301, 2))[:300])
    found = faults(after | {"checkpoint": written(before)["checkpoint"]})
    assert found[-1].startswith("root: the first 300 entries are not those that were signed")


def test_an_entry_and_its_hash_that_were_changed_together_are_named_by_the_tile_above() -> None:
    history = LONG[:600]
    files, other = written(history), written([*history[:299], event(300, 300, 1, reason="another")[0], *history[300:]])
    for path in ("tile/entries/001", "tile/0/001"):
        files[path] = other[path]
    found = faults(files)
    assert found[0].startswith("tile/1/000.p/2: its hash 1 is not that of the tile below")
    assert found[1].startswith("root: the first 600 entries are not those that were signed")


def test_an_entry_whose_hash_was_changed_to_a_third_is_named_as_such() -> None:
    files = written(HISTORY)
    files["tile/0/000.p/5"] = flipped(files["tile/0/000.p/5"], 64)
    files["tile/entries/000.p/5"] = files["tile/entries/000.p/5"].replace(b"number 3", b"number 9")
    found = faults(files)
    assert found[0].startswith("3: its bytes and its hash differ, and neither leads to what was signed")
    assert found[-1].startswith("root: ")


# --- who signed ----------------------------------------------------------------------------------------------


def test_another_key_under_the_same_name_is_not_believed() -> None:
    note = signed(checkpoint_of(HISTORY), log=FORGER)
    (found,) = faults(written(HISTORY, note=note))
    assert found == "checkpoint: no key that is known here has signed the note"


def test_what_a_known_key_did_not_sign_is_refused_beside_what_another_did() -> None:
    right, wrong = signed(checkpoint_of(HISTORY)), signed(checkpoint_of(HISTORY[:4]))
    lines = right.split(b"\n")
    lines[4] = wrong.split(b"\n")[4]
    (found,) = faults(written(HISTORY, note=b"\n".join(lines)))
    assert "is not one of this text" in found


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (5, "is not one of this text"),  # a witness's line from an older checkpoint
        (6, "is not one of this text"),
    ],
)
def test_a_witness_of_an_older_checkpoint_is_none_of_this_one(line: int, said: str) -> None:
    now, stale = signed(checkpoint_of(HISTORY)).split(b"\n"), signed(checkpoint_of(HISTORY[:4])).split(b"\n")
    now[line] = stale[line]
    (found,) = faults(written(HISTORY, note=b"\n".join(now)))
    assert said in found


def test_fewer_witnesses_than_must_are_too_few() -> None:
    (found,) = faults(written(HISTORY, note=signed(checkpoint_of(HISTORY), witnesses=WITNESSES[:1])))
    assert found == "checkpoint: 1 of 2 witnesses have signed it, but 2 must"


def test_the_log_of_another_ledger_is_not_taken_for_this_one() -> None:
    other = Checkpoint(f"log.example/{OTHER}", 5, checkpoint_of(HISTORY).root)
    stranger = LOG._replace(name=other.origin)
    files = written(HISTORY, note=signed(other, log=stranger))
    (found,) = faults(files)
    assert "of which no key is known here" in found
    found = faults(files, trust=Trust([stranger.verifier]))[0]
    assert found.startswith("1: it was written for another ledger")


# --- two checkpoints -----------------------------------------------------------------------------------------


def growth(old: Checkpoint, new: Checkpoint, proof: Sequence[bytes] | None = None) -> list[str]:
    return [str(fault) for fault in verify_growth(old, new, proof)]


def test_a_history_that_grew_is_shown_to_have_grown() -> None:
    for old in range(1, 6):
        proof = growth_of(HISTORY, old)
        assert growth(checkpoint_of(HISTORY[:old]), checkpoint_of(HISTORY), proof) == []
        assert growth(checkpoint_of(HISTORY), checkpoint_of(HISTORY[:old]), proof) == []
    assert growth(checkpoint_of([]), checkpoint_of(HISTORY)) == []


def test_a_fork_is_shown_by_two_checkpoints_of_one_size() -> None:
    forked = [*HISTORY[:4], event(6)[0]]
    (found,) = growth(checkpoint_of(HISTORY), checkpoint_of(forked))
    assert found.startswith("checkpoints: its log signed two histories of 5 entries")


def test_a_fork_of_another_size_cannot_be_proven_to_be_the_beginning() -> None:
    forked = [*HISTORY[:3], event(6)[0]]
    for proof in (growth_of(HISTORY, 4), []):
        (found,) = growth(checkpoint_of(forked), checkpoint_of(HISTORY), proof)
        assert "it is not shown that 5 entries begin with those 4" in found
    with pytest.raises(ValueError, match="a consistency proof from 4 to 5 is needed"):
        growth(checkpoint_of(forked), checkpoint_of(HISTORY))


def test_checkpoints_of_two_logs_are_not_compared() -> None:
    (found,) = growth(checkpoint_of(HISTORY, "a.example/1"), checkpoint_of(HISTORY))
    assert "they are of two logs" in found


# --- one entry -----------------------------------------------------------------------------------------------


def test_every_entry_can_be_shown_to_stand_at_its_position_and_at_no_other() -> None:
    for position in range(1, 6):
        proof = proof_of(HISTORY, position)
        for place, entry in enumerate(HISTORY, 1):
            if place == position:
                assert verify_proof(proof, entry, TRUST)[0] == position
            else:
                with pytest.raises(InvalidProof):
                    verify_proof(proof, entry, TRUST)


@pytest.mark.parametrize("index", [0, 1, 3, 4, 5, 2**40])
def test_a_proof_for_another_index_is_none(index: int) -> None:
    proof = proof_of(HISTORY, 3).replace(b"index 2\n", b"index %d\n" % index)
    with pytest.raises(InvalidProof):
        verify_proof(proof, HISTORY[2], TRUST)


def test_a_proof_for_another_size_or_ledger_is_none() -> None:
    with pytest.raises(InvalidProof):
        verify_proof(proof_of(HISTORY, 3, signed(checkpoint_of(HISTORY[:3]))), HISTORY[2], TRUST)
    other = checkpoint_of(HISTORY, "log.example/other")
    with pytest.raises(InvalidNote, match="of which no key is known"):
        verify_proof(proof_of(HISTORY, 3, signed(other, log=LOG._replace(name=other.origin))), HISTORY[2], TRUST)


# --- files ---------------------------------------------------------------------------------------------------


def test_a_file_that_is_full_takes_the_place_of_those_that_were_parts_of_it() -> None:
    older, newer = written(LONG[:300]), written(LONG[:600])
    parts = {path: content for path, content in older.items() if ".p/" in path}
    assert list(parts) == ["tile/0/001.p/44", "tile/entries/001.p/44", "tile/1/000.p/1"]
    del parts["tile/0/001.p/44"], parts["tile/entries/001.p/44"]
    assert faults(newer | parts | {"checkpoint": older["checkpoint"]}) == []


@pytest.mark.parametrize("path", ["tile/entries/001", "tile/0/001", "tile/1/000.p/2", "checkpoint"])
def test_a_file_that_is_missing_is_named(path: str) -> None:
    files = written(LONG[:600])
    del files[path]
    assert faults(files) == [f"{path}: it is missing"]


def test_where_entries_and_their_hashes_are_missing_there_is_no_root_and_the_rest_is_looked_at() -> None:
    files = written(LONG[:600])
    del files["tile/entries/001"], files["tile/0/001"]
    files["tile/entries/002.p/88"] = files["tile/entries/002.p/88"].replace(b"number 550", b"number 551")
    found = faults(files)
    assert found[:2] == ["tile/0/001: it is missing", "tile/entries/001: it is missing"]
    assert any(fault.startswith("550: its bytes") for fault in found)
    assert found[-1].endswith("found none)")


def test_a_log_that_says_to_be_without_end_is_looked_at_as_far_as_it_goes() -> None:
    endless = LONG[:600]
    files = written(endless, note=signed(checkpoint_of(endless)._replace(size=2**40)))
    files["tile/entries/001"] = flipped(files["tile/entries/001"], 100)
    seen = looked_at(files)
    assert seen.faulty > FAULTS_MAX
    assert seen.entries == 512
    assert any(str(fault).startswith("257: its bytes") for fault in seen.faults)


def test_what_stands_behind_the_end_of_a_file_is_a_fault() -> None:
    files = written(HISTORY)
    for path in ("tile/0/000.p/5", "tile/entries/000.p/5"):
        (found,) = faults(files | {path: files[path] + b"\0"})
        assert found.startswith(f"{path}: it is not whole")


def test_data_beside_an_entry_is_compared_with_what_the_entry_says() -> None:
    entry, payload = event(1, fact=FactRecorded(kind="k", body=LARGE), stream=9, version=1)
    assert payload is not None
    files = written([entry], [payload])
    seen = looked_at(files)
    assert (seen.faults, seen.payloads) == ([], 1)
    path = payload_path(payload)
    (found,) = faults({key: value for key, value in files.items() if key != path})
    assert found.startswith("1: the data beside it is missing")
    (found,) = faults(files | {path: flipped(payload, 60_000)})
    assert found.startswith("1: the data beside it is not what it was recorded with")


def test_streams_of_other_programs_are_numbered_as_they_like() -> None:
    theirs = [event(1, 7, 2, stream_type="aggregate")[0], event(2, 7, 3, stream_type="aggregate")[0]]
    assert faults(written(theirs)) == []
    assert faults(written([event(1, 7, 2)[0]])) != []


def test_bytes_that_are_no_event_are_a_fault_though_they_were_signed() -> None:
    found = faults(written([*HISTORY, b"{}", b"\xff"]))
    assert [fault[:31] for fault in found] == ["6: its bytes are no event: Obje", "7: its bytes are no event: JSON"]


def test_of_many_faults_the_first_are_told_and_all_are_counted(long: Files) -> None:
    other = written(entries(2000, 7))
    seen = looked_at(other | {"checkpoint": written(entries(2000, 8))["checkpoint"]})
    assert seen.faulty == 1
    bundle = written([event(n, 0, 1)[0] for n in range(1, 501)])
    seen = looked_at(bundle)
    assert (seen.faulty, len(seen.faults)) == (499, FAULTS_MAX)
