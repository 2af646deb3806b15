"""What the tests of approvals begin with: who asks, who decides, and the history that leads to each state."""

from typing import Any
from uuid import UUID

from uuid_utils.compat import uuid7

from ledger.commands import BeginUse, CastVote, RecordOutcome, RequestApproval
from ledger.events import (
    ApprovalCancelled,
    ApprovalDenied,
    ApprovalExpired,
    ApprovalGranted,
    ApprovalLapsed,
    ApprovalOutcomeUnknown,
    ApprovalRequested,
    ApprovalRevoked,
    ApprovalSuperseded,
    ApprovalUseBegun,
    ApprovalUseCompleted,
    ApprovalWithdrawn,
    Fact,
    VoteCast,
)
from ledger.values import Action, Actor, Principal, stamp
from tests.ledger.given import AGENT, NOW, By, Given, On, by, given, later, on

APPROVAL, ANOTHER, TASK = (UUID(f"0199a7c2-0000-7000-8000-0000000002{n:02}") for n in range(3))
EXECUTION, NEXT = uuid7(), uuid7()


def person(sub: str, *roles: str, **fields: Any) -> Actor:
    told: dict[str, Any] = {"issuer": "https://id.example", "kind": "human", "assurance": "authenticated"}
    return Actor(**told | {"sub": sub, "roles": roles or ("approver",)} | fields)


def principal(actor: Actor) -> Principal:
    return Principal(actor.issuer, actor.sub)


ANA, BEN, EVE = (person(sub) for sub in ("ana", "ben", "eve"))
OPERATOR, IMPORTER = person("olga", "operator"), person("ida", "importer", kind="service")
STRANGER = person("agent-8", "agent", kind="agent")

ACTION = Action(tool="refund", arguments={"invoice": 9, "amount": "12.50"})
EXPIRES_AT = stamp(later(NOW, days=1))
APPROVED_UNTIL = stamp(later(NOW, seconds=900))
OUTCOME_BY = stamp(later(NOW, seconds=300))


def before(time: str) -> str:
    """The last instant before it."""
    return stamp(later(time, microseconds=-1))


# Commands


def ask(**fields: Any) -> RequestApproval:
    question: dict[str, Any] = {"action": ACTION, "approval_id": APPROVAL}
    return RequestApproval(**question | fields)


def vote(verdict: Any = "approve", *, on: ApprovalRequested | None = None, **fields: Any) -> CastVote:
    """A vote by someone who has seen ASKED, or the question `on`."""
    said: dict[str, Any] = {"approval_id": APPROVAL, "digest_seen": (on or ASKED).request_digest}
    return CastVote(verdict=verdict, **said | fields)


def begin(execution_id: UUID = EXECUTION, **fields: Any) -> BeginUse:
    approved: dict[str, Any] = {"approval_id": APPROVAL, "action": ACTION}
    return BeginUse(execution_id=execution_id, **approved | fields)


def tell(outcome: Any = "ok", execution_id: UUID = EXECUTION, **fields: Any) -> RecordOutcome:
    return RecordOutcome(approval_id=APPROVAL, execution_id=execution_id, outcome=outcome, **fields)


# Facts


def asked(*history: Fact | On, who: Actor = AGENT, **fields: Any) -> ApprovalRequested:
    """What asking so makes after this history; its digests are of the question and the approval's id alone."""
    fact = given(*history).when(ask(**fields), who).events[-1].data
    assert isinstance(fact, ApprovalRequested)
    return fact


def voted(who: Actor, verdict: Any = "approve", **fields: Any) -> By:
    return by(who, VoteCast(verdict=verdict, digest_seen=ASKED.request_digest, **fields))


def begun(execution_id: UUID, outcome_by: str = OUTCOME_BY) -> ApprovalUseBegun:
    return ApprovalUseBegun(execution_id=execution_id, outcome_by=outcome_by)


def used(execution_id: UUID, outcome: Any = "ok") -> ApprovalUseCompleted:
    return ApprovalUseCompleted(execution_id=execution_id, outcome=outcome)


ASKED = asked()
GRANTED = ApprovalGranted(approved_until=APPROVED_UNTIL)
BEGUN, USED = begun(EXECUTION), used(EXECUTION)
UNKNOWN = ApprovalOutcomeUnknown(execution_id=EXECUTION, deadline=OUTCOME_BY)
EXPIRED, LAPSED = ApprovalExpired(deadline=EXPIRES_AT), ApprovalLapsed(approved_until=APPROVED_UNTIL)

APPROVED = (voted(ANA), GRANTED)
STATES: dict[str, tuple[Fact | By, ...]] = {
    "pending": (ASKED,),
    "approved": (ASKED, *APPROVED),
    "denied": (ASKED, voted(ANA, "deny"), ApprovalDenied()),
    "expired": (ASKED, EXPIRED),
    "withdrawn": (ASKED, ApprovalWithdrawn()),
    "cancelled": (ASKED, ApprovalCancelled(cause="operator")),
    "superseded": (ASKED, ApprovalSuperseded(by=ANOTHER)),
    "executing": (ASKED, *APPROVED, BEGUN),
    "executed": (ASKED, *APPROVED, BEGUN, USED),
    "lapsed": (ASKED, *APPROVED, LAPSED),
    "revoked": (ASKED, *APPROVED, ApprovalRevoked()),
}


def approval(*facts: Fact | By, now: str = NOW) -> Given:
    """A ledger of nothing but one approval with this history, its question ASKED unless it is another."""
    begins = facts and isinstance(facts[0], ApprovalRequested)
    return given(on(APPROVAL, *(facts if begins else (ASKED, *facts))), now=now)


def history_of(state: str, now: str = NOW) -> Given:
    return approval(*STATES[state], now=now)
