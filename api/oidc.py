"""Access tokens of an OpenID provider: its keys, what a token must say, and which Actor that makes.

A token is believed if a key that the provider published within the hour signed it with one of ALGORITHMS, as an
access token (RFC 9068), from this issuer, for our audience, for now. Keys are fetched aside from requests, and
old ones serve while the provider is away, until they are too old. What claims are called is configuration; no
token and no key is written anywhere.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from msgspec import Struct

from api.auth import READERS, Caller, Kind, Verify
from ledger.commands import ProjectId
from ledger.errors import StoreUnavailable, Unauthenticated
from ledger.settings import Settings
from ledger.values import Actor, Count, Line, Principal

log = logging.getLogger(__name__)

ALGORITHMS = {
    ("RSA", None): ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): ("EdDSA",),
}
"""What a key of each type and curve may sign with (RFC 7518 s3.1, RFC 8037). Never a MAC: its key would be the
public one, which anybody has."""

TYPES = frozenset({"at+jwt", "application/at+jwt", "jwt"})
"""What a token may be by its header: RFC 9068 s2.1, and what providers said before it."""

LEEWAY_SECONDS = 30
"""How far the provider's clock may be from ours."""
RSA_BITS_MIN, RSA_BITS_MAX = 2048, 8192
"""Below, a signature can be forged; above, it takes a request's time to verify one."""
ACTORS_MAX = 10

REFRESH_SECONDS = 300.0
"""How often the keys are fetched: a key that was withdrawn is trusted for no longer than that (and a minute,
for which a verified token is remembered)."""
KEYS_SECONDS_MAX = 3600.0
"""How long keys serve when the provider does not answer."""
ASK_SECONDS_MIN = 5.0
"""The provider is asked no more often than this, however many tokens name keys that it does not have."""
WAITING_MAX = 100
"""How many such tokens wait for its answer; a flood of them holds no more requests than that."""
ANSWER_SECONDS_MAX = 5.0
DOCUMENT_BYTES_MAX = 1024 * 1024


@asynccontextmanager
async def provider(settings: Settings) -> AsyncGenerator[dict[str, Verify]]:
    """The verifier of the issuer that is configured, with its keys kept fresh; nothing where none is.

    Returns without waiting for the provider: until it answers, its tokens meet StoreUnavailable.
    """
    if settings.oidc_issuer_url is None:
        yield {}
        return
    async with httpx.AsyncClient() as client:
        keys = Keys(settings.oidc_issuer_url, client)
        keeping = asyncio.create_task(keys.keep())
        try:
            yield {settings.oidc_issuer_url: Provider(settings, keys).verify}
        finally:
            keeping.cancel()
            with suppress(asyncio.CancelledError):
                await keeping


# Keys


class _Metadata(Struct):
    """OpenID Connect Discovery 1.0 s3, as far as it is used."""

    issuer: str
    jwks_uri: str


class _KeySet(Struct):
    """RFC 7517 s5."""

    keys: list[dict[str, Any]]


class _Key(Struct):
    """RFC 7517 s4, as far as it says what a key is for."""

    kid: str
    kty: str
    crv: str | None = None
    alg: str | None = None
    use: str = "sig"


