"""The whole-ledger check: what must hold of every ledger after anything at all was done to it.

Called at the end of store and API tests. It trusts nothing but the stored bytes.
"""

from collections import defaultdict
from typing import Any
from uuid import UUID

import psycopg

from ledger.batch import RULES
from ledger.entry import Event, Recorded, decode, leaf_hash
from ledger.events import stamp
from ledger.queue import closes, opened
from ledger.replay import fold


def check_ledger(conninfo: str) -> dict[str, list[Recorded]]:
    """Assert everything of every native ledger; returns each project's history."""
    with psycopg.connect(conninfo) as connection:
        ledgers = connection.execute(
            "SELECT ledger_id, project_id, size, last_recorded_at FROM ledger.ledgers WHERE NOT is_foreign"
        ).fetchall()
        return {row[1]: _check(connection, *row) for row in ledgers}


def _check(
    connection: psycopg.Connection[Any], ledger_id: UUID, project_id: str, size: int, last: Any
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
        assert (event.project, event.ledger) == (project_id, ledger_id)
        versions[stream_id] += 1
        assert version == versions[stream_id], f"versions of {stream_id} are dense"
        history.append(Recorded(position, event))
    times = [event.recorded_at for _, event in history]
    assert times == sorted(times), "recorded_at never decreases"
    assert not times or times[-1] <= stamp(last)
    assert len({event.event_id for _, event in history}) == len(history), "event ids are unique"
    _check_commands(connection, ledger_id, history)
    _check_open_items(connection, ledger_id, history)
    for stream in _streams(history).values():
        fold(stream)  # every stream has a state: nothing that its rules could not have made
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
                assert (event.type, data.status, data.command_type) == ("CommandRefused", status, command_type)
            else:
                assert event.stream_id == target
        if count:
            assert seen >= first + count - 1
    assert sorted(owner) == list(range(1, len(history) + 1)), "every event belongs to a command"


def _check_open_items(connection: psycopg.Connection[Any], ledger_id: UUID, history: list[Recorded]) -> None:
    expected: dict[UUID, Any] = {}
    for _, event in history:
        item = opened(event)
        if item is not None:
            expected[item.item_id] = item
        elif closes(event):
            expected.pop(event.stream_id, None)
    stored = connection.execute(
        "SELECT item_id, item_type, session_id, root_session_id FROM ledger.open_items WHERE ledger_id = %s",
        [ledger_id],
    ).fetchall()
    assert {row[0]: tuple(row) for row in stored} == {key: tuple(item) for key, item in expected.items()}


def _streams(history: list[Recorded]) -> dict[UUID, list[Recorded]]:
    streams: dict[UUID, list[Recorded]] = defaultdict(list)
    for recorded in history:
        streams[recorded.event.stream_id].append(recorded)
    return streams


def states(history: list[Recorded]) -> dict[UUID, Any]:
    """The state of every session and record in a history."""
    return {key: fold(stream) for key, stream in _streams(history).items() if stream[0].event.stream_type in RULES}


def of_type(history: list[Recorded], event_type: str) -> list[Event[Any]]:
    """The events of one type, in order."""
    return [event for _, event in history if event.type == event_type]
