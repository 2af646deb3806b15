"""Approvals over HTTP: asking, deciding, using what was approved; reading all that, and the keys of use tokens."""

from typing import Annotated, Any
from uuid import UUID

import msgspec
from litestar import Request, route
from litestar.types import Receive
from msgspec import UNSET, Meta, Struct, UnsetType

from api import resources
from api.commands import Asking, commanding, submit
from api.headers import agree
from api.http import READ, Answer, Call, Operation, encode
from api.reading import (
    SEEN,
    DatedListing,
    Single,
    SingleHeaders,
    as_of,
    dated,
    fresh,
    given,
    knows,
    or_none,
    reading,
    seen,
    single,
)
from api.use_tokens import KeySet
from ledger import errors
from ledger.approval_state import Approval, State
from ledger.commands import (
    BeginUse,
    CancelApproval,
    CastVote,
    EditApproval,
    Moment,
    PresentApproval,
    RecordOutcome,
    RequestApproval,
    RevokeApproval,
    WithdrawApproval,
    WithdrawVote,
)
from ledger.postgres import Connection
from ledger.receipt import Receipt
from ledger.values import Line, Risk
from projections import approvals

ONE = "/approvals/{approval_id:str}"

# Using


class UseOutcome(RecordOutcome, kw_only=True, tag="RecordOutcome"):
    """Say what came of an execution.

    After its time it is added to the record, and changes no state."""

    execution_id: UUID | UnsetType = UNSET  # type: ignore[assignment]


async def _record_outcome(call: Call, asking: Asking, receive: Receive) -> Receipt:
    agree(asking.command, "execution_id", call.path_id("execution_id", "execution"), "the path")
    command = RecordOutcome(**msgspec.structs.asdict(asking.command))
    return await submit(call, asking._replace(command=command), receive)


KEYS = Operation(
    tag="approvals",
    name="get_keys",
    doc="""The keys that use tokens are checked with (RFC 7517).

    A use token is a JWT of the type `muniment-use+jwt`; `jti` is the id of the execution that it is for.""",
    answers={200: {"application/jwk-set+json": KeySet}},
    refusals=(errors.StoreUnavailable,),
    open=True,
)


@route("/.well-known/jwks.json", http_method=READ, name=KEYS.name, opt={"operation": KEYS})
async def get_keys(request: Request[Any, Any, Any]) -> Answer:
    return await Call(request.scope).answer(_keys)


async def _keys(call: Call) -> Answer:
    caching = [(b"cache-control", b"public, max-age=300")]
    return Answer(200, encode(await call.api.signer.keys()), caching, b"application/jwk-set+json")


# Reading


class ApprovalQuery(DatedListing, kw_only=True, forbid_unknown_fields=True):
    """Which approvals, and which part of the list."""

    state: State | UnsetType = UNSET
    session_id: UUID | UnsetType = UNSET
    task_id: UUID | UnsetType = UNSET
    tool: Annotated[Line, Meta(description="The tool of the action.")] | UnsetType = UNSET
    risk: Risk | UnsetType = UNSET
    role: Annotated[Line, Meta(description="One of those that may decide it; of what is pending.")] | UnsetType = UNSET
    requester: Annotated[Line, Meta(description="`sub` or `issuer#sub`.")] | UnsetType = UNSET
    expires_before: Moment | UnsetType = UNSET
    order: Annotated[
        approvals.Order,
        Meta(description="As they were requested; or of those that are pending the riskiest, or most urgent, first."),
    ] = "desc"


class ApprovalPage(Struct, kw_only=True):
    """A part of a list of approvals; `next` leads on."""

    approvals: list[Approval]
    next: str | None


async def _no_approvals(call: Call, query: ApprovalQuery) -> Answer:
    return Answer(200, encode({"approvals": [], "next": None}))


@reading(
    "/approvals",
    tag="approvals",
    query=ApprovalQuery,
    answers={200: ApprovalPage},
    sends=SEEN,
    empty=_no_approvals,
)
async def list_approvals(call: Call, query: ApprovalQuery) -> Answer:
    """Approvals, the last requested first unless `order` says otherwise."""
    part: dict[str, Any] = {"limit": query.limit, "after": or_none(query.after), "order": query.order}
    wanted = given(query, approvals.Filter)
    assert call.ledger_id is not None
    if (then := await as_of(call, query)) is not None:
        at = await knows(call, "approvals", then)
        headers, reached = dated(at, then), at.position
        async with call.connection() as connection:
            page = await approvals.search_past(connection, call.ledger_id, then, wanted, reached=reached, **part)
    else:
        headers = seen(await fresh(call, "approvals", query))
        async with call.connection() as connection:
            page = await approvals.search(connection, call.ledger_id, wanted, **part)
    shown = await resources.reveal(call.api.vault, call.caller.project_id, page.approvals)
    for item, approval in zip(shown, page.approvals, strict=True):
        item["seconds_left"] = resources.seconds_left(approval, then and then.at)
    answer = {"approvals": shown, "next": None if page.next is None else str(page.next)}
    return Answer(200, encode(answer), headers)


@reading(
    ONE,
    tag="approvals",
    query=Single,
    headers=SingleHeaders,
    answers={200: Approval, 304: None},
    sends=("Ledger-Position", "ETag"),
)
async def get_approval(call: Call, query: Single) -> Answer:
    """One approval, as it is now or was.

    Who waits for the decision asks with If-None-Match and `wait_seconds`, and is answered as soon as it changes."""

    then = await as_of(call, query)

    async def beside(_: Connection, approval: Approval) -> dict[str, Any]:
        return {"seconds_left": resources.seconds_left(approval, then and then.at)}

    return await single(call, query, "approval", approvals.get, beside, then)


ROUTES = [
    commanding("POST", "/approvals", RequestApproval, answers={201: Approval, 200: Approval}),
    list_approvals,
    get_approval,
    commanding("POST", f"{ONE}/presentations", PresentApproval, "approval_id"),
    commanding("POST", f"{ONE}/votes", CastVote, "approval_id"),
    commanding("DELETE", f"{ONE}/votes/mine", WithdrawVote, "approval_id"),
    commanding("POST", f"{ONE}/edit", EditApproval, "approval_id"),
    commanding("POST", f"{ONE}/withdraw", WithdrawApproval, "approval_id"),
    commanding("POST", f"{ONE}/cancel", CancelApproval, "approval_id"),
    commanding("POST", f"{ONE}/revoke", RevokeApproval, "approval_id"),
    commanding("POST", f"{ONE}/uses", BeginUse, "approval_id"),
    commanding("POST", f"{ONE}/uses/{{execution_id:str}}/outcome", UseOutcome, "approval_id", submit=_record_outcome),
    get_keys,
]
