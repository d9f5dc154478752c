"""Losses against torch, timm and explicit formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm.loss
import torch
from torch.nn import functional as F

from fastflower.core.errors import InputError
from fastflower.model.heads import CosineHead, build_head
from fastflower.model.losses import Loss, add_angle, build_loss, smooth, subtract_cosine
from fastflower.recipe import load
from support.member_metas import member_meta

CLASSES = 5
COUNTS = [50, 20, 10, 5, 1]


def loss_of(*overrides: str, counts: list[int] = COUNTS) -> Loss:
    return build_loss(load(None, list(overrides)), counts)


def batch(rows: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels, and mixed targets of two classes per row."""
    logits, labels = 3 * torch.randn(rows, CLASSES), torch.arange(rows) % CLASSES
    hard = F.one_hot(labels, CLASSES).float()
    weight = torch.rand(rows, 1)
    return logits, labels, weight * hard + (1 - weight) * hard.roll(rows // 2, 0)


def close(got: torch.Tensor, want: torch.Tensor | float, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), atol=tolerance, rtol=1e-5)


def test_smoothed_loss_equals_torchs_on_hard_and_soft_targets() -> None:
    logits, labels, mixed = batch()
    loss = loss_of("loss.name=lsce", "reg.ls_eps=0.05")
    hard = F.one_hot(labels, CLASSES).float()
    close(loss(logits, hard), F.cross_entropy(logits, labels, label_smoothing=0.05))
    close(loss(logits, mixed), F.cross_entropy(logits, mixed, label_smoothing=0.05))
    close(loss(logits, hard), timm.loss.LabelSmoothingCrossEntropy(0.05)(logits, labels))
    close(smooth(hard[:1], 0.05), [[0.96, 0.01, 0.01, 0.01, 0.01]])


def test_plain_cross_entropy_ignores_smoothing() -> None:
    logits, labels, mixed = batch()
    loss = loss_of("loss.name=ce", "reg.ls_eps=0.3")
    close(loss(logits, F.one_hot(labels, CLASSES)), F.cross_entropy(logits, labels))
    close(loss(logits, mixed), F.cross_entropy(logits, mixed))


def test_mixing_then_smoothing_equals_smoothing_then_mixing() -> None:
    _, labels, _ = batch()
    a, b = F.one_hot(labels, CLASSES).float(), F.one_hot(labels.roll(3), CLASSES).float()
    close(smooth(0.3 * a + 0.7 * b, 0.1), 0.3 * smooth(a, 0.1) + 0.7 * smooth(b, 0.1))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_loss_equals_timms_on_hard_labels(gamma: float) -> None:
    logits, labels, _ = batch()
    loss = loss_of("loss.name=focal", f"loss.focal_gamma={gamma}", "reg.ls_eps=0")
    reference = timm.loss.AsymmetricLossSingleLabel(gamma_pos=gamma, gamma_neg=0, eps=0)
    close(loss(logits, F.one_hot(labels, CLASSES)), reference(logits.clone(), labels))


def test_focal_loss_at_nine_tenths_and_with_soft_targets() -> None:
    certain = torch.tensor([[math.log(0.9), math.log(0.1)]])
    loss = Loss(gamma=2.0)
    close(loss(certain, torch.tensor([[1.0, 0.0]])), 0.00105361, 1e-8)
    want = 0.7 * 0.1**2 * -math.log(0.9) + 0.3 * 0.9**2 * -math.log(0.1)
    close(loss(certain, torch.tensor([[0.7, 0.3]])), want)
    smoothed = loss_of("loss.name=focal", "loss.focal_gamma=2", "reg.ls_eps=0.2", counts=[1, 1])
    want = 0.9 * 0.1**2 * -math.log(0.9) + 0.1 * 0.9**2 * -math.log(0.1)
    close(smoothed(certain, torch.tensor([[1.0, 0.0]])), want)


def test_balanced_softmax_adds_the_prior_without_changing_the_logits() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    before = logits.clone()
    counts = [1000, 100, 10]
    for label, p in enumerate((0.7825, 0.2127, 0.0047)):
        loss = loss_of("loss.name=bsce", "reg.ls_eps=0", "sampler.type=none", counts=counts)
        got = torch.exp(-loss(logits, F.one_hot(torch.tensor([label]), 3)))
        close(got, p, 6e-5)
    assert torch.equal(logits, before)
    wide, _, mixed = batch()
    loss = loss_of("loss.name=bsce", "reg.ls_eps=0.1", "sampler.type=none")
    shifted = wide + torch.tensor(COUNTS).log()
    close(loss(wide, mixed), F.cross_entropy(shifted, mixed, label_smoothing=0.1))


