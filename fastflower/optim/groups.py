"""Parameter groups: the part of the network, the lr and the weight decay of each parameter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from timm.models._manipulate import group_parameters
from torch import nn

from fastflower.core.errors import InputError
from fastflower.model.network import batch_norms
from fastflower.recipe import Recipe
from fastflower.recipe.starting_point import layerwise

Group = dict[str, Any]
# a last layer of timm's with so few tensors, or of any with so small a share of the parameters, closes the network
CLOSING_TENSORS, CLOSING_SHARE = 4, 0.01


def part_names(recipe: Recipe) -> list[str]:
    """Names of the parts to which llrd.multipliers apply, from the first layers to the head."""
    count = len(multipliers(recipe))
    backbone_parts = {2: ["backbone"], 4: ["front", "middle", "back"]}
    return [*backbone_parts.get(count, [f"part{i}" for i in range(1, count)]), "head"]


def multipliers(recipe: Recipe) -> list[float]:
    """Factors on the lr, one per part; without layer-wise lr, 1 for the two parts backbone and head."""
    return list(recipe.llrd.multipliers) if layerwise(recipe) else [1.0, 1.0]


def part_by_parameter(network: nn.Module, names: list[str]) -> dict[str, str]:
    """Parameter name -> name of its part, for all parameters of a Network.

    The backbone's stages (for a ViT, its blocks) are split evenly over the parts, earlier parts taking one more:
    ConvNeXt's four stages become 0-1, 2, 3 and a ViT's twelve blocks 0-3, 4-7, 8-11. The stem counts with the first
    stage, closing norms and layers with the last.
    """
    backbone: nn.Module = network.backbone  # type: ignore[assignment]
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
        name: "head" if name.startswith(("head.", "aux_heads.")) else part_of[name]
        for name, _ in network.named_parameters()
    }


def _stages(backbone: nn.Module, wanted: int) -> tuple[dict[str, int], int]:
    """The stage of each backbone parameter, and the number of stages; uses single blocks if stages are too few."""
    for by_name, coarse in ((False, True), (False, False), (True, True), (True, False)):
        stage_of = _layers(backbone, coarse=coarse, by_name=by_name)
        count = max(stage_of.values(), default=-1) + 1
        if count >= wanted:
            return stage_of, count
    raise InputError(
        f"llrd.multipliers: got {wanted} factors and one for the head, {type(backbone).__name__} has {count} layers; "
        "give fewer, or set llrd.enabled=false"
    )


def _layers(backbone: nn.Module, *, coarse: bool, by_name: bool = False) -> dict[str, int]:
    """Parameter name -> number of its stage or, with coarse=False, of its block, counted from the input.

    Numbers are timm's where it has them for every parameter, else, and with by_name, those of `_named_layers`. The
    stem counts with the first layer; closing layers that are no layer of the network's body count with the last.
    """
    sizes = {name: parameter.numel() for name, parameter in backbone.named_parameters()}
    try:
        matcher = backbone.group_matcher(coarse=coarse)  # type: ignore[operator]
        layer_of = {name: int(n) for name, n in group_parameters(backbone, matcher, reverse=True).items()}
    except Exception:  # own networks have no matcher, those of some families are wrong
        layer_of = {}
    named = by_name or layer_of.keys() != sizes.keys()
    if named:
        layer_of = _named_layers(list(sizes), coarse=coarse)
    count = max(layer_of.values(), default=0) + 1
    tensors, share = [0] * count, [0.0] * count
    for name, layer in layer_of.items():
        tensors[layer] += 1
        share[layer] += sizes[name] / max(1, sum(sizes.values()))
    last = count - 1
    if last > 1 and tensors[last] <= CLOSING_TENSORS and not named:  # a final norm or pointwise layer
        last -= 1
    while last > 1 and share[last] < CLOSING_SHARE:
        last -= 1
    return {name: min(max(layer - 1, 0), max(last - 1, 0)) for name, layer in layer_of.items()}


def _named_layers(names: list[str], *, coarse: bool) -> dict[str, int]:
    """Layers by the numbers in parameters' names, in their order: 0 the stem, then `stages.2` or `stages.2.blocks.5`.

    Parameters between two layers, such as a downsampling, count with the layer before them.
    """
    layer_of: dict[str, int] = {}
    known: dict[tuple[str, ...], int] = {}
    current = 0
    for name in names:
        parts = name.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdecimal()][: 1 if coarse else 2]
        if numbers:
            current = known.setdefault(tuple(parts[: numbers[-1] + 1]), len(known) + 1)
        layer_of[name] = current
    if not known:  # a network of a few named modules
        modules = list(dict.fromkeys(name.partition(".")[0] for name in names))
        layer_of = {name: modules.index(name.partition(".")[0]) + 1 for name in names}
    return layer_of


def param_groups(network: nn.Module, lr: float, recipe: Recipe) -> list[Group]:
    """Groups of a Network's trainable parameters: each parameter in one group, no group empty, in a fixed order.

    A network without any, as one with a k-NN head, gets one empty group, for the optimizers that want one.

    A group is {params, lr, initial_lr, weight_decay, name, part}; its lr is the base lr times the factor of its part
    or, with llrd.decay, of its layer (timm's own groups only carry an `lr_scale`, which torch's optimizers ignore).
    """
    part_of = part_by_parameter(network, part_names(recipe))
    share_of = _shares(network, part_of, recipe)
    exempt = _exempt(network) if recipe.opt.no_decay_norm_bias else set()
    groups = []
    for share in sorted(set(share_of.values()), key=lambda share: share.place):
        for decays in (True, False):
            parameters = [
                parameter
                for name, parameter in network.named_parameters()
                if parameter.requires_grad and share_of[name] == share and (name not in exempt) == decays
            ]
            if parameters:
                groups.append(
                    {
                        "params": parameters,
                        "lr": lr * share.factor,
                        "initial_lr": lr * share.factor,
                        "weight_decay": recipe.opt.weight_decay if decays else 0.0,
                        "name": share.name if decays else f"{share.name}, no decay",
                        "part": share.part,
                    }
                )
    none: Group = {
        "params": [],
        "lr": lr,
        "initial_lr": lr,
        "weight_decay": 0.0,
        "name": "head",
        "part": "head",
    }
    return groups or [none]


@dataclass(frozen=True)
class _Share:
    """Parameters with one factor on the learning rate: a part, or with llrd.decay a layer of it."""

    place: tuple[int, int]  # of the part and the layer, by which shares are sorted
    part: str
    name: str
    factor: float


def _shares(network: nn.Module, part_of: Mapping[str, str], recipe: Recipe) -> dict[str, _Share]:
    """Parameter name -> its share. With llrd.decay the head has factor 1 and each layer below it decay times more."""
    names, decay = part_names(recipe), recipe.llrd.decay
    if decay is None or not layerwise(recipe):
        shares = {
            part: _Share((place, 0), part, part, factor)
            for place, (part, factor) in enumerate(zip(names, multipliers(recipe), strict=True))
        }
        return {name: shares[part] for name, part in part_of.items()}
    layer_of = _layers(network.backbone, coarse=False)  # type: ignore[arg-type]
    depth = max(layer_of.values(), default=-1) + 1
    share_of = {}
    for name, part in part_of.items():
        layer = layer_of.get(name.removeprefix("backbone."), depth)
        label = part if layer == depth else f"{part}, layer {layer + 1}"
        share_of[name] = _Share((names.index(part), layer), part, label, decay ** (depth - layer))
    return share_of


def describe_groups(groups: list[Group]) -> list[str]:
    """One line per group, after a header, for the console and meta/: name, tensors, parameters, lr, weight decay."""
    width = max([20, *(len(group["name"]) + 2 for group in groups)])
    rows = [f"{'group':<{width}}{'tensors':>8}{'parameters':>14}{'lr':>12}{'decay':>9}"]
    for group in groups:
        tensors, size = len(group["params"]), sum(parameter.numel() for parameter in group["params"])
        lr, decay = group["initial_lr"], group["weight_decay"]
        rows.append(f"{group['name']:<{width}}{tensors:>8}{size:>14,}{lr:>12.3g}{decay:>9g}")
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
