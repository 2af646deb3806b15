"""`muniment import`: recorded agent runs into a ledger, over HTTP like any other caller.

Invariant: what is in the ledger afterwards does not depend on how often, from where or with how many
interruptions it was put there. Ids come from what a run says (ops/runs.py), so the ledger's own idempotency
does the work: a run read again is replayed, a run cut short goes on. What a message means is not known here.
"""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from uuid import UUID

import jwt
from cyclopts import App, Parameter
from cyclopts.validators import Number
from msgspec import Struct, field
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from api.answers import Answer
from api.client import Client
from ledger.commands import CancelTask, CastVote, ChangeSession, Command, CompleteTask, OpenSession, Record
from ledger.errors import Forbidden, IdempotencyKeyReused, MunimentError, NotFound
from ops.projects import local_settings, local_token
from ops.runs import GATED_TOOLS, PERSONAL_KEYS, Mapping, Options, Step, identify, session_of
from ops.transcripts import Run, Transcript, Unusable
from ops.up import address

JOBS = 8
PATIENCE_SECONDS = 300.0
FIRST_PATIENCE_SECONDS = 5.0
IMPORTER = "muniment-import"
SHOWN_MAX = 200
LINES_EVERY_SECONDS = 5.0


class Numbered(NamedTuple):
    """A run that can be sent, and the session that it is."""

    run: Run
    session_id: UUID


class Report(Struct):
    """What went in, and what did not."""

    sessions: Counter[str] = field(default_factory=Counter)
    """By the state they are in now."""
    records: Counter[str] = field(default_factory=Counter)
    """By kind."""
    tasks: Counter[str] = field(default_factory=Counter)
    """Gated calls, by the state they were brought to."""
    approvals: Counter[str] = field(default_factory=Counter)
    """By the state they were brought to."""
    recorded: int = 0
    """Commands that the ledger took now."""
    replayed: int = 0
    """Commands that were in the ledger before."""
    copies: int = 0
    """Runs that stand in another of the files too, and were put in once."""
    position: int = 0
    read_bytes: int = 0
    """How far the files have been read."""
    not_taken: list[Unusable] = field(default_factory=list)

    def refused(self, where: str, reason: str) -> None:
        self.not_taken.append(Unusable(where, reason))


async def import_runs(
    client: Client,
    files: list[Transcript],
    options: Options,
    *,
    jobs: int = JOBS,
    moved: Callable[[Report], None] | None = None,
) -> Report:
    """Put every run of `files` in: `jobs` runs at a time, each in order. `moved` is told after each.

    Raises what stops everything: no server, no valid token, no such project, not the role.
    """
    report = Report()
    items = _numbered(files, report)

    async def work() -> None:
        for item in items:  # shared by all: each takes the next
            if isinstance(item, Unusable):
                report.not_taken.append(item)
            else:
                await _put(client, item, options, report)
            if moved:
                moved(report)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(jobs):
                group.create_task(work())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return report


def _numbered(files: list[Transcript], report: Report) -> Iterator[Numbered | Unusable]:
    met: set[UUID] = set()
    finished_bytes = 0
    for file in files:
        twins: Counter[str] = Counter()  # the same run twice in one file is two runs; in two files it is a copy
        for item in file.runs():
            report.read_bytes = finished_bytes + file.read_bytes
            if isinstance(item, Unusable):
                yield item
                continue
            try:
                run, digest = identify(item)
            except ValueError as error:
                yield Unusable(item.where, str(error))
                continue
            session_id = session_of(digest, twins[digest])
            twins[digest] += 1
            if session_id in met:
                report.copies += 1
                continue
            met.add(session_id)
            yield Numbered(run, session_id)
        finished_bytes += file.read_bytes


async def _put(client: Client, item: Numbered, options: Options, report: Report) -> None:
    """Put one run in. Killed between any two commands, the same again finds what is there and goes on."""
    name = item.run.name
    with suppress(NotFound):
        session = await client.get_session(item.session_id)
        if not await _is_ours(client, item.session_id):
            _leave_to_others(item, session, report)
            return
        # It keeps the name that it first came under, whatever its file is called now.
        name = session["external_id"]
    try:
        mapped = list(Mapping(item.run, item.session_id, name, options).steps())
    except RecursionError:
        report.refused(item.run.where, "it is nested too deeply")
        return
    steps = [step for step in mapped if isinstance(step, Step)]
    report.not_taken += [step for step in mapped if isinstance(step, Unusable)]
    # Alone, for without a session all that follows would be refused, and each refusal recorded.
    answers = await _send(client, [steps[0].command])
    if answers[0].error is None:
        answers += await _send(client, [step.command for step in steps[1:]])
    _count(steps, answers, report)


