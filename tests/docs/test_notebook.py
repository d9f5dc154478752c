"""The example notebook: its cells run in order, and it is kept without outputs."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = "examples/first_steps.ipynb"


def code_cells(repo: Path) -> list[dict[str, Any]]:
    """The cells of code of the notebook."""
    notebook = json.loads((repo / NOTEBOOK).read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_kept_without_outputs(repo: Path) -> None:
    for cell in code_cells(repo):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        compile("".join(cell["source"]), NOTEBOOK, "exec")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_its_cells_run(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("FASTFLOWER_NEXT", "0")
    names: dict[str, Any] = {"__name__": "__main__"}
    here = os.getcwd()
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            for cell in code_cells(repo):
                exec(compile("".join(cell["source"]), NOTEBOOK, "exec"), names)
    finally:
        os.chdir(here)
    assert names["images"].shape[1:] == (3, 32, 32)
    assert len(names["found"].class_ids) == 4 and set(names["found"].class_ids) <= set(names["model"].classes)
    assert "wrote results/results/tiny/scores.json" in printed.getvalue()
