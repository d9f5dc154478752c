"""docs/systems.md: every key, recipe, command and test that its tables name exists."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from fastflower.__main__ import COMMANDS
from fastflower.recipe import Recipe, schema

PAGE = Path(__file__).resolve().parents[2] / "docs/systems.md"
KEYS = {name for name, _, _ in schema.fields_of(Recipe())}


def rows() -> list[tuple[str, list[str], list[str]]]:
    """The rows of all tables: what is asked, and the names in code of the other two cells."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and cells[0] not in ("asked", "---"):
            asked, where, tests = cells
            found.append((asked, re.findall(r"`([^`]+)`", where), re.findall(r"`([^`]+)`", tests)))
    return found


@functools.cache
def functions(path: Path) -> set[str]:
    """The functions at the top of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_each_system_has_its_recipe_run_end_to_end() -> None:
    shown = {test.partition("::")[0] for _, _, tests in rows() for test in tests}
    assert {
        f"tests/systems/test_{name}.py" for name in ("flowers", "eyes", "digits", "pairs", "food")
    } <= shown
    assert len(rows()) > 70


@pytest.mark.parametrize(("asked", "where", "tests"), rows(), ids=[asked[:40] for asked, _, _ in rows()])
def test_what_a_row_names_exists(asked: str, where: list[str], tests: list[str], repo: Path) -> None:
    assert where and tests, "a row names a key, recipe or command, and a test"
    for name in where:
        if name.startswith("fastflower "):
            assert name.removeprefix("fastflower ") in COMMANDS, name
        elif name.startswith("recipes/"):
            assert (repo / name).is_file(), name
        else:
            assert name in KEYS, name
    for test in tests:
        path, _, function = test.partition("::")
        assert function.startswith("test_") and function in functions(repo / path), test
