"""Networks of the user's own: `model.backbone=my_module:build` names a function that returns the backbone.

The function takes no arguments that have no default and returns an nn.Module from images (B, 3, H, W), normalised, to
features (B, F). Its module is found as Python finds modules, the current directory first. Optional attributes of the
module: `mean` and `std` (three numbers in 0..1, else 0.5) and `interpolation` ("bilinear" or "bicubic").

    # my_network.py
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

Train, evaluate and export import it; the predictor does not, because a bundle holds programs.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastflower.core import own_parts
from fastflower.core.errors import InputError
from fastflower.core.own_parts import is_own

DEFAULTS: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}

__all__ = ["build", "find", "is_own", "preprocessing"]


def build(name: str) -> nn.Module:
    """The backbone that the function returns; InputError, in one line, for any fault of the user's module."""
    network = own_parts.call("model.backbone", name)
    if not isinstance(network, nn.Module):
        what = f"returned {type(network).__name__}, must return an nn.Module"
        raise own_parts.fault("model.backbone", name, what)
    return network


def find(name: str) -> Any:
    """The function of an own network's name; InputError when there is none that can be called without arguments."""
    return own_parts.find("model.backbone", name)


def preprocessing(backbone: nn.Module) -> dict[str, Any]:
    """mean, std and interpolation of an own network: its attributes, where they are what the names say."""
    values = {key: getattr(backbone, key, default) for key, default in DEFAULTS.items()}
    for key in ("mean", "std"):
        numbers = values[key]
        try:
            values[key] = tuple(float(number) for number in numbers)
        except (TypeError, ValueError):
            values[key] = ()
        if len(values[key]) != 3 or not all(0 < number <= 1 for number in values[key]):
            raise InputError(
                f"model.backbone: its attribute {key} is {numbers!r}, must be three numbers in 0..1"
            )
    if values["interpolation"] not in ("bilinear", "bicubic"):
        raise InputError(
            f"model.backbone: its attribute interpolation is {values['interpolation']!r}, must be bilinear or bicubic"
        )
    return values
