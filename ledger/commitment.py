"""What an approval commits to: the action that will run, and the question as people see it.

A digest is SHA-256 over a salt and the RFC 8785 form of plain fields, so whoever may read an approval comes to the
same one, in any language. A `$personal` mark is taken out first: what it marks stands in its place. Salts come from a
key of the project and the approval's id: they are as secret as where they are kept, and can always be made again.
"""

from hashlib import sha256
from typing import Any
from uuid import UUID

import msgspec
import rfc8785

from ledger.personal import PERSONAL
from ledger.queue import World
from ledger.values import Action


def plain(value: Any, subjects: list[str]) -> Any:
    """`value` without its marks; whose the marked values are is added to `subjects`."""
    if isinstance(value, dict):
        if PERSONAL in value:
            subjects.append(value[PERSONAL]["subject"])
            return value[PERSONAL]["value"]
        return {name: plain(part, subjects) for name, part in value.items()}
    if isinstance(value, list):
        return [plain(part, subjects) for part in value]
    return value


def salt(of: str, approval_id: UUID, world: World) -> bytes:
    """The salt `of` the action or the request of this approval."""
    return world.keyed(b"approval salt %b\0%b" % (of.encode(), approval_id.bytes))


def digest(salt: bytes, fields: Any) -> str:
    """The commitment to plain fields."""
    return f"sha256:{sha256(salt + rfc8785.dumps(fields)).hexdigest()}"


def action_digest(action: Action, approval_id: UUID, world: World) -> str:
    """The commitment of this approval to `action`, marked or not."""
    return digest(salt("action", approval_id, world), plain(msgspec.to_builtins(action), []))


def match(session_id: UUID | None, call_key: str, action: Action, world: World) -> bytes:
    """What requests for the same have in common, and nobody without the project's key can make."""
    same = [str(session_id) if session_id else None, call_key, plain(msgspec.to_builtins(action), [])]
    return world.keyed(b"approval match\0" + rfc8785.dumps(same))
