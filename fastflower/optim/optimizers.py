"""torch's own optimisers on our groups."""

from __future__ import annotations

import torch

from fastflower.optim.groups import Group
from fastflower.recipe import Recipe


def optimizer(groups: list[Group], recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """AdamW or SGD with Nesterov momentum over `param_groups`, in one kernel a step on GPUs.

    AdamW's decay is decoupled: a step takes lr * weight_decay of a weight. (Composer's DecoupledAdamW would
    take weight_decay itself, whatever the lr.) SGD's enters the gradient, so momentum carries it too.
    """
    fused = device.type == "cuda"
    if recipe.opt.name == "sgd":
        momentum = recipe.opt.momentum
        return torch.optim.SGD(
            groups, momentum=momentum, nesterov=momentum > 0, foreach=not fused, fused=fused
        )
    return torch.optim.AdamW(groups, foreach=not fused, fused=fused)
