"""The optimizer over the parameter groups: torch's, timm's, or one of the user's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastflower.core import own_parts
from fastflower.optim.groups import Group
from fastflower.recipe import Recipe

DECOUPLED = {"adopt": "adoptw"}  # timm's names of those whose own name adds the weight decay to the gradients


def build_optimizer(groups: list[Group], recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of opt.name over `param_groups`, each with its learning rate and weight decay.

    Of torch's, a step is one fused kernel where that is fastest: on GPUs, and on CPUs for Adam and AdamW. AdamW's
    decay is decoupled: a step subtracts lr * weight_decay times the weight (Composer's DecoupledAdamW subtracts
    weight_decay times the weight, whatever the lr). Adam and SGD add it to the gradient, hence to the momentum; SGD's
    momentum is Nesterov's. timm's have the settings of timm, with a decoupled decay.
    """
    name = recipe.opt.name
    if own_parts.is_own(name):
        return _own(name, groups)
    if name == "sgd":
        momentum, fused = recipe.opt.momentum, device.type == "cuda"
        return torch.optim.SGD(
            groups, momentum=momentum, nesterov=momentum > 0, foreach=not fused, fused=fused
        )
    if name in ("adamw", "adam"):
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        fused = device.type == "cuda" or all(_is_dense(p) for group in groups for p in group["params"])
        return kind(groups, foreach=not fused, fused=fused)
    from timm.optim import get_optimizer_class

    of_timm: Callable[[list[Group]], torch.optim.Optimizer] = get_optimizer_class(DECOUPLED.get(name, name))
    return of_timm(groups)


def _is_dense(parameter: Tensor) -> bool:
    """True if a parameter has no gaps in memory; torch's fused kernel of CPUs does not look at strides."""
    return parameter.stride() == torch.empty_like(parameter, device="meta").stride()


def _own(name: str, groups: list[Group]) -> torch.optim.Optimizer:
    """The optimizer of the user's function; InputError unless it keeps the names by which schedules know the groups."""
    optimizer = own_parts.call("opt.name", name, groups)
    if not isinstance(optimizer, torch.optim.Optimizer):
        what = f"returned {type(optimizer).__name__}, must return a torch.optim.Optimizer"
        raise own_parts.fault("opt.name", name, what)
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        what = (
            "has train() and eval(), as schedule-free optimizers do, which exchange the weights around an evaluation; "
            "scores, averages and checkpoints here follow one set, so use another (ema.enabled=true averages them)"
        )
        raise own_parts.fault("opt.name", name, what)
    names = [group.get("name") for group in optimizer.param_groups]
    if names != [group["name"] for group in groups]:
        raise own_parts.fault(
            "opt.name", name, "must keep the groups that it is given, with all their entries"
        )
    return optimizer
