"""The predictor's own modules, so that a model in Python gives what `python code/predict.py` gives."""

from __future__ import annotations

import functools
import importlib
import sys
from types import SimpleNamespace

from fastflower.bundle.tracing import CODE

NEEDED = ("bundles", "networks", "pictures")


@functools.cache
def predictor_code() -> SimpleNamespace:
    """The modules bundles, networks and pictures of code/, which other imports do not see."""
    names = [path.stem for path in CODE.glob("*.py")]
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    compiled, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # code/ is handed in as it is
    sys.path.insert(0, str(CODE))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in NEEDED})
    finally:
        sys.path.remove(str(CODE))
        sys.dont_write_bytecode = compiled
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)
