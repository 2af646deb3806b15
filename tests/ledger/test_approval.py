"""The rules of an approval: every command in every state, and what time does to each state."""

from typing import Any, get_args
from uuid import uuid5

import pytest

from ledger import approval as rules
from ledger.approval_state import State
from ledger.commands import (
    CancelApproval,
    Command,
    EditApproval,
    PresentApproval,
    RevokeApproval,
    WithdrawApproval,
    WithdrawVote,
)
from ledger.events import (
    ApprovalCancelled,
    ApprovalGranted,
    ApprovalPresented,
    ApprovalRevoked,
    ApprovalWithdrawn,
    FactRecorded,
    VoteCast,
)
from ledger.system import EndApproval, ExpireApproval, LapseApproval, MissOutcome
from ledger.values import SYSTEM, Action, Actor
from tests.ledger.approvals import (
    ANA,
    ANOTHER,
    APPROVAL,
    APPROVED_UNTIL,
    ASKED,
    BEN,
    EVE,
    EXECUTION,
    EXPIRED,
    EXPIRES_AT,
    LAPSED,
    NEXT,
    OPERATOR,
    OUTCOME_BY,
    STATES,
    STRANGER,
    UNKNOWN,
    USED,
    ask,
    before,
    begin,
    history_of,
    principal,
    tell,
    vote,
)
from tests.ledger.given import AGENT, NOW, Outcome, by_its_id, given, on

ALLOWED: dict[str, tuple[str, ...]] = {
    "pending": ("approved", "denied", "withdrawn", "cancelled", "superseded"),
    "approved": ("executing", "revoked"),
    "executing": ("executed",),
}
in_every_state = pytest.mark.parametrize("state", STATES)
CHANGED = Action(tool="refund", arguments={"invoice": 9, "amount": "10.00"})
OUTSIDE = uuid5(rules.OUTSIDE, AGENT.principal)


def edit(**fields: Any) -> EditApproval:
    asked: dict[str, Any] = {"approval_id": APPROVAL, "action": CHANGED, "new_approval_id": ANOTHER}
    return EditApproval(**asked | fields)


def impossible(outcome: Outcome, state: str) -> None:
    allowed = ALLOWED.get(state, ())
    outcome.refused("invalid_transition", id=APPROVAL, current_state=state, allowed=allowed)


# Every command in every state


@in_every_state
def test_the_history_of_each_state_leads_to_it(state: str) -> None:
    held = history_of(state).streams[APPROVAL]
    assert held.state == state
    assert set(get_args(State)) == set(STATES)
    assert (held.execution is not None) == (state == "executing")
    assert (held.decided_at is None) == (state == "pending")


@in_every_state
def test_an_id_is_asked_under_once(state: str) -> None:
    history_of(state).when(ask()).refused("already_exists", what="approval", id=APPROVAL)


@in_every_state
def test_who_was_shown_it_is_recorded_while_it_is_to_be_decided(state: str) -> None:
    outcome = history_of(state).when(PresentApproval(approval_id=APPROVAL, channel="chat"), ANA)
    if state == "pending":
        assert outcome.then(ApprovalPresented(channel="chat")).state.state == "pending"
        assert outcome.events[0].actor == ANA
    else:
        impossible(outcome, state)


@in_every_state
def test_a_vote_counts_only_while_it_is_to_be_decided(state: str) -> None:
    outcome = history_of(state).when(vote(), BEN)
    if state == "pending":
        cast = VoteCast(verdict="approve", digest_seen=ASKED.request_digest)
        assert outcome.then(cast, ApprovalGranted(approved_until=APPROVED_UNTIL)).state.state == "approved"
    elif state == "expired":
        outcome.refused("approval_expired", id=APPROVAL, deadline=EXPIRES_AT)
    else:
        impossible(outcome, state)


@in_every_state
def test_a_vote_is_taken_back_only_while_it_is_to_be_decided(state: str) -> None:
    history_of(state).when(WithdrawVote(approval_id=APPROVAL), BEN).then()
    outcome = history_of(state).when(WithdrawVote(approval_id=APPROVAL), ANA)
    if any(vote.voter == principal(ANA) for vote in history_of(state).streams[APPROVAL].votes):
        impossible(outcome, state)
    else:
        outcome.then()


@in_every_state
def test_another_question_stands_instead_of_it_only_while_it_is_to_be_decided(state: str) -> None:
    outcome = history_of(state).when(edit(), ANA)
    if state == "pending":
        assert outcome.state.state == "superseded"
    else:
        impossible(outcome, state)


