"""The data of one run: a fold's betons, opened, verified and read as training and evaluation batches."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
from composer.core import State

from fastflower.callbacks.scoring import CLEAN, CORRUPTED
from fastflower.core.errors import InputError
from fastflower.data.betons.fold_set import FoldSet, open_fold
from fastflower.data.decode.kernel import Crop
from fastflower.data.loaders import EvalLoader, TrainLoader
from fastflower.data.samplers import order
from fastflower.data.unlabelled import Unlabelled, unlabelled_rows, used_rows
from fastflower.recipe import Recipe
from fastflower.recipe.derived import Derived
from fastflower.training.ranks import Machine, on_rank_zero


class Clock:
    """Where training stands, for loaders that are built before the Trainer that knows."""

    def __init__(self) -> None:
        self.state: State | None = None

    @property
    def now(self) -> tuple[int, int]:
        """(epoch, step in it) of the next batch."""
        if self.state is None:
            return 0, 0
        return self.state.timestamp.epoch.value, self.state.timestamp.batch_in_epoch.value

    @property
    def scored(self) -> int:
        """The epoch that an evaluation belongs to: the one that has just ended."""
        return max(0, self.now[0] - 1)


@dataclass(frozen=True)
class Loaders:
    """One fold's betons as batches; `combos` are the (kind, level) pairs of the corrupted set."""

    train: TrainLoader
    evaluation: dict[str, EvalLoader]
    combos: list[list[str]]

    def close(self) -> None:
        self.train.close()
        for loader in self.evaluation.values():
            loader.close()


def open_data(recipe: Recipe, fold: int) -> FoldSet:
    """A fold's betons, checked against recipe, labels and folds by rank 0 before the others look."""
    on_rank_zero(lambda: open_fold(recipe, fold) and None)
    return open_fold(recipe, fold)


def verify(fold: FoldSet) -> None:
    """Read the betons against their checksums on rank 0; raises CorruptionError."""

    def work() -> None:
        for beton in (fold.train, fold.val, fold.val_corrupt, fold.unlabelled):
            if beton is not None:
                beton.verify()

    on_rank_zero(work)


def loaders(
    recipe: Recipe, d: Derived, *, clock: Clock, fold: FoldSet, interpolation: str, machine: Machine
) -> Loaders:
    """Batches of a fold from where `clock` stands. Raises InputError when an epoch holds no global batch."""
    number, passes, labelled = fold.train.manifest["fold"], recipe.sampler.passes, used_rows(recipe, fold)
    labels = fold.train.labels[labelled]

    @functools.lru_cache(maxsize=2)  # length and content of an epoch are asked for many times
    def rows(epoch: int) -> np.ndarray:
        batch, turns = per_rank(epoch) * machine.world, range(epoch * passes, (epoch + 1) * passes)
        drawn = [
            order(recipe.sampler, labels, seed=recipe.seed, epoch=turn, fold=number, batch=batch)
            for turn in turns
        ]
        return labelled[np.concatenate(drawn)]

    def per_rank(epoch: int) -> int:
        return d.stage(epoch).batch_per_gpu * recipe.train.grad_accum

    def size(epoch: int) -> tuple[int, int]:
        stage = d.stage(epoch)
        return stage.height, stage.width

    def steps(epoch: int) -> int:
        return len(labelled) * passes // (per_rank(epoch) * machine.world)

    aug, threads = recipe.aug, recipe.data.workers
    crop = Crop(
        (aug.rrc_scale[0], aug.rrc_scale[1]),
        (aug.rrc_ratio[0], aug.rrc_ratio[1]),
        min(1.0, aug.hflip_p * aug.strength),
    )
    beside = None
    if recipe.semi.enabled:
        weak = replace(crop, scale=(recipe.semi.weak_scale[0], recipe.semi.weak_scale[1]))
        strong = crop if recipe.semi.method == "fixmatch" else None
        beside = Unlabelled(
            *unlabelled_rows(recipe, fold), recipe.seed, number, recipe.semi.mu, per_rank, steps, size, weak, strong,
            machine.rank, machine.world, threads,
        )  # fmt: skip
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
        beside=beside,
    )
    train.cursor = lambda: clock.now
    for stage in d.stages:
        if train.steps(stage.first - 1) == 0:
            raise InputError(
                f"fold {number} has {len(labelled)} training images with labels, fewer than the global batch of "
                f"{stage.batch_per_gpu * recipe.train.grad_accum * machine.world}; lower train.batch_per_gpu"
            )
    evaluation = {}
    for label, beton in ((CLEAN, fold.val), (CORRUPTED, fold.val_corrupt)):
        if beton is not None:
            batch = recipe.eval.batch or recipe.train.batch_per_gpu
            evaluation[label] = EvalLoader(
                beton,
                batch,
                size=lambda: size(clock.scored),
                factor=recipe.eval.resize_factor,
                interpolation=interpolation,
                rank=machine.rank,
                world=machine.world,
                threads=threads,
            )
    return Loaders(train, evaluation, fold.val_corrupt.manifest["combos"] if fold.val_corrupt else [])


def class_counts(recipe: Recipe, fold: FoldSet) -> np.ndarray:
    """Images of each class whose labels are trained on, int64 (C,); C may be more than the classes there are."""
    classes = len(fold.classes) if recipe.data.num_classes == "auto" else int(recipe.data.num_classes)
    return np.bincount(fold.train.labels[used_rows(recipe, fold)], minlength=classes)
