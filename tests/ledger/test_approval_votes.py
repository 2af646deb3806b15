"""Who decides: people who are eligible, never those it is asked for; each counts once, and a no weighs first."""

from typing import Any

import pytest

from ledger.commands import WithdrawVote
from ledger.events import (
    ApprovalDenied,
    ApprovalExpired,
    ApprovalGranted,
    ApprovalRequested,
    VoteCast,
    VoteWithdrawn,
)
from ledger.values import Action, Actor, Principal, Quorum, stamp
from tests.ledger.approvals import (
    ANA,
    APPROVAL,
    APPROVED,
    APPROVED_UNTIL,
    ASKED,
    BEN,
    EVE,
    EXPIRED,
    EXPIRES_AT,
    GRANTED,
    IMPORTER,
    OPERATOR,
    STATES,
    approval,
    asked,
    before,
    history_of,
    person,
    principal,
    vote,
    voted,
)
from tests.ledger.given import AGENT, NOW, by, given, later, on, pending_of

DAN = person("dan")
TAKE_BACK = WithdrawVote(approval_id=APPROVAL)


def cast(verdict: Any = "approve", on: ApprovalRequested = ASKED, **fields: Any) -> VoteCast:
    return VoteCast(verdict=verdict, digest_seen=on.request_digest, **fields)


def quorum(approve: int = 1, deny: int = 1, *roles: str) -> ApprovalRequested:
    return asked(quorum=Quorum(approve=approve, deny=deny, roles=roles or ("approver",)))


# One vote


def test_one_approval_is_enough_where_one_is_asked_for() -> None:
    outcome = approval().when(vote(reason="small sum"), ANA)
    granted = ApprovalGranted(approved_until=APPROVED_UNTIL)
    state = outcome.then(cast(reason="small sum"), granted).state
    (counted,) = state.votes
    assert (counted.voter, counted.verdict, counted.reason) == (principal(ANA), "approve", "small sum")
    assert (counted.event_id, counted.version, counted.cast_at) == (outcome.events[0].event_id, 2, NOW)
    assert (state.state, state.decided_at, state.approved_until) == ("approved", NOW, APPROVED_UNTIL)
    assert [event.actor for event in outcome.events] == [ANA, ANA]


def test_a_grant_is_valid_from_the_decision_on_for_as_long_as_was_asked() -> None:
    minute = asked(valid_for_seconds=60)
    decided_at = stamp(later(NOW, hours=3))
    outcome = approval(minute, now=decided_at).when(vote(on=minute), ANA)
    assert outcome.state.approved_until == stamp(later(decided_at, seconds=60))


def test_a_granted_item_is_a_grant_and_a_denied_one_is_open_no_more() -> None:
    batch = approval().when(vote(), ANA).batch
    assert batch.append.opened[APPROVAL].item_type == "grant"
    assert approval().when(vote("deny"), ANA).batch.append.closed == {APPROVAL}


def test_one_denial_is_enough_where_one_is_asked_for() -> None:
    state = approval().when(vote("deny"), ANA).then(cast("deny"), ApprovalDenied()).state
    assert (state.state, state.decided_at, state.approved_until) == ("denied", NOW, None)


@pytest.mark.parametrize(
    "seen", [None, f"sha256:{'0' * 64}", ASKED.action_digest, asked(summary="other").request_digest]
)
def test_a_vote_on_what_was_not_seen_is_refused(seen: str | None) -> None:
    for verdict in ("approve", "deny"):
        refused = approval().when(vote(verdict, digest_seen=seen), ANA)
        refused.refused("digest_mismatch", id=APPROVAL, what="request_digest", expected=ASKED.request_digest)


@pytest.mark.parametrize(
    "other",
    [
        {"summary": "x"},
        {"reason": "x"},
        {"risk": "high"},
        {"quorum": Quorum(approve=2)},
        {"expires_at": later(NOW, hours=1)},
        {"action": Action(tool="refund")},
    ],
)
def test_what_people_see_is_all_in_the_digest_that_they_vote_on(other: dict[str, Any]) -> None:
    assert asked(**other).request_digest != ASKED.request_digest
    assert (asked(**other).action_digest != ASKED.action_digest) == ("action" in other)


@pytest.mark.parametrize("same", [{"call_key": "k"}, {"uses": 9}, {"valid_for_seconds": 5}, {"external_id": "x"}])
def test_the_rest_is_not(same: dict[str, Any]) -> None:
    assert asked(**same).request_digest == ASKED.request_digest


# Who may


@pytest.mark.parametrize(
    "who",
    [
        person("bot", kind="agent"),
        person("job", kind="service"),
        person("ana", assurance="asserted"),
        person("ana", assurance="imported"),
        person("ana", "auditor"),
        person("ana", "Approver"),
        person("ana", roles=()),
        OPERATOR,
    ],
)
def test_only_an_authenticated_person_with_an_eligible_role_votes(who: Actor) -> None:
    for verdict in ("approve", "deny"):
        approval().when(vote(verdict), who).refused("not_eligible", id=APPROVAL, roles=("approver",))
    denied = approval(voted(ANA, "deny"), ApprovalDenied())
    denied.when(vote("deny"), who).refused("not_eligible")


