"""Previews of augmentation for people: the picture of samples that train writes, and the report."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastflower.data.transforms.mixing import Kind, mix
from fastflower.recipe.schema import Reg

TITLES = {"mixup": "MixUp", "cutmix": "CutMix"}


def to_uint8(images: Tensor) -> np.ndarray:
    """Float (B, 3, h, w) in 0..255, on any device, as uint8 (B, h, w, 3)."""
    return images.detach().cpu().clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def mixed(
    images: Tensor, labels: Tensor, *, keys: Tensor, num_classes: int, reg: Reg
) -> dict[str, np.ndarray]:
    """A batch (B, 3, h, w) mixed by each kind that the recipe uses, as uint8 (B, h, w, 3)."""
    alphas: dict[Kind, float] = {"mixup": reg.mixup, "cutmix": reg.cutmix}
    return {
        kind: to_uint8(mix(images, labels, keys=keys, num_classes=num_classes, kind=kind, alpha=alpha)[0])
        for kind, alpha in alphas.items()
        if alpha and reg.mix_prob
    }
