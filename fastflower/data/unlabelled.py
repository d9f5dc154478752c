"""Semi-supervised data: the rows used with their labels, and two views of unlabelled images for each labelled batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fastflower.core import seeding
from fastflower.core.errors import InputError
from fastflower.core.tables import read_sealed
from fastflower.data.betons.beton_file import Beton
from fastflower.data.betons.fold_set import UNLABELLED_COLUMNS, UNLABELLED_TABLE, FoldSet
from fastflower.data.decode.kernel import Crop
from fastflower.data.loaders import Batch, Size, TrainLoader
from fastflower.recipe import Recipe
from fastflower.recipe.schema import Aug

LABELLED_TAG, ORDER_TAG = 0x1A, 0x0B  # separate these draws from others of the same seed
WEAK_SEED, STRONG_SEED = 1 << 32, 2 << 32  # added to the seed: the two views are two crops


def draw_labelled(labels: np.ndarray, per_class: int | None, *, seed: int, fold: int) -> np.ndarray:
    """Draw `per_class` rows of each class by seed and fold, or all of a smaller class: int64, ascending.

    labels: class_idx int64 (N,). With per_class = None, every row is drawn.
    """
    if per_class is None:
        return np.arange(len(labels))
    shuffled = seeding.generator(seed, fold, LABELLED_TAG).permutation(len(labels))
    chosen = [shuffled[labels[shuffled] == c][:per_class] for c in np.unique(labels)]
    return np.sort(np.concatenate([np.empty(0, np.int64), *chosen]))


def labelled_rows(recipe: Recipe, fold: FoldSet) -> np.ndarray:
    """The rows of the fold's training beton that are used with their labels, int64, ascending."""
    number = fold.train.origin.fold
    return draw_labelled(fold.train.labels, recipe.data.labels_per_class, seed=recipe.seed, fold=number)


def unlabelled_rows(recipe: Recipe, fold: FoldSet) -> tuple[Beton, np.ndarray]:
    """The beton that holds the unlabelled images, and their rows in it, int64.

    They come from data.unlabelled, less the images that validate the fold, or are the training images that
    data.labels_per_class leaves over. Raises InputError if there are none.
    """
    if fold.unlabelled is None:
        key, beton = f"data.labels_per_class = {recipe.data.labels_per_class}", fold.train
        rows = np.setdiff1d(np.arange(beton.rows), labelled_rows(recipe, fold))
    else:
        key, beton = f"data.unlabelled = {recipe.data.unlabelled}", fold.unlabelled
        held_out = {fold.folds.sha256[row] for row in fold.folds.val_rows(fold.train.origin.fold)}
        path = Path(recipe.data.home) / UNLABELLED_TABLE
        listed = read_sealed(path, UNLABELLED_COLUMNS, count=beton.rows)
        rows = np.flatnonzero([listed[index]["sha256"] not in held_out for index in beton.index])
    if beton.images_per_row == 2:
        raise InputError(
            "semi.enabled = true: the images are pairs, and it learns from single images only; use semi.enabled=false"
        )
    if not len(rows):
        raise InputError(f"{key} leaves no image unlabelled; change it or set semi.enabled=false")
    return beton, rows


def exclusion_notice(recipe: Recipe, fold: FoldSet) -> list[str]:
    """A notice if some images of data.unlabelled are left out because they validate the fold."""
    if fold.unlabelled is None:
        return []
    count = fold.unlabelled.rows - len(unlabelled_rows(recipe, fold)[1])
    return [f"{count} images of data.unlabelled validate this fold and are left out"] if count else []


def endless_rows(rows: np.ndarray, start: int, *, count: int, seed: int, fold: int) -> np.ndarray:
    """Elements start..start+count-1 of an endless sequence of rows, int64 (count,).

    The sequence goes through all rows again and again, each time in another random order.
    """
    passes = range(start // len(rows), -(-(start + count) // len(rows)))
    orders = [seeding.generator(seed, fold, number, ORDER_TAG).permutation(rows) for number in passes]
    offset = start % len(rows)
    return np.concatenate([np.empty(0, np.int64), *orders])[offset : offset + count]


@dataclass(frozen=True, kw_only=True)
class UnlabelledBatches:
    """The `extras` of a TrainLoader: `mu` unlabelled images for each labelled one.

    batch: epoch -> labelled images of one rank in a step. steps: epoch -> steps. size: epoch -> (height, width).
    weak, strong: None for methods that use the other view alone. True labels, where rows have them, are passed on
    only to measure the accuracy of pseudo-labels.
    """

    beton: Beton
    rows: np.ndarray
    seed: int
    fold: int
    mu: int
    batch: Callable[[int], int]
    steps: Callable[[int], int]
    size: Callable[[int], Size]
    weak: Crop | None
    strong: Crop | None
    rank: int = 0
    world: int = 1
    threads: int = 0

    def order(self, epoch: int) -> np.ndarray:
        """The rows of all ranks in an epoch, int64 (steps * world * batch * mu,)."""
        start = sum(self._draws(earlier) for earlier in range(epoch))
        return endless_rows(self.rows, start, count=self._draws(epoch), seed=self.seed, fold=self.fold)

    def __call__(self, epoch: int, step: int) -> Iterator[Batch]:
        """Batches from a step on: weak and strong uint8 (B, mu, h, w, 3), strong_key and truth int64 (B, mu).

        A view that is None is left out; "unlabelled_row" int64 (B, mu) are the rows of the beton. The first dimension
        equals that of the labelled batch, so microbatches split both in the same way.
        """
        views = {}
        if self.weak is not None:
            views["weak"] = self._loader(self.weak, WEAK_SEED).batches(epoch, step)
        if self.strong is not None:
            views["strong"] = self._loader(self.strong, STRONG_SEED).batches(epoch, step)
        for batches in zip(*views.values(), strict=True):
            by_view = dict(zip(views, batches, strict=True))
            batch = {name: view["image"] for name, view in by_view.items()}
            batch |= {"truth": batches[0]["label"], "unlabelled_row": batches[0]["row"]}
            if "strong" in by_view:
                batch["strong_key"] = by_view["strong"]["key"]
            yield {name: self._by_labelled(tensor) for name, tensor in batch.items()}

    def _draws(self, epoch: int) -> int:
        return self.steps(epoch) * self.world * self.batch(epoch) * self.mu

    def _by_labelled(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (-1, self.mu))

    def _loader(self, crop: Crop, view_seed: int) -> TrainLoader:
        def batch(epoch: int) -> int:
            return self.batch(epoch) * self.mu

        return TrainLoader(
            self.beton,
            self.order,
            seed=self.seed + view_seed,
            batch=batch,
            size=self.size,
            crop=crop,
            rank=self.rank,
            world=self.world,
            threads=self.threads,
        )


def strong_augmentation(recipe: Recipe) -> tuple[Aug, float]:
    """The augmentation of strong views and their erasing probability: the recipe's, with semi's RandAugment."""
    semi = recipe.semi
    aug = replace(recipe.aug, randaugment_n=semi.randaugment_n, randaugment_m=semi.randaugment_m)
    return aug, semi.erase_p
