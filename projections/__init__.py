"""What it looks like: views built from the ledger, all of them disposable.

A view is one module here with its `.sql`, registered in VIEWS, and one schema of its name. Nothing decides
anything by a view.
"""

from collections.abc import Mapping

from projections import approvals, audit, records, sessions, tasks
from projections.freshness import Freshness, Health, caught_up, health
from projections.projector import Projector, View

VIEWS: Mapping[str, View] = {
    "sessions": sessions,
    "records": records,
    "tasks": tasks,
    "approvals": approvals,
    "audit": audit,
}
"""Every view, by the name of its schema."""

__all__ = [
    "VIEWS",
    "Freshness",
    "Health",
    "Projector",
    "View",
    "approvals",
    "audit",
    "caught_up",
    "health",
    "records",
    "sessions",
    "tasks",
]
