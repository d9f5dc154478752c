"""Temperature scaling (Guo et al. 2017, arXiv:1706.04599): divide logits by the T that minimises the NLL.

Few images say little about T, so log T has a normal prior around 0, worth a fraction of an image's NLL; among hundreds
of images it changes T by less than its own uncertainty. Images of one class, or without an error, say nothing: the NLL
then falls forever as T goes to 0, and probabilities would tie at 0 and 1. T stays 1 there.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import logsumexp

from fastflower.core import scores
from fastflower.evaluation.logits import Logits, LogitsInfo
from fastflower.evaluation.records import TemperatureFit

LOWEST, HIGHEST = 0.05, 20.0  # beyond them, probabilities of different images round to equal ones
PRIOR_STD = 1.0  # of log T: T is within a factor of e of 1 for two networks in three


def fit(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The T in LOWEST..HIGHEST that minimises the (weighted) NLL of logits (N, C) / T, minus the log of the prior.

    The prior counts against the effective number of images, (sum of weights)^2 / (sum of their squares).
    """
    images = len(labels) if weights is None else float(weights.sum() ** 2 / np.square(weights).sum())
    from scipy.optimize import minimize_scalar  # here: half a second, which a refusal does not spend

    z = logits.astype(np.float64)
    z -= z.max(1, keepdims=True)
    z_label = z[np.arange(len(labels)), labels]

    def loss(log_t: float) -> float:
        beta = math.exp(-log_t)
        nll = float(np.average(logsumexp(z * beta, axis=1) - z_label * beta, weights=weights))
        return nll + (log_t / PRIOR_STD) ** 2 / (2 * images)

    bounds = (math.log(LOWEST), math.log(HIGHEST))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def silence(logits: np.ndarray, labels: np.ndarray) -> str:
    """The reason why the images cannot tell T; empty when they can."""
    if len(np.unique(labels)) < 2:
        return "all images are of one class"
    if (logits.argmax(1) == labels).all():
        return f"none of the {len(labels)} images is predicted wrongly"
    return ""


def note(t: float, reason: str) -> str:
    """The line for people on a T that the images did not decide; empty when they did."""
    if reason:
        return f"T stays 1: {reason}, which cannot tell how confident the network should be"
    if not 1.01 * LOWEST < t < HIGHEST / 1.01:
        return (
            f"T = {t:.3g} is at the limit of {LOWEST:g} to {HIGHEST:g}; the logits hardly follow the labels"
        )
    return ""


def fit_set(data: Logits[LogitsInfo], fit_on: str, *, alpha: float, bins: int) -> TemperatureFit:
    """Fit T on the `clean` or the `combo` images of a set, with NLL and ECE of its clean images before and after.

    combo: the weights of clean images sum to alpha, those of corrupted images (one view) to 1 - alpha.
    """
    labels = data.class_idx
    if fit_on == "combo" and len(data.combos):
        kinds, n, classes = data.corrupt.shape
        logits = np.concatenate([data.logits, data.corrupt.reshape(kinds * n, classes)])
        weights = np.concatenate([np.full(n, alpha / n), np.full(kinds * n, (1 - alpha) / (kinds * n))])
        fitted = np.tile(labels, 1 + kinds)
    else:
        fit_on, logits, fitted, weights = "clean", data.logits, labels, None
    reason = silence(logits, fitted)
    t = 1.0 if reason else fit(logits, fitted, weights)
    before, after = data.logits, data.logits / t
    return TemperatureFit(
        t=t,
        fit_on=fit_on,
        n=len(labels),
        nll_before=scores.nll(before, labels),
        nll_after=scores.nll(after, labels),
        ece_before=scores.ece(scores.softmax(before), labels, bins),
        ece_after=scores.ece(scores.softmax(after), labels, bins),
        note=note(t, reason),
    )
