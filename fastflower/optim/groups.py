"""Parameter groups: which part of the network a parameter belongs to, its real lr and its weight decay."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from timm.models._manipulate import group_parameters
from torch import nn

from fastflower.core.errors import InputError
from fastflower.recipe import Recipe

Group = dict[str, Any]


def part_names(recipe: Recipe) -> list[str]:
    """The parts that llrd.multipliers speak of, first layers to head."""
    count = len(multipliers(recipe))
    named = {2: ["backbone"], 4: ["front", "middle", "back"]}
    return [*named.get(count, [f"part{i}" for i in range(1, count)]), "head"]


def multipliers(recipe: Recipe) -> list[float]:
    """Factors on the lr by part; without layer-wise lr two parts, backbone and head, with factor 1."""
    return list(recipe.llrd.multipliers) if recipe.llrd.enabled else [1.0, 1.0]


def parts(network: nn.Module, names: list[str]) -> dict[str, str]:
    """The part of every parameter of a Network, by the parameter's name.

    timm's matcher gives the backbone's stages (for a ViT, its blocks). The stem counts with the first, a
    closing norm with the last; they are cut into equal runs, the earlier ones longer where that is not even:
    ConvNeXt's four stages become 0-1, 2, 3 and a ViT's twelve blocks 0-3, 4-7, 8-11.
    """
    backbone: Any = network.backbone
    if len(names) == 2:
        stage_of, count = {name: 0 for name, _ in backbone.named_parameters()}, 1
    else:
        stage_of, count = _stages(backbone, len(names) - 1)
    runs = np.array_split(np.arange(count), len(names) - 1)
    part_of_stage = {
        stage: name for name, run in zip(names[:-1], runs, strict=True) for stage in run.tolist()
    }
    of = {f"backbone.{name}": part_of_stage[stage] for name, stage in stage_of.items()}
    return {name: "head" if name.startswith("head.") else of[name] for name, _ in network.named_parameters()}


def _stages(backbone: Any, wanted: int) -> tuple[dict[str, int], int]:
    """The stage of each backbone parameter and how many there are; single blocks where stages are too few."""
    kind, most = type(backbone).__name__, 0
    if not hasattr(backbone, "group_matcher"):
        raise InputError(f"llrd.enabled: timm does not say how {kind} is layered; set it to false")
    for coarse in (True, False):
        layer = group_parameters(backbone, backbone.group_matcher(coarse=coarse), reverse=True)
        last = max(layer.values())
        closing = (
            last > 1 and sum(owner == last for owner in layer.values()) <= 4
        )  # a norm or a pointwise layer
        most = max(last, 1) - closing
        if most >= wanted:
            return {name: min(max(owner - 1, 0), most - 1) for name, owner in layer.items()}, most
    raise InputError(
        f"llrd.multipliers: {wanted} parts and a head asked, {kind} has {most} layers; give fewer"
    )


def param_groups(network: nn.Module, lr: float, recipe: Recipe) -> list[Group]:
    """Every trainable parameter of a Network in exactly one group, no group empty, in a fixed order.

    A group is {params, lr, initial_lr, weight_decay, name, part}; lr is the base lr times the part's
    multiplier (timm's own groups only carry an `lr_scale`, which torch's optimisers ignore).
    """
    names, factors = part_names(recipe), multipliers(recipe)
    part_of = parts(network, names)
    exempt = _exempt(network) if recipe.opt.no_decay_norm_bias else set()
    groups = []
    for part, factor in zip(names, factors, strict=True):
        for decays in (True, False):
            members = [
                parameter
                for name, parameter in network.named_parameters()
                if parameter.requires_grad and part_of[name] == part and (name not in exempt) == decays
            ]
            if members:
                groups.append(
                    {
                        "params": members,
                        "lr": lr * factor,
                        "initial_lr": lr * factor,
                        "weight_decay": recipe.opt.weight_decay if decays else 0.0,
                        "name": part if decays else f"{part}, no decay",
                        "part": part,
                    }
                )
    return groups


def table(groups: list[Group]) -> list[str]:
    """One line a group for people and for meta/: part, tensors, parameters, lr, weight decay."""
    rows = [f"{'group':<20}{'tensors':>8}{'parameters':>14}{'lr':>12}{'decay':>9}"]
    for group in groups:
        tensors, size = len(group["params"]), sum(parameter.numel() for parameter in group["params"])
        lr, decay = group["initial_lr"], group["weight_decay"]
        rows.append(f"{group['name']:<20}{tensors:>8}{size:>14,}{lr:>12.3g}{decay:>9g}")
    return rows


def hold_statistics(network: nn.Module, part_of: Mapping[str, str], frozen: Collection[str]) -> None:
    """Keep the running statistics of frozen BatchNorms: call after every `train()` while parts are frozen."""
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and part_of.get(f"{name}.weight") in frozen:
            module.eval()


def _exempt(network: nn.Module) -> set[str]:
    """Names without weight decay: vectors and scalars (norms, biases, layer scales) and what timm exempts."""
    own: set[str] = getattr(network.backbone, "no_weight_decay", set)()
    return {n for n, p in network.named_parameters() if p.ndim <= 1 or n.endswith(".bias")} | {
        f"backbone.{name}" for name in own
    }
