"""MixUp and CutMix on whole batches, never both: soft targets, a share for each row, no global random state.

MixUp: Zhang et al., "mixup: Beyond Empirical Risk Minimization"; CutMix: Yun et al., "CutMix: Regularization
Strategy to Train Strong Classifiers with Localizable Features". Published recipes draw one share a batch; one
a row gives the same distribution and less variance.
"""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special
from torch import Tensor

from fastflower.core import seeding

Kind = Literal["none", "mixup", "cutmix"]
WHETHER, WHICH, SHARE, CENTRE_ROW, CENTRE_COLUMN = range(3000, 3005)  # streams
KNOTS = 4096


def choose(
    seed: int, epoch: int, *, step: int, prob: float, switch: float, mixup: float, cutmix: float
) -> Kind:
    """What happens to the global batch of a step, the same on every rank.

    It is mixed at all with probability `prob`, and then by CutMix with probability `switch`. A method whose
    Beta parameter is 0 leaves its share to the other.
    """
    if not (mixup or cutmix):
        return "none"
    key = seeding.row_keys(seed, epoch, positions=np.array(step), rows=np.array(0))
    if seeding.uniform(key, WHETHER) >= prob:
        return "none"
    if mixup and cutmix:
        return "cutmix" if seeding.uniform(key, WHICH) < switch else "mixup"
    return "mixup" if mixup else "cutmix"


def mix(
    images: Tensor,
    labels: Tensor,
    *,
    keys: Tensor,
    num_classes: int,
    kind: Kind,
    alpha: float,
    teacher: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix each row i with row (i + B/2) mod B.

    Images are float (B, 3, H, W), labels and keys int64 (B,). Returns images of the same dtype and format,
    and float32 targets (B, num_classes) whose rows sum to 1; a teacher's probabilities (B, C) are mixed alike and
    stand to their right. Ranks that hold every world-th row of a global
    batch meet the same pairs as one rank would, if their batches are even. A batch of one stays as it is.
    """
    targets = F.one_hot(labels, num_classes).float()
    if teacher is not None:
        targets = torch.cat([targets, teacher], dim=1)
    half = len(images) // 2
    if kind == "none" or half == 0:
        return images, targets
    share = beta(keys, alpha)
    if kind == "mixup":
        visible = (1 - share)[:, None, None, None]
    else:
        visible, share = boxes(keys, share, *images.shape[2:])
    visible = visible.to(images.dtype)
    share = share[:, None]
    mixed = _partners(images, half).mul_(visible).add_(images * (1 - visible))
    return mixed, targets * share + _partners(targets, half) * (1 - share)


def beta(keys: Tensor, alpha: float) -> Tensor:
    """Float32 (B,) from Beta(alpha, alpha): the inverse distribution function at each key's uniform number.

    The function is interpolated between 4097 knots: its probabilities are right within 1/4096 everywhere,
    shares within 1e-4 on average. Only products and sums, so the same on every device.
    """
    table = _quantiles(alpha, keys.device)
    place = seeding.uniform_tensor(keys, SHARE) * KNOTS
    knot = place.long()
    low, high = table[knot], table[knot + 1]
    return low + (high - low) * (place - knot)


def boxes(keys: Tensor, share: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Bool (B, 1, H, W), true in the CutMix box, and the share of pixels outside it, float32 (B,).

    Sides are sqrt(1 - share) of the image, the centre is uniform, and what reaches over the border is cut
    off.
    """
    side = (1 - share.double()).sqrt()
    down, across = (
        _span(keys, CENTRE_ROW, side=side, length=height),
        _span(keys, CENTRE_COLUMN, side=side, length=width),
    )
    area = down.sum(1) * across.sum(1)
    return (down[:, :, None] & across[:, None])[:, None], 1 - area / (height * width)


def _span(keys: Tensor, stream: int, *, side: Tensor, length: int) -> Tensor:
    """Bool (B, length): places within a span of floor(side * length) around a uniform centre."""
    size = (side * length).floor()
    start = (seeding.uniform_tensor(keys, stream) * length).floor() - (size / 2).floor()
    place = torch.arange(length, device=keys.device)
    return (place >= start[:, None]) & (place < (start + size)[:, None])


def _partners(rows: Tensor, half: int) -> Tensor:
    return torch.cat([rows[half:], rows[:half]])  # unlike roll, this keeps the memory format


@functools.lru_cache(maxsize=8)
def _quantiles(alpha: float, device: torch.device) -> Tensor:
    knots = special.betaincinv(alpha, alpha, np.linspace(0, 1, KNOTS + 1))
    return torch.from_numpy(knots).float().to(device)
