"""Recorded messages in, commands out: nothing that a run says is lost, and the same run is always the same."""

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ledger.commands import (
    CancelTask,
    CastVote,
    ChangeSession,
    CompleteTask,
    OpenSession,
    Record,
    RequestApproval,
    SubmitTask,
)
from ledger.errors import MalformedRequest
from ledger.personal import PERSONAL
from ledger.syntax import BODY_BYTES_MAX, read_command
from ledger.values import Action
from ops.runs import Mapping, Options, Step, identify, session_of
from ops.transcripts import Run, Transcript, Unusable

RECORDED_RUNS = Path(__file__).parents[3] / "shared/data/airline-agent-runs.json.gz"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def mapped(messages: list[Any], about: dict[str, Any] | None = None, **options: Any) -> list[Step | Unusable]:
    run, digest = identify(Run("f#0", "f item 0", messages, about or {}))
    mapping = Mapping(run, session_of(digest, 0), run.name, Options(now=NOW, **options))
    return list(mapping.steps())


def commands(messages: list[Any], about: dict[str, Any] | None = None, **options: Any) -> list[Any]:
    steps = mapped(messages, about, **options)
    given = [step.command for step in steps if isinstance(step, Step)]
    for command in given:  # what the server would read is what was meant
        assert msgspec.to_builtins(read_command(msgspec.json.encode(command))) == msgspec.to_builtins(command)
    return given


def records(messages: list[Any], about: dict[str, Any] | None = None, **options: Any) -> list[Record]:
    return [command for command in commands(messages, about, **options) if isinstance(command, Record)]


def bodies(*messages: Any) -> list[Any]:
    return [record.body for record in records(list(messages))]


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content} | more


def calling(*calls: tuple[str | None, str, Any], content: Any = None) -> dict[str, Any]:
    tool_calls = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, name, arguments in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": tool_calls}


def answering(call_id: str | None, content: Any, **more: Any) -> dict[str, Any]:
    named = {} if call_id is None else {"tool_call_id": call_id}
    return {"role": "tool", "content": content} | named | more


def personal(value: Any, subject: str = "c1") -> dict[str, Any]:
    return {PERSONAL: {"subject": subject, "value": value}}


def test_a_run_is_a_session_that_is_opened_activated_and_completed() -> None:
    opened, activated, record, completed = commands([said("hi")], {"task_id": 3, "trial": 0})
    assert isinstance(opened, OpenSession)
    assert (opened.agent_role, opened.task_id, opened.external_id) == ("agent", "3", "f#0")
    assert opened.metadata == {"task_id": 3, "trial": 0}
    assert isinstance(activated, ChangeSession)
    assert activated.status == "active"
    assert (record.kind, record.session_id, record.external_id) == ("message.user", opened.session_id, "f#0:0")
    assert isinstance(completed, ChangeSession)
    assert completed.status == "completed"


def test_a_run_handed_to_a_human_has_failed() -> None:
    *_, end = commands([calling(("1", "transfer_to_human_agents", "{}")), answering("1", "ok")])
    assert (end.status, end.reason) == ("failed", "transferred to human")


def test_messages_are_records_of_their_role() -> None:
    roles = ["system", "developer", "user", "assistant", "critic", "Sub Agent"]
    kinds = [record.kind for record in records([{"role": role, "content": "x"} for role in roles])]
    assert kinds == [f"message.{r}" for r in ("system", "system", "user", "assistant", "critic", "sub-agent")]
    assert [body["role"] for body in bodies(*({"role": role, "content": "x"} for role in roles))] == roles


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "text",
        [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
        {"unusual": [1, 2]},
    ],
)
def test_content_of_every_form_is_kept_as_it_is(content: Any) -> None:
    assert bodies(said(content)) == [{"role": "user", "content": content}]


def test_what_else_a_message_says_is_kept() -> None:
    message = {
        "role": "assistant",
        "content": None,
        "refusal": "no",
        "name": "planner",
        "audio": {"id": "a"},
        "usage": 3,
    }
    assert bodies(message) == [message]


def test_a_call_and_its_result_are_one_record_and_the_message_only_names_the_call() -> None:
    message, called = records([calling(("x", "find", '{"q": [1]}')), answering("x", '{"hits": 2}', name="find")])
    assert message.body["tool_calls"] == [{"call_key": "f#0:0:0", "tool_call_id": "x", "name": "find"}]
    assert called.kind == "tool.called"
    assert called.parent_record_id == message.record_id
    assert called.status == "ok"
    assert called.body == {
        "call_key": "f#0:0:0",
        "tool_call_id": "x",
        "name": "find",
        "arguments": {"q": [1]},
        "result": {"hits": 2},
        "is_error": False,
    }


