"""Makes the passwords that `compose.yaml` asks for, in `.secrets` at the root of the checkout: `python3 prepare.py`.

Each is made once and never changed: the database and Keycloak keep what they were first given. Every container runs
as a user of its own, so the files can be read by all; their directory by its owner alone. Nothing of Muniment is
imported: this runs before anything is installed.
"""

import secrets
from pathlib import Path

DIRECTORY = Path(__file__).resolve().parents[2] / ".secrets"
KEYCLOAK = ("KC_BOOTSTRAP_ADMIN_PASSWORD", "AGENT_SECRET", "APPROVER_PASSWORD", "OPERATOR_PASSWORD")


def prepare(directory: Path) -> list[str]:
    """Make what is not there yet; answers with the names of what was made."""
    directory.mkdir(mode=0o700, exist_ok=True)
    made: list[str] = []

    def keep(name: str, content: str) -> str:
        path = directory / name
        if not path.exists():
            path.write_text(content, "utf-8")
            path.chmod(0o644)
            made.append(name)
        return path.read_text("utf-8")

    for role, password_name, url_name in (
        ("muniment", "owner_password", "migrate_database_url"),
        ("muniment_api", "api_password", "api_database_url"),
        ("muniment_worker", "worker_password", "worker_database_url"),
    ):
        password = keep(password_name, secrets.token_hex(24))
        keep(url_name, f"postgresql://{role}:{password}@postgres/muniment")
    keep("metrics_token", secrets.token_hex(24))
    keep("grafana_password", secrets.token_hex(12))
    lines = ["KC_BOOTSTRAP_ADMIN_USERNAME=admin", *(f"{name}={secrets.token_hex(12)}" for name in KEYCLOAK)]
    keep("keycloak.env", "\n".join(lines) + "\n")
    return made


if __name__ == "__main__":
    print(f"{DIRECTORY}: {', '.join(prepare(DIRECTORY)) or 'everything is there'}")
