"""The betons of a fold as a torch Dataset, for training loops of one's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastflower.core import seeding
from fastflower.core.errors import InputError
from fastflower.data.betons.fold_set import open_fold
from fastflower.data.decode.kernel import Crop
from fastflower.data.loaders import eval_images, train_images
from fastflower.model.backbones import profile
from fastflower.recipe import derived, load

Item = tuple[Any, int]


class FoldDataset(Dataset[Item]):
    """(image, class index) of a fold's training or validation images, converted before by `convert`.

    Images are uint8 (3, H, W), of pairs (3, H, 2W), unless `transform` changes them: random crops and flips of `train`
    by the recipe, centred crops of `val`. The crop of an image is a function of the recipe's seed, of `set_epoch` and
    of the row, whichever process reads it. torch's DataLoader reads whole batches at once.
    """

    def __init__(
        self,
        recipe: str | os.PathLike[str],
        *changes: str,
        fold: int = 0,
        split: Literal["train", "val"] = "train",
        size: int | tuple[int, int] | None = None,
        augment: bool | None = None,
        transform: Callable[[Tensor], Any] | None = None,
        threads: int = 1,
    ) -> None:
        """Open a fold; `changes` are key=value words, `size` is that of the recipe's last stage where it is None."""
        if split not in ("train", "val"):
            raise InputError(f"split = {split}: must be train or val")
        self.recipe = load(os.fspath(recipe), list(changes))
        data = open_fold(self.recipe, fold)
        self.beton = data.train if split == "train" else data.held_out
        self.classes: list[str] = list(data.classes.ids)
        self.labels: np.ndarray = self.beton.labels  # class indices (N,), for samplers
        sizes = derived.image_sizes(self.recipe)
        self.size = sizes[-1] if size is None else (size, size) if isinstance(size, int) else size
        self.augment = split == "train" if augment is None else augment
        self.transform, self.threads, self.epoch = transform, threads, 0
        self._crop = Crop.of(self.recipe)
        self._interpolation = profile(self.recipe.model.backbone, sizes).interpolation

    def set_epoch(self, epoch: int) -> None:
        """Draw the crops of another epoch; before the DataLoader of that epoch is iterated."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.beton.rows

    def __getitem__(self, row: int) -> Item:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[Item]:
        """The items of several rows, decoded together; a DataLoader asks for its batches so."""
        index = np.asarray(rows, np.int64)
        if ((index < -len(self)) | (index >= len(self))).any():
            raise IndexError(f"rows are 0..{len(self) - 1}")
        index %= len(self)
        if self.augment:
            keys = seeding.row_keys(self.recipe.seed, self.epoch, positions=index, rows=index)
            images = train_images(
                self.beton, index, keys=keys, size=self.size, crop=self._crop, threads=self.threads
            )
        else:
            images = eval_images(
                self.beton, index, size=self.size, factor=self.recipe.eval.resize_factor,
                interpolation=self._interpolation, threads=self.threads,
            )  # fmt: skip
        pictures: list[Any] = list(images.permute(0, 3, 1, 2).contiguous())
        if self.transform is not None:
            pictures = [self.transform(picture) for picture in pictures]
        return list(zip(pictures, torch.from_numpy(self.labels[index]).tolist(), strict=True))
