"""Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) through captum, for maps (NCHW, NHWC) and for tokens.

Shows where in the image the network finds a class, and how much of that lies at the image's border.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor, nn

from fastflower.errors import InputError

COARSEST = 4  # a map of 2 x 2, as small images leave it, shows nothing
BORDER = 1 / 8  # of each side
EVEN = 1 - (1 - 2 * BORDER) ** 2  # the border's share of a map that is the same everywhere


class Probe(nn.Module):
    """Passes on a map (B, C, h, w): the layer whose gradients are read."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@contextmanager
def probed(network: nn.Module, sample: Tensor) -> Iterator[Probe]:
    """Put a Probe where the network last has a spatial map, for the length of the block.

    Token networks get it before their last block, where every patch still reaches the output.
    """
    backbone: Any = getattr(network, "backbone", network)
    probe = Probe()
    blocks: Any = getattr(backbone, "blocks", None)
    patched = hasattr(backbone, "patch_embed") and isinstance(blocks, nn.Sequential)
    if patched and _yields_tokens(network, blocks, sample):
        prefix = int(getattr(backbone, "num_prefix_tokens", 1))
        grid = tuple(int(n) for n in backbone.patch_embed.dynamic_feat_size(sample.shape[-2:]))

        def tokens(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]  # (B, prefix + h * w, C)
            patches = x[:, prefix:].transpose(1, 2).unflatten(2, grid)
            patches = probe(patches).flatten(2).transpose(1, 2)
            return (torch.cat([x[:, :prefix], patches], dim=1), *args[1:])

        handle = blocks[-1].register_forward_pre_hook(tokens)
    else:
        last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"

        def maps(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            return probe(out.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if last else probe(out)

        handle = _last_map(network, sample, channels_last=last).register_forward_hook(maps)
    try:
        yield probe
    finally:
        handle.remove()


def attribute(network: nn.Module, images: Tensor, targets: Tensor) -> np.ndarray:
    """Grad-CAM of float images (B, 3, H, W) for class_idx targets (B,): float32 (B, H, W), each image's sum is 1.

    An image in which nothing speaks for its target has a map of zeros.
    """
    with torch.enable_grad(), probed(network, images[:1]) as probe:
        inputs = images.detach().requires_grad_()
        maps = LayerGradCam(network, probe).attribute(inputs, target=targets, relu_attributions=True)
    maps = F.interpolate(maps.detach(), images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    total = maps.sum((1, 2), keepdim=True)
    return (maps / torch.where(total > 0, total, torch.ones_like(total))).cpu().numpy()


def border_share(maps: np.ndarray) -> np.ndarray:
    """The share (B,) of each map (B, H, W) that lies in the outer eighth on each side; EVEN when spread evenly."""
    height, width = maps.shape[1:]
    top, left = round(height * BORDER), round(width * BORDER)
    inner = maps[:, top : height - top, left : width - left].sum((1, 2))
    total = maps.sum((1, 2))
    return np.where(total > 0, 1 - inner / np.where(total > 0, total, 1), np.nan)


def overlay(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """An image uint8 (H, W, 3) dimmed where the map (H, W) is low, so that colours stay what they are."""
    light = cam / max(float(cam.max()), 1e-12)
    return (image * (0.15 + 0.85 * light[..., None])).round().astype(np.uint8)


def _yields_tokens(network: nn.Module, blocks: nn.Sequential, sample: Tensor) -> bool:
    shapes: list[int] = []
    handle = blocks[-1].register_forward_hook(lambda module, args, out: shapes.append(out.ndim))
    with torch.no_grad():
        network(sample)
    handle.remove()
    return shapes == [3]


def _last_map(network: nn.Module, sample: Tensor, channels_last: bool) -> nn.Module:
    """The module that last yields a map of COARSEST x COARSEST positions or more; failing that, the finest."""
    found: list[tuple[int, nn.Module]] = []

    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(out, Tensor) and out.ndim == 4:
            found.append((min(out.shape[1:3] if channels_last else out.shape[2:]), module))

    handles = [module.register_forward_hook(note) for module in network.modules()]
    with torch.no_grad():
        network(sample)
    for handle in handles:
        handle.remove()
    if not found:
        raise InputError("Grad-CAM: the network has no spatial map")
    least = min(COARSEST, max(side for side, _ in found))
    return [module for side, module in found if side >= least][-1]
