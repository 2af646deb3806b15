"""The tree's maths, held against the definitions in RFC 9162 s2.1, which are written out here a second time."""

import base64
from collections import Counter
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger import merkle
from ledger.merkle import (
    EMPTY_ROOT,
    TILE_HASHES,
    Edge,
    InvalidProof,
    Node,
    Run,
    Tile,
    check_consistency,
    check_inclusion,
    consistency,
    in_tile,
    inclusion,
    joined,
    leaf_hash,
    node_hash,
    read_tile_path,
    subtrees,
    tile_of,
    tile_path,
    tiles,
)

LEAVES = [leaf_hash(b"%d" % number) for number in range(2_000)]
SIZES = st.integers(0, len(LEAVES))


def mth(leaves: Sequence[bytes]) -> bytes:
    """RFC 9162 s2.1.1, word for word."""
    if not leaves:
        return EMPTY_ROOT
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return node_hash(mth(leaves[:split]), mth(leaves[split:]))


@cache
def root(size: int) -> bytes:
    return mth(LEAVES[:size])


def hashes_of(runs: list[Run]) -> list[bytes]:
    """As a log makes a proof: from complete subtrees."""
    return [joined([_hash(node) for node in subtrees(run)]) for run in runs]


@cache
def _hash(node: Node) -> bytes:
    return mth(LEAVES[node.index << node.level : (node.index + 1) << node.level])


def test_a_leaf_and_the_root_of_nothing_are_those_that_others_make() -> None:
    assert base64.b64encode(leaf_hash(b"hello world")) == b"TszzRgjTG6xce+z2AG31kAXYKBgQVtCSCE40HmuwBb0="
    assert Edge().root.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@given(SIZES)
def test_the_subtrees_of_a_tree_make_its_root(size: int) -> None:
    (whole,) = hashes_of([Run(0, size)])
    assert whole == root(size)


@given(st.data())
def test_an_inclusion_proof_shows_its_leaf_and_no_other(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(LEAVES)))
    index = data.draw(st.integers(0, size - 1))
    proof = hashes_of(inclusion(index, size))
    check_inclusion(LEAVES[index], index, proof, size, root(size))
    elsewhere = data.draw(st.integers(0, size + 1).filter(lambda other: other != index))
    for leaf, place, hashes, leaves in (
        (leaf_hash(b"another"), index, proof, size),
        (LEAVES[index], elsewhere, proof, size),
        (LEAVES[index], index, [*proof, proof[0] if proof else root(size)], size),
        *((LEAVES[index], index, proof[:place] + proof[place + 1 :], size) for place in range(len(proof))),
        *((LEAVES[index], index, _changed(proof, place), size) for place in range(len(proof))),
    ):
        with pytest.raises(InvalidProof):
            check_inclusion(leaf, place, hashes, leaves, root(size))
    with pytest.raises(InvalidProof):
        check_inclusion(LEAVES[index], index, proof, size, leaf_hash(b"another root"))


@given(st.data())
def test_a_consistency_proof_shows_that_a_tree_grew(data: st.DataObject) -> None:
    new = data.draw(st.integers(1, len(LEAVES)))
    old = data.draw(st.integers(0, new))
    proof = hashes_of(consistency(old, new))
    check_consistency(old, root(old), new, root(new), proof)
    for hashes in (
        [*proof, root(new)],
        *(proof[:place] + proof[place + 1 :] for place in range(len(proof))),
        *(_changed(proof, place) for place in range(len(proof))),
    ):
        with pytest.raises(InvalidProof):
            check_consistency(old, root(old), new, root(new), hashes)
    with pytest.raises(InvalidProof):
        check_consistency(old, leaf_hash(b"a fork"), new, root(new), proof)
    if old:
        with pytest.raises(InvalidProof):
            check_consistency(old, root(old), new, leaf_hash(b"a fork"), proof)


