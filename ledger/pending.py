"""A command on its way through this process, from the one who asked to the one who answers.

It carries what is fixed before anything is decided: the id, the fingerprint, the target, the ids of its
events. It decides nothing, and it is answered once.
"""

import logging
from asyncio import Future
from collections.abc import Callable
from typing import Any
from uuid import UUID

import msgspec
from msgspec import Struct, field
from uuid_utils.compat import uuid7

from ledger.commands import Command
from ledger.entry import canonical
from ledger.errors import InternalError, MunimentError
from ledger.events import CommandRefused
from ledger.receipt import Receipt
from ledger.values import SYSTEM, Actor
from ledger.vault import Held

log = logging.getLogger(__name__)

Verdict = Receipt | MunimentError
"""What became of a command: its receipt, or the error that left no trace."""


class Pending(Struct, kw_only=True, eq=False):
    """A command on its way: what was asked, by whom, under which id, and where the answer goes.

    `rivals` came under the same id while it was: what becomes of them depends on what becomes of this one.
    """

    command: Command
    actor: Actor
    principal: str
    command_id: str
    target: UUID
    canonical: bytes
    fingerprint: bytes
    expected_version: int | None = None
    traceparent: str | None = None
    causation_id: UUID | None = None
    correlation_id: str | None = None
    answer: Future[Verdict] | None = None
    rivals: list["Pending"] = field(default_factory=list)
    minted: list[UUID] = field(default_factory=list)
    named: dict[str, UUID] = field(default_factory=dict)
    data_keys: Held | None = None
    outcome_unknown: bool = False
    since: float = 0.0
    """When it was taken in, by the clock that nobody sets."""
    span: Any = None
    """The span of whoever waits for the answer, if it is kept."""
    key: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        self.key = (self.principal, self.command_id)

    @classmethod
    def of_system(cls, command: Command, command_id: str, fingerprint: Callable[[bytes], bytes]) -> "Pending":
        """What the system itself commands: nobody waits for it."""
        assert command.target is not None
        asked = canonical(command)
        return cls(
            command=command,
            actor=SYSTEM,
            principal=SYSTEM.principal,
            command_id=command_id,
            target=command.target,
            canonical=asked,
            fingerprint=fingerprint(asked),
        )

    def resolve(self, verdict: Verdict) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(verdict)

    def fault(self, error: Exception) -> MunimentError:
        """What this command alone met. If it is no error of the table, it is a fault of ours."""
        if isinstance(error, MunimentError):
            return error
        log.error("A command %s could not be decided or stored", type(self.command).__name__, exc_info=error)
        return InternalError(why="This command met an error that nobody foresaw")

    def refused(self, refusal: MunimentError) -> CommandRefused:
        """What is recorded of its refusal: what was asked, as it was asked, and why not."""
        attempted = msgspec.json.decode(self.canonical)
        del attempted["type"]
        return CommandRefused(
            command_type=type(self.command).__name__,
            target=self.command.target,
            status=refusal.status,
            code=refusal.code,
            params=msgspec.to_builtins(refusal.params),
            attempted=attempted,
        )

    def mint(self, name: str) -> UUID:
        """An id of this command's making: the same each time it is decided."""
        return self.named.get(name) or self.named.setdefault(name, uuid7())

    def event_id(self, index: int) -> UUID:
        """The id of this command's event number `index`: the same each time it is decided."""
        while len(self.minted) <= index:
            self.minted.append(uuid7())
        return self.minted[index]
