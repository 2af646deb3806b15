"""Where a log goes on from one whose history was rolled back: what a stranger is told of it, and checks. Pure.

A database that was put back from a backup has less than its log has signed, and that log signs nothing more. An
operator may adopt what there is: an entry says so (`LedgerAdopted`), and from it on the ledger has another id, and so
another log. All before stays as it is, and names the id that it was recorded with: so an entry of an earlier id stands
right where a chain of such entries leads from its id to that of the log.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import msgspec
from msgspec import Struct

from ledger.checkpoint import Checkpoint, InvalidNote, Note

ADOPTION = ("log", "LedgerAdopted")
"""The type of its stream, and its own, of the entry that begins an epoch."""


class Adopted(Struct):
    """What such an entry says: which ledger went before, and the newest checkpoint that was known of it."""

    adopted: str
    checkpoint: str | None = None


class _Adoption(Struct):
    data: Adopted


_adoption = msgspec.json.Decoder(_Adoption)


class Change(NamedTuple):
    """Entries from `position` on were written for another ledger than those before; the first may say why."""

    position: int
    ledger: str
    adopted: Adopted | None


class Epoch(NamedTuple):
    """A log goes on at `position` from the one of `origin`. `last`: its newest checkpoint that was known; `is_here`:
    whether all that it covers is; None where that is not known."""

    position: int
    origin: str
    last: Checkpoint | None
    is_here: bool | None = None

    def __str__(self) -> str:
        begun = f"history begins anew at position {self.position}: {self.origin} went before"
        if self.last is None:
            return f"{begun}, and no checkpoint of it was known"
        covered = f"{begun}, and its newest checkpoint that was known covered {self.last.size:,} entries"
        if self.last.size >= self.position:
            return f"{covered}, of which at most {self.position - 1:,} are here"
        if self.is_here is None:
            return f"{covered}; whether those are here the whole log shows"
        return f"{covered}, which are {'all' if self.is_here else 'not those that are'} here"


Wrong = tuple[int, str, str, str]
"""A position, what is wrong with it, what was expected, and what was found."""


def adopted_in(entry: bytes) -> Adopted:
    """What an entry that begins an epoch says. Raises msgspec's errors."""
    return _adoption.decode(entry).data


def epochs_of(origin: str, changes: Sequence[Change]) -> tuple[list[Epoch], list[Wrong]]:
    """The epochs of a log, and what was written for another: from the last back, which has the log's own id."""
    deployment, _, ledger = origin.rpartition("/")
    known = {ledger}
    epochs: list[Epoch] = []
    wrong: list[Wrong] = []
    for position, written_for, adopted in reversed(changes):
        if written_for != ledger:
            wrong.append((position, "it was written for another ledger", ledger, written_for))
        elif adopted and adopted.adopted not in known:
            ledger = adopted.adopted
            known.add(ledger)
            last = None
            try:
                last = _checkpoint(adopted)
            except ValueError as error:
                wrong.append((position, f"it names no checkpoint of the log before: {error}", "", ""))
            epochs.append(Epoch(position, last.origin if last else f"{deployment}/{ledger}", last))
    return epochs[::-1], wrong[::-1]


def _checkpoint(adopted: Adopted) -> Checkpoint | None:
    """Who signed it is not looked at: it is in an entry, and whoever holds another compares that."""
    if adopted.checkpoint is None:
        return None
    checkpoint = Checkpoint.parse(Note.parse(adopted.checkpoint.encode()).text)
    if checkpoint.origin.rpartition("/")[2] != adopted.adopted:
        raise InvalidNote(f"it is of {checkpoint.origin}")
    return checkpoint


def lost(held: Checkpoint, epochs: Collection[Epoch]) -> Iterator[Wrong]:
    """What a checkpoint covers of a log that was adopted, and is not in the one that goes on from it."""
    for epoch in epochs:
        if held.origin == epoch.origin and (gone := held.size - epoch.position + 1) > 0:
            what = f"{gone:,} entries are lost that the checkpoint of {held.origin} covers: it was rolled back"
            yield epoch.position, what, str(held.size), str(epoch.position - 1)
