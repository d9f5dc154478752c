"""Training losses of logits (B, C) and soft targets (B, C): the mean over rows, in float32.

The mean is unweighted, so that microbatches and ranks add up to the whole batch. Every loss but `ce` smooths its
targets with reg.ls_eps, after mixing (the two commute). Scores never use these: the validation loss is `scores.nll`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflower.core import own_parts
from fastflower.core.errors import InputError
from fastflower.model.heads import MARGIN_HEADS
from fastflower.recipe import Recipe


def build_loss(recipe: Recipe, class_counts: Sequence[int]) -> Loss | Distilled:
    """The loss of a recipe; `class_counts` (C,) are the images per class in the fold's training split."""
    distill = recipe.distill
    loss = _label_loss(recipe, class_counts)
    if not distill.teacher:
        return loss
    return Distilled(loss, distill.weight, temperature=distill.temperature, t_squared=distill.t_squared)


def _label_loss(recipe: Recipe, class_counts: Sequence[int]) -> Loss:
    name, model = recipe.loss.name, recipe.model
    counts = torch.as_tensor(class_counts, dtype=torch.float32)
    if not (counts > 0).any():
        raise InputError("the training split of the fold is empty; check data.fold and the label file")
    kind = functools.partial(OwnLoss, name) if own_parts.is_own(name) else Loss
    return kind(
        smoothing=0.0 if name == "ce" else recipe.reg.ls_eps,
        gamma=recipe.loss.focal_gamma if name == "focal" else 0.0,
        log_prior=counts.log() if name == "bsce" else None,
        pos_weight=pos_weight(counts, recipe.loss.pos_weight) if name == "bce" else None,
        margin=model.head if model.head in MARGIN_HEADS else None,
        margin_size=model.margin,
        scale=model.head_scale,
    )


class Loss(nn.Module):
    """Cross-entropy with any of these options; it has no parameters and no state.

    `smoothing` of the targets; `gamma` of the focal loss; `log_prior` (C,) of balanced softmax (arXiv:2007.10740),
    log n_c, -inf for classes without images; `pos_weight` (C,) for one binary decision per class instead of a
    softmax; a `margin`. With two classes the binary decision is one, on the difference of their logits, whose sigmoid
    is their softmax: training, evaluation and hand-in use the same probability, whatever the loss.
    """

    log_prior: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        smoothing: float = 0.0,
        gamma: float = 0.0,
        *,
        log_prior: Tensor | None = None,
        pos_weight: Tensor | None = None,
        margin: str | None = None,
        margin_size: float = 0.3,
        scale: float = 30.0,
    ) -> None:
        super().__init__()
        self.smoothing, self.gamma = smoothing, gamma
        self.margin, self.margin_size, self.scale = margin, margin_size, scale
        self.register_buffer("log_prior", log_prior, persistent=False)
        self.register_buffer("pos_weight", pos_weight, persistent=False)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, C) of any precision and targets (B, C) whose rows sum to 1 -> float32 scalar.

        With a margin head a target may have at most two classes, as mixing produces: each of the two has a loss with
        its own margin, weighted by its target.
        """
        logits, targets = logits.float(), targets.float()
        if self.margin is None:
            return self._rows(logits, targets).mean()
        weights, classes = targets.topk(2)
        total = logits.new_zeros(len(logits))
        for weight, label in zip(weights.unbind(1), classes.unbind(1), strict=True):
            hard = F.one_hot(label, logits.shape[1]).to(logits)
            total = total + weight * self._rows(self._with_margin(logits, hard.bool()), hard)
        return total.mean()

    def _rows(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each row (B,)."""
        if self.pos_weight is not None:
            targets, weight = smooth(targets, self.smoothing), self.pos_weight
            if len(weight) == 2:
                logits, targets, weight = logits.diff(dim=1), targets[:, 1:], weight[1:]
            decisions = F.binary_cross_entropy_with_logits(
                logits, targets, pos_weight=weight, reduction="none"
            )
            return decisions.sum(1)
        absent = None
        if self.log_prior is not None:
            logits, absent = logits + self.log_prior, self.log_prior.isinf()
        targets = smooth(targets, self.smoothing, absent)
        log_probs = logits.log_softmax(1)
        if absent is not None:
            log_probs = log_probs.masked_fill(absent, 0.0)
        return -(targets * focus(log_probs, self.gamma) * log_probs).sum(1)

    def _with_margin(self, logits: Tensor, label: Tensor) -> Tensor:
        apply = add_angle if self.margin == "arcface" else subtract_cosine
        return torch.where(label, self.scale * apply(logits / self.scale, self.margin_size), logits)


