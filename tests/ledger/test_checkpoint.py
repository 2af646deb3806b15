"""Notes, checkpoints and proofs: what others made is believed, and nothing that was changed is."""

from base64 import b64encode
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.checkpoint import (
    COSIGNATURE,
    ED25519,
    SIGNATURES_MAX,
    Checkpoint,
    InclusionProof,
    InvalidNote,
    Note,
    Signature,
    SignerKey,
    VerifierKey,
    check_checkpoint,
    check_signed,
    read_hash,
)
from ledger.merkle import EMPTY_ROOT, InvalidProof, leaf_hash, node_hash
from ledger.verify import Trust, verify_proof

PUBLISHED_KEY = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
PUBLISHED_NOTE = (
    "This is an example message.\n\n"
    "\u2014 example.com/foo "
    "Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n"
).encode()

ORIGIN = "ledger.example.com/0199a7b0-0000-7000-8000-000000000001"
LOG = SignerKey(ORIGIN, ED25519, bytes(range(32)))
NEXT = SignerKey(ORIGIN, ED25519, bytes(range(1, 33)))
WITNESSES = [SignerKey(f"witness-{n}.example.org", COSIGNATURE, bytes([n]) * 32) for n in range(3)]
SEEN = datetime(2026, 11, 21, 9, 0, 0, tzinfo=UTC)

LEAVES = [leaf_hash(b"one"), leaf_hash(b"two"), leaf_hash(b"three")]
CHECKPOINT = Checkpoint(ORIGIN, 3, node_hash(node_hash(LEAVES[0], LEAVES[1]), LEAVES[2]))


def signed(*signers: SignerKey, checkpoint: Checkpoint = CHECKPOINT) -> Note:
    text = checkpoint.text
    return Note(text, tuple(one.sign(text, SEEN if one.type == COSIGNATURE else None) for one in signers))


PROOF = InclusionProof(1, (LEAVES[0], LEAVES[2]), signed(LOG, *WITNESSES))


def test_the_published_note_is_verified_by_its_published_key() -> None:
    key = VerifierKey.parse(PUBLISHED_KEY)
    assert str(key) == PUBLISHED_KEY
    note = Note.parse(PUBLISHED_NOTE)
    assert note.verified([key]) == {key: None}
    assert str(note).encode() == PUBLISHED_NOTE


def test_the_empty_tree_has_a_checkpoint() -> None:
    text = "log.example\n0\n47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n"
    assert Checkpoint("log.example", 0, EMPTY_ROOT).text == text
    assert Checkpoint.parse(text) == Checkpoint("log.example", 0, EMPTY_ROOT)


def test_a_checkpoint_is_read_as_it_was_written_and_may_be_extended() -> None:
    assert Checkpoint.parse(CHECKPOINT.text) == CHECKPOINT
    assert Checkpoint.parse(CHECKPOINT.text + "more of it\n") == CHECKPOINT


def test_a_witness_says_when_it_saw_the_checkpoint() -> None:
    verified = signed(LOG, WITNESSES[0]).verified([WITNESSES[0].verifier])
    assert verified == {WITNESSES[0].verifier: SEEN}


def test_the_signature_of_a_witness_is_of_its_time() -> None:
    note = signed(LOG, WITNESSES[0])
    log, witness = note.signatures
    later = int.from_bytes(witness.signature[:8]) + 1
    forged = Signature(witness.name, witness.key_id, later.to_bytes(8) + witness.signature[8:])
    with pytest.raises(InvalidNote, match="not one of this text"):
        Note(note.text, (log, forged)).verified([WITNESSES[0].verifier])


def test_a_log_signs_with_two_keys_while_one_follows_the_other() -> None:
    note = signed(LOG, NEXT)
    assert check_checkpoint(note, [LOG.verifier]) == CHECKPOINT
    assert check_checkpoint(note, [NEXT.verifier]) == CHECKPOINT


