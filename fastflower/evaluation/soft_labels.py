"""Soft labels of unlabelled images, by the members of another experiment that validated the same fold.

These members have seen no label of the fold's validation images, so a student that learns their labels has not either.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastflower.core import runs, scores
from fastflower.core.errors import InputError
from fastflower.data.betons.fold_set import FoldSet
from fastflower.data.loaders import EvalLoader
from fastflower.data.unlabelled import unlabelled_rows
from fastflower.evaluation import inference
from fastflower.evaluation.teacher_start import check_start
from fastflower.model.member import load_member
from fastflower.recipe import Recipe


@dataclass(frozen=True)
class SoftTargets:
    """Targets float32 (rows of the unlabelled beton, C), 0 in rows that are not learned, and a line for people."""

    targets: Tensor
    line: str


def soft_labels(recipe: Recipe, fold: FoldSet, num_classes: int) -> SoftTargets:
    """The teacher's probabilities to the power of semi.power, of images with a confidence of semi.floor or more.

    The mean of the logits of its members of this fold, plain and, with tta.hflip, mirrored. Raises InputError when it
    has none, or of other classes or folds.
    """
    name, number = recipe.semi.soft_teacher, fold.train.origin.fold
    check_start(recipe, "semi.soft_teacher", name)
    beton, rows = unlabelled_rows(recipe, fold)
    found = runs.find_members(name, recipe.ensembling.find_pattern, metric=recipe.select.metric)
    paths = [path for path in found if (parsed := runs.parse_member(path)) and parsed.fold == number]
    if not paths:
        raise InputError(
            f"semi.soft_teacher = {name}: no member of fold {number} in {runs.MODELS / name}; train that fold first"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    total = np.zeros((beton.rows, num_classes))
    flips = (False, True) if recipe.tta.hflip else (False,)
    for path in paths:
        member = load_member(path)
        meta = member.meta
        for noun, theirs, ours in (
            ("classes", (meta.class_hash, len(meta.class_ids)), (fold.classes.hash, num_classes)),
            ("folds", meta.folds_hash, fold.folds.hash),
            ("a fold", meta.fold, number),
        ):
            if theirs != ours:
                raise InputError(
                    f"semi.soft_teacher = {name}: {path.name} was trained with other {noun} ({theirs}) than the betons "
                    f"hold ({ours}); choose a teacher of this conversion"
                )
        loader = EvalLoader(
            beton,
            recipe.eval.batch or recipe.train.batch_per_gpu,
            size=lambda size=meta.size: size,  # type: ignore[misc]
            factor=meta.resize_factor,
            interpolation=meta.interpolation,
            threads=recipe.data.workers,
        )
        try:
            network = inference.load_network(member, path, device)
            total += sum(
                inference.logits_of([network], loader, rows=beton.rows, flips=flips, device=device)
            ) / (len(flips) * len(paths))
        finally:
            loader.close()
    p = scores.softmax(total)
    learned = np.zeros(beton.rows, dtype=bool)
    learned[rows] = p[rows].max(1) >= recipe.semi.floor
    sharp = p**recipe.semi.power
    targets = np.where(learned[:, None], sharp / sharp.sum(1, keepdims=True), 0).astype(np.float32)
    line = (
        f"soft labels by {len(paths)} members of {name} that validated fold {number}: {int(learned.sum())} of "
        f"{len(rows)} images at a confidence of {recipe.semi.floor:g} or more, on average {p[rows].max(1).mean():.3f}"
    )
    return SoftTargets(torch.from_numpy(targets), line)
