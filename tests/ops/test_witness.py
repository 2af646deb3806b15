"""A witness as logs, auditors and strangers meet it: a process that was killed at any moment has promised nothing more
than what it remembers."""

import itertools
import random
import re
import sqlite3
import stat
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from ledger.checkpoint import Checkpoint, Note, Signature, VerifierKey
from ledger.merkle import EMPTY_ROOT, leaf_hash
from ops.witness import connect, opened
from tests.witnesses import Log, RunningWitness, body

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWitness]:
    with RunningWitness(tmp_path_factory.mktemp("witness") / "home") as running:
        yield running


@pytest.fixture
def log(witness: RunningWitness) -> Log:
    """A log of this test's own, ten entries long, that is witnessed."""
    made = Log(f"ledger.example.com/{next(_numbers)}", entries=10)
    witness.trust(made)
    return made


def lines(answer: httpx.Response) -> list[Signature]:
    assert answer.status_code == 200, answer.text
    return [Signature.parse(line) for line in answer.text.removesuffix("\n").split("\n")]


# --- the protocol: what is cosigned --------------------------------------------------------------------------


def test_a_checkpoint_is_cosigned_and_shown(witness: RunningWitness, log: Log) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    answer = witness.add(log, 0, 7)
    (line,) = lines(answer)
    assert answer.headers["content-type"].startswith("text/plain")
    at = Note(log.note(7).text, (line,)).verified([witness.key])[witness.key]
    assert at is not None
    assert before <= at <= datetime.now(UTC)
    page = witness.shown(log)
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/plain; charset=utf-8"
    assert page.text == str(Note(log.note(7).text, (*log.note(7).signatures, line)))


def test_a_log_is_followed_as_it_grows(witness: RunningWitness, log: Log) -> None:
    log.grow(300)
    for old, size in itertools.pairwise([0, 1, 2, 3, 8, 9, 255, 256, 257, 310]):
        (line,) = lines(witness.add(log, old, size))
        assert Note(log.note(size).text, (line,)).verified([witness.key])


def test_a_checkpoint_is_cosigned_again_at_another_time(witness: RunningWitness, log: Log) -> None:
    witness.add(log, 0, 7)
    (line,) = lines(witness.add(log, 7, 7))
    assert Note(log.note(7).text, (line,)).verified([witness.key])
    assert witness.shown(log).text.endswith(str(line))


def test_the_empty_tree_is_cosigned(witness: RunningWitness, log: Log) -> None:
    lines(witness.add(log, 0, 0))
    assert Checkpoint.parse(Note.parse(witness.shown(log).content).text) == Checkpoint(log.origin, 0, EMPTY_ROOT)
    lines(witness.add(log, 0, 10))


def test_lines_that_extend_a_checkpoint_are_cosigned_with_it(witness: RunningWitness, log: Log) -> None:
    text = log.checkpoint(3).text + "and something more\n"
    (line,) = lines(witness.post(body(0, [], Note(text, (log.key.sign(text),)))))
    assert Note(text, (line,)).verified([witness.key])
    lines(witness.add(log, 3, 5))


def test_signatures_of_strangers_are_ignored_and_not_kept(witness: RunningWitness, log: Log) -> None:
    note = log.note(4)
    strangers = [Signature(f"stranger-{n}.example", bytes([n] * 4), b"\0" * 64) for n in range(15)]
    of_the_same_name = Signature(log.origin, b"none", b"\0" * 64)
    (line,) = lines(witness.post(body(0, [], Note(note.text, (*strangers, of_the_same_name, *note.signatures)))))
    assert witness.shown(log).text == str(Note(note.text, (*note.signatures, line)))


def test_any_key_that_is_believed_of_a_log_may_sign(witness: RunningWitness, log: Log) -> None:
    heir = Log(log.origin, seed=1)
    heir.leaves = log.leaves
    assert witness.add(heir, 0, 5).status_code == 403
    witness.trust(heir)
    lines(witness.add(log, 0, 5))
    lines(witness.add(heir, 5, 6))
    note = log.note(7)
    (line,) = lines(
        witness.post(body(6, log.proof(6, 7), Note(note.text, (*note.signatures, *heir.note(7).signatures))))
    )
    kept = Note.parse(witness.shown(log).content)
    assert kept.verified([log.vkey, heir.vkey, witness.key]).keys() == {log.vkey, heir.vkey, witness.key}
    assert kept.signatures[-1] == line


