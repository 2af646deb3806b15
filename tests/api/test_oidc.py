"""Access tokens of a real OpenID provider: which are believed, whose they are, and what happens without it."""

import asyncio
import hmac
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from jwt.algorithms import RSAAlgorithm

from api import oidc
from api.app import create_app
from api.auth import TOKEN_BYTES_MAX, Tokens
from api.oidc import caller_of, find_claim, provider
from ledger.errors import Unauthenticated
from ledger.postgres import open_pool
from ledger.settings import Settings
from ledger.store import create_ledger
from ledger.values import Principal
from ledger.vault import Vault
from tests.api.conftest import Token, problem_of, running, settings_of
from tests.api.provider.provider import OpenIdProvider, SigningKey
from tests.api.provider.trust import AUDIENCE, CLAIMS, configured, forged, parts, refused, trusting
from tests.check import check_ledger
from tests.conftest import Database

pytestmark = pytest.mark.usefixtures("prompt")


# Who is believed


async def test_a_machines_token_says_who_calls_and_for_which_project(openid: OpenIdProvider) -> None:
    async with trusting(openid.issuer) as caller:
        known = await caller(openid.token(CLAIMS, client_id="billing-bot"))
    assert (known.project_id, known.actor.issuer, known.actor.sub) == ("demo", openid.issuer, "billing-bot")
    assert (known.actor.kind, known.actor.assurance, known.actor.client) == ("agent", "authenticated", "billing-bot")
    assert (known.actor.roles, known.may_read) == (("agent", "offline_access", "auditor"), True)


async def test_a_persons_token_says_how_they_signed_in(openid: OpenIdProvider) -> None:
    how = {"kind": "human", "auth_time": 1_790_000_000, "acr": "2", "amr": ["pwd", "otp"]}
    tokens = openid.sign_in("ann", CLAIMS | how)
    async with trusting(openid.issuer) as caller:
        actor = (await caller(tokens["access_token"])).actor
    assert (actor.sub, actor.kind, actor.client) == ("ann", "human", "web")
    assert (actor.auth_time, actor.acr, actor.amr) == (1_790_000_000, "2", ("pwd", "otp"))


@pytest.mark.parametrize("typ", ["at+jwt", "JWT", "application/at+jwt"])
async def test_an_access_token_is_believed_by_either_name(openid: OpenIdProvider, typ: str) -> None:
    token = openid.token(CLAIMS, typ=typ)
    assert parts(token)[0]["typ"] == typ
    async with trusting(openid.issuer) as caller:
        assert (await caller(token)).actor.sub == "bot"


async def test_one_who_acts_for_a_person_is_the_actor_and_no_human(openid: OpenIdProvider) -> None:
    act = {"sub": "outer-agent", "act": {"sub": "middle-agent", "iss": openid.issuer, "act": {"sub": "first-agent"}}}
    tokens = openid.sign_in("ann", CLAIMS | {"kind": "human", "acr": "2", "act": act})
    async with trusting(openid.issuer) as caller:
        actor = (await caller(tokens["access_token"])).actor
    assert (actor.sub, actor.kind, actor.acr) == ("outer-agent", "agent", None)
    assert actor.on_behalf_of == tuple(Principal(openid.issuer, sub) for sub in ("ann", "first-agent", "middle-agent"))


# Who is not


async def test_an_id_token_is_no_access_token(openid: OpenIdProvider) -> None:
    id_token = openid.sign_in("ann", CLAIMS)["id_token"]
    like_one = openid.token(CLAIMS, client_id="web", audience="https://web.example", typ="JWT")
    async with trusting(openid.issuer) as caller:
        assert "`typ`" in await refused(caller, id_token)
        assert "`aud`" in await refused(caller, like_one)


async def test_a_token_for_another_service_is_refused(openid: OpenIdProvider) -> None:
    async with trusting(openid.issuer) as caller:
        token = openid.token(CLAIMS, audience="https://other.example")
        assert "for another audience" in await refused(caller, token)
        assert (await caller(openid.token(CLAIMS))).project_id == "demo"


