"""What a view must have: its tables, and the rows that a replay of the ledger makes.

Independent of how views are written: an event after another is folded by the rules of the ledger, and the rows are said
again from what that makes. Whoever changes what a view has (in its own module) changes it here too, or it never holds.
Pure: nothing is read or written here.
"""

from collections.abc import Callable
from math import log2
from typing import Any, NamedTuple
from uuid import UUID

from ledger import approval, session, task
from ledger.entry import Event, Recorded, canonical
from ledger.events import FactRecorded
from projections.segments import COUNTED, EVERY, SPAN_BITS
from projections.terms import common_term, event_terms, event_words, id_term, place_terms, term

Row = tuple[Any, ...]


class Table(NamedTuple):
    """A table to be compared. The first `key` columns of a row say which it is, the very first what it is made of."""

    name: str
    key: int


class Definition(NamedTuple):
    """What a view must have: its tables, the streams that its rows are made of (None: single events), and how."""

    tables: tuple[Table, ...]
    stream_type: str | None
    rows: Callable[[UUID, int, Any], dict[str, list[Row]]]


def _column(text: str | None) -> str | None:
    """As much of a text as a column can hold; the state has all of it."""
    return None if text is None else text.replace("\0", "\ufffd")[:255]


class Course(NamedTuple):
    """A state, the position `since` which what it calls its `state` has been what it is, and through which of these it
    has come: each with the positions from which on and before which it was in force."""

    state: Any
    since: int
    left: tuple[tuple[str, int, int], ...] = ()


def _course(evolve: Callable[[Any, Event[Any]], Any]) -> Callable[[Any, Recorded], Course]:
    def onward(was: Course | None, recorded: Recorded) -> Course:
        position, event = recorded
        if was is None:
            return Course(evolve(None, event), position)
        state, before = evolve(was.state, event), was.state.state
        if state.state == before:
            return was._replace(state=state)
        return Course(state, position, (*was.left, (before, was.since, position)))

    return onward


def _spans(position: int, stream_id: UUID, course: Course) -> list[Row]:
    return [
        (stream_id, since, state, int(log2(until - position)), position, until) for state, since, until in course.left
    ]


def _session_rows(_: UUID, position: int, course: Course) -> dict[str, list[Row]]:
    s, role = course.state, _column(course.state.agent_role)
    labels = {(_column(key), _column(value)) for key, value in s.labels.items()}
    return {
        "sessions": [(s.session_id, position, s.opened_at, s.expires_at, s.state, course.since, role, canonical(s))],
        "labels": [(s.session_id, key, value, s.opened_at, position, s.state, role) for key, value in labels],
        "spans": _spans(position, s.session_id, course),
    }


def _task_rows(_: UUID, position: int, course: Course) -> dict[str, list[Row]]:
    t = course.state
    row = (
        *(t.task_id, position, t.submitted_at, _column(t.kind), t.state, course.since, t.session_id),
        *(_column(t.worker), canonical(t)),
    )
    return {"tasks": [row], "spans": _spans(position, t.task_id, course)}


def _approval_rows(_: UUID, position: int, course: Course) -> dict[str, list[Row]]:
    a, due = course.state, approval.next_due(course.state)
    row = (
        *(a.approval_id, position, a.state, course.since, a.session_id, a.task_id, _column(a.action["tool"])),
        *(("critical", "high", "medium", "low").index(a.risk), tuple(map(_column, a.quorum.roles))),
        *(_column(a.requester.issuer), _column(a.requester.sub)),
        *(a.expires_at, due.deadline if due else None, canonical(a)),
    )
    return {"approvals": [row], "spans": _spans(position, a.approval_id, course)}


def _audit_rows(ledger_id: UUID, position: int, event: Event[Any]) -> dict[str, list[Row]]:
    return _indexed(ledger_id, position, event, {*event_words(event), *event_terms(event), *place_terms(event)})


def _record_rows(ledger_id: UUID, position: int, event: Event[Any]) -> dict[str, list[Row]]:
    fact = event.data
    if not isinstance(fact, FactRecorded):
        return {}
    named = {"status": fact.status, "external": event.external_id}
    ids = {"task": fact.task_id, "approval": fact.approval_id, "parent": fact.parent_record_id}
    terms = {*event_terms(event), common_term("kind", fact.kind)}
    terms |= {term(kind, value) for kind, value in named.items() if value is not None}
    terms |= {id_term(kind, value) for kind, value in ids.items() if value is not None}
    return _indexed(ledger_id, position, event, terms)


def _indexed(ledger_id: UUID, position: int, event: Event[Any], terms: set[bytes]) -> dict[str, list[Row]]:
    ledger = f"^{ledger_id.hex[-12:]}"
    spans = [ledger, *(f"{ledger}{bits}/{position >> bits:x}" for bits in SPAN_BITS)]
    counted = {f"{name.decode()}{'B' if name.startswith(COUNTED) else ''}" for name in {*terms, EVERY}}
    return {"segments": [(position, event.recorded_at, tuple(sorted([*spans, *counted])))]}


EVOLVE: dict[str, Callable[[Any, Recorded], Course]] = {
    "session": _course(session.evolve),
    "task": _course(task.evolve),
    "approval": _course(approval.evolve),
}

DEFINITIONS = {
    "sessions": Definition((Table("sessions", 1), Table("labels", 3), Table("spans", 2)), "session", _session_rows),
    "tasks": Definition((Table("tasks", 1), Table("spans", 2)), "task", _task_rows),
    "approvals": Definition((Table("approvals", 1), Table("spans", 2)), "approval", _approval_rows),
    "records": Definition((Table("segments", 1),), None, _record_rows),
    "audit": Definition((Table("segments", 1),), None, _audit_rows),
}