def test_the_checkpoint_of_a_log_that_others_wrote_is_cosigned(witness: RunningWitness) -> None:
    # Signed by a Go implementation: the tests of litewitness.
    origin = "sigsum.org/v1/tree/985ea163f5af026723561354f51f2ebcdcf2af809ce254ccfb64aa9aadd80f90"
    key = VerifierKey(origin, 1, bytes.fromhex("52c05edad1bf5feffa81354faae59a655d9a9a1a793ed2f62c39c26c0be2aecd"))
    signature = "7BKT0gOfNZ1J0So9unY3BZtm2YkPIoNYM/dce0Z2avJDs8dxN6ts9bOSwwrVrbjm6P9K3ZxpK6jJngOG6YvGGzV/lwo="
    note = f"{origin}\n1\nKgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n\n\u2014 {origin} {signature}\n"
    with opened(witness.home) as same:
        same.add_log(key)
    lines(witness.post(body(0, [], note)))


def test_the_request_in_the_specification_is_read(witness: RunningWitness) -> None:
    # C2SP tlog-witness publishes no key for it: so it is understood, and of an unknown log.
    answer = witness.post(
        "old 20852014\nPlRNCrwHpqhGrupue0L7gxbjbMiKA9temvuZZDDpkaw=\njrJZDmY8Y7SyJE0MWLpLozkIVMSMZcD5kvuKxPC3swk=\n"
        "5+pKlUdi2LeF/BcMHBn+Ku6yhPGNCswZZD1X/6QgPd8=\n/6WVhPs2CwSsb5rYBH5cjHV/wSmA79abXAwhXw3Kj/0=\n\n"
        "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n\u2014 "
        "example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE"
        "+xeMcTOAYQ8=\n\u2014 example.com/behind-the-sofa opLqBQsREYCgu6xQkYQwJr9fo45a62DN9EdmHXnZdXNqlcVGlCum2Wks+49/"
        "V6267UEjw6QUXTS5Rovnzv++qbSzm9Q=\n".encode(),
    )
    assert answer.status_code == 404


# --- the protocol: what is refused ---------------------------------------------------------------------------


def refused(witness: RunningWitness, log: Log, content: bytes, status: int) -> httpx.Response:
    """Sent to a witness that has followed the log to size 7: it has that status, and changes nothing."""
    witness.add(log, 0, 7)
    before = witness.shown(log).text
    answer = witness.post(content)
    assert answer.status_code == status, answer.text
    assert "\u2014" not in answer.text
    assert witness.shown(log).text == before
    return answer


def test_a_log_that_nobody_added_is_unknown(witness: RunningWitness, log: Log) -> None:
    stranger = Log("stranger.example/log", entries=3)
    refused(witness, log, body(0, [], stranger.note()), 404)
    assert witness.shown(stranger).status_code == 404


def test_a_checkpoint_that_no_key_of_its_log_signed_is_forbidden(witness: RunningWitness, log: Log) -> None:
    thief = Log(log.origin, seed=9)
    thief.leaves = log.leaves
    refused(witness, log, body(7, log.proof(7, 9), thief.note(9)), 403)


def test_the_signature_of_another_checkpoint_is_forbidden(witness: RunningWitness, log: Log) -> None:
    stale = Note(log.note(9).text, log.note(7).signatures)
    refused(witness, log, body(7, log.proof(7, 9), stale), 403)


def test_one_forged_line_of_a_known_key_spoils_the_note(witness: RunningWitness, log: Log) -> None:
    heir = Log(log.origin, seed=1)
    witness.trust(heir)
    forged = Signature(log.origin, heir.vkey.id, b"\0" * 64)
    note = log.note(9)
    refused(witness, log, body(7, log.proof(7, 9), Note(note.text, (*note.signatures, forged))), 403)


def test_an_old_size_beyond_the_checkpoint_is_a_bad_request(witness: RunningWitness, log: Log) -> None:
    refused(witness, log, body(9, [], log.note(8)), 400)


@pytest.mark.parametrize("old", [0, 1, 6, 8])
def test_another_old_size_than_the_last_is_a_conflict_that_says_the_last(
    witness: RunningWitness, log: Log, old: int
) -> None:
    answer = refused(witness, log, body(old, log.proof(old, 9), log.note(9)), 409)
    assert answer.content == b"7\n"
    assert answer.headers["content-type"] == "text/x.tlog.size"


