"""The score by select.metric on saved logits: its value and interval, and the order in which ensembling chooses.

Clean images are scored as they are handed in, by the mean over the views; S, and corrupted images, at a single view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fastflower.core import metric, scores
from fastflower.evaluation.logits import Logits, LogitsInfo
from fastflower.evaluation.records import MetricScore, Top1

SMOOTH = {"clean", "corrupted", "combo", "log_loss"}
DRAWS = 200  # of the bootstrap: an AUC of many classes is slow

Data = Logits[LogitsInfo]
Rating = Callable[[np.ndarray, np.ndarray], tuple[float, ...]]


def single_view_score(data: Sequence[Data], text: str, alpha: float) -> float:
    """The score of select.metric on the images of all sets together, at the single view of training."""
    parsed = metric.parse(text)
    labels = np.concatenate([part.class_idx for part in data])
    measured = parsed.measure(np.concatenate([part.single for part in data]), labels)
    return parsed.score(measured, _mean(np.concatenate([corrupted_hits(part) for part in data])), alpha)


def metric_score(data: Data, text: str, alpha: float, *, clean: Top1, s: Top1) -> MetricScore:
    """The score of select.metric with its 95% interval, by a bootstrap of the images within each class.

    Top-1 and S alone are given, with Wilson's interval. Images are drawn together with their corrupted copies.
    """
    known = {"clean": clean, "combo": s}.get(text)
    if known:
        return MetricScore(metric=text, n=known.n, value=known.top1, low=known.top1_low, high=known.top1_high)
    value = scorer(data, text, alpha)
    low, high = bootstrapped(data.class_idx, value)
    return MetricScore(metric=text, n=len(data), value=value(np.arange(len(data))), low=low, high=high)


def scorer(data: Data, text: str, alpha: float) -> Callable[[np.ndarray], float]:
    """The score of select.metric, as people read it, as a function of the rows of a set; a row may be there twice."""
    parsed = metric.parse(text)
    hits, of_s = corrupted_hits(data), sum(weight for weight, name in parsed.terms if name == "combo")

    def value(rows: np.ndarray) -> float:
        labels = data.class_idx[rows]
        measured = parsed.measure(data.logits[rows], labels)
        score = parsed.score(measured, _mean(hits[rows] if len(hits) else hits), alpha)
        if of_s:  # it is that of a single view
            share = of_s * (alpha if len(hits) else 1.0)
            score += share * (scores.top1(data.single[rows], labels) - scores.top1(data.logits[rows], labels))
        return parsed.shown(score)

    return value


def bootstrapped(labels: np.ndarray, value: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """The ends of the 95% interval of a function of rows, by drawing the images (N,) anew within each class."""
    rng, order = np.random.default_rng(0), np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    sizes = sizes[sizes > 0]
    first, size = np.repeat(np.cumsum(sizes) - sizes, sizes), np.repeat(sizes, sizes)
    drawn = [value(order[first + (rng.random(len(order)) * size).astype(np.int64)]) for _ in range(DRAWS)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def clean_score(logits: np.ndarray, labels: np.ndarray, text: str) -> float:
    """The score of select.metric by clean images alone, which stand in for corrupted ones; higher is better."""
    parsed = metric.parse(text)
    return parsed.score(parsed.measure(logits, labels), scores.top1(logits, labels), 1.0)


def rating(text: str) -> Rating:
    """The function by which ensembling compares log-probabilities (N, C) on labels (N,): a higher tuple is better.

    Top-1 and log loss are rated by the likelihood, of which top-1 is a coarse count. Other metrics are rated by
    themselves, and by the likelihood where they are equal. Clean images stand in for corrupted ones.
    """
    smooth = SMOOTH.issuperset(metric.parse(text).names)

    def rate(log_p: np.ndarray, labels: np.ndarray) -> tuple[float, ...]:
        likelihood = round(-scores.nll(log_p, labels), 9)
        return (likelihood,) if smooth else (round(clean_score(log_p, labels, text), 9), likelihood)

    return rate


def corrupted_hits(data: Data) -> np.ndarray:
    """The fraction (N,) of each image's corrupted copies that are predicted right; (0,) without corrupted copies."""
    if not len(data.combos):
        return np.empty(0)
    hits: np.ndarray = (data.corrupt.argmax(2) == data.class_idx).mean(0)
    return hits


def _mean(hits: np.ndarray) -> float | None:
    return float(hits.mean()) if len(hits) else None
