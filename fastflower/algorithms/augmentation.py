"""Augmentation of whole batches on the device, before Composer cuts them into microbatches."""

from __future__ import annotations

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from fastflower.data.device_copies import KEYS
from fastflower.data.transforms.augment import augment
from fastflower.recipe.schema import Aug


class DeviceAugment(Algorithm):
    """AFTER_DATALOADER: move the batch to the device and augment each image with its own key.

    Keys stay on the host, where all random numbers are drawn. "image" becomes float32 (B, 3, H, W) in 0..255,
    channels last; features (B, F) stay as they are. `fill` (3,), in 0..255, is the colour of erased boxes. With
    `pairs`, the two halves of each image are augmented independently.
    """

    def __init__(self, aug: Aug, erase_p: float, *, fill: tuple[float, ...], pairs: bool = False) -> None:
        self.aug = aug
        self.erase_p = erase_p
        self.pairs = pairs
        self.fill = torch.tensor(fill, dtype=torch.float32)

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_DATALOADER

    @torch.no_grad()
    def apply(self, event: Event, state: State, logger: Logger | None) -> None:
        keys = {name: state.batch[name] for name in KEYS if name in state.batch}
        batch = state.device.batch_to_device({k: v for k, v in state.batch.items() if k not in keys})
        images = batch["image"]
        if images.ndim == 4:
            self.fill = self.fill.to(images.device)
            images = augment(
                images, keys["key"], aug=self.aug, erase_p=self.erase_p, fill=self.fill, pairs=self.pairs
            )
        state.batch = {**batch, **keys, "image": images}
