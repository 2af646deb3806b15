"""A receipt as its caller is answered: alone, as one of a list, and as what became of a command.

An answer is a pure function of the receipt, so the first answer and every replay of it are the same bytes; personal
values in it are opened last, and only for who may read them.
"""

from typing import Any

import msgspec
from msgspec import Struct

from api import resources
from api.http import Answer, Call, encode
from api.problems import MEDIA_TYPE, headers_of, problem
from ledger.erasure import Erasure
from ledger.errors import MunimentError
from ledger.receipt import Receipt
from ledger.replay import ANSWERED_AS_IT_IS
from ledger.values import Principal


class CommandAnswer(Struct, kw_only=True):
    """What became of one command. `positions` are those of its events; `body` is what its own route answers."""

    command_id: str
    type: str
    status: int
    positions: list[int]
    body: msgspec.Raw


class ItemAnswer(Struct, kw_only=True, omit_defaults=True):
    """What became of one command of a list. `command_id` is null where an item without one was not recorded."""

    command_id: str | None
    status: int
    replayed: bool
    positions: list[int]
    body: msgspec.Raw
    location: str | None = None
    etag: str | None = None


async def answer(call: Call, receipt: Receipt) -> Answer:
    """The answer that `receipt` is, whether it is the first or a replay."""
    body = await _body(call, receipt)
    if receipt.refusal is not None:
        shown = Answer(receipt.status, body, headers_of(receipt.refusal), MEDIA_TYPE)
    else:
        shown = Answer(receipt.status, body)
        if not isinstance(receipt.state, tuple):
            shown.headers.append((b"etag", resources.etag(receipt.state)))
        if receipt.status in (201, 202):
            shown.headers.append((b"location", resources.location(receipt.state)))
    position = receipt.positions[-1] if receipt.event_count else receipt.seen_position
    shown.headers += [(b"ledger-position", b"%d" % position), (b"command-id", receipt.command_id.encode())]
    if receipt.replayed:
        shown.headers.append((b"idempotent-replayed", b"true"))
    return shown


async def _body(call: Call, receipt: Receipt) -> bytes:
    """What `receipt` says: the target as it then was, or why not. Who asks again must still be a reader: Forbidden."""
    if receipt.refusal is not None:
        return encode(problem(receipt.refusal, remembered=True))
    if receipt.replayed:
        call.caller.require_reader("Reading the answer")
    return await resources.encode(call.api.vault, call.caller.project_id, receipt.state, await _beside(call, receipt))


async def _beside(call: Call, receipt: Receipt) -> dict[str, Any]:
    """What an answer has beside the state. Only who began a use is given its token."""
    state = receipt.state
    if receipt.type == ANSWERED_AS_IT_IS:
        return {"seconds_left": resources.seconds_left(state)}
    if isinstance(state, Erasure):
        (destroyed,) = await resources.destroyed(call.api.vault, call.caller.project_id, [state])
        return {"destroyed": destroyed}
    if receipt.type == "BeginUse" and Principal.of(call.caller.actor) == state.requester:
        return {"use_token": await call.api.signer.token(call.caller.project_id, state)}
    return {}


async def item_answer(call: Call, command_id: str | None, verdict: Receipt | MunimentError) -> ItemAnswer:
    if isinstance(verdict, MunimentError):
        body = msgspec.Raw(encode(problem(verdict)))
        return ItemAnswer(command_id=command_id, status=verdict.status, replayed=False, positions=[], body=body)
    shown = ItemAnswer(
        command_id=verdict.command_id,
        status=verdict.status,
        replayed=verdict.replayed,
        positions=list(verdict.positions),
        body=msgspec.Raw(),
    )
    try:
        shown.body = msgspec.Raw(await _body(call, verdict))
    except MunimentError as error:
        shown.status, shown.body = error.status, msgspec.Raw(encode(problem(error)))
        return shown
    if verdict.refusal is None and not isinstance(verdict.state, tuple):
        shown.etag = resources.etag(verdict.state).decode()
        if verdict.status == 201:
            shown.location = resources.location(verdict.state).decode()
    return shown
