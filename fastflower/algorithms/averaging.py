"""EMA and SWA of the weights, kept in a second module (the shadow), so that weights are never swapped.

Composer's EMA swaps weights around evaluation and checkpoints, keys its state by the names inside the DDP wrapper
and truncates integer buffers. Here floats are averaged, other tensors are copied, and names are the network's.
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

from fastflower.model.network import Network, batch_norms


def ema_decay(decay: float, updates: int, *, warmup: bool) -> float:
    """Decay of update t = `updates`, counted from 0; with `warmup`, min(decay, (1 + t) / (10 + t))."""
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay


def shadow_copy(network: nn.Module) -> nn.Module:
    """A copy of the network in eval mode, without gradients; a frozen backbone is shared, as it never changes."""
    shared = {}
    if isinstance(network, Network) and network.kept == "backbone":
        shared[id(network.backbone)] = network.backbone
    shadow = copy.deepcopy(network, shared).eval().requires_grad_(False)
    for parameter in shadow.parameters():
        parameter.grad = None
    return shadow


def float_and_other_tensors(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The floating-point parameters and buffers in their order of definition, and the other ones."""
    tensors = [*module.parameters(), *module.buffers()]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]


@torch.no_grad()
def interpolate(shadow: nn.Module, network: nn.Module, weight: float) -> None:
    """shadow += weight * (network - shadow) in a few kernel launches; counters and index tables are copied."""
    shadow_floats, shadow_others = float_and_other_tensors(shadow)
    network_floats, network_others = float_and_other_tensors(network)
    pairs = [pair for pair in zip(shadow_floats, network_floats, strict=True) if pair[0] is not pair[1]]
    torch._foreach_lerp_([shadow for shadow, _ in pairs], [own for _, own in pairs], weight)
    for target, source in zip(shadow_others, network_others, strict=True):
        target.copy_(source)


@torch.no_grad()
def reestimate_batch_norms(module: nn.Module, images: Iterable[Tensor]) -> None:
    """Replace BatchNorm's running statistics by their mean over the batches; does nothing without BatchNorm.

    Unlike torch's update_bn, which trains the whole module meanwhile, dropout and stochastic depth stay off.
    """
    norms = list(batch_norms(module).values())
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
        norm.train()
    for batch in images:
        module(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


class Ema(Algorithm):
    """BATCH_END: move the shadow towards the network, unless `skipped()`: the optimizer made no step."""

    def __init__(
        self, network: nn.Module, decay: float, *, warmup: bool, skipped: Callable[[], bool]
    ) -> None:
        self.network = network
        self.shadow = shadow_copy(network)
        self.decay = decay
        self.warmup = warmup
        self.skipped = skipped
        self.updates = 0

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BATCH_END and not self.skipped()

    def apply(self, event: Event, state: State, logger: Logger | None) -> None:
        interpolate(self.shadow, self.network, 1 - ema_decay(self.decay, self.updates, warmup=self.warmup))
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self.shadow.load_state_dict(state["shadow"])


class Swa(Algorithm):
    """EPOCH_END from `first_epoch` on: add the raw weights to their mean and re-estimate BatchNorm.

    `batches(state)` yields the images for BatchNorm. The first average enters the shadow in `shadows` under "swa",
    where it is scored from then on. While `stopping(state)`, the shadow does not change: the run is about to end,
    and a resumed run meets the end of this epoch again.
    """

    def __init__(
        self,
        network: nn.Module,
        first_epoch: int,
        *,
        shadows: dict[str, Callable[[Tensor], Tensor]],
        batches: Callable[[State], Iterable[Tensor]],
        stopping: Callable[[State], bool] = lambda state: False,
    ) -> None:
        self.network = network
        self.shadow = shadow_copy(network)
        self.stopping = stopping
        self.first_epoch = first_epoch
        self.shadows = shadows
        self.batches = batches
        self.averaged = 0
        self.last_epoch = 0

    def match(self, event: Event, state: State) -> bool:
        epoch = state.timestamp.epoch.value  # a run resumed before its evaluation meets this epoch end again
        return event == Event.EPOCH_END and epoch >= self.first_epoch and epoch > self.last_epoch

    def apply(self, event: Event, state: State, logger: Logger | None) -> None:
        mean = copy.deepcopy(self.shadow)
        interpolate(mean, self.network, 1 / (self.averaged + 1))
        if batch_norms(mean):
            until_stop = itertools.takewhile(lambda _: not self.stopping(state), self.batches(state))
            reestimate_batch_norms(mean, until_stop)
        if self.stopping(state):
            return
        self.shadow.load_state_dict(mean.state_dict())
        self.averaged += 1
        self.last_epoch = state.timestamp.epoch.value
        self.shadows["swa"] = self.shadow

    def state_dict(self) -> dict[str, Any]:
        return {"averaged": self.averaged, "last_epoch": self.last_epoch, "shadow": self.shadow.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averaged, self.last_epoch = state["averaged"], state["last_epoch"]
        self.shadow.load_state_dict(state["shadow"])
        if self.averaged:
            self.shadows["swa"] = self.shadow
