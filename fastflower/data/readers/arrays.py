"""Images in arrays, from .npz and .npy files and tables of pixels, checked and converted to uint8.

Rows, labels and sizes are read at once, the pixels only on first use.
"""

from __future__ import annotations

import csv
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastflower.core.errors import InputError
from fastflower.core.tables import escaped

if TYPE_CHECKING:
    import pandas as pd

ROWS = 4096  # rows converted at a time, so that memory holds only one copy of the original numbers
PIXELS = "pixels"  # column of the pixels of an image as one text
MAX_FIELD = 1 << 30  # characters of a cell
MIN_PIXELS = 16  # a table of pixels has more columns than this
# what NumPy and zipfile raise for damaged files
BROKEN = (
    *(OSError, ValueError, KeyError, EOFError, RuntimeError, TypeError, OverflowError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
)
REMEDY = "name them by data.arrays=[images, labels], or [first, second, labels] for pairs"


@dataclass(frozen=True)
class Stack:
    """`rows` of single images or of pairs, all of one height and width; labels as text, or None.

    load: reads the pixels. names: the image arrays in a .npz. unused: columns of a table that are neither labels nor
    pixels.
    """

    rows: int
    height: int
    width: int
    images_per_row: int
    labels: list[str] | None
    load: Callable[[], tuple[np.ndarray, ...]]
    names: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @cached_property
    def images(self) -> tuple[np.ndarray, ...]:
        """One array for each image of a row, each uint8 (N, H, W) or (N, H, W, 3)."""
        return self.load()


def open_npz(path: Path, wanted: Any, *, shape: Any, labelled: bool) -> Stack:
    """Open the images and labels of a .npz; `wanted` names the arrays: [images, labels] or [first, second, labels].

    "auto" detects them by shape: the one or two arrays of images, and the only array with a single value per image.
    Raises InputError with a list of the arrays if that is ambiguous.
    """
    try:
        shapes = _shapes(path)
    except BROKEN as error:
        raise _damaged(path, error) from None
    names, label = _choose(path, shapes, wanted=wanted, labelled=labelled)
    values = _arrays(path, [label])[0] if label else None
    layouts = [_layout(shapes[name][0], f"{path}: {name}", shape) for name in names]
    if len({layout[:3] for layout in layouts}) > 1:
        sizes = " and ".join(f"{name} {layout[:3]}" for name, layout in zip(names, layouts, strict=True))
        raise InputError(f"{path}: {sizes}: the two images of a pair have one size, one row a pair")

    def load() -> tuple[np.ndarray, ...]:
        arrays = zip(_arrays(path, names), names, strict=True)
        return tuple(as_uint8(values, f"{path}: {name}", shape) for values, name in arrays)

    rows, height, width, _ = layouts[0]
    labels = None if values is None else _labels(values, f"{path}: {label}", rows)
    return Stack(
        rows=rows,
        height=height,
        width=width,
        images_per_row=len(names),
        labels=labels,
        load=load,
        names=tuple(names),
    )


def open_npy(path: Path, shape: Any, labels: Callable[[int], list[str]] | None) -> Stack:
    """Open the images of a .npy; `labels(rows)` reads their labels, given the number of images."""
    mapped = _npy(path)
    rows, height, width, _ = _layout(mapped.shape, str(path), shape)
    return Stack(
        rows=rows,
        height=height,
        width=width,
        images_per_row=1,
        labels=labels(rows) if labels else None,
        load=lambda: (as_uint8(mapped, str(path), shape),),
    )


def npy_labels(path: Path, rows: int) -> list[str]:
    """Read the labels in a .npy, one for each of `rows` images."""
    return _labels(np.array(_npy(path)), str(path), rows)


def open_pixels(path: Path, label_col: str, *, shape: Any, labelled: bool) -> Stack:
    """Open a table with a column of labels (label_col, or else `label`) and pixels, 0..255.

    The pixels are all other columns, or a column `pixels` of numbers with spaces between them.
    """
    header, first = pixel_columns(path)
    label = next((name for name in (label_col, "label") if name in header), None)
    joined = header.index(PIXELS) if PIXELS in header else None
    if labelled and label is None:
        listed = ", ".join(escaped(name) for name in header[:MIN_PIXELS]) + " ..." * (
            len(header) > MIN_PIXELS
        )
        raise InputError(
            f"{path}: no column {label_col} or label; it has {listed}; name yours by data.label_col"
        )
    # without labels the first column is read instead, to count the rows
    column = header.index(label or header[0])
    texts = [text for _, table in _tables(path, column) for text in table.iloc[:, 0]]
    count = len(header) - bool(label) if joined is None else len(first[joined].split())
    rows, height, width, _ = _layout((len(texts), count), str(path), shape)

    def load() -> tuple[np.ndarray, ...]:
        blocks = []
        for line, table in _tables(path, joined):
            what = f"{path}: lines from {line}"
            if joined is None:
                numbers = table.drop(columns=[label] if label else [])
            else:
                numbers = _split(table.iloc[:, 0].tolist(), count, what)
            blocks.append(_whole_numbers(numbers, what))
        return (as_uint8(np.concatenate(blocks), str(path), shape),)

    return Stack(
        rows=rows,
        height=height,
        width=width,
        images_per_row=1,
        labels=[text.strip() for text in texts] if labelled else None,
        load=load,
        unused=() if joined is None else tuple(name for name in header if name not in (label, PIXELS)),
    )


def pixel_columns(path: Path) -> tuple[list[str], list[str]]:
    """The column names and the first row of a table of pixels; InputError if the file is no such table."""
    csv.field_size_limit(MAX_FIELD)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header, first = [name.strip() for name in next(reader, [])], next(reader, None)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a table of pixels ({_one_line(error)})") from None
    if len(header) <= MIN_PIXELS and PIXELS not in header:
        raise InputError(
            f"{path}: has {len(header)} columns; a table of pixels has one for each pixel and one for the label, or a "
            f"column {PIXELS}; a label file is given as data.csv, and the folder of its images as data.root"
        )
    if first is None:
        raise InputError(f"{path}: has a header and no rows")
    if len(first) != len(header):
        raise InputError(f"{path}: line 2: {len(first)} fields, the header has {len(header)}")
    return header, first


def as_uint8(values: np.ndarray, what: str, shape: Any) -> np.ndarray:
    """Convert an array of images to uint8 (N, H, W) or (N, H, W, 3), channels last.

    Flat rows become images of `shape`, or square ones for "auto". Floats within 0..1 and booleans are scaled by 255;
    other numbers must be whole and within 0..255. `what` names the array in an InputError.
    """
    rows, height, width, channels = _layout(values.shape, what, shape)
    if values.dtype.kind not in "biuf":
        raise InputError(f"{what}: holds {values.dtype}; images are numbers")
    last = (rows, height, width, channels)[: 3 + (channels > 1)]
    if values.ndim == 2:
        values = values.reshape(rows, *(shape if shape != "auto" else (height, width)))
    if values.shape[1:] == (channels, height, width):  # channels first, as in torch
        values = np.moveaxis(values, 1, -1)
    values = values.reshape(last) if channels == 1 else values
    if values.dtype == np.uint8:
        return values
    starts = range(0, rows, ROWS)
    blocks = [values[start : start + ROWS] for start in starts]
    low, high = min(float(block.min()) for block in blocks), max(float(block.max()) for block in blocks)
    unit = values.dtype.kind == "b" or (values.dtype.kind == "f" and low >= 0 and high <= 1)
    out = np.empty(last, np.uint8)
    for start, block in zip(starts, blocks, strict=True):
        scaled = block.astype(np.float32) * 255 if unit else block
        if not unit and not (low >= 0 and high <= 255 and bool((block == np.rint(block)).all())):
            raise InputError(
                f"{what}: {values.dtype} from {low:g} to {high:g}; images are whole numbers 0..255, or floats 0..1"
            )
        out[start : start + ROWS] = np.rint(scaled)
    return out


# twin of code/inputs.py, layout
def _layout(shape: tuple[int, ...], what: str, wanted: Any) -> tuple[int, int, int, int]:
    """Rows, height, width and channels of an array of images; `wanted` is data.shape, for flat rows."""
    sides = list(shape[1:])
    if len(shape) == 2:
        side = round(shape[1] ** 0.5)
        sides = [side, side] if wanted == "auto" else wanted
        valid = isinstance(sides, list) and len(sides) in (2, 3) and all(type(side) is int for side in sides)
        if not valid or int(np.prod(sides)) != shape[1]:
            raise InputError(
                f"{what}: rows of {shape[1]} pixels are no images of data.shape = {wanted}; "
                "give [height, width] or [height, width, 3]"
            )
    if len(sides) == 3 and sides[0] in (1, 3) and sides[2] not in (1, 3):
        sides = [*sides[1:], sides[0]]
    if len(sides) == 2:
        sides.append(1)
    if len(sides) != 3 or sides[2] not in (1, 3) or 0 in (*shape, *sides):
        raise InputError(
            f"{what}: has the shape {tuple(shape)}; images are (N, H, W), (N, H, W, 3), (N, 3, H, W) or flat rows"
        )
    return shape[0], sides[0], sides[1], sides[2]


def _shapes(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array, from the headers alone."""
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                version = np.lib.format.read_magic(file)
                read_1, read_2 = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
                shape, _, dtype = (read_1 if version == (1, 0) else read_2)(file)
                shapes[name.removesuffix(".npy")] = (shape, dtype)
    return shapes


def _arrays(path: Path, names: list[str]) -> list[np.ndarray]:
    """Arrays of a .npz, whose checksums are compared while they are read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in names]
    except BROKEN as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be read as .npz ({_one_line(error)}); save it again")


def _choose(
    path: Path, shapes: dict[str, tuple[tuple[int, ...], np.dtype]], *, wanted: Any, labelled: bool
) -> tuple[list[str], str | None]:
    """The names of the image arrays and of the labels' array."""
    listing = ", ".join(f"{name} {dtype} {shape}" for name, (shape, dtype) in shapes.items())
    if wanted != "auto":
        valid = isinstance(wanted, list) and len(wanted) in (2, 3)
        names = list(wanted if labelled else wanted[:-1]) if valid else []
        missing = [str(name) for name in names if name not in shapes]
        if not valid or missing:
            fault = f"no array {', '.join(missing)}" if valid else f"data.arrays = {wanted}"
            raise InputError(f"{path}: {fault}; it has {listing}; {REMEDY}")
        return (names[:-1], names[-1]) if labelled else (names, None)
    images = [name for name, (shape, dtype) in shapes.items() if len(shape) > 2 and dtype.kind in "biuf"]
    flat = [name for name, (shape, _) in shapes.items() if len(shape) == 2 and shape[1] > MIN_PIXELS]
    images = sorted(images or flat)
    rows = {shapes[name][0][0] for name in images}
    labels = [
        name for name, (shape, _) in shapes.items() if shape[:1] == (*rows,) and shape[1:] in ((), (1,))
    ]
    if len(images) not in (1, 2) or len(rows) != 1 or (labelled and len(labels) != 1):
        raise InputError(
            f"{path}: it is not clear which arrays are images and labels; it has {listing}; {REMEDY}"
        )
    return images, labels[0] if labelled else None


def _labels(values: np.ndarray, what: str, rows: int) -> list[str]:
    """The labels as text, one per row; `what` names the array in an InputError."""
    if values.shape not in ((rows,), (rows, 1)) or values.dtype.kind not in "biufU":
        raise InputError(
            f"{what}: {values.dtype} {values.shape} for {rows} images; labels are one number or word per image"
        )
    values = values.astype(np.int64) if values.dtype.kind == "b" else values
    return [str(value) for value in values.ravel().tolist()]


def _npy(path: Path) -> np.ndarray:
    try:
        values: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except BROKEN as error:
        raise InputError(f"{path}: cannot be read as .npy ({_one_line(error)}); save it again") from None
    return values


def _tables(path: Path, column: int | None) -> Iterator[tuple[int, pd.DataFrame]]:
    """Tables of ROWS rows with the line of their first row: one column, as text, or all columns as numbers."""
    import pandas as pd  # a second of import, for tables of pixels only

    options: dict[str, Any] = {} if column is None else {"usecols": [column], "dtype": str}
    try:
        with pd.read_csv(path, na_filter=False, chunksize=ROWS, **options) as reader:
            for table in reader:
                table.columns = [str(name).strip() for name in table.columns]
                yield int(table.index[0]) + 2, table
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {_one_line(error)}") from None


def _split(texts: list[str], count: int, what: str) -> pd.DataFrame:
    """The numbers in texts, `count` in each; InputError if one has more or fewer."""
    import pandas as pd

    lengths = {len(text.split()) for text in texts} - {count}
    if lengths:
        raise InputError(f"{what}: {PIXELS} has {min(lengths)} numbers in a row, {count} in the first")
    return pd.read_csv(io.StringIO("\n".join(texts)), sep=r"\s+", header=None, na_filter=False)


def _whole_numbers(table: pd.DataFrame, what: str) -> np.ndarray:
    """The numbers of a table as uint8; InputError if one is not a whole number within 0..255."""
    try:
        numbers = table.to_numpy(np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: {_one_line(error)}; pixels are whole numbers 0..255") from None
    if not np.array_equal(numbers, np.clip(np.rint(numbers), 0, 255)):
        raise InputError(
            f"{what}: {np.nanmin(numbers):g} to {np.nanmax(numbers):g}; pixels are whole numbers 0..255"
        )
    return numbers.astype(np.uint8)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
