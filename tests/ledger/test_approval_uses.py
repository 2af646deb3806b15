"""What is approved is run as it was approved, no more often, in its time; and what came of it is said or unknown."""

from typing import Any

import pytest
from uuid_utils.compat import uuid7

from ledger import approval as rules
from ledger.commands import RevokeApproval
from ledger.events import (
    ApprovalLapsed,
    ApprovalOutcomeUnknown,
    ApprovalRevoked,
    ApprovalUseBegun,
    ApprovalUseCompleted,
    Fact,
    OutcomeReconciled,
)
from ledger.system import MissOutcome
from ledger.values import SYSTEM, Action, stamp
from tests.ledger.approvals import (
    ANA,
    APPROVAL,
    APPROVED,
    APPROVED_UNTIL,
    ASKED,
    BEGUN,
    EXECUTION,
    LAPSED,
    NEXT,
    OPERATOR,
    OUTCOME_BY,
    STRANGER,
    UNKNOWN,
    USED,
    approval,
    asked,
    before,
    begin,
    begun,
    history_of,
    person,
    principal,
    tell,
)
from tests.ledger.given import AGENT, NOW, By, Given, later

FEW = asked(uses=3)


def granted(*facts: Fact | By, question: Any = FEW, now: str = NOW) -> Given:
    """An approval for three uses, and what came of it since."""
    return approval(question, *APPROVED, *facts, now=now)


# Beginning


def test_a_use_begins_with_what_was_approved() -> None:
    outcome = history_of("approved").when(begin(audience="payments"))
    state = outcome.then(ApprovalUseBegun(execution_id=EXECUTION, outcome_by=OUTCOME_BY, audience="payments")).state
    (execution,) = state.executions
    assert (state.state, state.uses_left, state.execution) == ("executing", 0, execution)
    assert (execution.execution_id, execution.audience, execution.begun_at) == (EXECUTION, "payments", NOW)
    assert (execution.outcome_by, execution.outcome) == (OUTCOME_BY, None)


ALTERED = [
    Action(tool="refund", arguments={"invoice": 9, "amount": "12.51"}),
    Action(tool="refund", arguments={"invoice": 9, "amount": "12.50 "}),
    Action(tool="refund", arguments={"invoice": 9, "amount": 12.5}),
    Action(tool="refund", arguments={"invoice": "9", "amount": "12.50"}),
    Action(tool="refund", arguments={"invoice": 9}),
    Action(tool="refund", arguments={"invoice": 9, "amount": "12.50", "to": None}),
    Action(tool="refund"),
    Action(tool="Refund", arguments={"invoice": 9, "amount": "12.50"}),
    Action(tool="r\N{CYRILLIC SMALL LETTER IE}fund", arguments={"invoice": 9, "amount": "12.50"}),
    Action(tool="refund", arguments={"invoice": 9, "amount": "12.50"}, operation="full"),
    Action(tool="refund", arguments={"invoice": 9, "amount": "12.50"}, target="live"),
]


@pytest.mark.parametrize("action", ALTERED)
def test_anything_else_is_refused_and_the_digest_of_it_is_not_told(action: Action) -> None:
    refused = history_of("approved").when(begin(action=action))
    refused.refused("digest_mismatch", what="action_digest", expected=ASKED.action_digest, sent="another action")


@pytest.mark.parametrize(
    "arguments",
    [
        {"amount": "12.50", "invoice": 9},
        {"invoice": 9.0, "amount": "12.50"},
        {"invoice": 9, "amount": {"$personal": {"subject": "mia", "value": "12.50"}}},
        {"$personal": {"subject": "mia", "value": {"invoice": 9, "amount": "12.50"}}},
    ],
)
def test_the_same_written_otherwise_is_the_same(arguments: Any) -> None:
    outcome = history_of("approved").when(begin(action=Action(tool="refund", arguments=arguments)))
    assert outcome.then(BEGUN).state.state == "executing"


def test_only_the_requester_begins_a_use_and_says_what_came_of_it() -> None:
    namesake = person("agent-7", "agent", kind="agent", issuer="https://other.example")
    behind = person("agent-9", "agent", kind="agent", on_behalf_of=(principal(AGENT),))
    for who in (STRANGER, namesake, behind, person("ana", "agent", "approver")):
        history_of("approved").when(begin(), who).refused("forbidden", action="BeginUse")
        history_of("executing").when(tell(), who).refused("forbidden", action="RecordOutcome")
    for who in (ANA, OPERATOR):
        history_of("approved").when(begin(), who).refused("forbidden", needed=["agent"])