class Keys:
    """The signing keys that an issuer publishes. Only `keep` asks for them, so no answer overtakes another."""

    def __init__(self, issuer_url: str, client: httpx.AsyncClient) -> None:
        self._issuer_url = issuer_url
        self._client = client
        self._known: dict[tuple[str, str], Any] = {}
        self._fetched_at = -math.inf
        self._asked_at = -math.inf  # when the question was put to which the last answer came, or none
        self._trouble: str | None = None
        self._wanted, self._answered = asyncio.Event(), asyncio.Event()
        self._room = asyncio.Semaphore(WAITING_MAX)

    async def find(self, kid: str, algorithm: str) -> Any:
        """The key `kid`, which may sign with `algorithm`.

        Where it is not known, waits for an answer to a question that is put from now on: an older one says
        nothing about a key that is newer. That takes up to ASK_SECONDS_MIN and ANSWER_SECONDS_MAX.
        Raises Unauthenticated where the issuer has no such key, and StoreUnavailable where it cannot say.
        """
        wanted, came = (kid, algorithm), time.monotonic()
        if wanted not in self._fresh and self._trouble is None and not self._room.locked():
            async with self._room:
                await self._until(lambda: wanted in self._fresh or self._asked_at >= came or self._trouble is not None)
        if (key := self._fresh.get(wanted)) is not None:
            return key
        if self._trouble is None and self._asked_at >= came:
            raise Unauthenticated(why="The token is signed with a key that its issuer does not publish")
        # Not a 401: that would make a client drop a token which may be good, and ask an issuer for another that
        # does not answer. Of the codes for "not now", this one says what is so: nothing was done, send it again.
        why = "The issuer of this token does not answer" if self._trouble else "Many wait for this token's issuer"
        raise StoreUnavailable(why=f"{why}, so the token cannot be verified")

    @property
    def _fresh(self) -> dict[tuple[str, str], Any]:
        return self._known if time.monotonic() < self._fetched_at + KEYS_SECONDS_MAX else {}

    async def ask(self) -> None:
        """Have the issuer asked from now on, and wait until it answered that, or failed to."""
        came = time.monotonic()
        await self._until(lambda: self._asked_at >= came)

    async def _until(self, enough: Callable[[], bool]) -> None:
        while not enough():
            self._wanted.set()
            await self._answered.wait()

    async def keep(self) -> None:
        """Fetch the keys now, and before they grow old, for ever; sooner where that fails, or somebody waits."""
        while True:
            asked_at = time.monotonic()
            await self._ask(asked_at)
            self._asked_at = asked_at
            # Whom this did not tell enough wants another, and says so.
            self._wanted.clear()
            answered, self._answered = self._answered, asyncio.Event()
            answered.set()
            await asyncio.sleep(asked_at + ASK_SECONDS_MIN - time.monotonic())
            if self._trouble is None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wanted.wait(), asked_at + REFRESH_SECONDS - time.monotonic())

    async def _ask(self, asked_at: float) -> None:
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                known = await self._fetch()
        except (
            httpx.HTTPError,
            httpx.InvalidURL,
            TimeoutError,
            msgspec.MsgspecError,
            ValueError,
            RecursionError,
        ) as error:
            trouble = f"{type(error).__name__}: {error}"
            if trouble != self._trouble:
                log.warning("No keys from the OpenID provider %s (those known are kept): %s", self._issuer_url, trouble)
            self._trouble = trouble
            return
        # All at once: what the issuer no longer publishes is no longer trusted.
        self._known, self._fetched_at, self._trouble = known, asked_at, None

    async def _fetch(self) -> dict[tuple[str, str], Any]:
        # s4.1: a slash at the end of the issuer is left out.
        address = f"{self._issuer_url.removesuffix('/')}/.well-known/openid-configuration"
        metadata = msgspec.json.decode(await self._get(address), type=_Metadata)
        if metadata.issuer != self._issuer_url:
            raise ValueError(
                f"{address} is about the issuer {metadata.issuer[:200]!r}: is OIDC_ISSUER_URL spelt like that?"
            )
        if self._issuer_url.startswith("https:") and not metadata.jwks_uri.startswith("https:"):
            raise ValueError(f"its keys are at {metadata.jwks_uri[:200]!r}, which is not https")
        return signing_keys(msgspec.json.decode(await self._get(metadata.jwks_uri), type=_KeySet).keys)

    async def _get(self, address: str) -> bytes:
        body = bytearray()
        # As it is, since a few bytes of a compressed document can be any number of ours; and by a connection of its
        # own: one that was kept until the next time may be closed by the provider just when it is used.
        headers = {"Accept-Encoding": "identity", "Connection": "close"}
        async with self._client.stream("GET", address, headers=headers) as response:
            response.raise_for_status()  # a redirect as well: the issuer says where things are, and no one else
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > DOCUMENT_BYTES_MAX:
                    raise ValueError(f"{address} is over {DOCUMENT_BYTES_MAX} bytes")
        return bytes(body)


def signing_keys(published: list[dict[str, Any]]) -> dict[tuple[str, str], Any]:
    """The keys of a set by `kid` and each algorithm that they may be used with. A key that is not understood, or
    is for something else, or proves nothing (weak, or published with its secret half), is passed over (RFC 7517 s5)."""
    keys: dict[tuple[str, str], Any] = {}
    for one in published:
        try:
            said = msgspec.convert(one, _Key)
            fitting = ALGORITHMS.get((said.kty, said.crv), ())
            algorithms = [name for name in fitting if said.alg in (name, None) and said.use == "sig" and "d" not in one]
            key = jwt.PyJWK(one, algorithms[0]).key if algorithms else None
        except (msgspec.ValidationError, jwt.PyJWTError, ValueError, TypeError, UnsupportedAlgorithm):
            continue
        if said.kty != "RSA" or (key is not None and RSA_BITS_MIN <= key.key_size <= RSA_BITS_MAX):
            keys |= {(said.kid, name): key for name in algorithms}
    return keys


# Tokens


class _Act(Struct):
    """Who acts for the one above (RFC 8693 s4.1)."""

    sub: Line
    iss: str | None = None
    act: "_Act | None" = None


