"""The view `approvals`: what waits for whom, by what is urgent, page by page; and whose time has run out."""

import json
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from msgspec import to_builtins
from uuid_utils.compat import uuid7

from ledger import store
from ledger.commands import CastVote, Personal, PersonalValue, RequestApproval
from ledger.committer import Committer
from ledger.errors import MalformedRequest
from ledger.events import (
    ApprovalDenied,
    ApprovalGranted,
    ApprovalOutcomeUnknown,
    ApprovalPresented,
    ApprovalUseBegun,
    ApprovalUseCompleted,
    VoteCast,
)
from ledger.postgres import Connection, open_pool
from ledger.replay import fold
from ledger.system import ExpireApproval, LapseApproval, MissOutcome, Overdue
from ledger.values import Action, Actor, Principal, Quorum, moment, stamp
from ledger.vault import Vault
from projections import Projector, approvals
from projections.approvals import Filter, Order
from tests.check import check_views
from tests.conftest import Database
from tests.projections.conftest import AGENT, DIGEST, LATER, History, NewHistory, project_all, rows_read

ANA = Actor(issuer="https://id.example", sub="ana", kind="human", assurance="authenticated", roles=("approver",))
PAST = "2026-01-01T00:00:00.000000Z"


def grant(history: History, approval_id: UUID, until: str = LATER) -> None:
    history.add(VoteCast(verdict="approve", digest_seen=DIGEST), approval_id, actor=ANA)
    history.add(ApprovalGranted(approved_until=until), approval_id, actor=ANA)


def use(history: History, approval_id: UUID, outcome_by: str = LATER) -> UUID:
    execution_id = uuid7()
    history.add(ApprovalUseBegun(execution_id=execution_id, outcome_by=outcome_by), approval_id)
    return execution_id


def deny(history: History, approval_id: UUID) -> None:
    history.add(VoteCast(verdict="deny", digest_seen=DIGEST), approval_id, actor=ANA)
    history.add(ApprovalDenied(), approval_id, actor=ANA)


async def found(connection: Connection, history: History, order: Order = "asc", **wanted: Any) -> list[UUID]:
    page = await approvals.search(connection, history.ledger_id, Filter(**wanted), limit=200, order=order)
    assert page.next is None
    return [approval.approval_id for approval in page.approvals]


async def test_each_filter_finds_what_it_names_and_all_together_what_all_name(
    history: History, projector: Projector, reader: Connection
) -> None:
    session_id, task_id = history.open(), uuid7()
    plain = history.ask()
    urgent = history.ask(
        "deploy",
        session_id=session_id,
        task_id=task_id,
        risk="critical",
        quorum=Quorum(roles=("sre", "owner")),
        requester=Principal("https://other.example", "bot#2"),
        expires_at="2035-01-01T00:00:00.000000Z",
    )
    denied = history.ask(session_id=session_id)
    deny(history, denied)
    await project_all(projector, history)
    assert await found(reader, history) == [plain, urgent, denied]
    assert await found(reader, history, "desc") == [denied, urgent, plain]
    assert await found(reader, history, state="pending") == [plain, urgent]
    assert await found(reader, history, state="denied") == [denied]
    assert await found(reader, history, session_id=session_id) == [urgent, denied]
    assert await found(reader, history, task_id=task_id) == [urgent]
    assert await found(reader, history, tool="refund") == [plain, denied]
    assert await found(reader, history, risk="critical") == [urgent]
    assert await found(reader, history, role="owner") == [urgent]
    assert await found(reader, history, role="approver") == [plain]
    assert await found(reader, history, role="approve") == []
    assert await found(reader, history, requester="agent-7") == [plain, denied]
    assert await found(reader, history, requester="https://id.example#agent-7") == [plain, denied]
    assert await found(reader, history, requester="https://other.example#bot#2") == [urgent]
    assert await found(reader, history, requester="https://other.example#agent-7") == []
    assert await found(reader, history, expires_before=moment(LATER)) == [urgent]
    assert await found(reader, history, expires_before=moment("2035-01-01T00:00:00.000000Z")) == []
    everything: dict[str, Any] = {
        "state": "pending",
        "session_id": session_id,
        "task_id": task_id,
        "tool": "deploy",
        "risk": "critical",
        "role": "sre",
        "requester": "https://other.example#bot#2",
        "expires_before": moment(LATER),
    }
    orders: tuple[Order, ...] = ("asc", "desc", "risk", "expires_at")
    for order in orders:
        assert await found(reader, history, order, **everything) == [urgent]