def test_to_begin_the_same_use_again_changes_nothing_while_it_runs() -> None:
    history = history_of("executing")
    assert history.when(begin()).then().state == history.streams[APPROVAL]
    history.when(begin(action=ALTERED[0])).refused("digest_mismatch")
    history.when(begin(NEXT)).refused("execution_started", id=APPROVAL, execution_id=EXECUTION)
    history.when(begin(NEXT, action=ALTERED[0])).refused("execution_started")


def test_an_execution_that_is_over_does_not_begin_again() -> None:
    for outcome in (USED, UNKNOWN):
        granted(BEGUN, outcome).when(begin()).refused("already_exists", what="execution", id=EXECUTION)
    history_of("executed").when(begin()).refused("already_exists", what="execution", id=EXECUTION)


# Several uses


def test_it_is_used_as_often_as_was_approved_and_no_more() -> None:
    history = granted()
    for number, left in enumerate((2, 1, 0)):
        execution_id = uuid7()
        outcome = history.when(begin(execution_id))
        state = outcome.then(begun(execution_id)).state
        assert (state.state, state.uses_left, len(state.executions)) == ("executing", left, number + 1)
        history = outcome.taken()
        history.when(begin()).refused("execution_started", execution_id=execution_id)
        outcome = history.when(tell("failed" if number else "ok", execution_id))
        assert outcome.state.state == ("approved" if left else "executed")
        history = outcome.taken()
    history.when(begin()).refused("uses_exhausted", id=APPROVAL, uses=3)
    assert [e.outcome for e in history.streams[APPROVAL].executions] == ["ok", "failed", "failed"]


def test_each_use_has_its_own_time() -> None:
    at = stamp(later(NOW, seconds=400))
    outcome = granted(BEGUN, USED, now=at).when(begin(NEXT))
    outcome.then(begun(NEXT, stamp(later(at, seconds=300))))


def test_it_is_a_grant_among_what_is_open_until_its_last_use_has_begun() -> None:
    history = granted(BEGUN, USED, begun(NEXT))
    assert history.open_items(history.streams[APPROVAL].root)[APPROVAL].item_type == "grant"
    once = history_of("approved")
    assert once.when(begin()).batch.append.closed == {APPROVAL}


def test_between_two_uses_it_may_be_revoked() -> None:
    history = granted(BEGUN, USED)
    revoke = RevokeApproval(approval_id=APPROVAL)
    revoked = history.when(revoke, OPERATOR)
    revoked.then(ApprovalRevoked())
    revoked.taken().when(begin(NEXT)).refused("invalid_transition", current_state="revoked", allowed=())
    granted(BEGUN, USED, begun(NEXT)).when(revoke, OPERATOR).refused("execution_started", execution_id=NEXT)


# Its time


def test_a_use_begins_until_the_last_instant_and_not_at_the_end() -> None:
    now = before(APPROVED_UNTIL)
    assert history_of("approved", now=now).when(begin()).state.state == "executing"
    outcome = history_of("approved", now=APPROVED_UNTIL).when(begin())
    outcome.refused("approval_expired", LAPSED, id=APPROVAL, deadline=APPROVED_UNTIL)
    assert outcome.batch.stream(APPROVAL).state == "lapsed"
    assert outcome.batch.append.closed == {APPROVAL}


def test_what_is_being_run_at_the_end_of_its_time_is_run_to_its_end() -> None:
    long = asked(outcome_within_seconds=3600, uses=3)
    running = granted(begun(EXECUTION, stamp(later(NOW, hours=1))), question=long, now=APPROVED_UNTIL)
    assert rules.due(running.streams[APPROVAL], APPROVED_UNTIL) is None
    running.when(RevokeApproval(approval_id=APPROVAL), ANA).refused("execution_started")
    outcome = running.when(tell())
    state = outcome.then(USED).state
    assert (state.state, state.uses_left) == ("executed", 2), "its time is over, whatever uses are left"
    outcome.taken().when(begin(NEXT)).refused("approval_expired", deadline=APPROVED_UNTIL)


