"""Networks that compare the two images of a pair: one trunk for both, then a fusion of their features.

`register` adds them to timm, so that recipes name them like any backbone:
`compare_resnet<blocks of the three stages>_<fusion>[_cbam][_w<percent of the width>]`, such as
compare_resnet333_adaptive_cbam or compare_resnet222_distance_w112.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from timm.layers.cbam import CbamModule
from timm.models import register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

FEATURES = 256
WIDTHS = (64, 128, 256)  # channels of the three stages
LAYERS = ("222", "333")
PERCENT = (100, 25, 50, 75, 112, 125)
CONFIG = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "input_size": (3, 32, 64)}

Terms = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
FUSIONS: dict[str, Terms] = {  # features (B, F) of both images -> terms (B, F), which are concatenated
    "concat": lambda a, b: (a, b),
    "difference": lambda a, b: (a - b,),
    "distance": lambda a, b: ((a - b).abs(),),
    "product": lambda a, b: (a * b,),
    "square": lambda a, b: ((a - b).square(),),
    "adaptive": lambda a, b: (a, b, a - b, (a - b).abs(), a * b, (a - b).square()),
}


class CompareNet(nn.Module):
    """Pairs side by side (B, 3, H, 2W) -> fused features (B, F * terms).

    The terms of `adaptive` have learned weights: softmax(shares) times the number of terms, 1 at the start.
    """

    def __init__(self, layers: list[int], fusion: str, *, cbam: bool, width: float) -> None:
        super().__init__()
        channels = [round(wide * width / 8) * 8 for wide in WIDTHS]
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 3, 1, 1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU(True)
        )
        width_in, stages = channels[0], []
        for stage, (count, width_out) in enumerate(zip(layers, channels, strict=True)):
            blocks = [
                _block(width_in, width_out, 2 if stage else 1),
                *(_block(width_out, width_out, 1) for _ in range(count - 1)),
            ]
            stages.append(nn.Sequential(*blocks, *([CbamModule(width_out)] if cbam else [])))
            width_in = width_out
        self.stages = nn.Sequential(*stages)
        self.features = nn.Linear(width_in, FEATURES)
        self.terms = FUSIONS[fusion]
        self.shares = nn.Parameter(torch.zeros(6)) if fusion == "adaptive" else None
        self.pretrained_cfg = self.default_cfg = CONFIG

    def forward(self, pairs: Tensor) -> Tensor:
        first, second = (self.embed(half) for half in pairs.chunk(2, dim=3))
        terms = self.terms(first, second)
        if self.shares is not None:
            weights = self.shares.softmax(0) * len(terms)
            terms = tuple(weight * term for weight, term in zip(weights, terms, strict=True))
        return torch.cat(terms, 1)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, F), with the same weights for both images of a pair."""
        return self.features(self.stages(self.stem(images)).mean((2, 3)))

    def group_matcher(self, *, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers, from first to last."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^features|^shares", (99999,))]}


def _block(width_in: int, width_out: int, stride: int) -> BasicBlock:
    shortcut = None
    if width_in != width_out or stride > 1:
        shortcut = nn.Sequential(
            nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
        )
    return BasicBlock(width_in, width_out, stride, shortcut)


@lru_cache(maxsize=1)
def register() -> None:
    """Register all 144 variants with timm, once."""
    for layers, fusion, cbam, percent in itertools.product(LAYERS, FUSIONS, (False, True), PERCENT):
        _register(layers, fusion, cbam=cbam, percent=percent)


def _register(layers: str, fusion: str, *, cbam: bool, percent: int) -> None:
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        num_classes: int = 0,
    ) -> CompareNet:
        return CompareNet([int(count) for count in layers], fusion, cbam=cbam, width=percent / 100)

    name = f"compare_resnet{layers}_{fusion}{'_cbam' if cbam else ''}"
    create.__name__ = create.__qualname__ = name if percent == 100 else f"{name}_w{percent}"
    create.__module__ = __name__
    register_model(create)
