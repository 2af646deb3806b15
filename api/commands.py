"""The one flow of every command: bytes -> command -> committer -> answer; and `/commands` itself.

A route says a method, a path and a command type (`commanding`); all else is shared. What a receipt is answered with
is in `receipts.py`. The order is SPEC's: body limit, authentication, then in the committer replay, authorization,
handling. Rules are never here.
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from litestar import Request, route
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler
from litestar.types import HTTPScope, Receive, Send
from msgspec import UNSET, Meta, Struct, UnsetType

from api.headers import CommandHeaders, agree, apply, headers_said
from api.http import (
    BATCH_BODY_BYTES_MAX,
    BODY_BYTES_MAX,
    Answer,
    Call,
    Operation,
    encode,
)
from api.idempotency import Asked
from api.reading import Fresh, NoParameters, head, read_query, reading
from api.receipts import CommandAnswer, ItemAnswer, answer, item_answers
from api.resources import Claims
from ledger import errors
from ledger.batch import RULES
from ledger.commands import COMMANDS, BeginUse, Command, CommandId
from ledger.entry import canonical
from ledger.errors import MalformedRequest, MunimentError, NotFound
from ledger.receipt import Receipt
from ledger.replay import ANSWERED_AS_IT_IS
from ledger.syntax import explain, read_command
from ledger.values import Line

COMMANDS_MAX = 1000

SENDS = ("Ledger-Id", "Ledger-Position", "Command-Id", "ETag", "Location", "Idempotent-Replayed")

REFUSALS = (
    errors.MalformedRequest,
    errors.NumberOutOfRange,
    errors.Unauthenticated,
    errors.Forbidden,
    errors.UnknownProject,
    errors.BodyTooLarge,
    errors.UnsupportedMediaType,
    errors.IdempotencyKeyReused,
    errors.PreconditionFailed,
    errors.NotFound,
    errors.AlreadyExists,
    errors.LeaseLost,
    errors.InvalidTransition,
    errors.OpenWork,
    errors.UnknownParent,
    errors.SessionFull,
    errors.RateLimited,
    errors.StoreUnavailable,
    errors.UpgradeRequired,
    errors.ClockSkew,
)
"""Everything that a command may be told instead of what it asked for."""

OF_APPROVALS = (
    errors.SelfApprovalForbidden,
    errors.NotEligible,
    errors.DigestMismatch,
    errors.AlreadyVoted,
    errors.ExecutionStarted,
    errors.UsesExhausted,
    errors.NotUsable,
    errors.RequestExpired,
)
"""And what it may be told besides, if it is about an approval."""

BESIDES = {"approval": OF_APPROVALS, "subject": (errors.Held,)}

UNCOPIED = ("ClaimTasks", ANSWERED_AS_IT_IS)
"""Whose second answer need not be the first: nothing was claimed then, or the approval has been decided since."""


class _Named(Struct):
    command_id: str | None = None


_items = msgspec.json.Decoder(list[msgspec.Raw])
_named = msgspec.json.Decoder(_Named)


class Asking(NamedTuple):
    """One command as it was read, what the headers say beside it, and the parameters of its address."""

    command: Command
    said: CommandHeaders | None
    query: Any


# Reading


def _read_list(body: bytes, said: CommandHeaders | None) -> list[msgspec.Raw]:
    """The items of a list of commands, each still to be read."""
    try:
        raws = _items.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        explain(error, body)
    if not 1 <= len(raws) <= COMMANDS_MAX:
        detail = f"a list has 1 to {COMMANDS_MAX} commands, and this has {len(raws)}"
        raise MalformedRequest([{"pointer": "", "detail": detail}])
    if said is not None and (said.idempotency_key is not UNSET or said.if_match is not UNSET):
        name = "If-Match" if said.idempotency_key is UNSET else "Idempotency-Key"
        detail = "it is for one command; in a list each item says its own `command_id` and `expected_version`"
        raise MalformedRequest([{"pointer": name, "detail": detail}])
    return raws


def _read_item(
    raw: msgspec.Raw, said: CommandHeaders | None, named: type[Command] | None
) -> Command | MalformedRequest:
    try:
        command = read_command(raw, named)
    except MalformedRequest as error:
        return error
    if said is not None and command.correlation_id is UNSET:
        command.correlation_id = said.correlation_id
    if said is not None and command.causation_id is UNSET:
        command.causation_id = said.causation_id
    return command


def _command_id(item: Command | MalformedRequest, raw: msgspec.Raw) -> str | None:
    """What its sender calls an item, as far as that can be read."""
    if isinstance(item, Command):
        return None if item.command_id is UNSET else item.command_id
    try:
        return _named.decode(raw).command_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


# Submitting


async def _submit(
    call: Call, commands: Sequence[Command], said: CommandHeaders | None
) -> list[Receipt | MunimentError]:
    """What became of each, in order; from the copy where it is known there."""
    api, caller = call.api, call.caller
    traceparent = None if said is None or said.traceparent is UNSET else said.traceparent
    if any(isinstance(command, BeginUse) for command in commands):
        await api.signer.open()
    copy = api.copy
    if copy is None or await call.find_ledger() is None or all(c.command_id is UNSET for c in commands):
        verdicts = await api.committer.submit_all(caller.project_id, commands, caller.actor, traceparent=traceparent)
        await call.find_ledger()
        return verdicts
    await api.vault.open(caller.project_id)
    asked = {index: _asked(call, c) for index, c in enumerate(commands) if c.command_id is not UNSET}
    copied = dict(zip(asked, await copy.find(list(asked.values())), strict=True))
    rest = [c for index, c in enumerate(commands) if copied.get(index) is None]
    decided = await api.committer.submit_all(caller.project_id, rest, caller.actor, traceparent=traceparent)
    answers = iter(decided)
    verdicts = [copied.get(index) or next(answers) for index in range(len(commands))]
    for index, one in asked.items():
        verdict = verdicts[index]
        if isinstance(verdict, Receipt) and copied[index] is None and verdict.type not in UNCOPIED:
            copy.keep(one, verdict)
    return verdicts


def _asked(call: Call, command: Command) -> Asked:
    assert call.ledger_id is not None
    assert command.command_id is not UNSET
    plain = msgspec.structs.replace(command, command_id=UNSET, expected_version=UNSET)
    project_id = call.caller.project_id
    fingerprint = call.api.vault.fingerprint(project_id, canonical(plain))
    return Asked(project_id, call.ledger_id, call.caller.actor.principal, command.command_id, fingerprint)


def _read_one(call: Call, body: bytes, submission: "Submission") -> Asking:
    named, target = submission.named, submission.target
    query = read_query(call.scope["query_string"], submission.query)
    said = headers_said(call.headers)
    if said is not None and said.idempotency_key is not UNSET:
        call.command_id = said.idempotency_key
    command = read_command(body or b"{}", named)
    if target is not None:
        agree(command, target, call.path_id(target, command.stream_type), "the path")
    if said is not None:
        apply(said, command)
    if command.command_id is not UNSET:
        call.command_id = command.command_id
    return Asking(command, said, query)


Submit = Callable[[Call, Asking, Receive], Awaitable[Receipt]]


async def submit(call: Call, asking: Asking, receive: Receive) -> Receipt:
    """What became of it. Raises the error that left no trace."""
    (verdict,) = await _submit(call, [asking.command], asking.said)
    if isinstance(verdict, MunimentError):
        raise verdict
    return verdict


async def _many(call: Call, body: bytes, named: type[Command] | None) -> Answer:
    read_query(call.scope["query_string"], NoParameters)
    said = headers_said(call.headers)
    raws = _read_list(body, said)
    items = [_read_item(raw, said, named) for raw in raws]
    ids = [_command_id(item, raw) for item, raw in zip(items, raws, strict=True)]
    verdicts = iter(await _submit(call, [item for item in items if isinstance(item, Command)], said))
    found = [item if isinstance(item, MunimentError) else next(verdicts) for item in items]
    answers = await item_answers(call, ids, found)
    return Answer(201 if named and all(item.status == 201 for item in answers) else 200, encode(answers))


# Routes


class Submission(Struct, frozen=True):
    """The shared flow, as an ASGI application: what `api.app` gives requests whose address is the route's own.

    `named`: the type that the route says, if it is not the body that says it; `target`: the path parameter that
    is its target; `listed`: whether a list may come too; `submit`: what this route does with one command.
    """

    named: type[Command] | None
    target: str | None = None
    listed: bool = False
    submit: Submit = submit
    query: type[Struct] = NoParameters

    async def __call__(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        answer = await self.answer(scope, receive)
        await answer(scope, receive, send)

    def answer(self, scope: HTTPScope, receive: Receive) -> Awaitable[Answer]:
        return Call(scope).answer(lambda call: self._take(call, receive))

    async def _take(self, call: Call, receive: Receive) -> Answer:
        call.read_headers()
        body = await call.read_body(receive, BATCH_BODY_BYTES_MAX if self.listed else BODY_BYTES_MAX)
        await call.authenticate()
        call.require_json(body)
        if self.listed and body.lstrip(b" \t\r\n")[:1] == b"[":
            return await _many(call, body, self.named)
        return await answer(call, await self.submit(call, _read_one(call, body, self), receive))

    def route(self, method: str, path: str, operation: Operation) -> HTTPRouteHandler:
        async def handler(request: Request[Any, Any, Any]) -> Answer:
            return await self.answer(request.scope, request.receive)

        opt = {"operation": operation, "submission": self}
        # Every answer has its own status; but by Litestar's default for DELETE none would have a body.
        return route(path, http_method=[HttpMethod(method)], name=operation.name, opt=opt, status_code=200)(handler)


def commanding(
    method: Literal["POST", "PUT", "DELETE"],
    path: str,
    command: type[Command],
    target: str | None = None,
    *,
    listed: bool = False,
    submit: Submit = submit,
    query: type[Struct] = NoParameters,
    answers: dict[int, Any] | None = None,
) -> HTTPRouteHandler:
    """The route that gives one type of command; `target` names the path parameter that is its target. `answers` are
    by status what it answers, if that is not the target."""
    if answers is None:
        state = RULES[command.stream_type][1]
        answers = {201 if command.creates else 200: (state, list[ItemAnswer]) if listed else state}
        if listed:
            answers[200] = list[ItemAnswer]
    operation = Operation(
        tag=f"{command.stream_type}s",
        name=command.__name__,
        doc=command.__doc__ or "",
        query=None if query is NoParameters else query,
        headers=CommandHeaders,
        body=command,
        items_max=COMMANDS_MAX if listed else 0,
        sends=SENDS,
        body_required=any(field.required for field in msgspec.structs.fields(command)),
        answers=answers,
        refusals=(*REFUSALS, *BESIDES.get(command.stream_type, ())),
    )

    return Submission(command, target, listed, submit, query).route(method, path, operation)


_ANY: Any = reduce(or_, COMMANDS)
_STATES = tuple(state for _, state in RULES.values())

ANY_COMMAND = Operation(
    tag="commands",
    name="SubmitCommands",
    doc="""Any command, or a list of 1 to 1,000.

    One command is answered as its own route would answer it. A list is answered by a list in the same order;
    its items are decided in order and see each other's effects, and each is recorded, or refused, by itself.""",
    headers=CommandHeaders,
    body=_ANY,
    items_max=COMMANDS_MAX,
    sends=SENDS,
    answers={201: _STATES, 200: (*_STATES, Claims, list[ItemAnswer])},
    refusals=(*REFUSALS, *OF_APPROVALS),
)


