"""Registration of this project's networks with timm, so that recipes name them like any backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import register_model
from torch import nn


def register_with_timm(name: str, build: Callable[..., nn.Module]) -> None:
    """Let `timm.create_model(name)` call `build`, with the keyword arguments that are not of timm's own loading."""

    def create(
        pretrained: bool = False,
        *,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        num_classes: int = 0,
        **arguments: Any,
    ) -> nn.Module:
        return build(**arguments)

    create.__name__ = create.__qualname__ = name
    create.__module__ = build.__module__
    register_model(create)
