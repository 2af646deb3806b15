"""`muniment verify`: whether what was handed out is what was signed. It needs no server, no database and no settings.

What is looked at is in files: a mirror of a log, bundles of evidence, proofs, checkpoints. What is believed is what the
caller names: the keys of the log and of its witnesses, got from somewhere else than the files. Everything that is
computed is in ledger/verify.py and ledger/evidence.py; here is what is opened, and what is said.
"""

import sys
from collections.abc import Collection, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Annotated, NamedTuple
from zipfile import is_zipfile

import msgspec
from cyclopts import App, Parameter
from msgspec import Struct, field

from ledger.checkpoint import (
    COSIGNATURE,
    Checkpoint,
    InclusionProof,
    InvalidNote,
    Note,
    ShownKeys,
    Signed,
    VerifierKey,
    read_hash,
)
from ledger.epoch import Epoch, lost
from ledger.evidence import verify_bundle
from ledger.merkle import InvalidProof
from ledger.values import Stamp, stamp
from ledger.verify import (
    UNREADABLE,
    Fault,
    Read,
    Trust,
    Verdict,
    read_checkpoint,
    verify_growth,
    verify_log,
    verify_proof,
)
from ops.copies import VerificationError, in_archive, in_directory, on_a_line, opened
from ops.report import report_of

verify = App(
    name="verify",
    help="Verify a log's mirror, evidence, proofs and checkpoints, offline; or everything in the database.",
)
verify.command("ops.trees:database", name="database")

FAULTY, NOT_SHOWN = 1, 2
"""How the command ends where something is wrong, and where nothing is but not all is shown. Else 0."""


def _say(line: object) -> None:
    """Every line that is printed has something in it of what is looked at."""
    print(on_a_line(str(line)))


class Growth(Struct):
    """A consistency proof, as the service answers it."""

    proof: list[str]


class Given(NamedTuple):
    """What there is to look at."""

    mirrors: list[Path]
    bundles: list[Path]
    proofs: list[Path]
    checkpoints: list[Path]
    growths: list[list[bytes]]


@verify.default
def files(
    *paths: Path,
    key: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    witness: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    quorum: int | None = None,
    entry: Path | None = None,
    report: Path | None = None,
) -> None:
    """Verify files: mirrors, bundles of evidence, `.tlog-proof` files, checkpoints, consistency proofs.

    Checkpoints that are given beside a mirror are what you hold: the mirror must have grown from each of them. Two of
    them alone are compared with each other, by a consistency proof (the JSON that the service answers) where their
    sizes differ.

    Ends with 0 if all is shown, with 1 if something is wrong, and with 2 if nothing is but not all is shown: without
    --key, whoever made the files may have made their keys too.

    Parameters
    ----------
    paths
        What to look at. Directories are mirrors.
    key
        A key of the log (`<origin>+<id>+<base64>`), or a file with keys: JSON as the service tells them, or one a
        line. Have it from elsewhere than the files.
    witness
        The same of a witness whom you believe.
    quorum
        How many of the witnesses must have signed; all of them unless you say.
    entry
        For a `.tlog-proof`: the file with the exact bytes of the entry, unless the proof carries them.
    report
        For a bundle: where to write its report, made anew from the entries that were verified.
    """
    if not paths:
        raise VerificationError("name what to look at: a mirror's directory, a bundle, a proof, checkpoints")
    try:
        log, witnesses = _keys(key), _keys(witness)
        trust, given = _trust(log, witnesses, quorum), _sorted_out(paths)
        told = Told({key: until for key, until in log.items() if until is not None}, trust.quorum)
        can_be_earlier = bool(given.mirrors or given.bundles)
        held = [_held(path, trust, told, can_be_earlier=can_be_earlier) for path in given.checkpoints]
        held += [_bundle(path, trust, told, report) for path in given.bundles]
        held += [_proof(path, entry, trust, told) for path in given.proofs]
        known = [signed.checkpoint for signed in held if signed]
        _mirrors(given.mirrors, trust, known, told)
    except OSError as error:
        raise VerificationError(f"what was given cannot be read: {error}") from None
    if not given.mirrors:
        _compare(known, given.growths, told)
    told.end()


def _trust(log: Collection[VerifierKey], witnesses: Collection[VerifierKey], quorum: int | None) -> Trust:
    for key in (*log, *witnesses):
        if (key.type == COSIGNATURE) != (key in witnesses):
            kinds = ("a witness", "--witness") if key.type == COSIGNATURE else ("a log", "--key")
            raise VerificationError(f"{key} is the key of {kinds[0]}: name it by {kinds[1]}")
    if quorum is not None and not 0 <= quorum <= len(witnesses):
        raise VerificationError(f"of {len(witnesses)} witnesses {quorum} cannot have signed: name them by --witness")
    return Trust(list(log), list(witnesses), len(witnesses) if quorum is None else quorum)


