"""Personal values as an operator opens them: for a report, or to see that each opens where it stands.

A value that was sealed for one place opens at no other. So one that was moved or altered before its entry was hashed,
by whoever can sign too, is found by its own seal, where the tree has nothing to say.
"""

from collections.abc import Sequence
from typing import Annotated, Any
from uuid import UUID

import msgspec
from msgspec import Meta, Struct

from ledger import store
from ledger.commands import EXACT_INTEGER_MAX
from ledger.entry import whole
from ledger.personal import SEALED
from ledger.postgres import Pool, fetch
from ledger.project_key import UnusableKey
from ledger.store import Stored
from ledger.vault import BrokenSeal, Place, Vault
from ops.integrity import EVENTS_MAX, NO_EVENT, Integrity

_MARK = SEALED.encode()


class _Placed(Struct):
    """Where an event says that it stands."""

    stream_id: UUID
    stream_version: Annotated[int, Meta(ge=0, le=EXACT_INTEGER_MAX)]
    event_id: UUID


async def unsealed(vault: Vault, project: str, rows: Sequence[Stored]) -> list[dict[str, Any]]:
    """Events as JSON, with what was sealed readable again. Raises BrokenSeal, UnusableKey,
    and of what is no event msgspec's errors, ValueError, KeyError and RecursionError."""
    events = [msgspec.json.decode(whole(row.entry, row.payload)) for row in rows]
    placed = msgspec.convert(events, list[_Placed])
    places = [Place(project, one.stream_id, one.stream_version, one.event_id, "") for one in placed]
    opened: list[dict[str, Any]] = await vault.unseal_all(project, list(zip(events, places, strict=True)))
    return opened


async def open_all(pool: Pool, vault: Vault, found: Integrity) -> int:
    """Open every sealed value whose key is there, with one look for keys a batch. Answers how many entries have any.

    Raises psycopg's errors.
    """
    count = 0
    async with pool.connection() as connection:
        ledgers = await fetch(connection, store.SQL.list_ledgers)
    for ledger_id, project, is_foreign, *_ in ledgers:
        after = 0
        while not is_foreign:
            async with pool.connection() as connection:
                rows = await store.read_after(connection, ledger_id, after, EVENTS_MAX)
            if not rows:
                break
            after = rows[-1].position
            sealed = [row for row in rows if _MARK in row.entry or _MARK in (row.payload or b"")]
            count += len(sealed)
            try:
                found.add(project, await _faults(vault, project, sealed))
            except UnusableKey as error:
                found.add(project, [f"its sealed values cannot be opened: {error}"])
                break
    return count


async def _faults(vault: Vault, project: str, rows: Sequence[Stored]) -> list[str]:
    """Where one does not open it is looked for by halves. Raises UnusableKey."""
    try:
        await unsealed(vault, project, rows)
    except (BrokenSeal, *NO_EVENT) as error:
        if len(rows) > 1:
            middle = len(rows) // 2
            return [*await _faults(vault, project, rows[:middle]), *await _faults(vault, project, rows[middle:])]
        # What is no event at all was told already.
        return [f"{rows[0].position}: {error}"] if isinstance(error, BrokenSeal) else []
    return []
