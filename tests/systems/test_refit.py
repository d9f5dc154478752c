"""Refit on everything (data.fold=none): all images, the folds' epochs, a member of its own kind for the hand-in."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest

from fastflower import convert, evaluate, train
from fastflower.bundle.held_out import collect
from fastflower.bundle.members import choose
from fastflower.bundle.writer import load_members
from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.core.records import read_record
from fastflower.data.betons.fold_set import open_fold
from fastflower.model.member import load_member
from fastflower.recipe import checks, derived, load, parse_command
from fastflower.recipe.run_record import RunEnd
from fastflower.training import refit
from support import forked, toy_project

NONE = ["tiny.yaml", "data.fold=none"]


@pytest.mark.slow
def test_a_refit_trains_on_all_images_for_the_epochs_of_the_folds(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    toy_project.project(tmp_path)
    with pytest.raises(
        InputError, match=r"data.fold = none: no data/betons/fold3_train.beton; .*convert with data.fo"
    ):
        train.main(NONE)
    convert.main(NONE)
    every = open_fold(parse_command(NONE), 3)
    assert sorted(every.train.index.tolist()) == list(range(60)) and every.val is None
    with pytest.raises(InputError, match=r"no fold of tiny with test_vit, seed 42 is trained to its end"):
        train.main(NONE)

    assert train.main(["tiny.yaml", "data.fold=[0,1]"]) == 0
    ends = {fold: read_record(toy_project.run_of(fold=fold).end_path, RunEnd).best.epoch for fold in (0, 1)}
    assert evaluate.main(["tiny", "tta.hflip=false"]) == 0
    recorded = Path("results/results/tiny/meta/recipe.yaml").read_text()
    capsys.readouterr()
    assert train.main(["tiny.yaml", "data.fold=none"]) == 0
    output = capsys.readouterr().out
    epochs = int(statistics.median(ends.values()) + 0.5)
    assert (
        f"refit on all images: {epochs} epochs, the median of the folds' best epochs, {ends[0]} (fold 0), "
        in output
    )
    assert "60 training images" in output and "best by    nothing: no image is held out" in output
    run = toy_project.run_of(fold=3)
    (path,) = run.checkpoints("refit")
    meta = load_member(path).meta
    assert (meta.kind, meta.weights, meta.epoch, meta.fold) == ("refit", "ema", epochs, 3)
    assert np.sum(meta.class_counts) == 60 and not run.checkpoints("ema_best")
    shared = [row for row in toy_project.epochs() if row["fold"] in (0, 3) and row["epoch"] <= epochs]
    by_fold = [[row["size"] for row in shared if row["fold"] == fold] for fold in (0, 3)]
    assert by_fold[0] == by_fold[1] and len(by_fold[0]) == epochs  # the folds' schedule, cut off
    assert Path("results/results/tiny/meta/recipe.yaml").read_text() == recorded
    assert train.main(NONE) == 0 and "nothing to do" in capsys.readouterr().out

    assert evaluate.main(["tiny", "tta.hflip=false"]) == 0  # of the folds alone
    assert "2 members of tiny" in capsys.readouterr().out
    recipe = parse_command(["tiny"])
    folds = runs.find_members("tiny", "auto", metric="combo")
    both = choose(recipe, [*folds, path])
    assert len(folds) == 2 and both.paths == sorted([*folds, path]) and both.temperature != 1
    alone = choose(load("tiny.yaml", ["ensembling.find_pattern=refit__*"]), [])
    assert alone.paths == [path]
    shown = collect(tmp_path / "photographs", recipe, load_members([*folds, path], "fp16"))
    assert set(shown.fold.tolist()) == {0, 1}
    assert set(collect(tmp_path / "alone", recipe, load_members([path], "fp16")).fold.tolist()) == {3}


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_refit(tmp_path: Path) -> None:
    toy_project.project(tmp_path)
    convert.main(NONE)
    words = [*NONE[1:], "train.refit_epochs=2", "train.world_size=2", "train.batch_per_gpu=5"]
    two = forked.training(*words)
    assert two.wait() == [0, 0], two.text()
    (path,) = toy_project.run_of(fold=3).checkpoints("refit")
    assert load_member(path).meta.epoch == 2


def test_epochs_are_those_of_the_schedule_cut_off() -> None:
    words = ["data.fold=none", "data.img_size=[32,48]", "data.size_epochs=[4,10]", "sched.cosine_epochs=10"]
    numbers = derived.derive(load(None, [*words, "train.refit_epochs=7"]), 1)
    assert numbers.epochs == 7 and [(stage.first, stage.last) for stage in numbers.stages] == [(1, 4), (5, 7)]
    short = derived.derive(load(None, [*words, "train.refit_epochs=3"]), 1)
    assert [(stage.first, stage.last) for stage in short.stages] == [(1, 3)]
    with pytest.raises(InputError, match=r"train.refit_epochs = 11: the schedule has 10 epochs"):
        derived.derive(load(None, [*words, "train.refit_epochs=11"]), 1)
    of_folds = derived.derive(load(None, [*words[1:], "train.refit_epochs=7"]), 1)
    assert of_folds.epochs == 10  # it is for data.fold=none


def test_what_has_no_fold_is_refused() -> None:
    with pytest.raises(InputError, match=r"data.fold = none: distill.teacher is known out of fold only"):
        checks.check(load(None, ["data.fold=none", "distill.teacher=[other]"]))
    with pytest.raises(InputError, match=r"data.fold = none: every image trained, so evaluate has none"):
        checks.check_scored(load(None, ["data.fold=none"]), "evaluate")
    with pytest.raises(InputError, match=r"data.fold = nonsense: must be all, none, or a number"):
        checks.check(load(None, ["data.fold=nonsense"]))
    assert refit.settled(load(None, ["data.fold=none", "train.refit_epochs=4"]))[1] == []