def test_of_a_log_never_cosigned_the_last_size_is_none(witness: RunningWitness, log: Log) -> None:
    answer = witness.add(log, 3, 9)
    assert (answer.status_code, answer.content) == (409, b"0\n")
    assert witness.shown(log).status_code == 404


def test_a_checkpoint_before_the_last_is_a_conflict(witness: RunningWitness, log: Log) -> None:
    assert refused(witness, log, body(5, log.proof(5, 6), log.note(6)), 409).content == b"7\n"


def test_a_proof_that_does_not_hold_is_unprocessable(witness: RunningWitness, log: Log) -> None:
    proof = log.proof(7, 9)
    for place in range(len(proof)):
        flipped = [*proof[:place], bytes([proof[place][0] ^ 1]) + proof[place][1:], *proof[place + 1 :]]
        refused(witness, log, body(7, flipped, log.note(9)), 422)
    refused(witness, log, body(7, [], log.note(9)), 422)
    refused(witness, log, body(7, proof[:-1], log.note(9)), 422)
    refused(witness, log, body(7, [*proof, proof[0]], log.note(9)), 422)


@pytest.mark.parametrize(("old", "new"), [(7, 8), (7, 10), (6, 9), (8, 9)])
def test_a_proof_for_other_sizes_is_unprocessable(witness: RunningWitness, log: Log, old: int, new: int) -> None:
    refused(witness, log, body(7, log.proof(old, new), log.note(9)), 422)


def test_a_proof_where_there_is_nothing_to_prove_is_unprocessable(witness: RunningWitness, log: Log) -> None:
    assert witness.post(body(0, [leaf_hash(b"")], log.note(7))).status_code == 422
    refused(witness, log, body(7, [leaf_hash(b"")], log.note(7)), 422)


def test_the_empty_tree_with_another_root_is_unprocessable(witness: RunningWitness, log: Log) -> None:
    text = Checkpoint(log.origin, 0, leaf_hash(b"")).text
    assert witness.post(body(0, [], Note(text, (log.key.sign(text),)))).status_code == 422
    assert witness.shown(log).status_code == 404


def test_a_log_that_forks_is_not_followed_anywhere(witness: RunningWitness, log: Log) -> None:
    for at in range(7):
        for size in range(at + 1, 10):
            other = log.fork(at, 10)
            content = body(7, other.proof(7, size) if size >= 7 else [], other.note(size))
            refused(witness, log, content, 422 if size >= 7 else 400)
    lines(witness.add(log, 7, 10))


def test_who_signs_two_trees_of_one_size_is_shown_to_have_done_it(witness: RunningWitness, log: Log) -> None:
    other = log.fork(3, 7)
    refused(witness, log, body(7, [], other.note()), 422)
    where = witness.home / "contradictions" / f"{sha256(log.origin.encode()).hexdigest()}-7"
    cosigned, kept = (Note.parse(where.with_suffix(end).read_bytes()) for end in (".cosigned", ".refused"))
    for note in (cosigned, kept):
        assert note.verified([log.vkey])
    assert Checkpoint.parse(cosigned.text) == log.checkpoint(7)
    assert Checkpoint.parse(kept.text) == other.checkpoint(7)
    assert f"SIGNED TWICE: {where}" in witness.muniment("list")


HASH = b64encode(b"\0" * 32).decode()
NOTE = "an origin\n1\n" + HASH + "\n\n\u2014 an.origin AAAAAAAA\n"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n\n",
        NOTE,
        f"old\n\n{NOTE}",
        f"old 01\n\n{NOTE}",
        f"old -1\n\n{NOTE}",
        f"old +1\n\n{NOTE}",
        f"old 1 \n\n{NOTE}",
        f"old  1\n\n{NOTE}",
        f"old \u0661\n\n{NOTE}",
        f"old 1\r\n\n{NOTE}",
        f"old 1\n{NOTE}",
        f"size 1\n\n{NOTE}",
        f"old 1\n{HASH[:-1]}\n\n{NOTE}",
        f"old 1\n{HASH}{HASH}\n\n{NOTE}",
        f"old 1\n{'A' * 42}B=\n\n{NOTE}",  # bits beyond the hash
        f"old 1\n {HASH}\n\n{NOTE}",
        f"old 1\n{HASH}\n" * 2 + f"\n{NOTE}",
        f"old 1\n\n{NOTE.removesuffix(chr(10))}",
        f"old 1\n\n{NOTE.replace(HASH, '')}",
        "old 1\n\nan origin\n1\n\n\u2014 an.origin AAAAAAAA\n",
        f"old 1\n\nan origin\n01\n{HASH}\n\n\u2014 an.origin AAAAAAAA\n",
        f"old 1\n\nan origin\n1\n{HASH}\n\n",
        f"old 1\n\nan origin\n1\n{HASH}\n",
        "old 1\n\n" + "\udcff",
    ],
)
def test_what_is_no_request_is_a_bad_one(witness: RunningWitness, content: str) -> None:
    assert witness.post(content.encode("utf-8", "surrogateescape")).status_code == 400


