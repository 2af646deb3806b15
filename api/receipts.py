"""A receipt as its caller is answered: alone, as one of a list, and as what became of a command.

An answer is a pure function of the receipt, so the first answer and every replay of it are the same bytes; personal
values in it are opened last, and only for who may read them.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from api import resources
from api.http import Answer, Call, encode
from api.problems import MEDIA_TYPE, headers_of, problem
from api.resources import Draft
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
    drafted = await _draft(call, receipt)
    await resources.unseal(call.api.vault, call.caller.project_id, drafted.sealed)
    body = drafted.readable()
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


async def _draft(call: Call, receipt: Receipt) -> Draft:
    """What `receipt` says: the target as it then was, or why not. Who asks again must still be a reader: Forbidden."""
    if receipt.refusal is not None:
        return Draft(encode(problem(receipt.refusal, remembered=True)))
    if receipt.replayed:
        call.caller.require_reader("Reading the answer")
    return resources.draft(call.caller.project_id, receipt.state, await _beside(call, receipt))


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


async def item_answers(
    call: Call, ids: Sequence[str | None], verdicts: Sequence[Receipt | MunimentError]
) -> list[ItemAnswer]:
    """What became of each command of a list. All that is sealed in them is opened in one go."""
    drafts = [await _item_draft(call, verdict) for verdict in verdicts]
    sealed = [field for one in drafts if isinstance(one, Draft) for field in one.sealed]
    unread: MunimentError | None = None
    try:
        await resources.unseal(call.api.vault, call.caller.project_id, sealed)
    except MunimentError as error:
        unread = error  # without the keys: the others are answered
    return [
        _item(command_id, verdict, unread if unread and isinstance(one, Draft) and one.sealed else one)
        for command_id, verdict, one in zip(ids, verdicts, drafts, strict=True)
    ]


async def _item_draft(call: Call, verdict: Receipt | MunimentError) -> Draft | MunimentError:
    if isinstance(verdict, MunimentError):
        return verdict
    try:
        return await _draft(call, verdict)
    except MunimentError as error:
        return error


def _item(command_id: str | None, verdict: Receipt | MunimentError, told: Draft | MunimentError) -> ItemAnswer:
    """`told` is its body, or why that cannot be told."""
    body = msgspec.Raw(told.readable() if isinstance(told, Draft) else encode(problem(told)))
    if isinstance(verdict, MunimentError):
        return ItemAnswer(command_id=command_id, status=verdict.status, replayed=False, positions=[], body=body)
    shown = ItemAnswer(
        command_id=verdict.command_id,
        status=verdict.status if isinstance(told, Draft) else told.status,
        replayed=verdict.replayed,
        positions=list(verdict.positions),
        body=body,
    )
    if isinstance(told, Draft) and verdict.refusal is None and not isinstance(verdict.state, tuple):
        shown.etag = resources.etag(verdict.state).decode()
        if verdict.status == 201:
            shown.location = resources.location(verdict.state).decode()
    return shown
