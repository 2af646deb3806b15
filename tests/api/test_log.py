"""The log over HTTP convinces those who trust nobody: it is verified by code that shares nothing with it."""

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from uuid_utils.compat import uuid7

from ledger import merkle, store, tree
from ledger.checkpoint import InclusionProof, VerifierKey
from ledger.postgres import Pool, open_pool
from ledger.publisher import Publisher
from ledger.signing import LogFiles
from ledger.store import Append, EventRow
from ledger.verify import Trust, verify_proof
from tests.api.conftest import Token, problem_of
from tests.check import check_ledger
from tests.conftest import Database

LARGE = "x" * 100_000

# What a stranger writes from RFC 9162 and C2SP signed-note alone


def leaf(entry: bytes) -> bytes:
    return sha256(b"\0" + entry).digest()


def node(left: bytes, right: bytes) -> bytes:
    return sha256(b"\1" + left + right).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """RFC 9162 s2.1.1."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return node(root(leaves[:k]), root(leaves[k:]))


def includes(leaf_hash: bytes, index: int, size: int, path: Sequence[bytes], root_hash: bytes) -> bool:
    """RFC 9162 s2.1.3.2, step by step."""
    if index >= size:
        return False
    fn, sn, r = index, size - 1, leaf_hash
    for p in path:
        if sn == 0:
            return False
        if fn % 2 == 1 or fn == sn:
            r = node(p, r)
            while fn % 2 == 0 and fn != 0:
                fn, sn = fn >> 1, sn >> 1
        else:
            r = node(r, p)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and r == root_hash


def extends(first: int, first_hash: bytes, second: int, second_hash: bytes, proof: Sequence[bytes]) -> bool:
    """RFC 9162 s2.1.4.2, step by step; of equal sizes there is nothing to prove."""
    if first == second:
        return not proof and first_hash == second_hash
    if not proof:
        return False
    path = [first_hash, *proof] if first & (first - 1) == 0 else list(proof)
    fn, sn = first - 1, second - 1
    while fn % 2 == 1:
        fn, sn = fn >> 1, sn >> 1
    fr = sr = path[0]
    for c in path[1:]:
        if sn == 0:
            return False
        if fn % 2 == 1 or fn == sn:
            fr, sr = node(c, fr), node(c, sr)
            while fn % 2 == 0 and fn != 0:
                fn, sn = fn >> 1, sn >> 1
        else:
            sr = node(sr, c)
        fn, sn = fn >> 1, sn >> 1
    return fr == first_hash and sr == second_hash and sn == 0


class Head(NamedTuple):
    origin: str
    size: int
    root: bytes


def verified(note: bytes, vkey: str) -> Head:
    """The checkpoint that a note is, signed by that key: C2SP signed-note and tlog-checkpoint."""
    text, _, lines = note.decode().rpartition("\n\n")
    text += "\n"
    name, id_, rest = vkey.split("+", 2)
    key = base64.b64decode(rest)
    assert sha256(name.encode() + b"\n" + key).hexdigest()[:8] == id_
    assert key[0] == 1
    signed = [base64.b64decode(line.split(" ")[2]) for line in lines.splitlines() if line.startswith(f"\u2014 {name} ")]
    (signature,) = [one for one in signed if one[:4].hex() == id_]
    Ed25519PublicKey.from_public_bytes(key[1:]).verify(signature[4:], text.encode())
    origin, size, hash_ = text.splitlines()
    assert origin == name
    return Head(origin, int(size), base64.b64decode(hash_))


def unpacked(bundle: bytes) -> list[bytes]:
    entries = []
    while bundle:
        end = 2 + int.from_bytes(bundle[:2], "big")
        entries.append(bundle[2:end])
        bundle = bundle[end:]
    return entries


def path_of(index: int) -> str:
    """C2SP tlog-tiles: the number in groups of three digits."""
    digits = f"{index:0{-(-len(str(index)) // 3) * 3}}"
    groups = [digits[at : at + 3] for at in range(0, len(digits), 3)]
    return "/".join([*(f"x{group}" for group in groups[:-1]), groups[-1]])


# A ledger, and a publisher that publishes when it is told to


class Ledger(NamedTuple):
    client: httpx.AsyncClient
    auditor: dict[str, str]
    database: Database
    pool: Pool
    keys: LogFiles
    publisher: Publisher

    async def record(self, count: int, **fields: Any) -> None:
        item = {"type": "Record", "kind": "note"} | fields
        answered = await self.client.post("/commands", json=[item] * count)
        assert {one["status"] for one in answered.json()} == {201}

    async def publish(self) -> Head:
        """All that is recorded; answers the checkpoint."""
        async with self.pool.connection() as connection:
            ledger = await store.find_ledger(connection, "demo")
        assert ledger is not None
        await self.publisher.publish(ledger.ledger_id)
        return verified(await self.file("checkpoint"), (await self.vkeys())[-1])

    async def vkeys(self) -> list[str]:
        answer = msgspec.json.decode(await self.file("keys"))
        return [key["vkey"] for key in answer["keys"]]

    async def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return await self.client.get(f"/ledger/demo/{path}", **{"headers": self.auditor} | kwargs)

    async def file(self, path: str) -> bytes:
        response = await self.get(path)
        assert response.status_code == 200, (path, response.text)
        return response.content

    async def entries(self, size: int) -> list[bytes]:
        """All of them, from the bundles."""
        full, width = divmod(size, 256)
        paths = [path_of(index) for index in range(full)] + ([f"{path_of(full)}.p/{width}"] if width else [])
        return [entry for path in paths for entry in unpacked(await self.file(f"tile/entries/{path}"))]

    def tamper(self, statement: str) -> None:
        with psycopg.connect(self.database.owner) as owner:
            owner.execute("SET session_replication_role = replica")
            owner.execute(statement.encode())


@pytest.fixture
async def ledger(client: httpx.AsyncClient, token: Token, database: Database, tmp_path: Path) -> AsyncIterator[Ledger]:
    async with open_pool(database.worker) as pool:
        keys = LogFiles(tmp_path / "signing")
        async with pool.connection() as connection:
            await tree.add_key(connection, 1, keys.make(1))
        auditor = token("auditor", subject="ann")
        yield Ledger(client, auditor, database, pool, keys, Publisher(pool, keys))


# Files


async def test_the_checkpoint_is_of_the_very_bytes_that_are_served(ledger: Ledger, database: Database) -> None:
    await ledger.record(300, body={"who": {"$personal": {"subject": "c-9", "value": "Grace"}}})
    head = await ledger.publish()
    assert head.size == 300
    entries = await ledger.entries(300)
    assert head.root == root([leaf(entry) for entry in entries])
    for position in (1, 256, 257, 300):
        shown = (await ledger.client.get(f"/events/{position}", headers=ledger.auditor)).json()
        stored = msgspec.json.decode(entries[position - 1])
        assert (stored["event_id"], shown["position"]) == (shown["event_id"], position)
        assert "Grace" in str(shown)
    assert b"Grace" not in b"".join(entries)
    assert head.origin == f"localhost/{msgspec.json.decode(entries[0])['ledger']}"
    check_ledger(database.owner)


async def test_files_say_what_they_are_and_how_long_they_may_be_kept(ledger: Ledger) -> None:
    await ledger.record(260)
    await ledger.publish()
    kept, soon_old = "private, max-age=31536000, immutable", "private, max-age=1"
    for path, media_type, cache in (
        ("checkpoint", "text/plain; charset=utf-8", soon_old),
        ("keys", "application/json", soon_old),
        ("tile/0/000", "application/octet-stream", kept),
        ("tile/0/001.p/4", "application/octet-stream", kept),
        ("tile/entries/000", "application/octet-stream", kept),
        ("consistency?from=3&to=260", "application/json", kept),
    ):
        got = await ledger.get(path)
        assert (got.status_code, got.headers["content-type"]) == (200, media_type)
        assert (got.headers["cache-control"], got.headers["vary"]) == (cache, "Authorization")
        assert got.headers["ledger-id"]
        head = await ledger.client.head(f"/ledger/demo/{path}", headers=ledger.auditor)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers == got.headers


async def test_every_tile_of_the_tree_is_served_and_none_besides(ledger: Ledger) -> None:
    size = 66_000
    leaves = [leaf(b"event %d" % number) for number in range(size)]
    async with ledger.pool.connection() as connection:
        ledger_id = (await store.create_ledger(connection, "demo")).ledger_id
        batch = Append(ledger_id=ledger_id, seen=0, recorded_at=datetime(2026, 11, 21, tzinfo=UTC))
        rows = [(b"event %d" % number, hash_) for number, hash_ in enumerate(leaves)]
        batch.events = [EventRow(uuid7(), 1, "Anything", entry, hash_, None) for entry, hash_ in rows]
        assert await store.append(connection, batch)
    head = await ledger.publish()
    assert head.size == size
    level, below = 0, leaves
    while below:
        full, width = divmod(size >> 8 * level, 256)
        for index in {0, full // 2, full - 1} & set(range(full)):
            expected = b"".join(below[256 * index : 256 * index + 256])
            assert await ledger.file(f"tile/{level}/{path_of(index)}") == expected
        for part in {1, width} - {0}:
            expected = b"".join(below[256 * full : 256 * full + part])
            assert await ledger.file(f"tile/{level}/{path_of(full)}.p/{part}") == expected
        for missing in (path_of(full), f"{path_of(full)}.p/{width + 1}", path_of(full + 1), f"{path_of(full + 1)}.p/1"):
            assert (await ledger.get(f"tile/{level}/{missing}")).status_code == 404
        below = [root(below[at : at + 256]) for at in range(0, len(below) - 255, 256)]
        level += 1
    assert level == 3
    assert (await ledger.get("tile/3/000.p/1")).status_code == 404
    bundle = await ledger.file("tile/entries/257.p/208")
    assert unpacked(bundle) == [b"event %d" % number for number in range(65_792, size)]
    for index in (0, 65_535, 65_999):
        proof = InclusionProof.parse((await ledger.client.get(f"/events/{index + 1}/proof")).content)
        assert includes(leaves[index], index, size, proof.hashes, head.root)
    for old in (1, 65_536, 65_537):
        answer = (await ledger.get(f"consistency?from={old}&to={size}")).json()
        assert extends(old, root(leaves[:old]), size, head.root, [base64.b64decode(one) for one in answer["proof"]])


async def test_what_was_published_stays_and_what_is_not_is_not_there(ledger: Ledger) -> None:
    await ledger.record(5)
    await ledger.publish()
    files = {path: await ledger.file(path) for path in ("tile/0/000.p/5", "tile/entries/000.p/5")}
    await ledger.record(255)
    for path in ("tile/0/000.p/6", "tile/0/000", "tile/1/000.p/1", "tile/entries/000", "tile/entries/000.p/6"):
        assert problem_of(await ledger.get(path))["code"] == "not_found"
    await ledger.publish()
    for path in ("tile/0/000.p/6", "tile/0/000", "tile/1/000.p/1", "tile/entries/000", "tile/0/001.p/4"):
        assert (await ledger.get(path)).status_code == 200
    for path, content in files.items():
        assert await ledger.file(path) == content


NO_PATHS = """
    tile/0/0 tile/0/00 tile/0/0000 tile/00/000 tile/0/x000/000 tile/0/X000/000 tile/0/000x tile/0/001.p/5
    tile/0/000.p/0 tile/0/000.p/05 tile/0/000.p/256 tile/0/000.p/ tile/0/000.p tile/0/000.p/5.p/5
    tile/-0/000 tile/+0/000 tile/0/-00 tile/64/000.p/1 tile/8/0/000 tile/0/\u0660\u0660\u0660 tile/\u0660/000
    tile/0/000/ tile/0//000 tile//0/000 tile/0 tile/0/ tile tile/x/000 tile/data/000
    tile/entries tile/entries/ tile/entries/0 tile/entries/000/ tile/entries//000 tile/entries/000.p/0
    payload payload/ payload/000 nothing
