"""`muniment evidence export`: one file that a stranger verifies without us, and reads."""

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from uuid import UUID
from zipfile import ZIP_STORED, ZipFile

import msgspec
import pytest
from uuid_utils.compat import uuid7

from api.client import Client
from ledger import store
from ledger.adoption import LOG
from ledger.checkpoint import Checkpoint, Note, VerifierKey
from ledger.commands import (
    BeginUse,
    CastVote,
    ChangeSession,
    OpenSession,
    PresentApproval,
    Record,
    RecordOutcome,
    RequestApproval,
)
from ledger.embedded import EmbeddedServer
from ledger.evidence import Manifest, verify_bundle
from ledger.merkle import leaf_hash
from ledger.settings import Settings
from ledger.signing import LogFiles
from ledger.store import Append, EventRow
from ledger.subjects import EraseSubject
from ledger.values import Action, Actor, AgentDescription, moment, stamp
from ledger.vault import Vault
from ledger.verify import Trust, verify_log
from ops.copies import in_archive, in_directory
from ops.evidence import EvidenceError, Source, _asked, _new, write
from ops.importing import import_runs
from ops.mirror import write as write_mirror
from ops.runs import Options
from ops.transcripts import Transcript
from ops.worker import work
from tests.conftest import Database
from tests.ledger.adopted import NEW, adoption
from tests.ledger.written import event
from tests.ops.published import LARGE, Ledger, files_of, publishing
from tests.ops.test_importing import RECORDED_RUNS, recorded_runs
from tests.server import new_project, shared_server

MIA = Actor(issuer="https://id.example", sub="mia", kind="human", assurance="authenticated", roles=("approver",))
REFUND = Action(
    tool="refund",
    arguments={"invoice": 9, "amount": "12.50", "to": {"$personal": {"subject": "c-9", "value": "Ann Arbor"}}},
)


@pytest.fixture
async def ledger(database: Database, tmp_path: Path) -> AsyncIterator[Ledger]:
    """With a worker, which builds the view that entries are found by."""
    stop = asyncio.Event()
    async with publishing(database, tmp_path / "home") as ledger:
        working = asyncio.create_task(work(Settings.from_environment(ledger.environ), stop))
        yield ledger
        stop.set()
        await working


KINDS = ("LedgerAdopted", "SessionAnnotated")


async def a_refund(ledger: Ledger) -> tuple[UUID, UUID]:
    """A session in which an agent asks, a person says yes, and it is done; and others beside it."""
    agent = AgentDescription(name="finance-bot", provider="acme", model="m-1", instructions_digest=f"sha256:{'a' * 64}")
    session = (await ledger.give(OpenSession(agent_role="finance", agent=agent, external_id="ticket-81"))).target
    assert session
    await ledger.give(OpenSession(agent_role="other"))
    await ledger.give(ChangeSession(session_id=session, status="active"))
    asked = {"content": "Please refund me <b>now</b>\u202e"}
    await ledger.give(Record(kind="message.user", session_id=session, body=asked))
    request = RequestApproval(action=REFUND, session_id=session, summary="Refund 12.50", risk="high")
    requested = await ledger.give(request)
    approval = requested.target
    assert approval
    await ledger.give(Record(kind="message.user", body={"content": LARGE}))
    await ledger.give(PresentApproval(approval_id=approval, channel="desk"), MIA)
    seen = requested.state.request_digest
    await ledger.give(CastVote(approval_id=approval, verdict="approve", digest_seen=seen, reason="as agreed"), MIA)
    execution = uuid7()
    await ledger.give(BeginUse(approval_id=approval, execution_id=execution, action=REFUND))
    await ledger.give(
        RecordOutcome(approval_id=approval, execution_id=execution, outcome="ok", result={"receipt": "R-1"})
    )
    await ledger.give(ChangeSession(session_id=session, status="completed"))
    return session, approval


async def exported(ledger: Ledger, path: Path, vault: Vault | None = None, **asked: Any) -> Manifest:
    source = Source(ledger.pool, ledger.project, await ledger.ledger_id(), await ledger.publish())
    wanted = {"session": None, "approval": None, "range_": None, "since": None, "until": None}
    return await write(source, *await _asked(source, **wanted | asked), path, vault)


async def verified(ledger: Ledger, path: Path) -> Manifest:
    with ZipFile(path) as archive:
        trust = Trust([VerifierKey.parse(await ledger.key())])
        found, manifest = verify_bundle(in_archive(archive), archive.namelist(), trust)
    assert found.faults == []
    assert manifest is not None
    return manifest


def report(path: Path) -> str:
    with ZipFile(path) as archive:
        return archive.read("report.html").decode()


