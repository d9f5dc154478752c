"""A transform of one's own, for recipes of tests."""

from __future__ import annotations

from torch import Tensor


def darker(images: Tensor, keys: Tensor) -> Tensor:
    return images * 0.5
