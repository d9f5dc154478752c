"""MixUp or CutMix, never both, on whole batches: soft targets are written before Composer cuts microbatches."""

from __future__ import annotations

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import Tensor

from fastflower.data.transforms.mixing import choose, mix
from fastflower.recipe import Recipe, derived


def mix_probability(recipe: Recipe, epoch: int) -> float:
    """The fraction of batches that are mixed in an epoch, counted from 0."""
    final = derived.mix_final_epoch(recipe)
    return recipe.reg.mix_prob_final if final is not None and epoch + 1 >= final else recipe.reg.mix_prob


class MixUpCutMix(Algorithm):
    """BATCH_START: mix the batch and write "target", a function of (seed, epoch, step), the same on every rank.

    "target" is float32 (B, C) for every batch, mixed or not; "key" is taken out of the batch. With `teacher`,
    probabilities (rows of the training beton, C), it is (B, 2C): the labels' targets, then the teacher's.
    """

    def __init__(self, recipe: Recipe, num_classes: int, teacher: Tensor | None = None) -> None:
        self.recipe = recipe
        self.num_classes = num_classes
        self.teacher = teacher

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BATCH_START

    @torch.no_grad()
    def apply(self, event: Event, state: State, logger: Logger | None) -> None:
        batch, reg = state.batch, self.recipe.reg
        epoch, step = state.timestamp.epoch.value, state.timestamp.batch_in_epoch.value
        prob = mix_probability(self.recipe, epoch)
        kind = choose(
            self.recipe.seed,
            epoch,
            step=step,
            prob=prob,
            switch=reg.mix_switch_prob,
            mixup=reg.mixup,
            cutmix=reg.cutmix,
        )
        alpha = {"mixup": reg.mixup, "cutmix": reg.cutmix}.get(kind, 0.0)
        teacher_rows = None
        if self.teacher is not None:
            self.teacher = self.teacher.to(batch["label"].device)
            teacher_rows = self.teacher[batch["row"]]
        images, targets = mix(
            batch["image"],
            batch["label"],
            keys=batch["key"],
            num_classes=self.num_classes,
            kind=kind,
            alpha=alpha,
            teacher=teacher_rows,
        )
        rest = {name: column for name, column in batch.items() if name != "key"}
        state.batch = {**rest, "image": images, "target": targets}
