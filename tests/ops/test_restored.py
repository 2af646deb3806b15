"""An older backup put back under a worker that had published more: it is noticed, said, and signed over by nobody."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psycopg
import pytest

from ledger.checkpoint import Checkpoint, Note, VerifierKey, check_checkpoint
from ledger.embedded import EmbeddedServer
from ops.bench.serving import free_port
from tests.check import check_ledger
from tests.conftest import database_of, fastest_directory, new_home
from tests.server import Server
from tests.witnesses import NO_TLS, RunningWitness

PROJECT = "demo"
BACKED_UP, PUBLISHED = 3, 8
"""How many events the backup has, and how many were published by the time it was put back."""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory for homes and backups; whatever server is left in it is killed."""
    place = new_home(fastest_directory())
    yield place
    for home in place.glob("*/postgres"):
        if pid := EmbeddedServer(home.parent).pid:
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(place)


class Deployment(Server):
    """PostgreSQL, an API and a worker, all of one home, and what the worker is told of witnesses."""

    def __init__(self, home: Path, witness: RunningWitness | None) -> None:
        self._postgres = EmbeddedServer(home)
        self._witnesses, self._metrics = home / "witnesses.json", free_port()
        if witness is not None:
            named = {"quorum": 1, "witnesses": [{"url": witness.url, "vkey": str(witness.key)}]}
            home.mkdir(exist_ok=True)
            self._witnesses.write_text(json.dumps(named))
        super().__init__(database_of(self._postgres, "muniment"), home, ("api", "worker"))
        self.http = httpx.Client(base_url=self.url, trust_env=False, verify=NO_TLS, timeout=30)

    @property
    def environment(self) -> dict[str, str]:
        ours = {"MUNIMENT_CHECKPOINT_SECONDS": "0.1", "OTEL_EXPORTER_PROMETHEUS_PORT": str(self._metrics)}
        if self._witnesses.exists():
            ours["MUNIMENT_WITNESSES"] = str(self._witnesses)
        return super().environment | ours

    def start(self) -> None:
        self._postgres.start()
        muniment("migrate", home=self.home)
        super().start()
        self.http.headers["Authorization"] = f"Bearer {self.token(PROJECT, roles=('agent', 'auditor'))}"

    def kill(self) -> None:
        self.http.close()
        super().kill()
        self._postgres.stop()

    def record(self, count: int) -> list[dict[str, Any]]:
        """What was answered to so many commands, one after the other."""
        answers = [self.http.post("/records", json={"kind": "note", "body": {"n": n}}) for n in range(count)]
        assert {answer.status_code for answer in answers} == {201}
        return [answer.json() for answer in answers]

    def published(self, size: int) -> bytes:
        """The checkpoint that is served, as soon as it is of that size."""
        deadline = time.monotonic() + 60
        while True:
            answer = self.http.get(f"/ledger/{PROJECT}/checkpoint")
            if answer.status_code == 200 and Checkpoint.parse(Note.parse(answer.content).text).size == size:
                return answer.content
            assert time.monotonic() < deadline, answer.text
            time.sleep(0.02)

    def refused(self, wanted: str = "") -> str:
        """Why the log does not go on, as `/health` says, as soon as it is what is wanted."""
        deadline = time.monotonic() + 60
        while True:
            health = self.http.get("/health").json()
            if any(wanted in why for why in health["logs"]["refused"]):
                assert (health["status"], health["logs"]["state"]) == ("degraded", "degraded")
                (why,) = health["logs"]["refused"]
                return str(why)
            assert time.monotonic() < deadline, health
            time.sleep(0.02)

    def tried_again(self) -> None:
        """Returns once the worker has looked at the log twice more from here on, and refused."""
        tries = self._tries()
        deadline = time.monotonic() + 60
        while self._tries() < tries + 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def _tries(self) -> int:
        told = httpx.get(f"http://127.0.0.1:{self._metrics}/metrics", trust_env=False).text
        (line,) = [line for line in told.splitlines() if line.startswith("muniment_publication_refusals_total ")]
        return int(float(line.split()[1]))

    def signed(self) -> tuple[Any, ...]:
        """What the log has signed, and published."""
        with psycopg.connect(self.database.owner) as owner:
            ((*row,),) = owner.execute("SELECT size, signed, published_size, published FROM ledger.logs").fetchall()
        return tuple(row)


