"""Whatever people, agents and time do to an approval in whatever order: it is never used without their consent."""

from collections import defaultdict
from typing import Any, get_args
from uuid import UUID

from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from uuid_utils.compat import uuid7

from ledger import approval as rules
from ledger.approval_state import State
from ledger.commands import (
    BeginUse,
    CancelApproval,
    CastVote,
    Command,
    EditApproval,
    PresentApproval,
    RecordOutcome,
    RequestApproval,
    RevokeApproval,
    WithdrawApproval,
    WithdrawVote,
)
from ledger.entry import Event, decode
from ledger.events import ApprovalGranted, ApprovalRequested, ApprovalUseBegun, VoteCast
from ledger.system import Due, ExpireApproval, LapseApproval, MissOutcome
from ledger.values import SYSTEM, Action, Actor, Principal, Quorum
from tests.ledger.approvals import ANA, BEN, EVE, OPERATOR, STRANGER, person, principal
from tests.ledger.given import AGENT, Given, later, pending_of

PIA = person("pia", "agent", "approver")
FOR_BEN = person("agent-7", "agent", kind="agent", on_behalf_of=(principal(BEN),))
AGENTS = (AGENT, FOR_BEN, PIA, STRANGER)
PEOPLE = (
    ANA,
    BEN,
    EVE,
    PIA,
    person("dan", on_behalf_of=(principal(AGENT),)),
    person("ana", issuer="https://two.example"),
)
ACTIONS = (Action(tool="pay", arguments={"sum": 1}), Action(tool="pay", arguments={"sum": "1"}))

NEXT = {
    "pending": {
        "ApprovalGranted": "approved",
        "ApprovalDenied": "denied",
        "ApprovalExpired": "expired",
        "ApprovalWithdrawn": "withdrawn",
        "ApprovalCancelled": "cancelled",
        "ApprovalSuperseded": "superseded",
        "VoteCast": "pending",
        "VoteWithdrawn": "pending",
        "ApprovalPresented": "pending",
    },
    "approved": {"ApprovalUseBegun": "executing", "ApprovalRevoked": "revoked", "ApprovalLapsed": "lapsed"},
    "executing": {"ApprovalUseCompleted": "used", "ApprovalOutcomeUnknown": "used"},
}
"""From which state which event leads where; `used` is approved again while uses and time are left, else executed."""

OFTEN = ("vote", "vote", "vote", "vote", "begin", "begin", "begin", "tell", "tell", "tell")
SELDOM = ("ask", "deny", "retract", "edit", "revoke", "withdraw", "cancel", "present", "sweep")
STEP = st.tuples(st.sampled_from((*OFTEN, *SELDOM)), st.integers(0, 200))
STORY = st.lists(
    st.tuples(st.sampled_from((0, 0, 0, 0.5, 2, 15)), st.lists(STEP, min_size=1, max_size=6)), min_size=8, max_size=25
)


