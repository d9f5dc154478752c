"""Training on every image (data.split=none): nothing is scored, all epochs are trained, a named member is handed in."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from fastflower import convert, ensemble, evaluate, export, train
from fastflower.bundle import gates
from fastflower.bundle.gates import Gate
from fastflower.callbacks.trends import Trends
from fastflower.campaign import plan, results
from fastflower.campaign.launch import Result
from fastflower.campaign.search import Search
from fastflower.core import checkpoint, runs
from fastflower.core.errors import InputError
from fastflower.core.records import read_record
from fastflower.data import folds
from fastflower.data.betons.fold_set import open_fold
from fastflower.data.labels import read_labels
from fastflower.interface.fold_dataset import FoldDataset
from fastflower.optim.schedules import Plateau
from fastflower.recipe import Recipe, checks, load, parse_command
from fastflower.recipe.run_record import RunEnd
from support import toy_project

ALL = [
    *("tiny.yaml", "exp.name=whole", "data.split=none", "data.home=all", "data.root=data/train"),
    "data.csv=data/train_labels.csv",
]


@pytest.fixture
def converted() -> Recipe:
    """The toy project, converted once more without validation images."""
    toy_project.project(Path.cwd())
    convert.main(ALL)
    return parse_command(ALL)


def test_every_image_trains_and_only_one_beton_is_written(converted: Recipe) -> None:
    assert sorted(path.name for path in Path("all/betons").glob("*.beton")) == ["fold0_train.beton"]
    fold = open_fold(converted, 0)
    assert fold.train.rows == len(fold.folds) == 60 and fold.val is None and fold.val_corrupt is None
    assert fold.folds.numbers == [0] and not fold.folds.validates
    assert np.array_equal(folds.make_folds(read_labels(converted), np.arange(60), converted), np.full(60, -1))
    with pytest.raises(InputError, match=r"data.split = none: every image trained, and none was held out"):
        FoldDataset("tiny.yaml", *ALL[1:], split="val")


def test_folds_with_and_without_validation_are_not_taken_for_each_other(converted: Recipe) -> None:
    with pytest.raises(
        InputError, match=r"all/folds.csv holds no image out, and data.split = ratio asks for"
    ):
        convert.main([*ALL, "data.split=ratio"])
    with pytest.raises(InputError, match=r"data/folds.csv holds images out, and data.split = none asks for"):
        convert.main([*ALL, "data.home=data"])


@pytest.mark.slow
def test_all_epochs_are_trained_the_plateau_follows_the_training_loss_and_named_members_are_handed_in(
    converted: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        *ALL, *toy_project.ONE, "swa.enabled=true", "swa.start=0", "sched.name=plateau", "sched.cosine_epochs=3",
        "sched.patience=0", "opt.lr=0.01", "train.clip_grad=null", "es.patience=1", "llrd.enabled=false",
    ]  # fmt: skip
    assert train.main(words) == 0
    output = capsys.readouterr().out
    assert "no image is held out, so all 3 epochs are trained and none is the best" in output
    assert "the plateau schedule follows the training loss instead of sched.monitor=score" in output
    assert "best       none: no image was held out to be scored" in output
    rows = toy_project.epochs("whole")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(row["val_loss"] is row["score"] is row["best"]["score"] is None for row in rows)
    plateau = Plateau(0.5, 0, "train_loss")
    for before, row in itertools.pairwise(rows):
        plateau.step(before["train_loss"])
        assert row["lr_max"] == pytest.approx(
            0.01 * plateau.factor
        )  # a score that stands still at 0 would halve it

    run = toy_project.run_of("whole")
    assert read_record(run.end_path, RunEnd).best.epoch == 0
    kinds = {kind: run.checkpoints(kind) for kind in runs.KINDS}
    assert {kind for kind, paths in kinds.items() if paths} == {"ema_best", "swa", "last"}
    assert all(checkpoint.load(paths[-1]).meta["epoch"] == 3 for paths in kinds.values() if paths)
    assert train.start(words) == 0
    output = capsys.readouterr().out
    assert "is finished (all 3 epochs are done); nothing to do" in output
    assert output.splitlines()[-1].endswith("'ensembling.find_pattern=ema_best__*.pth'")

    (task,) = plan.tasks(["tiny.yaml"], plan.parse_overrides(words[1:]))
    result = Result(task, "done")
    assert results.line(result).endswith("3 epochs, not scored") and results.row(result)["score"] is None
    table = results.summary_table(results.combinations([result]))
    assert "nan" not in table and table.splitlines()[-1].split()[2:6] == ["1", "-", "-", "-"]
    with pytest.raises(InputError, match=r"data.split = none: every image trained, so a search has none"):
        Search(
            ["tiny.yaml"],
            plan.parse_overrides([*words[1:], "seed=[1,2]", "aug.strength=[0,1]"]),
            trials=2,
            journal=Path("j"),
        )

    for command in (evaluate, ensemble):
        with pytest.raises(InputError, match=r"data.split = none: every image trained, so \w+ has none"):
            command.main(words)
    with pytest.raises(
        InputError, match=r"it has ema_best, last, swa: name one, such as ensembling.find_pattern="
    ):
        export.main(words)
    seen: list[Gate] = []

    def without_predictor(*arguments: object, **options: object) -> tuple[list[Gate], list[str]]:
        seen.append(Gate("seen", got="", allowed="", passed=True))
        return seen, []

    monkeypatch.setattr(gates, "check", without_predictor)
    export.main([*words, "ensembling.find_pattern=ema_best__*.pth"])
    output = capsys.readouterr().out
    assert seen and "1 members, T = 1.0000 (no image was held out to fit it)" in output


def test_validation_images_and_none_are_a_contradiction() -> None:
    with pytest.raises(InputError, match=r"data.val = val and data.split = none: .* leave one of them out"):
        checks.check(load(None, ["data.val=val", "data.split=none"]))


def test_trends_of_a_training_without_scores_are_silent() -> None:
    row = {"epoch": 1, "size": [8, 8], "val_loss": None, "train_loss": 1.0, "lr_max": 1e-3, "chosen": "raw"}
    row["grad_norm"] = 1.0
    assert Trends(load(None, ["data.split=none"])).update(row) == []


def test_weights_of_the_last_step_alone_get_a_line_of_advice() -> None:
    whole = ["data.split=none", "model.pretrained=false"]
    alone = [*whole, "ema.enabled=false", "swa.enabled=false"]
    assert any(
        "keeps the weights of the last step alone, as last" in line
        for line in checks.check(load(None, alone))
    )
    for words in (whole, [*whole, "ema.enabled=false", "swa.enabled=true"]):
        assert not any("last step alone" in line for line in checks.check(load(None, words)))
