"""Reading a command: whatever bytes come in, out comes a command or an error that points at what is wrong."""

import json
import re
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ledger.commands import (
    COMMANDS,
    AnnotateSession,
    BeginUse,
    CancelSession,
    CastVote,
    ChangeSession,
    ClaimTasks,
    Command,
    CompleteTask,
    EditApproval,
    FailTask,
    OpenSession,
    Personal,
    Record,
    RecordOutcome,
    RequestApproval,
    SubmitTask,
    SuspendTask,
)
from ledger.entry import canonical
from ledger.errors import MalformedRequest, NumberOutOfRange
from ledger.syntax import read_command
from tests.ledger.examples import DIGEST, ENVELOPE, LEAST, RECORD_ID, SESSION_ID, WHOLE

each_type = pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)


def body_of(kind: type[Command], /, **fields: Any) -> bytes:
    """The least body of this type, with `fields`."""
    return json.dumps({"type": kind.__name__, **LEAST[kind], **fields}, ensure_ascii=False).encode()


def refused(body: bytes | str, kind: type[Command] | None = None) -> list[tuple[str, str]]:
    """What reading `body` says is wrong: (pointer, detail)."""
    with pytest.raises(MalformedRequest) as error:
        read_command(body.encode() if isinstance(body, str) else body, kind)
    assert error.value.status == 400
    assert not error.value.recorded
    return [(e["pointer"], e["detail"]) for e in error.value.errors]


def pointed_at(body: bytes | str, kind: type[Command] | None = None) -> list[str]:
    return [pointer for pointer, _ in refused(body, kind)]


# What is right


def test_every_command_of_the_table_has_an_example_here() -> None:
    assert set(WHOLE) == set(LEAST) == set(COMMANDS)


@each_type
def test_a_command_with_every_field_is_read_and_written_back_the_same(kind: type[Command]) -> None:
    body = json.dumps({"type": kind.__name__, **WHOLE[kind], **ENVELOPE}).encode()
    command = read_command(body)
    assert type(command) is kind
    assert set(command.__struct_fields__) == set(json.loads(body)) - {"type"} | ({"force"} & set(vars(kind)))
    assert read_command(canonical(command)) == command


@each_type
def test_a_route_that_knows_the_type_needs_no_tag_and_refuses_another(kind: type[Command]) -> None:
    untagged = json.dumps(LEAST[kind]).encode()
    assert read_command(untagged, kind) == read_command(body_of(kind)) == read_command(body_of(kind), kind)
    other = next(other for other in COMMANDS if other is not kind)
    assert pointed_at(body_of(other), kind) == ["/type"]
    assert refused(untagged) == [("", "Object missing required field `type`")]


@each_type
def test_the_target_is_the_stream_the_caller_named(kind: type[Command]) -> None:
    command = read_command(body_of(kind, **WHOLE[kind]))
    assert command.target == UUID(RECORD_ID if kind is Record else SESSION_ID)
    assert read_command(body_of(OpenSession)).target is None


def test_what_a_command_reads_besides_its_target() -> None:
    assert read_command(body_of(OpenSession, parent_session_id=SESSION_ID)).reads == (UUID(SESSION_ID),)
    both = read_command(body_of(Record, session_id=SESSION_ID, parent_record_id=RECORD_ID))
    assert both.reads == (UUID(SESSION_ID), UUID(RECORD_ID))
    assert read_command(body_of(RequestApproval, session_id=SESSION_ID, task_id=RECORD_ID)).reads == both.reads
    assert read_command(body_of(SuspendTask)).reads == (UUID(RECORD_ID),)
    assert read_command(body_of(ChangeSession)).reads == ()


def test_a_uuid_is_read_in_any_of_its_forms() -> None:
    for form in (SESSION_ID, SESSION_ID.upper(), SESSION_ID.replace("-", "")):
        assert read_command(body_of(CancelSession, session_id=form)).target == UUID(SESSION_ID)


# What is not a command at all


