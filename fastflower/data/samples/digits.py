"""Handwritten digits as a contest: scikit-learn's 1797 images (8 x 8 pixels, 17 levels) in Kaggle's file formats.

Source: Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, test part of the UCI data set.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from fastflower.core.errors import InputError
from fastflower.core.files import write_atomic
from fastflower.core.tables import write_csv
from fastflower.data.readers import arrays

HELD_OUT = 297  # the last rows, by other writers than the first


def write(home: Path, held_out: int = HELD_OUT) -> None:
    """Write train.csv (label and pixels), and the last `held_out` digits as test/<ImageId>.png and truth.csv.

    sample_submission.csv lists the ImageIds, which count the test images from 1. InputError when no digit is left to
    train on.
    """
    from sklearn.datasets import load_digits  # here: its import takes two seconds

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # (1797, 8, 8), levels 0..16 before
    training = len(pixels) - held_out
    if training < 1:
        raise InputError(f"held_out={held_out}: there are {len(pixels)} digits; leave some to train on")
    names = [f"pixel{i}" for i in range(pixels[0].size)]
    flat = [[str(value) for value in row] for row in pixels[:training].reshape(training, -1).tolist()]
    labels = [str(label) for label in digits.target.tolist()]
    rows = zip(labels[:training], flat, strict=True)
    write_csv(
        home / "train.csv", [{"label": label, **dict(zip(names, row, strict=True))} for label, row in rows]
    )
    write_images(pixels[training:], home / "test")
    answers = [{"ImageId": str(number), "Label": label} for number, label in enumerate(labels[training:], 1)]
    blank = [{**answer, "Label": "0"} for answer in answers]
    write_csv(home / "sample_submission.csv", blank, ("ImageId", "Label"))
    write_csv(home / "truth.csv", answers, ("ImageId", "Label"))


def unpack(table: Path, folder: Path) -> arrays.Stack:
    """Write a table of pixels without labels (Kaggle's test.csv) as folder/<ImageId>.png, counting rows from 1."""
    if not table.is_file():
        raise InputError(f"no {table}; give a table with one column for each pixel")
    stack = arrays.open_pixels(table, "label", shape="auto", labelled=False)
    write_images(stack.images[0], folder)
    return stack


def write_images(pixels: np.ndarray, folder: Path) -> None:
    """Write uint8 (N, H, W) as folder/1.png to folder/N.png."""
    for number, image in enumerate(pixels, 1):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        write_atomic(folder / f"{number}.png", buffer.getvalue())
