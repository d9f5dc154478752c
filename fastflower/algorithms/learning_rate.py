"""Sets the learning rate of each group before each step, as a function of epoch and step.

Composer's schedulers lag one step behind and waste two steps of the warm-up; here the first step has the first lr
of the schedule and the last step the last. Parts are frozen by lr 0, never by requires_grad: DDP does not notice when
requires_grad changes back, and the ranks would drift apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import nn

from fastflower.optim.groups import freeze_batch_norms, part_by_parameter, part_names
from fastflower.optim.schedules import Plateau, frozen_parts, lr_factor, plateau_monitor
from fastflower.recipe import Recipe
from fastflower.recipe.derived import Derived, scaled_lr
from fastflower.recipe.starting_point import warmup_epochs


def stage_factor(recipe: Recipe, derived: Derived, epoch: int) -> float:
    """Factor on the lr in a stage with its own batch: the scaling rule at its global batch over the first stage's."""
    return (
        scaled_lr(recipe, derived.stage(epoch).batch_per_gpu * derived.world_size * recipe.train.grad_accum)[
            0
        ]
        / derived.lr
    )


class LearningRate(Algorithm):
    """BATCH_START: set every group's lr, 0 for frozen parts. EPOCH_CHECKPOINT: step the plateau schedule.

    `steps(epoch)` is the number of steps of an epoch, `monitored()` the last epoch's value of
    `plateau_monitor`.
    State: the plateau's factor and counter.
    """

    def __init__(
        self,
        recipe: Recipe,
        derived: Derived,
        *,
        network: nn.Module,
        steps: Callable[[int], int],
        monitored: Callable[[], float],
    ) -> None:
        self.recipe = recipe
        self.derived = derived
        self.network = network
        self.steps = steps
        self.monitored = monitored
        self.plateau = Plateau(recipe.sched.factor, recipe.sched.patience, plateau_monitor(recipe))
        self.part_of = part_by_parameter(network, part_names(recipe))

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.BATCH_START, Event.EPOCH_CHECKPOINT)

    def apply(self, event: Event, state: State, logger: Logger | None) -> None:
        if event == Event.EPOCH_CHECKPOINT:
            self._step_plateau(state.timestamp.epoch.value - 1)
            return
        epoch, step = state.timestamp.epoch.value, state.timestamp.batch_in_epoch.value
        stage = stage_factor(self.recipe, self.derived, epoch)
        factor = lr_factor(
            epoch,
            step,
            steps_per_epoch=self.steps(epoch),
            recipe=self.recipe,
            plateau_factor=self.plateau.factor,
            batch_factor=stage,
        )
        frozen = frozen_parts(epoch, self.recipe)
        for group in state.optimizers[0].param_groups:  # lr 0 also stops AdamW's decay, which is lr * wd
            group["lr"] = 0.0 if group["part"] in frozen else group["initial_lr"] * factor
        if frozen:  # after an evaluation every module is in training mode again
            freeze_batch_norms(self.network, self.part_of, frozen)

    def _step_plateau(self, epoch: int) -> None:
        if epoch + 1 >= warmup_epochs(self.recipe):
            self.plateau.step(self.monitored())
        if self.derived.stage(epoch) != self.derived.stage(epoch + 1):
            self.plateau.restart()

    def state_dict(self) -> dict[str, Any]:
        return dict(self.plateau.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.plateau.load_state_dict(state)
