"""The script of GPU checks, as far as a machine without one can tell: its recipes are valid, its table is written."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from fastflower.recipe import checks, load
from support import gpu_check


@pytest.mark.parametrize(
    "name", ["memory", "speed", "repeat", "resume", "two_ranks", "half", "compiled", "hand_in"]
)
def test_every_training_of_a_check_has_a_valid_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if "run.py" in command:
            words.append(command[command.index("run.py") + 1 :])
        return subprocess.CompletedProcess(command, 0, "note: memory of 1 GB a GPU\n", "")

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    monkeypatch.setattr(
        gpu_check, "epoch_row", lambda exp: {"images_per_s": 1.0, "score": 1.0, "train_loss": 1.0}
    )
    monkeypatch.setattr(gpu_check, "tensors", lambda exp: {})
    with contextlib.suppress(ValueError):  # of results that no training has written
        gpu_check.CHECKS[name].run("cuda")
    assert words
    for changes in words:
        checks.check(load(None, changes))


@pytest.mark.parametrize("error, passed", [("", True), ("raise AssertionError('too | large')", False)])
def test_a_check_gives_its_figure_or_its_reason(
    error: str, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path("one.py")
    script.write_text(f"{error}\nprint('3.0 s')\n")
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    got, figure, seconds = gpu_check.run_one("stopped", "cuda")
    assert got == passed and figure == ("3.0 s" if passed else "AssertionError: too / large")
    assert 0 < seconds < 60


def test_a_machine_without_a_gpu_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main() == 4
    assert "no CUDA device" in capsys.readouterr().err