async def _send(client: Client, commands: list[Command]) -> list[Answer]:
    """The answers to commands that build on each other. Raises Forbidden, which stops everything.

    What was forbidden before is remembered for its id, and may be allowed by now: it gets another id, and what
    came after it in vain is sent again with it.
    """
    while True:
        answers = await client.send(commands)
        forbidden = [n for n, answer in enumerate(answers) if isinstance(answer.error, Forbidden)]
        if not forbidden:
            return answers
        for n in forbidden:
            if not answers[n].replayed and (error := answers[n].error):
                raise error
            commands[n].command_id = f"{commands[n].command_id}+"


async def _is_ours(client: Client, session_id: UUID) -> bool:
    """Whether this caller opened the session; another's commands cannot be told from new ones."""
    command_id = f"{session_id}:open"
    while True:
        try:
            receipt = await client.receipt(command_id)
        except NotFound:
            return False
        if receipt["status"] != Forbidden.status:
            return bool(receipt["status"] < 400)
        command_id += "+"


def _leave_to_others(item: Numbered, session: dict[str, Any], report: Report) -> None:
    report.sessions[session["state"]] += 1
    if session["state"] in ("pending", "active"):
        reason = "was begun by another caller and is not finished: import it with a token for the same subject"
        report.refused(item.run.where, f"its session {item.session_id} {reason}")


def _count(steps: list[Step], answers: list[Answer], report: Report) -> None:
    state = None
    for step, answer in zip(steps, answers, strict=False):
        error = answer.error
        if error is not None:
            report.refused(step.where, _reason(error))
            continue
        report.replayed += answer.replayed
        report.recorded += not answer.replayed
        report.position = max(report.position, *answer.positions, 0)
        match step.command:
            case Record():
                report.records[step.command.kind] += 1
            case OpenSession() | ChangeSession():
                state = answer.body["state"]
            case CompleteTask() | CancelTask():
                report.tasks[answer.body["state"]] += 1
            case CastVote():
                report.approvals[answer.body["state"]] += 1
    if state is not None:
        report.sessions[state] += 1


def _reason(error: MunimentError) -> str:
    if isinstance(error, IdempotencyKeyReused):
        return "it is in the ledger already, put there with other options or by another version of this importer"
    return f"{error.code}: {error.detail}"


# The command

importing = App(name="import", help="Put recorded history into a ledger.")


@importing.command(name="openai-messages")
def openai_messages(
    *files: Path,
    project: str,
    url: str | None = None,
    token: Annotated[str | None, Parameter(env_var="LEDGER_TOKEN")] = None,
    agent_role: str | None = None,
    personal_keys: str = PERSONAL_KEYS,
    gated_tools: str = GATED_TOOLS,
    jobs: Annotated[int, Parameter(validator=Number(gte=1, lte=64))] = JOBS,
) -> None:
    """Put recorded runs of agents in: files of messages in the OpenAI format.

    A FILE is a JSON list of runs, a run a line (JSON lines), one run, or a bare list of messages; or gzip of
    any of these. A run is `{"messages": [...]}` or `{"traj": [...]}`; what else it says becomes metadata.

    A run becomes a session, and every message and every tool call with its result a record; a call of a gated
    tool becomes a task, with an imported approval of its exact arguments, the evidence of which is the user's
    message before it. A run is known by what it says: imported again, also from a file that was renamed, moved
    or copied, nothing is added; after an interruption the same command goes on where it stopped, within a day where
    that was in the middle of a gated call. The session's `external_id` is `<file>#<index>`.

    Prints what went in and everything that was not taken, with the reason; then the exit code is 1.

    Parameters
    ----------
    files
        One or more files.
    project
        The project whose ledger takes it.
    url
        The server; default: the one that `make up` runs on this machine.
    token
        A token for that project with the roles `agent` and `importer`. Default: on this machine, in development,
        one is made by itself, for the subject `muniment-import`. Another subject cannot go on with what this one
        began.
    agent_role
        The sessions' agent_role. Default: `agent`, unless the data set is a known one.
    personal_keys
        JSON keys, with commas between, whose values in arguments and results are personal: they are sealed
        under the customer's own key (the run's `user_id` or `customer_id`, else the run by itself). Name
        `content` too to seal what is said, which full-text search then does not find.
    gated_tools
        Tools, with commas between, whose calls are tasks with an approval instead of records. Empty: none, and
        the role `agent` is enough.
    jobs
        How many runs are on their way at once.
    """
    if not files:
        sys.exit("muniment: name at least one FILE")
    url, token = _where(project, url, token)
    options = Options(agent_role=agent_role, personal_keys=personal_keys, gated_tools=gated_tools)
    try:
        done = asyncio.run(_import(url, token, [Transcript(path) for path in files], options, jobs))
    except MunimentError as error:
        sys.exit(f"muniment: stopped: {error.detail}\nWhat is in stays in; the same command goes on from there.")
    except KeyboardInterrupt:
        sys.exit("muniment: stopped. What is in stays in; the same command goes on from there.")
    print("\n".join(_told(done, project, url)))
    if done.not_taken:
        sys.exit(1)


