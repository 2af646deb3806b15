"""What an approval commits to: the same for the same fields however written, and for nothing else."""

import hmac
import json
from hashlib import sha256
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from uuid_utils.compat import uuid7

from ledger import commitment
from ledger.commands import BeginUse, CastVote, EditApproval, OpenSession, RequestApproval
from ledger.committer import Committer
from ledger.postgres import Pool
from ledger.receipt import Receipt
from ledger.store import read_streams
from ledger.syntax import read_command
from ledger.values import Action, Actor
from ledger.vault import Place
from tests.check import check_ledger, of_type, states
from tests.conftest import Database
from tests.ledger.approvals import ACTION, ANA, APPROVAL, ask, begin, vote
from tests.ledger.given import given

SALT = bytes(range(32))
MIA = {"$personal": {"subject": "mia", "value": "Mia Li"}}
TOM = {"$personal": {"subject": "tom", "value": "Tom Ash"}}


# The form


def test_a_digest_is_of_the_salt_and_the_rfc_8785_form() -> None:
    """Golden: whoever recomputes it elsewhere does it so (RFC 8785, appendix B has numbers like these)."""
    fields = {"\u20ac": "Euro", "\r": 1e21, "b": [1.0, -0.0, 333333333.33333329, 1e-7], "1": None, "\U0001f600": True}
    form = '{"\\r":1e+21,"1":null,"b":[1,0,333333333.3333333,1e-7],"\u20ac":"Euro","\U0001f600":true}'
    assert commitment.digest(SALT, fields) == f"sha256:{sha256(SALT + form.encode()).hexdigest()}"
    assert (
        commitment.digest(SALT, {"tool": "refund", "arguments": {"amount": "12.50", "invoice": 9}})
        == "sha256:f436b3b049e539d7d03347b8b0ef67ef576c5a0eb4155983b56c37bf5effbefa"
    )


def digest(arguments: Any) -> str:
    return commitment.action_digest(Action(tool="pay", arguments=arguments), APPROVAL, given().batch())


@pytest.mark.parametrize(
    "same", [(1, 1.0), (0, -0.0), (1e2, 100), ({"a": 1, "b": 2}, {"b": 2.0, "a": 1.0}), ([1], [1.0])]
)
def test_numbers_that_are_the_same_are_the_same(same: tuple[Any, Any]) -> None:
    assert digest(same[0]) == digest(same[1])


LOOK_ALIKE = [
    (1, "1"),
    (1, True),
    (0, False),
    (0, None),
    ("", None),
    (1, 1.0000000000000002),
    ([1, 2], [2, 1]),
    ([1], [[1]]),
    ({}, []),
    ({"a": None}, {}),
    ("paypal", "p\u0430ypal"),
    ("caf\u00e9", "cafe\u0301"),
    ("\u212b", "\u00c5"),
    ("a b", "a\u00a0b"),
    ("ab", "a\u200bb"),
    ("x", "\uff58"),
    ("1O", "10"),
    ("12.50", "12.5"),
    ("a", "a\n"),
    ("a", "A"),
    ({"a": {"b": 1}}, {"a": '{"b":1}'}),
]


@pytest.mark.parametrize("pair", LOOK_ALIKE)
def test_what_only_looks_the_same_is_not(pair: tuple[Any, Any]) -> None:
    assert digest(pair[0]) != digest(pair[1])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc\u0430$", max_size=3), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@for_all(JSON, JSON)
def test_two_actions_have_one_digest_only_if_they_are_the_same(first: Any, second: Any) -> None:
    """The same: after a look at both as RFC 8785 has them, numbers being binary64 (RFC 8259 s6)."""
    one, two = (json.dumps(_as_numbers(value), sort_keys=True) for value in (first, second))
    assert (digest(first) == digest(second)) == (one == two)
    assert digest(first) == digest(msgspec.json.decode(msgspec.json.encode(first))), "reading it again changes nothing"