async def test_what_is_pending_comes_by_age_by_risk_and_by_urgency_and_each_page_goes_on_where_the_last_ended(
    history: History, projector: Projector, reader: Connection
) -> None:
    def expiry(n: int) -> str:
        return stamp(datetime(2035, 1, 1, tzinfo=UTC) + timedelta(days=n))

    risks = ["low", "critical", "medium", "critical", "high", "low", "high"]
    asked = [history.ask(risk=risk, expires_at=expiry(n % 3)) for n, risk in enumerate(risks)]
    deny(history, history.ask(risk="critical"))
    await project_all(projector, history)
    expected: dict[Order, list[int]] = {
        "asc": [0, 1, 2, 3, 4, 5, 6],
        "desc": [6, 5, 4, 3, 2, 1, 0],
        "risk": [1, 3, 4, 6, 2, 0, 5],
        "expires_at": [0, 3, 6, 1, 4, 2, 5],
    }
    for order, numbers in expected.items():
        seen: list[UUID] = []
        after = None
        while not seen or after:
            page = await approvals.search(
                reader, history.ledger_id, Filter(state="pending"), limit=2, after=after, order=order
            )
            seen += [approval.approval_id for approval in page.approvals]
            after = page.next
        assert seen == [asked[n] for n in numbers], order


async def test_a_page_goes_on_after_an_approval_that_was_decided_meanwhile(
    history: History, projector: Projector, reader: Connection
) -> None:
    asked = [history.ask(risk="high") for _ in range(4)]
    await project_all(projector, history)
    orders: tuple[Order, ...] = ("asc", "risk", "expires_at")
    pages = {
        order: await approvals.search(reader, history.ledger_id, Filter(state="pending"), limit=2, order=order)
        for order in orders
    }
    deny(history, asked[1])
    await project_all(projector, history)
    for order, page in pages.items():
        rest = await approvals.search(
            reader, history.ledger_id, Filter(state="pending"), limit=2, order=order, after=page.next
        )
        assert [approval.approval_id for approval in rest.approvals] == asked[2:]


@pytest.mark.parametrize("order", ["risk", "expires_at"])
async def test_only_what_is_pending_is_ordered_by_urgency(history: History, reader: Connection, order: Order) -> None:
    for wanted in (Filter(state="approved"), Filter(state="approved", role="approver")):
        with pytest.raises(MalformedRequest, match="only what is pending"):
            await approvals.search(reader, history.ledger_id, wanted, limit=2, order=order)


async def test_an_approval_is_what_its_stream_says_at_each_step(
    history: History, projector: Projector, reader: Connection
) -> None:
    sealed = {"$sealed": {"subject": "p", "key": 1, "nonce": "n", "box": "b"}}
    approval_id = history.ask(action={"tool": "refund", "arguments": {"to": sealed, "n": 1.0}}, summary=sealed, uses=2)
    history.add(ApprovalPresented(channel="chat"), approval_id, actor=ANA)

    async def check(state: str) -> None:
        await project_all(projector, history)
        stream = await store.read_streams(reader, history.ledger_id, [approval_id])
        shown = await approvals.get(reader, history.ledger_id, approval_id)
        assert shown == fold(stream)
        assert await found(reader, history, state=state) == [approval_id]
        assert shown is not None
        assert shown.summary == sealed

    await check("pending")
    grant(history, approval_id)
    await check("approved")
    execution_id = use(history, approval_id)
    await check("executing")
    history.add(ApprovalUseCompleted(execution_id=execution_id, outcome="ok"), approval_id)
    await check("approved")
    execution_id = use(history, approval_id, PAST)
    history.add(ApprovalOutcomeUnknown(execution_id=execution_id, deadline=PAST), approval_id)
    await check("executed")


