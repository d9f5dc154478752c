"""Smooth random images and their JPEGs, file names that break careless code, and a rare kind of JPEG."""

from __future__ import annotations

import base64
import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ODD_NAMES = [
    *(
        "a b.jpg",
        " a.jpg",
        "b.jpg ",
        "c,d.jpg",
        'e"f.jpg',
        "it's.jpg",
        "=g.jpg",
        "-h.jpg",
        "@i.jpg",
        "j;k.jpg",
    ),
    *(
        "%s.jpg",
        "#.jpg",
        "花🌸.jpg",
        "e\u0301.jpg",
        "\u00e9.jpg",
        "n\nl.jpg",
        "t\tb\x1b[31m.jpg",
        "\u202egpj.jpg",
    ),
    *("bad\udcff\udc80.jpg", "x" * 251 + ".jpg"),
]  # hostile but valid file names: the last but one is not UTF-8, the last has 255 bytes

# a JPEG of 16 x 16 pixels in four colours as YCCK (Adobe's inverted inks), made by libjpeg-turbo
YCCK = base64.b64decode(
    "/9j/7gAOQWRvYmUAZAAAAAAC/9sAQwACAQEBAQECAQEBAgICAgIEAwICAgIFBAQDBAYFBgYGBQYGBgcJCAYHCQcGBggLCAkKCgoKCgYICwwL"
    "CgwJCgoK/9sAQwECAgICAgIFAwMFCgcGBwoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoK/8AA"
    "FAgAEAAQBAERAAIRAQMRAQQRAP/EAB8AAAEFAQEBAQEBAAAAAAAAAAABAgMEBQYHCAkKC//EALUQAAIBAwMCBAMFBQQEAAABfQECAwAEEQUS"
    "ITFBBhNRYQcicRQygZGhCCNCscEVUtHwJDNicoIJChYXGBkaJSYnKCkqNDU2Nzg5OkNERUZHSElKU1RVVldYWVpjZGVmZ2hpanN0dXZ3eHl6"
    "g4SFhoeIiYqSk5SVlpeYmZqio6Slpqeoqaqys7S1tre4ubrCw8TFxsfIycrS09TV1tfY2drh4uPk5ebn6Onq8fLz9PX29/j5+v/EAB8BAAMB"
    "AQEBAQEBAQEAAAAAAAABAgMEBQYHCAkKC//EALURAAIBAgQEAwQHBQQEAAECdwABAgMRBAUhMQYSQVEHYXETIjKBCBRCkaGxwQkjM1LwFWJy"
    "0QoWJDThJfEXGBkaJicoKSo1Njc4OTpDREVGR0hJSlNUVVZXWFlaY2RlZmdoaWpzdHV2d3h5eoKDhIWGh4iJipKTlJWWl5iZmqKjpKWmp6ip"
    "qrKztLW2t7i5usLDxMXGx8jJytLT1NXW19jZ2uLj5OXm5+jp6vLz9PX29/j5+v/aAA4EAQACEQMRBAAAPwDvK/og/wAZz9IK/P8Ar9IP+uw8"
    "vr9WK/5uz/P894r+f+v+oA/kM9Qr/9k="
)
YCCK_COLOURS = [[200, 40, 40], [40, 180, 60], [50, 60, 210], [230, 200, 90]]  # row by row


def predictor_pictures() -> Any:
    """Import code/pictures.py, the predictor's image reader."""
    path = Path(__file__).resolve().parents[2] / "code/pictures.py"
    spec = importlib.util.spec_from_file_location("pictures", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(seed: int, size: tuple[int, int] = (60, 48)) -> Image.Image:
    """A smooth field of random colours; size is (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options: object) -> bytes:
    """Encode an image as JPEG at quality 90."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()