@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"nul", b"{", b'{"type":"Record","kind":"a",}', b'{"type":"Record","kind":"a"}x', b"\xef\xbb\xbf{}"],
)
def test_bytes_that_are_no_json_are_called_that(body: bytes) -> None:
    assert refused(body) == [("", "it is not valid JSON")]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (b'"kind":"a","kind":"b"', "kind"),
        (b'"kind" : "a" , "k\\u0069nd" : "a"', "kind"),
        (b'"kind":"a","body":[{"b":{"c":1,"d":2,"c":null}}]', "c"),
        (b'"kind":"a","body":{"":1,"":2}', ""),
        (b'"kind":"a","type":"Record"', "type"),
        (b'"kind":"a","body":{"a":1,"a":"\\u003a"}', "a"),
        (b'"kind":"a","body":{"a":1,"a":"\\u003A"}', "a"),
        (b'"kind":"a","body":[],"body":":"', "body"),
    ],
)
def test_a_name_that_an_object_says_twice_is_refused(fields: bytes, name: str) -> None:
    detail = f"the name {name} is there twice in one object; send it once"
    assert refused(b'{"type":"Record",%b}' % fields) == [("", detail)]


def test_one_name_in_two_objects_is_no_repetition() -> None:
    body = rb'{"type" : "Record", "kind":"a", "body":[{"a\u003a":":"}, {"a\u003A":{"a":"\":\""}}, ":"], "refs":[]}'
    command = read_command(body)
    assert isinstance(command, Record)
    assert command.body == [{"a:": ":"}, {"a:": {"a": '":"'}}, ":"]


@pytest.mark.parametrize("body", [b"null", b"[]", b"1", b'"Record"', b"true"])
def test_json_that_is_no_object_is_called_what_it_is(body: bytes) -> None:
    ((pointer, detail),) = refused(body)
    assert pointer == ""
    assert detail.startswith("Expected `object`, got `")


@pytest.mark.parametrize("tag", ['"Nope"', '"opensession"', '"ExpireSession"', '"Command"', '"out of range"', '""'])
def test_an_unknown_type_is_refused_and_the_systems_own_are_unknown(tag: str) -> None:
    body = f'{{"type":{tag},"session_id":"{SESSION_ID}","deadline":"2026-11-21T09:00:00.000000Z"}}'
    assert refused(body) == [("/type", f"Invalid value '{tag[1:-1]}'")]
    assert pointed_at('{"type":1}') == pointed_at('{"type":null}') == ["/type"]


@pytest.mark.parametrize("body", [rb'"\xff"', b'{"\xc3":1}', b'"\xed\xa0\x80"', b'"\xc0\xaf"', b'"\xf5\x80\x80\x80"'])
def test_bytes_that_are_no_utf8_are_refused(body: bytes) -> None:
    ((pointer, _),) = refused(b'{"type":"Record","kind":"a","body":' + body.replace(rb"\xff", b"\xff") + b"}")
    assert pointer == ""


@pytest.mark.parametrize("text", [r"\ud800", r"\udc00", r"\ud800\ud800", r"\udc00\ud800", r"a\uDFFFb"])
@pytest.mark.parametrize("field", ['"body":"%s"', '"body":{"%s":1}', '"external_id":"%s"'])
def test_a_lone_surrogate_is_refused_wherever_it_stands(text: str, field: str) -> None:
    assert pointed_at('{"type":"Record","kind":"a",' + field % text + "}") == [""]


def test_a_pair_of_surrogates_is_one_character() -> None:
    command = read_command(rb'{"type":"Record","kind":"a","body":"\ud83d\ude00"}')
    assert isinstance(command, Record)
    assert command.body == "\N{GRINNING FACE}"


# Fields: unknown, missing, of the wrong type


@each_type
@pytest.mark.parametrize(
    ("name", "pointer"),
    [("x", "/x"), ("a/b~c", "/a~1b~0c"), ("", "/"), ("é\n`", "/é\n`"), ("$sealed", "/$sealed"), ("Type", "/Type")],
)
def test_an_unknown_field_is_pointed_at(kind: type[Command], name: str, pointer: str) -> None:
    assert refused(body_of(kind, **{name: 1})) == [(pointer, "there is no such field")]


@pytest.mark.parametrize(
    ("kind", "missing"), [(OpenSession, "agent_role"), (AnnotateSession, "text"), (Record, "kind")]
)
def test_a_missing_field_is_named_and_its_object_pointed_at(kind: type[Command], missing: str) -> None:
    body = json.dumps({"type": kind.__name__}).encode()
    assert refused(body) == [("", f"Object missing required field `{missing}`")]


