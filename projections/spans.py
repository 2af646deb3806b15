"""Spans: in which state each thing was from which position to which, so that the past can be listed.

A span of a state that was left is a row, written by the projector when it is left and never changed. A span that goes
on stands in the view's own row: its state, and the position since when. So what was in a state as of a position is what
has been in it since then or longer, and the spans around that position. To find these without going through the
ledger, each is of a class: how long after its thing began it ended, in powers of two.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple
from uuid import UUID

from ledger.postgres import Connection, bigints, queries, smallints, texts, uuids

SQL = queries("projections", "spans")


class Span(NamedTuple):
    """The thing whose first event is at `position` was in `state` from position `since` on, and not any more from
    `until` on."""

    stream_id: UUID
    position: int
    state: str
    since: int
    until: int

    @property
    def length_class(self) -> int:
        return (self.until - self.position).bit_length() - 1


def write(view: str, thing: str) -> bytes:
    """The part of a view's WRITE that writes its spans."""
    return _about(SQL.write, view, thing)


def columns(thing: str, spans: Iterable[Span]) -> dict[str, bytes]:
    """The values of `write`."""
    rows = list(spans)
    return {
        f"{thing}_span_states": texts(span.state for span in rows),
        f"{thing}_span_classes": smallints(span.length_class for span in rows),
        f"{thing}_span_positions": bigints(span.position for span in rows),
        f"{thing}_span_untils": bigints(span.until for span in rows),
        f"{thing}_span_sinces": bigints(span.since for span in rows),
        f"{thing}_span_ids": uuids(span.stream_id for span in rows),
    }


@cache
def found(view: str) -> bytes:
    """The beginning of a query of the spans around a position, of the class `c`."""
    return _about(SQL.found, view, "")


def part(view: str, of: Sequence[bytes], order: str, going_on: bool) -> list[bytes]:
    """A query of these spans, as far as one page needs them: those `of` which this holds, in `order`, `after` one."""
    after = [getattr(SQL, f"after_{order}")] if going_on else []
    return [found(view), *of, *after, getattr(SQL, f"by_{order}")]


def whole(view: str) -> list[bytes]:
    """A query of all these spans."""
    return [found(view), SQL.whole]


def united(rows: Sequence[bytes], spans: Sequence[bytes]) -> bytes:
    """A query of both, without its order: what is in the state still, and what was; as `k`."""
    filled: bytes = SQL.united.replace(b"{rows}", b"\n".join(rows)).replace(b"{spans}", b"\n".join(spans))
    return filled


def _about(sql: bytes, view: str, thing: str) -> bytes:
    return sql.replace(b"{view}", view.encode()).replace(b"{thing}", thing.encode())


async def version(connection: Connection, schema: str) -> int:
    """The version of the code that a build of a view is of; 0 where there is no such build."""
    row: Any = await (await connection.execute(SQL.version, {"schema": schema}, prepare=True)).fetchone()
    return int(row[0]) if row else 0
