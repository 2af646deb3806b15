"""What operators ask of views, and what came of it: once, by operators, in the project that is theirs."""

from typing import Any

import pytest

from ledger.events import Fact
from ledger.operations import (
    OPERATIONS,
    OPERATORS,
    CancelRebuild,
    OfView,
    RebuildView,
    RetryParked,
    RollBackView,
    SettleRequest,
    SkipEvent,
    VerifyView,
    stream_of,
)
from ledger.project_key import ProjectKey
from ledger.values import SYSTEM, Actor, Principal, Replayed
from ledger.view import View
from ledger.view_events import (
    EventSkipped,
    EventSkipRequested,
    ParkedRetried,
    ParkedRetryRequested,
    RebuildCancelled,
    RebuildCancelRequested,
    RebuildRequested,
    RollBackRequested,
    VerificationRequested,
    ViewRequestFailed,
    ViewRolledBack,
    ViewSwitched,
    ViewVerified,
)
from tests.ledger.given import AGENT, NOW, VAULT, Given, Outcome, by, given, on

STREAM = stream_of("sessions")
ANA = Actor(issuer="https://id.example", sub="ana", kind="human", assurance="authenticated", roles=("operator",))
BO = Actor(issuer="https://id.example", sub="bo", kind="human", assurance="authenticated", roles=("operator",))
HER, HIM, OURS = Principal.of(ANA), Principal.of(BO), Principal.of(SYSTEM)
REPLAYED = Replayed(code_version="1+a", heads_digest="sha256:1", digest="sha256:2", rows=7)
DRIFTED = Replayed(
    code_version="1+a", heads_digest="sha256:1", digest="sha256:2", rows=7, drifted=2, drifted_projects=("demo",)
)
REQUESTED = RebuildRequested(view="sessions")
SWITCHED = ViewSwitched(view="sessions", request=1, asked_by=HER, replayed=REPLAYED)
CANCEL_REQUESTED = RebuildCancelRequested(view="sessions", request=1)

VAULT._projects[OPERATORS] = ProjectKey(OPERATORS, bytes(32))


class Operators(Given):
    """The operators' ledger."""

    project_id = OPERATORS


def asked(*history: Fact) -> Operators:
    """What Ana asked of the view of sessions, and what came of it."""
    return Operators(on(STREAM, *(by(ANA, fact) for fact in history)))


def rebuild() -> RebuildView:
    return RebuildView(view="sessions", reason="new words")


def settle(outcome: Any, request: int = 1, **fields: Any) -> SettleRequest:
    command = SettleRequest(view="sessions", request=request, outcome=outcome, **fields)
    command.command_id = command.settling_id
    return command


def then(outcome: Outcome, *facts: Fact) -> View:
    state: View = outcome.then(*(on(STREAM, fact) for fact in facts)).state
    return state


def test_who_asks_for_a_rebuild_and_why_is_an_event_and_in_the_view() -> None:
    outcome = asked().when(rebuild(), ANA)
    state = then(outcome, REQUESTED)
    (request,) = state.open
    assert (state.view, state.state, state.version) == ("sessions", "rebuilding", 1)
    assert (request.asked, request.request, request.asked_by, request.asked_at) == ("rebuild", 1, HER, NOW)
    assert (request.reason, request.event_id) == ("new words", outcome.events[0].event_id)
    assert (outcome.events[0].actor, outcome.events[0].reason) == (ANA, "new words")


def test_of_two_who_ask_for_one_each_is_answered_that_of_the_first() -> None:
    state = then(asked(REQUESTED).when(rebuild(), BO))
    assert [one.asked_by for one in state.open] == [HER]


@pytest.mark.parametrize("command", OPERATIONS, ids=lambda command: command.__name__)
def test_only_operators_ask_and_only_in_the_project_that_is_theirs(command: type[OfView]) -> None:
    def made() -> OfView:
        fields: dict[str, Any] = {"project": "demo", "position": 7, "reason": "x"} if command is SkipEvent else {}
        return command(view="sessions", **fields)

    for roles in (("agent",), ("auditor",), ("approver", "importer"), ()):
        who = Actor(issuer="i", sub="s", kind="human", assurance="authenticated", roles=roles)
        asked(REQUESTED).when(made(), who).refused("forbidden", needed=["operator"])
    given().when(made(), ANA).turned_away("not_found", what="projection", id="sessions")
    given().when(made(), AGENT).refused("forbidden")


def test_nobody_but_the_system_says_what_came_of_it() -> None:
    asked(REQUESTED).when(settle("switched", replayed=REPLAYED), ANA).refused("forbidden")


@pytest.mark.parametrize(
    ("outcome", "fact", "state"),
    [
        (settle("switched", replayed=REPLAYED), SWITCHED, "switched"),
        (
            settle("failed", because="event 2 of demo"),
            ViewRequestFailed(view="sessions", request=1, asked_by=HER, asked="rebuild", because="event 2 of demo"),
            "built",
        ),
    ],
    ids=["switched", "failed"],
)
def test_a_rebuild_ends_as_it_ended_and_that_is_said_once(outcome: SettleRequest, fact: Fact, state: str) -> None:
    said = asked(REQUESTED).when(outcome, SYSTEM)
    view = then(said, fact)
    assert (view.state, view.open, view.requests[0].ended_at) == (state, (), NOW)
    assert said.events[0].actor == SYSTEM
    again = settle("failed", because="another worker saw it fail")
    then(said.taken().when(again, SYSTEM))
    assert outcome.settling_id == again.settling_id


