"""Scores of logits, as pure functions for training, evaluation and reports."""

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


def guesses(logits: np.ndarray) -> np.ndarray:
    """The class (N,) of each row's largest logit; -1, which is no class, where a logit is not finite."""
    finite = np.isfinite(logits).all(axis=1)
    return np.where(finite, np.nan_to_num(logits).argmax(1), -1)


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of rows whose largest logit is that of the label; 0 without rows."""
    return int((guesses(logits) == labels).sum()) / max(len(labels), 1)


def macro_recall(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean recall over the classes that occur in `labels`: balanced accuracy."""
    right, actual, _ = _counts(logits, labels)
    return float((right / actual).mean())


def macro_f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean F1 over the classes that occur in `labels`."""
    right, actual, guessed = _counts(logits, labels)
    return float((2 * right / (actual + guessed)).mean())


def _counts(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each class that occurs in `labels`: the rows that are right, that have it, and that are guessed to have it.

    Not scikit-learn's functions: checking their input takes them a millisecond, a bootstrap 2000 times as much.
    """
    guess, size = guesses(logits), max(logits.shape[1], int(labels.max(initial=0)) + 1)
    right, actual, guessed = (
        np.bincount(rows, minlength=size) for rows in (labels[guess == labels], labels, guess[guess >= 0])
    )
    present = actual > 0
    return right[present], actual[present], guessed[present]


def f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """F1 of the second of two classes; macro F1 of more."""
    if logits.shape[1] > 2:
        return macro_f1(logits, labels)
    from sklearn.metrics import f1_score

    return float(f1_score(labels, guesses(logits), labels=[1], average="macro", zero_division=0))


def auc(logits: np.ndarray, labels: np.ndarray) -> float:
    """The area under the ROC curve: of the second of two classes, else the mean over each class against the others.

    Of the classes that occur in `labels`; 0.5 when only one does, as nothing can be told apart.
    """
    from scipy.stats import rankdata

    probs = softmax(logits)
    classes = np.array([1]) if probs.shape[1] == 2 else np.unique(labels)
    if len(np.unique(labels)) < 2:
        return 0.5
    ranks = rankdata(probs[:, classes], axis=0)  # ties share their mean rank
    positive = labels[:, None] == classes
    n = positive.sum(0)
    above = np.where(positive, ranks, 0.0).sum(0) - n * (n + 1) / 2  # pairs in the right order, ties by half
    return float((above / (n * (len(labels) - n))).mean())


def quadratic_kappa(logits: np.ndarray, labels: np.ndarray) -> float:
    """Cohen's kappa with quadratic weights, for classes in an order, that of classes.csv; 1 when all is right."""
    classes, guess = np.arange(logits.shape[1], dtype=np.float64), logits.argmax(1)
    expected = (
        (classes[labels] ** 2).mean() + (classes[guess] ** 2).mean()
        - 2 * classes[labels].mean() * classes[guess].mean()
    )  # fmt: skip
    observed = ((classes[labels] - classes[guess]) ** 2).mean()
    return 1.0 if observed == 0 else float(1 - observed / expected)


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
    guess = guesses(logits)
    low, high = wilson(int((guess == labels).sum()), len(labels))
    all_finite = bool(np.isfinite(logits).all())
    binary = {}
    if logits.shape[1] == 2:
        from sklearn.metrics import precision_recall_fscore_support

        values = precision_recall_fscore_support(labels, guess, labels=[1], zero_division=0)
        binary = {name: float(value[0]) for name, value in zip(BINARY, values, strict=False)}
    return {
        "n": len(labels),
        "top1": top1(logits, labels),
        "top1_low": low,
        "top1_high": high,
        "top5": _top_k(logits, labels, 5) if all_finite else float("nan"),
        "macro_recall": macro_recall(logits, labels),
        "macro_f1": macro_f1(logits, labels),
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
