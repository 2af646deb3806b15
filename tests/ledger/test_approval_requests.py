"""What is asked: where a question belongs, when two are the same, and what stands instead of one."""

from typing import Any
from uuid import UUID, uuid5

import pytest
from msgspec import UNSET
from uuid_utils.compat import uuid7

from ledger import approval as rules
from ledger.commands import (
    EditApproval,
    RequestApproval,
)
from ledger.events import (
    ApprovalSuperseded,
    Fact,
    FactRecorded,
    SessionActivated,
    SessionCompleted,
    SessionExpired,
    SessionOpened,
    TaskCancelled,
    TaskSubmitted,
    VoteCast,
)
from ledger.queue import OPEN_ITEMS_MAX
from ledger.store import OpenItem
from ledger.values import Action, Quorum, stamp
from tests.ledger.approvals import (
    ACTION,
    ANA,
    ANOTHER,
    APPROVAL,
    APPROVED,
    APPROVED_UNTIL,
    ASKED,
    BEN,
    EXPIRED,
    EXPIRES_AT,
    OPERATOR,
    STATES,
    STRANGER,
    TASK,
    approval,
    ask,
    asked,
    before,
    begin,
    begun,
    person,
    principal,
    used,
    vote,
    voted,
)
from tests.ledger.given import AGENT, DEADLINE, NOW, OPENED, SESSION, By, Given, Outcome, given, later, on

OUTSIDE = uuid5(rules.OUTSIDE, AGENT.principal)
CHANGED = Action(tool="refund", arguments={"invoice": 9, "amount": "10.00"})


def test_a_question_is_as_it_was_asked() -> None:
    until = later(NOW, hours=2)
    quorum = Quorum(approve=2, deny=2, roles=("finance", "legal"))
    outcome = given().when(
        ask(
            call_key="refund-9",
            summary="Refund 12.50 to Mia",
            reason="she returned it",
            risk="high",
            quorum=quorum,
            expires_at=until,
            valid_for_seconds=60,
            uses=3,
            outcome_within_seconds=30,
            external_id="run#9",
        )
    )
    state = outcome.state
    assert (state.approval_id, state.state, state.version) == (APPROVAL, "pending", 1)
    assert (state.action, state.summary) == (
        {"tool": "refund", "arguments": {"invoice": 9, "amount": "12.50"}},
        "Refund 12.50 to Mia",
    )
    assert (state.reason, state.risk, state.quorum, state.call_key) == ("she returned it", "high", quorum, "refund-9")
    assert (state.requester, state.on_behalf_of, state.external_id) == (principal(AGENT), (), "run#9")
    assert (state.uses, state.uses_left, state.valid_for_seconds, state.outcome_within_seconds) == (3, 3, 60, 30)
    assert (state.requested_at, state.updated_at, state.expires_at) == (NOW, NOW, stamp(until))
    assert (state.votes, state.executions, state.decided_at, state.approved_until) == ((), (), None, None)


def test_a_question_has_defaults_and_an_id_of_version_7() -> None:
    outcome = given().when(RequestApproval(action=ACTION))
    state = outcome.state
    assert outcome.target.version == 7
    assert state.approval_id == outcome.target
    assert (state.risk, state.quorum) == ("medium", Quorum(approve=1, deny=1, roles=("approver",)))
    assert (state.expires_at, state.uses) == (EXPIRES_AT, 1)
    assert (state.valid_for_seconds, state.outcome_within_seconds) == (900, 300)


@pytest.mark.parametrize("seconds", [0, -1e-6, -3600])
def test_a_question_cannot_be_asked_with_its_time_run_out(seconds: float) -> None:
    error: Any = given().when(ask(expires_at=later(NOW, seconds=seconds))).turned_away("malformed_request")
    assert [told["pointer"] for told in error.errors] == ["/expires_at"]


def test_only_an_agent_asks() -> None:
    for who in (ANA, OPERATOR):
        given().when(ask(), who).refused("forbidden", needed=["agent", "importer"])


def test_what_is_asked_outside_of_any_session_is_open_under_its_requester() -> None:
    outcome = given().when(ask())
    assert outcome.batch.append.opened == {APPROVAL: OpenItem(APPROVAL, "approval", None, OUTSIDE)}
    (event,) = outcome.events
    assert (event.session_id, event.root_session_id, event.correlation_id) == (None, None, "asked")
    assert outcome.state.root == OUTSIDE


