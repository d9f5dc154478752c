"""The path of the docs as written, at tiny size: the contest's commands, the ways out, and the blocks of Python."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastflower.bench import tiny_project
from support import pages

DOCS = pages.REPO / "docs"
RECIPES = {  # what the commands call recipes/convnext.yaml and recipes/vit.yaml, with the settings of a tiny project
    "convnext": re.sub(r"(?m)^exp:.*$", "lrfind: {steps: 10}", tiny_project.RECIPE).replace(
        tiny_project.BACKBONE, "test_convnext"
    ),
    "vit": "base: convnext.yaml\nmodel: {backbone: test_vit}\n",
}
NOT_HERE = {"weights": "the tiny networks start from scratch, and a test downloads nothing"}


def run(words: tuple[str, ...]) -> int | None:
    """Run a command of a page in this process, the predictor in one of its own; returns the exit code."""
    if words[0] == "python":
        return subprocess.run([sys.executable, *words[1:]], timeout=300, check=False).returncode
    assert words[0] == "fastflower"
    module = importlib.import_module(f"fastflower.{words[1]}")
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"fastflower.{words[1]}.__main__")
    code: int | None = module.main(list(words[2:]))
    return code


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_from_photographs_to_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFLOWER_NEXT", "0")
    tiny_project.draw(tmp_path)
    (tmp_path / "code").symlink_to(pages.REPO / "code")
    (tmp_path / "recipes").mkdir()
    for name, text in RECIPES.items():
        (tmp_path / f"recipes/{name}.yaml").write_text(text)
    for name, source in (("a", "00"), ("b", "01")):
        shutil.copy(tmp_path / f"test_dataset/{source}.jpg", tmp_path / f"test_dataset/{name}.jpg")

    contest = next(block for block in pages.blocks(DOCS / "contest.md") if block.language == "bash")
    ways_out = [block for block in pages.blocks(DOCS / "hand_in.md") if "--timm" in block.text]
    done = set()
    for block in (contest, *ways_out):
        for line in block.text.splitlines():
            for words in pages.simple_commands(line):
                if not words or words[1] in NOT_HERE:
                    continue
                assert run(words) in (None, 0), " ".join(words)
                done.add(words[1])
    assert {"doctor", "convert", "lrfind", "train", "evaluate", "ensemble", "export", "report"} <= done
    assert len(Path("results/results/submission.csv").read_text().splitlines()) == 7
    assert Path("results/results/convnext/report.html").is_file()
    assert Path("for_timm/model.safetensors").is_file() and Path("convnext.onnx").is_file()

    for block in pages.blocks(DOCS / "python.md"):
        exec(compile(block.text, f"python.md:{block.line}", "exec"), {})
