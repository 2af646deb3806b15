"""The facts about the keys that sign checkpoints, in the ledger of the operators.

What holds of every fact (events.py) holds of these. All keys are of one stream, for the last of them is not retired.
"""

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
