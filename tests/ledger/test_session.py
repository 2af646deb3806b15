"""The rules of a session: every command in every state, and what time, parents and children do to it."""

from typing import Any
from uuid import UUID

import pytest
from msgspec import UNSET
from uuid_utils.compat import uuid7

from ledger import session
from ledger.commands import AnnotateSession, CancelSession, ChangeSession, Command, OpenSession, Record
from ledger.events import (
    Fact,
    FactRecorded,
    SessionActivated,
    SessionAnnotated,
    SessionCancelled,
    SessionCompleted,
    SessionExpired,
    SessionFailed,
    SessionMetadataChanged,
    SessionOpened,
    SessionTaskBound,
)
from ledger.queue import OPEN_ITEMS_MAX
from ledger.system import ExpireSession
from ledger.values import SYSTEM, Actor, AgentDescription, stamp
from tests.ledger.given import AGENT, DEADLINE, NOW, OPENED, RECORD, SESSION, given, later, on

CHILD, GRANDCHILD, OTHER = uuid7(), uuid7(), uuid7()
STATES: dict[str, tuple[Fact, ...]] = {
    "pending": (OPENED,),
    "active": (OPENED, SessionActivated()),
    "completed": (OPENED, SessionActivated(), SessionCompleted()),
    "failed": (OPENED, SessionActivated(), SessionFailed(reason="x")),
    "expired": (OPENED, SessionExpired(deadline=DEADLINE)),
    "cancelled": (OPENED, SessionCancelled()),
}
LIVING = {"pending": ["active", "cancelled"], "active": ["completed", "failed", "cancelled"]}
ENDED = [state for state in STATES if state not in LIVING]
BECOMES: dict[tuple[str, str], Fact] = {
    ("pending", "active"): SessionActivated(),
    ("pending", "cancelled"): SessionCancelled(reason="why"),
    ("active", "completed"): SessionCompleted(),
    ("active", "failed"): SessionFailed(reason="why"),
    ("active", "cancelled"): SessionCancelled(reason="why"),
}
in_every_state = pytest.mark.parametrize("state", STATES)
in_every_living_state = pytest.mark.parametrize("state", LIVING)
in_every_ended_state = pytest.mark.parametrize("state", ENDED)


def change(**fields: Any) -> ChangeSession:
    return ChangeSession(session_id=SESSION, **fields)


def child_of(parent: UUID) -> SessionOpened:
    return SessionOpened(agent_role="sub", expires_at=DEADLINE, parent_session_id=parent)


# Every command in every state


@in_every_state
def test_the_history_of_each_state_leads_to_it(state: str) -> None:
    assert given(*STATES[state]).streams[SESSION].state == state
    assert set(session.TERMINAL) == set(ENDED)


@pytest.mark.parametrize("status", STATES)
@in_every_state
def test_a_status_is_taken_up_only_from_where_it_can_be_reached(state: str, status: Any) -> None:
    outcome = given(*STATES[state]).when(change(status=status, reason="why"))
    if status == state:
        outcome.then()
    elif (state, status) in BECOMES:
        assert outcome.then(BECOMES[state, status]).state.state == status
    else:
        allowed = tuple(LIVING.get(state, ()))
        refused = outcome.refused(
            "invalid_transition", command="ChangeSession", id=SESSION, current_state=state, allowed=allowed
        )
        assert refused.state is None


@in_every_state
@pytest.mark.parametrize(
    ("fields", "fact"),
    [
        ({"task_id": "T-1"}, SessionTaskBound(task_id="T-1")),
        ({"metadata": {"a": 1}}, SessionMetadataChanged(metadata={"a": 1})),
    ],
)
def test_a_task_or_metadata_changes_while_the_session_lives(state: str, fields: dict[str, Any], fact: Fact) -> None:
    outcome = given(*STATES[state]).when(change(**fields))
    if state in LIVING:
        outcome.then(fact)
    else:
        outcome.refused("invalid_transition", command="ChangeSession", current_state=state, allowed=())


