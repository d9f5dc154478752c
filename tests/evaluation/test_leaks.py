"""The score with near-duplicates on both sides of the split: by hand on a few images, and by simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fastflower.data.folds import Folds
from fastflower.evaluation import leaks
from fastflower.evaluation.logits import assemble, fuse
from support import fake_members


def scored(groups: np.ndarray) -> tuple:
    """A fused set of three folds, and its folds with these groups (120,)."""
    labels, column = fake_members.labels(), fake_members.folds()
    names = [f"image_{row}.jpg" for row in range(120)]
    folds = Folds(
        filenames=names, category_ids=[fake_members.IDS[c] for c in labels], class_idx=labels, fold=column,
        group=groups, sha256=names,
    )  # fmt: skip
    members = [fake_members.member(fold, skill=0.5) for fold in (0, 1, 2)]
    return fuse([assemble(members, column)]), folds


def test_without_near_duplicates_nothing_leaks() -> None:
    fused, folds = scored(np.arange(120))
    leak = leaks.measure(fused, folds, 3)
    assert (leak.copies, leak.leaked, leak.inflation.gain, leak.line) == (0, 0, 0, "")


def test_the_leak_is_that_of_copies_which_the_plain_split_trains_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 2 and 3 are copies, 4 and 5 too; the plain split parts the first two alone."""
    groups = np.arange(120)
    groups[3], groups[5] = 2, 4
    fused, folds = scored(groups)
    folds = replace(folds, class_idx=folds.class_idx.copy())
    part = np.zeros(120, dtype=int)
    part[3] = 1
    monkeypatch.setattr(leaks, "plain_split", lambda *_: part)
    leak = leaks.measure(fused, folds, 3)
    honest = fused.logits.argmax(1) == fused.class_idx
    answered = [folds.class_idx[3] == folds.class_idx[2]] * 2
    before = honest[np.isin(fused.index, [2, 3])]
    assert leak.copies == 4 and leak.leaked == pytest.approx(2)
    assert leak.inflation.gain == pytest.approx((np.sum(answered) - before.sum()) / len(honest))
    assert leak.top1 == honest.mean()


def test_the_share_of_leaking_copies_is_that_of_random_parts() -> None:
    """Pairs with equal labels lie in one of three parts with probability a third, and are right where they do not."""
    labels = fake_members.labels()
    groups = np.arange(120)
    for c in range(6):
        rows = np.flatnonzero(labels == c)[: 2 * (np.sum(labels == c) // 2)]
        groups[rows[1::2]] = groups[rows[::2]]
    fused, folds = scored(groups)
    leak = leaks.measure(fused, folds, 3)
    assert leak.copies >= 100 and leak.leaked / leak.copies == pytest.approx(2 / 3, abs=0.1)
    wrong = 1 - leak.top1
    assert leak.inflation.gain == pytest.approx(wrong * leak.leaked / leak.n, abs=0.06)
    assert leak.inflation.low > 0 and "would have been inflated by up to +0." in leak.line
    part = leaks.plain_split(folds, 3, 0)
    assert (part[:2] == -1).all() and set(part[2:]) == {0, 1, 2}
