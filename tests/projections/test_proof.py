"""Proof of views: found by itself, kept, said of the build it is about, and told to whoever reads."""

import asyncio
import logging
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest

from ledger.events import SessionActivated, SessionAnnotated
from ledger.postgres import Connection, Pool, open_pool
from projections import VIEWS, Projector, caught_up, health, proof, rebuild, verify
from projections.proof import Proof, Proven, latest, prove, verify_for_ever
from projections.rebuild import begin, old_of, rebuild_for_ever, roll_back
from tests.conftest import Database
from tests.projections.conftest import History, NewHistory, deadline, project_all, running
from tests.projections.test_projector import add_at_random
from tests.projections.test_verify import change


@pytest.fixture
def tireless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part is proven again as soon as it was."""
    for name in ("AGAIN_SECONDS", "REST", "LOOK_SECONDS"):
        monkeypatch.setattr(proof, name, 0.0)


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice is one stream, or one event."""
    monkeypatch.setattr(verify, "SLICE_SECONDS", -1.0)


@asynccontextmanager
async def proving(pool: Pool) -> AsyncIterator[Proven]:
    """The worker's job, for as long as the block runs."""
    proven = Proven()
    job = asyncio.create_task(verify_for_ever(pool, proven))
    try:
        yield proven
    finally:
        job.cancel()
        await asyncio.wait([job])
        assert job.cancelled()


async def until(found: Callable[[], Awaitable[Any]]) -> Any:
    with deadline() as check:
        while not (answer := await found()):
            check()
            await asyncio.sleep(0.01)
    return answer


async def proofs(pool: Pool, view: str) -> dict[str, Proof]:
    async with pool.connection() as connection:
        return {one.verdict.project_id: one for one in await latest(connection, [view])}


async def test_a_view_states_what_it_is_a_replay_of(pool: Pool, new_history: NewHistory) -> None:
    histories = [await new_history("one"), await new_history("other")]
    for n, history in enumerate(histories):
        add_at_random(history, 50, n)
        await project_all(Projector(pool, VIEWS), history)
    for view in VIEWS:
        assert await proofs(pool, view) == {}
        found = await prove(pool, view)
        assert [verdict.holds for verdict in found] == [True, True]
        assert [one.verdict for one in (await proofs(pool, view)).values()] == found
    add_at_random(histories[0], 5, 3)
    await project_all(Projector(pool, VIEWS), histories[0])
    (later,) = await prove(pool, "sessions", "one")
    kept = await proofs(pool, "sessions")
    assert (kept["one"].verdict, kept["one"].verdict.position, kept["other"].verdict.position) == (later, 55, 50)
    assert kept["one"].verified_at > kept["other"].verified_at


INSERT = """
    INSERT INTO sessions.labels (ledger_id, key, value, opened_at, position, session_id, state, agent_role)
    SELECT ledger_id, 'team', 'blue', opened_at, position, session_id, state, agent_role FROM sessions.labels
    WHERE true"""


@pytest.mark.usefixtures("tireless")
@pytest.mark.parametrize(
    ("view", "damage", "named"),
    [
        (
            "sessions",
            "UPDATE sessions.sessions SET state = 'completed' WHERE true",
            "state: 'completed', a replay makes 'active', set by event 2 (SessionActivated",
        ),
        ("sessions", "DELETE FROM sessions.labels WHERE true", "team red] is missing: set by event 1 (SessionOpened"),
        ("sessions", INSERT, "team blue] is too many: no event says so"),
        (
            "audit",
            "UPDATE audit.segments SET recorded_ats[2] = now() WHERE first = 1",
            "set by event 2 (SessionActivated",
        ),
    ],
)
async def test_what_is_changed_behind_a_view_is_found_by_itself_and_told_until_a_rebuild_mends_it(
    view: str,
    damage: str,
    named: str,
    pool: Pool,
    database: Database,
    new_history: NewHistory,
    reader: Connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)
    damaged, sound = await new_history("damaged"), await new_history("sound")
    add_at_random(sound, 30, 1)
    await project_all(Projector(pool, VIEWS), sound)

    async def is_drifted(history: History) -> bool:
        return (await caught_up(pool, view, history.ledger_id)).is_drifted

    async with proving(pool) as proven:
        damaged.add(SessionActivated(), damaged.open(labels={"team": "red"}))
        await project_all(Projector(pool, VIEWS), damaged)
        await until(lambda: has_all(pool, view, ["damaged", "sound"]))
        assert not await is_drifted(damaged)
        await change(database, f"{damage} AND ledger_id = '{damaged.ledger_id}'")
        await until(lambda: is_drifted(damaged))
        assert not await is_drifted(sound)
        assert (await caught_up(pool, view, damaged.ledger_id)).state == "drifted"
        found = (await proofs(pool, view))["damaged"].verdict
        assert (found.holds, found.drifted) == (False, 1)
        assert named in str(found.drifts[0])
        told = await health(reader, VIEWS)
        assert {name: one.drifted for name, one in told.items()} == dict.fromkeys(VIEWS, 0) | {view: 1}
        assert told[view].drifted_projects == ["damaged"]
        seen = proven.verdicts[view, "differs"]
        await until(lambda: _is(lambda: proven.verdicts[view, "differs"] > seen + 2))
        errors = [record.getMessage() for record in caplog.records if record.name == proof.log.name]
        assert len(errors) == 1, "once"
        assert named in errors[0]
        await rebuilt(pool, view)
        assert not await is_drifted(damaged)
        await until(lambda: holds(pool, view, "damaged"))
        assert not await is_drifted(damaged)
        assert (await health(reader, VIEWS))[view].drifted == 0