@in_every_state
def test_a_session_is_cancelled_once_and_only_while_it_lives(state: str) -> None:
    outcome = given(*STATES[state]).when(CancelSession(session_id=SESSION, reason="stop"))
    if state in LIVING:
        outcome.then(SessionCancelled(reason="stop"))
    else:
        outcome.refused("invalid_transition", command="CancelSession", current_state=state, allowed=())


@in_every_state
def test_a_session_is_annotated_in_any_state(state: str) -> None:
    outcome = given(*STATES[state]).when(AnnotateSession(session_id=SESSION, text="seen"))
    assert outcome.then(SessionAnnotated(text="seen")).state.state == state


@in_every_state
def test_a_fact_is_recorded_in_any_state(state: str) -> None:
    command = Record(kind="note", session_id=SESSION, record_id=RECORD)
    given(*STATES[state]).when(command).then(on(RECORD, FactRecorded(kind="note")))


@in_every_state
def test_an_id_is_opened_once(state: str) -> None:
    command = OpenSession(agent_role="finance", session_id=SESSION)
    given(*STATES[state]).when(command).refused("already_exists", what="session", id=SESSION)


@in_every_state
def test_time_runs_out_once_and_only_for_a_session_that_lives(state: str) -> None:
    expire = ExpireSession(session_id=SESSION, deadline=DEADLINE)
    expire.command_id = expire.due_id
    outcome = given(*STATES[state], now=DEADLINE).when(expire, SYSTEM)
    if state in LIVING:
        outcome.then(SessionExpired(deadline=DEADLINE))
    else:
        outcome.then()


@pytest.mark.parametrize(
    "command",
    [
        change(status="active"),
        change(),
        CancelSession(session_id=SESSION),
        AnnotateSession(session_id=SESSION, text="x"),
        ExpireSession(session_id=SESSION, deadline=NOW),
    ],
)
def test_a_session_that_is_not_there_is_not_found_and_that_leaves_no_trace(command: Command) -> None:
    given().when(command, SYSTEM).turned_away("not_found", what="session", id=SESSION)
    as_record = on(SESSION, FactRecorded(kind="note"))
    given(as_record).when(command, SYSTEM).turned_away("not_found", what="session", id=SESSION)


# Opening


def test_a_session_opens_as_it_was_asked_for() -> None:
    agent = AgentDescription(name="bot", model="m-1")
    fields: dict[str, Any] = {"task_id": "T-1", "metadata": {"a": [1]}, "labels": {"team": "blue"}, "agent": agent}
    asked = OpenSession(agent_role="finance", session_id=SESSION, external_id="run#1", **fields)
    state = given().when(asked).then(SessionOpened(agent_role="finance", expires_at=DEADLINE, **fields)).state
    assert (state.state, state.version, state.root_session_id, state.external_id) == ("pending", 1, SESSION, "run#1")
    assert (state.task_id, state.metadata, state.labels, state.agent) == ("T-1", {"a": [1]}, {"team": "blue"}, agent)
    assert (state.opened_at, state.updated_at, state.expires_at) == (NOW, NOW, DEADLINE)


def test_a_session_opened_without_an_id_gets_one_of_version_7() -> None:
    outcome = given().when(OpenSession(agent_role="finance")).then(OPENED)
    assert outcome.target.version == 7
    assert outcome.state.session_id == outcome.target


def test_a_session_ends_when_it_says_in_whatever_offset() -> None:
    at = later(NOW, hours=1)
    given().when(OpenSession(agent_role="finance", session_id=SESSION, expires_at=at)).then(
        SessionOpened(agent_role="finance", expires_at=stamp(at))
    )


@pytest.mark.parametrize("seconds", [0, -1e-6, -3600])
def test_a_session_cannot_open_with_its_time_run_out(seconds: float) -> None:
    asked = OpenSession(agent_role="finance", session_id=SESSION, expires_at=later(NOW, seconds=seconds))
    error: Any = given().when(asked).turned_away("malformed_request")
    assert [told["pointer"] for told in error.errors] == ["/expires_at"]


def test_a_taken_id_is_taken_whatever_it_is_of() -> None:
    command = OpenSession(agent_role="finance", session_id=SESSION)
    given(on(SESSION, FactRecorded(kind="note"))).when(command).refused("already_exists", what="session", id=SESSION)


# Changing


