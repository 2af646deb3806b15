"""The bytes that can never change: entries, leaves, stamps; and what reading them must survive."""

import json
from datetime import UTC, datetime, timedelta, timezone
from hashlib import sha256
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.entry import ENTRY_BYTES_MAX, FACTS, Event, canonical, decode, encode, whole
from ledger.errors import UpgradeRequired
from ledger.events import (
    ApprovalRequested,
    AttemptFailed,
    CommandRefused,
    Fact,
    FactRecorded,
    SessionActivated,
    SessionAnnotated,
    SessionCancelled,
    SessionCompleted,
    SessionExpired,
    SessionFailed,
    SessionMetadataChanged,
    SessionOpened,
    SessionTaskBound,
    TaskClaimed,
    TaskSubmitted,
    VoteCast,
)
from ledger.merkle import leaf_hash
from ledger.values import (
    SYSTEM,
    Actor,
    AgentDescription,
    Artifact,
    Cost,
    Principal,
    Quorum,
    Ref,
    Usage,
    Voter,
    moment,
    stamp,
)
from tests.ledger.golden import AGENT, GOLDEN, HEAD, NAMED, SEALED, TAIL, event_of

each_golden = pytest.mark.parametrize(
    ("data", "text", "leaf"), GOLDEN, ids=lambda v: type(v).__name__ if isinstance(v, Fact) else ""
)


def test_every_fact_has_golden_bytes() -> None:
    assert {type(data) for data, _, _ in GOLDEN} == set(FACTS.values())
    assert all(type(data).schema_version == 1 for data, _, _ in GOLDEN)


@each_golden
def test_an_entry_is_these_bytes_for_ever(data: Fact, text: str, leaf: str) -> None:
    event = event_of(data)
    entry, payload = encode(event)
    assert entry.decode() == HEAD + text + TAIL % (data.stream_type, type(data).__name__)
    assert payload is None
    assert leaf_hash(entry).hex().startswith(leaf)
    assert decode(entry) == decode(entry, None, type(data).__name__) == event


def test_the_whole_envelope_is_these_bytes_for_ever() -> None:
    actor = Actor(
        issuer="https://id.example",
        sub="mia",
        kind="human",
        assurance="imported",
        roles=("approver", "auditor"),
        client="console",
        on_behalf_of=(Principal("i", "a"), Principal("i", "b")),
        name=SEALED,
        auth_time=1795251600,
        acr="2",
        amr=("pwd", "otp"),
    )
    event = event_of(
        SessionActivated(),
        actor=actor,
        stream_version=7,
        session_id=NAMED,
        root_session_id=NAMED,
        causation_id=NAMED,
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03",
        external_id="run#7",
        refs=(Ref("invoice", "9"), Ref("order", "a:b")),
        reason="because",
    )
    sealed = canonical(SEALED).decode()
    assert encode(event)[0].decode() == (
        '{"actor":{"acr":"2","amr":["pwd","otp"],"assurance":"imported","auth_time":1795251600,"client":"console",'
        f'"issuer":"https://id.example","kind":"human","name":{sealed},'
        '"on_behalf_of":[{"issuer":"i","sub":"a"},{"issuer":"i","sub":"b"}],"roles":["approver","auditor"],"sub":"mia"},'
        '"causation_id":"0199a7c2-5d4e-7000-8000-0123456789ab","command_id":"0199a7c2-0000-7000-8000-000000000003",'
        '"correlation_id":"0199a7c2-5d4e-7000-8000-0123456789ab","data":{},'
        '"event_id":"0199a7c3-0000-7000-8000-000000000002","external_id":"run#7",'
        '"ledger":"0199a7b0-0000-7000-8000-000000000001","occurred_at":"2026-11-21T09:00:00.000000Z","project":"demo",'
        '"reason":"because","recorded_at":"2026-11-21T09:00:00.001234Z",'
        '"refs":[{"id":"9","type":"invoice"},{"id":"a:b","type":"order"}],'
        '"root_session_id":"0199a7c2-5d4e-7000-8000-0123456789ab","schema_version":1,'
        '"session_id":"0199a7c2-5d4e-7000-8000-0123456789ab","stream_id":"0199a7c2-5d4e-7000-8000-0123456789ab",'
        '"stream_type":"session","stream_version":7,'
        '"traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03","type":"SessionActivated","v":1}'
    )
    assert decode(encode(event)[0]) == event


