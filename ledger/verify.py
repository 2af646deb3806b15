"""What a stranger checks: that a log is what its signed checkpoint says, entry by entry, trusting nobody who keeps it.

All of it is computed from bytes that a `Read` brings, from wherever they were copied to (C2SP tlog-tiles):

    checkpoint             which log, how many entries, the root of the tree over them; signed (checkpoint.py)
    tile/entries/<N>       256 entries a file, each behind its length in two bytes; the last file has fewer
    tile/0/<N>             their hashes; tile/1/<N>: those of 256 such files; and so on (merkle.py)
    payload/<sha256>       the data of an entry that is too large to stand in it

The tree binds each entry to its place: position = index + 1. Each entry says besides which ledger it was written for,
and which version of its stream it is; so what was recorded again in another order shows even where the tree was made
anew over it. What follows from this, and what does not, is in ops/verification.md.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from hashlib import sha256
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Struct, field

from ledger.checkpoint import Checkpoint, InclusionProof, InvalidNote, Note, Signed, VerifierKey, check_signed
from ledger.epoch import ADOPTION, Change, Epoch, adopted_in, epochs_of, lost
from ledger.merkle import (
    TILE_HASHES,
    Edge,
    InvalidProof,
    Run,
    Tile,
    check_consistency,
    check_inclusion,
    in_tile,
    joined,
    leaf_hash,
    parted,
    subtrees,
    tile_of,
    tile_path,
)

Read = Callable[[str], bytes]
"""The content of a file by its path. Raises FileNotFoundError where there is none."""

FAULTS_MAX = 100
UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)
"""What is raised of bytes that are not the JSON they should be."""
OPAQUE = "aggregate"
"""The type of streams that another program writes through Muniment, and numbers as it likes."""


class Trust(NamedTuple):
    """Whom to believe: the keys of one log, and how many of which witnesses must have seen what it says."""

    log: Collection[VerifierKey]
    witnesses: Collection[VerifierKey] = ()
    quorum: int = 0


class Fault(NamedTuple):
    """One thing that is wrong, and where: a position, or a file."""

    where: str
    what: str
    expected: str = ""
    found: str = ""

    def __str__(self) -> str:
        compared = f" (expected {self.expected}, found {self.found})" if self.expected or self.found else ""
        return f"{self.where}: {self.what}{compared}"


class Verdict(Struct):
    """What was looked at, and what is wrong with it: the first FAULTS_MAX faults, and how many there are."""

    signed: Signed | None = None
    entries: int = 0
    payloads: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    faulty: int = 0

    def add(self, where: object, what: str, expected: str = "", found: str = "") -> None:
        self.faulty += 1
        if len(self.faults) < FAULTS_MAX:
            self.faults.append(Fault(str(where), what, expected, found))


# Checkpoints


def read_checkpoint(content: bytes, trust: Trust) -> Signed:
    """Raises InvalidNote unless its log signed it, and as many witnesses as must."""
    note = Note.parse(content)
    if str(note).encode() != content:
        raise InvalidNote("the note is not written as notes are: a signature has bits that mean nothing")
    return check_signed(note, trust.log, trust.witnesses, trust.quorum)


def verify_growth(old: Checkpoint, new: Checkpoint, proof: Sequence[bytes] | None) -> Iterator[Fault]:
    """Whether one history begins with the other. Two checkpoints of one size need no proof. Raises ValueError where
    there is none and one is needed."""
    old, new = sorted((old, new), key=lambda one: one.size)
    if old.origin != new.origin:
        yield Fault("checkpoints", "they are of two logs", old.origin, new.origin)
    elif old.size == new.size:
        if old.root != new.root:
            yield Fault("checkpoints", FORKED.format(size=new.size), old.root.hex(), new.root.hex())
    elif proof is None and old.size:
        raise ValueError(f"a consistency proof from {old.size} to {new.size} is needed to compare them")
    else:
        try:
            check_consistency(old.size, old.root, new.size, new.root, proof or ())
        except InvalidProof as error:
            yield Fault("checkpoints", f"it is not shown that {new.size} entries begin with those {old.size}: {error}")


FORKED = "its log signed two histories of {size} entries, and whoever has both checkpoints can show it"


# One entry


def verify_proof(content: bytes, entry: bytes, trust: Trust) -> tuple[int, Signed]:
    """The position of an entry, and the checkpoint that covers it, by a proof that stands alone (C2SP tlog-proof).

    Raises InvalidNote, InvalidProof.
    """
    proof = InclusionProof.parse(content)
    signed = read_checkpoint(str(proof.checkpoint).encode(), trust)
    if str(proof).encode() != content:
        raise InvalidNote("the proof is not written as proofs are")
    size, root = signed.checkpoint.size, signed.checkpoint.root
    check_inclusion(leaf_hash(entry), proof.index, proof.hashes, size, root)
    return proof.index + 1, signed


class Stated(Struct, gc=False):
    """What an entry says of itself, of all that it says."""

    type: str
    ledger: str
    stream_type: str
    stream_id: str
    stream_version: int
    recorded_at: Annotated[str, Meta(min_length=27, max_length=27)]
    data_sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")] = ""
    data_bytes: int = 0

    @property
    def is_adoption(self) -> bool:
        """Whether it is the first entry of an epoch."""
        return (self.stream_type, self.type) == ADOPTION

    @staticmethod
    def of(entry: bytes) -> "Stated":
        """Raises what is in UNREADABLE where that is no event."""
        return _stated.decode(entry)


_stated = msgspec.json.Decoder(Stated)


class Order:
    """What entries say of themselves, looked at in the order of their positions; what lies between may be missing."""

    def __init__(self, origin: str, *, complete: bool) -> None:
        self._origin = origin
        self._complete = complete
        self._changes: list[Change] = []
        self._versions: dict[str, int] = {}
        self._recorded_at = ""

    def check(self, position: int, entry: bytes, verdict: Verdict) -> Stated | None:
        """What an entry says of itself; what contradicts those before it is a fault."""
        try:
            seen = Stated.of(entry)
            adopted = adopted_in(entry) if seen.is_adoption else None
        except UNREADABLE as error:
            verdict.add(position, f"its bytes are no event: {error}")
            return None
        if adopted or not self._changes or self._changes[-1].ledger != seen.ledger:
            self._changes.append(Change(position, seen.ledger, adopted))
        before = self._versions.get(seen.stream_id, 0)
        self._versions[seen.stream_id] = seen.stream_version
        if seen.stream_type != OPAQUE and not self._follows(before, seen.stream_version):
            what = f"it is not the next version of the stream {seen.stream_id}"
            verdict.add(position, what, str(before + 1), str(seen.stream_version))
        if seen.recorded_at < self._recorded_at:
            what = "it was recorded before an entry that stands before it"
            verdict.add(position, what, self._recorded_at, seen.recorded_at)
        self._recorded_at = seen.recorded_at
        return seen

    def end(self, verdict: Verdict) -> None:
        """No more entries come: name those that were written for another ledger, and the epochs of this one."""
        verdict.epochs, wrong = epochs_of(self._origin, self._changes)
        for one in wrong:
            verdict.add(*one)

    def _follows(self, before: int, version: int) -> bool:
        return version == before + 1 if self._complete else version > before


def check_payload(position: int, seen: Stated, read: Read, verdict: Verdict) -> None:
    """Name what is wrong with the data beside an entry."""
    verdict.payloads += 1
    try:
        payload = read(f"payload/{seen.data_sha256}")
    except FileNotFoundError:
        verdict.add(position, "the data beside it is missing", seen.data_sha256)
        return
    found = sha256(payload).hexdigest()
    if (found, len(payload)) != (seen.data_sha256, seen.data_bytes):
        verdict.add(position, "the data beside it is not what it was recorded with", seen.data_sha256, found)


# A whole log


def verify_log(read: Read, trust: Trust, held: Collection[Checkpoint] = ()) -> Verdict:
    """Compute every leaf, every tile and the root again, and compare them with what is stored, what is signed, and what
    is `held`: checkpoints that were got earlier or elsewhere, and that are believed."""
    verdict = Verdict()
    try:
        verdict.signed = read_checkpoint(read("checkpoint"), trust)
    except (FileNotFoundError, InvalidNote) as error:
        verdict.add("checkpoint", "it is missing" if isinstance(error, OSError) else str(error))
        return verdict
    now = verdict.signed.checkpoint
    tree, order = _Tree(read), Order(now.origin, complete=True)
    other: Other = {}
    for index in range(-(-now.size // TILE_HASHES)):
        width = min(TILE_HASHES, now.size - index * TILE_HASHES)
        stored = _parts(read, "0", index, width, verdict)
        entries = _parts(read, "entries", index, width, verdict)
        leaves = [leaf_hash(entry) for entry in entries]
        if leaves and stored != leaves:
            other[index] = stored, leaves
        tree.extend(stored or leaves)
        for position, entry in enumerate(entries, index * TILE_HASHES + 1):
            seen = order.check(position, entry, verdict)
            if seen and seen.data_sha256:
                check_payload(position, seen, read, verdict)
        verdict.entries += len(entries)
        if not (stored or entries) and verdict.faulty >= FAULTS_MAX:
            break  # nothing more is there
    tree.end()
    order.end(verdict)
    if other:
        tree = _blamed(read, now, tree, other, verdict)
    for fault in tree.faults:
        verdict.add(*fault)
    if tree.root != now.root:
        what = f"the first {now.size} entries are not those that were signed"
        verdict.add("root", what, now.root.hex(), tree.root.hex() if tree.root else "none")
    sound = read if tree.root and not (other or tree.faults) else None
    verdict.epochs = [one._replace(is_here=_is_here(one, now.size, sound)) for one in verdict.epochs]
    for fault in _unlike(held, now, verdict.epochs, sound):
        verdict.add(*fault)
    return verdict


def _unlike(
    held: Collection[Checkpoint], now: Checkpoint, epochs: Collection[Epoch], read: Read | None
) -> Iterator[Fault]:
    """Which of the checkpoints that are held are not of the log's beginning. `read`: unless its tiles have faults."""
    for one in held:
        if gone := list(lost(one, epochs)):
            yield from (Fault(str(where), *what) for where, *what in gone)
        elif one.origin not in {now.origin, *(epoch.origin for epoch in epochs)}:
            yield Fault("checkpoint", "it is of another log than the one that is held", one.origin, now.origin)
        elif one.origin == now.origin and one.size > now.size:
            yield Fault("checkpoint", OLDER, str(one.size), str(now.size))
        elif read is not None and (found := _root_at(one.size, now.size, read)) != one.root:
            what = f"the first {one.size} entries are not those that were signed before"
            yield Fault("root", what, one.root.hex(), found.hex())


