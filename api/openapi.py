"""OpenAPI 3.1 of the routes as they are: from what each says of itself, and the types that it decodes.

The schemas come from the very types that read requests and write answers (msgspec), so they cannot drift;
a route that says nothing of itself is not in the document. Nothing here is used to answer any other request.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

import msgspec
from litestar.handlers import HTTPRouteHandler

from api.http import Operation
from api.log import PayloadDigest, TileIndex, TileLevel
from api.problems import Problem
from api.resources import BESIDE, HIDDEN
from ledger.commands import Command, CommandId, ProjectId
from ledger.errors import InternalError, MunimentError
from ledger.subjects import Pseudonym
from ledger.values import Count, Line

Json = dict[str, Any]

DESCRIPTION = """An event-sourced, tamper-evident audit ledger for AI agents.

Every command is answered once its events are durable, and a command sent again with the same id is done once.
Every error is `application/problem+json` with one of [these codes](/docs/problems)."""

_REF = "#/components/schemas/{name}"
_TEXT: Json = {"type": "string"}
_NUMBER: Json = {"type": "string", "pattern": "^[0-9]+$"}
_HEADERS: dict[str, tuple[str, Json]] = {
    "Ledger-Id": ("The ledger that this is about; another one means that positions began anew.", _TEXT),
    "Ledger-Position": ("Of a command: its last event. Of a read: how far it has seen.", _NUMBER),
    "Command-Id": ("The id of the command; send it again to ask what became of it.", _TEXT),
    "Cache-Control": ("How long it may be kept by who asked: a year, where it never changes.", _TEXT),
    "ETag": ("The version of the one thing that this is about.", _TEXT),
    "Location": ("Where the created thing is.", _TEXT),
    "Idempotent-Replayed": ("`true` when this command was answered before, and this is that answer.", _TEXT),
    "View-Behind": ("How many events the view has yet to take in; absent when none.", _NUMBER),
    "View-State": (
        (
            "`parked`: the view stands before an event that it cannot take, and shows nothing after it. `drifted`: "
            "some of what it shows is not what a replay of the ledger makes. Absent where it does well."
        ),
        {"type": "string", "enum": ["parked", "drifted"]},
    ),
    "Link": ('The next page (RFC 8288, `rel="next"`), where the body has no place for it.', _TEXT),
    "Retry-After": ("Seconds to wait before asking again.", _NUMBER),
    "WWW-Authenticate": ("`Bearer`.", _TEXT),
    "Allow": ("The methods that are possible here.", _TEXT),
}
_PATH_TYPES: dict[str, Any] = {
    "command_id": CommandId,
    "position": Count,
    "view": Line,
    "subject": Pseudonym,
    "project": ProjectId,
    "level": TileLevel,
    "index": TileIndex,
    "digest": PayloadDigest,
}


def document(handlers: Sequence[HTTPRouteHandler]) -> Json:
    """The OpenAPI document of these routes."""
    described = [(handler, handler.opt["operation"]) for handler in handlers if "operation" in handler.opt]
    schemas = _Schemas([operation for _, operation in described])
    paths: dict[str, Json] = defaultdict(dict)
    for handler, operation in described:
        for path in handler.paths:
            for method in sorted(str(method).lower() for method in handler.http_methods if method != "HEAD"):
                paths[re.sub(r":\w+}", "}", path)][method] = _operation(operation, path, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Muniment",
            "version": version("muniment"),
            "description": DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
            "headers": {
                name: {"description": said, "schema": schema, "required": False}
                for name, (said, schema) in _HEADERS.items()
            },
        },
    }


class _Schemas:
    """The JSON Schemas of every type that the operations name, by name, and how to refer to one."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._types: list[Any] = [Problem, *_PATH_TYPES.values(), *BESIDE.values()]
        for operation in operations:
            self._types += [t for t in (operation.query, operation.headers, operation.body) if t is not None]
            for answer in operation.answers.values():
                for kind in answer.values() if isinstance(answer, dict) else [answer]:
                    self._types += kind if isinstance(kind, tuple) else [kind]
        self._types = [t for t in self._types if t is not None]
        refs, self.components = msgspec.json.schema_components(self._types, ref_template=_REF)
        # In ECMA-262, and so in JSON Schema, `$` is the very end as it stands; in Python that must be said.
        refs, self.components = msgspec.json.decode(
            msgspec.json.encode((refs, self.components)).replace(rb"$(?!\\n)", b"$")
        )
        self._refs = refs
        for state, hidden in HIDDEN.items():
            _hide(self.components[state.__name__], hidden)
        for state, beside in BESIDE.items():
            _join(self.components[state.__name__], self.components.pop(beside.__name__))

    def ref(self, wanted: Any) -> Json:
        """The schema of a type, or of any one of several."""
        if isinstance(wanted, tuple):
            return {"anyOf": [self.ref(one) for one in wanted]}
        schema: Json = self._refs[self._types.index(wanted)]
        return schema

    def parameters(self, struct: type[msgspec.Struct], where: str) -> Iterator[Json]:
        """One parameter for each field; the struct itself is no component then."""
        schema = self.components[struct.__name__]
        for name, about in schema["properties"].items():
            shown = {key: value for key, value in about.items() if key not in ("description", "default")}
            parameter = {"name": name, "in": where, "required": name in schema["required"], "schema": shown}
            if "description" in about:
                parameter["description"] = about["description"]
            if about.get("default") is not None:
                shown["default"] = about["default"]
            yield parameter