def test_balanced_softmax_masks_classes_without_images() -> None:
    loss = loss_of("loss.name=bsce", "reg.ls_eps=0.1", "sampler.type=none", counts=[50, 20, 10, 5, 0])
    logits, labels, _ = batch()
    target = F.one_hot(labels % 4, CLASSES).float()
    logits.requires_grad_()
    value = loss(logits, target)
    four = logits.detach()[:, :4] + torch.tensor([50.0, 20, 10, 5]).log()
    close(value, F.cross_entropy(four, target[:, :4], label_smoothing=0.1))
    value.backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and not logits.grad[:, 4].any()


def test_empty_training_split_is_refused() -> None:
    with pytest.raises(InputError, match="training split of the fold is empty"):
        loss_of("loss.name=bsce", "sampler.type=none", counts=[0, 0])


def test_binary_decisions_equal_torchs_with_the_weight_of_positives() -> None:
    logits, _, mixed = batch()
    loss = loss_of("loss.name=bce", "loss.pos_weight=auto", "reg.ls_eps=0.1")
    weight = torch.tensor([(sum(COUNTS) - n) / n for n in COUNTS])
    target = mixed * 0.9 + 0.1 / CLASSES
    want = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="sum") / len(
        logits
    )
    close(loss(logits, mixed), want)
    plain = loss_of("loss.name=bce", "reg.ls_eps=0")
    close(plain(logits, mixed), F.binary_cross_entropy_with_logits(logits, mixed) * CLASSES)


def test_automatic_pos_weight_of_two_classes() -> None:
    loss = loss_of("loss.name=bce", "loss.pos_weight=auto", counts=[468, 532])
    assert loss.pos_weight is not None
    assert loss.pos_weight[1].item() == pytest.approx(0.879699, abs=1e-6)


def test_two_classes_are_one_decision_whose_sigmoid_is_the_softmax() -> None:
    logits, labels = torch.randn(9, 2), torch.arange(9) % 2
    loss = loss_of("loss.name=bce", "loss.pos_weight=auto", "reg.ls_eps=0", counts=[468, 532])
    margin = logits[:, 1] - logits[:, 0]
    want = F.binary_cross_entropy_with_logits(margin, labels.float(), pos_weight=torch.tensor(468 / 532))
    close(loss(logits, F.one_hot(labels, 2).float()), want)
    close(margin.sigmoid(), logits.softmax(1)[:, 1])
    plain = loss_of("loss.name=bce", "reg.ls_eps=0.1", counts=[1, 1])
    close(plain(logits, F.one_hot(labels, 2).float()), F.cross_entropy(logits, labels, label_smoothing=0.1))


def arcface_by_angles(cosine: np.ndarray, margin: float) -> np.ndarray:
    """The formula of pytorch-metric-learning: through the angle, with a monotone continuation beyond pi."""
    angle = np.arccos(np.clip(cosine, -1, 1))
    return np.where(angle <= np.pi - margin, np.cos(angle + margin), np.cos(angle) - margin * np.sin(margin))


def test_margins_match_the_formulas_on_angles() -> None:
    cosine = torch.linspace(-0.9999, 0.9999, 401, dtype=torch.float64)
    for margin in (0.2, 0.3, 0.4):
        want = torch.from_numpy(arcface_by_angles(cosine.numpy(), margin))
        torch.testing.assert_close(add_angle(cosine, margin), want, atol=1e-6, rtol=0)
        assert (add_angle(cosine, margin).diff() > -0.02).all()
    close(subtract_cosine(cosine, 0.3), cosine - 0.3)