def test_a_question_belongs_to_its_session_and_is_open_under_the_root_above_it() -> None:
    child = uuid7()
    below = on(child, SessionOpened(agent_role="sub", expires_at=DEADLINE, parent_session_id=SESSION))
    outcome = given(OPENED, below).when(ask(session_id=child))
    (event,) = outcome.events
    assert (event.session_id, event.root_session_id, event.correlation_id) == (child, SESSION, str(SESSION))
    assert outcome.batch.append.opened == {APPROVAL: OpenItem(APPROVAL, "approval", child, SESSION)}


def submitted(*history: Any) -> Any:
    return given(*history, on(TASK, TaskSubmitted(kind="mail.send", run_at=NOW)))


def test_what_is_asked_for_a_task_belongs_to_the_session_of_the_task() -> None:
    outcome = submitted(OPENED).when(ask(task_id=TASK))
    assert (outcome.state.session_id, outcome.state.root_session_id, outcome.state.root) == (SESSION, SESSION, SESSION)
    assert outcome.batch.append.opened == {APPROVAL: OpenItem(APPROVAL, "approval", SESSION, SESSION, TASK)}
    alone = submitted().when(ask(task_id=TASK))
    assert alone.batch.append.opened == {APPROVAL: OpenItem(APPROVAL, "approval", None, TASK, TASK)}


def test_what_a_worker_asks_in_a_session_of_its_own_is_open_there() -> None:
    own = uuid7()
    history = submitted(OPENED, on(own, SessionOpened(agent_role="worker", expires_at=DEADLINE)))
    outcome = history.when(ask(task_id=TASK, session_id=own))
    assert outcome.batch.append.opened == {APPROVAL: OpenItem(APPROVAL, "approval", own, own, TASK)}
    assert outcome.events[0].root_session_id == outcome.state.root == own


@pytest.mark.parametrize("missing", [{"session_id": SESSION}, {"task_id": TASK}])
def test_a_question_of_a_session_or_task_that_is_not_there_is_not_found(missing: dict[str, UUID]) -> None:
    given().when(ask(**missing)).turned_away("not_found")
    record = given(*(on(i, FactRecorded(kind="x")) for i in missing.values()))
    record.when(ask(**missing)).turned_away("not_found")


def test_nothing_is_asked_any_more_in_a_session_or_for_a_task_that_has_ended() -> None:
    over = given(OPENED, SessionActivated(), SessionCompleted())
    over.when(ask(session_id=SESSION)).refused("invalid_transition", id=SESSION, current_state="completed", allowed=())
    expired = given(OPENED, now=DEADLINE).when(ask(session_id=SESSION))
    expired.refused("invalid_transition", on(SESSION, SessionExpired(deadline=DEADLINE)), current_state="expired")
    ended = given(on(TASK, TaskSubmitted(kind="mail.send", run_at=NOW), TaskCancelled()))
    ended.when(ask(task_id=TASK)).refused("invalid_transition", id=TASK, current_state="cancelled", allowed=())


def test_a_session_has_a_bound_on_its_open_questions() -> None:
    history = given(OPENED)
    history.items[SESSION] = {i: OpenItem(i, "approval", SESSION, SESSION) for i in (uuid7() for _ in range(1000))}
    assert OPEN_ITEMS_MAX == 1000
    history.when(ask(session_id=SESSION)).refused("session_full", id=SESSION, limit=1000)
    history.items[SESSION].popitem()
    assert history.when(ask(session_id=SESSION)).state.state == "pending"


# The same question


KEYED = asked(call_key="refund-9")
KEYED_IN_SESSION = asked(OPENED, session_id=SESSION, call_key="refund-9")
AGAIN: dict[str, Any] = {"approval_id": ANOTHER, "call_key": "refund-9"}


def answered_with(outcome: Outcome, approval_id: UUID, state: str) -> None:
    """Nothing was asked: the answer is the approval that is there, as it is now."""
    outcome.then()
    receipt: Any = outcome.verdict
    assert (receipt.status, receipt.target, receipt.event_count) == (200, approval_id, 0)
    assert (receipt.state.approval_id, receipt.state.state) == (approval_id, state)
    (row,) = outcome.batch.append.commands
    assert (row.target, row.status) == (approval_id, 200), "so it is answered again, too"


