from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from fastflower.core import scores
from fastflower.evaluation import calibration
from support.fake_members import member


def torch_fit(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The minimum of the NLL by torch's LBFGS on log T in float64."""
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
        value = (w * torch.nn.functional.cross_entropy(z / log_t.exp(), y, reduction="none")).sum()
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


def test_t_stays_in_its_bounds_when_every_image_is_right() -> None:
    t = calibration.fit(np.eye(3) * 5, np.arange(3))
    assert calibration.LOWEST <= t < 0.1


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