def test_several_fields_are_one_command_in_one_order() -> None:
    asked = change(status="active", metadata={"a": 1}, task_id="T-2", reason="begin")
    outcome = given(OPENED).when(asked)
    outcome.then(SessionTaskBound(task_id="T-2"), SessionMetadataChanged(metadata={"a": 1}), SessionActivated())
    assert [event.stream_version for event in outcome.events] == [2, 3, 4]
    assert {event.reason for event in outcome.events} == {"begin"}
    assert (outcome.state.state, outcome.state.task_id, outcome.state.metadata) == ("active", "T-2", {"a": 1})


@in_every_ended_state
def test_of_several_fields_none_is_changed_where_one_may_not_be(state: str) -> None:
    for asked in (change(status=state, metadata={"a": 1}), change(status="active", task_id="T-2")):
        given(*STATES[state]).when(asked).refused("invalid_transition", current_state=state)
    given(OPENED).when(change(status="completed", metadata={"a": 1})).refused("invalid_transition")


@in_every_state
def test_what_changes_nothing_appends_nothing_in_any_state(state: str) -> None:
    history = (
        SessionOpened(agent_role="finance", expires_at=DEADLINE, task_id="T", metadata={"a": 1}),
        *STATES[state][1:],
    )
    for asked in (change(), change(task_id="T"), change(metadata={"a": 1}), change(reason="none", force=True)):
        before = given(*history)
        assert before.when(asked).then().state == before.streams[SESSION]


def test_a_task_is_bound_again_and_unbound_by_null() -> None:
    bound = SessionOpened(agent_role="finance", expires_at=DEADLINE, task_id="T-1")
    assert given(bound).when(change(task_id="T-2")).then(SessionTaskBound(task_id="T-2")).state.task_id == "T-2"
    assert given(bound).when(change(task_id=None)).then(SessionTaskBound(task_id=None)).state.task_id is None
    given(bound).when(change(task_id=UNSET)).then()
    given(OPENED).when(change(task_id=None)).then()


@pytest.mark.parametrize("other", [True, 1.0])
def test_metadata_is_the_same_only_if_its_bytes_are(other: Any) -> None:
    history = given(SessionOpened(agent_role="finance", expires_at=DEADLINE, metadata={"a": 1}))
    outcome = history.when(change(metadata={"a": other})).then(SessionMetadataChanged(metadata={"a": other}))
    assert repr(outcome.state.metadata["a"]) == repr(other)


def test_metadata_is_replaced_not_merged_and_its_place_is_remembered() -> None:
    history = given(SessionOpened(agent_role="finance", expires_at=DEADLINE, metadata={"a": 1, "b": 2}))
    outcome = history.when(change(metadata={"b": 3})).then(SessionMetadataChanged(metadata={"b": 3}))
    assert outcome.state.metadata == {"b": 3}
    (event,) = outcome.events
    assert (outcome.state.metadata_event_id, outcome.state.metadata_version) == (event.event_id, 2)
    annotated = given(OPENED, SessionAnnotated(text="x")).streams[SESSION]
    assert annotated.metadata_version == 1


def test_a_reason_stands_once_in_each_event() -> None:
    failed = (
        given(*STATES["active"]).when(change(status="failed", reason="no seats")).then(SessionFailed(reason="no seats"))
    )
    assert failed.events[0].reason is None
    completed = given(*STATES["active"]).when(change(status="completed", reason="done")).then(SessionCompleted())
    assert completed.events[0].reason == "done"


@pytest.mark.parametrize(("version", "current"), [(0, 2), (1, 2), (3, 2)])
def test_a_version_that_is_not_the_present_one_fails_the_precondition(version: int, current: int) -> None:
    history = given(*STATES["active"])
    for command in (change(status="completed"), change(), AnnotateSession(session_id=SESSION, text="x")):
        history.when(command, expected_version=version).turned_away(
            "precondition_failed", id=SESSION, expected=version, current=current
        )
    history.when(change(status="completed"), expected_version=2).then(SessionCompleted())


