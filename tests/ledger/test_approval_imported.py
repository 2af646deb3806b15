"""Imported history: what was asked and decided elsewhere, told by an importer, and never used here."""

from typing import Any
from uuid import UUID

from uuid_utils.compat import uuid7

from ledger import approval as rules
from ledger.commands import (
    BeginUse,
    EditApproval,
    RevokeApproval,
    WithdrawApproval,
    WithdrawVote,
)
from ledger.events import (
    ApprovalDenied,
    ApprovalGranted,
    SessionActivated,
    SessionCompleted,
    TaskCancelled,
    TaskSubmitted,
    VoteCast,
)
from ledger.system import ExpireApproval
from ledger.values import SYSTEM, Principal, Quorum, Voter, moment, stamp
from tests.ledger.approvals import (
    ACTION,
    ANA,
    ANOTHER,
    APPROVAL,
    APPROVED_UNTIL,
    GRANTED,
    IMPORTER,
    TASK,
    approval,
    ask,
    asked,
    person,
    principal,
    vote,
)
from tests.ledger.given import AGENT, NOW, OPENED, SESSION, Given, by, given, later, on

PAST = stamp(later(NOW, days=-400))
IMPORTED = asked(who=IMPORTER, imported=True, expires_at=moment(PAST))
EVIDENCE = uuid7()


def voter(sub: str, evidence: UUID | None = EVIDENCE) -> Voter:
    return Voter(issuer="https://old.example", sub=sub, evidence=evidence)


def brought(sub: str, verdict: Any = "approve", **fields: Any) -> Any:
    """How somebody voted then, as an importer tells it."""
    return vote(verdict, on=IMPORTED, **{"voter": voter(sub), "digest_seen": None} | fields)


def history() -> Given:
    return given(on(APPROVAL, by(IMPORTER, IMPORTED)))


def test_an_importer_asks_what_was_asked_in_the_past() -> None:
    then = moment(PAST)
    outcome = given().when(ask(imported=True, expires_at=then, occurred_at=then), IMPORTER)
    (event,) = outcome.events
    assert (event.occurred_at, event.recorded_at) == (PAST, NOW)
    assert (outcome.state.imported, outcome.state.state, outcome.state.expires_at) == (True, "pending", PAST)
    assert outcome.state.requester == principal(IMPORTER)


def test_only_an_importer_asks_it_and_nothing_else() -> None:
    given().when(ask(imported=True)).refused("forbidden", needed=["importer"])
    given().when(ask(), IMPORTER).refused("forbidden", needed=["agent"])


def test_it_is_part_of_what_has_ended_too() -> None:
    over = given(OPENED, SessionActivated(), SessionCompleted())
    assert over.when(ask(session_id=SESSION, imported=True), IMPORTER).state.session_id == SESSION
    ended = given(on(TASK, TaskSubmitted(kind="mail.send", run_at=NOW), TaskCancelled()))
    assert ended.when(ask(task_id=TASK, imported=True), IMPORTER).state.task_id == TASK


def test_an_importer_says_how_people_voted_and_by_what_record() -> None:
    outcome = history().when(brought("mo"), IMPORTER)
    cast = VoteCast(verdict="approve", voter=voter("mo"))
    state = outcome.then(cast, ApprovalGranted(approved_until=APPROVED_UNTIL)).state
    (counted,) = state.votes
    assert (counted.voter, counted.evidence) == (Principal("https://old.example", "mo"), EVIDENCE)
    assert {event.actor for event in outcome.events} == {IMPORTER}
    denied = history().when(brought("mo", "deny"), IMPORTER)
    denied.then(VoteCast(verdict="deny", voter=voter("mo")), ApprovalDenied())


def test_each_of_those_people_counts_once() -> None:
    asked_two = asked(who=IMPORTER, imported=True, quorum=Quorum(approve=2))
    two = given(on(APPROVAL, by(IMPORTER, asked_two)))
    once = two.when(brought("mo"), IMPORTER).taken()
    once.when(brought("mo"), IMPORTER).then()
    once.when(brought("mo", "deny"), IMPORTER).refused("already_voted")
    assert once.when(brought("may"), IMPORTER).state.state == "approved"


def test_a_digest_that_was_not_seen_then_is_not_asked_for_but_a_wrong_one_is_refused() -> None:
    assert history().when(brought("mo", digest_seen=IMPORTED.request_digest), IMPORTER).state.state == "approved"
    history().when(brought("mo", digest_seen=f"sha256:{'0' * 64}"), IMPORTER).refused("digest_mismatch")


def test_nobody_else_votes_on_it_and_its_importer_not_in_person() -> None:
    history().when(brought("mo"), ANA).refused("not_eligible")
    history().when(vote(on=IMPORTED), ANA).refused("not_eligible")
    history().when(vote(on=IMPORTED), IMPORTER).refused("not_eligible")
    himself = Voter(issuer=IMPORTER.issuer, sub=IMPORTER.sub)
    history().when(brought("", voter=himself), IMPORTER).refused("self_approval_forbidden")


def test_nobody_brings_votes_to_what_is_to_be_decided_now() -> None:
    both = person("ida", "importer", "approver")
    for who in (IMPORTER, ANA, both):
        approval().when(vote(voter=voter("mo")), who).refused("not_eligible")


def test_a_person_does_not_take_back_what_an_importer_told_of_them() -> None:
    asked_two = asked(who=IMPORTER, imported=True, quorum=Quorum(approve=2))
    of_ana = Voter(issuer=ANA.issuer, sub=ANA.sub)
    told = given(on(APPROVAL, by(IMPORTER, asked_two), by(IMPORTER, VoteCast(verdict="approve", voter=of_ana))))
    told.when(WithdrawVote(approval_id=APPROVAL), ANA).refused("not_eligible", id=APPROVAL)


def test_it_is_never_used_nor_edited_nor_revoked() -> None:
    agent_too = person("ida", "importer", "agent", "approver", kind="service")
    granted = given(on(APPROVAL, by(IMPORTER, IMPORTED), by(IMPORTER, VoteCast(verdict="approve")), GRANTED))
    for told in (history(), granted):
        use = BeginUse(approval_id=APPROVAL, execution_id=uuid7(), action=ACTION)
        for who in (agent_too, AGENT):
            told.when(use, who).refused("not_usable", id=APPROVAL)
        told.when(EditApproval(approval_id=APPROVAL, action=ACTION), ANA).refused("not_usable")
        told.when(RevokeApproval(approval_id=APPROVAL), ANA).refused("not_usable")


def test_it_has_no_clock() -> None:
    """Its times are of the past: nothing runs out now."""
    granted = (by(IMPORTER, VoteCast(verdict="approve")), GRANTED)
    for facts, state in (((), "pending"), (granted, "approved")):
        told = given(on(APPROVAL, by(IMPORTER, IMPORTED), *facts), now=stamp(later(NOW, days=4000)))
        assert rules.due(told.streams[APPROVAL], told.batch().now) is None
        told.when(ExpireApproval(approval_id=APPROVAL, deadline=PAST), SYSTEM).then()
        told.when(WithdrawApproval(approval_id=APPROVAL)).refused("forbidden")
        assert told.streams[APPROVAL].state == state


def test_it_never_answers_a_question_of_today() -> None:
    told = given().when(ask(imported=True, call_key="refund-9"), IMPORTER).taken()
    both = person("ida", "importer", "agent", kind="service")
    for fields in ({}, {"imported": True}):
        again = ask(approval_id=ANOTHER, call_key="refund-9", **fields)
        assert told.when(again, both).state.approval_id == ANOTHER
