"""The keys of an OpenID provider: found, replaced, withdrawn, kept while it is away, and whatever else is served."""

import asyncio
import gzip
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from api import oidc
from api.auth import Caller, Tokens
from api.oidc import Keys, Provider, signing_keys
from ledger.errors import StoreUnavailable, Unauthenticated
from tests.api.provider.provider import OpenIdProvider, SigningKey
from tests.api.provider.trust import AUDIENCE, CLAIMS, Believes, configured, forged, parts, refused, trusting

pytestmark = pytest.mark.usefixtures("prompt")


@asynccontextmanager
async def knowing(issuer: str) -> AsyncIterator[tuple[Keys, Believes]]:
    """As `trusting`, with the keys to be asked for by the test as well."""
    async with httpx.AsyncClient() as client, asyncio.timeout(120):  # whoever waits for ever has failed
        keys = Keys(issuer, client)
        verify = Provider(configured(issuer), keys).verify
        keeping = asyncio.create_task(keys.keep())

        async def caller(token: str) -> Caller:
            return await Tokens({issuer: verify}).caller(f"Bearer {token}".encode())

        try:
            yield keys, caller
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])


async def test_a_new_key_is_found_by_its_first_token_and_a_withdrawn_one_is_dropped(openid: OpenIdProvider) -> None:
    old = openid.token(CLAIMS)
    async with knowing(openid.issuer) as (keys, caller):
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


async def test_a_key_of_the_same_name_replaces_the_other(openid: OpenIdProvider) -> None:
    old = openid.token(CLAIMS)
    async with knowing(openid.issuer) as (keys, caller):
        assert (await caller(old)).project_id == "demo"
        openid.keys = [SigningKey("first")]
        new = openid.token(CLAIMS)
        await keys.ask()
        assert (await caller(new)).project_id == "demo"
        assert "signature" in await refused(caller, old)


@pytest.mark.parametrize("outage", ["stopped", "failing"])
async def test_old_keys_serve_while_the_provider_is_away_but_not_for_ever(
    openid: OpenIdProvider, monkeypatch: pytest.MonkeyPatch, outage: str
) -> None:
    token = openid.token(CLAIMS)
    openid.keys.insert(0, SigningKey("second"))
    newer = openid.token(CLAIMS)
    newest, openid.keys = openid.keys[0], openid.keys[1:]
    openid.configure()
    async with knowing(openid.issuer) as (keys, caller):
        assert (await caller(token)).project_id == "demo"
        openid.keys.insert(0, newest)
        openid.configure(keys_status=500)
        if outage == "stopped":
            openid.stop()
        await keys.ask()
        assert (await caller(token)).project_id == "demo"
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await caller(newer)  # nobody can say whether there is such a key
        with monkeypatch.context() as later:
            later.setattr(oidc, "KEYS_SECONDS_MAX", 0.0)
            with pytest.raises(StoreUnavailable, match="does not answer"):
                await caller(token)
        if outage == "stopped":
            openid.start()
        openid.configure(keys_status=None)
        await keys.ask()
        assert (await caller(newer)).project_id == "demo"


async def test_tokens_with_made_up_keys_do_not_become_requests(openid: OpenIdProvider) -> None:
    header, claims = parts(openid.token(CLAIMS))
    made_up = [forged(header | {"kid": f"k-{n}" * 1000}, claims, lambda _: b"x") for n in range(50)]
    async with knowing(openid.issuer) as (keys, caller):
        await keys.ask()
        before = openid.configure()
        await asyncio.gather(*(refused(caller, token) for token in made_up))
        assert openid.configure() == before + 1


async def test_the_provider_is_not_asked_again_at_once(openid: OpenIdProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oidc, "ASK_SECONDS_MIN", 0.5)
    async with knowing(openid.issuer) as (keys, _):
        began = time.monotonic()
        await keys.ask()
        await keys.ask()
        assert time.monotonic() - began >= 0.5


async def test_keys_are_fetched_again_before_they_grow_old(
    openid: OpenIdProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "REFRESH_SECONDS", 0.02)
    async with trusting(openid.issuer), asyncio.timeout(60):
        while openid.configure() < 3:  # noqa: ASYNC110 - the provider is another process
            await asyncio.sleep(0.01)