def test_version_0_is_that_of_what_is_not_there_yet() -> None:
    given().when(OpenSession(agent_role="finance", session_id=SESSION), expected_version=0).then(OPENED)
    given().when(change(status="active"), expected_version=1).turned_away("not_found")
    taken = OpenSession(agent_role="finance", session_id=SESSION)
    given(OPENED).when(taken, expected_version=0).turned_away("precondition_failed", current=1)


# Time


@in_every_living_state
@pytest.mark.parametrize(
    "command",
    [
        change(status="active"),
        change(task_id="T-9"),
        CancelSession(session_id=SESSION),
        OpenSession(agent_role="finance", session_id=SESSION),
    ],
)
def test_time_that_has_run_out_comes_before_the_verdict(state: str, command: Command) -> None:
    code = "already_exists" if isinstance(command, OpenSession) else "invalid_transition"
    outcome = given(*STATES[state], now=DEADLINE).when(command)
    outcome.refused(code, on(SESSION, SessionExpired(deadline=DEADLINE)))
    expiry = outcome.events[0]
    assert expiry.actor == SYSTEM
    assert expiry.command_id == ExpireSession(session_id=SESSION, deadline=DEADLINE).due_id
    assert expiry.stream_version == len(STATES[state]) + 1


@in_every_living_state
def test_time_has_not_run_out_until_it_has(state: str) -> None:
    before = stamp(later(DEADLINE, microseconds=-1))
    given(*STATES[state], now=before).when(AnnotateSession(session_id=SESSION, text="x")).then(
        SessionAnnotated(text="x")
    )
    expired = given(*STATES[state], now=DEADLINE).when(AnnotateSession(session_id=SESSION, text="x"))
    assert expired.then(SessionExpired(deadline=DEADLINE), SessionAnnotated(text="x")).state.state == "expired"


def test_expiry_stays_when_the_command_leaves_no_trace() -> None:
    outcome = given(OPENED, now=DEADLINE).when(change(status="active"), expected_version=1)
    outcome.turned_away("precondition_failed", SessionExpired(deadline=DEADLINE), current=2)


def test_a_client_does_not_expire_a_session() -> None:
    given(OPENED).when(change(status="expired")).refused("invalid_transition", current_state="pending")
    given(OPENED, now=DEADLINE).when(change(status="expired")).then(SessionExpired(deadline=DEADLINE))


@pytest.mark.parametrize("deadline", ["2026-11-20T09:00:00.000000Z", DEADLINE, "2026-11-29T09:00:00.000000Z"])
def test_a_sweeper_that_is_early_or_knows_another_deadline_does_nothing(deadline: str) -> None:
    given(OPENED).when(ExpireSession(session_id=SESSION, deadline=deadline), SYSTEM).then()


def test_a_sweeper_and_a_command_expire_a_session_once_between_them() -> None:
    expire = ExpireSession(session_id=SESSION, deadline=DEADLINE)
    expire.command_id = expire.due_id
    outcome = given(OPENED, now=DEADLINE).when(expire, SYSTEM)
    outcome.then(SessionExpired(deadline=DEADLINE))
    assert len(outcome.batch.append.commands) == 1


# Parents and children


def test_a_child_belongs_to_the_root_above_its_parent() -> None:
    history = given(OPENED, on(CHILD, child_of(SESSION)))
    asked = OpenSession(agent_role="sub", session_id=GRANDCHILD, parent_session_id=CHILD)
    outcome = history.when(asked).then(on(GRANDCHILD, child_of(CHILD)))
    assert (outcome.state.parent_session_id, outcome.state.root_session_id) == (CHILD, SESSION)
    (event,) = outcome.events
    assert (event.session_id, event.root_session_id, event.correlation_id) == (GRANDCHILD, SESSION, str(SESSION))
    assert outcome.batch.append.opened[GRANDCHILD].session_id == CHILD


@pytest.mark.parametrize("parent", [OTHER, RECORD, CHILD])
def test_a_parent_must_be_a_session_that_is_there(parent: UUID) -> None:
    history = given(OPENED, on(RECORD, FactRecorded(kind="note")))
    asked = OpenSession(agent_role="sub", session_id=CHILD, parent_session_id=parent)
    history.when(asked).refused("unknown_parent", what="session", id=parent)


