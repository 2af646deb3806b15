"""Batches: decided in order, decided again alike, and answered rightly while others are on their way."""

import asyncio
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4

import pytest
from msgspec.structs import replace
from uuid_utils.compat import uuid7

from ledger.batch import Batch
from ledger.commands import AnnotateSession, CancelSession, ChangeSession, Command, OpenSession, Record
from ledger.committer import Committer
from ledger.entry import canonical, decode
from ledger.errors import IdempotencyKeyReused, MunimentError, NotFound, RateLimited
from ledger.events import FactRecorded, SessionCancelled, SessionOpened
from ledger.queue import OPEN_ITEMS_MAX
from ledger.receipt import Receipt
from ledger.syntax import METADATA_BYTES_MAX, PERSONAL_TEXT_BYTES_MAX, read_command
from ledger.values import Actor, moment
from ledger.vault import Unprepared
from tests.check import check_ledger, of_type
from tests.conftest import Database
from tests.ledger.given import DEADLINE, OPENED, RECORD, SESSION, given, on, pending_of

CHILD = uuid7()


def child_of(parent: UUID) -> SessionOpened:
    return SessionOpened(agent_role="sub", expires_at=DEADLINE, parent_session_id=parent)


async def opened(committer: Committer, agent: Actor, **fields: Any) -> UUID:
    receipt = await committer.submit("demo", OpenSession(agent_role="finance", **fields), agent)
    assert receipt.target is not None
    return receipt.target


async def alone(committer: Committer, agent: Actor) -> None:
    """Give commands until this process believes that it is alone on the ledger."""
    for _ in range(5):
        await opened(committer, agent)


def id_from(moment: datetime) -> str:
    """A UUIDv7 command id made at `moment`, by its own account."""
    return str(UUID(int=(int(moment.timestamp() * 1000) << 80) | (7 << 76) | (2 << 62) | uuid4().int % 2**62))


# Deciding


def rows_of(batch: Batch) -> list[tuple[Any, ...]]:
    return [(row.stream_id, row.stream_version, row.type, decode(row.entry).event_id) for row in batch.append.events]


def test_what_is_decided_again_gets_the_same_ids() -> None:
    """A batch that missed is decided again later, on another history; ids given away must not change."""
    asked = [
        pending_of(OpenSession(agent_role="finance", command_id="1")),
        pending_of(ChangeSession(session_id=SESSION, status="active", task_id="T", command_id="2")),
        pending_of(ChangeSession(session_id=SESSION, status="pending", command_id="3")),  # refused
        pending_of(Record(kind="note", session_id=SESSION, command_id="4")),
    ]
    first, again = given(OPENED).batch(), given(on(RECORD, FactRecorded(kind="note")), OPENED).batch(seconds_later=3)
    verdicts = [[batch.decide(pending) for pending in asked] for batch in (first, again)]
    assert rows_of(first) == rows_of(again)
    assert len({row[3] for row in rows_of(first)}) == 5
    assert [receipt.target for receipt in verdicts[0]] == [receipt.target for receipt in verdicts[1]]  # type: ignore[union-attr]
    assert [row.first_position + 1 for row in first.append.commands] == [
        r.first_position for r in again.append.commands
    ]
    assert {decode(row.entry).recorded_at for row in again.append.events} == {again.now} != {first.now}


def test_a_command_decides_on_what_those_before_it_in_the_batch_did() -> None:
    batch = given().batch()
    commands: list[Command] = [
        OpenSession(agent_role="finance", session_id=SESSION),
        OpenSession(agent_role="finance", session_id=SESSION),
        ChangeSession(session_id=SESSION, status="active"),
        OpenSession(agent_role="sub", session_id=CHILD, parent_session_id=SESSION),
        ChangeSession(session_id=SESSION, status="completed"),
        ChangeSession(session_id=SESSION, status="active"),
        Record(kind="note", record_id=RECORD, session_id=CHILD),
        Record(kind="note", parent_record_id=RECORD),
        CancelSession(session_id=CHILD),
    ]
    for number, command in enumerate(commands):
        command.command_id = str(number)
    verdicts = [batch.decide(pending_of(command)) for command in commands]
    assert [verdict.status for verdict in verdicts] == [201, 409, 200, 201, 200, 422, 201, 201, 200]
    assert [row.first_position for row in batch.append.commands] == list(range(1, 10))
    assert batch.size == len(batch.append.events) == 9
    assert batch.append.opened == {}, "what opened and closed at once was never open"


