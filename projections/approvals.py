"""The view `approvals`: every approval as it is now; above all those that wait for people, by what is urgent.

When an approval's time runs out, and what that means, is asked of its rules and kept beside it.
"""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import msgspec
from msgspec import Struct

from ledger import approval as rules
from ledger.approval import Approval
from ledger.entry import Recorded
from ledger.errors import MalformedRequest
from ledger.past import Past
from ledger.postgres import Connection, bigints, byteas, queries, smallints, texts, timestamptzs, uuids
from ledger.system import Overdue
from ledger.values import Risk, Stamp, moment
from projections import spans
from projections.projector import Memory
from projections.states import States, column

SQL = queries("projections", "approvals")
WRITE = SQL.write + b", " + spans.write("approvals", "approval")
VERSION = 2

Order = Literal["asc", "desc", "risk", "expires_at"]
"""`asc`: as they were requested; `risk`: the riskiest first, then as requested; `expires_at`: the most urgent first."""

RISKS: tuple[Risk, ...] = ("critical", "high", "medium", "low")

_OPEN = ("pending", "approved", "executing")
_approvals = States("approval", Approval, rules.evolve, lambda approval: approval.state in _OPEN, SQL)
get = _approvals.get


class Filter(Struct, kw_only=True, frozen=True):
    """Which approvals: all that is given must hold. `role` is one of those that may decide it, `requester` is `sub`
    or `issuer#sub`; `role` and `expires_before` are of what is pending."""

    state: str | None = None
    session_id: UUID | None = None
    task_id: UUID | None = None
    tool: str | None = None
    risk: Risk | None = None
    role: str | None = None
    requester: str | None = None
    expires_before: datetime | None = None


class Page(Struct, kw_only=True, frozen=True):
    """A part of a list; `next` is the position to go on after, if there is more."""

    approvals: list[Approval]
    next: int | None


async def project(
    connection: Connection, ledger_id: UUID, batch: Sequence[Recorded], memory: Memory
) -> dict[str, bytes]:
    """What brings the view from just before `batch` to just after it: the values of WRITE."""
    kept = await _approvals.after(connection, ledger_id, batch, memory)
    if not kept:
        return {}
    approvals = [one.state for one in kept.values()]
    next_due = [rules.next_due(approval) for approval in approvals]
    return {
        "approval_ids": uuids(kept),
        "approval_positions": bigints(one.position for one in kept.values()),
        "approval_states": texts(approval.state for approval in approvals),
        "approval_sinces": bigints(one.since for one in kept.values()),
        "approval_session_ids": uuids(approval.session_id for approval in approvals),
        "approval_task_ids": uuids(approval.task_id for approval in approvals),
        "approval_tools": texts(column(approval.action["tool"]) for approval in approvals),
        "approval_risks": smallints(RISKS.index(approval.risk) for approval in approvals),
        "approval_roles": texts("\n".join(map(column, approval.quorum.roles)) for approval in approvals),
        "approval_issuers": texts(column(approval.requester.issuer) for approval in approvals),
        "approval_subs": texts(column(approval.requester.sub) for approval in approvals),
        "approval_expires_ats": timestamptzs(moment(approval.expires_at) for approval in approvals),
        "approval_due_ats": timestamptzs(moment(due.deadline) if due else None for due in next_due),
        "approvals": byteas(one.content for one in kept.values()),
        **spans.columns("approval", (span for one in kept.values() for span in one.spans)),
    }


async def search(
    connection: Connection,
    ledger_id: UUID,
    wanted: Filter,
    *,
    limit: int,
    after: int | None = None,
    order: Order = "desc",
) -> Page:
    """Up to `limit` approvals beyond the one at the position `after`. By urgency, by who may decide it and by when it
    expires only what is pending is listed: else it is nobody's turn.

    Raises MalformedRequest where another state is asked for with one of these.
    """
    wanted, filters, values = _asked_for(wanted, order)
    parts = [SQL.list, *_in_state(wanted.state), *filters]
    if after is not None:
        parts.append(getattr(SQL, f"after_{order}"))
        values["after"] = after
    parts.append(getattr(SQL, f"by_{order}"))
    approvals, following = await _approvals.page(connection, parts, values | {"ledger_id": ledger_id}, limit)
    return Page(approvals=approvals, next=following)


async def search_past(
    connection: Connection,
    ledger_id: UUID,
    past: Past,
    wanted: Filter,
    *,
    limit: int,
    after: int | None = None,
    order: Order = "desc",
    reached: int,
) -> Page:
    """The same, as of `past`; the view has `reached` that position. Raises as `search`."""
    wanted, filters, values = _asked_for(wanted, order)
    approvals, following = await _approvals.past_page(
        connection,
        ledger_id,
        past,
        lambda going_on: _past_list(wanted, filters, order, going_on),
        values | {"classes": reached.bit_length()},
        limit=limit,
        after=after,
        holds=lambda approval: wanted.state in (None, approval.state),
    )
    return Page(approvals=approvals, next=following)