# Data beside its entry


def test_an_entry_whose_data_stands_beside_it_is_these_bytes_for_ever() -> None:
    event = event_of(FactRecorded(kind="note", body="x" * ENTRY_BYTES_MAX))
    entry, payload = encode(event)
    assert payload == b'{"body":"' + b"x" * ENTRY_BYTES_MAX + b'","kind":"note"}'
    digest = "a927d0f5636c36e79ca8d84d4aea329c544db71d9e37bd4c8ff92c7757f2d517"
    assert sha256(payload).hexdigest() == digest
    head, tail = HEAD.removesuffix('"data":'), TAIL % ("record", "FactRecorded")
    assert entry.decode() == f'{head}"data_bytes":61465,"data_sha256":"{digest}"{tail}'
    assert leaf_hash(entry).hex() == "5d88eb7a82989d3886c3119eb2db7de8ee185f2f98c51b0c2588dfd5dcfda41c"
    assert decode(entry, payload) == event
    assert whole(entry, payload) == msgspec.json.encode(event, order="sorted")


def test_data_stands_beside_its_entry_only_where_that_would_be_over_60_kib() -> None:
    least = len(encode(event_of(FactRecorded(kind="note", body="")))[0])
    fits, payload = encode(event_of(FactRecorded(kind="note", body="x" * (ENTRY_BYTES_MAX - least))))
    assert (len(fits), payload) == (60 * 1024, None)
    entry, payload = encode(event_of(FactRecorded(kind="note", body="x" * (ENTRY_BYTES_MAX - least + 1))))
    assert payload is not None
    assert len(entry) < 1024


@pytest.mark.parametrize("change", [b"y", b""])
def test_a_payload_that_is_not_the_one_hashed_is_not_taken(change: bytes) -> None:
    entry, payload = encode(event_of(FactRecorded(kind="note", body="x" * ENTRY_BYTES_MAX)))
    assert payload is not None
    with pytest.raises(ValueError, match="not the one"):
        decode(entry, payload[:20] + change + payload[21:])
    small, _ = encode(event_of(SessionActivated()))
    with pytest.raises(ValueError, match="not the one"):
        whole(small, payload)


# The canonical form


def test_the_canonical_form_is_sorted_by_code_point_tight_and_unescaped() -> None:
    value = {"b": 1, "a": {"\U0001f600": 1, "\ufffd": 2, "é": "\u2028/<>&\x7f", "": []}, "A": [1.0, -0.0, 1e22, 5e-324]}
    assert canonical(value).decode() == (
        '{"A":[1.0,-0.0,1e22,5e-324],"a":{"":[],"é":"\u2028/<>&\x7f","\ufffd":2,"\U0001f600":1},"b":1}'
    )


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(JSON)
def test_the_canonical_form_is_that_of_every_json_writer_that_sorts(value: Any) -> None:
    text = canonical(value)
    assert json.loads(text) == value
    assert canonical(msgspec.json.decode(text)) == text
    if not any(isinstance(part, float) for part in parts_of(value)):  # 1e22 or 1e+22: that differs among writers
        assert text.decode() == json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).replace(
            "\x7f", "\x7f"
        )


def parts_of(value: Any) -> list[Any]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value, *(part for item in inside for part in parts_of(item))]


