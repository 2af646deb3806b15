"""The examples against a running server: whatever happens to them, they act once, and only as a person approved."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from agents import Agent, RunConfig, Runner
from agents.items import ToolCallOutputItem
from agents.testing import ScriptedModel, assistant_message, function_call
from langgraph.checkpoint.memory import InMemorySaver

from api.auth import development_token
from api.client import Client
from ledger.embedded import EmbeddedServer
from ledger.errors import IdempotencyKeyReused
from ops import examples
from ops.examples import agent_loop, langgraph_node, tool_guard
from tests.server import Server, history, new_project, shared_server

Json = dict[str, Any]
Act = Callable[[Json], Awaitable[str]]
JOB = "ticket-81"
ACTION: Json = {"tool": "refund", "arguments": {"invoice": "9", "amount": "12.50"}}
LESS: Json = {"tool": "refund", "arguments": {"invoice": "9", "amount": "10.00"}}


# The examples, each as what does one action and says what came of it


async def by_loop(muniment: Client, act: Act, action: Json = ACTION) -> str:
    (came,) = await agent_loop.run(muniment, JOB, lambda came: None if came else action, act)
    return came


class ByNode:
    """With one memory: a graph that is run again goes on where it was."""

    def __init__(self) -> None:
        self.saver = InMemorySaver()

    async def __call__(self, muniment: Client, act: Act, action: Json = ACTION) -> str:
        return await langgraph_node.run(muniment, JOB, action, act, self.saver)


async def by_forgetful_node(muniment: Client, act: Act, action: Json = ACTION) -> str:
    return await ByNode()(muniment, act, action)


async def by_guard(muniment: Client, act: Act, *actions: Json) -> str:
    """The last of what the calls of a model came to: of ACTION, unless others are said."""

    async def refund(invoice: str, amount: str) -> str:
        """Pay back a part of an invoice."""
        return await act({"tool": "refund", "arguments": {"invoice": invoice, "amount": amount}})

    calls = [function_call("refund", one["arguments"], call_id=str(uuid4())) for one in actions or (ACTION,)]
    model = ScriptedModel([*([call] for call in calls), [assistant_message("Done.")]])
    clerk = Agent[tool_guard.Job](name="clerk", tools=[tool_guard.guarded(refund)])
    config = RunConfig(model=model, tracing_disabled=True)
    done = await Runner.run(clerk, "Refund it.", context=tool_guard.Job(JOB, muniment), run_config=config)
    return str([item for item in done.new_items if isinstance(item, ToolCallOutputItem)][-1].output)


Example = Callable[[Client, Act], Awaitable[str]]
EXAMPLES: dict[str, Callable[[], Example]] = {
    "loop": lambda: by_loop,
    "node": ByNode,
    "forgetful node": lambda: by_forgetful_node,
    "guard": lambda: by_guard,
}
CALL_KEYS = {"loop": f"{JOB}:0", "node": f"{JOB}:ask_and_act", "guard": f"{JOB}:refund"}


class Tool:
    """What is not to happen twice."""

    def __init__(self) -> None:
        self.done: list[Json] = []

    async def __call__(self, action: Json) -> str:
        self.done.append(action)
        return f"refunded {action['arguments']['amount']}"


@pytest.fixture(scope="module")
def server(postgres: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with shared_server(postgres, tmp_path_factory.mktemp("server"), ("api", "worker")) as server:
        yield server


@pytest.fixture
def project() -> str:
    return new_project()


@pytest.fixture
async def muniment(server: Server, project: str) -> AsyncIterator[Client]:
    """As the agent, in a ledger that is there: the first event is of a session, so others can wait for the next."""
    async with Client(server.url, server.token(project)) as muniment:
        await muniment.open_session("clerk")
        yield muniment


@pytest.fixture
async def ann(server: Server, project: str) -> AsyncIterator[Client]:
    """As a person who may approve."""
    token = development_token(server.keys_dir, project=project, subject="ann", kind="human", roles=["approver"])
    async with Client(server.url, token) as ann:
        yield ann


@pytest.fixture(params=EXAMPLES)
def run(request: pytest.FixtureRequest) -> Example:
    return EXAMPLES[request.param]()


@pytest.fixture
def tool() -> Tool:
    return Tool()


@pytest.fixture
def told(server: Server, project: str) -> Callable[[], list[str]]:
    """The types of what the ledger holds after the session, and after everything in it was checked."""
    return lambda: [event.type for _, event in history(server, project)[1:]]


async def asked(ann: Client, position: int = 2) -> Json:
    """The question that is open once the ledger has `position`."""
    (approval,) = [one async for one in ann.list_approvals(state="pending", min_position=position)]
    return approval


async def decide(ann: Client, verdict: Any) -> None:
    approval = await asked(ann)
    await ann.vote(approval["approval_id"], verdict, approval["request_digest"])


def started(run: Example, muniment: Client, act: Act) -> asyncio.Task[str]:
    return asyncio.ensure_future(run(muniment, act))


async def killed(running: asyncio.Task[str]) -> None:
    while not running.done():  # a framework may lose a cancellation that meets it between two steps
        running.cancel()
        await asyncio.wait([running], timeout=2)
    assert running.cancelled()


ONCE = ["ApprovalRequested", "VoteCast", "ApprovalGranted", "ApprovalUseBegun", "ApprovalUseCompleted"]


async def test_what_a_person_approved_is_done_and_told(
    run: Example, muniment: Client, ann: Client, tool: Tool, told: Callable[[], list[str]]
) -> None:
    running = started(run, muniment, tool)
    await decide(ann, "approve")
    assert await running == "refunded 12.50"
    assert tool.done == [ACTION]
    assert told() == ONCE


async def test_what_a_person_denied_is_not_done(
    run: Example, muniment: Client, ann: Client, tool: Tool, told: Callable[[], list[str]]
) -> None:
    running = started(run, muniment, tool)
    await decide(ann, "deny")
    assert await running == "not done: denied"
    assert await run(muniment, tool) == "not done: denied"
    assert tool.done == []
    assert told() == ["ApprovalRequested", "VoteCast", "ApprovalDenied"]


@pytest.mark.parametrize("name", CALL_KEYS)
async def test_what_nobody_decided_in_time_is_not_done(
    name: str, muniment: Client, tool: Tool, told: Callable[[], list[str]]
) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=2)
    await muniment.request_approval(ACTION, call_key=CALL_KEYS[name], expires_at=soon)
    assert await EXAMPLES[name]()(muniment, tool) == "not done: expired"
    assert tool.done == []
    assert told() == ["ApprovalRequested", "ApprovalExpired"]


async def test_a_run_that_died_while_it_waited_asks_nobody_again(
    run: Example, muniment: Client, ann: Client, tool: Tool, told: Callable[[], list[str]]
) -> None:
    running = started(run, muniment, tool)
    await asked(ann)
    await killed(running)
    await decide(ann, "approve")
    assert await run(muniment, tool) == "refunded 12.50"
    assert tool.done == [ACTION]
    assert told() == ONCE


async def test_a_run_that_died_as_it_acted_does_not_act_again(
    run: Example, muniment: Client, ann: Client, told: Callable[[], list[str]]
) -> None:
    acting = asyncio.Event()

    async def act(action: Json) -> str:
        assert not acting.is_set()
        acting.set()
        await asyncio.Event().wait()
        return ""

    running = started(run, muniment, act)
    await decide(ann, "approve")
    await acting.wait()
    await killed(running)
    assert await run(muniment, act) == "not done: executing"
    assert told() == ONCE[:-1]


async def test_what_was_done_is_not_done_again(
    run: Example, muniment: Client, ann: Client, tool: Tool, told: Callable[[], list[str]]
) -> None:
    running = started(run, muniment, tool)
    await decide(ann, "approve")
    await running
    assert await run(muniment, tool) == "not done: executed"
    assert tool.done == [ACTION]
    assert told() == ONCE


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "node"])
async def test_of_two_runs_at_once_one_acts(
    name: str, muniment: Client, ann: Client, tool: Tool, told: Callable[[], list[str]]
) -> None:
    beside = asyncio.Event()

    async def act(action: Json) -> str:
        await beside.wait()
        return await tool(action)

    runs = [started(EXAMPLES[name](), muniment, act) for _ in range(2)]
    await decide(ann, "approve")
    (first,), (second,) = await asyncio.wait(runs, return_when=asyncio.FIRST_COMPLETED)
    assert first.result() in ("not done: begun by another run", "not done: executing")
    beside.set()
    assert await second == "refunded 12.50"
    assert tool.done == [ACTION]
    assert told() == ONCE


async def test_what_went_wrong_is_not_tried_again(
    run: Example, muniment: Client, ann: Client, told: Callable[[], list[str]]
) -> None:
    async def act(action: Json) -> str:
        raise ConnectionError("the bank does not answer")

    running = started(run, muniment, act)
    await decide(ann, "approve")
    with pytest.raises(Exception, match="the bank does not answer"):
        await running
    tells = run is by_loop
    assert await run(muniment, act) == f"not done: {'executed' if tells else 'executing'}"
    assert told() == (ONCE if tells else ONCE[:-1])


@pytest.mark.parametrize("name", ["loop", "node"])
async def test_what_an_approver_made_of_it_is_what_is_done(
    name: str, muniment: Client, ann: Client, tool: Tool
) -> None:
    running = started(EXAMPLES[name](), muniment, tool)
    await changed_and_approved(ann)
    assert await running == "refunded 10.00"
    assert tool.done == [LESS]


async def test_a_model_is_told_what_an_approver_made_of_its_call_and_may_do_that(
    muniment: Client, ann: Client, tool: Tool, told: Callable[[], list[str]]
) -> None:
    running = asyncio.create_task(by_guard(muniment, tool, ACTION, LESS))
    await changed_and_approved(ann)
    assert await running == "refunded 10.00"
    assert tool.done == [LESS]
    assert told() == ["ApprovalRequested", "ApprovalSuperseded", *ONCE]


async def changed_and_approved(ann: Client) -> None:
    approval = await asked(ann)
    await ann.edit(approval["approval_id"], LESS)
    approval = await asked(ann, position=4)
    await ann.vote(approval["approval_id"], "approve", approval["request_digest"])


async def test_nothing_of_a_graph_runs_while_people_think(muniment: Client, ann: Client, tool: Tool) -> None:
    node = ByNode()
    running = started(node, muniment, tool)
    await decide(ann, "approve")
    await running
    kept = [one async for one in node.saver.alist({"configurable": {"thread_id": JOB}})]
    assert "__interrupt__" in {channel for one in kept for _, channel, _ in one.pending_writes or ()}


@pytest.mark.parametrize("run", [by_loop, by_forgetful_node])
async def test_a_key_is_for_one_action(run: Any, muniment: Client, ann: Client, tool: Tool) -> None:
    running = started(run, muniment, tool)
    await decide(ann, "approve")
    await running
    with pytest.raises(IdempotencyKeyReused):
        await run(muniment, tool, LESS)
    assert tool.done == [ACTION]


@pytest.mark.parametrize("name", ["agent_loop", "langgraph_node"])
async def test_it_can_be_run_by_its_name(
    name: str, muniment: Client, ann: Client, server: Server, project: str, told: Callable[[], list[str]]
) -> None:
    environment = server.environment | {"URL": server.url, "TOKEN": server.token(project)}
    command = [sys.executable, "-P", "-m", "ops.examples", name]
    running = await asyncio.create_subprocess_exec(*command, env=environment, stdout=subprocess.PIPE)
    await decide(ann, "approve")
    said, _ = await running.communicate()
    assert "refunded 12.50 of invoice 9" in said.decode()
    assert told() == ONCE


def test_each_can_be_read_at_a_glance() -> None:
    lines = {path.name: len(path.read_text("utf-8").splitlines()) for path in Path(*examples.__path__).glob("*.py")}
    assert max(lines.values()) < 60, lines
