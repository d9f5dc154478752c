"""The error analysis of a set of logits: confusion matrix, worst mistakes, confused pairs, likely label errors."""

from __future__ import annotations

import numpy as np

from fastflower.core import scores
from fastflower.core.tables import escaped
from fastflower.evaluation.logits import Logits, LogitsInfo
from fastflower.evaluation.records import ConfusedPair, ErrorAnalysis, ImageScores, Suspect

Data = Logits[LogitsInfo]
TRUSTED = 0.8  # agreement with the labels that both classes of a suspicion need


def error_analysis(data: Data, t: float) -> ErrorAnalysis:
    """All analyses of one set; probabilities use temperature t."""
    by_fold = {int(fold): data.take(np.flatnonzero(data.fold == fold)) for fold in np.unique(data.fold)}
    return ErrorAnalysis(
        wrong=wrong_images(data),
        confusion=confusion_cells(data),
        confusion_by_fold={fold: confusion_cells(part) for fold, part in by_fold.items()},
        pairs=confused_pairs(data, t),
        mistakes=worst_mistakes(data, t),
        right=right_images(data, t),
        suspects=suspects(data, t),
    )


def confusion_cells(data: Data) -> list[tuple[int, int, int]]:
    """The non-zero cells of the confusion matrix: (label, guess, images)."""
    classes = data.logits.shape[1]
    counts = _confusion(data.class_idx, data.logits.argmax(1), classes)
    return [(int(i), int(j), int(counts[i, j])) for i, j in zip(*np.nonzero(counts), strict=True)]


def image_scores(data: Data, probs: np.ndarray, *, row: int, top: int = 5) -> ImageScores:
    """The record of one image, from the probabilities (N, C) of its set."""
    order = np.argsort(-probs[row], kind="stable")[:top]
    label = int(data.class_idx[row])
    return ImageScores(
        index=int(data.index[row]),
        fold=int(data.fold[row]),
        filename=escaped(str(data.filename[row])),
        label=label,
        guess=int(order[0]),
        p_label=float(probs[row, label]),
        p_guess=float(probs[row, order[0]]),
        loss=float(-np.log(max(probs[row, label], 1e-12))),
        top=[(int(c), float(probs[row, c])) for c in order],
    )


def wrong_images(data: Data) -> list[tuple[int, int]]:
    """(row of folds.csv, fold) of every image that is predicted wrongly."""
    rows = np.flatnonzero(data.logits.argmax(1) != data.class_idx)
    return [(int(data.index[row]), int(data.fold[row])) for row in rows]


def worst_mistakes(data: Data, t: float, count: int = 100) -> list[ImageScores]:
    """The wrong images with the highest loss."""
    probs = scores.softmax(data.logits / t)
    wrong = np.flatnonzero(probs.argmax(1) != data.class_idx)
    order = wrong[np.argsort(probs[wrong, data.class_idx[wrong]], kind="stable")]
    return [image_scores(data, probs, row=row) for row in order[:count]]


def right_images(data: Data, t: float, count: int = 48) -> list[ImageScores]:
    """Right images spread evenly over the range of confidence, for comparison with the wrong ones."""
    probs = scores.softmax(data.logits / t)
    right = np.flatnonzero(probs.argmax(1) == data.class_idx)
    order = right[np.argsort(-probs[right].max(1), kind="stable")]
    picks = np.unique(np.linspace(0, max(len(order) - 1, 0), min(count, len(order))).astype(int))
    return [image_scores(data, probs, row=row) for row in order[picks]]


def confused_pairs(data: Data, t: float, *, count: int = 10, examples: int = 3) -> list[ConfusedPair]:
    """The pairs of classes with the most images confused in either direction.

    Each has wrong images of both directions, and the most typical right image of each class.
    """
    probs = scores.softmax(data.logits / t)
    guess, label = probs.argmax(1), data.class_idx
    classes = probs.shape[1]
    counts = _confusion(label, guess, classes)
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
            ConfusedPair(
                a=int(a),
                b=int(b),
                a_as_b=int(counts[a, b]),
                b_as_a=int(counts[b, a]),
                wrong=[image_scores(data, probs, row=row) for row in rows],
                typical=[typical(data, probs, int(c)) for c in (a, b)],
            )
        )
    return pairs


def typical(data: Data, probs: np.ndarray, class_idx: int) -> ImageScores | None:
    """The right image of a class with the highest probability; None when all are wrong."""
    rows = np.flatnonzero((data.class_idx == class_idx) & (probs.argmax(1) == class_idx))
    return image_scores(data, probs, row=int(rows[probs[rows, class_idx].argmax()])) if len(rows) else None


def suspects(data: Data, t: float, count: int = 24) -> list[Suspect]:
    """Likely label errors by confident learning (Northcutt et al. 2021, arXiv:1911.00068), largest margin first.

    A class is confident in an image when its probability reaches its mean over the images with that label. An image
    is suspect when its most likely confident class is not its label; the margin is between their probabilities.
    Only classes that the members know are compared, or their mistakes would outnumber those of the labels: of the
    images most confidently assigned to the suggested class, and of the images of the label's, TRUSTED agree with it.
    """
    probs, label = scores.softmax(data.logits / t), data.class_idx
    classes = probs.shape[1]
    thresholds = np.full(classes, np.inf)
    for c in np.unique(label):
        thresholds[c] = probs[label == c, c].mean()
    confident = np.where(probs >= thresholds, probs, -1.0)
    suggested = confident.argmax(1)
    assigned = confident.max(1) >= 0
    kept = np.bincount(suggested[assigned & (suggested == label)], minlength=classes)
    trusted = kept >= TRUSTED * np.maximum(np.bincount(suggested[assigned], minlength=classes), 1)
    found = np.bincount(label[probs.argmax(1) == label], minlength=classes)
    known = found >= TRUSTED * np.maximum(np.bincount(label, minlength=classes), 1)
    rows = np.flatnonzero(assigned & (suggested != label) & trusted[suggested] & known[label])
    margin = probs[rows, suggested[rows]] - probs[rows, label[rows]]
    order = rows[np.argsort(-margin, kind="stable")]
    return [
        Suspect(**vars(image_scores(data, probs, row=row)), suggested=int(suggested[row]))
        for row in order[:count]
    ]


def _confusion(labels: np.ndarray, guesses: np.ndarray, classes: int) -> np.ndarray:
    """The confusion matrix (label, guess), int64 (C, C)."""
    from sklearn.metrics import confusion_matrix  # here: its import takes two seconds

    return confusion_matrix(labels, guesses, labels=np.arange(classes))
