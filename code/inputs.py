"""Reads the images to predict: photographs in a folder, or pairs of images in a .npz; each row has a name.

Arrays are read as the trainer reads them, and the two images of a pair are put side by side as in its loaders.
"""

from __future__ import annotations

import contextlib
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

import pictures

ROWS = 4096  # checked at a time, so that no second copy of the whole array is made
BROKEN = (  # twin of fastflower/data/readers/arrays.py
    *(OSError, ValueError, KeyError, EOFError, RuntimeError, TypeError, OverflowError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
)

Headers = dict[str, tuple[tuple[int, ...], np.dtype]]


class UnsuitableInput(Exception):
    """The input is not of the kind that the bundle reads; the text is the line to show."""


class Folder:
    """Photographs below a folder: their paths relative to it in `names`, those of all other entries in `ignored`.

    `notes` are about photographs that could be read only in part, by name.
    """

    noun = "photographs"

    def __init__(self, folder: bytes) -> None:
        self.folder = folder
        self.names, self.ignored = pictures.find(folder)
        self.notes: dict[bytes, str] = {}

    def load(self) -> None:
        """Do nothing: files are read one at a time."""

    def views(self, name: bytes, crops: list[dict[str, Any]]) -> list[np.ndarray]:
        """The views of a photograph: uint8 (h, w, 3) for each crop. Any exception means it is unreadable."""
        views, note = pictures.prepare(os.path.join(self.folder, name), crops)
        if note:
            self.notes[name] = note
        return views

    def count_added(self) -> int:
        """The number of photographs added since the folder was listed."""
        return len(set(pictures.find(self.folder)[0]) - set(self.names))


class Pairs:
    """The pairs of a .npz, in its two `arrays`; other arrays, such as labels, are not read.

    `names` are `<stem of the file>/<row>`, as in training; `shape` is the shape of images stored as flat rows.
    """

    noun = "pairs"

    def __init__(self, path: str, arrays: list[str], shape: Any) -> None:
        self.path, self.arrays, self.shape = path, arrays, shape
        present = headers(path)
        missing = [name for name in arrays if name not in present]
        if missing:
            listed = ", ".join(f"{name} {dtype} {shape}" for name, (shape, dtype) in present.items())
            raise UnsuitableInput(
                f"{path}: no complete array {', '.join(missing)}; it has {listed or 'none'}; "
                f"this bundle compares the arrays {' and '.join(arrays)}"
            )
        self.layouts = [layout(*present[name], f"{path}: {name}", shape) for name in arrays]
        if len({sizes[:3] for sizes in self.layouts}) > 1:
            listed = " and ".join(f"{name} {sizes[:3]}" for name, sizes in zip(arrays, self.layouts))
            raise UnsuitableInput(f"{path}: {listed}; both arrays must have the same rows, height and width")
        self.names, self.ignored = row_names(path, self.layouts[0][0]), []
        self.notes: dict[bytes, str] = {}

    def load(self) -> None:
        """Read both arrays."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                self.numbers = [file[name] for name in self.arrays]
            self.unit = [is_unit_range(values) for values in self.numbers]
        except BROKEN as error:
            raise UnsuitableInput(f"{self.path}: cannot be read ({one_line(error)}); copy it again") from None

    def views(self, name: bytes, crops: list[dict[str, Any]]) -> list[np.ndarray]:
        """The views of a pair: uint8 (h, 2w, 3) for each crop. ValueError for numbers that are not pixels."""
        row = int(name.rpartition(b"/")[2])
        sides = [
            pictures.cut_views(Image.fromarray(self.pixels(side, row)).convert("RGB"), crops)
            for side in (0, 1)
        ]
        return [np.concatenate(both, axis=1) for both in zip(*sides)]

    def count_added(self) -> int:
        """Always 0: the file is read as a whole."""
        return 0

    def pixels(self, side: int, row: int) -> np.ndarray:
        """An image of a pair, the left one (0) or the right one (1): uint8 (H, W) or (H, W, 3)."""
        values, (_, height, width, channels) = self.numbers[side][row], self.layouts[side]
        if values.ndim == 1:
            values = values.reshape((height, width) if self.shape == "auto" else self.shape)
        if values.shape == (channels, height, width):  # channels first, as torch has them
            values = np.moveaxis(values, 0, -1)
        values = values.reshape(height, width) if channels == 1 else values
        if values.dtype == np.uint8:
            return values
        if not np.all(valid_pixels(values, unit=self.unit[side])):
            raise ValueError(
                f"{self.arrays[side]}: {values.dtype} from {values.min():g} to {values.max():g}; "
                "images are whole numbers 0..255, or floats 0..1"
            )
        return np.rint(values.astype(np.float32) * 255 if self.unit[side] else values).astype(np.uint8)


def open_input(path: str, pairs: dict[str, Any] | None) -> Folder | Pairs:
    """Open the folder or .npz to predict; `pairs` is that field of bundle.json, None for photographs."""
    if pairs is None:
        return Folder(os.fsencode(path))
    if not os.path.isfile(path):
        fault = "is a folder" if os.path.isdir(path) else "does not exist"
        raise UnsuitableInput(f"{path} {fault}; give a .npz with the arrays {' and '.join(pairs['arrays'])}")
    return Pairs(path, **pairs)


def open_without_bundle(path: str) -> Any:
    """The names of the rows where no bundle can be read: a .npz counts as many rows as its longest array."""
    if not os.path.isfile(path):
        return Folder(os.fsencode(path))
    longest = max((shape[0] for shape, _ in headers(path).values() if shape), default=0)
    return SimpleNamespace(names=row_names(path, longest), ignored=[])


def row_names(path: str, rows: int) -> list[bytes]:
    """`<stem>/<row>`, rows from 0 with leading zeros."""
    stem = os.fsencode(os.path.splitext(os.path.basename(path))[0])
    return [b"%s/%0*d" % (stem, len(str(rows - 1)), row) for row in range(rows)]


def headers(path: str) -> Headers:
    """Shape and dtype of the arrays in a .npz, without arrays that are incomplete; only headers are read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return dict(_headers(archive))
    except BROKEN as error:
        raise UnsuitableInput(
            f"{path}: cannot be read as .npz ({one_line(error)}); save it with numpy.savez"
        ) from None


def _headers(archive: zipfile.ZipFile) -> Iterator[tuple[str, tuple[tuple[int, ...], np.dtype]]]:
    for entry in archive.infolist():
        with contextlib.suppress(*BROKEN), archive.open(entry) as array:
            version = np.lib.format.read_magic(array)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(array)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(array)
            # a header may claim more than the file holds, and the table gets a row for each
            if dtype.hasobject or math.prod(shape) * dtype.itemsize == entry.file_size - array.tell():
                yield (
                    entry.filename[:-4] if entry.filename.endswith(".npy") else entry.filename,
                    (shape, dtype),
                )


# twin of fastflower/data/readers/arrays.py, _layout
def layout(
    shape: tuple[int, ...], dtype: np.dtype, title: str, image_shape: Any
) -> tuple[int, int, int, int]:
    """Rows, height, width and channels of an array of images; `image_shape` is for flat rows, or "auto"."""
    if dtype.kind not in "biuf":
        raise UnsuitableInput(f"{title}: holds {dtype}; images must be numbers")
    sides = list(shape[1:])
    if len(shape) == 2:
        side = round(shape[1] ** 0.5)
        sides = [side, side] if image_shape == "auto" else list(image_shape)
        if math.prod(sides) != shape[1]:
            expected = "square images" if image_shape == "auto" else f"images of {image_shape}"
            raise UnsuitableInput(f"{title}: rows of {shape[1]} numbers are not {expected}")
    if len(sides) == 3 and sides[0] in (1, 3) and sides[2] not in (1, 3):
        sides = [*sides[1:], sides[0]]
    if len(sides) == 2:
        sides.append(1)
    if len(sides) != 3 or sides[2] not in (1, 3) or min(*shape, *sides) < 1:
        raise UnsuitableInput(
            f"{title}: has the shape {tuple(shape)}; images are (N, H, W), (N, H, W, 3), (N, 3, H, W) or flat rows"
        )
    return shape[0], sides[0], sides[1], sides[2]


def is_unit_range(values: np.ndarray) -> bool:
    """True for images of 0..1, False for 0..255: for floats the one that is valid for more rows, 0..1 on a tie."""
    if values.dtype.kind != "f":
        return values.dtype.kind == "b"
    chunks = [
        values[start : start + ROWS].reshape(-1, math.prod(values.shape[1:]))
        for start in range(0, len(values), ROWS)
    ]
    as_unit, as_levels = (
        sum(valid_pixels(chunk, unit=unit).all(1).sum() for chunk in chunks) for unit in (True, False)
    )
    return bool(as_unit >= as_levels)


def valid_pixels(values: np.ndarray, *, unit: bool) -> np.ndarray:
    """A mask of the numbers that can be pixels, in 0..1 with `unit`, else whole numbers 0..255; NaN cannot."""
    if values.dtype.kind != "f" or unit:
        return (values >= 0) & (values <= (1 if unit else 255))
    return (values >= 0) & (values <= 255) & (values == np.rint(values))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
