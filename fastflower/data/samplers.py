"""Samplers: the rows of an epoch as a pure function of labels, seed, epoch and fold.

Every sampler draws exactly N rows, so the schedule does not depend on it. `POLICIES` sets the fraction of the draws
that each class gets; the cap, the redistribution of draws above it and the shuffling are common to all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastflower.core import own_parts, seeding
from fastflower.core.errors import InputError
from fastflower.recipe.schema import Sampler

TAG = 0x5A  # separates these draws from others with the same seed and epoch


def order(
    sampler: Sampler, labels: np.ndarray, *, seed: int, epoch: int, fold: int, batch: int | None = None
) -> np.ndarray:
    """Row numbers of one epoch, int64 (N,); the sampler repeats some rows and leaves out others.

    labels: class_idx int64 (N,) of the training rows. Where the classes rotate (see `Policy`) and `batch`, the images
    in a global batch, is given, each batch is shuffled as well, so that partners in MixUp and CutMix are random.
    """
    rng = seeding.generator(seed, fold, epoch, TAG)
    if own_parts.is_own(sampler.type):
        return _own(sampler.type, labels, rng)
    counts = np.bincount(labels)
    kept = _kept(counts, sampler.undersample_frac)
    if sampler.type == "none" and not sampler.undersample_frac:
        return rng.permutation(len(labels)).astype(np.int64)
    draws = _quotas(sampler, counts, kept=kept, rng=rng)
    rows_by_class = [
        _draw(np.flatnonzero(labels == c), kept[c], draws=draws[c], rng=rng) for c in np.flatnonzero(draws)
    ]
    if not POLICIES[sampler.type].rotate:
        return rng.permutation(np.concatenate(rows_by_class))
    rows = _rotate(rows_by_class, draws[draws > 0] < _limits(sampler, counts)[draws > 0], rng)
    if batch:
        starts = range(0, len(rows), batch)
        rows = np.concatenate([rng.permutation(rows[start : start + batch]) for start in starts])
    return rows


def _own(name: str, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The rows that the user's function draws for an epoch; InputError unless they are N rows of the N."""
    rows = np.asarray(own_parts.call("sampler.type", name, labels.copy(), rng))
    n = len(labels)
    if rows.shape != (n,) or rows.dtype.kind not in "iu":
        what = (
            f"gives {rows.dtype} {rows.shape}, must give {n} row numbers ({n},), as many as there are images"
        )
        raise own_parts.fault("sampler.type", name, what)
    if rows.min() < 0 or rows.max() >= n:
        raise own_parts.fault(
            "sampler.type", name, f"gives rows from {rows.min()} to {rows.max()}, must be in 0..{n - 1}"
        )
    return rows.astype(np.int64)


def effective_number(counts: np.ndarray, beta: float) -> np.ndarray:
    """E(n) = (1 - beta^n) / (1 - beta), float64 (C,), which tends to n as beta tends to 1 (Cui et al. 2019)."""
    return (1.0 - np.power(beta, counts.astype(np.float64))) / (1.0 - beta)


def repeat_factors(counts: np.ndarray, t: float | str, alpha: float) -> np.ndarray:
    """R = max(1, (t / n)^alpha) before rounding, float64 (C,); t = "median" is the median size of present classes."""
    threshold = float(np.median(counts[counts > 0])) if t == "median" else float(t)
    return np.maximum(1.0, (threshold / np.maximum(counts, 1)) ** alpha)


