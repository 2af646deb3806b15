"""What the image is made of, and whom the realm of compose lets in: read from what operators deploy, not told again."""

import json
import re
import shlex
import time
from pathlib import Path
from typing import Any

from api.auth import Caller
from api.oidc import caller_of
from ledger.settings import Settings

ROOT = Path(__file__).parents[2]
REALM: dict[str, Any] = json.loads((ROOT / "ops/compose/realm.json").read_text("utf-8"))


def instructions() -> list[tuple[str, str]]:
    """Those of the Dockerfile, each on one line."""
    text = (ROOT / "ops/image/Dockerfile").read_text("utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def _last_stage() -> list[tuple[str, str]]:
    made = instructions()
    begins = max(index for index, (name, _) in enumerate(made) if name == "FROM")
    return made[begins + 1 :]


IMAGE = _last_stage()
IMAGE_ENVIRONMENT = dict(pair.split("=", 1) for name, rest in IMAGE if name == "ENV" for pair in shlex.split(rest))
CONTEXT = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]
"""What of the checkout whoever builds the image has."""


def claims(issuer: str, client_id: str, username: str) -> dict[str, Any]:
    """What Keycloak puts into an access token, by its own default scopes and by the client's mappers."""
    (client,) = [one for one in REALM["clients"] if one["clientId"] == client_id]
    (user,) = [one for one in REALM["users"] if one["username"] == username]
    if user.get("serviceAccountClientId") is None:
        terminal = client.get("attributes", {}).get("oauth2.device.authorization.grant.enabled") == "true"
        assert client["publicClient"]
        assert client["standardFlowEnabled"] or terminal
        assert terminal or client["attributes"]["pkce.code.challenge.method"] == "S256"
    else:
        assert user["serviceAccountClientId"] == client_id
        assert client["serviceAccountsEnabled"]
        assert not client["publicClient"]
    # `sub` is of its scope `basic`, `realm_access` of `roles`: who imports scopes of their own has neither.
    assert "clientScopes" not in REALM
    assert "defaultClientScopes" not in client
    assert set(user["realmRoles"]) <= {role["name"] for role in REALM["roles"]["realm"]}
    said = {
        "iss": issuer,
        "sub": user["id"],
        "azp": client_id,
        "exp": int(time.time()) + REALM["accessTokenLifespan"],
        "realm_access": {"roles": user["realmRoles"]},
    }
    for mapper in client["protocolMappers"]:
        config = mapper["config"]
        assert config["access.token.claim"] == "true"
        if mapper["protocolMapper"] == "oidc-audience-mapper":
            said["aud"] = [config["included.custom.audience"]]
        else:
            assert mapper["protocolMapper"] == "oidc-usermodel-attribute-mapper"
            (said[config["claim.name"]],) = user["attributes"][config["user.attribute"]]
    return said


def caller(settings: Settings, client_id: str, username: str) -> Caller:
    """Who the API takes that token's bearer for."""
    said = claims(settings.oidc_issuer_url or "", client_id, username)
    assert settings.oidc_audience in said["aud"]
    return caller_of(said, settings)
