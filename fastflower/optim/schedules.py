"""Learning-rate schedules as pure functions of epoch and step; only the plateau schedule has state."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fastflower.core.errors import InputError
from fastflower.optim.groups import part_names
from fastflower.recipe import Recipe
from fastflower.recipe.derived import validates
from fastflower.recipe.starting_point import warmup_epochs

THRESHOLD = 1e-4  # minimum relative improvement, torch's default


def lr_factor(
    epoch: int,
    step: int,
    *,
    steps_per_epoch: int,
    recipe: Recipe,
    plateau_factor: float = 1.0,
    batch_factor: float = 1.0,
) -> float:
    """The factor on every group's initial_lr at a step; epoch and step count from 0.

    Warm-up starts above 0 and reaches 1 at its last step, or in its last epoch. `cosine` then falls from 1 to eta_min
    at the end of cosine_epochs and stays there; `plateau` is `plateau_factor` after the warm-up; `cyclic` goes from
    eta_min to 1 and back, in straight lines of cycle_steps steps (torch's CyclicLR, "triangular"); `none` is 1
    throughout. Progress is measured in epochs, so the cosine stays continuous when the number of steps per epoch
    changes.
    """
    sched = recipe.sched
    step += epoch * steps_per_epoch
    warmup, end = round(warmup_epochs(recipe) * steps_per_epoch), sched.cosine_epochs * steps_per_epoch
    if sched.name == "none":
        return batch_factor
    if sched.name == "cyclic":
        rise = 1 - abs(step / sched.cycle_steps % 2 - 1)
        return batch_factor * (sched.eta_min + (1 - sched.eta_min) * rise)
    if step < warmup and sched.warmup_unit == "epoch":
        return batch_factor * min(1.0, (epoch + 1) / warmup_epochs(recipe))
    if step < warmup:
        return batch_factor * (step + 1) / warmup
    if sched.name == "plateau":
        return batch_factor * plateau_factor
    progress = min((step - warmup) / (end - warmup), 1.0)
    return batch_factor * (sched.eta_min + (1 - sched.eta_min) * (1 + math.cos(math.pi * progress)) / 2)


def frozen_parts(epoch: int, recipe: Recipe) -> set[str]:
    """The parts that llrd.unfreeze_schedule still freezes in an epoch (from 0; the schedule counts from 1).

    Raises InputError for an unknown part and when nothing trains in the first epoch.
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


def plateau_monitor(recipe: Recipe) -> str:
    """The value that the plateau schedule follows: sched.monitor, or train_loss where no image is held out."""
    return recipe.sched.monitor if validates(recipe) else "train_loss"


class Plateau:
    """torch's ReduceLROnPlateau (relative threshold) as a factor on the lr, stepped once per epoch.

    `monitor` gives the direction: losses should fall, any other value rise. As in torch, the lr is lowered in
    bad epoch `patience` + 1; where a publication lowers it in the last of its patient epochs, patience is one less.
    Step it only after the warm-up.
    """

    def __init__(self, reduction: float, patience: int, monitor: str = "score") -> None:
        self.reduction, self.patience, self.lower_is_better = reduction, patience, monitor.endswith("loss")
        self.factor, self.best, self.bad_epochs = 1.0, 0.0, 0
        self.restart()

    def step(self, value: float) -> None:
        """Record an epoch's value; after more than `patience` epochs without an improvement the factor falls."""
        bar = self.best * (1 - THRESHOLD if self.lower_is_better else 1 + THRESHOLD)
        if value < bar if self.lower_is_better else value > bar:
            self.best, self.bad_epochs = value, 0
        else:
            self.bad_epochs += 1
        if self.bad_epochs > self.patience:
            self.factor, self.bad_epochs = self.factor * self.reduction, 0

    def restart(self) -> None:
        """Forget best value and count, keep the factor: values at a new image size are not comparable."""
        self.best, self.bad_epochs = math.inf if self.lower_is_better else -math.inf, 0

    def state_dict(self) -> dict[str, float]:
        return {"factor": self.factor, "best": self.best, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.factor, self.best, self.bad_epochs = state["factor"], state["best"], int(state["bad_epochs"])
