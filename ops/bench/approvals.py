"""The lists that approvers look at: pages of what is pending, among many more approvals. A program of the bench.

Told: url, project, seconds. One reader asks for the first page of each list and for the one after it, in turns. What
it measured is of the list that was the slowest; what each took is said on the way.
"""

import asyncio
import random
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid5

from msgspec.structs import replace

from ledger import store
from ledger.commands import CastVote, OpenSession, RequestApproval, SubmitTask
from ledger.committer import Committer
from ledger.postgres import Connection, open_pool
from ledger.values import Action, Actor, Quorum, Risk
from ops.bench import mix
from ops.bench.committing import committing, summary
from ops.bench.stage import answer, told, wait_for_word
from projections import approvals
from projections.approvals import Filter, Order

APPROVALS = 100_000
PENDING_EVERY = 20
PAGE = 50
CALLERS = 256

SESSIONS = 200
TASKS = 100
TOOLS = [f"tool-{number}" for number in range(20)]
RISKS: list[Risk] = ["low", "medium", "high", "critical"]
QUORUMS = [Quorum(), Quorum(roles=("finance",)), Quorum(approve=2, roles=("sre", "owner"))]
AGENTS = [replace(mix.AGENT, sub=f"agent-{number}") for number in range(10)]
APPROVER = Actor(
    issuer=mix.AGENT.issuer,
    sub="ana",
    kind="human",
    assurance="authenticated",
    roles=("approver", "finance", "sre", "owner"),
)
EXPIRY = datetime(2100, 1, 1, tzinfo=UTC)
"""So far away that nothing expires while it is measured; each is asked for up to a week longer than that."""

_NAMES = UUID("0199b0d1-3c55-7d52-9e0b-4f1d5f0c7a11")


def session_id(number: int) -> UUID:
    return uuid5(_NAMES, f"session {number}")


def task_id(number: int) -> UUID:
    return uuid5(_NAMES, f"task {number}")


def _pending(order: Order = "asc", **wanted: Any) -> tuple[Filter, Order]:
    return Filter(state="pending", **wanted), order


LISTS: dict[str, tuple[Filter, Order]] = {
    "the oldest first": _pending(),
    "the newest first": _pending("desc"),
    "the riskiest first": _pending("risk"),
    "the most urgent first": _pending("expires_at"),
    "of a session": _pending(session_id=session_id(7)),
    "of a task": _pending(task_id=task_id(7)),
    "of a common tool": _pending(tool=TOOLS[0]),
    "of a rare tool": _pending(tool=TOOLS[-1]),
    "of an unknown tool": _pending(tool="no such tool"),
    "low risk": _pending(risk="low"),
    "critical risk": _pending(risk="critical"),
    "for a common role": _pending(role="approver"),
    "for a rare role": _pending(role="sre"),
    "for an unknown role": _pending(role="nobody"),
    "of a requester": _pending(requester="agent-3"),
    "of an unknown requester": _pending(requester="nobody"),
    "expiring within an hour": _pending(expires_before=EXPIRY + timedelta(hours=1)),
    "for a common role, the riskiest first": _pending("risk", role="approver"),
    "for a rare role, the riskiest first": _pending("risk", role="owner"),
    "for an unknown role, the riskiest first": _pending("risk", role="nobody"),
    "for a rare role, the most urgent first": _pending("expires_at", role="sre"),
    "expiring within an hour, the riskiest first": _pending("risk", expires_before=EXPIRY + timedelta(hours=1)),
    "critical, the most urgent first": _pending("expires_at", risk="critical"),
    "of a rare tool, for a role, low risk": _pending("desc", tool=TOOLS[-1], role="finance", risk="low"),
    "of a session, the riskiest first": _pending("risk", session_id=session_id(7)),
}
"""Every filter alone, and those that are used together; some find nothing, and must not take long to."""

# Filling


async def fill(url: str, keys: str, project: str, count: int) -> None:
    """Have `count` approvals asked for, and all but every twentieth decided, by commands."""
    numbers = iter(range(count))
    async with committing(url, keys) as committer:
        for number in range(SESSIONS):
            await committer.submit(
                project, OpenSession(session_id=session_id(number), agent_role="airline-support"), mix.AGENT
            )
        for number in range(TASKS):
            await committer.submit(project, SubmitTask(task_id=task_id(number), kind="refund"), mix.AGENT)
        await asyncio.gather(*(_ask(committer, project, numbers) for _ in range(CALLERS)))


async def _ask(committer: Committer, project: str, numbers: Iterator[int]) -> None:
    for number in numbers:
        chance = random.Random(number)  # noqa: S311  (the same in every run)
        asked = await committer.submit(project, request(number, chance), chance.choice(AGENTS))
        if number % PENDING_EVERY:
            of, seen = asked.state.approval_id, asked.state.request_digest
            vote = CastVote(approval_id=of, verdict="deny", digest_seen=seen, reason="Not this one.")
            answered = await committer.submit(project, vote, APPROVER)
            assert answered.refusal is None


def request(number: int, chance: random.Random) -> RequestApproval:
    """Like those of an agent that changes bookings. Few are critical, of the last tools, for other roles."""
    tool = TOOLS[min(int(chance.expovariate(0.5)), len(TOOLS) - 1)]
    of_task = chance.random() < 0.02
    return RequestApproval(
        action=Action(
            tool=tool,
            arguments={"reservation_id": f"R{number:06}", "payment": {"amount": "114.00", "currency": "USD"}},
            target=f"booking/{number}",
        ),
        summary="Change the flight to the day after, and charge the difference to the card of the booking.",
        session_id=None if of_task else session_id(chance.randrange(SESSIONS)),
        task_id=task_id(chance.randrange(TASKS)) if of_task else None,
        risk=chance.choices(RISKS, [60, 25, 12, 3])[0],
        quorum=chance.choices(QUORUMS, [90, 9, 1])[0],
        expires_at=EXPIRY + timedelta(seconds=chance.randrange(7 * 86_400)),
    )


# Reading


async def main(url: str, project: str, seconds: float) -> None:
    async with open_pool(url, 1) as pool, pool.connection() as connection:
        ledger = await store.find_ledger(connection, project)
        assert ledger is not None
        for wanted, order in LISTS.values():
            await pages(connection, ledger.ledger_id, wanted, order)
        wait_for_word()
        taken_ms: dict[str, list[float]] = {name: [] for name in LISTS}
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            for name, (wanted, order) in LISTS.items():
                taken_ms[name] += await pages(connection, ledger.ledger_id, wanted, order)
    measured = {name: summary(taken, sum(taken) / 1000) for name, taken in taken_ms.items()}
    for name, figures in measured.items():
        print(
            f"    {name}: p50 {figures['p50_ms']:.1f} ms, p99 {figures['p99_ms']:.1f} ms", file=sys.stderr, flush=True
        )
    answer(**max(measured.values(), key=lambda figures: figures["p99_ms"]))


async def pages(connection: Connection, ledger_id: UUID, wanted: Filter, order: Order) -> list[float]:
    """How long the first page took, and the second, if there is one."""
    taken_ms: list[float] = []
    after: int | None = None
    while len(taken_ms) < 2:
        begun = time.perf_counter()
        found = await approvals.search(connection, ledger_id, wanted, limit=PAGE, after=after, order=order)
        taken_ms.append((time.perf_counter() - begun) * 1000)
        after = found.next
        if after is None:
            break
    return taken_ms


if __name__ == "__main__":
    asyncio.run(main(**told()))