def test_lines_of_strangers_are_left_aside() -> None:
    stranger = SignerKey("stranger.example", ED25519, bytes([9]) * 32)
    assert signed(stranger, LOG).verified([LOG.verifier]) == {LOG.verifier: None}
    with pytest.raises(InvalidNote, match="no key that is known here"):
        signed(stranger).verified([LOG.verifier])


def test_a_line_of_a_known_key_that_is_not_its_signature_spoils_the_note() -> None:
    note = signed(LOG, WITNESSES[0])
    log, witness = note.signatures
    forged = Signature(witness.name, witness.key_id, witness.signature[:-1] + bytes([witness.signature[-1] ^ 1]))
    with pytest.raises(InvalidNote, match=r"witness-0\.example\.org"):
        Note(note.text, (log, forged)).verified([LOG.verifier, WITNESSES[0].verifier])


def test_a_key_of_the_right_name_only_has_not_signed() -> None:
    with pytest.raises(InvalidNote, match="no key that is known here"):
        check_checkpoint(signed(LOG), [NEXT.verifier])


def test_a_checkpoint_of_another_log_is_refused() -> None:
    other = Checkpoint("ledger.example.com/another", 3, CHECKPOINT.root)
    with pytest.raises(InvalidNote, match="of which no key is known here"):
        check_checkpoint(signed(LOG, checkpoint=other), [LOG.verifier])


def test_enough_witnesses_must_have_seen_it() -> None:
    known = [one.verifier for one in WITNESSES]
    assert check_checkpoint(signed(LOG, *WITNESSES[:2]), [LOG.verifier], known, 2) == CHECKPOINT
    with pytest.raises(InvalidNote, match="2 of 3 witnesses"):
        check_checkpoint(signed(LOG, *WITNESSES[:2]), [LOG.verifier], known, 3)


def test_the_key_of_a_log_is_no_witness_and_that_of_a_witness_no_log() -> None:
    witness = SignerKey("witness.example.org", ED25519, bytes([7]) * 32)
    with pytest.raises(InvalidNote, match="0 of 1 witnesses"):
        check_checkpoint(signed(LOG, witness), [LOG.verifier], [witness.verifier], 1)
    with pytest.raises(InvalidNote, match="no key that is known here"):
        check_signed(signed(WITNESSES[0]), [LOG.verifier], [WITNESSES[0].verifier])


def test_a_witness_that_saw_it_at_no_time_has_not_seen_it() -> None:
    log, _ = signed(LOG, WITNESSES[0]).signatures
    never = WITNESSES[0].sign(CHECKPOINT.text, datetime.fromtimestamp(0, UTC))
    with pytest.raises(InvalidNote, match="is of no time"):
        Note(CHECKPOINT.text, (log, never)).verified([WITNESSES[0].verifier])


def test_a_witness_counts_once_by_whatever_names() -> None:
    again = SignerKey("another-name.example.org", COSIGNATURE, WITNESSES[0].seed)
    note = signed(LOG, WITNESSES[0], again)
    with pytest.raises(InvalidNote, match="1 of 2 witnesses"):
        check_checkpoint(note, [LOG.verifier], [WITNESSES[0].verifier, again.verifier], 2)


def test_a_proof_shows_an_entry_to_who_has_but_the_keys() -> None:
    proof = InclusionProof.parse(str(PROOF).encode())
    assert proof == PROOF
    known = [one.verifier for one in WITNESSES]
    trust = Trust([LOG.verifier], known, 3)
    assert verify_proof(str(proof).encode(), b"two", trust) == (2, check_signed(proof.checkpoint, *trust))
    with pytest.raises(InvalidProof):
        verify_proof(str(proof).encode(), b"three", trust)


def test_a_proof_may_carry_something_more() -> None:
    more = PROOF._replace(extra=b"where it was found")
    assert str(more).startswith(f"c2sp.org/tlog-proof@v1\nextra {b64encode(more.extra).decode()}\nindex 1\n")
    assert InclusionProof.parse(str(more).encode()) == more


