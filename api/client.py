"""The Python client: commands in, answers out, over HTTP.

Every command has an id before it is first sent, made here (UUIDv7) unless the caller gave one. Whatever
is lost on the way is sent again under the same id, so a command happens once however often it is sent;
an answer that is final is never asked for again. What goes wrong is raised as the class of `ledger.errors`
that the server raised. The server's own parts are never imported here: this is how others see it.
"""

import asyncio
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, cast
from urllib.parse import quote
from uuid import UUID

import msgspec

from api.answers import Answer, answers_to, encoded
from api.wire import PAUSE_SECONDS, Json, Wire, decoded
from api.work import Work
from ledger.commands import (
    LEASE_SECONDS,
    AnnotateSession,
    BeginUse,
    CancelApproval,
    CancelSession,
    CancelTask,
    CastVote,
    ChangeSession,
    ClaimTasks,
    Command,
    CompleteTask,
    EditApproval,
    FailTask,
    OpenSession,
    PresentApproval,
    Record,
    RecordOutcome,
    RedriveTask,
    RequestApproval,
    RevokeApproval,
    SubmitTask,
    SuspendTask,
    WithdrawApproval,
    WithdrawVote,
)
from ledger.subjects import EraseSubject, PlaceHold, ReleaseHold
from ledger.values import Action

PAGE_ITEMS_MAX = 200
PAGE_EVENTS_MAX = 1000
WAIT_TIMEOUT_SECONDS = 30.0
CHANGE_WAIT_SECONDS = 50
OPEN_TASK = ("queued", "running", "waiting", "retrying")

_objects = msgspec.json.Decoder(Json)


