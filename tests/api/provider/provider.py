"""A real OpenID provider, certified, as a process of its own: `provider.js` beside this, which says what it is told.

Its packages are those of `package-lock.json`, installed once into pytest's cache.
"""

import base64
import json
import shutil
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

HERE = Path(__file__).parent
SOURCES = ("package.json", "package-lock.json", "provider.js")
NODE_VERSION_MIN = 20
REDIRECT = "http://127.0.0.1/callback"
ANSWER_SECONDS_MAX = 60.0
VERIFIER = "v" * 43
"""The secret of a sign-in (RFC 7636)."""


def installed(cache: Path) -> Path:
    """The directory of the provider with its packages. Skips the test on a machine that cannot run it."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        pytest.skip("the OpenID provider of these tests needs node and npm, which are not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.strip("v\n").split(".")[0]) < NODE_VERSION_MIN:
        pytest.skip(f"the OpenID provider of these tests needs node {NODE_VERSION_MIN}, and this is {version.strip()}")
    contents = b"".join((HERE / name).read_bytes() for name in SOURCES)
    there = cache / sha256(contents).hexdigest()[:16]
    if not there.exists():
        # Aside, then renamed: a run that was stopped leaves nothing half done, and of two the first decides.
        aside = Path(tempfile.mkdtemp(dir=cache))
        for name in SOURCES:
            shutil.copy(HERE / name, aside)
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(command, cwd=aside, check=True)
        try:
            aside.rename(there)
        except OSError:
            shutil.rmtree(aside)
    return there


class SigningKey:
    """A key of the provider, which the tests have too."""

    def __init__(self, kid: str) -> None:
        self.kid = kid
        self.private: RSAPrivateKey = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    @property
    def jwk(self) -> dict[str, Any]:
        said = jwt.algorithms.RSAAlgorithm.to_jwk(self.private, as_dict=True)
        del said["key_ops"]
        return said | {"kid": self.kid, "alg": "RS256", "use": "sig"}


class OpenIdProvider:
    """A running provider. A context manager; it keeps its address when it is stopped and started again."""

    def __init__(self, directory: Path, audience: str) -> None:
        self.audience = audience
        self.keys = [SigningKey("first")]
        self.issuer = ""
        self._directory = directory
        self._clients: dict[str, dict[str, Any]] = {}
        self._settings: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        port = self.issuer.rpartition(":")[2] or "0"
        self._process = subprocess.Popen(
            ["node", "provider.js", port],
            cwd=self._directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.configure()

    def stop(self) -> None:
        if self._process is not None:
            with self._process as process:  # the end of its input ends it
                assert process.stdin is not None
                process.stdin.close()
            self._process = None

    def configure(self, **settings: Any) -> int:
        """Be as `provider.js` says, from now on. Returns how often the keys were asked for so far."""
        self._settings |= settings
        wanted = {
            "keys": [key.jwk for key in self.keys],
            "audience": self.audience,
            "clients": list(self._clients.values()),
        }
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(wanted | self._settings) + "\n")
        self._process.stdin.flush()
        said = json.loads(self._process.stdout.readline())
        self.issuer = said["issuer"]
        return int(said["key_requests"])

    def client(self, client_id: str, claims: dict[str, Any], **settings: Any) -> None:
        """Know a client, in whose access tokens `claims` stand."""
        self._clients[client_id] = {"client_id": client_id, "claims": claims} | settings
        self.configure()

    def token(self, claims: dict[str, Any], client_id: str = "bot", **settings: Any) -> str:
        """An access token for a machine: the client credentials grant (RFC 6749 s4.4)."""
        self.client(client_id, claims, **settings)
        return self._tokens(client_id, grant_type="client_credentials")["access_token"]

    def sign_in(self, person: str, claims: dict[str, Any], client_id: str = "web", **settings: Any) -> dict[str, str]:
        """The tokens of a person who signed in with a browser: the authorization code grant, with PKCE."""
        self.client(client_id, claims, **settings)
        challenge = base64.urlsafe_b64encode(sha256(VERIFIER.encode()).digest()).rstrip(b"=").decode()
        asked = {
            "client_id": client_id,
            "response_type": "code",
            "scope": "openid",
            "resource": self.audience,
            "redirect_uri": REDIRECT,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        with httpx.Client(base_url=self.issuer, trust_env=False, timeout=ANSWER_SECONDS_MAX) as browser:
            form = browser.get("/auth", params=asked).headers["location"]
            back = browser.post(form, data={"prompt": "login", "login": person, "password": "any"}).headers["location"]
            code = httpx.URL(browser.get(back).headers["location"]).params["code"]
        return self._tokens(
            client_id, grant_type="authorization_code", code=code, redirect_uri=REDIRECT, code_verifier=VERIFIER
        )

    def _tokens(self, client_id: str, **fields: str) -> dict[str, str]:
        sent = {"client_id": client_id, "client_secret": "secret"} | fields
        answer = httpx.post(f"{self.issuer}/token", data=sent, trust_env=False, timeout=ANSWER_SECONDS_MAX)
        assert answer.status_code == 200, answer.text
        tokens: dict[str, str] = answer.json()
        return tokens

    def __enter__(self) -> "OpenIdProvider":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
