"""The data keys in a database of their own (KEYS_DATABASE_URL), with backups and rights of its own.

The invariant: keys are in one place. Where the ledger's database has some beside the one that is named, or a ledger's
keys are nowhere, nothing starts: what was sealed under keys that are not found would be taken for erased.
"""

import psycopg

from ops.migrate import MigrationError, check, migrate, shipped

# Of the files of the ledger's database, those that are about keys alone; and what they take for granted.
_FILES = ("0002_keys.sql", "0011_erasure.sql")
_ROLES = """-- The role that the keys are for. In the ledger's database the first migration makes it.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'muniment_api') THEN
        CREATE ROLE muniment_api LOGIN;
    END IF;
END
$$;
"""

_MISPLACED = """
SELECT l.project_id FROM ledger.ledgers AS l
LEFT JOIN keys.project_keys AS k USING (project_id)
WHERE NOT l.is_foreign AND l.size > 0 AND (k.project_id IS NULL) <> %s
ORDER BY l.project_id LIMIT 1
"""


def files() -> dict[str, str]:
    """The migrations of a database that has the keys alone."""
    known = shipped()
    return {"0000_roles.sql": _ROLES} | {name: known[name] for name in _FILES}


async def migrate_keys(url: str, deployment: str | None) -> list[str]:
    """As `migrate`, for the database of the keys."""
    return await migrate(url, deployment, files())


async def check_keys(ledger_url: str, keys_url: str | None, deployment: str | None) -> None:
    """Refuse to start where the keys are not where they are said to be; what cannot be reached yet is no reason.

    Raises `MigrationError`, also if the schema of the keys' database is not this version's.
    """
    if keys_url is not None:
        await check(keys_url, deployment, production=False, wanted=files())
    try:
        connection = await psycopg.AsyncConnection.connect(
            ledger_url, autocommit=True, connect_timeout=5, prepare_threshold=None
        )
        async with connection:
            row = await (await connection.execute(_MISPLACED, [keys_url is not None])).fetchone()
    except (psycopg.OperationalError, psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return
    if row and keys_url is not None:
        raise MigrationError(
            f"KEYS_DATABASE_URL is set, and the ledger's database has keys too, that of {row[0]} for one: move them "
            f"(ops/runbooks/erasure.md tells how), or unset it"
        )
    if row:
        raise MigrationError(
            f"The ledger of {row[0]} has events, and its database has no key of it: set KEYS_DATABASE_URL to where the "
            f"keys are, or restore them"
        )
