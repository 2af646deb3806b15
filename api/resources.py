"""A state as the resource that callers see: its body, its address, its ETag, its personal values.

The body of a session and of a record is a pure function of the state, here and nowhere else, so that an
answer, a replay of it, a read from a view and a read from the stream cannot differ. Sealed values are
opened last, and only for a caller who may read them.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias
from uuid import UUID

import msgspec

from ledger.record import RecordedFact
from ledger.session import Session
from ledger.vault import Place, Vault

Resource: TypeAlias = Session | RecordedFact

SEALED = b'"$sealed"'
ADDRESS: dict[type[Any], bytes] = {Session: b"/sessions", RecordedFact: b"/records"}

_encode = msgspec.json.Encoder().encode


def body(state: Resource) -> dict[str, Any]:
    """What is shown of `state`, personal values still sealed."""
    shown = msgspec.structs.asdict(state)
    if isinstance(state, Session):
        del shown["metadata_event_id"], shown["metadata_version"]
        shown["status"] = state.state
        shown["waiting_on"] = []
    return shown


def identity(state: Resource) -> UUID:
    return state.session_id if isinstance(state, Session) else state.record_id


def location(state: Resource) -> bytes:
    return b"%b/%b" % (ADDRESS[type(state)], str(identity(state)).encode())


def etag(state: Resource) -> bytes:
    return b'"%d"' % state.version


def _sealed_field(project_id: str, state: Resource) -> tuple[str, Place]:
    """The one field that may hold personal values, and the place they were sealed for."""
    if isinstance(state, Session):
        place = Place(project_id, state.session_id, state.metadata_version, state.metadata_event_id, "/data/metadata")
        return "metadata", place
    return "body", Place(project_id, state.record_id, 1, state.event_id, "/data/body")


async def encode(vault: Vault, project_id: str, state: Resource) -> bytes:
    """The body of `state` as JSON, readable."""
    encoded = _encode(body(state))
    if SEALED not in encoded:
        return encoded
    return _encode((await reveal(vault, project_id, [state]))[0])


async def reveal(vault: Vault, project_id: str, states: Sequence[Resource]) -> list[dict[str, Any]]:
    """The bodies of `states`, readable; all keys in one go. Raises BrokenSeal."""
    shown = [body(state) for state in states]
    if SEALED not in _encode(shown):
        return shown
    fields = [_sealed_field(project_id, state) for state in states]
    sealed = [(item[name], place) for item, (name, place) in zip(shown, fields, strict=True)]
    opened = await vault.unseal_all(project_id, sealed)
    for item, (name, _), value in zip(shown, fields, opened, strict=True):
        item[name] = value
    return shown
