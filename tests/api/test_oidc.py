"""Access tokens of a real OpenID provider: which are believed, whose they are, and what happens without it."""

import asyncio
import base64
import hmac
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from api import oidc
from api.app import create_app
from api.auth import Caller, Tokens
from api.oidc import Keys, Provider, caller_of, find_claim, provider, signing_keys
from ledger.errors import StoreUnavailable, Unauthenticated
from ledger.events import Principal
from ledger.postgres import open_pool
from ledger.settings import Settings
from ledger.store import create_ledger
from ledger.vault import Vault
from tests.api.conftest import Token, problem_of, running, settings_of
from tests.api.provider.provider import OpenIdProvider, SigningKey, installed
from tests.check import check_ledger
from tests.conftest import Database

AUDIENCE = "https://ledger.example"
CLAIMS = {"project": "demo", "roles": ["agent", "offline_access", "auditor"]}


@pytest.fixture(scope="session")
def provider_directory(request: pytest.FixtureRequest) -> Path:
    return installed(request.config.cache.mkdir("openid-provider"))


@pytest.fixture
def openid(provider_directory: Path) -> Iterator[OpenIdProvider]:
    """A provider of this test's own."""
    with OpenIdProvider(provider_directory, AUDIENCE) as openid:
        yield openid


def configured(issuer: str, **environment: str) -> Settings:
    known = {"DATABASE_URL": "postgresql://nowhere", "OIDC_ISSUER_URL": issuer, "OIDC_AUDIENCE": AUDIENCE}
    return Settings.from_environment(known | environment)


@asynccontextmanager
async def trusting(openid: OpenIdProvider, **environment: str) -> AsyncIterator[Callable[[str], Any]]:
    """Takes a token, and answers who calls, as the API of a server in production does."""
    async with provider(configured(openid.issuer, **environment)) as verifiers:

        async def caller(token: str) -> Caller:
            # Nothing is remembered from one token to the next.
            return await Tokens(verifiers).caller(f"Bearer {token}".encode())

        yield caller


async def refused(caller: Callable[[str], Any], token: str) -> str:
    with pytest.raises(Unauthenticated) as raised:
        await caller(token)
    assert token not in raised.value.detail
    return raised.value.detail.partition(". ")[0]


def forged(header: dict[str, Any], claims: dict[str, Any], sign: Callable[[bytes], bytes]) -> str:
    """A token as no library would make it."""
    signed = b".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, claims))
    return (signed + b"." + base64.urlsafe_b64encode(sign(signed)).rstrip(b"=")).decode()


