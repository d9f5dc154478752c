"""Gradients between the backward pass and the optimizer step: norm, clipping, and the guard against NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn

from fastflower.core.errors import Diverged, InputError
from fastflower.model.network import batch_norms


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], limit: float | None) -> float:
    """Scale the gradients to a global 2-norm of at most `limit`; returns the norm before (one device sync)."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


def _drop_frozen(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if group["lr"] == 0:
            for parameter in group["params"]:
                parameter.grad = None


def without_gradient(network: nn.Module) -> list[str]:
    """The names of trainable parameters that have no gradient."""
    return [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]


class GradientGuard(Algorithm):
    """BATCH_START: save BatchNorm's statistics. AFTER_BACKWARD: drop the gradients of frozen parts. AFTER_TRAIN_BATCH:
    clip, or skip a non-finite step.

    A skipped step leaves weights, optimizer, averages and running statistics unchanged. Gradients are checked after
    the reduction over ranks, so that all ranks decide alike. Raises Diverged after `limit` non-finite steps in a
    row; overflows of the fp16 scaler are skipped but not counted while its scale can still fall.

    Frozen parts (lr 0) lose their gradients before the fp16 scaler looks at them, so that an overflow there skips no
    step; they neither count in the norm nor fill the optimizer's moments before they train.

    Parameters without a gradient in the first step are reported to `warn`; on more than one rank they raise
    InputError, because DDP waits for all gradients and would not average the others of their bucket.
    """

    def __init__(
        self, network: nn.Module, clip_grad: float | None, *, limit: int, warn: Callable[[str], None] = print
    ) -> None:
        self.network = network
        self.warn = warn
        self.first_step = True
        self.clip_grad = clip_grad
        self.limit = limit
        self.skipped = False
        self.norm = math.nan
        self.total = 0
        self.in_a_row = 0
        self.statistics: list[Tensor] = []
        for norm in batch_norms(network).values():
            self.statistics += [b for b in (norm.running_mean, norm.running_var) if b is not None]
        self._before = [torch.empty_like(buffer) for buffer in self.statistics]

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.BATCH_START, Event.AFTER_BACKWARD, Event.AFTER_TRAIN_BATCH)

    @torch.no_grad()
    def apply(self, event: Event, state: State, logger: Logger | None) -> None:
        if event == Event.BATCH_START:
            self._save_statistics()
            return
        if event == Event.AFTER_BACKWARD:  # of each microbatch
            if self.first_step:
                self._check_first_step()
            _drop_frozen(state.optimizers[0])
            return
        self.norm = clip(self.network.parameters(), self.clip_grad)
        self.skipped = not math.isfinite(self.norm)
        if not self.skipped:
            self.in_a_row = 0
            return
        for parameter in self.network.parameters():
            parameter.grad = None
        for buffer, before in zip(self.statistics, self._before, strict=True):
            buffer.copy_(before)
        scale = state.scaler.get_scale() if state.scaler is not None and state.scaler.is_enabled() else 1.0
        if str(state.precision.value) != "amp_fp16" or scale <= 1:
            self._count_skipped(state)

    def _check_first_step(self) -> None:
        self.first_step, idle = False, without_gradient(self.network)
        if not idle:
            return
        problem = f"{len(idle)} parameters get no gradient, first {idle[0]}"
        if dist.get_world_size() == 1:
            self.warn(f"WARNING {problem}: the loss does not depend on them, and they will not be trained")
        elif dist.get_global_rank():
            raise SystemExit(InputError.exit_code)  # rank 0 prints the reason
        else:
            raise InputError(
                f"{problem}, and ranks cannot average the rest; train on one rank, or use all parameters in the loss"
            )

    def _save_statistics(self) -> None:
        if self._before and self._before[0].device != self.statistics[0].device:
            self._before = [torch.empty_like(buffer) for buffer in self.statistics]
        for before, buffer in zip(self._before, self.statistics, strict=True):
            before.copy_(buffer)

    def _count_skipped(self, state: State) -> None:
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit and dist.get_global_rank():
            raise SystemExit(Diverged.exit_code)  # rank 0 prints the reason
        if self.in_a_row >= self.limit:
            lr = max(group["lr"] for group in state.optimizers[0].param_groups)
            raise Diverged(
                f"loss or gradients were not finite in {self.in_a_row} steps in a row, up to step "
                f"{state.timestamp.batch.value + 1} (epoch {state.timestamp.epoch.value + 1}, lr {lr:.3g}); "
                f"{Diverged.REMEDY}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]
