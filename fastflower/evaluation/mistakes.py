"""Which images and classes a set of logits gets wrong: plain rows, ready for tables and pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from fastflower.core import scores
from fastflower.core.tables import shown
from fastflower.evaluation.logits import Logits


def examined(data: Logits, t: float) -> dict[str, Any]:
    """Everything below about one set, under the names it has in scores.json; probabilities at temperature t."""
    parts = {int(fold): data.take(np.flatnonzero(data.fold == fold)) for fold in np.unique(data.fold)}
    return {
        "wrong": wrong(data),
        "confusion": confusion(data),
        "confusion_by_fold": {str(fold): confusion(part) for fold, part in parts.items()},
        "pairs": confused_pairs(data, t),
        "mistakes": worst(data, t),
        "right": right(data, t),
        "suspects": suspects(data, t),
    }


def confusion(data: Logits) -> list[list[int]]:
    """The non-zero cells of the confusion matrix: [true class_idx, predicted class_idx, images]."""
    classes = data.logits.shape[1]
    counts = confusion_matrix(data.class_idx, data.logits.argmax(1), labels=np.arange(classes))
    return [[int(i), int(j), int(counts[i, j])] for i, j in zip(*np.nonzero(counts), strict=True)]


def image(data: Logits, probs: np.ndarray, *, row: int, top: int = 5) -> dict[str, Any]:
    """One image: where it lies, its label, its prediction and the most likely classes with probabilities."""
    order = np.argsort(-probs[row], kind="stable")[:top]
    label = int(data.class_idx[row])
    return {
        "index": int(data.index[row]),
        "fold": int(data.fold[row]),
        "filename": shown(str(data.filename[row])),
        "label": label,
        "guess": int(order[0]),
        "p_label": float(probs[row, label]),
        "p_guess": float(probs[row, order[0]]),
        "loss": float(-np.log(max(probs[row, label], 1e-12))),
        "top": [[int(c), float(probs[row, c])] for c in order],
    }


def wrong(data: Logits) -> list[list[int]]:
    """[row of folds.csv, fold] of every image that is predicted wrongly."""
    rows = np.flatnonzero(data.logits.argmax(1) != data.class_idx)
    return [[int(data.index[row]), int(data.fold[row])] for row in rows]


def worst(data: Logits, t: float, count: int = 100) -> list[dict[str, Any]]:
    """The wrong images with the highest loss, probabilities at temperature t."""
    probs = scores.softmax(data.logits / t)
    wrong = np.flatnonzero(probs.argmax(1) != data.class_idx)
    order = wrong[np.argsort(probs[wrong, data.class_idx[wrong]], kind="stable")]
    return [image(data, probs, row=row) for row in order[:count]]


def right(data: Logits, t: float, count: int = 48) -> list[dict[str, Any]]:
    """Right images spread evenly over the range of confidence, for comparison with the wrong ones."""
    probs = scores.softmax(data.logits / t)
    good = np.flatnonzero(probs.argmax(1) == data.class_idx)
    order = good[np.argsort(-probs[good].max(1), kind="stable")]
    places = np.unique(np.linspace(0, max(len(order) - 1, 0), min(count, len(order))).astype(int))
    return [image(data, probs, row=row) for row in order[places]]


def confused_pairs(data: Logits, t: float, *, count: int = 10, examples: int = 3) -> list[dict[str, Any]]:
    """Pairs of classes by the number of images that went either way.

    Each has wrong images of both directions, and the most typical right image of each class.
    """
    probs = scores.softmax(data.logits / t)
    guess, label = probs.argmax(1), data.class_idx
    classes = probs.shape[1]
    counts = confusion_matrix(label, guess, labels=np.arange(classes))
    both = np.triu(counts + counts.T, 1)
    order = np.argsort(-both, axis=None, kind="stable")[:count]
    pairs = []
    for a, b in zip(*np.unravel_index(order, both.shape), strict=True):
        if not both[a, b]:
            break
        crossed = ((label == a) & (guess == b)) | ((label == b) & (guess == a))
        rows = np.flatnonzero(crossed)
        rows = rows[np.argsort(-probs[rows].max(1), kind="stable")][:examples]
        pairs.append(
            {
                "a": int(a),
                "b": int(b),
                "a_as_b": int(counts[a, b]),
                "b_as_a": int(counts[b, a]),
                "wrong": [image(data, probs, row=row) for row in rows],
                "typical": [typical(data, probs, int(c)) for c in (a, b)],
            }
        )
    return pairs


def typical(data: Logits, probs: np.ndarray, class_idx: int) -> dict[str, Any] | None:
    """The right image of a class with the highest probability; None when all are wrong."""
    rows = np.flatnonzero((data.class_idx == class_idx) & (probs.argmax(1) == class_idx))
    return image(data, probs, row=int(rows[probs[rows, class_idx].argmax()])) if len(rows) else None


def suspects(data: Logits, t: float, count: int = 24) -> list[dict[str, Any]]:
    """Likely label errors: confident disagreement (confident learning, Northcutt et al. 2021, arXiv:1911.00068).

    A class is confident in an image when its probability reaches the mean it has on images that bear its
    label. Images whose most likely confident class is not their label, by how far it exceeds the label's.
    """
    probs, label = scores.softmax(data.logits / t), data.class_idx
    classes = probs.shape[1]
    bar = np.full(classes, np.inf)
    for c in np.unique(label):
        bar[c] = probs[label == c, c].mean()
    confident = np.where(probs >= bar, probs, -1.0)
    other = confident.argmax(1)
    rows = np.flatnonzero((confident.max(1) >= 0) & (other != label))
    margin = probs[rows, other[rows]] - probs[rows, label[rows]]
    order = rows[np.argsort(-margin, kind="stable")]
    return [{**image(data, probs, row=row), "other": int(other[row])} for row in order[:count]]
