"""Methods to combine runs, each fitted and scored on different folds.

A run is a (backbone, seed) with its out-of-fold logits; `stack` is (M, N, C), M runs over the same N images.
A method fits on one stack and returns a function from a stack to log-probabilities up to a constant (N, C).
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import log_softmax, softmax

from fastflower.core import scores
from fastflower.core.errors import InputError
from fastflower.core.metric import parse
from fastflower.core.records import from_plain, to_plain
from fastflower.evaluation import meta_learners
from fastflower.evaluation.blending import hill_climbing, rank_mean
from fastflower.evaluation.logits import Logits, LogitsInfo, RunLogits, TrainedInfo, align, family_weights
from fastflower.evaluation.paired import paired_gain
from fastflower.evaluation.records import EnsembleComparison, GainOverBest, MethodScores
from fastflower.evaluation.selected import clean_score, rating
from fastflower.recipe import Recipe
from fastflower.recipe.schema import Bundle

WEIGHTS_FRACTION = 0.98  # of bundle.max_mb; programs, code and tables take the rest
RANKS = "mean of ranks"
BYTES = {"fp32": 2.0, "fp16": 1.0, "int8": 0.5}  # of a stored parameter, against half precision

Predict = Callable[[np.ndarray], np.ndarray]
Method = Callable[[np.ndarray, np.ndarray], Predict]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Cost of each run or member in the hand-in (M,), and the limits of their sums: MB, and ms an image."""

    mb: np.ndarray
    ms: np.ndarray
    max_mb: float
    max_ms: float

    @classmethod
    def of(cls, sets: Sequence[Logits[TrainedInfo]], limits: Bundle) -> Budget:
        """The costs that evaluate measured, with weights as the bundle stores them, and a recipe's limits."""
        mb = np.array([data.info.mb for data in sets]) * BYTES[limits.dtype]
        ms = np.array([data.info.ms for data in sets])
        return cls(mb=mb, ms=ms, max_mb=WEIGHTS_FRACTION * limits.max_mb, max_ms=limits.max_ms)

    @property
    def any_fits(self) -> bool:
        """True when at least one run fits alone."""
        return any(self.allows([m]) for m in range(len(self.mb)))

    def check(self, setting: str, noun: str) -> None:
        """Raise InputError when none fits; the message begins with the recipe's setting that needs one."""
        if not self.any_fits:
            raise InputError(
                f"{setting}: the smallest {noun} takes {self.mb.min():.1f} MB and {self.ms.min():.1f} ms, allowed are "
                f"{self.max_mb:.1f} MB and {self.max_ms:g} ms; raise bundle.max_mb or bundle.max_ms, or store int8"
            )

    def allows(self, chosen: list[int]) -> bool:
        """True when the chosen runs together are within the limits; one chosen several times counts once."""
        distinct = sorted(set(chosen))
        return bool(self.mb[distinct].sum() <= self.max_mb and self.ms[distinct].sum() <= self.max_ms)


def weighted_logits(weights: np.ndarray) -> Predict:
    """The weighted mean of logits."""
    return lambda stack: np.tensordot(weights, stack.astype(np.float64), axes=1)


def mean_logits(stack: np.ndarray, labels: np.ndarray) -> Predict:
    return weighted_logits(np.full(len(stack), 1 / len(stack)))


def mean_probabilities(stack: np.ndarray, labels: np.ndarray) -> Predict:
    return weighted_probabilities(np.full(len(stack), 1 / len(stack)))


def best_single(stack: np.ndarray, labels: np.ndarray, *, metric: str = "clean") -> Predict:
    """The run with the best score by the metric, of corrupted images the clean ones; the first of equal ones."""
    return weighted_logits(np.eye(len(stack))[best_run(stack, labels, metric)])


def best_run(stack: np.ndarray, labels: np.ndarray, metric: str) -> int:
    """The number of the run with the best score by the metric."""
    return int(np.argmax([clean_score(logits, labels, metric) for logits in stack]))