def test_the_question_says_which_roles_are_eligible() -> None:
    for_money = quorum(1, 1, "finance", "legal")
    approval(for_money).when(vote(on=for_money), ANA).refused("not_eligible", roles=("finance", "legal"))
    lawyer = person("lea", "approver", "legal")
    assert approval(for_money).when(vote(on=for_money), lawyer).state.state == "approved"


def test_who_asked_does_not_decide_whatever_their_roles() -> None:
    asker = person("pia", "agent", "approver")
    own = asked(who=asker)
    history = given(on(APPROVAL, by(asker, own)))
    for verdict in ("approve", "deny"):
        history.when(vote(verdict, on=own), asker).refused("self_approval_forbidden", id=APPROVAL, sub="pia")
    assert history.when(vote(on=own), ANA).state.state == "approved"


CHAIN = (principal(ANA), Principal("https://id.example", "crew"), principal(BEN))


@pytest.mark.parametrize("who", [ANA, BEN, person("crew")])
def test_nobody_decides_what_is_asked_on_their_behalf_at_whatever_remove(who: Actor) -> None:
    bot = person("agent-7", "agent", kind="agent", on_behalf_of=CHAIN)
    theirs = asked(who=bot)
    assert theirs.on_behalf_of == CHAIN
    history = approval(theirs)
    for verdict in ("approve", "deny"):
        history.when(vote(verdict, on=theirs), who).refused("self_approval_forbidden", sub=who.sub)
    assert history.when(vote(on=theirs), EVE).state.state == "approved"


@pytest.mark.parametrize("behind", [principal(AGENT), principal(BEN)])
def test_nobody_decides_through_a_delegate(behind: Principal) -> None:
    bot = person("agent-7", "agent", kind="agent", on_behalf_of=(principal(BEN),))
    theirs = asked(who=bot)
    delegate = person("dan", on_behalf_of=(principal(EVE), behind))
    approval(theirs).when(vote(on=theirs), delegate).refused("self_approval_forbidden")


@pytest.mark.parametrize(("issuer", "sub"), [("https://other.example", "pia"), ("https://id.example", "Pia")])
def test_people_are_compared_exactly(issuer: str, sub: str) -> None:
    own = asked(who=person("pia", "agent"))
    namesake = person(sub, issuer=issuer)
    assert approval(own).when(vote(on=own), namesake).state.state == "approved"


def test_who_may_not_vote_hears_that_first_whatever_else_is_wrong() -> None:
    for state in STATES:
        refused = history_of(state).when(vote(digest_seen=None), AGENT)
        refused.refused("self_approval_forbidden")


# Several votes


def test_a_quorum_of_several_is_reached_by_as_many_people() -> None:
    three = quorum(3, 1)
    history = approval(three)
    for who in (ANA, BEN):
        outcome = history.when(vote(on=three), who)
        assert outcome.then(cast(on=three)).state.state == "pending"
        history = outcome.taken()
    state = history.when(vote(on=three), EVE).then(cast(on=three), GRANTED).state
    assert [vote.voter for vote in state.votes] == [principal(who) for who in (ANA, BEN, EVE)]


def test_as_many_denials_as_it_takes_end_it() -> None:
    two = quorum(1, 2)
    history = approval(two, voted(ANA, "deny"))
    assert history.streams[APPROVAL].state == "pending"
    assert history.when(vote("deny", on=two), BEN).then(cast("deny", two), ApprovalDenied()).state.state == "denied"
    assert history.when(vote(on=two), BEN).then(cast(on=two), GRANTED).state.state == "approved"


def test_a_denial_is_looked_at_before_an_approval() -> None:
    both = quorum(2, 2)
    history = approval(both, voted(ANA), voted(BEN), voted(EVE, "deny"))
    history.when(vote("deny", on=both), DAN).then(cast("deny", both), ApprovalDenied())
    history = approval(both, voted(ANA, "deny"), voted(BEN, "deny"), voted(EVE))
    history.when(vote(on=both), DAN).then(cast(on=both), ApprovalDenied())


def test_one_person_has_one_vote() -> None:
    two = quorum(2, 2)
    for verdict, other in (("approve", "deny"), ("deny", "approve")):
        history = approval(two, voted(ANA, verdict))
        assert len(history.when(vote(verdict, on=two), ANA).then().state.votes) == 1
        history.when(vote(other, on=two), ANA).refused("already_voted", id=APPROVAL, verdict=verdict)
        otherwise = person("ana", "approver", "auditor", client="app", name="Ana", amr=("otp",))
        assert len(history.when(vote(verdict, on=two), otherwise).then().state.votes) == 1


