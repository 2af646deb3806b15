"""The tree over a ledger: which hashes a root or a proof is made of, how they are made one, how they are checked.

RFC 9162 s2.1 (the hashes are those of RFC 6962), and the tiles of C2SP tlog-tiles. Everything is a pure function.
What a log must look up is named first, as complete subtrees, so that one query can bring all of it:

    proof = [joined([hashes[node] for node in subtrees(run)]) for run in inclusion(index, size)]

`Node(level, index)` is the complete subtree over the leaves index * 2**level up to (index + 1) * 2**level.
"""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import NamedTuple

HASH_BYTES = 32
EMPTY_ROOT = sha256(b"").digest()

TILE_LEVELS = 8
TILE_HASHES = 1 << TILE_LEVELS


class Node(NamedTuple):
    """A complete subtree: over 2**level leaves, the first of which is index * 2**level."""

    level: int
    index: int  # type: ignore[assignment]  # a tuple's own `index` is nothing anybody asks of one


class Run(NamedTuple):
    """Leaves from `first` up to, not including, `end`; its hash is MTH(D[first:end]), where that is a subtree."""

    first: int
    end: int


class InvalidProof(ValueError):
    """A proof does not show what it should; the message says which step fails."""


def leaf_hash(entry: bytes) -> bytes:
    """RFC 9162 s2.1.1: SHA-256(0x00 || entry)."""
    return sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """RFC 9162 s2.1.1: SHA-256(0x01 || left || right)."""
    return sha256(b"\x01" + left + right).digest()


# What is made of what


def subtrees(run: Run) -> list[Node]:
    """The fewest complete subtrees that cover a run, from the left: O(log n)."""
    nodes = []
    first, end = run
    while first < end:
        # The largest that begins here, and does not reach beyond the end.
        level = min((end - first).bit_length() - 1, (first & -first).bit_length() - 1 if first else 64)
        nodes.append(Node(level, first >> level))
        first += 1 << level
    return nodes


def joined(hashes: Sequence[bytes]) -> bytes:
    """The hash of a run of which these are the subtrees, from the left."""
    if not hashes:
        return EMPTY_ROOT
    *left, whole = hashes
    for one in reversed(left):
        whole = node_hash(one, whole)
    return whole


def halved(hashes: Sequence[bytes]) -> list[bytes]:
    """The level above these; a last one without a sibling is left out."""
    return [node_hash(left, right) for left, right in zip(hashes[::2], hashes[1::2], strict=False)]


def inclusion(index: int, size: int) -> list[Run]:
    """RFC 9162 s2.1.3.1, PATH(m, D_n): the runs whose hashes are the proof, from the leaf to the root."""
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has none with index {index}")
    path: list[Run] = []
    first, end = 0, size
    while end - first > 1:
        middle = first + _split(end - first)
        if index < middle:
            path.append(Run(middle, end))
            end = middle
        else:
            path.append(Run(first, middle))
            first = middle
    return path[::-1]


def consistency(old: int, new: int) -> list[Run]:
    """RFC 9162 s2.1.4.1, PROOF(m, D_n): the runs whose hashes show that a tree of `old` leaves is the beginning of one
    of `new`. For equal sizes, and for the empty tree, which begins every other, there is nothing to show."""
    if not 0 <= old <= new:
        raise ValueError(f"a tree of {old} leaves is no beginning of one of {new}")
    if old in (0, new):
        return []
    path: list[Run] = []
    first, end = 0, new
    while end != old:
        middle = first + _split(end - first)
        if old <= middle:
            path.append(Run(middle, end))
            end = middle
        else:
            path.append(Run(first, middle))
            first = middle
    if first:
        path.append(Run(first, end))
    return path[::-1]


def _split(size: int) -> int:
    """The largest power of two below `size`."""
    return 1 << (size - 1).bit_length() - 1


# What a reader checks


def check_inclusion(leaf: bytes, index: int, proof: Sequence[bytes], size: int, root: bytes) -> None:
    """RFC 9162 s2.1.3.2. Raises InvalidProof unless `leaf` is the hash at `index` of the tree of that size and root."""
    if not 0 <= index < size:
        raise InvalidProof(f"a tree of {size} leaves has none with index {index}")
    _check_hashes([leaf, *proof, root])
    place, last, seen = index, size - 1, leaf
    for sibling in proof:
        if not last:
            raise InvalidProof("the proof goes on beyond the root")
        if place & 1 or place == last:
            seen = node_hash(sibling, seen)
            while place and not place & 1:
                place, last = place >> 1, last >> 1
        else:
            seen = node_hash(seen, sibling)
        place, last = place >> 1, last >> 1
    if last:
        raise InvalidProof("the proof ends before the root")
    if seen != root:
        raise InvalidProof("the proof leads to another root")


def check_consistency(old: int, old_root: bytes, new: int, new_root: bytes, proof: Sequence[bytes]) -> None:
    """RFC 9162 s2.1.4.2. Raises InvalidProof unless the tree of size `old` is the beginning of that of size `new`."""
    if not 0 <= old <= new:
        raise InvalidProof(f"a tree of {old} leaves is no beginning of one of {new}")
    _check_hashes([old_root, new_root, *proof])
    if old in (0, new):
        _check_same(old, old_root, new, new_root, proof)
        return
    place, last = old - 1, new - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    # Where `old` is a power of two, its root is a subtree of the new tree too, and not said again.
    path = list(proof) if place else [old_root, *proof]
    if not path:
        raise InvalidProof("the proof is empty")
    was = now = path[0]
    for sibling in path[1:]:
        if not last:
            raise InvalidProof("the proof goes on beyond the root")
        if place & 1 or place == last:
            was, now = node_hash(sibling, was), node_hash(sibling, now)
            while place and not place & 1:
                place, last = place >> 1, last >> 1
        else:
            now = node_hash(now, sibling)
        place, last = place >> 1, last >> 1
    if last:
        raise InvalidProof("the proof ends before the root")
    if was != old_root:
        raise InvalidProof("the proof does not begin at the older root")
    if now != new_root:
        raise InvalidProof("the proof leads to another root")


