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

import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from fastflower.core.errors import InputError

DEFAULTS: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_own(name: str) -> bool:
    """True for the name of an own network, module:function."""
    return _NAME.fullmatch(name) is not None


def build(name: str) -> nn.Module:
    """The backbone that the function returns; InputError, in one line, for any fault of the user's module."""
    function = find(name)
    try:
        network = function()
    except Exception as error:
        raise _fault(name, f"raised {_line(error)}") from None
    if not isinstance(network, nn.Module):
        raise _fault(name, f"returned {type(network).__name__}, must return an nn.Module")
    return network


def find(name: str) -> Any:
    """The function of an own network's name; InputError when there is none that can be called without arguments."""
    module_name, _, function_name = name.partition(":")
    function = getattr(_module(name, module_name), function_name, None)
    if not callable(function):
        raise _fault(name, f"{module_name} has no function {function_name}")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return function
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise _fault(name, f"needs the argument {needed[0]}, must be callable without any")
    return function


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


def _module(name: str, module_name: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise InputError(
                f"model.backbone = {name}: no module {module_name} in {folder} nor where Python looks; "
                "run in its folder or set PYTHONPATH"
            ) from None
        raise _fault(name, f"importing {module_name} raised {_line(error)}") from None
    except Exception as error:
        raise _fault(name, f"importing {module_name} raised {_line(error)}") from None


def _fault(name: str, what: str) -> InputError:
    return InputError(f"model.backbone = {name}: {what}; see fastflower/model/own_network.py for an example")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
