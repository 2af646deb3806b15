"""Run one: `TOKEN=… python -m ops.examples agent_loop | langgraph_node | tool_guard`, beside `make up` or with its URL.

It waits until a person has decided; run again, it does nothing twice. tool_guard needs OPENAI_API_KEY, for a model.
"""

import asyncio
import os
import sys
from typing import Any

from api.client import Client

ACTION = {"tool": "refund", "arguments": {"invoice": "9", "amount": "12.50"}}


async def act(action: dict[str, Any]) -> str:
    return "refunded {amount} of invoice {invoice}".format(**action["arguments"])  # what a tool would do


async def agent_loop(muniment: Client, job: str) -> list[str]:
    from ops.examples import agent_loop

    return await agent_loop.run(muniment, job, lambda came: None if came else ACTION, act)


async def langgraph_node(muniment: Client, job: str) -> str:
    from langgraph.checkpoint.memory import InMemorySaver

    from ops.examples import langgraph_node

    return await langgraph_node.run(muniment, job, ACTION, act, InMemorySaver())


async def tool_guard(muniment: Client, job: str) -> Any:
    from agents import Agent, Runner

    from ops.examples import tool_guard

    async def refund(invoice: str, amount: str) -> str:
        """Pay back a part of an invoice."""
        return await act({"arguments": {"invoice": invoice, "amount": amount}})

    clerk = Agent[tool_guard.Job](name="clerk", tools=[tool_guard.guarded(refund)])
    done = await Runner.run(clerk, "Refund 12.50 of invoice 9.", context=tool_guard.Job(job, muniment))
    return done.final_output


EXAMPLES = {"agent_loop": agent_loop, "langgraph_node": langgraph_node, "tool_guard": tool_guard}


async def main(name: str) -> None:
    async with Client(os.environ.get("URL", "http://127.0.0.1:8088"), os.environ["TOKEN"]) as muniment:
        print(await EXAMPLES[name](muniment, f"example of {name}"))


if __name__ == "__main__":
    if sys.argv[1:] not in [[name] for name in EXAMPLES] or "TOKEN" not in os.environ:
        sys.exit(__doc__)
    asyncio.run(main(sys.argv[1]))
