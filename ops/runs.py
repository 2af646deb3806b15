"""What a recorded run means: the commands that put it into a ledger.

A run is a session: opened, activated, completed or failed. Every message is a record; a tool's answer is
the record of its call, and a call that was never answered is a record too. A call of a gated tool, one that
changes the world, is a task instead, with an approval bound to its arguments where somebody can be shown to have
asked for it. Ids are made from what the run says and not from the file it stands in (RFC 9562 s5.5), so the same
run always gives the same commands. A call is known by `<run>:<message index>:<call index>`, for tool-call ids
repeat. Pure: no clock, no I/O.
"""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, NamedTuple
from uuid import UUID, uuid5

from msgspec import UNSET, Struct, field

from ledger.commands import (
    CancelTask,
    CastVote,
    ChangeSession,
    Command,
    CompleteTask,
    OpenSession,
    Record,
    RequestApproval,
    Start,
    SubmitTask,
)
from ledger.entry import canonical
from ledger.personal import ERASED, PERSONAL, SEALED
from ledger.syntax import BODY_BYTES_MAX, METADATA_BYTES_MAX
from ledger.values import Action, Voter
from ops.messages import is_error, letters, line, opened, part, subject, tool_calls
from ops.transcripts import Run, Unusable, mended

Json = dict[str, Any]

MAPPING = UUID("8d0b6f2e-94c7-5a13-b7e5-2c41d9f07a68")
"""The namespace of imported ids. A mapping that gives other commands for the same run needs another one."""

PERSONAL_KEYS = (
    "name,first_name,middle_name,last_name,full_name,given_name,family_name,surname,"
    "address,address1,address2,street,zip,zip_code,postal_code,email,email_address,phone,phone_number,mobile,"
    "dob,birth_date,date_of_birth,birthday,passport,passport_number,ssn,"
    "payment_id,payment_method,payment_methods,payment_method_id,card_number,credit_card,last_four,iban"
)
"""The JSON keys whose values are about a person, unless the caller names others."""

GATED_TOOLS = (
    "book_reservation,cancel_reservation,update_reservation_flights,update_reservation_baggages,"
    "update_reservation_passengers,send_certificate"
)
"""The tools whose calls changed something that had to be asked for, unless the caller names others."""

LEASE_SECONDS = 86_400
"""How long an import that was stopped in the middle of a call may take to go on with it."""

FAILING_TOOLS = ("transfer_to_human_agents",)
WORKER = "muniment-import"
ISSUER = "urn:muniment:imported"
"""Under which the customers of imported runs are known as voters; their ids are made from what the run calls them."""

TIME_KEYS = ("timestamp", "created_at", "created", "time", "started_at", "start_time")

# Published data sets whose agent is known by the first line of its instructions.
_KNOWN_ROLES = {"# Airline Agent Policy": "airline-support", "# Retail agent policy": "retail-support"}
_EARLIEST = datetime(1990, 1, 1, tzinfo=UTC)
# Beside a message or a run a `name` is an agent's or a tool's; a person's stands in arguments and results.
_NAMES = frozenset({"name"})
_RESERVED = frozenset({PERSONAL, SEALED, ERASED})


class Options(Struct, frozen=True, kw_only=True):
    """How runs are mapped. A run that is in a ledger already cannot be put in again with others."""

    agent_role: str | None = None
    """None: the data set's, where it is a known one, else `agent`."""
    personal_keys: str = PERSONAL_KEYS
    """Separated by commas; written `firstName`, `first-name` or `first_name`, a key is the same."""
    gated_tools: str = GATED_TOOLS
    """Separated by commas, exactly as the calls name them."""
    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    """A time in a log that is later than this is not believed."""


class Step(NamedTuple):
    """One command, and what of the run it is for."""

    where: str
    command: Command


class _Call(NamedTuple):
    """A tool call, until its answer is met."""

    place: str
    body: Json
    made_at: datetime | None
    message_id: UUID | None


