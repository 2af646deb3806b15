"""The facts about views, in the ledger of the operators: what was asked of them, and what came of it.

What holds of every fact (events.py) holds of these. A view is called by its name; `request` is the version of the view
at which was asked for what came to this, and `asked_by` is who did.
"""

from ledger.events import Fact
from ledger.values import Asked, Principal, Replayed


class RebuildRequested(Fact, frozen=True):
    """The view is to be built again, beside the one that is read."""

    stream_type = "view"
    view: str


class RebuildCancelRequested(Fact, frozen=True):
    """The rebuild that was asked for at version `request` is to end. It may be too late: what came of it tells."""

    stream_type = "view"
    view: str
    request: int


class RollBackRequested(Fact, frozen=True):
    """What the last rebuild replaced is to come back."""

    stream_type = "view"
    view: str


class VerificationRequested(Fact, frozen=True):
    """The view is to be compared with a replay: in one project, or in all."""

    stream_type = "view"
    view: str
    project: str | None = None


class ParkedRetryRequested(Fact, frozen=True):
    """What the view cannot take is to be tried again now: in one project, or in all."""

    stream_type = "view"
    view: str
    project: str | None = None


class EventSkipRequested(Fact, frozen=True):
    """The view is to leave out the event that it is parked before."""

    stream_type = "view"
    view: str
    project: str
    position: int


class ViewSwitched(Fact, frozen=True):
    """What was built is what is read from here on; it was compared with that replay before."""

    stream_type = "view"
    view: str
    request: int
    asked_by: Principal
    replayed: Replayed


class RebuildCancelled(Fact, frozen=True):
    stream_type = "view"
    view: str
    request: int
    asked_by: Principal
    cancelled_by: Principal


class ViewRolledBack(Fact, frozen=True):
    stream_type = "view"
    view: str
    request: int
    asked_by: Principal


class ViewVerified(Fact, frozen=True):
    """Whether the view holds what that replay makes, and if not, in how many values it differs, and where."""

    stream_type = "view"
    view: str
    request: int
    asked_by: Principal
    holds: bool
    replayed: Replayed
    project: str | None = None


class ParkedRetried(Fact, frozen=True):
    stream_type = "view"
    view: str
    request: int
    asked_by: Principal


class EventSkipped(Fact, frozen=True):
    stream_type = "view"
    view: str
    request: int
    asked_by: Principal
    project: str
    position: int


class ViewRequestFailed(Fact, frozen=True):
    """It could not be done; the view is as it was."""

    stream_type = "view"
    view: str
    request: int
    asked_by: Principal
    asked: Asked
    because: str