@pytest.mark.parametrize(
    ("kind", "fields", "pointer"),
    [
        (Record, {"refs": [{"type": "a", "id": "b"}, {"type": "a", "id": "b", "z/": 1}]}, "/refs/1/z~1"),
        (Record, {"refs": [{"type": "a"}]}, "/refs/0"),
        (Record, {"refs": [{"type": "a:b", "id": "b"}]}, "/refs/0/type"),
        (Record, {"refs": [{"type": "a", "id": "b"}] * 17}, "/refs"),
        (Record, {"usage": {"cost": {"amount": "1e5", "currency": "EUR"}}}, "/usage/cost/amount"),
        (Record, {"usage": {"cost": {"amount": 1.5, "currency": "EUR"}}}, "/usage/cost/amount"),
        (Record, {"usage": {"cost": {"amount": "1", "currency": "eur"}}}, "/usage/cost/currency"),
        (Record, {"usage": {"input_tokens": -1}}, "/usage/input_tokens"),
        (Record, {"usage": {"input_tokens": 1.5}}, "/usage/input_tokens"),
        (Record, {"usage": {"inputTokens": 1}}, "/usage/inputTokens"),
        (Record, {"artifacts": [{"uri": "a"}, {"sha256": "A" * 64}]}, "/artifacts/1/sha256"),
        (Record, {"artifacts": [{}] * 101}, "/artifacts"),
        (Record, {"artifacts": {}}, "/artifacts"),
        (Record, {"kind": "Tool.Called"}, "/kind"),
        (Record, {"kind": "tool..called"}, "/kind"),
        (Record, {"kind": "a" * 101}, "/kind"),
        (Record, {"kind": ""}, "/kind"),
        (Record, {"status": "done"}, "/status"),
        (Record, {"record_id": "nope"}, "/record_id"),
        (Record, {"record_id": None}, "/record_id"),
        (Record, {"session_id": 5}, "/session_id"),
        (OpenSession, {"agent_role": None}, "/agent_role"),
        (OpenSession, {"agent_role": "x" * 256}, "/agent_role"),
        (OpenSession, {"metadata": []}, "/metadata"),
        (OpenSession, {"metadata": None}, "/metadata"),
        (OpenSession, {"agent": {"policy_digest": "sha256:" + "A" * 64}}, "/agent/policy_digest"),
        (OpenSession, {"agent": {"sub": "me"}}, "/agent/sub"),
        (ChangeSession, {"status": "closed"}, "/status"),
        (ChangeSession, {"status": None}, "/status"),
        (ChangeSession, {"force": "yes"}, "/force"),
        (CancelSession, {"cascade": 1}, "/cascade"),
        (AnnotateSession, {"text": ""}, "/text"),
        (AnnotateSession, {"text": "x" * 4097}, "/text"),
        (AnnotateSession, {"text": 5}, "/text"),
        (SubmitTask, {"priority": 10}, "/priority"),
        (SubmitTask, {"max_attempts": 0}, "/max_attempts"),
        (SubmitTask, {"start": {"worker": "w", "lease_seconds": 0}}, "/start/lease_seconds"),
        (SubmitTask, {"start": {}}, "/start"),
        (ClaimTasks, {"kinds": []}, "/kinds"),
        (ClaimTasks, {"kinds": ["Mail"]}, "/kinds/0"),
        (ClaimTasks, {"n": 101}, "/n"),
        (RequestApproval, {"action": {"arguments": {}}}, "/action"),
        (RequestApproval, {"action": {"tool": "a", "args": {}}}, "/action/args"),
        (RequestApproval, {"quorum": {"approve": 0}}, "/quorum/approve"),
        (RequestApproval, {"quorum": {"roles": []}}, "/quorum/roles"),
        (RequestApproval, {"risk": "none"}, "/risk"),
        (RequestApproval, {"uses": 0}, "/uses"),
        (CastVote, {"verdict": "yes"}, "/verdict"),
        (CastVote, {"digest_seen": "sha256:" + "A" * 64}, "/digest_seen"),
        (CastVote, {"voter": {"sub": "mia"}}, "/voter"),
        (RecordOutcome, {"outcome": "unknown"}, "/outcome"),
        (AnnotateSession, {"expected_version": -1}, "/expected_version"),
        (AnnotateSession, {"expected_version": 1.0}, "/expected_version"),
        (AnnotateSession, {"causation_id": ""}, "/causation_id"),
        (AnnotateSession, {"correlation_id": "x" * 129}, "/correlation_id"),
    ],
)
def test_a_wrong_value_is_pointed_at(kind: type[Command], fields: dict[str, Any], pointer: str) -> None:
    assert pointed_at(body_of(kind, **fields)) == [pointer]


