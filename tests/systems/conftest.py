"""The five systems end to end, from their recipes with few images and small networks, in this process."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastflower import export
from fastflower.bundle import held_out, sandbox
from fastflower.core import runs

Rows = list[dict[str, str]]
HandIn = Callable[..., Rows]


@pytest.fixture
def hand_in(monkeypatch: pytest.MonkeyPatch, code: Any, capsys: pytest.CaptureFixture[str]) -> HandIn:
    """Export of an experiment's members past all gates, then the prediction of a folder or .npz: the table's rows.

    The predictor runs in this process instead of an environment of its own, which `test_export.py` tests.
    """

    def predict(source: str, table: str, *options: str) -> str | None:
        exit_code = code.predict.main([source, table, "--threads", "1", *options])
        return f"exit {exit_code}" if exit_code else None

    def run_copy(root: Path, options: list[str], python: Path | None) -> str | None:
        source = next(root.glob("test_dataset*"))
        bundle = ("--bundle", str(root / runs.BUNDLE))
        return predict(str(source), str(root / runs.SUBMISSION), *bundle, *options)

    monkeypatch.setattr(sandbox, "run_predictor", run_copy)
    monkeypatch.setattr(sandbox, "try_environment", lambda folder: (None, "this process"))
    monkeypatch.setattr(held_out, "MOST_ROWS", 12)

    def make(words: list[str], source: str, *options: str) -> Rows:
        export.main([*words, "bundle.max_ms=60000"])
        output = capsys.readouterr().out
        assert "FAILED" not in output and output.count("passed") >= 6, output
        assert predict(source, str(runs.SUBMISSION), "--bundle", str(runs.BUNDLE), *options) is None
        with open(runs.SUBMISSION, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    return make


def epochs(exp: str) -> list[dict[str, Any]]:
    """The epoch rows of an experiment's events.jsonl."""
    rows = runs.read_events(runs.RESULTS / exp / "events.jsonl", [])
    return [row for row in rows if row["event"] == "epoch"]
