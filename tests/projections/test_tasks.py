"""The view `tasks`: found by every filter, page by page, the same as its stream; and what came of each attempt."""

from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from uuid_utils.compat import uuid7

from ledger import store
from ledger.events import (
    AttemptFailed,
    AttemptLost,
    LateResultRefused,
    TaskCancelled,
    TaskClaimed,
    TaskCompleted,
    TaskDeadLettered,
    TaskQueued,
    TaskRedriven,
    TaskResumed,
    TaskRetryScheduled,
    TaskSuspended,
)
from ledger.postgres import Connection
from ledger.replay import fold
from ledger.values import moment
from projections import Projector, states, tasks
from projections.tasks import Attempt, Filter
from tests.conftest import Database
from tests.projections.conftest import BEGINNING, LATER, History, NewHistory, project_all, rows_read


def claim(history: History, task_id: UUID, attempt: int = 1, worker: str = "w1") -> UUID:
    lease_id = uuid7()
    history.add(TaskClaimed(attempt=attempt, worker=worker, lease_id=lease_id, lease_until=LATER), task_id)
    return lease_id


def complete(history: History, task_id: UUID, lease_id: UUID, **fields: Any) -> None:
    history.add(TaskCompleted(lease_id=lease_id, **fields), task_id)


def die(history: History, task_id: UUID) -> None:
    lease_id = claim(history, task_id)
    history.add(AttemptFailed(attempt=1, lease_id=lease_id, error="no", retryable=False), task_id)
    history.add(TaskDeadLettered(attempts=1), task_id)


async def found(connection: Connection, history: History, limit: int = 200, **wanted: Any) -> list[UUID]:
    page = await tasks.search(connection, history.ledger_id, Filter(**wanted), limit=limit)
    assert page.next is None
    return [task.task_id for task in page.tasks]


async def test_each_filter_finds_what_it_names_and_all_together_what_all_name(
    history: History, projector: Projector, reader: Connection
) -> None:
    session_id = history.open()
    queued = history.submit()
    running = history.submit("report", session_id=session_id)
    dead = history.submit(session_id=session_id)
    claim(history, running, worker="w2")
    die(history, dead)
    await project_all(projector, history)
    assert await found(reader, history) == [dead, running, queued]
    assert await found(reader, history, kind="email") == [dead, queued]
    assert await found(reader, history, state="dead") == [dead]
    assert await found(reader, history, kind="report", state="dead") == []
    assert await found(reader, history, session_id=session_id) == [dead, running]
    assert await found(reader, history, worker="w2") == [running]
    assert await found(reader, history, worker="w1") == []  # its lease has ended
    everything: dict[str, Any] = {
        "kind": "report",
        "state": "running",
        "session_id": session_id,
        "worker": "w2",
        "since": BEGINNING,
    }
    assert await found(reader, history, **everything) == [running]


async def test_since_is_inclusive_and_until_exclusive_on_the_time_of_submission(
    history: History, projector: Projector, reader: Connection
) -> None:
    history.open()
    submitted = [history.submit() for _ in range(4)]
    claim(history, submitted[0])
    await project_all(projector, history)
    second, fourth, end = (moment(history.time(1 + n)) for n in (2, 4, 5))
    filters: list[dict[str, Any]] = [{}, {"kind": "email"}]
    for more in filters:
        assert await found(reader, history, since=second, **more) == submitted[:0:-1]
        assert await found(reader, history, until=second, **more) == submitted[:1]
        assert await found(reader, history, since=second, until=fourth, **more) == [submitted[2], submitted[1]]
        assert await found(reader, history, since=end, **more) == []
        assert await found(reader, history, until=BEGINNING, **more) == []


async def test_pages_go_through_the_list_once_in_either_order(
    history: History, projector: Projector, reader: Connection
) -> None:
    submitted = [history.submit("a" if n % 2 else "b") for n in range(11)]
    await project_all(projector, history)
    for wanted, expected in ((Filter(), submitted), (Filter(kind="a", state="queued"), submitted[1::2])):
        for order in ("asc", "desc"):
            seen: list[UUID] = []
            after = None
            while not seen or after:
                page = await tasks.search(reader, history.ledger_id, wanted, limit=2, after=after, order=order)
                seen += [task.task_id for task in page.tasks]
                after = page.next
            assert seen == (expected if order == "asc" else expected[::-1])


async def test_a_task_is_what_its_stream_says_whether_it_was_remembered_or_read_again(
    history: History, projector: Projector, reader: Connection
) -> None:
    large = {"text": "x" * states.REMEMBERED_BYTES_MAX}
    task_ids = [history.submit(payload=payload, priority=9) for payload in (None, {"a": 1.0}, large)]
    for task_id in task_ids:
        await project_all(projector, history)
        lease_id = claim(history, task_id)
        await project_all(projector, history)
        complete(history, task_id, lease_id, result=large)
        history.add(LateResultRefused(lease_id=uuid7(), outcome="failed"), task_id)
    await project_all(projector, history)
    for task_id in task_ids:
        stream = await store.read_streams(reader, history.ledger_id, [task_id])
        shown = await tasks.get(reader, history.ledger_id, task_id)
        assert shown is not None
        assert shown.state == "completed"
        assert shown == fold(stream)


async def test_a_projector_that_remembers_nothing_goes_on_alike(
    history: History, projector: Projector, reader: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "REMEMBERED_MAX", -1)
    task_id = history.submit()
    await project_all(projector, history)
    claim(history, task_id, worker="w7")
    await project_all(projector, history)
    assert await found(reader, history, worker="w7", state="running") == [task_id]