class CommandQuery(Fresh, kw_only=True, forbid_unknown_fields=True):
    """Whose command it was."""

    principal: (
        Annotated[Line, Meta(description="Whose command, as `issuer#sub`; for auditors and operators.")] | UnsetType
    ) = UNSET


@reading(
    "/commands/{command_id:str}",
    tag="commands",
    query=CommandQuery,
    answers={200: CommandAnswer},
    sends=("Ledger-Position",),
)
async def get_command(call: Call, query: CommandQuery) -> Answer:
    """What became of a command of yours."""
    own = call.caller.actor.principal
    principal = own if query.principal is UNSET else query.principal
    if principal != own:
        call.caller.require("auditor", "operator", action="Reading what others commanded")
    command_id = call.scope["path_params"]["command_id"]
    at = await head(call, query, "audit")
    try:
        command_id = msgspec.convert(command_id, CommandId)
    except msgspec.ValidationError:
        raise NotFound(what="command", id=command_id[:255]) from None  # no command can have it
    receipt = await call.api.committer.receipt(call.caller.project_id, principal, command_id)
    if receipt is None:
        raise NotFound(what="command", id=command_id)
    shown = await answer(call, receipt)
    became = CommandAnswer(
        command_id=receipt.command_id,
        type=receipt.type,
        status=receipt.status,
        positions=list(receipt.positions),
        body=msgspec.Raw(shown.body),
    )
    return Answer(200, encode(became), [(b"ledger-position", b"%d" % at.head)])


ROUTES = [Submission(None, listed=True).route("POST", "/commands", ANY_COMMAND), get_command]