def test_parallel_calls_are_answered_in_any_order() -> None:
    asked = calling(("a", "one", "{}"), ("b", "two", "{}"), ("c", "three", "{}"))
    _, *called = bodies(asked, answering("c", "3"), answering("a", "1"), answering("b", "2"))
    assert [(body["name"], body["call_key"], body["result"]) for body in called] == [
        ("three", "f#0:0:2", "3"),
        ("one", "f#0:0:0", "1"),
        ("two", "f#0:0:1", "2"),
    ]


def test_a_repeated_call_id_answers_the_call_that_waits() -> None:
    _, first, _, second = bodies(
        calling(("same", "one", "{}")), answering("same", "1"), calling(("same", "two", "{}")), answering("same", "2")
    )
    assert (first["name"], first["result"], second["name"], second["result"]) == ("one", "1", "two", "2")
    _, *both = bodies(
        calling(("same", "one", "{}"), ("same", "two", "{}")), answering("same", "1"), answering("same", "2")
    )
    assert [(body["name"], body["result"]) for body in both] == [("one", "1"), ("two", "2")]


def test_a_call_without_a_result_is_a_record_without_one() -> None:
    _, _, called = records([calling(("a", "one", '{"x": 1}')), said("never mind")])
    assert (called.body["arguments"], called.status, "result" in called.body) == ({"x": 1}, None, False)


def test_a_result_without_a_call_is_a_record_of_its_own() -> None:
    (lost,) = records([answering("unknown", "found", name="find")])
    assert lost.kind == "tool.called"
    assert lost.body == {"tool_call_id": "unknown", "name": "find", "result": "found", "is_error": False}
    _, *both = bodies(calling(("a", "one", "{}")), answering("a", "1"), answering("a", "again"))
    assert [body["result"] for body in both] == ["1", "again"]


def test_a_result_without_an_id_answers_by_name_and_else_in_order() -> None:
    asked = calling((None, "one", "{}"), (None, "two", "{}"))
    _, *named = bodies(asked, answering(None, "2", name="two"), answering(None, "1", name="one"))
    assert [(body["name"], body["result"]) for body in named] == [("two", "2"), ("one", "1")]
    _, *ordered = bodies(asked, answering(None, "1"), answering(None, "2"))
    assert [(body["name"], body["result"]) for body in ordered] == [("one", "1"), ("two", "2")]


def test_the_old_form_of_a_call_is_understood() -> None:
    asked = {"role": "assistant", "content": None, "function_call": {"name": "find", "arguments": '{"q": 1}'}}
    message, called = bodies(asked, {"role": "function", "name": "find", "content": "[1]"})
    assert message == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"call_key": "f#0:0:0", "tool_call_id": None, "name": "find"}],
    }
    assert (called["name"], called["arguments"], called["result"]) == ("find", {"q": 1}, [1])


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        ('{"a": 1', '{"a": 1'),
        ("", ""),
        ("5", "5"),
        (None, None),
        ('{"id": 12345678901234567890}', {"id": "12345678901234567890"}),
        ("[" * 5000, "[" * 5000),
    ],
)
def test_arguments_that_are_no_json_are_kept_as_they_are(arguments: Any, kept: Any) -> None:
    assert bodies(calling(("a", "f", arguments)))[1]["arguments"] == kept


@pytest.mark.parametrize(
    ("tool_calls", "body"),
    [
        (["what"], {"tool_call_id": None, "name": None, "arguments": "what"}),
        ([{}], {"tool_call_id": None, "name": None, "arguments": None}),
        ([{"id": 5, "name": "f", "arguments": "{}"}], {"tool_call_id": 5, "name": "f", "arguments": {}}),
        ({"id": "x", "function": {"name": "f"}}, {"tool_call_id": "x", "name": "f", "arguments": None}),
        (
            [{"id": "x", "type": "custom", "custom": {"name": "f", "input": "raw"}, "index": 0}],
            {"tool_call_id": "x", "name": "f", "arguments": "raw", "more": {"index": 0}},
        ),
    ],
)
def test_calls_of_unusual_forms_are_kept(tool_calls: Any, body: Any) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": tool_calls}
    assert bodies(message)[1] == {"call_key": "f#0:0:0"} | body