def _as_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_numbers(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_as_numbers(part) for part in value]
    return float(value) + 0.0 if isinstance(value, int | float) and not isinstance(value, bool) else value


@settings(max_examples=200, deadline=None)
@for_all(st.binary(min_size=1, max_size=40), st.integers(0, 39), st.integers(1, 255))
def test_one_byte_changed_is_another_action(content: bytes, place: int, change: int) -> None:
    other = bytearray(content)
    other[place % len(content)] ^= change
    first, second = content.decode("latin-1"), other.decode("latin-1")
    asked = given().when(ask(action=Action(tool="pay", arguments=first)))
    granted = asked.taken().when(vote(digest_seen=asked.state.request_digest), ANA).taken()
    granted.when(begin(action=Action(tool="pay", arguments=second))).refused("digest_mismatch")
    assert granted.when(begin(action=Action(tool="pay", arguments=first))).state.state == "executing"


# Salts and marks


def test_each_approval_has_salts_of_its_own_that_only_the_project_can_make() -> None:
    world = given().batch()
    salts = {commitment.salt(of, i, world) for of in ("action", "request") for i in (APPROVAL, uuid7())}
    assert len(salts) == 4
    assert commitment.salt("action", APPROVAL, world) == world.keyed(b"approval salt action\0" + APPROVAL.bytes)
    state = given().when(ask()).state
    assert state.salts == {of: commitment.salt(of, APPROVAL, world).hex() for of in ("action", "request")}


def test_whoever_may_read_an_approval_comes_to_both_digests() -> None:
    state = given().when(ask(summary="Refund", reason="returned", risk="high")).state
    seen = {
        "action": state.action,
        "summary": state.summary,
        "reason": state.reason,
        "risk": state.risk,
        "quorum": msgspec.to_builtins(state.quorum),
        "expires_at": state.expires_at,
    }
    assert commitment.digest(bytes.fromhex(state.salts["action"]), state.action) == state.action_digest
    assert commitment.digest(bytes.fromhex(state.salts["request"]), seen) == state.request_digest


@pytest.mark.parametrize(
    "marked", [{"to": MIA, "n": 1}, {"$personal": {"subject": "mia", "value": {"to": "Mia Li", "n": 1}}}]
)
def test_a_mark_is_not_part_of_what_is_committed_to(marked: Any) -> None:
    assert digest(marked) == digest({"to": "Mia Li", "n": 1})


# Stored


def body(**fields: Any) -> bytes:
    return json.dumps({"action": {"tool": "pay", "arguments": {"to": MIA, "sum": 1.0}}, **fields}).encode()


async def test_personal_values_and_the_salts_over_them_are_sealed_and_open_to_readers(
    committer: Committer, agent: Actor, database: Database
) -> None:
    asked = read_command(body(summary=MIA, reason=TOM, call_key="k"), RequestApproval)
    receipt = await committer.submit("demo", asked, agent)
    state = receipt.state
    rows = await raw(committer.pool, state.approval_id)
    assert b"Mia Li" not in rows
    assert b"Tom Ash" not in rows
    assert list(state.salts) == ["$sealed"]
    place = Place("demo", state.approval_id, state.request_version, state.request_event_id, "/data/salts")
    salts = await committer.vault.unseal("demo", state.salts, place)
    action = {"tool": "pay", "arguments": {"to": "Mia Li", "sum": 1}}
    assert commitment.digest(bytes.fromhex(salts["action"]), action) == state.action_digest
    quorum = {"approve": 1, "deny": 1, "roles": ["approver"]}
    seen = {"action": action, "summary": "Mia Li", "reason": "Tom Ash", "risk": "medium", "quorum": quorum}
    seen["expires_at"] = state.expires_at
    assert commitment.digest(bytes.fromhex(salts["request"]), seen) == state.request_digest
    check_ledger(database.owner)


