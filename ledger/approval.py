"""The rules of an approval: people say whether one exact action may run, and it runs no more often than they said.

Who asked never decides, nor whoever it was asked for; a timeout is never a yes; what runs is compared once more with
what was approved. Imported history is voted on by its importers alone, and is never used. Pure: no clock, no I/O.
`approval_state.py` has the states, `commitment.py` the digests: personal values are looked at there and nowhere else.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple
from uuid import UUID, uuid5

import msgspec
from msgspec import UNSET

from ledger import commitment, session, task  # a task waits for its approval: the two modules know each other
from ledger.approval_state import Approval, State, decision, due, evolve, item, next_due
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
from ledger.errors import (
    AlreadyExists,
    AlreadyVoted,
    DigestMismatch,
    ExecutionStarted,
    Forbidden,
    InvalidTransition,
    MalformedRequest,
    NotEligible,
    NotFound,
    NotUsable,
    RequestExpired,
    SelfApprovalForbidden,
    SessionFull,
    UsesExhausted,
)
from ledger.events import (
    ApprovalCancelled,
    ApprovalDenied,
    ApprovalExpired,
    ApprovalGranted,
    ApprovalLapsed,
    ApprovalOutcomeUnknown,
    ApprovalPresented,
    ApprovalRequested,
    ApprovalRevoked,
    ApprovalSuperseded,
    ApprovalUseBegun,
    ApprovalUseCompleted,
    ApprovalWithdrawn,
    Fact,
    OutcomeReconciled,
    VoteCast,
    VoteWithdrawn,
)
from ledger.personal import PERSONAL
from ledger.queue import OPEN_ITEMS_MAX, On, Same, World
from ledger.system import EndApproval, ExpireApproval, LapseApproval, MissOutcome
from ledger.values import Actor, Principal, Stamp, moment, stamp

__all__ = ["Approval", "decide", "decision", "due", "evolve", "item", "next_due"]

ALLOWED: dict[str, tuple[str, ...]] = {
    "pending": ("approved", "denied", "withdrawn", "cancelled", "superseded"),
    "approved": ("executing", "revoked"),
    "executing": ("executed",),
}
"""What a caller may turn each state into. Only the system expires and lapses."""

EXPIRES_SECONDS = 86_400
OUTSIDE = UUID("0199a9f4-6b1e-5d2c-8a57-3c1f0e9b7d46")
"""The namespace of what a principal has open outside of any session and task. Frozen: it names where that is kept."""


# What becomes of a command


def decide(approval: Approval | None, command: Command, world: World) -> Sequence[Fact | On]:
    """The facts that `command` makes of `approval`; none if it changes nothing. Raises its refusal, or `Same`."""
    if isinstance(command, RequestApproval):
        return [_request(approval, command, world)]
    if approval is None:
        raise NotFound(what="approval", id=command.target)
    match command:
        case PresentApproval():
            _require(approval, command, "pending")
            return [ApprovalPresented(channel=command.channel)]
        case CastVote():
            return _vote(approval, command, world)
        case WithdrawVote():
            return _withdraw_vote(approval, command, world)
        case EditApproval():
            return _edit(approval, command, world)
        case BeginUse():
            return _begin(approval, command, world)
        case RecordOutcome():
            return _outcome(approval, command, world)
        case WithdrawApproval() | CancelApproval() | RevokeApproval():
            return [_end(approval, command, world)]
        case _:
            return _follow(approval, command, world)


def _follow(approval: Approval, command: Command, world: World) -> list[Fact]:
    """What the system's own commands make of it; nothing if they come too early or too late."""
    if isinstance(command, EndApproval):
        return [ApprovalCancelled(cause=command.cause)] if approval.state == "pending" else []
    if command != due(approval, world.now):
        return []
    match command:
        case ExpireApproval():
            return [ApprovalExpired(deadline=command.deadline)]
        case LapseApproval():
            return [ApprovalLapsed(approved_until=command.deadline)]
        case MissOutcome():
            execution_id = approval.executions[-1].execution_id
            return [ApprovalOutcomeUnknown(execution_id=execution_id, deadline=command.deadline)]
        case _:
            raise TypeError(f"{type(command).__name__} is not an approval's command")


