"""`muniment verify`: from files alone, it shows, names what is wrong, or says what it does not show."""

import os
import subprocess
import sys
from base64 import b64encode
from collections.abc import Sequence
from copy import copy
from datetime import UTC, datetime
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import msgspec
import pytest

from ledger.checkpoint import Note
from ledger.evidence import Asked
from tests.ledger.adopted import KEY as NEW_KEY
from tests.ledger.adopted import adopted, files_of, held
from tests.ledger.test_epoch import bundle as epoch_bundle
from tests.ledger.test_evidence import bundle
from tests.ledger.written import (
    LEDGER,
    LOG,
    ORIGIN,
    WITNESSES,
    Files,
    checkpoint_of,
    entries,
    event,
    growth_of,
    proof_of,
    signed,
    written,
)

HISTORY = entries(300, 3)
KEY = str(LOG.verifier)
LONG_AGO = "2025-01-01T00:00:00.000000Z"
KEYS = msgspec.json.encode({"keys": [{"vkey": KEY, "from": "2026-11-21T09:00:00.000000Z"}]})


def verify(*arguments: object) -> tuple[int, str]:
    """How it ended, and what it said. It has no database and no settings, and none to find."""
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "DATABASE_URL": "nonsense"}
    line = [sys.executable, "-P", "-m", "ops.cli", "verify", *map(str, arguments)]
    ended = subprocess.run(line, env=environ, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout + ended.stderr


def mirror(directory: Path, files: Files) -> Path:
    for path, content in files.items():
        directory.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
        directory.joinpath(path).write_bytes(content)
    return directory


def archive(path: Path, files: Files) -> Path:
    with ZipFile(path, "w") as made:
        for name, content in files.items():
            made.writestr(ZipInfo(name), content)
    return path


def file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_mirror_is_shown_to_be_what_was_signed_and_seen(tmp_path: Path) -> None:
    code, said = verify(
        mirror(tmp_path / "log", written(HISTORY)),
        *("--key", KEY, "--witness", WITNESSES[0].verifier, "--witness", WITNESSES[1].verifier),
    )
    assert code == 0, said
    assert "300 entries, 0 with data beside them: whole" in said
    assert f"signed by {KEY}" in said
    assert "seen by witness-1.example, 2026-11-21 09:00:00 UTC" in said


def test_without_a_key_of_the_callers_own_not_all_is_shown(tmp_path: Path) -> None:
    code, said = verify(mirror(tmp_path / "log", written(HISTORY) | {"keys.json": KEYS}))
    assert code == 2
    assert "whose keys those are that came with it" in said
    assert "300 entries, 0 with data beside them: whole" in said


def test_what_is_wrong_is_named_with_its_place(tmp_path: Path) -> None:
    directory = mirror(tmp_path / "log", written(HISTORY))
    path = directory / "tile/entries/000"
    path.write_bytes(path.read_bytes().replace(b"number 17", b"number 71"))
    code, said = verify(directory, "--key", file(tmp_path / "keys", KEYS))
    assert code == 1
    assert "  17: its bytes are not those that were signed (expected " in said


def test_too_few_witnesses_are_too_few(tmp_path: Path) -> None:
    directory = mirror(tmp_path / "log", written(HISTORY, note=signed(checkpoint_of(HISTORY), witnesses=WITNESSES[:1])))
    both = ("--witness", WITNESSES[0].verifier, "--witness", WITNESSES[1].verifier)
    assert verify(directory, "--key", KEY, *both)[0] == 1
    assert verify(directory, "--key", KEY, *both, "--quorum", 1)[0] == 0


def test_a_mirror_is_compared_with_the_checkpoints_that_are_held(tmp_path: Path) -> None:
    directory = mirror(tmp_path / "log", written(HISTORY))
    held = [file(tmp_path / str(size), signed(checkpoint_of(HISTORY[:size]))) for size in (100, 299)]
    code, said = verify(directory, *held, "--key", KEY)
    assert code == 0, said
    assert "its first 299 entries are those of the checkpoint you hold" in said
    forked = file(tmp_path / "forked", signed(checkpoint_of([*HISTORY[:99], event(400)[0]])))
    code, said = verify(directory, *held, forked, "--key", KEY)
    assert code == 1
    assert "root: the first 100 entries are not those that were signed" in said
    longer = file(tmp_path / "longer", signed(checkpoint_of([*HISTORY, event(301)[0]])))
    assert "rolled back, or this is an older copy" in verify(directory, longer, "--key", KEY)[1]


def test_two_checkpoints_are_compared_by_a_consistency_proof(tmp_path: Path) -> None:
    older = file(tmp_path / "older", signed(checkpoint_of(HISTORY[:100])))
    newer = file(tmp_path / "newer", signed(checkpoint_of(HISTORY)))
    proof = msgspec.json.encode({"proof": [b64encode(one).decode() for one in growth_of(HISTORY, 100)]})
    code, said = verify(newer, older, file(tmp_path / "consistency.json", proof), "--key", KEY)
    assert code == 0, said
    assert "the first 100 of the 300 entries are those 100" in said
    code, said = verify(newer, older, "--key", KEY)
    assert code == 2
    assert "a consistency proof from 100 to 300 is needed" in said
    other = file(tmp_path / "other", signed(checkpoint_of([*HISTORY[:99], event(400)[0]])))
    code, said = verify(newer, other, file(tmp_path / "consistency.json", proof), "--key", KEY)
    assert code == 1
    assert "it is not shown that 300 entries begin with those 100" in said


def consistency(path: Path, old: int, history: Sequence[bytes] = HISTORY) -> Path:
    proof = {"proof": [b64encode(one).decode() for one in growth_of(history, old)]}
    return file(path, msgspec.json.encode(proof))


def test_of_three_checkpoints_each_is_shown_to_be_the_beginning_of_a_newer_one_or_is_not(tmp_path: Path) -> None:
    three = [file(tmp_path / str(size), signed(checkpoint_of(HISTORY[:size]))) for size in (100, 200, 300)]
    first, second = consistency(tmp_path / "first", 100), consistency(tmp_path / "second", 200)
    between = consistency(tmp_path / "between", 100, HISTORY[:200])
    for proofs in ([first, second], [second, first], [between, second]):
        assert verify(*three, *proofs, "--key", KEY)[0] == 0
    code, said = verify(*three, first, "--key", KEY)
    assert (code, "not shown: whether 300 entries begin with those 200" in said) == (2, True)
    assert "the first 100 of the 300 entries are those 100" in said
    assert verify(*three, between, "--key", KEY)[0] == 2
    code, said = verify(three[2], three[0], first, second, "--key", KEY)
    assert (code, "not shown: what a consistency proof is for" in said) == (2, True)
    forked = file(tmp_path / "forked", signed(checkpoint_of([*HISTORY[:199], event(400)[0]])))
    code, said = verify(three[0], forked, three[2], first, second, "--key", KEY)
    assert (code, "it is not shown that 300 entries begin with those 200" in said) == (1, True)


def test_two_mirrors_of_a_log_are_compared_with_each_other(tmp_path: Path) -> None:
    longer = mirror(tmp_path / "longer", written(HISTORY))
    older = mirror(tmp_path / "older", written(HISTORY[:290]))
    forked = mirror(tmp_path / "forked", written([*HISTORY[:289], event(400, 0, 97)[0]]))
    for two in ([longer, older], [older, longer]):
        code, said = verify(*two, "--key", KEY)
        assert (code, "its first 290 entries are those of the checkpoint you hold" in said) == (0, True)
    for two in ([longer, forked], [forked, longer], [forked, older]):
        code, said = verify(*two, "--key", KEY)
        assert (code, "root: the first 290 entries are not those that were signed before" in said) == (1, True)
    assert verify(forked, "--key", KEY)[0] == 0
    stranger = LOG._replace(name=f"another.example/{LEDGER}")
    note = signed(checkpoint_of(HISTORY, stranger.name), log=stranger)
    other = mirror(tmp_path / "other", written(HISTORY, note=note))
    assert verify(other, older, "--key", KEY, "--key", stranger.verifier)[0] == 0


def test_a_log_that_goes_on_from_another_is_compared_with_what_that_had_signed(tmp_path: Path) -> None:
    directory = mirror(tmp_path / "log", files_of(adopted(held(310))))
    key = ("--key", NEW_KEY)
    code, said = verify(directory, *key)
    assert code == 0, said
    assert f"  history begins anew at position 301: {ORIGIN} went before" in said
    assert "its newest checkpoint that was known covered 310 entries, of which at most 300 are here" in said
    older = file(tmp_path / "older", signed(held(290)))
    code, said = verify(directory, older, *key)
    assert (code, "its first 290 entries are those of the checkpoint you hold" in said) == (0, True)
    newer = file(tmp_path / "newer", signed(held(305)))
    code, said = verify(directory, newer, *key)
    assert (code, f"301: 5 entries are lost that the checkpoint of {ORIGIN} covers" in said) == (1, True)
    forged = file(tmp_path / "forged", signed(held(290), log=LOG._replace(seed=bytes(32))))
    code, said = verify(directory, forged, *key)
    assert (code, "no key that is known here has signed the note" in said) == (1, True)
    code, said = verify(older, *key)
    assert (code, "of which no key is known here" in said) == (1, True)
    retired = {"keys": [{"vkey": str(NEW_KEY), "from": LONG_AGO, "until": "2026-01-01T00:00:00.000000Z"}]}
    code, said = verify(directory, older, "--key", file(tmp_path / "keys", msgspec.json.encode(retired)))
    assert (code, said.count("and no witness says that it was before")) == (2, 2)


def test_a_bundle_of_what_was_recorded_before_says_what_went_before_in_its_report_too(tmp_path: Path) -> None:
    files = epoch_bundle(adopted(held(310)), [3, 4, 5, 301], Asked(first=3, last=5))
    path = archive(tmp_path / "b.zip", files)
    key = ("--key", NEW_KEY)
    code, said = verify(path, *key, "--report", tmp_path / "mine.html")
    assert (code, "history begins anew at position 301" in said) == (0, True)
    page = (tmp_path / "mine.html").read_text()
    assert f"History begins anew at position 301: {ORIGIN} went before" in page
    assert "covered 310 entries, of which at most 300 are here" in page
    newer = file(tmp_path / "newer", signed(held(310)))
    code, said = verify(path, newer, *key)
    assert (code, f"301: 10 entries are lost that the checkpoint of {ORIGIN} covers" in said) == (1, True)


def test_what_only_retired_keys_have_signed_must_have_been_seen_before(tmp_path: Path) -> None:
    path = file(tmp_path / "checkpoint", signed(checkpoint_of(HISTORY)))
    witness = ("--witness", WITNESSES[0].verifier)
    for until, alone, seen in (("2026-11-21T08:59:59", 2, 1), ("2026-11-21T09:00:00", 2, 0)):
        keys = {"keys": [{"vkey": KEY, "from": LONG_AGO, "until": f"{until}.000000Z"}]}
        known = file(tmp_path / "keys", msgspec.json.encode(keys))
        code, said = verify(path, "--key", known)
        assert (code, "and no witness says that it was before" in said) == (alone, True)
        assert verify(path, "--key", known, *witness)[0] == seen


def test_one_witness_alone_does_not_say_when_a_retired_key_has_signed(tmp_path: Path) -> None:
    """It was stolen, and so was a witness, which dates back what it signs."""
    checkpoint = checkpoint_of(HISTORY)
    text = checkpoint.text
    times = [datetime(2026, 11, day, 9, 0, 0, tzinfo=UTC) for day in (1, 21)]
    lines = [LOG.sign(text), *(witness.sign(text, at) for witness, at in zip(WITNESSES, times, strict=True))]
    path = file(tmp_path / "checkpoint", str(Note(text, tuple(lines))).encode())
    known = file(
        tmp_path / "keys",
        msgspec.json.encode({"keys": [{"vkey": KEY, "from": LONG_AGO, "until": "2026-11-11T09:00:00.000000Z"}]}),
    )
    both = [path, "--key", known, "--witness", WITNESSES[0].verifier, "--witness", WITNESSES[1].verifier]
    code, said = verify(*both)
    assert (code, "not before 2026-11-21T09:00:00.000000Z had enough witnesses seen it" in said) == (1, True)
    assert verify(*both, "--quorum", 1)[0] == 0
    code, said = verify(*both, "--quorum", 0)
    assert (code, "and no witness says that it was before" in said) == (2, True)


def test_a_report_is_made_anew_from_what_was_verified(tmp_path: Path) -> None:
    files = bundle(Asked(first=3, last=7), range(3, 8), HISTORY) | {"report.html": b"all is well"}
    path = archive(tmp_path / "bundle.zip", files)
    assert verify(path, "--key", KEY, "--report", tmp_path / "mine.html")[0] == 0
    assert "number 5" in (tmp_path / "mine.html").read_text()
    files["entries/5.json"] += b" "
    path = archive(tmp_path / "bundle.zip", files)
    assert verify(path, "--key", KEY, "--report", tmp_path / "none.html")[0] == 1
    assert not (tmp_path / "none.html").exists()


def test_a_mirror_must_have_grown_from_the_checkpoint_of_a_bundle_too(tmp_path: Path) -> None:
    path = archive(tmp_path / "bundle.zip", bundle(Asked(first=3, last=7), range(3, 8), HISTORY[:290]))
    code, said = verify(mirror(tmp_path / "log", written(HISTORY)), path, "--key", KEY)
    assert (code, "its first 290 entries are those of the checkpoint you hold" in said) == (0, True)
    forked = written([*HISTORY[:288], event(400)[0], event(401)[0], event(402)[0]])
    assert verify(mirror(tmp_path / "forked", forked), path, "--key", KEY)[0] == 1


def test_a_fork_is_shown_by_two_checkpoints(tmp_path: Path) -> None:
    one = file(tmp_path / "one", signed(checkpoint_of(HISTORY)))
    other = file(tmp_path / "other", signed(checkpoint_of([*HISTORY[:-1], event(301)[0]])))
    code, said = verify(one, other, "--key", KEY)
    assert code == 1
    assert "its log signed two histories of 300 entries" in said


def test_a_proof_shows_where_its_entry_stands(tmp_path: Path) -> None:
    proof = file(tmp_path / "17.tlog-proof", proof_of(HISTORY, 17))
    entry = file(tmp_path / "17.json", HISTORY[16])
    code, said = verify(proof, "--entry", entry, "--key", KEY)
    assert (code, "the entry stands at position 17" in said) == (0, True)
    assert verify(proof, "--key", KEY)[0] == 2
    assert verify(proof, "--entry", entry)[0] == 2
    entry.write_bytes(HISTORY[17])
    code, said = verify(proof, "--entry", entry, "--key", KEY)
    assert (code, "the proof leads to another root" in said) == (1, True)


def test_a_bundle_is_shown_and_what_is_changed_in_it_named(tmp_path: Path) -> None:
    files = bundle(Asked(first=3, last=7), range(3, 8), HISTORY)
    code, said = verify(archive(tmp_path / "whole.zip", files), "--key", KEY)
    assert code == 0, said
    assert "5 entries, positions 3 to 7: whole" in said
    assert "completeness: proven: each position from 3 to 7 is here" in said
    files["entries/5.json"] = files["entries/5.json"].replace(b"number 5", b"number 6")
    code, said = verify(archive(tmp_path / "changed.zip", files), "--key", KEY)
    assert code == 1
    assert "  5: it is not shown that its bytes stand there: the proof leads to another root" in said


def test_a_bundle_with_a_gap_is_not_all_that_was_asked_for(tmp_path: Path) -> None:
    files = bundle(Asked(first=3, last=7), [3, 4, 6, 7], HISTORY)
    code, said = verify(archive(tmp_path / "gap.zip", files), "--key", KEY)
    assert (code, "completeness: gap: " in said, "positions 5 to 5" in said) == (2, True, True)


def test_of_a_bundle_with_faults_no_completeness_is_told_and_of_a_report_that_it_was_not_looked_at(
    tmp_path: Path,
) -> None:
    files = bundle(Asked(first=3, last=7), range(3, 8), HISTORY) | {"report.html": b"all is well"}
    code, said = verify(archive(tmp_path / "whole.zip", files), "--key", KEY)
    assert (code, "completeness: proven" in said, "its report.html was not looked at" in said) == (0, True, True)
    code, said = verify(archive(tmp_path / "more.zip", files | {"readme.txt": b"trust me"}), "--key", KEY)
    assert (code, "completeness" in said) == (1, False)
    assert "  readme.txt: nothing in the bundle is about it" in said


def test_a_bundle_that_is_damaged_on_the_way_is_named_at_its_place(tmp_path: Path) -> None:
    path = archive(tmp_path / "bundle.zip", bundle(Asked(first=3, last=7), range(3, 8), HISTORY))
    path.write_bytes(path.read_bytes().replace(b"number 5", b"number 6"))
    code, said = verify(path, "--key", KEY)
    assert (code, "  5: it is not shown that its bytes stand there" in said) == (1, True)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_bundle_with_two_files_of_one_name_shows_nothing(tmp_path: Path) -> None:
    files = bundle(Asked(first=3, last=7), range(3, 8), HISTORY)
    path = archive(tmp_path / "bundle.zip", files)
    with ZipFile(path, "a") as made:
        made.writestr("entries/5.json", b"another")
    code, said = verify(path, "--key", KEY)
    assert (code, "it has two files of one name" in said) == (1, True)


def test_a_bundle_is_compared_with_a_checkpoint_that_is_held(tmp_path: Path) -> None:
    path = archive(tmp_path / "bundle.zip", bundle(Asked(first=3, last=7), range(3, 8), HISTORY))
    forked = file(tmp_path / "forked", signed(checkpoint_of([*HISTORY[:-1], event(301)[0]])))
    code, said = verify(path, forked, "--key", KEY)
    assert (code, "two histories of 300 entries" in said) == (1, True)


def test_nothing_that_is_looked_at_writes_on_the_terminal_what_it_likes(tmp_path: Path) -> None:
    hidden = "\\u001b[2J\\u202e\\n/tmp/log: 4 entries: whole"
    odd = HISTORY[3].replace(b'"stream_id":"', b'"stream_id":"' + hidden.encode())
    code, said = verify(mirror(tmp_path / "log", written([*HISTORY[:3], odd])), "--key", KEY)
    assert (code, "[2J\ufffd\ufffd/tmp/log" in said) == (1, True)
    files = bundle(Asked(first=3, last=7), range(3, 8), HISTORY) | {"\x1b]0;x\x07\u2066\n  completeness: proven": b""}
    code, named = verify(archive(tmp_path / "b.zip", files), "--key", KEY)
    assert (code, "\ufffd]0;x" in named) == (1, True)
    assert not {"\x1b", "\x07", "\u202e", "\u2066"} & {*said, *named}
    assert not [line for line in (said + named).splitlines() if line.startswith(("/tmp/log: 4", "  completeness"))]


@pytest.mark.parametrize("path", ["checkpoint", "tile/entries/000", "tile/1/000.p/1", "keys.json"])
@pytest.mark.parametrize("kind", ["pipe", "link", "hole", "directory"])
def test_what_stands_in_a_mirror_for_a_file_is_not_waited_for(tmp_path: Path, path: str, kind: str) -> None:
    directory = mirror(tmp_path / "log", written(HISTORY) | {"keys.json": KEYS})
    one = directory / path
    one.rename(tmp_path / "away")
    if kind == "pipe":
        os.mkfifo(one)
    elif kind == "link":
        one.symlink_to("/dev/zero")
    elif kind == "hole":
        with one.open("wb") as file:
            file.truncate(2**40)
    else:
        one.mkdir()
    code, said = verify(directory)
    assert (code, "Traceback" in said) == (1, False)
    assert ("cannot be read: " in said) == (kind != "directory")


def test_a_bundle_that_grows_as_it_is_read_is_not(tmp_path: Path) -> None:
    files = bundle(Asked(first=3, last=7), range(3, 8), HISTORY)
    with ZipFile(tmp_path / "deflated.zip", "w", ZIP_DEFLATED) as made:
        for name, content in (files | {"entries/3.json": bytes(10_000_000)}).items():
            made.writestr(name, content)
    code, said = verify(tmp_path / "deflated.zip", "--key", KEY)
    assert (code, "cannot be read: a bundle's files are stored, and not compressed" in said) == (1, True)
    path = archive(tmp_path / "shared.zip", files)
    with ZipFile(path, "a") as made:
        (first, *_) = made.infolist()
        for number in range(1000):
            again = copy(first)
            again.filename = f"payload/{number}"
            made.filelist.append(again)
            made._didModify = True  # type: ignore[attr-defined]
    code, said = verify(path, "--key", KEY)
    assert (code, "cannot be read: its files are larger than it is" in said) == (1, True)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (10, 8),  # compressed, it says
        (10, 99),  # in a way that nobody knows
        (6, 0xFF),  # made for a version that is not there yet
        (8, 1),  # encrypted
        (42, 0xFF),  # elsewhere
        (27, 0xFF),  # larger
        (28, 0xFF),  # called otherwise
    ],
)
def test_each_part_of_a_bundle_that_is_odd_is_said_or_named(tmp_path: Path, at: int, value: int) -> None:
    path = archive(tmp_path / "bundle.zip", bundle(Asked(first=3, last=7), range(3, 8), HISTORY))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + at] = value
    path.write_bytes(content)
    code, said = verify(path, "--key", KEY)
    assert (code, "Traceback" in said) == (1, False)