def _past_list(wanted: Filter, filters: list[bytes], order: Order, going_on: bool) -> bytes:
    """What there was: in any state; of a few, what may have been in one; in one since before, or in a span of it."""
    in_order: bytes = getattr(SQL, f"by_{order}")
    end = [*([getattr(SQL, f"after_{order}")] if going_on else []), in_order]
    if wanted.state is None:
        return b"\n".join([SQL.then, *filters, *end])
    if wanted.session_id is not None or wanted.task_id is not None:
        return b"\n".join([SQL.then, SQL.perhaps_then, *filters, *end])
    since = [SQL.then, *_in_state(wanted.state), SQL.since_then]
    if order in ("asc", "desc"):
        of = [SQL.then_of.replace(b"{filters}", b"\n".join(filters))] if filters else []
        return spans.united([*since, *filters, *end], spans.part("approvals", of, order, going_on)) + b"\n" + in_order
    listed = spans.united(since, spans.whole("approvals"))
    return b"\n".join([SQL.then_sorted.replace(b"{list}", listed), *filters, *end])


async def waited_on(
    connection: Connection, ledger_id: UUID, past: Past, session_ids: Collection[UUID]
) -> dict[UUID, list[UUID]]:
    """The approvals that each of these sessions waited on; the view has reached that position. Sessions that waited on
    none are not named."""
    values = {"ledger_id": ledger_id, "session_ids": uuids(session_ids), "as_of": past.position}
    cursor = await connection.execute(SQL.perhaps_pending, values, prepare=True, binary=True)
    found = sorted([approval_id for (approval_id,) in await cursor.fetchall()])
    waited_on: dict[UUID, list[UUID]] = {}
    for approval in await _approvals.as_of(connection, ledger_id, found, past.position):
        if approval.state == "pending" and approval.session_id is not None:
            waited_on.setdefault(approval.session_id, []).append(approval.approval_id)
    return waited_on


def _asked_for(wanted: Filter, order: Order) -> tuple[Filter, list[bytes], dict[str, Any]]:
    """What is asked for, the parts of a query that say so, but for the state, and the values of all of it."""
    of_pending = {"order": order not in ("asc", "desc"), "role": wanted.role, "expires_before": wanted.expires_before}
    if said := [name for name, value in of_pending.items() if value]:
        if wanted.state not in (None, "pending"):
            detail = f"with this only what is pending can be listed, not what is {wanted.state}"
            raise MalformedRequest([{"pointer": name, "detail": detail} for name in said])
        wanted = msgspec.structs.replace(wanted, state="pending")
    values = {name: value for name, value in msgspec.structs.asdict(wanted).items() if value is not None}
    among_pending = ("tool", "requester") if wanted.state == "pending" else ()
    parts = [getattr(SQL, f"pending_{name}" if name in among_pending else name) for name in values if name != "state"]
    if wanted.risk is not None:
        values["risk"] = RISKS.index(wanted.risk)
    if wanted.requester is not None:
        # An issuer has no `#` (OpenID Connect Discovery s3), so what stands before the first one is it.
        issuer, separator, sub = wanted.requester.partition("#")
        values["requester"] = sub if separator else issuer
        if separator:
            parts.append(SQL.issuer)
            values["issuer"] = issuer
    return wanted, parts, values


def _in_state(state: str | None) -> list[bytes]:
    return [] if state is None else [SQL.pending if state == "pending" else SQL.state]


class _Asked(Struct):
    requested_at: Stamp


_asked = msgspec.json.Decoder(_Asked)


async def waits(connection: Connection, limit: int) -> list[float]:
    """How long in seconds each pending approval of any project has waited for people, of up to `limit` of them."""
    cursor = await connection.execute(SQL.waiting, {"limit": limit}, prepare=True, binary=True)
    return [
        (now - moment(_asked.decode(content).requested_at)).total_seconds() for content, now in await cursor.fetchall()
    ]


async def due(connection: Connection, limit: int) -> list[Overdue]:
    """Up to `limit` approvals of any project whose time has run out, the longest overdue first."""
    cursor = await connection.execute(SQL.due, {"limit": limit}, prepare=True, binary=True)
    found = [
        (project_id, rules.next_due(_approvals.decode(content))) for project_id, content in await cursor.fetchall()
    ]
    return [Overdue(project_id, command) for project_id, command in found if command is not None]