# Asking


class _Home(NamedTuple):
    """Where a request belongs: the session and the root session of its events, and what it is open under."""

    session_id: UUID | None
    root_session_id: UUID | None
    root: UUID


def _request(approval: Approval | None, command: RequestApproval, world: World) -> ApprovalRequested:
    actor = world.actor
    needed = "importer" if command.imported else "agent"
    if needed not in actor.roles:
        raise Forbidden(action="RequestApproval", needed=[needed], roles=list(actor.roles))
    home = _home(command, world)
    expires_at = stamp(command.expires_at) if command.expires_at else _after(world.now, EXPIRES_SECONDS)
    if expires_at <= world.now and not command.imported:
        raise MalformedRequest([{"pointer": "/expires_at", "detail": "it is not in the future"}])
    asked = _asked(
        command,
        command,
        world,
        world.target,
        home,
        expires_at=expires_at,
        requester=Principal.of(actor),
        on_behalf_of=actor.on_behalf_of,
        imported=command.imported,
    )
    open_items = world.open_items(home.root)
    for other in open_items.values():
        if asked.match is not None and other.match == bytes.fromhex(asked.match):
            _answer_with(world.stream(other.item_id), asked, world.now)
    if approval is not None:
        raise AlreadyExists(what="approval", id=approval.approval_id)
    if len(open_items) >= OPEN_ITEMS_MAX:
        raise SessionFull(id=home.root, limit=OPEN_ITEMS_MAX)
    return asked


def _answer_with(other: Approval, asked: ApprovalRequested, now: Stamp) -> None:
    """Raises Same where `other` is open for the same people: whoever may not vote on the one may not on the other."""
    is_open = other.state in ("pending", "approved") and due(other, now) is None
    if is_open and (other.requester, other.on_behalf_of) == (asked.requester, asked.on_behalf_of):
        raise Same(other.approval_id)


def _home(command: RequestApproval, world: World) -> _Home:
    """It is open under the session it is asked in, or that of its task; else under the task, or the requester."""
    session_id = root_session_id = None
    if command.session_id is not None:
        within = world.stream(command.session_id)
        if not isinstance(within, session.Session):
            raise NotFound(what="session", id=command.session_id)
        if within.state in session.TERMINAL and not command.imported:
            raise _impossible(command, within.session_id, within.state)
        session_id, root_session_id = within.session_id, within.root_session_id
    if command.task_id is None:
        return _Home(session_id, root_session_id, root_session_id or uuid5(OUTSIDE, world.actor.principal))
    of = world.stream(command.task_id)
    if not isinstance(of, task.Task):
        raise NotFound(what="task", id=command.task_id)
    if of.state not in task.OPEN and not command.imported:
        raise _impossible(command, of.task_id, of.state)
    if session_id is None:
        session_id, root_session_id = of.session_id, of.root_session_id
    return _Home(session_id, root_session_id, root_session_id or of.task_id)


def _asked(
    asks: RequestApproval | EditApproval,
    terms: "RequestApproval | Approval",
    world: World,
    approval_id: UUID,
    home: _Home,
    *,
    expires_at: Stamp,
    **who: Any,
) -> ApprovalRequested:
    """The question that `asks` puts, on these terms, with the two commitments to it."""
    subjects: list[str] = []
    shown = {name: msgspec.to_builtins(getattr(asks, name)) for name in ("action", "summary", "reason")}
    seen = {name: commitment.plain(part, subjects) for name, part in shown.items()}
    seen |= {"risk": terms.risk, "quorum": msgspec.to_builtins(terms.quorum), "expires_at": expires_at}
    salts = {of: commitment.salt(of, approval_id, world).hex() for of in ("action", "request")}
    match = None
    if terms.call_key is not None and not who.get("imported"):
        match = commitment.match(home.session_id, terms.call_key, asks.action, world).hex()
    return ApprovalRequested(
        action=shown["action"],
        summary=shown["summary"],
        risk=terms.risk,
        quorum=terms.quorum,
        expires_at=expires_at,
        valid_for_seconds=terms.valid_for_seconds,
        uses=terms.uses,
        outcome_within_seconds=terms.outcome_within_seconds,
        action_digest=commitment.action_digest(asks.action, approval_id, world),
        request_digest=commitment.digest(commitment.salt("request", approval_id, world), seen),
        # Erasing a person has to take along what a guess at their values could be checked with.
        salts={PERSONAL: {"subject": subjects[0], "value": salts}} if subjects else salts,
        task_id=terms.task_id,
        call_key=terms.call_key,
        root=None if home.root == home.root_session_id else home.root,
        match=match,
        **who,
    )


