"""Scores of logits, as pure functions for training, evaluation and reports; computed by scikit-learn."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import log_softmax

BINARY = ("precision", "recall", "f1")
Z95 = 1.959963984540054  # half the width of a 95% interval, in standard deviations


def softmax(logits: np.ndarray) -> np.ndarray:
    """Class probabilities (N, C) in float64."""
    return np.exp(log_softmax(logits.astype(np.float64), axis=1))


def nll(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood: the plain cross-entropy, without smoothing, prior or margin."""
    return float(-log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels].mean())


def ece(probs: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error over equal-width confidence bins (Guo et al. 2017, arXiv:1706.04599)."""
    confidence, hit = probs.max(1), probs.argmax(1) == labels
    index = bin_index(confidence, bins)
    gaps = [
        abs(hit[index == b].mean() - confidence[index == b].mean()) * (index == b).mean()
        for b in np.unique(index)
    ]
    return float(sum(gaps))


def bin_index(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The bin (N,) of each confidence among `bins` bins of equal width, each closed above."""
    return np.clip(np.searchsorted(np.linspace(0, 1, bins + 1), confidence, side="left") - 1, 0, bins - 1)


def wilson(hits: float, n: int) -> tuple[float, float]:
    """The 95% interval of the fraction hits / n (Wilson 1927); `hits` may be fractional."""
    if n == 0:
        return 0.0, 1.0
    fraction, z = hits / n, Z95
    centre = fraction + z * z / (2 * n)
    spread = z * math.sqrt(fraction * (1 - fraction) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def scores(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> dict[str, float]:
    """Top-1 with its 95% interval, top-5, macro recall and F1, NLL and ECE of logits (N, C) against labels (N,).

    With two classes, also precision, recall and F1 of the second. Macro means are over the classes that occur in
    `labels`. A row with non-finite logits counts as wrong in top-1, recall and F1; top-5, NLL and ECE are then NaN.
    """
    # imported here: two seconds, which commands that read saved scores do not spend
    from sklearn.metrics import f1_score, precision_recall_fscore_support, recall_score

    finite = np.isfinite(logits).all(axis=1)
    classes = logits.shape[1]
    guess = np.where(finite, np.nan_to_num(logits).argmax(1), -1)
    hits, present = int((guess == labels).sum()), np.unique(labels)
    low, high = wilson(hits, len(labels))
    all_finite = bool(finite.all())
    binary = {}
    if classes == 2:
        values = precision_recall_fscore_support(labels, guess, labels=[1], zero_division=0)
        binary = {name: float(value[0]) for name, value in zip(BINARY, values, strict=False)}
    return {
        "n": len(labels),
        "top1": hits / max(len(labels), 1),
        "top1_low": low,
        "top1_high": high,
        "top5": _top_k(logits, labels, 5) if all_finite else float("nan"),
        "macro_recall": float(recall_score(labels, guess, labels=present, average="macro", zero_division=0)),
        "macro_f1": float(f1_score(labels, guess, labels=present, average="macro", zero_division=0)),
        "nll": nll(logits, labels) if all_finite else float("nan"),
        "ece": ece(softmax(logits), labels, bins) if all_finite else float("nan"),
        **binary,
    }


def combined(clean: float, corrupted: float | None, alpha: float) -> float:
    """The score S = alpha * clean + (1 - alpha) * corrupted; `clean` when there is no corrupted set."""
    return clean if corrupted is None else alpha * clean + (1 - alpha) * corrupted


def _top_k(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    if logits.shape[1] <= k:  # scikit-learn warns, and wants another shape for two classes
        return 1.0
    from sklearn.metrics import top_k_accuracy_score

    return float(top_k_accuracy_score(labels, logits, k=k, labels=np.arange(logits.shape[1])))
