"""Every command there is, as an agent and a person give them over HTTP, and what people read of it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import UUID

import psycopg
import pytest
from uuid_utils.compat import uuid7

from api.auth import development_token
from api.client import Client
from ledger.commands import COMMANDS
from ledger.errors import InvalidTransition
from tests.server import Server

ACTION = {"tool": "refund", "arguments": {"invoice": 9}}
LESS = {"tool": "refund", "arguments": {"invoice": 8}}
NAME = {"$personal": {"subject": "c-9", "value": "Mia Li"}}


class Pair:
    """An agent and who decides for it, on any of `servers` in turn: a caller of many processes reaches any of them."""

    def __init__(self, agents: Sequence[Client], people: Sequence[Client]) -> None:
        self._agents, self._people = list(agents), list(people)

    @property
    def agent(self) -> Client:
        self._agents.append(self._agents.pop(0))
        return self._agents[0]

    @property
    def person(self) -> Client:
        self._people.append(self._people.pop(0))
        return self._people[0]

    async def give_every_command(self) -> None:
        """Work in one session, until it ends; what must be refused is refused."""
        kind = f"mail.{uuid7().hex}"
        session = await self._open()
        with pytest.raises(InvalidTransition):
            await self.agent.change_session(session, status="pending")
        await self.agent.annotate(session, "two people have seen it")
        await self.agent.record("tool.called", session_id=session, body={"tool": "refund", "customer": NAME})
        await asyncio.gather(
            self._work(kind, session), self._ask_and_act(session), self._ask_in_vain(session), self._give_up(session)
        )
        await self.agent.change_session(session, status="completed")
        await self.agent.cancel(await self._open(), cascade=True)

    async def _open(self) -> UUID:
        opened = await self.agent.open_session("finance", labels={"team": "blue"}, metadata={"ticket": "T-81"})
        session = UUID(opened.body["session_id"])
        await self.agent.change_session(session, status="active")
        return session

    async def _work(self, kind: str, session: UUID) -> None:
        """A task that waits for an approval, and one that fails and is taken up again."""
        await self.agent.submit_task(kind, payload={"to": NAME}, session_id=session, max_attempts=1)
        (task,) = await self.agent.claim_tasks("w-1", kinds=(kind,), wait_seconds=10)
        await self.agent.heartbeat(task["task_id"], task["lease_id"])
        await self.agent.fail_task(task["task_id"], task["lease_id"], "no seats", retryable=False)
        await self.person.redrive_task(task["task_id"], "there are seats")
        (task,) = await self.agent.claim_tasks("w-1", kinds=(kind,), wait_seconds=10)
        asked = await self.agent.request_approval(ACTION, task_id=task["task_id"])
        await self.agent.suspend_task(task["task_id"], task["lease_id"], asked.body["approval_id"])
        await self.person.vote(asked.body["approval_id"], "approve", asked.body["request_digest"])
        (task,) = await self.agent.claim_tasks("w-1", kinds=(kind,), wait_seconds=10)
        await self.agent.complete_task(task["task_id"], task["lease_id"], {"sent": True})
        assert (await self.agent.wait_for_task(task["task_id"]))["state"] == "completed"

    async def _ask_and_act(self, session: UUID) -> None:
        asked = await self.agent.request_approval(ACTION, session_id=session, risk="high")
        await self.person.present(asked.body["approval_id"], "console")
        approval = uuid7()
        await self.person.edit(asked.body["approval_id"], LESS, new_approval_id=approval)
        waiting = asyncio.create_task(self.agent.wait_for_decision(approval))
        await self.person.vote(approval, "approve", (await self.person.get_approval(approval))["request_digest"])
        assert (await waiting)["state"] == "approved"
        execution = uuid7()
        assert (await self.agent.begin_use(approval, execution, LESS)).body["use_token"]
        await self.agent.record_outcome(approval, execution, "ok")

    async def _ask_in_vain(self, session: UUID) -> None:
        quorum = {"approve": 2, "deny": 2, "roles": ["approver"]}
        asked = await self.agent.request_approval(ACTION, session_id=session, quorum=quorum)
        await self.person.vote(asked.body["approval_id"], "deny", asked.body["request_digest"])
        await self.person.withdraw_vote(asked.body["approval_id"])
        await self.agent.withdraw(asked.body["approval_id"])
        asked = await self.agent.request_approval(ACTION, session_id=session)
        await self.person.cancel_approval(asked.body["approval_id"])
        asked = await self.agent.request_approval(ACTION, session_id=session, valid_for_seconds=600)
        await self.person.vote(asked.body["approval_id"], "approve", asked.body["request_digest"])
        await self.person.revoke(asked.body["approval_id"])

    async def _give_up(self, session: UUID) -> None:
        task = await self.agent.submit_task("nobody.does-it", session_id=session)
        await self.agent.cancel_task(task.body["task_id"])

    async def read_every_list(self) -> dict[str, int]:
        """How many there are of each; none may fail."""
        person = self.person
        lists = {
            "sessions": person.list_sessions(label="team:blue"),
            "records": person.list_records(kind="tool.called"),
            "tasks": person.list_tasks(state="completed"),
            "dead": person.list_dead_letters(),
            "approvals": person.list_approvals(state="executed"),
            "events": person.events(),
            "found": person.search("refund"),
        }
        return {name: len([item async for item in items]) for name, items in lists.items()}


@asynccontextmanager
async def pair_of(project: str, *servers: Server) -> AsyncIterator[Pair]:
    """Who uses these servers, which have their keys in common."""
    keys = servers[0].keys_dir
    human = development_token(
        keys, project=project, subject="mia", kind="human", roles=["approver", "operator", "auditor"]
    )
    agent = development_token(keys, project=project, subject="bot", kind="agent", roles=["agent"])
    async with AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(Client(server.url, agent)) for server in servers]
        people = [await stack.enter_async_context(Client(server.url, human)) for server in servers]
        yield Pair(agents, people)


def given(conninfo: str) -> set[str]:
    """The types of the commands that a database has."""
    with psycopg.connect(conninfo) as connection:
        return {name for (name,) in connection.execute("SELECT DISTINCT type FROM ledger.commands").fetchall()}


EVERY: set[str] = {command.__name__ for command in COMMANDS}


async def until(condition: Callable[[], Awaitable[object]], seconds: float = 60) -> None:
    """Ask again and again until it is so; fails when it never is."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not await condition():
        assert asyncio.get_running_loop().time() < deadline, "it never came"
        await asyncio.sleep(0.02)