def test_a_rebuild_is_cancelled_or_that_came_too_late() -> None:
    history = asked(REQUESTED).when(CancelRebuild(view="sessions"), BO)
    assert then(history, CANCEL_REQUESTED).state == "cancelling"
    cancelling = history.taken()
    then(cancelling.when(CancelRebuild(view="sessions"), ANA))
    cancelling.when(rebuild(), ANA).refused("invalid_transition", current_state="cancelling", allowed=())
    cancelled = RebuildCancelled(view="sessions", request=1, asked_by=HER, cancelled_by=HIM)
    assert then(cancelling.when(settle("cancelled"), SYSTEM), cancelled).state == "built"
    assert then(cancelling.when(settle("switched", replayed=REPLAYED), SYSTEM), SWITCHED).state == "switched"


def test_only_what_is_under_way_is_cancelled() -> None:
    for history, state in (((), "built"), ((REQUESTED, SWITCHED), "switched")):
        asked(*history).when(CancelRebuild(view="sessions"), ANA).refused(
            "invalid_transition", id="sessions", current_state=state
        )


def test_only_what_a_rebuild_replaced_is_rolled_back_to_and_once() -> None:
    for facts in ((), (REQUESTED,), (REQUESTED, CANCEL_REQUESTED)):
        asked(*facts).when(RollBackView(view="sessions"), ANA).refused("invalid_transition")
    switched = asked(REQUESTED, SWITCHED)
    rolling = switched.when(RollBackView(view="sessions"), ANA)
    assert then(rolling, RollBackRequested(view="sessions")).state == "rolling_back"
    history = rolling.taken()
    then(history.when(RollBackView(view="sessions"), BO))
    history.when(rebuild(), ANA).refused("invalid_transition", current_state="rolling_back")
    back = history.when(settle("rolled_back", 3), SYSTEM)
    assert then(back, ViewRolledBack(view="sessions", request=3, asked_by=HER)).state == "built"
    back.taken().when(RollBackView(view="sessions"), ANA).refused("invalid_transition", current_state="built")


def test_what_a_rebuild_replaced_is_kept_while_the_next_ones_fail() -> None:
    failed = ViewRequestFailed(view="sessions", request=3, asked_by=HER, asked="rebuild", because="x")
    history = asked(REQUESTED, SWITCHED, REQUESTED, failed)
    assert then(history.when(RollBackView(view="sessions"), ANA), RollBackRequested(view="sessions")).requests


@pytest.mark.parametrize("project", [None, "demo"])
@pytest.mark.parametrize("history", [(), (REQUESTED,), (REQUESTED, CANCEL_REQUESTED)])
def test_a_view_is_verified_in_any_state_and_keeps_it(project: str | None, history: tuple[Fact, ...]) -> None:
    requested = VerificationRequested(view="sessions", project=project)
    outcome = asked(*history).when(VerifyView(view="sessions", project=project), ANA)
    before = then(outcome, requested)
    number = before.version
    verifying = outcome.taken()
    then(verifying.when(VerifyView(view="sessions", project=project), BO))
    then(
        verifying.when(VerifyView(view="sessions", project="other"), BO),
        VerificationRequested(view="sessions", project="other"),
    )
    verified = ViewVerified(
        view="sessions", request=number, asked_by=HER, holds=False, replayed=DRIFTED, project=project
    )
    after = then(verifying.when(settle("verified", number, replayed=DRIFTED), SYSTEM), verified)
    ended = after.find(number)
    assert ended is not None
    assert (ended.outcome, ended.holds, ended.replayed) == ("verified", False, DRIFTED)
    assert after.state == before.state


def test_what_is_parked_is_tried_again_or_skipped_with_a_reason() -> None:
    retry = asked().when(RetryParked(view="sessions", project="demo"), ANA)
    then(retry, ParkedRetryRequested(view="sessions", project="demo"))
    history = retry.taken()
    then(history.when(RetryParked(view="sessions", project="demo"), BO))
    then(history.when(settle("retried"), SYSTEM), ParkedRetried(view="sessions", request=1, asked_by=HER))

    def skipping() -> SkipEvent:
        return SkipEvent(view="sessions", project="demo", position=7, reason="of no session")

    skip = history.when(skipping(), BO)
    then(skip, EventSkipRequested(view="sessions", project="demo", position=7))
    both = skip.taken()
    then(both.when(skipping(), ANA))
    skipped = EventSkipped(view="sessions", request=2, asked_by=HIM, project="demo", position=7)
    then(both.when(settle("skipped", 2), SYSTEM), skipped)
    failed = ViewRequestFailed(view="sessions", request=2, asked_by=HIM, asked="skip", because="not parked")
    then(both.when(settle("failed", 2, because="not parked"), SYSTEM), failed)


def test_the_system_asks_as_operators_do() -> None:
    (request,) = then(asked().when(rebuild(), SYSTEM), REQUESTED).open
    assert request.asked_by == OURS


def test_of_each_kind_the_last_that_ended_is_remembered() -> None:
    requested = VerificationRequested(view="sessions")
    facts: list[Fact] = [REQUESTED, SWITCHED]
    for number in (3, 5, 7):
        facts += [requested, ViewVerified(view="sessions", request=number, asked_by=HER, holds=True, replayed=REPLAYED)]
    state = asked(*facts, REQUESTED).streams[STREAM]
    assert [(one.asked, one.request, one.outcome) for one in state.requests] == [
        ("rebuild", 1, "switched"),
        ("verify", 7, "verified"),
        ("rebuild", 9, None),
    ]
