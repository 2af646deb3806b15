"""What operators ask of views, followed in the ledger of their own and done; and what came of it, said there.

A view's stream says what is open, and `projections.rebuilds` how far that is: each look compares the two and does what
is missing, so it does not matter who looks, nor where the one before was killed. What is done is done in a transaction
that notes the request's number; what came of it is a command with an id made from that number, so that it stands in the
ledger once, and is what that transaction did. Building is not here: `rebuild_for_ever` takes what was begun.
"""

import asyncio
import logging
from typing import Any

from ledger import store
from ledger.committer import Committer
from ledger.errors import IdempotencyKeyReused, MunimentError
from ledger.operations import OPERATORS, Outcome, RebuildView, SettleRequest, stream_of
from ledger.postgres import Connection, Pool
from ledger.replay import fold_all
from ledger.values import SYSTEM, Replayed
from ledger.view import Request, View, unasked
from projections import VIEWS
from projections.projector import TROUBLE, Troubles
from projections.proof import prove
from projections.rebuild import UNDER_WAY, Impossible, Rebuild, begin, cancel, latest, retry, roll_back, skip
from projections.verify import summed_up

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2
RETRY_SECONDS = 1.0


async def views(connection: Connection) -> tuple[int, dict[str, View]]:
    """What operators asked of each view, and the size of their ledger when that was read; 0 where there is none.

    Raises UpgradeRequired.
    """
    ledger = await store.find_ledger(connection, OPERATORS)
    states: dict[Any, Any] = {}
    if ledger is not None and ledger.size:
        history = await store.read_streams(connection, ledger.ledger_id, [stream_of(view) for view in VIEWS])
        # What an earlier release let be called as a view is none.
        states = {stream: state for stream, state in fold_all(history).items() if isinstance(state, View)}
    return ledger.size if ledger else 0, {view: states.get(stream_of(view)) or unasked(view) for view in VIEWS}


def reason_of(request: Request) -> str:
    """Why it was asked for, in words that PostgreSQL's text can hold; nothing where that is sealed."""
    return request.reason.replace("\0", "\ufffd") if isinstance(request.reason, str) else ""


