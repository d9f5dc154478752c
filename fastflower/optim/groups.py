"""Parameter groups: the part of the network, the lr and the weight decay of each parameter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from timm.models._manipulate import group_parameters
from torch import nn

from fastflower.core.errors import InputError
from fastflower.model.network import batch_norms
from fastflower.recipe import Recipe

Group = dict[str, Any]


def part_names(recipe: Recipe) -> list[str]:
    """Names of the parts to which llrd.multipliers apply, from the first layers to the head."""
    count = len(multipliers(recipe))
    backbone_parts = {2: ["backbone"], 4: ["front", "middle", "back"]}
    return [*backbone_parts.get(count, [f"part{i}" for i in range(1, count)]), "head"]


def multipliers(recipe: Recipe) -> list[float]:
    """Factors on the lr, one per part; without layer-wise lr, 1 for the two parts backbone and head."""
    return list(recipe.llrd.multipliers) if recipe.llrd.enabled else [1.0, 1.0]


def part_by_parameter(network: nn.Module, names: list[str]) -> dict[str, str]:
    """Parameter name -> name of its part, for all parameters of a Network.

    timm's group matcher gives the backbone's stages (for a ViT, its blocks). The stem counts with the first stage, a
    final norm with the last. Consecutive stages are split evenly over the parts, earlier parts taking one more:
    ConvNeXt's four stages become 0-1, 2, 3 and a ViT's twelve blocks 0-3, 4-7, 8-11.
    """
    backbone: Any = network.backbone
    if len(names) == 2:
        stage_of, count = {name: 0 for name, _ in backbone.named_parameters()}, 1
    else:
        stage_of, count = _stages(backbone, len(names) - 1)
    chunks = np.array_split(np.arange(count), len(names) - 1)
    part_of_stage = {
        stage: name for name, chunk in zip(names[:-1], chunks, strict=True) for stage in chunk.tolist()
    }
    part_of = {f"backbone.{name}": part_of_stage[stage] for name, stage in stage_of.items()}
    return {
        name: "head" if name.startswith("head.") else part_of[name] for name, _ in network.named_parameters()
    }


def _stages(backbone: Any, wanted: int) -> tuple[dict[str, int], int]:
    """The stage of each backbone parameter, and the number of stages; uses single blocks if stages are too few."""
    kind, count = type(backbone).__name__, 0
    if not hasattr(backbone, "group_matcher"):
        raise InputError(f"llrd.enabled: timm defines no layers for {kind}; set llrd.enabled=false")
    for coarse in (True, False):
        layer_of = group_parameters(backbone, backbone.group_matcher(coarse=coarse), reverse=True)
        last = max(layer_of.values())
        tensors_in_last = sum(layer == last for layer in layer_of.values())
        ends_in_norm = last > 1 and tensors_in_last <= 4  # a final norm or pointwise layer is no stage
        count = max(last, 1) - ends_in_norm
        if count >= wanted:
            return {name: min(max(layer - 1, 0), count - 1) for name, layer in layer_of.items()}, count
    raise InputError(
        f"llrd.multipliers: got {wanted} factors and one for the head, {kind} has {count} layers; give fewer"
    )


def param_groups(network: nn.Module, lr: float, recipe: Recipe) -> list[Group]:
    """Groups of a Network's trainable parameters: each parameter in one group, no group empty, in a fixed order.

    A group is {params, lr, initial_lr, weight_decay, name, part}; its lr is the base lr times the part's
    multiplier (timm's own groups only carry an `lr_scale`, which torch's optimizers ignore).
    """
    names, factors = part_names(recipe), multipliers(recipe)
    part_of = part_by_parameter(network, names)
    exempt = _exempt(network) if recipe.opt.no_decay_norm_bias else set()
    groups = []
    for part, factor in zip(names, factors, strict=True):
        for decays in (True, False):
            parameters = [
                parameter
                for name, parameter in network.named_parameters()
                if parameter.requires_grad and part_of[name] == part and (name not in exempt) == decays
            ]
            if parameters:
                groups.append(
                    {
                        "params": parameters,
                        "lr": lr * factor,
                        "initial_lr": lr * factor,
                        "weight_decay": recipe.opt.weight_decay if decays else 0.0,
                        "name": part if decays else f"{part}, no decay",
                        "part": part,
                    }
                )
    return groups


def describe_groups(groups: list[Group]) -> list[str]:
    """One line per group, after a header, for the console and meta/: name, tensors, parameters, lr, weight decay."""
    rows = [f"{'group':<20}{'tensors':>8}{'parameters':>14}{'lr':>12}{'decay':>9}"]
    for group in groups:
        tensors, size = len(group["params"]), sum(parameter.numel() for parameter in group["params"])
        lr, decay = group["initial_lr"], group["weight_decay"]
        rows.append(f"{group['name']:<20}{tensors:>8}{size:>14,}{lr:>12.3g}{decay:>9g}")
    return rows


def freeze_batch_norms(network: nn.Module, part_of: Mapping[str, str], frozen: Collection[str]) -> None:
    """Put the BatchNorms of frozen parts in eval mode; call after every `train()` while parts are frozen."""
    for name, norm in batch_norms(network).items():
        if part_of.get(f"{name}.weight") in frozen:
            norm.eval()


def _exempt(network: nn.Module) -> set[str]:
    """Names without weight decay: vectors and scalars (norms, biases, layer scales) and timm's own exemptions."""
    timm_exempt: set[str] = getattr(network.backbone, "no_weight_decay", set)()
    return {n for n, p in network.named_parameters() if p.ndim <= 1 or n.endswith(".bias")} | {
        f"backbone.{name}" for name in timm_exempt
    }
