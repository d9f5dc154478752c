"""Samplers: the rows of an epoch as a pure function of labels, seed, epoch and fold.

Every sampler draws exactly N rows, so the schedule does not depend on it. A sampler only says what share of
the draws a class gets; the cap, the spare draws, the rounding and the shuffling are the same for all.
"""

from __future__ import annotations

import numpy as np

from fastflower.core import seeding
from fastflower.core.errors import InputError
from fastflower.recipe.schema import Sampler

TAG = 0x5A  # separates these draws from others with the same seed and epoch


def order(
    sampler: Sampler, labels: np.ndarray, *, seed: int, epoch: int, fold: int, batch: int | None = None
) -> np.ndarray:
    """Row numbers of one epoch, int64 (N,), rows repeated or left out as the sampler says.

    labels: class_idx int64 (N,) of the training rows. With `batch` (images in a global batch) class_balanced
    also shuffles inside each batch, so that partners in MixUp/CutMix are random; its classes rotate, so any
    stretch of draws holds each class equally often, give or take one, as far as the cap allows.
    """
    rng = seeding.generator(seed, fold, epoch, TAG)
    counts = np.bincount(labels)
    kept = _kept(counts, sampler.undersample_frac)
    if sampler.type == "none" and not sampler.undersample_frac:
        return rng.permutation(len(labels)).astype(np.int64)
    draws = _quotas(sampler, counts, kept=kept, rng=rng)
    drawn = [
        _draw(np.flatnonzero(labels == c), kept[c], draws=draws[c], rng=rng) for c in np.flatnonzero(draws)
    ]
    if sampler.type != "class_balanced":
        return rng.permutation(np.concatenate(drawn))
    rows = _rotate(drawn, draws[draws > 0] < _limits(sampler, counts)[draws > 0], rng)
    if batch:
        rows = np.concatenate([rng.permutation(rows[at : at + batch]) for at in range(0, len(rows), batch)])
    return rows


def effective_number(counts: np.ndarray, beta: float) -> np.ndarray:
    """E(n) = (1 - beta^n) / (1 - beta), float64 (C,); n for beta near 1 (Cui et al. 2019)."""
    return (1.0 - np.power(beta, counts.astype(np.float64))) / (1.0 - beta)


def repeat_factors(counts: np.ndarray, t: float | str, alpha: float) -> np.ndarray:
    """R = max(1, (t / n)^alpha) before rounding, float64 (C,); t "median" is that of the classes there are."""
    threshold = float(np.median(counts[counts > 0])) if t == "median" else float(t)
    return np.maximum(1.0, (threshold / np.maximum(counts, 1)) ** alpha)


def shares(sampler: Sampler, counts: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The share of an epoch's draws that each class should get before the cap: float64 (C,), sum 1.

    counts: images of each class; kept: those not left out by sampler.undersample_frac. Absent classes get 0.
    """
    n = np.maximum(counts, 1)
    weight = {
        "none": lambda: kept,
        "weighted_en": lambda: kept / effective_number(n, sampler.beta),
        "weighted_inv": lambda: kept / n,
        "class_balanced": lambda: np.ones(len(n)),
        "repeat_factor": lambda: (
            kept * np.floor(repeat_factors(counts, sampler.rf_t, sampler.rf_alpha) + 0.5)
        ),
    }[sampler.type]()
    weight = np.where(counts > 0, weight, 0.0)
    return weight / weight.sum()


def _kept(counts: np.ndarray, frac: float) -> np.ndarray:
    """Images of each class that an epoch may use; the largest tenth of the classes, at least one, lose `frac`."""
    present = np.sort(counts[counts > 0])
    bar = present[-max(1, len(present) // 10)]
    return np.where(counts >= bar, np.ceil(counts * (1 - frac)), counts).astype(np.int64)


def _limits(sampler: Sampler, counts: np.ndarray) -> np.ndarray:
    return np.floor(sampler.oversample_cap * counts + 1e-9).astype(np.int64)


def _quotas(
    sampler: Sampler, counts: np.ndarray, *, kept: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Whole draws of each class, int64 (C,), sum N, none above the cap; spare draws go to the rest by share."""
    n, limit = int(counts.sum()), _limits(sampler, counts)
    limit = np.minimum(limit, np.floor(sampler.oversample_cap * kept + 1e-9).astype(np.int64))
    if limit.sum() < n:
        raise InputError(
            f"sampler.oversample_cap = {sampler.oversample_cap:g} leaves room for {limit.sum()} of {n} draws with "
            f"sampler.undersample_frac = {sampler.undersample_frac:g}; raise the cap or set the fraction to 0"
        )
    share = shares(sampler, counts, kept)
    capped = np.zeros(len(counts), bool)
    while True:
        wanted = np.where(capped, limit, 0.0)
        rest = np.where(capped, 0.0, share)
        if rest.sum() > 0:
            wanted = wanted + (n - wanted.sum()) * rest / rest.sum()
        over = (wanted > limit) & ~capped
        if not over.any():
            break
        capped |= over
    if sampler.type == "class_balanced":
        return _round_fair(wanted, ~capped & (share > 0), n=n, rng=rng)
    # systematic rounding: each class gets the floor or the ceiling, and over epochs its exact share
    steps = np.round(np.cumsum(wanted), 6)
    steps[-1] = n
    return np.diff(np.floor(np.r_[0.0, steps] + rng.random() * (1 - 1e-6))).astype(np.int64)


def _round_fair(wanted: np.ndarray, free: np.ndarray, *, n: int, rng: np.random.Generator) -> np.ndarray:
    """Capped classes as they are, the rest equally, with one more for some drawn at random."""
    draws = np.where(free, np.floor(wanted + 1e-6), wanted).astype(np.int64)
    lucky = rng.permutation(np.flatnonzero(free))[: n - draws.sum()]
    draws[lucky] += 1
    return draws


def _draw(rows: np.ndarray, kept: int, *, draws: int, rng: np.random.Generator) -> np.ndarray:
    """`draws` of a class's rows in random order, each as often as any other, give or take one."""
    pool = rng.permutation(rows)[:kept]
    whole, part = divmod(int(draws), len(pool))
    rounds = [rng.permutation(pool) for _ in range(whole)]
    return np.concatenate([*rounds, rng.permutation(pool)[:part]]).astype(np.int64)


def _rotate(drawn: list[np.ndarray], free: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Interleave classes: those below their cap in one fixed rotation, the capped ones spread evenly between."""
    total = sum(len(rows) for rows, loose in zip(drawn, free, strict=True) if loose)
    turn = rng.permutation(len(drawn))
    ranked = sorted(range(len(drawn)), key=lambda c: (-len(drawn[c]) if free[c] else 0, turn[c]))
    at = np.empty(sum(map(len, drawn)))
    start, seat = 0, 0
    seats = max(int(free.sum()), 1)
    for c in ranked:
        steps = np.arange(len(drawn[c]))
        if free[c]:
            at[start : start + len(steps)] = (steps * seats + seat + 0.5) / max(total, 1)
            seat += 1
        else:
            at[start : start + len(steps)] = (steps + rng.random()) / len(steps)
        start += len(steps)
    return np.concatenate([drawn[c] for c in ranked])[np.argsort(at, kind="stable")]
