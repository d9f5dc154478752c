"""The demo: invalid arguments, removal of its folders, scoring, and that its scores come from learning."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fastflower import convert, demo, evaluate, train
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


@pytest.fixture
def few_small_flowers(monkeypatch) -> None:
    """Contests of 313 photographs of six species at 160 pixels, instead of 1228 of fifteen at 600."""
    monkeypatch.setattr(flowers, "SIZE", 160)
    monkeypatch.setattr(flowers, "SPECIES", flowers.SPECIES[:6])
    monkeypatch.setattr(flowers, "write", partial(flowers.write, head=60, tail=20, held_out=15))


SMALL = ("data.img_size=[32,48]", "tta.scales=[48]", "sched.warmup_epochs=1")  # pixels: a third of the demo's
CHANCE = 33 / 90  # a random classifier gets 15 of 90 right on average; this is five deviations more


def copy_repository(repo: Path, target: Path) -> Path:
    """Copy or link the sources to another folder, so that a demo there does not touch this repository."""
    shutil.copytree(
        repo / "code", target / "code"
    )  # a copy: the predictor finds bundles relative to its real path
    for name in ("fastflower", "recipes", "pyproject.toml"):
        (target / name).symlink_to(repo / name)
    return target


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.usefixtures("few_small_flowers")
def test_the_demo_learns_flowers(repo, tmp_path, monkeypatch):
    """All commands of the demo, trained on two ranks; the drawing is small, because it runs in this process."""
    monkeypatch.chdir(copy_repository(repo, tmp_path / "repository"))
    demo.main(
        [*SMALL, "sched.cosine_epochs=12", "data.size_epochs=[8,12]", "eval.every=6", "robust.score=one"]
    )
    summary = json.loads(Path("results/results/demo/summary.json").read_text())
    assert Path(summary["submission"]).is_file() and Path(summary["report"]).is_file()
    assert set(summary["seconds"]) >= {"draw", "convert", "train", "evaluate", "export", "predict", "report"}
    assert summary["held_out"] == 90
    assert summary["clean_top1"] >= 0.75 > CHANCE  # 0.82 to 0.83 with three seeds
    assert summary["corrupted_top1"] >= 0.65  # 0.78 to 0.84


@pytest.mark.slow
@pytest.mark.usefixtures("few_small_flowers")
def test_shuffled_labels_give_chance(repo, code):
    """A training on permuted labels knows nothing of the held-out images, or their labels have leaked into it."""
    contest = flowers.write(Path("data/demo"), seed=0)
    labels = submissions.read_labels(contest.labels)
    permuted = np.random.default_rng(0).permutation(list(labels.values())).tolist()
    label_file("shuffled.csv", dict(zip(labels, permuted, strict=True)))
    words = [str(repo / demo.RECIPE), "exp.name=shuffled", "data.csv=shuffled.csv", "data.home=data/shuffled"]
    words += [*SMALL, "sched.cosine_epochs=6", "data.size_epochs=[4,6]", "eval.every=6"]
    words += ["train.world_size=1", "robust.enabled=false"]
    for command in (convert, train, evaluate):
        assert not command.main(words)
    programs = "results/model/shuffled/programs"
    assert not code.predict.main([str(contest.test), "out.csv", "--bundle", programs, "--threads", "1"])
    top1 = submissions.score(submissions.read_labels(contest.truth), Path("out.csv")).score.top1
    assert top1 < CHANCE  # 0.12 to 0.20 with four permutations
