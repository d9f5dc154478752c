"""torch's optimizers over the parameter groups."""

from __future__ import annotations

import torch

from fastflower.optim.groups import Group
from fastflower.recipe import Recipe


def build_optimizer(groups: list[Group], recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD with Nesterov momentum over `param_groups`; on GPUs a step is one fused kernel.

    AdamW's decay is decoupled: a step subtracts lr * weight_decay times the weight (Composer's DecoupledAdamW
    subtracts weight_decay times the weight, whatever the lr). Adam and SGD add it to the gradient, hence to the
    momentum.
    """
    fused = device.type == "cuda"
    if recipe.opt.name == "sgd":
        momentum = recipe.opt.momentum
        return torch.optim.SGD(
            groups, momentum=momentum, nesterov=momentum > 0, foreach=not fused, fused=fused
        )
    kind = torch.optim.Adam if recipe.opt.name == "adam" else torch.optim.AdamW
    return kind(groups, foreach=not fused, fused=fused)