class Page(HTMLParser):
    """What a reader sees of it, and what a browser would fetch or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


async def test_a_session_is_told_as_a_story_that_stands_alone(ledger: Ledger, tmp_path: Path) -> None:
    session, approval = await a_refund(ledger)
    manifest = await exported(ledger, tmp_path / "b.zip", session=session)
    assert (await verified(ledger, tmp_path / "b.zip")) == manifest
    assert manifest.completeness.state == "not_established"
    assert manifest.types == {
        "ApprovalGranted": 1,
        "ApprovalPresented": 1,
        "ApprovalRequested": 1,
        "ApprovalUseBegun": 1,
        "ApprovalUseCompleted": 1,
        "FactRecorded": 1,
        "SessionActivated": 1,
        "SessionCompleted": 1,
        "SessionOpened": 1,
        "VoteCast": 1,
    }
    page = Page(report(tmp_path / "b.zip"))
    for said in (
        *("finance-bot", "acme m-1", f"sha256:{'a' * 64}", "ticket-81", "Refund 12.50", "high", "as agreed"),
        *(
            "agent-7 (agent, https://id.example, agent): ",
            "mia (human, https://id.example, approver)",
            "approve, of this very request",
            "desk",
            "R-1",
            "completed the session",
        ),
        *("not established", "Please refund me <b>now</b>\ufffd", str(approval)),
    ):
        assert said in page.text, said
    assert "Ann Arbor" not in page.text
    assert "[sealed: of person " in page.text
    assert page.tags.isdisjoint({"script", "img", "link", "iframe", "b"})
    assert all(link.startswith("#p") for link in page.links)


async def test_an_approval_is_told_with_the_session_it_is_of(ledger: Ledger, tmp_path: Path) -> None:
    _, approval = await a_refund(ledger)
    manifest = await exported(ledger, tmp_path / "b.zip", approval=approval)
    await verified(ledger, tmp_path / "b.zip")
    assert manifest.types["ApprovalRequested"] == manifest.types["SessionOpened"] == 1
    assert "FactRecorded" not in manifest.types


async def test_a_stretch_is_proven_to_be_whole_and_its_data_is_beside_it(ledger: Ledger, tmp_path: Path) -> None:
    await a_refund(ledger)
    manifest = await exported(ledger, tmp_path / "b.zip", range_="2:8")
    assert (await verified(ledger, tmp_path / "b.zip")) == manifest
    assert (manifest.completeness.state, manifest.entries, manifest.payloads) == ("proven", 7, 1)


async def test_a_time_is_the_stretch_that_was_recorded_then(ledger: Ledger, tmp_path: Path) -> None:
    await a_refund(ledger)
    whole = await exported(ledger, tmp_path / "all.zip", range_="1:12")
    with ZipFile(tmp_path / "all.zip") as archive:
        times = [_recorded(archive.read(f"entries/{position}.json")) for position in range(1, 13)]
    manifest = await exported(ledger, tmp_path / "b.zip", since=times[3], until=times[9])
    first, last = times.index(times[3]) + 1, times.index(times[9])
    assert (manifest.asked.first, manifest.asked.last) == (first, last)
    assert manifest.runs == ((first - 1, last + 1),)
    assert (await verified(ledger, tmp_path / "b.zip")).completeness.state == "proven"
    assert whole.entries == 12


def _recorded(entry: bytes) -> datetime:
    return moment(msgspec.json.decode(entry)["recorded_at"])


async def test_what_an_earlier_log_has_recorded_is_exported_with_the_entry_by_which_this_one_goes_on(
    ledger: Ledger, tmp_path: Path
) -> None:
    session, _ = await a_refund(ledger)
    before, ledger_id = await ledger.publish(), await ledger.ledger_id()
    wanted: dict[str, Any] = dict.fromkeys(("session", "approval", "range_", "since", "until"))
    of_session = await _asked(Source(ledger.pool, "demo", ledger_id, before), **wanted | {"session": session})
    more: dict[str, Any] = {"project": "demo", "recorded_at": stamp(datetime.now(UTC))}
    entries = [
        adoption(13, NEW, ledger_id, before.published, **more),
        event(14, 50, 1, ledger=NEW, **more)[0],
    ]
    rows = [
        EventRow(LOG if kind == "LedgerAdopted" else uuid7(), 1, kind, entry, leaf_hash(entry), None)
        for kind, entry in zip(KINDS, entries, strict=True)
    ]
    async with ledger.pool.connection() as connection:
        await store.append(connection, Append(ledger_id=ledger_id, seen=12, recorded_at=datetime.now(UTC), events=rows))
    log = await ledger.publish()
    root = Checkpoint.parse(Note.parse(log.published).text).root
    # The log goes on under its new name, by the same key.
    origin = f"{log.origin.rpartition('/')[0]}/{NEW}"
    key = LogFiles(ledger.home / "keys").signer(origin, 1, VerifierKey.parse(await ledger.key()).public)
    text = Checkpoint(origin, 14, root).text
    log = msgspec.structs.replace(log, origin=origin, published=str(Note(text, (key.sign(text),))).encode())
    source = Source(ledger.pool, ledger.project, ledger_id, log)
    stretches = {stretch: await _asked(source, **wanted | {"range_": stretch}) for stretch in ("2:4", "12:14", "14:14")}
    for asked, expected in (
        (of_session, [13]),
        (stretches["2:4"], [2, 3, 4, 13]),
        (stretches["12:14"], [12, 13, 14]),
        (stretches["14:14"], [14]),
    ):
        path = tmp_path / f"{expected}.zip"
        await write(source, *asked, path)
        with ZipFile(path) as archive:
            found, manifest = verify_bundle(in_archive(archive), archive.namelist(), Trust([key.verifier]))
        assert manifest is not None
        complete = "not_established" if asked is of_session else "proven"
        assert (found.faults, manifest.completeness.state) == ([], complete)
        positions = [at for first, last in manifest.runs for at in range(first, last + 1)]
        assert positions[-len(expected) :] == expected
        told = (
            f"History begins anew at position 13: {before.origin} went before, and its newest checkpoint that was known"
        )
        assert (told in Page(report(path)).text) == (13 in expected)
        assert [epoch.position for epoch in found.epochs] == [13] * (13 in expected)


async def test_the_same_entries_make_the_same_bytes(ledger: Ledger, tmp_path: Path) -> None:
    session, _ = await a_refund(ledger)
    for name in ("one.zip", "other.zip"):
        await exported(ledger, tmp_path / name, session=session)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "other.zip").read_bytes()
    with ZipFile(tmp_path / "one.zip") as archive:
        assert {info.compress_type for info in archive.infolist()} == {ZIP_STORED}
    with pytest.raises(EvidenceError, match="nothing is overwritten"):
        await exported(ledger, tmp_path / "one.zip", session=session)
    assert {name for name in files_of(tmp_path) if "zip" in name} == {"one.zip", "other.zip"}


async def test_a_bundle_is_its_owners_and_takes_no_place(ledger: Ledger, tmp_path: Path) -> None:
    session, _ = await a_refund(ledger)
    out = tmp_path / "out"
    out.mkdir()
    was = os.umask(0)
    try:
        await exported(ledger, out / "b.zip", session=session)
    finally:
        os.umask(was)
    assert (out / "b.zip").stat().st_mode & 0o777 == 0o600
    (out / "link.zip").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EvidenceError, match="nothing is overwritten"):
        await exported(ledger, out / "link.zip", session=session)
    late = _new(out / "late.zip")
    with late:
        (draft,) = out.glob(".late.zip.*")
        assert draft.stat().st_mode & 0o777 == 0o600
    (out / "late.zip").unlink()
    late = _new(out / "late.zip")
    late.__enter__()
    (out / "late.zip").write_text("another's")  # while it is written
    with pytest.raises(EvidenceError, match="nothing is overwritten"):
        late.__exit__(None, None, None)
    assert (out / "late.zip").read_text() == "another's"
    with pytest.raises(EvidenceError, match="cannot be written: No such file"):
        await exported(ledger, tmp_path / "nowhere" / "b.zip", session=session)
    assert sorted(path.name for path in out.iterdir()) == ["b.zip", "late.zip", "link.zip"]
    assert not (tmp_path / "elsewhere").exists()


async def test_personal_values_are_shown_only_where_they_are_unsealed_and_never_in_entries(
    ledger: Ledger, tmp_path: Path
) -> None:
    session, _ = await a_refund(ledger)
    vault = Vault(ledger.home / "keys", ledger.pool, create_keys=False)
    await exported(ledger, tmp_path / "b.zip", vault, session=session)
    await verified(ledger, tmp_path / "b.zip")
    with ZipFile(tmp_path / "b.zip") as archive:
        holders = [name for name in archive.namelist() if b"Ann Arbor" in archive.read(name)]
    assert holders == ["report.html"]


async def test_whoever_was_erased_stays_erased_in_a_bundle_and_every_proof_holds(
    ledger: Ledger, tmp_path: Path
) -> None:
    session, _ = await a_refund(ledger)
    await exported(ledger, tmp_path / "before.zip", session=session)
    operator = Actor(
        issuer="https://id.example", sub="olga", kind="human", assurance="authenticated", roles=("operator",)
    )
    erased = (await ledger.give(EraseSubject(subject="c-9", ground="asked for"), operator)).state
    vault = Vault(ledger.home / "keys", ledger.pool, create_keys=False)
    await vault.destroy("demo", {erased.subject: erased.through})
    await exported(ledger, tmp_path / "after.zip", vault, session=session)
    for path in (tmp_path / "before.zip", tmp_path / "after.zip"):
        await verified(ledger, path)
    text = Page(report(tmp_path / "after.zip")).text
    assert "[erased]" in text
    assert "Ann Arbor" not in text
    ended = await asyncio.to_thread(ledger.muniment, "verify", "database", "--open-seals")
    assert (ended.returncode, ended.stderr) == (0, "")


async def test_what_cannot_be_exported_is_said(ledger: Ledger, tmp_path: Path) -> None:
    session, _ = await a_refund(ledger)
    for wrong, said in (
        ("5", "no range"),
        ("0:3", "no range"),
        ("3:2", "no range"),
        ("1:99", "12 entries are published"),
    ):
        with pytest.raises(EvidenceError, match=said):
            await exported(ledger, tmp_path / "b.zip", range_=wrong)
    for arguments, said in (
        ([], "say what to export"),
        (["--session", session, "--range", "1:2"], "say what to export"),
        (["--session", uuid7()], "nothing published is of session"),
        (["--since", "2026-01-01T00:00:00"], "says not of which zone it is"),
        (["--since", "2100-01-01T00:00:00Z"], "nothing published is of that time"),
    ):
        ended = await asyncio.to_thread(ledger.muniment, "evidence", "export", "--project", "demo", *arguments)
        assert ended.returncode == 1
        assert said in ended.stderr


async def test_the_command_writes_what_the_other_verifies(ledger: Ledger, tmp_path: Path) -> None:
    session, _ = await a_refund(ledger)
    await ledger.publish()
    out = tmp_path / "evidence.zip"
    asked = ("--project", "demo", "--session", session, "--out", out)
    ended = await asyncio.to_thread(ledger.muniment, "evidence", "export", *asked)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"10 entries, session {session}" in ended.stdout
    ended = await asyncio.to_thread(ledger.muniment, "verify", out, "--key", await ledger.key())
    assert (ended.returncode, f"10 entries, session {session}: whole" in ended.stdout) == (0, True)


@recorded_runs
async def test_real_runs_are_exported_verified_and_told(postgres: EmbeddedServer, tmp_path: Path) -> None:
    """Runs of a real agent, with people and what they asked for: sealed, proven, and readable as a conversation."""
    project = new_project()
    with shared_server(postgres, tmp_path / "server", ("api", "worker")) as server:
        token = server.token(project, "importer", ("agent", "importer"))
        async with Client(server.url, token, patience_seconds=60) as client:
            imported = await import_runs(client, [Transcript(RECORDED_RUNS)], Options(agent_role="airline-support"))
        assert sum(imported.sessions.values()) == 160
        async with publishing(server.database, server.home, project) as ledger:
            opened = "SELECT stream_id FROM ledger.events WHERE type = 'SessionOpened' ORDER BY position LIMIT 20"
            async with ledger.pool.connection() as connection:
                sessions: list[UUID] = [session for (session,) in await (await connection.execute(opened)).fetchall()]
            told = ""
            for number, session in enumerate(sessions):
                path = tmp_path / f"{number}.zip"
                await exported(ledger, path, session=session)
                assert (await verified(ledger, path)).completeness.state == "not_established"
                told += Page(report(path)).text
            log = await ledger.publish()
            requested = "SELECT stream_id FROM ledger.events WHERE type = 'ApprovalRequested' ORDER BY position LIMIT 1"
            async with ledger.pool.connection() as connection:
                ((approval,),) = await (await connection.execute(requested)).fetchall()
            alone = await exported(ledger, tmp_path / "approval.zip", approval=approval)
            assert {"SessionOpened", "VoteCast", "TaskCompleted", "FactRecorded"} < set(alone.types)
            assert alone.types["ApprovalRequested"] == 1
            assert (await verified(ledger, tmp_path / "approval.zip")) == alone
            stretch = await exported(ledger, tmp_path / "all.zip", range_=f"1:{log.published_size}")
            assert (await verified(ledger, tmp_path / "all.zip")).completeness.state == "proven"
            async with ledger.pool.connection() as connection:
                await write_mirror(connection, await ledger.ledger_id(), log, tmp_path / "log")
            seen = verify_log(in_directory(tmp_path / "log"), Trust([VerifierKey.parse(await ledger.key())]))
    assert (seen.faults, seen.entries) == ([], stretch.entries)
    for said in (
        "recorded what the user said",
        "book_reservation",
        "imported only",
        "by what was said at position",
        "As a task",
        "[sealed: of person",
    ):
        assert said in told