async def test_what_is_due_is_named_with_the_command_that_sees_to_it_the_longest_overdue_first(
    history: History, new_history: NewHistory, projector: Projector, reader: Connection
) -> None:
    times = [f"2026-01-0{n}T00:00:00.000000Z" for n in range(1, 5)]
    other = await new_history("other")
    expired = other.ask(expires_at=times[2])
    lapsed = history.ask(expires_at=times[0])
    grant(history, lapsed, times[1])
    unknown = history.ask(expires_at=times[0])
    grant(history, unknown, LATER)
    use(history, unknown, times[3])
    history.ask()
    history.ask(imported=True, expires_at=times[0])
    deny(history, history.ask(expires_at=times[0]))
    used = history.ask()
    grant(history, used, times[0])
    history.add(ApprovalUseCompleted(execution_id=use(history, used, times[0]), outcome="ok"), used)
    await project_all(projector, history)
    await project_all(projector, other)
    expected = [
        Overdue("demo", LapseApproval(approval_id=lapsed, deadline=times[1])),
        Overdue("other", ExpireApproval(approval_id=expired, deadline=times[2])),
        Overdue("demo", MissOutcome(approval_id=unknown, deadline=times[3])),
    ]
    assert await approvals.due(reader, 10) == expected
    assert await approvals.due(reader, 2) == expected[:2]


async def test_what_a_parked_view_says_is_due_is_left_to_commands(
    history: History, projector: Projector, reader: Connection, database: Database
) -> None:
    history.ask(expires_at=PAST)
    await project_all(projector, history)
    assert len(await approvals.due(reader, 10)) == 1
    async with await psycopg.AsyncConnection.connect(database.worker, autocommit=True) as connection:
        await connection.execute("UPDATE projections.positions SET parked_position = 2 WHERE view = 'approvals'")
    assert await approvals.due(reader, 10) == []


async def test_another_project_sees_nothing_of_it(
    history: History, new_history: NewHistory, projector: Projector, reader: Connection
) -> None:
    approval_id = history.ask()
    await project_all(projector, history)
    other = await new_history("other")
    assert await found(reader, other) == await found(reader, other, "risk", state="pending") == []
    assert await approvals.get(reader, other.ledger_id, approval_id) is None
    assert await approvals.get(reader, history.ledger_id, approval_id) is not None


async def test_the_longest_names_fit(history: History, projector: Projector, reader: Connection) -> None:
    longest = "\U0001f984" * 255
    roles = tuple(chr(ord("a") + n) + longest[1:] for n in range(16))
    approval_id = history.ask(longest, requester=Principal(longest, longest), quorum=Quorum(roles=roles))
    await project_all(projector, history)
    assert await found(reader, history, tool=longest, requester=longest, role=roles[7]) == [approval_id]


async def test_a_list_reads_little_more_than_it_shows(
    history: History, projector: Projector, reader: Connection
) -> None:
    session_id, task_id = history.open(), uuid7()
    for n in range(3000):
        approval_id = history.ask(
            "rare" if n % 1000 == 0 else "common",
            session_id=session_id if n % 300 == 0 else None,
            task_id=task_id if n % 300 == 1 else None,
            risk="critical" if n % 500 == 7 else "low",
            expires_at=stamp(moment(LATER) + timedelta(minutes=n % 100)),
        )
        if n % 20:
            deny(history, approval_id)
    await project_all(projector, history)
    pending: tuple[Order, ...] = ("asc", "desc", "risk", "expires_at")
    wanted: list[tuple[Filter, Order]] = [(Filter(state="pending"), order) for order in pending]
    wanted += [
        (Filter(), "desc"),
        (Filter(state="denied"), "desc"),
        (Filter(tool="rare"), "desc"),
        (Filter(tool="common"), "asc"),
        (Filter(risk="critical"), "desc"),
        (Filter(session_id=session_id), "desc"),
        (Filter(task_id=task_id), "desc"),
        (Filter(requester="agent-7"), "desc"),
        (Filter(requester="nobody"), "desc"),
        (Filter(state="pending", session_id=session_id), "asc"),
        (Filter(state="pending", expires_before=moment(LATER) + timedelta(minutes=1)), "expires_at"),
    ]
    for filter_, order in wanted:
        for after in (None, 1501):
            async with reader.transaction():
                before = await rows_read(reader, "approvals")
                page = await approvals.search(reader, history.ledger_id, filter_, limit=20, order=order, after=after)
                read = await rows_read(reader, "approvals") - before
            assert read <= 2 * (len(page.approvals) + 11), (filter_, order, after)


