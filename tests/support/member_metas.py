"""Made-up descriptions of members, for tests that write checkpoints by hand."""

from __future__ import annotations

from typing import Any

from fastflower.model.member import MemberMeta
from fastflower.model.network import NetworkSpec


def member_meta(spec: NetworkSpec | None = None, **changes: Any) -> MemberMeta:
    """A complete description of a network of three classes at 32 pixels, or of `spec`; `changes` replaces fields."""
    values: dict[str, Any] = {
        "backbone": "resnet10t", "head": "linear", "head_scale": 30.0, "margin": 0.3, "num_classes": 3,
        "size": (32, 32), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic",
        "resize_factor": 1.14, "stored_side": 55, "class_ids": ("7", "12", "100"), "class_hash": "c1a55",
        "class_counts": (4, 4, 4), "folds_hash": "f01d5", "exp": "tiny", "fold": 0, "seed": 42, "epoch": 1,
        "recipe": "", "version": "0", "kind": "best_combo", "weights": "raw", "scores": {},
    }  # fmt: skip
    return MemberMeta(**{**values, **(vars(spec) if spec else {}), **changes})