@pytest.mark.parametrize(
    ("answer", "is_error"),
    [
        (answering("a", "Error: no such flight"), True),
        (answering("a", "error executing tool"), True),
        (answering("a", "Errors were none"), False),
        (answering("a", "fine"), False),
        (answering("a", '{"error": "no"}'), True),
        (answering("a", '{"error": null}'), False),
        (answering("a", "Error: but it was meant", is_error=False), False),
        (answering("a", "fine", is_error=True), True),
        (answering("a", "fine", status="error"), True),
        (answering("a", None), False),
    ],
)
def test_a_result_says_whether_it_is_an_error(answer: dict[str, Any], is_error: bool) -> None:
    _, called = records([calling(("a", "f", "{}")), answer])
    assert (called.body["is_error"], called.status) == (is_error, "error" if is_error else "ok")


@pytest.mark.parametrize(
    "message", [None, 5, "text", [], {}, {"content": "x"}, {"role": None}, {"role": ""}, {"role": 3}]
)
def test_what_is_no_message_is_named_and_the_rest_goes_on(message: Any) -> None:
    steps = mapped([said("a"), message, said("b")])
    assert [step for step in steps if isinstance(step, Unusable)] == [
        Unusable("f item 0 message 1", "it is not a message: it has no role")
    ]
    external_ids = [step.command.external_id for step in steps if isinstance(step, Step)]
    assert external_ids[2:4] == ["f#0:0", "f#0:2"]


# Personal values


def test_personal_values_in_arguments_and_results_are_the_customers() -> None:
    arguments = {"user_id": "c1", "passengers": [{"first_name": "Ann", "dob": "1990-01-01", "seat": 3}]}
    result = {"userId": "other", "Email": "a@example.com", "address": {"zip": "1", "city": "X"}, "status": "ok"}
    _, called = bodies(calling(("a", "book", json.dumps(arguments))), answering("a", json.dumps(result)))
    assert called["arguments"] == {
        "user_id": "c1",
        "passengers": [{"first_name": personal("Ann"), "dob": personal("1990-01-01"), "seat": 3}],
    }
    assert called["result"] == {
        "userId": "other",
        "Email": personal("a@example.com"),
        "address": personal({"zip": "1", "city": "X"}),
        "status": "ok",
    }


def test_the_customer_is_whom_the_run_names_and_else_the_run_itself() -> None:
    call = calling(("a", "f", '{"user_id": "from the call", "email": "e"}'))
    named, unnamed = {"info": {"task": {"user_id": "from the run"}}}, calling(("a", "f", '{"email": "e"}'))

    def subject(message: Any, about: dict[str, Any]) -> str:
        record = records([message], about)[1]
        subject = record.body["arguments"]["email"][PERSONAL]["subject"]
        assert isinstance(subject, str)
        return subject

    assert subject(call, named) == "from the run"
    assert subject(call, {}) == "from the call"
    assert subject(unnamed, {}) == str(records([unnamed])[0].session_id)
    assert subject(calling(("a", "f", '{"user_id": 17, "email": "e"}')), {}) == "17"


def test_personal_keys_are_the_callers_to_name() -> None:
    call = calling(("a", "f", '{"user_id": "c1", "secret-word": "s", "email": "e"}'))
    _, called = [r.body for r in records([call], personal_keys="secret_word, user-id")]
    assert called["arguments"] == {"user_id": personal("c1"), "secret-word": personal("s"), "email": "e"}
    message, called = [
        r.body for r in records([call | {"content": "hello"}], personal_keys="content", about={"user_id": "c1"})
    ]
    assert message["content"] == personal("hello")
    _, called = [r.body for r in records([call, answering("a", "told")], personal_keys="content")]
    assert called["result"] == personal("told")


def test_a_name_beside_a_message_is_an_agents_unless_a_user_speaks() -> None:
    about = {"user_id": "c1", "name": "trial 5"}
    bodies = [
        r.body
        for r in records([said("x", name="Ann"), {"role": "assistant", "content": "y", "name": "planner"}], about)
    ]
    assert (bodies[0]["name"], bodies[1]["name"]) == (personal("Ann"), "planner")
    assert commands([], about)[0].metadata == about


def test_text_parts_of_a_result_are_opened_for_personal_values() -> None:
    parts = [{"type": "text", "text": '{"user_id": "c1", "email": "e"}'}, {"type": "image", "data": "x"}]
    _, called = records([calling(("a", "f", '{"user_id": "c1"}')), answering("a", parts)])
    assert called.body["result"] == [
        {"type": "text", "text": {"user_id": "c1", "email": personal("e")}},
        {"type": "image", "data": "x"},
    ]


