"""Views over HTTP, for operators of the project `operators`: how they do, what proves them, and what is asked of them.

To ask is a command like any other, and its event is in that project's ledger; a worker does what was asked, and says
there what came of it. In any other project there is none of this. This process only reads what workers keep.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
from litestar.types import Receive
from msgspec import Struct

from api import commands, resources
from api.commands import Asking, commanding
from api.headers import agree
from api.http import Answer, Call, encode
from api.reading import NoParameters, reading
from ledger.errors import NotFound
from ledger.operations import OPERATORS, CancelRebuild, OfView, RebuildView, RollBackView, VerifyView
from ledger.receipt import Receipt
from ledger.values import Stamp, stamp
from ledger.view import Request, State, View
from projections import VIEWS, health, proof, rebuild
from projections.proof import Proof
from projections.rebuild import UNDER_WAY, Progress, Rebuild, next_of
from projections.requests import views
from projections.verify import Drift

PROOFS_MAX = 100
"""Projects in which a view is told with what was last found of it, those where it differs first: all are counted."""


class ParkedPart(Struct, kw_only=True):
    """A project's part of a view, which is stopped before an event that it cannot take."""

    project_id: str
    position: int
    type: str | None
    since: Stamp
    reason: str


class Stated(Struct, kw_only=True):
    """What a view says of itself in one project, as it was last verified. `drifted` counts the values that are not what
    a replay makes, and `drifts` are some of them."""

    project_id: str
    ledger_id: UUID
    position: int
    code_version: str
    digest: str
    holds: bool
    statement: str
    drifted: int
    drifts: list[Drift]
    verified_at: Stamp


class Build(Struct, kw_only=True):
    """The latest rebuild of a view. While it is under way, how far it is, and what that will still take at the pace
    that it has had."""

    state: str
    asked_by: str
    reason: str
    began_at: Stamp
    ended_at: Stamp | None
    ended_because: str | None
    code_version: str | None
    heads_digest: str | None
    rows: int | None
    digest: str | None
    events_done: int | None
    events_total: int | None
    events_per_second: float | None
    eta_seconds: float | None


class Projection(Struct, kw_only=True):
    """A view. `state` is what operators made of it, and what they may make of it depends on that; `health` is how it
    does: running, degraded or stopped. `build_version` is that of what is read: until a release has built another, it
    may be older than the `release_version` of this process. Of its projects, `proven` were verified, and in
    `differing` it was not right."""

    view: str
    state: State
    requests: list[Request]
    keeps_replaced: bool
    version: int
    updated_at: Stamp | None
    build_version: int
    release_version: int
    health: str
    lag_events: int
    lag_seconds: float
    parked: list[ParkedPart]
    rebuild: Build | None
    proven: int
    differing: int
    proofs: list[Stated]


class Projections(Struct, kw_only=True):
    """Every view there is."""

    projections: list[Projection]
    next: None = None


async def _list(call: Call, query: NoParameters) -> Answer:
    """As `list_projections`, of a deployment whose operators never asked for anything."""
    _require_operator(call)
    return Answer(200, encode({"projections": (await _shown(call, list(VIEWS)))[1], "next": None}))


async def _get(call: Call, query: NoParameters) -> Answer:
    _require_operator(call)
    return Answer(200, encode((await _shown(call, [_named(call)]))[1][0]))


@reading("/projections", tag="views", answers={200: Projections}, sends=("Ledger-Position",), empty=_list)
async def list_projections(call: Call, query: NoParameters) -> Answer:
    """Every view: how it does, what proves it, what was asked of it, and its rebuild.

    For operators of the project `operators`."""
    _require_operator(call)
    position, shown = await _shown(call, list(VIEWS))
    return Answer(200, encode({"projections": shown, "next": None}), [(b"ledger-position", b"%d" % position)])


@reading(
    "/projections/{view:str}", tag="views", answers={200: Projection}, sends=("Ledger-Position", "ETag"), empty=_get
)
async def get_projection(call: Call, query: NoParameters) -> Answer:
    """One view, as it is now.

    For operators of the project `operators`."""
    _require_operator(call)
    position, (shown,) = await _shown(call, [_named(call)])
    headers = [(b"ledger-position", b"%d" % position)]
    if shown["version"]:  # what nobody asked anything of has no version that a command could expect
        headers.append((b"etag", b'"%d"' % shown["version"]))
    return Answer(200, encode(shown), headers)


