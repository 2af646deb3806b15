"""Use tokens: a gateway that asks nobody can tell that an approved action has begun, and that it is this one."""

import asyncio
import stat
from collections.abc import AsyncIterator, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import jwt
import pytest
import rfc8785

from api.app import create_app
from api.use_tokens import Signer
from ledger.postgres import Pool, open_pool
from ledger.project_key import UnusableKey
from ledger.settings import Settings
from tests.api.conftest import Token, problem_of, running
from tests.check import check_ledger, of_type
from tests.conftest import Database

Json = dict[str, Any]
ACTION: Json = {"tool": "bank.transfer", "arguments": {"to": "DE02 1203", "amount": 12.5}}
CLAIMS = ["iss", "aud", "iat", "exp", "jti", "project", "approval_id", "action_digest"]


@pytest.fixture(autouse=True)
def whole(database: Database) -> Iterator[None]:
    """Whatever a test did, the ledger holds afterwards."""
    yield
    check_ledger(database.owner)


async def approved(client: httpx.AsyncClient, token: Token, **fields: Any) -> Json:
    """An approval that agent-7 asked for, and may now use."""
    asked = (await client.post("/approvals", json={"action": ACTION} | fields)).json()
    vote = {"verdict": "approve", "digest_seen": asked["request_digest"]}
    path, by = f"/approvals/{asked['approval_id']}/votes", token("approver", subject="ann", kind="human")
    answer: Json = (await client.post(path, json=vote, headers=by)).json()
    assert answer["state"] == "approved"
    return answer


async def begun(client: httpx.AsyncClient, approval: Json, **fields: Any) -> httpx.Response:
    use = {"execution_id": str(uuid4()), "action": ACTION, "audience": "payments", "command_id": str(uuid4())}
    return await client.post(f"/approvals/{approval['approval_id']}/uses", json=use | fields)


async def checked(client: httpx.AsyncClient, token: str, audience: str = "payments") -> Json:
    """What a gateway learns of a token, having nothing but the published keys."""
    keys = jwt.PyJWKSet.from_dict((await client.get("/.well-known/jwks.json", headers={"Authorization": ""})).json())
    shown = jwt.decode_complete(
        token,
        keys[jwt.get_unverified_header(token)["kid"]],
        algorithms=["EdDSA"],
        audience=audience,
        issuer="localhost",
        options={"require": CLAIMS},
    )
    assert shown["header"]["typ"] == "muniment-use+jwt"
    payload: Json = shown["payload"]
    return payload


async def test_a_gateway_can_tell_what_was_approved_from_the_token_alone(
    client: httpx.AsyncClient, token: Token
) -> None:
    approval = await approved(client, token)
    answer = (await begun(client, approval)).json()
    (execution,) = answer["executions"]
    claims = await checked(client, answer["use_token"])
    assert claims["jti"] == execution["execution_id"]
    assert (claims["project"], claims["approval_id"]) == ("demo", approval["approval_id"])
    assert 0 < claims["exp"] - claims["iat"] <= 60
    salt = bytes.fromhex(approval["salts"]["action"])
    assert claims["action_digest"] == f"sha256:{sha256(salt + rfc8785.dumps(ACTION)).hexdigest()}"


async def test_a_token_is_for_its_audience_and_for_nobody_without_one(client: httpx.AsyncClient, token: Token) -> None:
    one = (await begun(client, await approved(client, token))).json()["use_token"]
    with pytest.raises(jwt.InvalidAudienceError):
        await checked(client, one, "another")
    nobodys = (await begun(client, await approved(client, token), audience=None)).json()["use_token"]
    with pytest.raises(jwt.MissingRequiredClaimError):
        await checked(client, nobodys)


async def test_a_token_lasts_no_longer_than_the_execution_has(client: httpx.AsyncClient, token: Token) -> None:
    approval = await approved(client, token, outcome_within_seconds=20)
    claims = await checked(client, (await begun(client, approval)).json()["use_token"])
    assert claims["exp"] - claims["iat"] <= 21


