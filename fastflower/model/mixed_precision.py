"""Mixed precision on a CPU, where Composer's own does nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def autocast_cpu() -> Iterator[None]:
    """Context manager that computes in bf16 as torch's autocast does, but depthwise convolutions in float32.

    In bf16 the gradients of depthwise kernels of 5 x 5 and more take 1.5 to 90 times as long (oneDNN in torch 2.7),
    which would make EfficientNets slower than in float32.
    """
    with torch.autocast("cpu", torch.bfloat16), _DepthwiseInFloat32():
        yield


class _DepthwiseInFloat32(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.conv2d:
            func = _conv2d
        return func(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,  # its name in torch
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """torch.conv2d, in float32 where each channel is convolved alone."""
    if groups == 1 or weight.shape[1] > 1:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    with torch.autocast("cpu", enabled=False):
        return torch.conv2d(input.float(), weight, bias, stride, padding, dilation, groups)