def asked_anew(outcome: Outcome) -> None:
    receipt: Any = outcome.verdict
    assert (receipt.status, receipt.target) == (201, ANOTHER)
    assert outcome.events[-1].type == "ApprovalRequested"


def with_uses(*facts: Fact | By) -> tuple[Fact | By, ...]:
    return (asked(call_key="refund-9", uses=2), *APPROVED, *facts)


FIRST, SECOND = uuid7(), uuid7()


@pytest.mark.parametrize(
    ("history", "state"),
    [
        ((KEYED,), "pending"),
        ((KEYED, voted(ANA, "deny")), "pending"),
        ((KEYED, *APPROVED), "approved"),
        (with_uses(begun(FIRST), used(FIRST)), "approved"),
    ],
)
def test_the_same_question_is_answered_with_the_one_that_is_open(history: tuple[Fact | By, ...], state: str) -> None:
    answered_with(approval(*history).when(ask(**AGAIN)), APPROVAL, state)
    answered_with(approval(*history).when(ask(**AGAIN | {"approval_id": UNSET})), APPROVAL, state)
    answered_with(approval(*history).when(ask(**AGAIN | {"approval_id": APPROVAL})), APPROVAL, state)


@pytest.mark.parametrize(
    "history",
    [
        *((KEYED, *STATES[state][1:]) for state in STATES if state not in ("pending", "approved")),
        with_uses(begun(FIRST)),
        with_uses(begun(FIRST), used(FIRST), begun(SECOND), used(SECOND)),
    ],
)
def test_what_is_decided_or_used_up_or_being_run_answers_no_other_question(history: tuple[Fact | By, ...]) -> None:
    asked_anew(approval(*history).when(ask(**AGAIN)))


def test_the_rest_of_the_question_does_not_make_it_another_one() -> None:
    told: dict[str, Any] = {"summary": "other words", "risk": "critical", "uses": 7, "expires_at": later(NOW, days=9)}
    answered_with(approval(KEYED).when(ask(**AGAIN | told)), APPROVAL, "pending")


@pytest.mark.parametrize(
    "other",
    [
        {"call_key": "refund-10"},
        {"call_key": "Refund-9"},
        {"call_key": None},
        {"session_id": SESSION},
        {"action": Action(tool="refund", arguments={"invoice": 9, "amount": "12.5"})},
        {"action": Action(tool="refund", arguments={"invoice": "9", "amount": "12.50"})},
        {"action": Action(tool="refund", arguments={"invoice": 9, "amount": "12.50"}, target="live")},
        {"action": Action(tool="r\u0435fund", arguments={"invoice": 9, "amount": "12.50"})},
    ],
)
def test_another_session_key_or_action_is_another_question(other: dict[str, Any]) -> None:
    history = given(OPENED, on(APPROVAL, KEYED))
    history.streams[APPROVAL] = approval(KEYED).streams[APPROVAL]  # asked outside of the session that there is
    asked_anew(history.when(ask(**AGAIN | other)))


def test_a_question_without_a_key_is_the_same_as_no_other() -> None:
    asked_anew(approval(ASKED).when(ask(approval_id=ANOTHER)))
    assert ASKED.match is None


@pytest.mark.parametrize(
    "same",
    [
        {"invoice": 9.0, "amount": "12.50"},
        {"amount": "12.50", "invoice": 9},
        {"invoice": 9, "amount": {"$personal": {"subject": "mia", "value": "12.50"}}},
    ],
)
def test_the_same_action_written_otherwise_is_the_same_question(same: dict[str, Any]) -> None:
    answered_with(approval(KEYED).when(ask(**AGAIN, action=Action(tool="refund", arguments=same))), APPROVAL, "pending")


def test_within_a_session_its_own_questions_are_known_again() -> None:
    history = given(OPENED, on(APPROVAL, KEYED_IN_SESSION))
    answered_with(history.when(ask(**AGAIN, session_id=SESSION)), APPROVAL, "pending")
    asked_anew(history.when(ask(**AGAIN)))


def test_who_asks_for_others_asks_another_question() -> None:
    """Whoever may not vote on the one could vote on the other."""
    for_ana = person("agent-7", "agent", kind="agent", on_behalf_of=(principal(ANA),))
    history = given(OPENED, on(APPROVAL, KEYED_IN_SESSION))
    asked_anew(history.when(ask(**AGAIN, session_id=SESSION), STRANGER))
    asked_anew(history.when(ask(**AGAIN, session_id=SESSION), for_ana))


