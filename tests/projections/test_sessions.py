"""The view `sessions`: found by every filter, in pages that miss and repeat nothing."""

from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from ledger.errors import MalformedRequest
from ledger.events import SessionActivated, SessionAnnotated, SessionCompleted, SessionFailed, SessionMetadataChanged
from ledger.postgres import Connection
from ledger.values import moment
from projections import Projector, sessions
from projections.sessions import Filter, Page
from tests.conftest import Database
from tests.projections.conftest import BEGINNING, History, NewHistory, project_all, rows_read

STRANGE = ["a\0b", "\ud7ff\ue000", "\U0001d518", "e\u0301", "'; DROP TABLE x; --", "\\", "%s", "\u202eright", "  "]


async def found(connection: Connection, history: History, limit: int = 200, **wanted: Any) -> list[UUID]:
    page = await sessions.search(connection, history.ledger_id, Filter(**wanted), limit=limit)
    assert page.total == len(page.sessions)
    assert page.total_is_exact
    return [session.session_id for session in page.sessions]


async def test_each_filter_finds_what_it_names_and_all_together_what_all_name(
    history: History, projector: Projector, reader: Connection
) -> None:
    first = history.open("writer", labels={"team": "red", "tier": "a:b"})
    second = history.open("writer", labels={"team": "blue"})
    third = history.open("reader", labels={"team": "red"})
    history.add(SessionActivated(), second)
    history.add(SessionActivated(), third)
    history.add(SessionCompleted(), third)
    await project_all(projector, history)
    assert await found(reader, history) == [third, second, first]
    assert await found(reader, history, state="pending") == [first]
    assert await found(reader, history, state="completed") == [third]
    assert await found(reader, history, state="no such state") == []
    assert await found(reader, history, agent_role="writer") == [second, first]
    assert await found(reader, history, agent_role="writer", state="active") == [second]
    assert await found(reader, history, label="team=red") == [third, first]
    assert await found(reader, history, label="team:red") == [third, first]
    assert await found(reader, history, label="tier=a:b") == [first]
    assert await found(reader, history, label="team:red", state="completed", agent_role="reader") == [third]
    assert await found(reader, history, label="team:red", agent_role="writer", since=BEGINNING) == [first]
    assert await found(reader, history, label="team:green") == []


async def test_since_is_inclusive_and_until_exclusive_on_the_time_of_opening(
    history: History, projector: Projector, reader: Connection
) -> None:
    opened = [history.open(labels={"x": "y"}) for _ in range(4)]
    history.add(SessionActivated(), opened[0])
    await project_all(projector, history)
    second, fourth = moment(history.time(2)), moment(history.time(4))
    filters: list[dict[str, Any]] = [{}, {"label": "x:y"}, {"agent_role": "helper"}]
    for more in filters:
        assert await found(reader, history, since=second, **more) == opened[:0:-1]
        assert await found(reader, history, until=second, **more) == opened[:1]
        assert await found(reader, history, since=second, until=fourth, **more) == [opened[2], opened[1]]
        assert await found(reader, history, since=second, until=second, **more) == []
    in_another_offset = second.astimezone(tz=None) + timedelta(0)
    assert await found(reader, history, since=in_another_offset) == opened[:0:-1]


async def test_cursors_and_numbered_pages_go_through_the_list_once(
    history: History, projector: Projector, reader: Connection
) -> None:
    # All in one batch, so many were opened at the same instant.
    opened = [history.open("a" if n % 2 else "b", labels={"x": "y"}) for n in range(23)]
    await project_all(projector, history)
    for wanted in (Filter(), Filter(label="x=y"), Filter(state="pending")):
        pages: list[Page] = []
        after = None
        while not pages or after:
            pages.append(await sessions.search(reader, history.ledger_id, wanted, limit=5, after=after))
            after = pages[-1].next
        assert [s.session_id for page in pages for s in page.sessions] == opened[::-1]
        assert [page.total for page in pages] == [23] * 5
        numbered = [
            await sessions.search(reader, history.ledger_id, wanted, limit=5, offset=offset)
            for offset in range(0, 30, 5)
        ]
        assert [s.session_id for page in numbered for s in page.sessions] == opened[::-1]
        assert numbered[0].next == pages[0].next
        assert numbered[4].next is numbered[5].next is None