class Follower:
    """Does what operators ask, for as long as `follow` runs."""

    def __init__(self, pool: Pool, committer: Committer) -> None:
        self._pool = pool
        self._committer = committer
        self._size = -1
        self._views: dict[str, View] = {}
        # What may take long, each by itself; the rest is done as it is met.
        self._jobs: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._verifying = asyncio.Lock()
        self._troubles = Troubles(log.warning)

    async def follow(self) -> None:
        """Do what is asked. Without a database, or the key of that ledger, wait for it. Ends when cancelled."""
        try:
            while True:
                try:
                    well = await self._look()
                    self._say("what operators ask of views", "")
                except (*TROUBLE, MunimentError) as error:
                    well = False
                    self._say("what operators ask of views", str(error))
                await asyncio.sleep(LOOK_SECONDS if well else RETRY_SECONDS)
        finally:
            for job in self._jobs.values():
                job.cancel()
            await asyncio.gather(*self._jobs.values(), return_exceptions=True)
            self._jobs.clear()

    async def renew(self, connection: Connection, view: str, asked_by: str, reason: str) -> bool:
        """Ask for a rebuild that a release needs; False where one was asked for. Where operators have no ledger yet, it
        is begun and nobody is told. Raises StoreUnavailable."""
        if await store.find_ledger(connection, OPERATORS) is None:
            return await begin(connection, view, asked_by, reason)
        command = RebuildView(view=view, reason=f"{asked_by}: {reason}")
        return (await self._committer.submit(OPERATORS, command, SYSTEM)).event_count > 0

    async def _look(self) -> bool:
        """Whether all that is open was done, or begun."""
        well = self._ended_well()
        async with self._pool.connection() as connection:
            ledger = await store.find_ledger(connection, OPERATORS)
            if ledger is None:
                return well
            if ledger.size != self._size:
                self._size, self._views = await views(connection)
            asked = [(view, request) for view in self._views.values() for request in view.open]
            rebuilds = {one.view: one for one in await latest(connection)} if asked else {}
            for view, request in asked:
                what = f"request {request.request} of {view.view}"
                try:
                    await self._do(connection, view, request, rebuilds.get(view.view))
                    self._say(what, "")
                except (*TROUBLE, MunimentError) as error:
                    well = False
                    self._say(what, str(error))
            return well

    async def _do(self, connection: Connection, view: View, request: Request, found: Rebuild | None) -> None:
        """Do it, or begin to, or see what came of that. Raises TROUBLE, StoreUnavailable; then it is tried again."""
        match request.asked:
            case "rebuild":
                await self._rebuild(connection, view, request, found)
            case "retry":
                await retry(connection, view.view, request.project)
                await self._settle(view, request, "retried")
            case "skip":
                await self._skip(connection, view, request)
            case "rollback" | "verify":
                if (key := (view.view, request.request)) not in self._jobs:
                    work = self._roll_back if request.asked == "rollback" else self._verify
                    self._jobs[key] = asyncio.create_task(work(view, request))

    def _ended_well(self) -> bool:
        """Forget the jobs that have ended: those that could not do it are begun again, while it is still open."""
        well = True
        for key in [key for key, job in self._jobs.items() if job.done()]:
            error = self._jobs.pop(key).exception()
            if error is not None and not isinstance(error, (*TROUBLE, MunimentError)):
                raise error
            self._say(f"the job of request {key[1]} of {key[0]}", str(error or ""))
            well = well and error is None
        return well

    def _say(self, what: str, trouble: str) -> None:
        self._troubles.say(what, trouble and f"{what} will be tried again: {trouble}")

    async def _rebuild(self, connection: Connection, view: View, request: Request, found: Rebuild | None) -> None:
        """Begin it, cancel it, or say what came of it."""
        asked_by, number = str(request.asked_by), request.request
        if found is None or found.request != number:
            # Where another is under way that nobody asked for here, this one waits for it.
            await begin(connection, view.view, asked_by, reason_of(request), number)
        elif found.state in UNDER_WAY:
            if view.state == "cancelling":
                await cancel(connection, view.view, str(request.cancelled_by), "", number)
        elif found.state == "switched":
            assert found.code_version is not None
            assert found.heads_digest is not None
            assert found.digest is not None
            replayed = Replayed(
                code_version=found.code_version,
                heads_digest=found.heads_digest,
                digest=found.digest,
                rows=found.rows_compared or 0,
            )
            await self._settle(view, request, "switched", replayed=replayed)
        elif found.state == "cancelled" and request.cancelled_by is not None:
            await self._settle(view, request, "cancelled")
        else:
            await self._settle(view, request, "failed", because=found.ended_because or found.state)

    async def _roll_back(self, view: View, request: Request) -> None:
        try:
            await roll_back(self._pool, view.view, str(request.asked_by), reason_of(request), request.request)
        except Impossible as error:
            await self._settle(view, request, "failed", because=str(error))
        else:
            # Dying before this, it is found to have been done, and said then.
            await self._settle(view, request, "rolled_back")

    async def _verify(self, view: View, request: Request) -> None:
        try:
            async with self._verifying:
                verdicts = await prove(self._pool, view.view, request.project)
        except TROUBLE:
            raise
        except Exception as error:
            # Tried again it would end so again, and take all else that is asked with it.
            log.exception("%s cannot be verified", view.view)
            await self._settle(view, request, "failed", because=f"{type(error).__name__}: {error}"[:2000])
            return
        if request.project is not None and not verdicts:
            because = f"{view.view} has nothing of a project {request.project}"
            await self._settle(view, request, "failed", because=because)
        else:
            await self._settle(view, request, "verified", replayed=summed_up(verdicts))

    async def _skip(self, connection: Connection, view: View, request: Request) -> None:
        assert request.project is not None
        assert request.position is not None
        asked_by, reason = str(request.asked_by), reason_of(request)
        try:
            await skip(connection, view.view, request.project, request.position, asked_by, reason)
        except Impossible as error:
            await self._settle(view, request, "failed", because=str(error))
        else:
            await self._settle(view, request, "skipped")

    async def _settle(
        self, view: View, request: Request, outcome: Outcome, *, because: str = "", replayed: Replayed | None = None
    ) -> None:
        """Say what came of it, once. Raises StoreUnavailable; then it is said later."""
        command = SettleRequest(
            view=view.view,
            request=request.request,
            outcome=outcome,
            because=because,
            replayed=replayed,
            reason=reason_of(request) or None,
            causation_id=request.event_id,
        )
        command.command_id = command.settling_id
        try:
            await self._committer.submit(OPERATORS, command, SYSTEM)
        except IdempotencyKeyReused:
            log.info("what came of request %d of %s was said by another worker", request.request, view.view)
