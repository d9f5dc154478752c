"""Settings that change with epoch and step: steps per epoch, microbatch, seed of dropout."""

from __future__ import annotations

from collections.abc import Callable

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist

from fastflower.core import seeding
from fastflower.recipe.derived import Derived


class StageSchedule(Algorithm):
    """FIT_START, EPOCH_START: set the stage's steps and microbatch. BATCH_START: seed by (seed, global step, rank).

    Seeding every step makes dropout and stochastic depth independent of earlier steps: a resumed run draws the same
    numbers as an uninterrupted one, and no generator state needs saving.
    """

    def __init__(self, seed: int, derived: Derived, steps: Callable[[int], int]) -> None:
        self.seed = seed
        self.derived = derived
        self.steps = steps

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.FIT_START, Event.EPOCH_START, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger | None) -> None:
        if event == Event.BATCH_START:
            seeding.seed_all(self.seed, state.timestamp.batch.value, dist.get_global_rank())
            return
        epoch = state.timestamp.epoch.value
        state.dataloader_len = self.steps(epoch)
        state.device_train_microbatch_size = self.derived.stage(epoch).batch_per_gpu