async def test_sessions_opened_in_one_instant_are_paged_in_the_order_they_were_recorded(
    history: History, projector: Projector, reader: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(History, "time", staticmethod(lambda position: "2026-01-01T00:00:00.000000Z"))
    opened = [history.open() for _ in range(7)]
    await project_all(projector, history)
    seen: list[UUID] = []
    after = None
    for _ in range(4):
        page = await sessions.search(reader, history.ledger_id, Filter(), limit=2, after=after)
        seen += [session.session_id for session in page.sessions]
        after = page.next
    assert seen == opened[::-1]
    assert after is None


async def test_the_total_is_exact_up_to_a_bound_and_says_when_it_is_not(
    history: History, projector: Projector, reader: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "TOTAL_MAX", 10)
    for expected, is_exact in ((10, True), (10, False)):
        for _ in range(10 - history.size or 1):
            history.open()
        await project_all(projector, history)
        page = await sessions.search(reader, history.ledger_id, Filter(), limit=2)
        assert (page.total, page.total_is_exact) == (expected, is_exact)
    with pytest.raises(MalformedRequest, match="beyond 10"):
        await sessions.search(reader, history.ledger_id, Filter(), limit=2, offset=11)


@pytest.mark.parametrize("after", ["", "x", "1", "1-2-3", "1-", "-", "9" * 40 + "-1", "1-" + "9" * 40, "1-x\0"])
async def test_a_cursor_of_someones_own_making_is_refused(history: History, reader: Connection, after: str) -> None:
    with pytest.raises(MalformedRequest) as refused:
        await sessions.search(reader, history.ledger_id, Filter(), limit=2, after=after)
    assert refused.value.errors == [{"pointer": "after", "detail": "it is not a cursor that was given here"}]


async def test_a_label_without_a_separator_is_refused(history: History, reader: Connection) -> None:
    with pytest.raises(MalformedRequest, match="neither `=` nor `:`"):
        await sessions.search(reader, history.ledger_id, Filter(label="team"), limit=2)


@pytest.mark.parametrize("text", STRANGE, ids=ascii)
async def test_any_text_can_be_kept_shown_and_found(
    history: History, projector: Projector, reader: Connection, text: str
) -> None:
    session_id = history.open(text, labels={text: text}, metadata={text: [text]}, task_id=text)
    history.add(SessionAnnotated(text=text), session_id, external_id=text, correlation_id=text, reason=text)
    history.add(SessionMetadataChanged(metadata={"b": text, "a": 1.0, "n": 10**15}), session_id)
    history.add(SessionFailed(reason=text), session_id)
    await project_all(projector, history)
    session = await sessions.get(reader, history.ledger_id, session_id)
    assert session is not None
    assert (session.agent_role, session.task_id, session.labels) == (text, text, {text: text})
    assert list(session.metadata.items()) == [("a", 1.0), ("b", text), ("n", 10**15)]
    assert await found(reader, history, agent_role=text) == [session_id]
    assert await found(reader, history, label=f"{text}={text}") == [session_id]


async def test_the_longest_role_and_labels_fit(history: History, projector: Projector, reader: Connection) -> None:
    longest = "\U0001f984" * 255
    session_id = history.open(longest, labels={longest: longest})
    await project_all(projector, history)
    assert await found(reader, history, agent_role=longest, label=f"{longest}={longest}") == [session_id]


async def test_labels_that_look_alike_to_the_index_are_one_to_it(
    history: History, projector: Projector, reader: Connection
) -> None:
    labels = {"a\0": "x", "a\ufffd": "x", "b" * 255: "y", "b" * 255 + "c": "y"}
    session_id = history.open(labels=labels)
    await project_all(projector, history)
    assert await found(reader, history, label="a\0=x") == [session_id]
    assert await found(reader, history, label=f"{'b' * 255}=y") == [session_id]
    session = await sessions.get(reader, history.ledger_id, session_id)
    assert session is not None
    assert session.labels == labels


async def test_another_project_sees_nothing_of_it(
    history: History, new_history: NewHistory, projector: Projector, reader: Connection
) -> None:
    session_id = history.open(labels={"x": "y"})
    await project_all(projector, history)
    other = await new_history("other")
    assert await found(reader, other, label="x=y") == await found(reader, other) == []
    assert await sessions.get(reader, other.ledger_id, session_id) is None
    assert await sessions.get(reader, history.ledger_id, session_id) is not None


async def test_a_list_reads_little_more_than_it_shows(
    history: History, projector: Projector, reader: Connection
) -> None:
    for n in range(6000):
        session_id = history.open("rare" if n % 1000 == 0 else "common", labels={"team": "all", "one": str(n % 1000)})
        if n % 3:
            history.add(SessionActivated(), session_id)
        if n % 1500 == 1:
            history.add(SessionCompleted(), session_id)
    await project_all(projector, history)
    for wanted in (
        Filter(),
        Filter(state="active"),
        Filter(agent_role="common"),
        Filter(agent_role="rare"),
        Filter(agent_role="rare", state="pending"),
        Filter(label="team=all"),
        Filter(label="one=7"),
        Filter(label="team=all", state="completed"),
        Filter(since=moment(history.time(100)), until=moment(history.time(200))),
    ):
        async with reader.transaction():
            before = await rows_read(reader, "sessions")
            page = await sessions.search(reader, history.ledger_id, wanted, limit=20)
            read = await rows_read(reader, "sessions") - before
        assert read <= 2 * (page.total + 21), wanted


async def test_who_asks_for_what_no_session_has_does_not_read_them_all(
    history: History, projector: Projector, reader: Connection, database: Database
) -> None:
    """Also once the planner knows that all are alike."""
    for _ in range(2000):
        history.open("common")
    await project_all(projector, history)
    async with await psycopg.AsyncConnection.connect(database.owner, autocommit=True) as owner:
        await owner.execute("ANALYZE sessions.sessions")
    for wanted in (Filter(agent_role="nobody"), Filter(state="failed"), Filter(agent_role="nobody", state="failed")):
        async with reader.transaction():
            before = await rows_read(reader, "sessions")
            page = await sessions.search(reader, history.ledger_id, wanted, limit=20)
            assert page.sessions == []
            assert await rows_read(reader, "sessions") - before <= 20, wanted
