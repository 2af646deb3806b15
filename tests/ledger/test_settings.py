"""Settings: what is possible starts, what is not stops with a message that says all of it."""

from pathlib import Path

import pytest

from ledger.settings import InvalidSettings, Settings

PASSWORD = "hunter2"


def settings(**environ: str) -> Settings:
    return Settings.from_environment({"MUNIMENT_MODE": "development"} | environ)


def problems(**environ: str) -> list[str]:
    with pytest.raises(InvalidSettings) as refused:
        settings(**environ)
    assert str(refused.value) == "\n".join(f"- {problem}" for problem in refused.value.problems)
    return refused.value.problems


def test_development_needs_nothing() -> None:
    chosen = settings()
    assert chosen.mode == "development"
    assert chosen.embedded
    assert (chosen.host, chosen.port) == ("127.0.0.1", 8088)
    assert chosen.keys_dir == chosen.home / "keys"
    assert chosen.deployment is None
    assert chosen.redis_url is None
    assert (chosen.idempotency_enabled, chosen.idempotency_ttl_seconds) == (True, 86_400)
    assert chosen.session_retention_days == 7


def test_the_default_is_production_which_needs_a_database() -> None:
    with pytest.raises(InvalidSettings) as refused:
        Settings.from_environment({})
    (problem,) = refused.value.problems
    assert "DATABASE_URL is not set" in problem
    assert "MUNIMENT_MODE=development" in problem


def test_a_wrong_database_is_one_problem() -> None:
    with pytest.raises(InvalidSettings) as refused:
        Settings.from_environment({"DATABASE_URL": "nonsense"})
    (problem,) = refused.value.problems
    assert problem.endswith("such as postgresql://user@host/database, or the word 'embedded'")


def test_production_may_ask_for_the_embedded_database() -> None:
    chosen = Settings.from_environment({"DATABASE_URL": "embedded"})
    assert chosen.mode == "production"
    assert chosen.embedded


def test_the_owner_is_the_same_in_development_and_named_in_production() -> None:
    url = "postgresql://app@db/muniment"
    assert settings(DATABASE_URL=url).migrate_database_url == url
    production = Settings.from_environment({"DATABASE_URL": url})
    assert production.migrate_database_url is None
    assert production.database_direct_url == url


def test_all_problems_are_told_at_once() -> None:
    told = problems(MUNIMENT_MODE="prod", PORT="http", SESSION_RETENTION_DAYS="0", IDEMPOTENCY_ENABLED="maybe")
    assert any(p.startswith("MUNIMENT_MODE is 'prod': allowed are production") for p in told)
    assert "PORT is 'http': a whole number from 1 to 65535 is allowed" in told
    assert any(p.startswith("SESSION_RETENTION_DAYS is '0'") for p in told)
    assert "IDEMPOTENCY_ENABLED is 'maybe': allowed are true and false" in told
    assert any(p.startswith("DATABASE_URL is not set") for p in told)
    assert len(told) == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "0"),
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("PORT", "80.0"),
        ("PORT", "٨٠"),
        ("HOST", "not a host"),
        ("HOST", "1.2.3.4.5"),
        ("HOST", "http://localhost"),
        ("IDEMPOTENCY_TTL_SECONDS", "1d"),
        ("SESSION_RETENTION_DAYS", "99999999999999999999"),
        ("MUNIMENT_DEPLOYMENT", "https://ledger.example.com"),
        ("MUNIMENT_DEPLOYMENT", "two words"),
        ("MUNIMENT_DEPLOYMENT", "a+b"),
        ("MUNIMENT_HOME", "relative/path"),
        ("MUNIMENT_HOME", __file__),
        ("MUNIMENT_KEYS_DIR", "keys"),
        ("MUNIMENT_CHECKPOINT_SECONDS", "0.05"),
        ("MUNIMENT_CHECKPOINT_SECONDS", "1e3"),
        ("MUNIMENT_CHECKPOINT_SECONDS", "nan"),
        ("MUNIMENT_WITNESSES", "witnesses.json"),
        ("OIDC_ISSUER_URL", "id.example.com"),
        ("OIDC_ISSUER_URL", "https://["),
        ("OIDC_ISSUER_URL", "https://id.example/?tenant=1"),
    ],
)
def test_an_impossible_value_is_named_with_what_is_allowed(name: str, value: str) -> None:
    told = problems(**{name: value})
    assert any(p.startswith(f"{name} is {value!r}: ") for p in told)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", f"postgresql://u:{PASSWORD}@h:port/db?nonsense=1"),
        ("DATABASE_DIRECT_URL", f"mysql {PASSWORD}"),
        ("MIGRATE_DATABASE_URL", f"{PASSWORD}"),
        ("REDIS_URL", f"http://:{PASSWORD}@localhost"),
    ],
)
def test_a_secret_is_never_shown(name: str, value: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(value)
    for told in (problems(**{name: value}), problems(**{f"{name}_FILE": str(file)})):
        assert any(p.startswith(f"{name} (its value is secret") for p in told)
        assert PASSWORD not in "".join(told)


def test_a_connection_string_stays_out_of_the_repr() -> None:
    assert PASSWORD not in repr(settings(DATABASE_URL=f"postgresql://u:{PASSWORD}@h/db"))


def test_a_secret_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"postgresql://u:{PASSWORD}@h/db\n")
    assert settings(DATABASE_URL_FILE=str(file)).database_url == f"postgresql://u:{PASSWORD}@h/db"


