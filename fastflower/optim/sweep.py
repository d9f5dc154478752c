"""The learning-rate range test (Smith, arXiv:1506.01186): rates that rise step by step, and what their losses say."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MEMORY = 0.95  # of the running mean that smooths the losses
RUINED = 4.0  # times the lowest smoothed loss: the sweep has seen enough


@dataclass(frozen=True)
class Suggestion:
    """lr: where the loss falls fastest. lowest: where it was lowest; from there on it rises."""

    lr: float
    lowest: float


def rates(low: float, high: float, steps: int) -> list[float]:
    """`steps` rates from low to high, each the same multiple of the one before."""
    return np.geomspace(low, high, steps).tolist()


def smoothed(losses: list[float]) -> list[float]:
    """Their running mean, without the pull towards 0 of its beginning."""
    mean, found = 0.0, []
    for step, loss in enumerate(losses, 1):
        mean = MEMORY * mean + (1 - MEMORY) * loss
        found.append(mean / (1 - MEMORY**step))
    return found


def ruined(losses: list[float]) -> bool:
    """Whether the last loss is not finite, or its running mean lies far above the lowest so far."""
    if not math.isfinite(losses[-1]):
        return True
    means = smoothed(losses)
    return means[-1] > RUINED * min(means)


def suggest(tried: list[float], losses: list[float]) -> Suggestion | None:
    """The rate at which the smoothed loss falls fastest per factor of lr, before its minimum; None: it never does."""
    finite = [(rate, loss) for rate, loss in zip(tried, losses, strict=True) if math.isfinite(loss)]
    if len(finite) < 5:
        return None
    logs, means = np.log([rate for rate, _ in finite]), np.array(smoothed([loss for _, loss in finite]))
    bottom = int(means.argmin())
    if bottom < 2:
        return None
    slopes = np.gradient(means, logs)[: bottom + 1]
    at = int(slopes.argmin())
    return Suggestion(finite[at][0], finite[bottom][0]) if slopes[at] < 0 else None