def test_names_that_are_ours_do_not_make_a_log_unreadable() -> None:
    _, called = bodies(calling(("a", "f", '{"$sealed": 1, "$personal": {"x": 2}, "email": {"$erased": 3}}')))
    assert called["arguments"]["$sealed_"] == 1
    assert called["arguments"]["$personal_"] == {"x": 2}
    assert next(iter(called["arguments"]["email"][PERSONAL]["value"])) == "$erased_"


# Gated calls


def gated(messages: list[Any], **options: Any) -> list[Any]:
    """The commands that come of these messages, without those of the session and of the messages."""
    others = ("message.user", "message.assistant")
    return [
        command
        for command in commands(messages, {"user_id": "c1"}, **options)
        if not isinstance(command, OpenSession | ChangeSession) and getattr(command, "kind", "") not in others
    ]


REFUND = [said("refund me"), calling(("a", "refund", '{"amount": 5, "iban": "DE1"}')), answering("a", "Error: no")]


def test_a_gated_call_is_a_task_with_an_approval_of_its_exact_arguments() -> None:
    submitted, requested, voted, completed = gated(REFUND, gated_tools="pay, refund")
    assert isinstance(submitted, SubmitTask)
    assert (submitted.kind, submitted.external_id, submitted.max_attempts) == ("tool.refund", "f#0:1:0", 1)
    assert submitted.payload["arguments"] == {"amount": 5, "iban": personal("DE1")}
    assert submitted.start is not None
    assert isinstance(requested, RequestApproval)
    assert (requested.task_id, requested.session_id) == (submitted.task_id, submitted.session_id)
    assert (requested.call_key, requested.imported) == ("f#0:1:0", True)
    assert requested.action == Action(tool="refund", arguments={"amount": 5, "iban": personal("DE1")})
    assert isinstance(voted, CastVote)
    assert voted.approval_id == requested.approval_id
    assert isinstance(completed, CompleteTask)
    assert (completed.task_id, completed.lease_id) == (submitted.task_id, submitted.start.lease_id)
    assert (completed.result, completed.is_error) == ("Error: no", True)


def test_the_evidence_of_an_approval_is_the_nearest_earlier_message_of_the_user() -> None:
    run, about = REFUND[:1] + REFUND, {"user_id": "c1"}
    (vote,) = [command for command in gated(run, gated_tools="refund") if isinstance(command, CastVote)]
    first, second = [record for record in records(run, about) if record.kind == "message.user"]
    assert vote.voter is not None
    assert vote.voter.evidence == second.record_id != first.record_id
    assert "c1" not in vote.voter.sub


def test_where_no_user_asked_there_is_a_task_and_no_approval() -> None:
    assert [type(command) for command in gated(REFUND[1:], gated_tools="refund")] == [SubmitTask, CompleteTask]


def test_a_gated_call_that_was_never_answered_is_cancelled() -> None:
    submitted, *_, cancelled = gated(REFUND[:2], gated_tools="refund")
    assert isinstance(cancelled, CancelTask)
    assert cancelled.task_id == submitted.task_id


def test_an_answer_without_its_call_is_a_record_though_its_tool_is_gated() -> None:
    (lone,) = gated([answering("x", "done", name="refund")], gated_tools="refund")
    assert isinstance(lone, Record)


def test_the_same_tool_call_id_twice_is_two_tasks() -> None:
    tasks = [command for command in gated(REFUND * 2, gated_tools="refund") if isinstance(command, SubmitTask)]
    assert len({task.task_id for task in tasks}) == 2


def test_what_else_an_answer_of_a_gated_call_says_is_kept() -> None:
    answer = answering("a", '{"ok": 1}', took_ms=7)
    *_, completed = gated([*REFUND[:2], answer], gated_tools="refund")
    assert completed.result == {"content": {"ok": 1}, "answer": {"took_ms": 7}}


# Identity, time, size


def test_the_same_run_is_the_same_commands_and_another_run_is_not() -> None:
    run, other = [calling(("a", "f", "{}")), answering("a", "x")], [calling(("a", "f", "{}")), answering("a", "y")]
    assert [msgspec.json.encode(c) for c in commands(run)] == [msgspec.json.encode(c) for c in commands(run)]
    ids = {command.command_id for command in commands(run)}
    assert len(ids) == 5
    assert not ids & {command.command_id for command in commands(other)}
    assert not ids & {command.command_id for command in commands(run, {"trial": 1})}


def test_the_ids_of_a_run_are_frozen() -> None:
    opened, *_, record, _ = commands([said("hi")])
    assert str(opened.session_id) == "2c576dc8-e438-5dfc-a8fb-b3a5c31cd4fe"
    assert opened.command_id == f"{opened.session_id}:open"
    assert (str(record.record_id), record.command_id) == (
        "ebb00692-70df-5774-992b-7397d9e54a34",
        f"{opened.session_id}:0",
    )