def test_a_secret_given_twice_or_not_at_all_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    (twice,) = problems(REDIS_URL="redis://h", REDIS_URL_FILE="/run/secrets/redis")
    assert twice == "REDIS_URL and REDIS_URL_FILE are both set: unset one of them"
    (missing,) = problems(REDIS_URL_FILE=str(tmp_path / "none"))
    assert missing.startswith("REDIS_URL_FILE is ")
    assert missing.endswith("which cannot be read: No such file or directory")
    assert problems(REDIS_URL_FILE=str(empty))[0].endswith("which is empty")


def test_a_misspelt_name_stops_the_start() -> None:
    assert problems(MUNIMENT_MODES="production") == [
        "MUNIMENT_MODES is not a setting of Muniment: did you mean MUNIMENT_MODE?"
    ]
    assert problems(MUNIMENT_PORT="9000") == ["MUNIMENT_PORT is not a setting of Muniment: did you mean PORT?"]
    assert "the names are MUNIMENT_MODE" in problems(MUNIMENT_TELEMETRY="1")[0]


@pytest.mark.parametrize("service", ["MUNIMENT", "MUNIMENT_API", "MUNIMENT_API_V2"])
def test_what_kubernetes_injects_for_a_service_is_no_setting(service: str) -> None:
    settings(
        **{
            f"{service}_SERVICE_HOST": "10.0.0.1",
            f"{service}_SERVICE_PORT": "8088",
            f"{service}_SERVICE_PORT_HTTP": "8088",
            f"{service}_PORT": "tcp://10.0.0.1:8088",
            f"{service}_PORT_8088_TCP": "tcp://10.0.0.1:8088",
            f"{service}_PORT_8088_TCP_PROTO": "tcp",
            f"{service}_PORT_8088_TCP_PORT": "8088",
            f"{service}_PORT_8088_TCP_ADDR": "10.0.0.1",
        }
    )


def test_an_empty_value_is_no_value() -> None:
    assert settings(REDIS_URL="", PORT="", MUNIMENT_HOME=" ").port == 8088


def test_the_embedded_database_takes_no_other_address() -> None:
    (problem,) = problems(MIGRATE_DATABASE_URL="postgresql://h/db")
    assert problem.startswith("MIGRATE_DATABASE_URL is set, but the database is the embedded one")


def test_the_keys_may_be_in_a_database_of_their_own_which_has_an_owner() -> None:
    assert settings().keys_database_url is None
    known = settings(KEYS_DATABASE_URL="postgresql://muniment_api@h/keys")
    assert known.migrate_keys_database_url == known.keys_database_url == "postgresql://muniment_api@h/keys"
    production = {"MUNIMENT_MODE": "production", "DATABASE_URL": "embedded"}
    assert settings(KEYS_DATABASE_URL="postgresql://h/keys", **production).migrate_keys_database_url is None
    assert problems(MIGRATE_KEYS_DATABASE_URL="postgresql://h/keys") == [
        "MIGRATE_KEYS_DATABASE_URL is set without KEYS_DATABASE_URL: set both, or neither"
    ]


def test_an_issuer_needs_an_audience() -> None:
    assert problems(OIDC_ISSUER_URL="https://id.example") == [
        "OIDC_ISSUER_URL is set without OIDC_AUDIENCE: set both, or neither"
    ]
    assert settings(OIDC_ISSUER_URL="https://id.example", OIDC_AUDIENCE="m").oidc_audience == "m"


def test_production_asks_for_keys_where_nobody_can_change_the_answer() -> None:
    production = {"MUNIMENT_MODE": "production", "DATABASE_URL": "embedded", "OIDC_AUDIENCE": "m"}
    (problem,) = problems(OIDC_ISSUER_URL="http://id.example", **production)
    assert problem.startswith("OIDC_ISSUER_URL is 'http://id.example': production fetches keys over https:// only")
    assert settings(OIDC_ISSUER_URL="http://127.0.0.1:9000", **production).oidc_issuer_url == "http://127.0.0.1:9000"
    assert settings(OIDC_ISSUER_URL="http://keycloak:8080", OIDC_AUDIENCE="m").oidc_issuer_url == "http://keycloak:8080"


def test_the_default_home_follows_the_desktop_convention(tmp_path: Path) -> None:
    assert settings(XDG_DATA_HOME=str(tmp_path)).home == tmp_path / "muniment"
    assert settings(HOME=str(tmp_path)).home == tmp_path / ".local" / "share" / "muniment"