def test_under_a_key_of_the_callers_own_the_pointer_ends_at_what_holds_it() -> None:
    """msgspec does not tell the keys of a dictionary; the parent is pointed at, and the detail says the rest."""
    assert refused(body_of(OpenSession, labels={"a/b": 5})) == [("/labels", "Expected `str`, got `int`")]
    assert pointed_at(body_of(OpenSession, labels={"": "x"})) == ["/labels"]
    assert pointed_at('{"type":"Record","kind":"a","body":{"x":[1e400]}}') == ["/body"]


def test_a_session_has_at_most_32_labels() -> None:
    assert isinstance(read_command(body_of(OpenSession, labels={str(n): "x" for n in range(32)})), Command)
    assert pointed_at(body_of(OpenSession, labels={str(n): "x" for n in range(33)})) == ["/labels"]


@pytest.mark.parametrize("kind", [OpenSession, ChangeSession])
def test_metadata_is_at_most_16_kib_of_utf8(kind: type[Command]) -> None:
    def sized(size: int) -> dict[str, str]:
        return {"a": "é" * ((size - 8) // 2) + "x" * (size % 2)}

    assert len(canonical(sized(16 * 1024))) == 16 * 1024
    assert isinstance(read_command(body_of(kind, metadata=sized(16 * 1024))), Command)
    assert refused(body_of(kind, metadata=sized(16 * 1024 + 1))) == [("/metadata", "it is over 16384 bytes")]


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (Record, "body"),
        (SubmitTask, "payload"),
        (CompleteTask, "result"),
        (FailTask, "error"),
        (RecordOutcome, "result"),
    ],
)
def test_what_is_free_is_at_most_1_mib(kind: type[Command], field: str) -> None:
    assert isinstance(read_command(body_of(kind, **{field: "x" * (2**20 - 2)})), Command)
    assert refused(body_of(kind, **{field: "x" * (2**20 - 1)})) == [(f"/{field}", "it is over 1048576 bytes")]


@pytest.mark.parametrize("kind", [RequestApproval, EditApproval, BeginUse])
def test_an_action_is_at_most_1_mib(kind: type[Command]) -> None:
    def sized(size: int) -> dict[str, str]:
        return {"tool": "a", "arguments": "x" * (size - len(canonical({"tool": "a", "arguments": ""})))}

    assert isinstance(read_command(body_of(kind, action=sized(2**20))), Command)
    assert refused(body_of(kind, action=sized(2**20 + 1))) == [("/action", "it is over 1048576 bytes")]


@pytest.mark.parametrize(
    ("kind", "field"), [(AnnotateSession, "text"), (ChangeSession, "reason"), (RequestApproval, "summary")]
)
def test_a_text_is_at_most_4096_characters_and_a_personal_one_16_kib(kind: type[Command], field: str) -> None:
    def personal(size: int) -> Any:
        value = "x" * (size - len(canonical({"$personal": {"subject": "mia", "value": ""}})))
        return {"$personal": {"subject": "mia", "value": value}}

    for text in ("\N{GRINNING FACE}" * 4096, "\x00" * 4096, personal(16 * 1024)):
        assert isinstance(read_command(body_of(kind, **{field: text})), Command)
    assert pointed_at(body_of(kind, **{field: "x" * 4097})) == [f"/{field}"]
    assert refused(body_of(kind, **{field: personal(16 * 1024 + 1)})) == [(f"/{field}", "it is over 16384 bytes")]


# Lines of text


