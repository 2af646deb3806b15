"""Tasks over HTTP: submitting work, claiming it, keeping its lease, saying what came of it; and reading all that."""

import asyncio
from datetime import timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Request, route
from litestar.enums import HttpMethod
from litestar.types import Receive
from msgspec import UNSET, Meta, Struct, UnsetType

from api import resources
from api.commands import Asking, commanding, submit
from api.http import BODY_BYTES_MAX, Answer, Call, Operation, encode, gone
from api.reading import (
    SEEN,
    WAIT_SECONDS_MAX,
    Dated,
    DatedListing,
    NoParameters,
    Single,
    SingleHeaders,
    as_of,
    dated,
    fresh,
    given,
    head,
    knows,
    or_none,
    read_query,
    reading,
    seen,
    single,
)
from api.resources import HIDDEN, Claims
from ledger import errors, store
from ledger.commands import (
    LEASE_SECONDS,
    CancelTask,
    ClaimTasks,
    CompleteTask,
    FailTask,
    Kind,
    Moment,
    RedriveTask,
    Seconds,
    SubmitTask,
    SuspendTask,
)
from ledger.errors import LeaseLost, MalformedRequest, NotFound
from ledger.known import offer
from ledger.receipt import Receipt
from ledger.syntax import explain
from ledger.task import State, Task
from ledger.values import Line
from ledger.vault import Place
from projections import tasks
from projections.tasks import Attempt

KIND_CHARACTERS_MAX = 100


# Submitting


class RouteTask(SubmitTask, kw_only=True, tag=True):
    """Submit work for a role, whoever has it: a task of the kind `<role>.<kind>`."""

    role: Kind


async def _route(call: Call, asking: Asking, receive: Receive) -> Receipt:
    """The task is in the ledger; who takes it is for others to say: 202."""
    said = msgspec.structs.asdict(asking.command)
    kind = f"{said.pop('role')}.{said.pop('kind')}"
    if len(kind) > KIND_CHARACTERS_MAX:
        detail = f"with the role before it, it is over {KIND_CHARACTERS_MAX} characters"
        raise MalformedRequest([{"pointer": "/kind", "detail": detail}])
    receipt = await submit(call, asking._replace(command=SubmitTask(kind=kind, **said)), receive)
    return msgspec.structs.replace(receipt, status=202) if receipt.status == 201 else receipt


# Claiming


class ClaimQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """How long to wait for work."""

    wait_seconds: Annotated[
        int, Meta(ge=0, le=WAIT_SECONDS_MAX, description="Wait so long for work before nothing is the answer.")
    ] = 0


async def _claim(call: Call, asking: Asking, receive: Receive) -> Receipt:
    """What was claimed, at once or after a while. Who has gone away meanwhile claims nothing any more."""
    command, api = asking.command, call.api
    assert isinstance(command, ClaimTasks)
    kept = msgspec.structs.replace(command)  # what is submitted is taken apart
    loop = asyncio.get_running_loop()
    until = loop.time() + asking.query.wait_seconds
    receipt = await submit(call, asking, receive)
    if receipt.state != () or not asking.query.wait_seconds or command.kinds is UNSET or call.ledger_id is None:
        return receipt
    away = asyncio.create_task(gone(receive))
    try:
        while receipt.state == () and loop.time() < until and not (api.ending or away.done()):
            async with api.line.turn(call.ledger_id, offer(command), command.n, until, away) as called:
                if called:
                    again = asking._replace(command=msgspec.structs.replace(kept))
                    receipt = await submit(call, again, receive)
    finally:
        away.cancel()
    return receipt


# Keeping a lease


class Heartbeat(Struct, kw_only=True, forbid_unknown_fields=True):
    """The lease goes on for so long from now, never for less than it had left."""

    lease_id: UUID
    lease_seconds: Seconds = LEASE_SECONDS


_heartbeat = msgspec.json.Decoder(Heartbeat)

HEARTBEAT = Operation(
    tag="tasks",
    name="Heartbeat",
    doc="""Keep the lease of a task, which is no command and no event.

    Best every half lease. Once the lease is lost, what comes of the attempt has no effect any more.""",
    body=Heartbeat,
    answers={204: None},
    sends=("Ledger-Id",),
    refusals=(
        errors.MalformedRequest,
        errors.NumberOutOfRange,
        errors.Unauthenticated,
        errors.Forbidden,
        errors.UnknownProject,
        errors.BodyTooLarge,
        errors.UnsupportedMediaType,
        errors.NotFound,
        errors.LeaseLost,
        errors.StoreUnavailable,
        errors.ClockSkew,
    ),
)


@route(
    "/tasks/{task_id:str}/heartbeat",
    http_method=[HttpMethod.POST],
    name=HEARTBEAT.name,
    opt={"operation": HEARTBEAT},
)
async def keep_lease(request: Request[Any, Any, Any]) -> Answer:
    return await Call(request.scope).answer(lambda call: _keep_lease(call, request.receive))


async def _keep_lease(call: Call, receive: Receive) -> Answer:
    call.read_headers()
    sent = await call.read_body(receive, BODY_BYTES_MAX)
    await call.authenticate()
    call.require_json(sent)
    call.caller.require("agent", action="Heartbeat")
    read_query(call.scope["query_string"], NoParameters)
    task_id = call.path_id("task_id", "task")
    try:
        heartbeat = _heartbeat.decode(sent)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        explain(error, sent)
    ledger_id = await call.find_ledger()
    until, clock = None, call.api.committer.clock
    if ledger_id is not None:
        async with call.connection() as connection:
            if clock.stale:
                await clock.measure(connection)
            lease_until = clock.now() + timedelta(seconds=heartbeat.lease_seconds)
            holder = call.caller.actor.principal
            until = await store.heartbeat(connection, ledger_id, task_id, heartbeat.lease_id, holder, lease_until)
    if until is None:
        raise LeaseLost(id=task_id, lease_id=heartbeat.lease_id)
    return Answer(204)


