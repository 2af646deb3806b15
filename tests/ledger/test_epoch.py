"""A log that goes on from one that was rolled back says so, and what is lost can be told by whoever held it."""

from collections.abc import Sequence

import pytest

from ledger.checkpoint import Checkpoint
from ledger.epoch import Epoch
from ledger.evidence import Asked, Inventory, verify_bundle
from ledger.verify import Stated, Trust, Verdict
from tests.ledger.adopted import (
    NEW,
    NEWEST,
    SIGNED_BEFORE,
    STREAM,
    TRUSTED,
    adopted,
    adoption,
    files_of,
    held,
    note_of,
    origin_of,
    renumbered,
)
from tests.ledger.written import (
    LEDGER,
    LOG,
    ORIGIN,
    Files,
    checkpoint_of,
    entries,
    event,
    faults,
    looked_at,
    proof_of,
    reader,
)

FORKED = [*SIGNED_BEFORE[:280], *renumbered(281, 300, LEDGER)]
BEFORE = "history begins anew at position 301: " + ORIGIN + " went before, and "


@pytest.mark.parametrize(
    ("last", "is_here", "said"),
    [
        (None, None, "no checkpoint of it was known"),
        (held(310), False, "its newest checkpoint that was known covered 310 entries, of which at most 300 are here"),
        (held(301), False, "its newest checkpoint that was known covered 301 entries, of which at most 300 are here"),
        (held(300), True, "its newest checkpoint that was known covered 300 entries, which are all here"),
        (held(17), True, "its newest checkpoint that was known covered 17 entries, which are all here"),
        (
            held(290, FORKED),
            False,
            "its newest checkpoint that was known covered 290 entries, which are not those that are here",
        ),
    ],
)
def test_a_log_that_goes_on_from_another_is_whole_and_says_what_it_has_of_it(
    last: Checkpoint | None, is_here: bool | None, said: str
) -> None:
    seen = looked_at(files_of(adopted(last)), trust=TRUSTED)
    assert (seen.faults, seen.entries) == ([], 400)
    assert seen.epochs == [Epoch(301, ORIGIN, last, is_here)]
    assert str(seen.epochs[0]) == BEFORE + said


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (held(290), None),
        (held(300), None),
        (held(301), "301: 1 entries are lost that the checkpoint of " + ORIGIN + " covers: it was rolled back"),
        (held(310), "301: 10 entries are lost that the checkpoint of " + ORIGIN + " covers: it was rolled back"),
        (held(290, FORKED), "root: the first 290 entries are not those that were signed before"),
        (held(280, FORKED), None),
        (checkpoint_of(SIGNED_BEFORE[:5], origin_of(NEWEST)), "checkpoint: it is of another log than the one that is"),
    ],
)
def test_what_somebody_holds_of_the_log_before_is_compared(one: Checkpoint, expected: str | None) -> None:
    found = faults(files_of(adopted(held(310))), one, trust=TRUSTED)
    assert len(found) == (expected is not None)
    assert expected is None or found[0].startswith(expected)


def twice() -> list[bytes]:
    second = adoption(401, NEWEST, NEW, note_of(adopted()), version=2)
    return [*adopted(held(310)), second, *(event(n, 51, n - 401, ledger=NEWEST)[0] for n in range(402, 421))]


def test_a_log_may_go_on_more_than_once() -> None:
    trust = TRUSTED._replace(log=[LOG.verifier._replace(name=origin_of(NEWEST))])
    files = files_of(twice(), NEWEST)
    seen = looked_at(files, held(300), checkpoint_of(adopted(held(310))[:350], origin_of(NEW)), trust=trust)
    assert seen.faults == []
    assert [(one.position, one.origin) for one in seen.epochs] == [(301, ORIGIN), (401, origin_of(NEW))]
    (found,) = faults(files, checkpoint_of(adopted()[:400] * 2, origin_of(NEW)), trust=trust)
    assert found.startswith(f"401: 400 entries are lost that the checkpoint of {origin_of(NEW)} covers")