def _edit(approval: Approval, command: EditApproval, world: World) -> list[Fact | On]:
    """Who asked stays who asked; what was said of the old action is not said of the new one."""
    if approval.imported:
        raise NotUsable(id=approval.approval_id)
    _require(approval, command, "pending")
    new = command.new_approval_id
    if new is UNSET:
        new = world.mint("approval")
    elif world.stream(new) is not None:
        raise AlreadyExists(what="approval", id=new)
    asked = _asked(
        command,
        approval,
        world,
        new,
        _Home(approval.session_id, approval.root_session_id, approval.root),
        expires_at=approval.expires_at,
        requester=approval.requester,
        on_behalf_of=approval.on_behalf_of,
        supersedes=approval.approval_id,
        edited_by=Principal.of(world.actor),
    )
    return [ApprovalSuperseded(by=new), On(new, asked)]


# Deciding


def _vote(approval: Approval, command: CastVote, world: World) -> list[Fact]:
    voter = _voter(approval, command, world.actor)
    if approval.state == "expired":
        raise RequestExpired(id=approval.approval_id, deadline=approval.expires_at)
    mine = next((vote.verdict for vote in approval.votes if vote.voter == voter), None)
    if mine != command.verdict:
        _require(approval, command, "pending")
    seen = command.digest_seen
    if seen != approval.request_digest and not (approval.imported and seen is None):
        raise DigestMismatch(
            id=approval.approval_id, what="request_digest", expected=approval.request_digest, sent=seen or "none"
        )
    if mine == command.verdict:
        return []
    if mine is not None:
        raise AlreadyVoted(id=approval.approval_id, verdict=mine)
    cast = VoteCast(verdict=command.verdict, digest_seen=seen, reason=command.reason, voter=command.voter)
    verdicts = [vote.verdict for vote in approval.votes] + [command.verdict]
    # A no weighs first: what was denied by as many as it takes is denied, however many approved.
    if verdicts.count("deny") >= approval.quorum.deny:
        return [cast, ApprovalDenied()]
    if verdicts.count("approve") >= approval.quorum.approve:
        return [cast, ApprovalGranted(approved_until=_after(world.now, approval.valid_for_seconds))]
    return [cast]


def _voter(approval: Approval, command: CastVote, actor: Actor) -> Principal:
    """Whose vote it is. Raises where that person may not vote, or the actor not for them."""
    if (command.voter is not None) != approval.imported or (approval.imported and "importer" not in actor.roles):
        raise _not_eligible(approval, "An importer says how others voted, on imported history and nowhere else")
    if command.voter is not None:
        voters = {voter := Principal.of(command.voter)}
    else:
        voters = {voter := Principal.of(actor), *actor.on_behalf_of}
    if not voters.isdisjoint(approval.askers):
        raise SelfApprovalForbidden(id=approval.approval_id, sub=voter.sub)
    if approval.barred_editor in voters:
        raise _not_eligible(approval, "Whoever edited it votes only where one approval is enough")
    if command.voter is None:
        if actor.kind != "human" or actor.assurance != "authenticated":
            raise _not_eligible(approval, "Only a person who is authenticated votes")
        _require_role(approval, actor)
    return voter


def _withdraw_vote(approval: Approval, command: WithdrawVote, world: World) -> list[Fact]:
    me = Principal.of(world.actor)
    if all(vote.voter != me for vote in approval.votes):
        _require_role(approval, world.actor)  # or the answer would show it to whoever may not read it
        return []
    if approval.imported:
        raise _not_eligible(approval, "How people voted then is history")
    _require(approval, command, "pending")
    return [VoteWithdrawn()]


