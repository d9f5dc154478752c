"""The house rules that a reader should not have to check: imports go down, few modules touch the heavy libraries."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastflower

COMMANDS = (
    "convert",
    "train",
    "lrfind",
    "evaluate",
    "ensemble",
    "export",
    "report",
    "campaign",
    "demo",
    "doctor",
    "sample_data",
    "weights",
    "explain",
    "diff",
    "__main__",
    "bench",
)
FLOORS = {
    "core": 0,
    "recipe": 1,
    "data": 2,
    "model": 3,
    **dict.fromkeys(("optim", "evaluation"), 4),  # siblings on a floor do not know each other
    **dict.fromkeys(("algorithms", "callbacks", "bundle"), 5),
    "training": 6,
    **dict.fromkeys((*COMMANDS, "interface"), 7),  # commands speak through files
}
COMPOSER = ("model/classifier.py", "algorithms/", "callbacks/", "training/", "bench/trainers.py")
FFCV = ("bench/stock_ffcv.py", "bench/trainers.py")
PREDICTOR = {"torch", "numpy", "PIL"}
BUILT = {".git", ".venv", ".venv-next", "build", "data", "results", "shared"}

REPO = Path(__file__).resolve().parents[1]
MODULES = sorted((REPO / "fastflower").rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import statement, at any depth; `from a import b` gives a.b."""
    package = path.relative_to(REPO).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(path: Path) -> str:
    """The name by which FLOORS knows a file of fastflower/."""
    return path.relative_to(REPO / "fastflower").with_suffix("").parts[0]


def inside(path: Path, places: tuple[str, ...]) -> bool:
    return path.relative_to(REPO / "fastflower").as_posix().startswith(places)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(REPO).as_posix())
def test_imports_go_down(path):
    here = room(path)
    if here == "__init__":
        for name in imports(path):  # at run time only those of the standard library
            assert name.startswith("fastflower.interface.") or name.split(".")[0] in sys.stdlib_module_names
        return
    assert here in FLOORS, f"{here} has no floor; give it one in FLOORS"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "fastflower" or len(parts) == 1 or parts[1] in (here, "__version__"):
            continue
        there = parts[1]
        assert FLOORS[there] < FLOORS[here], f"{here} imports {name}, which is not below it"


def test_few_modules_touch_composer_and_ffcv():
    heavy = {"composer": COMPOSER, "ffcv": FFCV}
    found = [
        f"{path.relative_to(REPO)}: {name}"
        for path in MODULES
        for name in imports(path)
        if (top := name.split(".")[0]) in heavy and not inside(path, heavy[top])
    ]
    assert found == []


def test_the_predictor_needs_three_libraries():
    files = sorted((REPO / "code").rglob("*.py"))
    own = {path.stem for path in files}
    allowed = set(sys.stdlib_module_names) | PREDICTOR | own
    assert "predict" in own
    found = [
        f"{path.name}: {name}"
        for path in files
        for name in imports(path)
        if name.split(".")[0] not in allowed
    ]
    assert found == []
    assert not (
        REPO / "code" / "__init__.py"
    ).exists()  # it would hide the standard library's code, which pdb needs


def test_the_version_is_written_once():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fastflower.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastflower.__version__)


def test_nothing_imports_the_predictor():
    own = {path.stem for path in (REPO / "code").glob("*.py")}
    assert not [name for path in MODULES for name in imports(path) if name.split(".")[0] in own]


def test_no_module_hides_another_library():
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()) - {"fastflower"}
    files = [*MODULES, *(REPO / "code").rglob("*.py"), *(REPO / "tests").rglob("*.py")]
    hidden = [
        path for path in files if path.stem in taken and path.stem not in ("__init__", "__main__", "conftest")
    ]
    assert [path.relative_to(REPO).as_posix() for path in hidden] == []
    vague = {"utils", "common", "helpers", "misc"}
    assert not [path for path in files if path.stem in vague or path.parent.name in vague]


def texts() -> Iterator[tuple[Path, str]]:
    """Every text file of the repository that is not made by it."""
    for path in sorted(REPO.rglob("*")):
        parts = path.relative_to(REPO).parts
        if parts[0] in BUILT or any(
            part.endswith((".egg-info", "cache", "__pycache__")) for part in parts[:-1]
        ):
            continue
        if path.is_file() and path.suffix not in (".so", ".pyc", ".png", ".jpg"):
            yield path, path.read_text(encoding="utf-8")


def test_no_file_names_a_registry_or_somebodys_machine():
    words = ["pypi" + ".org", "python" + "hosted", "huggingface" + ".co", "/wo" + "rk/", "/ro" + "ot/"]
    pattern = re.compile("|".join(map(re.escape, words)))
    found = [f"{path.relative_to(REPO)}: {hit[0]}" for path, text in texts() if (hit := pattern.search(text))]
    assert found == []


def test_nothing_is_left_for_later():
    pattern = re.compile(r"\b(TO" + "DO|FIX" + r"ME)\b")
    code = [
        (path, text) for path, text in texts() if path.suffix in (".py", ".yaml", ".sh", ".c", ".md", ".j2")
    ]
    assert [
        f"{path.relative_to(REPO)}: {hit[0]}" for path, text in code if (hit := pattern.search(text))
    ] == []


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-next.lock"])
def test_the_lock_is_hashed_and_covers_the_project(name: str):
    lock = (REPO / name).read_text()
    pinned = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lock, flags=re.M))
    entries = re.split(r"\n(?=[a-z0-9])", lock.strip())
    assert all("--hash=sha256:" in entry for entry in entries)
    project = (REPO / "pyproject.toml").read_text()
    versions = dict(re.findall(r'^  "([\w-]+)==([\d.]+)"', project, flags=re.M))
    if name == "requirements-next.lock":
        versions |= dict(
            re.findall(r"^([\w-]+)==(\S+)", (REPO / "requirements-next.in").read_text(), flags=re.M)
        )
    assert {package: pinned[package] for package in versions} == versions
    for package in re.findall(r'^  "([\w-]+)[>=]', project, flags=re.M):
        assert package in pinned
