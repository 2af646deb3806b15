"""The facts about logs: the keys that sign checkpoints, in the ledger of the operators; and what a ledger was before.

What holds of every fact (events.py) holds of these. All keys are of one stream, for the last of them is not retired.
"""

from uuid import UUID

from ledger.events import Fact


class LogKeyAdded(Fact, frozen=True):
    """It signs the checkpoints of all ledgers from here on; `public` is its public half (Ed25519), in hex."""

    stream_type = "log_key"
    number: int
    public: str


class LogKeyRetired(Fact, frozen=True):
    """It signs no more. What it has signed stays signed."""

    stream_type = "log_key"
    number: int


class LedgerAdopted(Fact, frozen=True):
    """From here on the ledger is called `ledger`, and has a log of that name. What stands before, as far as it came
    after the last such event, was recorded while it was called `adopted`, whose log had signed `checkpoint` (a C2SP
    signed-note) and is contradicted by what is there: it was rolled back."""

    stream_type = "log"
    ledger: UUID
    adopted: UUID
    checkpoint: str