async def _is(said: Callable[[], bool]) -> bool:
    return said()


async def has_all(pool: Pool, view: str, projects: list[str]) -> bool:
    return sorted(await proofs(pool, view)) == projects


async def holds(pool: Pool, view: str, project: str) -> bool:
    kept = await proofs(pool, view)
    return project in kept and kept[project].verdict.holds


async def rebuilt(pool: Pool, view: str) -> None:
    job = asyncio.create_task(rebuild_for_ever(pool))
    async with pool.connection() as connection:
        await begin(connection, view, "ana", "because")

        async def is_switched() -> bool:
            return [one.state for one in await rebuild.latest(connection) if one.view == view] == ["switched"]

        await until(is_switched)
    job.cancel()
    await asyncio.wait([job])


async def test_what_was_found_is_of_a_build_and_stays_with_it_when_it_is_switched_and_rolled_back(
    pool: Pool, database: Database, history: History
) -> None:
    history.open()
    await project_all(Projector(pool, VIEWS), history)
    await change(database, "UPDATE sessions.sessions SET agent_role = 'boss'")
    (damaged,) = await prove(pool, "sessions")
    assert (await caught_up(pool, "sessions", history.ledger_id)).is_drifted
    await rebuilt(pool, "sessions")
    assert not (await caught_up(pool, "sessions", history.ledger_id)).is_drifted
    async with pool.connection() as connection:
        (old,) = await latest(connection, [old_of("sessions")])
    assert old.verdict == damaged
    (sound,) = await prove(pool, "sessions")
    assert (sound.holds, sound.digest) == (True, damaged.replay_digest)
    await roll_back(pool, "sessions", "ana", "because")
    assert (await caught_up(pool, "sessions", history.ledger_id)).is_drifted
    assert (await proofs(pool, "sessions"))["demo"].verdict == damaged
    async with pool.connection() as connection:
        await connection.execute(proof.SQL.forget)
        rows = await (await connection.execute("SELECT schema FROM projections.verdicts")).fetchall()
    assert rows == [(damaged.schema,)], "that of the build that is gone is gone"


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("view", VIEWS)
async def test_a_view_that_goes_on_while_it_is_compared_is_proven_as_of_where_it_stood(
    view: str, pool: Pool, database: Database, history: History
) -> None:
    """Between any two slices a session is opened, and others go on: the digest is that of the replay before."""
    for _ in range(2):
        history.ask(session_id=history.open())
        history.submit()
    add_at_random(history, 10, 1)
    session_id = history.open(labels={"team": "red"}, stream_id=UUID(int=2**128 - 1))
    await project_all(Projector(pool, VIEWS), history)
    (before,) = await prove(pool, view)
    async with open_pool(database.worker, 1) as small:
        slow = asyncio.create_task(prove(small, view))
        for _ in range(2):  # there is one connection: who waits for it has it after the next slice
            async with small.connection():
                pass
        between = 0
        while not slow.done():
            async with small.connection():
                between += 1
                add_at_random(history, 1, between)
                history.open(labels={"team": "blue"})
                history.add(SessionAnnotated(text="more"), session_id)
                await project_all(Projector(pool, VIEWS), history)
    assert between > 2
    assert await slow == [before]
    (after,) = await prove(pool, view)
    assert (after.holds, after.position) == (True, history.size)
    assert after.digest != before.digest or view == "tasks"


