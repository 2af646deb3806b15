"""What sealing and erasing take: one erasure after the other, and reads of records that have a sealed value, have none,
or had one that was erased. A program of the bench.

Told: port, token, seconds, what: `erase`, or one of the kinds of records. One thing at a time, over HTTP.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvloop
from msgspec.structs import replace
from uuid_utils.compat import uuid7

from api.auth import development_token
from ops.bench import serving
from ops.bench.caller import Caller, connect
from ops.bench.committing import summary
from ops.bench.serving import PROJECT, settled
from ops.bench.stage import Figures, Measure, Stage, answer, told, wait_for_word

RECORDS = 100
SUBJECTS_A_SECOND = 300
"""More than can be erased."""
AT_ONCE = 100
PERSON = {"name": "Mia Li", "date_of_birth": "1990-04-05", "email": "mia.li3818@example.com"}
KINDS = ("sealed", "plain", "erased")


@contextmanager
def erasing(stage: Stage) -> Iterator[dict[str, Measure]]:
    """An API process and its worker."""
    database = stage.new_database()
    roles = ("agent", "operator", "auditor")
    token = development_token(stage.keys, project=PROJECT, subject="bench", kind="service", roles=roles)
    with serving.api(stage, database) as api, serving.worker(stage, database):

        def measure(what: str) -> Figures:
            figures, _ = api.meet("erasing", token=token, seconds=stage.seconds, what=what)
            settled(stage, database)
            return replace(figures, cpu_seconds=None)  # most of it went into what had to be recorded before

        yield {"erasures": partial(measure, "erase"), **{f"records, {kind}": partial(measure, kind) for kind in KINDS}}


def personal(subject: str) -> Any:
    return {"$personal": {"subject": subject, "value": PERSON}}


async def recorded(caller: Caller, bodies: list[Any]) -> list[str]:
    """The paths of new records."""
    ids = [str(uuid7()) for _ in bodies]
    for first in range(0, len(ids), AT_ONCE):
        some = zip(ids[first : first + AT_ONCE], bodies[first : first + AT_ONCE], strict=True)
        commands = [{"type": "Record", "record_id": id_, "kind": "note", "body": body} for id_, body in some]
        for result in await caller.ask("POST", "/commands", commands):
            if result["status"] != 201:
                raise ValueError(f"a record was answered with {result}")
    return [f"/records/{id_}" for id_ in ids]


async def main(port: int, token: str, seconds: float, what: str) -> None:
    caller = await connect(port, token)
    count = int(seconds * SUBJECTS_A_SECOND) + 1 if what == "erase" else RECORDS
    subjects = [f"customer-{uuid7()}" for _ in range(count)]
    paths = await recorded(caller, [PERSON if what == "plain" else personal(subject) for subject in subjects])

    async def erase(subject: str) -> None:
        await caller.ask("POST", "/erasures", {"subject": subject, "ground": "asked to"})

    if what == "erased":
        for subject in subjects:
            await erase(subject)
    for path in paths[:RECORDS]:
        await caller.ask("GET", path)
    wait_for_word()
    taken_ms: list[float] = []
    begun = time.perf_counter()
    for subject, path in zip(itertools.cycle(subjects), itertools.cycle(paths)):
        if (now := time.perf_counter()) >= begun + seconds:
            break
        await (erase(subject) if what == "erase" else caller.ask("GET", path))
        taken_ms.append((time.perf_counter() - now) * 1000)
    took = time.perf_counter() - begun
    caller.close()
    answer(**summary(taken_ms, took), sent=len(taken_ms))


if __name__ == "__main__":
    uvloop.run(main(**told()))
