"""Use tokens: they show a gateway, which need not ask here, that an execution of what was approved has begun.

The key is the deployment's, one Ed25519 key in the keys directory that every node needs. A token is a pure function of
the approval that it tells of, so a replay gives the same one; it is stored nowhere. A gateway checks it with PyJWT:

    keys = jwt.PyJWKClient("https://muniment.example/.well-known/jwks.json")
    shown = jwt.decode_complete(
        token,
        keys.get_signing_key_from_jwt(token),
        algorithms=["EdDSA"],
        audience="payments",  # what it calls itself, as said when the use was begun
        issuer="muniment.example",
        options={"require": ["iss", "aud", "iat", "exp", "jti", "project", "approval_id", "action_digest"]},
    )
    assert shown["header"]["typ"] == "muniment-use+jwt"
    assert shown["payload"]["project"] == "finance"

and then runs the action once for each `jti` (it is the execution's id), if that is the action which was approved:
SHA-256 over the approval's action salt and the RFC 8785 form of the action is `action_digest`.
"""

import asyncio
from base64 import urlsafe_b64encode
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Struct

from ledger import store
from ledger.approval import Approval
from ledger.postgres import Pool, store_errors
from ledger.project_key import UnusableKey, create_key_file, read_key_file
from ledger.values import moment

TYPE = "muniment-use+jwt"
LIFETIME_SECONDS = 60


class Key(Struct, frozen=True, kw_only=True):
    """A public Ed25519 key (RFC 8037 s2); `kid` is its thumbprint (RFC 7638)."""

    kty: str = "OKP"
    crv: str = "Ed25519"
    x: str
    kid: str
    use: str = "sig"
    alg: str = "EdDSA"


class KeySet(Struct, frozen=True):
    """A JWK Set (RFC 7517 s5)."""

    keys: list[Key]


class _Known(NamedTuple):
    key: Ed25519PrivateKey
    public: Key
    issuer: str


class Signer:
    """Signs use tokens. Every method may raise UnusableKey and StoreUnavailable, until one of them did not.

    `create_key`: may make the key file, if there is none.
    """

    def __init__(self, keys_dir: Path, pool: Pool, *, create_key: bool) -> None:
        self._path = keys_dir / "use-tokens.secret"  # a name that no project's key can have
        self._pool = pool
        self._create_key = create_key
        self._opened: _Known | None = None

    async def open(self) -> None:
        """Have the key at hand. To be done before a use begins: what could not be shown must not begin."""
        await self._known()

    async def keys(self) -> KeySet:
        """What tokens are checked with."""
        return KeySet([(await self._known()).public])

    async def token(self, project_id: str, approval: Approval) -> str:
        """The token of the last execution that was begun: good for a minute, and not beyond what the execution has."""
        known, execution = await self._known(), approval.executions[-1]
        begun_at = moment(execution.begun_at)
        ends_at = min(begun_at + timedelta(seconds=LIFETIME_SECONDS), moment(execution.outcome_by))
        claims = {
            "iss": known.issuer,
            "jti": str(execution.execution_id),
            "iat": int(begun_at.timestamp()),
            "exp": int(ends_at.timestamp()),
            "project": project_id,
            "approval_id": str(approval.approval_id),
            "action_digest": approval.action_digest,
        }
        if execution.audience is not None:  # without one it is for nobody who asks that it be for them
            claims["aud"] = execution.audience
        return jwt.encode(claims, known.key, algorithm="EdDSA", headers={"typ": TYPE, "kid": known.public.kid})

    async def _known(self) -> _Known:
        if self._opened is None:
            secret = await asyncio.to_thread(self._secret)
            with store_errors():
                async with self._pool.connection() as connection:
                    issuer = await store.deployment(connection)
            key = Ed25519PrivateKey.from_private_bytes(secret)
            self._opened = _Known(key, _public(key), issuer)
        return self._opened

    def _secret(self) -> bytes:
        secret = read_key_file(self._path)
        if secret is not None:
            return secret
        if not self._create_key:
            raise UnusableKey(
                f"The key file {self._path}, which signs use tokens, is missing. `muniment project create` makes it; "
                "or put there the one that other nodes have: gateways trust no other."
            )
        return create_key_file(self._path)


def _public(key: Ed25519PrivateKey) -> Key:
    x = _base64url(key.public_key().public_bytes_raw())
    # RFC 7638 s3.2, RFC 8037 s2: the required members in this order, without white space.
    thumbprint = sha256(msgspec.json.encode({"crv": "Ed25519", "kty": "OKP", "x": x})).digest()
    return Key(x=x, kid=_base64url(thumbprint))


def _base64url(content: bytes) -> str:
    return urlsafe_b64encode(content).rstrip(b"=").decode()
