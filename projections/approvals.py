"""The view `approvals`: every approval as it is now; above all those that wait for people, by what is urgent.

When an approval's time runs out, and what that means, is asked of its rules and kept beside it.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Literal
from uuid import UUID

import msgspec
from msgspec import Struct

from ledger import approval as rules
from ledger.approval import Approval
from ledger.entry import Recorded
from ledger.errors import MalformedRequest
from ledger.postgres import Connection, bigints, byteas, queries, smallints, texts, timestamptzs, uuids
from ledger.system import Overdue
from ledger.values import Risk, Stamp, moment
from projections.projector import Memory
from projections.states import States, column

SQL = queries("projections", "approvals")
WRITE = SQL.write

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
    of_pending = {"order": order not in ("asc", "desc"), "role": wanted.role, "expires_before": wanted.expires_before}
    if said := [name for name, value in of_pending.items() if value]:
        if wanted.state not in (None, "pending"):
            detail = f"with this only what is pending can be listed, not what is {wanted.state}"
            raise MalformedRequest([{"pointer": name, "detail": detail} for name in said])
        wanted = msgspec.structs.replace(wanted, state="pending")
    values = {name: value for name, value in msgspec.structs.asdict(wanted).items() if value is not None}
    if wanted.state == "pending":
        values["pending"] = values.pop("state")
    parts = [SQL.list, *(getattr(SQL, name) for name in values)]
    if wanted.risk is not None:
        values["risk"] = RISKS.index(wanted.risk)
    if wanted.requester is not None:
        # An issuer has no `#` (OpenID Connect Discovery s3), so what stands before the first one is it.
        issuer, separator, sub = wanted.requester.partition("#")
        values["requester"] = sub if separator else issuer
        if separator:
            parts.append(SQL.issuer)
            values["issuer"] = issuer
    if after is not None:
        parts.append(getattr(SQL, f"after_{order}"))
        values["after"] = after
    parts.append(getattr(SQL, f"by_{order}"))
    approvals, following = await _approvals.page(connection, parts, values | {"ledger_id": ledger_id}, limit)
    return Page(approvals=approvals, next=following)


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