def test_of_two_that_are_alike_the_answer_is_ones_own() -> None:
    theirs = asked(OPENED, who=STRANGER, session_id=SESSION, call_key="refund-9")
    history = given(OPENED, on(uuid7(), theirs), on(APPROVAL, KEYED_IN_SESSION))
    answered_with(history.when(ask(**AGAIN, session_id=SESSION)), APPROVAL, "pending")


@pytest.mark.parametrize(("facts", "deadline"), [((KEYED,), EXPIRES_AT), ((KEYED, *APPROVED), APPROVED_UNTIL)])
def test_the_same_question_is_asked_anew_from_the_instant_its_time_has_run_out(
    facts: tuple[Fact | By, ...], deadline: str
) -> None:
    state = "approved" if len(facts) > 1 else "pending"
    answered_with(approval(*facts, now=before(deadline)).when(ask(**AGAIN)), APPROVAL, state)
    asked_anew(approval(*facts, now=deadline).when(ask(**AGAIN)))


def test_a_session_that_is_full_still_answers_the_same_question() -> None:
    history = given(OPENED, on(APPROVAL, KEYED_IN_SESSION))
    more = (uuid7() for _ in range(OPEN_ITEMS_MAX))
    history.items[SESSION] |= {i: OpenItem(i, "approval", SESSION, SESSION) for i in more}
    answered_with(history.when(ask(**AGAIN, session_id=SESSION)), APPROVAL, "pending")


# Another question instead


def edit(**fields: Any) -> EditApproval:
    asked: dict[str, Any] = {"approval_id": APPROVAL, "action": CHANGED, "new_approval_id": ANOTHER}
    return EditApproval(**asked | fields)


def edited(history: Given, **fields: Any) -> tuple[Given, Any]:
    """The ledger after Ana's edit, and the question that stands there instead."""
    after = history.when(edit(**fields), ANA).taken()
    return after, after.streams[ANOTHER]


def test_an_edit_supersedes_a_question_by_a_new_one_of_the_same_requester() -> None:
    fields: dict[str, Any] = {"risk": "high", "quorum": Quorum(roles=("approver", "legal")), "uses": 4}
    terms: dict[str, Any] = {"valid_for_seconds": 60, "outcome_within_seconds": 5, "expires_at": later(NOW, hours=1)}
    history = approval(asked(call_key="k", summary="old words", reason="old", **fields, **terms))
    outcome = history.when(edit(summary="ten is enough", reason="policy"), ANA)
    superseded, requested = outcome.events
    assert (superseded.stream_id, superseded.data) == (APPROVAL, ApprovalSuperseded(by=ANOTHER))
    assert (requested.stream_id, requested.stream_version, requested.actor) == (ANOTHER, 1, ANA)
    assert (outcome.state.state, outcome.state.superseded_by, outcome.state.decided_at) == ("superseded", ANOTHER, NOW)
    before_it = history.streams[APPROVAL]
    new = outcome.taken().streams[ANOTHER]
    assert (new.state, new.supersedes, new.edited_by, new.votes) == ("pending", APPROVAL, principal(ANA), ())
    assert (new.requester, new.on_behalf_of) == (principal(AGENT), ())
    assert new.action["arguments"] == {"invoice": 9, "amount": "10.00"}
    assert (new.summary, new.reason) == ("ten is enough", "policy")
    same = ("risk", "quorum", "uses", "valid_for_seconds", "outcome_within_seconds", "expires_at", "call_key", "root")
    assert {name: getattr(new, name) for name in same} == {name: getattr(before_it, name) for name in same}
    assert new.action_digest != before_it.action_digest
    assert new.request_digest != before_it.request_digest


def test_an_edit_without_an_id_for_the_new_question_gets_one_of_version_7() -> None:
    superseded, requested = approval().when(edit(new_approval_id=UNSET), ANA).events
    assert superseded.data.by == requested.stream_id
    assert requested.stream_id.version == 7


@pytest.mark.parametrize("taken", [APPROVAL, SESSION])
def test_the_id_of_the_new_question_must_be_free(taken: UUID) -> None:
    history = given(OPENED, on(APPROVAL, ASKED))
    history.when(edit(new_approval_id=taken), ANA).refused("already_exists", what="approval", id=taken)