@pytest.mark.parametrize("name", ["keys.json", "manifest.json"])
def test_json_without_end_is_none(tmp_path: Path, name: str) -> None:
    deep = b'{"else":' + b"[" * 200_000
    files = bundle(Asked(first=3, last=7), range(3, 8), HISTORY) | {"keys.json": KEYS, name: deep}
    code, said = verify(archive(tmp_path / "b.zip", files))
    assert (code, "Traceback" in said) == (1, False)
    for arguments in (["--key", file(tmp_path / "deep", deep), tmp_path], [tmp_path / "deep"]):
        code, said = verify(*arguments)
        assert (code, "Traceback" in said, "recursion" in said) == (1, False, True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "name what to look at"),
        (["nowhere"], "nowhere cannot be read: No such file"),
        (["x", "--key", "a+b"], "is not a verifier key"),
        (["x", "--witness", KEY], "is the key of a log: name it by --key"),
        (["x", "--key", WITNESSES[0].verifier], "is the key of a witness: name it by --witness"),
        (["x", "--key", KEY, "--quorum", 1], "of 0 witnesses 1 cannot have signed"),
        (["x", "--key", KEY, "--quorum", -1], "of 0 witnesses -1 cannot have signed"),
        (["x", "--key", "nowhere"], "nowhere is neither a key nor a file"),
    ],
)
def test_what_cannot_be_looked_at_is_said(arguments: list[object], expected: str) -> None:
    code, said = verify(*arguments)
    assert code == 1
    assert expected in said
    assert "Traceback" not in said
