"""Where a ledger was at a time: the past is a position, and a time is a way to name one.

So whatever is asked as of a time is the fold of the events up to a position, and can be asked again.
"""

from datetime import datetime
from typing import NamedTuple
from uuid import UUID

import msgspec
from msgspec import Struct

from ledger import store
from ledger.postgres import CLOCK_SKEW_MAX_SECONDS, Connection, queries
from ledger.values import Stamp, moment, stamp

SQL = queries("ledger", "past")

SETTLED_SECONDS = CLOCK_SKEW_MAX_SECONDS
"""What is decided at a time is sent within half of that (writer.py); the rest is for clocks, and the way."""

LOOK_SECONDS = 0.05
"""How soon to look again whether an append has ended."""


class Past(NamedTuple):
    """A moment of a ledger's past: after the event at `position`, before any other. At the time `at` that was so."""

    position: int
    at: datetime


class Found(NamedTuple):
    """Up to which position a ledger had come at a time: as far as is known `now`, by the database's clock, and for ever
    once `unsettled_seconds` have passed."""

    position: int
    now: datetime
    unsettled_seconds: float


async def find(connection: Connection, ledger_id: UUID, time: datetime) -> Found:
    """The last position that was recorded at `time` or before; some 20 look-ups in a ledger of a million events.

    It may be followed by another for as long as a batch is on its way whose time was fixed before. None is appended
    with a time before the ledger's last: so once the ledger has moved on after `time`, there is no other. Until then,
    it is unsettled for as long as the clock of a node that fixes one may be behind, and while something is being
    appended: a commit may wait, for a standby say, and is not seen before. Looked for first, so that what is not being
    appended any more is found.
    """
    values = {"ledger_id": ledger_id, "time": time, "stamp": stamp(time)}
    row = await (await connection.execute(SQL.moved, values, prepare=True, binary=True)).fetchone()
    assert row is not None
    last_recorded_at, now, is_appending = row
    row = await (await connection.execute(SQL.find, values, prepare=True, binary=True)).fetchone()
    assert row is not None
    unsettled = SETTLED_SECONDS - (now - time).total_seconds() if last_recorded_at <= time else 0.0
    return Found(row[0], now, max(LOOK_SECONDS if is_appending else 0.0, unsettled))


class _Recorded(Struct):
    recorded_at: Stamp


async def time_of(connection: Connection, ledger_id: UUID, position: int) -> datetime | None:
    """When the event at `position` was recorded; None where there is none."""
    rows = await store.read_positions(connection, ledger_id, [position])
    return moment(msgspec.json.decode(rows[0].entry, type=_Recorded).recorded_at) if rows else None
