"""What others have published: trees and paths, notes, cosignatures, and a talk with a witness, each held against ours.

The values are facts of their sources, which are named above them.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest

from ledger.checkpoint import (
    COSIGNATURE,
    ED25519,
    Checkpoint,
    InvalidNote,
    Note,
    Signature,
    SignerKey,
    VerifierKey,
    check_checkpoint,
)
from ledger.merkle import (
    Edge,
    InvalidProof,
    Node,
    Run,
    check_consistency,
    check_inclusion,
    consistency,
    inclusion,
    joined,
    leaf_hash,
    node_hash,
    subtrees,
)
from ops.witness import opened
from tests.witnesses import RunningWitness

# Trees. The eight leaves of the reference tests of Certificate Transparency (RFC 6962), the hash of every complete
# subtree, the root at every size, and the paths and what is wrong with others: transparency-dev/merkle, testonly and
# testdata, at 417fb0c3.

LEAVES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
SUBTREES = [
    [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "0298d122906dcfc10892cb53a73992fc5b9f493ea4c9badb27b791b4127a7fe7",
        "07506a85fd9dd2f120eb694f86011e5bb4662e5c415a62917033d4a9624487e7",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "4271a26be0d8a84f0bd54c8c302e7cb3a3b5d1fa6780a40bcce2873477dab658",
        "b08693ec2e721597130641e8211e7eedccb4c26413963eee6c1e2ed16ffb1a5f",
        "46f6ffadd3d06a09ff3c5860d2755c8b9819db7df44251788c7d8e3180de8eb1",
    ],
    [
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
    ],
    [
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    ["5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"],
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
Places = list[tuple[int, int]]

INCLUSION: list[tuple[int, int, Places]] = [  # index, size, the path as (level, index) of its subtrees
    (0, 1, []),
    (0, 8, [(0, 1), (1, 1), (2, 1)]),
    (5, 8, [(0, 4), (1, 3), (2, 0)]),
    (2, 3, [(1, 0)]),
    (1, 5, [(0, 0), (1, 1), (0, 4)]),
]
CONSISTENCY: list[tuple[int, int, Places]] = [  # from which size to which
    (1, 1, []),
    (1, 8, [(0, 1), (1, 1), (2, 1)]),
    (6, 8, [(1, 2), (1, 3), (2, 0)]),
    (2, 5, [(1, 1), (0, 4)]),
    (6, 7, [(1, 2), (0, 6), (2, 0)]),
]
STRANGE = leaf_hash(b"not of the tree")


def subtree(level: int, index: int) -> bytes:
    return bytes.fromhex(SUBTREES[level][index])


def root(size: int) -> bytes:
    return bytes.fromhex(ROOTS[size])


def made(runs: list[Run]) -> list[bytes]:
    """A path as a log makes it, from the published hashes."""
    return [joined([subtree(*_place(node)) for node in subtrees(run)]) for run in runs]


def _place(node: Node) -> tuple[int, int]:
    return node.level, node.index


def spoiled(path: list[bytes], *roots: bytes) -> Iterator[list[bytes]]:
    """What the published cases make of a path: too long at either end or inside, too short, another bit."""
    for more in (STRANGE, b"", *roots):
        yield from ([more, *path], [*path, more])
    for place in range(len(path)):
        yield path[:place]
        yield [*path[:place], STRANGE, *path[place:]]
        for bit in (3, 4):
            yield [*path[:place], bytes([path[place][0] ^ 1 << bit]) + path[place][1:], *path[place + 1 :]]


def test_every_subtree_and_every_root_is_the_published_one() -> None:
    leaves = [leaf_hash(bytes.fromhex(leaf)) for leaf in LEAVES]
    assert [leaf.hex() for leaf in leaves] == SUBTREES[0]
    for below, above in pairwise(SUBTREES):
        pairs = zip(map(bytes.fromhex, below[::2]), map(bytes.fromhex, below[1::2]), strict=True)
        assert [node_hash(*pair).hex() for pair in pairs] == above
    for size in range(9):
        edge = Edge()
        edge.extend(leaves[:size])
        assert edge.root.hex() == ROOTS[size]


@pytest.mark.parametrize(("index", "size", "path"), INCLUSION)
def test_a_path_to_a_leaf_is_the_published_one_and_what_is_published_as_wrong_is_wrong(
    index: int, size: int, path: Places
) -> None:
    leaf, proof = subtree(0, index), [subtree(*place) for place in path]
    assert made(inclusion(index, size)) == proof
    check_inclusion(leaf, index, proof, size, root(size))
    wrong = [(leaf, index, hashes, size, root(size)) for hashes in spoiled(proof, root(size), leaf)]
    wrong += [(leaf, other, proof, size, root(size)) for other in (index - 1, index + 1, index ^ 2)]
    wrong += [(leaf, index, proof, other, root(size)) for other in (size * 2, size // 2)]
    wrong += [
        (STRANGE, index, proof, size, root(size)),
        (leaf, index, proof, size, STRANGE),
        (leaf, index, [], 0, leaf),
    ]
    wrong += [(leaf, index, proof, size, b""), (b"", index, proof, size, root(size))]
    for case in wrong:
        with pytest.raises(InvalidProof):
            check_inclusion(*case)


@pytest.mark.parametrize(("old", "new", "path"), CONSISTENCY)
def test_a_path_from_a_size_to_another_is_the_published_one_and_what_is_published_as_wrong_is_wrong(
    old: int, new: int, path: Places
) -> None:
    proof = [subtree(*place) for place in path]
    assert made(consistency(old, new)) == proof
    check_consistency(old, root(old), new, root(new), proof)
    wrong = [(old, root(old), new, root(new), hashes) for hashes in spoiled(proof, root(old), root(new))]
    wrong += [(other, root(old), new, root(new), proof) for other in (old - 1, old + 1, old ^ 2)]
    wrong += [(old, root(old), other, root(new), proof) for other in (new * 2, new // 2)]
    wrong += [(old, STRANGE, new, root(new), proof), (old, root(old), new, STRANGE, proof)]
    if old != new:
        wrong += [(old, root(new), new, root(old), proof), (old, root(old), new, root(new), [])]
    for case in wrong:
        with pytest.raises(InvalidProof):
            check_consistency(*case)


@pytest.mark.parametrize(
    ("old", "new", "roots", "proof"),
    [
        (0, 0, (STRANGE, root(1)), []),
        (0, 0, (root(0), root(0)), [STRANGE]),
        (0, 1, (root(0), root(1)), [STRANGE]),
        (1, 1, (root(1), STRANGE), []),
        (1, 1, (root(1), root(1)), [STRANGE]),
        (2, 1, (root(2), root(1)), []),
        (1, 0, (root(1), root(0)), []),
        (1, 2, (root(1), root(2)), []),
    ],
)
def test_between_sizes_that_are_hardly_any_nothing_else_is_believed(
    old: int, new: int, roots: tuple[bytes, bytes], proof: list[bytes]
) -> None:
    with pytest.raises(InvalidProof):
        check_consistency(old, roots[0], new, roots[1], proof)


# Notes. PeterNeumann's and EnochRoot's: golang.org/x/mod, sumdb/note, at fe2ec04f, which makes the same bytes, for
# Ed25519 signs a text in one way only. What sum.golang.org signed: transparency-dev/formats, log, at 0b850f1a.

PETER = SignerKey(
    "PeterNeumann", ED25519, bytes.fromhex("810a1402d5146c8d84f2443330f54080ebf98ee17d9c74f6252fc5d5c7283173")
)
PETERS_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
PETERS_TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
PETERS_LINE = (
    "\u2014 PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)
ENOCHS_LINE = (
    "\u2014 EnochRoot rwz+eBzmZa0SO3NbfRGzPCpDckykFXSdeX+MNtCOXm2/5n2tiOHp+vAF1aGrQ5ovTG01oOTGwnWLox33WWd1RvMc+QQ=\n"
)

SUMDB_KEY = "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"
SUMDB_NOTE = """go.sum database tree
6476701
mb8QLQIs0Z0yP5Cstq6guj87oXWeC9gEM8oVikmm9Wk=

