"""Semi-supervised data: which labels count, and the two views of unlabelled images beside each labelled batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fastflower.core import seeding
from fastflower.core.errors import InputError
from fastflower.core.tables import read_csv
from fastflower.data.betons.beton_file import Beton
from fastflower.data.betons.fold_set import FoldSet
from fastflower.data.decode.kernel import Crop
from fastflower.data.loaders import Batch, Size, TrainLoader
from fastflower.recipe import Recipe
from fastflower.recipe.schema import Aug

CHOICE, STREAM = 0x1A, 0x0B  # tags that separate these draws from others of the same seed
WEAK, STRONG = 1 << 32, 2 << 32  # added to the seed: two views of an image are two crops


def labelled_rows(labels: np.ndarray, per_class: int | None, *, seed: int, fold: int) -> np.ndarray:
    """The rows whose labels count, int64, ascending: `per_class` of each class, drawn by seed and fold.

    labels: class_idx int64 (N,). A smaller class gives all it has; None: every row.
    """
    if per_class is None:
        return np.arange(len(labels))
    shuffled = seeding.generator(seed, fold, CHOICE).permutation(len(labels))
    chosen = [shuffled[labels[shuffled] == c][:per_class] for c in np.unique(labels)]
    return np.sort(np.concatenate([np.empty(0, np.int64), *chosen]))


def used_rows(recipe: Recipe, fold: FoldSet) -> np.ndarray:
    """The rows of the fold's training part whose labels count, int64, ascending."""
    number = fold.train.manifest["fold"]
    return labelled_rows(fold.train.labels, recipe.data.labels_per_class, seed=recipe.seed, fold=number)


def unlabelled_rows(recipe: Recipe, fold: FoldSet) -> tuple[Beton, np.ndarray]:
    """The beton with the unlabelled images and their rows in it, int64: those of data.unlabelled, or what
    data.labels_per_class leaves. Never an image that validates the fold. Raises InputError when there are none.
    """
    if fold.unlabelled is None:
        key, beton = f"data.labels_per_class = {recipe.data.labels_per_class}", fold.train
        rows = np.setdiff1d(np.arange(beton.rows), used_rows(recipe, fold))
    else:
        key, beton = f"data.unlabelled = {recipe.data.unlabelled}", fold.unlabelled
        held_out = {fold.folds.sha256[index] for index in fold.val.index}
        listed = read_csv(Path(recipe.data.home) / "unlabelled.csv", ("filename", "sha256"))
        content = [listed[index]["sha256"] for index in beton.index]
        rows = np.flatnonzero([sha256 not in held_out for sha256 in content])
    if beton.images == 2:
        raise InputError("semi.enabled=true learns from single images, these are pairs; set it to false")
    if not len(rows):
        raise InputError(f"{key} leaves no image unlabelled; change it or set semi.enabled=false")
    return beton, rows


def left_out(recipe: Recipe, fold: FoldSet) -> list[str]:
    """A line when some of data.unlabelled validate the fold and are not learned from."""
    if fold.unlabelled is None:
        return []
    count = fold.unlabelled.rows - len(unlabelled_rows(recipe, fold)[1])
    return [f"{count} images of data.unlabelled validate this fold and are left out"] if count else []


def stream(rows: np.ndarray, start: int, *, count: int, seed: int, fold: int) -> np.ndarray:
    """Places start..start+count-1 of an endless stream, int64 (count,), in which every len(rows) are all rows once.

    Each turn through the rows has an order of its own.
    """
    turns = range(start // len(rows), -(-(start + count) // len(rows)))
    orders = [seeding.generator(seed, fold, turn, STREAM).permutation(rows) for turn in turns]
    at = start % len(rows)
    return np.concatenate([np.empty(0, np.int64), *orders])[at : at + count]


@dataclass(frozen=True)
class Unlabelled:
    """`mu` unlabelled images beside each labelled one, as pure functions of (seed, epoch, step).

    `batch(epoch)` are one rank's labelled images in a step and `steps(epoch)` the steps of an epoch. Labels that
    a row may have are only passed on for counting how often a label made for it is right.
    """

    beton: Beton
    rows: np.ndarray
    seed: int
    fold: int
    mu: int
    batch: Callable[[int], int]
    steps: Callable[[int], int]
    size: Callable[[int], Size]
    weak: Crop
    strong: Crop | None
    rank: int = 0
    world: int = 1
    threads: int = 0

    def order(self, epoch: int) -> np.ndarray:
        """The rows of all ranks in an epoch, int64 (steps * world * batch * mu,)."""
        start = sum(self._draws(past) for past in range(epoch))
        return stream(self.rows, start, count=self._draws(epoch), seed=self.seed, fold=self.fold)

    def __call__(self, epoch: int, step: int) -> Iterator[Batch]:
        """From a step on: weak, and strong if there is one, uint8 (B, mu, h, w, 3); strong_key, truth int64 (B, mu).

        The first dimension is the labelled batch's, so that microbatches cut both alike.
        """
        weak = self._loader(self.weak, WEAK).batches(epoch, step)
        if self.strong is None:
            yield from ({"weak": self._beside(w["image"]), "truth": self._beside(w["label"])} for w in weak)
            return
        strong = self._loader(self.strong, STRONG).batches(epoch, step)
        for w, s in zip(weak, strong, strict=True):
            yield {
                "weak": self._beside(w["image"]),
                "truth": self._beside(w["label"]),
                "strong": self._beside(s["image"]),
                "strong_key": self._beside(s["key"]),
            }

    def _draws(self, epoch: int) -> int:
        return self.steps(epoch) * self.world * self.batch(epoch) * self.mu

    def _beside(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (-1, self.mu))

    def _loader(self, crop: Crop, view: int) -> TrainLoader:
        def batch(epoch: int) -> int:
            return self.batch(epoch) * self.mu

        return TrainLoader(
            self.beton,
            self.order,
            seed=self.seed + view,
            batch=batch,
            size=self.size,
            crop=crop,
            rank=self.rank,
            world=self.world,
            threads=self.threads,
        )


def strong_augmentation(recipe: Recipe) -> tuple[Aug, float]:
    """What the device does to a strong view: the labelled images' augmentation with semi's RandAugment and erasing."""
    semi = recipe.semi
    aug = replace(recipe.aug, randaugment_n=semi.randaugment_n, randaugment_m=semi.randaugment_m)
    return aug, semi.erase_p
