"""Handwritten digits as a contest gives them: scikit-learn's 1797 (8 x 8 pixels, 17 levels) in Kaggle's tables.

The digits are those of Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI's test part.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from fastflower.core.errors import InputError
from fastflower.core.files import write_atomic
from fastflower.core.tables import write_csv
from fastflower.data.readers import arrays

HELD_OUT = 297  # the last rows, of other writers than the first


def write(home: Path, held_out: int = HELD_OUT) -> None:
    """The rows in train.csv (label and pixels), the last `held_out` in test/<ImageId>.png, sample_submission.csv and
    truth.csv instead.

    ImageId counts the rows of the test part from 1. InputError when nothing is left to train on.
    """
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # (1797, 8, 8), levels 0..16 before
    known = len(pixels) - held_out
    if known < 1:
        raise InputError(f"held_out={held_out}: there are {len(pixels)} digits; leave some to train on")
    names = [f"pixel{i}" for i in range(pixels[0].size)]
    flat = [[str(value) for value in row] for row in pixels[:known].reshape(known, -1).tolist()]
    labels = [str(label) for label in digits.target.tolist()]
    rows = zip(labels[:known], flat, strict=True)
    write_csv(
        home / "train.csv", [{"label": label, **dict(zip(names, row, strict=True))} for label, row in rows]
    )
    write_images(pixels[known:], home / "test")
    answers = [{"ImageId": str(number), "Label": label} for number, label in enumerate(labels[known:], 1)]
    blank = [{**answer, "Label": "0"} for answer in answers]
    write_csv(home / "sample_submission.csv", blank, ("ImageId", "Label"))
    write_csv(home / "truth.csv", answers, ("ImageId", "Label"))


def unpack(table: Path, folder: Path) -> arrays.Stack:
    """A table of pixels without labels (Kaggle's test.csv) as folder/<ImageId>.png; ImageId counts rows."""
    if not table.is_file():
        raise InputError(f"no {table}; give a table with one column for each pixel")
    stack = arrays.open_pixels(table, "label", shape="auto", labelled=False)
    write_images(stack.images[0], folder)
    return stack


def write_images(pixels: np.ndarray, folder: Path) -> None:
    """uint8 (N, H, W) as folder/1.png to folder/N.png."""
    for number, image in enumerate(pixels, 1):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        write_atomic(folder / f"{number}.png", buffer.getvalue())
