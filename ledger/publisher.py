"""The publisher: what was recorded becomes part of the tree, is signed, is shown to witnesses, and is published.

A log never signs two checkpoints of which one is not the beginning of the other. So before it signs it looks whether
what is stored still is what it signed before, by the database's word, by the file beside its key, and by that of its
witnesses; and refuses where it is not. What it signs is durable before anybody else sees it.

Killed anywhere, it goes on from what the database has: each step says what it leaves. Two at once do no harm: the row
of the log is the lock while one signs, and what is published is replaced only where it is what was seen. The ledger
itself is only read, and never locked: nobody who appends waits for this.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple
from uuid import UUID

import httpx
import psycopg

from ledger import store, tree
from ledger.checkpoint import Checkpoint, InvalidNote, Note, SignerKey, check_checkpoint
from ledger.merkle import EMPTY_ROOT, Edge, Run
from ledger.postgres import Connection, Pool, queries
from ledger.project_key import UnusableKey
from ledger.signing import LogFiles
from ledger.telemetry import Published
from ledger.tree import LEAVES_AT_ONCE, Damaged, LogKey
from ledger.witness import Cosigners, Prove, RolledBack, Witnesses

SQL = queries("ledger", "publisher")

NO_WITNESSES = Witnesses(0, ())


class Refused(Exception):
    """Nothing is signed, or published; the message says why, and names no project. `said` is that for everybody:
    without what is of this machine or of the database, which the worker's log has, or what a witness answered.

    `contradicted_by` is what the log itself has signed, and is no beginning of what is there.
    """

    def __init__(self, why: str, *, said: str = "", contradicted_by: Note | None = None) -> None:
        super().__init__(why)
        self.said = said or why
        self.contradicted_by = contradicted_by


class _Row(NamedTuple):
    """What was signed and published of a ledger; and what somebody holds that may contradict it."""

    origin: str
    size: int
    signed: str | None
    signed_by: list[int]
    published_size: int
    published: str | None
    refused: str | None
    contradicted_by: str | None
    server: str
    """Which server, since its start, and which database of it this was read from."""

    @property
    def log_id(self) -> UUID:
        """Of this log alone: a ledger that was adopted has another."""
        return UUID(self.origin.rpartition("/")[2])

    @property
    def checkpoint(self) -> Checkpoint:
        """What was signed last, as it says itself. Raises InvalidNote."""
        if self.signed is None:
            return Checkpoint(self.origin, 0, EMPTY_ROOT)
        return Checkpoint.parse(Note.parse(self.signed.encode()).text)

    @property
    def is_published(self) -> bool:
        return self.signed is None or (self.published or "").startswith(self.signed)


class Publisher:
    """Publishes, a ledger at a time. See `publish`."""

    def __init__(
        self, pool: Pool, keys: LogFiles, witnesses: Witnesses = NO_WITNESSES, http: httpx.AsyncClient | None = None
    ) -> None:
        self.published = Published()
        self.silent: dict[str, str] = {}
        """Why a witness did not sign when it was last asked; empty where it did."""
        self._pool = pool
        self._keys = keys
        self._quorum, self._names = witnesses.quorum, [one.key.name for one in witnesses.known]
        self._cosigners = Cosigners(http, witnesses) if http is not None and witnesses.known else None
        self._known: dict[UUID, Note] = {}
        self._unkept: dict[UUID, str] = {}
        self._told: dict[UUID, list[Note]] = {}
        self._confronted: dict[UUID, str] = {}
        """Where each log was when the witnesses were asked what they know of it; what they showed is in `_told`."""

    def forget(self) -> None:
        """Ask witnesses anew what they know of every log: it may be another database that answers from here on."""
        self._confronted.clear()

    @property
    def unkept(self) -> str:
        """Why what was signed last of some log could not be kept beside the keys; empty where all is."""
        return next(iter(self._unkept.values()), "")

    async def usable(self, connection: Connection) -> list[int]:
        """The numbers of the keys that sign, and are here."""
        with suppress(UnusableKey):
            return [key.number for key, _ in self._signers(await tree.keys_of(connection))]
        return []

    async def publish(self, ledger_id: UUID) -> None:
        """Publish all that a ledger has now.

        Raises Refused, which the log of that ledger then says too, and psycopg's errors: then it is to be tried again.
        """
        try:
            await self._confront(ledger_id)
            row = await self._sign(ledger_id)
            if row is None and await self._begin(ledger_id):
                await self._confront(ledger_id)
                row = await self._sign(ledger_id)
            if row is not None and row.signed is not None:
                await self._show(ledger_id, row)
        except Refused as refused:
            await self._refuse(ledger_id, refused)
            raise
        except (RolledBack, Damaged, InvalidNote, UnusableKey, psycopg.errors.InsufficientPrivilege) as error:
            refusal = _refusal(error)
            await self._refuse(ledger_id, refusal)
            raise refusal from error

    async def _begin(self, ledger_id: UUID) -> bool:
        """Begin the log of a ledger; False where it has one, or is not here itself."""
        async with self._pool.connection() as connection:
            begun = await connection.execute(SQL.begin, {"ledger_id": ledger_id})
        return begun.rowcount == 1

    async def _refuse(self, ledger_id: UUID, refused: Refused) -> None:
        """Have it known to all workers, and to whoever asks."""
        self.published.refusals += 1
        note = refused.contradicted_by
        values = {"ledger_id": ledger_id, "why": refused.said, "note": None if note is None else str(note)}
        async with self._pool.connection() as connection:
            await connection.execute(SQL.refuse, values)

    # Before anything is signed

    async def _confront(self, ledger_id: UUID) -> None:
        """Ask the witnesses what they have cosigned, unless they were of this database. Raises Refused, RolledBack."""
        if self._cosigners is None:
            return
        async with self._pool.connection() as connection:
            row = await _read(connection, SQL.read, ledger_id)
            if row is None or self._confronted.get(row.log_id) == row.server:
                return
            keys = [key.vkey for key in await tree.keys_of(connection, row.origin)]
        note = None if row.signed is None else Note.parse(row.signed.encode())
        silent, told = await self._cosigners.check(row.checkpoint, note, keys, self._prove(ledger_id))
        for error in told:
            if error.shown is None and not await self._overtaken(ledger_id, row.size, error):
                raise error
        if len(self._names) - len(silent) < self._quorum:
            raise _too_few("say what they know", silent)
        # What they show may be of what is here: then the database has only forgotten to have signed it.
        self._told[row.log_id] = [error.shown for error in told if error.shown is not None]
        self._confronted[row.log_id] = row.server

    async def _overtaken(self, ledger_id: UUID, size: int, error: RolledBack) -> bool:
        """Whether another publisher of this database has gone on from `size` meanwhile: what one shows to witnesses,
        the database has before."""
        async with self._pool.connection() as connection:
            row = await _read(connection, SQL.read, ledger_id)
        return row is not None and size < error.size <= row.size

    def _prove(self, ledger_id: UUID) -> Prove:
        async def prove(old: int, new: int) -> list[bytes]:
            async with self._pool.connection() as connection:
                return await tree.prove_consistency(connection, ledger_id, old, new)

        return prove

    async def _recheck(
        self, connection: Connection, ledger_id: UUID, row: _Row, head: int, keys: Sequence[LogKey]
    ) -> Edge:
        """What the tree goes on from, which is what was signed. Raises Refused, Damaged, InvalidNote."""
        if head < row.size:
            raise Refused(
                f"history was rolled back: a checkpoint of {row.size} events was signed, and {head} are there"
            )
        edge = await tree.read_edge(connection, ledger_id, row.size)
        vkeys = [key.vkey for key in keys]
        stored = None if row.signed is None else Note.parse(row.signed.encode())
        if stored is not None:
            signed = check_checkpoint(stored, vkeys)
            if signed != Checkpoint(row.origin, row.size, edge.root):
                raise Refused(f"what is stored is not what was signed: the tree of {row.size} events has another root")
        notes = [*self._last_signed(row.log_id), *self._told.get(row.log_id, ())]
        if row.contradicted_by is not None:
            notes.append(Note.parse(row.contradicted_by.encode()))
        for note in notes:
            if note == stored:
                continue  # as nearly always
            known = check_checkpoint(note, vkeys)
            if known.size > head:
                what = f"a checkpoint of {known.size} events was signed, and {head} are there"
            elif await self._root_at(connection, ledger_id, row, edge, known) == known.root:
                continue
            else:
                what = f"the first {known.size} events are others than those that were signed"
            ours = tuple(line for line in note.signatures if line.name == row.origin)
            raise Refused(f"history was rolled back: {what}", contradicted_by=Note(note.text, ours))
        return edge

    async def _root_at(
        self, connection: Connection, ledger_id: UUID, row: _Row, edge: Edge, known: Checkpoint
    ) -> bytes:
        if known.size <= row.size:
            return edge.root if known.size == row.size else await tree.root_of(connection, ledger_id, known.size)
        # The database lost that they were signed, not the events: as a standby that takes over may.
        return await tree.root_beyond(connection, ledger_id, edge, row.size, known.size)

    def _last_signed(self, log_id: UUID) -> list[Note]:
        """What was last signed here, if anything was. Raises Refused, InvalidNote."""
        if log_id not in self._known:
            try:
                content = self._keys.last_signed(log_id)
            except OSError as error:
                raise Refused(f"what was last signed here cannot be read: {error.strerror}") from error
            if content is None:
                return []
            self._known[log_id] = Note.parse(content)
        return [self._known[log_id]]

    # Signing

    async def _sign(self, ledger_id: UUID) -> _Row | None:
        """What is signed when all that is there is signed; None where another publisher is at it."""
        while True:
            async with self._pool.connection() as connection:
                connection.standby_missed = False
                async with connection.transaction():
                    row = await _read(connection, SQL.lock, ledger_id)
                    if row is None:
                        return None
                    row, more = await self._step(connection, ledger_id, row)
                # Dying before the commit leaves nothing of this step. Dying after it leaves a note that nobody has
                # seen: whoever comes next finds it signed, and goes on from it.
                if connection.standby_missed:
                    raise psycopg.OperationalError("the standby has not confirmed what was signed")
            if not more:
                break
        if row.signed is not None:
            await self._keep(row.log_id, Note.parse(row.signed.encode()))
        return row

    async def _step(self, connection: Connection, ledger_id: UUID, row: _Row) -> tuple[_Row, bool]:
        """Integrate and sign some of what is new, in one transaction; and whether there is more."""
        head = (await store.head(connection, ledger_id)).size
        keys = await tree.keys_of(connection, row.origin)
        edge = await self._recheck(connection, ledger_id, row, head, keys)
        upto = min(head, row.size + LEAVES_AT_ONCE)
        signers = self._signers(keys)
        added = [key.number for key, _ in signers if key.number not in row.signed_by]
        if upto == row.size and not (added and upto):
            return row, False
        if self._cosigners is not None and self._confronted.get(row.log_id) != row.server:
            raise psycopg.OperationalError("another database answers than the one that witnesses were asked about")
        if not signers:
            raise Refused("there is no key to sign with: run `muniment keys add` where the worker runs")
        if upto > row.size:
            (leaves,) = await tree.read_leaves(connection, ledger_id, [Run(row.size, upto)])
            await tree.extend(connection, ledger_id, edge, row.size, leaves)
            self.published.events += upto - row.size
        text = Checkpoint(row.origin, upto, edge.root).text
        signatures = [signer.sign(text) for _, signer in signers]
        numbers = [key.number for key, _ in signers]
        if upto == row.size:
            # More sign the same: what others have signed, whose keys may not be here, stays.
            there = Note.parse(row.signed.encode()).signatures if row.signed else ()
            signatures = [*there, *(one for one in signatures if one not in there)]
            numbers = sorted({*numbers, *row.signed_by})
        signed = str(Note(text, tuple(signatures)))
        values = {"ledger_id": ledger_id, "size": upto, "signed": signed, "signed_by": numbers}
        await connection.execute(SQL.sign, values)
        return row._replace(size=upto, signed=signed, signed_by=numbers), upto < head

    def _signers(self, keys: Sequence[LogKey]) -> list[tuple[LogKey, SignerKey]]:
        """The keys that sign. One that was made elsewhere may not be here yet: it does without, unless it is the only
        one. Raises UnusableKey."""
        signers, missing = [], None
        for key in keys:
            if key.until is None:
                try:
                    signers.append((key, self._keys.signer(key.vkey.name, key.number, key.vkey.public)))
                except UnusableKey as error:
                    missing = error
        if missing and not signers:
            raise missing
        return signers

    async def _keep(self, log_id: UUID, note: Note) -> None:
        """Remember beside the key what was signed, before anybody sees it."""
        if self._known.get(log_id) == note and log_id not in self._unkept:
            return
        self._known[log_id] = note
        try:
            await asyncio.to_thread(self._keys.keep_signed, log_id, note)
            self._unkept.pop(log_id, None)
        except OSError as error:
            # Keys may be where nothing can be written. Then only witnesses notice a database that was put back.
            self._unkept[log_id] = str(error)

    # Publishing

    async def _show(self, ledger_id: UUID, row: _Row) -> None:
        """Publish what is signed. Raises Refused, RolledBack."""
        assert row.signed is not None
        if row.is_published:
            if row.refused is not None or row.contradicted_by is not None:
                async with self._pool.connection() as connection:
                    await connection.execute(SQL.go_on, {"ledger_id": ledger_id, "seen": row.contradicted_by})
            return
        with self.published.publishing():
            try:
                note = await self._cosigned(ledger_id, Note.parse(row.signed.encode()))
            except RolledBack as error:
                if not await self._overtaken(ledger_id, row.size, error):
                    self._confronted.pop(row.log_id, None)  # what it shows is judged by the events, the next time
                    raise
                return
            values = {"ledger_id": ledger_id, "origin": row.origin, "seen": row.published_size, "size": row.size}
            # Dying before this leaves what is signed unpublished; whoever comes next shows the same to the witnesses,
            # who sign it again, and publishes it.
            async with self._pool.connection() as connection:
                await connection.execute(SQL.publish, {**values, "published": str(note)})
                if row.contradicted_by is not None:
                    await connection.execute(SQL.go_on, {"ledger_id": ledger_id, "seen": row.contradicted_by})

    async def _cosigned(self, ledger_id: UUID, note: Note) -> Note:
        """With the lines of enough witnesses. Raises Refused, RolledBack."""
        if self._cosigners is None:
            return note
        async with self._pool.connection() as connection:
            keys = await tree.keys_of(connection, Checkpoint.parse(note.text).origin)
        cosigned = await self._cosigners.cosign(note, [key.vkey for key in keys], self._prove(ledger_id))
        self.silent = dict.fromkeys(self._names, "") | cosigned.missing
        if not cosigned.enough:
            raise _too_few("have signed it", cosigned.missing)
        return cosigned.note


async def _read(connection: Connection, query: bytes, ledger_id: UUID) -> _Row | None:
    row = await (await connection.execute(query, {"ledger_id": ledger_id}, prepare=True)).fetchone()
    return _Row(*row) if row else None


def _too_few(wanted: str, silent: dict[str, str]) -> Refused:
    why = "; ".join(f"{name}: {reason}" for name, reason in sorted(silent.items()))
    said = f"too few witnesses {wanted}: not {', '.join(sorted(silent))}"
    return Refused(f"too few witnesses {wanted}: {why}", said=said)


def _refusal(error: Exception) -> Refused:
    said = ""
    match error:
        case UnusableKey():
            said = "no key that signs can be used where the worker runs; its log says more"
        case psycopg.Error():
            said = "the database does not take what is to be stored; the worker's log says more"
        case InvalidNote():
            said = "what was signed before cannot be verified; the worker's log says more"
    return Refused(str(error), said=said)
