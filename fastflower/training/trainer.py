"""Composer's Trainer without the steps that only loaders of unknown length need."""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from composer import Trainer
from composer.core import Event
from composer.trainer.trainer import TrainerMode
from composer.utils import dist
from torch import Tensor

from fastflower.algorithms.stages import StageSchedule
from fastflower.core.host_copies import HostCopies
from fastflower.optim.sharpness import Sharpness


class FoldTrainer(Trainer):
    """Trains from loaders that give every rank equally many batches of equal size, as those of `data/loaders.py` do.

    Composer asks all ranks after each batch whether their loader has ended and how many images it held, and reads the
    loss twice: four collectives and seven waits of the host for the device a step. Here each rank knows, and the loss
    comes to the host with the gradients' norm, which is the one wait (`GradientGuard`).

    With `sharpness` a step has two passes over its microbatches, the second at the near point with the random numbers
    of the first; the loss is the first's, the gradients the second's. Algorithms see the events of both.
    """

    sharpness: Sharpness | None = None

    _loss: float = math.nan  # of the last step, the mean over the ranks

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

    def _run_evaluators(self, event: Event) -> None:
        due = (evaluator.eval_interval for evaluator in self.state.evaluators)
        if event == Event.EPOCH_END and not any(interval(self.state, event) for interval in due if interval):
            # nothing is scored, and callbacks close the epoch at the same events as after an evaluation
            self.engine.run_event(Event.EVAL_BEFORE_ALL)
            self.engine.run_event(Event.EVAL_AFTER_ALL)
            return
        super()._run_evaluators(event)

    def _train_microbatches(
        self, microbatches: Sequence[Any], total_loss_dict: dict[str, Tensor], ddp_sync: bool = True
    ) -> Tensor:
        """Forward and backward of a step; returns its loss on the host, (1,), which `_train_batch` takes."""
        state, data = self.state, self._train_data_spec
        assert ddp_sync and data is not None and state.scaler is not None
        scaled = self._use_grad_scaling(state.precision, state.scaler)
        self.engine.run_event(Event.BEFORE_TRAIN_BATCH)
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=True)
        rows = sum(data.get_num_samples_in_batch(microbatch) for microbatch in microbatches)
        batch, total = state.batch, total_loss_dict["loss/train/total"]
        total += self._pass(microbatches, rows, scaled=scaled)
        if self.sharpness is not None:
            with self.sharpness.near_point() as moved:
                if moved:
                    for algorithm in state.algorithms:
                        if isinstance(algorithm, StageSchedule):
                            algorithm.seed_step(state)
                    self._pass(microbatches, rows, scaled=scaled)
        state.batch = batch
        if scaled:
            for optimizer in state.optimizers:
                state.scaler.unscale_(optimizer)
        dist.all_reduce(total)
        copies = HostCopies()
        host = copies.add(total)
        self.engine.run_event(Event.AFTER_TRAIN_BATCH)  # where the host waits for the gradients' norm
        copies.wait()
        self._loss = host.item() / dist.get_world_size()
        return host

    def _pass(self, microbatches: Sequence[Any], rows: int | float, *, scaled: bool) -> Tensor:
        """Add the gradients of a step's microbatches, averaged over the ranks; their loss on this rank."""
        state, data = self.state, self._train_data_spec
        assert data is not None
        total = state.device.tensor_to_device(torch.zeros(1))
        for number, microbatch in enumerate(microbatches, 1):
            state.batch = data.microbatch_transforms(state.device.batch_to_device(microbatch))
            losses = self._train_microbatch(scaled, rows, is_final_microbatch=number == len(microbatches))
            total += losses["total"]
        return total

    def _train_batch(self, use_grad_scaling: bool) -> Any:
        """Train on a batch; returns None, as there is no loss left to collect over the ranks."""
        super()._train_batch(use_grad_scaling)
        self.state.total_loss_dict = {"loss/train/total": self._loss}
        self.logger.log_metrics(self.state.total_loss_dict)

    def _accumulate_time_across_ranks(
        self, num_samples: int | float, num_tokens: int, batch_time: datetime.timedelta
    ) -> tuple[int, int, datetime.timedelta]:
        world = dist.get_world_size()
        return int(num_samples) * world, num_tokens * world, batch_time