def full(*facts: Fact) -> Any:
    children = [uuid7() for _ in range(OPEN_ITEMS_MAX)]
    history = [on(child, child_of(SESSION)) for child in children]
    return given(OPENED, *history, on(children[0], *facts))


def test_a_root_session_has_at_most_1000_open_below_it() -> None:
    asked = OpenSession(agent_role="sub", session_id=GRANDCHILD, parent_session_id=SESSION)
    full().when(asked).refused("session_full", id=SESSION, limit=1000)
    full(SessionCancelled()).when(asked).then(on(GRANDCHILD, child_of(SESSION)))
    full().when(OpenSession(agent_role="finance", session_id=OTHER)).then(on(OTHER, OPENED))


def test_a_full_root_is_full_for_its_grandchildren_too() -> None:
    history = full()
    child = next(iter(history.items[SESSION]))
    asked = OpenSession(agent_role="sub", parent_session_id=child)
    history.when(asked).refused("session_full", id=SESSION)


FAMILY = (OPENED, on(CHILD, child_of(SESSION)), on(GRANDCHILD, child_of(CHILD)), on(OTHER, child_of(SESSION)))


def test_cancelling_takes_what_is_below_along_only_when_asked() -> None:
    given(*FAMILY).when(CancelSession(session_id=SESSION, reason="stop")).then(SessionCancelled(reason="stop"))
    fact = SessionCancelled(reason="stop", cascade=True)
    outcome = given(*FAMILY).when(CancelSession(session_id=SESSION, reason="stop", cascade=True))
    outcome.then(fact, on(CHILD, fact), on(OTHER, fact), on(GRANDCHILD, fact))
    root, child, other, grandchild = outcome.events
    assert [e.causation_id for e in (child, other, grandchild)] == [root.event_id, root.event_id, child.event_id]
    assert {e.correlation_id for e in outcome.events} == {str(SESSION)}
    assert [e.actor for e in outcome.events] == [AGENT, SYSTEM, SYSTEM, SYSTEM]
    assert outcome.batch.append.closed == {CHILD, OTHER, GRANDCHILD}
    assert outcome.batch.open_items(SESSION) == {}


def test_a_part_of_the_family_is_cancelled_alone() -> None:
    fact = SessionCancelled(cascade=True)
    given(*FAMILY).when(CancelSession(session_id=CHILD, cascade=True)).then(fact, on(GRANDCHILD, fact))


def test_what_has_ended_already_is_left_as_it_is() -> None:
    fact = SessionCancelled(cascade=True)
    ended = given(*FAMILY, on(OTHER, SessionActivated(), SessionCompleted()))
    ended.when(CancelSession(session_id=SESSION, cascade=True)).then(fact, on(CHILD, fact), on(GRANDCHILD, fact))


def test_what_is_below_someone_who_has_ended_is_below_still() -> None:
    fact = SessionCancelled(cascade=True)
    ended = given(*FAMILY, on(CHILD, SessionActivated(), SessionCompleted()))
    ended.when(CancelSession(session_id=SESSION, cascade=True)).then(fact, on(GRANDCHILD, fact), on(OTHER, fact))
    beside = given(*FAMILY, on(CHILD, SessionCancelled()))
    beside.when(CancelSession(session_id=OTHER, cascade=True)).then(on(OTHER, fact))


def test_a_child_whose_time_has_run_out_expires_and_is_not_cancelled() -> None:
    soon = "2026-11-21T10:00:00.000000Z"
    child = SessionOpened(agent_role="sub", expires_at=soon, parent_session_id=SESSION)
    outcome = given(OPENED, on(CHILD, child), now=soon).when(CancelSession(session_id=SESSION, cascade=True))
    outcome.then(SessionCancelled(cascade=True), on(CHILD, SessionExpired(deadline=soon)))
    assert outcome.batch.append.closed == {CHILD}


@pytest.mark.parametrize("ending", ["completed", "failed"])
def test_other_endings_take_nobody_along(ending: Any) -> None:
    fact = {"completed": SessionCompleted(), "failed": SessionFailed()}[ending]
    given(*FAMILY, SessionActivated()).when(change(status=ending)).then(fact)


# Who


