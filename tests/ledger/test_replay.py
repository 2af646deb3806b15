"""What was answered once is answered again the same, from nothing but what is stored."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid5

import pytest
from msgspec.structs import replace
from uuid_utils.compat import uuid7

from ledger import store
from ledger.commands import (
    AnnotateSession,
    CancelSession,
    ChangeSession,
    Command,
    OpenSession,
    Personal,
    PersonalValue,
    Record,
)
from ledger.committer import Committer
from ledger.entry import Recorded
from ledger.errors import MunimentError
from ledger.events import SessionActivated
from ledger.postgres import Pool
from ledger.receipt import Receipt
from ledger.replay import fold, fold_all, recall
from ledger.values import Actor, Artifact, Cost, Ref, Usage
from ledger.vault import Vault
from tests.check import check_ledger, states
from tests.conftest import Database
from tests.ledger.given import OPENED, SESSION, given

AUDITOR = Actor(issuer="i", sub="eve", kind="human", assurance="authenticated", roles=("auditor",))
MARK = Personal(PersonalValue("mia", "1 Elm St"))


def restarted(pool: Pool, tmp_path: Path) -> Committer:
    """The committer of a process that has just begun and remembers nothing."""
    return Committer(pool, Vault(tmp_path, pool, create_keys=False), create_ledgers=False)


def told(receipt: Receipt) -> dict[str, Any]:
    """Everything a caller is told by a receipt, but whether it was told before."""
    refusal = receipt.refusal
    return {
        "receipt": replace(receipt, replayed=False, refusal=None),
        "refusal": refusal and (refusal.code, refusal.status, refusal.detail, refusal.recorded),
    }


def everything() -> list[Callable[[], Command]]:
    """One command after the other, of every kind and outcome, on one session and its child."""
    root, child, record = uuid7(), uuid7(), uuid7()
    usage = Usage(model="m", input_tokens=2**53 - 1, cost=Cost("0.10", "EUR"))
    numbers = {"one": 1.0, "zero": -0.0, "large": 1e300, "exact": 2**53 - 1, "tenth": 0.1, "list": [None, True, {}]}
    return [
        lambda: OpenSession(agent_role="finance", session_id=root, metadata={"a": MARK, **numbers}, labels={"b": "c"}),
        lambda: OpenSession(agent_role="finance"),
        lambda: OpenSession(agent_role="sub", session_id=child, parent_session_id=root),
        lambda: OpenSession(agent_role="finance", session_id=root),
        lambda: ChangeSession(session_id=root, status="completed", reason=MARK),
        lambda: ChangeSession(session_id=root, status="active", metadata=numbers, task_id="T", reason="begin"),
        lambda: ChangeSession(session_id=root, status="active"),
        lambda: AnnotateSession(session_id=root, text=MARK),
        lambda: Record(
            kind="note", session_id=child, record_id=record, body=numbers, usage=usage, refs=(Ref("a", "b"),)
        ),
        lambda: Record(kind="note", parent_record_id=record, body="x" * 70_000, artifacts=(Artifact(uri="s3://a"),)),
        lambda: Record(kind="note", parent_record_id=root),
        lambda: Record(kind="note", body=[MARK, "x" * 70_000]),
        lambda: CancelSession(session_id=root, cascade=True, reason="stop"),
        lambda: CancelSession(session_id=root),
        lambda: ChangeSession(session_id=child, status="active"),
    ]


async def test_every_answer_is_given_again_by_a_process_that_remembers_nothing(
    committer: Committer, pool: Pool, tmp_path: Path, agent: Actor, database: Database
) -> None:
    commands = everything()

    async def ask(process: Committer, number: int, actor: Actor) -> Receipt:
        command = commands[number]()
        command.command_id = f"c-{number}"
        return await process.submit("demo", command, actor)

    first = [await ask(committer, number, agent) for number in range(len(commands))]
    first += [await ask(committer, number, AUDITOR) for number in range(len(commands))]
    assert {receipt.status for receipt in first} == {200, 201, 403, 409, 422}
    before = check_ledger(database.owner)["demo"]
    for process in (committer, restarted(pool, tmp_path)):
        again = [await ask(process, number, agent) for number in range(len(commands))]
        again += [await ask(process, number, AUDITOR) for number in range(len(commands))]
        for one, other in zip(first, again, strict=True):
            assert told(other) == told(one)
            assert (one.replayed, other.replayed) == (False, True)
        await process.close()
    assert check_ledger(database.owner)["demo"] == before, "nothing happened twice"


async def test_a_receipt_is_there_for_its_principal_alone(committer: Committer, agent: Actor) -> None:
    first = await committer.submit("demo", OpenSession(agent_role="finance", command_id="c"), agent)
    found = await committer.receipt("demo", agent.principal, "c")
    assert found is not None
    assert told(found) == told(first)
    assert await committer.receipt("demo", AUDITOR.principal, "c") is None
    assert await committer.receipt("demo", agent.principal, "d") is None
    assert await committer.receipt("other", agent.principal, "c") is None


async def test_what_a_cascade_did_is_answered_again_with_what_it_had_seen(
    committer: Committer, pool: Pool, tmp_path: Path, agent: Actor
) -> None:
    root = uuid7()
    await committer.submit("demo", OpenSession(agent_role="a", session_id=root), agent)
    for _ in range(3):
        await committer.submit("demo", OpenSession(agent_role="a", parent_session_id=root), agent)

    def cancel() -> CancelSession:
        return CancelSession(session_id=root, cascade=True, command_id="stop")

    first = await committer.submit("demo", cancel(), agent)
    assert (first.event_count, first.seen_position) == (1, 8)
    await committer.submit("demo", AnnotateSession(session_id=root, text="after"), agent)
    again = await restarted(pool, tmp_path).submit("demo", cancel(), agent)
    assert told(again) == told(first)
    assert again.state.version == 2


async def test_expiry_that_came_first_is_part_of_the_answer_again(
    committer: Committer, pool: Pool, tmp_path: Path, agent: Actor, database: Database
) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=2)
    opened = await committer.submit("demo", OpenSession(agent_role="a", expires_at=soon), agent)
    while committer.clock.now() < soon:  # noqa: ASYNC110  (it is the time that is waited for)
        await asyncio.sleep(0.01)

    def annotate() -> AnnotateSession:
        return AnnotateSession(session_id=opened.target, text="late", command_id="late")  # type: ignore[arg-type]

    first = await committer.submit("demo", annotate(), agent)
    assert (first.state.state, first.state.version, first.event_count) == ("expired", 3, 1)
    again = await restarted(pool, tmp_path).submit("demo", annotate(), agent)
    assert told(again) == told(first)
    history = check_ledger(database.owner)["demo"]
    expiry = history[1].event
    assert expiry.command_id == str(uuid5(opened.target, f"expire {expiry.data.deadline}"))  # type: ignore[arg-type, attr-defined]


async def test_receipts_come_in_the_order_of_their_rows(
    committer: Committer, pool: Pool, agent: Actor, database: Database
) -> None:
    commands = everything()
    for number, make in enumerate(commands):
        command = make()
        command.command_id = f"c-{number}"
        await committer.submit("demo", command, agent)
    ledger = await committer.ledger("demo")
    assert ledger is not None
    keys = [(agent.principal, f"c-{number}") for number in reversed(range(len(commands)))]
    async with pool.connection() as connection:
        rows = await store.find_commands(connection, ledger.ledger_id, keys)
        receipts = await recall(connection, ledger.ledger_id, [rows[key] for key in keys])
        assert await recall(connection, ledger.ledger_id, []) == []
    assert [receipt.command_id for receipt in receipts] == [command_id for _, command_id in keys]
    history = check_ledger(database.owner)["demo"]
    for receipt in receipts:
        if receipt.refusal is None:
            then = states([recorded for recorded in history if recorded.position <= receipt.seen_position])
            assert receipt.state == then[receipt.target]  # type: ignore[index]
        else:
            assert receipt.state is None


def test_folding_nothing_gives_nothing() -> None:
    assert fold([]) is None
    assert fold_all([]) == {}


def test_a_stream_without_rules_is_its_last_event() -> None:
    outcome = given(OPENED).when(ChangeSession(session_id=SESSION, status="failed"))
    (event,) = outcome.events
    assert fold([Recorded(2, event)]) == event
    assert isinstance(outcome.verdict, Receipt | MunimentError)


def test_a_history_that_does_not_begin_is_no_state() -> None:
    (event,) = given(OPENED).when(ChangeSession(session_id=SESSION, status="active")).then(SessionActivated()).events
    with pytest.raises(AssertionError, match="begins with SessionOpened"):
        fold([Recorded(2, event)])
