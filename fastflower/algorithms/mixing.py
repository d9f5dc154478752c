"""MixUp or CutMix, never both, on whole batches: soft targets are written before Composer cuts microbatches."""

from __future__ import annotations

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import Tensor
from torch.nn import functional as F

from fastflower.data.auxiliary import AuxTargets
from fastflower.data.transforms.mixing import choose, mix
from fastflower.recipe import Recipe, derived


def mix_probability(recipe: Recipe, epoch: int) -> float:
    """The fraction of batches that are mixed in an epoch, counted from 0."""
    final = derived.mix_final_epoch(recipe)
    return recipe.reg.mix_prob_final if final is not None and epoch + 1 >= final else recipe.reg.mix_prob


class MixUpCutMix(Algorithm):
    """BATCH_START: mix the batch and write "target", a function of (seed, epoch, step), the same on every rank.

    "target" is float32 (B, C) for every batch, mixed or not; "key" is taken out of the batch. With `teacher`,
    probabilities (rows of the training beton, C), it is (B, 2C): the labels' targets, then the teacher's. With `aux`,
    "aux" are the targets (B, K) of all auxiliary columns beside each other, mixed alike; 0 where an image has no value.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_classes: int,
        teacher: Tensor | None = None,
        *,
        aux: AuxTargets | None = None,
    ) -> None:
        self.recipe = recipe
        self.num_classes = num_classes
        self.teacher = teacher
        self.aux_sizes = aux.sizes if aux else ()
        self.aux_codes = torch.from_numpy(aux.train) if aux else None

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
        further = self._further(batch)
        images, targets = mix(
            batch["image"],
            batch["label"],
            keys=batch["key"],
            num_classes=self.num_classes,
            kind=kind,
            alpha=alpha,
            further=further,
        )
        state.batch = {name: column for name, column in batch.items() if name != "key"}
        if self.aux_codes is not None:
            targets, state.batch["aux"] = targets.tensor_split([-sum(self.aux_sizes)], dim=1)
        state.batch |= {"image": images, "target": targets}

    def _further(self, batch: dict[str, Tensor]) -> Tensor | None:
        """The targets beside those of the labels: the teacher's, then those of the auxiliary columns."""
        columns, rows = [], batch["row"]
        if self.teacher is not None:
            self.teacher = self.teacher.to(rows.device)
            columns.append(self.teacher[rows])
        if self.aux_codes is not None:
            self.aux_codes = self.aux_codes.to(rows.device)
            for codes, size in zip(self.aux_codes[rows].unbind(1), self.aux_sizes, strict=True):
                columns.append(F.one_hot(codes.clamp_min(0), size) * (codes >= 0)[:, None])
        return torch.cat(columns, 1) if columns else None
