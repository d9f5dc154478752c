"""fastflower: image-classification contests, from photographs to the hand-in, with Composer and FFCV betons.

model = fastflower.load("results/model/convnext")    # an experiment, a bundle or one member
model.predict(["a.jpg", "b.jpg"]).class_ids
dataset = fastflower.FoldDataset("recipes/convnext.yaml", fold=0, split="val")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["FoldDataset", "Predictions", "TrainedModel", "load"]

if TYPE_CHECKING:
    from fastflower.interface.fold_dataset import FoldDataset
    from fastflower.interface.trained import Predictions, TrainedModel, load

_MODULES = {
    "FoldDataset": "fold_dataset",
    "Predictions": "trained",
    "TrainedModel": "trained",
    "load": "trained",
}


def __getattr__(name: str) -> Any:
    """Import what other programs use when they use it: torch takes seconds, which commands do not spend."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.interface.{_MODULES[name]}"), name)
