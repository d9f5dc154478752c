"""Mixed precision on a CPU, where Composer's own does nothing."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn


def autocast_cpu() -> torch.autocast:
    """Context manager that computes in bf16 on a CPU, as torch's autocast does."""
    return torch.autocast("cpu", torch.bfloat16)


def keep_depthwise_in_float32(network: nn.Module) -> None:
    """Make the depthwise convolutions of a network compute in float32 under `autocast_cpu`, in place.

    In bf16 the gradients of depthwise kernels of 5 x 5 and more take 1.5 to 90 times as long (oneDNN in torch 2.7),
    which would make EfficientNets slower than in float32. The layers themselves do it, because gradient checkpointing
    computes them again in the backward pass, outside any context manager around the forward pass.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and module.weight.shape[1] == 1:
            module.__class__ = _in_float32(type(module))  # type: ignore[arg-type]


@functools.cache
def _in_float32(kind: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """The kind of convolution whose forward pass is in float32 under autocast, parameters and hooks unchanged."""

    def forward(self: nn.Conv2d, image: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return kind.forward(self, image)
        with torch.autocast("cpu", enabled=False):
            return kind.forward(self, image.float())

    return type(kind.__name__, (kind,), {"forward": forward})
