"""What the system alone commands: what is due because its time has come, and what follows from another stream.

No caller can give these. A due command has an id made from its stream and its deadline, so that any number of
sweepers, and every command that comes too late, do it once between them.
"""

from typing import ClassVar, Literal, NamedTuple
from uuid import UUID, uuid5

from ledger.commands import Command
from ledger.values import Stamp


class Due(Command, kw_only=True):
    """Something's time has come. `deadline` is the one that was set: another one since makes it void."""

    roles = frozenset()
    verb: ClassVar[str]

    deadline: Stamp

    @property
    def due_id(self) -> str:
        """The same from any number of sweepers, so that it is done once."""
        assert self.target is not None
        return str(uuid5(self.target, f"{self.verb} {self.deadline}"))


class Overdue(NamedTuple):
    """What is due, and in which project."""

    project_id: str
    command: Due


class ExpireSession(Due, kw_only=True, tag=True):
    stream_type = "session"
    verb = "expire"

    session_id: UUID


class ExpireTask(Due, kw_only=True, tag=True):
    stream_type = "task"
    verb = "expire"

    task_id: UUID


class QueueTask(Due, kw_only=True, tag=True):
    """The time to try it again has come."""

    stream_type = "task"
    verb = "queue"

    task_id: UUID


class LoseAttempt(Due, kw_only=True, tag=True):
    """Nothing was heard of this lease in time. `deadline` is when it ended as far as events say; that no heartbeat
    has come since is seen under the ledger's lock."""

    stream_type = "task"
    verb = "lose"

    task_id: UUID
    lease_id: UUID


class ResumeTask(Command, kw_only=True, tag=True):
    """The approval that the task waits for was decided, or another one stands `instead` of it."""

    stream_type = "task"
    roles = frozenset()

    task_id: UUID
    approval_id: UUID
    decision: str
    instead: UUID | None = None


class ExpireApproval(Due, kw_only=True, tag=True):
    stream_type = "approval"
    verb = "expire"

    approval_id: UUID


class LapseApproval(Due, kw_only=True, tag=True):
    stream_type = "approval"
    verb = "lapse"

    approval_id: UUID


class MissOutcome(Due, kw_only=True, tag=True):
    """Nobody said in time what came of the execution."""

    stream_type = "approval"
    verb = "miss"

    approval_id: UUID


class EndApproval(Command, kw_only=True, tag=True):
    """What the approval was asked for has ended."""

    stream_type = "approval"
    roles = frozenset()

    approval_id: UUID
    cause: Literal["session_ended", "task_ended"]
