"""The demo: invalid arguments, removal of its folders, scoring, and that its scores come from learning."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastflower import demo
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.data.samples import flowers
from fastflower.evaluation import submissions
from fastflower.recipe import load


@pytest.fixture
def at_root(repo, monkeypatch) -> Path:
    monkeypatch.chdir(repo)
    return repo


def label_file(path: str, rows: dict[str, str]) -> Path:
    lines = ["filename,category_id", *(f"{name},{category}" for name, category in rows.items())]
    Path(path).write_text("\n".join(lines) + "\n")
    return Path(path)


def test_it_runs_from_the_root_only():
    with pytest.raises(InputError, match="run from the root of the repository"):
        demo.check([])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--quick", "got --quick; the demo takes --shuffle-labels and key=value"),
        ("data.home=/", "got data.home=/; this key is fixed in the demo"),
        ("exp.name=mine", "got exp.name=mine; this key is fixed in the demo"),
        ("sched.epochs=3", "unknown key sched.epochs"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_removed(at_root, word, message):
    with pytest.raises(InputError) as caught:
        demo.check([word])
    assert message in str(caught.value)


def test_overrides_reach_the_recipe_and_every_command(at_root):
    overrides = ["seed=7", "train.world_size=1"]
    recipe = demo.check(overrides)
    assert recipe.seed == 7
    contest = flowers.DrawnContest(Path("data/demo"))
    stages = demo.commands(recipe, contest, disturbed=Path("d.csv"), overrides=overrides)
    assert [stage for stage, _ in stages] == [
        "convert", "train", "evaluate", "export", "predict", "predict disturbed", "report",
    ]  # fmt: skip
    for stage in ("convert", "train", "evaluate", "export"):
        assert dict(stages)[stage][-3:] == ["recipes/demo.yaml", *overrides]
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
    recipe = load(None, ["data.home=data/demo", "exp.name=demo"])
    before = set(Path().rglob("*"))
    for made in ("data/demo", "results/model/demo", "results/results/demo"):
        with pytest.raises(InputError, match=f"^{made} was not made by the demo.*; move it away"):
            demo.remove_outputs(recipe)
        assert set(Path().rglob("*")) == before
        (Path(made) / demo.MARK).touch()
        before.add(Path(made) / demo.MARK)
    demo.remove_outputs(recipe)
    assert set(Path().rglob("*")) == before - {Path("data/demo/train")}
    demo.remove_outputs(recipe)


def test_a_missing_row_is_wrong():
    path = label_file("truth.csv", {"a.jpg": "5", "b.jpg": "7", "c.jpg": "7", "d.jpg": "9"})
    truth = submissions.read_labels(path)
    found = submissions.score(truth, label_file("s.csv", {"a.jpg": "5", "b.jpg": "5", "c.jpg": "7"}))
    assert (found.score.top1, found.right, found.missing) == (0.5, 2, 1)
    assert submissions.score(truth, path).score.top1 == 1.0


def test_a_failing_command_is_named_with_its_exit_code(capfd):
    assert demo.run_stage("convert", [sys.executable, "-c", "print('seen')"]) >= 0
    assert "seen" in capfd.readouterr().out
    with pytest.raises(EnvironmentFault, match="train failed with exit code 3 after"):
        demo.run_stage("train", [sys.executable, "-c", "raise SystemExit(3)"])


def copy_repository(repo: Path, target: Path) -> Path:
    """Copy or link the sources to another folder, so that a demo there does not touch this repository."""
    shutil.copytree(
        repo / "code", target / "code"
    )  # a copy: the predictor finds bundles relative to its real path
    for name in ("fastflower", "recipes", "pyproject.toml"):
        (target / name).symlink_to(repo / name)
    return target


def run_demo(folder: Path, *arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "fastflower.demo", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads((folder / "results/results/demo/summary.json").read_text())
    assert (folder / summary["submission"]).is_file()
    assert (folder / summary["report"]).is_file()
    return summary


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1800)
def test_the_demo_learns_flowers_and_shuffled_labels_give_chance(repo, tmp_path, monkeypatch):
    home = copy_repository(repo, tmp_path / "repository")
    short = ["sched.cosine_epochs=12", "data.size_epochs=[8,12]", "eval.every=4", "robust.score=one"]
    summary = run_demo(home, *short)
    assert summary["clean_top1"] >= 0.75  # 0.97 after all 30 epochs
    assert summary["corrupted_top1"] >= 0.6
    assert set(summary["seconds"]) >= {"draw", "convert", "train", "evaluate", "export", "predict", "report"}
    monkeypatch.chdir(home)
    assert top1_with_shuffled_labels(flowers.DrawnContest(Path("data/demo"))) < 48 / 360


def top1_with_shuffled_labels(contest: flowers.DrawnContest) -> float:
    """Top-1 on the held-out images of a training on the demo's images with permuted labels.

    A random classifier of 15 balanced classes gets 24 of 360 right on average; 48 is five deviations more.
    """
    labels = submissions.read_labels(contest.labels)
    permuted = np.random.default_rng(0).permutation(list(labels.values())).tolist()
    label_file("shuffled.csv", dict(zip(labels, permuted, strict=True)))
    words = ["recipes/demo.yaml", "exp.name=shuffled", "data.csv=shuffled.csv", "data.home=data/shuffled"]
    words += ["data.img_size=[48,64]", "tta.scales=[64]"]  # half the pixels, enough to find a leak
    words += ["sched.cosine_epochs=6", "sched.warmup_epochs=1", "data.size_epochs=[4,6]", "eval.every=6"]
    words += ["train.world_size=1", "robust.enabled=false"]
    for command in ("convert", "train", "evaluate"):
        demo.run_stage(command, [sys.executable, "-m", f"fastflower.{command}", *words])
    programs = "results/model/shuffled/programs"
    demo.run_stage(
        "predict", [sys.executable, "code/predict.py", str(contest.test), "out.csv", "--bundle", programs]
    )
    return submissions.score(submissions.read_labels(contest.truth), Path("out.csv")).score.top1