class OwnLoss(Loss):
    """A loss of the user's own: a function of logits and smoothed targets (B, C) to the loss of each row (B,)."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(**options)
        self.of_rows = own_parts.find("loss.name", name)
        logits = torch.zeros(3, 2, requires_grad=True)
        got = own_parts.call("loss.name", name, logits, torch.eye(2)[[0, 1, 0]])
        shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
        if shape != (3,):
            raise own_parts.fault(
                "loss.name", name, f"gives {shape} for three rows, must give the loss of each, (3,)"
            )
        if not got.requires_grad:
            raise own_parts.fault("loss.name", name, "gives a loss without a gradient to the logits")

    def _rows(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses: Tensor = self.of_rows(logits, smooth(targets, self.smoothing))
        return losses


class Distilled(nn.Module):
    """(1 - weight) * loss on labels + weight * KL(teacher || student), teacher and student at temperature T.

    Gradients at temperature T shrink as 1 / T^2; with `t_squared` the KL is multiplied by T^2, so that its weight
    does not depend on T (Hinton et al. 2015, arXiv:1503.02531). No parameters, no state.
    """

    def __init__(self, loss: Loss, weight: float, *, temperature: float, t_squared: bool) -> None:
        super().__init__()
        self.loss, self.weight, self.temperature = loss, weight, temperature
        self.scale = temperature**2 if t_squared else 1.0

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, C) and targets (B, 2C), labels then teacher probabilities at T -> float32 scalar."""
        labels, teacher = targets.float().chunk(2, dim=1)
        student = (logits.float() / self.temperature).log_softmax(1)
        divergence = F.kl_div(student, teacher, reduction="batchmean") * self.scale
        return (1 - self.weight) * self.loss(logits, labels) + self.weight * divergence


def auxiliary_loss(
    logits: Tensor, targets: Tensor, *, sizes: Sequence[int], weights: Sequence[float]
) -> Tensor:
    """The weighted sum, float32, of a cross-entropy for each auxiliary column of logits and soft targets (B, K).

    `sizes` are the columns' widths within K. A row without a value, whose target is 0, adds nothing; the mean is over
    all rows, or microbatches and ranks would not add up.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for weight, own, wanted in zip(
        weights, logits.split(list(sizes), 1), targets.split(list(sizes), 1), strict=True
    ):
        total = total - weight * (wanted.float() * own.float().log_softmax(1)).sum(1).mean()
    return total


def consistency(
    label_logits: Tensor, learned_logits: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """FixMatch's loss on unlabelled images (arXiv:2001.07685, equation 4), the pseudo-labels (N,) and their mask (N,).

    `label_logits` (N, C) of one view give the pseudo-labels, `learned_logits` (N, C) of another view learn them. The
    loss, float32, is the mean over all N rows of 1[max p >= threshold] * cross-entropy; rows below the threshold
    count in the mean, or microbatches would not add up. No gradient flows through `label_logits`; Lee's
    pseudo-labels (2013) are `consistency(x, x, threshold)`.
    """
    confidence, labels = label_logits.detach().float().softmax(1).max(1)
    mask = confidence >= threshold
    losses = F.cross_entropy(learned_logits.float(), labels, reduction="none")
    return torch.where(mask, losses, 0.0).mean(), labels, mask


def smooth(targets: Tensor, eps: float, absent: Tensor | None = None) -> Tensor:
    """(1 - eps) * targets (B, C) + eps spread evenly over the classes that are not `absent`, bool (C,)."""
    if eps == 0:
        return targets
    if absent is None:
        return targets * (1 - eps) + eps / targets.shape[1]
    return targets * (1 - eps) + eps * (~absent) / (~absent).sum()


def focus(log_probs: Tensor, gamma: float) -> Tensor | float:
    """The focal loss's factor (1 - p)^gamma (arXiv:1708.02002), one per class because targets are soft."""
    # 1 - p from log p without cancellation; the floor keeps the slope of a power below 1 finite
    return (-torch.expm1(log_probs)).clamp_min(1e-12) ** gamma if gamma else 1.0


def pos_weight(counts: Tensor, value: float | str) -> Tensor:
    """Weight (C,) of the positives in each class's binary decision; `auto` is negatives / positives."""
    weight = (counts.sum() - counts) / counts if value == "auto" else torch.full_like(counts, float(value))
    return torch.where(counts > 0, weight, 1.0)


def add_angle(cosine: Tensor, margin: float) -> Tensor:
    """ArcFace: cos(angle + margin), continued as a decreasing line beyond pi."""
    sine = (1 - cosine * cosine).clamp_min(1e-12).sqrt()
    turned = cosine * math.cos(margin) - sine * math.sin(margin)
    return torch.where(cosine > -math.cos(margin), turned, cosine - margin * math.sin(margin))


def subtract_cosine(cosine: Tensor, margin: float) -> Tensor:
    """CosFace: cos(angle) - margin."""
    return cosine - margin