AUDITOR = Actor(issuer="i", sub="eve", kind="human", assurance="authenticated", roles=("auditor", "approver"))
OPERATOR = Actor(issuer="i", sub="olga", kind="human", assurance="authenticated", roles=("operator",))


@pytest.mark.parametrize(
    ("command", "roles"),
    [
        (OpenSession(agent_role="finance", session_id=OTHER), ["agent"]),
        (change(status="active"), ["agent"]),
        (AnnotateSession(session_id=SESSION, text="x"), ["agent"]),
        (CancelSession(session_id=SESSION), ["agent", "operator"]),
        (Record(kind="note"), ["agent"]),
    ],
)
def test_without_one_of_its_roles_a_command_is_forbidden(command: Command, roles: list[str]) -> None:
    outcome = given(OPENED).when(command, AUDITOR)
    outcome.refused("forbidden", action=type(command).__name__, needed=roles, roles=["auditor", "approver"])
    given(OPENED).when(command, Actor(issuer="i", sub="x", kind="agent", assurance="asserted")).refused("forbidden")


def test_an_operator_cancels_and_does_nothing_else() -> None:
    given(OPENED).when(CancelSession(session_id=SESSION), OPERATOR).then(SessionCancelled())
    given(OPENED).when(change(status="cancelled"), OPERATOR).refused("forbidden")


def test_expiry_is_not_for_callers() -> None:
    everyone = Actor(
        issuer="i", sub="x", kind="human", assurance="authenticated", roles=("agent", "operator", "system")
    )
    lookalike = Actor(issuer="muniment", sub="system", kind="system", assurance="authenticated")
    for who in (everyone, lookalike):
        outcome = given(OPENED).when(ExpireSession(session_id=SESSION, deadline=DEADLINE), who)
        outcome.refused("forbidden", needed=[])


# When the caller says it happened


def test_a_callers_time_is_kept_and_rules_do_not_look_at_it() -> None:
    claimed = later(DEADLINE, days=-1000)
    outcome = given(OPENED).when(change(status="active", occurred_at=claimed)).then(SessionActivated())
    assert (outcome.events[0].occurred_at, outcome.events[0].recorded_at) == (stamp(claimed), NOW)
    assert outcome.state.updated_at == NOW


@pytest.mark.parametrize("seconds", [5.000001, 60])
def test_a_callers_time_is_at_most_5_seconds_ahead(seconds: float) -> None:
    given(OPENED).when(change(status="active", occurred_at=later(NOW, seconds=5))).then(SessionActivated())
    asked = change(status="active", occurred_at=later(NOW, seconds=seconds))
    error: Any = given(OPENED).when(asked).turned_away("malformed_request")
    assert error.errors[0]["pointer"] == "/occurred_at"


def test_what_the_caller_says_of_its_command_is_in_every_event_of_it() -> None:
    said: dict[str, Any] = {"correlation_id": "order 81", "causation_id": OTHER, "external_id": "run#7"}
    outcome = given(OPENED).when(change(status="active", task_id="T", command_id="c-1", **said))
    for event in outcome.then(SessionTaskBound(task_id="T"), SessionActivated()).events:
        assert {name: getattr(event, name) for name in said} == said
        assert (event.command_id, event.session_id, event.root_session_id) == ("c-1", SESSION, SESSION)


# The record of a refusal


def test_a_refusal_is_one_event_in_a_stream_of_its_own() -> None:
    asked = change(status="completed", reason="now", refs=(), command_id="c-1")
    outcome = given(OPENED).when(asked)
    (event,) = outcome.events
    outcome.refused("invalid_transition")
    data: Any = event.data
    assert (event.stream_type, event.stream_version, event.type) == ("refusal", 1, "CommandRefused")
    assert event.stream_id not in (SESSION, outcome.target)
    assert (data.command_type, data.target, data.status) == ("ChangeSession", SESSION, 422)
    assert data.attempted == {"session_id": str(SESSION), "status": "completed", "reason": "now"}
    assert (event.session_id, event.root_session_id) == (SESSION, SESSION), "it is found with its session"
    again = given(OPENED).when(change(status="completed", command_id="c-1")).events[0]
    other = given(OPENED).when(change(status="completed", command_id="c-2")).events[0]
    assert again.stream_id == event.stream_id != other.stream_id