def test_the_same_id_twice_in_a_batch_is_decided_once() -> None:
    batch = given(OPENED).batch()
    first = batch.decide(pending_of(AnnotateSession(session_id=SESSION, text="x", command_id="1")))
    again = batch.decide(pending_of(AnnotateSession(session_id=SESSION, text="x", command_id="1")))
    assert isinstance(first, Receipt)
    assert again == replace(first, replayed=True)
    assert len(batch.append.events) == 1


def test_a_batch_has_one_time() -> None:
    batch = given(OPENED).batch()
    for number in range(3):
        batch.decide(pending_of(AnnotateSession(session_id=SESSION, text="x", command_id=str(number))))
    events = [decode(row.entry) for row in batch.append.events]
    assert {(event.recorded_at, event.occurred_at) for event in events} == {(batch.now, batch.now)}
    assert batch.append.recorded_at == moment(batch.now)


def test_follow_ups_a_thousand_levels_deep_do_not_recurse() -> None:
    chain = [SESSION, *(uuid7() for _ in range(OPEN_ITEMS_MAX))]
    history = given(OPENED, *(on(child, child_of(parent)) for parent, child in pairwise(chain)))
    outcome = history.when(CancelSession(session_id=SESSION, cascade=True))
    fact = SessionCancelled(cascade=True)
    outcome.then(*(on(stream_id, fact) for stream_id in chain))
    assert outcome.batch.append.commands[0].seen_position == outcome.batch.size
    assert outcome.batch.append.closed == set(chain[1:])


def test_follow_ups_a_thousand_wide_all_follow() -> None:
    children = [uuid7() for _ in range(OPEN_ITEMS_MAX)]
    history = given(OPENED, *(on(child, child_of(SESSION)) for child in children))
    outcome = history.when(CancelSession(session_id=SESSION, cascade=True))
    outcome.then(*(on(stream_id, SessionCancelled(cascade=True)) for stream_id in (SESSION, *children)))
    assert len({event.command_id for event in outcome.events}) == 1 + OPEN_ITEMS_MAX


def test_personal_values_never_reach_an_entry_in_the_clear() -> None:
    """The keys are missing here, so nothing can be sealed: then nothing is decided either."""
    mark = {"$personal": {"subject": "mia", "value": "1 Elm St"}}
    with pytest.raises(Unprepared):
        given(OPENED).when(Record(kind="note", body=[mark]))


# Answering, in batches that overlap