@pytest.mark.parametrize(
    ("clock_seconds", "why"), [(-3600, "The token has expired"), (3600, "The token is not valid yet")]
)
async def test_a_token_is_for_its_time(openid: OpenIdProvider, clock_seconds: int, why: str) -> None:
    async with trusting(openid.issuer) as caller:
        openid.configure(clock_seconds=clock_seconds)
        assert await refused(caller, openid.token(CLAIMS)) == why
        openid.configure(clock_seconds=clock_seconds // 360)
        assert (await caller(openid.token(CLAIMS))).project_id == "demo"


async def test_a_token_of_another_provider_with_the_same_key_name_is_refused(
    openid: OpenIdProvider, provider_directory: Path
) -> None:
    with OpenIdProvider(provider_directory, AUDIENCE) as other:
        theirs = other.token(CLAIMS)
        as_ours = jwt.encode(
            parts(theirs)[1] | {"iss": openid.issuer}, other.keys[0].private, "RS256", {"kid": "first"}
        )
        async with trusting(openid.issuer) as caller:
            assert await refused(caller, theirs) == "The token's issuer is not trusted here"
            assert "signature" in await refused(caller, as_ours)


async def test_a_token_that_no_provider_signed_is_refused(openid: OpenIdProvider) -> None:
    header, claims = parts(openid.token(CLAIMS))
    public = openid.keys[0].private.public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    async with trusting(openid.issuer) as caller:
        for key in (pem, der, b""):
            sign = partial(hmac.digest, key, digest="sha256")
            assert "`alg`" in await refused(caller, forged(header | {"alg": "HS256"}, claims, sign))
        for algorithm in ("none", "None", "ES256K", "RS1", ["RS256"], None):
            assert await refused(caller, forged(header | {"alg": algorithm}, claims, lambda _: b""))
        own = SigningKey("first")
        theirs = RSAAlgorithm.to_jwk(own.private.public_key(), as_dict=True)
        for there in ({"jwk": theirs}, {"jku": "https://evil.example/jwks"}, {"x5u": "https://evil.example/x"}, {}):
            assert "signature" in await refused(caller, jwt.encode(claims, own.private, "RS256", header | there))
        good = openid.token(CLAIMS)
        assert "signature" in await refused(caller, good[:-6] + ("AAAAAA" if good[-6:] != "AAAAAA" else "BBBBBB"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"typ": "dpop+jwt"}, "`typ`"),
        ({"typ": None}, "`typ`"),
        ({"kid": None}, "`kid`"),
        ({"kid": "other"}, "a key that its issuer does not publish"),
        ({"alg": "ES256"}, "a key that its issuer does not publish"),
        ({"crit": ["exp-not"], "exp-not": 1}, "not valid"),
    ],
)
async def test_a_header_that_is_not_understood_is_refused(
    openid: OpenIdProvider, change: dict[str, Any], why: str
) -> None:
    header, claims = parts(openid.token(CLAIMS))
    key = openid.keys[0].private

    def sign(signed: bytes) -> bytes:
        return RSAAlgorithm(RSAAlgorithm.SHA256).sign(signed, key)

    async with trusting(openid.issuer) as caller:
        assert (await caller(forged(header, claims, sign))).project_id == "demo"
        changed = {name: value for name, value in (header | change).items() if value is not None}
        assert why in await refused(caller, forged(changed, claims, sign))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"exp": None}, "no claim `exp`"),
        ({"sub": None}, "no claim `sub`"),
        ({"aud": None}, "no claim `aud`"),
        ({"aud": [AUDIENCE + "/"]}, "another audience"),
        ({"sub": ""}, "not usable"),
        ({"sub": "\ud800"}, "not valid"),
        ({"exp": float("inf")}, "not valid"),
        ({"project": None}, "claim `project` is missing"),
        ({"project": ["demo"]}, "claim `project`"),
        ({"project": "../etc"}, "claim `project`"),
        ({"kind": "system"}, "claim `kind`"),
        ({"roles": {"agent": True}}, "claim `roles`"),
        ({"roles": ["agent", 1]}, "claim `roles`"),
        ({"roles": ["agent", ""]}, "claim `roles`"),
        ({"roles": ["finance\n"]}, "claim `roles`"),
        ({"roles": "agent a\x01"}, "claim `roles`"),
        ({"act": {}}, "not usable"),
        ({"act": "bot"}, "not usable"),
        ({"act": {"sub": "system", "iss": "muniment"}}, "another issuer"),
        ({"auth_time": "now"}, "not usable"),
        ({"auth_time": 2**53}, "not usable"),
        ({"auth_time": -1}, "not usable"),
        ({"nbf": 10**400}, "not valid"),
    ],
)
async def test_claims_that_cannot_be_meant_are_refused(
    openid: OpenIdProvider, change: dict[str, Any], why: str
) -> None:
    said = parts(openid.token(CLAIMS))[1] | change
    claims = {name: value for name, value in said.items() if value is not None}
    async with trusting(openid.issuer) as caller:
        assert why in await refused(caller, jwt.encode(claims, openid.keys[0].private, "RS256", {"kid": "first"}))


