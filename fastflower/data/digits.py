"""Handwritten digits as a contest gives them: scikit-learn's 1797 (8 x 8 pixels, 17 levels) in Kaggle's tables.

The digits are those of Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI's test part.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from fastflower.data import arrays
from fastflower.data.tables import write_csv
from fastflower.errors import InputError
from fastflower.runs import write_atomic

HELD_OUT = 297  # the last rows, of other writers than the first


def write(home: Path) -> None:
    """1500 rows in train.csv (label and pixels), the rest in test/<ImageId>.png, sample_submission.csv and truth.csv.

    ImageId counts the rows of the test part from 1.
    """
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # (1797, 8, 8), levels 0..16 before
    train, test = slice(0, len(pixels) - HELD_OUT), slice(len(pixels) - HELD_OUT, None)
    names = [f"pixel{i}" for i in range(pixels[0].size)]
    flat = [[str(value) for value in row] for row in pixels.reshape(len(pixels), -1).tolist()]
    labels = [str(label) for label in digits.target.tolist()]
    rows = zip(labels[train], flat[train], strict=True)
    write_csv(
        home / "train.csv", [{"label": label, **dict(zip(names, row, strict=True))} for label, row in rows]
    )
    write_images(pixels[test], home / "test")
    ids = [str(number) for number in range(1, HELD_OUT + 1)]
    write_csv(home / "sample_submission.csv", [{"ImageId": one, "Label": "0"} for one in ids])
    answers = zip(ids, labels[test], strict=True)
    write_csv(home / "truth.csv", [{"ImageId": one, "Label": label} for one, label in answers])


def unpack(table: Path, folder: Path) -> arrays.Stack:
    """A table of pixels without labels (Kaggle's test.csv) as folder/<ImageId>.png; ImageId counts rows."""
    if not table.is_file():
        raise InputError(f"no {table}; give a table with one column for each pixel")
    stack = arrays.open_pixels(table, "label", "auto", labelled=False)
    write_images(stack.images[0], folder)
    return stack


def write_images(pixels: np.ndarray, folder: Path) -> None:
    """uint8 (N, H, W) as folder/1.png to folder/N.png."""
    for number, image in enumerate(pixels, 1):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        write_atomic(folder / f"{number}.png", buffer.getvalue())
