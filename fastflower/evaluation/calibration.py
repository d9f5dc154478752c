"""Temperature scaling (Guo et al. 2017, arXiv:1706.04599): divide logits by the T that minimises the NLL."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from fastflower.core import scores
from fastflower.evaluation.logits import Logits, LogitsInfo
from fastflower.evaluation.records import TemperatureFit

LOWEST, HIGHEST = 0.01, 100.0


def fit(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The T > 0 that minimises the (weighted) NLL of logits (N, C) / T; on log T, so it cannot leave (0, inf)."""
    z = logits.astype(np.float64)
    z -= z.max(1, keepdims=True)
    z_label = z[np.arange(len(labels)), labels]

    def loss(log_t: float) -> float:
        beta = math.exp(-log_t)
        return float(np.average(logsumexp(z * beta, axis=1) - z_label * beta, weights=weights))

    bounds = (math.log(LOWEST), math.log(HIGHEST))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def fit_set(data: Logits[LogitsInfo], fit_on: str, *, alpha: float, bins: int) -> TemperatureFit:
    """Fit T on the `clean` or the `combo` images of a set, with NLL and ECE of its clean images before and after.

    combo: the weights of clean images sum to alpha, those of corrupted images (one view) to 1 - alpha.
    """
    labels = data.class_idx
    if fit_on == "combo" and len(data.combos):
        kinds, n, classes = data.corrupt.shape
        logits = np.concatenate([data.logits, data.corrupt.reshape(kinds * n, classes)])
        weights = np.concatenate([np.full(n, alpha / n), np.full(kinds * n, (1 - alpha) / (kinds * n))])
        t = fit(logits, np.concatenate([labels, np.tile(labels, kinds)]), weights)
    else:
        fit_on = "clean"
        t = fit(data.logits, labels)
    before, after = data.logits, data.logits / t
    return TemperatureFit(
        t=t,
        fit_on=fit_on,
        n=len(labels),
        nll_before=scores.nll(before, labels),
        nll_after=scores.nll(after, labels),
        ece_before=scores.ece(scores.softmax(before), labels, bins),
        ece_after=scores.ece(scores.softmax(after), labels, bins),
    )
