"""The log of a project over HTTP: what shows whoever does not trust us that nothing of its ledger was changed.

The files of C2SP tlog-tiles, the payloads beside them, and proofs; of what is published, and of nothing beyond it. What
is hashes alone may be read with any token of the project, entries by auditors. Nothing is signed or verified here: a
worker signs, and whoever reads verifies.
"""

import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Annotated, Any, NamedTuple, NoReturn
from urllib.parse import unquote
from uuid import UUID

from msgspec import Meta, Struct

from api.events import position_of
from api.http import Answer, Call, encode
from api.reading import NoParameters, SingleHeaders, matches, reading
from ledger import store, tree
from ledger.checkpoint import InclusionProof, Note, ShownKeys
from ledger.errors import MalformedRequest, NotFound, ViewBehind
from ledger.merkle import TILE_HASHES, TILE_LEVELS, Tile, read_tile_path
from ledger.postgres import Connection
from ledger.tree import Log
from ledger.values import Count

TEXT, BYTES = b"text/plain; charset=utf-8", b"application/octet-stream"
LEVELS = 64
"""C2SP tlog-tiles: a tile's level is below that."""

# A token decides what is shown, so only who asked may keep it, and only for that token.
_PRIVATE = (b"vary", b"Authorization")
KEPT = [(b"cache-control", b"private, max-age=31536000, immutable"), _PRIVATE]
SOON_OLD = [(b"cache-control", b"private, max-age=1"), _PRIVATE]

TileLevel = Annotated[int, Meta(ge=0, lt=LEVELS)]
TileIndex = Annotated[str, Meta(pattern=r"^(x[0-9]{3}/)*[0-9]{3}(\.p/[1-9][0-9]{0,2})?$")]
PayloadDigest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]


class Sizes(Struct, kw_only=True, forbid_unknown_fields=True, rename={"from_": "from"}):
    """Of which two checkpoints."""

    from_: Annotated[Count, Meta(description="The size of the older one; at most `to`.")]
    to: Annotated[Count, Meta(description="The size of the newer one; at most that of what is published.")]


class Consistency(Struct):
    """The hashes that show that the tree of the newer checkpoint begins with that of the older (RFC 9162 s2.1.4)."""

    proof: list[bytes]


class NoCheckpoint(NotFound):
    """Nothing of the log is published yet."""

    title = "Nothing is published yet"
    template = "The log of {id} has no {what} yet: its first is published a moment after its first event. Ask again."


class Published(NamedTuple):
    """What the log of the caller's project serves, and what to read it with."""

    connection: Connection
    ledger_id: UUID
    log: Log


# Who may


def anyone(call: Call) -> None:
    """Whoever has a token: it is one of the project."""


def of_project(call: Call) -> None:
    """Raises NotFound unless the path names the caller's project."""
    named = call.scope["path_params"]["project"]
    if named != call.caller.project_id:
        raise NotFound(what="ledger", id=named[:100])


def auditors(call: Call) -> None:
    """Raises NotFound as `of_project`, and Forbidden unless the caller is an auditor."""
    of_project(call)
    call.caller.require("auditor", action="Reading events as they are stored")


# What is published


@asynccontextmanager
async def published(call: Call) -> AsyncGenerator[Published]:
    """Raises NoCheckpoint, StoreUnavailable."""
    assert call.ledger_id is not None
    async with call.connection() as connection:
        log = await tree.log_of(connection, call.ledger_id)
        if log is None:
            _refuse_nothing(call)
        yield Published(connection, call.ledger_id, log)


def _refuse_nothing(call: Call) -> NoReturn:
    raise NoCheckpoint(what="checkpoint", id=call.caller.project_id)


async def _nothing(call: Call, query: Any) -> Answer:
    _refuse_nothing(call)


def _rest(call: Call, under: str) -> str:
    """The path behind `under`, as it was sent: to Litestar a slash that is doubled, or at the end, is none."""
    sent = unquote(call.scope["raw_path"].partition(b"?")[0].decode("latin-1"))
    return sent.partition(f"/ledger/{call.caller.project_id}/{under}/")[2]


def _tile(path: str, size: int) -> Tile:
    """The tile whose path is this and no other, if a tree of `size` leaves has it so wide. Raises NotFound."""
    level, _, rest = path.partition("/")
    try:
        tile = Tile(int(level), *read_tile_path(rest))
    except ValueError:
        raise NotFound(what="tile", id=path[:100]) from None
    end = tile.index * TILE_HASHES + tile.width
    if tile.path != path or not 0 <= tile.level < LEVELS or end > size >> TILE_LEVELS * tile.level:
        raise NotFound(what="tile", id=path[:100])
    return tile


# Files


@reading(
    "/ledger/{project:str}/checkpoint",
    tag="log",
    answers={200: {"text/plain": str}, 304: None},
    headers=SingleHeaders,
    sends=("Ledger-Position", "Cache-Control", "ETag"),
    empty=_nothing,
    require=of_project,
)
async def get_checkpoint(call: Call, query: NoParameters) -> Answer:
    """The newest checkpoint: how many events there are, and the root of the tree over them, signed.

    A signed note (C2SP tlog-checkpoint), with the lines of the witnesses that have seen it."""
    async with published(call) as (_, _, log):
        etag = b'"%b"' % sha256(log.published).hexdigest()[:32].encode()
    headers = [(b"ledger-position", b"%d" % log.published_size), (b"etag", etag), *SOON_OLD]
    if matches(call.headers.get(b"if-none-match", b""), etag):
        return Answer(304, b"", headers)
    return Answer(200, log.published, headers, TEXT)