@given(st.integers(0, len(str(PROOF).encode()) - 1), st.integers(0, 7))
def test_no_bit_of_a_proof_can_be_changed(place: int, bit: int) -> None:
    content = bytearray(str(PROOF).encode())
    content[place] ^= 1 << bit
    with pytest.raises((InvalidNote, InvalidProof)):
        verify_proof(bytes(content), b"two", Trust([LOG.verifier], [one.verifier for one in WITNESSES], 3))


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_whatever_is_no_proof_is_refused_in_words(content: bytes) -> None:
    for parse in (Note.parse, InclusionProof.parse):
        with pytest.raises(InvalidNote):
            parse(content)


@pytest.mark.parametrize(
    "content",
    [
        b"a text\n",
        b"a text\n\n",
        b"a text\n\n\xe2\x80\x94 name\n",
        b"a text\n\n- name AAAAAAAA\n",
        b"a text\n\n\xe2\x80\x94 name AAAAAAAA",
        b"a text\n\n\xe2\x80\x94 name AAAA AAAA\n",
        b"a text\n\n\xe2\x80\x94 na+me AAAAAAAA\n",
        b"a text\n\n\xe2\x80\x94  AAAAAAAA\n",
        b"a text\n\n\xe2\x80\x94 name AAA\n",
        b"a text\n\n\xe2\x80\x94 name AAAA\n",
        b"a\ttext\n\n\xe2\x80\x94 name AAAAAAAA\n",
        b"a \xff text\n\n\xe2\x80\x94 name AAAAAAAA\n",
        b"a text\n\n" + b"\xe2\x80\x94 name AAAAAAAA\n" * (SIGNATURES_MAX + 1),
    ],
)
def test_what_is_not_written_as_a_note_is_none(content: bytes) -> None:
    with pytest.raises(InvalidNote):
        Note.parse(content)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "origin\n",
        "origin\n1\n",
        f"\n1\n{b64encode(EMPTY_ROOT).decode()}\n",
        f"origin\n01\n{b64encode(EMPTY_ROOT).decode()}\n",
        f"origin\n-1\n{b64encode(EMPTY_ROOT).decode()}\n",
        f"origin\n1 \n{b64encode(EMPTY_ROOT).decode()}\n",
        f"origin\n\u0661\n{b64encode(EMPTY_ROOT).decode()}\n",
        f"origin\n1\n{b64encode(EMPTY_ROOT[:31]).decode()}\n",
        "origin\n1\nnot base64\n",
    ],
)
def test_what_is_not_written_as_a_checkpoint_is_none(text: str) -> None:
    with pytest.raises(InvalidNote):
        Checkpoint.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        PUBLISHED_KEY[:-4],
        PUBLISHED_KEY.replace("530d903a", "530d903b"),
        PUBLISHED_KEY.replace("+530d903a", "+530D903A"),
        "na me" + PUBLISHED_KEY.removeprefix("example.com/foo"),
        f"log+00000000+{b64encode(bytes([6]) + bytes(32)).decode()}",
    ],
)
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidNote):
        VerifierKey.parse(text)


def test_a_hash_has_one_form() -> None:
    written = b64encode(EMPTY_ROOT).decode()
    assert read_hash(written) == EMPTY_ROOT
    other = written[:-2] + chr(ord(written[-2]) + 1) + "="  # the same bytes: its last bits are not used
    for wrong in (other, written.rstrip("="), written + "\n", f" {written}"):
        with pytest.raises(InvalidNote):
            read_hash(wrong)


def test_a_signer_does_not_show_its_seed() -> None:
    assert LOG.seed.hex() not in repr(LOG)
    assert b64encode(LOG.seed).decode() not in f"{LOG!r} {LOG}"