async def test_a_replay_is_no_failed_precondition_however_young_its_id_looks(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    """The first try moved the version on; a client whose clock is ahead tries again at another process."""
    session_id = await opened(committer, agent)
    ahead = id_from(datetime.now(UTC) + timedelta(hours=1))

    def change() -> ChangeSession:
        return ChangeSession(session_id=session_id, status="active", command_id=ahead, expected_version=1)

    first = await committer.submit("demo", change(), agent)
    await alone(another, agent)
    again = await another.submit("demo", change(), agent)
    assert (again.replayed, again.positions, again.state) == (True, first.positions, first.state)
    check_ledger(database.owner)


async def test_a_replay_of_what_could_not_be_asked_anew_is_still_answered(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=2)
    ahead = id_from(soon + timedelta(hours=1))

    def open_it() -> OpenSession:
        return OpenSession(agent_role="finance", expires_at=soon, command_id=ahead)

    first = await committer.submit("demo", open_it(), agent)
    await alone(another, agent)
    while another.clock.now() < soon:  # noqa: ASYNC110  (it is the time that is waited for)
        await asyncio.sleep(0.02)
    again = await another.submit("demo", open_it(), agent)
    assert (again.replayed, again.target) == (True, first.target)


async def test_a_principal_has_60_refusals_a_minute_however_the_batches_fall(
    committer: Committer, agent: Actor, database: Database
) -> None:
    session_id = await opened(committer, agent)
    await alone(committer, agent)
    wrong = [ChangeSession(session_id=session_id, status="completed") for _ in range(200)]
    answers = await committer.submit_all("demo", wrong, agent)
    assert sum(isinstance(answer, RateLimited) for answer in answers) == 140
    assert len(of_type(check_ledger(database.owner)["demo"], "CommandRefused")) == 60


async def test_a_caller_who_goes_away_leaves_an_id_that_can_be_asked_again(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    session_id = await opened(committer, agent)
    for turn in range(20):
        await alone(committer, agent)
        await opened(another, agent)  # so that the next batch of the first misses

        def note(turn: int = turn) -> AnnotateSession:
            return AnnotateSession(session_id=session_id, text="x", command_id=f"note-{turn}")

        gone = asyncio.create_task(committer.submit("demo", note(), agent))
        for _ in range(turn):
            await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        async with asyncio.timeout(10):
            again = await committer.submit("demo", note(), agent)
        assert again.status == 200
    notes = of_type(check_ledger(database.owner)["demo"], "SessionAnnotated")
    assert sorted(note.command_id for note in notes) == sorted(f"note-{turn}" for turn in range(20))


async def test_what_a_batch_on_its_way_closes_is_not_open_for_the_next(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    root = await opened(another, agent)
    children = [uuid7() for _ in range(1000)]
    answers = await another.submit_all(
        "demo", [OpenSession(agent_role="sub", session_id=c, parent_session_id=root) for c in children], agent
    )
    assert {answer.status for answer in answers} == {201}
    for child in children[:10]:
        await alone(committer, agent)
        close = CancelSession(session_id=child)
        refill = OpenSession(agent_role="sub", parent_session_id=root)
        answers = await committer.submit_all("demo", [close, refill], agent)
        assert [answer.status for answer in answers] == [200, 201]
        await opened(another, agent)
    check_ledger(database.owner)


async def test_the_largest_envelope_that_can_be_asked_for_has_a_place(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    """Everything but the data stands in the entry itself, which has an end: 65,535 bytes (static-ct-api)."""
    session_id = await opened(committer, agent)
    wide = "\N{GRINNING FACE}"
    room = PERSONAL_TEXT_BYTES_MAX - len(canonical({"$personal": {"subject": wide * 255, "value": ""}}))
    asked = canonical(
        {
            "type": "ChangeSession",
            "session_id": session_id,
            "status": "active",
            "task_id": wide * 255,
            "metadata": {"a": "x" * (METADATA_BYTES_MAX - 8)},
            "reason": {"$personal": {"subject": wide * 255, "value": "x" * room}},
            "refs": [{"type": wide * 100, "id": wide * 255}] * 16,
            "correlation_id": wide * 128,
            "external_id": wide * 255,
            "command_id": "x" * 255,
        }
    )
    first = await committer.submit("demo", read_command(asked), agent)
    again = await another.submit("demo", read_command(asked), agent)
    assert (first.event_count, again.replayed, again.state) == (3, True, first.state)
    refused = await committer.submit("demo", replace(read_command(asked), command_id="y", status="pending"), agent)
    assert refused.status == 422
    check_ledger(database.owner)


@pytest.mark.parametrize("settled", [False, True])
async def test_of_two_commands_raced_under_one_id_one_is_done_and_the_other_is_told(
    committer: Committer, another: Committer, agent: Actor, database: Database, settled: bool
) -> None:
    if settled:
        await alone(committer, agent)
        await alone(another, agent)
    before = len(check_ledger(database.owner).get("demo", []))

    async def ask(number: int) -> Receipt | MunimentError:
        process = (committer, another)[number % 2]
        command = OpenSession(agent_role=("buyer", "seller")[number // 2 % 2], command_id="one~id")
        try:
            return await process.submit("demo", command, agent)
        except MunimentError as error:
            return error

    answers = await asyncio.gather(*(ask(number) for number in range(64)))
    done = [answer for answer in answers if isinstance(answer, Receipt)]
    told = [answer for answer in answers if isinstance(answer, IdempotencyKeyReused)]
    assert (len(done), len(told)) == (32, 32)
    assert len({(receipt.target, receipt.state.agent_role) for receipt in done}) == 1
    assert sum(not receipt.replayed for receipt in done) == 1
    assert len(check_ledger(database.owner)["demo"]) == before + 1


async def test_a_duplicate_of_what_left_no_trace_is_decided_by_itself(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    """The first is not found; the second, under its id and of other content, must not be told that it was reused."""
    there = await opened(committer, agent)
    for process in (committer, another):
        await alone(process, agent)
        commands = [AnnotateSession(session_id=target, text="x", command_id="free") for target in (uuid7(), there)]
        answers = await process.submit_all("demo", commands, agent)
        assert isinstance(answers[0], NotFound | IdempotencyKeyReused)
        assert isinstance(answers[1], Receipt)
    assert len(of_type(check_ledger(database.owner)["demo"], "SessionAnnotated")) == 1
