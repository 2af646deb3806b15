"""eventsourcing's stock PostgreSQL application under the same mix. A program of the bench.

Its own tables in a database of their own, its default settings but for a pool as large as its callers, and an
aggregate kept in hand between two saves, so that it need not be read again: nothing here slows it down.
"""

import itertools
import threading
import time
from typing import Any
from uuid import UUID

from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event

from ledger.commands import OpenSession, Record
from ops.bench import mix
from ops.bench.stage import answer, told, wait_for_word


class Session(Aggregate):
    @event("Opened")
    def __init__(self, agent_role: str, metadata: dict[str, Any], labels: dict[str, str]) -> None:
        self.agent_role, self.metadata, self.labels = agent_role, metadata, labels
        self.status = "pending"

    @event("StatusChanged")
    def change(self, status: str) -> None:
        self.status = status

    @event("Annotated")
    def annotate(self, text: str) -> None:
        pass


class Fact(Aggregate):
    @event("Recorded")
    def __init__(self, kind: str, session_id: str, body: Any) -> None:
        self.kind, self.session_id, self.body = kind, session_id, body


def run_unit(app: Application[UUID], unit: mix.Unit) -> None:
    opened, first, _, second, _ = unit
    assert isinstance(opened, OpenSession)
    session = Session(opened.agent_role, opened.metadata, opened.labels)
    app.save(session)
    for number, record in enumerate((first, second)):
        assert isinstance(record, Record)
        app.save(Fact(record.kind, str(session.id), record.body))
        if number == 0:
            session.change("active")
            app.save(session)
    session.annotate("The customer was asked to confirm.")
    app.save(session)


def main(directory: str, database: str, callers: int, seconds: float) -> None:
    app = Application[UUID](
        {
            "PERSISTENCE_MODULE": "eventsourcing.postgres",
            "POSTGRES_DBNAME": database,
            "POSTGRES_HOST": directory,
            "POSTGRES_PORT": "5432",
            "POSTGRES_USER": "muniment",
            "POSTGRES_PASSWORD": "",
            "POSTGRES_POOL_SIZE": str(callers),
        }
    )
    units = mix.units()
    taking = threading.Lock()
    done = itertools.count()

    def call(until: float) -> None:
        while time.perf_counter() < until:
            with taking:
                unit = next(units)
            run_unit(app, unit)
            next(done)

    def run(seconds: float) -> float:
        begun = time.perf_counter()
        threads = [threading.Thread(target=call, args=(begun + seconds,)) for _ in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - begun

    run(min(0.5, seconds))
    begun = next(done) + 1
    wait_for_word()
    took = run(seconds)
    answer(count=(next(done) - begun) * mix.UNIT_COMMANDS, seconds=took)
    app.close()


if __name__ == "__main__":
    main(**told())
