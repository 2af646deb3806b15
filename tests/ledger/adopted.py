"""A log that goes on from one that was rolled back and adopted, written by hand."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from ledger.checkpoint import Checkpoint
from ledger.verify import Trust
from tests.ledger.written import LEDGER, LOG, ORIGIN, WITNESSES, Files, checkpoint_of, entries, event, signed, written

NEW = UUID("0199a7b0-0000-7000-8000-000000000004")
NEWEST = UUID("0199a7b0-0000-7000-8000-000000000005")
STREAM = 99


def origin_of(ledger: UUID) -> str:
    return f"log.example/{ledger}"


KEY = LOG.verifier._replace(name=origin_of(NEW))
TRUSTED = Trust([KEY], [witness.verifier for witness in WITNESSES], 2)
SIGNED_BEFORE = entries(310, 3)
"""What the log before had signed, of which 300 were restored."""


def adoption(
    position: int, ledger: UUID, adopted: object, note: bytes | None = None, version: int = 1, **fields: Any
) -> bytes:
    data = {"adopted": str(adopted), "ledger": str(ledger), "checkpoint": note.decode() if note else None}
    more = {"type": "LedgerAdopted", "stream_type": "log", "ledger": ledger, "data": data}
    return event(position, STREAM, version, **more | fields)[0]


def adopted(last: Checkpoint | None = None) -> list[bytes]:
    """300 entries of the log before, and 99 after the one by which it was adopted."""
    note = signed(last, log=LOG._replace(name=last.origin)) if last else None
    return [*SIGNED_BEFORE[:300], adoption(301, NEW, LEDGER, note), *renumbered(302, 400, NEW)]


def renumbered(first: int, last: int, ledger: UUID) -> list[bytes]:
    """Entries of streams of their own."""
    return [event(n, 50, n - first + 1, ledger=ledger)[0] for n in range(first, last + 1)]


def note_of(history: Sequence[bytes], ledger: UUID = NEW) -> bytes:
    origin = origin_of(ledger)
    return signed(checkpoint_of(history, origin), log=LOG._replace(name=origin))


def files_of(history: Sequence[bytes], ledger: UUID = NEW) -> Files:
    return written(history, note=note_of(history, ledger))


def held(size: int, history: Sequence[bytes] = SIGNED_BEFORE) -> Checkpoint:
    """A checkpoint of the log before."""
    return checkpoint_of(history[:size], ORIGIN)
