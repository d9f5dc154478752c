"""Scores against scikit-learn and torchmetrics, and against written-out formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss, precision_score, recall_score
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from fastflower.core import scores


@pytest.fixture
def logits_and_labels() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 400)
    logits = rng.normal(size=(400, 7)).astype(np.float32)  # class 6 never occurs
    logits[np.arange(400), labels] += 1.5
    return logits, labels


def test_scores_equal_the_references(logits_and_labels):
    logits, labels = logits_and_labels
    computed, guess = scores.scores(logits, labels), logits.argmax(1)
    assert computed["n"] == 400
    assert computed["top1"] == pytest.approx(accuracy_score(labels, guess))
    assert computed["macro_recall"] == pytest.approx(
        recall_score(labels, guess, labels=range(6), average="macro")
    )
    assert computed["macro_f1"] == pytest.approx(f1_score(labels, guess, labels=range(6), average="macro"))
    assert computed["nll"] == pytest.approx(log_loss(labels, scores.softmax(logits), labels=range(7)))
    z, y = torch.from_numpy(logits), torch.from_numpy(labels)
    assert computed["top5"] == pytest.approx(multiclass_accuracy(z, y, 7, average="micro", top_k=5).item())
    assert computed["ece"] == pytest.approx(
        multiclass_calibration_error(z.softmax(1), y, 7, n_bins=15).item(), abs=1e-6
    )


def test_wilson_interval_of_a_known_case():
    low, high = scores.wilson(81, 263)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_non_finite_logits_count_as_wrong(logits_and_labels):
    logits, labels = logits_and_labels
    before = scores.scores(logits, labels)["top1"]
    right = int(np.flatnonzero(logits.argmax(1) == labels)[0])
    logits[right, 3] = np.nan
    after = scores.scores(logits, labels)
    assert after["top1"] == pytest.approx(before - 1 / 400) and np.isnan(after["nll"])


def test_combined_score():
    assert scores.combined(0.9, 0.8, 0.7) == pytest.approx(0.87)
    assert scores.combined(0.9, None, 0.7) == 0.9


@pytest.mark.parametrize(("classes", "want"), [(2, 1.0), (5, 1.0), (6, 0.5), (9, 0.5)])
def test_top_5_is_that_of_five_classes(classes, want):
    """The first label is ranked last, the second first."""
    logits = np.stack([np.arange(classes), -np.arange(classes)]).astype(float)
    assert scores.scores(logits, np.array([0, 0]))["top5"] == want


def test_two_classes_have_precision_recall_and_f1_of_the_second(logits_and_labels):
    logits, labels = logits_and_labels
    logits, labels = logits[:, :2], (labels == 1).astype(int)
    computed, guess = scores.scores(logits, labels), logits.argmax(1)
    for name, reference in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert computed[name] == pytest.approx(reference(labels, guess))
    assert "f1" not in scores.scores(np.eye(3), np.arange(3))


def test_each_score_alone_is_that_of_all_together(logits_and_labels):
    logits, labels = logits_and_labels
    logits = logits.copy()
    logits[3] = np.nan
    together = scores.scores(logits, labels)
    for name in ("top1", "macro_recall", "macro_f1"):
        assert getattr(scores, name)(logits, labels) == together[name], name
