"""The rules of a record: written once, of anything that is there, in any state of its session."""

from typing import Any
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from ledger.commands import Record
from ledger.events import FactRecorded, SessionCompleted, SessionExpired, SessionOpened
from ledger.values import Artifact, Cost, Ref, Usage, stamp
from tests.ledger.given import AGENT, DEADLINE, NOW, OPENED, RECORD, SESSION, given, later, on

OTHER = uuid7()
NOTE = FactRecorded(kind="note")


def test_a_record_is_kept_as_it_was_sent() -> None:
    started = later(NOW, days=-1)
    usage = Usage(model="m-1", input_tokens=7, cost=Cost("0.10", "EUR"))
    artifacts = (Artifact(uri="s3://a", size_bytes=9),)
    fields: dict[str, Any] = {"kind": "model.called", "task_id": OTHER, "approval_id": OTHER, "status": "error"}
    fields |= {"body": {"n": [1.5, None]}, "usage": usage, "artifacts": artifacts, "parent_record_id": OTHER}
    asked = Record(record_id=RECORD, session_id=SESSION, started_at=started, refs=(Ref("invoice", "9"),), **fields)
    outcome = given(OPENED, on(OTHER, NOTE)).when(asked).then(FactRecorded(started_at=stamp(started), **fields))
    state = outcome.state
    assert {name: getattr(state, name) for name in fields} == fields
    assert (state.record_id, state.session_id, state.version, state.refs) == (
        RECORD,
        SESSION,
        1,
        (Ref("invoice", "9"),),
    )
    assert (state.actor, state.started_at, state.ended_at) == (AGENT, stamp(started), None)
    assert (state.event_id, state.recorded_at) == (outcome.events[0].event_id, NOW)


def test_a_record_without_an_id_gets_one_of_version_7() -> None:
    outcome = given().when(Record(kind="note")).then(NOTE)
    assert outcome.target.version == 7
    assert (outcome.state.record_id, outcome.verdict.status) == (outcome.target, 201)


def test_a_record_stands_alone_or_in_the_family_of_its_session() -> None:
    (alone,) = given().when(Record(kind="note", record_id=RECORD, command_id="c-1")).events
    assert (alone.session_id, alone.root_session_id, alone.correlation_id) == (None, None, "c-1")
    child = SessionOpened(agent_role="sub", expires_at=DEADLINE, parent_session_id=SESSION)
    (inside,) = given(OPENED, on(OTHER, child)).when(Record(kind="note", session_id=OTHER)).events
    assert (inside.session_id, inside.root_session_id, inside.correlation_id) == (OTHER, SESSION, str(SESSION))


@pytest.mark.parametrize("there", [NOTE, OPENED])
def test_an_id_is_used_once(there: Any) -> None:
    given(on(RECORD, there)).when(Record(kind="note", record_id=RECORD)).refused(
        "already_exists", what="record", id=RECORD
    )


@pytest.mark.parametrize("named", [RECORD, OTHER])
def test_its_session_must_be_a_session_that_is_there(named: UUID) -> None:
    asked = Record(kind="note", session_id=named)
    given(OPENED, on(RECORD, NOTE)).when(asked).turned_away("not_found", what="session", id=named)


@pytest.mark.parametrize("named", [SESSION, OTHER])
def test_its_parent_must_be_a_record_that_is_there(named: UUID) -> None:
    asked = Record(kind="note", parent_record_id=named)
    given(OPENED, on(RECORD, NOTE)).when(asked).refused("unknown_parent", what="record", id=named)
    given(on(RECORD, NOTE)).when(Record(kind="note", parent_record_id=RECORD)).then(
        FactRecorded(kind="note", parent_record_id=RECORD)
    )


def test_a_record_in_a_session_whose_time_has_run_out_comes_after_its_expiry() -> None:
    outcome = given(OPENED, now=DEADLINE).when(Record(kind="note", record_id=RECORD, session_id=SESSION))
    outcome.then(on(SESSION, SessionExpired(deadline=DEADLINE)), on(RECORD, NOTE))
    assert [row.first_position for row in outcome.batch.append.commands] == [2, 3]


def test_a_record_changes_nothing_of_its_session() -> None:
    history = given(OPENED, SessionCompleted())
    outcome = history.when(Record(kind="note", session_id=SESSION)).then(NOTE)
    assert outcome.batch.stream(SESSION) == history.streams[SESSION]


def test_version_0_is_that_of_a_record_that_is_not_there_yet() -> None:
    given().when(Record(kind="note", record_id=RECORD), expected_version=0).then(NOTE)
    given(on(RECORD, NOTE)).when(Record(kind="note", record_id=RECORD), expected_version=0).turned_away(
        "precondition_failed", expected=0, current=1
    )
