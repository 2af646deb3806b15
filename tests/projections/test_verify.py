"""Verify: a view is what a replay makes of the ledger, and where it is not, that is named row by row."""

from typing import Any

import psycopg
import pytest
from uuid_utils.compat import uuid7

from ledger.events import ApprovalDenied, FactRecorded, SessionActivated, SessionAnnotated, TaskCancelled
from ledger.postgres import Pool
from projections import VIEWS, Projector, projector
from projections.verify import Verdict, verify
from tests.conftest import Database
from tests.projections.conftest import History, NewHistory, project_all
from tests.projections.test_projector import add_at_random


async def verdicts(pool: Pool, view: str, project: str | None = None) -> list[Verdict]:
    return [verdict async for verdict in verify(pool, view, project)]


async def change(database: Database, statement: str, *values: Any) -> None:
    async with await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as owner:
        assert (await owner.execute(statement.encode(), values)).rowcount == 1


async def test_every_view_of_every_project_is_a_replay_however_it_was_cut_into_batches(
    pool: Pool, new_history: NewHistory
) -> None:
    histories = [await new_history("one"), await new_history("other")]
    one_by_one = Projector(pool, VIEWS)
    for seed, count in enumerate((1, 2, 300, 7, 400)):
        for n, history in enumerate(histories):
            add_at_random(history, count, 10 * seed + n)
            await project_all(one_by_one, history)
    for view in VIEWS:
        one, other = await verdicts(pool, view)
        for verdict, history in ((one, histories[0]), (other, histories[1])):
            assert verdict.holds, verdict.drifts
            assert verdict.rows
            assert (verdict.project_id, verdict.position) == (history.project_id, 710)
            assert str(verdict) == (
                f"{view} of {history.project_id} is replay(ledger {history.ledger_id}, position 710, "
                f"code version {verdict.code_version}), digest {verdict.digest}"
            )
        assert one.digest != other.digest
        assert await verdicts(pool, view, "other") == [other]