class Told(Struct):
    """What was said so far: how often something was wrong, and how often not shown. `retired`: keys, and since when.
    `quorum`: how many witnesses must have seen a checkpoint before then, if only such keys have signed it."""

    retired: dict[VerifierKey, Stamp]
    quorum: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    faults: int = 0
    not_shown: int = 0

    def verdict(self, what: str, found: Verdict) -> None:
        self.faults += found.faulty
        _say(f"{what}: {f'{found.faulty:,} faults' if found.faulty else 'whole'}")
        if found.signed:
            self.signed(found.signed)
        for epoch in found.epochs:
            _say(f"  {epoch}")
        for fault in found.faults:
            _say(f"  {fault}")
        if found.faulty > len(found.faults):
            _say(f"  and {found.faulty - len(found.faults):,} more")

    def signed(self, signed: Signed) -> None:
        checkpoint = signed.checkpoint
        _say(f"  {checkpoint.origin}: {checkpoint.size:,} entries, root {checkpoint.root.hex()}")
        for key, at in signed.by.items():
            _say(f"  signed by {key}" if at is None else f"  seen by {key.name}, {at:%Y-%m-%d %H:%M:%S} UTC")
        ends = [self.retired.get(key) for key, at in signed.by.items() if at is None]
        until = max((end for end in ends if end), default="")
        # One witness alone may say of any time that it saw it then.
        times = sorted({key.public: stamp(at) for key, at in signed.by.items() if at is not None}.values())
        seen = times[self.quorum - 1] if 0 < self.quorum <= len(times) else None
        if None in ends or (seen is not None and seen <= until):
            return
        what = f"{checkpoint.origin}, {checkpoint.size:,} entries: the keys that signed it were retired at {until}"
        if seen is None:
            self.missing(f"{what}, and no witness says that it was before")
        else:
            self.fault(f"{what}, and not before {seen} had enough witnesses seen it")

    def fault(self, fault: object) -> None:
        self.faults += 1
        _say(fault)

    def missing(self, what: str) -> None:
        self.not_shown += 1
        _say(f"not shown: {what}")

    def end(self) -> None:
        if self.faults:
            sys.exit(FAULTY)
        if self.not_shown:
            sys.exit(NOT_SHOWN)


def _mirrors(paths: Sequence[Path], trust: Trust, held: Sequence[Checkpoint], told: Told) -> None:
    """Each, and that the longer ones of a log have grown from the shorter ones."""
    found = sorted(((_said(path), path) for path in paths), key=lambda one: one[0].size)
    seen: list[Checkpoint] = []
    for said, path in found:
        signed = _mirror(path, trust, [*held, *(one for one in seen if one.origin == said.origin)], told)
        seen += [signed.checkpoint] if signed else []


def _said(path: Path) -> Checkpoint:
    """What a mirror says to be, which nobody has verified yet."""
    try:
        return Checkpoint.parse(Note.parse(in_directory(path)("checkpoint")).text)
    except (FileNotFoundError, InvalidNote):
        return Checkpoint("", 0, b"")


def _mirror(path: Path, trust: Trust, held: Sequence[Checkpoint], told: Told) -> Signed | None:
    read = in_directory(path)
    trust = _trusting(trust, read, path, told)
    found = verify_log(read, trust, held)
    told.verdict(f"{path}: {found.entries:,} entries, {found.payloads:,} with data beside them", found)
    for one in held if not found.faulty else ():
        _say(f"  and its first {one.size:,} entries are those of the checkpoint you hold")
    return found.signed


def _bundle(path: Path, trust: Trust, told: Told, report: Path | None) -> Signed | None:
    with opened(path) as archive:
        names = archive.namelist()
        if len(set(names)) != len(names):
            told.fault(f"{path}: it has two files of one name")
            return None
        read = in_archive(archive)
        trust = _trusting(trust, read, path, told)
        found, manifest = verify_bundle(read, names, trust)
        if report is not None and manifest and found.signed and not found.faulty:
            report.write_text(report_of(manifest, found, read), "utf-8")
    asked = f", {manifest.asked}" if manifest else ""
    told.verdict(f"{path}: {found.entries:,} entries{asked}", found)
    if manifest is None or found.faulty:
        return None
    complete = manifest.completeness
    _say(f"  completeness: {complete.state.replace('_', ' ')}: {complete.because}")
    for missing in complete.missing:
        _say(f"    {missing}")
    told.not_shown += complete.state == "gap"
    if "report.html" in names:
        _say("  its report.html was not looked at: it is no evidence (--report makes one of these entries)")
    told.epochs += found.epochs
    return found.signed


def _proof(path: Path, entry: Path | None, trust: Trust, told: Told) -> Signed | None:
    if not _has_key(trust, path, told):
        return None
    content = path.read_bytes()
    try:
        bytes_ = entry.read_bytes() if entry else InclusionProof.parse(content).extra
        if not bytes_:
            told.missing(f"{path}: of which entry it is; name the file with its bytes by --entry")
            return None
        position, signed = verify_proof(content, bytes_, trust)
    except (InvalidNote, InvalidProof) as error:
        told.fault(Fault(str(path), str(error)))
        return None
    _say(f"{path}: the entry stands at position {position}")
    told.signed(signed)
    return signed