LINES = [
    (OpenSession, "agent_role", "/agent_role", lambda text: text),
    (OpenSession, "task_id", "/task_id", lambda text: text),
    (OpenSession, "labels", "/labels", lambda text: {"a": text}),
    (OpenSession, "labels", "/labels", lambda text: {text: "a"}),
    (OpenSession, "agent", "/agent/name", lambda text: {"name": text}),
    (ChangeSession, "task_id", "/task_id", lambda text: text),
    (AnnotateSession, "command_id", "/command_id", lambda text: text),
    (AnnotateSession, "correlation_id", "/correlation_id", lambda text: text),
    (AnnotateSession, "external_id", "/external_id", lambda text: text),
    (AnnotateSession, "refs", "/refs/0/id", lambda text: [{"type": "a", "id": text}]),
    (AnnotateSession, "refs", "/refs/0/type", lambda text: [{"type": text, "id": "a"}]),
    (AnnotateSession, "text", "/text/$personal/subject", lambda text: {"$personal": {"subject": text, "value": 1}}),
    (Record, "kind", "/kind", lambda text: text),
    (Record, "artifacts", "/artifacts/0/uri", lambda text: [{"uri": text}]),
    (Record, "usage", "/usage/model", lambda text: {"model": text}),
]


@pytest.mark.parametrize(("kind", "field", "pointer", "put"), LINES)
def test_a_line_holds_no_control_character_not_even_at_its_end(
    kind: type[Command], field: str, pointer: str, put: Any
) -> None:
    assert isinstance(read_command(body_of(kind, **{field: put("a")})), Command)
    for text in ("a\x00", "a\n", "\na", "a\r", "a\tb", "a\x1f", "a\x7f", "\n", ""):
        assert pointed_at(body_of(kind, **{field: put(text)})) == [pointer]


@pytest.mark.parametrize(
    "fields",
    [
        {"usage": {"cost": {"amount": "1\n", "currency": "EUR"}}},
        {"usage": {"cost": {"amount": "1", "currency": "EUR\n"}}},
        {"artifacts": [{"sha256": "a" * 64 + "\n"}]},
    ],
)
def test_a_pattern_ends_where_the_text_ends(fields: dict[str, Any]) -> None:
    assert len(refused(body_of(Record, **fields))) == 1
    assert pointed_at(body_of(OpenSession, agent={"tools_digest": DIGEST + "\n"})) == ["/agent/tools_digest"]


@pytest.mark.parametrize("command_id", ["a", "a" * 255, "0199a7c2-0000-7000-8000-000000000001", "~:@+._-"])
def test_a_command_id_is_1_to_255_plain_characters(command_id: str) -> None:
    assert read_command(body_of(OpenSession, command_id=command_id)).command_id == command_id
    for wrong in (command_id + " ", command_id + "/", command_id + "é", command_id + "a" * 255):
        assert pointed_at(body_of(OpenSession, command_id=wrong)) == ["/command_id"]


def test_free_text_may_hold_any_character() -> None:
    text = "two\nlines\x00\N{SNOWMAN}"
    command = read_command(body_of(AnnotateSession, text=text))
    assert isinstance(command, AnnotateSession)
    assert command.text == text
    assert read_command(canonical(command)) == command


# Numbers


def out_of_range(body: bytes | str) -> list[str]:
    with pytest.raises(NumberOutOfRange) as error:
        read_command(body.encode() if isinstance(body, str) else body)
    assert error.value.code == "number_out_of_range"
    assert all("send it as a string" in e["detail"] for e in error.value.errors)
    return [e["pointer"] for e in error.value.errors]


@pytest.mark.parametrize("sign", ["", "-"])
def test_an_integer_is_exact_up_to_2_to_the_53_less_1(sign: str) -> None:
    assert isinstance(read_command(f'{{"type":"Record","kind":"a","body":{sign}9007199254740991}}'.encode()), Command)
    for digits in ("9007199254740992", "18446744073709551616", "9" * 30, "9" * 5000):
        assert out_of_range(f'{{"type":"Record","kind":"a","body":{sign}{digits}}}') == ["/body"]


