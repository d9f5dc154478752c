"""Networks for crops of eyes (open or closed) and other small pictures, after OCEC (github.com/PINTO0309/OCEC).

`register` adds one to timm by its name: `ocec_<variant>_c<channels>_b<blocks>[_<head>]`, such as
ocec_baseline_c64_b8 or ocec_convnext_c32_b4_mlp_mixer. Each second block from the third on halves the map and doubles
the channels. The classifier and its dropout are the Network's (model.drop_rate), not the backbone's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers import DropPath, LayerNorm2d, SqueezeExcite
from timm.models._manipulate import checkpoint_seq
from timm.models.convnext import ConvNeXtBlock
from timm.models.mlp_mixer import MixerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from fastflower.core.errors import InputError
from fastflower.model.timm_registry import register_with_timm

PREFIX = "ocec_"
HEADS = {"baseline": "avg", "inverted_se": "avgmax_mlp", "convnext": "transformer"}  # by variant
MIXERS = ("transformer", "mlp_mixer")
GRID, MIXER_LAYERS = (2, 3), 2  # tokens (rows, columns) and layers of the last two heads
EXPANSION, SE_RATIO = 4, 1 / 8  # of inverted_se
MOST_CHANNELS, MOST_BLOCKS = 512, 12
CONFIG = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "input_size": (3, 32, 64)}

_NAME = re.compile(
    rf"{PREFIX}(?P<variant>{'|'.join(HEADS)})_c(?P<channels>\d+)_b(?P<blocks>\d+)"
    r"(?:_(?P<head>avg|avgmax_mlp|transformer|mlp_mixer))?"
)


class SeparableBlock(nn.Module):
    """Depthwise 3x3 and pointwise convolutions with BatchNorm and ReLU; residual where the shapes agree."""

    def __init__(self, width_in: int, width: int, *, stride: int, drop_path: float) -> None:
        super().__init__()
        self.depthwise = _conv(width_in, width_in, 3, stride=stride, groups=width_in, act=nn.ReLU)
        self.pointwise = _conv(width_in, width, 1)
        self.residual = stride == 1 and width_in == width
        self.drop_path = DropPath(drop_path) if drop_path and self.residual else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop_path(self.pointwise(self.depthwise(x)))
        return F.relu(x + y if self.residual else y)


class InvertedBlock(nn.Module):
    """Inverted residual (expansion 4) with squeeze-excite (an eighth) and SiLU; residual where the shapes agree."""

    def __init__(self, width_in: int, width: int, *, stride: int, drop_path: float) -> None:
        super().__init__()
        hidden = EXPANSION * width_in
        self.expand = _conv(width_in, hidden, 1, act=nn.SiLU)
        self.depthwise = _conv(hidden, hidden, 3, stride=stride, groups=hidden, act=nn.SiLU)
        self.excite = SqueezeExcite(hidden, rd_ratio=SE_RATIO, rd_divisor=1)
        self.project = _conv(hidden, width, 1)
        self.residual = stride == 1 and width_in == width
        self.drop_path = DropPath(drop_path) if drop_path and self.residual else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop_path(self.project(self.excite(self.depthwise(self.expand(x)))))
        return F.silu(x + y if self.residual else y)


class PooledHead(nn.Module):
    """Map (B, C, h, w) -> features (B, F): `avg`, BatchNorm of the mean; `avgmax_mlp`, a layer on mean and maximum."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.with_max = kind == "avgmax_mlp"
        self.norm = nn.BatchNorm1d(channels * (1 + self.with_max))
        self.layer = (
            nn.Sequential(nn.Linear(2 * channels, channels), nn.ReLU()) if self.with_max else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3))
        if self.with_max:
            pooled = torch.cat([pooled, x.amax((2, 3))], 1)
        return self.layer(self.norm(pooled))


class TokenHead(nn.Module):
    """Map (B, C, h, w) -> features (B, C): transformer or MLP-Mixer layers over a grid of 2 x 3 pooled tokens.

    The pooling is adaptive: 32 x 64 pixels leave maps of 2 x 4 or 1 x 2, which no grid of 2 x 3 divides.
    """

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        heads = next(n for n in range(min(8, channels), 0, -1) if channels % n == 0)
        self.layers = nn.Sequential(
            *(
                Block(channels, heads, mlp_ratio=2.0, qkv_bias=True)
                if kind == "transformer"
                else MixerBlock(channels, GRID[0] * GRID[1], mlp_ratio=(2.0, 2.0))
                for _ in range(MIXER_LAYERS)
            )
        )
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.adaptive_avg_pool2d(x, GRID).flatten(2).transpose(1, 2)
        return self.norm(self.layers(tokens).mean(1))


