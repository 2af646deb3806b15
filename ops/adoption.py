"""`muniment ledger`: go on with a ledger of which a restore has lost what its log had signed.

The publisher noticed, and signs nothing more of it: what somebody may hold contradicts what is there. Bringing the
newer state back is better, wherever there is one. Where there is none, that is put on record, in the ledger itself, and
from there on it has another id and another log: whoever follows it sees that it begins anew, why, and what is missing.
"""

from typing import Annotated, NamedTuple
from uuid import UUID

import msgspec
from cyclopts import App, Parameter
from uuid_utils.compat import uuid7

from ledger.adoption import AdoptLedger
from ledger.checkpoint import Checkpoint, Note
from ledger.commands import Text
from ledger.postgres import fetch, queries
from ops.desk import Desk, DeskError, open_desk

SQL = queries("ops", "adoption")

ledger = App(name="ledger", help="The ledgers of projects: go on with one whose history a restore has rolled back.")


@ledger.command
async def adopt(
    *projects: str, reason: str, every: Annotated[bool, Parameter(name="--all", negative=())] = False
) -> None:
    """Adopt what is left of a ledger after a restore: its log ends, and another begins over what is there.

    Only where a log says that history was rolled back; look for the newer state first, for this cannot be undone.

    Parameters
    ----------
    projects
        Whose ledgers.
    reason
        What happened, for auditors: it is recorded with it.
    every
        Of all projects of which that is said.
    """
    if bool(projects) == every:
        raise DeskError("name the projects whose ledgers are to be adopted, or all that were rolled back: --all")
    try:
        msgspec.convert(reason, Text)
    except msgspec.ValidationError as error:
        raise DeskError(f"the reason cannot be recorded: {error}") from None
    async with open_desk() as desk:
        async with desk.pool.connection() as connection:
            found = {row[0]: _RolledBack(*row) for row in await fetch(connection, SQL.rolled_back)}
        if missing := [project for project in projects if project not in found]:
            raise DeskError(
                f"of {', '.join(missing)} nobody says that history was rolled back: its log goes on, or does not for "
                "another reason (muniment doctor). A worker must have met what contradicts it"
            )
        if not found:
            print("no log says that history was rolled back: there is nothing to adopt")
        refused = [await _adopt(desk, found[project], reason) for project in projects or found]
    if any(refused):
        raise DeskError(" ".join(filter(None, refused)))


class _RolledBack(NamedTuple):
    project: str
    adopted: UUID
    origin: str
    is_foreign: bool
    size: int
    note: str
    is_allowed: bool


async def _adopt(desk: Desk, ledger: _RolledBack, reason: str) -> str:
    """Adopt one; answers why not, where that is so."""
    project = ledger.project
    if not ledger.is_allowed:
        return f"{project}: DATABASE_URL must name the worker's role (muniment_worker): no other may adopt a ledger."
    if ledger.is_foreign:
        return (
            f"{project}: its ledger is written through eventsourcing, whose applications would read what is recorded "
            "here as theirs: have them go on in a new project."
        )
    lost = Checkpoint.parse(Note.parse(ledger.note.encode()).text)
    named = AdoptLedger(ledger=uuid7(), adopted=ledger.adopted, checkpoint=ledger.note, reason=reason)
    # Dying before the answer leaves it adopted, or not: given again, it says which.
    receipt = await desk.give(named, project)
    print(f"{project}: ledger {ledger.adopted} goes on as {named.ledger}, from position {receipt.first_position} on")
    print(f"  Its log {ledger.origin} had signed {lost.size} events, of which {_kept(lost.size, ledger.size)}; it ends")
    print(
        f"  Its log is {ledger.origin.rpartition('/')[0]}/{named.ledger} now. Give its keys to auditors and witnesses:"
    )
    print(f"  muniment keys list --project {project}")
    return ""


def _kept(signed: int, size: int) -> str:
    return f"the last {signed - size} are lost" if signed > size else "not all are as they were"