\u2014 sum.golang.org Az3grsLX85Gz+s1SiTbgkuqxgItqFq7gsMUEyVnrsa9LM7Us9S+1xbFIGu95949rj4nPRYfvimWEPWL+o3GeoWwOoAw=
"""


def test_a_note_is_signed_as_go_signs_it() -> None:
    assert str(PETER.verifier) == PETERS_KEY
    assert str(PETER.sign(PETERS_TEXT)) == PETERS_LINE


def test_a_note_that_others_have_signed_too_is_read_and_believed_for_who_is_known() -> None:
    key = VerifierKey.parse(PETERS_KEY)
    for lines in (PETERS_LINE, PETERS_LINE + ENOCHS_LINE, ENOCHS_LINE + PETERS_LINE):
        note = Note.parse(f"{PETERS_TEXT}\n{lines}".encode())
        assert note.verified([key]) == {key: None}
    with pytest.raises(InvalidNote, match="no key that is known here"):
        Note.parse(f"{PETERS_TEXT}\n{ENOCHS_LINE}".encode()).verified([key])
    with pytest.raises(InvalidNote, match="not one of this text"):
        Note.parse(f"{PETERS_TEXT}And more.\n\n{PETERS_LINE}".encode()).verified([key])


def test_a_checkpoint_of_the_go_checksum_database_is_believed_for_its_key() -> None:
    key = VerifierKey.parse(SUMDB_KEY)
    note = Note.parse(SUMDB_NOTE.encode())
    assert note.verified([key]) == {key: None}
    checkpoint = Checkpoint.parse(note.text)
    assert (checkpoint.origin, checkpoint.size) == ("go.sum database tree", 6476701)
    assert checkpoint.text == note.text


# Cosignatures. A log of certificates at work, and three witnesses that others run, with their published keys:
# the checkpoint is one of arche2025h1.staging.ct.transparency.dev. It has a signature of the log's of a type that is
# not known here (RFC 6962), and one of Ed25519. The example of C2SP tlog-cosignature, at 5ba5ee83, has no key.

COSIGNED_LOG = "arche2025h1.staging.ct.transparency.dev+ba2f06c0+AU0vHmlGCS/PdN8b2OaGmKprLI8HKM+dJ472xgFYh15f"
COSIGNERS = [
    "remora.n621.de+da77ade7+BOvN63jn/bLvkieywe8R6UYAtVtNbZpXh34x7onlmtw2",
    "witness1.smartit.nu/witness1+a48c820f+BPSFWg9G6KPiO7QPryYO5Xq4oYJJ+kAvLKLSimDhoxMO",
    "transparency.dev/DEV:witness-little-garden+d8042a87+BCtusOxINQNUTN5Oj8HObRkh2yHf/MwYaGX4CPdiVEPM",
]
COSIGNED = """arche2025h1.staging.ct.transparency.dev
1432088532
U7WM79jrzyhGZ5/GUBTpM7NzwdyfFx61t3RovgcC4Ro=