class Ocec(nn.Module):
    """Images (B, 3, H, W) -> features (B, F)."""

    def __init__(
        self, variant: str, channels: int, *, blocks: int, head: str, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.stem = _stem(variant, channels)
        stages: list[list[nn.Module]] = []
        width = channels
        for index in range(blocks):
            stride = 2 if index and index % 2 == 0 else 1
            rate = drop_path * index / max(blocks - 1, 1)  # rises with the depth, as in timm
            if index % 2 == 0:
                stages.append([])
            stages[-1].append(_block(variant, width, stride=stride, drop_path=rate))
            width *= stride
        self.stages = nn.Sequential(*(nn.Sequential(*stage) for stage in stages))
        self.pool: nn.Module = TokenHead(width, head) if head in MIXERS else PooledHead(width, head)
        self.grad_checkpointing = False
        self.pretrained_cfg = self.default_cfg = CONFIG
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self.pool(checkpoint_seq(self.stages, x))
        return self.pool(self.stages(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages' activations in the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, *, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers, from first to last."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^pool", (99999,))]}


def register(name: str) -> None:
    """Register the network of a name with timm; InputError for a name that only begins like one of this module."""
    if not name.startswith(PREFIX) or timm.is_model(name):
        return
    match = _NAME.fullmatch(name)
    if match is None or not (
        4 <= int(match["channels"]) <= MOST_CHANNELS and 1 <= int(match["blocks"]) <= MOST_BLOCKS
    ):
        raise InputError(
            f"model.backbone = {name}: write {PREFIX}<{', '.join(HEADS)}>_c<4 to {MOST_CHANNELS} channels>"
            f"_b<1 to {MOST_BLOCKS} blocks>, and if you like _<avg, avgmax_mlp, {', '.join(MIXERS)}>, as in "
            "ocec_baseline_c64_b8"
        )
    variant, channels, blocks = match["variant"], int(match["channels"]), int(match["blocks"])
    head = match["head"] or HEADS[variant]
    register_with_timm(
        name,
        lambda drop_path_rate=0.0: Ocec(
            variant, channels, blocks=blocks, head=head, drop_path=drop_path_rate
        ),
    )


def _conv(
    width_in: int,
    width: int,
    side: int,
    *,
    stride: int = 1,
    groups: int = 1,
    act: Callable[[], nn.Module] | None = None,
) -> nn.Sequential:
    """A convolution without bias, its BatchNorm, and an activation."""
    layers: list[nn.Module] = [
        nn.Conv2d(width_in, width, side, stride, side // 2, groups=groups, bias=False),
        nn.BatchNorm2d(width),
    ]
    return nn.Sequential(*layers, *([act()] if act else []))


def _stem(variant: str, channels: int) -> nn.Sequential:
    if variant == "baseline":
        return _conv(3, channels, 3, stride=2, act=nn.ReLU)
    if variant == "inverted_se":
        return nn.Sequential(
            _conv(3, channels, 3, act=nn.SiLU), _conv(channels, channels, 3, stride=2, act=nn.SiLU)
        )
    return nn.Sequential(nn.Conv2d(3, channels, 4, 4), LayerNorm2d(channels))


def _block(variant: str, width_in: int, *, stride: int, drop_path: float) -> nn.Module:
    """A block that multiplies the width by its stride."""
    if variant == "baseline":
        return SeparableBlock(width_in, width_in * stride, stride=stride, drop_path=drop_path)
    if variant == "inverted_se":
        return InvertedBlock(width_in, width_in * stride, stride=stride, drop_path=drop_path)
    block = ConvNeXtBlock(width_in * stride, kernel_size=7, ls_init_value=1e-6, drop_path=drop_path)
    if stride == 1:
        return block
    return nn.Sequential(LayerNorm2d(width_in), nn.Conv2d(width_in, width_in * stride, 2, 2), block)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d) and module.bias is None:  # followed by BatchNorm
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
