"""Whom a server believes that trusts an issuer, and tokens that no library would make."""

import base64
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import jwt
import pytest

from api.auth import Caller, Tokens
from api.oidc import provider
from ledger.errors import Unauthenticated
from ledger.settings import Settings

AUDIENCE = "https://ledger.example"
CLAIMS = {"project": "demo", "roles": ["agent", "offline_access", "auditor"]}

Believes = Callable[[str], Coroutine[Any, Any, Caller]]
"""Takes a token, and answers who calls, as the API of a server in production does."""


def configured(issuer: str, **environment: str) -> Settings:
    known = {"DATABASE_URL": "postgresql://nowhere", "OIDC_ISSUER_URL": issuer, "OIDC_AUDIENCE": AUDIENCE}
    return Settings.from_environment(known | environment)


@asynccontextmanager
async def trusting(issuer: str, **environment: str) -> AsyncIterator[Believes]:
    async with provider(configured(issuer, **environment)) as verifiers:

        async def caller(token: str) -> Caller:
            # Nothing is remembered from one token to the next.
            return await Tokens(verifiers).caller(f"Bearer {token}".encode())

        yield caller


async def refused(caller: Believes, token: str) -> str:
    """Why."""
    with pytest.raises(Unauthenticated) as raised:
        await caller(token)
    assert token not in raised.value.detail
    return raised.value.detail.partition(". ")[0]


def forged(header: dict[str, Any], claims: dict[str, Any] | str, sign: Callable[[bytes], bytes]) -> str:
    """A token with any header and any claims at all."""
    said = claims if isinstance(claims, str) else json.dumps(claims)
    signed = b".".join(base64.urlsafe_b64encode(part.encode()).rstrip(b"=") for part in (json.dumps(header), said))
    return (signed + b"." + base64.urlsafe_b64encode(sign(signed)).rstrip(b"=")).decode()


def parts(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return jwt.get_unverified_header(token), jwt.decode(token, options={"verify_signature": False})
