"""Paired comparisons: two sets of predictions of the same images, with an interval and an exact test."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastflower.core.scores import Z95


@dataclass(frozen=True, kw_only=True)
class PairedGain:
    """The mean gain of one score over another on n images, its 95% interval, and p of no difference.

    gained and lost: images whose score rose and fell.
    """

    n: int
    gain: float
    low: float
    high: float
    gained: int
    lost: int
    p: float | None

    @property
    def p_text(self) -> str:
        """p to two digits."""
        return "-" if self.p is None else f"{self.p:.2g}"

    @property
    def text(self) -> str:
        """The gain with its interval and p."""
        p = "" if self.p is None else f", p = {self.p_text}"
        return f"{self.gain:+.4f} ({self.low:+.4f} to {self.high:+.4f}{p})"


def paired_gain(before: np.ndarray, after: np.ndarray, weights: np.ndarray | None = None) -> PairedGain:
    """The gain of scores `after` over `before` (N,), in 0..1, image by image: hits, or means of hits.

    The interval is Agresti and Min's (2005): Wald's after adding half an image to each cell of the table of hits, so
    that few images without a difference are no proof of none. p is of the exact sign test, which is McNemar's for hits.
    With weights of the images, their effective number counts, and there is no exact test.
    """
    difference = after.astype(np.float64) - before.astype(np.float64)
    shares = np.ones(len(difference)) if weights is None else weights * weights.sum() / (weights**2).sum()
    n = shares.sum()  # of images that count equally
    mean = float(shares @ difference) / (n + 2)
    spread = math.sqrt((shares @ difference**2 + 1) / (n + 2) - mean**2) / math.sqrt(n + 2)
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    return PairedGain(
        n=len(difference),
        gain=float(np.average(difference, weights=weights)),
        low=max(-1.0, mean - Z95 * spread),
        high=min(1.0, mean + Z95 * spread),
        gained=gained,
        lost=lost,
        p=sign_test(gained, lost) if weights is None else None,
    )


def gain_of_hits(n: int, *, gained: int, lost: int) -> PairedGain:
    """The gain of hits on n images, of which `gained` are newly right and `lost` newly wrong."""
    return paired_gain(np.zeros(n), np.repeat([1.0, -1.0, 0.0], [gained, lost, n - gained - lost]))


def sign_test(gained: int, lost: int) -> float:
    """The two-sided p of as uneven a split of gained and lost images by fair coins."""
    from scipy.stats import binomtest  # here: a second, which a refusal does not spend

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
