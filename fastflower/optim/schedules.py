"""The course of the lr as pure functions of epoch and step: nothing to save but the plateau's counter."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fastflower.core.errors import InputError
from fastflower.optim.groups import part_names
from fastflower.recipe import Recipe

THRESHOLD = 1e-4  # the relative gain that counts as better, torch's default


def lr_factor(
    epoch: int,
    step: int,
    *,
    steps_per_epoch: int,
    recipe: Recipe,
    plateau_factor: float = 1.0,
    batch_factor: float = 1.0,
) -> float:
    """What every group's initial_lr is multiplied with at a step; epoch and step count from 0.

    Warm-up rises to 1 at its last step and never is 0; the cosine then falls from 1 towards eta_min at the
    horizon and stays there. `plateau` is warm-up, then `plateau_factor`; `none` is 1 throughout. Time runs in
    epochs and shares of them, so the cosine stays continuous when an epoch's number of steps changes.
    """
    sched = recipe.sched
    step += epoch * steps_per_epoch
    warmup, horizon = sched.warmup_epochs * steps_per_epoch, sched.cosine_epochs * steps_per_epoch
    if sched.name == "none":
        return batch_factor
    if step < warmup:
        return batch_factor * (step + 1) / warmup
    if sched.name == "plateau":
        return batch_factor * plateau_factor
    done = min((step - warmup) / (horizon - warmup), 1.0)
    return batch_factor * (sched.eta_min + (1 - sched.eta_min) * (1 + math.cos(math.pi * done)) / 2)


def frozen_parts(epoch: int, recipe: Recipe) -> set[str]:
    """The parts that llrd.unfreeze_schedule has not named by this epoch (from 0; the schedule counts from 1).

    Raises InputError for a part that does not exist and when nothing trains in the first epoch.
    """
    schedule, names = recipe.llrd.unfreeze_schedule, part_names(recipe)
    if schedule is None:
        return set()
    starts: dict[str, int] = {}
    for start, listed in schedule.items():
        for part in listed:
            if part not in names:
                raise InputError(f"llrd.unfreeze_schedule: no part {part}; the parts are {', '.join(names)}")
            starts[part] = min(int(start), starts.get(part, int(start)))
    if 1 not in starts.values():
        raise InputError(
            "llrd.unfreeze_schedule: nothing trains in epoch 1; list at least head there, as in {1: [head]}"
        )
    return {part for part in names if starts.get(part, math.inf) > epoch + 1}


class Plateau:
    """torch's ReduceLROnPlateau (relative threshold) as a factor on the lr, stepped once an epoch.

    `monitor` says the direction: a score should rise, a val_loss fall. As in torch, `patience` bad epochs are
    forgiven and the next one lowers the lr; tables in which the last of them lowers it mean one less.
    Its counting should begin after the warm-up.
    """

    def __init__(self, factor: float, patience: int, monitor: str = "score") -> None:
        self.fall, self.patience, self.falling = factor, patience, monitor == "val_loss"
        self.factor, self.best, self.bad_epochs = 1.0, 0.0, 0
        self.restart()

    def step(self, value: float) -> None:
        """Count an epoch's value; after more than `patience` epochs without a better one the factor falls."""
        bar = self.best * (1 - THRESHOLD if self.falling else 1 + THRESHOLD)
        if value < bar if self.falling else value > bar:
            self.best, self.bad_epochs = value, 0
        else:
            self.bad_epochs += 1
        if self.bad_epochs > self.patience:
            self.factor, self.bad_epochs = self.factor * self.fall, 0

    def restart(self) -> None:
        """For a new image size, whose scores are not comparable: the factor stays, the count does not."""
        self.best, self.bad_epochs = math.inf if self.falling else -math.inf, 0

    def state_dict(self) -> dict[str, float]:
        return {"factor": self.factor, "best": self.best, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.factor, self.best, self.bad_epochs = state["factor"], state["best"], int(state["bad_epochs"])
