"""The demo: what it refuses, what it removes, how it scores, and that what it scores was learned."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastflower import demo
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.data.samples import flowers
from fastflower.recipe import load


@pytest.fixture
def at_root(repo, monkeypatch) -> Path:
    monkeypatch.chdir(repo)
    return repo


def table(path: str, rows: dict[str, str]) -> Path:
    lines = ["filename,category_id", *(f"{name},{category}" for name, category in rows.items())]
    Path(path).write_text("\n".join(lines) + "\n")
    return Path(path)


def test_it_runs_from_the_root_only():
    with pytest.raises(InputError, match="run from the root of the repository"):
        demo.check([])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--quick", "got --quick; the demo takes --shuffle-labels and key=value words"),
        ("data.home=/", "got data.home=/; the demo keeps to its own folders"),
        ("exp.name=mine", "got exp.name=mine; the demo keeps to its own folders"),
        ("sched.epochs=3", "unknown key sched.epochs"),
    ],
)
def test_bad_words_are_refused_before_anything_is_removed(at_root, word, message):
    with pytest.raises(InputError) as caught:
        demo.check([word])
    assert message in str(caught.value)


def test_words_reach_the_recipe_and_every_command(at_root):
    words = ["seed=7", "train.world_size=1"]
    made = demo.check(words)
    assert made.seed == 7
    stages = demo.commands(made, flowers.DrawnSet(Path("data/demo")), disturbed=Path("d.csv"), words=words)
    assert [stage for stage, _ in stages] == [
        "convert", "train", "evaluate", "export", "predict", "predict disturbed", "report",
    ]  # fmt: skip
    for stage in ("convert", "train", "evaluate", "export"):
        assert dict(stages)[stage][-3:] == ["recipes/demo.yaml", *words]
    assert dict(stages)["report"][1:] == ["-m", "fastflower.report", "demo"]
    train = dict(stages)["train"]
    assert train[1:4] == ["-n", "1", "fastflower/train.py"]
    predict = dict(stages)["predict"]
    assert predict[1:] == ["code/predict.py", "data/demo/test", "results/results/submission.csv"]


def test_only_its_own_folders_are_removed():
    for folder in (
        "data/demo/train",
        "data/train",
        "results/model/demo",
        "results/model/mine",
        "results/results/demo",
    ):
        Path(folder).mkdir(parents=True)
    made = load()
    made.data.home, made.exp.name = "data/demo", "demo"
    demo.begin_afresh(made)
    left = {path.as_posix() for path in Path().rglob("*")}
    assert left == {"data", "data/train", "results", "results/model", "results/model/mine", "results/results"}


def test_a_missing_row_is_wrong():
    truth = table("truth.csv", {"a.jpg": "5", "b.jpg": "7", "c.jpg": "7", "d.jpg": "9"})
    assert demo.score(truth, table("s.csv", {"a.jpg": "5", "b.jpg": "5", "c.jpg": "7"})) == 0.5
    assert demo.score(truth, truth) == 1.0


def test_a_failing_command_is_named_with_its_exit_code(capfd):
    assert demo.run("convert", [sys.executable, "-c", "print('seen')"]) >= 0
    assert "seen" in capfd.readouterr().out
    with pytest.raises(EnvironmentFault, match="train ended with exit code 3 after"):
        demo.run("train", [sys.executable, "-c", "raise SystemExit(3)"])


def copied(repo: Path, to: Path) -> Path:
    """The repository's sources in a place of their own, so that a demo there touches nothing."""
    shutil.copytree(repo / "code", to / "code")  # the predictor looks for bundles beside where it really lies
    for name in ("fastflower", "recipes", "pyproject.toml"):
        (to / name).symlink_to(repo / name)
    return to


def run_demo(place: Path, *words: str) -> dict[str, float]:
    command = [sys.executable, "-m", "fastflower.demo", *words]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads((place / "results/results/demo/summary.json").read_text())
    assert (place / summary["submission"]).is_file()
    assert (place / summary["report"]).is_file()
    return summary


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1800)
def test_the_demo_learns_flowers(repo, tmp_path):
    summary = run_demo(copied(repo, tmp_path / "place"))
    assert summary["clean_top1"] >= 0.9
    assert summary["corrupted_top1"] >= 0.7
    assert set(summary["seconds"]) >= {"draw", "convert", "train", "evaluate", "export", "predict", "report"}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1800)
def test_shuffled_labels_give_chance(repo, tmp_path):
    """A random classifier of 15 balanced classes is right on 24 of 360; 48 is five deviations above."""
    words = ["sched.cosine_epochs=6", "sched.warmup_epochs=1", "data.size_epochs=[4,6]"]
    summary = run_demo(copied(repo, tmp_path / "place"), "--shuffle-labels", *words)
    assert summary["clean_top1"] < 48 / 360
