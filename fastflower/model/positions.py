"""Resampling of position embeddings to another image size by two fixed matrices, for training.

timm resamples those of ViTs with the bicubic interpolation of torch, whose backward pass on GPUs adds up in any order:
two trainings with one seed would differ. The interpolation is linear and separates into rows and columns, so two small
matrix products give the same values, and their backward pass is deterministic.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

SHARPNESS = -0.5  # of the cubic that torch takes where it smooths (antialias), as Pillow does


def resample_positions(
    posemb: Tensor,
    new_size: tuple[int, int],
    old_size: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
    **options: Any,
) -> Tensor:
    """timm's `resample_abs_pos_embed`, by matrices where a gradient is needed: (1, N, C) -> (1, prefix + H * W, C)."""
    timms = options or torch.compiler.is_compiling() or not (posemb.requires_grad and torch.is_grad_enabled())
    if timms:
        return resample_abs_pos_embed(posemb, new_size, old_size, num_prefix_tokens, **options)
    if old_size is None:
        old_size = (math.isqrt(posemb.shape[1] - num_prefix_tokens),) * 2
    if tuple(new_size) == tuple(old_size):
        return posemb
    prefix, grid = posemb[:, :num_prefix_tokens], posemb[0, num_prefix_tokens:]
    # tensors without content, of an estimate of memory, must not stay for a training
    matrix = _matrix.__wrapped__ if isinstance(posemb, FakeTensor) else _matrix
    rows, columns = (
        matrix(old, new, posemb.device) for old, new in zip(old_size, new_size, strict=True)
    )  # (H, h), (W, w)
    with torch.autocast(posemb.device.type, enabled=False):  # half precision would round the positions
        grid = rows @ grid.float().reshape(old_size[0], -1)  # (H, w * C)
        grid = columns @ grid.reshape(new_size[0], old_size[1], -1)  # (H, W, C)
    resampled = grid.reshape(1, -1, posemb.shape[-1]).to(posemb.dtype)
    return torch.cat([prefix, resampled], 1) if num_prefix_tokens else resampled


def bicubic_weights(old: int, new: int) -> np.ndarray:
    """Weights (new, old), float64, of torch's bicubic interpolation with antialias of `old` places to `new`."""
    scale = old / new
    centres = (np.arange(new)[:, None] + 0.5) * scale
    x = np.abs(np.arange(old) + 0.5 - centres) / max(scale, 1.0)
    near = ((SHARPNESS + 2) * x - (SHARPNESS + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * SHARPNESS
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


@functools.lru_cache(maxsize=32)
def _matrix(old: int, new: int, device: torch.device) -> Tensor:
    return torch.tensor(bicubic_weights(old, new), dtype=torch.float32, device=device)


def use_matrices_for_positions(network: nn.Module) -> None:
    """Let the timm modules that define a network's layers resample positions by `resample_positions`."""
    homes = {kind.__module__ for layer in network.modules() for kind in type(layer).__mro__}
    for module in map(sys.modules.__getitem__, homes):
        if getattr(module, "resample_abs_pos_embed", None) is resample_abs_pos_embed:
            module.resample_abs_pos_embed = resample_positions  # type: ignore[attr-defined]