async def test_who_goes_away_does_not_end_the_wait_of_others(openid: OpenIdProvider) -> None:
    token = openid.token(CLAIMS)
    async with knowing(openid.issuer) as (_, caller):
        first, second = (asyncio.create_task(caller(token)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).project_id == "demo"
        assert first.cancelled()
        assert openid.configure() == 1


async def test_keys_of_an_issuer_of_another_name_are_not_taken(
    openid: OpenIdProvider, caplog: pytest.LogCaptureFixture
) -> None:
    issuer = openid.issuer.replace("127.0.0.1", "localhost")
    async with knowing(issuer) as (_, caller):
        with pytest.raises(StoreUnavailable):
            await caller(signed(issuer, openid.keys[0]))
    assert "is OIDC_ISSUER_URL spelt like that?" in caplog.text


def test_only_keys_that_may_sign_are_taken() -> None:
    rsa_key, weak = (rsa.generate_private_key(public_exponent=65537, key_size=size) for size in (2048, 1024))
    published = [
        RSAAlgorithm.to_jwk(rsa_key.public_key(), as_dict=True) | {"kid": "any-rsa"},
        RSAAlgorithm.to_jwk(rsa_key.public_key(), as_dict=True) | {"kid": "ps", "alg": "PS256", "use": "sig"},
        RSAAlgorithm.to_jwk(rsa_key.public_key(), as_dict=True) | {"kid": "encrypts", "use": "enc"},
        RSAAlgorithm.to_jwk(rsa_key.public_key(), as_dict=True) | {"kid": "mac", "alg": "HS256"},
        RSAAlgorithm.to_jwk(rsa_key.public_key(), as_dict=True),
        RSAAlgorithm.to_jwk(rsa_key, as_dict=True) | {"kid": "no secret"},
        RSAAlgorithm.to_jwk(weak.public_key(), as_dict=True) | {"kid": "weak"},
        ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP384R1()).public_key(), as_dict=True) | {"kid": "ec"},
        OKPAlgorithm.to_jwk(ed25519.Ed25519PrivateKey.generate().public_key(), as_dict=True) | {"kid": "ed"},
        OKPAlgorithm.to_jwk(ed25519.Ed25519PrivateKey.generate(), as_dict=True) | {"kid": "no secret either"},
        {"kty": "oct", "k": "c2VjcmV0", "kid": "secret", "alg": "HS256"},
        {"kty": "oct", "k": "c2VjcmV0", "kid": "secret", "alg": "RS256"},
        {"kty": "RSA", "kid": "broken", "n": "!", "e": "AQAB"},
        {"kty": "RSA", "kid": "endless", "n": "_" * 100_000, "e": "AQAB"},
        {"kty": "EC", "crv": "P-256", "kid": "no point", "x": "AA", "y": "AA"},
        {"kty": ["RSA"], "kid": "odd"},
    ]
    both = [f"{kind}{bits}" for kind in ("RS", "PS") for bits in (256, 384, 512)]
    expected = [("any-rsa", name) for name in both] + [("ps", "PS256"), ("ec", "ES384"), ("ed", "EdDSA")]
    assert list(signing_keys(published)) == expected


# An issuer that no certified provider is


