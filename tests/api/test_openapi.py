"""The OpenAPI document is true: what it allows is accepted, what it forbids is refused, and every answer is as it
says; and the documentation is whole without any other host."""

import asyncio
import hashlib
import re
import threading
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psycopg
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from psycopg import sql
from schemathesis.config import SchemathesisConfig
from schemathesis.python.asgi import shutdown_lifespans

from api.app import RESOURCES, Application, create_app
from api.auth import development_token
from api.openapi import document
from ledger.commands import COMMANDS
from ledger.embedded import EmbeddedServer
from ledger.errors import ERRORS
from ops.worker import work
from tests.api.conftest import settings_of
from tests.check import check_ledger
from tests.conftest import TEMPLATE, Database, database_of

# What a schema cannot say: the order of times, whether two parts agree, what is in the ledger.
SEMANTIC = re.compile(
    r"make them agree|in the future|beyond 2\^53|it is for one command|reserved|`after`|given here|`=` nor `:`|words"
    r"|either `kinds` or one `task_id`|with the role before it|with `start` it begins now|not after the time"
    r"|both say when|asked of the past|that are published|more than `to`"
    r"|only what is pending|\$personal|Expected `int( \| null)?`, got `float`"  # to JSON Schema 3.0 is an integer
)
REFUSED = ["400", "401", "403", "404", "405", "409", "410", "412", "413", "415", "422", "429", "503"]
CHECKS = {
    "positive_data_acceptance": {"expected-statuses": ["2xx", "304", *REFUSED]},
    "negative_data_rejection": {"expected-statuses": REFUSED},
    "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "503"]},
}
ROUTES = [route for module in RESOURCES for route in module.ROUTES]
DOCUMENT = msgspec.json.decode(msgspec.json.encode(document(ROUTES)))


serving: list[Application] = []


async def application(scope: Any, receive: Any, send: Any) -> None:
    """The app of this run, which is not there yet when tests are collected. Nobody waits: it may be for a minute."""
    if scope["type"] == "http":
        serving[-1].end_waits()
    await serving[-1](scope, receive, send)


def schema_for(mode: str) -> Any:
    """The document, for requests that it allows or for such that it forbids."""
    config = SchemathesisConfig.from_dict({"checks": CHECKS, "generation": {"mode": mode}})
    schema = schemathesis.openapi.from_dict(DOCUMENT, config=config)
    schema.app = application
    return schema


allowed, forbidden = schema_for("positive"), schema_for("negative")


@pytest.fixture(scope="module")
def shared(postgres: EmbeddedServer) -> Iterator[Database]:
    name = sql.Identifier("test_openapi")
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(name, sql.Identifier(TEMPLATE)))
        yield database_of(postgres, "test_openapi")
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openapi")


@pytest.fixture(scope="module")
def app(shared: Database, home: Path) -> Iterator[Application]:
    """The app in a loop and thread of its own, as schemathesis runs it, with a worker in another."""
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    job = work(settings_of(shared, home, DATABASE_URL=shared.worker), stop)
    worker = threading.Thread(target=lambda: loop.run_until_complete(job))
    worker.start()
    serving.append(create_app(settings_of(shared, home)))
    yield serving[-1]
    shutdown_lifespans()
    loop.call_soon_threadsafe(stop.set)
    worker.join()
    loop.close()
    check_ledger(shared.owner)


@pytest.fixture(scope="module")
def authorization(home: Path) -> dict[str, str]:
    roles = ["agent", "auditor", "operator"]
    return {"Authorization": f"Bearer {development_token(home / 'keys', project='demo', subject='x', roles=roles)}"}


def has_a_reason_that_no_schema_can_say(context: Any, response: Any, case: Any) -> None:
    """The check of a 400 to a request that the document allows."""
    if response.status_code == 400:
        details = [error["detail"] for error in response.json()["errors"]]
        assert all(SEMANTIC.search(detail) for detail in details), details