# Reading back


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
STAMPS = st.datetimes(timezones=st.just(UTC)).map(stamp)
JSONS = st.dictionaries(st.text(max_size=8), JSON, max_size=3)
DATA: st.SearchStrategy[Fact] = st.one_of(
    st.builds(
        SessionOpened,
        agent_role=WORDS,
        expires_at=STAMPS,
        task_id=st.none() | WORDS,
        metadata=JSONS,
        labels=st.dictionaries(WORDS, WORDS, max_size=3),
        parent_session_id=st.none() | st.uuids(),
        agent=st.none() | st.builds(AgentDescription, name=st.none() | WORDS, model=WORDS),
    ),
    st.builds(SessionActivated),
    st.builds(SessionCompleted),
    st.builds(SessionFailed, reason=JSON),
    st.builds(SessionExpired, deadline=STAMPS),
    st.builds(SessionCancelled, reason=JSON, cascade=st.booleans()),
    st.builds(SessionTaskBound, task_id=st.none() | WORDS),
    st.builds(SessionMetadataChanged, metadata=JSONS),
    st.builds(SessionAnnotated, text=JSON),
    st.builds(
        FactRecorded,
        kind=WORDS,
        status=st.sampled_from(["ok", "error", None]),
        body=JSON | st.text(min_size=1).map(lambda text: text * ENTRY_BYTES_MAX),
        usage=st.none() | st.builds(Usage, input_tokens=st.integers(0, 2**53 - 1), cost=st.just(Cost("1.50", "EUR"))),
        artifacts=st.lists(st.builds(Artifact, uri=WORDS), max_size=2).map(tuple),
    ),
    st.builds(
        TaskSubmitted,
        kind=WORDS,
        run_at=STAMPS,
        payload=JSON,
        priority=st.integers(0, 9),
        deadline_at=st.none() | STAMPS,
    ),
    st.builds(TaskClaimed, attempt=st.integers(1, 100), worker=WORDS, lease_id=st.uuids(), lease_until=STAMPS),
    st.builds(AttemptFailed, attempt=st.integers(1, 100), lease_id=st.uuids(), error=JSON, retryable=st.booleans()),
    st.builds(
        ApprovalRequested,
        action=JSON,
        requester=st.builds(Principal, WORDS, WORDS),
        risk=st.sampled_from(["low", "critical"]),
        quorum=st.builds(Quorum, approve=st.integers(1, 20), roles=st.lists(WORDS, min_size=1, max_size=3).map(tuple)),
        expires_at=STAMPS,
        valid_for_seconds=st.integers(1, 900),
        uses=st.integers(1, 9),
        outcome_within_seconds=st.integers(1, 300),
        action_digest=WORDS,
        request_digest=WORDS,
        salts=JSONS,
        on_behalf_of=st.lists(st.builds(Principal, WORDS, WORDS), max_size=2).map(tuple),
        summary=JSON,
        edited_by=st.none() | st.builds(Principal, WORDS, WORDS),
    ),
    st.builds(
        VoteCast,
        verdict=st.sampled_from(["approve", "deny"]),
        reason=JSON,
        voter=st.none() | st.builds(Voter, issuer=WORDS, sub=WORDS, evidence=st.none() | st.uuids()),
    ),
    st.builds(
        CommandRefused,
        command_type=WORDS,
        status=st.integers(400, 599),
        code=WORDS,
        params=JSONS,
        attempted=JSON,
        target=st.none() | st.uuids(),
    ),
)


@settings(deadline=None)
@given(
    DATA, JSON, st.lists(st.builds(Ref, WORDS.map(lambda text: text.replace(":", "")).filter(len), WORDS), max_size=3)
)
def test_an_event_is_read_back_as_it_was_written(data: Fact, reason: Any, refs: list[Ref]) -> None:
    event = event_of(data, actor=SYSTEM, reason=reason, refs=tuple(refs))
    entry, payload = encode(event)
    assert len(entry) <= ENTRY_BYTES_MAX
    assert decode(entry, payload) == event
    assert encode(decode(entry, payload)) == (entry, payload)


def changed(entry: bytes, **fields: Any) -> bytes:
    return canonical(msgspec.json.decode(entry) | fields)


def test_a_type_this_release_does_not_know_stops_the_reader() -> None:
    entry = changed(encode(event_of(SessionActivated()))[0], type="SessionTeleported", schema_version=3)
    for known in (None, "SessionTeleported"):
        with pytest.raises(UpgradeRequired) as error:
            decode(entry, None, known)
        assert error.value.params == {"type": "SessionTeleported", "schema_version": 3}
        assert (error.value.status, error.value.recorded) == (503, False)


@pytest.mark.parametrize(
    "data", [{}, {"beam": {"a": 1}}, {"agent_role": 5}, {"agent_role": "a", "expires_at": "x"}, [], 1]
)
def test_a_newer_schema_version_stops_the_reader_whatever_its_data_is(data: Any) -> None:
    entry = encode(event_of(SessionOpened(agent_role="a", expires_at="x")))[0]
    with pytest.raises(UpgradeRequired, match="SessionOpened in schema version 2"):
        decode(changed(entry, schema_version=2, data=data))


@pytest.mark.parametrize("event", [event_of(data) for data, _, _ in GOLDEN], ids=lambda event: event.type)
def test_a_field_that_a_newer_release_added_is_passed_over(event: Event[Any]) -> None:
    """It was added with a default, so what is known here still means what it meant."""
    told = msgspec.json.decode(encode(event)[0])
    told["data"]["added"] = told["added"] = told["actor"]["added"] = {"x": [1]}
    assert decode(canonical(told)) == event