@reading(
    "/ledger/{project:str}/tile/{level:str}/{index:path}",
    tag="log",
    answers={200: {"application/octet-stream": None}},
    sends=("Cache-Control",),
    empty=_nothing,
    require=of_project,
)
async def get_tile(call: Call, query: NoParameters) -> Answer:
    """Hashes of the tree: a tile of C2SP tlog-tiles.

    `index` is a number in groups of three digits, all but the last behind an `x`; with `.p/<width>` behind it for the
    first hashes alone. It is there once a published tree has them."""
    async with published(call) as (connection, ledger_id, log):
        hashes = await tree.read_tile(connection, ledger_id, _tile(_rest(call, "tile"), log.published_size))
    return Answer(200, hashes, [*KEPT], BYTES)


@reading(
    "/ledger/{project:str}/tile/entries/{index:path}",
    tag="log",
    answers={200: {"application/octet-stream": None}},
    sends=("Cache-Control",),
    empty=_nothing,
    require=auditors,
)
async def get_entries(call: Call, query: NoParameters) -> Answer:
    """Events as the very bytes that are hashed, for auditors: an entry bundle of C2SP tlog-tiles.

    Each stands behind its length, in two bytes (big-endian). Personal values are sealed, and stay so."""
    async with published(call) as (connection, ledger_id, log):
        _, index, width = _tile(f"0/{_rest(call, 'tile/entries')}", log.published_size)
        entries = await tree.read_entries(connection, ledger_id, index * TILE_HASHES, width)
    bundle = b"".join(part for entry in entries for part in (len(entry).to_bytes(2), entry))
    return Answer(200, bundle, [*KEPT], BYTES)


@reading(
    "/ledger/{project:str}/payload/{digest:str}",
    tag="log",
    answers={200: {"application/octet-stream": None}},
    sends=("Cache-Control",),
    empty=_nothing,
    require=auditors,
)
async def get_payload(call: Call, query: NoParameters) -> Answer:
    """The data of an event that is too large to stand in its entry, by the `data_sha256` there; for auditors."""
    digest = call.scope["path_params"]["digest"]
    async with published(call) as (connection, ledger_id, log):
        payload = None
        if re.fullmatch(r"[0-9a-f]{64}", digest):
            payload = await tree.read_payload(connection, ledger_id, bytes.fromhex(digest), log.published_size)
    if payload is None:
        raise NotFound(what="payload", id=digest[:100])
    return Answer(200, payload, [*KEPT], BYTES)


@reading(
    "/ledger/{project:str}/keys",
    tag="log",
    answers={200: ShownKeys},
    sends=("Cache-Control",),
    empty=_nothing,
    require=of_project,
)
async def get_log_keys(call: Call, query: NoParameters) -> Answer:
    """The keys whose signatures checkpoints of the log have. Keep them when you first see them: a verifier does not
    ask whom it verifies."""
    async with published(call) as (connection, _, log):
        known = await tree.keys_of(connection, log.origin)
    return Answer(200, encode(tree.shown(known)), [*SOON_OLD])


# Proofs


@reading(
    "/ledger/{project:str}/consistency",
    tag="log",
    query=Sizes,
    answers={200: Consistency},
    sends=("Cache-Control",),
    empty=_nothing,
    require=of_project,
)
async def get_consistency(call: Call, query: Sizes) -> Answer:
    """That the ledger of a newer checkpoint begins with all that an older one has (RFC 9162 s2.1.4)."""
    async with published(call) as (connection, ledger_id, log):
        wrong = []
        if query.from_ > query.to:
            wrong.append({"pointer": "from", "detail": f"it is more than `to`, which is {query.to}"})
        if query.to > log.published_size:
            wrong.append({"pointer": "to", "detail": f"it is more than the {log.published_size} that are published"})
        if wrong:
            raise MalformedRequest(wrong)
        proof = await tree.prove_consistency(connection, ledger_id, query.from_, query.to)
    return Answer(200, encode(Consistency(proof)), [*KEPT])


@reading(
    "/events/{position:str}/proof",
    tag="log",
    answers={200: {"text/plain": str}},
    sends=("Ledger-Position",),
    require=anyone,
)
async def get_proof(call: Call, query: NoParameters) -> Answer:
    """That an event is in the ledger, for who has nothing but its entry and the log's keys: a `.tlog-proof` file.

    C2SP tlog-proof, under the newest checkpoint. `view_behind` until one covers the event, which is a moment."""
    position, ledger_id = position_of(call), call.ledger_id
    assert ledger_id is not None
    async with call.connection() as connection:
        log = await tree.log_of(connection, ledger_id)
        size = log.published_size if log else 0
        if log is None or not 1 <= position <= size:
            if 1 <= position <= (await store.head(connection, ledger_id)).size:
                raise ViewBehind(view="log", position=size, wanted=position)
            raise NotFound(what="event", id=call.scope["path_params"]["position"][:100])
        hashes = await tree.prove_inclusion(connection, ledger_id, position - 1, size)
    proof = InclusionProof(position - 1, tuple(hashes), Note.parse(log.published))
    return Answer(200, str(proof).encode(), [(b"ledger-position", b"%d" % size)], TEXT)


ROUTES = [get_checkpoint, get_tile, get_entries, get_payload, get_log_keys, get_consistency, get_proof]