def parts(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return jwt.get_unverified_header(token), jwt.decode(token, options={"verify_signature": False})


# Who is believed


async def test_a_machines_token_says_who_calls_and_for_which_project(openid: OpenIdProvider) -> None:
    async with trusting(openid) as caller:
        known = await caller(openid.token(CLAIMS, client_id="billing-bot"))
    assert (known.project_id, known.actor.issuer, known.actor.sub) == ("demo", openid.issuer, "billing-bot")
    assert (known.actor.kind, known.actor.assurance, known.actor.client) == ("agent", "authenticated", "billing-bot")
    assert (known.actor.roles, known.may_read) == (("agent", "auditor"), True)


async def test_a_persons_token_says_how_they_signed_in(openid: OpenIdProvider) -> None:
    how = {"kind": "human", "auth_time": 1_790_000_000, "acr": "2", "amr": ["pwd", "otp"]}
    tokens = openid.sign_in("ann", CLAIMS | how)
    async with trusting(openid) as caller:
        actor = (await caller(tokens["access_token"])).actor
    assert (actor.sub, actor.kind, actor.client) == ("ann", "human", "web")
    assert (actor.auth_time, actor.acr, actor.amr) == (1_790_000_000, "2", ("pwd", "otp"))


@pytest.mark.parametrize("typ", ["at+jwt", "JWT", "application/at+jwt"])
async def test_an_access_token_is_believed_by_either_name(openid: OpenIdProvider, typ: str) -> None:
    token = openid.token(CLAIMS, typ=typ)
    assert parts(token)[0]["typ"] == typ
    async with trusting(openid) as caller:
        assert (await caller(token)).actor.sub == "bot"


async def test_one_who_acts_for_a_person_is_the_actor_and_no_human(openid: OpenIdProvider) -> None:
    act = {"sub": "outer-agent", "act": {"sub": "middle-agent", "iss": openid.issuer, "act": {"sub": "first-agent"}}}
    tokens = openid.sign_in("ann", CLAIMS | {"kind": "human", "acr": "2", "act": act})
    async with trusting(openid) as caller:
        actor = (await caller(tokens["access_token"])).actor
    assert (actor.sub, actor.kind, actor.acr) == ("outer-agent", "agent", None)
    assert actor.on_behalf_of == tuple(Principal(openid.issuer, sub) for sub in ("ann", "first-agent", "middle-agent"))


# Who is not


async def test_an_id_token_is_no_access_token(openid: OpenIdProvider) -> None:
    id_token = openid.sign_in("ann", CLAIMS)["id_token"]
    like_one = openid.token(CLAIMS, client_id="web", audience="https://web.example", typ="JWT")
    async with trusting(openid) as caller:
        assert "`typ`" in await refused(caller, id_token)
        assert "`aud`" in await refused(caller, like_one)


async def test_a_token_for_another_service_is_refused(openid: OpenIdProvider) -> None:
    async with trusting(openid) as caller:
        token = openid.token(CLAIMS, audience="https://other.example")
        assert "for another audience" in await refused(caller, token)
        assert (await caller(openid.token(CLAIMS))).project_id == "demo"


@pytest.mark.parametrize(
    ("clock_seconds", "why"), [(-3600, "The token has expired"), (3600, "The token is not valid yet")]
)
async def test_a_token_is_for_its_time(openid: OpenIdProvider, clock_seconds: int, why: str) -> None:
    async with trusting(openid) as caller:
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
        async with trusting(openid) as caller:
            assert await refused(caller, theirs) == "The token's issuer is not trusted here"
            assert "signature" in await refused(caller, as_ours)


async def test_a_token_that_no_provider_signed_is_refused(openid: OpenIdProvider) -> None:
    header, claims = parts(openid.token(CLAIMS))
    public = openid.keys[0].private.public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    async with trusting(openid) as caller:
        for key in (pem, der, b""):
            sign = partial(hmac.digest, key, digest="sha256")
            assert "`alg`" in await refused(caller, forged(header | {"alg": "HS256"}, claims, sign))
        for algorithm in ("none", "None", "ES256K", "RS1", ["RS256"], None):
            assert await refused(caller, forged(header | {"alg": algorithm}, claims, lambda _: b""))
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

    async with trusting(openid) as caller:
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
        ({"act": {}}, "not usable"),
        ({"act": "bot"}, "not usable"),
        ({"act": {"sub": "system", "iss": "muniment"}}, "another issuer"),
        ({"auth_time": "now"}, "not usable"),
    ],
)
async def test_claims_that_cannot_be_meant_are_refused(
    openid: OpenIdProvider, change: dict[str, Any], why: str
) -> None:
    said = parts(openid.token(CLAIMS))[1] | change
    claims = {name: value for name, value in said.items() if value is not None}
    async with trusting(openid) as caller:
        assert why in await refused(caller, jwt.encode(claims, openid.keys[0].private, "RS256", {"kid": "first"}))


# Keys