"""
LONG = (f"tile/0/{'x999/' * 2000}999", f"tile/{'9' * 5000}/000", f"payload/{'0' * 64}", f"payload/{'A' * 64}")


async def test_there_is_one_path_to_a_file_and_any_other_is_404(ledger: Ledger) -> None:
    await ledger.record(256)
    await ledger.publish()
    for path in ("tile/0/000", "tile/0/000.p/5", "tile/1/000.p/1", "tile/entries/000", "tile/entries/000.p/5"):
        assert (await ledger.get(path)).status_code == 200
    for path in (*NO_PATHS.split(), *LONG, ""):
        response = await ledger.get(path)
        assert response.status_code == 404, path
        assert problem_of(response)["code"] == "not_found"


async def test_data_beside_its_entry_is_had_by_the_digest_there(ledger: Ledger) -> None:
    await ledger.record(1)
    await ledger.record(2, body={"text": LARGE})
    await ledger.publish()
    entry = msgspec.json.decode((await ledger.entries(3))[1])
    assert "data" not in entry
    response = await ledger.get(f"payload/{entry['data_sha256']}")
    assert response.headers["content-type"] == "application/octet-stream"
    assert "immutable" in response.headers["cache-control"]
    payload = response.content
    assert (sha256(payload).hexdigest(), len(payload)) == (entry["data_sha256"], entry["data_bytes"])
    assert msgspec.json.decode(payload)["body"] == {"text": LARGE}
    await ledger.record(1, body={"text": LARGE + "!"})
    with psycopg.connect(ledger.database.owner) as owner:
        row = owner.execute("SELECT encode(sha256(data), 'hex') FROM ledger.payloads WHERE position = 4").fetchone()
    assert row is not None
    assert problem_of(await ledger.get(f"payload/{row[0]}"))["code"] == "not_found"
    await ledger.publish()
    assert (await ledger.get(f"payload/{row[0]}")).status_code == 200


async def test_a_checkpoint_that_is_known_is_not_sent_again(ledger: Ledger) -> None:
    await ledger.record(1)
    await ledger.publish()
    known = await ledger.get("checkpoint")
    again = await ledger.get("checkpoint", headers=ledger.auditor | {"If-None-Match": known.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == known.headers["etag"]
    assert again.headers["cache-control"] == known.headers["cache-control"]
    await ledger.record(1)
    await ledger.publish()
    changed = await ledger.get("checkpoint", headers=ledger.auditor | {"If-None-Match": known.headers["etag"]})
    assert changed.status_code == 200
    assert changed.headers["ledger-position"] == "2"


# Who may


HASHES = ("checkpoint", "tile/0/000.p/3", "keys", "consistency?from=1&to=3")
ENTRIES = ("tile/entries/000.p/3", "payload/{digest}")


async def test_any_token_of_the_project_reads_hashes_and_auditors_read_entries(ledger: Ledger, token: Token) -> None:
    await ledger.record(3, body={"text": LARGE})
    await ledger.publish()
    digest = msgspec.json.decode((await ledger.entries(3))[0])["data_sha256"]
    entries = [path.format(digest=digest) for path in ENTRIES]
    for roles in ((), ("importer",), ("agent",), ("approver", "operator")):
        by = token(*roles, subject="x")
        for path in HASHES:
            assert (await ledger.get(path, headers=by)).status_code == 200
        assert (await ledger.client.get("/events/1/proof", headers=by)).status_code == 200
        for path in entries:
            refused = await ledger.get(path, headers=by)
            assert (refused.status_code, problem_of(refused)["needed"]) == (403, ["auditor"])
    for path in entries:
        assert (await ledger.get(path)).status_code == 200


async def test_the_log_of_another_project_is_as_if_it_were_not(ledger: Ledger, token: Token) -> None:
    await ledger.record(3)
    await ledger.publish()
    other = token("auditor", "operator", subject="x", project="other")
    for path in (*HASHES, "tile/entries/000.p/3", f"payload/{'0' * 64}"):
        theirs = await ledger.get(path, headers=other)
        nobodys = await ledger.client.get(f"/ledger/nobody/{path}", headers=other)
        assert problem_of(theirs) | {"id": "", "detail": ""} == problem_of(nobodys) | {"id": "", "detail": ""}
        assert theirs.status_code == 404
        assert "ledger-id" not in theirs.headers
        ledger.client.headers.pop("authorization", None)
        assert (await ledger.client.get(f"/ledger/demo/{path}")).status_code == 401


# Proofs


async def test_before_it_is_published_there_is_no_checkpoint_and_no_proof(ledger: Ledger) -> None:
    for recorded in (0, 2):
        if recorded:
            await ledger.record(recorded)
        for path in ("checkpoint", "tile/0/000.p/1", "tile/entries/000.p/1", "keys", "consistency?from=1&to=1"):
            problem = problem_of(await ledger.get(path))
            assert (problem["status"], problem["code"]) == (404, "not_found")
            assert "no checkpoint yet" in problem["detail"]
    early = await ledger.client.get("/events/2/proof")
    assert (early.status_code, problem_of(early)["code"]) == (503, "view_behind")
    await ledger.publish()
    assert (await ledger.client.get("/events/2/proof")).status_code == 200
    await ledger.record(1)
    early = await ledger.client.get("/events/3/proof")
    assert (early.status_code, problem_of(early)["position"], problem_of(early)["wanted"]) == (503, 2, 3)
    for nowhere in ("0", "4", "-1", "x", "1" * 30, "\u0663"):
        missing = await ledger.client.get(f"/events/{nowhere}/proof")
        assert (missing.status_code, problem_of(missing)["code"]) == (404, "not_found")


async def test_a_proof_shows_that_the_event_is_there_and_nowhere_else(ledger: Ledger) -> None:
    await ledger.record(300)
    await ledger.publish()
    (vkey,) = await ledger.vkeys()
    entries = await ledger.entries(300)
    for position in (1, 2, 255, 256, 257, 299, 300):
        answer = await ledger.client.get(f"/events/{position}/proof")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.headers["ledger-position"] == "300"
        first, index, *lines = answer.text.split("\n\n")[0].split("\n")
        assert (first, index) == ("c2sp.org/tlog-proof@v1", f"index {position - 1}")
        note = answer.text.partition("\n\n")[2].encode()
        assert note == await ledger.file("checkpoint")
        head, path = verified(note, vkey), [base64.b64decode(line) for line in lines]
        for other in {0, max(0, position - 2), position - 1, min(position, 299)}:
            shown = includes(leaf(entries[other]), position - 1, head.size, path, head.root)
            assert shown == (other == position - 1)
        proven, signed = verify_proof(answer.content, entries[position - 1], Trust([VerifierKey.parse(vkey)]))
        assert (proven, signed.checkpoint.size) == (position, 300)


async def test_each_checkpoint_goes_on_from_those_before(ledger: Ledger) -> None:
    heads = []
    for count in (1, 1, 5, 249, 1, 43):
        await ledger.record(count)
        heads.append(await ledger.publish())
    for at, old in enumerate(heads):
        for new in heads[at:]:
            answer = await ledger.get("consistency", params={"from": old.size, "to": new.size})
            assert list(answer.json()) == ["proof"]
            proof = [base64.b64decode(one, validate=True) for one in answer.json()["proof"]]
            assert extends(old.size, old.root, new.size, new.root, proof)
            merkle.check_consistency(old.size, old.root, new.size, new.root, proof)
            assert old == new or not extends(old.size, leaf(b"forged"), new.size, new.root, proof)
    assert (await ledger.get("consistency?from=0&to=7")).json() == {"proof": []}


@pytest.mark.parametrize(
    ("query", "pointers"),
    [
        ("from=2&to=1", ["from"]),
        ("from=1&to=4", ["to"]),
        ("from=5&to=4", ["from", "to"]),
        ("from=1", ["to"]),
        ("to=1", ["from"]),
        ("from=x&to=1", ["from"]),
        ("from=-1&to=1", ["from"]),
        ("from=1&to=1.5", ["to"]),
        ("from=1&to=99999999999999999999", ["to"]),
        ("from=1&to=1&to=2", ["to"]),
        ("from=1&to=1&size=2", ["size"]),
    ],
)
async def test_what_cannot_be_compared_is_named(ledger: Ledger, query: str, pointers: list[str]) -> None:
    await ledger.record(3)
    await ledger.publish()
    await ledger.record(3)
    problem = problem_of(await ledger.get(f"consistency?{query}"))
    assert problem["status"] == 400
    assert [error["pointer"] for error in problem["errors"]] == pointers


async def test_the_keys_say_since_when_and_until_when(ledger: Ledger) -> None:
    await ledger.record(1)
    await ledger.publish()
    (only,) = (await ledger.get("keys")).json()["keys"]
    assert set(only) == {"vkey", "from"}
    async with ledger.pool.connection() as connection:
        await tree.add_key(connection, 2, ledger.keys.make(2))
    await ledger.publish()
    note = await ledger.file("checkpoint")
    old, new = await ledger.vkeys()
    assert old == only["vkey"]
    assert verified(note, old) == verified(note, new)
    async with ledger.pool.connection() as connection:
        await tree.retire_key(connection, 1, datetime.now(UTC))
    first, second = (await ledger.get("keys")).json()["keys"]
    assert (set(first), set(second)) == ({"vkey", "from", "until"}, {"vkey", "from"})
    assert first["from"] < first["until"]


# Trouble


async def test_what_is_damaged_is_not_given_out_as_if_it_were_whole(ledger: Ledger) -> None:
    await ledger.record(300)
    await ledger.publish()
    ledger.tamper("DELETE FROM ledger.tiles")
    ledger.tamper("DELETE FROM ledger.events WHERE position = 7")
    for path in ("tile/1/000.p/1", "tile/0/000", "tile/entries/000"):
        problem = problem_of(await ledger.get(path))
        assert (problem["status"], problem["code"]) == (500, "internal_error")
    assert (await ledger.client.get("/events/300/proof")).status_code == 500
    assert (await ledger.get("checkpoint")).status_code == 200


async def test_readers_of_a_growing_log_see_what_fits_together(ledger: Ledger) -> None:
    await ledger.record(1)
    await ledger.publish()

    async def grow() -> None:
        for _ in range(10):
            await ledger.record(30)
            await ledger.publish()

    growing = asyncio.create_task(grow())
    while not growing.done():
        (vkey,) = await ledger.vkeys()
        proof = InclusionProof.parse((await ledger.client.get("/events/1/proof")).content)
        head = verified(str(proof.checkpoint).encode(), vkey)
        entries = await ledger.entries(head.size)
        assert head.root == root([leaf(entry) for entry in entries])
        assert includes(leaf(entries[0]), 0, head.size, proof.hashes, head.root)
    await growing
