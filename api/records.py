"""Records over HTTP."""

from api.commands import commanding
from ledger.commands import Record

ROUTES = [commanding("POST", "/records", Record, listed=True)]