async def test_whatever_is_asked_of_what_is_pending_reads_no_more_than_all_of_it(
    history: History, projector: Projector, reader: Connection, database: Database
) -> None:
    """Also once the planner knows the table, and that there is much else that the rest of a filter would find."""
    for n in range(3000):
        approval_id = history.ask("refund" if n % 2 else "deploy", risk="low" if n % 3 else "high")
        if n % 30:
            deny(history, approval_id)
    await project_all(projector, history)
    wanted: list[dict[str, Any]] = [
        {"role": "nobody"},
        {"requester": "nobody"},
        {"requester": "agent-7", "role": "nobody"},
        {"tool": "deploy", "risk": "low", "role": "nobody"},
        {"tool": "refund", "expires_before": moment(PAST)},
    ]
    orders: tuple[Order, ...] = ("asc", "desc", "risk", "expires_at")
    for _ in range(2):
        for more, order in product(wanted, orders):
            async with reader.transaction():
                before = await rows_read(reader, "approvals")
                assert await found(reader, history, order, state="pending", **more) == []
                assert await rows_read(reader, "approvals") - before <= 100, (more, order)
        async with await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as owner:
            await owner.execute("ANALYZE approvals.approvals")


async def test_who_asks_for_what_no_approval_has_does_not_read_them_all(
    history: History, projector: Projector, reader: Connection, database: Database
) -> None:
    """Also once the planner knows that all are alike."""
    for _ in range(2000):
        deny(history, history.ask("refund", risk="low"))
    await project_all(projector, history)
    async with await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as owner:
        await owner.execute("ANALYZE approvals.approvals")
    wanted: list[dict[str, Any]] = [
        *({"requester": "nobody"}, {"tool": "deploy"}, {"risk": "high"}, {"state": "granted"}),
        *({"session_id": uuid4()}, {"task_id": uuid4()}),
    ]
    for one in wanted:
        async with reader.transaction():
            before = await rows_read(reader, "approvals")
            assert await found(reader, history, **one) == []
            assert await rows_read(reader, "approvals") - before <= 20, one


async def test_personal_values_rest_sealed_in_the_view_too(
    database: Database, projector: Projector, reader: Connection, tmp_path: Path
) -> None:
    def personal(text: str) -> Personal:
        return Personal(PersonalValue(subject="c-9", value=text))

    arguments = {"to": to_builtins(personal("Mia in Bergen"))}
    request = RequestApproval(action=Action(tool="refund", arguments=arguments), summary=personal("Mia asks"))
    async with open_pool(database.api) as pool:
        committer = Committer(pool, Vault(tmp_path, pool, create_keys=True), create_ledgers=True)
        asked = (await committer.submit("demo", request, AGENT)).state
        vote = CastVote(
            approval_id=asked.approval_id,
            verdict="deny",
            digest_seen=asked.request_digest,
            reason=personal("Mia is away"),
        )
        await committer.submit("demo", vote, ANA)
        ledger = await committer.ledger("demo")
        await committer.close()
    assert ledger is not None
    while await projector.advance(ledger.ledger_id):
        pass
    check_views(database.owner)
    ((row,),) = await (
        await reader.execute(
            "SELECT to_jsonb(a) || convert_from(approval, 'UTF8')::jsonb FROM approvals.approvals AS a"
        )
    ).fetchall()
    text = json.dumps(row)
    assert text.count("$sealed") == 4, "where it goes, what it is for, why not, and the salts of all that"
    assert "Mia " not in text
