"""The training on all images of every fold (data.fold=none), for as many epochs as the folds chose.

It follows the schedule of the folds and stops where the median of their best epochs was, so that its weights have seen
the learning rates that the chosen ones had. Nothing scores it: its member `refit` is handed in on the evidence of the
folds.
"""

from __future__ import annotations

import dataclasses
import math
import statistics

from fastflower.core.errors import InputError
from fastflower.core.records import read_record
from fastflower.core.runs import Run
from fastflower.recipe import Recipe
from fastflower.recipe.derived import fold_count
from fastflower.recipe.run_record import RunEnd


def settled(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with a number for train.refit_epochs, and a line that says where it comes from.

    Raises InputError when it is `auto` and no fold of this experiment, backbone and seed has been trained to its end.
    """
    if recipe.train.refit_epochs != "auto":
        return recipe, []
    best = best_epochs(recipe)
    if not best:
        raise InputError(
            f"data.fold = none: no fold of {recipe.exp.name} with {recipe.model.backbone}, seed {recipe.seed} is "
            "trained to its end, so none has a best epoch; train data.fold=all first, or give train.refit_epochs"
        )
    epochs = math.floor(statistics.median(best.values()) + 0.5)
    listed = ", ".join(f"{epoch} (fold {fold})" for fold, epoch in best.items())
    line = f"refit on all images: {epochs} epochs, the median of the folds' best epochs, {listed}"
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, refit_epochs=epochs)), [line]


def best_epochs(recipe: Recipe) -> dict[int, int]:
    """The best epoch of each fold that is trained to its end: fold -> epoch from 1."""
    found = {}
    for fold in range(fold_count(recipe)):
        run = Run(exp=recipe.exp.name, backbone=recipe.model.backbone, fold=fold, seed=recipe.seed)
        if run.end_path.is_file():
            found[fold] = read_record(run.end_path, RunEnd).best.epoch
    return {fold: epoch for fold, epoch in found.items() if epoch}
