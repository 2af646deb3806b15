"""A credential becomes a Caller: the project it is for, and the actor that events will name.

Every token names its issuer, and each issuer has one verifier: the OpenID provider's is in `api/oidc.py`. In
development this machine is one as well, and its key file signs tokens; production never reads that file, so a
development token is worth nothing there.
What a caller may do is not decided here, and no token is ever stored or logged.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

import jwt
import msgspec
from msgspec import Meta, Struct

from ledger.commands import ProjectId
from ledger.errors import Forbidden, Unauthenticated
from ledger.project_key import create_key_file, read_key_file
from ledger.values import Actor, Line

DEVELOPMENT_ISSUER = "muniment-development"
LIFETIME_SECONDS = 30 * 24 * 3600
VERIFIED_SECONDS_MAX = 60.0
VERIFIED_TOKENS_MAX = 10_000
TOKEN_BYTES_MAX = 16 * 1024
READERS = frozenset({"agent", "approver", "auditor", "operator"})
"""The roles that may read what is recorded in their project."""

Kind = Literal["human", "agent", "service"]


class Caller(Struct, frozen=True):
    """Who calls, and the one project whose things exist for them."""

    project_id: str
    actor: Actor
    may_read: bool
    """Whether one of the roles is a reader's; asked for every answer, so it is found once a token."""

    def require(self, *needed: str, action: str) -> None:
        """Raises Forbidden unless the caller has one of these roles."""
        if not any(role in needed for role in self.actor.roles):
            raise self._forbidden(needed, action)

    def require_reader(self, action: str) -> None:
        """Raises Forbidden unless the caller may read what is recorded in the project."""
        if not self.may_read:
            raise self._forbidden(sorted(READERS), action)

    def _forbidden(self, needed: Sequence[str], action: str) -> Forbidden:
        return Forbidden(action=action, needed=list(needed), roles=list(self.actor.roles))


class _Claims(Struct):
    """What a development token says (RFC 7519), as far as it is used."""

    sub: Line
    project: ProjectId
    exp: float
    kind: Kind = "agent"
    roles: Annotated[list[Line], Meta(max_length=20)] = []

    def __post_init__(self) -> None:
        # Python's JSON reads half a character (a lone surrogate), which no event and no answer could hold.
        "".join([self.sub, *self.roles]).encode()


_NOBODY: tuple[Caller | None, float] = (None, 0.0)

Verify = Callable[[str], Awaitable[tuple[Caller, float]]]
"""From a token to its caller and its expiry (seconds since the epoch). Raises jwt.PyJWTError, ValueError,
msgspec.ValidationError, Unauthenticated, and StoreUnavailable where it cannot be known now."""

_WHY: dict[type[Exception], str] = {
    jwt.ExpiredSignatureError: "The token has expired",
    jwt.ImmatureSignatureError: "The token is not valid yet",
    jwt.InvalidAudienceError: "The token is for another audience: its `aud` does not name this service",
    jwt.InvalidSignatureError: "The token's signature is not that of its issuer's key",
}


class Tokens:
    """Verifies bearer tokens (RFC 6750), and remembers for up to a minute that it did."""

    def __init__(self, verifiers: dict[str, Verify]) -> None:
        self._verifiers = verifiers
        self._verified: dict[bytes, tuple[Caller, float]] = {}

    def known(self, authorization: bytes) -> Caller | None:
        """The caller behind an Authorization header that was verified within the minute."""
        caller, until = self._verified.get(sha256(authorization).digest(), _NOBODY)
        return caller if time.time() < until else None

    async def caller(self, authorization: bytes) -> Caller:
        """The caller behind an Authorization header. Raises Unauthenticated, and StoreUnavailable where an
        issuer's keys are not to be had."""
        if not authorization:
            raise Unauthenticated(why="This needs a token, and the request has none")
        if (caller := self.known(authorization)) is not None:
            return caller
        scheme, _, token = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            raise Unauthenticated(why="The Authorization header is not `Bearer <token>`")
        if len(token) > TOKEN_BYTES_MAX:
            raise Unauthenticated(why=f"The token is over {TOKEN_BYTES_MAX} bytes")
        caller, expires_at = await self._verify(token.strip())
        if len(self._verified) >= VERIFIED_TOKENS_MAX:
            del self._verified[next(iter(self._verified))]
        digest = sha256(authorization).digest()
        self._verified.pop(digest, None)
        self._verified[digest] = caller, min(expires_at, time.time() + VERIFIED_SECONDS_MAX)
        return caller

    async def _verify(self, token: bytes) -> tuple[Caller, float]:
        try:
            text = token.decode("ascii")
            # Only to choose who verifies; nothing is believed before that.
            issuer = jwt.decode(text, options={"verify_signature": False}).get("iss")
            verify = self._verifiers.get(issuer) if isinstance(issuer, str) else None
            if verify is None:
                raise Unauthenticated(why="The token's issuer is not trusted here")
            return await verify(text)
        except msgspec.ValidationError as error:
            raise Unauthenticated(why=f"The token's claims are not usable: {error}") from None
        except jwt.MissingRequiredClaimError as error:
            raise Unauthenticated(why=f"The token has no claim `{error.claim}`") from None
        except (jwt.PyJWTError, ValueError, OverflowError, RecursionError) as error:
            raise Unauthenticated(why=_WHY.get(type(error), "The token is not valid")) from None


def key_path(keys_dir: Path) -> Path:
    """The file with the key of development tokens: a name that no project's key can have."""
    return keys_dir / "development.secret"


def development_verifier(keys_dir: Path) -> Verify:
    """Accepts what `development_token` made with the key file of the same directory."""

    async def verify(token: str) -> tuple[Caller, float]:
        signing_key = read_key_file(key_path(keys_dir))
        if signing_key is None:
            raise jwt.InvalidKeyError("no token was ever made here")
        claims = jwt.decode(
            token,
            signing_key,
            algorithms=["HS256"],
            issuer=DEVELOPMENT_ISSUER,
            options={"require": ["exp", "iss", "sub"]},
        )
        known = msgspec.convert(claims, _Claims)
        actor = Actor(
            issuer=DEVELOPMENT_ISSUER,
            sub=known.sub,
            kind=known.kind,
            roles=tuple(known.roles),
            assurance="authenticated",
        )
        return Caller(known.project, actor, not READERS.isdisjoint(known.roles)), known.exp

    return verify


def development_token(
    keys_dir: Path,
    *,
    project: str,
    subject: str,
    kind: Kind = "agent",
    roles: tuple[str, ...] | list[str] = ("agent",),
    lifetime_seconds: int = LIFETIME_SECONDS,
) -> str:
    """A token that a server in development mode with the same keys directory accepts.

    Makes the key at first use (0600; of two processes the first decides). Raises UnusableKey, and
    msgspec.ValidationError for a claim that the server would not accept.
    """
    expires_at = int(time.time()) + lifetime_seconds
    claims = {"sub": subject, "project": project, "kind": kind, "roles": list(roles), "exp": expires_at}
    msgspec.convert(claims, _Claims)
    path = key_path(keys_dir)
    signing_key = read_key_file(path) or create_key_file(path)
    return jwt.encode({"iss": DEVELOPMENT_ISSUER} | claims, signing_key, algorithm="HS256")
