"""That the bench measures what it says, at sizes at which its figures mean nothing."""

import itertools
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from ledger import store
from ledger.commands import ClaimTasks, CompleteTask, SubmitTask
from ledger.committer import Committer
from ledger.postgres import open_pool
from ledger.vault import Vault
from ops.bench import mix, scale, table
from ops.bench.agents import Log, look_for
from ops.bench.parts import PARTS, all_completed_once
from ops.bench.serving import PROJECT
from ops.bench.stage import BenchError, Figures
from ops.bench.tasks import Handed
from ops.bench.visible import lags_ms
from tests.conftest import Database


@pytest.mark.timeout(400)
@pytest.mark.parametrize("part", PARTS)
def test_each_part_fills_its_rows_of_the_table(part: str) -> None:
    if part == "tasks" and not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("pg-boss, which tasks are compared with, needs node and npm, which are not installed")
    command = [sys.executable, "-m", "ops.bench", part, "--rounds", "1", "--seconds", "0.2", "--events", "5000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    for row in table.ROWS[part]:
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"| {row.text} |")]
        assert "not measured" not in line
        assert float(line.split("|")[2].strip(" *")) > 0


def test_a_part_that_does_not_exist_is_named_with_those_that_do() -> None:
    done = subprocess.run([sys.executable, "-m", "ops.bench", "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no part nothing; there are committer" in done.stderr


async def test_the_mix_is_what_it_says_and_each_command_appends_one_event(database: Database, tmp_path: Path) -> None:
    units = list(itertools.islice(mix.units(), 20))
    kinds = Counter(type(command).__name__ for unit in units for command in unit)
    assert kinds == {"OpenSession": 20, "Record": 40, "ChangeSession": 20, "AnnotateSession": 20}
    assert sum(b'"$personal"' in mix.body(command) for unit in units for command in unit) == 10
    async with open_pool(database.api) as pool:
        committer = Committer(pool, Vault(tmp_path, pool, create_keys=True), create_ledgers=True)
        for unit in units:
            for receipt in await committer.submit_all("bench", unit, mix.AGENT):
                assert not isinstance(receipt, Exception)
                assert (receipt.refusal, receipt.event_count) == (None, 1)
        await committer.close()


@pytest.mark.parametrize("old", [True, False])
def test_a_tenth_are_replays_of_commands_that_were_sent_before(old: bool) -> None:
    before, fresh = (list(itertools.islice(mix.units(), number)) for number in (600, 5000))
    sent = {command.command_id for unit in before for command in unit}
    of_before = set(sent)
    replayed = []
    for unit in mix.with_replays(before, fresh, 0.1, old=old):
        replayed += [command.command_id for command in unit if command.command_id in sent]
        sent.update(command.command_id for command in unit)
    total = 5000 * mix.UNIT_COMMANDS + len(replayed)
    assert len(replayed) / total == pytest.approx(0.1, rel=0.05)
    assert sum(command_id in of_before for command_id in replayed) / len(replayed) == (
        1 if old else pytest.approx(0, abs=0.1)
    )
    assert not old or len(set(replayed)) == len(replayed)


def test_a_lag_runs_from_the_receipt_to_the_first_sight_of_the_position() -> None:
    seen = [(0.0, 0), (1.0, 2), (2.0, 2), (3.0, 5)]
    committed = [(0.5, 1), (0.75, 2), (2.5, 4), (3.5, 5)]
    assert lags_ms(committed, seen) == [500.0, 250.0, 500.0, 0.0]


def test_the_verdict_is_of_the_median_of_the_rounds_ratios() -> None:
    def rounds(*rates: float) -> list[Figures]:
        return [Figures(count=int(rate), seconds=1.0, p99_ms=1000 / rate) for rate in rates]

    results: dict[str, list[Figures] | str] = {
        "committer, 32 callers": rounds(10, 10, 10),
        "pgbench, 32 clients": "pgbench not found",
        "eventsourcing stock, 32 callers": rounds(10, 10, 10),
        "committer, 256 callers": rounds(10, 10, 10),
        "pgbench, 1,000 rows a statement": rounds(10, 10, 10),
        "committer, 1 caller": rounds(50, 10, 90),
        "pgbench, 1 client": rounds(100, 100, 100),
    }
    lines = table.rows(["committer"], results)
    assert lines[2].endswith("| pgbench not found | | 1.3 | 1.6 | not measured |")
    assert lines[3].endswith("| **1.00** | 1.00 - 1.00 | 20 | 25 | **missed** |")
    assert lines[4].endswith("| **1.00** | 1.00 - 1.00 | 0.45 | 0.7 | aim reached |")
    assert lines[5].endswith("| **0.50** | 0.10 - 0.90 | 0.45 | 0.6 | reached |")
    visible = table.rows(["visible"], {"visible": rounds(100, 66, 50)})
    assert visible[2].endswith("| **15.2** | 10.0 - 20.0 | at most 20 ms | at most 10 ms | reached |")


def test_a_rate_is_to_be_as_high_and_a_time_as_low_as_the_row_says() -> None:
    results: dict[str, list[Figures] | str] = dict.fromkeys(table.QUEUES, "not found")
    results |= {"tasks, in process": "not found", "tasks, HTTP": [Figures(499, 1.0), Figures(490, 1.0)]}
    results["tasks submitted"] = [Figures(1000, 1.0), Figures(2000, 1.0)]
    results["tasks, all wait"] = [Figures(50, 1.0, p95_ms=49.0, p99_ms=90.0)]
    submitted, completed, waited = table.rows(["tasks"], results)[2:5]
    assert submitted.endswith("| **1500.0** | 1000.0 - 2000.0 | 1000 |  | reached |")
    assert completed.endswith("| **494.5** | 490.0 - 499.0 | 500 |  | **missed** |")
    assert waited.endswith("| **49.0** | 49.0 - 49.0 | at most 50 ms |  | reached |")


def test_of_two_times_the_first_is_to_be_at_most_so_many_times_the_other() -> None:
    results: dict[str, list[Figures] | str] = dict.fromkeys((row.over for row in table.ROWS["scale"]), "not asked")
    results |= dict.fromkeys((row.under for row in table.ROWS["scale"] if row.under), "not asked")
    results["a session by its id, large"] = [Figures(100, 1.0, p99_ms=30.0), Figures(100, 1.0, p99_ms=9.0)]
    results["a session by its id, small"] = [Figures(100, 1.0, p99_ms=10.0), Figures(100, 1.0, p99_ms=9.0)]
    assert table.rows(["scale"], results)[2].endswith("| **2.00** | 1.00 - 3.00 | at most 2 |  | reached |")
    results["a session by its id, large"] = [Figures(100, 1.0, p99_ms=30.0), Figures(100, 1.0, p99_ms=12.0)]
    assert table.rows(["scale"], results)[2].endswith("| **2.17** | 1.33 - 3.00 | at most 2 |  | **missed** |")


async def test_a_ledger_that_was_filled_in_part_is_gone_on_with(database: Database, tmp_path: Path) -> None:
    for events in (400, 700):
        async with open_pool(database.api) as pool, pool.connection() as connection:
            ledger = await store.find_ledger(connection, PROJECT)
        await scale.fill(database.api, str(tmp_path), ledger.size if ledger else 0, events)
    async with open_pool(database.api) as pool, pool.connection() as connection:
        ledger = await store.find_ledger(connection, PROJECT)
        assert ledger is not None
        assert 700 < ledger.size <= 700 + mix.UNIT_COMMANDS
        known = await scale.look_around(connection, PROJECT)
    assert known.session_ids
    assert known.tickets
    assert known.times


def test_a_task_that_two_workers_have_is_noticed() -> None:
    handed, task_id = Handed(), uuid4()
    handed.take(task_id)
    with pytest.raises(ValueError, match="leased twice"):
        handed.take(task_id)


async def test_a_task_that_was_not_leased_once_and_completed_is_found_in_the_ledger(
    database: Database, tmp_path: Path
) -> None:
    async with open_pool(database.api) as pool:
        committer = Committer(pool, Vault(tmp_path, pool, create_keys=True), create_ledgers=True)

        async def submit(command: Any) -> Any:
            return (await committer.submit(PROJECT, command, mix.AGENT)).state

        await submit(SubmitTask(kind="k"))
        (task,) = await submit(ClaimTasks(worker="w", kinds=("k",)))
        with pytest.raises(BenchError, match=r"\(1, 1\)"):
            all_completed_once(database.owner, 0, 1)
        await submit(CompleteTask(task_id=task.task_id, lease_id=task.lease_id))
        all_completed_once(database.owner, 0, 1)
        with pytest.raises(BenchError):
            all_completed_once(database.owner, 0, 2)
        await committer.close()


async def test_what_was_acknowledged_and_is_not_in_the_ledger_as_it_was_said_is_noticed(
    database: Database, tmp_path: Path
) -> None:
    async with open_pool(database.api) as pool, pool.connection() as connection:
        committer = Committer(pool, Vault(tmp_path, pool, create_keys=True), create_ledgers=True)
        receipt = await committer.submit(PROJECT, SubmitTask(kind="k"), mix.AGENT)
        ledger = await committer.ledger(PROJECT)
        assert ledger is not None
        key = (mix.AGENT.principal, receipt.command_id)

        def said(status: int, state: str) -> Log:
            log = Log()
            log.commands[key], log.ends_as[receipt.state.task_id] = status, state
            return log

        await look_for(connection, ledger.ledger_id, said(201, "queued"))
        with pytest.raises(ValueError, match="was said to be completed"):
            await look_for(connection, ledger.ledger_id, said(201, "completed"))
        with pytest.raises(ValueError, match="was answered with 200"):
            await look_for(connection, ledger.ledger_id, said(200, "queued"))
        lost = said(201, "queued")
        lost.commands[key[0], "lost"] = 200
        with pytest.raises(ValueError, match="lost"):
            await look_for(connection, ledger.ledger_id, lost)
        await committer.close()
