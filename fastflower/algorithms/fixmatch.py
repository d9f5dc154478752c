"""FixMatch (Sohn et al., arXiv:2001.07685), with ReMixMatch's distribution alignment, and pseudo-labels (Lee 2013).

Labelled images and the views of unlabelled ones go through the network in one forward pass, so that BatchNorm's
statistics are those of all of them, as in the authors' code. MixUp and CutMix have touched the labelled ones only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from composer.core import Algorithm, Event, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn
from torch.nn import functional as F

from fastflower.data.transforms.augment import augment
from fastflower.data.unlabelled import strong_augmentation
from fastflower.model.classifier import pixels
from fastflower.model.losses import consistency
from fastflower.recipe import Recipe

SUMS = ("seen", "loss", "known", "right")  # images; their loss; labels made whose truth is known; right ones
MEMORY = 0.99  # a step, of the predictions' mean: about the 128 batches of the paper


def weight(epoch: int, step: int, *, steps: int, lambda_u: float, ramp_epochs: int) -> float:
    """lambda_u at a step of an epoch counted from 0: rising linearly from 0 over ramp_epochs, then constant."""
    return lambda_u * min(1.0, (epoch + step / max(steps, 1)) / ramp_epochs) if ramp_epochs else lambda_u


class FixMatch(Algorithm):
    """BEFORE_FORWARD: put the views behind the labelled images. AFTER_FORWARD: take their logits off again.
    AFTER_LOSS: add lambda_u times their loss. EPOCH_START, BATCH_END: count.

    All of it works on a microbatch: "weak" and "strong" uint8 (b, mu, H, W, 3), "strong_key", "truth" int64
    (b, mu). `teacher`, in eval mode, labels the weak views apart from the network's pass; None: the network
    itself, as the paper has it. `fill` (3,) is what erasing paints.

    With semi.align the probabilities p of the weak views become p * shares / mean, normalised (Berthelot et al.,
    arXiv:1911.09785, section 3.1): `shares` of the labels' classes over the running mean of what was predicted, so
    that a class which looks likely everywhere does not take the others' images. State: the epoch's counts, the mean.
    """

    def __init__(
        self,
        recipe: Recipe,
        class_counts: Sequence[int],
        *,
        fill: tuple[float, ...],
        teacher: nn.Module | None = None,
    ) -> None:
        self.semi = recipe.semi
        self.aug, self.erase_p = strong_augmentation(recipe)
        self.fill = fill
        self.teacher = teacher
        self.lambda_u = 0.0
        self.counts = torch.zeros(len(class_counts), dtype=torch.float64)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64)
        self.shares = torch.tensor(class_counts, dtype=torch.float64) / sum(class_counts)
        self.mean = self.shares.clone()
        self._step: list[Tensor] = []  # of the microbatches: (C + C + 4,)
        self._made: Tensor = torch.empty(0)
        self._learned: Tensor = torch.empty(0)

    def match(self, event: Event, state: State) -> bool:
        return event in self._work()

    def apply(self, event: Event, state: State, logger: Logger | None) -> None:
        self._work()[event](state)

    def _work(self) -> dict[Event, Any]:
        return {
            Event.EPOCH_START: self._forget,
            Event.BEFORE_FORWARD: self._join,
            Event.AFTER_FORWARD: self._part,
            Event.AFTER_LOSS: self._learn,
            Event.BATCH_END: self._count,
        }

    def _join(self, state: State) -> None:
        batch = state.batch
        weak = pixels({"image": batch["weak"].flatten(0, 1)})
        views = []
        if self.teacher is not None:
            with torch.no_grad(), get_precision_context(state.precision, state.precision_config):
                self._made = self.teacher(weak)
        if self.teacher is None or self.semi.method == "pseudo":
            views.append(weak)
        if self.semi.method == "fixmatch":
            images, keys = batch["strong"].flatten(0, 1), batch["strong_key"].flatten()
            with torch.no_grad():
                views.append(augment(images, keys, aug=self.aug, erase_p=self.erase_p, fill=self.fill))
        state.batch = {**batch, "image": torch.cat([batch["image"], *views])}

    def _part(self, state: State) -> None:
        assert isinstance(state.outputs, Tensor)
        rows = len(state.batch["label"])
        views = state.outputs[rows:].split(rows * self.semi.mu)
        state.outputs = state.outputs[:rows]
        self._learned = views[-1]
        if self.teacher is None:
            self._made = views[0]

    def _learn(self, state: State) -> None:
        made, predicted = self._made.detach().float(), self._made.detach().double().softmax(1).sum(0)
        if self.semi.align:
            made = made + (self.shares.clamp_min(1e-6) / self.mean.clamp_min(1e-6)).log().to(made)
        loss, labels, mask = consistency(made, self._learned, self.semi.threshold)
        now, steps = state.timestamp, int(state.dataloader_len or 1)
        semi, epoch, step = self.semi, now.epoch.value, now.batch_in_epoch.value
        self.lambda_u = weight(epoch, step, steps=steps, lambda_u=semi.lambda_u, ramp_epochs=semi.ramp_epochs)
        assert isinstance(state.loss, Tensor)
        state.loss = state.loss + self.lambda_u * loss
        truth = state.batch["truth"].flatten()
        known = mask & (truth >= 0)
        counts = (F.one_hot(labels, len(self.counts)) * mask[:, None]).sum(0)
        images = torch.ones_like(labels).sum()
        numbers = [images, images * loss.detach(), known.sum(), (known & (labels == truth)).sum()]
        self._step.append(torch.cat([counts, predicted, torch.stack([n.double() for n in numbers])]))

    def _count(self, state: State) -> None:
        step = torch.stack(self._step).sum(0)
        self._step = []
        if dist.get_world_size() > 1:  # each step, so that a checkpoint holds all ranks' counts
            dist.all_reduce(step)
        counts, predicted, sums = step.cpu().split([len(self.counts), len(self.mean), len(self.sums)])
        self.counts += counts
        self.sums += sums
        if predicted.isfinite().all():  # a step that the gradient guard skips leaves no trace here either
            self.mean = MEMORY * self.mean + (1 - MEMORY) * predicted / sums[0]

    def _forget(self, state: State) -> None:
        self.counts.zero_()
        self.sums.zero_()

    def row(self) -> dict[str, Any]:
        """The epoch so far: the share of unlabelled images that got a label, how many of each class, the loss on
        all of them, the last lambda_u; and of the labels whose truth is known the share that is right, else None.
        """
        sums = dict(zip(SUMS, self.sums.tolist(), strict=True))
        seen = max(sums["seen"], 1.0)
        return {
            "mask_rate": float(self.counts.sum()) / seen,
            "pseudo_counts": [int(n) for n in self.counts.tolist()],
            "pseudo_accuracy": sums["right"] / sums["known"] if sums["known"] else None,
            "unlabelled_loss": sums["loss"] / seen,
            "lambda_u": self.lambda_u,
        }

    def state_dict(self) -> dict[str, Any]:
        counts, sums, mean = self.counts.clone(), self.sums.clone(), self.mean.clone()
        return {"counts": counts, "sums": sums, "mean": mean, "lambda_u": self.lambda_u}

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        self.counts, self.sums, self.mean = (state[name].clone() for name in ("counts", "sums", "mean"))
        self.lambda_u = state["lambda_u"]
