"""Recorded runs into a running service and out again: nothing lost, nothing twice, whatever happens meanwhile."""

import asyncio
import gzip
import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from api.answers import BATCH_BYTES_MAX
from api.client import Client
from ledger.commands import BeginUse
from ledger.embedded import EmbeddedServer
from ledger.entry import Recorded, canonical
from ledger.errors import BodyTooLarge, Forbidden, MalformedRequest, NotUsable
from ledger.syntax import BODY_BYTES_MAX
from ledger.values import Action
from ops.importing import JOBS, Report, import_runs
from ops.runs import GATED_TOOLS, ISSUER, Mapping, Options, Step, identify, session_of
from ops.transcripts import Run, Transcript
from tests.check import of_type, states
from tests.server import Server, history, new_project, shared_server

RECORDED_RUNS = Path(__file__).parents[3] / "shared/data/airline-agent-runs.json.gz"
recorded_runs = pytest.mark.skipif(
    not RECORDED_RUNS.exists(), reason="the recorded airline runs are not beside this checkout"
)


@pytest.fixture(scope="module")
def server(postgres: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with shared_server(postgres, tmp_path_factory.mktemp("server"), ("api", "worker")) as server:
        yield server


@pytest.fixture
def project() -> str:
    return new_project()


def muniment(server: Server, project: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ("import", "openai-messages", "--project", project, *map(str, arguments))
    return subprocess.run(
        [sys.executable, "-P", "-m", "ops.cli", *command],
        env=server.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


async def put(server: Server, project: str, *paths: Path, subject: str = "importer", **options: Any) -> Report:
    """Import in this process."""
    roles = options.pop("roles", ("agent", "importer"))
    async with Client(server.url, server.token(project, subject, roles), patience_seconds=60) as client:
        return await import_runs(client, [Transcript(path) for path in paths], Options(**options))


def size(server: Server, project: str) -> int:
    """How many events the project's ledger has."""
    with psycopg.connect(server.database.owner) as connection:
        row = connection.execute("SELECT size FROM ledger.ledgers WHERE project_id = %s", [project]).fetchone()
    return row[0] if row else 0


def content(recorded: list[Recorded]) -> dict[str, bytes]:
    """What a ledger says, apart from who said it when and under which keys."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return "sealed" if "$sealed" in value else {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    def lasting(fields: dict[str, Any]) -> dict[str, Any]:
        passing, keyed = ("_at", "_until", "event_id"), ("_digest", "salts", "match", "actor")
        return {name: value for name, value in fields.items() if not name.endswith(passing + keyed)}

    shown = {}
    for stream_id, state in states(recorded).items():
        fields = lasting(json.loads(canonical(state)))
        if "votes" in fields:
            fields["votes"] = [lasting(vote) for vote in fields["votes"]]
        shown[str(stream_id)] = canonical(plain(fields))
    return shown


def runs_file(path: Path, count: int, length: int = 4) -> Path:
    """A file of distinct runs, each with calls among its messages."""
    lines = []
    for n in range(count):
        messages: list[Any] = [{"role": "user", "content": f"run {n}"}]
        for m in range(length):
            call = {
                "id": "c",
                "function": {"name": "find", "arguments": json.dumps({"user_id": f"u{n}", "email": f"{m}@x"})},
            }
            messages += [
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c", "content": f"result {m}"},
            ]
        lines.append(json.dumps({"messages": messages, "n": n}))
    path.write_text("\n".join(lines))
    return path


# The recorded runs


@pytest.fixture(scope="module")
def airline(server: Server) -> str:
    """The project into which the recorded airline runs were imported from the command line."""
    project = new_project()
    done = muniment(server, project, RECORDED_RUNS)
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[0] == f"In project {project} at {server.url}, up to position 5,699:"
    assert lines[1] == "sessions   160 (121 completed, 39 failed)"
    assert lines[2].startswith("records    4,037 (1,957 message.assistant, 1,189 message.user, 731 tool.called,")
    assert lines[3] == "tasks      197 (197 completed)"
    assert lines[4] == "approvals  197 (197 approved)"
    assert lines[5] == "commands   5,305 recorded now, 0 were in the ledger before (replayed)"
    assert lines[6] == "not taken  0"
    return project


def recorded() -> list[dict[str, Any]]:
    with gzip.open(RECORDED_RUNS) as file:
        runs: list[dict[str, Any]] = json.load(file)
    return runs


def opened(text: str) -> Any:
    """A tool's result, as JSON where it is an object or a list."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict | list) else text


@recorded_runs
async def test_every_recorded_message_and_call_is_found_again_over_http(server: Server, airline: str) -> None:
    async with Client(server.url, server.token(airline, roles=("auditor",))) as client:
        await client.wait(5699)
        records = [record async for record in client.list_records()]
        sessions = {
            session["external_id"]: session async for session in client.list_sessions(label="imported:openai-messages")
        }
        tasks = {task["external_id"]: task async for task in client.list_tasks()}
        approvals = {approval["call_key"]: approval async for approval in client.list_approvals()}
    assert len(sessions) == 160
    assert len(records) == 4037
    by_place = {record["external_id"]: record for record in records}
    unread = set(by_place)
    for number, run in enumerate(recorded()):
        name = f"airline-agent-runs.json.gz#{number}"
        transferred = False
        calls: dict[str, tuple[str, Any]] = {}
        for index, message in enumerate(run["traj"]):
            place = f"{name}:{index}"
            if message["role"] == "tool":
                key, call = calls.pop(message["tool_call_id"])
                if call["function"]["name"] in GATED_TOOLS.split(","):
                    check_gated(tasks.pop(key), approvals.pop(key), call, message)
                    continue
                body = by_place[key]["body"]
                unread.remove(key)
                assert body["call_key"] == key
                assert (body["name"], body["tool_call_id"]) == (call["function"]["name"], call["id"])
                assert unmarked(body["arguments"]) == json.loads(call["function"]["arguments"])
                assert unmarked(body["result"]) == opened(message["content"])
                assert body["is_error"] == message["content"].startswith("Error")
                assert by_place[key]["status"] == ("error" if body["is_error"] else "ok")
                transferred |= call["function"]["name"] == "transfer_to_human_agents"
                continue
            record = by_place[place]
            unread.remove(place)
            assert record["kind"] == f"message.{message['role']}"
            assert record["body"]["content"] == message["content"]
            assert record["session_id"] == sessions[name]["session_id"]
            calls |= {call["id"]: (f"{place}:{nth}", call) for nth, call in enumerate(message.get("tool_calls", []))}
        assert not calls
        assert sessions[name]["state"] == ("failed" if transferred else "completed")
        assert sessions[name]["agent_role"] == "airline-support"
        about = {key: value for key, value in run.items() if key != "traj"}
        assert unmarked(sessions[name]["metadata"]) == about
    assert not unread
    assert not tasks
    assert not approvals


def check_gated(task: dict[str, Any], approval: dict[str, Any], call: dict[str, Any], answer: dict[str, Any]) -> None:
    """Compare what a gated call and its answer became with what they said."""
    action = {"tool": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}
    assert unmarked(task["payload"]["arguments"]) == action["arguments"]
    assert (task["state"], task["worker"]) == ("completed", None)
    assert unmarked(task["result"]) == opened(answer["content"])
    assert task["is_error"] == answer["content"].startswith("Error")
    assert unmarked(approval["action"]) == action
    assert (approval["state"], approval["imported"], approval["task_id"]) == ("approved", True, task["task_id"])
    (vote,) = approval["votes"]
    assert (vote["verdict"], vote["voter"]["issuer"]) == ("approve", ISSUER)


@recorded_runs
async def test_the_evidence_of_an_imported_approval_is_what_the_user_said_before_it(
    server: Server, airline: str
) -> None:
    async with Client(server.url, server.token(airline, roles=("auditor",))) as client:
        await client.wait(5699)
        said = {record["record_id"]: record async for record in client.list_records(kind="message.user")}
        evidence = [(a["call_key"], a["votes"][0]["evidence"]) async for a in client.list_approvals()]
    places = {record["external_id"]: record["record_id"] for record in said.values()}
    assert len(evidence) == 197
    for call_key, record_id in evidence:
        name, index, _ = call_key.rsplit(":", 2)
        before = [n for n in range(int(index)) if f"{name}:{n}" in places]
        assert record_id == places[f"{name}:{before[-1]}"]


async def test_an_imported_approval_is_never_used(server: Server, project: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    call = {"id": "c", "function": {"name": "send_certificate", "arguments": '{"amount": 100}'}}
    messages = [{"role": "user", "content": "yes"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    path.write_text(json.dumps({"messages": messages}))
    report = await put(server, project, path)
    assert (report.tasks, report.approvals, report.not_taken) == ({"cancelled": 1}, {"approved": 1}, [])
    (requested,) = of_type(history(server, project), "ApprovalRequested")
    action = Action(tool="send_certificate", arguments={"amount": 100})
    async with Client(server.url, server.token(project, "importer", ("agent", "importer"))) as client:
        (answer,) = await client.send([BeginUse(approval_id=requested.stream_id, execution_id=uuid4(), action=action)])
    assert isinstance(answer.error, NotUsable)


def unmarked(value: Any) -> Any:
    """A value without the marks of what in it is personal."""
    if isinstance(value, dict):
        return (
            unmarked(value["$personal"]["value"])
            if "$personal" in value
            else {k: unmarked(v) for k, v in value.items()}
        )
    return [unmarked(item) for item in value] if isinstance(value, list) else value


@recorded_runs
def test_what_is_personal_in_arguments_and_results_is_nowhere_at_rest(server: Server, airline: str) -> None:
    secrets = Counter[str]()
    for run in recorded():
        for message in run["traj"]:
            result = opened(message["content"] or "") if message["role"] == "tool" else None
            if isinstance(result, dict) and "email" in result:
                secrets.update([result["email"], result["address"]["address1"]])
                secrets.update(f'"{payment}"' for payment in result["payment_methods"])
    assert len(secrets) > 50
    entries = b"".join(
        canonical(event)
        for _, event in history(server, airline)
        if event.type != "FactRecorded" or b"tool" in canonical(event.data)
    )
    assert b"$sealed" in entries
    assert [secret for secret in secrets if secret.encode() in entries] == []


@recorded_runs
def test_a_second_import_appends_nothing_whatever_the_file_is_called(
    server: Server, airline: str, tmp_path: Path
) -> None:
    again = muniment(server, airline, RECORDED_RUNS)
    assert again.returncode == 0, again.stderr
    assert "0 recorded now, 5,305 were in the ledger before" in again.stdout
    renamed = tmp_path / "renamed.json"
    renamed.write_bytes(gzip.decompress(RECORDED_RUNS.read_bytes()))
    third = muniment(server, airline, renamed)
    assert third.returncode == 0, third.stdout
    assert "0 recorded now, 5,305 were in the ledger before" in third.stdout
    assert "sessions   160 (121 completed, 39 failed)" in third.stdout
    assert size(server, airline) == 5699


@recorded_runs
def test_an_import_killed_again_and_again_ends_with_the_same_ledger(server: Server, airline: str) -> None:
    project = new_project()
    command = [
        sys.executable,
        "-P",
        "-m",
        "ops.cli",
        "import",
        "openai-messages",
        "--project",
        project,
        str(RECORDED_RUNS),
    ]
    chance = random.Random()
    for _ in range(3):
        until = size(server, project) + chance.randrange(1, 1200)
        running = subprocess.Popen(
            command, env=server.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while running.poll() is None and size(server, project) < until:
            time.sleep(0.005)
        running.kill()
        running.wait()
    assert 0 < size(server, project) < 5699
    last = muniment(server, project, RECORDED_RUNS)
    assert last.returncode == 0, last.stdout + last.stderr
    assert content(history(server, project)) == content(history(server, airline))


# Interruptions and repetitions


async def test_an_import_outlives_a_server_that_is_killed(postgres: EmbeddedServer, tmp_path: Path) -> None:
    path = runs_file(tmp_path / "runs.jsonl", 60)
    with shared_server(postgres, tmp_path / "home") as server:
        whole = asyncio.create_task(put(server, "interrupted", path))
        while await asyncio.to_thread(size, server, "interrupted") < 100:
            assert not whole.done()
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        report = await whole
        assert report.not_taken == []
        assert report.recorded + report.replayed == 60 * 12
        await put(server, "straight", path)
        assert content(history(server, "interrupted")) == content(history(server, "straight"))


async def test_the_same_run_in_several_files_is_put_in_once(server: Server, project: str, tmp_path: Path) -> None:
    path = runs_file(tmp_path / "runs.jsonl", 5)
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps([json.loads(line) for line in path.read_text().splitlines()]))
    report = await put(server, project, path, copy)
    assert (report.sessions, report.copies, report.recorded) == ({"completed": 5}, 5, 60)
    opened = of_type(history(server, project), "SessionOpened")
    assert sorted(event.external_id or "" for event in opened) == [f"runs.jsonl#{n}" for n in range(5)]


async def test_the_same_run_twice_in_one_file_is_two_sessions(server: Server, project: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n' * 3)
    assert (await put(server, project, path)).sessions == {"completed": 3}
    assert (await put(server, project, path)).recorded == 0
    assert size(server, project) == 3 * 4


async def test_a_log_that_grew_adds_only_what_is_new(server: Server, project: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    runs_file(path, 3)
    await put(server, project, path)
    runs_file(path, 5)
    report = await put(server, project, path)
    assert (report.sessions, report.recorded, report.replayed) == ({"completed": 5}, 24, 36)


async def test_what_another_caller_put_in_is_left_alone(server: Server, project: str, tmp_path: Path) -> None:
    path = runs_file(tmp_path / "runs.jsonl", 3)
    await put(server, project, path, subject="ann")
    before = size(server, project)
    report = await put(server, project, path, subject="bob")
    assert (report.sessions, report.recorded, report.not_taken) == ({"completed": 3}, 0, [])
    assert size(server, project) == before


async def test_what_another_caller_left_unfinished_is_said(server: Server, project: str, tmp_path: Path) -> None:
    whole = runs_file(tmp_path / "runs.jsonl", 1)
    async with Client(server.url, server.token(project, "ann")) as client:
        (run,) = Transcript(whole).runs()
        assert isinstance(run, Run)
        run, digest = identify(run)
        steps = Mapping(run, session_of(digest, 0), run.name, Options()).steps()
        await client.send([step.command for step in steps if isinstance(step, Step)][:4])
    before = size(server, project)
    report = await put(server, project, whole, subject="bob")
    assert [place for place, _ in report.not_taken] == [f"{whole} line 1"]
    assert "was begun by another caller and is not finished" in report.not_taken[0].reason
    assert size(server, project) == before
    assert (await put(server, project, whole, subject="ann")).sessions == {"completed": 1}


async def test_other_options_than_last_time_are_said_and_change_nothing(
    server: Server, project: str, tmp_path: Path
) -> None:
    path = runs_file(tmp_path / "runs.jsonl", 1, length=1)
    await put(server, project, path)
    before = content(history(server, project))
    report = await put(server, project, path, personal_keys="user_id")
    assert [(where, reason.split(",")[0]) for where, reason in report.not_taken] == [
        (f"{path} line 1 message 2", "it is in the ledger already")
    ]
    assert content(history(server, project)) == before


def test_whoever_interrupts_an_import_is_told_how_to_go_on(server: Server, project: str, tmp_path: Path) -> None:
    path = runs_file(tmp_path / "runs.jsonl", 300)
    command = [sys.executable, "-P", "-m", "ops.cli", "import", "openai-messages", "--project", project, str(path)]
    with subprocess.Popen(command, env=server.environment, stderr=subprocess.PIPE, text=True) as running:
        while size(server, project) < 50:
            assert running.poll() is None
            time.sleep(0.005)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate()
    assert running.returncode == 1
    assert told == "muniment: stopped. What is in stays in; the same command goes on from there.\n"


# What cannot go in


MIXED = [
    {"messages": [{"role": "user", "content": "fine"}]},
    {"messages": "none"},
    {"messages": [{"role": "user", "content": "nul \u0000 and half \ud83d characters"}, {"content": "no role"}]},
    {"messages": [{"role": "user", "content": "x" * (9 * 1024 * 1024)}, {"role": "user", "content": "after it"}]},
    17,
    {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "x" * (2 * 1024 * 1024)}]}]},
]


OVER_1_MIB = MalformedRequest([{"pointer": "/body", "detail": f"it is over {BODY_BYTES_MAX} bytes"}])
TOO_LARGE_FOR_A_RECORD = f"malformed_request: {OVER_1_MIB.detail}"
TOO_LARGE = f"body_too_large: {BodyTooLarge(limit_bytes=BATCH_BYTES_MAX).detail}"


async def test_what_cannot_go_in_is_told_by_number_and_the_rest_goes_in(
    server: Server, project: str, tmp_path: Path
) -> None:
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps(MIXED))
    done = await asyncio.to_thread(muniment, server, project, path, tmp_path / "absent.json")
    assert done.returncode == 1, done.stderr
    told = done.stdout.splitlines()
    assert told[1:3] == ["  sessions   4 (4 completed)", "  records    3 (3 message.user)"]
    assert told[6] == "  not taken  6"
    assert sorted(line.strip().removeprefix(f"{tmp_path}/") for line in told[7:13]) == [
        "absent.json: it cannot be read on: No such file or directory",
        "mixed.json item 1: it has no list of messages under `messages` or `traj`",
        "mixed.json item 2 message 1: it is not a message: it has no role",
        "mixed.json item 3 message 0: " + TOO_LARGE,
        "mixed.json item 4: it is a number, neither a run nor a list of messages",
        "mixed.json item 5 message 0: " + TOO_LARGE_FOR_A_RECORD,
    ]
    async with Client(server.url, server.token(project)) as client:
        await client.wait(size(server, project))
        said = [record["body"]["content"] async for record in client.list_records(kind="message.user")]
    assert sorted(said) == ["after it", "fine", "nul \u0000 and half \\ud83d characters"]


async def test_without_the_importers_role_gated_calls_wait_for_it(server: Server, project: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    call = {"id": "c", "function": {"name": "send_certificate", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "done"},
    ]
    path.write_text(json.dumps({"messages": messages}))
    for _ in range(2):
        with pytest.raises(Forbidden):
            await put(server, project, path, roles=("agent",))
    report = await put(server, project, path)
    assert (report.tasks, report.approvals, report.not_taken) == ({"completed": 1}, {"approved": 1}, [])
    before = content(history(server, project))
    other = await put(server, project, path, gated_tools="")
    assert [reason.split(",")[0] for _, reason in other.not_taken] == ["it is in the ledger already"]
    assert content(history(server, project)) == before


async def test_without_the_role_nothing_goes_in_until_it_is_given(server: Server, project: str, tmp_path: Path) -> None:
    path = runs_file(tmp_path / "runs.jsonl", 40)
    with pytest.raises(Forbidden):
        await put(server, project, path, roles=("auditor",))
    refused = history(server, project)
    assert {event.type for _, event in refused} == {"CommandRefused"}
    assert len(refused) <= JOBS
    with pytest.raises(Forbidden):
        await put(server, project, path, roles=("auditor",))
    for _ in range(2):
        report = await put(server, project, path)
        assert (report.sessions, report.not_taken) == ({"completed": 40}, [])


def test_a_server_that_is_not_there_is_said_soon(server: Server, project: str, tmp_path: Path) -> None:
    path = runs_file(tmp_path / "runs.jsonl", 1)
    refused = muniment(server, project, path, "--url", "http://127.0.0.1:9")
    assert refused.returncode == 1
    assert refused.stderr.startswith("muniment: stopped: http://127.0.0.1:9 did not answer")


def test_a_name_that_no_project_can_have_is_refused(server: Server, tmp_path: Path) -> None:
    refused = muniment(server, "Not_A_Project", runs_file(tmp_path / "runs.jsonl", 1))
    assert refused.returncode == 1
    assert refused.stderr.startswith("muniment: no server would accept such a token")


def test_a_token_for_another_project_sends_nothing(server: Server, project: str, tmp_path: Path) -> None:
    path = runs_file(tmp_path / "runs.jsonl", 1)
    refused = muniment(server, project, path, "--token", server.token("other"), "--url", server.url)
    assert refused.returncode == 1
    assert refused.stderr == f"muniment: this token is for the project other, not {project}: nothing was sent\n"
    unknown = muniment(server, project, path, "--token", "nonsense", "--url", server.url)
    assert unknown.stderr.startswith("muniment: stopped: The token is not valid. Send a valid token")
    assert size(server, project) == 0


@pytest.mark.parametrize("arguments", [(), ("--jobs", "0", "f"), ("--jobs", "x", "f")])
def test_a_command_line_that_says_too_little_is_refused(
    server: Server, project: str, arguments: tuple[str, ...]
) -> None:
    refused = muniment(server, project, *arguments)
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr


def test_whoever_watches_a_terminal_sees_a_bar(server: Server, project: str, tmp_path: Path) -> None:
    path = runs_file(tmp_path / "runs.jsonl", 30)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-P", "-m", "ops.cli", "import", "openai-messages", "--project", project, str(path)]
    environment = server.environment | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=theirs) as running:
        os.close(theirs)
        seen = b""
        try:
            while piece := os.read(ours, 1 << 16):
                seen += piece
        except OSError:  # how Linux says that the other end is closed
            pass
        finally:
            os.close(ours)
        told, _ = running.communicate()
    assert running.returncode == 0, seen.decode()
    assert b"sessions" in seen
    assert b"%" in seen
    assert b"sessions   30 (30 completed)" in told