def _held(path: Path, trust: Trust, told: Told, *, can_be_earlier: bool) -> Signed | None:
    if not _has_key(trust, path, told):
        return None
    content = path.read_bytes()
    origin = content.partition(b"\n")[0].decode(errors="replace")
    if can_be_earlier and origin not in {key.name for key in trust.log}:
        # A log that was adopted signed by the same keys, under its own name.
        renamed = {key: key._replace(name=origin) for key in trust.log}
        trust = trust._replace(log=list(renamed.values()))
        told.retired |= {renamed[key]: until for key, until in told.retired.items() if key in renamed}
    try:
        signed = read_checkpoint(content, trust)
    except InvalidNote as error:
        told.fault(Fault(str(path), str(error)))
        return None
    _say(f"{path}: a checkpoint")
    told.signed(signed)
    return signed


def _compare(held: Sequence[Checkpoint], growths: Sequence[list[bytes]], told: Told) -> None:
    """Each checkpoint with the newer ones of its log, by whichever proof is one of these two."""
    ordered = sorted(set(held), key=lambda one: (one.origin, one.size))
    used: set[int] = set()
    unshown = []
    for place, old in enumerate(ordered):
        newer = [one for one in ordered[place + 1 :] if one.origin == old.origin]
        if not newer:
            continue
        if newer[0].size == old.size:
            told.fault(*verify_growth(old, newer[0], None))
            continue
        proofs = enumerate(growths if old.size else [[]])
        ways = [(number, new) for number, proof in proofs for new in newer if not [*verify_growth(old, new, proof)]]
        used |= {number for number, _ in ways if old.size}
        for _, new in ways:
            _say(f"the first {old.size:,} of the {new.size:,} entries are those {old.size:,}")
        if not ways:
            unshown.append((old, newer[0]))
    unused = [proof for number, proof in enumerate(growths) if number not in used]
    for (old, new), given in zip_longest(unshown, unused[: len(unshown)]):
        try:
            told.fault(*verify_growth(old, new, given))
        except ValueError as error:
            told.missing(f"whether {new.size:,} entries begin with those {old.size:,}: {error}")
    if len(unused) > len(unshown):
        told.missing("what a consistency proof is for: it is none of two of these checkpoints")
    for where, what, *sizes in (wrong for one in ordered for wrong in lost(one, told.epochs)):
        told.fault(Fault(str(where), what, *sizes))
    for one, other in pairwise(dict.fromkeys(one.origin for one in ordered)):
        told.missing(f"{one} and {other} are two logs, and cannot be compared")


# What is given


def _sorted_out(paths: Sequence[Path]) -> Given:
    given = Given([], [], [], [], [])
    for path in paths:
        try:
            if path.is_dir():
                given.mirrors.append(path)
            elif is_zipfile(path):
                given.bundles.append(path)
            elif (content := path.read_bytes()).startswith(b"c2sp.org/tlog-proof@"):
                given.proofs.append(path)
            elif content.startswith(b"{"):
                hashes = msgspec.json.decode(content, type=Growth).proof
                given.growths.append([read_hash(one) for one in hashes])
            else:
                given.checkpoints.append(path)
        except OSError as error:
            raise VerificationError(f"{path} cannot be read: {error.strerror}") from None
        except UNREADABLE as error:
            raise VerificationError(f"{path} is no consistency proof: {error}") from None
    return given


def _keys(given: Sequence[str]) -> dict[VerifierKey, Stamp | None]:
    """Keys, and since when they are retired."""
    found: dict[VerifierKey, Stamp | None] = {}
    for one in given:
        path = Path(one)
        try:
            if "+" in one and not path.exists():
                found[VerifierKey.parse(one)] = None
            else:
                found |= _read_keys(path.read_bytes())
        except OSError as error:
            raise VerificationError(f"{one} is neither a key nor a file that can be read: {error.strerror}") from None
        except UNREADABLE as error:
            raise VerificationError(f"{one}: {error}") from None
    return found


def _read_keys(content: bytes) -> dict[VerifierKey, Stamp | None]:
    if content.lstrip().startswith(b"{"):
        told = msgspec.json.decode(content, type=ShownKeys).keys
        return {VerifierKey.parse(key.vkey): key.until or None for key in told}
    return {VerifierKey.parse(line): None for line in content.decode().split()}


def _has_key(trust: Trust, path: Path, told: Told) -> bool:
    if not trust.log:
        told.missing(f"{path}: who signed it; name the log's key by --key")
    return bool(trust.log)


def _trusting(trust: Trust, read: Read, path: Path, told: Told) -> Trust:
    """With the keys that came with the files, where none are given."""
    if trust.log:
        return trust
    told.missing(f"{path}: whose keys those are that came with it; name the log's key by --key")
    try:
        return trust._replace(log=[key for key in _read_keys(read("keys.json")) if key.type != COSIGNATURE])
    except (FileNotFoundError, *UNREADABLE):
        return trust
