"""The group commit, against a real PostgreSQL: what is answered is what is there, once."""

import asyncio
import random
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4, uuid5

import psycopg
import pytest
from uuid_utils.compat import uuid7

from ledger.commands import AnnotateSession, CancelSession, ChangeSession, OpenSession, Record
from ledger.committer import Committer
from ledger.errors import (
    IdempotencyKeyReused,
    MunimentError,
    NotFound,
    PreconditionFailed,
    RateLimited,
    StoreUnavailable,
)
from ledger.past import SETTLED_SECONDS
from ledger.pending import Verdict
from ledger.postgres import Pool
from ledger.receipt import Receipt
from ledger.system import ExpireSession
from ledger.values import SYSTEM, Actor, stamp
from tests.check import check_ledger, of_type, states
from tests.conftest import Database

pytestmark = pytest.mark.usefixtures("database")


async def opened(committer: Committer, agent: Actor, **fields: Any) -> UUID:
    receipt = await committer.submit("demo", OpenSession(agent_role="finance", **fields), agent)
    assert receipt.status == 201
    assert receipt.target is not None
    return receipt.target


async def test_a_command_is_answered_with_the_state_it_made(
    committer: Committer, agent: Actor, database: Database
) -> None:
    session_id = await opened(committer, agent, metadata={"ticket": "T-81"})
    receipt = await committer.submit("demo", ChangeSession(session_id=session_id, status="active"), agent)
    assert (receipt.status, list(receipt.positions), receipt.state.state) == (200, [2], "active")
    assert receipt.state.version == 2
    history = check_ledger(database.owner)["demo"]
    assert [event.type for _, event in history] == ["SessionOpened", "SessionActivated"]


async def test_several_fields_are_one_atomic_command(committer: Committer, agent: Actor, database: Database) -> None:
    session_id = await opened(committer, agent)
    change = ChangeSession(session_id=session_id, status="active", task_id="T-1", metadata={"a": 1.50}, reason="begin")
    receipt = await committer.submit("demo", change, agent)
    assert list(receipt.positions) == [2, 3, 4]
    history = check_ledger(database.owner)["demo"]
    assert [e.type for _, e in history][1:] == ["SessionTaskBound", "SessionMetadataChanged", "SessionActivated"]
    assert {e.reason for _, e in history[1:]} == {"begin"}


async def test_the_same_status_and_nothing_else_appends_nothing(
    committer: Committer, agent: Actor, database: Database
) -> None:
    session_id = await opened(committer, agent)
    receipt = await committer.submit("demo", ChangeSession(session_id=session_id, status="pending"), agent)
    assert (receipt.status, receipt.event_count, receipt.seen_position) == (200, 0, 1)
    assert len(check_ledger(database.owner)["demo"]) == 1


