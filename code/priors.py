"""Corrects probabilities for the class distribution of the pictures to predict, where it differs from the training's.

Saerens et al. 2002 (Neural Computation 14): p becomes p * target / source, normalised, where `source` is the class
distribution for which the networks' probabilities hold, and the target is known or estimated from the probabilities.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def known_ratio(bundle: dict[str, Any]) -> np.ndarray | None:
    """Target over source (C,) where the bundle knows the target; None where there is nothing to correct, or not yet."""
    correction = bundle["correction"]
    if correction is None or correction["target"] == "em":
        return None
    return np.array(correction["target"]) / np.array(correction["source"])


# twin of estimate in fastflower/evaluation/priors.py
def estimate(probabilities: np.ndarray, source: np.ndarray) -> np.ndarray:
    """The class distribution (C,) of pictures by expectation-maximisation over their probabilities (N, C).

    One picture of the source distribution is added, so that few pictures leave no class impossible.
    """
    odds, target = probabilities / source, source
    for _ in range(1000):
        joint = odds * target
        before, target = target, (joint / joint.sum(1, keepdims=True)).sum(0) + source
        target = target / target.sum()
        if np.abs(target - before).sum() < 1e-6:
            break
    target = np.maximum(target, 1e-6)
    return target / target.sum()