async def _import(url: str, token: str, files: list[Transcript], options: Options, jobs: int) -> Report:
    async with Client(url, token, patience_seconds=FIRST_PATIENCE_SECONDS) as first:
        with suppress(NotFound):  # asked only to hear early that there is no server, or no right to ask
            await first.receipt(IMPORTER)
    async with Client(url, token, patience_seconds=PATIENCE_SECONDS, connections_max=jobs) as client:
        with _progress(sum(file.size_bytes for file in files)) as moved:
            return await import_runs(client, files, options, jobs=jobs, moved=moved)


def _where(project: str, url: str | None, token: str | None) -> tuple[str, str]:
    """The server and the token to use; what is not said is this machine's."""
    token = token or local_token(project, IMPORTER, "service", ("agent", "importer"))
    with suppress(jwt.PyJWTError):  # an opaque token says nothing; the server knows
        claimed = jwt.decode(token.strip(), options={"verify_signature": False}).get("project", project)
        if claimed != project:
            sys.exit(f"muniment: this token is for the project {claimed}, not {project}: nothing was sent")
    return url or address(local_settings(any_mode=True)), token


def _progress(total_bytes: int) -> AbstractContextManager[Callable[[Report], None]]:
    console = Console(stderr=True)
    return _Bar(console, total_bytes) if console.is_terminal else nullcontext(_Lines(total_bytes))


class _Bar(Progress):
    """A progress bar, over the bytes of the files."""

    def __init__(self, console: Console, total_bytes: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        super().__init__(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
        self._bar = self.add_task("importing", total=total_bytes or None)

    def __call__(self, report: Report) -> None:
        self.update(self._bar, completed=report.read_bytes, description=_so_far(report))


class _Lines:
    """The same where nobody watches a terminal: a line now and then."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._next = time.monotonic() + LINES_EVERY_SECONDS

    def __call__(self, report: Report) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LINES_EVERY_SECONDS
            part = f"{report.read_bytes / self._total_bytes:.0%} read, " if self._total_bytes else ""
            print(f"{part}{_so_far(report)}", file=sys.stderr, flush=True)


def _so_far(report: Report) -> str:
    return f"{report.sessions.total():,} sessions, {report.records.total():,} records"


def _told(report: Report, project: str, url: str) -> Iterator[str]:
    yield f"In project {project} at {url}, up to position {report.position:,}:"
    yield f"  sessions   {_counted(report.sessions)}"
    yield f"  records    {_counted(report.records)}"
    yield f"  tasks      {_counted(report.tasks)}"
    yield f"  approvals  {_counted(report.approvals)}"
    yield f"  commands   {report.recorded:,} recorded now, {report.replayed:,} were in the ledger before (replayed)"
    if report.copies:
        yield f"  copies     {report.copies:,} runs that stand in several of the files, put in once"
    yield f"  not taken  {len(report.not_taken):,}"
    for where, reason in report.not_taken[:SHOWN_MAX]:
        yield f"    {where}: {reason}"
    if len(report.not_taken) > SHOWN_MAX:
        yield f"    and {len(report.not_taken) - SHOWN_MAX:,} more"
    yield f"  to see it  {url}/sessions?label=imported:openai-messages"


def _counted(counts: Counter[str]) -> str:
    parts = ", ".join(f"{number:,} {name}" for name, number in counts.most_common())
    return f"{counts.total():,}" + (f" ({parts})" if parts else "")