async def test_what_was_sealed_is_approved_and_run_with_or_without_its_marks(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    for plain in (False, True):
        approval_id = uuid7()
        asked = read_command(body(approval_id=str(approval_id), call_key=str(plain)), RequestApproval)
        state = (await committer.submit("demo", asked, agent)).state
        vote = CastVote(approval_id=approval_id, verdict="approve", digest_seen=state.request_digest)
        await another.submit("demo", vote, ANA)
        to = "Mia Li" if plain else MIA
        use = json.dumps({"execution_id": str(uuid7()), "action": {"tool": "pay", "arguments": {"sum": 1, "to": to}}})
        begun = read_command(use.encode(), BeginUse)
        begun.approval_id = approval_id  # type: ignore[attr-defined]
        receipt = await committer.submit("demo", begun, agent)
        assert (receipt.refusal, receipt.state.state) == (None, "executing")
    check_ledger(database.owner)


async def test_a_question_asked_again_is_answered_as_it_is_now_also_from_the_table(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    session = await committer.submit("demo", OpenSession(agent_role="x"), agent)
    asked: dict[str, Any] = {"action": ACTION, "session_id": session.target, "call_key": "k"}
    first = await committer.submit("demo", RequestApproval(**asked, command_id="first"), agent)
    same = await another.submit("demo", RequestApproval(**asked, command_id="second"), agent)
    assert (first.status, same.status, same.target, same.event_count) == (201, 200, first.target, 0)
    vote = CastVote(approval_id=first.state.approval_id, verdict="approve", digest_seen=first.state.request_digest)
    await committer.submit("demo", vote, ANA)
    for process in (committer, another):
        for command_id, status in (("first", 201), ("second", 200)):
            again = await process.submit("demo", RequestApproval(**asked, command_id=command_id), agent)
            assert (again.replayed, again.status, again.target) == (True, status, first.target)
            assert again.state.state == "approved", "the one answer that is of now, not of then"
    recalled = await another.receipt("demo", agent.principal, "second")
    assert isinstance(recalled, Receipt)
    assert (recalled.target, recalled.state.state) == (first.target, "approved")
    history = check_ledger(database.owner)["demo"]
    assert len(of_type(history, "ApprovalRequested")) == 1


async def test_an_edit_is_stored_as_it_was_decided(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    first = await committer.submit("demo", read_command(body(call_key="k"), RequestApproval), agent)
    edited = read_command(body(summary=TOM), EditApproval)
    edited.approval_id = first.target  # type: ignore[attr-defined]
    receipt = await another.submit("demo", edited, ANA)
    new_id: UUID = receipt.state.superseded_by
    async with committer.pool.connection() as connection:
        ledger = await committer.ledger("demo")
        assert ledger is not None
        history = await read_streams(connection, ledger.ledger_id, [new_id])
    assert [recorded.event.type for recorded in history] == ["ApprovalRequested"]
    asked: Any = history[0].event.data
    vote = CastVote(approval_id=new_id, verdict="deny", digest_seen=asked.request_digest)
    assert (await committer.submit("demo", vote, ANA)).state.state == "denied"
    kept = states(check_ledger(database.owner)["demo"])
    assert {state.state for state in kept.values()} == {"superseded", "denied"}


async def raw(pool: Pool, stream_id: UUID) -> bytes:
    """Everything that is stored of a stream."""
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT entry FROM ledger.events WHERE stream_id = %s", [stream_id])
        return b"\n".join([entry for (entry,) in await cursor.fetchall()])


def test_the_match_of_a_question_cannot_be_made_without_the_key() -> None:
    state = given().when(ask(call_key="k")).state
    plain = msgspec.json.encode([None, "k", msgspec.to_builtins(ACTION)])
    assert state.match == commitment.match(None, "k", ACTION, given().batch())
    assert state.match not in (sha256(plain).digest(), hmac.digest(bytes(32), plain, "sha256"))