def _require_operator(call: Call) -> None:
    """Raises NotFound in any other project, and Forbidden in this one."""
    if call.caller.project_id != OPERATORS:
        raise NotFound(what="projection", id=call.scope["path_params"].get("view", "")[:100])
    call.caller.require("operator", action="Reading projections")


def _named(call: Call) -> str:
    """The view in the path. Raises NotFound, in any other project too."""
    name: str = call.scope["path_params"]["view"]
    if call.caller.project_id != OPERATORS or name not in VIEWS:
        raise NotFound(what="projection", id=name[:100])
    return name


async def _shown(call: Call, names: Sequence[str]) -> tuple[int, list[dict[str, Any]]]:
    """These views as they are shown, and how far the operators' ledger was read for that."""
    async with call.connection() as connection:
        position, states = await views(connection)
        healths = await health(connection, names)
        builds = {one.view: one for one in await rebuild.latest(connection)}
        progress, built_as = await rebuild.progress(connection), await rebuild.versions(connection)
        parked = await rebuild.parked(connection)
        proofs = await proof.latest(connection, names)
    shown = await resources.reveal(call.api.vault, OPERATORS, [states[name] for name in names])
    for item, name in zip(shown, names, strict=True):
        does, build = healths[name], builds.get(name)
        item |= {"health": does.state, "lag_events": does.lag_events, "lag_seconds": does.lag_seconds}
        item |= {"build_version": built_as.get(name, 0), "release_version": VIEWS[name].VERSION}
        item["parked"] = [_parked(one) for one in parked if one.view == name]
        item["rebuild"] = _build(build, progress) if build else None
        item |= _proven([one for one in proofs if one.verdict.view == name])
    return position, shown


def _parked(part: rebuild.Parked) -> ParkedPart:
    told = {name: getattr(part, name) for name in ("project_id", "position", "type", "reason")}
    return ParkedPart(**told, since=stamp(part.since))


def _build(build: Rebuild, progress: dict[str, Progress]) -> Build:
    told = {name: getattr(build, name) for name in ("state", "asked_by", "reason", "ended_because", "code_version")}
    done = total = pace = left = None
    if build.state in UNDER_WAY:
        begun = progress.get(next_of(build.view), Progress())
        done, total = begun.taken, max(begun.total, progress.get(build.view, Progress()).total)
        pace = done / max((datetime.now(UTC) - build.began_at).total_seconds(), 0.001)
        left = (total - done) / pace if done else None
    return Build(
        **told,
        began_at=stamp(build.began_at),
        ended_at=stamp(build.ended_at) if build.ended_at else None,
        heads_digest=build.heads_digest,
        rows=build.rows_compared,
        digest=build.digest,
        events_done=done,
        events_total=total,
        events_per_second=None if pace is None else round(pace, 1),
        eta_seconds=None if left is None else round(left, 1),
    )


def _proven(proofs: list[Proof]) -> dict[str, Any]:
    differing = [one for one in proofs if not one.verdict.holds]
    told = (differing + [one for one in proofs if one.verdict.holds])[:PROOFS_MAX]
    return {"proven": len(proofs), "differing": len(differing), "proofs": [_stated(one) for one in told]}


def _stated(proof: Proof) -> Stated:
    found = proof.verdict
    names = ("project_id", "ledger_id", "position", "code_version", "digest", "holds", "drifted", "drifts")
    return Stated(
        **{name: getattr(found, name) for name in names},
        statement=f"I am {found.statement}",
        verified_at=stamp(proof.verified_at),
    )


# Asking


async def _ask(call: Call, asking: Asking, receive: Receive) -> Receipt:
    """It is on record; a worker does it: 202. Nothing new, for it was asked for already: 200."""
    assert isinstance(asking.command, OfView)
    agree(asking.command, "view", _named(call), "the path")
    receipt = await commands.submit(call, asking, receive)
    return msgspec.structs.replace(receipt, status=202) if receipt.status == 200 and receipt.event_count else receipt


ROUTES = [
    list_projections,
    get_projection,
    *(
        commanding("POST", f"/projections/{{view:str}}/{verb}", command, submit=_ask, answers={200: View, 202: View})
        for verb, command in (
            ("rebuild", RebuildView),
            ("cancel", CancelRebuild),
            ("rollback", RollBackView),
            ("verify", VerifyView),
        )
    ),
]
