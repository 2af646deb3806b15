"""Batches: decided in order, decided again alike, and answered rightly while others are on their way."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from uuid_utils.compat import uuid7

from ledger.commands import AnnotateSession, CancelSession, ChangeSession, OpenSession
from ledger.committer import Committer
from ledger.errors import RateLimited
from ledger.events import Actor
from tests.check import check_ledger, of_type
from tests.conftest import Database

pytestmark = pytest.mark.usefixtures("database")


async def opened(committer: Committer, agent: Actor, **fields: Any) -> UUID:
    receipt = await committer.submit("demo", OpenSession(agent_role="finance", **fields), agent)
    assert receipt.target is not None
    return receipt.target


async def alone(committer: Committer, agent: Actor) -> None:
    """Give commands until this process believes that it is alone on the ledger."""
    for _ in range(5):
        await opened(committer, agent)


def id_from(moment: datetime) -> str:
    """A UUIDv7 command id made at `moment`, by its own account."""
    return str(UUID(int=(int(moment.timestamp() * 1000) << 80) | (7 << 76) | (2 << 62) | uuid4().int % 2**62))


async def test_a_replay_is_no_failed_precondition_however_young_its_id_looks(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    """The first try moved the version on; a client whose clock is ahead tries again at another process."""
    session_id = await opened(committer, agent)
    ahead = id_from(datetime.now(UTC) + timedelta(hours=1))

    def change() -> ChangeSession:
        return ChangeSession(session_id=session_id, status="active", command_id=ahead, expected_version=1)

    first = await committer.submit("demo", change(), agent)
    await alone(another, agent)
    again = await another.submit("demo", change(), agent)
    assert (again.replayed, again.positions, again.state) == (True, first.positions, first.state)
    check_ledger(database.owner)


async def test_a_replay_of_what_could_not_be_asked_anew_is_still_answered(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    soon = datetime.now(UTC) + timedelta(milliseconds=300)
    ahead = id_from(soon + timedelta(hours=1))

    def open_it() -> OpenSession:
        return OpenSession(agent_role="finance", expires_at=soon, command_id=ahead)

    first = await committer.submit("demo", open_it(), agent)
    await alone(another, agent)
    while another.clock.now() < soon:  # noqa: ASYNC110  (it is the time that is waited for)
        await asyncio.sleep(0.02)
    again = await another.submit("demo", open_it(), agent)
    assert (again.replayed, again.target) == (True, first.target)


async def test_a_principal_has_60_refusals_a_minute_however_the_batches_fall(
    committer: Committer, agent: Actor, database: Database
) -> None:
    session_id = await opened(committer, agent)
    await alone(committer, agent)
    wrong = [ChangeSession(session_id=session_id, status="completed") for _ in range(200)]
    answers = await committer.submit_all("demo", wrong, agent)
    assert sum(isinstance(answer, RateLimited) for answer in answers) == 140
    assert len(of_type(check_ledger(database.owner)["demo"], "CommandRefused")) == 60


async def test_a_caller_who_goes_away_leaves_an_id_that_can_be_asked_again(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    session_id = await opened(committer, agent)
    for turn in range(20):
        await alone(committer, agent)
        await opened(another, agent)  # so that the next batch of the first misses

        def note(turn: int = turn) -> AnnotateSession:
            return AnnotateSession(session_id=session_id, text="x", command_id=f"note-{turn}")

        gone = asyncio.create_task(committer.submit("demo", note(), agent))
        for _ in range(turn):
            await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        async with asyncio.timeout(10):
            again = await committer.submit("demo", note(), agent)
        assert again.status == 200
    notes = of_type(check_ledger(database.owner)["demo"], "SessionAnnotated")
    assert sorted(note.command_id for note in notes) == sorted(f"note-{turn}" for turn in range(20))


async def test_what_a_batch_on_its_way_closes_is_not_open_for_the_next(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    root = await opened(another, agent)
    children = [uuid7() for _ in range(1000)]
    answers = await another.submit_all(
        "demo", [OpenSession(agent_role="sub", session_id=c, parent_session_id=root) for c in children], agent
    )
    assert {answer.status for answer in answers} == {201}
    for child in children[:10]:
        await alone(committer, agent)
        close = CancelSession(session_id=child)
        refill = OpenSession(agent_role="sub", parent_session_id=root)
        answers = await committer.submit_all("demo", [close, refill], agent)
        assert [answer.status for answer in answers] == [200, 201]
        await opened(another, agent)
    check_ledger(database.owner)