def test_a_number_out_of_range_is_pointed_at_wherever_it_stands() -> None:
    large = 2**53
    body = {"a/b": [1, {"~": large}], "c": -large, "": [[large]]}
    assert sorted(out_of_range(body_of(Record, body=body))) == ["/body//0/0", "/body/a~1b/1/~0", "/body/c"]
    assert out_of_range(body_of(OpenSession, metadata={"n": large})) == ["/metadata/n"]
    assert out_of_range(body_of(Record, usage={"input_tokens": large})) == ["/usage/input_tokens"]
    assert out_of_range(body_of(Record, artifacts=[{"size_bytes": large}])) == ["/artifacts/0/size_bytes"]
    assert out_of_range(body_of(Record, expected_version=large)) == ["/expected_version"]
    marked = {"$personal": {"subject": "mia", "value": large}}
    assert out_of_range(body_of(Record, body=marked)) == ["/body/$personal/value"]


def test_of_many_numbers_out_of_range_the_first_20_are_named() -> None:
    assert out_of_range(body_of(Record, body=[2**53] * 5000)) == [f"/body/{n}" for n in range(20)]


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1e99999999999", "9" * 400 + ".5"])
def test_a_number_that_is_not_finite_in_binary64_is_out_of_range(number: str) -> None:
    assert out_of_range(f'{{"type":"Record","kind":"a","body":{number}}}') == ["/body"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "nan", "01", "+1", ".5", "1.", "0x1", "1_000"])
def test_what_json_has_no_number_for_is_no_json(number: str) -> None:
    assert refused(f'{{"type":"Record","kind":"a","body":{number}}}') == [("", "it is not valid JSON")]


@pytest.mark.parametrize(
    ("number", "value"),
    [("-0", 0), ("-0.0", 0.0), ("1.10", 1.1), ("1e5", 100000.0), ("1E-400", 0.0), ("1.7976931348623157e308", None)],
)
def test_a_finite_number_is_kept_as_its_value(number: str, value: float | None) -> None:
    command = read_command(f'{{"type":"Record","kind":"a","body":{number}}}'.encode())
    assert isinstance(command, Record)
    assert command.body == (float(number) if value is None else value)
    assert read_command(canonical(command)) == command


def test_digits_inside_text_are_no_number() -> None:
    assert isinstance(read_command(body_of(Record, body={"9" * 40: "9" * 40})), Command)


# Nesting


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":', "}")])
def test_a_body_may_be_nested_100_levels_and_no_deeper(start: str, end: str) -> None:
    def nested(levels: int) -> str:
        return f'{{"type":"Record","kind":"a","body":{start * (levels - 1)}{"[]"}{end * (levels - 1)}}}'

    assert isinstance(read_command(nested(100).encode()), Command)
    for levels in (101, 300, 900, 990, 5_000, 100_000):
        ((pointer, detail),) = refused(nested(levels))
        assert pointer == ""
        assert "nested" in detail


def test_many_brackets_side_by_side_are_no_nesting() -> None:
    command = read_command(body_of(Record, body=[[{"a": [n]}] for n in range(1000)] + ["[" * 1000]))
    assert isinstance(command, Record)
    assert len(command.body) == 1001


# Times


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2026-11-21T09:00:00Z", "2026-11-21T09:00:00Z"),
        ("2026-11-21t09:00:00z", "2026-11-21T09:00:00Z"),
        ("2026-11-21 09:00:00Z", "2026-11-21T09:00:00Z"),  # RFC 3339 s5.6 lets a space stand for the T
        ("2026-11-21T09:00:00-00:00", "2026-11-21T09:00:00Z"),
        ("2026-11-21T09:00:00+05:30", "2026-11-21T03:30:00Z"),
        ("2026-11-21T09:00:00-23:59", "2026-11-22T08:59:00Z"),
        ("2026-11-21T09:00:00.5Z", "2026-11-21T09:00:00.5Z"),
        ("2026-11-21T09:00:00.1234567Z", "2026-11-21T09:00:00.123457Z"),
        ("2024-02-29T00:00:00Z", "2024-02-29T00:00:00Z"),
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00Z"),
        ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999999Z"),
    ],
)
def test_a_time_is_rfc_3339_in_any_offset(text: str, utc: str) -> None:
    command = read_command(body_of(AnnotateSession, occurred_at=text))
    assert command.occurred_at == read_command(body_of(AnnotateSession, occurred_at=utc)).occurred_at
    assert read_command(canonical(command)) == command


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (AnnotateSession, "occurred_at"),
        (OpenSession, "expires_at"),
        (Record, "started_at"),
        (Record, "ended_at"),
        (SubmitTask, "run_at"),
        (SubmitTask, "deadline_at"),
        (RequestApproval, "expires_at"),
    ],
)
@pytest.mark.parametrize(
    "text",
    [
        "2026-11-21T09:00:00",  # no offset: whose nine o'clock?
        "2026-11-21",
        "2016-12-31T23:59:60Z",  # a leap second; nothing here has a second 60
        "0000-01-01T00:00:00Z",
        "10000-01-01T00:00:00Z",
        "0001-01-01T00:00:00+00:01",  # in UTC: the year 0
        "9999-12-31T23:59:59-00:01",  # in UTC: the year 10000
        "9999-12-31T23:59:59.9999999Z",
        "2026-02-30T00:00:00Z",
        "2026-11-21T24:00:00Z",
        "2026-11-21T09:00:00+24:00",
        "2026-11-21T09:00:00Z\n",
        "now",
        1700000000,
    ],
)
def test_a_time_that_is_none_is_pointed_at(kind: type[Command], field: str, text: Any) -> None:
    assert pointed_at(body_of(kind, **{field: text})) == [f"/{field}"]


