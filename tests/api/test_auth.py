"""Tokens: what is accepted, what is not, and for how long."""

import base64
import hmac
import json
import time
from pathlib import Path
from typing import Any

import jwt
import msgspec
import pytest

from api import auth
from api.auth import DEVELOPMENT_ISSUER, Caller, Tokens, development_token, development_verifier, key_path
from api.http import encode
from api.problems import problem
from ledger.errors import Unauthenticated
from ledger.project_key import UnusableKey

CLAIMS: dict[str, Any] = {"iss": DEVELOPMENT_ISSUER, "sub": "ann", "project": "demo", "exp": 4_000_000_000}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def tokens(keys: Path) -> Tokens:
    return Tokens({DEVELOPMENT_ISSUER: development_verifier(keys)})


def bearer(token: str) -> bytes:
    return f"Bearer {token}".encode()


def signed(keys: Path, claims: dict[str, Any], key: bytes | None = None) -> str:
    """A token with any claims at all, which the library would not make."""
    development_token(keys, project="demo", subject="x")
    content = b".".join(_part(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
    return b".".join([content, _part(hmac.digest(key or key_path(keys).read_bytes(), content, "sha256"))]).decode()


def _part(content: bytes) -> bytes:
    return base64.urlsafe_b64encode(content).rstrip(b"=")


async def test_a_development_token_says_who_and_for_which_project(keys: Path, tokens: Tokens) -> None:
    token = development_token(keys, project="demo", subject="ann", kind="human", roles=["approver", "auditor"])
    for _ in range(2):
        caller = await tokens.caller(bearer(token))
        assert (caller.project_id, caller.actor.principal) == ("demo", "muniment-development#ann")
        assert (caller.actor.kind, caller.actor.roles) == ("human", ("approver", "auditor"))
        assert caller.actor.assurance == "authenticated"
    assert (await tokens.caller(b"bearer  " + token.encode())).actor == caller.actor


async def test_a_token_without_a_kind_is_an_agents_and_without_roles_has_none(keys: Path, tokens: Tokens) -> None:
    caller = await tokens.caller(bearer(signed(keys, CLAIMS)))
    assert (caller.actor.kind, caller.actor.roles, caller.may_read) == ("agent", (), False)


async def test_the_key_is_made_once_and_is_nobodys_but_ours(keys: Path) -> None:
    first = development_token(keys, project="demo", subject="a")
    path = key_path(keys)
    assert path.stat().st_mode & 0o777 == 0o600
    second = development_token(keys, project="demo", subject="b")
    verifier = Tokens({DEVELOPMENT_ISSUER: development_verifier(keys)})
    assert [(await verifier.caller(bearer(t))).actor.sub for t in (first, second)] == ["a", "b"]
    path.chmod(0o644)
    with pytest.raises(UnusableKey):
        await Tokens({DEVELOPMENT_ISSUER: development_verifier(keys)}).caller(bearer(first))


def test_the_key_of_tokens_is_no_projects_key(keys: Path) -> None:
    assert not msgspec.json.encode(key_path(keys).name).endswith(b'.key"')


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Basic YTpi",
        b"Bearer a.b.c",
        b"Bearer \xff\xfe",
        b"Bearer " + b"a" * 20_000,
        b"Bearer " + b".".join([base64.urlsafe_b64encode(b'{"alg":"HS256"}').strip(b"=")] * 3),
        b"Bearer " + base64.urlsafe_b64encode(b"[" * 9000) + b".x.y",
    ],
)
async def test_what_is_no_token_is_refused(tokens: Tokens, header: bytes) -> None:
    with pytest.raises(Unauthenticated):
        await tokens.caller(header)


@pytest.mark.parametrize(
    "change",
    [
        {"exp": 1},
        {"exp": "soon"},
        {"exp": None},
        {"iss": "https://id.example"},
        {"iss": [DEVELOPMENT_ISSUER]},
        {"iss": None},
        {"sub": None},
        {"sub": ""},
        {"sub": "a\n"},
        {"sub": "x" * 256},
        {"sub": 7},
        {"sub": "\ud800"},
        {"roles": ["agent", "a\udfff"]},
        {"kind": "\ud800"},
        {"iss": "\ud800"},
        {"project": None},
        {"project": "../etc"},
        {"project": "demo\n"},
        {"kind": "system"},
        {"roles": "agent"},
        {"roles": [1]},
        {"nbf": 4_000_000_000},
    ],
)
async def test_claims_that_cannot_be_meant_are_refused(keys: Path, tokens: Tokens, change: dict[str, Any]) -> None:
    claims = {name: value for name, value in (CLAIMS | change).items() if value is not None}
    with pytest.raises(Unauthenticated) as refused:
        await tokens.caller(bearer(signed(keys, claims)))
    assert encode(problem(refused.value))


async def test_a_token_signed_otherwise_is_refused(keys: Path, tokens: Tokens) -> None:
    good = signed(keys, CLAIMS)
    head, body, signature = good.split(".")
    forged = base64.urlsafe_b64encode(msgspec.json.encode(CLAIMS | {"sub": "root"})).decode().strip("=")
    unsigned = jwt.encode(CLAIMS, "", algorithm="none")
    other_key = signed(keys, CLAIMS, key=b"k" * 32)
    flipped = signature[:-2] + ("A" if signature[-2] != "A" else "B") + signature[-1]
    for token in (f"{head}.{forged}.{signature}", unsigned, other_key, f"{head}.{body}.{flipped}", f"{head}.{body}."):
        with pytest.raises(Unauthenticated):
            await tokens.caller(bearer(token))
    assert (await tokens.caller(bearer(good))).actor.sub == "ann"


async def test_no_token_is_accepted_where_no_issuer_is_trusted(keys: Path) -> None:
    with pytest.raises(Unauthenticated):
        await Tokens({}).caller(bearer(development_token(keys, project="demo", subject="a")))


@pytest.mark.parametrize(("lifetime", "remembered"), [(3600, 59), (30, 29)])
async def test_a_token_is_verified_again_after_a_minute_or_when_it_expires(
    keys: Path, monkeypatch: pytest.MonkeyPatch, lifetime: int, remembered: int
) -> None:
    verify, verified = development_verifier(keys), []

    async def counted(token: str) -> tuple[Caller, float]:
        verified.append(token)
        return await verify(token)

    tokens = Tokens({DEVELOPMENT_ISSUER: counted})
    now = float(int(time.time()))
    monkeypatch.setattr("time.time", lambda: now)
    token = bearer(development_token(keys, project="demo", subject="a", lifetime_seconds=lifetime))
    for later, times in ((0, 1), (remembered, 1), (remembered + 1, 2)):
        monkeypatch.setattr("time.time", lambda later=later: now + later)
        await tokens.caller(token)
        assert len(verified) == times


async def test_only_so_many_tokens_are_remembered(keys: Path, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "VERIFIED_TOKENS_MAX", 3)
    for n in range(10):
        await tokens.caller(bearer(development_token(keys, project="demo", subject=f"s{n}")))
    assert len(tokens._verified) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"project": "No"},
        {"subject": ""},
        {"kind": "system"},
        {"roles": ["a" * 256]},
        {"project": "a\n"},
        {"subject": "\ud800"},
    ],
)
def test_a_token_that_no_server_would_accept_is_not_made(keys: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        development_token(keys, **({"project": "demo", "subject": "a"} | wrong))