def _check_same(old: int, old_root: bytes, new: int, new_root: bytes, proof: Sequence[bytes]) -> None:
    """Where there is nothing to show: a tree is the beginning of itself, and the empty one of every other."""
    if proof:
        raise InvalidProof("nothing is to be shown here, but the proof is not empty")
    if not old and old_root != EMPTY_ROOT:
        raise InvalidProof("the empty tree has another root")
    if old == new and old_root != new_root:
        raise InvalidProof("trees of one size have two roots")


def _check_hashes(hashes: Sequence[bytes]) -> None:
    if any(len(one) != HASH_BYTES for one in hashes):
        raise InvalidProof(f"a hash has not {HASH_BYTES} bytes")


# Tiles


class Tile(NamedTuple):
    """C2SP tlog-tiles: hashes of level 8 * `level`, `width` of them (256 where it is full), from 256 * `index` on."""

    level: int
    index: int  # type: ignore[assignment]  # a tuple's own `index` is nothing anybody asks of one
    width: int = TILE_HASHES

    @property
    def path(self) -> str:
        """`<L>/<N>[.p/<W>]`, as it stands behind `tile/`."""
        return f"{self.level}/{tile_path(self.index, self.width)}"


def parted(hashes: bytes) -> list[bytes]:
    """The hashes that stand one behind the other."""
    return [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]


def tile_path(index: int, width: int = TILE_HASHES) -> str:
    """`<N>[.p/<W>]`: the number in groups of three digits, all but the last behind an `x`."""
    groups = [f"{index % 1000:03}"]
    while index := index // 1000:
        groups.append(f"x{index % 1000:03}")
    return "/".join(groups[::-1]) + (f".p/{width}" if width != TILE_HASHES else "")


def read_tile_path(path: str) -> tuple[int, int]:
    """Index and width that `tile_path` made this of. Raises ValueError for anything else."""
    groups, partial, width = path.partition(".p/")
    digits = groups.replace("/x", "").removeprefix("x").replace("/", "")
    if digits.isdecimal() and digits.isascii() and (width.isdecimal() or not partial):
        index, wide = int(digits), int(width or TILE_HASHES)
        if 0 < wide <= TILE_HASHES and tile_path(index, wide) == path:
            return index, wide
    raise ValueError(f"{path} is not the path of a tile")


def tiles(size: int, since: int = 0) -> Iterator[Tile]:
    """The tiles of a tree of `size` leaves that one of `since` leaves has not, or has less of; the leaves' first."""
    level = 0
    while size:
        for index in range(since // TILE_HASHES, -(-size // TILE_HASHES)):
            width = min(size - index * TILE_HASHES, TILE_HASHES)
            if index * TILE_HASHES + width > since:
                yield Tile(level, index, width)
        level, size, since = level + 1, size // TILE_HASHES, since // TILE_HASHES


def tile_of(node: Node, size: int) -> Tile:
    """The tile that a node's hash is made from, in a tree of `size` leaves."""
    level, above = divmod(node.level, TILE_LEVELS)
    index = node.index >> (TILE_LEVELS - above)
    there = (size >> TILE_LEVELS * level) - index * TILE_HASHES
    return Tile(level, index, min(there, TILE_HASHES))


def in_tile(node: Node, hashes: bytes) -> bytes:
    """The hash of a node, from those of its tile."""
    above = node.level % TILE_LEVELS
    first = (node.index << above) % TILE_HASHES
    level = [hashes[place * HASH_BYTES : (place + 1) * HASH_BYTES] for place in range(first, first + (1 << above))]
    _check_hashes(level)
    while len(level) > 1:
        level = halved(level)
    return level[0]


class Edge:
    """The right edge of a growing tree: at each tile level the hashes of the tile that is not full yet. From it alone
    the root is made, and the tree goes on: `levels` and nothing else must be kept."""

    def __init__(self, levels: Sequence[Sequence[bytes]] = ()) -> None:
        self.levels = [list(hashes) for hashes in levels]

    def extend(self, leaves: Sequence[bytes]) -> list[tuple[int, bytes]]:
        """Add leaf hashes; answers the tiles that are full now, each with its level, in the order of each level."""
        full: list[tuple[int, bytes]] = []
        level, hashes = 0, list(leaves)
        while hashes:
            if level == len(self.levels):
                self.levels.append([])
            there = self.levels[level] + hashes
            whole = len(there) - len(there) % TILE_HASHES
            hashes = []
            for first in range(0, whole, TILE_HASHES):
                tile = there[first : first + TILE_HASHES]
                full.append((level, b"".join(tile)))
                while len(tile) > 1:
                    tile = halved(tile)
                hashes += tile
            self.levels[level] = there[whole:]
            level += 1
        return full

    @property
    def root(self) -> bytes:
        """RFC 9162 s2.1.1, MTH(D_n)."""
        peaks: list[bytes] = []
        for hashes in self.levels:
            # From the right: the last complete subtree of a level is the smallest.
            end = len(hashes)
            while end:
                width = end & -end
                peak = hashes[end - width : end]
                while len(peak) > 1:
                    peak = halved(peak)
                peaks += peak
                end -= width
        return joined(peaks[::-1])