def instead(position: int, entry: bytes) -> list[bytes]:
    history = adopted()
    history[position - 1] = entry
    return history


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        (instead(350, event(350, 50, 49, ledger=LEDGER)[0]), "350: it was written for another ledger"),
        (instead(250, event(250, 1, 84, ledger=NEW)[0]), "250: it was written for another ledger"),
        (instead(250, event(250, 1, 84, ledger=NEWEST)[0]), "250: it was written for another ledger"),
        (instead(301, adoption(301, NEW, NEWEST)), "1: it was written for another ledger"),
        (instead(301, adoption(301, NEW, NEW)), "1: it was written for another ledger"),
        (instead(301, adoption(301, LEDGER, NEW)), "1: it was written for another ledger"),
        (instead(301, event(301, STREAM, 1, ledger=NEW)[0]), "1: it was written for another ledger"),
        (
            instead(301, adoption(301, NEW, LEDGER).replace(b'"stream_type":"log"', b'"stream_type":"record"')),
            "1: it was written for another ledger",
        ),
        (
            instead(301, adoption(301, NEW, LEDGER).replace(b'"adopted":"', b'"adapted":"')),
            "301: its bytes are no event",
        ),
        (instead(301, adoption(301, NEW, LEDGER, b"a log\n")), "301: it names no checkpoint of the log before"),
        (
            instead(301, adoption(301, NEW, LEDGER, note_of(SIGNED_BEFORE))),
            "301: it names no checkpoint of the log before: it is of " + origin_of(NEW),
        ),
        ([*adopted()[:350], adoption(351, LEDGER, NEW, version=2)], "351: it was written for another ledger"),
    ],
)
def test_what_no_chain_of_adoptions_leads_to_is_of_another_ledger(history: Sequence[bytes], expected: str) -> None:
    found = faults(files_of(history), trust=TRUSTED)
    assert found[0].startswith(expected), found


def test_an_id_is_of_one_epoch_alone() -> None:
    again = [*adopted(), adoption(401, LEDGER, NEW, version=2), event(402, 51, 1)[0]]
    found = faults(files_of(again, LEDGER), trust=Trust([LOG.verifier]))
    assert found == [f"1: it was written for another ledger (expected {NEW}, found {LEDGER})"]


# --- bundles -------------------------------------------------------------------------------------------------


def bundle(history: Sequence[bytes], positions: Sequence[int], asked: Asked) -> Files:
    note = note_of(history)
    found = Inventory(asked, checkpoint_of(history, origin_of(NEW)))
    files: Files = {"checkpoint": note}
    for position in positions:
        found.take(position, Stated.of(history[position - 1]))
        files[f"entries/{position}.json"] = history[position - 1]
        files[f"proofs/{position}.tlog-proof"] = proof_of(history, position, note)
    return files | {"manifest.json": found.manifest().encode()}


def verified(positions: Sequence[int], asked: Asked, history: Sequence[bytes]) -> tuple[Verdict, str]:
    files = bundle(history, positions, asked)
    found, manifest = verify_bundle(reader(files), files, TRUSTED)
    assert manifest is not None
    return found, manifest.completeness.state


def test_a_bundle_of_what_was_recorded_before_needs_the_entry_by_which_the_log_goes_on() -> None:
    history = adopted(held(290))
    found, state = verified([3, 4, 5, 301], Asked(first=3, last=5), history)
    assert (found.faults, state) == ([], "proven")
    assert str(found.epochs[0]) == (
        f"{BEFORE}its newest checkpoint that was known covered 290 entries; whether those are here the whole log shows"
    )
    found, _ = verified([3, 4, 5], Asked(first=3, last=5), history)
    assert [str(fault)[:37] for fault in found.faults] == ["3: it was written for another ledger "]
    assert verified([302, 303], Asked(first=302, last=303), history)[0].epochs == []


def test_no_version_of_the_stream_of_adoptions_is_missed() -> None:
    history = instead(301, adoption(301, NEW, LEDGER, version=2))
    found, state = verified([3, 6, 301], Asked(session=NEW), history)
    assert (found.faults, state) == ([], "not_established")
    assert verified([3, 9, 301], Asked(session=NEW), history)[1] == "gap"


def test_entries_of_one_ledger_need_no_adoption() -> None:
    assert looked_at(files_of([event(1, 50, 1, ledger=NEW)[0]]), trust=TRUSTED).faults == []
    assert faults(files_of(entries(3)), trust=TRUSTED) == [
        f"1: it was written for another ledger (expected {NEW}, found {LEDGER})"
    ]