def _hide(schema: Json, names: Sequence[str]) -> None:
    """Leave out what is in a state and not shown (`api.resources`)."""
    schema["properties"] = {name: about for name, about in schema["properties"].items() if name not in names}
    schema["required"] = sorted(schema["properties"])
    schema["description"] = schema["description"].partition(". ")[0].rstrip(".") + "."


def _join(schema: Json, beside: Json) -> None:
    """Add what is shown beside a state."""
    schema["properties"] |= beside["properties"]
    schema["required"] = sorted({*schema["required"], *beside["required"]})


def _operation(operation: Operation, path: str, schemas: _Schemas) -> Json:
    summary, _, description = operation.doc.partition("\n\n")
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": _path_schema(name, schemas)}
        for name in re.findall(r"{(\w+)", path)
    ]
    if operation.query is not None:
        parameters += schemas.parameters(operation.query, "query")
    if operation.headers is not None:
        parameters += schemas.parameters(operation.headers, "header")
    shown: Json = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": " ".join(summary.split()),
        "parameters": parameters,
        "responses": dict(sorted(_responses(operation, schemas).items())),
    }
    if description:
        shown["description"] = "\n".join(line.strip() for line in description.splitlines()).strip()
    if operation.body is not None:
        body = {"application/json": {"schema": _body(operation, path, schemas)}}
        shown["requestBody"] = {"required": operation.body_required, "content": body}
    shown["security"] = [] if operation.open else [{"token": []}]
    return shown


def _path_schema(name: str, schemas: _Schemas) -> Json:
    return schemas.ref(_PATH_TYPES[name]) if name in _PATH_TYPES else {"type": "string", "format": "uuid"}


def _body(operation: Operation, path: str, schemas: _Schemas) -> Json:
    """What the body may be. Where the route names the command's type the body need not, and what is in the
    path is not in the body."""
    body = operation.body
    one = schemas.ref(body)
    if isinstance(body, type) and issubclass(body, Command):
        schema = schemas.components[body.__name__]
        in_path = re.findall(r"{(\w+)", path)
        properties = {name: about for name, about in schema["properties"].items() if name not in in_path}
        one = schema | {"properties": properties, "required": [name for name in schema["required"] if name != "type"]}
    if not operation.items_max:
        return one
    # What is no such item does not make the list wrong.
    item = {"anyOf": [one, {"description": "Anything else is answered in its place, by a 400 of its own."}]}
    return {"anyOf": [one, {"type": "array", "items": item, "minItems": 1, "maxItems": operation.items_max}]}


def _responses(operation: Operation, schemas: _Schemas) -> dict[str, Json]:
    shown: dict[str, Json] = {}
    for status, answer in operation.answers.items():
        by_media_type = answer if isinstance(answer, dict) else {"application/json": answer}
        response: Json = {"description": HTTPStatus(status).phrase, "headers": _headers(*operation.sends)}
        if answer is not None:
            content = {media: {"schema": schemas.ref(kind) if kind else {}} for media, kind in by_media_type.items()}
            response["content"] = content
        shown[str(status)] = response
    for status, errors in _by_status((*operation.refusals, InternalError)).items():
        sends = [name for name in operation.sends if name not in ("ETag", "Location")]
        sends += {401: ["WWW-Authenticate"], 429: ["Retry-After"], 503: ["Retry-After"]}.get(status, [])
        shown[str(status)] = {
            "description": "; ".join(f"`{error.code}`: {error.title}" for error in errors),
            "headers": _headers(*sends),
            "content": {"application/problem+json": {"schema": schemas.ref(Problem)}},
        }
    return shown


def _by_status(errors: Sequence[type[MunimentError]]) -> dict[int, list[type[MunimentError]]]:
    grouped: dict[int, list[type[MunimentError]]] = defaultdict(list)
    for error in dict.fromkeys(errors):
        grouped[error.status].append(error)
    return grouped


def _headers(*names: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
