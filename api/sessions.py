"""Sessions over HTTP."""

from api.commands import commanding
from ledger.commands import AnnotateSession, CancelSession, ChangeSession, OpenSession

ROUTES = [
    commanding("POST", "/sessions", OpenSession),
    commanding("PUT", "/sessions/{session_id:str}", ChangeSession, "session_id"),
    commanding("POST", "/sessions/{session_id:str}/cancel", CancelSession, "session_id"),
    commanding("POST", "/sessions/{session_id:str}/annotations", AnnotateSession, "session_id"),
]