@in_every_state
def test_the_one_who_asked_takes_it_back_only_while_it_is_to_be_decided(state: str) -> None:
    withdraw = WithdrawApproval(approval_id=APPROVAL, reason="no need")
    outcome = history_of(state).when(withdraw)
    if state == "pending":
        assert outcome.then(ApprovalWithdrawn(reason="no need")).state.state == "withdrawn"
    else:
        impossible(outcome, state)
    history_of(state).when(withdraw, STRANGER).refused("forbidden", action="WithdrawApproval")


@in_every_state
def test_an_operator_cancels_it_only_while_it_is_to_be_decided(state: str) -> None:
    cancel = CancelApproval(approval_id=APPROVAL, reason="freeze")
    outcome = history_of(state).when(cancel, OPERATOR)
    if state == "pending":
        cancelled = ApprovalCancelled(cause="operator", reason="freeze")
        assert outcome.then(cancelled).state.state == "cancelled"
    else:
        impossible(outcome, state)
    for other in (AGENT, ANA):
        history_of(state).when(cancel, other).refused("forbidden", needed=["operator"])


@in_every_state
@pytest.mark.parametrize("who", [ANA, EVE, OPERATOR])
def test_it_is_revoked_after_approval_and_not_while_it_is_run(state: str, who: Actor) -> None:
    outcome = history_of(state).when(RevokeApproval(approval_id=APPROVAL, reason="too much"), who)
    if state == "approved":
        assert outcome.then(ApprovalRevoked(reason="too much")).state.state == "revoked"
    elif state == "executing":
        outcome.refused("execution_started", id=APPROVAL, execution_id=EXECUTION)
    else:
        impossible(outcome, state)


@in_every_state
def test_a_use_begins_only_while_it_is_approved(state: str) -> None:
    outcome = history_of(state).when(begin(NEXT))
    match state:
        case "approved":
            assert outcome.state.state == "executing"
        case "executing":
            outcome.refused("execution_started", id=APPROVAL, execution_id=EXECUTION)
        case "executed":
            outcome.refused("uses_exhausted", id=APPROVAL, uses=1)
        case "expired":
            outcome.refused("approval_expired", deadline=EXPIRES_AT)
        case "lapsed":
            outcome.refused("approval_expired", deadline=APPROVED_UNTIL)
        case _:
            impossible(outcome, state)


@in_every_state
def test_an_outcome_is_of_an_execution_that_was_begun(state: str) -> None:
    outcome = history_of(state).when(tell("ok"))
    if state == "executing":
        assert outcome.then(USED).state.state == "executed"
    elif state == "executed":
        outcome.then()
    else:
        outcome.turned_away("not_found", what="execution", id=EXECUTION)


@in_every_state
def test_what_it_was_asked_for_ends_and_it_with_it_only_while_it_is_to_be_decided(state: str) -> None:
    outcome = history_of(state).when(EndApproval(approval_id=APPROVAL, cause="task_ended"), SYSTEM)
    outcome.then(*[ApprovalCancelled(cause="task_ended")] if state == "pending" else [])


@in_every_state
@pytest.mark.parametrize(
    ("kind", "deadline", "from_state", "fact"),
    [
        (ExpireApproval, EXPIRES_AT, "pending", EXPIRED),
        (LapseApproval, APPROVED_UNTIL, "approved", LAPSED),
        (MissOutcome, OUTCOME_BY, "executing", UNKNOWN),
    ],
)
def test_each_kind_of_time_runs_out_once_and_only_where_it_runs(
    state: str, kind: Any, deadline: str, from_state: str, fact: Any
) -> None:
    command = by_its_id(kind(approval_id=APPROVAL, deadline=deadline))
    outcome = history_of(state, now=deadline).when(command, SYSTEM)
    own = [event.data for event in outcome.events if event.command_id == command.due_id]
    assert own == ([fact] if state == from_state else [])
    early = history_of(state, now=before(deadline)).when(kind(approval_id=APPROVAL, deadline=deadline), SYSTEM)
    assert not any(event.type == type(fact).__name__ for event in early.events)
    other = history_of(state, now=deadline).when(kind(approval_id=APPROVAL, deadline=NOW), SYSTEM)
    assert not any(event.command_id == "asked" for event in other.events)


@pytest.mark.parametrize(
    "command",
    [
        vote(),
        begin(),
        tell(),
        edit(),
        WithdrawVote(approval_id=APPROVAL),
        PresentApproval(approval_id=APPROVAL, channel="x"),
        WithdrawApproval(approval_id=APPROVAL),
        ExpireApproval(approval_id=APPROVAL, deadline=NOW),
    ],
)
def test_an_approval_that_is_not_there_is_not_found_and_that_leaves_no_trace(command: Command) -> None:
    given().when(command, SYSTEM).turned_away("not_found", what="approval", id=APPROVAL)
    given(on(APPROVAL, FactRecorded(kind="x"))).when(command, SYSTEM).turned_away("not_found", what="approval")