def test_twins_in_one_file_are_two_sessions() -> None:
    _, digest = identify(Run("f#0", "f", [said("hi")], {}))
    assert len({session_of(digest, twins) for twins in range(3)}) == 3


@pytest.mark.parametrize(
    ("said_time", "meant"),
    [
        ("2025-03-01T12:00:00Z", datetime(2025, 3, 1, 12, tzinfo=UTC)),
        ("2025-03-01T12:00:00.5+02:00", datetime(2025, 3, 1, 10, 0, 0, 500_000, tzinfo=UTC)),
        (1740830400, datetime(2025, 3, 1, 12, tzinfo=UTC)),
        (1740830400000, datetime(2025, 3, 1, 12, tzinfo=UTC)),
        ("2025-03-01T12:00:00", None),
        ("yesterday", None),
        (1e300, None),
        (True, None),
        (-5, None),
        ("2027-01-01T00:00:00Z", None),
        ({"a": 1}, None),
    ],
)
def test_times_are_taken_where_they_are_exact(said_time: Any, meant: datetime | None) -> None:
    opened, activated, record, end = commands([said("x", timestamp=said_time)])
    for command in (opened, activated, record, end):
        assert (command.occurred_at if isinstance(command.occurred_at, datetime) else None) == meant
    assert record.body["timestamp"] == said_time


def test_a_call_lasted_from_its_message_to_its_answer() -> None:
    asked = calling(("a", "f", "{}")) | {"created_at": 1740830400}
    called = records([asked, answering("a", "x", created_at=1740830405)])[1]
    assert isinstance(called.started_at, datetime)
    assert isinstance(called.ended_at, datetime)
    assert (called.ended_at - called.started_at).total_seconds() == 5
    assert called.occurred_at == called.ended_at


def test_what_metadata_cannot_hold_is_a_record() -> None:
    about = {"tools": ["x" * 20_000]}
    opened, activated, described, *_ = commands([said("hi")], about)
    assert (opened.metadata, activated.status) == ({}, "active")
    assert (described.kind, described.body) == ("run.described", about)


def test_calls_of_a_message_that_is_too_large_for_a_record_stand_alone() -> None:
    steps = mapped([calling(("a", "f", "{}"), content="x" * BODY_BYTES_MAX)])
    message, called = [s.command for s in steps if isinstance(s, Step) and isinstance(s.command, Record)]
    with pytest.raises(MalformedRequest, match="/body"):
        read_command(msgspec.json.encode(message))
    assert called.parent_record_id is None


def test_half_characters_are_shown_and_not_lost() -> None:
    assert bodies({"role": "user", "content": "\ud83d!", "k\udc00": 1}) == [
        {"role": "user", "content": "\\ud83d!", "k\\udc00": 1}
    ]


def test_a_run_nested_too_deeply_is_refused_with_its_reason() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        identify(Run("f#0", "f", [said(deep)], {}))


# The recorded runs


@pytest.mark.skipif(not RECORDED_RUNS.exists(), reason="the recorded airline runs are not beside this checkout")
def test_the_recorded_airline_runs_become_what_is_counted_in_them() -> None:
    kinds: Counter[str] = Counter()
    statuses: Counter[Any] = Counter()
    given: Counter[str] = Counter()
    ids: set[Any] = set()
    subjects = 0
    for item in Transcript(RECORDED_RUNS).runs():
        assert isinstance(item, Run)
        for command in commands(item.messages, item.about):
            ids.add(command.command_id)
            given[type(command).__name__] += 1
            subjects += msgspec.json.encode(command).count(b'"$personal"')
            if isinstance(command, Record):
                kinds[command.kind] += 1
            if isinstance(command, Record | ChangeSession):
                statuses[command.status] += 1
            if isinstance(command, OpenSession):
                assert command.agent_role == "airline-support"
            if isinstance(command, CompleteTask):
                statuses[f"is_error {command.is_error}"] += 1
    assert kinds == {"message.user": 1189, "message.assistant": 1957, "message.system": 160, "tool.called": 731}
    assert statuses == {None: 3306, "ok": 731, "active": 160, "completed": 121, "failed": 39} | {
        "is_error True": 56,
        "is_error False": 141,
    }
    tasks = dict.fromkeys(["SubmitTask", "RequestApproval", "CastVote", "CompleteTask"], 197)
    assert given == {"OpenSession": 160, "ChangeSession": 320, "Record": 4037, **tasks}
    assert len(ids) == given.total()
    assert subjects > 3000