@asynccontextmanager
async def knowing(openid: OpenIdProvider) -> AsyncIterator[tuple[Keys, Callable[[str], Any]]]:
    """As `trusting`, but the keys are asked for only when a token needs them, or by the test."""
    settings = configured(openid.issuer)
    async with httpx.AsyncClient() as client:
        keys = Keys(openid.issuer, client)
        verify = Provider(settings, keys).verify

        async def caller(token: str) -> Caller:
            return await Tokens({openid.issuer: verify}).caller(f"Bearer {token}".encode())

        yield keys, caller
        await keys.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider may be asked again at once."""
    monkeypatch.setattr(oidc, "ASK_SECONDS_MIN", 0.01)


@pytest.mark.usefixtures("impatient")
async def test_a_new_key_is_found_by_its_first_token_and_a_withdrawn_one_is_dropped(openid: OpenIdProvider) -> None:
    old = openid.token(CLAIMS)
    async with knowing(openid) as (keys, caller):
        assert (await caller(old)).project_id == "demo"
        openid.keys.insert(0, SigningKey("second"))
        new = openid.token(CLAIMS)
        assert parts(new)[0]["kid"] == "second"
        assert (await caller(new)).project_id == "demo"
        assert (await caller(old)).project_id == "demo"  # it is still published
        openid.keys.pop()
        asked = openid.configure()
        assert (await caller(old)).project_id == "demo"  # nobody had a reason to ask
        assert openid.configure() == asked
        await keys.ask()
        assert "does not publish" in await refused(caller, old)
        assert (await caller(new)).project_id == "demo"


@pytest.mark.usefixtures("impatient")
async def test_a_key_of_the_same_name_replaces_the_other(openid: OpenIdProvider) -> None:
    old = openid.token(CLAIMS)
    async with knowing(openid) as (keys, caller):
        assert (await caller(old)).project_id == "demo"
        openid.keys = [SigningKey("first")]
        new = openid.token(CLAIMS)
        await keys.ask()
        assert (await caller(new)).project_id == "demo"
        assert "signature" in await refused(caller, old)


@pytest.mark.parametrize("outage", ["stopped", "failing"])
@pytest.mark.usefixtures("impatient")
async def test_old_keys_serve_while_the_provider_is_away_but_not_for_ever(
    openid: OpenIdProvider, monkeypatch: pytest.MonkeyPatch, outage: str
) -> None:
    token = openid.token(CLAIMS)
    openid.keys.insert(0, SigningKey("second"))
    newer = openid.token(CLAIMS)
    newest, openid.keys = openid.keys[0], openid.keys[1:]
    openid.configure()
    async with knowing(openid) as (keys, caller):
        assert (await caller(token)).project_id == "demo"
        openid.keys.insert(0, newest)
        openid.configure(keys_status=500)
        if outage == "stopped":
            openid.stop()
        await keys.ask()
        assert (await caller(token)).project_id == "demo"
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await caller(newer)  # nobody can say whether there is such a key
        monkeypatch.setattr(oidc, "KEYS_SECONDS_MAX", 0.0)
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await caller(token)
        monkeypatch.undo()
        if outage == "stopped":
            openid.start()
        openid.configure(keys_status=None)
        monkeypatch.setattr(oidc, "ASK_SECONDS_MIN", 0.0)
        assert (await caller(newer)).project_id == "demo"


async def test_tokens_with_made_up_keys_do_not_become_requests(openid: OpenIdProvider) -> None:
    header, claims = parts(openid.token(CLAIMS))
    made_up = [forged(header | {"kid": f"k-{n}"}, claims, lambda _: b"x") for n in range(50)]
    async with knowing(openid) as (_, caller):
        before = openid.configure()
        await asyncio.gather(*(refused(caller, token) for token in made_up[:25]))
        for token in made_up[25:]:
            await refused(caller, token)
        assert openid.configure() == before + 1


@pytest.mark.usefixtures("impatient")
async def test_keys_are_fetched_again_before_they_grow_old(
    openid: OpenIdProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "REFRESH_SECONDS", 0.02)
    async with trusting(openid):
        while openid.configure() < 3:  # noqa: ASYNC110 - the provider is another process
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("impatient")
async def test_who_goes_away_does_not_end_the_wait_of_others(openid: OpenIdProvider) -> None:
    token = openid.token(CLAIMS)
    async with knowing(openid) as (_, caller):
        first, second = (asyncio.create_task(caller(token)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).project_id == "demo"
        assert openid.configure() == 1


@pytest.mark.usefixtures("impatient")
async def test_keys_of_an_issuer_of_another_name_are_not_taken(
    openid: OpenIdProvider, caplog: pytest.LogCaptureFixture
) -> None:
    token = openid.token(CLAIMS)
    openid.issuer = openid.issuer.replace("127.0.0.1", "localhost")
    token = jwt.encode(parts(token)[1] | {"iss": openid.issuer}, openid.keys[0].private, "RS256", {"kid": "first"})
    async with knowing(openid) as (_, caller):
        with pytest.raises(StoreUnavailable):
            await caller(token)
    assert "is OIDC_ISSUER_URL spelt like that?" in caplog.text


def test_only_keys_that_may_sign_are_taken() -> None:
    rsa_key, weak = (rsa.generate_private_key(public_exponent=65537, key_size=size) for size in (2048, 1024))
    published = [
        RSAAlgorithm.to_jwk(rsa_key.public_key(), as_dict=True) | {"kid": "any-rsa"},
        RSAAlgorithm.to_jwk(rsa_key.public_key(), as_dict=True) | {"kid": "ps", "alg": "PS256", "use": "sig"},
        RSAAlgorithm.to_jwk(rsa_key.public_key(), as_dict=True) | {"kid": "encrypts", "use": "enc"},
        RSAAlgorithm.to_jwk(rsa_key.public_key(), as_dict=True) | {"kid": "mac", "alg": "HS256"},
        RSAAlgorithm.to_jwk(rsa_key.public_key(), as_dict=True),
        RSAAlgorithm.to_jwk(weak.public_key(), as_dict=True) | {"kid": "weak"},
        ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP384R1()).public_key(), as_dict=True) | {"kid": "ec"},
        OKPAlgorithm.to_jwk(ed25519.Ed25519PrivateKey.generate().public_key(), as_dict=True) | {"kid": "ed"},
        {"kty": "oct", "k": "c2VjcmV0", "kid": "secret", "alg": "HS256"},
        {"kty": "oct", "k": "c2VjcmV0", "kid": "secret", "alg": "RS256"},
        {"kty": "RSA", "kid": "broken", "n": "!", "e": "AQAB"},
        {"kty": "EC", "crv": "P-256", "kid": "no point", "x": "AA", "y": "AA"},
        {"kty": ["RSA"], "kid": "odd"},
    ]
    both = [f"{kind}{bits}" for kind in ("RS", "PS") for bits in (256, 384, 512)]
    expected = [("any-rsa", name) for name in both] + [("ps", "PS256"), ("ec", "ES384"), ("ed", "EdDSA")]
    assert list(signing_keys(published)) == expected


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
    assert (known.actor.roles, known.actor.client) == (("agent",), claims["azp"])


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
    ("said", "roles"),
    [
        (["agent", "uma_authorization", "agent", "Auditor"], ("agent",)),
        ("openid importer operator", ("importer", "operator")),
        ([], ()),
        (None, ()),
        ("", ()),
    ],
)
def test_roles_are_those_that_are_known_here(said: Any, roles: tuple[str, ...]) -> None:
    claims = {"iss": "https://id.example", "sub": "s", "exp": 1, "project": "demo", "roles": said}
    assert caller_of(claims, configured("https://id.example")).actor.roles == roles


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


@pytest.mark.usefixtures("impatient")
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
        while openid.configure() < 1:  # noqa: ASYNC110 - asked without any request of ours
            await asyncio.sleep(0.01)
        assert (await client.get("/status")).status_code == 200
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
