"""The image sizes that a backbone takes, found by building it on the meta device, which allocates nothing, and trying.

What networks say of themselves is not relied upon: of some families the patch size is a number, of some a pair, some
assert what they take and others fail in a layer far behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fastflower.core.errors import InputError
from fastflower.model import own_network

Size = tuple[int, int]
STEP = 32  # between sizes that are tried, without a patch size
NEAR = 0.15  # relative distance up to which another size stands for the one that was asked for
TRIED = 5  # sizes on each side


def create(name: str, arguments: dict[str, Any]) -> nn.Module:
    """A backbone without classifier and with random weights: timm's, or one of the user's own (`module:function`)."""
    if own_network.is_own(name):
        return own_network.build(name)
    return timm.create_model(name, pretrained=False, num_classes=0, **arguments)


@lru_cache(maxsize=64)
def fit(name: str, sizes: tuple[Size, ...]) -> tuple[dict[str, Any], nn.Module]:
    """timm's arguments for a backbone that takes these sizes, and that backbone on the meta device (shapes only).

    Position embeddings are resampled per batch where timm supports it; else the default size is used if it fits;
    else the backbone is built for the one size. Whether it takes the sizes is asked of `accepts`.
    """
    arguments: dict[str, Any]
    with torch.device("meta"):
        try:
            arguments = {"dynamic_img_size": True}
            if not own_network.is_own(name):
                return arguments, create(name, arguments).eval()
        except Exception:  # most networks do not know the argument
            pass
        plain = _create_plain(name).eval()
        if len(set(sizes)) > 1 or accepts(plain, sizes[0]) or own_network.is_own(name):
            return {}, plain
        if any(side % _step(plain) for side in sizes[0]):  # built, it would ignore the rest of the image
            return {}, plain
        arguments = {"img_size": sizes[0]}
        try:
            return arguments, create(name, arguments).eval()
        except Exception:  # an unknown argument, or an impossible size
            return {}, plain


def _create_plain(name: str) -> nn.Module:
    """A backbone of its default size on the meta device; InputError in one line for one that cannot be built."""
    try:
        return create(name, {})
    except Exception as error:
        if own_network.is_own(name):  # one that reads weights, or computes with its parameters
            with torch.device("cpu"):
                return own_network.build(name).to("meta")
        raise InputError(
            f"model.backbone = {name}: it cannot be built ({_reason(error)}); choose another backbone"
        ) from None


def accepts(backbone: nn.Module, size: Size) -> bool:
    """True if a backbone from `fit` takes images of this size."""
    try:
        features(backbone, size)
    except Exception:  # each family refuses a size in its own way
        return False
    return True


@lru_cache(maxsize=512)
def features(backbone: nn.Module, size: Size) -> int:
    """The number of features per image of a backbone from `fit`; raises what the backbone raises."""
    with torch.no_grad(), torch.device("meta"):
        output = backbone(torch.empty(2, 3, *size))
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"gives {shape} for two images; a backbone gives one vector of features for each")
    return output.shape[1]


def takes(name: str, size: Size) -> bool:
    """True if a backbone can be built for this one size."""
    return accepts(fit(name, (size,))[1], size)


def refusal(name: str, size: Size, built_for: Sequence[Size]) -> str:
    """Why a backbone built for `built_for` refuses a size, as the end of a line: the sizes nearby that it takes."""
    _, backbone = fit(name, tuple(built_for))
    alone = list(built_for) == [size]
    near = []
    for side in (-1, 1):
        candidates = _candidates(backbone, size, side)
        near.append(
            next((s for s in candidates if (takes(name, s) if alone else accepts(backbone, s))), None)
        )
    shown = " or ".join(text(s) for s in near if s is not None)
    if shown:
        return f"cannot take images of this size; the nearest that it takes: {shown}"
    try:
        features(backbone, size)
    except Exception as error:
        return f"cannot take images of this size ({_reason(error)}); choose another backbone"
    return "takes this size"


def fitting(name: str, sizes: Sequence[Size], *, largest: int) -> list[Size]:
    """The sizes nearest to those asked that one network takes, one for each of `sizes`, no side above `largest`.

    Where no network takes several, all are the same size. Raises InputError without any.
    """
    _, backbone = fit(name, tuple(sizes))
    if all(accepts(backbone, size) for size in sizes):
        return list(sizes)
    found = [_nearest(backbone, size, largest) for size in sizes]
    near = [size for size in found if size is not None]
    if len(near) == len(sizes) and all(map(_is_near, near, sizes)):
        return near
    last = sizes[-1]
    for size in [last, *_around(backbone, last)]:
        if max(size) <= largest and _is_near(size, last) and takes(name, size):
            return [size] * len(sizes)
    if near:
        return [near[-1]] * len(sizes)
    raise InputError(f"data.img_size = {text(last)}: {name} {refusal(name, last, [last])}")


def view_scales(name: str, size: Size, scales: Sequence[int]) -> list[int]:
    """The sides of square views nearest to `scales` that a backbone takes which was trained at `size`, each once."""
    _, backbone = fit(name, (size,))
    largest = max(*scales, *size)
    near = (_nearest(backbone, (scale, scale), largest) for scale in scales)
    return list(dict.fromkeys(view[0] for view in near if view is not None)) or [size[0]]


def text(size: Size) -> str:
    """A size as recipes write it."""
    return str(size[0]) if size[0] == size[1] else f"[{size[0]}, {size[1]}]"


def _nearest(backbone: nn.Module, size: Size, largest: int) -> Size | None:
    """The size nearest to one asked that a backbone takes, no side above `largest`."""
    if accepts(backbone, size):
        return size
    return next((s for s in _around(backbone, size) if max(s) <= largest and accepts(backbone, s)), None)


def _candidates(backbone: nn.Module, size: Size, side: int) -> list[Size]:
    """Multiples of the patch size, or of 32, below (side -1) or above (side 1) a size, the nearest first."""
    step = _step(backbone)
    below = tuple(length // step * step for length in size)
    first = 1 if side == 1 or below == size else 0
    found = [(below[0] + side * k * step, below[1] + side * k * step) for k in range(first, first + TRIED)]
    return [candidate for candidate in found if min(candidate) > 0]


def _around(backbone: nn.Module, size: Size) -> list[Size]:
    """The sizes to try in place of one, the nearest first."""
    candidates = {s for side in (-1, 1) for s in _candidates(backbone, size, side)} | set(_native(backbone))
    return sorted(candidates, key=lambda s: (abs(s[0] - size[0]) + abs(s[1] - size[1]), s))


def _native(backbone: nn.Module) -> list[Size]:
    """The sizes that the network's published weights were trained at."""
    config = getattr(backbone, "pretrained_cfg", None) or {}
    sizes = (config.get("input_size"), config.get("test_input_size")) if isinstance(config, dict) else ()
    return [(size[1], size[2]) for size in sizes if size]


def _step(backbone: nn.Module) -> int:
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    number = patch[0] if isinstance(patch, (tuple, list)) and patch else patch
    return number if isinstance(number, int) and number > 1 else STEP


def _is_near(size: Size, asked: Size) -> bool:
    return all(abs(a - b) <= NEAR * b for a, b in zip(size, asked, strict=True))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
