"""A publisher that dies on the line that it is told: `python -P -m tests.ledger.dying CONNINFO KEYS LEDGER`.

It reads numbers, and for each has a child publish that is gone, without a word, before so many different lines were
begun. It answers each time with 0 where that child was done before it came to die.
"""

import asyncio
import os
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import UUID

from ledger import publisher, signing, tree
from ledger.postgres import open_pool
from ledger.publisher import Publisher
from ledger.signing import LogFiles

LINES_OF = {module.__file__ for module in (publisher, signing, tree)}


class Dying:
    def __init__(self, line: int) -> None:
        self.line = line
        self.been: set[tuple[str, int]] = set()

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in LINES_OF:
            return None
        if event == "line":
            self.been.add((frame.f_code.co_filename, frame.f_lineno))
            if len(self.been) == self.line:
                os._exit(1)
        return self.trace


async def publish(conninfo: str, keys: str, ledger_id: str) -> None:
    async with open_pool(conninfo, 2) as pool:
        await Publisher(pool, LogFiles(Path(keys))).publish(UUID(ledger_id))


def main() -> None:
    for asked in sys.stdin:
        child = os.fork()
        if not child:
            dying = Dying(int(asked))
            threading.settrace(dying.trace)
            sys.settrace(dying.trace)
            asyncio.run(publish(*sys.argv[1:]))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