class Client:
    """A connection to one Muniment server as the caller whom `token` names. An async context manager.

    `patience_seconds` bounds how long one call keeps trying while the server cannot be reached, answers
    503, or asks to slow down (429); then it raises what it was last told. Nothing else is tried again.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        patience_seconds: float = 60.0,
        timeout_seconds: float = 30.0,
        connections_max: int = 32,
    ) -> None:
        self._wire = Wire(
            url,
            token,
            patience_seconds=patience_seconds,
            timeout_seconds=timeout_seconds,
            connections_max=connections_max,
        )

    @property
    def url(self) -> str:
        return self._wire.url

    @property
    def ledger_id(self) -> str | None:
        """The ledger that answered last. If it changes, positions have started again."""
        return self._wire.ledger_id

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._wire.close()

    # Commands

    async def command(self, command: Command) -> Answer:
        """Give one command; raises its refusal.

        A command without an id is given one and keeps it: giving the same object again, after an error,
        cannot make it happen twice.
        """
        (answer,) = await self.send([command])
        if answer.error:
            raise answer.error
        return answer

    async def send(self, commands: Iterable[Command]) -> list[Answer]:
        """Give many commands in order, in as few requests as they fit in; an answer for each, in order.

        A refused command does not stop the others and is not raised: look at `answer.error`. From the
        first one that could not be decided yet (429, 503) all are sent again, so their order holds.
        """
        return await answers_to(self._wire, commands)

    async def open_session(self, agent_role: str, **fields: Any) -> Answer:
        """Open a session; `fields` are those of `OpenSession`."""
        return await self.command(OpenSession(agent_role=agent_role, **fields))

    async def change_session(self, session_id: UUID, **fields: Any) -> Answer:
        """Change a session's status, work or metadata; `fields` are those of `ChangeSession`."""
        return await self.command(ChangeSession(session_id=session_id, **fields))

    async def cancel(self, session_id: UUID, **fields: Any) -> Answer:
        """Cancel a session; `fields` are those of `CancelSession`."""
        return await self.command(CancelSession(session_id=session_id, **fields))

    async def annotate(self, session_id: UUID, text: str | Json, **fields: Any) -> Answer:
        """Add a remark to a session; `text` may be a `$personal` value."""
        return await self.command(AnnotateSession(session_id=session_id, text=text, **fields))  # type: ignore[arg-type]

    async def record(self, kind: str, **fields: Any) -> Answer:
        """Record a fact; `fields` are those of `Record`."""
        return await self.command(Record(kind=kind, **fields))

    async def submit_task(self, kind: str, **fields: Any) -> Answer:
        """Submit work; `fields` are those of `SubmitTask`."""
        return await self.command(SubmitTask(kind=kind, **fields))

    async def route_task(self, role: str, kind: str, **fields: Any) -> Answer:
        """Submit work for a role, whoever has it: a task of the kind `<role>.<kind>`."""
        return await self.submit_task(f"{role}.{kind}", **fields)

    async def claim_tasks(
        self, worker: str, *, wait_seconds: int = 0, patience_seconds: float | None = None, **fields: Any
    ) -> list[Json]:
        """Claim work, and wait for it if there is none; `fields` are those of `ClaimTasks`. See also `work`."""
        _, content = encoded(ClaimTasks(worker=worker, **fields))
        response = await self._wire.exchange(
            "POST",
            "/tasks/claim",
            content=content,
            params={"wait_seconds": wait_seconds},
            patience_seconds=patience_seconds,
            wait_seconds=wait_seconds,
        )
        return cast(list[Json], decoded(response, _objects)["tasks"])

    async def heartbeat(
        self,
        task_id: UUID,
        lease_id: UUID,
        *,
        lease_seconds: int = LEASE_SECONDS,
        patience_seconds: float | None = None,
    ) -> None:
        """Keep a task for so long from now. Raises LeaseLost."""
        content = msgspec.json.encode({"lease_id": lease_id, "lease_seconds": lease_seconds})
        path = f"/tasks/{task_id}/heartbeat"
        await self._wire.exchange("POST", path, content=content, patience_seconds=patience_seconds)

    async def complete_task(self, task_id: UUID, lease_id: UUID, result: Any = None, **fields: Any) -> Answer:
        """Say what came out of a task; `fields` are those of `CompleteTask`. Raises LeaseLost."""
        return await self.command(CompleteTask(task_id=task_id, lease_id=lease_id, result=result, **fields))

    async def fail_task(self, task_id: UUID, lease_id: UUID, error: Any = None, **fields: Any) -> Answer:
        """Say that an attempt failed; `fields` are those of `FailTask`. Raises LeaseLost."""
        return await self.command(FailTask(task_id=task_id, lease_id=lease_id, error=error, **fields))

    async def suspend_task(self, task_id: UUID, lease_id: UUID, approval_id: UUID, **fields: Any) -> Answer:
        """Have a task wait for an approval of it. Raises LeaseLost."""
        return await self.command(SuspendTask(task_id=task_id, lease_id=lease_id, approval_id=approval_id, **fields))

    async def cancel_task(self, task_id: UUID, **fields: Any) -> Answer:
        """Cancel a task; `fields` are those of `CancelTask`."""
        return await self.command(CancelTask(task_id=task_id, **fields))

    async def redrive_task(self, task_id: UUID, reason: Any, **fields: Any) -> Answer:
        """Take a task out of the dead letters; `reason` may be a `$personal` value."""
        return await self.command(RedriveTask(task_id=task_id, reason=reason, **fields))

    def work(
        self,
        kinds: Sequence[str],
        worker: str,
        *,
        concurrency: int = 1,
        lease_seconds: int = LEASE_SECONDS,
        session_id: UUID | None = None,
    ) -> Work:
        """The tasks of these kinds, one after the other as this worker has hands for them; see `api.work`::

        async for task in muniment.work(kinds=["mail.send"], worker="mailer-1"):
            async with task:
                await task.complete(await send(task.payload))
        """
        return Work(self, kinds, worker, concurrency=concurrency, lease_seconds=lease_seconds, session_id=session_id)

    async def request_approval(self, action: Action | Json, **fields: Any) -> Answer:
        """Ask whether an action may run; `fields` are those of `RequestApproval`. See also `wait_for_decision`."""
        return await self.command(RequestApproval(action=action, **fields))  # type: ignore[arg-type]

    async def present(self, approval_id: UUID, channel: str, **fields: Any) -> Answer:
        """Say that the caller was shown the request."""
        return await self.command(PresentApproval(approval_id=approval_id, channel=channel, **fields))

    async def vote(
        self, approval_id: UUID, verdict: Literal["approve", "deny"], digest_seen: str | None = None, **fields: Any
    ) -> Answer:
        """Approve or deny the request whose `request_digest` was seen; `fields` are those of `CastVote`."""
        return await self.command(CastVote(approval_id=approval_id, verdict=verdict, digest_seen=digest_seen, **fields))

    async def withdraw_vote(self, approval_id: UUID, **fields: Any) -> Answer:
        """Take the caller's vote back."""
        return await self.command(WithdrawVote(approval_id=approval_id, **fields))

    async def edit(self, approval_id: UUID, action: Action | Json, **fields: Any) -> Answer:
        """Ask about a changed action instead; `fields` are those of `EditApproval`."""
        return await self.command(EditApproval(approval_id=approval_id, action=action, **fields))  # type: ignore[arg-type]

    async def withdraw(self, approval_id: UUID, **fields: Any) -> Answer:
        """Take the caller's request back; `fields` are those of `WithdrawApproval`."""
        return await self.command(WithdrawApproval(approval_id=approval_id, **fields))

    async def cancel_approval(self, approval_id: UUID, **fields: Any) -> Answer:
        """End a request undecided; `fields` are those of `CancelApproval`."""
        return await self.command(CancelApproval(approval_id=approval_id, **fields))

    async def revoke(self, approval_id: UUID, **fields: Any) -> Answer:
        """Take an approval back that is not being used; `fields` are those of `RevokeApproval`."""
        return await self.command(RevokeApproval(approval_id=approval_id, **fields))

    async def begin_use(self, approval_id: UUID, execution_id: UUID, action: Action | Json, **fields: Any) -> Answer:
        """Begin to run what was approved; the body has a `use_token`. `fields` are those of `BeginUse`."""
        return await self.command(
            BeginUse(approval_id=approval_id, execution_id=execution_id, action=action, **fields)  # type: ignore[arg-type]
        )

    async def record_outcome(
        self, approval_id: UUID, execution_id: UUID, outcome: Literal["ok", "failed"], **fields: Any
    ) -> Answer:
        """Say what came of an execution; `fields` are those of `RecordOutcome`."""
        return await self.command(
            RecordOutcome(approval_id=approval_id, execution_id=execution_id, outcome=outcome, **fields)
        )

    async def erase_subject(self, subject: str, ground: str, **fields: Any) -> Json:
        """Erase a subject: the erasure, once it is done; `fields` are those of `EraseSubject`. Raises Held."""
        return await self._post("/erasures", EraseSubject(subject=subject, ground=ground, **fields))

    async def place_hold(self, subject: str, reason: str, **fields: Any) -> Json:
        """Keep a subject from being erased: the hold; `fields` are those of `PlaceHold`."""
        return await self._post("/holds", PlaceHold(subject=subject, reason=reason, **fields))

    async def release_hold(self, hold_id: UUID, reason: str, **fields: Any) -> Json:
        """Release a hold; `fields` are those of `ReleaseHold`."""
        return await self._post(f"/holds/{hold_id}/release", ReleaseHold(hold_id=hold_id, reason=reason, **fields))

    async def receipt(self, command_id: str, *, principal: str | None = None) -> Json:
        """What became of a command: {status, positions, body}. Raises NotFound if it was never recorded."""
        return await self._get(f"/commands/{quote(command_id, safe='')}", {"principal": principal})

    # Reading. Filters are the query parameters of the route; None leaves one out. With `as_of`, a time, or
    # `as_of_position` it is as it was then: single things, and the lists of sessions, tasks and approvals.

    async def get_session(self, session_id: UUID, **parameters: Any) -> Json:
        return await self._get(f"/sessions/{session_id}", parameters)

    async def get_record(self, record_id: UUID, **parameters: Any) -> Json:
        return await self._get(f"/records/{record_id}", parameters)

    async def get_task(self, task_id: UUID, **parameters: Any) -> Json:
        return await self._get(f"/tasks/{task_id}", parameters)

    async def list_attempts(self, task_id: UUID, **parameters: Any) -> list[Json]:
        """Every attempt of a task, in order."""
        return cast(list[Json], (await self._get(f"/tasks/{task_id}/attempts", parameters))["attempts"])

    async def wait_for_task(self, task_id: UUID, *, timeout_seconds: float | None = None) -> Json:
        """The task once nobody is to work on it any more: it is completed, dead, cancelled or expired. Raises
        TimeoutError."""
        async with asyncio.timeout(timeout_seconds):
            task = await self.get_task(task_id)
            while task["state"] in OPEN_TASK:
                task = await self._changed(f"/tasks/{task_id}", task)
            return task

    async def get_approval(self, approval_id: UUID, **parameters: Any) -> Json:
        return await self._get(f"/approvals/{approval_id}", parameters)

    async def wait_for_decision(self, approval_id: UUID, *, timeout_seconds: float | None = None) -> Json:
        """The approval once it is decided, or the one that took its place. Raises TimeoutError."""
        async with asyncio.timeout(timeout_seconds):
            approval = await self.get_approval(approval_id)
            while approval["state"] in ("pending", "superseded"):
                if approval["state"] == "superseded":
                    approval = await self.get_approval(approval["superseded_by"])
                else:
                    approval = await self._changed(f"/approvals/{approval['approval_id']}", approval)
            return approval

    def list_sessions(self, *, limit: int | None = None, **filters: Any) -> AsyncIterator[Json]:
        """The sessions, at most `limit` of them, page by page as they are asked for."""
        return self._pages("/sessions", "sessions", filters, limit, PAGE_ITEMS_MAX)

    def list_records(self, *, limit: int | None = None, **filters: Any) -> AsyncIterator[Json]:
        return self._pages("/records", "records", filters, limit, PAGE_ITEMS_MAX)

    def list_tasks(self, *, limit: int | None = None, **filters: Any) -> AsyncIterator[Json]:
        return self._pages("/tasks", "tasks", filters, limit, PAGE_ITEMS_MAX)

    def list_dead_letters(self, *, limit: int | None = None, **filters: Any) -> AsyncIterator[Json]:
        return self._pages("/dead-letters", "tasks", filters, limit, PAGE_ITEMS_MAX)

    def list_approvals(self, *, limit: int | None = None, **filters: Any) -> AsyncIterator[Json]:
        return self._pages("/approvals", "approvals", filters, limit, PAGE_ITEMS_MAX)

    def list_erasures(self, *, limit: int | None = None, **filters: Any) -> AsyncIterator[Json]:
        return self._pages("/erasures", "erasures", filters, limit, PAGE_ITEMS_MAX)

    def list_holds(self, *, limit: int | None = None, **filters: Any) -> AsyncIterator[Json]:
        return self._pages("/holds", "holds", filters, limit, PAGE_ITEMS_MAX)

    def events(self, *, after: int = 0, limit: int | None = None, **filters: Any) -> AsyncIterator[Json]:
        """The events after a position, in order, to the end of the ledger as it is when that is reached."""
        return self._pages("/events", "events", {"after": after} | filters, limit, PAGE_EVENTS_MAX)

    def session_events(self, session_id: UUID, *, limit: int | None = None, **filters: Any) -> AsyncIterator[Json]:
        """Everything of a session: its own events and those of what belongs to it."""
        return self._pages(f"/sessions/{session_id}/events", "events", filters, limit, PAGE_EVENTS_MAX)

    def search(self, q: str, *, limit: int | None = None, **filters: Any) -> AsyncIterator[Json]:
        """The events that hold the plain words `q`."""
        return self._pages("/audit/search", "events", {"q": q} | filters, limit, PAGE_ITEMS_MAX)

    async def wait(self, position: int, *, timeout_seconds: float = WAIT_TIMEOUT_SECONDS) -> None:
        """Return when every view shows what was appended up to `position`; raises ViewBehind if it does not."""
        deadline = time.monotonic() + timeout_seconds
        for path in ("/sessions", "/records", "/tasks", "/approvals", "/events"):
            await self._get(path, {"limit": 1, "min_position": position}, deadline - time.monotonic())

    # The log of a project, for who verifies it: the files that `muniment publish` writes, and proofs

    async def log_file(self, project: str, path: str) -> bytes:
        """A file of the log: `checkpoint`, `tile/<level>/<index>`, `tile/entries/<index>` or `payload/<sha256>`."""
        return (await self._wire.exchange("GET", f"/ledger/{project}/{path}")).content

    async def log_keys(self, project: str) -> list[Json]:
        """The keys of the log, each a `vkey`, signing `from` then on, `until` it was retired."""
        return cast(list[Json], (await self._get(f"/ledger/{project}/keys", {}))["keys"])

    async def prove(self, position: int) -> bytes:
        """The `.tlog-proof` of an event, once a published checkpoint covers it; raises ViewBehind if none comes to."""
        return (await self._wire.exchange("GET", f"/events/{position}/proof")).content

    async def prove_consistency(self, project: str, old: int, new: int) -> list[bytes]:
        """The hashes that show that a checkpoint of `new` events goes on from one of `old`."""
        answer = await self._get(f"/ledger/{project}/consistency", {"from": old, "to": new})
        return [b64decode(one) for one in answer["proof"]]

    async def _pages(
        self, path: str, plural: str, filters: Json, limit: int | None, page_max: int
    ) -> AsyncIterator[Json]:
        left = limit
        while left is None or left > 0:
            page = await self._get(path, filters | {"limit": page_max if left is None else min(left, page_max)})
            for item in page[plural]:
                yield item
            if page["next"] is None:
                return
            left = None if left is None else left - len(page[plural])
            filters = filters | {"after": page["next"]}

    async def _changed(self, path: str, known: Json) -> Json:
        """One thing once it is another than what is `known` of it, or after a while as it is."""
        response = await self._wire.exchange(
            "GET",
            path,
            params={"wait_seconds": CHANGE_WAIT_SECONDS},
            headers={"If-None-Match": f'"{known["version"]}"'},
            wait_seconds=CHANGE_WAIT_SECONDS,
        )
        if response.status_code != 304:
            return cast(Json, decoded(response, _objects))
        await asyncio.sleep(PAUSE_SECONDS)
        return known

    async def _post(self, path: str, command: Command) -> Json:
        """What the route of a command answers that no list takes."""
        _, content = encoded(command)
        body: Json = decoded(await self._wire.exchange("POST", path, content=content), _objects)
        return body

    async def _get(self, path: str, parameters: Json, patience_seconds: float | None = None) -> Json:
        sent = {name: _parameter(value) for name, value in parameters.items() if value is not None}
        response = await self._wire.exchange("GET", path, params=sent, patience_seconds=patience_seconds)
        return cast(Json, decoded(response, _objects))


def _parameter(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.isoformat() if isinstance(value, datetime) else str(value)