# The app's and the worker's threads draw random numbers too, and hypothesis takes them for its strategies'.
beside_other_threads = pytest.mark.filterwarnings("ignore:Do not use the .random. module")
bounded = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.usefixtures("app")
@beside_other_threads
@allowed.parametrize()  # type: ignore[untyped-decorator]
@bounded
def test_what_the_document_allows_is_taken(case: Any, authorization: dict[str, str]) -> None:
    reasoned = [has_a_reason_that_no_schema_can_say]
    case.call_and_validate(headers=authorization, additional_checks=reasoned)


@pytest.mark.usefixtures("app")
@beside_other_threads
@forbidden.parametrize()  # type: ignore[untyped-decorator]
@bounded
def test_what_the_document_forbids_is_refused(case: Any, authorization: dict[str, str]) -> None:
    case.call_and_validate(headers=authorization)


# The document itself

TASK_VERBS = ("heartbeat", "complete", "fail", "suspend", "cancel", "redrive")
APPROVAL_VERBS = ("presentations", "votes", "edit", "withdraw", "cancel", "revoke", "uses")


async def test_the_document_that_is_served_is_this_one_and_names_every_route(client: httpx.AsyncClient) -> None:
    served = await client.get("/openapi.json")
    assert served.json() == DOCUMENT
    assert served.json()["openapi"] == "3.1.0"
    named = {(path, method.upper()) for path, operations in DOCUMENT["paths"].items() for method in operations}
    assert named == {
        ("/sessions", "GET"),
        ("/sessions", "POST"),
        ("/sessions/{session_id}", "GET"),
        ("/sessions/{session_id}", "PUT"),
        ("/sessions/{session_id}/cancel", "POST"),
        ("/sessions/{session_id}/annotations", "POST"),
        ("/sessions/{session_id}/events", "GET"),
        ("/records", "GET"),
        ("/records", "POST"),
        ("/records/{record_id}", "GET"),
        ("/tasks", "GET"),
        ("/tasks", "POST"),
        ("/tasks/route", "POST"),
        ("/tasks/claim", "POST"),
        ("/tasks/{task_id}", "GET"),
        ("/tasks/{task_id}/attempts", "GET"),
        *((f"/tasks/{{task_id}}/{verb}", "POST") for verb in TASK_VERBS),
        ("/dead-letters", "GET"),
        ("/approvals", "GET"),
        ("/approvals", "POST"),
        ("/approvals/{approval_id}", "GET"),
        *((f"/approvals/{{approval_id}}/{verb}", "POST") for verb in APPROVAL_VERBS),
        ("/approvals/{approval_id}/votes/mine", "DELETE"),
        ("/approvals/{approval_id}/uses/{execution_id}/outcome", "POST"),
        ("/.well-known/jwks.json", "GET"),
        ("/approvals", "GET"),
        ("/approvals", "POST"),
        ("/approvals/{approval_id}", "GET"),
        ("/approvals/{approval_id}/presentations", "POST"),
        ("/approvals/{approval_id}/votes", "POST"),
        ("/approvals/{approval_id}/votes/mine", "DELETE"),
        ("/approvals/{approval_id}/edit", "POST"),
        ("/approvals/{approval_id}/withdraw", "POST"),
        ("/approvals/{approval_id}/cancel", "POST"),
        ("/approvals/{approval_id}/revoke", "POST"),
        ("/approvals/{approval_id}/uses", "POST"),
        ("/approvals/{approval_id}/uses/{execution_id}/outcome", "POST"),
        ("/.well-known/jwks.json", "GET"),
        ("/commands", "POST"),
        ("/commands/{command_id}", "GET"),
        ("/events", "GET"),
        ("/events/{position}", "GET"),
        ("/events/{position}/proof", "GET"),
        ("/ledger/{project}/checkpoint", "GET"),
        ("/ledger/{project}/tile/{level}/{index}", "GET"),
        ("/ledger/{project}/tile/entries/{index}", "GET"),
        ("/ledger/{project}/payload/{digest}", "GET"),
        ("/ledger/{project}/keys", "GET"),
        ("/ledger/{project}/consistency", "GET"),
        ("/audit/search", "GET"),
        ("/erasures", "GET"),
        ("/erasures", "POST"),
        ("/erasures/{subject}", "GET"),
        ("/holds", "GET"),
        ("/holds", "POST"),
        ("/holds/{hold_id}", "GET"),
        ("/holds/{hold_id}/release", "POST"),
        ("/projections", "GET"),
        ("/projections/{view}", "GET"),
        ("/projections/{view}/rebuild", "POST"),
        ("/projections/{view}/cancel", "POST"),
        ("/projections/{view}/rollback", "POST"),
        ("/projections/{view}/verify", "POST"),
        ("/projections", "GET"),
        ("/projections/{view}", "GET"),
        *((f"/projections/{{view}}/{verb}", "POST") for verb in ("rebuild", "cancel", "rollback", "verify")),
        ("/health", "GET"),
        ("/health/live", "GET"),
        ("/health/ready", "GET"),
        ("/metrics", "GET"),
        ("/status", "GET"),
        ("/openapi.json", "GET"),
    }


