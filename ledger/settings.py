"""The configuration: every environment variable Muniment reads, in one frozen value.

Invariant: a `Settings` that exists is possible. All that is wrong with an environment is found at
once, before anything starts, and no message shows a secret's value. Only entry points (`ops`) read
the environment; everything else is handed what it needs. Defaults that depend on the machine may
stand here; connections, files and keys may not be opened here.
"""

import difflib
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec
from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

Mode = Literal["production", "development"]

EMBEDDED = "embedded"
"""The value of DATABASE_URL that asks for the PostgreSQL that Muniment starts itself."""

_OUR_NAMES = (
    "MUNIMENT_MODE",
    "MUNIMENT_HOME",
    "MUNIMENT_DEPLOYMENT",
    "MUNIMENT_KEYS_DIR",
    "MUNIMENT_LOG_KEYS_DIR",
    "MUNIMENT_CHECKPOINT_SECONDS",
    "MUNIMENT_WITNESSES",
)
# Kubernetes describes every service of the namespace to every container, in variables that begin
# with the service's name: a service called muniment, or muniment-api, must not stop the start.
_KUBERNETES_NAME = re.compile(
    r"MUNIMENT(_[A-Z0-9_]+)?"
    r"(_SERVICE_HOST|_SERVICE_PORT(_[A-Z0-9_]+)?|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_KUBERNETES_LINK = re.compile(r"MUNIMENT(_[A-Z0-9_]+)?_PORT")
_DEPLOYMENT = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(/[a-z0-9]([a-z0-9._-]*[a-z0-9])?)*")
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True} | {
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


class InvalidSettings(Exception):
    """The environment asks for something impossible; `problems` has one sentence for each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(f"- {problem}" for problem in problems))


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator decided. Durations and sizes carry their unit in the name."""

    mode: Mode
    home: Path
    keys_dir: Path
    log_keys_dir: Path
    """Where the keys are that sign checkpoints: of workers alone."""
    deployment: str | None
    """None: whatever the first migration stored."""
    database_url: str
    """A connection string, or `EMBEDDED`."""
    database_direct_url: str
    migrate_database_url: str | None
    """The owner's; None in production where it was not given: then nothing can migrate."""
    keys_database_url: str | None
    """Where the data keys are, if not in the ledger's database; never `EMBEDDED`."""
    migrate_keys_database_url: str | None
    """Its owner's; None in production where it was not given."""
    redis_url: str | None
    idempotency_enabled: bool
    idempotency_ttl_seconds: int
    session_retention_days: int
    checkpoint_seconds: float
    """At most one checkpoint of a ledger in so many seconds."""
    witnesses: Path | None
    """The file that names who cosigns checkpoints; None: nobody."""
    oidc_issuer_url: str | None
    oidc_audience: str | None
    oidc_project_claim: str
    oidc_roles_claim: str
    oidc_kind_claim: str
    host: str
    port: int
    drain_seconds: int
    """How long the API goes on after SIGTERM, unready, so that a load balancer stops sending before it ends."""
    metrics_token: str | None
    """What who asks the API for its metrics must show; None: whoever reaches it may have them."""
    worker_metrics_host: str
    worker_metrics_port: int | None
    """Where a worker tells its metrics; None: nowhere."""
    traces: bool
    """Whether traces are sent; how is OpenTelemetry's own business, which reads the environment itself."""

    @property
    def embedded(self) -> bool:
        """Whether Muniment runs PostgreSQL itself."""
        return self.database_url == EMBEDDED

    def __repr__(self) -> str:
        """Connection strings carry passwords: they stay out of logs and tracebacks."""
        return f"Settings(mode={self.mode!r}, home={str(self.home)!r}, embedded={self.embedded})"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Settings":
        """Read `environ`; an empty value counts as absent.

        Raises `InvalidSettings` with everything that is wrong, not only the first thing.
        """
        read = _Environment(environ)
        read.refuse_unknown_names()
        mode: Mode = "production"
        if read.one_of("MUNIMENT_MODE", ("production", "development")) == "development":
            mode = "development"
        home = read.directory("MUNIMENT_HOME", _default_home(environ))
        database_url = read.secret("DATABASE_URL", _check_database) or EMBEDDED
        database_given = bool(environ.get("DATABASE_URL") or environ.get("DATABASE_URL_FILE"))
        direct_url = read.secret("DATABASE_DIRECT_URL", _check_connection)
        migrate_url = read.secret("MIGRATE_DATABASE_URL", _check_connection)
        keys_url = read.secret("KEYS_DATABASE_URL", _check_connection)
        migrate_keys_url = read.secret("MIGRATE_KEYS_DATABASE_URL", _check_connection)
        if mode == "development" or database_url == EMBEDDED:
            migrate_url = migrate_url or database_url
        keys_dir = read.directory("MUNIMENT_KEYS_DIR", home / "keys")
        if mode == "development":
            migrate_keys_url = migrate_keys_url or keys_url
        settings = cls(
            mode=mode,
            home=home,
            keys_dir=keys_dir,
            log_keys_dir=read.directory("MUNIMENT_LOG_KEYS_DIR", keys_dir),
            deployment=read.text("MUNIMENT_DEPLOYMENT", _check_deployment),
            database_url=database_url,
            database_direct_url=direct_url or database_url,
            migrate_database_url=migrate_url,
            keys_database_url=keys_url,
            migrate_keys_database_url=migrate_keys_url,
            redis_url=read.secret("REDIS_URL", _check_redis),
            idempotency_enabled=read.boolean("IDEMPOTENCY_ENABLED", True),
            idempotency_ttl_seconds=read.integer("IDEMPOTENCY_TTL_SECONDS", 86_400, 1, 31_622_400),
            session_retention_days=read.integer("SESSION_RETENTION_DAYS", 7, 1, 36_500),
            checkpoint_seconds=read.seconds("MUNIMENT_CHECKPOINT_SECONDS", 1.0, 0.1, 3600.0),
            witnesses=read.file("MUNIMENT_WITNESSES"),
            oidc_issuer_url=read.text("OIDC_ISSUER_URL", _check_issuer),
            oidc_audience=read.text("OIDC_AUDIENCE"),
            oidc_project_claim=read.text("OIDC_PROJECT_CLAIM") or "project",
            oidc_roles_claim=read.text("OIDC_ROLES_CLAIM") or "roles",
            oidc_kind_claim=read.text("OIDC_KIND_CLAIM") or "kind",
            host=read.text("HOST", _check_host) or "127.0.0.1",
            port=read.integer("PORT", 8088, 1, 65_535),
            drain_seconds=read.integer("DRAIN_SECONDS", 5 if mode == "production" else 0, 0, 600),
            metrics_token=read.secret("METRICS_TOKEN", _check_token),
            # OpenTelemetry's names for where an exporter for Prometheus listens.
            worker_metrics_host=read.text("OTEL_EXPORTER_PROMETHEUS_HOST", _check_host) or "localhost",
            worker_metrics_port=read.integer("OTEL_EXPORTER_PROMETHEUS_PORT", 0, 1, 65_535) or None,
            traces=read.traces(),
        )
        if problems := read.problems + _contradictions(settings, database_given):
            raise InvalidSettings(problems)
        return settings


def _contradictions(settings: Settings, database_given: bool) -> list[str]:
    """What no single value tells."""
    problems = []
    if not database_given and settings.mode == "production":
        problems.append(
            f"DATABASE_URL is not set, and production needs it: name a PostgreSQL database, or set it to {EMBEDDED!r} "
            "to let Muniment run one in MUNIMENT_HOME. To try Muniment out, set MUNIMENT_MODE=development"
        )
    if settings.embedded:
        addresses = {
            "DATABASE_DIRECT_URL": settings.database_direct_url,
            "MIGRATE_DATABASE_URL": settings.migrate_database_url,
        }
        problems += [
            f"{name} is set, but the database is the embedded one, which needs none: unset it, or set DATABASE_URL too"
            for name, value in addresses.items()
            if value != EMBEDDED
        ]
    if settings.migrate_keys_database_url and not settings.keys_database_url:
        problems.append("MIGRATE_KEYS_DATABASE_URL is set without KEYS_DATABASE_URL: set both, or neither")
    issuer = {"OIDC_ISSUER_URL": settings.oidc_issuer_url, "OIDC_AUDIENCE": settings.oidc_audience}
    for there, missing in (("OIDC_ISSUER_URL", "OIDC_AUDIENCE"), ("OIDC_AUDIENCE", "OIDC_ISSUER_URL")):
        if issuer[there] and not issuer[missing]:
            problems.append(f"{there} is set without {missing}: set both, or neither")
    # Whoever stands between could name keys of their own, and then be anybody.
    if settings.mode == "production" and _is_open(settings.oidc_issuer_url or ""):
        problems.append(
            f"OIDC_ISSUER_URL is {settings.oidc_issuer_url!r}: production fetches keys over https:// only, "
            "or from this machine"
        )
    return problems


Check = Callable[[str], str | None]
"""Takes a value; answers what is allowed when the value is not, else None."""


class _Environment:
    """Reads variables one by one and remembers what was wrong with them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.problems: list[str] = []

    def refuse_unknown_names(self) -> None:
        """A misspelt setting must not silently be its default."""
        for name, value in sorted(self._environ.items()):
            if not name.startswith("MUNIMENT_") or name in _OUR_NAMES:
                continue
            if _KUBERNETES_NAME.fullmatch(name):
                continue
            if _KUBERNETES_LINK.fullmatch(name) and "://" in value:
                continue
            near = difflib.get_close_matches(name, _OUR_NAMES, n=1, cutoff=0.8)
            if name.removeprefix("MUNIMENT_") in ("HOST", "PORT", "DATABASE_URL", "REDIS_URL"):
                near = [name.removeprefix("MUNIMENT_")]
            hint = f"did you mean {near[0]}?" if near else f"the names are {', '.join(_OUR_NAMES)}"
            self.problems.append(f"{name} is not a setting of Muniment: {hint}")

    def text(self, name: str, check: Check | None = None) -> str | None:
        value = self._environ.get(name, "").strip()
        if value and check and (allowed := check(value)):
            self.problems.append(f"{name} is {value!r}: {allowed}")
            return None
        return value or None

    def secret(self, name: str, check: Check) -> str | None:
        """The value of `name`, or the contents of the file that `name`_FILE names."""
        value = self._environ.get(name, "").strip()
        file_name = self._environ.get(f"{name}_FILE", "").strip()
        if value and file_name:
            self.problems.append(f"{name} and {name}_FILE are both set: unset one of them")
            return None
        if file_name:
            try:
                value = Path(file_name).read_text("utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
                self.problems.append(f"{name}_FILE is {file_name!r}, which cannot be read: {reason}")
                return None
            if not value:
                self.problems.append(f"{name}_FILE is {file_name!r}, which is empty")
                return None
        if value and (allowed := check(value)):
            self.problems.append(f"{name} (its value is secret and not shown): {allowed}")
            return None
        return value or None

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str | None:
        either = f"allowed are {' and '.join(allowed)}"
        return self.text(name, lambda value: None if value in allowed else either)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.text(name, lambda value: None if value.lower() in _BOOLEANS else "allowed are true and false")
        return default if value is None else _BOOLEANS[value.lower()]

    def integer(self, name: str, default: int, least: int, most: int) -> int:
        allowed = f"a whole number from {least} to {most} is allowed"

        def check(value: str) -> str | None:
            number = int(value) if re.fullmatch(r"[0-9]{1,18}", value) else None
            return None if number is not None and least <= number <= most else allowed

        value = self.text(name, check)
        return default if value is None else int(value)

    def seconds(self, name: str, default: float, least: float, most: float) -> float:
        allowed = f"a number of seconds from {least:g} to {most:g} is allowed"

        def check(value: str) -> str | None:
            number = float(value) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value) else None
            return None if number is not None and least <= number <= most else allowed

        value = self.text(name, check)
        return default if value is None else float(value)

    def file(self, name: str) -> Path | None:
        """Whether it is there is for who reads it: not every process does."""
        absolute = "the absolute path of a file is allowed"
        value = self.text(name, lambda value: None if Path(value).is_absolute() else absolute)
        return None if value is None else Path(value)

    def traces(self) -> bool:
        """Whether OpenTelemetry's names ask for traces, in the one form in which we can send them."""
        disabled = self.boolean("OTEL_SDK_DISABLED", False)
        exporter = self.one_of("OTEL_TRACES_EXPORTER", ("otlp", "none"))
        for name in ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"):
            only = "http/protobuf is allowed (most collectors take it on port 4318)"
            self.text(name, lambda value, only=only: None if value == "http/protobuf" else only)  # type: ignore[misc]
        named = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        return not disabled and (exporter == "otlp" or (exporter is None and any(map(self.text, named))))

    def directory(self, name: str, default: Path) -> Path:
        def check(value: str) -> str | None:
            path = Path(value)
            if not path.is_absolute():
                return "an absolute path is allowed (processes start in different directories)"
            if path.exists() and not path.is_dir():
                return "it exists and is not a directory"
            return None

        value = self.text(name, check)
        return default if value is None else Path(os.path.normpath(value))


def _default_home(environ: Mapping[str, str]) -> Path:
    data_home = environ.get("XDG_DATA_HOME", "")
    if data_home.startswith("/"):
        return Path(data_home) / "muniment"
    return Path(environ.get("HOME") or Path.home()) / ".local" / "share" / "muniment"


def _check_connection(value: str) -> str | None:
    try:
        conninfo_to_dict(value)
    except ProgrammingError:
        return "a PostgreSQL connection string is allowed, such as postgresql://user@host/database"
    return None


def _check_database(value: str) -> str | None:
    if value == EMBEDDED or not (allowed := _check_connection(value)):
        return None
    return f"{allowed}, or the word {EMBEDDED!r}"


def _check_redis(value: str) -> str | None:
    if urlsplit(value).scheme in ("redis", "rediss", "unix"):
        return None
    return "an address that begins with redis://, rediss:// or unix:// is allowed"


def _check_token(value: str) -> str | None:
    # What a bearer token may be made of: RFC 6750 s2.1.
    if re.fullmatch(r"[A-Za-z0-9._~+/-]{16,}=*", value):
        return None
    return "16 letters, digits and signs of ._~+/- at least are allowed"


def _check_issuer(value: str) -> str | None:
    allowed = "an https:// address without query or fragment is allowed"
    try:
        parts = urlsplit(value)
    except ValueError:
        return allowed
    good = parts.scheme in ("https", "http") and parts.hostname and not parts.query and not parts.fragment
    return None if good else allowed


def _is_open(address: str) -> bool:
    """Whether what is fetched from there can be changed on its way."""
    parts = urlsplit(address)
    return parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1")


def _check_deployment(value: str) -> str | None:
    # It begins the origin of every log (C2SP tlog-checkpoint): an address without a scheme.
    if len(value) <= 200 and _DEPLOYMENT.fullmatch(value):
        return None
    return (
        "a lower-case host name, with a path if you like, of at most 200 characters is allowed, "
        "such as ledger.example.com"
    )


def _check_host(value: str) -> str | None:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        # What looks like an address and is none must not go out to be looked up as a name.
        if not _HOST_NAME.fullmatch(value) or re.fullmatch(r"[0-9.]+", value):
            return "an IP address or a host name is allowed"
    return None