OLDER = "it ends before the one that is held: history was rolled back, or this is an older copy"


def _is_here(epoch: Epoch, size: int, read: Read | None) -> bool | None:
    if epoch.last is None or read is None:
        return None
    return epoch.last.size < epoch.position and _root_at(epoch.last.size, size, read) == epoch.last.root


def _root_at(size: int, now: int, read: Read) -> bytes:
    """The root of the first `size` of `now` entries, from tiles that were compared with them."""
    hashes = []
    for node in subtrees(Run(0, size)):
        tile = tile_of(node, now)
        hashes.append(in_tile(node, b"".join(_parts(read, str(tile.level), tile.index, tile.width, Verdict()))))
    return joined(hashes)


def _parts(read: Read, kind: str, index: int, width: int, verdict: Verdict) -> list[bytes]:
    """The hashes of a tile, or the entries of a bundle; none where it is not whole, which is a fault."""
    path = f"tile/{kind}/{tile_path(index, width)}"
    try:
        try:
            content, count = read(path), width
        except FileNotFoundError:
            # A file that has become full takes the place of those that were parts of it.
            content, count = read(f"tile/{kind}/{tile_path(index)}"), TILE_HASHES
    except FileNotFoundError:
        verdict.add(path, "it is missing")
        return []
    split = _split_entries if kind == "entries" else parted
    parts = split(content)
    if len(parts) == count:
        return parts[:width]
    first, last = index * TILE_HASHES + 1, index * TILE_HASHES + width
    verdict.add(path, f"it is not whole: it has positions {first} to {last}", str(count), str(len(parts)))
    return []


