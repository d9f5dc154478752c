"""Networks that compare the two images of a pair: one trunk for both, then a fusion of their features.

`register` adds them to timm, so that recipes name them like any backbone:
`compare_resnet<blocks of the three stages>_<fusion>[_cbam][_w<percent of the width>]`, such as
compare_resnet333_adaptive_cbam or compare_resnet222_distance_w112; and `compare_<timm name>_<fusion>` with any network
of timm as the trunk, such as compare_efficientnet_b0_adaptive, whose published weights are those of efficientnet_b0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.layers.cbam import CbamModule
from timm.models._manipulate import checkpoint_seq
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from fastflower.model.pretrained import WITH_TRUNK
from fastflower.model.timm_registry import register_with_timm

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
        self._fuse_by(fusion)
        self.grad_checkpointing = False
        self.pretrained_cfg = self.default_cfg = CONFIG

    def _fuse_by(self, fusion: str) -> None:
        self.terms = FUSIONS[fusion]
        self.shares = nn.Parameter(torch.zeros(6)) if fusion == "adaptive" else None

    def forward(self, pairs: Tensor) -> Tensor:
        first, second = (self.embed(half) for half in pairs.chunk(2, dim=3))
        terms = self.terms(first, second)
        if self.shares is not None:
            weights = self.shares.softmax(0) * len(terms)
            terms = tuple(weight * term for weight, term in zip(weights, terms, strict=True))
        return torch.cat(terms, 1)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, F), with the same weights for both images of a pair."""
        x = self.stem(images)
        maps = checkpoint_seq(self.stages, x) if self.grad_checkpointing else self.stages(x)
        return self.features(maps.mean((2, 3)))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages' activations in the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, *, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers, from first to last."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^features|^shares", (99999,))]}


class TrunkCompareNet(CompareNet):
    """Pairs side by side (B, 3, H, 2W) -> fused features, with a network of timm as the trunk."""

    def __init__(self, trunk: str, fusion: str, drop_path: float) -> None:
        nn.Module.__init__(self)
        options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        self.trunk: Any = timm.create_model(trunk, num_classes=0, **options)
        with torch.no_grad():
            width = self.trunk.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
        self.trunk.train()
        self.features = nn.Linear(width, FEATURES)
        self._fuse_by(fusion)
        config = timm.data.resolve_model_data_config(self.trunk)
        self.pretrained_cfg = self.default_cfg = {
            **CONFIG,
            **{k: config[k] for k in ("mean", "std", "interpolation")},
        }

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, F), with the same weights for both images of a pair."""
        return self.features(self.trunk(images))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the trunk's activations in the backward pass, where it can."""
        self.trunk.set_grad_checkpointing(enable)

    def group_matcher(self, *, coarse: bool = False) -> dict[str, Any]:
        """The trunk's description of its layers, from first to last; the layer of features is of the last."""
        return _inside("trunk", self.trunk.group_matcher(coarse=coarse))


def _inside(prefix: str, patterns: Any) -> Any:
    """timm's patterns of layers, for a network that is a part of another one."""
    if isinstance(patterns, str):
        return rf"^{prefix}\.(?:{patterns.replace('^', '')})"
    if isinstance(patterns, dict):
        inside = {name: _inside(prefix, value) for name, value in patterns.items()}
        blocks = inside.get("blocks", [])
        blocks = blocks if isinstance(blocks, list) else [(blocks, None)]
        return {**inside, "blocks": [*blocks, (r"^features|^shares", (99999,))]}
    if isinstance(patterns, (list, tuple)):
        return type(patterns)(_inside(prefix, value) for value in patterns)
    return patterns


def _block(width_in: int, width_out: int, stride: int) -> BasicBlock:
    shortcut = None
    if width_in != width_out or stride > 1:
        shortcut = nn.Sequential(
            nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
        )
    return BasicBlock(width_in, width_out, stride, shortcut)


def register_trunk(name: str) -> None:
    """Register the network of a name with timm, if it is compare_<timm name>_<fusion>."""
    match = WITH_TRUNK.fullmatch(name)
    if (
        timm.is_model(name)
        or match is None
        or match["fusion"] not in FUSIONS
        or not timm.is_model(match["trunk"])
    ):
        return
    trunk, fusion = match["trunk"], match["fusion"]
    register_with_timm(name, lambda drop_path_rate=0.0: TrunkCompareNet(trunk, fusion, drop_path_rate))


@lru_cache(maxsize=1)
def register() -> None:
    """Register all 144 variants with timm, once."""
    for layers, fusion, cbam, percent in itertools.product(LAYERS, FUSIONS, (False, True), PERCENT):
        _register(layers, fusion, cbam=cbam, percent=percent)


def _register(layers: str, fusion: str, *, cbam: bool, percent: int) -> None:
    name = f"compare_resnet{layers}_{fusion}{'_cbam' * cbam}{f'_w{percent}' * (percent != 100)}"
    counts = [int(count) for count in layers]
    register_with_timm(name, lambda: CompareNet(counts, fusion, cbam=cbam, width=percent / 100))
