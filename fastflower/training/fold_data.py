"""The data of one run: opens and verifies a fold's betons and builds the training and evaluation loaders."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from composer.core import State

from fastflower.callbacks.scoring import CLEAN, CORRUPTED
from fastflower.core.errors import InputError
from fastflower.data.betons.beton_file import Beton
from fastflower.data.betons.fold_set import FoldSet, open_fold
from fastflower.data.decode.kernel import Crop
from fastflower.data.device_copies import DeviceCopies
from fastflower.data.loaders import EvalLoader, TrainLoader
from fastflower.data.samplers import order
from fastflower.data.unlabelled import UnlabelledBatches, labelled_rows, unlabelled_rows
from fastflower.recipe import Recipe
from fastflower.recipe.derived import Derived, eval_factor
from fastflower.training.ranks import Machine, on_rank_zero

ALL_CORRUPTED = 10_000  # corrupted images up to which training scores all (robust.score=auto)


class Position:
    """The current epoch and step, for loaders that are built before the Trainer whose state has them."""

    def __init__(self) -> None:
        self.state: State | None = None

    @property
    def next_batch(self) -> tuple[int, int]:
        """(epoch, step within the epoch), both from 0, of the next batch."""
        if self.state is None:
            return 0, 0
        return self.state.timestamp.epoch.value, self.state.timestamp.batch_in_epoch.value

    @property
    def scored_epoch(self) -> int:
        """The epoch (from 0) that an evaluation belongs to: the one that has just ended."""
        return max(0, self.next_batch[0] - 1)


@dataclass(frozen=True)
class Loaders:
    """The loaders of one fold; `combos` lists the (kind, level) of each corrupted copy of the validation images."""

    train: TrainLoader
    evaluation: dict[str, EvalLoader]
    combos: list[list[str]]

    def close(self) -> None:
        self.train.close()
        for loader in self.evaluation.values():
            loader.close()


def augmentation(recipe: Recipe, fill: tuple[float, ...], beton: Beton) -> dict[str, Any]:
    """The keyword arguments of `augment` beside images and keys, for the training images of a beton."""
    pairs = beton.images_per_row == 2
    return {"aug": recipe.aug, "erase_p": recipe.reg.erase_p, "fill": fill, "pairs": pairs}


def open_data(recipe: Recipe, fold: int) -> FoldSet:
    """Open a fold's betons. Rank 0 checks them against recipe, labels and folds before the other ranks open them."""
    on_rank_zero(lambda: open_fold(recipe, fold) and None)
    return open_fold(recipe, fold)


def verify(fold: FoldSet) -> None:
    """Check the betons' checksums on rank 0; raises CorruptionError."""

    def check() -> None:
        for beton in (fold.train, fold.val, fold.val_corrupt, fold.unlabelled):
            if beton is not None:
                beton.verify()

    on_rank_zero(check)


def loaders(
    recipe: Recipe,
    derived: Derived,
    *,
    position: Position,
    fold: FoldSet,
    interpolation: str,
    machine: Machine,
) -> Loaders:
    """The loaders of a fold, read from `position` on. Raises InputError when an epoch has less than a global batch."""
    number, passes, labelled = fold.train.origin.fold, recipe.sampler.passes, labelled_rows(recipe, fold)
    labels = fold.train.labels[labelled]

    @functools.lru_cache(maxsize=2)  # called many times an epoch, for its length and its rows
    def rows(epoch: int) -> np.ndarray:
        if recipe.model.head == "knn":  # there is nothing to train
            return labelled[:0]
        batch = per_rank(epoch) * machine.world
        orders = [
            order(recipe.sampler, labels, seed=recipe.seed, epoch=turn, fold=number, batch=batch)
            for turn in range(epoch * passes, (epoch + 1) * passes)
        ]
        return labelled[np.concatenate(orders)]

    def per_rank(epoch: int) -> int:
        return derived.stage(epoch).batch_per_gpu * recipe.train.grad_accum

    def size(epoch: int) -> tuple[int, int]:
        stage = derived.stage(epoch)
        return stage.height, stage.width

    def steps(epoch: int) -> int:
        return len(labelled) * passes // (per_rank(epoch) * machine.world)

    crop, threads = Crop.of(recipe), recipe.data.workers
    extras = None
    if recipe.semi.enabled:
        extras = _unlabelled_batches(recipe, fold, batch=per_rank, steps=steps, size=size, machine=machine)
    train = TrainLoader(
        fold.train,
        rows,
        seed=recipe.seed,
        batch=per_rank,
        size=size,
        crop=crop,
        rank=machine.rank,
        world=machine.world,
        threads=threads,
        extras=extras,
    )
    train.cursor = lambda: position.next_batch
    for stage in derived.stages:
        if recipe.model.head != "knn" and train.steps(stage.first - 1) == 0:
            raise InputError(
                f"fold {number} has {len(labelled)} training images with labels, fewer than the global batch of "
                f"{stage.batch_per_gpu * recipe.train.grad_accum * machine.world}; lower train.batch_per_gpu"
            )
    evaluation = _evaluation_loaders(
        recipe,
        fold,
        size=lambda: size(position.scored_epoch),
        interpolation=interpolation,
        machine=machine,
    )
    if machine.device == "gpu":
        copies = DeviceCopies(machine.torch_device)
        train.copies = copies
        for loader in evaluation.values():
            loader.copies = copies
    return Loaders(
        train,
        evaluation,
        [list(combo) for combo in fold.val_corrupt.origin.combos] if fold.val_corrupt else [],
    )


