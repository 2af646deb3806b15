"""The whole-ledger check: what must hold of every ledger after anything at all was done to it.

Called at the end of store and API tests. It trusts nothing but the stored bytes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, TypeVar
from uuid import UUID

import psycopg

from ledger.adoption import LOG, name_at
from ledger.approval import Approval, due
from ledger.batch import RULES, RULES_OF
from ledger.checkpoint import Checkpoint, Note
from ledger.entry import Event, Recorded, canonical, decode
from ledger.merkle import Edge, leaf_hash
from ledger.replay import fold
from ledger.session import Session
from ledger.store import QueuedTask
from ledger.task import Task, queued
from ledger.values import moment, stamp

Row = tuple[Any, ...]
S = TypeVar("S")


def check_ledger(conninfo: str) -> dict[str, list[Recorded]]:
    """Assert everything of every native ledger and of its views; returns each project's history."""
    histories: dict[str, list[Recorded]] = {}
    with psycopg.connect(conninfo) as connection:
        for ledger_id, project_id, history in _histories(connection):
            _check_commands(connection, ledger_id, history)
            _check_open_items(connection, ledger_id, history)
            for stream in _streams(history).values():
                fold(stream)  # every stream has a state: nothing that its rules could not have made
            _check_views(connection, ledger_id, history)
            histories[project_id] = history
        _check_logs(connection)
    return histories


def check_logs(conninfo: str) -> None:
    """Assert of every log that what is stored, signed and published is the tree over the entries, and nothing else."""
    with psycopg.connect(conninfo) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        _check_logs(connection)


def _check_logs(connection: psycopg.Connection[Any]) -> None:
    logs = connection.execute("SELECT ledger_id, origin, size, signed, published_size, published FROM ledger.logs")
    for ledger_id, origin, size, signed, published_size, published in logs.fetchall():
        entries = "SELECT entry FROM ledger.events WHERE ledger_id = %s AND position <= %s ORDER BY position"
        leaves = [leaf_hash(entry) for (entry,) in connection.execute(entries, [ledger_id, size])]
        assert len(leaves) == size, "what was signed is there"
        tree = Edge()
        tiles = tree.extend(leaves[:published_size])
        assert _says(published) == (Checkpoint(origin, published_size, tree.root).text if published_size else None)
        tiles += tree.extend(leaves[published_size:])
        was_adopted = not origin.endswith(f"/{ledger_id}")  # then it may not have signed yet what was there before
        if signed is not None or not was_adopted:
            assert _says(signed) == (Checkpoint(origin, size, tree.root).text if size else None)
        tiles += [(level, b"".join(hashes)) for level, hashes in enumerate(tree.levels) if hashes]
        stored = connection.execute("SELECT level, hashes FROM ledger.tiles WHERE ledger_id = %s", [ledger_id])
        assert sorted(stored.fetchall()) == sorted(tile for tile in tiles if tile[0]), "the tiles are of the entries"


def _says(note: str | None) -> str | None:
    return None if note is None else Note.parse(note.encode()).text


def check_views(conninfo: str) -> None:
    """Assert of every view of every native ledger that it is what a replay makes of it, row by row."""
    with psycopg.connect(conninfo) as connection:
        for ledger_id, _, history in _histories(connection):
            _check_views(connection, ledger_id, history)


def _histories(connection: psycopg.Connection[Any]) -> Iterator[tuple[UUID, str, list[Recorded]]]:
    """Every native ledger, all as of one moment: a worker may be about."""
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    ledgers = connection.execute(
        "SELECT ledger_id, project_id, size, last_recorded_at, coalesce(epoch, ledger_id) FROM ledger.ledgers"
        " WHERE NOT is_foreign"
    ).fetchall()
    for ledger_id, project_id, size, last, epoch in ledgers:
        yield ledger_id, project_id, _history(connection, ledger_id, project_id, size, last, epoch)


def _history(
    connection: psycopg.Connection[Any], ledger_id: UUID, project_id: str, size: int, last: Any, epoch: UUID
) -> list[Recorded]:
    rows = connection.execute(
        """SELECT e.position, e.stream_id, e.stream_version, e.type, e.entry, e.leaf, p.data
           FROM ledger.events e LEFT JOIN ledger.payloads p USING (ledger_id, position)
           WHERE ledger_id = %s ORDER BY position""",
        [ledger_id],
    ).fetchall()
    assert [row[0] for row in rows] == list(range(1, size + 1)), "positions are dense"
    history: list[Recorded] = []
    versions: dict[UUID, int] = defaultdict(int)
    for position, stream_id, version, event_type, entry, leaf, payload in rows:
        event = decode(entry, payload)
        assert leaf == leaf_hash(entry), f"the leaf of {position} is of its bytes"
        assert (event.stream_id, event.stream_version, event.type) == (stream_id, version, event_type)
        versions[stream_id] += 1
        assert version == versions[stream_id], f"versions of {stream_id} are dense"
        history.append(Recorded(position, event))
    adoptions = [recorded for recorded in history if recorded.event.stream_id == LOG]
    assert name_at(0, adoptions, epoch) == ledger_id, "it was called so at first"
    for position, event in history:
        assert (event.project, event.ledger) == (project_id, name_at(position, adoptions, epoch))
    times = [event.recorded_at for _, event in history]
    assert times == sorted(times), "recorded_at never decreases"
    assert not times or times[-1] <= stamp(last)
    assert len({event.event_id for _, event in history}) == len(history), "event ids are unique"
    return history


