"""The peers: pgbench, which inserts the same rows and does nothing else; eventsourcing, and queues, as they come.

pgbench's rows are copies of rows that the committer wrote, kind by kind in the mix's shares, in the same tables
with the same indexes: an event and its command in one statement, that statement one transaction. Ids and
positions are new each time and grow as ours do. It takes no ledger's lock, checks nothing and hashes nothing.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from psycopg import sql

from ledger.postgres import queries
from ops.bench.stage import BenchError, Figures, Stage, run

SQL = queries("ops.bench", "peers")

CEILING_ROWS = 1000
KINDS = 10
PGBOSS = Path(__file__).with_name("pgboss")
NODE_VERSION_MIN = 20
LEDGER = UUID(int=1)


class PgBench:
    """pgbench on a database of its own, with rows like those in `sample`, a database with our mix in it."""

    def __init__(self, stage: Stage, sample: str) -> None:
        self._stage = stage
        self._program = find_pgbench(stage)
        self._database = stage.new_database()
        scripts = stage.directory / self._database
        scripts.mkdir()
        with psycopg.connect(stage.owner(sample)) as connection:
            sampled = connection.execute(SQL.rows).fetchall()
        # As many as there are tenths in the mix's shares, from the middle of each, sorted by kind.
        kinds = [sampled[(2 * tenth + 1) * len(sampled) // (2 * KINDS)] for tenth in range(KINDS)]
        numbered = [sql.SQL(", ").join(map(sql.Literal, (number, *row))) for number, row in enumerate(kinds)]
        values = sql.SQL("({})").format(sql.SQL("), (").join(numbered))
        self._one = [scripts / f"{number}.sql" for number in range(KINDS)]
        self._many = scripts / "ceiling.sql"
        with psycopg.connect(stage.owner(self._database)) as connection:
            connection.execute(SQL.prepare)
            names = ("type", "version", "entry", "leaf", "principal", "fingerprint", "command", "status")
            for path, row in zip(self._one, kinds, strict=True):
                literals = dict(zip(names, map(sql.Literal, row), strict=True))
                path.write_text(_script(connection, SQL.insert_one, **literals))
            numbers = {"kinds": sql.Literal(KINDS), "count": sql.Literal(CEILING_ROWS)}
            self._many.write_text(_script(connection, SQL.insert_many, rows=values, **numbers))

    def one_a_transaction(self, clients: int) -> Figures:
        """Rows a second, each an event and its command, one a transaction."""
        return self._run(clients, self._one, 1)

    def ceiling(self) -> Figures:
        """Rows a second in statements of 1,000, one after the other, as whoever appends to one ledger must."""
        return self._run(1, [self._many], CEILING_ROWS)

    def _run(self, clients: int, scripts: list[Path], rows: int) -> Figures:
        threads = min(clients, os.cpu_count() or 1)
        command = [str(self._program), "--no-vacuum", "--protocol=prepared", f"--client={clients}", f"--jobs={threads}"]
        command += [f"--time={max(1, round(self._stage.seconds))}", *(f"--file={path}" for path in scripts)]
        done = subprocess.run(
            [*command, self._stage.api(self._database)], capture_output=True, text=True, check=False, timeout=300
        )
        tps = re.search(r"^tps = ([\d.]+)", done.stdout, re.MULTILINE)
        transactions = re.search(r"transactions actually processed: (\d+)", done.stdout)
        if done.returncode or not tps or not transactions:
            raise BenchError(f"pgbench failed: {done.stderr.strip()}")
        return Figures(count=int(transactions[1]) * rows, seconds=int(transactions[1]) / float(tps[1]))


def _script(connection: psycopg.Connection[Any], statement: bytes, **values: sql.Composable) -> str:
    """A statement with its values in it: pgbench binds none of these types.

    With a connection, bytes are written in hex; without, they would be text, in which pgbench sees variables.
    """
    uuid7 = SQL.uuid7 if connection.info.server_version >= 180000 else SQL.uuid7_before_18
    values |= {"uuid7": sql.SQL(uuid7.decode()), "ledger": sql.Literal(LEDGER)}
    return sql.SQL(statement.decode()).format(**values).as_string(connection) + "\n"


def find_pgbench(stage: Stage) -> Path:
    """The server's own, else the machine's newest, else the one in the path. Raises BenchError."""
    installed = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/pgbench"), key=lambda p: float(p.parts[-3]), reverse=True
    )
    for path in (stage.server.programs.bin / "pgbench", *installed, shutil.which("pgbench")):
        if path and Path(path).exists():
            return Path(path)
    raise BenchError("pgbench not found: it comes with the embedded extra and with PostgreSQL's client programs")


def install_pgboss(stage: Stage) -> Path:
    """The directory in which pg-boss is, with its packages as they are locked. Raises BenchError."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        raise BenchError("pg-boss needs node and npm, which are not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.strip("v").split(".")[0]) < NODE_VERSION_MIN:
        raise BenchError(f"pg-boss needs node {NODE_VERSION_MIN}, and this is {version}")
    there = stage.directory / "pgboss"
    if there.exists():
        return there
    shutil.copytree(PGBOSS, there)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    done = subprocess.run(command, cwd=there, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(there)
        raise BenchError(f"pg-boss could not be installed: {done.stderr.strip()}")
    return there


def queue(stage: Stage, peer: str, **told: Any) -> Figures:
    """A queue of tasks in a database of its own, tasks a second."""
    known: dict[str, Any] = {
        "peer": peer,
        "directory": str(stage.server.socket_directory),
        "database": stage.new_database(),
    }
    if peer == "pg-boss":
        known |= {"node": shutil.which("node"), "script": str(install_pgboss(stage) / "pgboss.js")}
    (figures,) = run(("queues", known | told))
    return Figures(**figures)


def stock(stage: Stage, database: str, callers: int) -> Figures:
    """eventsourcing's stock PostgreSQL application, events a second."""
    told = {"directory": str(stage.server.socket_directory), "database": database, "callers": callers}
    (figures,) = run(("stock", told | {"seconds": stage.seconds}))
    return Figures(**figures)