def _unlabelled_batches(
    recipe: Recipe,
    fold: FoldSet,
    *,
    batch: Callable[[int], int],
    steps: Callable[[int], int],
    size: Callable[[int], tuple[int, int]],
    machine: Machine,
) -> UnlabelledBatches:
    """The unlabelled images beside the labelled ones, `semi.mu` times as many; the arguments are by epoch."""
    crop, beton_and_rows = Crop.of(recipe), unlabelled_rows(recipe, fold)
    weak = replace(crop, scale=(recipe.semi.weak_scale[0], recipe.semi.weak_scale[1]))
    return UnlabelledBatches(
        beton=beton_and_rows[0],
        rows=beton_and_rows[1],
        seed=recipe.seed,
        fold=fold.train.origin.fold,
        mu=recipe.semi.mu,
        batch=batch,
        steps=steps,
        size=size,
        weak=None if recipe.semi.method == "soft" else weak,
        strong=None if recipe.semi.method == "pseudo" else crop,
        rank=machine.rank,
        world=machine.world,
        threads=recipe.data.workers,
    )


def _evaluation_loaders(
    recipe: Recipe,
    fold: FoldSet,
    *,
    size: Callable[[], tuple[int, int]],
    interpolation: str,
    machine: Machine,
) -> dict[str, EvalLoader]:
    """The loaders of the fold's validation images and of their corrupted copies, as far as it has them."""
    evaluation = {}
    for label, beton in ((CLEAN, fold.val), (CORRUPTED, fold.val_corrupt)):
        if beton is not None:
            combos = len(beton.origin.combos) if label == CORRUPTED else 1
            evaluation[label] = EvalLoader(
                beton,
                recipe.eval.batch or recipe.train.batch_per_gpu,
                size=size,
                factor=eval_factor(recipe),
                interpolation=interpolation,
                rank=machine.rank,
                world=machine.world,
                threads=recipe.data.workers,
                rows=scored_combos(recipe, beton.rows // combos, combos),
            )
    return evaluation


def scored_combos(recipe: Recipe, images: int, count: int) -> np.ndarray | None:
    """The rows of `count` corrupted copies of `images` images that training scores, by robust.score; None: all.

    Copy after copy, as the beton has them, with equally many images of each: up to `count` - 1 images are left out.
    With `auto` one image in two is scored: at the usual scores and weights the error of the corrupted part of S is then
    that of the clean one, and the evaluations cost three quarters.
    """
    auto = recipe.robust.score == "auto"
    if (
        recipe.robust.score == "all"
        or count < 2
        or images < count
        or (auto and images * count <= ALL_CORRUPTED)
    ):
        return None
    own = count * np.arange(0, images // count, 2 if auto else 1)
    return np.concatenate([copy * images + copy + own for copy in range(count)])


def class_counts(recipe: Recipe, fold: FoldSet) -> np.ndarray:
    """Labelled training images of each class, int64 (C,); with data.num_classes C may exceed the fold's classes."""
    classes = len(fold.classes) if recipe.data.num_classes == "auto" else int(recipe.data.num_classes)
    return np.bincount(fold.train.labels[labelled_rows(recipe, fold)], minlength=classes)
