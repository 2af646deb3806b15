"""Commands that are decided together, and then appended together: one batch from its first command to its append.

It says what one batch may hold. When it is begun, sent and answered, is the writer's.
"""

import asyncio
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from itertools import groupby
from uuid import UUID

from msgspec import Struct, field

from ledger.batch import Batch
from ledger.pending import Pending, Verdict
from ledger.subjects import EraseSubject

BATCH_COMMANDS_MAX = 512
BATCH_BYTES_MAX = 8 * 1024 * 1024


def apart(batch: list[Pending]) -> Iterator[list[Pending]]:
    """`batch` in order, in parts of which an erasure is one by itself.

    What comes after it is sealed under a key that is not made yet; and where the keys are away, nothing else fails.
    """
    for is_erasure, part in groupby(batch, lambda pending: isinstance(pending.command, EraseSubject)):
        commands = list(part)
        yield from ([one] for one in commands) if is_erasure else [commands]


class Flight(Struct, eq=False):
    """Commands decided together; once the batch is on its way, `job` appends it.

    `absent` are the streams that were believed not to exist, and not looked up.
    """

    decided: Batch
    fresh: list[Pending] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    absent: AbstractSet[UUID] = frozenset()
    bytes: int = 0
    job: asyncio.Task[bool] | None = None

    def decide(self, batch: list[Pending], absent: AbstractSet[UUID]) -> None:
        """Decide these too. Raises NotLoaded; then nothing but `fresh` and `absent` is of use any more."""
        self.absent |= absent
        self.decided.believe_absent(absent)
        self.verdicts += map(self.decided.decide, batch)
        self.fresh += batch
        self.bytes += sum(len(pending.canonical) for pending in batch)

    @property
    def room(self) -> int:
        """How many commands it can still take."""
        return BATCH_COMMANDS_MAX - len(self.fresh) if self.bytes < BATCH_BYTES_MAX else 0
