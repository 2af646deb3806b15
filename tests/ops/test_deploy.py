"""What operators deploy agrees with what Muniment is: settings, commands, ports, probes, claims, and what is mounted.

What needs a registry or a cluster is not done here; what the image is made of, by its own instructions, is.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec
import pytest
from kubernetes_validate.utils import ValidationError, validate

from api import health, metrics
from ledger.settings import Settings
from ops.cli import app
from ops.compose.prepare import prepare
from ops.projects import Role
from ops.serve import STOP_SECONDS
from tests.ops.deployed import CONTEXT, IMAGE, IMAGE_ENVIRONMENT, REALM, ROOT, caller, instructions

COMPOSE: dict[str, Any] = msgspec.yaml.decode((ROOT / "ops/compose/compose.yaml").read_bytes())
KUBERNETES = sorted((ROOT / "ops/kubernetes").glob("*.yaml"))
UNITS = sorted((ROOT / "ops/systemd").glob("*.service"))
OTHERS = {"HOME", "PATH", "PYTHONDONTWRITEBYTECODE"}


def documents(path: Path) -> list[dict[str, Any]]:
    return [msgspec.yaml.decode(text) for text in path.read_text("utf-8").split("\n---\n")]


def manifests() -> list[dict[str, Any]]:
    return [one for path in KUBERNETES if path.name != "kustomization.yaml" for one in documents(path)]


def pods() -> dict[str, dict[str, Any]]:
    """By the name of its only container."""
    specs = [one["spec"]["template"]["spec"] for one in manifests() if one["kind"] in ("Deployment", "Job")]
    return {spec["containers"][0]["name"]: spec for spec in specs}


def lines(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([A-Z_]+)=(.*)$", path.read_text("utf-8"), re.MULTILINE))


def unit(path: Path) -> list[tuple[str, str]]:
    """What it says, after what all of them say."""
    shared = (ROOT / "ops/systemd/muniment-.service.d/10-muniment.conf").read_text("utf-8")
    return re.findall(r"^([A-Za-z]+)=(.*)$", shared + path.read_text("utf-8"), re.MULTILINE)


class Process(NamedTuple):
    """One command of Muniment's as somebody runs it: its arguments, and its whole environment."""

    where: str
    arguments: list[str]
    environment: dict[str, str]


def of_compose() -> list[Process]:
    ours = {name: service for name, service in COMPOSE["services"].items() if service["image"].startswith("muniment:")}
    return [
        Process(f"compose {name}", service["command"], IMAGE_ENVIRONMENT | service["environment"])
        for name, service in ours.items()
    ]


def of_kubernetes() -> list[Process]:
    configured = IMAGE_ENVIRONMENT | lines(ROOT / "ops/kubernetes/settings.env")
    containers = [pod["containers"][0] for pod in pods().values()]
    return [
        Process(f"kubernetes {c['name']}", c["args"], configured | {e["name"]: e["value"] for e in c["env"]})
        for c in containers
    ]


def of_systemd() -> list[Process]:
    processes = []
    for path in UNITS:
        said = unit(path)
        environment = lines(ROOT / "ops/systemd/environment")
        for key, value in said:
            if key == "Environment":
                environment |= dict(pair.split("=", 1) for pair in value.split())
        program, *arguments = dict(said)["ExecStart"].replace("%i", "billing").split()
        assert program == "/opt/muniment/bin/muniment"
        processes.append(Process(f"systemd {path.stem}", arguments, environment))
    return processes


PROCESSES = [*of_compose(), *of_kubernetes(), *of_systemd()]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=[process.where for process in PROCESSES])


class Asked(dict[str, str]):
    """An environment that knows what it was asked for."""

    def __init__(self, environment: dict[str, str]) -> None:
        super().__init__(environment)
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


@each_process
def test_every_process_has_possible_settings_and_none_that_nobody_reads(process: Process, tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "database_url").write_bytes(
        (tmp_path / "api_database_url").read_bytes()
    )  # elsewhere, all are called so
    files = {name: tmp_path / Path(value).name for name, value in process.environment.items() if name.endswith("_FILE")}
    environment = process.environment | {name: str(path) for name, path in files.items()}
    asked = Asked(environment)
    settings = Settings.from_environment(asked)
    assert settings.mode == "production"
    assert not settings.embedded
    assert str(settings.home) == "/var/lib/muniment"
    assert set(environment) <= asked.names | OTHERS