def learned_weights(stack: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weights w = softmax(v), (M,), that minimise the NLL of the weighted mean of logits at a free temperature.

    L-BFGS over v and log T with the exact gradient, from equal weights.
    """
    from scipy.optimize import minimize  # here: half a second, which a refusal does not spend

    z = stack.astype(np.float64)
    runs, n, _ = z.shape
    rows = np.arange(n)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        w, beta = softmax(parameters[:-1]), np.exp(-parameters[-1])
        mean = np.tensordot(w, z, axes=1)
        log_p = log_softmax(mean * beta, axis=1)
        residual = np.exp(log_p)
        residual[rows, labels] -= 1
        by_weight = beta * np.einsum("mnc,nc->m", z, residual) / n
        by_log_t = -beta * float((mean * residual).sum()) / n
        gradient = np.append(w * (by_weight - w @ by_weight), by_log_t)
        return -float(log_p[rows, labels].mean()), gradient

    bounds = [(-8, 8)] * runs + [(-4.6, 4.6)]
    solution = minimize(loss, np.zeros(runs + 1), jac=True, method="L-BFGS-B", bounds=bounds)
    return softmax(solution.x[:-1])


def mixture_weights(stack: np.ndarray, labels: np.ndarray, rounds: int = 10_000) -> np.ndarray:
    """Weights (M,) that minimise the NLL of the weighted mean of probabilities.

    By expectation-maximisation: the likelihood is concave in the weights and each round raises it. Gradient descent
    on softmax-normalised weights has the same optimum.
    """
    rows = np.arange(len(labels))
    p = np.stack([softmax(logits.astype(np.float64), axis=1)[rows, labels] for logits in stack])
    p = np.maximum(p, 1e-30)  # (M, N)
    w = np.full(len(p), 1 / len(p))
    for _ in range(rounds):
        joint = w[:, None] * p
        before, w = w, (joint / joint.sum(0)).mean(1)
        if np.abs(w - before).max() < 1e-9:
            break
    return w


def weighted_probabilities(weights: np.ndarray) -> Predict:
    """The weighted mean of probabilities."""

    def predict(stack: np.ndarray) -> np.ndarray:
        mean = np.tensordot(weights, softmax(stack.astype(np.float64), axis=2), axes=1)
        return np.log(np.maximum(mean, 1e-30))

    return predict


def greedy_weights(
    stack: np.ndarray,
    labels: np.ndarray,
    *,
    budget: Budget | None = None,
    rounds: int = 20,
    metric: str = "log_loss",
) -> np.ndarray:
    """Weights (M,) by greedy selection with replacement (Caruana et al. 2004, Ensemble Selection from Libraries of
    Models).

    Each round adds the run within the budget that raises the mean's `rating` by the metric most; it stops when none
    raises it.
    """
    z, rate = stack.astype(np.float64), rating(metric)
    chosen: list[int] = []
    total = np.zeros(z.shape[1:])
    best: tuple[float, ...] = (-np.inf,)
    for _ in range(rounds):
        allowed = [m for m in range(len(z)) if budget is None or budget.allows([*chosen, m])]
        ratings = {m: rate((total + z[m]) / (len(chosen) + 1), labels) for m in allowed}
        if not ratings or max(ratings.values()) <= best:
            break
        pick = max(ratings, key=ratings.__getitem__)
        chosen, best, total = [*chosen, pick], ratings[pick], total + z[pick]
    counts = np.bincount(chosen, minlength=len(z)).astype(np.float64)
    return counts / max(counts.sum(), 1)


def climbed_weights(stack: np.ndarray, labels: np.ndarray, *, budget: Budget, metric: str) -> np.ndarray:
    """Weights (M,) by hill climbing, stopped by a fifth of the images after another."""
    parts = scoring_parts(np.zeros(len(labels)), labels)
    return hill_climbing(stack, labels, parts=parts, rate=rating(metric), allows=budget.allows)


def hand_weights(sets: Sequence[RunLogits], given: Any) -> np.ndarray:
    """ensembling.weights as weights (M,) that sum to 1; a backbone's weight is split evenly over its seeds.

    Raises InputError for anything but weights >= 0 for every run, by backbone or by `<backbone> seed <seed>`.
    """
    backbones, names = [run.info.backbone for run in sets], [run.name for run in sets]
    known = f"one for each of {', '.join(dict.fromkeys([*backbones, *names]))}"
    if not isinstance(given, dict):
        raise InputError(f"ensembling.weights = {given}: must be a map of weights, {known}")
    unknown = [key for key in given if key not in (*backbones, *names)]
    if unknown:
        raise InputError(f"ensembling.weights: no run is called {unknown[0]}; give {known}")
    weights = np.empty(len(sets))
    for m, (backbone, name) in enumerate(zip(backbones, names, strict=True)):
        if name not in given and backbone not in given:
            raise InputError(f"ensembling.weights: none for {name}; give {known}")
        value = given[name] if name in given else given[backbone]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < np.inf:
            raise InputError(f"ensembling.weights: {value} for {name}; weights are numbers from 0")
        weights[m] = value if name in given else value / backbones.count(backbone)
    if not weights.sum():
        raise InputError("ensembling.weights: all are 0; at least one run must count")
    return weights / weights.sum()


def run_weights(sets: Sequence[RunLogits], recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """The weights by which an experiment's runs are fused: (M, N) to score, and (M,) to hand in.

    Learned and greedy weights that score a part of the images are fitted on the other parts, those to hand in on
    all. Raises InputError when weighting is greedy and no run fits bundle's limits.
    """
    aligned, weighting = align(sets), recipe.ensembling.weighting
    backbones = [run.info.backbone for run in sets]
    fixed = {
        "flat": lambda: np.full(len(sets), 1 / len(sets)),
        "family": lambda: family_weights(backbones),
        "hand": lambda: hand_weights(sets, recipe.ensembling.weights),
    }
    if weighting in fixed or len(sets) == 1:
        weights = fixed[weighting]() if len(sets) > 1 else np.ones(1)
        return np.repeat(weights[:, None], len(aligned[0]), axis=1), weights
    budget = Budget.of(sets, recipe.bundle)
    if weighting == "greedy":
        budget.check("ensembling.weighting = greedy", "run")

    def fit(stack: np.ndarray, labels: np.ndarray) -> np.ndarray:
        if weighting == "greedy":
            return greedy_weights(stack, labels, budget=budget, metric=recipe.select.metric)
        if recipe.ensembling.average == "probabilities":
            return mixture_weights(stack, labels)
        return learned_weights(stack, labels)

    stack = np.stack([run.logits for run in aligned])
    labels, parts = aligned[0].class_idx, scoring_parts(aligned[0].fold, aligned[0].class_idx)
    by_image = np.empty(stack.shape[:2])
    for part in np.unique(parts):
        inside = parts == part
        by_image[:, inside] = fit(stack[:, ~inside], labels[~inside])[:, None]
    return by_image, fit(stack, labels)


def methods(
    sets: Sequence[RunLogits], budget: Budget, given_weights: Any = None, *, metric: str = "clean"
) -> dict[str, Method]:
    """Every method by its name in tables; those that need several runs are left out for one."""
    table: dict[str, Method] = {"best single": functools.partial(best_single, metric=metric)}
    if len(sets) > 1:
        table["mean of logits"] = mean_logits
        table["mean of probabilities"] = mean_probabilities
        backbones = [run.info.backbone for run in sets]
        if 1 < len(set(backbones)) < len(backbones):
            table["mean by backbone"] = lambda stack, labels: weighted_logits(family_weights(backbones))
        if given_weights is not None:
            by_hand = hand_weights(sets, given_weights)
            table["hand-set weights"] = lambda stack, labels: weighted_logits(by_hand)
        table["learned weights"] = lambda stack, labels: weighted_logits(learned_weights(stack, labels))
        table["learned mixture"] = lambda stack, labels: weighted_probabilities(
            mixture_weights(stack, labels)
        )
        if budget.any_fits:
            table["greedy in budget"] = lambda stack, labels: weighted_logits(
                greedy_weights(stack, labels, budget=budget, metric=metric)
            )
            table["hill climbing"] = lambda stack, labels: weighted_logits(
                climbed_weights(stack, labels, budget=budget, metric=metric)
            )
        table[RANKS] = lambda stack, labels: rank_mean
    table["logistic stacking"] = meta_learners.logistic
    if importlib.util.find_spec("lightgbm"):
        table["LightGBM stacking"] = meta_learners.lightgbm
    return table


def gain_over_best(fused: Logits[LogitsInfo], sets: Sequence[RunLogits]) -> GainOverBest:
    """The paired gain in top-1 of a fused set over its best run, the first of equal ones."""
    aligned = align(sets)
    hits = [run.logits.argmax(1) == run.class_idx for run in aligned]
    best = int(np.argmax([of_run.mean() for of_run in hits]))
    gain = paired_gain(hits[best], fused.logits.argmax(1) == fused.class_idx)
    return GainOverBest(**vars(gain), best=aligned[best].name)


def scoring_parts(fold: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The part (N,) each image is scored in: its fold, or five stratified parts when there is only one fold."""
    if len(np.unique(fold)) > 1:
        return fold
    from sklearn.model_selection import StratifiedKFold  # here: its import takes two seconds

    smallest = int(np.unique(labels, return_counts=True)[1].min())
    parts = np.empty(len(labels), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)  # classes rarer than the number of parts
        folds = StratifiedKFold(max(2, min(5, smallest)), shuffle=True, random_state=0)
        for part, (_, rows) in enumerate(folds.split(parts, labels)):
            parts[rows] = part
    return parts


def nested_predictions(
    method: Method, stack: np.ndarray, *, labels: np.ndarray, parts: np.ndarray
) -> np.ndarray:
    """Predictions (N, C) where each part is predicted by a method fitted on all the others."""
    log_p = np.empty(stack.shape[1:], dtype=np.float64)
    for part in np.unique(parts):
        inside = parts == part
        log_p[inside] = method(stack[:, ~inside], labels[~inside])(stack[:, inside])
    return log_p


def compare(
    sets: Sequence[RunLogits], budget: Budget, given_weights: Any = None, *, metric: str = "clean"
) -> EnsembleComparison:
    """Every method's nested scores, gain over the best single run and cost, and its weights fitted on all images."""
    stack = np.stack([run.logits for run in sets])
    labels, parts = sets[0].class_idx, scoring_parts(sets[0].fold, sets[0].class_idx)
    names = [run.name for run in sets]
    single = [float((run.logits.argmax(1) == labels).mean()) for run in sets]
    table = methods(sets, budget, given_weights, metric=metric)
    fits: dict[str, Callable[[], np.ndarray]] = {
        "hand-set weights": lambda: hand_weights(sets, given_weights),
        "learned weights": lambda: learned_weights(stack, labels),
        "learned mixture": lambda: mixture_weights(stack, labels),
        "greedy in budget": lambda: greedy_weights(stack, labels, budget=budget, metric=metric),
        "hill climbing": lambda: climbed_weights(stack, labels, budget=budget, metric=metric),
    }
    weights = {
        name: dict(zip(names, fit().tolist(), strict=True)) for name, fit in fits.items() if name in table
    }
    best = best_run(stack, labels, metric)
    rows: list[MethodScores] = []
    base: np.ndarray | None = None  # hits of the first method, the best single run
    for name, method in table.items():
        log_p = nested_predictions(method, stack, labels=labels, parts=parts)
        hits = log_p.argmax(1) == labels
        base = hits if base is None else base
        gains = [float(hits[parts == part].mean() - base[parts == part].mean()) for part in np.unique(parts)]
        gain = float(hits.mean() - base.mean())
        cost = hand_in_cost(name, weights.get(name), best=best, budget=budget)
        score = parse(metric).shown(clean_score(log_p, labels, metric))
        row = {**scores.scores(log_p, labels), "method": name, "gain": gain, "gains": gains, "score": score}
        row |= cost | {"over_best": to_plain(paired_gain(base, hits)) if rows else None}
        rows.append(from_plain(MethodScores, row))
    return EnsembleComparison(
        n=len(labels),
        parts=len(np.unique(parts)),
        runs=names,
        single=single,
        rows=rows,
        metric=metric,
        weights=weights,
    )


def hand_in_cost(
    method: str, weights: dict[str, float] | None, *, best: int, budget: Budget
) -> dict[str, float | None]:
    """`mb` and `ms` an image of a method's hand-in, and `fits`: both are within the limits. `best`: of single runs.

    A meta-learner has no cost, as a hand-in of torch alone cannot run it; nor have ranks, which need all test images.
    """
    if "stacking" in method or method == RANKS:
        return {"mb": None, "ms": None, "fits": False}
    chosen = list(range(len(budget.mb)))
    if method == "best single":
        chosen = [best]
    elif weights is not None:
        chosen = [m for m, weight in enumerate(weights.values()) if weight > 0]
    mb, ms = float(budget.mb[chosen].sum()), float(budget.ms[chosen].sum())
    return {"mb": mb, "ms": ms, "fits": budget.allows(chosen)}
