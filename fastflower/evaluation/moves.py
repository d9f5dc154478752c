"""Turned, shifted and cut views of an image at test time, as part of the network that sees them.

A view of a bundle is a program, so the predictor needs no code for these: the program moves its input first.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflower.data.transforms import image_ops
from fastflower.model.network import Network
from fastflower.recipe.schema import Tta


@dataclass(frozen=True)
class Move:
    """A rotation in degrees, counter-clockwise, and a shift in fractions of the width and height.

    `zoom` is the side of the part that fills the view, as a fraction of the image's; `upside_down` mirrors vertically.
    """

    degrees: float = 0.0
    across: float = 0.0
    down: float = 0.0
    zoom: float = 1.0
    upside_down: bool = False


def moves_of(tta: Tta) -> list[Move]:
    """The moves of every view: none, then rotations, four shifts, upside down, quarter turns and five crops."""
    shifts = [(tta.shift, 0.0), (-tta.shift, 0.0), (0.0, tta.shift), (0.0, -tta.shift)] if tta.shift else []
    corner = (1 - tta.crops) / 2
    centres = [(0.0, 0.0), (corner, corner), (-corner, corner), (corner, -corner), (-corner, -corner)]
    return [
        Move(),
        *(Move(degrees=degrees) for degrees in tta.rotations),
        *(Move(across=across, down=down) for across, down in shifts),
        *([Move(upside_down=True)] if tta.vflip else []),
        *(Move(degrees=degrees) for degrees in ((90.0, 180.0, 270.0) if tta.quarter_turns else ())),
        *(Move(across=across, down=down, zoom=tta.crops) for across, down in (centres if corner else ())),
    ]


class MovedNetwork(Network):
    """A network that samples its input bilinearly at moved positions, mirrored at the border; pairs image by image.

    The positions of an image (H, W) are the sums of `across` (W, 2) and `down` (H, 2), both buffers.
    """

    names: tuple[str, str]
    images: int

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float 0..255 -> logits (B, C)."""
        across, down = (self.get_buffer(name) for name in self.names)
        grid = (across[None] + down[:, None]).expand(images.shape[0], -1, -1, -1)
        halves = images.chunk(self.images, 3) if self.images > 1 else (images,)
        moved = [F.grid_sample(half, grid, "bilinear", "reflection", align_corners=False) for half in halves]
        return super().forward(torch.cat(moved, 3) if self.images > 1 else moved[0])


def moved(network: nn.Module, move: Move, size: tuple[int, int], *, images: int = 1) -> nn.Module:
    """A network of the same weights whose input of `size` (height, width) is moved; itself for no move.

    With `images` = 2 it sees pairs side by side, (B, 3, H, 2W).
    """
    if move == Move():
        return network
    assert isinstance(network, Network)
    height, width = size
    matrix = image_ops.rotation(torch.tensor([move.degrees]))[0]  # of positions from the centre, in pixels
    matrix[:, :2] *= move.zoom
    if move.upside_down:
        matrix[1, :2] *= -1
    matrix[:, 2] = torch.tensor([-round(move.across * width), -round(move.down * height)])
    scale = torch.tensor([2 / width, 2 / height])
    columns, rows = ((torch.arange(n) - (n - 1) / 2)[:, None] for n in (width, height))
    kind = "_upside_down" if move.upside_down else "" if move.zoom == 1 else f"_{move.zoom:g}"
    name = f"{move.degrees:g}_{move.across:g}_{move.down:g}_{height}_{width}{kind}"
    name = name.replace(".", "p").replace("-", "m")
    result: Any = copy.copy(network)  # shares the modules with their weights
    result._buffers = dict(network._buffers)
    result._non_persistent_buffers_set = set(network._non_persistent_buffers_set)
    result.__class__ = MovedNetwork
    result.names, result.images = (f"across_{name}", f"down_{name}"), images
    device = next(network.parameters()).device
    for label, values in zip(
        result.names,
        (columns * matrix[:, 0] * scale, (rows * matrix[:, 1] + matrix[:, 2]) * scale),
        strict=True,
    ):
        result.register_buffer(label, values.to(device), persistent=False)
    return result