def _split_entries(bundle: bytes) -> list[bytes]:
    entries: list[bytes] = []
    at = 0
    while at < len(bundle) and len(entries) <= TILE_HASHES:
        end = at + 2 + int.from_bytes(bundle[at : at + 2])
        entries.append(bundle[at + 2 : end])
        at = end
    return entries if at == len(bundle) else []


class _Tree:
    """The tree over leaf hashes, made from the left, with the tiles above them compared."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._edge = Edge()
        self._full: dict[int, int] = {}
        self.has_hole = False
        self.faults: list[Fault] = []

    @property
    def root(self) -> bytes | None:
        return None if self.has_hole else self._edge.root

    def extend(self, leaves: Sequence[bytes]) -> None:
        """Add the next leaves; none where they are missing: from there on there is no root."""
        self.has_hole = self.has_hole or not leaves
        for level, hashes in self._edge.extend(() if self.has_hole else leaves):
            index = self._full[level] = self._full.get(level, -1) + 1
            self._compare(Tile(level, index), hashes)

    def end(self) -> None:
        """No more leaves come: compare the tiles that are not full."""
        for level, last in enumerate(() if self.has_hole else self._edge.levels):
            if last:
                self._compare(Tile(level, self._full.get(level, -1) + 1, len(last)), b"".join(last))

    def _compare(self, tile: Tile, made: bytes) -> None:
        if tile.level == 0:
            return
        seen = Verdict()
        stored = _parts(self._read, str(tile.level), tile.index, tile.width, seen)
        self.faults += seen.faults
        for place, (found, expected) in enumerate(zip(stored, parted(made), strict=False)):
            if found != expected:
                what = f"its hash {place} is not that of the tile below"
                self.faults.append(Fault(f"tile/{tile.path}", what, expected.hex(), found.hex()))


Other = dict[int, tuple[list[bytes], list[bytes]]]
"""Tiles of hashes, and the hashes of the entries there, where they differ."""


def _blamed(read: Read, signed: Checkpoint, tree: _Tree, other: Other, verdict: Verdict) -> _Tree:
    """Name what differs from its hash: entries if the hashes are those that were signed, and hashes if the entries are.
    Answers the tree of what was signed."""
    culprit = "entries"
    if tree.has_hole:
        culprit = "both"  # there is no root to tell them by; nor an end, perhaps, of what is missing
    elif tree.root != signed.root:
        made = _Tree(read)
        for index in range(-(-signed.size // TILE_HASHES)):
            width = min(TILE_HASHES, signed.size - index * TILE_HASHES)
            made.extend(other[index][1] if index in other else _parts(read, "0", index, width, Verdict()))
        made.end()
        tree, culprit = (made, "hashes") if made.root == signed.root else (tree, "both")
    for index, (stored, leaves) in other.items():
        for place, (hash_, leaf) in enumerate(zip(stored, leaves, strict=False)):
            position = index * TILE_HASHES + place + 1
            if hash_ == leaf:
                continue
            if culprit == "entries":
                verdict.add(position, "its bytes are not those that were signed", hash_.hex(), leaf.hex())
            elif culprit == "hashes":
                what = f"its hash {place} is not that of the entry at {position}"
                verdict.add(f"tile/0/{tile_path(index)}", what, leaf.hex(), hash_.hex())
            else:
                what = "its bytes and its hash differ, and neither leads to what was signed"
                verdict.add(position, what, hash_.hex(), leaf.hex())
    return tree