Serve = Callable[[], Awaitable[bytes]]


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[str]:
    """The address of an issuer that answers with what `serve` returns where its keys should be."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):  # it wanted no more of it
            try:
                asked = await reader.readuntil(b"\r\n\r\n")
                about = msgspec.json.encode({"issuer": issuer, "jwks_uri": f"{issuer}/jwks"})
                writer.write(await serve() if asked.startswith(b"GET /jwks ") else document(about))
                await writer.drain()
            finally:
                writer.close()
                await writer.wait_closed()

    answering: list[asyncio.Task[None]] = []
    server = await asyncio.start_server(lambda *ends: answering.append(asyncio.create_task(answer(*ends))), "127.0.0.1")
    issuer = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        try:
            yield issuer
        finally:
            for one in answering:
                one.cancel()
            await asyncio.gather(*answering, return_exceptions=True)


def document(body: bytes, head: str = "HTTP/1.1 200 OK") -> bytes:
    return f"{head}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


def key_set(*keys: SigningKey) -> bytes:
    public = [RSAAlgorithm.to_jwk(key.private.public_key(), as_dict=True) | {"kid": key.kid} for key in keys]
    return document(msgspec.json.encode({"keys": public}))


def signed(issuer: str, key: SigningKey, **header: Any) -> str:
    claims = {"iss": issuer, "sub": "bot", "aud": AUDIENCE, "exp": 4_000_000_000} | CLAIMS
    return jwt.encode(claims, key.private, "RS256", {"kid": key.kid} | header)


async def test_a_new_key_is_not_refused_for_an_answer_that_is_older() -> None:
    first, second = SigningKey("first"), SigningKey("second")
    asked, arrives = asyncio.Event(), asyncio.Event()

    async def serve() -> bytes:
        published = key_set(first, second) if asked.is_set() else key_set(first)
        asked.set()
        await arrives.wait()
        return published

    async with serving(serve) as issuer, knowing(issuer) as (_, caller):
        await asked.wait()
        new, old = (asyncio.create_task(caller(signed(issuer, key))) for key in (second, first))
        await asyncio.sleep(0)
        arrives.set()
        assert (await old).project_id == (await new).project_id == "demo"


async def test_a_flood_of_made_up_keys_at_a_slow_issuer_holds_few_requests_and_none_with_a_known_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(oidc, "WAITING_MAX", 3)
    key, arrives = SigningKey("first"), asyncio.Event()
    arrives.set()

    async def serve() -> bytes:
        await arrives.wait()
        return key_set(key)

    async with serving(serve) as issuer, knowing(issuer) as (_, caller):
        assert (await caller(signed(issuer, key))).project_id == "demo"
        arrives.clear()
        held = [asyncio.create_task(caller(signed(issuer, key, kid=f"k-{n}"))) for n in range(3)]
        await asyncio.sleep(0)
        for n in range(20):
            with pytest.raises(StoreUnavailable, match="Many wait"):
                await caller(signed(issuer, key, kid=f"l-{n}"))
        assert (await caller(signed(issuer, key))).project_id == "demo"
        assert not any(one.done() for one in held)
        arrives.set()
        answers = await asyncio.gather(*held, return_exceptions=True)
        assert [type(one) for one in answers] == [Unauthenticated] * 3
        assert "does not publish" in await refused(caller, signed(issuer, key, kid="l-0"))


@pytest.mark.parametrize(
    ("served", "why"),
    [
        (document(b" " * 10_000_000 + b'{"keys": []}'), "is over 1048576 bytes"),
        (document(gzip.compress(b" " * 10_000_000), "HTTP/1.1 200 OK\r\nContent-Encoding: gzip"), "DecodeError"),
        (document(b'{"keys": [[]]}'), "ValidationError"),
        (document(b'{"keys": [{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}]}"), "RecursionError"),
        (document(b'{"keys": {}}'), "ValidationError"),
        (document(b"", "HTTP/1.1 302 Found\r\nLocation: https://elsewhere.example/jwks"), "302"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "RemoteProtocolError"),
        (b"SSH-2.0-OpenSSH_9\r\n", "RemoteProtocolError"),
        (b"", "RemoteProtocolError"),
    ],
)
async def test_what_is_no_key_set_changes_nothing_and_the_next_one_is_taken(
    caplog: pytest.LogCaptureFixture, served: bytes, why: str
) -> None:
    first, second = SigningKey("first"), SigningKey("second")
    now = key_set(first)

    async def serve() -> bytes:
        return now

    async with serving(serve) as issuer, knowing(issuer) as (keys, caller):
        assert (await caller(signed(issuer, first))).project_id == "demo"
        now = served
        await keys.ask()
        assert why in caplog.text
        assert (await caller(signed(issuer, first))).project_id == "demo"
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await caller(signed(issuer, second))
        now = key_set(second)
        await keys.ask()
        assert (await caller(signed(issuer, second))).project_id == "demo"


async def test_an_issuer_that_never_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(oidc, "ANSWER_SECONDS_MAX", 0.05)

    async def serve() -> bytes:
        return await asyncio.Future[bytes]()

    async with serving(serve) as issuer, knowing(issuer) as (_, caller):
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await caller(signed(issuer, SigningKey("first")))
    assert "TimeoutError" in caplog.text
