"""Adapter of a Network to Composer's Trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor
from torch.nn import functional as F

from fastflower.model.network import Network

Batch = dict[str, Tensor]


class Classifier(ComposerModel):
    """A network, its loss, and averaged copies of it (shadows) that are scored on the same batches.

    Shadows stay outside the module tree: they add no parameters, DDP does not see them, and `train()` and `eval()`
    do not reach them. Add them in eval mode.

    `precision` makes the context manager of each forward pass, beside Composer's own.
    """

    def __init__(
        self,
        network: Network,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        precision: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__()
        self.network = network
        self.criterion = loss
        self.precision = precision
        self.shadows: dict[str, Callable[[Tensor], Tensor]] = {}

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C) of a batch whose image is float (B, 3, H, W), uint8 (B, H, W, 3) or its features (B, F)."""
        with self.precision():
            return self.network(float_images(batch))

    def loss(self, outputs: Tensor, batch: Batch, *_: Any, **__: Any) -> Tensor:
        """The training loss of logits (B, C) against the batch's soft target, or its label without one."""
        target = batch.get("target")
        if target is None:
            target = F.one_hot(batch["label"], outputs.shape[1])
        return self.criterion(outputs, target)

    def eval_forward(self, batch: Batch, outputs: Tensor | None = None) -> dict[str, Tensor]:
        """Float32 logits (B, C) by name: `raw` for the network itself, then every shadow."""
        images = float_images(batch)
        networks: dict[str, Callable[[Tensor], Tensor]] = {"raw": self.network, **self.shadows}
        with self.precision():
            if self.network.kept == "backbone" and images.ndim == 4:  # which all of them share
                images = self.network.features(images)
            return {name: network(images).float() for name, network in networks.items()}


def float_images(batch: Batch) -> Tensor:
    """A batch's images as (B, 3, H, W) in 0..255: decoded uint8 (B, H, W, 3) to channels_last float32, floats as is."""
    images = batch["image"]
    return images.permute(0, 3, 1, 2).to(torch.float32) if images.dtype == torch.uint8 else images