# Claims


KEYCLOAK = {
    "azp": "billing",
    "realm_access": {"roles": ["default-roles-acme", "agent"]},
    "muniment": {"kind": "service"},
}
ENTRA = {
    "azp": "11111111-2222-3333-4444-555555555555",
    "tid": "99999999-2222-3333-4444-555555555555",
    "roles": ["agent"],
}
AUTH0 = {
    "azp": "abc",
    "https://acme.example/project": "demo",
    "https://acme.example/roles": ["agent"],
    "https://acme.example/kind": "service",
}


@pytest.mark.parametrize(
    ("claims", "names", "expected"),
    [
        (KEYCLOAK | {"project": "demo"}, ("project", "realm_access.roles", "muniment.kind"), ("demo", "service")),
        (ENTRA, ("tid", "roles", "kind"), (ENTRA["tid"], "agent")),
        (AUTH0, tuple(f"https://acme.example/{name}" for name in ("project", "roles", "kind")), ("demo", "service")),
    ],
)
def test_claims_are_found_under_the_names_that_are_configured(
    claims: dict[str, Any], names: tuple[str, str, str], expected: tuple[str, str]
) -> None:
    claims = {"iss": "https://id.example", "sub": "s", "exp": 4_000_000_000} | claims
    environment = dict(zip(("OIDC_PROJECT_CLAIM", "OIDC_ROLES_CLAIM", "OIDC_KIND_CLAIM"), names, strict=True))
    known = caller_of(claims, configured("https://id.example", **environment))
    assert (known.project_id, known.actor.kind) == expected
    assert (known.actor.roles[-1], known.actor.client) == ("agent", claims["azp"])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("plain", 1),
        ("a.b", "exact"),
        ("a.c", 2),
        ("a.c.d", None),
        ("apps.my.app.roles", ["agent"]),
        ("https://x.example/roles", 3),
        ("missing", None),
        ("plain.x", None),
        ("", None),
        (".", None),
    ],
)
def test_a_claim_is_found_by_its_name_and_then_by_its_path(name: str, found: Any) -> None:
    claims = {
        "plain": 1,
        "a.b": "exact",
        "a": {"b": "by path", "c": 2},
        "apps": {"my": {"app": None}, "my.app": {"roles": ["agent"]}},
        "https://x.example/roles": 3,
    }
    assert find_claim(claims, name) == found


@pytest.mark.parametrize(
    ("said", "roles", "may_read"),
    [
        (["agent", "uma_authorization", "agent", "Auditor"], ("agent", "uma_authorization", "Auditor"), True),
        ("openid importer operator", ("openid", "importer", "operator"), True),
        (["finance", "four eyes"], ("finance", "four eyes"), False),
        ([], (), False),
        (None, (), False),
        ("", (), False),
    ],
)
def test_every_role_is_kept_since_a_quorum_may_name_any(said: Any, roles: tuple[str, ...], may_read: bool) -> None:
    claims = {"iss": "https://id.example", "sub": "s", "exp": 1, "project": "demo", "roles": said}
    known = caller_of(claims, configured("https://id.example"))
    assert (known.actor.roles, known.may_read) == (roles, may_read)


def test_so_many_may_act_one_for_the_other_and_no_more() -> None:
    claims: dict[str, Any] = {"iss": "https://id.example", "sub": "s", "exp": 1, "project": "demo"}
    act: dict[str, Any] = {"sub": "a-1"}
    for n in range(2, oidc.ACTORS_MAX + 1):
        act = {"sub": f"a-{n}", "act": act}
    settings = configured("https://id.example")
    actor = caller_of(claims | {"act": act}, settings).actor
    assert actor.sub == f"a-{oidc.ACTORS_MAX}"
    assert [one.sub for one in actor.on_behalf_of] == ["s", *(f"a-{n}" for n in range(1, oidc.ACTORS_MAX))]
    with pytest.raises(Unauthenticated):
        caller_of(claims | {"act": {"sub": "one more", "act": act}}, settings)


@pytest.mark.parametrize(("actors", "why"), [(11, "more than 10 actors"), (400, "more than 10"), (1000, "over 16384")])
async def test_a_chain_without_end_is_refused(openid: OpenIdProvider, actors: int, why: str) -> None:
    header, claims = parts(openid.token(CLAIMS))
    text = json.dumps(claims)[:-1] + ', "act": {"sub": "a"' * actors + "}" * (actors + 1)
    token = forged(header, text, lambda signed: RSAAlgorithm(RSAAlgorithm.SHA256).sign(signed, openid.keys[0].private))
    async with trusting(openid.issuer) as caller:
        assert why in await refused(caller, token)