def _end(
    approval: Approval, command: WithdrawApproval | CancelApproval | RevokeApproval, world: World
) -> ApprovalWithdrawn | ApprovalCancelled | ApprovalRevoked:
    if isinstance(command, RevokeApproval):
        if approval.imported:
            raise NotUsable(id=approval.approval_id)
        _require_no_execution(approval)
        _require(approval, command, "approved")
        return ApprovalRevoked(reason=command.reason)
    if isinstance(command, WithdrawApproval):
        _require_requester(approval, command, world.actor)
        _require(approval, command, "pending")
        return ApprovalWithdrawn(reason=command.reason)
    _require(approval, command, "pending")
    return ApprovalCancelled(cause="operator", reason=command.reason)


# Using


def _begin(approval: Approval, command: BeginUse, world: World) -> list[Fact]:
    if approval.imported:
        raise NotUsable(id=approval.approval_id)
    _require_requester(approval, command, world.actor)
    begun = approval.execution is not None and approval.execution.execution_id == command.execution_id
    if not begun:
        _require_usable(approval, command)
    if commitment.action_digest(command.action, approval.approval_id, world) != approval.action_digest:
        # The digest of what was sent is not told: it may hold personal values, and the salt be open.
        raise DigestMismatch(
            id=approval.approval_id, what="action_digest", expected=approval.action_digest, sent="another action"
        )
    if begun:
        return []
    outcome_by = _after(world.now, approval.outcome_within_seconds)
    return [ApprovalUseBegun(execution_id=command.execution_id, outcome_by=outcome_by, audience=command.audience)]


def _require_usable(approval: Approval, command: BeginUse) -> None:
    """That one more execution may begin now. Time that has run out has been seen to before."""
    _require_no_execution(approval)
    if any(past.execution_id == command.execution_id for past in approval.executions):
        raise AlreadyExists(what="execution", id=command.execution_id)
    if approval.state == "executed" and not approval.uses_left:
        raise UsesExhausted(id=approval.approval_id, uses=approval.uses)
    if approval.state in ("executed", "lapsed"):
        raise RequestExpired(id=approval.approval_id, deadline=approval.approved_until)
    if approval.state == "expired":
        raise RequestExpired(id=approval.approval_id, deadline=approval.expires_at)
    _require(approval, command, "approved")


def _outcome(approval: Approval, command: RecordOutcome, world: World) -> list[Fact]:
    _require_requester(approval, command, world.actor)
    told = {"execution_id": command.execution_id, "outcome": command.outcome, "result": command.result}
    for execution in approval.executions:
        if execution.execution_id == command.execution_id:
            if execution.outcome is None:
                return [ApprovalUseCompleted(**told)]
            if execution.outcome == "unknown":
                return [OutcomeReconciled(**told)]
            if execution.outcome == command.outcome:
                return []
            raise _impossible(command, approval.approval_id, approval.state)
    raise NotFound(what="execution", id=command.execution_id)


def _require(approval: Approval, command: Command, state: State) -> None:
    if approval.state != state:
        raise _impossible(command, approval.approval_id, approval.state, ALLOWED.get(approval.state, ()))


def _require_role(approval: Approval, actor: Actor) -> None:
    if set(approval.quorum.roles).isdisjoint(actor.roles):
        raise _not_eligible(approval, "You have none of the roles that it takes")


def _require_requester(approval: Approval, command: Command, actor: Actor) -> None:
    if Principal.of(actor) != approval.requester:
        who = f"the requester of {approval.approval_id}"
        raise Forbidden(action=type(command).__name__, needed=[who], roles=list(actor.roles))


def _not_eligible(approval: Approval, why: str) -> NotEligible:
    return NotEligible(why=why, id=approval.approval_id, roles=approval.quorum.roles)


def _require_no_execution(approval: Approval) -> None:
    if approval.execution is not None:
        raise ExecutionStarted(id=approval.approval_id, execution_id=approval.execution.execution_id)


def _impossible(command: Command, of: UUID, state: str, allowed: tuple[str, ...] = ()) -> InvalidTransition:
    return InvalidTransition(command=type(command).__name__, id=of, current_state=state, allowed=allowed)


def _after(now: Stamp, seconds: int) -> Stamp:
    return stamp(moment(now) + timedelta(seconds=seconds))