@pytest.mark.parametrize("head", ["arcface", "cosface"])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_margin_loss_moves_the_true_class_only(head: str, eps: float) -> None:
    cosine = torch.rand(6, CLASSES) * 1.8 - 0.9
    labels = torch.arange(6) % CLASSES
    shifted = cosine.clone()
    for row, label in enumerate(labels.tolist()):
        positive = cosine[row, label].numpy()
        shifted[row, label] = float(arcface_by_angles(positive, 0.3) if head == "arcface" else positive - 0.3)
    loss = loss_of(f"model.head={head}", "model.margin=0.3", "model.head_scale=20", f"reg.ls_eps={eps}")
    want = F.cross_entropy(20 * shifted, labels, label_smoothing=eps)
    close(loss(20 * cosine, F.one_hot(labels, CLASSES)), want, 1e-4)


@pytest.mark.parametrize("name", ["ce", "lsce", "focal", "bsce", "bce"])
@pytest.mark.parametrize("head", ["arcface", "cosface"])
def test_margin_loss_of_a_mixed_target_is_the_mixture_of_two_losses(head: str, name: str) -> None:
    loss = loss_of(f"model.head={head}", f"loss.name={name}", "sampler.type=none")
    logits, a = 30 * (torch.rand(4, CLASSES) * 2 - 1), torch.tensor([0, 1, 2, 3])
    first, second = F.one_hot(a, CLASSES).float(), F.one_hot((a + 1) % CLASSES, CLASSES).float()
    mixture = 0.3 * loss(logits, first) + 0.7 * loss(logits, second)
    close(loss(logits, 0.3 * first + 0.7 * second), mixture, 1e-4)
    one_class = 0.4 * first + 0.6 * first  # both partners of one class
    close(loss(logits, one_class), loss(logits, first), 1e-4)


@pytest.mark.parametrize("name", ["ce", "lsce", "focal", "bsce", "bce"])
@pytest.mark.parametrize("head", ["linear", "arcface", "cosface"])
def test_microbatches_give_the_gradient_of_the_whole_batch(name: str, head: str) -> None:
    loss = loss_of(f"loss.name={name}", f"model.head={head}", "sampler.type=none")
    logits, _, mixed = batch()
    full = logits.clone().requires_grad_()
    loss(full, mixed).backward()
    split = logits.clone().requires_grad_()
    for rows in (slice(0, 5), slice(5, 12)):
        (loss(split[rows], mixed[rows]) * len(split[rows]) / len(split)).backward()
    assert full.grad is not None and split.grad is not None
    close(split.grad, full.grad)


@pytest.mark.parametrize("name", ["ce", "lsce", "focal", "bsce", "bce"])
@pytest.mark.parametrize("head", ["linear", "arcface", "cosface"])
def test_losses_are_float32_and_finite_for_extreme_logits(name: str, head: str) -> None:
    loss = loss_of(f"loss.name={name}", f"model.head={head}", "loss.focal_gamma=0.5", "sampler.type=none")
    logits = torch.full((2, CLASSES), -30.0, dtype=torch.bfloat16)
    logits[0, 0] = logits[1, 1] = 30.0
    logits.requires_grad_()
    value = loss(logits, torch.eye(CLASSES)[:2].roll(1, 0))
    assert value.dtype == torch.float32 and value.isfinite()
    value.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_losses_hold_no_state() -> None:
    loss = loss_of("loss.name=bsce", "sampler.type=none")
    assert not loss.state_dict() and not list(loss.parameters())


def test_cosine_head_gives_scaled_cosines_without_margin_in_float32() -> None:
    head = build_head(member_meta(head="arcface"), 8)
    assert isinstance(head, CosineHead)
    features = torch.randn(5, 8)
    want = 30 * F.cosine_similarity(features[:, None], head.weight[None], dim=2)
    close(head(features), want, 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(features), head(features.clone())) and head(features).dtype == torch.float32
        close(head(features), want, 1e-4)


def test_linear_head_is_initialised_as_timms() -> None:
    head = build_head(member_meta(num_classes=1000), 64)
    assert not head.bias.any() and head.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("margin", [0.0, 0.999])
@pytest.mark.parametrize("head", ["arcface", "cosface"])
def test_margins_and_scales_at_their_bounds_give_finite_losses_and_gradients(head, margin, scale):
    """Also where features and weights point exactly the same or the opposite way, for hard and for mixed targets."""
    cosine = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.5], [0.0, 0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5], [1 - 1e-7, 1e-7, 0.0]])
    loss = Loss(0.1, margin=head, margin_size=margin, scale=scale)(scale * cosine, targets)
    (gradient,) = torch.autograd.grad(loss, cosine)
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(gradient).all())