@each_process
def test_every_process_runs_a_command_that_there_is(process: Process) -> None:
    command, bound, _ = app.parse_args(process.arguments, exit_on_error=False, print_error=False)
    assert callable(command)
    assert len(bound.args) == len(process.arguments) - (2 if process.arguments[0] in ("project", "keys") else 1)


def test_who_is_deployed_where_is_the_same_everywhere() -> None:
    kinds = [{process.arguments[0] for process in made()} for made in (of_compose, of_kubernetes, of_systemd)]
    assert kinds[0] == kinds[1] == kinds[2] - {"project", "keys"} == {"migrate", "api", "worker"}


# What signs checkpoints is the worker's


def mounts_of_compose(name: str) -> dict[str, str]:
    """By where it is mounted: which volume."""
    return {mount.split(":")[1]: mount.split(":")[0] for mount in COMPOSE["services"][name].get("volumes", [])}


def mounts_of_kubernetes(name: str) -> dict[str, str]:
    """By where it is mounted: which secret."""
    pod = pods()[name]
    secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    mounts = pod["containers"][0]["volumeMounts"]
    return {mount["mountPath"]: secrets[mount["name"]] for mount in mounts if mount["name"] in secrets}


@pytest.mark.parametrize(
    ("mounts_of", "processes", "said"),
    [(mounts_of_compose, of_compose(), "log-keys"), (mounts_of_kubernetes, of_kubernetes(), "muniment-log-keys")],
)
def test_no_container_but_the_workers_has_what_signs_checkpoints(
    mounts_of: Callable[[str], dict[str, str]], processes: list[Process], said: str
) -> None:
    for process in processes:
        name = process.where.split()[1]
        held = [path for path, source in mounts_of(name).items() if source == said]
        directory = process.environment.get("MUNIMENT_LOG_KEYS_DIR", "")
        if name == "worker":
            assert [path for path in held if Path(directory).is_relative_to(path)]
            assert directory != process.environment.get("MUNIMENT_KEYS_DIR")
        else:
            assert held == []


SIGNING = {"muniment-worker", "muniment-log-key"}


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_no_unit_but_the_workers_sees_what_signs_checkpoints(path: Path) -> None:
    said = unit(path)
    (process,) = [one for one in of_systemd() if one.where == f"systemd {path.stem}"]
    directory = Path(process.environment["MUNIMENT_LOG_KEYS_DIR"])
    hidden = [value for key, value in said if key == "InaccessiblePaths"]
    assert hidden == ([] if path.stem in SIGNING else [str(directory)])
    # It is there before it is hidden; and nothing leads to it through another process of the same user.
    assert str(directory.relative_to("/var/lib")) in dict(said)["StateDirectory"].split()
    assert dict(said)["PrivateUsers"] == "yes"


# The image


def test_the_image_is_for_nobody_but_muniment() -> None:
    last = {name: rest for name, rest in IMAGE if name not in ("COPY", "RUN")}
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last["USER"])
    assert (json.loads(last["ENTRYPOINT"]), json.loads(last["CMD"])) == (["muniment"], ["api"])
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert f"'PORT'] + '{next(iter(health.get_live.paths))}'" in last["HEALTHCHECK"]
    python = dict(instructions())["ARG"]
    assert re.fullmatch(r"PYTHON=docker\.io/library/python:3\.11\.\d+-slim-\w+", python)
    assert {rest.split()[0] for name, rest in instructions() if name == "FROM"} == {"${PYTHON}"}
    assert set(last["EXPOSE"].split()) == {IMAGE_ENVIRONMENT["PORT"], metrics_port()}


