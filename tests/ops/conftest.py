"""What some tests of this room run against besides: a pooler."""

from collections.abc import Iterator

import pytest

from ledger.embedded import EmbeddedServer
from tests.ops.pooler import PgBouncer, installed


@pytest.fixture(scope="session")
def pgbouncer(request: pytest.FixtureRequest, postgres: EmbeddedServer) -> Iterator[PgBouncer]:
    """A pooler of transactions before every database of the server."""
    with PgBouncer(installed(request.config.cache.mkdir("pgbouncer")), postgres) as pgbouncer:
        yield pgbouncer
