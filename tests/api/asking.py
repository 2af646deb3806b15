"""Asking people over HTTP, as tests do it: an agent that asks, and people who decide."""

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx

from ledger.values import stamp
from tests.api.conftest import Token

Json = dict[str, Any]
ACTION: Json = {"tool": "bank.transfer", "arguments": {"to": "DE02 1203", "amount": 12.5}, "target": "invoice:9"}
ISSUER = "muniment-development"
LONG_SECONDS = 30


class People:
    """Who takes part besides the agent: headers by name."""

    def __init__(self, token: Token) -> None:
        self.ann = token("approver", subject="ann", kind="human")
        self.ben = token("approver", subject="ben", kind="human")
        self.operator = token("operator", subject="olga", kind="human")
        self.importer = token("importer", subject="importer", kind="service")


async def post(client: httpx.AsyncClient, path: str, by: Any = None, status: int = 200, **body: Any) -> Json:
    response = await client.post(path, json=body, headers=by)
    assert response.status_code == status, response.text
    answer: Json = response.json()
    return answer


async def asked(client: httpx.AsyncClient, **fields: Any) -> Json:
    return await post(client, "/approvals", status=201, **{"action": ACTION} | fields)


def path_of(approval: Json) -> str:
    return f"/approvals/{approval['approval_id']}"


async def voted(
    client: httpx.AsyncClient, approval: Json, by: Any, verdict: str = "approve", status: int = 200, **fields: Any
) -> Json:
    seen = {"verdict": verdict, "digest_seen": approval["request_digest"]}
    return await post(client, f"{path_of(approval)}/votes", by, status, **seen | fields)


async def read(client: httpx.AsyncClient, approval: Json, **parameters: Any) -> Json:
    response = await client.get(path_of(approval), params=parameters)
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def principal(sub: str) -> Json:
    return {"issuer": ISSUER, "sub": sub}


def later(**units: float) -> str:
    return stamp(datetime.now(UTC) + timedelta(**units))
