"""The part of a training's tensors that is handed in: no adapters and no auxiliary heads."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastflower.model.lora import merged


def handed_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the main head alone, its adapters added to their weights; another one is returned as it is."""
    return {name: tensor for name, tensor in merged(tensors).items() if not name.startswith("aux_heads.")}
