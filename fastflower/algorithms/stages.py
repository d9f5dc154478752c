"""What changes with the epoch and the step: the epoch's length, the microbatch, the seeds of dropout."""

from __future__ import annotations

from collections.abc import Callable

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist

from fastflower.core import seeding
from fastflower.recipe.derived import Derived


class Stages(Algorithm):
    """FIT_START, EPOCH_START: the stage's steps and microbatch. BATCH_START: seed by (seed, global step, rank).

    Seeding every step makes dropout and stochastic depth independent of what ran before, so no generator state
    needs saving and a resumed step draws what the uninterrupted one drew.
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