def muniment(*arguments: object, home: Path) -> str:
    """What a command prints that an operator gives, of the PostgreSQL in that home."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MUNIMENT_", "DATABASE_"))}
    line = [sys.executable, "-P", "-m", "ops.cli", *map(str, arguments)]
    environment = inherited | {"MUNIMENT_MODE": "development", "MUNIMENT_HOME": str(home)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Story(NamedTuple):
    """What was before anything was put back."""

    home: Path
    backup: Path
    then: bytes
    """The checkpoint that was served when the backup was made."""
    last: bytes
    """The one that somebody may hold."""
    key: VerifierKey


def lived(place: Path, witness: RunningWitness) -> Story:
    """A ledger is recorded, cosigned, published, backed up, and goes on."""
    home, backup = place / "home", place / "backup"
    with (deployment := Deployment(home, witness)):
        deployment.record(BACKED_UP)
        assert "too few witnesses" in deployment.refused(), "the witness does not know the log yet"
        (shown,) = muniment("keys", "list", "--project", PROJECT, home=home).splitlines()
        key = VerifierKey.parse(shown.split()[1])
        witness.muniment("add-log", str(key))
        then = deployment.published(BACKED_UP)
        muniment("backup", backup, "--with-keys", home=home)
        deployment.record(PUBLISHED - BACKED_UP)
        last = deployment.published(PUBLISHED)
    for note in (then, last):
        check_checkpoint(Note.parse(note), [key], [witness.key], 1)
    return Story(home, backup, then, last, key)


def goes_on_unsigned(deployment: Deployment, story: Story) -> None:
    """It is refused, and said; commands and reads are as ever; the checkpoint of then stays, and no other is signed."""
    assert f"checkpoint of {PUBLISHED} events was signed, and {BACKED_UP} are there" in deployment.refused(
        "rolled back"
    )
    assert deployment.published(BACKED_UP) == story.then
    before = deployment.signed()
    assert before == (BACKED_UP, _of_the_log(story), BACKED_UP, story.then.decode())
    (answer, *_) = deployment.record(PUBLISHED)  # more than were lost: it is not for its size alone that it is refused
    assert answer["recorded_at"] == deployment.http.get(f"/records/{answer['record_id']}").json()["recorded_at"]
    assert deployment.http.get("/health").json()["logs"]["lag_events"] == PUBLISHED
    proof = deployment.http.get(f"/events/{BACKED_UP + 1}/proof")
    assert (proof.status_code, proof.json()["code"]) == (503, "view_behind")
    assert deployment.http.get(f"/events/{BACKED_UP}/proof").status_code == 200
    deployment.tried_again()
    assert deployment.signed() == before
    assert deployment.published(BACKED_UP) == story.then


def goes_on_as_another(deployment: Deployment, story: Story, witness: RunningWitness | None) -> None:
    """Adopted, it is published again, under another name and with another log, which tells what went before."""
    muniment("ledger", "adopt", PROJECT, "--reason", "the disk was lost", home=deployment.home)
    (shown,) = muniment("keys", "list", "--project", PROJECT, home=deployment.home).splitlines()
    key = VerifierKey.parse(shown.split()[1])
    if witness is not None:
        witness.muniment("add-log", str(key))
    note = deployment.published(BACKED_UP + PUBLISHED + 1)
    checkpoint = check_checkpoint(Note.parse(note), [key], [witness.key] if witness else [], 1 if witness else 0)
    assert (checkpoint.origin, key.public) == (key.name, story.key.public)
    assert key.name != story.key.name
    event = deployment.http.get(f"/events/{checkpoint.size}")
    assert key.name.endswith(f"/{event.json()['ledger']}")
    assert (event.json()["type"], event.json()["reason"]) == ("LedgerAdopted", "the disk was lost")
    assert Note.parse(event.json()["data"]["checkpoint"].encode()).text == Note.parse(story.last).text
    (answer,) = deployment.record(1)
    deployment.published(checkpoint.size + 1)
    assert deployment.http.get("/health").json()["logs"]["refused"] == []
    headers = deployment.http.get(f"/records/{answer['record_id']}").headers
    assert key.name.endswith(f"/{headers['ledger-id']}")


def _of_the_log(story: Story) -> str:
    """The checkpoint of then as the log has signed it, without the witness's line."""
    note = Note.parse(story.then)
    return str(note._replace(signatures=tuple(one for one in note.signatures if one.name == story.key.name)))


def test_what_lies_beside_the_keys_knows_of_more_than_a_database_that_was_put_back(place: Path) -> None:
    with RunningWitness(place / "witness") as witness:
        story = lived(place, witness)
    (story.home / "postgres").rename(place / "the-newer-database")
    (story.home / "witnesses.json").unlink()
    muniment("restore", story.backup, home=story.home)
    (kept,) = (story.home / "keys/signed").iterdir()
    was = kept.read_bytes()
    with (deployment := Deployment(story.home, None)):
        goes_on_unsigned(deployment, story)
        assert kept.read_bytes() == was
        goes_on_as_another(deployment, story, None)
        assert len(check_ledger(deployment.database.owner)[PROJECT]) == BACKED_UP + PUBLISHED + 2


def test_a_witness_knows_of_more_than_a_database_that_was_put_back_on_another_machine(place: Path) -> None:
    with RunningWitness(place / "witness") as witness:
        story = lived(place, witness)
        elsewhere = place / "elsewhere"
        muniment("restore", story.backup, home=elsewhere)
        assert not (elsewhere / "keys/signed").exists(), "no backup has it"
        with (deployment := Deployment(elsewhere, witness)):
            goes_on_unsigned(deployment, story)
            assert not (elsewhere / "keys/signed").exists()
            goes_on_as_another(deployment, story, witness)
            assert len(check_ledger(deployment.database.owner)[PROJECT]) == BACKED_UP + PUBLISHED + 2
        path = f"/{sha256(story.key.name.encode()).hexdigest()}/checkpoint"
        shown = Note.parse(witness.http.get(path).content)
        assert Checkpoint.parse(shown.text) == Checkpoint.parse(Note.parse(story.last).text)
