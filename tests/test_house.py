"""The rules of the house that a program can check: what may stand in the repository, and how large it may be."""

import ast
import re
import subprocess
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("ledger", "projections", "api", "ops")
FOLDERS = {*PACKAGES, "migrations", "tests"}
FILES = {
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "pyproject.toml",
    "requirements.lock",
    "requirements-dev.lock",
}
# About 400 is the aim; from here on it needs to be two files.
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60

# Where packages come from is the machine's business, and where anything lies on a machine is nobody's.
# Each is written so that it does not find itself.
UNWANTED = {
    "a registry": r"pypi[.]org|pythonhosted[.]org|registry[.]npmjs|npmjs[.]org|index[-_]url|find[-_]links",
    "a path of one machine": r"(?<![\w.])/(?:work|root|farm|home|Users)/[\w.]",
    "an unresolved merge": r"^(?:<{7}|>{7}) ",
}


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def sources() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in PACKAGES]


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text("utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_the_house_has_its_rooms_and_no_others() -> None:
    top = {path.relative_to(ROOT).parts for path in tracked()}
    assert {parts[0] for parts in top if len(parts) > 1 and not parts[0].startswith(".")} <= FOLDERS
    assert {parts[0] for parts in top if len(parts) == 1 and not parts[0].startswith(".")} <= FILES


@pytest.mark.parametrize("what", UNWANTED)
def test_nothing_names(what: str) -> None:
    pattern = re.compile(UNWANTED[what], re.MULTILINE)
    found = []
    for path in tracked():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # no text
        if path != Path(__file__):
            found += [f"{path.relative_to(ROOT)}: {match[0]!r}" for match in pattern.finditer(text)]
    assert not found


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_every_dependency_is_locked_by_version_and_digest(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    assert "//" not in text, "an address"
    entries = re.split(r"\n(?=[a-z0-9])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip())
    assert len(entries) > 30
    for entry in entries:
        assert re.match(r"[a-z0-9._-]+(\[[a-z,]+\])?==\S+", entry), entry
        assert "--hash=sha256:" in entry, entry


def test_the_locks_agree() -> None:
    def pins(name: str) -> set[str]:
        return set(re.findall(r"^([a-z0-9._-]+==\S+)", (ROOT / name).read_text("utf-8"), re.MULTILINE))

    assert pins("requirements.lock") <= pins("requirements-dev.lock")


def test_the_locks_hold_what_the_project_asks_for() -> None:
    locked = set(re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements.lock").read_text("utf-8"), re.MULTILINE))
    asked = {re.split(r"[^\w.-]", name)[0].replace("_", "-") for name in distribution("muniment").requires or []}
    assert asked <= locked, "run `make lock`"


def test_files_stay_readable_in_one_sitting() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked()
        if path.suffix in (".py", ".sql") and path.name != "schema.sql" and path.relative_to(ROOT).parts[0] in PACKAGES
        if (lines := len(path.read_text("utf-8").splitlines())) > FILE_LINES_MAX
    }
    assert not long


def test_functions_stay_short() -> None:
    long = {
        f"{path.relative_to(ROOT)}: {function.name}": lines
        for path in sources()
        for function in functions(path)
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > FUNCTION_LINES_MAX
    }
    assert not long


def test_every_module_says_what_it_is_for() -> None:
    silent = [str(path.relative_to(ROOT)) for path in sources() if not ast.get_docstring(ast.parse(path.read_bytes()))]
    assert not silent


def test_no_module_is_a_drawer_for_everything() -> None:
    drawers = {"util", "utils", "common", "core", "helper", "helpers", "base", "manager", "service", "repository"}
    assert not [str(path.relative_to(ROOT)) for path in sources() if path.stem in drawers]


def test_litestar_is_known_to_the_api_alone() -> None:
    importing = {
        str(path.relative_to(ROOT))
        for path in sources()
        if re.search(r"^\s*(from|import) litestar\b", path.read_text("utf-8"), re.MULTILINE)
    }
    # The bench measures against a bare Litestar application.
    assert {path for path in importing if not path.startswith(("api/", "ops/bench/"))} == set()
    assert "api/client.py" not in importing


def test_the_papers_are_here() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")
    assert distribution("muniment").metadata["License-Expression"] == "Apache-2.0"
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text("utf-8")
