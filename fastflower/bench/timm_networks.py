"""Networks of timm as its users create them, for the peers of benchmarks."""

from __future__ import annotations

from typing import Any

from torch import nn


def create(name: str, side: int, **options: Any) -> nn.Module:
    """A network for square images of `side` pixels: built for them, if it is one that is built for a size."""
    import timm

    try:
        network: nn.Module = timm.create_model(name, img_size=side, **options)
    except TypeError:  # an unknown argument
        network = timm.create_model(name, **options)
    return network