def _check_commands(connection: psycopg.Connection[Any], ledger_id: UUID, history: list[Recorded]) -> None:
    rows = connection.execute(
        """SELECT principal, command_id, type, target, status, first_position, event_count, seen_position
           FROM ledger.commands WHERE ledger_id = %s""",
        [ledger_id],
    ).fetchall()
    owner: dict[int, tuple[str, str]] = {}
    for principal, command_id, command_type, target, status, first, count, seen in rows:
        assert (first == 0) == (count == 0)
        assert seen <= len(history)
        for position in range(first, first + count):
            assert position not in owner, f"{position} belongs to one command"
            owner[position] = (principal, command_id)
            event = history[position - 1].event
            assert (event.actor.principal, event.command_id) == (principal, command_id)
            if status >= 400:
                data: Any = event.data
                if event.type == "LateResultRefused":
                    assert (event.stream_id, status) == (target, 409)
                else:
                    assert (event.type, data.status, data.command_type) == ("CommandRefused", status, command_type)
            elif command_type not in ("ClaimTasks", "EditApproval"):  # these are about several streams
                assert event.stream_id == target
        if count:
            assert seen >= first + count - 1
    assert sorted(owner) == list(range(1, len(history) + 1)), "every event belongs to a command"


def _check_open_items(connection: psycopg.Connection[Any], ledger_id: UUID, history: list[Recorded]) -> None:
    """What decisions read besides streams is what the streams say; only a lease may end later than its claim said."""
    expected = [item for state in states(history).values() if (item := RULES_OF[type(state)].item(state))]
    stored = connection.execute(
        "SELECT item_id, item_type, session_id, root_session_id, task_id, match FROM ledger.open_items"
        " WHERE ledger_id = %s",
        [ledger_id],
    ).fetchall()
    assert {row[0]: tuple(row) for row in stored} == {item.item_id: tuple(item) for item in expected}
    tasks = [queued(state) for state in states(history).values() if isinstance(state, Task)]
    rows = connection.execute(
        "SELECT task_id, kind, session_id, state, rank, run_at, deadline_at, lease_id, lease_until, holder"
        " FROM ledger.tasks"
        " WHERE ledger_id = %s",
        [ledger_id],
    ).fetchall()
    kept = {row[0]: QueuedTask(*row) for row in rows}
    told = {task.task_id: task for task in tasks if task is not None}
    assert {key: row._replace(lease_until=None) for key, row in kept.items()} == {
        key: task._replace(lease_until=None) for key, task in told.items()
    }
    for key, task in told.items():
        lease_until = kept[key].lease_until
        assert (lease_until is None) == (task.lease_until is None)
        assert lease_until is None or task.lease_until is None or lease_until >= task.lease_until


def _check_views(connection: psycopg.Connection[Any], ledger_id: UUID, history: list[Recorded]) -> None:
    """Each view holds what the events up to its position make, and nothing else."""
    values = {"ledger_id": ledger_id}
    places = connection.execute(
        "SELECT view, position FROM projections.positions WHERE ledger_id = %(ledger_id)s", values
    )
    reached: dict[str, int] = dict(places.fetchall())
    for view, (query, rows) in ROWS.items():
        seen = history[: reached.get(view.partition(".")[0], 0)]
        stored = connection.execute(query, values).fetchall()
        assert sorted(stored) == sorted(rows(seen)), f"{view} is what a replay makes of it"


def _made(seen: list[Recorded], type_: type[S]) -> Iterator[tuple[int, int, S]]:
    """The states of one kind, each with the position of its stream's first event, and that of the one by which what it
    calls its state came to be."""
    for turns, state in _turns(seen, type_):
        yield turns[0][0], turns[-1][0], state


def _turns(seen: list[Recorded], type_: type[S]) -> Iterator[tuple[list[tuple[int, str]], S]]:
    """When each thing of one kind came to what it calls its state, every time that this became another."""
    for stream in _streams(seen).values():
        rules = RULES.get(stream[0].event.stream_type)
        if rules is None or rules[1] is not type_:
            continue
        turns: list[tuple[int, str]] = []
        state: Any = None
        for position, event in stream:
            state = rules[0].evolve(state, event)
            if not turns or turns[-1][1] != state.state:
                turns.append((position, state.state))
        yield turns, state


