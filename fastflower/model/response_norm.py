"""ConvNeXt V2's global response normalisation: the values of timm's layer with less memory and, on CPUs, less time.

In mixed precision on GPUs timm's layer keeps two float32 copies of the hidden map for the backward pass. This one
keeps its input alone, in the precision that it came in, and computes the rest again.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def _norm(x: Tensor, spatial: tuple[int, int]) -> Tensor:
    """The norm of x over its spatial axes, which stay with length 1, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == "cpu":  # where torch's norm over two axes takes 7 to 30 times as long
        return x.to(wide).square().sum(spatial, keepdim=True).sqrt()
    return torch.linalg.vector_norm(x, 2, spatial, keepdim=True, dtype=wide)


class _ResponseNorm(torch.autograd.Function):
    """y = x + weight * x * n + bias, where n is the spatial norm of each channel over its mean over the channels.

    Works in float32 at least and rounds once, to the type of x (B, H, W, C) or, with other `spatial` and `channel`,
    (B, C, H, W). `weight` and `bias` broadcast against x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        spatial: tuple[int, int],
        channel: int,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            norm = _norm(x, spatial)
            share = norm / (norm.mean(channel, keepdim=True) + eps)
            y = torch.addcmul(bias, x, 1 + weight * share).to(x.dtype)
        ctx.save_for_backward(x, weight, norm)
        ctx.eps, ctx.spatial, ctx.channel = eps, spatial, channel
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norm = ctx.saved_tensors
        spatial, channel = ctx.spatial, ctx.channel
        mean = norm.mean(channel, keepdim=True) + ctx.eps
        share = norm / mean
        batch_and_spatial = (0, *spatial)
        grad = grad.to(norm.dtype)
        scaled = (grad * x).sum(spatial, keepdim=True)  # of weight * share, and with it of the norm
        grad_share = scaled * weight
        grad_norm = grad_share / mean - (grad_share * norm).sum(channel, keepdim=True) / (
            x.shape[channel] * mean * mean
        )
        per_norm = torch.where(norm > 0, grad_norm / norm, 0.0)  # a channel of zeros has no direction
        grad_x = torch.addcmul(grad * (1 + weight * share), x, per_norm).to(x.dtype)
        grad_weight = (scaled * share).sum(batch_and_spatial, keepdim=True)
        return grad_x, grad_weight, grad.sum(batch_and_spatial, keepdim=True), None, None, None


class LeanResponseNorm(GlobalResponseNorm):
    """timm's GlobalResponseNorm that keeps less for the backward pass; parameters and names are the same."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), or (B, C, H, W) where timm built the layer so, to the same shape and type."""
        weight, bias = self.weight.view(self.wb_shape), self.bias.view(self.wb_shape)
        return _ResponseNorm.apply(x, weight, bias, self.eps, self.spatial_dim, self.channel_dim)


def use_lean_response_norms(network: nn.Module) -> None:
    """Turn timm's GlobalResponseNorm layers into lean ones, in place; a network without any is left as it is."""
    for module in network.modules():
        if type(module) is GlobalResponseNorm:
            module.__class__ = LeanResponseNorm  # parameters, hooks and references to the layer stay
