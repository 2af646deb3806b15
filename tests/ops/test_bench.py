"""That the bench measures what it says, at sizes at which its figures mean nothing."""

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ledger.committer import Committer
from ledger.postgres import open_pool
from ledger.vault import Vault
from ops.bench import mix, table
from ops.bench.parts import PARTS
from ops.bench.stage import Figures
from ops.bench.visible import lags_ms
from tests.conftest import Database


@pytest.mark.timeout(400)
@pytest.mark.parametrize("part", PARTS)
def test_each_part_fills_its_rows_of_the_table(part: str) -> None:
    command = [sys.executable, "-m", "ops.bench", part, "--rounds", "1", "--seconds", "0.2"]
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