async def test_a_replay_gets_the_first_answer_from_memory_and_from_the_table(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    first = await committer.submit("demo", OpenSession(agent_role="finance", command_id="order-81"), agent)
    await committer.submit("demo", ChangeSession(session_id=first.target or uuid4(), status="active"), agent)
    for process in (committer, another):
        again = await process.submit("demo", OpenSession(agent_role="finance", command_id="order-81"), agent)
        assert again.replayed
        assert (again.status, again.target, again.positions) == (first.status, first.target, first.positions)
        assert again.state == first.state, "as it was then, not as it is now"
    assert len(check_ledger(database.owner)["demo"]) == 2


async def test_an_id_used_for_another_command_is_refused_and_leaves_no_trace(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    await committer.submit("demo", OpenSession(agent_role="finance", command_id="one"), agent)
    for process in (committer, another):
        with pytest.raises(IdempotencyKeyReused):
            await process.submit("demo", OpenSession(agent_role="sales", command_id="one"), agent)
    assert len(check_ledger(database.owner)["demo"]) == 1


async def test_the_same_id_of_another_principal_is_another_command(
    committer: Committer, agent: Actor, database: Database
) -> None:
    other = Actor(issuer="https://id.example", sub="agent-8", kind="agent", assurance="authenticated", roles=("agent",))
    first = await committer.submit("demo", OpenSession(agent_role="finance", command_id="one"), agent)
    second = await committer.submit("demo", OpenSession(agent_role="finance", command_id="one"), other)
    assert first.target != second.target
    assert not second.replayed
    check_ledger(database.owner)


async def test_a_refusal_is_recorded_once_and_said_again_word_for_word(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    session_id = await opened(committer, agent)

    def complete() -> ChangeSession:
        return ChangeSession(session_id=session_id, status="completed", command_id="early")

    first = await committer.submit("demo", complete(), agent)
    assert first.refusal is not None
    assert (first.status, first.refusal.code) == (422, "invalid_transition")
    for process in (committer, another):
        again = await process.submit("demo", complete(), agent)
        assert again.refusal is not None
        assert (again.replayed, again.refusal.detail) == (True, first.refusal.detail)
    (refused,) = of_type(check_ledger(database.owner)["demo"], "CommandRefused")
    assert refused.data.attempted == {"session_id": str(session_id), "status": "completed"}
    assert refused.data.params["current_state"] == "pending"


async def test_what_is_not_there_leaves_no_trace_and_frees_the_id(
    committer: Committer, agent: Actor, database: Database
) -> None:
    session_id = uuid7()

    def annotate() -> AnnotateSession:
        return AnnotateSession(session_id=session_id, text="hello", command_id="free")

    with pytest.raises(NotFound):
        await committer.submit("demo", annotate(), agent)
    await opened(committer, agent, session_id=session_id)
    receipt = await committer.submit("demo", annotate(), agent)
    assert (receipt.status, receipt.replayed) == (200, False)
    check_ledger(database.owner)


async def test_what_waits_under_the_id_of_one_that_left_no_trace_is_decided_itself(
    committer: Committer, agent: Actor, database: Database
) -> None:
    session_id = await opened(committer, agent)
    nowhere = AnnotateSession(session_id=uuid7(), text="x", command_id="one")
    other = Record(kind="note", command_id="one")
    stale = AnnotateSession(session_id=session_id, text="y", command_id="two", expected_version=9)
    right = AnnotateSession(session_id=session_id, text="y", command_id="two", expected_version=1)
    again = AnnotateSession(session_id=session_id, text="y", command_id="two")
    different = AnnotateSession(session_id=session_id, text="z", command_id="two")
    answers = await committer.submit_all("demo", [nowhere, other, stale, right, again, different], agent)
    assert [a.status for a in answers] == [404, 201, 412, 200, 200, 422]
    assert [isinstance(a, Receipt) and a.replayed for a in answers] == [False, False, False, False, True, False]
    check_ledger(database.owner)


async def test_a_stale_expected_version_is_a_failed_precondition(
    committer: Committer, agent: Actor, database: Database
) -> None:
    session_id = await opened(committer, agent)
    await committer.submit("demo", AnnotateSession(session_id=session_id, text="x"), agent)
    change = ChangeSession(session_id=session_id, status="active", expected_version=1)
    with pytest.raises(PreconditionFailed) as failed:
        await committer.submit("demo", change, agent)
    assert failed.value.params["current"] == 2
    check_ledger(database.owner)


async def test_without_a_role_the_refusal_is_on_the_record(
    committer: Committer, agent: Actor, database: Database
) -> None:
    auditor = Actor(issuer="i", sub="eve", kind="human", assurance="authenticated", roles=("auditor",))
    receipt = await committer.submit("demo", OpenSession(agent_role="finance"), auditor)
    assert receipt.refusal is not None
    assert receipt.refusal.code == "forbidden"
    (refused,) = of_type(check_ledger(database.owner)["demo"], "CommandRefused")
    assert refused.actor == auditor


async def test_a_principal_fills_no_ledger_with_refusals(
    committer: Committer, agent: Actor, database: Database
) -> None:
    session_id = await opened(committer, agent)

    async def complete() -> Verdict:
        try:
            return await committer.submit("demo", ChangeSession(session_id=session_id, status="completed"), agent)
        except MunimentError as error:
            return error

    answers = await asyncio.gather(*(complete() for _ in range(80)))
    assert sum(isinstance(answer, RateLimited) for answer in answers) == 20
    assert len(of_type(check_ledger(database.owner)["demo"], "CommandRefused")) == 60
    assert (
        await committer.submit("demo", AnnotateSession(session_id=session_id, text="still fine"), agent)
    ).status == 200


async def test_one_batch_chains_what_is_decided_on_one_stream(
    committer: Committer, agent: Actor, database: Database
) -> None:
    session_id = uuid7()
    answers = await committer.submit_all(
        "demo",
        [
            OpenSession(agent_role="finance", session_id=session_id),
            ChangeSession(session_id=session_id, status="active"),
            ChangeSession(session_id=session_id, status="completed"),
            ChangeSession(session_id=session_id, status="active"),
            Record(kind="tool.called", session_id=session_id),
        ],
        agent,
    )
    assert [a.status for a in answers] == [201, 200, 200, 422, 201]
    check_ledger(database.owner)


@pytest.mark.parametrize("versioned", [uuid4, uuid7])
async def test_a_taken_id_is_refused_whoever_took_it_and_however_young_it_looks(
    committer: Committer, another: Committer, agent: Actor, database: Database, versioned: Any
) -> None:
    for process in (committer, another):
        for _ in range(5):  # until each believes that it is alone
            await opened(process, agent)
    taken = versioned()
    await opened(committer, agent, session_id=taken)
    for process in (committer, another):
        receipt = await process.submit("demo", OpenSession(agent_role="finance", session_id=taken), agent)
        assert receipt.refusal is not None
        assert receipt.refusal.code == "already_exists"
        as_record = await process.submit("demo", Record(kind="note", record_id=taken), agent)
        assert as_record.refusal is not None
        assert as_record.refusal.code == "already_exists"
    check_ledger(database.owner)


async def test_an_id_from_the_future_is_found_again_by_the_index(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    ahead = int((datetime.now(UTC) + timedelta(days=1)).timestamp() * 1000)
    command_id = str(UUID(int=(ahead << 80) | (7 << 76) | (2 << 62) | 1))
    for _ in range(5):
        await opened(another, agent)
    first = await committer.submit("demo", OpenSession(agent_role="finance", command_id=command_id), agent)
    for _ in range(5):
        await opened(another, agent)
    again = await another.submit("demo", OpenSession(agent_role="finance", command_id=command_id), agent)
    assert (again.replayed, again.target) == (True, first.target)
    check_ledger(database.owner)


async def test_due_expiry_comes_before_any_verdict(committer: Committer, agent: Actor, database: Database) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=2)
    session_id = await opened(committer, agent, expires_at=soon)
    while True:  # the ledger's clock decides: ask until it has passed
        receipt = await committer.submit("demo", ChangeSession(session_id=session_id, task_id=str(uuid4())), agent)
        if receipt.status != 200:
            break
    assert receipt.refusal is not None
    assert receipt.refusal.params["current_state"] == "expired"
    history = check_ledger(database.owner)["demo"]
    assert [e.type for _, e in history][-2:] == ["SessionExpired", "CommandRefused"]
    assert history[-2].event.actor == SYSTEM


async def test_any_number_of_sweepers_expire_a_session_once(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=2)
    session_id = await opened(committer, agent, expires_at=soon)
    state = (await committer.submit("demo", ChangeSession(session_id=session_id), agent)).state

    async def sweep(process: Committer) -> Receipt:
        command = ExpireSession(session_id=session_id, deadline=state.expires_at)
        command.command_id = command.due_id
        return await process.submit("demo", command, SYSTEM)

    while committer.clock.now() < soon:  # noqa: ASYNC110  (it is the time that is waited for)
        await asyncio.sleep(0.02)
    await asyncio.gather(*(sweep(process) for process in (committer, another) * 5))
    assert len(of_type(check_ledger(database.owner)["demo"], "SessionExpired")) == 1


async def test_an_expiry_that_came_too_early_leaves_no_trace_and_comes_again(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=2)
    session_id = await opened(committer, agent, expires_at=soon)
    expiry = ExpireSession(session_id=session_id, deadline=stamp(soon))

    async def sweep(process: Committer) -> Receipt:
        command = ExpireSession(session_id=session_id, deadline=expiry.deadline)
        command.command_id = expiry.due_id
        return await process.submit("demo", command, SYSTEM)

    early = await sweep(another)
    assert (early.event_count, early.state.state) == (0, "pending")
    while (late := await sweep(committer)).state.state != "expired":
        pass
    assert late.event_count == 1
    assert (await sweep(another)).replayed
    note = AnnotateSession(session_id=session_id, text="late")
    assert (await another.submit("demo", note, agent)).status == 200
    check_ledger(database.owner)


async def test_cancelling_cascades_only_when_asked_and_in_one_commit(
    committer: Committer, agent: Actor, database: Database
) -> None:
    root = await opened(committer, agent)
    child = await opened(committer, agent, parent_session_id=root)
    grandchild = await opened(committer, agent, parent_session_id=child)
    done = await opened(committer, agent, parent_session_id=root)
    await committer.submit("demo", CancelSession(session_id=done), agent)
    kept = await opened(committer, agent)
    receipt = await committer.submit("demo", CancelSession(session_id=root, cascade=True, reason="stop"), agent)
    assert receipt.event_count == 1
    history = check_ledger(database.owner)["demo"]
    final = states(history)
    assert [final[i].state for i in (root, child, grandchild, kept)] == ["cancelled"] * 3 + ["pending"]
    trigger, *follow_ups = [e for _, e in history[-3:]]
    assert [e.stream_id for e in follow_ups] == [child, grandchild]
    assert follow_ups[0].causation_id == trigger.event_id
    assert receipt.seen_position == len(history), "a reader who waits for this position sees it all"


async def test_a_session_has_a_bound_on_what_is_open_under_it(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    root = await opened(committer, agent)
    children = [OpenSession(agent_role="sub", parent_session_id=root) for _ in range(1001)]
    answers = await committer.submit_all("demo", children, agent)
    assert [a.status for a in answers] == [201] * 1000 + [422]
    receipt = await another.submit("demo", CancelSession(session_id=root, cascade=True), agent)
    assert receipt.status == 200
    history = check_ledger(database.owner)["demo"]
    assert len(of_type(history, "SessionCancelled")) == 1001


async def test_an_unknown_parent_is_refused(committer: Committer, agent: Actor, database: Database) -> None:
    receipt = await committer.submit("demo", OpenSession(agent_role="x", parent_session_id=uuid7()), agent)
    assert receipt.refusal is not None
    assert receipt.refusal.code == "unknown_parent"
    check_ledger(database.owner)


async def test_data_too_large_for_its_entry_is_kept_beside_it_whole(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    body = {"text": "é" * 100_000, "n": 1.10}

    def record() -> Record:
        return Record(kind="message.user", body=body, command_id="large")

    first = await committer.submit("demo", record(), agent)
    again = await another.submit("demo", record(), agent)
    assert first.state == again.state
    assert again.state.body == body
    check_ledger(database.owner)


async def test_personal_values_are_sealed_wherever_they_rest(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    mark = {"$personal": {"subject": "mia", "value": "Mia Li, 1 Elm St"}}
    session_id = await opened(committer, agent, metadata={"customer": mark})
    await committer.submit("demo", Record(kind="note", session_id=session_id, body=[mark]), agent)
    await committer.submit("demo", Record(kind="note", body={"at": "x" * 70_000, "who": mark}), agent)
    refused = ChangeSession(session_id=session_id, status="completed", metadata={"customer": mark})
    receipt = await committer.submit("demo", refused, agent)
    assert receipt.status == 422
    with psycopg.connect(database.owner) as connection:
        for table in ("events", "payloads", "commands"):
            rows = connection.execute(f"SELECT t::text, t.* FROM ledger.{table} t").fetchall()
            assert rows
            assert not any(b"Elm St" in v for row in rows for v in row if isinstance(v, bytes))
            assert not any("Elm St" in str(v) for row in rows for v in row)
    history = check_ledger(database.owner)["demo"]
    assert all("$sealed" in str(e.data) for _, e in history)


async def test_two_processes_interleave_and_every_verdict_stands(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    """Both work on the same few streams; each answer must be what a replay of the ledger says."""
    sessions = [await opened(committer, agent) for _ in range(6)]
    dice = random.Random(7)
    asked: list[tuple[ChangeSession, Receipt | MunimentError]] = []

    async def caller(process: Committer) -> None:
        for _ in range(40):
            status: Any = dice.choice(["active", "completed", "failed", "pending"])
            change = ChangeSession(session_id=dice.choice(sessions), status=status)
            if dice.random() < 0.1:
                change = ChangeSession(session_id=change.session_id, task_id=str(dice.randint(1, 3)))
            actor = Actor(issuer="i", sub=str(uuid4()), kind="agent", assurance="authenticated", roles=("agent",))
            asked.append((change, await process.submit("demo", change, actor)))

    await asyncio.gather(*(caller(process) for process in (committer, another) * 4))
    history = check_ledger(database.owner)["demo"]
    for change, verdict in asked:
        assert isinstance(verdict, Receipt)
        before = states([r for r in history if r.position < (verdict.first_position or verdict.seen_position + 1)])
        session = before[change.session_id]  # type: ignore[index]
        if verdict.refusal is not None:
            assert verdict.refusal.params["current_state"] == session.state
        else:
            after = states([r for r in history if r.position <= verdict.seen_position])
            assert after[change.session_id] == verdict.state  # type: ignore[index]
            assert verdict.event_count or change.status in {session.state} or change.task_id == session.task_id


async def test_a_refusal_has_a_place_that_no_stranger_can_take_first(
    committer: Committer, agent: Actor, database: Database
) -> None:
    session_id = await opened(committer, agent)
    ledger = await committer.ledger("demo")
    assert ledger is not None
    guessed = uuid5(ledger.ledger_id, f"{agent.principal}\nmine")
    await opened(committer, agent, session_id=guessed)
    refused = ChangeSession(session_id=session_id, status="completed", command_id="mine")
    assert (await committer.submit("demo", refused, agent)).status == 422
    check_ledger(database.owner)


async def test_concurrent_duplicates_across_processes_have_one_effect(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    async def open_it(process: Committer) -> Receipt:
        return await process.submit("demo", OpenSession(agent_role="finance", command_id="race"), agent)

    receipts = await asyncio.gather(*(open_it(process) for process in (committer, another) * 32))
    assert len({receipt.target for receipt in receipts}) == 1
    assert sum(not receipt.replayed for receipt in receipts) == 1
    assert len(check_ledger(database.owner)["demo"]) == 1


async def test_a_lost_connection_mid_commit_is_looked_up_and_not_repeated(
    committer: Committer, agent: Actor, database: Database
) -> None:
    session_id = await opened(committer, agent)
    done = asyncio.Event()

    async def cut() -> None:
        async with await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as connection:
            while not done.is_set():
                await connection.execute(
                    """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                       WHERE usename = 'muniment_api' AND datname = current_database() AND random() < 0.2"""
                )
                await asyncio.sleep(0.05)

    async def annotate(index: int) -> Receipt:
        def command() -> AnnotateSession:
            return AnnotateSession(session_id=session_id, text=str(index), command_id=f"note-{index}")

        while True:
            try:
                return await committer.submit("demo", command(), agent)
            except StoreUnavailable:
                continue

    cutter = asyncio.create_task(cut())
    for start in range(0, 300, 20):
        receipts = await asyncio.gather(*(annotate(i) for i in range(start, start + 20)))
        assert all(receipt.status == 200 for receipt in receipts)
    done.set()
    await cutter
    texts = [event.data.text for event in of_type(check_ledger(database.owner)["demo"], "SessionAnnotated")]
    assert sorted(texts, key=int) == [str(i) for i in range(300)]


async def test_what_was_decided_long_before_it_could_be_sent_is_recorded_at_the_time_that_it_is_then(
    committer: Committer, pool: Pool, agent: Actor
) -> None:
    for _ in range(5):  # until it believes to be alone
        await opened(committer, agent)
    async with AsyncExitStack() as held:
        for _ in range(pool.max_size):
            await held.enter_async_context(pool.connection())
        late = asyncio.create_task(committer.submit("demo", OpenSession(agent_role="finance"), agent))
        await asyncio.sleep(SETTLED_SECONDS)
        at = stamp(datetime.now(UTC))
    assert (await late).state.opened_at > at, "else it were of a time of which everything was told already"
