"""Files of every kind, whole and broken: every run comes out, and everything else is named."""

import gzip
import json
import os
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ops.transcripts import CHUNK_CHARACTERS, Run, Transcript, Unusable, mended, parse

MESSAGE = {"role": "user", "content": "hi"}
RUN = {"messages": [MESSAGE], "task": 7}
M, R = json.dumps(MESSAGE), json.dumps(RUN)

Read = Callable[[str, str | bytes], list[Run | Unusable]]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    def read(name: str, content: str | bytes) -> list[Run | Unusable]:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        monkeypatch.chdir(tmp_path)
        return list(Transcript(Path(name)).runs())

    return read


_AFTER_1, _AFTER_2 = "f.json item 1 and what follows it", "f.json item 2 and what follows it"
_NO_NAME = "Expecting property name enclosed in double quotes"
_NO_END = "Unterminated string starting"


def _seen(items: list[Run | Unusable]) -> list[str]:
    """Runs by name, all else by place and the beginning of the reason."""
    return [item.name if isinstance(item, Run) else f"{item.where}: {item.reason}" for item in items]


FORMS: dict[str, tuple[str, list[str]]] = {
    "a list of runs": (f"[{R}, {R}]", ["#0", "#1"]),
    "an indented list": (json.dumps([RUN, RUN], indent=2), ["#0", "#1"]),
    "a list a line": (f"[\n{R},\n{R}\n]\n", ["#0", "#1"]),
    "a list of lists of messages": (f"[[{M}], [{M}, {M}]]", ["#0", "#1"]),
    "a list of messages": (f"[{M}, {M}]", ["#0"]),
    "one run": (R, ["#0"]),
    "one indented run": (json.dumps(RUN, indent=2), ["#0"]),
    "a run over lines that are values themselves": (f'{{"messages": [\n{M}\n]}}', ["#0"]),
    "a run a line": (f"{R}\n\n{R}\n", ["#0", "#1"]),
    "a run a line, as Windows writes it": (f"{R}\r\n{R}\r\n", ["#0", "#1"]),
    "a list of messages a line": (f"[{M}]\n[{M}]\n", ["#0", "#1"]),
    "indented runs one after the other": (json.dumps(RUN, indent=2) * 2, ["#0", "#1"]),
    "a run that says traj": (json.dumps({"traj": [MESSAGE]}), ["#0"]),
    "a run that says nothing": ('{"messages": []}', ["#0"]),
    "no runs": ("[]", []),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_file_gives_its_runs(read: Read, form: str) -> None:
    content, names = FORMS[form]
    assert _seen(read("f.json", content)) == [f"f.json{name}" for name in names]
    assert _seen(read("f.json.gz", gzip.compress(content.encode()))) == [f"f.json.gz{name}" for name in names]
    assert _seen(read("f", "\ufeff" + content)) == [f"f{name}" for name in names]
    assert _seen(read("f", content.encode("utf-16"))) == [f"f{name}" for name in names]


def test_a_run_keeps_all_that_is_said_beside_its_messages(read: Read) -> None:
    (run,) = read("f.json", R)
    assert isinstance(run, Run)
    assert (run.messages, run.about) == ([MESSAGE], {"task": 7})


@pytest.mark.parametrize(
    ("name", "content", "seen"),
    [
        ("f.json", "", ["f.json: it is empty"]),
        ("f.json", " \n\t", ["f.json: it is empty"]),
        (
            "f.json",
            f'[{R}, 5, null, "x", {{"messages": 3}}, {R}]',
            [
                "f.json#0",
                "f.json item 1: it is a number, neither a run nor a list of messages",
                "f.json item 2: it is null, neither a run nor a list of messages",
                "f.json item 3: it is a text, neither a run nor a list of messages",
                "f.json item 4: it has no list of messages under `messages` or `traj`",
                "f.json#5",
            ],
        ),
        (
            "f.jsonl",
            f"{R}\nbroken\n\n{R[:-5]}\n{R}\n",
            [
                "f.jsonl#0",
                "f.jsonl line 2: it is not JSON: Expecting value at character 1",
                f"f.jsonl line 4: it is not JSON: {_NO_END} at character {R.rindex(chr(34), 0, -5) + 1}",
                "f.jsonl#3",
            ],
        ),
        ("f.log", f"{R}\n{R[:20]}", ["f.log#0", f"f.log line 2: it is not JSON: {_NO_END} at character 16"]),
        ("f.jsonl", f"{R[:20]}\n{R}", [f"f.jsonl line 1: it is not JSON: {_NO_END} at character 16", "f.jsonl#1"]),
        ("f.json", f"{R[:20]}\n{R}", [f"f.json line 1: it is not JSON: {_NO_END} at character 16", "f.json#1"]),
        (
            "f.json",
            f"[{R}, {R}",
            ["f.json#0", "f.json#1", f"{_AFTER_2}: the file ends within the list"],
        ),
        ("f.json", f"[{R}, {{]}}, {R}]", ["f.json#0", f"{_AFTER_1}: it is not JSON: {_NO_NAME} at character 65"]),
        ("f.json", f"[{R}] and more", ["f.json#0", f"{_AFTER_1}: it stands after the end of the list"]),
        ("f.txt", "hello\n", ["f.txt line 1: it is not JSON: Expecting value at character 1"]),
        ("f.json", "[" * 100_000, ["f.json item 0 and what follows it: it is nested too deeply"]),
        ("f.jsonl", "[" * 100_000 + f"\n{R}", ["f.jsonl line 1: it is nested too deeply", "f.jsonl#1"]),
        ("f.json", b"\x00\x01\x02", ["f.json line 1: it is not JSON: Expecting value at character 1"]),
    ],
)
def test_what_is_no_run_is_named_with_its_reason(read: Read, name: str, content: str | bytes, seen: list[str]) -> None:
    assert _seen(read(name, content)) == seen


def test_a_compressed_log_without_its_end_gives_what_was_written(read: Read) -> None:
    whole = gzip.compress("".join(f'{{"messages": [], "n": "{n * 7919 % 10007}"}}\n' for n in range(5000)).encode())
    assert len(read("f.jsonl.gz", whole)) == 5000
    *runs, last = read("f.jsonl.gz", whole[: len(whole) * 3 // 4])
    assert sum(isinstance(run, Run) for run in runs) > 3000
    assert isinstance(last, Unusable)
    assert last.reason == "the compressed file is damaged: it ends too early"


def test_compressed_logs_put_together_are_one_log(read: Read) -> None:
    line = gzip.compress(f"{R}\n".encode())
    assert _seen(read("f.jsonl.gz", line + line + b"\0" * 512)) == ["f.jsonl.gz#0", "f.jsonl.gz#1"]


def test_a_damaged_compressed_file_is_named(read: Read) -> None:
    whole = bytearray(gzip.compress(f"{R}\n".encode() * 3))
    whole[12] ^= 0xFF
    *_, last = read("f.jsonl.gz", bytes(whole))
    assert isinstance(last, Unusable)
    assert "the compressed file is damaged" in last.reason


@pytest.mark.parametrize("size", [CHUNK_CHARACTERS - 60, CHUNK_CHARACTERS, 3 * CHUNK_CHARACTERS + 1])
def test_a_list_is_read_in_pieces_wherever_a_piece_ends(read: Read, size: int) -> None:
    runs: list[Any] = [{"messages": [{"role": "user", "content": "x" * length}]} for length in (size, 1, size + 9, 0)]
    found = read("f.json", json.dumps(runs))
    assert [run.messages for run in found if isinstance(run, Run)] == [run["messages"] for run in runs]
    many: list[Any] = [{"messages": [MESSAGE], "n": n} for n in range(size // 30)]
    assert [run.about["n"] for run in read("f.json", json.dumps(many)) if isinstance(run, Run)] == list(
        range(len(many))
    )


def test_memory_holds_one_run_of_a_large_list_and_not_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("w") as file:
        file.write("[" + R)
        for _ in range(300):
            file.write("," + json.dumps({"messages": [{"role": "user", "content": "x" * 100_000}]}))
        file.write("]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in Transcript(path).runs()) == 301
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 10
    finally:
        tracemalloc.stop()


def test_a_file_that_is_not_there_or_no_file_is_named(tmp_path: Path) -> None:
    assert list(Transcript(tmp_path / "x").runs()) == [
        Unusable(str(tmp_path / "x"), "it cannot be read on: No such file or directory")
    ]
    assert list(Transcript(tmp_path).runs()) == [Unusable(str(tmp_path), "it cannot be read on: Is a directory")]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
def test_a_file_is_open_only_while_it_is_read(tmp_path: Path) -> None:
    paths = [tmp_path / str(n) for n in range(50)]
    for path in paths:
        path.write_text(R)
    before = len(list(Path("/proc/self/fd").iterdir()))
    transcripts = [Transcript(path) for path in paths]
    assert [len(list(transcript.runs())) for transcript in transcripts] == [1] * 50
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(f"{R}\n{R}\n",))
    writer.start()
    assert _seen(list(Transcript(pipe).runs())) == ["pipe#0", "pipe#1"]
    writer.join()


def test_how_far_a_file_was_read_grows_to_its_size(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(f"{R}\n" * 20_000)
    transcript = Transcript(path)
    seen = [transcript.read_bytes for _ in transcript.runs()]
    assert seen == sorted(seen)
    assert 0 < seen[0] < seen[-1] <= transcript.size_bytes
    assert transcript.read_bytes == transcript.size_bytes


def test_a_byte_that_is_no_character_costs_a_character_and_not_the_run(read: Read) -> None:
    (run,) = read("f.json", b'{"messages": [{"role": "user", "content": "caf\xe9"}]}')
    assert isinstance(run, Run)
    assert mended(run.messages) == [{"role": "user", "content": "caf\\udce9"}]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("9007199254740991", 9007199254740991),
        ("-9007199254740991", -9007199254740991),
        ("9007199254740992", "9007199254740992"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("1e400", "1e400"),
        ("-1e400", "-1e400"),
        ("1.5e3", 1500.0),
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
    ],
)
def test_a_number_that_not_every_reader_reads_alike_stays_a_text(text: str, value: Any) -> None:
    assert parse(text) == value


def test_control_characters_in_texts_are_read_as_they_stand() -> None:
    assert parse('"a\tb\nc"') == "a\tb\nc"