class Story(Given):
    """A ledger on which approvals are asked for, decided and used, batch after batch."""

    def __init__(self) -> None:
        super().__init__()
        self.approvals: list[UUID] = []
        self.executions: list[UUID] = [uuid7()]
        self.events: dict[UUID, list[Event[Any]]] = defaultdict(list)
        self.command_ids: list[tuple[str, str]] = []

    def request(self, number: int) -> RequestApproval:
        return RequestApproval(
            action=ACTIONS[number % 2],
            call_key="k" if number % 3 == 0 else None,
            quorum=Quorum(approve=max(1, number % 4), deny=1 + number % 2),
            uses=1 + number % 3,
            expires_at=later("2026-11-21T09:00:00.000000Z", seconds=10 + number),
            valid_for_seconds=1 + number % 30,
            outcome_within_seconds=1 + number % 7,
        )

    def command(self, what: str, number: int) -> tuple[Command, Actor]:
        """The step that it is, and who takes it."""
        agent, one = AGENTS[number % 7 % 4], PEOPLE[number % len(PEOPLE)]
        if what == "ask" or not self.approvals:
            return self.request(number), agent
        approval_id = self.approvals[-1 - number % min(3, len(self.approvals))]
        held = self.streams[approval_id]
        about: dict[str, Any] = {"approval_id": approval_id}
        asker = next(who for who in AGENTS if principal(who) == held.requester)
        requester = agent if number % 11 == 0 else asker
        action, execution_id = ACTIONS[number % 13 == 0], self.executions[-1 - number % 2 % len(self.executions)]
        if held.action["arguments"]["sum"] == "1":
            action = ACTIONS[number % 13 != 0]
        match what:
            case "vote" | "deny":
                seen = None if number % 17 == 0 else held.request_digest
                verdict: Any = "deny" if what == "deny" else "approve"
                return CastVote(verdict=verdict, digest_seen=seen, **about), one
            case "retract":
                return WithdrawVote(**about), one
            case "edit":
                return EditApproval(action=ACTIONS[number % 2], **about), one
            case "begin":
                self.executions.append(uuid7())
                begun = execution_id if number % 5 == 0 else self.executions[-1]
                return BeginUse(execution_id=begun, action=action, **about), requester
            case "tell":
                told = held.executions[-1].execution_id if held.executions else execution_id
                outcome: Any = ("ok", "failed")[number % 2]
                return RecordOutcome(execution_id=told, outcome=outcome, **about), requester
            case "revoke":
                return RevokeApproval(**about), OPERATOR
            case "withdraw":
                return WithdrawApproval(**about), requester
            case "cancel":
                return CancelApproval(**about), OPERATOR
            case "present":
                return PresentApproval(channel="chat", **about), one
            case _:
                return self.due(held, number), SYSTEM

    def due(self, held: Any, number: int) -> Due:
        deadlines = (held.expires_at, held.approved_until, held.executions[-1].outcome_by if held.executions else None)
        kind = (ExpireApproval, LapseApproval, MissOutcome)[number % 3]
        command = kind(approval_id=held.approval_id, deadline=deadlines[number % 3] or held.expires_at)
        command.command_id = command.due_id
        return command

    def goes_on(self, seconds_later: float, steps: list[tuple[str, int]]) -> None:
        batch = self.batch(seconds_later)
        for place, step in enumerate(steps):
            command, by = self.command(*step)
            if by is not SYSTEM:
                command.command_id = f"{len(self.command_ids)}-{place}"
            batch.decide(pending_of(command, by))
        for row in batch.append.events:
            event = decode(row.entry, row.payload, row.type)
            self.take(event)
            self.events[event.stream_id].append(event)
            if isinstance(event.data, ApprovalRequested):
                self.approvals.append(event.stream_id)
        for stream_id, state in batch.streams.items():
            assert self.streams[stream_id] == state, "what was decided on is what was stored"
        self.command_ids += [(row.principal, row.command_id) for row in batch.append.commands]
        self.recorded_at = batch.recorded_at


def test_whatever_happens_in_whatever_order_the_rules_hold() -> None:
    reached: set[str] = set()

    @settings(max_examples=300, deadline=None)
    @for_all(STORY)
    def tell(story: Any) -> None:
        ledger = Story()
        for seconds_later, steps in story:
            ledger.goes_on(seconds_later, steps)
        assert len(set(ledger.command_ids)) == len(ledger.command_ids), "what is due is done once"
        for approval_id in ledger.approvals:
            assert_the_rules_hold(ledger.events[approval_id])
        states = [ledger.streams[approval_id] for approval_id in ledger.approvals]
        items = {item.item_id: item for state in states if (item := rules.item(state))}
        assert {i: item for root in ledger.items.values() for i, item in root.items()} == items
        reached.update(state.state for state in states)

    tell()
    assert reached == set(get_args(State)), "else it would prove nothing"


def assert_the_rules_hold(events: list[Event[Any]]) -> None:
    """By the events alone: the states follow one another, every person counts once, and no use is one too many."""
    asked: ApprovalRequested = events[0].data
    state, until = "pending", ""
    votes: dict[Principal, str] = {}
    begun: list[ApprovalUseBegun] = []
    for event in events[1:]:
        now, voter = event.recorded_at, principal(event.actor)
        if event.type == "OutcomeReconciled":
            assert event.data.execution_id in [use.execution_id for use in begun]
            continue
        if state == "pending" and event.type != "ApprovalExpired":
            assert now < asked.expires_at
        state = NEXT[state][event.type]
        match event.data:
            case VoteCast():
                assert voter not in votes, "one person, one vote"
                assert not {voter, *event.actor.on_behalf_of} & {asked.requester, *asked.on_behalf_of}
                assert (event.actor.kind, event.data.digest_seen) == ("human", asked.request_digest)
                votes[voter] = event.data.verdict
            case ApprovalGranted():
                until = event.data.approved_until
                assert list(votes.values()).count("approve") >= asked.quorum.approve
                assert list(votes.values()).count("deny") < asked.quorum.deny
            case ApprovalUseBegun():
                begun.append(event.data)
                assert len({use.execution_id for use in begun}) == len(begun) <= asked.uses
                assert now < until
                assert voter == asked.requester
        if event.type == "VoteWithdrawn":
            del votes[voter]
        elif event.type == "ApprovalDenied":
            assert list(votes.values()).count("deny") >= asked.quorum.deny
        elif event.type in ("ApprovalLapsed", "ApprovalExpired", "ApprovalOutcomeUnknown"):
            deadline = {"ApprovalLapsed": until, "ApprovalExpired": asked.expires_at}.get(event.type)
            assert (deadline or begun[-1].outcome_by) <= now
            assert event.actor == SYSTEM
        if state == "used":
            state = "approved" if len(begun) < asked.uses and now < until else "executed"
