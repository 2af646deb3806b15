"""What operators command about subjects: to erase one, and to hold what is recorded of one.

A caller names a subject by its own id for it. Where the command goes in (`committer.py`) that is replaced by the
pseudonym that stands in what was sealed, so the id is nowhere at rest: not in the event, nor in the record of a
refusal. No list of commands takes these.
"""

from hashlib import sha256
from typing import Annotated
from uuid import UUID

from msgspec import UNSET, Meta, UnsetType

from ledger.commands import TEXT_CHARACTERS_MAX, Command, Moment
from ledger.personal import SUBJECT_CHARACTERS_MAX

_TAG = bytes.fromhex("5ab1ec70")
_TAG_NUMBER = int.from_bytes(_TAG)

STREAMS = UUID(bytes=_TAG + bytes(12)), UUID(bytes=_TAG + b"\xff" * 12)
"""Between these two are the names of all streams of subjects."""

Subject = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=SUBJECT_CHARACTERS_MAX,
        description="Your id of the subject, as in `$personal`; recorded as its pseudonym.",
    ),
]
Pseudonym = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$(?!\n)")]
Words = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=TEXT_CHARACTERS_MAX,
        description="In words that name nobody: it is recorded as it is, and never erased.",
    ),
]


def stream_of(pseudonym: str) -> UUID:
    """The stream of a subject's erasures, under which its holds are open. A UUIDv8 (RFC 9562 s5.8); frozen."""
    digest = bytearray(_TAG + sha256(b"muniment subject 1\0" + pseudonym.encode()).digest()[:12])
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    return UUID(bytes=bytes(digest))


def may_be_of_a_subject(stream_id: UUID) -> bool:
    """Whether a subject's stream may be called so: nothing else is, for whoever began that stream first would keep the
    subject from being erased, or its holds from being seen."""
    return stream_id.int >> 96 == _TAG_NUMBER and stream_id.version == 8  # the cheap half first: it is asked of each


class OfSubject(Command, kw_only=True):
    """A command that names a subject. `subject` is its pseudonym, once it was taken in."""

    roles = frozenset({"operator"})

    subject: Subject


class EraseSubject(OfSubject, kw_only=True, tag=True):
    """Erase a subject: destroy the keys of all that was sealed for it so far.

    Answered once they are destroyed. What was sealed reads `{"$erased": true}` from then on, wherever it is asked for;
    every byte that was recorded, and every proof, stays as it is. A hold prevents it (409 `held`)."""

    stream_type = "subject"
    creates = True

    ground: Words

    @property
    def target(self) -> UUID:
        return stream_of(self.subject)


class PlaceHold(OfSubject, kw_only=True, tag=True):
    """Place a hold: while it is in force its subject cannot be erased."""

    stream_type = "hold"
    creates = True

    hold_id: UUID | UnsetType = UNSET
    reason: Words
    until: Moment | None = None


class ReleaseHold(Command, kw_only=True, tag=True):
    """Release a hold, so that its subject can be erased again."""

    stream_type = "hold"
    roles = frozenset({"operator"})

    hold_id: UUID | UnsetType = UNSET
    reason: Words


OF_SUBJECTS: tuple[type[Command], ...] = (EraseSubject, PlaceHold, ReleaseHold)
