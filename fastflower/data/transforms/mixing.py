"""MixUp and CutMix on whole batches, never both: soft targets, one weight per row, no global random state.

MixUp: Zhang et al., "mixup: Beyond Empirical Risk Minimization"; CutMix: Yun et al., "CutMix: Regularization
Strategy to Train Strong Classifiers with Localizable Features". Published recipes draw one weight per batch; one
per row has the same distribution and less variance.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special
from torch import Tensor

from fastflower.core import seeding
from fastflower.data.transforms import image_ops

Kind = Literal["none", "mixup", "cutmix"]
APPLIED, METHOD, WEIGHT, CENTRE_ROW, CENTRE_COLUMN = range(3000, 3005)  # random streams
KNOTS = 4096


def choose(
    seed: int, epoch: int, *, step: int, prob: float, switch: float, mixup: float, cutmix: float
) -> Kind:
    """The method for the global batch of a step, the same on every rank.

    A batch is mixed with probability `prob`, and then with CutMix with probability `switch`. If the Beta parameter
    `mixup` or `cutmix` is 0, the other method takes all mixed batches.
    """
    if not (mixup or cutmix):
        return "none"
    key = seeding.row_keys(seed, epoch, positions=np.array(step), rows=np.array(0))
    if seeding.uniform(key, APPLIED) >= prob:
        return "none"
    if mixup and cutmix:
        return "cutmix" if seeding.uniform(key, METHOD) < switch else "mixup"
    return "mixup" if mixup else "cutmix"


def mix(
    images: Tensor,
    labels: Tensor,
    *,
    keys: Tensor,
    num_classes: int,
    kind: Kind,
    alpha: float,
    further: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix each row i with row (i + B/2) mod B.

    Images are float (B, 3, H, W), labels int64 (B,), keys int64 (B,) on the host. Returns images of the same dtype
    and memory format, and float32 targets (B, num_classes) whose rows sum to 1. The columns of `further` (B, K), such
    as a teacher's probabilities, are mixed alike and appended to them. Ranks that hold every world-th row of a global
    batch form the same pairs as one rank would, if their batches are even. A batch of one row is not mixed.
    """
    targets = F.one_hot(labels, num_classes).float()
    if further is not None:
        targets = torch.cat([targets, further], dim=1)
    half = len(images) // 2
    if kind == "none" or half == 0:
        return images, targets
    weight = beta(keys, alpha)
    if kind == "mixup":
        visible = image_ops.column(1 - weight, images)
    else:
        down, across, weight = boxes(keys, weight, images.shape[2:])
        sides = image_ops.on_device(torch.cat([down, across], 1), images.device)  # (B, H + W)
        visible = sides[:, None, : down.shape[1], None] & sides[:, None, None, down.shape[1] :]
    visible = visible.to(images.dtype)  # weight of the partner, by pixel
    own, partner = image_ops.on_device(torch.stack([weight, 1 - weight]), images.device)[:, :, None]
    mixed = _partners(images, half).mul_(visible).add_(images * (1 - visible))
    return mixed, targets * own + _partners(targets, half) * partner


def beta(keys: Tensor, alpha: float) -> Tensor:
    """Draws (B,), float32, from Beta(alpha, alpha): the quantile function at each key's uniform number.

    Interpolated between 4097 knots: probabilities are within 1/4096 everywhere, values within 1e-4 on average.
    """
    table = _quantiles(alpha)
    position = seeding.uniform_tensor(keys, WEIGHT) * KNOTS
    knot = position.long()
    low, high = table[knot], table[knot + 1]
    return low + (high - low) * (position - knot)


def boxes(keys: Tensor, weight: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The rows (B, H) and columns (B, W) of the CutMix boxes, bool, and the fraction of pixels outside, float32 (B,).

    `size` is (height, width). A box has sqrt(1 - weight) of each side and a uniform centre, and is cut at the border.
    """
    height, width = size
    side = (1 - weight.double()).sqrt()
    down, across = (
        _span(keys, CENTRE_ROW, side=side, length=height),
        _span(keys, CENTRE_COLUMN, side=side, length=width),
    )
    area = down.sum(1) * across.sum(1)
    return down, across, 1 - area / (height * width)


def _span(keys: Tensor, stream: int, *, side: Tensor, length: int) -> Tensor:
    """Bool (B, length): positions within a span of floor(side * length) around a uniform centre."""
    size = (side * length).floor()
    start = (seeding.uniform_tensor(keys, stream) * length).floor() - (size / 2).floor()
    return image_ops.spans(start[:, None], size[:, None], length)


def _partners(rows: Tensor, half: int) -> Tensor:
    return torch.cat([rows[half:], rows[:half]])  # unlike roll, this keeps the memory format


@functools.lru_cache(maxsize=8)
def _quantiles(alpha: float) -> Tensor:
    return torch.from_numpy(special.betaincinv(alpha, alpha, np.linspace(0, 1, KNOTS + 1))).float()