# Personal values


MARK = {"$personal": {"subject": "mia", "value": {"name": "Mia", "ages": [1, 2]}}}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (OpenSession, {"metadata": {"a": [MARK, {"b": MARK}]}}),
        (Record, {"body": MARK}),
        (Record, {"body": {"$personally": {"subject": 1}, "x": "$personal", "y": ["$sealed"]}}),
        (ChangeSession, {"reason": MARK}),
        (CancelSession, {"reason": MARK}),
        (AnnotateSession, {"text": MARK}),
        (SubmitTask, {"payload": {"to": MARK}}),
        (FailTask, {"error": MARK}),
        (RequestApproval, {"action": {"tool": "refund", "arguments": {"iban": MARK}}, "summary": MARK}),
        (EditApproval, {"action": {"tool": "refund", "arguments": MARK}, "reason": MARK}),
        (CastVote, {"reason": MARK}),
        (RecordOutcome, {"result": [MARK]}),
    ],
)
def test_a_personal_value_may_stand_in_every_free_field(kind: type[Command], fields: dict[str, Any]) -> None:
    command = read_command(body_of(kind, **fields))
    assert read_command(canonical(command)) == command


def test_a_text_that_is_personal_is_read_as_such() -> None:
    command = read_command(body_of(AnnotateSession, text=MARK))
    assert isinstance(command, AnnotateSession)
    assert isinstance(command.text, Personal)
    assert command.text.personal.subject == "mia"


@pytest.mark.parametrize(
    ("value", "pointer"),
    [
        ({"a/b": {"$personal": 1}}, "/a~1b/$personal"),
        ({"$personal": {"subject": "s"}}, "/$personal"),
        ({"$personal": {"subject": "s", "value": 1, "x": 1}}, "/$personal"),
        ({"$personal": {"subject": "", "value": 1}}, "/$personal/subject"),
        ({"$personal": {"subject": "s" * 256, "value": 1}}, "/$personal/subject"),
        ({"$personal": {"subject": 5, "value": 1}}, "/$personal/subject"),
        ({"$personal": {"subject": "s", "value": 1}, "other": 1}, ""),
        ({"$personal": {"subject": "s", "value": [MARK]}}, "/$personal/value/0"),
        ({"$personal": {"subject": "s", "value": {"$sealed": 1}}}, "/$personal/value/$sealed"),
        ([{"$sealed": {"subject": "x", "key": 1, "nonce": "", "box": ""}}], "/0/$sealed"),
        ([[{"$erased": True}]], "/0/0/$erased"),
    ],
)
@pytest.mark.parametrize(("kind", "field"), [(Record, "body"), (OpenSession, "metadata"), (ChangeSession, "metadata")])
def test_a_malformed_or_reserved_mark_is_pointed_at(kind: type[Command], field: str, value: Any, pointer: str) -> None:
    if field == "metadata":
        value, pointer = {"m~": value}, f"/m~0{pointer}"
    assert pointed_at(body_of(kind, **{field: value})) == [f"/{field}{pointer}"]


