"""Pairs of scikit-learn's handwritten digits, labelled 1 if both show the same digit: .npz with xa, xb and y.

The 1797 images are split before they are paired, so that no image is in two splits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fastflower.core import seeding

SIDE = 32
SPLITS = {"train": 0.6, "val": 0.2, "test": 0.2}  # fractions of the images


def write(home: Path, *, rows: int = 8000, held_out: int = 2000, seed: int = 0) -> None:
    """Write train.npz with `rows` pairs, val.npz and test.npz with `held_out` pairs each.

    Arrays: xa, xb uint8 (N, 32, 32), y int64 (N,).
    """
    from sklearn.datasets import load_digits  # here: its import takes two seconds

    home.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    images = np.stack([_enlarged(image) for image in digits.images])
    ends = np.cumsum([round(fraction * len(images)) for fraction in SPLITS.values()])
    chunks = np.split(seeding.generator(seed, 1).permutation(len(images)), ends[:-1])
    for number, (split, indices) in enumerate(zip(SPLITS, chunks, strict=True)):
        count = rows if split == "train" else held_out
        first, second, agree = draw(digits.target[indices], count, seeding.generator(seed, 2, number))
        np.savez(home / f"{split}.npz", xa=images[indices[first]], xb=images[indices[second]], y=agree)


def draw(
    labels: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`count` pairs of different rows of labels (N,): first rows, second rows, and 1 where labels agree, in half."""
    first, second = rng.integers(0, len(labels), (2, count))
    agree = rng.permutation(np.arange(count) % 2)
    while True:
        wrong = ((labels[first] == labels[second]) != (agree == 1)) | (first == second)
        if not wrong.any():
            return first, second, agree.astype(np.int64)
        second[wrong] = rng.integers(0, len(labels), int(wrong.sum()))


def _enlarged(image: np.ndarray) -> np.ndarray:
    """8 x 8 of 0..16 to 32 x 32 of 0..255."""
    small = Image.fromarray((image * (255 / 16)).round().astype(np.uint8))
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