def _spans(type_: type[Any]) -> Callable[[list[Recorded]], Iterator[Row]]:
    def rows(seen: list[Recorded]) -> Iterator[Row]:
        for turns, state in _turns(seen, type_):
            stream_id = getattr(state, f"{type_.__name__.lower()}_id")
            for (since, was), (until, _) in pairwise(turns):
                yield stream_id, since, until, turns[0][0], len(f"{until - turns[0][0]:b}") - 1, was

    return rows


def _session_rows(seen: list[Recorded]) -> Iterator[Row]:
    for position, since, s in _made(seen, Session):
        times = moment(s.opened_at), moment(s.expires_at)
        yield s.session_id, position, *times, s.state, since, _column(s.agent_role), canonical(s)


def _label_rows(seen: list[Recorded]) -> Iterator[Row]:
    rows = {
        (s.session_id, _column(key), _column(value), moment(s.opened_at), position, s.state, _column(s.agent_role))
        for position, _, s in _made(seen, Session)
        for key, value in s.labels.items()
    }
    yield from rows


def _task_rows(seen: list[Recorded]) -> Iterator[Row]:
    for position, since, t in _made(seen, Task):
        worker = None if t.worker is None else _column(t.worker)
        yield (
            *(t.task_id, position, moment(t.submitted_at)),
            *(_column(t.kind), t.state, since, t.session_id, worker, canonical(t)),
        )


def _approval_rows(seen: list[Recorded]) -> Iterator[Row]:
    for position, since, a in _made(seen, Approval):
        next_due = due(a, "9999-12-31T23:59:59.999999Z")
        yield (
            *(a.approval_id, position, a.state, since, a.session_id, a.task_id, _column(a.action["tool"])),
            *(["critical", "high", "medium", "low"].index(a.risk), [_column(role) for role in a.quorum.roles]),
            *(_column(a.requester.issuer), _column(a.requester.sub), moment(a.expires_at)),
            *(moment(next_due.deadline) if next_due else None, canonical(a)),
        )


def _column(text: str) -> str:
    return text.replace("\0", "\ufffd")[:255]


def _positions(event_type: str | None = None) -> Callable[[list[Recorded]], Iterator[Row]]:
    return lambda seen: ((position,) for position, event in seen if event_type in (None, event.type))


_SEGMENTS = """SELECT first + place - 1 FROM {view}.segments, unnest(terms) AS u (term, places, weights),
    unnest(places) AS place WHERE term = '*' AND ledger_id = %(ledger_id)s"""

_SPANS = """SELECT stream_id, since, until, position, class, state FROM {view}.spans WHERE ledger_id = %(ledger_id)s"""

ROWS: dict[str, tuple[str, Callable[[list[Recorded]], Iterator[Row]]]] = {
    "sessions": (
        """SELECT session_id, position, opened_at, expires_at, state, state_since, agent_role, session
           FROM sessions.sessions WHERE ledger_id = %(ledger_id)s""",
        _session_rows,
    ),
    "sessions.labels": (
        """SELECT session_id, key, value, opened_at, position, state, agent_role
           FROM sessions.labels WHERE ledger_id = %(ledger_id)s""",
        _label_rows,
    ),
    "tasks": (
        """SELECT task_id, position, submitted_at, kind, state, state_since, session_id, worker, task
           FROM tasks.tasks WHERE ledger_id = %(ledger_id)s""",
        _task_rows,
    ),
    "approvals": (
        """SELECT approval_id, position, state, state_since, session_id, task_id, tool, risk, roles,
                  requester_issuer, requester_sub, expires_at, due_at, approval
           FROM approvals.approvals WHERE ledger_id = %(ledger_id)s""",
        _approval_rows,
    ),
    "sessions.spans": (_SPANS.format(view="sessions"), _spans(Session)),
    "tasks.spans": (_SPANS.format(view="tasks"), _spans(Task)),
    "approvals.spans": (_SPANS.format(view="approvals"), _spans(Approval)),
    "records": (_SEGMENTS.format(view="records"), _positions("FactRecorded")),
    "audit": (_SEGMENTS.format(view="audit"), _positions()),
}
"""By view: what it has, and what it should have."""


def _streams(history: list[Recorded]) -> dict[UUID, list[Recorded]]:
    streams: dict[UUID, list[Recorded]] = defaultdict(list)
    for recorded in history:
        streams[recorded.event.stream_id].append(recorded)
    return streams


def states(history: list[Recorded]) -> dict[UUID, Any]:
    """The state of every stream in a history that has one."""
    return {key: fold(stream) for key, stream in _streams(history).items() if stream[0].event.stream_type in RULES}


def of_type(history: list[Recorded], event_type: str) -> list[Event[Any]]:
    """The events of one type, in order."""
    return [event for _, event in history if event.type == event_type]
