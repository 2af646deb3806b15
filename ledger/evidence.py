"""A bundle of evidence: some entries of a log, each with its proof, and what they are said to be. Pure, as verify.py.

    manifest.json                     what was asked for, what is here, and how complete that is
    checkpoint                        where every proof leads to: the log's, signed
    keys.json                         the log's keys, as its keeper names them: have them from elsewhere to believe them
    entries/<position>.json           the exact bytes that were hashed
    proofs/<position>.tlog-proof      that they stand at that position (C2SP tlog-proof)
    payload/<sha256>                  the data of an entry that is too large to stand in it
    report.html                       the same to read, made from the entries; itself no evidence

All that the manifest says, but for what was asked for, follows from the entries: who verifies makes it again.
"""

from collections import defaultdict
from contextlib import suppress
from itertools import pairwise
from typing import Literal
from uuid import UUID

import msgspec
from msgspec import Struct

from ledger.checkpoint import Checkpoint, InclusionProof, InvalidNote, Note
from ledger.merkle import InvalidProof, check_inclusion, leaf_hash
from ledger.values import Stamp
from ledger.verify import FAULTS_MAX, OPAQUE, Order, Read, Trust, Verdict, read_checkpoint


class Asked(Struct, kw_only=True, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What was asked for: the positions from `first` to `last`, of a time where `since` or `until` are given; or what
    belongs to a session, or to an approval."""

    session: UUID | None = None
    approval: UUID | None = None
    first: int | None = None
    last: int | None = None
    since: Stamp | None = None
    until: Stamp | None = None

    def __str__(self) -> str:
        if self.session or self.approval:
            return f"session {self.session}" if self.session else f"approval {self.approval}"
        times = [f"{name} {time}" for name, time in (("since", self.since), ("until", self.until)) if time]
        return ", ".join([f"positions {self.first} to {self.last}", *times])


class Completeness(Struct, kw_only=True, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Whether that is all of what was asked for.

    `proven`: each position from `first` to `last` is here. `gap`: what is named in `missing` was recorded, and is not
    here. `not_established`: no more is shown than that what is here was recorded.
    """

    state: Literal["proven", "gap", "not_established"]
    because: str
    missing: tuple[str, ...] = ()


class Manifest(Struct, kw_only=True, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """See the module. `runs` are positions, each first to last."""

    format: Literal["muniment-evidence/1"] = "muniment-evidence/1"
    origin: str
    size: int
    asked: Asked
    entries: int
    payloads: int
    runs: tuple[tuple[int, int], ...]
    types: dict[str, int]
    streams: int
    first_recorded_at: Stamp | None = None
    last_recorded_at: Stamp | None = None
    completeness: Completeness

    def encode(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=2) + b"\n"


MISSING_MAX = 100


class _Entry(Struct, gc=False):
    type: str
    stream_type: str
    stream_id: str
    stream_version: int
    recorded_at: Stamp
    session_id: str | None = None
    data_sha256: str | None = None


class Inventory:
    """What entries come to, which are taken in the order of their positions."""

    def __init__(self, asked: Asked, checkpoint: Checkpoint) -> None:
        self._asked, self._checkpoint = asked, checkpoint
        self._runs: list[list[int]] = []
        self._types: dict[str, int] = defaultdict(int)
        self._versions: dict[str, list[int]] = defaultdict(list)
        self._times: list[Stamp] = []
        self._payloads = 0

    def take(self, position: int, entry: bytes) -> None:
        """Raises msgspec's errors where that is no event."""
        seen = _decoder.decode(entry)
        if self._runs and self._runs[-1][1] == position - 1:
            self._runs[-1][1] = position
        else:
            self._runs.append([position, position])
        self._types[seen.type] += 1
        if seen.stream_type != OPAQUE:
            self._versions[seen.stream_id].append(seen.stream_version)
        self._times = [*self._times[:1], seen.recorded_at]
        self._payloads += seen.data_sha256 is not None

    def manifest(self) -> Manifest:
        return Manifest(
            origin=self._checkpoint.origin,
            size=self._checkpoint.size,
            asked=self._asked,
            entries=sum(last - first + 1 for first, last in self._runs),
            payloads=self._payloads,
            runs=tuple((first, last) for first, last in self._runs),
            types=dict(sorted(self._types.items())),
            streams=len(self._versions),
            first_recorded_at=self._times[0] if self._times else None,
            last_recorded_at=self._times[-1] if self._times else None,
            completeness=self._of_range() if self._asked.first is not None else self._of_streams(),
        )

    def _of_range(self) -> Completeness:
        first, last = self._asked.first or 0, self._asked.last or 0
        missing, at = [], first
        for begin, end in [*self._runs, [last + 1, last + 1]]:
            if begin > at:
                missing.append(f"positions {at} to {begin - 1}")
            at = end + 1
        if missing:
            because = "positions are dense, and these are not here"
            return Completeness(state="gap", because=because, missing=tuple(missing[:MISSING_MAX]))
        because = f"each position from {first} to {last} is here, and proven to stand there"
        if self._asked.since or self._asked.until:
            because += (
                "; that no other is of that time follows if times never decrease, which a look at the whole log shows"
            )
        return Completeness(state="proven", because=because)

    def _of_streams(self) -> Completeness:
        missing = [
            f"versions {one + 1} to {next_ - 1} of {stream}"
            for stream, versions in self._versions.items()
            for one, next_ in pairwise([0, *sorted(versions)])
            if next_ > one + 1
        ]
        if missing:
            because = "versions of a stream are dense, and these are not here"
            return Completeness(state="gap", because=because, missing=tuple(missing[:MISSING_MAX]))
        because = (
            f"each of {len(self._versions)} streams is here from its first version on without a gap; that none of them "
            "went on, and that no other belongs to it, only the whole log shows"
        )
        return Completeness(state="not_established", because=because)


_decoder = msgspec.json.Decoder(_Entry)


def verify_bundle(read: Read, trust: Trust) -> tuple[Verdict, Manifest | None]:
    """Compute every proof again, and all that the manifest says of the entries."""
    verdict = Verdict()
    where = "manifest.json"
    try:
        said = msgspec.json.decode(read(where), type=Manifest)
        where = "checkpoint"
        content = read(where)
        verdict.signed = read_checkpoint(content, trust)
    except FileNotFoundError:
        verdict.add(where, "it is missing")
        return verdict, None
    except (msgspec.MsgspecError, ValueError) as error:
        verdict.add(where, str(error))
        return verdict, None
    note, checkpoint = Note.parse(content), verdict.signed.checkpoint
    found = Inventory(said.asked, checkpoint)
    order = Order(checkpoint.origin, complete=False)
    for first, last in said.runs:
        for position in range(first, last + 1):
            entry = _proven(position, read, note, checkpoint, verdict)
            if entry is None:
                if verdict.faulty >= FAULTS_MAX:
                    return verdict, said  # nothing more is there
                continue
            verdict.entries += 1
            order.check(position, entry, read, verdict)
            with suppress(msgspec.MsgspecError, ValueError, RecursionError):  # which is a fault already
                found.take(position, entry)
    _compare(said, found.manifest(), verdict)
    return verdict, said


def _proven(position: int, read: Read, note: Note, checkpoint: Checkpoint, verdict: Verdict) -> bytes | None:
    """The entry at a position; what is wrong with it, or its proof, is a fault."""
    path = f"entries/{position}.json"
    try:
        entry = read(path)
        path = f"proofs/{position}.tlog-proof"
        content = read(path)
        proof = InclusionProof.parse(content)
    except FileNotFoundError:
        verdict.add(position, f"{path} is missing")
        return None
    except InvalidNote as error:
        verdict.add(path, str(error))
        return entry
    if (proof.checkpoint, proof.index, str(proof).encode()) != (note, position - 1, content):
        verdict.add(path, "it is not for that position of the bundle's checkpoint")
        return entry
    try:
        check_inclusion(leaf_hash(entry), position - 1, proof.hashes, checkpoint.size, checkpoint.root)
    except InvalidProof as error:
        verdict.add(position, f"it is not shown that its bytes stand there: {error}")
    return entry


def _compare(said: Manifest, found: Manifest, verdict: Verdict) -> None:
    for name in Manifest.__struct_fields__:
        one, other = getattr(said, name), getattr(found, name)
        if one != other:
            verdict.add("manifest.json", f"it says of {name} what its entries do not", _shown(other), _shown(one))


def _shown(value: object) -> str:
    return msgspec.json.encode(value).decode()
