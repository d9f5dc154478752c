"""The optimizer over the parameter groups: torch's, timm's, or one of the user's own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastflower.core import own_parts
from fastflower.optim.groups import Group
from fastflower.recipe import Recipe


def build_optimizer(groups: list[Group], recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of opt.name over `param_groups`, each with its learning rate and weight decay.

    Of torch's, a step is one fused kernel on GPUs. AdamW's decay is decoupled: a step subtracts lr * weight_decay times
    the weight (Composer's DecoupledAdamW subtracts weight_decay times the weight, whatever the lr). Adam and SGD add
    it to the gradient, hence to the momentum; SGD's momentum is Nesterov's. timm's have the settings of timm.
    """
    name, fused = recipe.opt.name, device.type == "cuda"
    if own_parts.is_own(name):
        return _own(name, groups)
    if name == "sgd":
        momentum = recipe.opt.momentum
        return torch.optim.SGD(
            groups, momentum=momentum, nesterov=momentum > 0, foreach=not fused, fused=fused
        )
    if name in ("adamw", "adam"):
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return kind(groups, foreach=not fused, fused=fused)
    from timm.optim import get_optimizer_class

    of_timm: Callable[[list[Group]], torch.optim.Optimizer] = get_optimizer_class(name)
    return of_timm(groups)


def _own(name: str, groups: list[Group]) -> torch.optim.Optimizer:
    """The optimizer of the user's function; InputError unless it keeps the names by which schedules know the groups."""
    optimizer = own_parts.call("opt.name", name, groups)
    if not isinstance(optimizer, torch.optim.Optimizer):
        what = f"returned {type(optimizer).__name__}, must return a torch.optim.Optimizer"
        raise own_parts.fault("opt.name", name, what)
    names = [group.get("name") for group in optimizer.param_groups]
    if names != [group["name"] for group in groups]:
        raise own_parts.fault(
            "opt.name", name, "must keep the groups that it is given, with all their entries"
        )
    return optimizer
