"""`muniment evidence export`: what is of a session, an approval or a stretch of a ledger, in one file for a stranger.

What a bundle has is in ledger/evidence.py, and how it is told in report.py. The same entries under the same checkpoint
make the same bytes, whoever exports them, wherever. Only what is published is exported: nothing else has a proof.
"""

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from hashlib import sha256
from itertools import islice
from pathlib import Path
from tempfile import mkstemp
from typing import Annotated, NamedTuple
from uuid import UUID
from zipfile import ZipFile, ZipInfo

import msgspec
from cyclopts import App, Parameter

from ledger import past, store, tree
from ledger.adoption import LOG
from ledger.checkpoint import InclusionProof, Note, VerifierKey
from ledger.entry import Event, whole
from ledger.events import ApprovalRequested, Fact, VoteCast
from ledger.evidence import Asked, Inventory, Manifest
from ledger.merkle import inclusion
from ledger.postgres import Connection, Pool, bigints, fetch, open_keys_pool, queries, uuids
from ledger.store import Stored
from ledger.tree import Log
from ledger.values import stamp
from ledger.vault import Vault
from ledger.verify import Order, Stated, Trust, Verdict, read_checkpoint
from ledger.witness import read_witnesses
from ops import OperatorError
from ops.desk import reached
from ops.report import EVENTS_MAX, Told, report
from ops.seals import unsealed
from projections import audit, caught_up

SQL = queries("ops", "evidence")

evidence = App(name="evidence", help="Hand out evidence: entries with their proofs, in a file that needs no server.")

ENTRIES_AT_ONCE = 256
FOUND_AT_ONCE = 10_000
PUBLISHED_WITHIN_SECONDS = 10.0
LOOK_SECONDS = 0.1
EPOCH = (1980, 1, 1, 0, 0, 0)
"""A zip file knows no earlier time; every file in a bundle has this one."""


class EvidenceError(OperatorError):
    """What was asked for cannot be exported; the message says why."""