def test_what_is_no_proof_is_refused_not_followed() -> None:
    with pytest.raises(InvalidProof, match="none with index"):
        check_inclusion(LEAVES[0], 3, [], 3, root(3))
    with pytest.raises(InvalidProof, match="no beginning"):
        check_consistency(4, root(4), 3, root(3), [])
    with pytest.raises(InvalidProof, match="32 bytes"):
        check_inclusion(LEAVES[0], 0, [LEAVES[1][:31]], 2, root(2))
    with pytest.raises(ValueError, match="none with index"):
        inclusion(3, 3)
    with pytest.raises(ValueError, match="no beginning"):
        consistency(4, 3)


@given(st.lists(st.integers(1, 600), max_size=12))
def test_a_tree_goes_on_from_its_right_edge_alone(steps: list[int]) -> None:
    edge, size, full = Edge(), 0, Counter[int]()
    for step in steps:
        step = min(step, len(LEAVES) - size)
        for level, content in edge.extend(LEAVES[size : size + step]):
            first = full[level] * TILE_HASHES
            assert content == b"".join(_level(level)[first : first + TILE_HASHES])
            full[level] += 1
        size += step
        edge = Edge(edge.levels)
        assert edge.root == root(size)


def _level(level: int) -> list[bytes]:
    hashes = LEAVES
    for _ in range(8 * level):
        hashes = merkle.halved(hashes)
    return hashes


@pytest.mark.parametrize(
    ("size", "there"),
    [
        (1, {(0, 1): 1}),
        (255, {(0, 255): 1}),
        (256, {(0, 256): 1, (1, 1): 1}),
        (70_000, {(0, 256): 273, (0, 112): 1, (1, 256): 1, (1, 17): 1, (2, 1): 1}),
    ],
)
def test_a_tree_has_the_tiles_that_the_specification_says(size: int, there: dict[tuple[int, int], int]) -> None:
    assert Counter((tile.level, tile.width) for tile in tiles(size)) == there


@given(st.integers(0, 200_000), st.integers(0, 3_000))
def test_a_tree_that_grew_has_new_tiles_for_what_is_new(old: int, more: int) -> None:
    new = set(tiles(old + more))
    assert set(tiles(old + more, old)) == new - set(tiles(old))


@given(st.data())
def test_every_subtree_is_made_from_one_tile(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(LEAVES)))
    first = data.draw(st.integers(0, size - 1))
    for node in subtrees(Run(first, size)):
        tile = tile_of(node, size)
        assert tile in set(tiles(size))
        hashes = _level(tile.level)[tile.index * TILE_HASHES : tile.index * TILE_HASHES + tile.width]
        assert in_tile(node, b"".join(hashes)) == _hash(node)


@pytest.mark.parametrize(
    ("index", "width", "path"),
    [(0, 256, "000"), (255, 256, "255"), (1_000, 1, "x001/000.p/1"), (1_234_067, 256, "x001/x234/067")],
)
def test_a_tile_is_found_where_the_specification_says(index: int, width: int, path: str) -> None:
    assert tile_path(index, width) == path
    assert Tile(3, index, width).path == f"3/{path}"


@given(st.integers(0, 10**12), st.integers(1, 256))
def test_the_path_of_a_tile_is_read_as_it_was_written(index: int, width: int) -> None:
    assert read_tile_path(tile_path(index, width)) == (index, width)


@pytest.mark.parametrize(
    "path",
    [
        *(
            "",
            "0",
            "0000",
            "x000/000",
            "000/000",
            "x001/x000",
            "x1/000",
            "-01",
            "+01",
            " 00",
            "\u0660\u0660\u0660",
            "000/",
            "xx01/000",
        ),
        *("000.p/0", "000.p/256", "000.p/257", "000.p/01", "000.p/", "000.p", "000.p/1/", "000.p/1.p/1"),
    ],
)
def test_a_path_that_is_written_otherwise_is_no_tile(path: str) -> None:
    with pytest.raises(ValueError, match="not the path of a tile"):
        read_tile_path(path)


def _changed(hashes: list[bytes], place: int) -> list[bytes]:
    return [*hashes[:place], bytes(byte ^ 1 for byte in hashes[place]), *hashes[place + 1 :]]
