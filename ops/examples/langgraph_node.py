"""A LangGraph node that asks a person before it acts, and survives being run again.

LangGraph runs a node again from its first line when it is resumed, or after its process died. So the node asks each
time, and each time is answered with the same approval as it is now. What it is resumed with says only where to look:
whether it may act it learns from the ledger.
"""

from collections.abc import Awaitable, Callable
from typing import Any, NotRequired, TypedDict
from uuid import NAMESPACE_URL, uuid5

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt

from api.client import Client

Json = dict[str, Any]
Act = Callable[[Json], Awaitable[str]]


class State(TypedDict):
    action: Json
    came: NotRequired[str]


async def run(muniment: Client, job: str, action: Json, act: Act, saver: BaseCheckpointSaver[Any]) -> str:
    """Have the graph do `action`, waiting outside of it: nothing of it runs while people think."""

    async def ask_and_act(state: State, config: RunnableConfig) -> Json:
        call_key = f"{config['configurable']['thread_id']}:ask_and_act"
        once = uuid5(NAMESPACE_URL, call_key)  # the same in every run
        approval = (await muniment.request_approval(state["action"], call_key=call_key, command_id=str(once))).body
        while approval["state"] in ("pending", "superseded"):
            approval = await muniment.get_approval(interrupt(approval["approval_id"]))
        if approval["state"] != "approved":
            return {"came": f"not done: {approval['state']}"}
        approval_id, action = approval["approval_id"], approval["action"]  # as approved: it may have been changed
        if not (await muniment.begin_use(approval_id, once, action)).positions:
            return {"came": "not done: begun by another run"}
        result = await act(action)  # if it raises, its outcome becomes `unknown`, and it is not done again
        await muniment.record_outcome(approval_id, once, "ok", result=result)
        return {"came": result}

    graph = StateGraph(State).add_node(ask_and_act).add_edge(START, "ask_and_act").compile(checkpointer=saver)
    config: RunnableConfig = {"configurable": {"thread_id": job}}
    state = await graph.ainvoke({"action": action}, config)
    while waiting := state.get("__interrupt__"):
        decided = await muniment.wait_for_decision(waiting[0].value)
        state = await graph.ainvoke(Command(resume=decided["approval_id"]), config)
    return str(state["came"])
