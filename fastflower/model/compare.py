"""Networks that compare the two images of a pair: one trunk for both, then a fusion of their features.

They are registered with timm, so that recipes name them as they name any backbone:
`compare_resnet<blocks of the three stages>_<fusion>[_cbam][_w<percent of the width>]`, such as
compare_resnet333_adaptive_cbam or compare_resnet222_distance_w112. Seed 003's "ResNetCompareNet"; it does not list
its six fusions, so those below are ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from timm.layers.cbam import CbamModule
from timm.models import register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

FEATURES = 256
WIDTHS = (64, 128, 256)  # of the three stages
LAYERS = ("222", "333")
PERCENT = (100, 25, 50, 75, 112, 125)
CONFIG = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "input_size": (3, 32, 64)}

Terms = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
FUSIONS: dict[str, Terms] = {  # features (B, F) of either image -> terms (B, F), which are concatenated
    "concat": lambda a, b: (a, b),
    "difference": lambda a, b: (a - b,),
    "distance": lambda a, b: ((a - b).abs(),),
    "product": lambda a, b: (a * b,),
    "square": lambda a, b: ((a - b).square(),),
    "adaptive": lambda a, b: (a, b, a - b, (a - b).abs(), a * b, (a - b).square()),
}


class CompareNet(nn.Module):
    """Pairs side by side (B, 3, H, 2W) -> fused features (B, F * terms).

    The terms of `adaptive` have learned shares, softmax times their number, so that they begin at 1.
    """

    def __init__(self, layers: list[int], fusion: str, *, cbam: bool, width: float) -> None:
        super().__init__()
        channels = [round(wide * width / 8) * 8 for wide in WIDTHS]
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 3, 1, 1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU(True)
        )
        before, stages = channels[0], []
        for place, (count, after) in enumerate(zip(layers, channels, strict=True)):
            blocks = [
                _block(before, after, 2 if place else 1),
                *(_block(after, after, 1) for _ in range(count - 1)),
            ]
            stages.append(nn.Sequential(*blocks, *([CbamModule(after)] if cbam else [])))
            before = after
        self.stages = nn.Sequential(*stages)
        self.features = nn.Linear(before, FEATURES)
        self.terms = FUSIONS[fusion]
        self.shares = nn.Parameter(torch.zeros(6)) if fusion == "adaptive" else None
        self.pretrained_cfg = self.default_cfg = CONFIG

    def forward(self, pairs: Tensor) -> Tensor:
        one, other = (self.embed(half) for half in pairs.chunk(2, dim=3))
        terms = self.terms(one, other)
        if self.shares is not None:
            shares = self.shares.softmax(0) * len(terms)
            terms = tuple(share * term for share, term in zip(shares, terms, strict=True))
        return torch.cat(terms, 1)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, F), with the same weights for either image of a pair."""
        return self.features(self.stages(self.stem(images)).mean((2, 3)))

    def group_matcher(self, *, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers, first to last."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^features|^shares", (99999,))]}


def _block(before: int, after: int, stride: int) -> BasicBlock:
    shortcut = None
    if before != after or stride > 1:
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
    return BasicBlock(before, after, stride, shortcut)


def _register(layers: str, fusion: str, cbam: bool, percent: int) -> None:
    def make(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        num_classes: int = 0,
    ) -> CompareNet:
        return CompareNet([int(count) for count in layers], fusion, cbam=cbam, width=percent / 100)

    name = f"compare_resnet{layers}_{fusion}{'_cbam' if cbam else ''}"
    make.__name__ = make.__qualname__ = name if percent == 100 else f"{name}_w{percent}"
    make.__module__ = __name__
    register_model(make)


for choice in itertools.product(LAYERS, FUSIONS, (False, True), PERCENT):
    _register(*choice)
