"""`make bench`: measure in turns, round by round, and write the table."""

import signal
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from ops.bench import table
from ops.bench.parts import ONLY_NAMED, PARTS
from ops.bench.stage import BenchError, Figures, Stage, open_stage

RESULTS = Path(__file__).with_name("RESULTS.md")

app = App(name="python -m ops.bench", help="Measure what the write path must reach, against peers on this machine.")


@app.default
def bench(
    *parts: Annotated[str, Parameter(help=f"Only these: {', '.join(PARTS)}.")],
    rounds: int = 5,
    seconds: float = 3.0,
    events: int = 10_000_000,
    keep: Path | None = None,
) -> None:
    """All parts but `rebuilding`, `proofs` and `scale` take an hour, and write RESULTS.md; some only print.

    Parameters
    ----------
    rounds
        How often each measurement is taken, in turns; the table has the medians.
    seconds
        How long one measurement takes.
    events
        How large the large ledger of `scale` is, and that of `proofs`. To fill one of ten million takes half an hour
        and 30 GB.
    keep
        A directory where that ledger is kept, to be used again by the next run of the same release that is told so.
    """
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"There is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    chosen = [part for part in PARTS if (part in parts if parts else part not in ONLY_NAMED)]
    with open_stage(seconds, events, keep) as stage:
        results: dict[str, list[Figures] | str] = {}
        for part in chosen:
            results |= measure(stage, part, rounds)
        text = report(stage, chosen, rounds, results)
    print(text)
    if not parts:
        RESULTS.write_text(text)
        print(f"written to {RESULTS}")
    if any(isinstance(figures, str) for figures in results.values()):
        sys.exit("Not everything could be measured; the table says what and why")


def measure(stage: Stage, part: str, rounds: int) -> dict[str, list[Figures] | str]:
    """Every measure of a part, in turns. One that fails is not tried again; the others go on."""
    results: dict[str, list[Figures] | str] = {}
    with PARTS[part](stage) as measures:
        for number in range(1, rounds + 1):
            for name, take in measures.items():
                so_far = results.setdefault(name, [])
                if isinstance(so_far, str):
                    continue
                try:
                    so_far.append(take())
                except BenchError as error:
                    results[name] = str(error).replace("\n", " ").replace("|", "/")
                    say(f"{part} {number}/{rounds}  {name}: {error}")
                else:
                    p99 = f", p99 {so_far[-1].p99_ms:.1f} ms" if so_far[-1].p99_ms else ""
                    say(f"{part} {number}/{rounds}  {name}: {so_far[-1].rate:,.0f}/s{p99}")
    return results


def report(stage: Stage, parts: list[str], rounds: int, results: table.Results) -> str:
    lines = [
        "# What was measured",
        "",
        *table.machine(stage.settings(), stage.directory),
        f"- medians of {rounds} rounds of {stage.seconds:g} s each, taken in turns; a ratio is of the same round",
        "- the mix: 20 % open, 40 % record, 20 % change, 20 % annotate; one event a command; one record in four has a",
        "  sealed personal value; replays are counted as answers",
        *(line for part in parts for line in table.NOTES.get(part, ())),
        "",
        *table.rows(parts, results),
        "",
        *table.figures(results),
        "",
    ]
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that all is stopped on the way out
    app()