def operations() -> Iterator[dict[str, Any]]:
    for path in DOCUMENT["paths"].values():
        yield from path.values()


def test_every_operation_is_described_and_says_every_way_it_can_fail() -> None:
    ids = [operation["operationId"] for operation in operations()]
    assert len(set(ids)) == len(ids)
    for operation in operations():
        assert operation["summary"]
        for parameter in operation["parameters"]:
            assert parameter["schema"]
        for status, response in operation["responses"].items():
            assert response["description"]
            if status >= "400" and not (status == "503" and operation["operationId"] in ("get_health", "get_ready")):
                problem = response["content"]["application/problem+json"]["schema"]
                assert problem == {"$ref": "#/components/schemas/Problem"}
        guarded = operation["security"] != []
        assert guarded == ("401" in operation["responses"])
        if "requestBody" in operation:
            sent = {"400", "401", "403", "404", "409", "413", "415", "500", "503"}
            # A heartbeat is no command: it has no version to match, no id to reuse, and no refusal to record.
            commanded = set() if operation["operationId"] == "Heartbeat" else {"412", "422", "429"}
            assert sent | commanded <= set(operation["responses"])


def test_schemas_are_as_strict_as_what_reads() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for command in COMMANDS:
        assert schemas[command.__name__]["additionalProperties"] is False
        assert schemas[command.__name__]["description"]
    body = DOCUMENT["paths"]["/commands"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    one, listed = body["anyOf"]
    assert one["discriminator"]["propertyName"] == "type"
    assert set(one["discriminator"]["mapping"]) == {command.__name__ for command in COMMANDS}
    assert (listed["minItems"], listed["maxItems"]) == (1, 1000)
    assert "metadata_event_id" not in schemas["Session"]["properties"]
    text = msgspec.json.encode(DOCUMENT).decode()
    assert "(?!" not in text, "a pattern that not every engine reads"
    for reference in set(re.findall(r'"#/components/([^"]+)"', text)):
        kind, name = reference.split("/")
        assert name in DOCUMENT["components"][kind]


# The pages


async def test_the_documentation_loads_nothing_from_elsewhere(client: httpx.AsyncClient) -> None:
    client.headers.pop("authorization")
    page = await client.get("/docs")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert loaded
    for address in loaded:
        assert address.startswith(("/docs/", "data:"))
        if address.startswith("/docs/"):
            file = await client.get(address)
            assert file.status_code == 200
            assert file.headers["x-content-type-options"] == "nosniff"
            assert file.headers["content-type"].startswith(("text/javascript", "text/css"))
    assert "<script>" not in page.text


async def test_every_problem_has_its_place_on_the_page(client: httpx.AsyncClient) -> None:
    page = (await client.get("/docs/problems")).text
    missing = (await client.get("/nothing")).json()
    assert missing["type"] == "/docs/problems#not_found"
    for code, error in ERRORS.items():
        assert f'<dt id="{code}">' in page
        assert str(error.status) in page


def test_what_is_vendored_is_what_was_published() -> None:
    folder = files("api.docs")
    lines = re.findall(r"^([0-9a-f]{64})  (\S+)$", folder.joinpath("VENDOR.txt").read_text(), re.MULTILINE)
    assert len(lines) == 5
    for digest, name in lines:
        assert hashlib.sha256(folder.joinpath(name).read_bytes()).hexdigest() == digest
