"""The score that a split would have shown with near-duplicates on both sides.

A plain stratified split trains on copies of some images that it validates. The same out-of-fold predictions are scored
with this leak left in: an image with a near-duplicate among the training images of such a split counts as predicted by
the label of its copies there, as a network that remembers its training images would. So the difference is what
remembering alone can add; a network that remembers less gains less.
"""

from __future__ import annotations

import warnings

import numpy as np

from fastflower.data.folds import Folds
from fastflower.evaluation.logits import Logits, LogitsInfo
from fastflower.evaluation.measured import Leak
from fastflower.evaluation.paired import paired_gain

DRAWS = 20  # of the plain split


def measure(fused: Logits[LogitsInfo], folds: Folds, splits: int) -> Leak:
    """The leak of stratified splits in `splits` parts, the mean of several, on the images of a fused set."""
    honest = (fused.logits.argmax(1) == fused.class_idx).astype(np.float64)
    sizes = np.bincount(folds.group)
    copies = np.flatnonzero(sizes[folds.group[fused.index]] > 1)
    by_group = np.split(np.argsort(folds.group, kind="stable"), np.cumsum(sizes)[:-1])
    mates = {row: by_group[folds.group[fused.index[row]]] for row in copies.tolist()}
    with_leak, leaked = honest.copy(), 0.0
    if len(copies):
        with_leak[copies] = 0
        for draw in range(DRAWS):
            part = plain_split(folds, splits, draw)
            for row, group in mates.items():
                image = fused.index[row]
                training = group[(part[group] != part[image]) & (group != image)]
                leaked += bool(len(training)) / DRAWS
                hit = honest[row]
                if len(training):
                    hit = float(np.bincount(folds.class_idx[training]).argmax() == folds.class_idx[image])
                with_leak[row] += hit / DRAWS
    return Leak(
        n=len(fused),
        splits=splits,
        copies=len(copies),
        leaked=leaked,
        top1=float(honest.mean()),
        inflation=paired_gain(honest, with_leak),
    )


def plain_split(folds: Folds, splits: int, seed: int) -> np.ndarray:
    """The part (N,) of each row in a stratified split that knows no groups; -1 for rows that always train."""
    from sklearn.model_selection import StratifiedKFold  # here: its import takes two seconds

    part, rows = np.full(len(folds), -1), np.flatnonzero(folds.fold >= 0)
    labels = folds.class_idx[rows]
    splits = min(splits, int(np.bincount(labels).max()))
    if splits < 2:
        part[rows] = 0
        return part
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)  # classes rarer than the number of parts
        divided = StratifiedKFold(splits, shuffle=True, random_state=seed).split(labels, labels)
        for number, (_, inside) in enumerate(divided):
            part[rows[inside]] = number
    return part