\u2014 arche2025h1.staging.ct.transparency.dev \
zTM8sQAAAZ5W0WdjBAMARjBEAiBjW5IQf9pvsYLfQFX6hoGREPMHbdQ3urbllzalApkptQIgIpwtEroeW2BXaHAI4kJXFbon5Ch9MNL5zRNZ55lvGt0=
\u2014 arche2025h1.staging.ct.transparency.dev \
ui8GwCF1+kWqZrxGdhj4aX3gcw7XUlXQQabg/27lefwhUkzbC3NygNI75MdhL1bfTW9g8Ei59RA23oHP7Ry1k3ZFWwQ=
\u2014 transparency.dev/DEV:witness-little-garden \
2AQqhwAAAABqEiEgzgFIqqhbUoDwjMWE6UP8nd8/KYTzwZ2rhIgcqoXHAwVkjZr4AscylP3v7sEodkRAErumC2q44vdgJY096st5BQ==
\u2014 witness1.smartit.nu/witness1 \
pIyCDwAAAABqEiEghIp82KWebrw7/oHQwlTAm3g2RKS4+eebl8eO0WH+/iEcxZ75W3u5hNI7TOQtmJbqmNWVuE0tgh0XwzdZsDsUAQ==
\u2014 remora.n621.de \
2net5wAAAABqEiEgPlfF3V06o0Y+fHM+J5J9s27wgxxcOVSpZ/2g/KSiXCg9DEZI+aVCIobWX9sXTynk5XeU/zZ0WBxtqB0DrAWfBw==
\u2014 witness.stagemole.eu \
Z/euoAAAAABqEiEgw0i+7g2ENfDAWHmtRzCfKTHSDwYDJA2NmKeGi9Y8FtEyOUvVr+AJmIY/2TUFucgKi7lI7cUiOvKFYe/TmN9DAg==
"""
EXAMPLE = """example.com/behind-the-sofa
20852163
CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=

