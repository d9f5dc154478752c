"""Training losses: logits (B, C) and soft targets (B, C) to the plain mean over rows, in float32.

A plain mean is what makes microbatches and ranks add up to the whole batch. Every loss but `ce` smooths its
targets with reg.ls_eps, after mixing; smoothing and mixing commute.
Scores never use these: the validation loss is `scores.nll`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflower.core.errors import InputError
from fastflower.model.heads import MARGIN_HEADS
from fastflower.recipe import Recipe


def build_loss(recipe: Recipe, class_counts: Sequence[int]) -> Loss | Distilled:
    """The loss of a recipe; `class_counts` (C,) are the images of each class in the fold's training part."""
    distill = recipe.distill
    loss = _of_labels(recipe, class_counts)
    if not distill.teacher:
        return loss
    return Distilled(loss, distill.weight, temperature=distill.temperature, t_squared=distill.t_squared)


def _of_labels(recipe: Recipe, class_counts: Sequence[int]) -> Loss:
    name, model = recipe.loss.name, recipe.model
    counts = torch.as_tensor(class_counts, dtype=torch.float32)
    if not (counts > 0).any():
        raise InputError("the training part of the fold is empty; check data.fold and the label file")
    return Loss(
        smoothing=0.0 if name == "ce" else recipe.reg.ls_eps,
        gamma=recipe.loss.focal_gamma if name == "focal" else 0.0,
        log_prior=counts.log() if name == "bsce" else None,
        pos_weight=pos_weight(counts, recipe.loss.pos_weight) if name == "bce" else None,
        margin=model.head if model.head in MARGIN_HEADS else None,
        margin_size=model.margin,
        scale=model.head_scale,
    )


class Loss(nn.Module):
    """Cross-entropy with any of: smoothing; a focus on hard rows (gamma); the prior log n_c (C,) of balanced
    softmax (arXiv:2007.10740), -inf for classes without images; one binary decision a class, weighted by
    pos_weight (C,); a margin. No parameters, nothing to save.

    Two classes are one decision, not two: it is taken on the difference of their logits, whose sigmoid is their
    softmax, so that training, evaluation and hand-in speak of the same probability, whatever the loss.
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
        """Logits (B, C) of any precision, targets (B, C) that sum to 1 a row -> float32 scalar.

        With a margin head a target may hold two classes at most, which is what mixing makes: each of the two
        is priced with its own margin, weighted by its share.
        """
        logits, targets = logits.float(), targets.float()
        if self.margin is None:
            return self._rows(logits, targets).mean()
        shares, classes = targets.topk(2)
        total = logits.new_zeros(len(logits))
        for share, label in zip(shares.unbind(1), classes.unbind(1), strict=True):
            alone = F.one_hot(label, logits.shape[1]).to(logits)
            total = total + share * self._rows(self._with_margin(logits, alone.bool()), alone)
        return total.mean()

    def _rows(self, logits: Tensor, targets: Tensor) -> Tensor:
        """One loss a row (B,)."""
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


class Distilled(nn.Module):
    """(1 - weight) of a loss on labels and `weight` of KL(teacher || student), both softened by a temperature T.

    Softened gradients shrink as 1 / T^2; times T^2 they keep their share whatever T is (Hinton et al. 2015,
    arXiv:1503.02531). No parameters, nothing to save.
    """

    def __init__(self, loss: Loss, weight: float, *, temperature: float, t_squared: bool) -> None:
        super().__init__()
        self.loss, self.weight, self.temperature = loss, weight, temperature
        self.scale = temperature**2 if t_squared else 1.0

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, C), targets (B, 2C): the labels', then the teacher's probabilities at T -> float32 scalar."""
        labels, teacher = targets.float().chunk(2, dim=1)
        student = (logits.float() / self.temperature).log_softmax(1)
        divergence = F.kl_div(student, teacher, reduction="batchmean") * self.scale
        return (1 - self.weight) * self.loss(logits, labels) + self.weight * divergence


def consistency(made: Tensor, learned: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """FixMatch's loss on unlabelled images (arXiv:2001.07685, equation 4), float32, and labels and mask (N,).

    Logits (N, C) of one view make the labels, those of the other learn them: the mean over all N rows of
    1[max p >= threshold] * cross-entropy. Rows below the threshold count in the mean, or microbatches would not
    add up. No gradient flows through `made`; Lee's pseudo-labels (2013) are `consistency(x, x, threshold)`.
    """
    confidence, labels = made.detach().float().softmax(1).max(1)
    mask = confidence >= threshold
    losses = F.cross_entropy(learned.float(), labels, reduction="none")
    return torch.where(mask, losses, 0.0).mean(), labels, mask


def smooth(targets: Tensor, eps: float, absent: Tensor | None = None) -> Tensor:
    """(1 - eps) of the targets (B, C) and eps spread evenly over the classes that are not absent (C,)."""
    if eps == 0:
        return targets
    if absent is None:
        return targets * (1 - eps) + eps / targets.shape[1]
    return targets * (1 - eps) + eps * (~absent) / (~absent).sum()


def focus(log_probs: Tensor, gamma: float) -> Tensor | float:
    """The factor (1 - p)^gamma of the focal loss (arXiv:1708.02002), class by class for soft targets."""
    # 1 - p from log p without cancellation; the floor keeps the slope of a power below 1 finite
    return (-torch.expm1(log_probs)).clamp_min(1e-12) ** gamma if gamma else 1.0


def pos_weight(counts: Tensor, value: float | str) -> Tensor:
    """The weight (C,) of a class's own images in its binary decision; auto: others over own."""
    weight = (counts.sum() - counts) / counts if value == "auto" else torch.full_like(counts, float(value))
    return torch.where(counts > 0, weight, 1.0)


def add_angle(cosine: Tensor, margin: float) -> Tensor:
    """cos(angle + margin); beyond pi a line of the same slope sign, so that it never rises again."""
    sine = (1 - cosine * cosine).clamp_min(1e-12).sqrt()
    turned = cosine * math.cos(margin) - sine * math.sin(margin)
    return torch.where(cosine > -math.cos(margin), turned, cosine - margin * math.sin(margin))


def subtract_cosine(cosine: Tensor, margin: float) -> Tensor:
    """CosFace: cos(angle) - margin."""
    return cosine - margin
