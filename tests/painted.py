"""Pictures for tests of conversion: smooth, each seed another, and their JPEGs."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (60, 48)) -> Image.Image:
    """A blurred field of colours, of a width and height."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options: object) -> bytes:
    """The bytes of its JPEG at quality 90."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()