def test_a_part_with_a_field_that_is_not_known_needs_a_newer_schema_version() -> None:
    """Refs, usage, artifacts and the agent's description are strict, as in requests: to add to them is to
    raise the version, and then an older reader stops rather than shows half of it."""
    entry = encode(event_of(FactRecorded(kind="a", usage=Usage(model="m"))))[0]
    data = {"kind": "a", "usage": {"model": "m", "added": 1}}
    with pytest.raises(UpgradeRequired):
        decode(changed(entry, schema_version=2, data=data))
    with pytest.raises(msgspec.ValidationError):
        decode(changed(entry, data=data))


@pytest.mark.parametrize(
    "entry", [b"", b"{}", b"null", b'{"type":1}', b"\xff", b'{"type":"SessionOpened","schema_version":1}']
)
def test_bytes_that_are_no_event_are_not_taken_for_one(entry: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode(entry)


# Times


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("0001-01-01T00:00:00.000000Z", datetime(1, 1, 1, tzinfo=UTC)),
        ("0987-12-31T23:59:59.000001Z", datetime(987, 12, 31, 23, 59, 59, 1, tzinfo=UTC)),
        (
            "2026-11-21T09:00:00.000000Z",
            datetime(2026, 11, 21, 14, 30, tzinfo=timezone(timedelta(hours=5, minutes=30))),
        ),
        ("2026-11-22T08:59:00.000000Z", datetime(2026, 11, 21, 9, tzinfo=timezone(-timedelta(hours=23, minutes=59)))),
        ("9999-12-31T23:59:59.999999Z", datetime.max.replace(tzinfo=UTC)),
    ],
)
def test_a_stamp_is_27_characters_of_utc(text: str, time: datetime) -> None:
    assert stamp(time) == text
    assert moment(text) == time
    assert moment(text).utcoffset() == timedelta(0)


TIMES = st.datetimes(
    datetime.min + timedelta(days=1),  # noqa: DTZ901  (bounds are asked for without a zone)
    datetime.max - timedelta(days=1),  # noqa: DTZ901
    timezones=st.integers(-1439, 1439).map(lambda m: timezone(timedelta(minutes=m))),
)


@settings(deadline=None)
@given(TIMES, TIMES)
def test_stamps_sort_as_the_times_they_are(one: datetime, other: datetime) -> None:
    assert moment(stamp(one)) == one
    assert len(stamp(one)) == 27
    assert (stamp(one) < stamp(other)) == (one < other)
    assert (stamp(one) == stamp(other)) == (one == other)


@pytest.mark.parametrize("text", ["2026-11-21T09:00:00Z", "2026-11-21T09:00:00.000000+00:00", "", "2026-11-21"])
def test_what_is_no_stamp_has_no_moment(text: str) -> None:
    with pytest.raises(ValueError, match="is no stamp"):
        moment(text)


def test_a_principal_is_its_issuer_and_its_subject_and_nothing_else() -> None:
    assert AGENT.principal == "https://id.example/realms/main#9f0c"
    assert SYSTEM.principal == "muniment#system"


def test_the_fields_that_may_be_personal_are_the_free_ones() -> None:
    assert {name: fact.personal for name, fact in FACTS.items() if fact.personal} == {
        "SessionOpened": ("metadata",),
        "SessionFailed": ("reason",),
        "SessionCancelled": ("reason",),
        "SessionMetadataChanged": ("metadata",),
        "SessionAnnotated": ("text",),
        "FactRecorded": ("body",),
        "TaskSubmitted": ("payload",),
        "TaskCompleted": ("result",),
        "AttemptFailed": ("error",),
        "TaskCancelled": ("reason",),
        "TaskRedriven": ("reason",),
        "LateResultRefused": ("result",),
        "ApprovalRequested": ("action", "summary", "salts"),
        "VoteCast": ("reason",),
        "ApprovalWithdrawn": ("reason",),
        "ApprovalCancelled": ("reason",),
        "ApprovalUseCompleted": ("result",),
        "OutcomeReconciled": ("result",),
        "ApprovalRevoked": ("reason",),
        "CommandRefused": ("attempted",),
    }
