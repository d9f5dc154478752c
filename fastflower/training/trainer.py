"""Composer's Trainer without what only loaders of unknown length need."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator
from typing import Any

from composer import Trainer
from composer.core import Event
from composer.trainer.trainer import TrainerMode
from composer.utils import dist


class FoldTrainer(Trainer):
    """Trains from loaders that give every rank equally many batches of equal size, as those of `data/loaders.py` do.

    Composer asks all ranks after each batch whether their loader has ended and how many images it held, which takes
    three collectives and four waits of the host for the device a step. Here each rank knows.
    """

    def _iter_dataloader(self, trainer_mode: TrainerMode) -> Iterator[Any]:
        assert self.state.dataloader is not None
        length, training = self.state.dataloader_len, trainer_mode == TrainerMode.TRAIN
        batches = itertools.islice(self.state.dataloader, None if length is None else int(length))
        while True:
            if training:
                self.engine.run_event(Event.BEFORE_DATALOADER)
            try:
                batch = next(batches)
            except StopIteration:
                if training:  # closes the marker that BEFORE_DATALOADER has opened
                    self.engine.run_marker_only_event(Event.AFTER_DATALOADER)
                return
            yield batch

    def _accumulate_time_across_ranks(
        self, num_samples: int | float, num_tokens: int, batch_time: datetime.timedelta
    ) -> tuple[int, int, datetime.timedelta]:
        world = dist.get_world_size()
        return int(num_samples) * world, num_tokens * world, batch_time
