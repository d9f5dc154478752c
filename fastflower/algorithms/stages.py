"""Settings that change with epoch and step: steps per epoch, microbatch, seed of dropout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist

from fastflower.core import seeding
from fastflower.recipe.derived import Derived, Stage


class StageSchedule(Algorithm):
    """FIT_START, EPOCH_START: set the stage's steps and microbatch. BATCH_START: seed by (seed, global step, rank).
    BEFORE_FORWARD, AFTER_BACKWARD: strict determinism from the one to the other.

    Seeding every step makes dropout and stochastic depth independent of earlier steps: a resumed run draws the same
    numbers as an uninterrupted one, and no generator state needs saving.

    `microbatches` are the images of one forward pass of a rank, by stage: the stage's batch, or less where a trial
    found that a GPU cannot hold it. `strict` are the stages in which a trial found a deterministic kernel for every
    operation; in others torch would refuse to train, and takes faster kernels also where it has both, as for
    attention. At a new size the allocator gives its blocks back, which fit the old size only.
    """

    def __init__(self, seed: int, derived: Derived, steps: Callable[[int], int]) -> None:
        self.seed = seed
        self.derived = derived
        self.steps = steps
        self.microbatches = [stage.batch_per_gpu for stage in derived.stages]
        self.strict = [False] * len(derived.stages)
        self._strict_now = False

    def match(self, event: Event, state: State) -> bool:
        if event in (Event.BEFORE_FORWARD, Event.AFTER_BACKWARD):
            return self._strict_now
        return event in (Event.FIT_START, Event.EPOCH_START, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger | None) -> None:
        if event == Event.BATCH_START:
            self.seed_step(state)
            return
        if event in (Event.BEFORE_FORWARD, Event.AFTER_BACKWARD):
            torch.use_deterministic_algorithms(True, warn_only=event == Event.AFTER_BACKWARD)
            return
        epoch = state.timestamp.epoch.value
        stage, microbatch = self.at(epoch)
        state.dataloader_len = self.steps(epoch)
        state.device_train_microbatch_size = microbatch
        self._strict_now = self.strict[self.derived.stages.index(stage)]
        if epoch + 1 == stage.first:
            torch.cuda.empty_cache()  # does nothing where CUDA has not started

    def seed_step(self, state: State) -> None:
        """Begin the random numbers of the current step on this rank."""
        seeding.seed_all(self.seed, state.timestamp.batch.value, dist.get_global_rank())

    def at(self, epoch: int) -> tuple[Stage, int]:
        """The stage of an epoch (from 0) and its microbatch."""
        stage = self.derived.stage(epoch)
        return stage, self.microbatches[self.derived.stages.index(stage)]
