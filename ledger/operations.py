"""What operators command about views and keys, in the project that is theirs; and how the system says what came of it.

These are no commands of other projects: no list of commands takes them, and the rules refuse them elsewhere. What is
asked for is an event like any other; a worker does it, and its answer is an event of the same stream.
"""

from typing import Annotated, ClassVar, Literal
from uuid import UUID, uuid5

from msgspec import UNSET, Meta, UnsetType

from ledger.commands import EXACT_INTEGER_MAX, Command, ProjectId, Text
from ledger.values import Asked, Line, Replayed

OPERATORS = "operators"
"""The project whose ledger has what is done to the deployment as a whole (SPEC s1)."""

VIEWS = UUID("6d3f4a52-7a0b-5c1e-9b64-2f1d3c8e7a90")
"""The namespace of the streams of views. Frozen: their ids are made from it."""

LOG_KEYS = uuid5(VIEWS, "log keys")
"""The one stream of the keys that sign checkpoints. Frozen, as they are."""

Outcome = Literal["switched", "cancelled", "rolled_back", "verified", "retried", "skipped", "failed"]


def stream_of(view: str) -> UUID:
    """The stream of what was asked of a view."""
    return uuid5(VIEWS, view)


def may_be_of_a_view(stream_id: UUID) -> bool:
    """Whether a view, of whatever release, may be called so: in the operators' ledger nothing else is, for whoever
    began that stream first would keep everybody from commanding the view."""
    return stream_id.version == 5


class OfView(Command, kw_only=True):
    """A command about a view, which is named as its schema is."""

    stream_type = "view"
    roles = frozenset({"operator"})
    asked: ClassVar[Asked]
    """What it asks for, or cancels."""

    view: Line | UnsetType = UNSET
    reason: Text | None = None

    @property
    def target(self) -> UUID | None:
        return None if self.view is UNSET else stream_of(self.view)


class RebuildView(OfView, kw_only=True, tag=True):
    """Build a view again beside the one that is read, compare it with a replay, and switch.

    Where one is under way, the answer is that one."""

    asked = "rebuild"


class CancelRebuild(OfView, kw_only=True, tag=True):
    """End the rebuild of a view that is under way, and drop what it made; unless it switches before."""

    asked = "rebuild"


class RollBackView(OfView, kw_only=True, tag=True):
    """Put back what the last rebuild of a view replaced, brought to where the view is now."""

    asked = "rollback"


class VerifyView(OfView, kw_only=True, tag=True):
    """Compare a view with a replay of the ledger that knows nothing of it: in one project, or in all."""

    asked = "verify"

    project: ProjectId | None = None


class RetryParked(OfView, kw_only=True, tag=True):
    """Have the events that a view cannot take tried again now: in one project, or in all."""

    asked = "retry"

    project: ProjectId | None = None


class SkipEvent(OfView, kw_only=True, tag=True):
    """Let a view leave out the event that it is parked before."""

    asked = "skip"

    project: ProjectId
    position: Annotated[int, Meta(ge=1, le=EXACT_INTEGER_MAX)]
    reason: Text


OPERATIONS: tuple[type[OfView], ...] = (RebuildView, CancelRebuild, RollBackView, VerifyView, RetryParked, SkipEvent)


class SettleRequest(OfView, kw_only=True, tag=True):
    """What came of the request that was made at version `request` of a view: the system's alone."""

    roles = frozenset()

    view: Line
    request: int
    outcome: Outcome
    because: str = ""
    replayed: Replayed | None = None

    @property
    def settling_id(self) -> str:
        """The same from any number of workers, however often they are killed: a request has one answer."""
        return str(uuid5(stream_of(self.view), f"settle {self.request}"))


class OfLogKeys(Command, kw_only=True):
    """A command about the keys that sign checkpoints. It is given where the keys are, and never over HTTP."""

    stream_type = "log_key"
    roles = frozenset({"operator"})

    number: Annotated[int, Meta(ge=1, le=EXACT_INTEGER_MAX)]
    reason: Text | None = None

    @property
    def target(self) -> UUID | None:
        return LOG_KEYS


class AddLogKey(OfLogKeys, kw_only=True, tag=True):
    """Have the key of that public half, in hex, sign the checkpoints of all ledgers."""

    public: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]


class RetireLogKey(OfLogKeys, kw_only=True, tag=True):
    """Have a key sign no more; there must be another that does."""
