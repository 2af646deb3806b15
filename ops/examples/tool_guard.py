"""A guard for the tools of the OpenAI Agents SDK: a person is asked before the tool runs.

Every run gives a call another id: so the job, the tool and the arguments are what names it, and a job that is started
again finds what it asked. If the tool raises, its outcome becomes `unknown`, and it is not run again.
"""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from uuid import NAMESPACE_URL, UUID, uuid5

import agents
from agents import FunctionTool, ToolGuardrailFunctionOutput, ToolInputGuardrailData, ToolOutputGuardrailData

from api.client import Client


@dataclass
class Job:
    """What an agent works on: the context of its run. `begun` has the approval and the execution of each open call."""

    name: str
    muniment: Client
    begun: dict[str, tuple[UUID, UUID]] = field(default_factory=dict)


@agents.tool_input_guardrail
async def ask_first(data: ToolInputGuardrailData) -> ToolGuardrailFunctionOutput:
    call, job = data.context, data.context.context
    action = {"tool": call.tool_name, "arguments": json.loads(call.tool_arguments or "{}")}
    once = uuid5(NAMESPACE_URL, json.dumps([job.name, action], sort_keys=True))  # the same in every run
    asked = await job.muniment.request_approval(action, call_key=f"{job.name}:{call.tool_name}", command_id=str(once))
    approval = await job.muniment.wait_for_decision(asked.body["approval_id"])
    if approval["state"] != "approved":
        return ToolGuardrailFunctionOutput.reject_content(f"not done: {approval['state']}")
    if approval["action"] != action:  # an approver changed it: it is for the model to call the tool like that
        return ToolGuardrailFunctionOutput.reject_content(f"not done: approved was {json.dumps(approval['action'])}")
    if not (await job.muniment.begin_use(approval["approval_id"], once, action)).positions:
        return ToolGuardrailFunctionOutput.reject_content("not done: begun by another run")
    job.begun[call.tool_call_id] = approval["approval_id"], once
    return ToolGuardrailFunctionOutput.allow()


@agents.tool_output_guardrail
async def tell_outcome(data: ToolOutputGuardrailData) -> ToolGuardrailFunctionOutput:
    approval_id, once = data.context.context.begun.pop(data.context.tool_call_id)
    await data.context.context.muniment.record_outcome(approval_id, once, "ok", result=str(data.output))
    return ToolGuardrailFunctionOutput.allow()


def guarded(tool: Callable[..., Awaitable[str]]) -> FunctionTool:
    """As `function_tool`; but what goes wrong is raised, so that only what was done is told as done."""
    return agents.function_tool(
        tool,
        tool_input_guardrails=[ask_first],
        tool_output_guardrails=[tell_outcome],
        failure_error_function=None,
        timeout_behavior="raise_exception",
    )
