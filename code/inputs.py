"""What is to be predicted: photographs in a folder, or pairs of images in a .npz. Each row has a name and its views.

Numbers are read as the trainer reads them, and the two images of a pair stand side by side as its loaders put them.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

import pictures

ROWS = 4096  # looked at together, so that memory holds the file's own numbers once
BROKEN = (OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)

Headers = dict[str, tuple[tuple[int, ...], np.dtype]]


class Unfit(Exception):
    """What is given is not what the bundle reads; the text is the one line to show."""


class Folder:
    """Photographs below a folder; `names` are paths relative to it, `others` those of what is none."""

    noun = "photographs"

    def __init__(self, folder: bytes) -> None:
        self.folder = folder
        self.names, self.others = pictures.find(folder)

    def load(self) -> None:
        """Nothing: files are read one by one."""

    def views(self, name: bytes, crops: list[dict[str, Any]]) -> list[np.ndarray]:
        """A row as the networks see it: uint8 (h, w, 3) for each crop. Raises whatever makes it unreadable."""
        return pictures.prepare(os.path.join(self.folder, name), crops)

    def late(self) -> int:
        """Photographs that came after they were looked for."""
        return len(set(pictures.find(self.folder)[0]) - set(self.names))


class Pairs:
    """The pairs of a .npz, in its two `arrays`; other arrays, such as labels, are ignored.

    `names` are `<stem of the file>/<row>`, as in training; `shape` is that of images that come as flat rows.
    """

    noun = "pairs"

    def __init__(self, path: str, arrays: list[str], shape: Any) -> None:
        self.path, self.arrays, self.shape = path, arrays, shape
        there = headers(path)
        what = f"this bundle compares the arrays {' and '.join(arrays)}"
        lacking = [name for name in arrays if name not in there]
        if lacking:
            listed = ", ".join(f"{name} {dtype} {shape}" for name, (shape, dtype) in there.items())
            raise Unfit(f"{path}: no whole array {', '.join(lacking)}; it has {listed or 'none'}; {what}")
        self.layouts = [layout(*there[name], f"{path}: {name}", shape) for name in arrays]
        if len({own[:3] for own in self.layouts}) > 1:
            sizes = " and ".join(f"{name} {own[:3]}" for name, own in zip(arrays, self.layouts))
            raise Unfit(f"{path}: {sizes}: the two images of a pair have one size, one row a pair")
        self.names, self.others = row_names(path, self.layouts[0][0]), []

    def load(self) -> None:
        """Read the numbers of all rows."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                self.numbers = [file[name] for name in self.arrays]
            self.unit = [in_unit(values) for values in self.numbers]
        except BROKEN as error:
            raise Unfit(f"{self.path}: cannot be read ({one_line(error)}); copy it again") from None

    def views(self, name: bytes, crops: list[dict[str, Any]]) -> list[np.ndarray]:
        """A pair as the networks see it: uint8 (h, 2w, 3) for each crop. ValueError for numbers that are no image."""
        row = int(name.rpartition(b"/")[2])
        sides = [
            pictures.views(Image.fromarray(self.pixels(place, row)).convert("RGB"), crops) for place in (0, 1)
        ]
        return [np.concatenate(both, axis=1) for both in zip(*sides)]

    def late(self) -> int:
        """No pair can come to a file that is read at once."""
        return 0

    def pixels(self, place: int, row: int) -> np.ndarray:
        """An image of a pair: uint8 (H, W) or (H, W, 3)."""
        values, (_, height, width, channels) = self.numbers[place][row], self.layouts[place]
        if values.ndim == 1:
            values = values.reshape((height, width) if self.shape == "auto" else self.shape)
        if values.shape == (channels, height, width):  # channels first, as torch has them
            values = np.moveaxis(values, 0, -1)
        values = values.reshape(height, width) if channels == 1 else values
        if values.dtype == np.uint8:
            return values
        if not np.all(readable(values, unit=self.unit[place])):
            raise ValueError(
                f"{self.arrays[place]}: {values.dtype} from {values.min():g} to {values.max():g}; "
                "images are whole numbers 0..255, or floats 0..1"
            )
        return np.rint(values.astype(np.float32) * 255 if self.unit[place] else values).astype(np.uint8)