def identify(run: Run) -> tuple[Run, str]:
    """`run` as it can be sent, and the digest it is known by. Raises ValueError where it is nested too deeply."""
    try:
        try:
            said = canonical([run.about, run.messages])
        except UnicodeEncodeError:
            run = run._replace(about=mended(run.about), messages=mended(run.messages))
            said = canonical([run.about, run.messages])
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return run, sha256(said).hexdigest()


def session_of(digest: str, twins_before: int) -> UUID:
    """The session of the run with that digest; one file may hold exactly the same run several times."""
    return uuid5(MAPPING, f"{digest}+{twins_before}" if twins_before else digest)


class Mapping:
    """One run on its way into commands; `name` is what the ids it has in the caller's world begin with."""

    def __init__(self, run: Run, session_id: UUID, name: str, options: Options) -> None:
        self._run = run
        self._session_id = session_id
        self._name = name
        self._options = options
        self._keys = frozenset(map(letters, options.personal_keys.split(","))) - {""}
        self._gated = frozenset(name.strip() for name in options.gated_tools.split(",")) - {""}
        self._subject = subject(run) or str(session_id)
        self._asked_by: UUID | None = None
        self._unanswered: list[_Call] = []
        self._transferred = False

    def steps(self) -> Iterator[Step | Unusable]:
        """The commands in the order in which they must be given, and what could not become one."""
        times = [time for time in (self._moment(message) for message in self._run.messages) if time]
        yield from self._opening(self._moment(self._run.about) or (times[0] if times else None))
        for index, message in enumerate(self._run.messages):
            where = f"{self._run.where} message {index}"
            role = message.get("role") if isinstance(message, dict) else None
            if not isinstance(role, str) or not role.strip():
                yield Unusable(where, "it is not a message: it has no role")
            elif role in ("tool", "function"):
                yield Step(where, self._answered(index, message))
            else:
                said = self._said(index, message)
                is_held = len(canonical(said.body)) <= BODY_BYTES_MAX  # else it will be refused
                yield Step(where, said)
                if role == "user" and is_held:
                    self._asked_by = self._record_id(str(index))
                for call in self._calls(index, message, said if is_held else None):
                    self._unanswered.append(call)
                    yield from (Step(where, command) for command in self._begun(call))
        for call in self._unanswered:
            yield Step(f"{self._run.where} call {call.place}", self._unanswered_call(call))
        yield self._ending(times[-1] if times else None)

    def _opening(self, time: datetime | None) -> Iterator[Step]:
        about = self._marked(self._run.about, self._keys - _NAMES)
        fits = len(canonical(about)) <= METADATA_BYTES_MAX
        opened = OpenSession(
            command_id=f"{self._session_id}:open",
            session_id=self._session_id,
            external_id=self._name,
            occurred_at=time or UNSET,
            agent_role=self._options.agent_role or self._known_role() or "agent",
            task_id=line(self._run.about.get("task_id")),
            metadata=about if fits else {},
            labels={"imported": "openai-messages"},
        )
        yield Step(self._run.where, opened)
        yield Step(self._run.where, self._change("active", time))
        if not fits:  # what metadata cannot hold is a record of its own
            yield Step(self._run.where, self._record("about", "run.described", about, time))

    def _ending(self, time: datetime | None) -> Step:
        change = self._change("failed" if self._transferred else "completed", time)
        change.reason = "transferred to human" if self._transferred else None
        return Step(self._run.where, change)

    def _change(self, status: Any, time: datetime | None) -> ChangeSession:
        command_id = f"{self._session_id}:{status}"
        return ChangeSession(
            command_id=command_id, session_id=self._session_id, status=status, occurred_at=time or UNSET
        )

    def _known_role(self) -> str | None:
        first = next((m.get("content") for m in self._run.messages if isinstance(m, dict)), None)
        return _KNOWN_ROLES.get(first.partition("\n")[0].strip()) if isinstance(first, str) else None

    def _record(self, place: str, kind: str, body: Json, time: datetime | None) -> Record:
        return Record(
            command_id=f"{self._session_id}:{place}",
            record_id=self._record_id(place),
            session_id=self._session_id,
            external_id=f"{self._name}:{place}",
            occurred_at=time or UNSET,
            kind=kind,
            body=body,
        )

    def _record_id(self, place: str) -> UUID:
        return uuid5(self._session_id, place)

    # Messages

    def _said(self, index: int, message: Json) -> Record:
        """A message other than a tool's answer. The calls it makes are only named: each is a record of its own."""
        role = message["role"]
        keys = self._keys if role == "user" else self._keys - _NAMES
        body = self._marked({k: v for k, v in message.items() if k not in ("tool_calls", "function_call")}, keys)
        calls = [
            {"call_key": f"{self._name}:{index}:{nth}", "tool_call_id": call_id, "name": name}
            for nth, (call_id, name, _, _) in enumerate(tool_calls(message))
        ]
        if calls:
            body["tool_calls"] = calls
        kind = "system" if role == "developer" else re.sub(r"[^a-z0-9_-]+", "-", role.strip().lower())[:80]
        return self._record(str(index), f"message.{kind}", body, self._moment(message))

    def _calls(self, index: int, message: Json, said: Record | None) -> Iterator[_Call]:
        """The calls that a message makes; they stand alone where no record will hold the message."""
        for nth, (call_id, name, arguments, more) in enumerate(tool_calls(message)):
            self._transferred |= name in FAILING_TOOLS
            place = f"{index}:{nth}"
            body = {
                "call_key": f"{self._name}:{place}",
                "tool_call_id": call_id,
                "name": name,
                "arguments": self._marked(opened(arguments)),
            }
            if more:
                body["more"] = self._marked(more)
            yield _Call(place, body, self._moment(message), self._record_id(str(index)) if said else None)

    def _answered(self, index: int, message: Json) -> Command:
        """What a tool's message makes of the call that it answers; a record of the answer alone where no call waits
        for it."""
        call = self._awaited(message)
        if call:
            self._unanswered.remove(call)
        else:
            named = {"tool_call_id": message.get("tool_call_id"), "name": message.get("name")}
            call = _Call(str(index), named, None, None)
        content = message.get("content")
        result = [part(piece) for piece in content] if isinstance(content, list) else opened(content)
        answer = {"result": self._marked({"content": result})["content"], "is_error": is_error(message, result)}
        known = ("role", "content", "tool_call_id", "name", "is_error")
        if more := self._marked({k: v for k, v in message.items() if k not in known}):
            answer["answer"] = more
        time = self._moment(message)
        if self._is_gated(call):
            return self._completed(call, answer, time)
        return self._called(call, answer, answer["is_error"], time)

    def _unanswered_call(self, call: _Call) -> Command:
        if not self._is_gated(call):
            return self._called(call, {}, None, None)
        return CancelTask(
            command_id=f"{self._session_id}:{call.place}:cancel",
            task_id=self._task_id(call.place),
            reason="the run ended before the call was answered",
        )

    def _called(self, call: _Call, answer: Json, is_error: bool | None, time: datetime | None) -> Record:
        record = self._record(call.place, "tool.called", call.body | answer, time or call.made_at)
        record.parent_record_id = call.message_id
        if is_error is not None:
            record.status = "error" if is_error else "ok"
        if call.made_at and time and call.made_at <= time:
            record.started_at, record.ended_at = call.made_at, time
        return record

    # Gated calls

    def _is_gated(self, call: _Call) -> bool:
        return "arguments" in call.body and call.body["name"] in self._gated

    def _begun(self, call: _Call) -> Iterator[Command]:
        """The task that a gated call is, which no worker is ever offered, and who can be shown to have asked for it.

        Nobody is made to have approved what nobody can be shown to have asked for: then there is no approval.
        """
        if not self._is_gated(call):
            return
        task_id, approval_id = self._task_id(call.place), uuid5(self._session_id, f"{call.place}:approval")
        name, key = call.body["name"], f"{self._session_id}:{call.place}"
        occurred_at = call.made_at or UNSET
        yield SubmitTask(
            command_id=key,  # as its record would have: it is one or the other, in one ledger
            task_id=task_id,
            session_id=self._session_id,
            external_id=call.body["call_key"],
            occurred_at=occurred_at,
            kind=f"tool.{re.sub(r'[^a-z0-9_-]+', '-', name.lower())[:80]}",
            payload=call.body,
            max_attempts=1,
            start=Start(worker=WORKER, lease_seconds=LEASE_SECONDS, lease_id=self._lease_id(call.place)),
        )
        if self._asked_by is None:
            return
        yield RequestApproval(
            command_id=f"{key}:approval",
            approval_id=approval_id,
            session_id=self._session_id,
            task_id=task_id,
            external_id=call.body["call_key"],
            call_key=call.body["call_key"],
            occurred_at=occurred_at,
            action=Action(tool=name, arguments=call.body["arguments"]),
            imported=True,
        )
        yield CastVote(
            command_id=f"{key}:vote",
            approval_id=approval_id,
            occurred_at=occurred_at,
            verdict="approve",
            # Whom the customer's id names is personal, and a voter is not sealed.
            voter=Voter(issuer=ISSUER, sub=str(uuid5(MAPPING, self._subject)), evidence=self._asked_by),
        )

    def _completed(self, call: _Call, answer: Json, time: datetime | None) -> CompleteTask:
        result = answer["result"]
        return CompleteTask(
            command_id=f"{self._session_id}:{call.place}:complete",
            task_id=self._task_id(call.place),
            lease_id=self._lease_id(call.place),
            occurred_at=time or call.made_at or UNSET,
            result={"content": result, "answer": answer["answer"]} if "answer" in answer else result,
            is_error=answer["is_error"],
        )

    def _task_id(self, place: str) -> UUID:
        return uuid5(self._session_id, f"{place}:task")

    def _lease_id(self, place: str) -> UUID:
        return uuid5(self._session_id, f"{place}:lease")

    def _awaited(self, message: Json) -> _Call | None:
        """The earliest call without an answer that has the answer's id; without an id its name; or neither."""
        for key in ("tool_call_id", "name"):
            if message.get(key):
                return next((call for call in self._unanswered if call.body[key] == message[key]), None)
        return self._unanswered[0] if self._unanswered else None

    # Values

    def _marked(self, value: Any, keys: frozenset[str] | None = None) -> Any:
        """`value` with what stands under a personal key marked as the subject's."""
        keys = self._keys if keys is None else keys
        if isinstance(value, list):
            return [self._marked(item, keys) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            f"{name}_" if name in _RESERVED else name: self._personal(item)
            if letters(name) in keys and item not in (None, "", [], {})
            else self._marked(item, keys)
            for name, item in value.items()
        }

    def _personal(self, value: Any) -> Json:
        return {PERSONAL: {"subject": self._subject, "value": self._marked(value, frozenset())}}

    def _moment(self, value: Any) -> datetime | None:
        """When it says that it happened, if it says so exactly: with an offset, or in seconds of Unix time."""
        said = next((value[key] for key in TIME_KEYS if value.get(key)), None) if isinstance(value, dict) else None
        time = None
        try:
            if isinstance(said, str):
                time = datetime.fromisoformat(said)
            elif isinstance(said, int | float) and not isinstance(said, bool):
                time = datetime.fromtimestamp(said / 1000 if said > 1e11 else said, UTC)
        except (ValueError, OverflowError, OSError):
            return None
        return time if time and time.tzinfo and _EARLIEST < time <= self._options.now else None