async def test_a_huge_token_is_refused_before_it_is_read(openid: OpenIdProvider) -> None:
    token = openid.token(CLAIMS | {"groups": ["g" * 50] * 400})
    assert len(token) > TOKEN_BYTES_MAX
    async with trusting(openid.issuer) as caller:
        assert await refused(caller, token) == "The token is over 16384 bytes"


async def test_a_token_that_expired_is_taken_within_the_leeway_but_never_remembered(
    openid: OpenIdProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "LEEWAY_SECONDS", 3600)
    claims = parts(openid.token(CLAIMS))[1] | {"exp": int(time.time()) - 10}
    sent = f"Bearer {jwt.encode(claims, openid.keys[0].private, 'RS256', {'kid': 'first'})}".encode()
    async with provider(configured(openid.issuer)) as verifiers:
        tokens = Tokens(verifiers)
        assert (await tokens.caller(sent)).project_id == "demo"
        assert tokens.known(sent) is None
        monkeypatch.setattr(oidc, "LEEWAY_SECONDS", 0)
        with pytest.raises(Unauthenticated, match="has expired"):
            await tokens.caller(sent)


# The API


async def production(openid: OpenIdProvider, database: Database, home: Path) -> Settings:
    """A production server's settings, with the project `demo`."""
    settings = settings_of(
        database, home, MUNIMENT_MODE="production", OIDC_ISSUER_URL=openid.issuer, OIDC_AUDIENCE=AUDIENCE
    )
    async with open_pool(settings.database_url, 1) as pool:
        await Vault(settings.keys_dir, pool, create_keys=True).open("demo")
        async with pool.connection() as connection:
            await create_ledger(connection, "demo")
    return settings


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


RECORD = {"kind": "tool.called", "body": {"tool": "refund"}}


async def test_production_takes_the_providers_tokens_and_no_others(
    openid: OpenIdProvider, database: Database, tmp_path: Path, token: Token
) -> None:
    settings = await production(openid, database, tmp_path)
    act = {"sub": "refund-bot"}
    person = openid.sign_in("ann", CLAIMS | {"kind": "human", "act": act})["access_token"]
    async with running(create_app(settings), bearer(person)) as client:
        assert (await client.post("/records", json=RECORD)).status_code == 201
        development = await client.post("/records", json=RECORD, headers=token("agent"))
        assert problem_of(development)["code"] == "unauthenticated"
        elsewhere = await client.post("/records", json=RECORD, headers=bearer(openid.token({"project": "p2"})))
        assert problem_of(elsewhere)["code"] == "unknown_project"
        machine = await client.post("/records", json=RECORD, headers=bearer(openid.token({"project": "demo"})))
        assert problem_of(machine)["code"] == "forbidden"
    recorded, _ = check_ledger(database.owner)["demo"]
    actor = recorded.event.actor
    assert (actor.issuer, actor.sub, actor.kind) == (openid.issuer, "refund-bot", "agent")
    assert (actor.client, actor.on_behalf_of) == ("web", (Principal(openid.issuer, "ann"),))


async def test_a_server_starts_without_the_provider_and_recovers_by_itself(
    openid: OpenIdProvider, database: Database, tmp_path: Path
) -> None:
    settings = await production(openid, database, tmp_path)
    token = openid.token(CLAIMS)
    openid.stop()
    async with running(create_app(settings), bearer(token)) as client:
        for answer in (await client.get("/status"), await client.post("/records", json=RECORD)):
            assert problem_of(answer)["code"] == "store_unavailable"
        openid.start()
        async with asyncio.timeout(60):
            while (await client.get("/status")).status_code != 200:  # noqa: ASYNC110 - it is the server that we ask
                await asyncio.sleep(0.01)
        assert (await client.post("/records", json=RECORD)).status_code == 201


async def test_development_takes_both_kinds_of_token(
    openid: OpenIdProvider, database: Database, tmp_path: Path, token: Token
) -> None:
    settings = settings_of(database, tmp_path, OIDC_ISSUER_URL=openid.issuer, OIDC_AUDIENCE=AUDIENCE)
    async with running(create_app(settings), token("agent")) as client:
        assert (await client.post("/records", json=RECORD)).status_code == 201
        theirs = bearer(openid.token(CLAIMS, client_id="billing-bot"))
        assert (await client.post("/records", json=RECORD, headers=theirs)).status_code == 201
    assert [one.event.actor.sub for one in check_ledger(database.owner)["demo"]] == ["agent-7", "billing-bot"]
