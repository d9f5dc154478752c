"""The learning-rate range test: a rate that rises with every step, and the loss at each."""

from __future__ import annotations

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist

from fastflower.optim.lr_range import has_diverged, rates
from fastflower.recipe import Recipe


class LrRangeTest(Algorithm):
    """BATCH_START: set the step's rate times each group's factor. BATCH_END: record the loss, stop if it diverges.

    `tried` and `losses` (the mean over ranks) hold one number per step.
    """

    def __init__(self, recipe: Recipe, lr: float) -> None:
        self.rates = rates(recipe.lrfind.low, recipe.lrfind.high, recipe.lrfind.steps)
        self.lr = lr  # base lr from which the groups' initial_lr were computed
        self.losses: list[float] = []

    @property
    def tried(self) -> list[float]:
        return self.rates[: len(self.losses)]

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.BATCH_START, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger | None) -> None:
        if event == Event.BATCH_START:
            for group in state.optimizers[0].param_groups:
                group["lr"] = self.rates[len(self.losses)] * group["initial_lr"] / self.lr
            return
        loss = torch.tensor(float(state.total_loss_dict["loss/train/total"]), device=state.device._device)
        if dist.get_world_size() > 1:
            dist.all_reduce(loss)
        self.losses.append(float(loss) / dist.get_world_size())
        if has_diverged(self.losses):
            state.stop_training()
