from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from fastflower.core import scores
from fastflower.evaluation import calibration, summary
from fastflower.evaluation.logits import Logits
from fastflower.recipe import load
from support.fake_members import classes_csv, folds, member


def torch_fit(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The minimum of the NLL and the prior by torch's LBFGS on log T in float64."""
    z, y = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    w = (
        torch.full((len(y),), 1 / len(y)).double()
        if weights is None
        else torch.from_numpy(weights / weights.sum())
    )
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        nll = torch.nn.functional.cross_entropy(z / log_t.exp(), y, reduction="none")
        value = (w * nll).sum() + 0.5 * log_t**2 * (
            w**2
        ).sum()  # the sum of squares is 1 / (effective images)
        value.backward()
        return value

    optimizer.step(loss)
    return float(log_t.exp().detach())


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 8.0])
def test_t_is_the_minimum_that_torch_finds(sharpness: float) -> None:
    data = member(0, skill=1.0)
    logits = sharpness * data.logits
    assert calibration.fit(logits, data.class_idx) == pytest.approx(
        torch_fit(logits, data.class_idx), rel=1e-4
    )


def test_t_of_scaled_log_probabilities_is_the_factor_they_were_scaled_by() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 5))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)  # drawn from softmax(logits)
    assert calibration.fit(2.5 * logits, labels) == pytest.approx(2.5, rel=0.03)


def logits_set(logits: np.ndarray, labels: np.ndarray) -> Logits:
    """A set of these logits (N, C), corrupted ones included."""
    data, n = member(0), len(labels)
    base = data.take(np.resize(np.arange(len(data)), n))
    both = np.stack([logits, logits])
    return replace(base, logits=logits, single=logits, corrupt=both, class_idx=labels)


@pytest.mark.parametrize("fit_on", ["clean", "combo"])
@pytest.mark.parametrize("case", ["no error", "one class", "one image"])
def test_t_stays_1_with_a_line_where_images_cannot_tell(case: str, fit_on: str) -> None:
    rng = np.random.default_rng(0)
    labels = np.array({"no error": [0, 1] * 6, "one class": [1] * 300, "one image": [0]}[case])
    logits = (3 * np.eye(2)[labels] + 0.1 * rng.normal(size=(len(labels), 2))).astype(np.float32)
    if case == "one class":
        logits = rng.normal(size=logits.shape).astype(np.float32)
    fitted = calibration.fit_set(logits_set(logits, labels), fit_on, alpha=0.7, bins=15)
    assert fitted.t == 1 and fitted.note.startswith("T stays 1: ") and fitted.nll_after == fitted.nll_before
    column = scores.softmax(logits / fitted.t)[:, 1]  # as the table of two classes has it
    assert len(np.unique(column)) == len(labels)


def test_few_images_move_t_little_and_many_decide_it() -> None:
    rng = np.random.default_rng(1)
    for n, low, high in ((12, 1.0, 4.9), (5000, 4.5, 5.5)):
        logits = rng.normal(size=(n, 3))
        labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
        fitted = calibration.fit_set(
            logits_set((5 * logits).astype(np.float32), labels), "clean", alpha=1, bins=15
        )
        assert low < fitted.t < high and not fitted.note
        assert fitted.t == pytest.approx(torch_fit((5 * logits).astype(np.float32), labels), rel=1e-4)


def test_t_at_its_limit_is_announced_and_ties_no_probabilities() -> None:
    rng = np.random.default_rng(2)
    logits, labels = 50 * rng.normal(size=(2000, 2)).astype(np.float32), rng.integers(0, 2, 2000)
    data = logits_set(logits, labels)
    fitted = calibration.fit_set(data, "clean", alpha=0.7, bins=15)
    assert fitted.t == pytest.approx(calibration.HIGHEST, rel=1e-3) and "at the limit" in fitted.note
    assert len(np.unique(scores.softmax(logits / fitted.t)[:, 1])) > 1990


def test_the_note_of_the_fused_temperature_reaches_people() -> None:
    members = [member(fold, skill=99.0) for fold in range(3)]
    settings = load(None, ["exp.name=a"])
    found = summary.summarise(members, folds(), classes=classes_csv(), recipe=settings)
    assert found.fused.temperature.t == 1 and [
        line for line in found.advice if line.startswith("T stays 1: none of")
    ]


def test_combo_weighs_clean_and_corrupted_by_alpha() -> None:
    data, alpha = member(0, skill=1.0), 0.7
    n, kinds = len(data), len(data.combos)
    logits = np.concatenate([data.logits, *data.corrupt])
    weights = np.concatenate([np.full(n, alpha / n), np.full(n * kinds, (1 - alpha) / (n * kinds))])
    expected = torch_fit(logits, np.tile(data.class_idx, 1 + kinds), weights)
    fitted = calibration.fit_set(data, "combo", alpha=alpha, bins=15)
    assert fitted.t == pytest.approx(expected, rel=1e-4)
    assert fitted.fit_on == "combo"
    assert fitted.t != pytest.approx(calibration.fit_set(data, "clean", alpha=alpha, bins=15).t, rel=1e-3)


def test_nll_and_ece_before_and_after_are_those_of_torch_and_torchmetrics() -> None:
    data = member(0, skill=1.0)
    fitted = calibration.fit_set(data, "clean", alpha=0.7, bins=15)
    for when, t in (("before", 1.0), ("after", fitted.t)):
        logits, labels = torch.from_numpy(data.logits / np.float32(t)), torch.from_numpy(data.class_idx)
        nll = torch.nn.functional.cross_entropy(logits, labels)
        ece = MulticlassCalibrationError(logits.shape[1], n_bins=15)(logits.softmax(1), labels)
        assert getattr(fitted, f"nll_{when}") == pytest.approx(float(nll), rel=1e-5)
        assert getattr(fitted, f"ece_{when}") == pytest.approx(float(ece), abs=1e-5)
    assert fitted.nll_after < fitted.nll_before
    np.testing.assert_array_equal(scores.softmax(data.logits / fitted.t).argmax(1), data.logits.argmax(1))
