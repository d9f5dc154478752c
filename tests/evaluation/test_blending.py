"""The mean of ranks and hill climbing against values by hand, and the gain over the best run of every method."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import binomtest

from fastflower.evaluation import blending, ensembles, logits, tables
from fastflower.evaluation.selected import rating
from support.fake_members import BACKBONES, folds, member

FREE = ensembles.Budget(mb=np.ones(3), ms=np.ones(3), max_mb=100, max_ms=100)


def test_ranks_are_averaged_within_each_class() -> None:
    """Two runs of five images; the second is confident everywhere, and ranks do not follow its confidence."""
    first = np.array([0.1, 0.2, 0.3, 0.4, 0.6])
    second = np.array([0.90, 0.99, 0.97, 0.999, 0.98])
    stack = np.stack([np.log(np.stack([1 - p, p], axis=1)) for p in (first, second)])
    fused = np.exp(blending.rank_mean(stack))
    # ranks of the second class: 1 2 3 4 5 and 1 4 2 5 3, means 1 3 2.5 4.5 4
    assert np.argsort(fused[:, 1]).tolist() == [0, 2, 1, 4, 3]
    sorted_means = (np.sort(first) + np.sort(second)) / 2
    np.testing.assert_allclose(np.sort(fused[:, 1]), sorted_means, rtol=1e-9)
    np.testing.assert_allclose(fused[:, 0] + fused[:, 1], 1)
    alone = np.random.default_rng(0).normal(size=(1, 20, 3))
    np.testing.assert_allclose(np.exp(blending.rank_mean(alone)), softmax(alone[0], axis=1), rtol=1e-9)
    assert blending.rank_mean(stack[:, :1]).shape == (1, 2)


def drawn(noise: tuple[float, ...], n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """A stack of runs of these noises and labels (n,) of four classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, n)
    return np.stack([1.5 * np.eye(4)[labels] + s * rng.normal(size=(n, 4)) for s in noise]), labels


def test_hill_climbing_follows_a_path_and_stops_where_the_held_out_images_do_best() -> None:
    stack, labels = drawn((0.9, 1.0, 5.0))
    parts, rate, rounds = np.arange(300) % 3, rating("log_loss"), 8
    got = blending.hill_climbing(
        stack, labels, parts=parts, rate=rate, allows=lambda chosen: True, rounds=rounds
    )
    shares = []
    for part in range(3):
        inside, path = parts == part, []
        for _ in range(rounds):
            means = {m: stack[[*path, m]][:, ~inside].mean(0) for m in range(3)}
            path.append(max(means, key=lambda m: rate(means[m], labels[~inside])))
        held_out = [rate(stack[path[:k]][:, inside].mean(0), labels[inside]) for k in range(1, rounds + 1)]
        best = int(np.argmax([value for (value,) in held_out])) + 1
        shares.append([path[:best].count(m) / best for m in range(3)])
    np.testing.assert_allclose(got, np.mean(shares, axis=0))
    assert got.sum() == pytest.approx(1) and got[2] < 0.1 and min(got[:2]) > 0.2


def test_hill_climbing_stays_within_the_budget() -> None:
    stack, labels = drawn((0.9, 1.0, 1.1))
    small = ensembles.Budget(mb=np.array([60.0, 60.0, 60.0]), ms=np.ones(3), max_mb=70, max_ms=100)
    parts = np.zeros(len(labels))
    parts[::3] = 1
    weights = blending.hill_climbing(
        stack, labels, parts=parts, rate=rating("clean"), allows=small.allows, rounds=6
    )
    assert sorted(weights)[-1] >= 0.5  # one run for each part
    none = blending.hill_climbing(
        stack, labels, parts=parts, rate=rating("clean"), allows=lambda chosen: False, rounds=6
    )
    assert not none.any()


def test_every_method_has_its_gain_over_the_best_run_with_interval_and_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # LightGBM takes ten seconds
    pairs = itertools.product(BACKBONES, (1, 2))
    runs = [
        logits.assemble([member(fold, backbone, seed, skill=1.0) for fold in (0, 1, 2)], folds())
        for backbone, seed in pairs
    ]
    budget = ensembles.Budget(mb=np.ones(4), ms=np.ones(4), max_mb=100, max_ms=100)
    comparison = ensembles.compare(runs, budget)
    rows = {row.method: row for row in comparison.rows}
    assert {"hill climbing", "mean of ranks"} <= set(rows) and rows["best single"].over_best is None
    assert sum(comparison.weights["hill climbing"].values()) == pytest.approx(1)
    assert tables.hand_in_verdict(rows["mean of ranks"]) == "no predictor"
    assert tables.hand_in_verdict(rows["hill climbing"]) == "fits"
    stack, labels = np.stack([run.logits for run in runs]), runs[0].class_idx
    base = ensembles.nested_predictions(ensembles.best_single, stack, labels=labels, parts=runs[0].fold)
    hits = [values.argmax(1) == labels for values in (base, stack.astype(float).mean(0))]
    gained, lost = int((hits[1] & ~hits[0]).sum()), int((hits[0] & ~hits[1]).sum())
    over = rows["mean of logits"].over_best
    assert (over.gained, over.lost) == (gained, lost)
    assert over.gain == pytest.approx(rows["mean of logits"].gain)
    assert over.p == binomtest(gained, gained + lost).pvalue and over.low < over.gain < over.high
    table = tables.method_table(comparison)
    assert table[0].count("95%") == 2 and all(len(row) == len(table[0]) for row in table)
    fused = logits.fuse(runs)
    alone = [float((run.logits.argmax(1) == labels).mean()) for run in runs]
    best = ensembles.gain_over_best(fused, runs)
    assert best.best == runs[int(np.argmax(alone))].name
    assert best.gain == pytest.approx((fused.logits.argmax(1) == labels).mean() - max(alone))
