"""Commands on their way to a server until each has its answer; a part of the Python client.

Given many at a time, in as few requests as they fit in, and in order. What could not be decided is given again under
the same id, so nothing happens twice; what is decided is never asked for again.
"""

from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import Any

import msgspec
from msgspec import UNSET, Struct
from uuid_utils.compat import uuid7

from api.wire import TRY_AGAIN, Tries, Wire, decoded, error_of, strange
from ledger.commands import Command
from ledger.errors import BodyTooLarge, MunimentError

BATCH_COMMANDS_MAX = 1000
BATCH_BYTES_MAX = 8 * 1024 * 1024


class Answer(Struct, frozen=True, kw_only=True):
    """What became of one command.

    `body` is what the command's own route answers: the session, record, task or approval as it left that, or the
    problem where it was refused.
    `positions` are those of the events it appended, now or, if it is `replayed`, when it was first given.
    `command_id` is None where it could not be read.
    """

    command_id: str | None
    status: int
    body: Any
    replayed: bool = False
    positions: list[int] = []
    location: str | None = None
    etag: str | None = None

    @property
    def error(self) -> MunimentError | None:
        """Why it was refused, or None."""
        return error_of(self.status, self.body) if self.status >= 400 else None


_answers = msgspec.json.Decoder(list[Answer])


async def answers_to(wire: Wire, commands: Iterable[Command]) -> list[Answer]:
    """See `Client.send`."""
    waiting = deque(map(encoded, commands))
    answers: list[Answer] = []
    tries = Tries(wire.patience_seconds)
    while waiting:
        batch = _first_batch(waiting)
        if not batch:
            answers.append(_too_large(waiting.popleft()[0]))
            continue
        response = await wire.exchange("POST", "/commands", content=b"[%b]" % b",".join(batch))
        decided: list[Answer] = decoded(response, _answers)
        if len(decided) != len(batch):
            raise strange(response)
        for answer in decided:
            if answer.status in TRY_AGAIN:
                error = error_of(answer.status, answer.body)
                await tries.pause(error, float(error.retry_after_seconds or 0))
                break
            answers.append(answer)
            waiting.popleft()
        else:
            tries = Tries(wire.patience_seconds)
    return answers


def encoded(command: Command) -> tuple[str, bytes]:
    """Its id, which it is given if it has none and then keeps, and its bytes."""
    if command.command_id is UNSET:
        command.command_id = str(uuid7())
    return command.command_id, msgspec.json.encode(command)


def _first_batch(waiting: Iterable[tuple[str, bytes]]) -> list[bytes]:
    """As many from the front as one request may carry; none if the first is too large by itself."""
    batch: list[bytes] = []
    size = 2
    for _, text in islice(waiting, BATCH_COMMANDS_MAX):
        size += len(text) + 1
        if size > BATCH_BYTES_MAX:
            break
        batch.append(text)
    return batch


def _too_large(command_id: str) -> Answer:
    """What the server would say of a command that no request can carry."""
    error = BodyTooLarge(limit_bytes=BATCH_BYTES_MAX)
    body = {"status": error.status, "code": error.code, "title": error.title, "detail": error.detail} | error.params
    return Answer(command_id=command_id, status=error.status, body=body)