def test_a_grant_that_was_used_and_not_used_up_lapses() -> None:
    outcome = granted(BEGUN, USED, now=APPROVED_UNTIL).when(begin(NEXT))
    outcome.refused("approval_expired", ApprovalLapsed(approved_until=APPROVED_UNTIL))


# Outcomes


@pytest.mark.parametrize("outcome", ["ok", "failed"])
def test_what_came_of_it_is_said_once(outcome: Any) -> None:
    other = {"ok": "failed", "failed": "ok"}[outcome]
    said = history_of("executing").when(tell(outcome, result={"id": "r-1"}))
    completed = ApprovalUseCompleted(execution_id=EXECUTION, outcome=outcome, result={"id": "r-1"})
    state = said.then(completed).state
    assert (state.state, state.executions[0].outcome, state.execution) == ("executed", outcome, None)
    after = said.taken()
    assert after.when(tell(outcome)).then().state.state == "executed"
    after.when(tell(other)).refused("invalid_transition", command="RecordOutcome", current_state="executed")


def test_an_outcome_of_an_execution_that_never_began_is_not_found() -> None:
    for state in ("approved", "executing", "executed"):
        history_of(state).when(tell("ok", NEXT)).turned_away("not_found", what="execution", id=NEXT)


def test_an_outcome_in_the_last_instant_is_in_time_and_one_at_the_deadline_is_late() -> None:
    in_time = history_of("executing", now=before(OUTCOME_BY)).when(tell())
    in_time.then(USED)
    outcome = history_of("executing", now=OUTCOME_BY).when(tell("failed", result="no funds"))
    reconciled = OutcomeReconciled(execution_id=EXECUTION, outcome="failed", result="no funds")
    state = outcome.then(UNKNOWN, reconciled).state
    assert (state.state, state.executions[0].outcome) == ("executed", "failed")
    assert [event.actor for event in outcome.events] == [SYSTEM, AGENT]


def test_nothing_said_by_the_deadline_is_unknown_and_no_failure() -> None:
    miss: Any = MissOutcome(approval_id=APPROVAL, deadline=OUTCOME_BY)
    miss.command_id = miss.due_id
    state = history_of("executing", now=OUTCOME_BY).when(miss, SYSTEM).then(UNKNOWN).state
    assert (state.state, state.executions[0].outcome) == ("executed", "unknown")


def test_what_is_said_too_late_is_reconciled_once_and_changes_no_state() -> None:
    history = approval(*APPROVED, BEGUN, UNKNOWN, now=stamp(later(NOW, days=30)))
    reconciled = history.when(tell("ok", result=1))
    state = reconciled.then(OutcomeReconciled(execution_id=EXECUTION, outcome="ok", result=1)).state
    assert (state.state, state.executions[0].outcome) == ("executed", "ok")
    after = reconciled.taken()
    after.when(tell("ok")).then()
    after.when(tell("failed")).refused("invalid_transition")


def test_after_an_unknown_outcome_the_next_use_may_begin_and_the_first_be_reconciled_beside_it() -> None:
    outcome = granted(BEGUN, now=OUTCOME_BY).when(begin(NEXT))
    second = begun(NEXT, stamp(later(OUTCOME_BY, seconds=300)))
    assert outcome.then(UNKNOWN, second).state.uses_left == 1
    after = outcome.taken()
    reconciled = after.when(tell("ok"))
    state = reconciled.then(OutcomeReconciled(execution_id=EXECUTION, outcome="ok")).state
    assert (state.state, state.execution.execution_id) == ("executing", NEXT)
    assert [e.outcome for e in state.executions] == ["ok", None]


def test_an_unknown_outcome_after_the_time_of_the_grant_ends_it() -> None:
    late = stamp(later(NOW, seconds=1000))
    history = granted(begun(EXECUTION, late), now=late)
    unknown = ApprovalOutcomeUnknown(execution_id=EXECUTION, deadline=late)
    history.when(begin(NEXT)).refused("approval_expired", unknown, deadline=APPROVED_UNTIL)


def test_what_came_of_it_is_still_said_after_a_revocation() -> None:
    history = granted(BEGUN, UNKNOWN, ApprovalRevoked())
    state = history.when(tell("ok")).then(OutcomeReconciled(execution_id=EXECUTION, outcome="ok")).state
    assert state.state == "revoked"
