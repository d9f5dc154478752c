"""Averages of the weights, kept as modules beside the network, so that nothing is ever swapped.

The stock EMA swaps weights around evaluation and checkpoints, keys its state by the names that the distributed
wrapper gives, and truncates integer buffers; here floats are averaged, the rest is copied, names are the network's.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import Tensor, nn


def ramped(decay: float, updates: int, *, warmup: bool) -> float:
    """The decay of the next update after `updates` of them: min(decay, (1 + t) / (10 + t))."""
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay


def shadow_of(network: nn.Module) -> nn.Module:
    """A copy that is never trained."""
    shadow = copy.deepcopy(network).eval().requires_grad_(False)
    for parameter in shadow.parameters():
        parameter.grad = None
    return shadow


def split(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers in the order of their names: floating ones, others."""
    tensors = [*module.parameters(), *module.buffers()]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]


@torch.no_grad()
def pull(shadow: nn.Module, network: nn.Module, weight: float) -> None:
    """shadow += weight * (network - shadow) in a few launches; counters and index tables are copied."""
    ours, our_counts = split(shadow)
    theirs, their_counts = split(network)
    torch._foreach_lerp_(ours, theirs, weight)
    for mine, other in zip(our_counts, their_counts, strict=True):
        mine.copy_(other)


def batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The layers that hold running statistics."""
    return [
        m
        for m in module.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]


@torch.no_grad()
def recalibrate(module: nn.Module, images: Iterable[Tensor]) -> None:
    """Replace BatchNorm's running statistics by their plain mean over the batches; nothing to do without BatchNorm."""
    norms = batch_norms(module)
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative
        norm.train()
    for batch in images:
        module(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


class Ema(Algorithm):
    """BATCH_END: move the shadow towards the network, unless `skipped()` says that no step was made."""

    def __init__(
        self, network: nn.Module, decay: float, *, warmup: bool, skipped: Callable[[], bool]
    ) -> None:
        self.network = network
        self.shadow = shadow_of(network)
        self.decay = decay
        self.warmup = warmup
        self.skipped = skipped
        self.updates = 0

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BATCH_END and not self.skipped()

    def apply(self, event: Event, state: State, logger: Logger | None) -> None:
        pull(self.shadow, self.network, 1 - ramped(self.decay, self.updates, warmup=self.warmup))
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow.state_dict()}

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        self.updates = state["updates"]
        self.shadow.load_state_dict(state["shadow"])


class Swa(Algorithm):
    """EPOCH_END of the last epochs: add the raw weights to their plain mean and re-estimate BatchNorm.

    The shadow joins `shadows` under "swa" at its first average, and is scored from then on. Once `asked(state)`, it
    is left as it was: the run is about to end, and meets the end of this epoch again when it goes on.
    """

    def __init__(
        self,
        network: nn.Module,
        first_epoch: int,
        *,
        shadows: dict[str, Callable[[Tensor], Tensor]],
        batches: Callable[[State], Iterable[Tensor]],
        asked: Callable[[State], bool] = lambda state: False,
    ) -> None:
        self.network = network
        self.shadow = shadow_of(network)
        self.asked = asked
        self.first_epoch = first_epoch
        self.shadows = shadows
        self.batches = batches
        self.averaged = 0
        self.last_epoch = 0

    def match(self, event: Event, state: State) -> bool:
        epoch = state.timestamp.epoch.value  # a run resumed before its evaluation meets the same end again
        return event == Event.EPOCH_END and epoch >= self.first_epoch and epoch > self.last_epoch

    def apply(self, event: Event, state: State, logger: Logger | None) -> None:
        mean = copy.deepcopy(self.shadow)
        pull(mean, self.network, 1 / (self.averaged + 1))
        if batch_norms(mean):
            until_asked = itertools.takewhile(lambda _: not self.asked(state), self.batches(state))
            recalibrate(mean, until_asked)
        if self.asked(state):
            return
        self.shadow.load_state_dict(mean.state_dict())
        self.averaged += 1
        self.last_epoch = state.timestamp.epoch.value
        self.shadows["swa"] = self.shadow

    def state_dict(self) -> dict[str, Any]:
        return {"averaged": self.averaged, "last_epoch": self.last_epoch, "shadow": self.shadow.state_dict()}

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        self.averaged, self.last_epoch = state["averaged"], state["last_epoch"]
        self.shadow.load_state_dict(state["shadow"])
        if self.averaged:
            self.shadows["swa"] = self.shadow