@evidence.command(name="export")
async def export(
    *,
    project: str,
    session: UUID | None = None,
    approval: UUID | None = None,
    range_: Annotated[str | None, Parameter(name="--range")] = None,
    since: datetime | None = None,
    until: datetime | None = None,
    out: Path | None = None,
    unseal: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Write a bundle: entries, their proofs, the checkpoint, the keys, a manifest, and a report to read.

    Whoever has it verifies it without this service: `muniment verify BUNDLE --key KEY`.

    Parameters
    ----------
    project
        Whose ledger it is from.
    session
        Everything that belongs to this session.
    approval
        This approval, what it replaced or was replaced by, and what is about it.
    range_
        The positions from A to B, as A:B. Only of such a stretch is it proven that nothing was left out.
    since
        Those recorded then or later.
    until
        Those recorded before.
    out
        The file; by default one here, called after what is in it. It must not exist. Only you may read it.
    unseal
        Show personal values in the report, where their keys are there. They stay in that file when the person is
        erased. Entries are as they were recorded, sealed, in any case.
    """
    if sum((session is not None, approval is not None, range_ is not None, (since or until) is not None)) != 1:
        raise EvidenceError("say what to export by one of --session, --approval, --range, or --since and --until")
    async with reached() as (settings, pool), open_keys_pool(settings.keys_database_url, pool) as keys:
        async with pool.connection() as connection:
            ledger = await store.find_ledger(connection, project)
        if ledger is None:
            raise EvidenceError(f"there is no project {project}")
        log = await _published(pool, ledger.ledger_id)
        witnesses = read_witnesses(settings.witnesses).keys if settings.witnesses else []
        source = Source(pool, project, ledger.ledger_id, log, tuple(witnesses))
        asked, positions = await _asked(source, session, approval, range_, since, until)
        if not positions:
            raise EvidenceError(f"nothing published is of {asked}")
        vault = Vault(settings.keys_dir, keys, create_keys=False) if unseal else None
        path = out or Path(f"evidence-{project}-{_name(asked)}.zip")
        manifest = await write(source, asked, positions, path, vault)
    print(f"{path}: {manifest.entries:,} entries, {asked}")
    print(f"completeness: {manifest.completeness.state.replace('_', ' ')}: {manifest.completeness.because}")


class Source(NamedTuple):
    """Where entries are taken from: a ledger, as far as its log has published it."""

    pool: Pool
    project: str
    ledger_id: UUID
    log: Log
    witnesses: tuple[VerifierKey, ...] = ()


async def _published(pool: Pool, ledger_id: UUID) -> Log:
    """The ledger's log, with all that is in the ledger now, if a publisher is at work; else with what it has."""
    deadline = time.monotonic() + PUBLISHED_WITHIN_SECONDS
    async with pool.connection() as connection:
        head = await store.head(connection, ledger_id)
        while True:
            log = await tree.log_of(connection, ledger_id)
            if log is not None and log.published_size >= head.size:
                return log
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(LOOK_SECONDS)
    if log is None:
        raise EvidenceError("nothing of it was published yet, so nothing can be proven: is a worker there that signs?")
    print(f"of {head.size:,} entries {log.published_size:,} are published, and only these can be exported")
    return log


# What belongs to it


async def _asked(
    source: Source,
    session: UUID | None,
    approval: UUID | None,
    range_: str | None,
    since: datetime | None,
    until: datetime | None,
) -> tuple[Asked, Sequence[int]]:
    size = source.log.published_size
    if session is not None:
        return Asked(session=session), await _found(source, audit.Filter(session=session), {session})
    if approval is not None:
        return Asked(approval=approval), await _found(source, audit.Filter(q=str(approval)), {approval})
    first, last = 1, size
    if range_ is not None:
        begin, _, end = range_.partition(":")
        if not (begin.isdecimal() and end.isdecimal() and 1 <= int(begin) <= int(end)):
            raise EvidenceError(f"{range_!r} is no range of positions: such as 1:500")
        first, last = int(begin), int(end)
        if last > size:
            raise EvidenceError(f"{size:,} entries are published, and the range ends at {last:,}")
        return Asked(first=first, last=last), range(first, last + 1)
    async with source.pool.connection() as connection:
        if since is not None:
            first = 1 + (await past.find(connection, source.ledger_id, _before(since))).position
        if until is not None:
            last = min(size, (await past.find(connection, source.ledger_id, _before(until))).position)
    if first > last:
        raise EvidenceError("nothing published is of that time")
    times = [None if time is None else stamp(time) for time in (since, until)]
    # With those beside them, where there are any: only they show that nothing else is of that time.
    positions = range(max(first - 1, 1), min(last + 1, size) + 1)
    return Asked(first=first, last=last, since=times[0], until=times[1]), positions


def _before(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise EvidenceError(f"{moment.isoformat()} says not of which zone it is: add Z, or +01:00")
    return moment - timedelta(microseconds=1)


async def _found(source: Source, wanted: audit.Filter, stream_ids: set[UUID]) -> list[int]:
    """What the audit view finds, and the whole of every stream that is in it: so a gap in one shows."""
    fresh = await caught_up(source.pool, "audit", source.ledger_id, timeout_seconds=PUBLISHED_WITHIN_SECONDS)
    if fresh.behind:
        raise EvidenceError(
            f"the view audit, which finds entries, is {fresh.behind:,} events behind: does a worker run?"
        )
    size, after = source.log.published_size, 0
    positions: list[int] = []
    async with source.pool.connection() as connection:
        while found := await audit.search(connection, source.ledger_id, wanted, limit=FOUND_AT_ONCE, after=after):
            positions += found
            after = found[-1]
        if wanted.session is None:
            rows = await store.read_positions(connection, source.ledger_id, positions)
            stream_ids |= {stream_id for row in rows for stream_id in _told_with(row.decode().event)}
        ids = {"positions": bigints(positions), "stream_ids": uuids(stream_ids)}
        whole_streams = await fetch(connection, SQL.streams, ledger_id=source.ledger_id, size=size, **ids)
    return [position for (position,) in whole_streams]


def _told_with(event: Event[Fact]) -> Iterator[UUID]:
    """What an approval is not understood without: its session, what is run under it, what a vote was taken from."""
    fact = event.data
    named = [event.session_id]
    if isinstance(fact, ApprovalRequested):
        named += [fact.task_id, fact.supersedes]
    if isinstance(fact, VoteCast) and fact.voter is not None:
        named.append(fact.voter.evidence)
    yield from (one for one in named if one is not None)


def _name(asked: Asked) -> str:
    if asked.session or asked.approval:
        return f"{'session' if asked.session else 'approval'}-{asked.session or asked.approval}"
    return f"{asked.first}-{asked.last}"


# The bundle


async def write(
    source: Source, asked: Asked, positions: Sequence[int], path: Path, vault: Vault | None = None
) -> Manifest:
    """Write a bundle of these positions. Raises EvidenceError."""
    async with source.pool.connection() as connection:
        keys = await tree.keys_of(connection, source.log.origin)
    signed = read_checkpoint(source.log.published, Trust([key.vkey for key in keys], source.witnesses))
    inventory = Inventory(asked, signed.checkpoint)
    order, seen = Order(signed.checkpoint.origin, complete=False), Verdict()
    positions = sorted({*positions, *await _adoptions(source, positions)})
    told: list[Told] = []
    with _new(path) as archive:
        for begin in range(0, len(positions), ENTRIES_AT_ONCE):
            some = positions[begin : begin + ENTRIES_AT_ONCE]
            async with source.pool.connection() as connection:
                rows = await store.read_positions(connection, source.ledger_id, some)
                proofs = await _proofs(connection, source, some)
            for row in rows:
                order.check(row.position, row.entry, seen)
                inventory.take(row.position, Stated.of(row.entry))
                _add(archive, f"entries/{row.position}.json", row.entry)
                _add(archive, f"proofs/{row.position}.tlog-proof", proofs[row.position])
                if row.payload is not None:
                    _add(archive, f"payload/{sha256(row.payload).hexdigest()}", row.payload)
            told += await _readable(source, rows[: EVENTS_MAX - len(told)], vault)
        manifest = inventory.manifest()
        order.end(seen)
        vkey = next(key for key, at in signed.by.items() if at is None)
        _add(archive, "checkpoint", source.log.published)
        _add(archive, "keys.json", msgspec.json.encode(tree.shown(keys)))
        _add(archive, "manifest.json", manifest.encode())
        _add(archive, "report.html", report(manifest, signed, str(vkey), told, seen.epochs).encode())
    return manifest


async def _adoptions(source: Source, positions: Sequence[int]) -> list[int]:
    """The entries behind these by which the log goes on from earlier ones: without them these are not of this log."""
    async with source.pool.connection() as connection:
        (first,) = await store.read_positions(connection, source.ledger_id, positions[:1])
        if Stated.of(first.entry).ledger == source.log.origin.rpartition("/")[2]:
            return []
        ends = {"after": positions[0], "size": source.log.published_size}
        found = await fetch(connection, SQL.adoptions, ledger_id=source.ledger_id, log=LOG, **ends)
    return [position for (position,) in found]


@contextmanager
def _new(path: Path) -> Iterator[ZipFile]:
    """A file that has its name as soon as it is whole, and that nobody else reads: there may be personal values in it.

    Raises EvidenceError where something has that name, or it cannot be written.
    """
    taken = EvidenceError(f"{path} exists, and nothing is overwritten: name another by --out")
    if os.path.lexists(path):
        raise taken
    try:
        number, draft = mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(number, "wb") as file, ZipFile(file, "w") as archive:
                yield archive
            os.link(draft, path)  # and not a rename, which would take the place of what came there meanwhile
        finally:
            Path(draft).unlink()
    except FileExistsError:
        raise taken from None
    except OSError as error:
        raise EvidenceError(f"{path} cannot be written: {error.strerror or error}") from None


async def _proofs(connection: Connection, source: Source, positions: Sequence[int]) -> dict[int, bytes]:
    """For each position the file that proves its entry, from two queries for all."""
    size, note = source.log.published_size, Note.parse(source.log.published)
    paths = {position: inclusion(position - 1, size) for position in positions}
    runs = [run for path in paths.values() for run in path]
    hashes = iter(await tree.hashes_of(connection, source.ledger_id, runs, size))
    proofs = {
        position: InclusionProof(position - 1, tuple(islice(hashes, len(path))), note)
        for position, path in paths.items()
    }
    return {position: str(proof).encode() for position, proof in proofs.items()}


async def _readable(source: Source, rows: Sequence[Stored], vault: Vault | None) -> list[Told]:
    """As the report tells them: with personal values, where a vault is given to open them."""
    if vault is not None:
        events = await unsealed(vault, source.project, rows)
    else:
        events = [msgspec.json.decode(whole(row.entry, row.payload)) for row in rows]
    return [Told(row.position, event) for row, event in zip(rows, events, strict=True)]


def _add(archive: ZipFile, name: str, content: bytes) -> None:
    if name.startswith("payload/") and name in archive.NameToInfo:
        return  # two entries with the same data have one file
    archive.writestr(ZipInfo(name, EPOCH), content)