@pytest.mark.usefixtures("one_by_one")
async def test_a_proof_that_began_earlier_never_takes_the_place_of_a_later_one(
    pool: Pool, database: Database, history: History
) -> None:
    for _ in range(8):
        history.open()
    await project_all(Projector(pool, VIEWS), history)
    async with open_pool(database.worker, 1) as small:
        slow = asyncio.create_task(prove(small, "sessions"))
        for _ in range(4):
            async with small.connection():
                pass
        async with small.connection():
            first = "(SELECT session_id FROM sessions.sessions ORDER BY session_id LIMIT 1)"
            await change(database, f"UPDATE sessions.sessions SET state = 'lost' WHERE session_id = {first}")
            (later,) = await prove(pool, "sessions")
        (earlier,) = await slow
    assert (earlier.holds, later.holds) == (True, False)
    assert (await proofs(pool, "sessions"))["demo"].verdict == later


async def test_what_is_kept_of_a_drift_is_bounded_and_all_of_it_is_counted(
    pool: Pool, database: Database, history: History
) -> None:
    for _ in range(30):
        history.open(metadata={"said": "x" * 2000})
    await project_all(Projector(pool, VIEWS), history)
    async with open_pool(database.worker, 1) as worker, worker.connection() as connection:
        await connection.execute("UPDATE sessions.sessions SET session = '\\x00' || session")
    (found,) = await prove(pool, "sessions")
    kept = (await proofs(pool, "sessions"))["demo"].verdict
    assert (found.drifted, len(found.drifts), kept.drifted, len(kept.drifts)) == (30, 30, 30, proof.DRIFTS_KEPT)
    assert {len(drift.stored or "") for drift in kept.drifts} == {proof.VALUE_CHARACTERS_KEPT}


@pytest.mark.usefixtures("tireless")
async def test_a_view_that_cannot_be_proven_does_not_hold_up_the_others(
    pool: Pool, history: History, caplog: pytest.LogCaptureFixture
) -> None:
    history.open()
    await project_all(Projector(pool, VIEWS), history)
    async with pool.connection() as connection:
        await connection.execute("ALTER TABLE approvals.approvals RENAME TO elsewhere")
    async with proving(pool):
        for view in VIEWS.keys() - {"approvals"}:
            await until(lambda view=view: holds(pool, view, "demo"))  # type: ignore[misc]
        async with pool.connection() as connection:
            await connection.execute("ALTER TABLE approvals.elsewhere RENAME TO approvals")
        await until(lambda: holds(pool, "approvals", "demo"))
    assert [text for text in caplog.messages if text.startswith("approvals of demo cannot be proven now")]


FORKING = """
import asyncio, os, sys
from ledger.postgres import open_pool
from projections import VIEWS, Projector

async def project():
    async with open_pool({url!r}, 2) as pool:
        await Projector(pool, VIEWS, listen_to={url!r}, batch_events_max=20).run()

for line in sys.stdin:
    child = os.fork()
    if not child:
        asyncio.run(project())
    print(child, flush=True)
    os.waitpid(child, 0)
"""
"""Starts a projector for each line it is sent, a process of its own that need not load anything, and waits."""

KILLS = 100


async def test_a_projector_killed_a_hundred_times_under_load_leaves_views_that_are_a_replay(
    pool: Pool, database: Database, new_history: NewHistory
) -> None:
    chance, left = random.Random(1), 0
    histories = [await new_history(f"project-{n}") for n in range(3)]
    forking = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FORKING.format(url=database.worker)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert forking.stdin
    assert forking.stdout
    for kill in range(KILLS):
        for history in histories:
            add_at_random(history, 40, kill)
            await history.write()
        before = await stands(pool)
        forking.stdin.write(b"\n")
        child = int(await forking.stdout.readline())
        if kill % 10:  # else even before it has done anything
            await until(lambda before=before: differs(pool, before))  # type: ignore[misc]
        await asyncio.sleep(chance.uniform(0, 0.03))  # not a wait for anything: the moment of death
        os.kill(child, signal.SIGKILL)
        for history in histories:
            left += (await caught_up(pool, "audit", history.ledger_id, min_position=0)).behind
    assert left > 0, "it died while it worked"
    forking.stdin.close()
    assert await forking.wait() == 0
    async with running(Projector(pool, VIEWS)):
        for history in histories:
            for view in VIEWS:
                await caught_up(pool, view, history.ledger_id, min_position=history.size, timeout_seconds=60)
    for view in VIEWS:
        for verdict in await prove(pool, view):
            assert verdict.holds, verdict.drifts
            assert verdict.position == next(h.size for h in histories if h.ledger_id == verdict.ledger_id)


async def differs(pool: Pool, before: tuple[int, ...]) -> bool:
    return await stands(pool) != before


async def stands(pool: Pool) -> tuple[int, ...]:
    async with pool.connection() as connection:
        rows = await connection.execute("SELECT position FROM projections.positions ORDER BY ledger_id, view")
        return tuple(position for (position,) in await rows.fetchall())
