"""Distillation targets: the teachers' probabilities for the training images.

Out of fold, because members are nearly certain of the images they trained on. The teachers of an image were trained
on the student's validation labels; that leak is second-hand and small, but it is one. Where validation images are
given apart (data.val), no image is out of fold, and the teachers predict the images they trained on, as their networks
would beside the student in training.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastflower.core import runs, scores
from fastflower.core.errors import InputError
from fastflower.data.betons.fold_set import FoldSet
from fastflower.data.loaders import EvalLoader
from fastflower.evaluation import inference, logits, summary
from fastflower.evaluation.logits import MemberLogits
from fastflower.evaluation.teacher_start import check_start
from fastflower.model.member import load_member
from fastflower.recipe import Recipe


def probabilities(recipe: Recipe, fold: FoldSet, num_classes: int) -> Tensor | None:
    """softmax(z / T) of the mean logits z of all teachers: float32 (rows of the training beton, C).

    Images that train in every fold, for which no member has out-of-fold logits, get their one-hot label. None
    without a teacher. Raises InputError for teachers of other classes or folds, and for teachers without logits of
    a training image, or of all.
    """
    names, t = recipe.distill.teacher, recipe.distill.temperature
    if not names:
        return None
    sets = []
    for name in names:
        check_start(recipe, "distill.teacher", name)
        members = summary.load_member_logits(runs.RESULTS / name)
        for run_members in summary.members_by_run(members).values():
            _check(name, run_members[0], fold=fold, num_classes=num_classes)
            sets.append(logits.assemble(run_members, fold.folds.fold))
    fused = logits.fuse(sets)
    fused_row = np.full(len(fold.folds), -1)  # by row of folds.csv
    fused_row[fused.index] = np.arange(len(fused))
    rows = fused_row[fold.train.index]
    taught = rows >= 0
    absent = ~taught & (fold.folds.fold[fold.train.index] >= 0)
    if absent.any():
        raise InputError(
            f"distill.teacher = {names}: {int(absent.sum())} of {len(rows)} training images have no out-of-fold "
            "logits; train and evaluate the teacher with data.fold=all"
        )
    if not taught.any():
        mean = np.mean([_on_training_images(name, recipe, fold) for name in names], axis=0)
        return torch.from_numpy(scores.softmax(mean / t).astype(np.float32))
    targets = np.eye(num_classes, dtype=np.float32)[fold.train.labels]
    targets[taught] = scores.softmax(fused.logits[rows[taught]].astype(np.float64) / t)
    return torch.from_numpy(targets)


def _on_training_images(name: str, recipe: Recipe, fold: FoldSet) -> np.ndarray:
    """The mean logits of a teacher's members on the training beton, one view each: float64 (rows, C)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    total, members = np.zeros(()), summary.load_member_logits(runs.RESULTS / name)
    for member in members:
        path = runs.MODELS / name / member.info.checkpoint
        teacher = load_member(path)
        meta = teacher.meta
        loader = EvalLoader(
            fold.train,
            recipe.eval.batch or recipe.train.batch_per_gpu,
            size=lambda size=meta.size: size,  # type: ignore[misc]
            factor=meta.resize_factor,
            interpolation=meta.interpolation,
            threads=recipe.data.workers,
        )
        network = inference.load_network(teacher, path, device)
        try:
            (values,) = inference.logits_of(
                [network], loader, rows=fold.train.rows, flips=(False,), device=device
            )
        finally:
            loader.close()
        total = total + values.astype(np.float64)
    return np.asarray(total / len(members))


def _check(name: str, member: MemberLogits, *, fold: FoldSet, num_classes: int) -> None:
    for noun, theirs, ours in (
        ("classes", member.info.class_hash, fold.classes.hash),
        ("folds", member.info.folds_hash, fold.folds.hash),
    ):
        if theirs != ours:
            raise InputError(
                f"distill.teacher: {name} was evaluated with other {noun} ({theirs}) than the betons hold "
                f"({ours}); choose a teacher of this conversion"
            )
    classes = member.logits.shape[1]
    if classes != num_classes:
        raise InputError(
            f"distill.teacher: {name} knows {classes} classes, the student {num_classes}; set data.num_classes=auto"
        )
