"""Parts of the user's own: `module:attribute` in a recipe names a function or class to use in place of a built-in one.

The module is found as Python finds modules, the current directory first. `SIGNATURES` has, for each key that takes such
a name, the arguments that the part is called with; docs/add_your_own.md shows an example of each.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fastflower.core.errors import InputError
from fastflower.core.files import digest

SIGNATURES: dict[str, tuple[str, ...]] = {
    "model.backbone": (),
    "loss.name": ("logits", "targets"),
    "opt.name": ("groups",),
    "sampler.type": ("labels", "generator"),
    "aug.extra": ("images", "keys"),
    "robust.kinds": ("pixels", "level", "generator"),
    "select.metric": ("probabilities", "labels"),
}

_FOUND: dict[tuple[str, str], Callable[..., Any]] = {}  # parts that were checked, by key and name
_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_own(name: object) -> bool:
    """True for the name of an own part, module:attribute."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def find(key: str, name: str) -> Callable[..., Any]:
    """The part of this name; InputError, in one line, unless it takes the arguments that the key calls it with.

    It is checked once, and again when its module has been imported anew: some are found for every image.
    """
    module_name, _, attribute = name.partition(":")
    if (key, name) in _FOUND:
        known = _FOUND[key, name]
        if known is getattr(sys.modules.get(module_name), attribute, None):
            return known
    part = getattr(_module(key, name), attribute, None)
    if not callable(part):
        raise fault(key, name, f"{module_name} has no function {attribute}")
    try:
        signature = inspect.signature(part)
    except (TypeError, ValueError):  # a builtin that does not tell
        return part
    wanted = SIGNATURES[key]
    try:
        signature.bind(*wanted)
    except TypeError:
        called = f"called with ({', '.join(wanted)})" if wanted else "called without arguments"
        raise fault(key, name, f"takes {signature}, and is {called}") from None
    _FOUND[key, name] = part
    return part


def call(key: str, name: str, *arguments: Any) -> Any:
    """Call a part and return its result; InputError for whatever it raises, as for other faults of the module."""
    part = find(key, name)
    try:
        return part(*arguments)
    except InputError:
        raise
    except Exception as error:
        raise fault(key, name, f"raised {_line(error)}") from None


def source_digest(key: str, name: str) -> str:
    """The digest of the source of a part's module; of its name where Python has no source, as for a compiled one."""
    path = inspect.getsourcefile(_module(key, name))
    return digest(Path(path).read_bytes() if path else name)


def fault(key: str, name: str, what: str) -> InputError:
    """The line for a part that cannot be used."""
    return InputError(f"{key} = {name}: {what}; see docs/add_your_own.md for an example")


def _module(key: str, name: str) -> ModuleType:
    module_name, folder = name.partition(":")[0], str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise InputError(
                f"{key} = {name}: no module {module_name} in {folder} nor where Python looks; "
                "run in its folder or set PYTHONPATH"
            ) from None
        raise fault(key, name, f"importing {module_name} raised {_line(error)}") from None
    except Exception as error:
        raise fault(key, name, f"importing {module_name} raised {_line(error)}") from None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
