"""`muniment keys`: which keys sign the checkpoints, given where they are: on the machine of the worker.

That a key signs from here on, or no more, is an event of the operators' ledger before it is so. Whatever is left half
done by a terminal that was closed is done by the same command given again: a file that nobody was told of is taken up,
and what the ledger has is brought to `ledger.log_keys`, which the publisher goes by.
"""

import sys

from cyclopts import App

from ledger import log_key, store, tree
from ledger.log_events import LogKeyAdded, LogKeyRetired
from ledger.log_key import LogKeys
from ledger.operations import LOG_KEYS, OPERATORS, AddLogKey, RetireLogKey
from ledger.postgres import Connection
from ledger.signing import LogFiles
from ledger.values import moment
from ops.desk import Desk, DeskError, connected, open_desk

keys = App(name="keys", help="The keys that sign checkpoints: have one follow the other.")


@keys.command(name="list")
async def list_keys(*, project: str | None = None) -> None:
    """List the keys: since when and until when each signs.

    Parameters
    ----------
    project
        Show what the log of that project is verified with, for who verifies it: its verifier keys.
    """
    async with connected() as connection:
        origin = "any"
        if project is not None:
            ledger = await store.find_ledger(connection, project)
            if ledger is None:
                raise DeskError(f"there is no project {project!r} yet")
            origin = f"{await store.deployment(connection)}/{ledger.epoch}"
        found = await tree.keys_of(connection, origin)
    for key in found:
        shown = str(key.vkey) if project is not None else key.vkey.public.hex()
        print(f"{key.number:<4} {shown}  signs since {key.from_}" + (f" until {key.until}" if key.until else ""))
    if not found:
        print("there is no key, and so nothing is signed: `muniment keys add`", file=sys.stderr)


@keys.command
async def add(*, reason: str | None = None) -> None:
    """Make a key, and have it sign beside those that do.

    Parameters
    ----------
    reason
        Why, for those who come after.
    """
    async with open_desk() as desk:
        files = LogFiles(desk.settings.log_keys_dir)
        await _record(desk)
        async with desk.pool.connection() as connection:
            number = 1 + max((key.number for key in await tree.keys_of(connection)), default=0)
        public = files.make(number)
        # Dying here leaves a file that signs nothing: the next key that is made is that one.
        receipt = await desk.give(AddLogKey(number=number, public=public.hex(), reason=reason))
        async with desk.pool.connection() as connection:
            await _follow(connection, receipt.state)
    print(f"key {number} signs: {public.hex()}")
    print(f"It is {files.path(number)}: every worker needs it, no API process does, and nobody else must have it.")


@keys.command
async def retire(number: int, /, *, reason: str | None = None) -> None:
    """Have a key sign no more; there must be another that does.

    Parameters
    ----------
    number
        As `muniment keys list` numbers it.
    reason
        Why, for those who come after.
    """
    async with open_desk() as desk:
        await _record(desk)
        receipt = await desk.give(RetireLogKey(number=number, reason=reason))
        async with desk.pool.connection() as connection:
            await _follow(connection, receipt.state)
    print(f"key {number} signs no more; what it has signed is verified by it as before. Destroy its file everywhere")


async def _record(desk: Desk) -> None:
    """Have on record what a worker made by itself, in development. Raises DeskError in production, where none does."""
    async with desk.pool.connection() as connection:
        known = await told(connection)
        for key in await tree.keys_of(connection):
            if known.find(key.number) is None:
                if desk.settings.mode == "production":
                    raise DeskError(
                        f"the key {key.number} in the database was added by no operator, and nothing is put on record "
                        "for it: find out who put it there (muniment verify database)"
                    )
                await desk.give(AddLogKey(number=key.number, public=key.vkey.public.hex()))


async def told(connection: Connection) -> LogKeys:
    """The keys as the operators' ledger has them, by its events about keys alone."""
    ledger = await store.find_ledger(connection, OPERATORS)
    keys = LogKeys()
    for _, event in await store.read_streams(connection, ledger.ledger_id, [LOG_KEYS]) if ledger else ():
        if isinstance(event.data, LogKeyAdded | LogKeyRetired):
            keys = log_key.evolve(keys, event)
    return keys


async def _follow(connection: Connection, known: LogKeys) -> None:
    """Bring the table to what the ledger says. Dying on the way, the next command does it."""
    for key in known.keys:
        await tree.add_key(connection, key.number, bytes.fromhex(key.public), moment(key.added_at))
        if key.retired_at is not None:
            await tree.retire_key(connection, key.number, moment(key.retired_at))