def find(path: str, pairs: dict[str, Any] | None) -> Folder | Pairs:
    """The rows of what is given; `pairs` is what the bundle says of them, None for photographs."""
    if pairs is None:
        return Folder(os.fsencode(path))
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "is not there"
        raise Unfit(f"{path} {what}; give a .npz with the arrays {' and '.join(pairs['arrays'])}")
    return Pairs(path, **pairs)


def guess(path: str) -> Any:
    """Names where no bundle says what they are of: a .npz has as many rows as its longest array."""
    if not os.path.isfile(path):
        return Folder(os.fsencode(path))
    longest = max((shape[0] for shape, _ in headers(path).values() if shape), default=0)
    return SimpleNamespace(names=row_names(path, longest), others=[])


def row_names(path: str, rows: int) -> list[bytes]:
    """`<stem>/<row>`, rows from 0 with leading zeros."""
    stem = os.fsencode(os.path.splitext(os.path.basename(path))[0])
    return [b"%s/%0*d" % (stem, len(str(rows - 1)), row) for row in range(rows)]


def headers(path: str) -> Headers:
    """Shape and kind of the arrays in a .npz, without those whose own words are damaged; no number is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return dict(_headers(archive))
    except BROKEN as error:
        raise Unfit(f"{path}: cannot be read as .npz ({one_line(error)}); save it by numpy.savez") from None


def _headers(archive: zipfile.ZipFile) -> Iterator[tuple[str, tuple[tuple[int, ...], np.dtype]]]:
    for entry in archive.infolist():
        with contextlib.suppress(*BROKEN), archive.open(entry) as member:
            version = np.lib.format.read_magic(member)
            first = version == (1, 0)
            read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(member)
            # what a header claims must be there: the table has a row for each
            if dtype.hasobject or math.prod(shape) * dtype.itemsize == entry.file_size - member.tell():
                yield (
                    entry.filename[:-4] if entry.filename.endswith(".npy") else entry.filename,
                    (shape, dtype),
                )


def layout(shape: tuple[int, ...], dtype: np.dtype, what: str, wanted: Any) -> tuple[int, int, int, int]:
    """Rows, height, width and channels of an array of images; `wanted` is the shape of flat rows, or "auto"."""
    if dtype.kind not in "biuf":
        raise Unfit(f"{what}: holds {dtype}; images are numbers")
    sides = list(shape[1:])
    if len(shape) == 2:
        side = round(shape[1] ** 0.5)
        sides = [side, side] if wanted == "auto" else list(wanted)
        if math.prod(sides) != shape[1]:
            raise Unfit(f"{what}: rows of {shape[1]} pixels are no images of data.shape = {wanted}")
    if len(sides) == 3 and sides[0] in (1, 3) and sides[2] not in (1, 3):
        sides = [*sides[1:], sides[0]]
    if len(sides) == 2:
        sides.append(1)
    if len(sides) != 3 or sides[2] not in (1, 3) or min(*shape, *sides) < 1:
        raise Unfit(
            f"{what}: has the shape {tuple(shape)}; images are (N, H, W), (N, H, W, 3), (N, 3, H, W) or flat rows"
        )
    return shape[0], sides[0], sides[1], sides[2]


def in_unit(values: np.ndarray) -> bool:
    """Whether images are shares of 1 and not levels 0..255: floats in which more rows, or as many, can be read so."""
    if values.dtype.kind != "f":
        return values.dtype.kind == "b"
    parts = [
        values[at : at + ROWS].reshape(-1, math.prod(values.shape[1:])) for at in range(0, len(values), ROWS)
    ]
    shares, levels = (sum(readable(part, unit=unit).all(1).sum() for part in parts) for unit in (True, False))
    return bool(shares >= levels)


def readable(values: np.ndarray, *, unit: bool) -> np.ndarray:
    """Which numbers can be pixels; NaN is none."""
    if values.dtype.kind != "f" or unit:
        return (values >= 0) & (values <= (1 if unit else 255))
    return (values >= 0) & (values <= 255) & (values == np.rint(values))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
