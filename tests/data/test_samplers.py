from __future__ import annotations

import numpy as np
import pytest

from fastflower.core.errors import InputError
from fastflower.data import samplers
from fastflower.recipe import schema

TAIL = np.array([1000, 100, 10])
TYPES = ["none", "weighted_en", "weighted_inv", "class_balanced", "repeat_factor"]


def labels_of(counts: np.ndarray | list[int]) -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


def draws(sampler: schema.Sampler, counts: np.ndarray | list[int], epoch: int = 0) -> np.ndarray:
    labels = labels_of(counts)
    return np.bincount(
        labels[samplers.order(sampler, labels, seed=42, epoch=epoch, fold=0)], minlength=len(counts)
    )


@pytest.mark.parametrize(
    ("beta", "want"),
    [
        (0.9, [1, 6.5132, 9.9997, 10]),
        (0.99, [1, 9.5618, 63.3968, 99.9957]),
        (0.999, [1, 9.9551, 95.2079, 632.3046]),
    ],
)
def test_effective_number(beta: float, want: list[float]) -> None:
    assert samplers.effective_number(np.array([1, 10, 100, 1000]), beta) == pytest.approx(want, abs=6e-5)


@pytest.mark.parametrize(("alpha", "want"), [(0.3, 1.9953), (0.5, 3.1623), (0.7, 5.0119)])
def test_repeat_factors(alpha: float, want: float) -> None:
    assert samplers.repeat_factors(TAIL, "median", alpha) == pytest.approx([1, 1, want], abs=5e-5)
    assert samplers.repeat_factors(TAIL, 100.0, alpha)[2] == pytest.approx(want, abs=5e-5)


def test_uncapped_fractions_follow_the_formulas() -> None:
    free = 1e6
    want = np.array([482.8, 320.6, 306.6])
    mean = np.mean([draws(schema.Sampler(oversample_cap=free), TAIL, e) for e in range(300)], axis=0)
    assert mean == pytest.approx(want, abs=0.15)
    assert draws(schema.Sampler("weighted_inv", oversample_cap=free), TAIL).tolist() == [370, 370, 370]
    assert draws(schema.Sampler("none"), TAIL).tolist() == TAIL.tolist()
    factors = np.array([1, 1, 3]) * TAIL  # 3.1623 rounds to 3
    got = np.mean(
        [draws(schema.Sampler("repeat_factor", oversample_cap=free), TAIL, e) for e in range(300)], axis=0
    )
    assert got == pytest.approx(1110 * factors / factors.sum(), abs=0.15)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("cap", [1.0, 2.5, 3.0])
def test_no_class_exceeds_the_cap_and_the_length_is_fixed(kind: str, cap: float) -> None:
    rng = np.random.default_rng(3)
    for epoch, counts in enumerate(
        [TAIL, np.array([5, 0, 1]), np.array([1, 1, 1]), rng.integers(1, 300, 40)]
    ):
        got = draws(schema.Sampler(kind, oversample_cap=cap), counts, epoch)  # type: ignore[arg-type]
        assert got.sum() == counts.sum()
        assert (got <= np.floor(cap * counts)).all()
        assert (got[counts == 0] == 0).all()


def test_draws_above_the_cap_go_to_the_other_classes_in_proportion() -> None:
    assert draws(schema.Sampler("weighted_inv"), TAIL).tolist() == [780, 300, 30]
    got = draws(schema.Sampler("weighted_inv", oversample_cap=3), [300, 300, 10])
    assert got.tolist() == [290, 290, 30]


@pytest.mark.parametrize("kind", TYPES)
def test_an_order_is_a_pure_function(kind: str) -> None:
    labels, sampler = labels_of(TAIL), schema.Sampler(kind)  # type: ignore[arg-type]
    rows = samplers.order(sampler, labels, seed=42, epoch=3, fold=1)
    assert rows.dtype == np.int64
    assert np.array_equal(rows, samplers.order(sampler, labels, seed=42, epoch=3, fold=1))
    for seed, epoch, fold in ((43, 3, 1), (42, 4, 1), (42, 3, 2)):
        assert not np.array_equal(rows, samplers.order(sampler, labels, seed=seed, epoch=epoch, fold=fold))


def test_draws_of_two_images_of_a_class_differ_by_one_at_most() -> None:
    labels = labels_of(TAIL)
    times = np.bincount(
        samplers.order(schema.Sampler(), labels, seed=0, epoch=0, fold=0), minlength=len(labels)
    )
    for c in range(3):
        assert np.ptp(times[labels == c]) <= 1


@pytest.mark.parametrize("counts", [[64] * 17, [100] * 10 + [37] * 6, list(range(90, 190))])
@pytest.mark.parametrize("batch", [64, 128])
@pytest.mark.parametrize("shuffle", [False, True])
def test_balanced_batches_differ_by_one_at_most(counts: list[int], batch: int, shuffle: bool) -> None:
    labels = labels_of(counts)
    rows = samplers.order(
        schema.Sampler("class_balanced"), labels, seed=1, epoch=2, fold=0, batch=batch if shuffle else None
    )
    for start in range(0, len(rows), batch):
        seen = np.bincount(labels[rows[start : start + batch]], minlength=len(counts))
        assert np.ptp(seen) <= 1
    assert np.ptp(np.bincount(labels[rows])) <= 1


def test_capped_classes_are_spread_over_the_epoch() -> None:
    labels = labels_of([1000, 1000, 20])
    rows = samplers.order(schema.Sampler("class_balanced"), labels, seed=1, epoch=0, fold=0)
    where = np.flatnonzero(labels[rows] == 2)
    assert len(where) == 60
    assert np.diff(where).max() <= 2 * len(rows) / 60


def test_undersampling_leaves_out_images_of_the_largest_class() -> None:
    labels = labels_of(TAIL)
    rows = samplers.order(schema.Sampler(undersample_frac=0.2), labels, seed=0, epoch=0, fold=0)
    assert len(np.unique(rows[labels[rows] == 0])) <= 800
    assert len(rows) == 1110
    with pytest.raises(InputError, match=r"leaves room for 910 of 1110 draws"):
        samplers.order(
            schema.Sampler(undersample_frac=0.2, oversample_cap=1), labels, seed=0, epoch=0, fold=0
        )
