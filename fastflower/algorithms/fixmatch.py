"""FixMatch (Sohn et al., arXiv:2001.07685), with ReMixMatch's distribution alignment, and pseudo-labels (Lee 2013).

Labelled images and the views of unlabelled ones go through the network in one forward pass, so that BatchNorm
sees all of them, as in the authors' code. MixUp and CutMix apply to the labelled ones only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from composer.core import Algorithm, Event, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn
from torch.nn import functional as F

from fastflower.data.transforms.augment import augment
from fastflower.data.unlabelled import strong_augmentation
from fastflower.model.classifier import float_images
from fastflower.model.losses import consistency
from fastflower.recipe import Recipe

SUMS = ("images", "loss", "known", "correct")  # known: pseudo-labels whose true class is known
MEAN_DECAY = 0.99  # per step, of the mean prediction: about the 128 batches of the paper


def unlabelled_weight(epoch: int, step: int, *, steps: int, lambda_u: float, ramp_epochs: int) -> float:
    """lambda_u at a step of an epoch (both from 0): rises linearly from 0 over `ramp_epochs`, then constant."""
    return lambda_u * min(1.0, (epoch + step / max(steps, 1)) / ramp_epochs) if ramp_epochs else lambda_u


class FixMatch(Algorithm):
    """BATCH_START: augment the strong views. BEFORE_FORWARD: append the unlabelled views to the labelled images.
    AFTER_FORWARD: split their logits off. AFTER_LOSS: add lambda_u times their loss. EPOCH_START, BATCH_END: reset
    and add up the epoch's counts.

    Works on a batch with "weak" and "strong" uint8 (B, mu, H, W, 3), "strong_key" and "truth" int64 (B, mu), the keys
    on the host. Strong views become float32 (B, mu, 3, H, W), and the keys are taken out of the batch.
    `teacher`, in eval mode, labels the weak views in a forward pass of its own; None: the network labels them, as
    in the paper. `precision` makes the context manager of the teacher's forward pass, beside Composer's own.
    `fill` (3,), in 0..255, is the colour of erased boxes.

    With semi.align the probabilities p of the weak views become p * class_prior / mean_prediction, normalised
    (Berthelot et al., arXiv:1911.09785, section 3.1), so that a class which is predicted too often gets fewer
    pseudo-labels. State: the epoch's counts and the mean prediction.
    """

    def __init__(
        self,
        recipe: Recipe,
        class_counts: Sequence[int],
        *,
        fill: tuple[float, ...],
        teacher: nn.Module | None = None,
        precision: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.semi = recipe.semi
        self.aug, self.erase_p = strong_augmentation(recipe)
        self.fill = fill
        self.teacher = teacher
        self.precision = precision
        self.lambda_u = 0.0
        self.counts = torch.zeros(len(class_counts), dtype=torch.float64)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64)
        self.class_prior = torch.tensor(class_counts, dtype=torch.float64) / sum(class_counts)
        self.mean_prediction = self.class_prior.clone()
        self._microbatches: list[Tensor] = []  # this step's counts, predictions and SUMS, (C + C + 4,)
        self._label_logits: Tensor = torch.empty(0)
        self._learned_logits: Tensor = torch.empty(0)

    def match(self, event: Event, state: State) -> bool:
        return event in self._handlers()

    def apply(self, event: Event, state: State, logger: Logger | None) -> None:
        self._handlers()[event](state)

    def _handlers(self) -> dict[Event, Any]:
        return {
            Event.EPOCH_START: self._reset,
            Event.BATCH_START: self._augment_strong,
            Event.BEFORE_FORWARD: self._append_views,
            Event.AFTER_FORWARD: self._split_logits,
            Event.AFTER_LOSS: self._add_loss,
            Event.BATCH_END: self._count,
        }

    @torch.no_grad()
    def _augment_strong(self, state: State) -> None:
        if self.semi.method != "pseudo":
            batch = dict(state.batch)
            images, keys = batch["strong"], batch.pop("strong_key").flatten()
            views = augment(
                images.flatten(0, 1), keys, aug=self.aug, erase_p=self.erase_p, fill=self.fill
            ).unflatten(0, images.shape[:2])
            state.batch = {**batch, "strong": views}

    def _append_views(self, state: State) -> None:
        batch = state.batch
        weak = float_images({"image": batch["weak"].flatten(0, 1)})
        views = []
        if self.teacher is not None:
            with (
                torch.no_grad(),
                get_precision_context(state.precision, state.precision_config),
                self.precision(),
            ):
                logits = self.teacher(weak)
            self._label_logits = logits[:, : len(self.counts)]  # without those of auxiliary heads
        if self.teacher is None or self.semi.method == "pseudo":
            views.append(weak)
        if self.semi.method == "fixmatch":
            views.append(batch["strong"].flatten(0, 1))
        state.batch = {**batch, "image": torch.cat([batch["image"], *views])}

    def _split_logits(self, state: State) -> None:
        assert isinstance(state.outputs, Tensor)
        rows = len(state.batch["label"])
        views = state.outputs[rows:, : len(self.counts)].split(rows * self.semi.mu)
        state.outputs = state.outputs[:rows]
        self._learned_logits = views[-1]
        if self.teacher is None:
            self._label_logits = views[0]

    def _add_loss(self, state: State) -> None:
        logits = self._label_logits.detach().float()
        predicted = self._label_logits.detach().double().softmax(1).sum(0)
        if self.semi.align:
            ratio = self.class_prior.clamp_min(1e-6) / self.mean_prediction.clamp_min(1e-6)
            logits = logits + ratio.log().to(logits)
        loss, labels, mask = consistency(logits, self._learned_logits, self.semi.threshold)
        self._learn(state, loss, labels=labels, mask=mask, predicted=predicted)

    def _learn(self, state: State, loss: Tensor, *, labels: Tensor, mask: Tensor, predicted: Tensor) -> None:
        """Add the loss of unlabelled images to the step's, and count their labels (N,) where `mask` is true."""
        self.lambda_u = unlabelled_weight(
            state.timestamp.epoch.value,
            state.timestamp.batch_in_epoch.value,
            steps=int(state.dataloader_len or 1),
            lambda_u=self.semi.lambda_u,
            ramp_epochs=self.semi.ramp_epochs,
        )
        assert isinstance(state.loss, Tensor)
        state.loss = state.loss + self.lambda_u * loss
        truth = state.batch["truth"].flatten()
        known = mask & (truth >= 0)
        counts = (F.one_hot(labels, len(self.counts)) * mask[:, None]).sum(0)
        images = torch.ones_like(labels).sum()
        sums = [images, images * loss.detach(), known.sum(), (known & (labels == truth)).sum()]
        entry = torch.cat([counts, predicted, torch.stack([n.double() for n in sums])])
        self._microbatches = [
            *self._microbatches,
            entry,
        ]  # a new list: a memory trial works on a shallow copy

    def _count(self, state: State) -> None:
        step = torch.stack(self._microbatches).sum(0)
        self._microbatches = []
        if dist.get_world_size() > 1:  # at each step, so that a checkpoint holds the counts of all ranks
            dist.all_reduce(step)
        classes = len(self.counts)
        counts, predicted, sums = step.cpu().split([classes, classes, len(SUMS)])
        self.counts += counts
        self.sums += sums
        if predicted.isfinite().all():  # not after a step that the gradient guard skips
            self.mean_prediction = MEAN_DECAY * self.mean_prediction + (1 - MEAN_DECAY) * predicted / sums[0]

    def _reset(self, state: State) -> None:
        self.counts.zero_()
        self.sums.zero_()

    def row(self) -> dict[str, Any]:
        """The epoch so far: fraction of unlabelled images with a pseudo-label, their count per class, the loss on all
        unlabelled images, the last lambda_u, and the accuracy of pseudo-labels with a known true class (else None).
        """
        sums = dict(zip(SUMS, self.sums.tolist(), strict=True))
        images = max(sums["images"], 1.0)
        return {
            "mask_rate": float(self.counts.sum()) / images,
            "pseudo_counts": [int(n) for n in self.counts.tolist()],
            "pseudo_accuracy": sums["correct"] / sums["known"] if sums["known"] else None,
            "unlabelled_loss": sums["loss"] / images,
            "lambda_u": self.lambda_u,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "counts": self.counts.clone(),
            "sums": self.sums.clone(),
            "mean": self.mean_prediction.clone(),
            "lambda_u": self.lambda_u,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts, self.sums = state["counts"].clone(), state["sums"].clone()
        self.mean_prediction = state["mean"].clone()
        self.lambda_u = state["lambda_u"]