def test_an_edit_may_be_edited_again_and_keeps_who_asked() -> None:
    for_ben = person("agent-7", "agent", kind="agent", on_behalf_of=(principal(BEN),))
    history, _ = edited(approval(asked(who=for_ben)))
    third = uuid7()
    again = EditApproval(approval_id=ANOTHER, action=ACTION, new_approval_id=third)
    new = history.when(again, OPERATOR_AND_APPROVER).taken().streams[third]
    assert (new.requester, new.on_behalf_of) == (principal(AGENT), (principal(BEN),))
    assert (new.supersedes, new.edited_by) == (ANOTHER, principal(OPERATOR_AND_APPROVER))
    vote_of_ben = vote(approval_id=third, digest_seen=new.request_digest)
    history.when(vote_of_ben, BEN).refused("self_approval_forbidden")


OPERATOR_AND_APPROVER = person("olga", "operator", "approver")


def test_what_was_said_of_the_old_action_is_not_said_of_the_new_one() -> None:
    history, new = edited(approval(asked(quorum=Quorum(approve=2)), voted(BEN)))
    assert new.votes == ()
    history.when(vote(approval_id=ANOTHER), BEN).refused("digest_mismatch", what="request_digest")
    fresh = vote(approval_id=ANOTHER, digest_seen=new.request_digest)
    history.when(fresh, BEN).then(on(ANOTHER, VoteCast(verdict="approve", digest_seen=new.request_digest)))


@pytest.mark.parametrize("verdict", ["approve", "deny"])
def test_whoever_edited_it_votes_only_where_one_approval_is_enough(verdict: Any) -> None:
    history, new = edited(approval())
    state = history.when(vote(verdict, approval_id=ANOTHER, digest_seen=new.request_digest), ANA).state
    assert state.state == {"approve": "approved", "deny": "denied"}[verdict]
    history, new = edited(approval(asked(quorum=Quorum(approve=2))))
    of_the_editor = vote(verdict, approval_id=ANOTHER, digest_seen=new.request_digest)
    history.when(of_the_editor, ANA).refused("not_eligible", id=ANOTHER)
    delegate = person("dan", on_behalf_of=(principal(ANA),))
    history.when(vote(approval_id=ANOTHER, digest_seen=new.request_digest), delegate).refused("not_eligible")


def test_what_runs_is_what_was_edited() -> None:
    history, new = edited(approval())
    history = history.when(vote(approval_id=ANOTHER, digest_seen=new.request_digest), ANA).taken()
    history.when(begin(approval_id=ANOTHER)).refused("digest_mismatch", what="action_digest")
    assert history.when(begin(approval_id=ANOTHER, action=CHANGED)).state.state == "executing"


def test_an_edited_question_stays_open_where_the_first_one_was() -> None:
    for history in (approval(KEYED), given(OPENED, on(APPROVAL, KEYED_IN_SESSION))):
        first = history.streams[APPROVAL]
        outcome = history.when(edit(), ANA)
        new = outcome.taken().streams[ANOTHER]
        assert (new.session_id, new.root_session_id, new.root) == (first.session_id, first.root_session_id, first.root)
        opened = OpenItem(ANOTHER, "approval", first.session_id, first.root, None, new.match)
        assert (outcome.batch.append.opened, outcome.batch.append.closed) == ({ANOTHER: opened}, {APPROVAL})
        assert {event.root_session_id for event in outcome.events} == {first.root_session_id}


def test_after_an_edit_the_changed_action_is_the_question_that_is_open() -> None:
    history, _ = edited(approval(KEYED))
    again: dict[str, Any] = AGAIN | {"approval_id": uuid7()}
    answered_with(history.when(ask(**again, action=CHANGED)), ANOTHER, "pending")
    assert history.when(ask(**again)).events[-1].type == "ApprovalRequested"


def test_an_edit_comes_too_late_from_the_instant_the_time_has_run_out() -> None:
    assert approval(now=before(EXPIRES_AT)).when(edit(), ANA).state.state == "superseded"
    approval(now=EXPIRES_AT).when(edit(), ANA).refused("invalid_transition", EXPIRED, current_state="expired")


def test_only_an_approver_edits() -> None:
    for who in (AGENT, OPERATOR):
        approval().when(edit(), who).refused("forbidden", needed=["approver"])