def test_what_builds_the_image_is_what_sets_up_a_checkout() -> None:
    version = re.search(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert version
    lock = (ROOT / "ops/image/build.lock").read_text("utf-8")
    assert re.findall(r"^(\w\S+)", lock, re.MULTILINE) == [f"uv=={version[1]}"]
    assert "--hash=sha256:" in lock
    project = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["project"]
    embedded = [re.split(r"[<>=~; ]", asked)[0] for asked in project["optional-dependencies"]["embedded"]]
    assert (ROOT / "ops/image/excludes").read_text("utf-8").split() == embedded
    assert {f"muniment:{project['version']}"} == {
        service["image"] for service in COMPOSE["services"].values() if "build" in service
    }


def test_no_secret_can_get_into_the_image() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert next(line for line in ignored if not line.startswith("#")) == "*"
    assert ".secrets" not in CONTEXT
    made = {path.rpartition("/")[0] for path in (one["file"] for one in COMPOSE["secrets"].values())}
    assert made == {"../../.secrets"}
    assert "/.secrets/" in (ROOT / ".gitignore").read_text("utf-8").splitlines()


# Compose


def test_every_other_image_is_pinned_to_a_version() -> None:
    for service in COMPOSE["services"].values():
        assert re.fullmatch(r"[a-z.]+/[\w./-]+:v?\d+\.\d+[\w.-]*|muniment:\d+\.\d+\.\d+", service["image"])


def test_what_compose_mounts_is_there_and_what_it_names_is_declared(tmp_path: Path) -> None:
    prepare(tmp_path)
    for name, service in COMPOSE["services"].items():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert source in COMPOSE["volumes"] if source[0] != "." else (ROOT / "ops/compose" / source).exists(), mount
        used = {Path(v).name for n, v in service.get("environment", {}).items() if n.endswith("_FILE")}
        assert used <= set(service.get("secrets", [])) <= set(COMPOSE["secrets"]), name
        assert set(service.get("depends_on", [])) <= set(COMPOSE["services"])
    for secret, where in COMPOSE["secrets"].items():
        assert (tmp_path / secret).stat().st_mode & 0o777 == 0o644
        assert Path(where["file"]).name == secret


def test_passwords_are_made_once_and_addresses_have_them(tmp_path: Path) -> None:
    directory = tmp_path / ".secrets"
    assert len(prepare(directory)) > 5
    before = {path.name: path.read_text("utf-8") for path in directory.iterdir()}
    assert directory.stat().st_mode & 0o777 == 0o700
    assert prepare(directory) == []
    assert before == {path.name: path.read_text("utf-8") for path in directory.iterdir()}
    for role in ("owner", "api", "worker"):
        address = before["migrate_database_url" if role == "owner" else f"{role}_database_url"]
        assert f":{before[f'{role}_password']}@postgres/muniment" in address
    given = (ROOT / "ops/compose/passwords.sql").read_text("utf-8")
    for role in ("api", "worker"):
        assert f"ALTER ROLE muniment_{role} PASSWORD :'{role}'" in given
        assert f"/run/secrets/{role}_password" in given


def test_prometheus_asks_where_metrics_are_and_loads_the_alerts() -> None:
    config = msgspec.yaml.decode((ROOT / "ops/compose/prometheus.yaml").read_bytes())
    mounts = dict(mount.split(":")[:2][::-1] for mount in COMPOSE["services"]["prometheus"]["volumes"])
    assert mounts["/etc/prometheus/prometheus.yml"] == "./prometheus.yaml"
    (pattern,) = config["rule_files"]
    there = ROOT / "ops/compose" / mounts[str(Path(pattern).parent)]
    assert [path.name for path in there.iterdir() if fnmatch(path.name, Path(pattern).name)] == ["muniment.yaml"]
    targets = {}
    for job in config["scrape_configs"]:
        assert {job["metrics_path"]} == metrics.get_metrics.paths
        (target,) = job["static_configs"][0]["targets"]
        service, port = target.split(":")
        targets[service] = port
        environment = next(one.environment for one in of_compose() if one.where == f"compose {service}")
        token = environment.get("METRICS_TOKEN_FILE")
        assert job.get("authorization", {}).get("credentials_file") == token
        assert token is None or Path(token).name in COMPOSE["services"]["prometheus"]["secrets"]
    assert targets == {"api": IMAGE_ENVIRONMENT["PORT"], "worker": metrics_port()}


def metrics_port() -> str:
    (worker,) = [process for process in of_compose() if process.arguments == ["worker"]]
    return worker.environment["OTEL_EXPORTER_PROMETHEUS_PORT"]


def test_grafana_finds_the_dashboard_and_what_it_draws_from() -> None:
    mounts = dict(mount.split(":")[:2][::-1] for mount in COMPOSE["services"]["grafana"]["volumes"])
    provisioning = ROOT / "ops/compose" / mounts["/etc/grafana/provisioning"]
    (provider,) = msgspec.yaml.decode((provisioning / "dashboards/muniment.yaml").read_bytes())["providers"]
    dashboards = ROOT / "ops/compose" / mounts[provider["options"]["path"]]
    dashboard = json.loads((dashboards / "muniment.json").read_text("utf-8"))
    (source,) = msgspec.yaml.decode((provisioning / "datasources/prometheus.yaml").read_bytes())["datasources"]
    assert source["type"] in {one["query"] for one in dashboard["templating"]["list"] if one["type"] == "datasource"}
    assert source["url"] == "http://prometheus:9090"
    home = COMPOSE["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/muniment.json"


# Keycloak


def test_the_realm_says_what_the_api_is_told_to_read(tmp_path: Path) -> None:
    prepare(tmp_path)
    (api,) = [process for process in of_compose() if process.arguments == ["api"]]
    files = {name: str(tmp_path / Path(v).name) for name, v in api.environment.items() if name.endswith("_FILE")}
    settings = Settings.from_environment(api.environment | files)
    keycloak = COMPOSE["services"]["keycloak"]
    assert settings.oidc_issuer_url == f"{keycloak['environment']['KC_HOSTNAME']}/realms/{REALM['realm']}"
    # Keycloak and the API are one host to each other, and this machine's port leads there.
    assert keycloak["network_mode"] == "service:api"
    assert f"127.0.0.1:8180:{keycloak['environment']['KC_HTTP_PORT']}" in COMPOSE["services"]["api"]["ports"]
    callers = {name: caller(settings, *name) for name in REALM_CALLERS}
    said = {name[1]: (one.project_id, one.actor.kind, one.actor.roles) for name, one in callers.items()}
    assert said == {
        "service-account-demo-agent": ("demo", "agent", ("agent",)),
        "mia": ("demo", "human", ("approver", "auditor")),
        "olga": ("operators", "human", ("operator",)),
    }
    assert len({one.actor.sub for one in callers.values()}) == len({name[1] for name in callers})


REALM_CALLERS = [
    ("demo-agent", "service-account-demo-agent"),
    *((client, person) for client in ("console", "terminal") for person in ("mia", "olga")),
]


def test_the_realm_has_our_roles_and_keeps_people_from_choosing_their_project(tmp_path: Path) -> None:
    assert {role["name"] for role in REALM["roles"]["realm"]} == set(get_args(Role))
    (component,) = REALM["components"]["org.keycloak.userprofile.UserProfileProvider"]
    profile = {one["name"]: one for one in json.loads(component["config"]["kc.user.profile.config"][0])["attributes"]}
    for name in ("project", "kind"):
        assert profile[name]["permissions"]["edit"] == ["admin"]
    prepare(tmp_path)
    made = set(lines(tmp_path / "keycloak.env"))
    asked = set(re.findall(r"\$\{(\w+)\}", json.dumps(REALM)))
    assert asked == made - {"KC_BOOTSTRAP_ADMIN_USERNAME", "KC_BOOTSTRAP_ADMIN_PASSWORD"}


# Kubernetes


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_kubernetes_takes_every_manifest(version: str) -> None:
    assert len(manifests()) > 7
    for manifest in manifests():
        validate(manifest, version, strict=True)


def test_a_manifest_with_a_word_that_kubernetes_does_not_know_is_found_out() -> None:
    (job,) = [one for one in manifests() if one["kind"] == "Job"]
    job["spec"]["template"]["spec"]["enableServiceLink"] = False
    with pytest.raises(ValidationError):
        validate(job, "1.37", strict=True)


@pytest.mark.parametrize("name", ["migrate", "api", "worker"])
def test_a_pod_is_as_restricted_as_its_namespace_asks(name: str) -> None:
    (namespace,) = [one for one in manifests() if one["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pod = pods()[name]
    (container,) = pod["containers"]
    assert pod["enableServiceLinks"] is pod["automountServiceAccountToken"] is False
    user = int(dict(IMAGE)["USER"].split(":")[0])
    security = pod["securityContext"]
    assert (security["runAsNonRoot"], security["runAsUser"], security["fsGroup"]) == (True, user, user)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert container["resources"]["limits"]["memory"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    for variable in container["env"]:
        if variable["name"].endswith("_FILE"):
            assert str(Path(variable["value"]).parent) == mounts["secrets"]
    if name != "migrate":
        assert mounts["keys"] == f"{IMAGE_ENVIRONMENT['MUNIMENT_HOME']}/keys"


def test_what_ends_in_the_cluster_has_the_time_to() -> None:
    drain = int(lines(ROOT / "ops/kubernetes/settings.env")["DRAIN_SECONDS"])
    assert pods()["api"]["terminationGracePeriodSeconds"] > drain + STOP_SECONDS
    default = Settings.from_environment({"DATABASE_URL": "postgresql://nowhere"}).drain_seconds
    assert int(COMPOSE["services"]["api"]["stop_grace_period"].rstrip("s")) > default + STOP_SECONDS
    assert int(dict(unit(ROOT / "ops/systemd/muniment-api.service"))["TimeoutStopSec"]) > default + STOP_SECONDS
    # Nobody is sent on before it is known that this one is not ready.
    ready = pods()["api"]["containers"][0]["readinessProbe"]
    assert drain > ready["periodSeconds"] * ready["failureThreshold"] + ready["timeoutSeconds"]
    assert ready["timeoutSeconds"] > health.DATABASE_SECONDS_MAX


def test_probes_and_services_lead_to_ports_that_are_listened_on() -> None:
    containers = {name: pod["containers"][0] for name, pod in pods().items()}
    ports = {name: {p["name"]: p["containerPort"] for p in c.get("ports", [])} for name, c in containers.items()}
    assert ports["api"] == {"http": int(IMAGE_ENVIRONMENT["PORT"])}
    told = {one["name"]: one["value"] for one in containers["worker"]["env"]}
    assert ports["worker"] == {"metrics": int(told["OTEL_EXPORTER_PROMETHEUS_PORT"])}
    paths = {"api": health.get_live.paths | health.get_ready.paths, "worker": {"/metrics"}}
    for name, allowed in paths.items():
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = containers[name][probe]["httpGet"]
            assert asked["port"] in ports[name]
            assert asked["path"] in allowed
    assert containers["api"]["readinessProbe"]["httpGet"]["path"] in health.get_ready.paths
    assert containers["api"]["livenessProbe"]["httpGet"]["path"] in health.get_live.paths
    named = {label for spec in ports.values() for label in spec}
    for one in manifests():
        if one["kind"] == "Service":
            assert {port["targetPort"] for port in one["spec"]["ports"]} <= named
        if one["kind"] == "NetworkPolicy":
            assert {p["port"] for rule in one["spec"].get("ingress", []) for p in rule["ports"]} <= named


def test_what_selects_pods_selects_some() -> None:
    deployed = [one for one in manifests() if one["kind"] in ("Deployment", "Job")]
    labelled = [one["spec"]["template"]["metadata"]["labels"] for one in deployed]
    selectors = [
        one["spec"][key] for one in manifests() for key in ("selector", "podSelector") if key in one.get("spec", {})
    ]
    assert len(selectors) > 5
    for selector in selectors:
        wanted = selector.get("matchLabels", selector).items()
        assert [labels for labels in labelled if wanted <= labels.items()]
    kustomization = documents(ROOT / "ops/kubernetes/kustomization.yaml")[0]
    assert {*kustomization["resources"], "kustomization.yaml"} == {path.name for path in KUBERNETES}
    version = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["project"]["version"]
    assert [image["newTag"] for image in kustomization["images"]] == [version]


# systemd


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_has_its_secrets_as_credentials_and_nothing_else_to_itself(path: Path) -> None:
    said = unit(path)
    loaded = {value.split(":")[0] for key, value in said if key == "LoadCredential"}
    named = re.findall(r"(\w+)_FILE=%d/(\w+)", " ".join(value for key, value in said if key == "Environment"))
    assert {name for _, name in named} == loaded == {"database_url"}
    known = dict(said)
    assert (known["User"], known["ProtectSystem"], known["NoNewPrivileges"]) == ("muniment", "strict", "yes")
    assert (known["StateDirectory"].split()[0], known["CapabilityBoundingSet"]) == ("muniment", "")
    if known.get("Type") != "oneshot":
        assert known["Restart"] == "always"
        assert known["KillMode"] == "mixed"
        assert known["Wants"] == known["After"] == "muniment-migrate.service"


def test_systemd_takes_every_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd here")
    shutil.copytree(ROOT / "ops/systemd/muniment-.service.d", tmp_path / "muniment-.service.d")
    names = []
    for path in UNITS:
        name = path.name.replace("@", "@billing")
        text = path.read_text("utf-8").replace("/opt/muniment/bin/muniment", str(Path(sys.executable)))
        (tmp_path / name).write_text(text, "utf-8")
        names.append(str(tmp_path / name))
    found = {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
    checked = subprocess.run([analyze, "verify", "--man=no", *names], env=found, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