\u2014 example.com/behind-the-sofa \
Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=
\u2014 witness.example.com/w1 \
jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==
"""


def test_what_witnesses_at_work_have_cosigned_is_believed_and_when() -> None:
    note, log = Note.parse(COSIGNED.encode()), VerifierKey.parse(COSIGNED_LOG)
    witnesses = [VerifierKey.parse(key) for key in COSIGNERS]
    assert [str(key) for key in witnesses] == COSIGNERS
    assert {key.type for key in witnesses} == {COSIGNATURE}
    assert note.verified([log, *witnesses]) == {log: None} | dict.fromkeys(
        witnesses, datetime(2026, 5, 23, 21, 50, 24, tzinfo=UTC)
    )
    assert check_checkpoint(note, [log], witnesses, 3).size == 1432088532
    assert str(note) == COSIGNED


def test_a_cosignature_of_another_text_or_time_is_not_believed() -> None:
    for was, becomes in (("1432088532", "1432088533"), ("2net5wAAAABqEiEg", "2net5wAAAABqEiEh")):
        changed = Note.parse(COSIGNED.replace(was, becomes).encode())
        with pytest.raises(InvalidNote, match=r"remora\.n621\.de"):
            changed.verified([VerifierKey.parse(COSIGNERS[0])])


def test_the_example_in_the_specification_is_read_as_it_was_written() -> None:
    note = Note.parse(EXAMPLE.encode())
    assert str(note) == EXAMPLE
    assert Checkpoint.parse(note.text).text == note.text
    (_, witness) = note.signatures
    assert len(witness.signature) == 8 + 64
    assert datetime.fromtimestamp(int.from_bytes(witness.signature[:8]), UTC).year == 2023


# A talk with a witness, and how it must answer: the tests of litewitness, FiloSottile/torchwood, at 341dc2f0. The text
# of the log is signed by what nobody here has the key of.

ORIGIN = "sigsum.org/v1/tree/4d6d8825a6bb689d459628312889dfbb0bcd41b5211d9e1ce768b0ff0309e562"
ORIGIN_KEY = VerifierKey(
    ORIGIN, ED25519, bytes.fromhex("ffdc2d4d98e4124d3feaf788c0c2f9abfd796083d1f0495437f302ec79cf100f")
)


def zeros(start: str) -> str:
    """A hash of which but the beginning is given."""
    return start + "A" * (43 - len(start)) + "="


OF_1 = (1, zeros("Kg"), "UgIom7fPZTqpxWWhyjWduBvTvGVqsokMbqTArsQilegKoFBJQjUFAmQ0+YeSPM3wfUQMFSzVnnNuWRTYrajXpNUbIQY=")
OF_3 = (
    3,
    "RcCI1Nk56ZcSmIEfIn0SleqtV7uvrlXNccFx595Iwl0=",
    "UgIom2VbtIcdFbwFAy1n7s6IkAxIY6J/GQOTuZF2ORV39d75cbAj2aQYwyJre36kezNobZs4SUUdrcawfAB8WVrx6go=",
)
OF_5 = (
    5,
    "QrtXrQZCCvpIgsSmOsah7HdICzMLLyDfxToMql9WTjY=",
    "UgIomw/EOJmWi0i1FQsOj+etB7F8IccFam/jgd6wzRns4QPVmyEZtdvl1U2KEmLOZ/ASRcWJi0tW90dJWAShei7sDww=",
)
FORGED_3 = (3, OF_3[1], OF_3[2].replace("x6go=", "x6gx="))
FROM_1_TO_3 = [zeros("KgE"), zeros("KgI")]
FROM_1_TO_5 = [zeros("KgE"), "+fUDV+k970B4I3uKrqJM4aP1lloPZP8mvr2Z4wRw2LI=", zeros("KgQ")]
FROM_3_TO_5 = [zeros("KgI"), zeros("KgM"), "wgiIFdZfYNv6WU1OllBKsWnLYIS/DBMqt8Uh/S4OukE=", zeros("KgQ")]
TALK = [
    (0, [], ORIGIN, OF_1, 200),
    (1, FROM_1_TO_3, ORIGIN, FORGED_3, 403),
    (1, FROM_1_TO_3, ORIGIN.replace("e562", "e563"), OF_3, 403),  # by now 404, for a log that is not known
    (1, [], ORIGIN, OF_3, 422),
    (1, [FROM_1_TO_3[0], FROM_1_TO_3[1].replace("AAA=", "ABA=")], ORIGIN, OF_3, 422),
    (1, FROM_1_TO_3, ORIGIN, OF_3, 200),
    (1, FROM_1_TO_5, ORIGIN, OF_5, 409),
    (3, FROM_3_TO_5, ORIGIN, OF_5, 200),
    (0, [], ORIGIN, OF_5, 409),
]


def test_a_witness_answers_as_those_of_others_do(tmp_path: Path) -> None:
    with RunningWitness(tmp_path / "witness") as witness:
        with opened(witness.home) as same:
            same.add_log(ORIGIN_KEY)
        seen = 0
        for old, proof, origin, (size, hash_, signature), code in TALK:
            text = f"{origin}\n{size}\n{hash_}\n"
            lines = "".join(f"{one}\n" for one in proof)
            answer = witness.post(f"old {old}\n{lines}\n{text}\n\u2014 {origin} {signature}\n".encode())
            assert answer.status_code == (code if origin == ORIGIN else 404), answer.text
            if code == 200:
                line = Signature.parse(answer.text.removesuffix("\n"))
                assert Note(text, (line,)).verified([witness.key])
                seen = size
            elif code == 409:
                assert (answer.text, answer.headers["content-type"]) == (f"{seen}\n", "text/x.tlog.size")