async def test_a_replay_gives_the_same_token_and_nobody_else_is_given_it(
    client: httpx.AsyncClient, token: Token
) -> None:
    approval = await approved(client, token, uses=2)
    use: Json = {"execution_id": str(uuid4()), "command_id": "use-1"}
    first = await begun(client, approval, **use)
    outcome = f"/approvals/{approval['approval_id']}/uses/{use['execution_id']}/outcome"
    assert "use_token" not in (await client.post(outcome, json={"outcome": "ok"})).json()
    second = await begun(client, approval)
    again = await begun(client, approval, **use)
    assert again.content == first.content
    assert again.headers["idempotent-replayed"] == "true"
    assert second.json()["use_token"] != first.json()["use_token"]
    assert (await client.get("/commands/use-1")).json()["body"] == first.json()
    theirs = {"principal": "muniment-development#agent-7"}
    auditor = token("auditor", subject="eve", kind="human")
    seen = (await client.get("/commands/use-1", params=theirs, headers=auditor)).json()["body"]
    assert seen | {"use_token": first.json()["use_token"]} == first.json()
    assert "use_token" not in seen
    assert "use_token" not in (await client.get(f"/approvals/{approval['approval_id']}")).json()


async def test_every_process_of_a_deployment_signs_with_the_same_key(
    client: httpx.AsyncClient, settings: Settings, token: Token
) -> None:
    answer = await client.get("/.well-known/jwks.json")
    assert answer.headers["content-type"] == "application/jwk-set+json"
    (key,) = answer.json()["keys"]
    assert (key["kty"], key["crv"], key["alg"], key["use"]) == ("OKP", "Ed25519", "EdDSA", "sig")
    thumbprint = sha256(f'{{"crv":"Ed25519","kty":"OKP","x":"{key["x"]}"}}'.encode()).digest()
    assert jwt.utils.base64url_encode(thumbprint).decode() == key["kid"]
    async with running(create_app(settings), token("agent")) as elsewhere:
        assert (await elsewhere.get("/.well-known/jwks.json")).json() == answer.json()
        shown = (await begun(elsewhere, await approved(client, token))).json()["use_token"]
        await checked(client, shown)


async def test_nothing_begins_that_could_not_be_shown(
    client: httpx.AsyncClient, token: Token, tmp_path: Path, database: Database
) -> None:
    approval, key = await approved(client, token), tmp_path / "keys" / "use-tokens.secret"
    key.write_bytes(bytes(31))
    key.chmod(0o600)
    use: Json = {"execution_id": str(uuid4()), "command_id": "use-1"}
    assert problem_of(await begun(client, approval, **use))["code"] == "store_unavailable"
    assert problem_of(await client.get("/.well-known/jwks.json"))["code"] == "store_unavailable"
    in_a_list = {"type": "BeginUse", "approval_id": approval["approval_id"], "action": ACTION} | use
    assert problem_of(await client.post("/commands", json=[in_a_list]))["code"] == "store_unavailable"
    assert not of_type(check_ledger(database.owner)["demo"], "ApprovalUseBegun")
    key.unlink()
    await checked(client, (await begun(client, approval, **use)).json()["use_token"])


# The key


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    async with open_pool(database.api, 2) as pool:
        yield pool


async def test_the_key_is_made_once_and_only_where_it_may_be(pool: Pool, tmp_path: Path) -> None:
    keys_dir = tmp_path / "keys"
    with pytest.raises(UnusableKey, match=r"use-tokens\.secret.* is missing"):
        await Signer(keys_dir, pool, create_key=False).open()
    signers = [Signer(keys_dir, pool, create_key=True) for _ in range(8)]
    sets = await asyncio.gather(*(signer.keys() for signer in signers))
    assert all(one == sets[0] for one in sets)
    assert await Signer(keys_dir, pool, create_key=False).keys() == sets[0]
    (file,) = keys_dir.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    with pytest.raises(UnusableKey, match="open to other users"):
        await Signer(keys_dir, pool, create_key=True).open()