async def test_every_attempt_tells_what_came_of_it(history: History, projector: Projector, reader: Connection) -> None:
    task_id = history.submit()
    asked = uuid7()
    first = claim(history, task_id, 1, "w1")
    history.add(TaskSuspended(lease_id=first, approval_id=asked), task_id)
    history.add(TaskSuspended(approval_id=uuid7()), task_id)  # superseded: it ends no attempt
    history.add(TaskResumed(approval_id=asked, decision="approved"), task_id)
    again = claim(history, task_id, 1, "w2")
    history.add(AttemptFailed(attempt=1, lease_id=again, error={"why": "no ink"}), task_id)
    history.add(TaskRetryScheduled(run_at=LATER), task_id)
    history.add(TaskQueued(), task_id)
    lost = claim(history, task_id, 2, "w1")
    history.add(AttemptLost(attempt=2, lease_id=lost, lease_until=LATER), task_id)
    history.add(TaskDeadLettered(attempts=2), task_id)
    history.add(LateResultRefused(lease_id=lost, outcome="completed"), task_id)
    history.add(TaskRedriven(reason="ink bought"), task_id)
    cancelled = claim(history, task_id, 3, "w1")
    history.add(TaskCancelled(), task_id)
    await history.write()
    made = await tasks.attempts(reader, history.ledger_id, task_id)
    assert made is not None
    failed = (await store.read_streams(reader, history.ledger_id, [task_id]))[6].event
    time = history.time
    assert made == [
        Attempt(number=1, worker="w1", lease_id=first, claimed_at=time(2), ended_at=time(3), outcome="suspended"),
        Attempt(
            number=1,
            worker="w2",
            lease_id=again,
            claimed_at=time(6),
            ended_at=time(7),
            outcome="failed",
            error={"why": "no ink"},
            error_event_id=failed.event_id,
            error_version=7,
        ),
        Attempt(number=2, worker="w1", lease_id=lost, claimed_at=time(10), ended_at=time(11), outcome="lost"),
        Attempt(number=3, worker="w1", lease_id=cancelled, claimed_at=time(15), ended_at=time(16), outcome="cancelled"),
    ]


async def test_an_attempt_that_is_running_has_no_outcome_yet(history: History, reader: Connection) -> None:
    task_id = history.submit()
    await history.write()
    assert await tasks.attempts(reader, history.ledger_id, task_id) == []
    claim(history, task_id)
    await history.write()
    (attempt,) = await tasks.attempts(reader, history.ledger_id, task_id) or []
    assert (attempt.outcome, attempt.ended_at) == (None, None)


async def test_what_is_no_task_has_no_attempts(history: History, reader: Connection) -> None:
    session_id = history.open()
    await history.write()
    assert await tasks.attempts(reader, history.ledger_id, session_id) is None
    assert await tasks.attempts(reader, history.ledger_id, uuid7()) is None


async def test_another_project_sees_nothing_of_it(
    history: History, new_history: NewHistory, projector: Projector, reader: Connection
) -> None:
    task_id = history.submit()
    await project_all(projector, history)
    other = await new_history("other")
    assert await found(reader, other) == []
    assert await tasks.get(reader, other.ledger_id, task_id) is None
    assert await tasks.attempts(reader, other.ledger_id, task_id) is None
    assert await tasks.get(reader, history.ledger_id, task_id) is not None


async def test_the_longest_names_fit(history: History, projector: Projector, reader: Connection) -> None:
    longest = "\U0001f984" * 255
    task_id = history.submit(longest)
    claim(history, task_id, worker=longest)
    await project_all(projector, history)
    assert await found(reader, history, kind=longest, worker=longest) == [task_id]


async def test_a_list_reads_little_more_than_it_shows(
    history: History, projector: Projector, reader: Connection
) -> None:
    session_id = history.open()
    for n in range(6000):
        task_id = history.submit("rare" if n % 1000 == 0 else "common", session_id=None if n % 500 else session_id)
        if n % 3 == 0:
            complete(history, task_id, claim(history, task_id))
        elif n % 1500 == 1:
            die(history, task_id)
        elif n % 1500 == 2:
            claim(history, task_id, worker="w9")
    await project_all(projector, history)
    for wanted in (
        Filter(),
        Filter(state="completed"),
        Filter(state="dead"),
        Filter(kind="common"),
        Filter(kind="rare"),
        Filter(kind="common", state="dead"),
        Filter(kind="rare", state="queued"),
        Filter(session_id=session_id),
        Filter(worker="w9"),
        Filter(worker="w9", state="running"),
        Filter(since=moment(history.time(100)), until=moment(history.time(200))),
        Filter(kind="common", since=moment(history.time(100)), until=moment(history.time(200))),
        Filter(until=BEGINNING),
    ):
        async with reader.transaction():
            before = await rows_read(reader, "tasks")
            page = await tasks.search(reader, history.ledger_id, wanted, limit=20)
            read = await rows_read(reader, "tasks") - before
        assert read <= 2 * (len(page.tasks) + 11), wanted


async def test_who_asks_for_what_no_task_has_does_not_read_them_all(
    history: History, projector: Projector, reader: Connection, database: Database
) -> None:
    """Also once the planner knows that all are alike."""
    session_id = history.open()
    for _ in range(2000):
        claim(history, history.submit("common", session_id=session_id), worker="w1")
    await project_all(projector, history)
    async with await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as owner:
        await owner.execute("ANALYZE tasks.tasks")
    for wanted in (Filter(kind="other"), Filter(state="dead"), Filter(worker="w2"), Filter(session_id=uuid4())):
        async with reader.transaction():
            before = await rows_read(reader, "tasks")
            page = await tasks.search(reader, history.ledger_id, wanted, limit=20)
            assert page.tasks == []
            assert await rows_read(reader, "tasks") - before <= 20, wanted
