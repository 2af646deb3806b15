"""What headers say of a command: its id, the version it expects, what it belongs to and where it comes from.

A header and the body may both say it, and must then agree; nothing is guessed. How the ledger uses what is
said is not decided here.
"""

import re
from typing import Annotated, Any
from uuid import UUID

from msgspec import UNSET, Meta, Struct, UnsetType

from api.http import Headers, convert
from ledger.commands import Command, CommandId
from ledger.errors import MalformedRequest
from ledger.values import ONE_LINE

_IF_MATCH = r'^(\*|"[0-9]{1,15}")$(?!\n)'


class CommandHeaders(
    Struct,
    kw_only=True,
    rename={
        "idempotency_key": "Idempotency-Key",
        "if_match": "If-Match",
        "correlation_id": "Correlation-Id",
        "causation_id": "Causation-Id",
    },
):
    """What headers say of a command. Where its body says it too, both must agree."""

    idempotency_key: (
        Annotated[CommandId, Meta(description="The command id: sent again, it is done once.")] | UnsetType
    ) = UNSET
    if_match: (
        Annotated[str, Meta(pattern=_IF_MATCH, description="The ETag you last saw, or `*`.", examples=['"3"'])]
        | UnsetType
    ) = UNSET
    correlation_id: (
        Annotated[
            str,
            Meta(min_length=1, max_length=128, pattern=ONE_LINE, description="What this belongs to."),
        ]
        | UnsetType
    ) = UNSET
    causation_id: Annotated[UUID, Meta(description="The id of the event that led to this.")] | UnsetType = UNSET
    traceparent: Annotated[str, Meta(description="W3C Trace Context; kept with the events.")] | UnsetType = UNSET


_HEADERS = tuple((name.lower().encode(), name) for name in CommandHeaders.__struct_encode_fields__)
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{0,200})?")


def headers_said(headers: Headers) -> CommandHeaders | None:
    """What the headers say, None if nothing. Raises MalformedRequest by the header's name."""
    sent = {}
    for raw, name in _HEADERS:
        if raw in headers:
            try:
                sent[name] = headers[raw].decode()
            except UnicodeDecodeError:
                raise MalformedRequest([{"pointer": name, "detail": "it is not UTF-8"}]) from None
    if not sent:
        return None
    key = sent.get("Idempotency-Key", "")
    if len(key) > 1 and key[0] == key[-1] == '"':
        sent["Idempotency-Key"] = key[1:-1]
    if not re.match(_IF_MATCH, sent.get("If-Match", "*")):
        # RFC 9110 s13.1.1 knows lists and weak tags too, but a command expects one version, which these do not say.
        detail = 'it is one ETag as it was given, such as "3", or *: no list, and no weak tag, which never matches'
        raise MalformedRequest([{"pointer": "If-Match", "detail": detail}])
    said = convert(sent, CommandHeaders)
    if said.traceparent is not UNSET and not _TRACEPARENT.fullmatch(said.traceparent):
        said.traceparent = UNSET  # W3C Trace Context s3.2.2.3: what cannot be parsed is not there
    return said


def agree(command: Command, field: str, value: Any, where: str) -> None:
    """Have `command` say `value`. Raises MalformedRequest if it says something else already."""
    own = getattr(command, field)
    if own is UNSET:
        setattr(command, field, value)
    elif own != value:
        detail = f"it is {own}, and {where} says {value}: make them agree, or send one of them"
        raise MalformedRequest([{"pointer": f"/{field}", "detail": detail}])


def apply(said: CommandHeaders, command: Command) -> None:
    if said.idempotency_key is not UNSET:
        agree(command, "command_id", said.idempotency_key, "the header Idempotency-Key")
    if said.if_match is not UNSET and said.if_match != "*":  # `*`: it exists, or the answer is 404 anyway
        agree(command, "expected_version", int(said.if_match[1:-1]), "the header If-Match")
    if said.correlation_id is not UNSET:
        agree(command, "correlation_id", said.correlation_id, "the header Correlation-Id")
    if said.causation_id is not UNSET:
        agree(command, "causation_id", said.causation_id, "the header Causation-Id")
