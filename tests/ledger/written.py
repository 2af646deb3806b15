"""A log written to files as a mirror has them, by a key of its own; and what becomes of it when it is changed."""

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid5

from ledger.checkpoint import COSIGNATURE, ED25519, Checkpoint, InclusionProof, Note, SignerKey
from ledger.entry import Event, encode
from ledger.events import Fact, SessionAnnotated
from ledger.merkle import (
    Edge,
    Run,
    consistency,
    halved,
    inclusion,
    joined,
    leaf_hash,
    subtrees,
    tile_path,
    tiles,
)
from ledger.values import Actor
from ledger.verify import Trust, Verdict, verify_log

LEDGER = UUID("0199a7b0-0000-7000-8000-000000000003")
ORIGIN = f"log.example/{LEDGER}"
LOG = SignerKey(ORIGIN, ED25519, bytes(range(32)))
WITNESSES = [SignerKey(f"witness-{n}.example", COSIGNATURE, bytes([n]) * 32) for n in (1, 2)]
SEEN = datetime(2026, 11, 21, 9, 0, 0, tzinfo=UTC)
TRUST = Trust([LOG.verifier], [witness.verifier for witness in WITNESSES], 2)
AGENT = Actor(issuer="https://id.example", sub="agent-7", kind="agent", assurance="authenticated", roles=("agent",))
LARGE = {"content": "x" * 70_000}

Files = dict[str, bytes]


def event(number: int, stream: int = 0, version: int | None = None, **more: Any) -> tuple[bytes, bytes | None]:
    """The entry at a position, and its payload: an annotation of one of some streams, unless a `fact` is given."""
    fact: Fact = more.pop("fact", None) or SessionAnnotated(text=f"number {number}")
    known: dict[str, Any] = {
        "v": 1,
        "project": "demo",
        "ledger": LEDGER,
        "event_id": uuid5(LEDGER, str(number)),
        "stream_type": fact.stream_type,
        "stream_id": uuid5(LEDGER, f"stream {stream}"),
        "stream_version": number if version is None else version,
        "type": type(fact).__name__,
        "schema_version": 1,
        "occurred_at": f"2026-11-21T09:00:00.{number:06}Z",
        "recorded_at": f"2026-11-21T09:00:00.{number:06}Z",
        "actor": AGENT,
        "command_id": f"command-{number}",
        "correlation_id": "c",
        "data": fact,
    }
    return encode(Event(**known | more))


def entries(count: int, streams: int = 1) -> list[bytes]:
    """That many, which take turns in that many streams."""
    return [event(n, n % streams, (n - 1) // streams + 1)[0] for n in range(1, count + 1)]


def signed(checkpoint: Checkpoint, log: SignerKey = LOG, witnesses: Sequence[SignerKey] = WITNESSES) -> bytes:
    text = checkpoint.text
    lines = [log.sign(text), *(witness.sign(text, SEEN) for witness in witnesses)]
    return str(Note(text, tuple(lines))).encode()


def checkpoint_of(history: Sequence[bytes], origin: str = ORIGIN) -> Checkpoint:
    edge = Edge()
    edge.extend([leaf_hash(entry) for entry in history])
    return Checkpoint(origin, len(history), edge.root)


def written(history: Sequence[bytes], payloads: Iterable[bytes] = (), note: bytes | None = None) -> Files:
    """The files of a log of these entries, checkpoint and all."""
    files: Files = {}
    level = [leaf_hash(entry) for entry in history]
    levels = [level]
    while len(level) >= 256:
        for _ in range(8):
            level = halved(level)
        levels.append(level)
    for tile in tiles(len(history)):
        first = tile.index * 256
        files[f"tile/{tile.path}"] = b"".join(levels[tile.level][first : first + tile.width])
        if tile.level == 0:
            part = history[first : first + tile.width]
            bundle = b"".join(len(entry).to_bytes(2) + entry for entry in part)
            files[f"tile/entries/{tile_path(tile.index, tile.width)}"] = bundle
    for payload in payloads:
        files[payload_path(payload)] = payload
    return files | {"checkpoint": note or signed(checkpoint_of(history))}


def payload_path(payload: bytes) -> str:
    return f"payload/{sha256(payload).hexdigest()}"


def reader(files: Files) -> Callable[[str], bytes]:
    def read(path: str) -> bytes:
        if path not in files:
            raise FileNotFoundError(path)
        return files[path]

    return read


def looked_at(files: Files, *held: Checkpoint, trust: Trust = TRUST) -> Verdict:
    return verify_log(reader(files), trust, held)


def faults(files: Files, *held: Checkpoint, trust: Trust = TRUST) -> list[str]:
    return [str(fault) for fault in looked_at(files, *held, trust=trust).faults]


def hashes_of(history: Sequence[bytes], runs: Iterable[Run]) -> list[bytes]:
    def subtree(level: int, index: int) -> bytes:
        leaves = [leaf_hash(entry) for entry in history[index << level : (index + 1) << level]]
        while len(leaves) > 1:
            leaves = halved(leaves)
        return leaves[0]

    return [joined([subtree(*node) for node in subtrees(run)]) for run in runs]


def proof_of(history: Sequence[bytes], position: int, note: bytes | None = None) -> bytes:
    """That an entry stands at a position, as a file."""
    hashes = hashes_of(history, inclusion(position - 1, len(history)))
    made = InclusionProof(position - 1, tuple(hashes), Note.parse(note or signed(checkpoint_of(history))))
    return str(made).encode()


def growth_of(history: Sequence[bytes], old: int) -> list[bytes]:
    """That the first `old` of these entries are the beginning of them."""
    return hashes_of(history, consistency(old, len(history)))
