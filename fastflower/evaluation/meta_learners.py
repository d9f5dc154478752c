"""Meta-learners, which stack runs: logistic regression and boosted trees on the log-probabilities of all runs.

`stack` is (M, N, C), M runs over the same N images. Each returns a function from a stack to log-probabilities (N, C).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import log_softmax

from fastflower.core.workers import check_threads, cores


def features(stack: np.ndarray) -> np.ndarray:
    """The inputs of a meta-learner: log-probabilities (N, M * C)."""
    runs, n, classes = stack.shape
    return log_softmax(stack.astype(np.float64), axis=2).transpose(1, 0, 2).reshape(n, runs * classes)


def meta_learner(model: Any, classes: int) -> Callable[[np.ndarray], np.ndarray]:
    """The predictions of a fitted meta-learner; classes absent from its training images get probability 1e-12."""

    def predict(stack: np.ndarray) -> np.ndarray:
        log_p = np.full((stack.shape[1], classes), np.log(1e-12))
        log_p[:, model.classes_] = np.log(np.maximum(model.predict_proba(features(stack)), 1e-12))
        return log_p

    return predict


def logistic(stack: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Multinomial logistic regression on the runs' log-probabilities."""
    return meta_learner(fit_logistic(stack, labels), stack.shape[2])


def fit_logistic(stack: np.ndarray, labels: np.ndarray) -> Any:
    """scikit-learn's fitted model of `logistic`."""
    from sklearn.linear_model import LogisticRegression  # here: its import takes two seconds

    model = LogisticRegression(C=0.01, max_iter=100)
    with warnings.catch_warnings():
        # 100 steps are enough, converged or not
        warnings.simplefilter("ignore", category=UserWarning)
        return model.fit(features(stack), labels)


def lightgbm(stack: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Gradient-boosted trees on the same features."""
    return meta_learner(fit_lightgbm(stack, labels), stack.shape[2])


def fit_lightgbm(stack: np.ndarray, labels: np.ndarray) -> Any:
    """LightGBM's fitted model of `lightgbm`.

    There is a tree for each class and round; each uses about 64 of the features, as with all of them a hundred
    classes would take an hour.
    """
    threads = os.environ.get("OMP_NUM_THREADS", "")
    check_threads(int(threads) if threads.isdecimal() else cores(0))  # or libgomp would end this process
    from lightgbm import LGBMClassifier

    model = LGBMClassifier(
        n_estimators=50,
        learning_rate=0.1,
        num_leaves=7,
        min_child_samples=5,
        colsample_bytree=min(1.0, 64 / (len(stack) * stack.shape[2])),
        max_bin=63,
        random_state=0,
        deterministic=True,
        force_col_wise=True,
        n_jobs=0,  # as OMP_NUM_THREADS says; None takes all cores, whatever it says
        verbose=-1,
    )
    return model.fit(features(stack), labels)
