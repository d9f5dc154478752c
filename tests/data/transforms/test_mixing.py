"""MixUp and CutMix: rates, weights, labels, and the same pairs on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fastflower.core import seeding
from fastflower.data.transforms.mixing import WEIGHT, beta, boxes, choose, mix

KINDS = ("mixup", "cutmix")


def keys_of(count: int, epoch: int = 0) -> Tensor:
    rows = np.arange(count)
    return torch.from_numpy(seeding.row_keys(9, epoch, positions=rows, rows=rows).view(np.int64))


def flat(count: int, size: int = 20) -> Tensor:
    """Image i is the constant i, float32 (count, 3, size, size), channels last."""
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, size, size)
    return images.contiguous(memory_format=torch.channels_last)


def rates(**changes: float) -> dict[str, float]:
    settings = {"prob": 0.4, "switch": 0.5, "mixup": 0.2, "cutmix": 0.8, **changes}
    kinds = [choose(42, step // 500, step=step % 500, **settings) for step in range(5000)]
    return {kind: kinds.count(kind) / 5000 for kind in ("none", *KINDS)}


def test_total_probability_and_switch() -> None:
    rate = rates()
    assert abs(rate["mixup"] + rate["cutmix"] - 0.4) < 0.02
    assert abs(rate["cutmix"] - 0.2) < 0.02
    rate = rates(prob=1.0, switch=0.25)
    assert rate["none"] == 0 and abs(rate["cutmix"] - 0.25) < 0.02


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mixup": 0.0}, {"mixup": 0.0, "cutmix": 0.4}),
        ({"cutmix": 0.0}, {"mixup": 0.4, "cutmix": 0.0}),
        ({"mixup": 0.0, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 0.0}),
        ({"prob": 0.0}, {"mixup": 0.0, "cutmix": 0.0}),
        ({"switch": 1.0}, {"mixup": 0.0, "cutmix": 0.4}),
    ],
)
def test_a_disabled_method_leaves_all_mixed_batches_to_the_other(changes: dict, expected: dict) -> None:
    rate = rates(**changes)
    assert all(abs(rate[kind] - want) < 0.02 for kind, want in expected.items())
    assert all(rate[kind] == 0 for kind, want in expected.items() if want == 0)


def test_choice_is_a_pure_function_of_seed_epoch_and_step() -> None:
    def kinds(seed: int, epoch: int) -> list[str]:
        return [
            choose(seed, epoch, step=step, prob=0.5, switch=0.5, mixup=0.2, cutmix=0.8) for step in range(200)
        ]

    assert kinds(1, 0) == kinds(1, 0)
    assert len({tuple(kinds(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 5.0])
def test_weights_follow_beta(alpha: float) -> None:
    """In 92 bins of known probability; the outer are wide, as float32 cannot tell 1 - 1e-8 from 1."""
    weights = beta(keys_of(50_000), alpha).double().numpy()
    edges = stats.beta.ppf(np.linspace(0.05, 0.95, 91), alpha, alpha)
    counts = np.histogram(weights, [-1, *edges, 2])[0]
    expected = np.diff([0, *np.linspace(0.05, 0.95, 91), 1]) * 50_000
    assert stats.chisquare(counts, expected).pvalue > 1e-3
    assert weights.min() >= 0 and weights.max() <= 1
    if alpha >= 0.8:
        assert stats.kstest(weights, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.2, 0.8, 3.0])
def test_interpolation_error_of_the_quantiles(alpha: float) -> None:
    keys = keys_of(20_000)
    uniform = seeding.uniform_tensor(keys, WEIGHT).double().numpy()
    weights = beta(keys, alpha).double().numpy()
    exact = weights < 1 - 1e-4  # nearer to 1, float32 rounding exceeds the interpolation error
    assert np.abs(stats.beta.cdf(weights, alpha, alpha) - uniform)[exact].max() <= 1 / 4096
    assert np.abs(weights - stats.beta.ppf(uniform, alpha, alpha)).mean() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_label_weight_is_pixel_fraction(kind: str) -> None:
    """The partner of i is (i + B/2) mod B; on constant images the mean pixel gives the weight."""
    count = 16
    images, targets = mix(
        flat(count), torch.arange(count), keys=keys_of(count), num_classes=count, kind=kind, alpha=0.8
    )
    for row in range(count):
        partner = (row + count // 2) % count
        weight = float(targets[row, row])
        mean = float(images[row].double().mean())
        assert mean == pytest.approx(weight * row + (1 - weight) * partner, abs=1e-4)
        assert float(targets[row, partner]) == pytest.approx(1 - weight, abs=1e-6)
        others = [c for c in range(count) if c not in (row, partner)]
        assert not targets[row, others].any()
    assert len({round(float(w), 4) for w in targets.diagonal()}) > count // 2  # each row has its own weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 7, 16])
def test_targets_and_formats(kind: str, count: int) -> None:
    labels = torch.arange(count) % 3
    for dtype in (torch.float32, torch.bfloat16):
        before = flat(count).to(dtype)
        images, targets = mix(before, labels, keys=keys_of(count), num_classes=5, kind=kind, alpha=0.4)
        assert images.dtype == dtype and targets.dtype == torch.float32 and targets.shape == (count, 5)
        assert images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(targets.sum(1), torch.ones(count), atol=1e-6, rtol=0)
        assert torch.equal(before, flat(count).to(dtype))  # the input is left alone


def test_mixup_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    images, keys = 255 * torch.rand(6, 3, 8, 8, generator=generator), keys_of(6)
    mixed, _ = mix(images, torch.arange(6), keys=keys, num_classes=6, kind="mixup", alpha=0.7)
    weight = beta(keys, 0.7).view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed, weight * images + (1 - weight) * images[[3, 4, 5, 0, 1, 2]])


def test_cutmix_pastes_one_box_of_whole_pixels() -> None:
    images, _ = mix(
        flat(64, 32), torch.arange(64), keys=keys_of(64), num_classes=64, kind="cutmix", alpha=0.8
    )
    for row in range(64):
        pasted = images[row, 0] != row
        assert set(images[row].unique().tolist()) <= {float(row), float((row + 32) % 64)}
        rows, columns = pasted.any(1).nonzero().ravel(), pasted.any(0).nonzero().ravel()
        if len(rows):
            assert pasted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            assert pasted.sum() == len(rows) * len(columns)


def test_cutmix_boxes_have_the_drawn_area_where_nothing_is_cut_off() -> None:
    keys = keys_of(4000)
    weight = torch.full((4000,), 0.75)  # a box of half the sides
    down, across, actual = boxes(keys, weight, (40, 60))
    inside = down[:, :, None] & across[:, None]
    area = inside.sum((1, 2))
    assert int(area.max()) == 20 * 30
    torch.testing.assert_close(actual, 1 - area / 2400)
    # a side of half the image keeps 7/8 of itself on average over uniform centres
    assert float(area.float().mean()) == pytest.approx(600 * 0.875**2, rel=0.02)
    covered = inside.float().mean(0)
    assert covered[20, 30] > covered[0, 0] > 0


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_hard_targets_when_nothing_is_mixed(kind: str) -> None:
    images, targets = mix(flat(1), torch.tensor([2]), keys=keys_of(1), num_classes=4, kind=kind, alpha=0.2)
    assert torch.equal(images, flat(1)) and targets.tolist() == [[0, 0, 1, 0]]
    images, targets = mix(flat(4), torch.arange(4), keys=keys_of(4), num_classes=4, kind="none", alpha=0.2)
    assert torch.equal(images, flat(4)) and torch.equal(targets, torch.eye(4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_meet_the_pairs_of_one_rank(kind: str, world: int) -> None:
    labels, keys = torch.arange(24) % 7, keys_of(24)
    images, targets = mix(flat(24), labels, keys=keys, num_classes=7, kind=kind, alpha=0.8)
    for rank in range(world):
        rows = slice(rank, None, world)
        rank_images, rank_targets = mix(
            flat(24)[rows], labels[rows], keys=keys[rows], num_classes=7, kind=kind, alpha=0.8
        )
        assert torch.equal(rank_images, images[rows]) and torch.equal(rank_targets, targets[rows])


def test_global_random_state_does_not_change() -> None:
    state = torch.get_rng_state()
    mix(flat(4), torch.arange(4), keys=keys_of(4), num_classes=4, kind="cutmix", alpha=0.8)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_equals_cpu(kind: str) -> None:
    labels, keys = torch.arange(16), keys_of(16)
    images, targets = mix(flat(16), labels, keys=keys, num_classes=16, kind=kind, alpha=0.8)
    cuda = mix(flat(16).cuda(), labels.cuda(), keys=keys, num_classes=16, kind=kind, alpha=0.8)
    torch.testing.assert_close(cuda[0].cpu(), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(cuda[1].cpu(), targets, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("alpha", [1e-300, 1e-6, 1e6, 1e300])
def test_any_beta_parameter_gives_finite_images_and_targets(kind, alpha):
    images, labels = torch.rand(6, 3, 8, 10), torch.arange(6)
    keys = torch.randint(-(2**63), 2**63 - 1, (6,))
    mixed, targets = mix(images, labels, keys=keys, num_classes=6, kind=kind, alpha=alpha)
    assert bool(torch.isfinite(mixed).all()) and float(mixed.min()) >= 0 and float(mixed.max()) <= 1
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    if kind == "mixup":  # one of the two images, or their mean
        own = targets.gather(1, labels[:, None])
        expected = 0.5 if alpha > 1 else own.round()
        assert float((own - expected).abs().max()) < 0.01
