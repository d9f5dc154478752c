"""What an ensemble says of the training images, for a student: its out-of-fold logits, softened.

Out of fold, because members are nearly certain of the images they trained on. The members that speak of an image
did see the student's validation labels; that leak is second-hand and small, but it is one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.data.betons.fold_set import FoldSet
from fastflower.evaluation import logits, summary
from fastflower.recipe import Recipe


def probabilities(recipe: Recipe, fold: FoldSet, num_classes: int) -> Tensor | None:
    """softmax(z / T) of the mean logits z of all teachers: float32 (rows of the training beton, C).

    Images that train in every fold, which no member was asked about, have their label. None without a teacher.
    Raises InputError for teachers of other classes or folds, or that say nothing of a training image, or of all.
    """
    names, t = recipe.distill.teacher, recipe.distill.temperature
    if not names:
        return None
    sets = []
    for name in names:
        for members in summary.by_run(summary.evaluated(runs.RESULTS / name)).values():
            _check(
                name, members[0].about, fold=fold, classes=members[0].logits.shape[1], num_classes=num_classes
            )
            sets.append(logits.assemble(members, fold.folds.fold))
    fused = logits.fuse(sets)
    place = np.full(len(fold.folds), -1)
    place[fused.index] = np.arange(len(fused))
    own = place[fold.train.index]
    absent = (own < 0) & (fold.folds.fold[fold.train.index] >= 0)
    if absent.any():
        raise InputError(
            f"distill.teacher = {names}: {int(absent.sum())} of {len(own)} training images have no out-of-fold logits; "
            "train and evaluate the teacher with data.fold=all"
        )
    if not (own >= 0).any():
        raise InputError(
            f"distill.teacher = {names}: all {len(own)} training images train in every fold, so that no member was "
            "asked about one; convert with folds (data.val=), and train and evaluate the teacher with data.fold=all"
        )
    found = np.eye(num_classes, dtype=np.float32)[fold.train.labels]
    z = fused.logits.astype(np.float64)[own[own >= 0]] / t
    z = np.exp(z - z.max(1, keepdims=True))
    found[own >= 0] = z / z.sum(1, keepdims=True)
    return torch.from_numpy(found)


def _check(name: str, about: dict[str, object], *, fold: FoldSet, classes: int, num_classes: int) -> None:
    for key, noun, own in (
        ("class_hash", "classes", fold.classes.hash),
        ("folds_hash", "folds", fold.folds.hash),
    ):
        if about[key] != own:
            raise InputError(
                f"distill.teacher: {name} was evaluated with other {noun} ({about[key]}) than the betons hold "
                f"({own}); take a teacher of this conversion"
            )
    if classes != num_classes:
        raise InputError(
            f"distill.teacher: {name} knows {classes} classes, the student {num_classes}; set data.num_classes=auto"
        )