def test_a_reserved_name_does_not_hide_behind_an_escape() -> None:
    assert pointed_at(r'{"type":"Record","kind":"a","body":{"\u0024se\u0061led":{}}}') == ["/body/$sealed"]


@pytest.mark.parametrize(
    ("value", "pointer"),
    [
        ({}, "/text"),
        ({"$personal": {"subject": "s"}}, "/text/$personal"),
        ({"$personal": {"subject": "s", "value": 1, "x": 1}}, "/text/$personal/x"),
        ({"$personal": {"subject": "s", "value": 1}, "x": 1}, "/text/x"),
        ({"$personal": {"subject": "s", "value": {"$erased": True}}}, "/text/$personal/value/$erased"),
        ({"$sealed": {}}, "/text/$sealed"),
    ],
)
def test_a_text_is_words_or_one_whole_personal_value(value: Any, pointer: str) -> None:
    assert pointed_at(body_of(AnnotateSession, text=value)) == [pointer]


@pytest.mark.parametrize("field", ["labels", "external_id", "agent_role", "task_id"])
def test_a_personal_value_may_not_stand_where_it_would_not_be_sealed(field: str) -> None:
    value = {"a": MARK} if field == "labels" else MARK
    assert pointed_at(body_of(OpenSession, **{field: value})) == [f"/{field}"]


# Anything at all


def assert_read_or_refused(body: bytes, kind: type[Command] | None = None) -> None:
    errors = []
    try:
        command = read_command(body, kind)
    except MalformedRequest as error:
        errors = error.errors
    if errors:
        assert all(re.fullmatch(r"(/([^/~]|~[01])*)*", told["pointer"]) and told["detail"] for told in errors)
    else:
        assert type(command) in COMMANDS
        assert read_command(canonical(command)) == command, "what is stored reads as what was asked"
        json.loads(body, object_pairs_hook=each_once)


def each_once(fields: list[tuple[str, Any]]) -> None:
    assert len({name for name, _ in fields}) == len(fields)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["$personal", "$sealed", SESSION_ID, "2026-11-21T09:00:00Z", 2**53, 2**64, -(2**63), "a\n"])
)
KEYS = st.text(max_size=5) | st.sampled_from(["$personal", "$sealed", "$erased", "subject", "value", "type", "a/b~"])
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4))


@st.composite
def almost_commands(draw: st.DrawFn) -> bytes:
    """A whole command in which a few fields are something else."""
    kind = draw(st.sampled_from(COMMANDS))
    fields = {"type": kind.__name__, **WHOLE[kind], **ENVELOPE}
    for name in draw(st.lists(st.sampled_from([*sorted(fields), "x"]), max_size=3, unique=True)):
        if draw(st.booleans()):
            fields[name] = draw(VALUES)
        else:
            fields.pop(name, None)
    return json.dumps(fields, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=200), st.none() | st.sampled_from(COMMANDS))
@example(b"\xff", None)
@example(b'{"type":"Record","kind":"a","body":' + b"[" * 100_000, None)
def test_any_bytes_are_a_command_or_malformed(body: bytes, kind: type[Command] | None) -> None:
    assert_read_or_refused(body, kind)


@settings(deadline=None, max_examples=300)
@given(almost_commands())
def test_almost_a_command_is_a_command_or_malformed(body: bytes) -> None:
    assert_read_or_refused(body)


@settings(deadline=None, max_examples=150)
@given(almost_commands(), st.data())
def test_a_command_with_some_bytes_changed_is_a_command_or_malformed(body: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(body) - 1))
    changed = body[:at] + data.draw(st.binary(max_size=4)) + body[at + data.draw(st.integers(0, 4)) :]
    assert_read_or_refused(changed)


def test_personal_values_stand_inside_metadata_and_not_in_its_place() -> None:
    marked = '{"$personal": {"subject": "mia", "value": {}}}'
    with pytest.raises(MalformedRequest) as refused:
        read_command(f'{{"type": "OpenSession", "agent_role": "x", "metadata": {marked}}}'.encode())
    assert refused.value.errors[0]["pointer"] == "/metadata"
    read_command(f'{{"type": "OpenSession", "agent_role": "x", "metadata": {{"who": {marked}}}}}'.encode())
