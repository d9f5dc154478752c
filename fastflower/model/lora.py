"""Low-rank adapters (LoRA, arXiv:2106.09685): a large backbone learns through two narrow matrices in each linear layer.

A layer computes W x + b + alpha / rank * B (A x); W and b stay as they are, A (rank, in) and B (out, rank) are trained.
A checkpoint's state keeps the adapters as `<layer>.lora_a`, `<layer>.lora_b` and `<layer>.lora_scale`. `merged` adds
them to the weights, so that members, bundle and predictor hold an ordinary network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from fastflower.core.errors import InputError
from fastflower.recipe.schema import Lora

SMALLEST = 64  # inputs and outputs of a layer, below which an adapter saves nothing
PARTS = ("lora_a", "lora_b", "lora_scale")


class AdaptedLinear(nn.Linear):
    """An nn.Linear with an adapter. Networks that read `weight` themselves, as BEiT's attention does, get the sum."""

    lora_a: Tensor
    lora_b: Tensor
    lora_scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), without forming the sum of the weights."""
        narrow = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, cast(Tensor, self._parameters["weight"]), self.bias) + self.lora_scale * narrow

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight and its adapter's share, (out, in)."""
        return cast(Tensor, self._parameters["weight"]) + self.lora_scale * self.lora_b @ self.lora_a


def adapt(backbone: nn.Module, lora: Lora, name: str) -> int:
    """Freeze a backbone and give its linear layers adapters, in place; returns their number.

    B starts at 0, so that the network first computes what it did. Raises InputError for a network, or for
    model.lora.targets, without such layers; `name` is the backbone's, for the message.
    """
    layers = _chosen(linear_layers(backbone), lora, name)
    backbone.requires_grad_(False)
    for layer in layers.values():
        weight = layer.weight
        layer.lora_a = nn.Parameter(weight.new_empty(lora.rank, layer.in_features))
        layer.lora_b = nn.Parameter(weight.new_zeros(layer.out_features, lora.rank))
        layer.register_buffer("lora_scale", weight.new_tensor(lora.alpha / lora.rank))
        nn.init.kaiming_uniform_(layer.lora_a, a=math.sqrt(5))
        layer.__class__ = AdaptedLinear  # parameters, hooks and references to the layer stay
    return len(layers)


def linear_layers(backbone: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of attention and MLPs: those in numbered blocks, wide enough for an adapter to be narrow."""
    return {
        name: module
        for name, module in backbone.named_modules()
        if type(module) is nn.Linear
        and any(part.isdecimal() for part in name.split("."))
        and min(module.in_features, module.out_features) >= SMALLEST
    }


def merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose adapters are added to their weights; one without adapters is returned as it is."""
    plain = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in PARTS}
    for name in tensors:
        layer, _, leaf = name.rpartition(".")
        if leaf == "lora_a":
            a, b, scale = (tensors[f"{layer}.{part}"].double() for part in PARTS)
            weight = plain[f"{layer}.weight"]
            plain[f"{layer}.weight"] = (weight.double() + scale * b @ a).to(weight.dtype)
    return plain


def _chosen(layers: dict[str, nn.Linear], lora: Lora, name: str) -> dict[str, nn.Linear]:
    """The layers that model.lora.targets names."""
    if not layers:
        raise InputError(
            f"model.lora.rank = {lora.rank}: {name} has no linear layers of {SMALLEST} or more inputs and outputs in "
            "its blocks; set it to 0 and train all weights, or the head alone by model.freeze=backbone"
        )
    if lora.targets == "auto":
        return layers
    kinds = sorted({layer.rpartition(".")[2] for layer in layers})
    unknown = [kind for kind in lora.targets if kind not in kinds]
    if unknown:
        raise InputError(
            f"model.lora.targets = {lora.targets}: {name} has no linear layers {', '.join(unknown)} in its blocks; "
            f"choose from {', '.join(kinds)}, or auto for all"
        )
    return {layer: module for layer, module in layers.items() if layer.rpartition(".")[2] in lora.targets}
