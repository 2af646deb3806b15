"""An agent loop that asks a person before it acts, in plain Python.

It may be killed at any line and run again from the start. Of one call key there is one question, one decision and
one act: asked again, the ledger answers with the same approval as it is now. At worst an act was begun and its
outcome never told: then it is not done again, and a person has to look.
"""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from api.client import Client

Json = dict[str, Any]
Model = Callable[[list[str]], Json | None]
Act = Callable[[Json], Awaitable[str]]


async def run(muniment: Client, job: str, model: Model, act: Act) -> list[str]:
    """Do what `model` wants next, given what came of all before, until it wants nothing more."""
    came: list[str] = []
    while action := model(came):
        came.append(await ask_and_act(muniment, f"{job}:{len(came)}", action, act))
    return came


async def ask_and_act(muniment: Client, call_key: str, action: Json, act: Act) -> str:
    once = uuid5(NAMESPACE_URL, call_key)  # the same in every run
    asked = await muniment.request_approval(action, call_key=call_key, command_id=str(once))
    approval = await muniment.wait_for_decision(asked.body["approval_id"])
    if approval["state"] != "approved":
        return f"not done: {approval['state']}"
    approval_id, action = approval["approval_id"], approval["action"]  # as approved: an approver may have changed it
    begun = await muniment.begin_use(approval_id, once, action)
    if not begun.positions:  # it changed nothing: another run began before this one
        return "not done: begun by another run"
    try:
        result = await act(action)
    except Exception:
        await muniment.record_outcome(approval_id, once, "failed")
        raise
    await muniment.record_outcome(approval_id, once, "ok", result=result)
    return result
