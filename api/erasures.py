"""Erasing subjects over HTTP, and the holds that prevent it: operators command them, auditors read them as well.

An erasure is answered once it is done. Its event comes before that: dying in between leaves it to a worker. A subject
is named by the caller's id where something is asked, and shown by its pseudonym everywhere. There is no view of these:
what the audit view finds is folded from its streams.
"""

from collections.abc import Sequence
from typing import Any, Literal
from uuid import UUID

from litestar.types import Receive
from msgspec import UNSET, Struct, UnsetType

from api import commands, resources
from api.commands import Asking, commanding
from api.events import Listed, Page, find
from api.http import Answer, Call, encode
from api.reading import SEEN, Fresh, Limit, fresh, head, reading, replay, seen
from ledger import erasure, store
from ledger.entry import Event
from ledger.erasure import Erasure
from ledger.errors import NotFound
from ledger.hold import Hold, in_force
from ledger.receipt import Receipt
from ledger.replay import fold_all
from ledger.subjects import EraseSubject, PlaceHold, ReleaseHold, Subject, stream_of
from ledger.values import stamp
from projections import audit


class SubjectQuery(Listed, kw_only=True, forbid_unknown_fields=True):
    """Whose, and which part of the list."""

    subject: Subject | UnsetType = UNSET
    limit: Limit = 50
    order: Literal["asc", "desc"] = "desc"


class ErasurePage(Struct, kw_only=True):
    """A part of a list of erasures; `next` leads on."""

    erasures: list[Erasure]
    next: str | None


class HoldPage(Struct, kw_only=True):
    """A part of a list of holds; `next` leads on."""

    holds: list[Hold]
    next: str | None


async def _erase(call: Call, asking: Asking, receive: Receive) -> Receipt:
    """First on record, then done, then answered; a replay makes sure that it was done."""
    receipt = await commands.submit(call, asking, receive)
    if receipt.refusal is None:
        await call.api.vault.destroy(call.caller.project_id, {receipt.state.subject: receipt.state.through})
    return receipt


async def _no_erasures(call: Call, query: SubjectQuery) -> Answer:
    _require_reader(call)
    return Answer(200, encode({"erasures": [], "next": None}))


@reading("/erasures", tag="subjects", query=SubjectQuery, answers={200: ErasurePage}, sends=SEEN, empty=_no_erasures)
async def list_erasures(call: Call, query: SubjectQuery) -> Answer:
    """Erasures, newest first unless `order` says otherwise.

    For operators and auditors."""
    _require_reader(call)
    subject = await _pseudonym(call, query)
    at = await fresh(call, "audit", query)
    wanted = audit.Filter(type="SubjectErased", stream=stream_of(subject) if subject else None)
    page = await find(call, query, wanted)
    erasures = [erasure.evolve(None, event) for event in await _events(call, page)]
    destroyed = await resources.destroyed(call.api.vault, call.caller.project_id, erasures)
    shown = [resources.body(one) | {"destroyed": gone} for one, gone in zip(erasures, destroyed, strict=True)]
    return Answer(200, encode({"erasures": shown, "next": _next(page)}), seen(at))


@reading(
    "/erasures/{subject:str}", tag="subjects", query=Fresh, answers={200: Erasure}, sends=("Ledger-Position", "ETag")
)
async def get_erasure(call: Call, query: Fresh) -> Answer:
    """The last erasure of a subject, which is named by its pseudonym.

    For operators and auditors."""
    _require_reader(call)
    subject = call.scope["path_params"]["subject"]
    state, headers = await _one(call, query, "subject", stream_of(subject), subject)
    (destroyed,) = await resources.destroyed(call.api.vault, call.caller.project_id, [state])
    return Answer(200, encode(resources.body(state) | {"destroyed": destroyed}), headers)


async def _no_holds(call: Call, query: SubjectQuery) -> Answer:
    _require_reader(call)
    return Answer(200, encode({"holds": [], "next": None}))


@reading("/holds", tag="holds", query=SubjectQuery, answers={200: HoldPage}, sends=SEEN, empty=_no_holds)
async def list_holds(call: Call, query: SubjectQuery) -> Answer:
    """Holds, newest first unless `order` says otherwise.

    For operators and auditors."""
    _require_reader(call)
    subject = await _pseudonym(call, query)
    at = await fresh(call, "audit", query)
    page = await find(call, query, audit.Filter(type="HoldPlaced", q=subject))
    placed = [event.stream_id for event in await _events(call, page)]
    assert call.ledger_id is not None
    async with call.connection() as connection:
        holds = fold_all(await store.read_streams(connection, call.ledger_id, placed))
    shown = [_shown(call, holds[hold_id]) for hold_id in placed]
    return Answer(200, encode({"holds": shown, "next": _next(page)}), seen(at))


@reading("/holds/{hold_id:str}", tag="holds", query=Fresh, answers={200: Hold}, sends=("Ledger-Position", "ETag"))
async def get_hold(call: Call, query: Fresh) -> Answer:
    """One hold.

    For operators and auditors."""
    _require_reader(call)
    hold_id = call.path_id("hold_id", "hold")
    state, headers = await _one(call, query, "hold", hold_id, str(hold_id))
    return Answer(200, encode(_shown(call, state)), headers)


def _require_reader(call: Call) -> None:
    call.caller.require("auditor", "operator", action="Reading erasures and holds")


def _shown(call: Call, hold: Hold) -> dict[str, Any]:
    return resources.body(hold) | {"in_force": in_force(hold, stamp(call.api.committer.clock.now()))}


async def _pseudonym(call: Call, query: SubjectQuery) -> str | None:
    if query.subject is UNSET:
        return None
    await call.api.vault.open(call.caller.project_id)
    return call.api.vault.pseudonym(call.caller.project_id, query.subject)


async def _one(
    call: Call, query: Fresh, what: str, stream_id: UUID, name: str
) -> tuple[Any, list[tuple[bytes, bytes]]]:
    """The state of a stream, and what the headers say of it. Raises NotFound."""
    at = await head(call, query, "audit")
    assert call.ledger_id is not None
    async with call.connection() as connection:
        state = await replay(connection, call.ledger_id, what, stream_id)
    if state is None:
        raise NotFound(what="erasure of" if what == "subject" else what, id=name[:100])
    return state, [(b"etag", resources.etag(state)), (b"ledger-position", b"%d" % at.head)]


async def _events(call: Call, page: Page) -> Sequence[Event[Any]]:
    assert call.ledger_id is not None
    async with call.connection() as connection:
        stored = await store.read_positions(connection, call.ledger_id, page.positions)
    events = {row.position: row.decode().event for row in stored}
    return [events[position] for position in page.positions]


def _next(page: Page) -> str | None:
    return str(page.positions[-1]) if page.more else None


ROUTES = [
    commanding("POST", "/erasures", EraseSubject, submit=_erase),
    list_erasures,
    get_erasure,
    commanding("POST", "/holds", PlaceHold),
    commanding("POST", "/holds/{hold_id:str}/release", ReleaseHold, "hold_id"),
    list_holds,
    get_hold,
]