# Reading


class DeadLetterQuery(DatedListing, kw_only=True, forbid_unknown_fields=True):
    """Which tasks, and which part of the list."""

    kind: Kind | UnsetType = UNSET
    session_id: UUID | UnsetType = UNSET
    since: Annotated[Moment, Meta(description="Submitted then or later.")] | UnsetType = UNSET
    until: Annotated[Moment, Meta(description="Submitted before.")] | UnsetType = UNSET
    order: Literal["asc", "desc"] = "desc"


class TaskQuery(DeadLetterQuery, kw_only=True, forbid_unknown_fields=True):
    """Which tasks, and which part of the list."""

    state: State | UnsetType = UNSET
    worker: Annotated[Line, Meta(description="Who has it in hand.")] | UnsetType = UNSET


class TaskPage(Struct, kw_only=True):
    """A part of a list of tasks; `next` leads on."""

    tasks: list[Task]
    next: str | None


class Attempts(Struct, kw_only=True):
    """Every attempt of a task, in order."""

    attempts: list[Attempt]
    next: None = None


async def _no_tasks(call: Call, query: DeadLetterQuery) -> Answer:
    return Answer(200, encode({"tasks": [], "next": None}))


async def _list(call: Call, query: DeadLetterQuery, wanted: tasks.Filter) -> Answer:
    part: dict[str, Any] = {"limit": query.limit, "after": or_none(query.after), "order": query.order}
    assert call.ledger_id is not None
    if (then := await as_of(call, query)) is not None:
        at = await knows(call, "tasks", then)
        headers, reached = dated(at, then), at.position
        async with call.connection() as connection:
            page = await tasks.search_past(connection, call.ledger_id, then, wanted, reached=reached, **part)
    else:
        headers = seen(await fresh(call, "tasks", query))
        async with call.connection() as connection:
            page = await tasks.search(connection, call.ledger_id, wanted, **part)
    shown = {
        "tasks": await resources.reveal(call.api.vault, call.caller.project_id, page.tasks),
        "next": None if page.next is None else str(page.next),
    }
    return Answer(200, encode(shown), headers)


@reading(
    "/tasks",
    tag="tasks",
    query=TaskQuery,
    answers={200: TaskPage},
    sends=SEEN,
    empty=_no_tasks,
)
async def list_tasks(call: Call, query: TaskQuery) -> Answer:
    """Tasks, the last submitted first unless `order` says otherwise."""
    return await _list(call, query, given(query, tasks.Filter))


@reading(
    "/dead-letters",
    tag="tasks",
    query=DeadLetterQuery,
    answers={200: TaskPage},
    sends=SEEN,
    empty=_no_tasks,
)
async def list_dead_letters(call: Call, query: DeadLetterQuery) -> Answer:
    """Tasks whose attempts are used up, or could not help; an operator may redrive them."""
    return await _list(call, query, msgspec.structs.replace(given(query, tasks.Filter), state="dead"))


@reading(
    "/tasks/{task_id:str}",
    tag="tasks",
    query=Single,
    headers=SingleHeaders,
    answers={200: Task, 304: None},
    sends=("Ledger-Position", "ETag"),
)
async def get_task(call: Call, query: Single) -> Answer:
    """One task, as it is now or was."""
    return await single(call, query, "task", tasks.get, then=await as_of(call, query))


@reading(
    "/tasks/{task_id:str}/attempts",
    tag="tasks",
    query=Dated,
    answers={200: Attempts},
    sends=("Ledger-Position",),
)
async def list_attempts(call: Call, query: Dated) -> Answer:
    """Every attempt of a task: who made it, and what came of it."""
    task_id, project_id = call.path_id("task_id", "task"), call.caller.project_id
    assert call.ledger_id is not None
    then = await as_of(call, query)
    position = then.position if then is not None else (await head(call, query, "tasks")).head
    async with call.connection() as connection:
        made = await tasks.attempts(connection, call.ledger_id, task_id, then)
    if made is None:
        raise NotFound(what="task", id=task_id)
    shown = [
        {name: value for name, value in msgspec.structs.asdict(attempt).items() if name not in HIDDEN[Attempt]}
        for attempt in made
    ]
    await resources.unseal(
        call.api.vault,
        project_id,
        [
            (item, "error", Place(project_id, task_id, attempt.error_version, attempt.error_event_id, "/data/error"))
            for item, attempt in zip(shown, made, strict=True)
            if attempt.error_event_id is not None and attempt.error_version is not None
        ],
    )
    return Answer(200, encode({"attempts": shown, "next": None}), [(b"ledger-position", b"%d" % position)])


ROUTES = [
    commanding("POST", "/tasks", SubmitTask),
    commanding("POST", "/tasks/route", RouteTask, submit=_route, answers={202: Task}),
    commanding("POST", "/tasks/claim", ClaimTasks, submit=_claim, query=ClaimQuery, answers={200: Claims}),
    list_tasks,
    get_task,
    list_attempts,
    keep_lease,
    commanding("POST", "/tasks/{task_id:str}/complete", CompleteTask, "task_id"),
    commanding("POST", "/tasks/{task_id:str}/fail", FailTask, "task_id"),
    commanding("POST", "/tasks/{task_id:str}/suspend", SuspendTask, "task_id"),
    commanding("POST", "/tasks/{task_id:str}/cancel", CancelTask, "task_id"),
    commanding("POST", "/tasks/{task_id:str}/redrive", RedriveTask, "task_id"),
    list_dead_letters,
]
