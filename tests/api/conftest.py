"""The real app over a fresh database, and callers with tokens for it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from litestar import Litestar

from api import oidc
from api.app import create_app
from api.auth import development_token
from ledger.settings import Settings
from ops.worker import work
from tests.api.provider.provider import OpenIdProvider, installed
from tests.api.provider.trust import AUDIENCE
from tests.conftest import Database

Token = Callable[..., dict[str, str]]


@pytest.fixture
def settings(database: Database, tmp_path: Path) -> Settings:
    """A development configuration on this test's database."""
    return settings_of(database, tmp_path)


def settings_of(database: Database, home: Path, **environment: str) -> Settings:
    known = {"MUNIMENT_MODE": "development", "MUNIMENT_HOME": str(home), "DATABASE_URL": database.api}
    return Settings.from_environment(known | environment)


@pytest.fixture
def token(tmp_path: Path) -> Token:
    """Makes an Authorization header: `token("auditor", subject="ann", project="other")`."""

    def header(*roles: str, subject: str = "agent-7", project: str = "demo", **claims: Any) -> dict[str, str]:
        made = development_token(tmp_path / "keys", project=project, subject=subject, roles=roles, **claims)
        return {"Authorization": f"Bearer {made}"}

    return header


@asynccontextmanager
async def running(app: Litestar, headers: dict[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `app`, which runs in this process."""
    started, ended = asyncio.Event(), asyncio.Event()

    async def live() -> None:  # in one task, as a server does it: fixtures begin and end in two
        async with app.lifespan():
            started.set()
            await ended.wait()

    life = asyncio.create_task(live())
    ready = asyncio.create_task(started.wait())
    await asyncio.wait([life, ready], return_when=asyncio.FIRST_COMPLETED)
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
    try:
        if started.is_set():
            async with httpx.AsyncClient(transport=transport, base_url="http://muniment", headers=headers) as client:
                yield client
    finally:
        ready.cancel()
        ended.set()
        await life


@pytest.fixture
async def client(settings: Settings, token: Token) -> AsyncIterator[httpx.AsyncClient]:
    """An agent of project `demo`."""
    async with running(create_app(settings), token("agent")) as client:
        yield client


def problem_of(response: httpx.Response) -> dict[str, Any]:
    """The problem that an answer is, checked for what every problem must be."""
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == response.status_code
    assert problem["type"] == f"/docs/problems#{problem['code']}"
    assert problem["title"]
    assert problem["detail"]
    assert ("errors" in problem) == (response.status_code == 400)
    assert ("retry-after" in response.headers) == (response.status_code in (429, 503))
    for word in ("Traceback", "SELECT", "psycopg", "/api/", "site-packages"):
        assert word not in response.text
    return problem


@pytest.fixture
async def worker(database: Database, tmp_path: Path) -> AsyncIterator[None]:
    """A worker, as `muniment worker` runs it, in this process."""
    stop = asyncio.Event()
    settings = settings_of(database, tmp_path, DATABASE_URL=database.worker)
    job = asyncio.create_task(work(settings, stop))
    yield
    stop.set()
    await job


@pytest.fixture(scope="session")
def provider_directory(request: pytest.FixtureRequest) -> Path:
    return installed(request.config.cache.mkdir("openid-provider"))


@pytest.fixture
def openid(provider_directory: Path) -> Iterator[OpenIdProvider]:
    """An OpenID provider of this test's own."""
    with OpenIdProvider(provider_directory, AUDIENCE) as openid:
        yield openid


@pytest.fixture
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """An issuer may be asked again at once, and takes as long to answer as a busy machine needs."""
    monkeypatch.setattr(oidc, "ASK_SECONDS_MIN", 0.01)
    monkeypatch.setattr(oidc, "ANSWER_SECONDS_MAX", 60.0)
