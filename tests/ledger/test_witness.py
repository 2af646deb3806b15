"""Asking witnesses: such as keep the protocol, as processes of their own, and one that says whatever a test wants."""

import asyncio
import json
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path

import httpx
import pytest

import ledger.witness
from ledger.checkpoint import COSIGNATURE, Checkpoint, Note, Signature, SignerKey, check_checkpoint
from ledger.settings import InvalidSettings
from ledger.witness import Cosigned, Cosigners, RolledBack, Witness, Witnesses, read_witnesses
from ops.listener import Answer, Listener, Request
from tests.witnesses import NO_TLS, Log, RunningWitness

NAMES = ("one.example.org", "two.example.org", "three.example.org")
NOW = datetime(2026, 11, 21, 9, 0, 0, tzinfo=UTC)
LIAR = SignerKey("liar.example.org", COSIGNATURE, b"\7" * 32)


@pytest.fixture(scope="module")
def witnesses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RunningWitness]]:
    with ExitStack() as stack:
        home = tmp_path_factory.mktemp("witnesses")
        yield [stack.enter_context(RunningWitness(home / name, name)) for name in NAMES]


@pytest.fixture
def log(witnesses: list[RunningWitness], request: pytest.FixtureRequest) -> Log:
    """A log of this test's own, thirty entries long, that all witnesses know and have not seen yet."""
    made = Log(f"ledger.example.com/{sha256(request.node.nodeid.encode()).hexdigest()[:16]}", entries=30)
    for witness in witnesses:
        witness.trust(made)
    return made


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(trust_env=False, verify=NO_TLS) as client:
        yield client


def known(witnesses: list[RunningWitness], quorum: int) -> Witnesses:
    return Witnesses(quorum, tuple(witness.address for witness in witnesses))


async def cosign(cosigners: Cosigners, log: Log, size: int) -> Cosigned:
    return await cosigners.cosign(log.note(size), [log.vkey], log.prove)


class Liar:
    """A witness that answers one thing after another, the last again and again, and remembers what it was asked."""

    def __init__(self, *answers: Answer | Callable[[], Answer]) -> None:
        self.asked: list[Request] = []
        self._answers = list(answers)
        self._server: asyncio.Server | None = None

    def _answer(self, request: Request) -> Answer:
        self.asked.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return answer if isinstance(answer, Answer) else answer()

    async def __aenter__(self) -> Witness:
        self._server = await Listener(self._answer).listen("127.0.0.1", 0)
        return Witness(f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}", LIAR.verifier)

    async def __aexit__(self, *_: object) -> None:
        assert self._server
        self._server.close()


def said(text: object) -> Answer:
    return Answer(HTTPStatus.OK, str(text))


def conflict(size: object) -> Answer:
    return Answer(HTTPStatus.CONFLICT, f"{size}\n", "text/x.tlog.size")


NOT_FOUND = Answer(HTTPStatus.NOT_FOUND, "nothing\n")
UNPROCESSABLE = Answer(HTTPStatus.UNPROCESSABLE_ENTITY, "no\n")


# --- cosignatures --------------------------------------------------------------------------------------------


async def test_all_witnesses_sign_a_log_as_it_grows(
    witnesses: list[RunningWitness], log: Log, http: httpx.AsyncClient
) -> None:
    everyone = known(witnesses, 3)
    cosigners = Cosigners(http, everyone)
    for size in (0, 1, 7, 8, 8, 30):
        cosigned = await cosign(cosigners, log, size)
        assert (cosigned.missing, cosigned.enough) == ({}, True)
        assert check_checkpoint(cosigned.note, [log.vkey], everyone.keys, 3) == log.checkpoint(size)
        assert [line.name for line in cosigned.note.signatures] == [log.origin, *NAMES]


async def test_who_begins_to_ask_finds_out_where_the_witnesses_are(
    witnesses: list[RunningWitness], log: Log, http: httpx.AsyncClient
) -> None:
    for size, witness in enumerate(witnesses, start=4):
        assert witness.add(log, 0, size).is_success
    assert (await cosign(Cosigners(http, known(witnesses, 3)), log, 20)).missing == {}


async def test_a_witness_is_asked_again_from_the_size_that_it_says(http: httpx.AsyncClient) -> None:
    log = Log("a.log", entries=9)
    right = said(LIAR.sign(log.checkpoint(9).text, NOW))
    liar = Liar(conflict(5), right, right)
    async with liar as witness:
        cosigners = Cosigners(http, Witnesses(1, (witness,)))
        assert (await cosign(cosigners, log, 9)).enough
        assert (await cosign(cosigners, log, 9)).enough
    hashes = "".join(f"{b64encode(one).decode()}\n" for one in log.proof(5, 9))
    assert [request.body.decode() for request in liar.asked] == [
        f"old 0\n\n{log.note(9)}",
        f"old 5\n{hashes}\n{log.note(9)}",
        f"old 9\n\n{log.note(9)}",
    ]


