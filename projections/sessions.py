"""The view `sessions`: every session as it is now, to be listed by state, role, label and time.

A session here is what `ledger.session.evolve` makes of its events, and nothing else: the rules and the view
cannot differ. Its bytes are kept as they are; the columns beside them are only for finding. Personal values
stay sealed.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
from msgspec import Struct

from ledger.entry import Recorded
from ledger.errors import MalformedRequest
from ledger.past import Past
from ledger.postgres import Connection, bigints, byteas, queries, texts, uuids
from ledger.session import TERMINAL, Session, evolve
from ledger.system import ExpireSession, Overdue
from ledger.values import moment, stamp
from projections import spans
from projections.projector import Memory
from projections.states import Kept, States, column

SQL = queries("projections", "sessions")
WRITE = SQL.write + b", " + spans.write("sessions", "session")
VERSION = 2

TOTAL_MAX = 10_000
"""How far a list is counted, and how deep its numbered pages go; beyond, `after` leads on."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_sessions = States("session", Session, evolve, lambda session: session.state not in TERMINAL, SQL)
get = _sessions.get


class Filter(Struct, kw_only=True, frozen=True):
    """Which sessions: all that is given must hold. `label` is `key=value` or `key:value`."""

    state: str | None = None
    agent_role: str | None = None
    label: str | None = None
    since: datetime | None = None
    until: datetime | None = None


class Page(Struct, kw_only=True, frozen=True):
    """A part of a list, newest first; `next` is the cursor that leads on, if there is more."""

    sessions: list[Session]
    total: int
    total_is_exact: bool
    next: str | None


async def project(
    connection: Connection, ledger_id: UUID, batch: Sequence[Recorded], memory: Memory
) -> dict[str, bytes]:
    """What brings the view from just before `batch` to just after it: the values of WRITE."""
    kept = await _sessions.after(connection, ledger_id, batch, memory)
    if not kept:
        return {}
    moved = [one for one in kept.values() if one.before is None or one.before.state != one.state.state]
    ended = spans.columns("session", (span for one in kept.values() for span in one.spans))
    return _session_rows(kept) | _label_rows(moved) | ended


def _session_rows(kept: dict[UUID, Kept[Session]]) -> dict[str, bytes]:
    sessions = [one.state for one in kept.values()]
    return {
        "session_ids": uuids(kept),
        "session_positions": bigints(one.position for one in kept.values()),
        "session_opened_ats": texts(session.opened_at for session in sessions),
        "session_expires_ats": texts(session.expires_at for session in sessions),
        "session_states": texts(session.state for session in sessions),
        "session_sinces": bigints(one.since for one in kept.values()),
        "session_roles": texts(column(session.agent_role) for session in sessions),
        "sessions": byteas(one.content for one in kept.values()),
    }


def _label_rows(moved: list[Kept[Session]]) -> dict[str, bytes]:
    """Those of sessions whose state is another one now: what else is in them never changes."""
    labelled = {
        (one.state.session_id, column(key), column(value)): one
        for one in moved
        for key, value in one.state.labels.items()
    }
    sessions = [one.state for one in labelled.values()]
    return {
        "label_keys": texts(key for _, key, _ in labelled),
        "label_values": texts(value for _, _, value in labelled),
        "label_opened_ats": texts(session.opened_at for session in sessions),
        "label_positions": bigints(one.position for one in labelled.values()),
        "label_session_ids": uuids(session.session_id for session in sessions),
        "label_states": texts(session.state for session in sessions),
        "label_roles": texts(column(session.agent_role) for session in sessions),
    }


async def search(
    connection: Connection,
    ledger_id: UUID,
    wanted: Filter,
    *,
    limit: int,
    offset: int = 0,
    after: str | None = None,
) -> Page:
    """Sessions newest first: `limit` of them, `offset` or the cursor `after` into the list.

    The total is counted up to TOTAL_MAX, whatever the cursor. Raises MalformedRequest for a cursor that is not
    one of ours, a label without `=` or `:`, and an offset beyond TOTAL_MAX.
    """
    names, values = _asked_for(wanted, offset)
    listed = [SQL.from_all if wanted.label is None else SQL.from_label, *(getattr(SQL, name) for name in names)]
    values |= {"ledger_id": ledger_id, "limit": limit + 1, "offset": offset, "total_max": TOTAL_MAX}
    count = SQL.count.replace(b"{list}", b"\n".join([*listed, SQL.newest_first]))
    if after is not None:
        values["after_time"], values["after_position"] = _read_cursor(after)
        listed.append(SQL.after)
    page = SQL.page.replace(b"{list}", b"\n".join([*listed, SQL.newest_first]))
    async with connection.pipeline():
        counted = await connection.execute(count, values, prepare=True)
        found = await connection.execute(page, values, prepare=True, binary=True)
    (total,) = await counted.fetchone() or (0,)
    rows = await found.fetchall()
    sessions = [_sessions.decode(content) for _, content in rows[:limit]]
    return Page(
        sessions=sessions,
        total=min(total, TOTAL_MAX),
        total_is_exact=total <= TOTAL_MAX,
        next=_cursor(rows[limit - 1][0], sessions[-1]) if len(rows) > limit else None,
    )