def class_fractions(sampler: Sampler, counts: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The fraction of an epoch's draws that each class should get before the cap: float64 (C,), sum 1.

    counts: images of each class; kept: those not left out by sampler.undersample_frac. Absent classes get 0.
    """
    weights = np.where(counts > 0, POLICIES[sampler.type].weights(sampler, counts, kept), 0.0)
    return weights / weights.sum()


@dataclass(frozen=True)
class Policy:
    """A sampler type.

    weights: function of (sampler, counts, kept) that gives the unnormalised weight of each class (C,); see
    `class_fractions`. rotate: classes take turns, so any stretch of draws has equally many of each class, give or take
    one, as far as the cap allows; otherwise the draws are shuffled.
    """

    weights: Callable[[Sampler, np.ndarray, np.ndarray], np.ndarray]
    rotate: bool = False


POLICIES = {
    "none": Policy(lambda sampler, counts, kept: kept),
    "weighted_en": Policy(
        lambda sampler, counts, kept: kept / effective_number(np.maximum(counts, 1), sampler.beta)
    ),
    "weighted_inv": Policy(lambda sampler, counts, kept: kept / np.maximum(counts, 1)),
    "class_balanced": Policy(lambda sampler, counts, kept: np.ones(len(counts)), rotate=True),
    "repeat_factor": Policy(
        lambda sampler, counts, kept: (
            kept * np.floor(repeat_factors(counts, sampler.rf_t, sampler.rf_alpha) + 0.5)
        )
    ),
}


def _kept(counts: np.ndarray, frac: float) -> np.ndarray:
    """Images of each class that an epoch may use; the largest tenth of the classes, at least one, lose `frac`."""
    present = np.sort(counts[counts > 0])
    threshold = present[-max(1, len(present) // 10)]
    return np.where(counts >= threshold, np.ceil(counts * (1 - frac)), counts).astype(np.int64)


def _limits(sampler: Sampler, counts: np.ndarray) -> np.ndarray:
    """The most draws of each class under sampler.oversample_cap, int64 (C,)."""
    return np.floor(sampler.oversample_cap * counts + 1e-9).astype(np.int64)


def _quotas(
    sampler: Sampler, counts: np.ndarray, *, kept: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The number of draws of each class, int64 (C,), sum N, none above the cap.

    Draws above the cap go to the other classes in proportion to their fractions.
    """
    n, limit = int(counts.sum()), _limits(sampler, counts)
    limit = np.minimum(limit, np.floor(sampler.oversample_cap * kept + 1e-9).astype(np.int64))
    if limit.sum() < n:
        raise InputError(
            f"sampler.oversample_cap = {sampler.oversample_cap:g} leaves room for {limit.sum()} of {n} draws with "
            f"sampler.undersample_frac = {sampler.undersample_frac:g}; raise the cap or set the fraction to 0"
        )
    fractions = class_fractions(sampler, counts, kept)
    capped = np.zeros(len(counts), bool)
    while True:
        ideal = np.where(capped, limit, 0.0)
        uncapped = np.where(capped, 0.0, fractions)
        if uncapped.sum() > 0:
            ideal = ideal + (n - ideal.sum()) * uncapped / uncapped.sum()
        over = (ideal > limit) & ~capped
        if not over.any():
            break
        capped |= over
    if POLICIES[sampler.type].rotate:
        return _round_equally(ideal, ~capped & (fractions > 0), n=n, rng=rng)
    # systematic rounding: each class gets the floor or the ceiling, and on average over epochs the exact number
    steps = np.round(np.cumsum(ideal), 6)
    steps[-1] = n
    return np.diff(np.floor(np.r_[0.0, steps] + rng.random() * (1 - 1e-6))).astype(np.int64)


def _round_equally(
    ideal: np.ndarray, uncapped: np.ndarray, *, n: int, rng: np.random.Generator
) -> np.ndarray:
    """Round to equal numbers for the uncapped classes, with one more draw for randomly chosen ones to reach n."""
    draws = np.where(uncapped, np.floor(ideal + 1e-6), ideal).astype(np.int64)
    chosen = rng.permutation(np.flatnonzero(uncapped))[: n - draws.sum()]
    draws[chosen] += 1
    return draws


def _draw(rows: np.ndarray, kept: int, *, draws: int, rng: np.random.Generator) -> np.ndarray:
    """`draws` of a class's rows in random order; the numbers of draws of any two rows differ by one at most."""
    pool = rng.permutation(rows)[:kept]
    rounds, remainder = divmod(int(draws), len(pool))
    full_rounds = [rng.permutation(pool) for _ in range(rounds)]
    return np.concatenate([*full_rounds, rng.permutation(pool)[:remainder]]).astype(np.int64)


def _rotate(rows_by_class: list[np.ndarray], uncapped: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Interleave the classes: the uncapped ones in one fixed rotation, the capped ones spread evenly between them."""
    total = sum(len(rows) for rows, is_uncapped in zip(rows_by_class, uncapped, strict=True) if is_uncapped)
    tie_break = rng.permutation(len(rows_by_class))
    ranked = sorted(
        range(len(rows_by_class)),
        key=lambda c: (-len(rows_by_class[c]) if uncapped[c] else 0, tie_break[c]),
    )
    position = np.empty(sum(map(len, rows_by_class)))  # of each draw in the epoch, as a number in 0..1
    start, seat = 0, 0
    seats = max(int(uncapped.sum()), 1)
    for c in ranked:
        steps = np.arange(len(rows_by_class[c]))
        if uncapped[c]:
            position[start : start + len(steps)] = (steps * seats + seat + 0.5) / max(total, 1)
            seat += 1
        else:
            position[start : start + len(steps)] = (steps + rng.random()) / len(steps)
        start += len(steps)
    return np.concatenate([rows_by_class[c] for c in ranked])[np.argsort(position, kind="stable")]