async def test_who_forgot_how_far_a_log_went_is_told_again(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    log = Log("a.log", entries=9)
    first, second = (said(LIAR.sign(log.checkpoint(size).text, NOW)) for size in (8, 9))
    async with Liar(first, conflict(3), second) as witness:
        cosigners = Cosigners(http, Witnesses(1, (witness,)))
        await cosign(cosigners, log, 8)
        assert (await cosign(cosigners, log, 9)).enough
    assert "the witness liar.example.org has forgotten a.log from 3 to 8" in caplog.text


async def test_without_witnesses_nobody_is_missing(http: httpx.AsyncClient) -> None:
    log = Log("a.log", entries=3)
    assert await cosign(Cosigners(http, Witnesses(0, ())), log, 3) == Cosigned(log.note(3), {}, True)


async def test_a_witness_that_is_down_is_named(
    witnesses: list[RunningWitness], log: Log, http: httpx.AsyncClient
) -> None:
    everyone = [*(one.address for one in witnesses[:2]), Witness("http://127.0.0.1:1", LIAR.verifier)]
    for quorum, enough in ((2, True), (3, False)):
        cosigned = await cosign(Cosigners(http, Witnesses(quorum, tuple(everyone))), log, 9)
        assert cosigned.enough is enough
        assert cosigned.missing.keys() == {LIAR.name}
        assert cosigned.missing[LIAR.name].startswith("it cannot be reached: ")
        assert len(cosigned.note.verified([one.key for one in everyone])) == 2


async def test_a_witness_that_does_not_answer_is_not_waited_for_once_there_are_enough(
    witnesses: list[RunningWitness], log: Log, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger.witness, "ASK_SECONDS", 60.0)

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        address = Witness(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", LIAR.verifier)
        everyone = Witnesses(2, (address, *(one.address for one in witnesses[:2])))
        async with asyncio.timeout(30):
            cosigned = await cosign(Cosigners(http, everyone), log, 9)
        assert (cosigned.enough, cosigned.missing) == (True, {LIAR.name: "it did not answer in time"})
        monkeypatch.setattr(ledger.witness, "ASK_SECONDS", 0.2)
        cosigned = await cosign(Cosigners(http, everyone._replace(quorum=3)), log, 9)
        assert (cosigned.enough, list(cosigned.missing)) == (False, [LIAR.name])
        silent, told = await Cosigners(http, everyone).check(log.checkpoint(9), None, [log.vkey], log.prove)
        assert (silent, told) == ({LIAR.name: "it did not answer in time"}, [])


@pytest.mark.parametrize("elsewhere", ["mailto:x", "http:a", "javascript:1", "http://xn--/", "//["])
async def test_a_witness_that_sends_us_elsewhere_has_not_signed(http: httpx.AsyncClient, elsewhere: str) -> None:
    async def send_away(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 302 Found\r\nLocation: {elsewhere}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        writer.write(head.encode())
        writer.close()

    log = Log("a.log", entries=9)
    async with await asyncio.start_server(send_away, "127.0.0.1", 0) as server:
        address = Witness(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", LIAR.verifier)
        cosigners = Cosigners(http, Witnesses(1, (address,)))
        cosigned = await cosign(cosigners, log, 9)
        assert (cosigned.enough, list(cosigned.missing)) == (False, [LIAR.name])
        silent, told = await cosigners.check(log.checkpoint(9), None, [log.vkey], log.prove)
        assert (list(silent), told) == ([LIAR.name], [])


async def test_nothing_is_kept_for_a_witness(http: httpx.AsyncClient) -> None:
    async def set_cookie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(set_cookie, "127.0.0.1", 0) as server:
        address = Witness(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", LIAR.verifier)
        await cosign(Cosigners(http, Witnesses(1, (address,))), Log("a.log", entries=9), 9)
    assert len(http.cookies.jar) == 0


async def test_a_connection_that_was_closed_meanwhile_is_made_anew(http: httpx.AsyncClient) -> None:
    log = Log("a.log", entries=9)
    heard = 0

    async def hang_up_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        heard += 1
        await reader.readuntil(b"\r\n\r\n")
        if heard > 1:
            line = str(LIAR.sign(log.checkpoint(9).text, NOW)).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(line), line))
        writer.close()

    async with await asyncio.start_server(hang_up_once, "127.0.0.1", 0) as server:
        address = Witness(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", LIAR.verifier)
        assert (await cosign(Cosigners(http, Witnesses(1, (address,))), log, 9)).missing == {}
    assert heard == 2


# --- lines that are none -------------------------------------------------------------------------------------

LOG = Log("a.log", entries=9)
TEXT = LOG.checkpoint(9).text
RIGHT = LIAR.sign(TEXT, NOW)
NOBODY = SignerKey("nobody.example.org", COSIGNATURE, b"\3" * 32)


def flipped(line: Signature, place: int) -> Signature:
    changed = bytearray(line.signature)
    changed[place] ^= 1
    return line._replace(signature=bytes(changed))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (said(""), "not its signature"),
        (said("\n"), "not its signature"),
        (said("yes\n"), "not its signature"),
        (said(f"{RIGHT}yes\n"), "not its signature"),
        (said(NOBODY.sign(TEXT, NOW)), "without a signature of the key that is known"),
        (said(NOBODY.sign(TEXT, NOW)._replace(name=LIAR.name)), "without a signature of the key that is known"),
        (said(NOBODY.sign(TEXT, NOW)._replace(name=LIAR.name, key_id=LIAR.verifier.id)), "is not one of this text"),
        (said(RIGHT._replace(name=NOBODY.name)), "without a signature of the key that is known"),
        (said(LIAR._replace(type=1).sign(TEXT)), "without a signature of the key that is known"),
        (said(LIAR._replace(type=1).sign(TEXT)._replace(key_id=LIAR.verifier.id)), "the length of a cosignature"),
        (said(LOG.note(9).signatures[0]), "without a signature of the key that is known"),
        (said(LIAR.sign(LOG.checkpoint(8).text, NOW)), "is not one of this text"),
        (said(LIAR.sign(TEXT.replace("a.log", "b.log"), NOW)), "is not one of this text"),
        (said(LIAR.sign(LOG.fork(5, 9).checkpoint().text, NOW)), "is not one of this text"),
        (said(flipped(RIGHT, 0)), "is of no time"),
        (said(flipped(RIGHT, 7)), "is not one of this text"),
        (said(flipped(RIGHT, 8)), "is not one of this text"),
        (said(flipped(RIGHT, -1)), "is not one of this text"),
        (said(LIAR.sign(TEXT, datetime.fromtimestamp(0, UTC))), "is of no time"),
        (said("\u2014 x AAAAAAAA\n" * 100_000), "more than 262,144 bytes"),
        (Answer(HTTPStatus.FORBIDDEN, "go away\n"), "it answered 403: 'go away'"),
        (Answer(HTTPStatus.NOT_FOUND, "\x1b[2J" * 1000), r"it answered 404: '\x1b"),
        (Answer(HTTPStatus.MOVED_PERMANENTLY, ""), "it answered 301"),
        (conflict(""), "it answered 409, but no size"),
        (conflict("007"), "it answered 409, but no size"),
        (conflict("-1"), "it answered 409, but no size"),
        (conflict("9" * 20), "it answered 409, but no size"),
        (conflict("5"), "3 times it said that it is at another size"),
        (UNPROCESSABLE, "it answered 422 when asked what it cosigned last"),
    ],
)
async def test_what_is_no_signature_of_this_checkpoint_is_not_counted(
    http: httpx.AsyncClient, answer: Answer, why: str
) -> None:
    async with Liar(answer) as witness:
        cosigned = await cosign(Cosigners(http, Witnesses(1, (witness,))), LOG, 9)
    assert not cosigned.enough
    assert cosigned.note == LOG.note(9)
    assert why in cosigned.missing[LIAR.name]


async def test_lines_of_others_beside_its_own_are_left_aside(http: httpx.AsyncClient) -> None:
    others = f"{NOBODY.sign(TEXT, NOW)}\u2014 {LIAR.name} {b64encode(b'x' * 2428).decode()}\n"
    async with Liar(said(f"{others}{RIGHT}")) as witness:
        cosigned = await cosign(Cosigners(http, Witnesses(1, (witness,))), LOG, 9)
    assert cosigned == Cosigned(Note(TEXT, (*LOG.note(9).signatures, RIGHT)), {}, True)


# --- a history that others know otherwise --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "size"), [(12, 12), (12, 13), (12, 19), (12, 20), (19, 20), (12, 21), (0, 30), (19, 30)]
)
async def test_a_history_that_was_rolled_back_is_known_to_a_witness(
    witnesses: list[RunningWitness], log: Log, http: httpx.AsyncClient, at: int, size: int
) -> None:
    before = Cosigners(http, known(witnesses, 1))
    assert (await cosign(before, log, 20)).enough
    restored = log.fork(at, size)
    for cosigners in (before, Cosigners(http, known(witnesses, 1))):
        with pytest.raises(RolledBack) as caught:
            await cosign(cosigners, restored, size)
        assert caught.value.witness in NAMES
        assert caught.value.size == 20
        assert caught.value.shown
        assert check_checkpoint(caught.value.shown, [log.vkey]) == log.checkpoint(20)
        for note in (None, restored.note()):
            _, told = await cosigners.check(restored.checkpoint(), note, [log.vkey], restored.prove)
            assert {one.witness for one in told} <= set(NAMES)
            assert told
            for one in told:
                assert "has cosigned a checkpoint of size 20 (shows one, signed by the log,)" in str(one)


async def test_one_witness_that_knows_better_is_enough(
    witnesses: list[RunningWitness], log: Log, http: httpx.AsyncClient
) -> None:
    assert witnesses[2].add(log, 0, 20).is_success
    restored = log.fork(12, 15)
    with pytest.raises(RolledBack, match=r"three\.example\.org"):
        await cosign(Cosigners(http, known(witnesses, 2)), restored, 15)


async def test_a_history_that_went_on_is_the_one_that_witnesses_know(
    witnesses: list[RunningWitness], log: Log, http: httpx.AsyncClient
) -> None:
    cosigners = Cosigners(http, known(witnesses, 2))
    assert await cosigners.check(log.checkpoint(0), None, [log.vkey], log.prove) == ({}, [])
    for size, witness in zip((3, 20), witnesses, strict=False):
        assert witness.add(log, 0, size).is_success
    for size in (20, 21, 30):
        assert await cosigners.check(log.checkpoint(size), None, [log.vkey], log.prove) == ({}, [])


async def test_the_word_of_a_witness_that_a_log_went_further_is_taken(http: httpx.AsyncClient) -> None:
    forged = Note(LOG.fork(5, 12).checkpoint().text, (SignerKey(LOG.origin, 1, b"\5" * 32).sign("x"),))
    for shown in (NOT_FOUND, said("nonsense"), said(forged), said(LOG.note(8))):
        async with Liar(conflict(10), shown) as witness:
            with pytest.raises(RolledBack, match=r"size 10 \(says so, and shows none\): there are 9 leaves") as caught:
                await cosign(Cosigners(http, Witnesses(0, (witness,))), LOG, 9)
        assert caught.value.shown is None


async def test_a_witness_that_shows_nothing_is_asked_by_what_is_signed_already(http: httpx.AsyncClient) -> None:
    async with Liar(NOT_FOUND, conflict(10), NOT_FOUND) as witness:
        cosigners = Cosigners(http, Witnesses(1, (witness,)))
        assert await cosigners.check(LOG.checkpoint(0), None, [LOG.vkey], LOG.prove) == ({}, []), "nothing is signed"
        _, (told,) = await cosigners.check(LOG.checkpoint(9), LOG.note(9), [LOG.vkey], LOG.prove)
        assert "size 10 (says so, and shows none): there are 9 leaves" in str(told)


async def test_one_that_shows_what_it_knew_some_time_ago_is_asked_what_it_knows_now(http: httpx.AsyncClient) -> None:
    shown = said(LOG.fork(5, 12).note())
    async with Liar(conflict(12), shown) as witness:
        cosigners = Cosigners(http, Witnesses(1, (witness,)))
        _, (told,) = await cosigners.check(LOG.checkpoint(9), LOG.note(9), [LOG.vkey], LOG.prove)
        assert told.shown is not None


async def test_one_that_is_down_does_not_hold_up_each_of_many_logs(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        address = Witness(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", LIAR.verifier)
        cosigners = Cosigners(http, Witnesses(0, (address,)))
        monkeypatch.setattr(ledger.witness, "ASK_SECONDS", 0.2)
        silent, _ = await cosigners.check(LOG.checkpoint(9), None, [LOG.vkey], LOG.prove)
        assert list(silent) == [LIAR.name]
        monkeypatch.setattr(ledger.witness, "ASK_SECONDS", 60.0)
        async with asyncio.timeout(30):
            for name in ("b.log", "c.log"):
                other = Log(name, entries=3)
                silent, _ = await cosigners.check(other.checkpoint(3), None, [other.vkey], other.prove)
                assert list(silent) == [LIAR.name]


async def test_what_the_log_did_not_sign_proves_nothing(http: httpx.AsyncClient) -> None:
    thief = Log(LOG.origin, seed=5)
    thief.leaves = LOG.fork(5, 12).leaves
    for shown in (said(thief.note()), said(Log("another.log", entries=12).note()), said("nonsense")):
        for ask in (False, True):
            async with Liar(*[UNPROCESSABLE] * ask, shown) as witness:
                cosigners = Cosigners(http, Witnesses(0, (witness,)))
                if ask:
                    missing = (await cosign(cosigners, LOG, 9)).missing
                else:
                    missing, _ = await cosigners.check(LOG.checkpoint(9), None, [LOG.vkey], LOG.prove)
            assert missing[LIAR.name].startswith("it shows a checkpoint that is not one of this log: ")


async def test_a_proof_that_cannot_be_made_is_not_the_fault_of_a_witness(http: httpx.AsyncClient) -> None:
    async def prove(old: int, new: int) -> list[bytes]:
        raise LookupError(f"{old} to {new}")

    async with Liar(conflict(5)) as witness:
        with pytest.raises(LookupError, match="5 to 9"):
            await Cosigners(http, Witnesses(1, (witness,))).cosign(LOG.note(9), [LOG.vkey], prove)


# --- who they are --------------------------------------------------------------------------------------------


def test_witnesses_are_named_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "witnesses.json"
    named = [{"url": f"https://{one.name}/w/", "vkey": str(one.verifier)} for one in (LIAR, NOBODY)]
    file.write_text(json.dumps({"quorum": 2, "witnesses": named}))
    assert read_witnesses(file) == Witnesses(
        2, tuple(Witness(f"https://{one.name}/w", one.verifier) for one in (LIAR, NOBODY))
    )


GOOD = {"url": "https://liar.example.org", "vkey": str(LIAR.verifier)}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        ("{", "truncated"),
        ({"quorum": 1}, "missing required field `witnesses`"),
        ({"quorum": 1, "witnesses": [GOOD], "quorums": 1}, "unknown field `quorums`"),
        ({"quorum": 2, "witnesses": [GOOD]}, "a quorum of 2 cannot be had of 1 witnesses"),
        ({"quorum": -1, "witnesses": [GOOD]}, "a quorum of -1 cannot be had"),
        ({"quorum": 1, "witnesses": [GOOD, GOOD]}, "two witnesses have the same key, or the same name"),
        (
            {"quorum": 1, "witnesses": [GOOD, GOOD | {"vkey": str(LIAR._replace(name="another.name").verifier)}]},
            "two witnesses have the same key, or the same name",
        ),
        ({"quorum": 1, "witnesses": [GOOD | {"vkey": "liar.example.org"}]}, "is not a verifier key"),
        ({"quorum": 1, "witnesses": [GOOD | {"vkey": str(LOG.vkey)}]}, "is the key of a log, not of a witness"),
        ({"quorum": 1, "witnesses": [GOOD | {"url": "liar.example.org"}]}, "is not the address of a witness"),
        ({"quorum": 1, "witnesses": [GOOD | {"url": "ftp://liar.example.org"}]}, "is not the address of a witness"),
        ({"quorum": 1, "witnesses": [GOOD | {"url": "https://"}]}, "is not the address of a witness"),
        ({"quorum": 1, "witnesses": [GOOD | {"url": "https://liar.example.org:x"}]}, "Invalid port"),
    ],
)
def test_a_file_that_names_no_possible_witnesses_is_refused(tmp_path: Path, content: object, problem: str) -> None:
    file = tmp_path / "witnesses.json"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InvalidSettings, match=re.escape(problem)):
        read_witnesses(file)


def test_a_checkpoint_in_the_specification_frames_a_cosignature() -> None:
    # C2SP tlog-cosignature publishes no key for it: what can be told is whose it is, and of when.
    note = Note.parse(
        "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
        "\u2014 example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nT"
        "o+zyWE+xeMcTOAYQ8=\n\u2014 witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dl"
        "rDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==\n".encode()
    )
    assert Checkpoint.parse(note.text).size == 20852163
    log, witness = note.signatures
    assert (log.name, len(log.signature)) == ("example.com/behind-the-sofa", 64)
    assert (witness.name, witness.key_id.hex(), len(witness.signature)) == ("witness.example.com/w1", "8d66cf3f", 72)
    assert int.from_bytes(witness.signature[:8]) == 1679315147