async def test_the_digest_is_of_what_the_view_says_and_not_of_how_it_came_to_be(
    pool: Pool, database: Database, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_at_random(history, 100, 1)
    await project_all(Projector(pool, VIEWS), history)
    at_once = {view: await verdicts(pool, view) for view in VIEWS}
    async with await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as owner:
        await owner.execute(
            "TRUNCATE sessions.sessions, sessions.labels, sessions.spans, tasks.tasks, tasks.spans,"
            " approvals.approvals, approvals.spans, records.segments, audit.segments, projections.positions"
        )
    monkeypatch.setattr(projector, "BATCH_EVENTS_MAX", 9)
    await project_all(Projector(pool, VIEWS), history)
    again = {view: await verdicts(pool, view) for view in VIEWS}
    assert again == at_once


async def test_a_value_that_was_changed_behind_its_back_is_named_with_the_event_that_set_it(
    pool: Pool, database: Database, history: History
) -> None:
    session_id = history.open(labels={"team": "red"})
    other_id = history.open()
    history.add(SessionActivated(), session_id)
    history.add(SessionAnnotated(text="x"), session_id)
    await project_all(Projector(pool, VIEWS), history)
    (before,) = await verdicts(pool, "sessions")
    await change(database, "UPDATE sessions.sessions SET state = 'completed' WHERE session_id = %s", session_id)
    await change(database, "UPDATE sessions.sessions SET agent_role = 'boss' WHERE session_id = %s", other_id)
    (verdict,) = await verdicts(pool, "sessions")
    assert not verdict.holds
    assert verdict.replay_digest == before.digest == before.replay_digest
    assert verdict.digest != before.digest
    state, role = verdict.drifts
    assert (state.table, state.key, state.field) == ("sessions", str(session_id), "state")
    assert (state.stored, state.replayed) == ("completed", "active")
    assert state.event is not None
    assert (state.event.position, state.event.type) == (3, "SessionActivated")
    assert (role.key, role.field, role.stored, role.replayed) == (str(other_id), "agent_role", "boss", "helper")
    assert role.event is not None
    assert (role.event.position, role.event.type) == (2, "SessionOpened")


@pytest.mark.parametrize(
    ("view", "statement", "found"),
    [
        ("sessions", "DELETE FROM sessions.labels", {("labels", "*", True)}),
        ("sessions", "UPDATE sessions.labels SET state = 'lost'", {("labels", "state", True)}),
        ("sessions", "UPDATE sessions.labels SET value = 'x'", {("labels", "*", False), ("labels", "*", True)}),
        ("sessions", "UPDATE sessions.sessions SET expires_at = 'infinity'", {("sessions", "expires_at", True)}),
        ("sessions", "UPDATE sessions.sessions SET session = session || ' '", {("sessions", "session", True)}),
        ("sessions", "UPDATE sessions.sessions SET state_since = 7", {("sessions", "state_since", True)}),
        ("sessions", "DELETE FROM sessions.spans", {("spans", "*", True)}),
        ("sessions", "UPDATE sessions.spans SET until = until + 1", {("spans", "until", True)}),
        ("sessions", "UPDATE sessions.spans SET class = class + 1", {("spans", "class", True)}),
        ("sessions", "UPDATE sessions.spans SET since = 0", {("spans", "*", False), ("spans", "*", True)}),
        ("tasks", "UPDATE tasks.spans SET state = 'dead'", {("spans", "state", True)}),
        ("approvals", "UPDATE approvals.spans SET position = 1", {("spans", "position", True)}),
        ("tasks", "DELETE FROM tasks.tasks", {("tasks", "*", True)}),
        ("tasks", "UPDATE tasks.tasks SET worker = 'someone'", {("tasks", "worker", True)}),
        ("tasks", "UPDATE tasks.tasks SET task_id = gen_random_uuid()", {("tasks", "*", False), ("tasks", "*", True)}),
        ("approvals", "UPDATE approvals.approvals SET due_at = now()", {("approvals", "due_at", True)}),
        ("approvals", "UPDATE approvals.approvals SET roles = roles || '{x}'", {("approvals", "roles", True)}),
        ("records", "UPDATE records.segments SET terms = 'x'", {("segments", "*", True)}),
        (
            "audit",
            "UPDATE audit.segments SET terms = terms || $$'secret':1$$::tsvector",
            {("segments", "*", False)},
        ),
        (
            "audit",
            "UPDATE audit.segments SET terms = ts_delete(terms, '*')",
            {("segments", "terms", True)},
        ),
        (
            "audit",
            "UPDATE audit.segments SET recorded_ats[2] = now()",
            {("segments", "recorded_at", True)},
        ),
        (
            "audit",
            "UPDATE audit.segments SET ledger_id = gen_random_uuid()",
            {("segments", "*", True)},
        ),
    ],
)
async def test_whatever_is_changed_is_noticed(
    view: str, statement: str, found: set[tuple[str, str, bool]], pool: Pool, database: Database, history: History
) -> None:
    session_id = history.open(labels={"team": "red"})
    task_id = history.submit(session_id=session_id)
    approval_id = history.ask(session_id=session_id)
    history.add(FactRecorded(kind="note"), session_id=session_id)
    history.add(SessionActivated(), session_id)
    history.add(TaskCancelled(), task_id)
    history.add(ApprovalDenied(), approval_id)
    await project_all(Projector(pool, VIEWS), history)
    assert [verdict.holds for verdict in await verdicts(pool, view)] == [True]
    await change(database, statement)
    (verdict,) = await verdicts(pool, view)
    assert not verdict.holds
    assert verdict.drifted == len(verdict.drifts)
    assert {(drift.table, drift.field, drift.event is not None) for drift in verdict.drifts} == found
    for other in VIEWS.keys() - {view}:
        assert [verdict.holds for verdict in await verdicts(pool, other)] == [True]


async def test_a_view_that_stands_behind_is_a_replay_up_to_there(pool: Pool, history: History) -> None:
    add_at_random(history, 40, 1)
    await project_all(Projector(pool, VIEWS), history)
    add_at_random(history, 40, 2)
    await history.write()
    for view in VIEWS:
        (verdict,) = await verdicts(pool, view)
        assert verdict.holds
        assert verdict.position == 40


async def test_an_event_that_no_replay_can_take_is_named(pool: Pool, database: Database, history: History) -> None:
    history.open()
    history.add(SessionActivated(), uuid7())  # of a session that was never opened
    await project_all(Projector(pool, VIEWS), history)
    await change(database, "UPDATE projections.positions SET position = 2 WHERE view = 'sessions'")
    (verdict,) = await verdicts(pool, "sessions")
    assert not verdict.holds
    (drift,) = verdict.drifts
    assert drift.key == "event 2"