async def search_past(
    connection: Connection,
    ledger_id: UUID,
    past: Past,
    wanted: Filter,
    *,
    limit: int,
    offset: int = 0,
    after: str | None = None,
    reached: int,
) -> Page:
    """The same, as of `past`; the view has `reached` that position. Raises as `search`."""
    names, values = _asked_for(wanted, offset)
    values |= {"ledger_id": ledger_id, "limit": limit + 1, "offset": offset, "total_max": TOTAL_MAX}
    values |= {"at": past.at, "as_of": past.position, "classes": reached.bit_length()}
    count = SQL.then_count.replace(b"{list}", _past_list(wanted, names, []))
    going_on = []
    if after is not None:
        values["after_time"], values["after_position"] = _read_cursor(after)
        going_on = ["after"]
    page = SQL.then_page.replace(b"{list}", _past_list(wanted, names, going_on))
    async with connection.pipeline():
        counted = await connection.execute(count, values | {"part": TOTAL_MAX + 1}, prepare=True)
        found = await connection.execute(page, values | {"part": offset + limit + 1}, prepare=True, binary=True)
    (total,) = await counted.fetchone() or (0,)
    rows = await found.fetchall()
    shown = [stream_id for _, stream_id in rows[:limit]]
    sessions = await _sessions.as_of(connection, ledger_id, shown, past.position)
    return Page(
        sessions=sessions,
        total=min(total, TOTAL_MAX),
        total_is_exact=total <= TOTAL_MAX,
        next=_cursor(rows[limit - 1][0], sessions[-1]) if len(rows) > limit else None,
    )


def _past_list(wanted: Filter, names: list[str], going_on: list[str]) -> bytes:
    """What there was: in any state, or in one, since before or in a span of it."""
    source = SQL.then_all if wanted.label is None else SQL.then_label
    rows = [source, *(getattr(SQL, name) for name in [*names, *going_on]), SQL.newest_first, SQL.part]
    if wanted.state is None:
        return b"\n".join(rows)
    rows.insert(1, SQL.since_then if wanted.label is None else SQL.since_then_labelled)
    in_spans = [spans.found("sessions"), *(SQL.then_after for _ in going_on), SQL.then_newest_first, SQL.part]
    filters = b"\n".join(getattr(SQL, name) for name in names if name != "state")
    if wanted.label is not None:
        in_spans.insert(1, SQL.then_labelled.replace(b"{filters}", filters))
    elif filters:
        in_spans.insert(1, SQL.then_of.replace(b"{filters}", filters))
    return spans.united(rows, in_spans)


def _asked_for(wanted: Filter, offset: int) -> tuple[list[str], dict[str, Any]]:
    """The parts of a query that say what was asked for, but for a label; and the values of all of it."""
    if offset > TOTAL_MAX:
        raise MalformedRequest([{"pointer": "page", "detail": f"it begins beyond {TOTAL_MAX}; use `after`"}])
    values = {name: value for name, value in msgspec.structs.asdict(wanted).items() if value is not None}
    names = [name for name in values if name != "label"]
    if wanted.label is not None:
        values["key"], values["value"] = _label(wanted.label)
    return names, {name: column(value) if isinstance(value, str) else value for name, value in values.items()}


def _label(text: str) -> tuple[str, str]:
    for separator in "=:":
        key, found, value = text.partition(separator)
        if found:
            return column(key), column(value)
    raise MalformedRequest([{"pointer": "label", "detail": "it has neither `=` nor `:` between key and value"}])


def _cursor(position: int, session: Session) -> str:
    return f"{(moment(session.opened_at) - _EPOCH) // timedelta(microseconds=1)}-{position}"


def _read_cursor(text: str) -> tuple[datetime, int]:
    try:
        microseconds, position = map(int, text.split("-"))
        if 0 < position < 2**63:
            return _EPOCH + timedelta(microseconds=microseconds), position
    except (ValueError, OverflowError):
        pass
    raise MalformedRequest([{"pointer": "after", "detail": "it is not a cursor that was given here"}])


async def due(connection: Connection, limit: int) -> list[Overdue]:
    """Up to `limit` sessions of any project whose time has run out, the longest overdue first."""
    cursor = await connection.execute(SQL.due, {"limit": limit}, prepare=True)
    return [
        Overdue(project_id, ExpireSession(session_id=session_id, deadline=stamp(at)))
        for project_id, session_id, at in await cursor.fetchall()
    ]