def test_the_same_vote_again_says_nothing_new_also_after_the_decision() -> None:
    for state, verdict, other in (("approved", "approve", "deny"), ("denied", "deny", "approve")):
        history = history_of(state)
        outcome = history.when(vote(verdict), ANA).then()
        assert outcome.state.state == state
        history.when(vote(other), ANA).refused("invalid_transition", current_state=state)
        history.when(vote(verdict, digest_seen=None), ANA).refused("digest_mismatch")


def test_who_has_taken_a_vote_back_may_vote_the_other_way() -> None:
    two = quorum(2, 2)
    history = approval(two, voted(ANA), voted(BEN, "deny"))
    outcome = history.when(TAKE_BACK, ANA)
    state = outcome.then(VoteWithdrawn()).state
    assert [vote.voter for vote in state.votes] == [principal(BEN)]
    again = outcome.taken()
    again.when(vote("deny", on=two), ANA).then(cast("deny", two), ApprovalDenied())
    assert again.when(TAKE_BACK, ANA).then().state.state == "pending"


def test_a_vote_that_was_taken_back_does_not_count() -> None:
    two = quorum(2, 1)
    history = approval(two, voted(ANA), by(ANA, VoteWithdrawn()))
    assert history.when(vote(on=two), BEN).then(cast(on=two)).state.state == "pending"
    assert history.when(vote(on=two), ANA).then(cast(on=two)).state.state == "pending"


def test_nobody_takes_the_vote_of_another_back() -> None:
    history = approval(quorum(2, 2), voted(ANA))
    for who in (BEN, person("ana", issuer="https://other.example")):
        assert len(history.when(TAKE_BACK, who).then().state.votes) == 1


def test_who_has_no_vote_and_no_role_that_it_takes_is_not_shown_it_by_taking_one_back() -> None:
    history = approval(quorum(2, 2), voted(ANA))
    for who in (OPERATOR, AGENT, IMPORTER, person("nobody", "finance")):
        history.when(TAKE_BACK, who).refused("not_eligible")


def test_who_voted_takes_it_back_also_without_the_role_by_now() -> None:
    history = approval(quorum(2, 2), voted(ANA))
    assert history.when(TAKE_BACK, person("ana", "auditor")).then(VoteWithdrawn()).state.votes == ()


# Time


def test_a_vote_in_the_last_instant_counts_and_one_at_the_deadline_is_too_late() -> None:
    last = stamp(later(EXPIRES_AT, seconds=900, microseconds=-1))
    state = approval(now=before(EXPIRES_AT)).when(vote(), ANA).then(cast(), ApprovalGranted(approved_until=last)).state
    assert state.state == "approved"
    for verdict in ("approve", "deny"):
        outcome = approval(now=EXPIRES_AT).when(vote(verdict), ANA)
        outcome.refused("approval_expired", EXPIRED, id=APPROVAL, deadline=EXPIRES_AT)
        assert outcome.batch.stream(APPROVAL).state == "expired"


def test_a_timeout_never_approves_however_many_had_voted_for_it() -> None:
    two = quorum(2, 1)
    late = approval(two, voted(ANA), now=stamp(later(EXPIRES_AT, days=3)))
    late.when(vote(on=two), BEN).refused("approval_expired", ApprovalExpired(deadline=EXPIRES_AT))
    late.when(vote(on=two), ANA).refused("approval_expired", ApprovalExpired(deadline=EXPIRES_AT))


def test_a_vote_is_not_taken_back_once_the_time_has_run_out() -> None:
    late = approval(quorum(2, 1), voted(ANA), now=EXPIRES_AT)
    late.when(TAKE_BACK, ANA).refused("invalid_transition", EXPIRED, current_state="expired")


def test_the_time_of_a_question_is_its_own() -> None:
    short = asked(expires_at=later(NOW, seconds=5))
    at = stamp(later(NOW, seconds=5))
    approval(short, now=at).when(vote(on=short), ANA).refused("approval_expired", ApprovalExpired(deadline=at))
    assert approval(short, now=before(at)).when(vote(on=short), ANA).state.state == "approved"


def test_a_vote_after_a_decision_finds_it_made() -> None:
    history = approval(*APPROVED)
    for verdict in ("approve", "deny"):
        history.when(vote(verdict), BEN).refused("invalid_transition", current_state="approved")


def test_two_votes_in_one_commit_are_counted_in_their_order() -> None:
    two = quorum(2, 1)
    batch = approval(two).batch()
    votes = [(ANA, "1"), (ANA, "2"), (BEN, "3"), (EVE, "4")]
    answers = [batch.decide(pending_of(vote(on=two, command_id=number), who)) for who, number in votes]
    assert [answer.status for answer in answers] == [200, 200, 200, 422]
    assert [row.type for row in batch.append.events[:-1]] == ["VoteCast", "VoteCast", "ApprovalGranted"]