def test_a_proof_has_sixty_three_lines_at_most(witness: RunningWitness, log: Log) -> None:
    assert witness.post(body(0, [leaf_hash(b"")] * 63, log.note(9))).status_code == 422
    assert witness.post(body(0, [leaf_hash(b"")] * 64, log.note(9))).status_code == 400


def test_a_log_that_is_believed_no_more_is_unknown_but_not_forgotten(witness: RunningWitness, log: Log) -> None:
    lines(witness.add(log, 0, 7))
    witness.muniment("remove-log", str(log.vkey))
    assert witness.add(log, 7, 9).status_code == 404
    assert witness.shown(log).status_code == 200
    witness.muniment("add-log", str(log.vkey))
    assert witness.add(log, 0, 9).content == b"7\n"


# --- many at once, and death ---------------------------------------------------------------------------------


def test_of_two_trees_of_one_size_at_once_one_is_cosigned(witness: RunningWitness) -> None:
    with ExitStack() as stack:
        second = RunningWitness.__new__(RunningWitness)
        second.__dict__ |= witness.__dict__ | {"_port": "0"}
        stack.enter_context(second)  # another process on the same store
        threads = stack.enter_context(ThreadPoolExecutor(4))
        for _ in range(25):
            log = Log(f"ledger.example.com/{next(_numbers)}", entries=20)
            witness.trust(log)
            lines(witness.add(log, 0, 5))
            forks = [log, log.fork(5, 20), log.fork(9, 20), log.fork(12, 20)]
            start = threading.Barrier(len(forks))

            def send(n: int, forks: list[Log] = forks, start: threading.Barrier = start) -> int:
                start.wait()
                return (witness, second)[n % 2].add(forks[n], 5, 20).status_code

            answers = list(threads.map(send, range(len(forks))))
            assert sorted(answers) == [200, 409, 409, 409]
            kept = Checkpoint.parse(Note.parse(second.shown(log).content).text)
            assert kept == forks[answers.index(200)].checkpoint()


def test_killed_at_any_moment_it_has_answered_nothing_that_it_forgot(tmp_path: Path) -> None:
    witness = RunningWitness(tmp_path / "home")
    log = Log("ledger.example.com/killed", entries=2000)
    witness.trust(log)
    with witness:
        lines(witness.add(log, 0, 1))
    answered = asked = 1
    for _ in range(12):
        with witness:
            kept = Note.parse(witness.shown(log).content)
            assert kept.verified([log.vkey, witness.key]).keys() == {log.vkey, witness.key}
            last = Checkpoint.parse(kept.text).size
            # What was stored may be one that was not answered any more, and never less than what was.
            assert answered <= last <= asked
            assert witness.add(log.fork(last - 1, last + 1), last, last + 1).status_code == 422
            death = threading.Timer(random.uniform(0.005, 0.15), witness.process.kill)
            death.start()
            with suppress(httpx.TransportError):
                for asked in range(last + 1, len(log.leaves)):
                    lines(witness.add(log, asked - 1, asked))
                    answered = asked
            death.join()
    assert answered > 12, "it was at work when it was killed"


def test_what_is_stored_survives_the_machine(witness: RunningWitness) -> None:
    with closing(connect(witness.home / "witness.db", "rw")) as store:
        assert store.execute("PRAGMA synchronous").fetchone() == (2,)
        assert store.execute("PRAGMA journal_mode").fetchone() == ("truncate",)