class _Claims(Struct):
    """What every provider calls the same (RFC 7519, 8693, 9068; OpenID Connect Core s2)."""

    iss: str
    sub: Line
    exp: float
    client_id: Line | None = None
    azp: Line | None = None
    act: _Act | None = None
    auth_time: Count | None = None
    acr: Line | None = None
    amr: list[Line] | None = None


class Provider:
    """Verifies the tokens of one issuer."""

    def __init__(self, settings: Settings, keys: Keys) -> None:
        self._settings = settings
        self._keys = keys

    async def verify(self, token: str) -> tuple[Caller, float]:
        """See `api.auth.Verify`."""
        header = jwt.get_unverified_header(token)
        typ, algorithm, kid = (header.get(name) for name in ("typ", "alg", "kid"))
        if not isinstance(typ, str) or typ.lower() not in TYPES:
            raise Unauthenticated(why="The token is no access token: its `typ` is neither at+jwt nor JWT")
        if not isinstance(algorithm, str) or not any(algorithm in fitting for fitting in ALGORITHMS.values()):
            raise Unauthenticated(why="The token's `alg` is none that is accepted here")
        if not isinstance(kid, str):
            raise Unauthenticated(why="The token does not name its key (`kid`)")
        claims = jwt.decode(
            token,
            await self._keys.find(kid, algorithm),
            algorithms=[algorithm],
            issuer=self._settings.oidc_issuer_url,
            audience=self._settings.oidc_audience,
            leeway=LEEWAY_SECONDS,
            options={"require": ["iss", "sub", "aud", "exp"]},
        )
        return caller_of(claims, self._settings), claims["exp"]


def caller_of(claims: dict[str, Any], settings: Settings) -> Caller:
    """Who a verified token says calls. Raises Unauthenticated and msgspec.ValidationError."""
    msgspec.json.encode(claims)  # a ValueError for half a character, which no event and no answer could hold
    known = msgspec.convert(claims, _Claims)
    project = _read(claims, settings.oidc_project_claim, ProjectId)
    kind: Kind = _read(claims, settings.oidc_kind_claim, Kind | None) or "agent"
    # All of them, known here or not: a quorum may name any role, such as `finance`.
    roles = tuple(dict.fromkeys(_read(claims, settings.oidc_roles_claim, list[Line] | None, split=True) or ()))
    client = known.client_id or known.azp
    if known.act is None:
        actor = Actor(
            issuer=known.iss,
            sub=known.sub,
            kind=kind,
            assurance="authenticated",
            roles=roles,
            client=client,
            auth_time=known.auth_time,
            acr=known.acr,
            amr=tuple(known.amr or ()),
        )
    else:
        # How and when somebody signed in is told of the subject, and so is its kind: a machine acts for it.
        actor = Actor(
            issuer=known.iss,
            sub=known.act.sub,
            kind="agent" if kind == "human" else kind,
            assurance="authenticated",
            roles=roles,
            client=client,
            on_behalf_of=_chain(known, known.act),
        )
    return Caller(project, actor, not READERS.isdisjoint(roles))


def _chain(claims: _Claims, act: _Act) -> tuple[Principal, ...]:
    """For whom the outermost `act` acts: the subject, then those who acted between, the first of them first."""
    between: list[Principal] = []
    at: _Act | None = act
    while at is not None:
        # An issuer speaks for its own: with another's names, one person could be two, or somebody else.
        if at.iss not in (None, claims.iss) or len(between) == ACTORS_MAX:
            raise Unauthenticated(why=f"The token's `act` names another issuer, or more than {ACTORS_MAX} actors")
        between.append(Principal(claims.iss, at.sub))
        at = at.act
    return (Principal(claims.iss, claims.sub), *reversed(between[1:]))


def _read(claims: dict[str, Any], name: str, wanted: Any, *, split: bool = False) -> Any:
    found = find_claim(claims, name)
    try:
        return msgspec.convert(found.split() if split and isinstance(found, str) else found, wanted)
    except msgspec.ValidationError as error:
        raise Unauthenticated(why=f"The token's claim `{name}` is missing or not usable: {error}") from None


def find_claim(claims: dict[str, Any], name: str) -> Any:
    """The claim that is called exactly `name`, else the one at that dotted path; None where there is neither.

    At each step of a path the same holds: `resource_access.my.app.roles` finds `roles` of `my.app`.
    """
    if name in claims:
        return claims[name]
    for end in (index for index, character in enumerate(name) if character == "."):
        inner = claims.get(name[:end])
        if isinstance(inner, dict) and (found := find_claim(inner, name[end + 1 :])) is not None:
            return found
    return None
