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

import re
from collections import defaultdict
from collections.abc import Collection
from itertools import pairwise
from typing import Annotated, Literal
from uuid import UUID

import msgspec
from msgspec import Meta, Struct

from ledger.checkpoint import Checkpoint, InclusionProof, InvalidNote, Note
from ledger.merkle import InvalidProof, check_inclusion, leaf_hash
from ledger.values import Stamp
from ledger.verify import (
    FAULTS_MAX,
    OPAQUE,
    UNREADABLE,
    Order,
    Read,
    Stated,
    Trust,
    Verdict,
    check_payload,
    read_checkpoint,
)

_TIME = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z$(?!\n)"
"""As Muniment writes it: so times sort as text."""
Time = Annotated[Stamp, Meta(pattern=_TIME)]


class Asked(Struct, kw_only=True, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What was asked for: the positions from `first` to `last`, of a time where `since` or `until` are given; or what
    belongs to a session, or to an approval."""

    session: UUID | None = None
    approval: UUID | None = None
    first: int | None = None
    last: int | None = None
    since: Time | None = None
    until: Time | None = None

    def __post_init__(self) -> None:
        given = {name for name in self.__struct_fields__ if getattr(self, name) is not None}
        is_stretch = {"first", "last"} <= given <= {"first", "last", "since", "until"}
        if not (given in ({"session"}, {"approval"}) or (is_stretch and 1 <= (self.first or 0) <= (self.last or 0))):
            raise ValueError("it asks for none of a session, an approval, and positions from a first to a last")

    def __str__(self) -> str:
        if self.session or self.approval:
            return f"session {self.session}" if self.session else f"approval {self.approval}"
        times = [f"{name} {time}" for name, time in (("since", self.since), ("until", self.until)) if time]
        return ", ".join([f"positions {self.first} to {self.last}", *times])


class Completeness(Struct, kw_only=True, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Whether that is all of what was asked for.

    `proven`: each position from `first` to `last` is here, and of a time those beside them, which are not of it.
    `gap`: what is named in `missing` was recorded, and is not here. `not_established`: no more is shown than that what
    is here was recorded.
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

    def __post_init__(self) -> None:
        at = 0
        for first, last in self.runs:
            if not at < first <= last:
                raise ValueError("its runs of positions do not follow each other")
            at = last

    def encode(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=2) + b"\n"


MISSING_MAX = 100


class Inventory:
    """What entries come to, which are taken in the order of their positions."""

    def __init__(self, asked: Asked, checkpoint: Checkpoint) -> None:
        self._asked, self._checkpoint = asked, checkpoint
        self._runs: list[list[int]] = []
        self._types: dict[str, int] = defaultdict(int)
        self._versions: dict[str, list[int]] = defaultdict(list)
        self._times: list[Stamp] = []
        self._edges = ((asked.first or 0) - 1, (asked.last or 0) + 1)
        self._beside: dict[int, Stamp] = {}
        self._payloads = 0

    def take(self, position: int, seen: Stated) -> None:
        if self._runs and self._runs[-1][1] == position - 1:
            self._runs[-1][1] = position
        else:
            self._runs.append([position, position])
        self._types[seen.type] += 1
        if seen.stream_type != OPAQUE and not seen.is_adoption:
            self._versions[seen.stream_id].append(seen.stream_version)
        self._times = [*self._times[:1], seen.recorded_at]
        if position in self._edges and re.match(_TIME, seen.recorded_at):
            self._beside[position] = seen.recorded_at
        self._payloads += bool(seen.data_sha256)

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
            if at < min(begin, last + 1):
                missing.append(f"positions {at} to {min(begin, last + 1) - 1}")
            at = max(at, end + 1)
        if missing:
            because = "positions are dense, and these are not here"
            return Completeness(state="gap", because=because, missing=tuple(missing[:MISSING_MAX]))
        because = f"each position from {first} to {last} is here, and proven to stand there"
        if not (self._asked.since or self._asked.until):
            return Completeness(state="proven", because=because)
        if not self._is_between(first, last):
            because += "; that those before and behind are not of that time is not shown"
            return Completeness(state="not_established", because=because)
        because += (
            "; those beside them are not of that time, and so no other is if times never decrease, which a look at the "
            "whole log shows"
        )
        return Completeness(state="proven", because=because)

    def _is_between(self, first: int, last: int) -> bool:
        """Whether what stands before and behind is here, and not of the time that was asked for."""
        since, until, size = self._asked.since, self._asked.until, self._checkpoint.size
        before, after = map(self._beside.get, self._edges)
        begins = first == 1 or (since is not None and before is not None and before < since)
        ends = last == size or (until is not None and after is not None and after >= until)
        return begins and ends

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


BESIDE = {"keys.json", "report.html"}
"""What no entry speaks of: whom to believe is for the caller to say, and the report is told from the entries."""


def verify_bundle(read: Read, names: Collection[str], trust: Trust) -> tuple[Verdict, Manifest | None]:
    """Compute every proof again, and all that the manifest says of the entries. `names`: of all files there are."""
    verdict = Verdict()
    seen = set(BESIDE)

    def noted(path: str) -> bytes:
        seen.add(path)
        return read(path)

    where = "manifest.json"
    try:
        said = msgspec.json.decode(noted(where), type=Manifest)
        where = "checkpoint"
        content = noted(where)
        verdict.signed = read_checkpoint(content, trust)
    except FileNotFoundError:
        verdict.add(where, "it is missing")
        return verdict, None
    except UNREADABLE as error:
        verdict.add(where, str(error))
        return verdict, None
    note, checkpoint = Note.parse(content), verdict.signed.checkpoint
    if (said.asked.last or 0) > checkpoint.size:
        verdict.add(
            "manifest.json", "it asks for positions that the log has not", str(checkpoint.size), str(said.asked.last)
        )
    found = Inventory(said.asked, checkpoint)
    order = Order(checkpoint.origin, complete=False)
    for position in (position for first, last in said.runs for position in range(first, last + 1)):
        entry = _proven(position, noted, note, checkpoint, verdict)
        if entry is not None:
            verdict.entries += 1
            stated = order.check(position, entry, verdict)
            if stated is not None:
                found.take(position, stated)
            if stated and stated.data_sha256:
                check_payload(position, stated, noted, verdict)
        elif verdict.faulty >= FAULTS_MAX:
            return verdict, said  # nothing more is there
    order.end(verdict)
    _compare(said, found.manifest(), verdict)
    for name in sorted(set(names) - seen):
        verdict.add(name, "nothing in the bundle is about it, and it was not looked at")
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
