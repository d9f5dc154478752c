"""Pairs of handwritten digits from scikit-learn's: do both show the same digit? As .npz, with arrays xa, xb and y.

The 1797 images are parted first, so that no image trains and validates, in whatever pair.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from fastflower.core import seeding
from fastflower.core.errors import InputError

SIDE = 32
PARTS = {"train": 0.6, "val": 0.2, "test": 0.2}  # of the images


def write(home: Path, rows: int = 8000, held_out: int = 2000, seed: int = 0) -> None:
    """train.npz with `rows` pairs, val.npz and test.npz with `held_out` each: xa, xb uint8 (N, 32, 32), y int64 (N,).

    InputError when something lies there already.
    """
    if home.exists() and any(home.iterdir()):
        raise InputError(f"{home} is not empty; remove it, or give another home=")
    home.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    images = np.stack([_enlarged(image) for image in digits.images])
    ends = np.cumsum([round(share * len(images)) for share in PARTS.values()])
    order = np.split(seeding.generator(seed, 1).permutation(len(images)), ends[:-1])
    for number, (part, own) in enumerate(zip(PARTS, order, strict=True)):
        count = rows if part == "train" else held_out
        one, other, same = draw(digits.target[own], count, seeding.generator(seed, 2, number))
        np.savez(home / f"{part}.npz", xa=images[own[one]], xb=images[own[other]], y=same)


def draw(
    labels: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`count` pairs of different rows of labels (N,): first and second row, and whether they agree, in half of them."""
    one, other = rng.integers(0, len(labels), (2, count))
    same = rng.permutation(np.arange(count) % 2)
    while True:
        wrong = ((labels[one] == labels[other]) != (same == 1)) | (one == other)
        if not wrong.any():
            return one, other, same.astype(np.int64)
        other[wrong] = rng.integers(0, len(labels), int(wrong.sum()))


def _enlarged(image: np.ndarray) -> np.ndarray:
    """8 x 8 of 0..16 to 32 x 32 of 0..255."""
    small = Image.fromarray((image * (255 / 16)).round().astype(np.uint8))
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