def test_a_store_that_cannot_be_used_signs_nothing(witness: RunningWitness, log: Log) -> None:
    with closing(sqlite3.connect(witness.home / "witness.db")) as store:
        store.execute("ALTER TABLE checkpoints RENAME TO aside")
        try:
            answer = witness.add(log, 0, 7)
            assert (answer.status_code, answer.text) == (500, "the witness cannot use its store\n")
        finally:
            store.execute("ALTER TABLE aside RENAME TO checkpoints")
    lines(witness.add(log, 0, 7))


# --- what an auditor types -----------------------------------------------------------------------------------


def test_a_witness_is_made_once(tmp_path: Path) -> None:
    home = tmp_path / "home"
    witness = RunningWitness(home)
    assert witness.key.name == "witness.example.org"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "witness.key").stat().st_mode) == 0o600
    with pytest.raises(AssertionError, match=re.escape(f"{home} has a witness already: {witness.key}")):
        RunningWitness(home, "another.example.org")
    assert witness.muniment("list") == str(witness.key)


@pytest.mark.parametrize("name", ["", "a witness", "a+witness", "witness\n", "wítness"])
def test_a_name_that_no_witness_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(AssertionError, match="cannot name a witness"):
        RunningWitness(tmp_path / "home", name)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("there", [["witness.db"], ["witness.db", "witness.key"]])
def test_a_witness_that_was_half_made_is_made(tmp_path: Path, there: list[str]) -> None:
    first = RunningWitness(tmp_path / "home")
    for file in list(first.home.iterdir()):
        if file.name not in there:
            file.unlink()
    again = RunningWitness(first.home)
    assert (again.key == first.key) == ("witness.key" in there)


def test_a_witness_that_lost_its_memory_signs_nothing_more(tmp_path: Path) -> None:
    witness = RunningWitness(tmp_path / "home")
    (witness.home / "witness.db").unlink()
    with pytest.raises(AssertionError, match="make a new witness"):
        witness.muniment("run")
    (witness.home / "witness.db").touch()
    with pytest.raises(AssertionError, match="make a new witness"):
        witness.muniment("run")
    (witness.home / "witness.db").unlink()
    (witness.home / "witness.vkey").unlink()
    with pytest.raises(AssertionError, match="begin elsewhere"):
        witness.muniment("init", "witness.example.org")


def test_a_key_that_is_another_signs_nothing(tmp_path: Path) -> None:
    witness = RunningWitness(tmp_path / "home")
    (witness.home / "witness.key").write_bytes(b"\1" * 32)
    with pytest.raises(AssertionError, match="is not the key of"):
        witness.muniment("run")


def test_what_is_followed_is_listed(tmp_path: Path) -> None:
    witness = RunningWitness(tmp_path / "home")
    logs = [Log(f"ledger.example.com/{n}", entries=4) for n in "ab"]
    added = witness.muniment("add-log", *(str(log.vkey) for log in logs))
    assert added.splitlines() == [f"{log.origin} is witnessed" for log in logs]
    with witness:
        lines(witness.add(logs[1], 0, 4))
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        first, second, third = witness.muniment("list").splitlines()
    assert first == str(witness.key)
    assert second == f"{logs[0].vkey}  nothing yet"
    assert third.startswith(f"{logs[1].vkey}  size 4  {today[:4]}-")


def test_a_key_that_is_no_log_s_is_refused(tmp_path: Path) -> None:
    witness = RunningWitness(tmp_path / "home")
    with pytest.raises(AssertionError, match="is the key of a witness, not of a log"):
        witness.muniment("add-log", str(witness.key))
    with pytest.raises(AssertionError, match="is not a verifier key"):
        witness.muniment("add-log", "ledger.example.com")
    with pytest.raises(AssertionError, match="is not a key that is believed here"):
        witness.muniment("remove-log", str(Log("ledger.example.com").vkey))


def test_it_ends_when_it_is_told_to(tmp_path: Path) -> None:
    witness = RunningWitness(tmp_path / "home")
    with witness:
        idle = witness.dial()
        began = time.monotonic()
        assert witness.stop() == 128 + 15
        assert time.monotonic() - began < 5
        idle.close()


def test_where_another_one_listens_it_cannot(witness: RunningWitness, tmp_path: Path) -> None:
    other = RunningWitness(tmp_path / "home")
    with pytest.raises(AssertionError, match=r"it cannot listen on 127\.0\.0\.1"):
        other.muniment("run", "--port", witness.url.rpartition(":")[2])
