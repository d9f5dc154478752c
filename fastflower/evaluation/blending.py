"""Two more ways to combine runs: the mean of ranks, and hill climbing that stops by held-out images.

`stack` is (M, N, C), the logits of M runs on the same N images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import softmax

from fastflower.evaluation.selected import Rating


def rank_mean(stack: np.ndarray) -> np.ndarray:
    """The mean over the runs of each image's rank by the probability of each class, as log-probabilities (N, C).

    Ranks, among these images, make runs comparable whose probabilities are spread differently. The mean ranks are given
    back the runs' mean sorted probabilities, which keeps their order within each class, and makes classes comparable.
    """
    from scipy.stats import rankdata  # here: a second, which a refusal does not spend

    p = softmax(stack.astype(np.float64), axis=2)
    ranks = rankdata(p, axis=1).mean(0)  # ties share their mean rank
    values, n = np.sort(p, axis=1).mean(0), stack.shape[1]
    positions = (rankdata(ranks, axis=0) - 1) / max(n - 1, 1)
    fused = np.stack(
        [np.interp(positions[:, c], np.linspace(0, 1, n), values[:, c]) for c in range(stack.shape[2])],
        axis=1,
    )
    result: np.ndarray = np.log(np.maximum(fused, 1e-12))
    return result


def hill_climbing(
    stack: np.ndarray,
    labels: np.ndarray,
    *,
    parts: np.ndarray,
    rate: Rating,
    allows: Callable[[list[int]], bool],
    rounds: int = 40,
) -> np.ndarray:
    """Weights (M,) by forward selection with replacement (Caruana et al. 2004), stopped by held-out images.

    Each part (N,) is held out once: on the others, rounds add the run after which the mean of logits is rated best,
    even when its rating falls; the round that is best on the part counts. The weights are the means over the parts.
    Runs that `allows` refuses together are not added; those of different parts may exceed the limits together.
    """
    z, shares = stack.astype(np.float64), np.zeros(len(stack))
    for part in np.unique(parts):
        held_out = parts == part
        path = _climb(z[:, ~held_out], labels[~held_out], rate=rate, allows=allows, rounds=rounds)
        if not path:
            continue
        totals = np.cumsum(z[path][:, held_out], axis=0)
        scored = [rate(total / (turn + 1), labels[held_out]) for turn, total in enumerate(totals)]
        best = max(range(len(path)), key=lambda turn: scored[turn])
        shares += np.bincount(path[: best + 1], minlength=len(stack)) / (best + 1)
    return shares / max(shares.sum(), 1e-12)


def _climb(
    z: np.ndarray,
    labels: np.ndarray,
    *,
    rate: Rating,
    allows: Callable[[list[int]], bool],
    rounds: int,
) -> list[int]:
    """The runs in the order in which they are added."""
    chosen: list[int] = []
    total = np.zeros(z.shape[1:])
    for _ in range(rounds):
        options: Sequence[int] = [m for m in range(len(z)) if allows([*chosen, m])]
        if not options:
            break
        pick = max(options, key=lambda m: rate((total + z[m]) / (len(chosen) + 1), labels))
        chosen, total = [*chosen, pick], total + z[pick]
    return chosen
