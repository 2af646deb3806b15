"""`muniment doctor`: what is wrong with this deployment, seen from this machine, and what to do about it.

It goes through what `checks.py` looks at, as far as that can be reached; a server that does not run is not started.
What cannot be examined is a finding too, and the others go on.
"""

import os
import sys
from contextlib import AsyncExitStack

import psycopg
from msgspec import structs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ledger.embedded import OWNER, EmbeddedServer
from ledger.settings import InvalidSettings, Settings
from ops.checks import IN_DATABASE, ON_MACHINE, Finding, Findings, Level, Patient, connect


async def doctor(*, last: int = 1000) -> None:
    """Look for what is wrong: settings, database, clock, Redis, disk, views, and what was recorded; changes nothing.

    Reads the settings as the API and the worker do; where neither MUNIMENT_MODE nor DATABASE_URL is set, as
    `make up` does. Ends with 1 if there is a problem.

    Parameters
    ----------
    last
        How many of the last positions of every project are recomputed; 0 for all there are.
    """
    # Who reads it through a pipe wants a line to be a line.
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    findings = [finding async for finding in examine(dict(os.environ), last)]
    console.print(_table(findings))
    count = {level: sum(f.level == level for f in findings) for level in ("problem", "warning")}
    console.print(f"{count['problem']} problems, {count['warning']} warnings")
    if count["problem"]:
        sys.exit(1)


async def examine(environ: dict[str, str], last: int = 1000) -> Findings:
    """Every finding, in the order in which one would mend them."""
    given = [name for name in ("MUNIMENT_MODE", "DATABASE_URL", "DATABASE_URL_FILE") if environ.get(name)]
    try:
        settings = Settings.from_environment(environ if given else environ | {"MUNIMENT_MODE": "development"})
    except InvalidSettings as error:
        for problem in error.problems:
            yield Finding("settings", "problem", problem, "correct it: nothing starts until then")
        return
    for check in ON_MACHINE:
        async for finding in check(settings):
            yield finding
    async for finding in _examine_database(settings, last):
        yield finding


async def _examine_database(settings: Settings, last: int) -> Findings:
    if settings.embedded:
        server = EmbeddedServer(settings.home)
        if not server.is_running():
            seen = f"the embedded PostgreSQL of {settings.home} does not run, or is another account's"
            yield Finding("server", "problem", seen, "start Muniment (`make up`), and ask again as the same account")
            return
        url = server.url("muniment_api")
        settings = structs.replace(
            settings, database_url=url, database_direct_url=url, migrate_database_url=server.url(OWNER)
        )
    async with AsyncExitStack() as stack:
        owner = None
        if settings.migrate_database_url:
            try:
                owner = await stack.enter_async_context(await connect(settings.migrate_database_url))
            except psycopg.OperationalError as error:
                yield Finding("server", "problem", f"MIGRATE_DATABASE_URL: {_said(error)}", "no migration is possible")
        try:
            connection = await stack.enter_async_context(await connect(settings.database_url))
        except psycopg.OperationalError as error:
            advice = "start PostgreSQL, or correct DATABASE_URL: until then commands and reads are answered 503"
            if owner:
                advice = "the server is there: `muniment migrate` makes the roles; or correct DATABASE_URL"
            yield Finding("server", "problem", f"DATABASE_URL: {_said(error)}", advice)
            return
        patient = Patient(settings, connection, owner, last)
        for check in IN_DATABASE:
            try:
                async for finding in check(patient):
                    yield finding
            except psycopg.Error as error:
                yield Finding(check.__name__, "problem", f"it cannot be examined: {_said(error)}", "see above")


def _said(error: psycopg.Error) -> str:
    return " ".join((error.diag.message_primary or str(error)).split())


_COLOURS: dict[Level, str] = {"ok": "green", "warning": "yellow", "problem": "red bold"}


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for finding in findings:
        seen = Text(finding.seen + (f"\n-> {finding.advice}" if finding.advice else ""))
        table.add_row(Text(finding.level, _COLOURS[finding.level]), Text(finding.check), seen)
    return table
