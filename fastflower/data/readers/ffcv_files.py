"""Betons that FFCV's DatasetWriter wrote, read without FFCV: their fields, labels, and images as they are stored.

A field is known by its type. JPEG files come out byte for byte, raw images as pixels. A type of the writer's own
(FFCV's number 255) is refused, because only its program knows how many bytes it takes in a row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastflower.core.errors import InputError
from fastflower.core.tables import escaped
from fastflower.data.betons.beton_file import ALLOCATION, FIELD, HEADER, IMAGE, IMAGE_TYPE, RAW
from fastflower.data.readers.image_folders import Check

SUFFIXES = (".beton", ".ffcv")
VERSION = 2  # of the file format
SMALLEST_PAGE = 1 << 21  # bytes; FFCV's pages are powers of two from here
MAX_FIELDS = 256
POINTER = np.dtype([("ptr", "<u8"), ("size", "<u8")])
ARRAY = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])  # arguments of an NDArrayField
FLOAT, INTEGER, BYTES, NDARRAY, JSON, TENSOR = 0, 1, 3, 4, 5, 6  # FFCV's type ids, beside IMAGE_TYPE
TYPES: dict[int, tuple[str, Any]] = {  # the name of a type, and what a row's metadata holds of it
    FLOAT: ("FloatField", "<f8"),
    INTEGER: ("IntField", "<i8"),
    IMAGE_TYPE: ("RGBImageField", IMAGE),
    BYTES: ("BytesField", POINTER),
    NDARRAY: ("NDArrayField", "<u8"),
    JSON: ("JSONField", POINTER),
    TENSOR: ("TorchTensorField", "<u8"),
}
LABELS = (FLOAT, INTEGER, BYTES, NDARRAY, TENSOR)  # types that can hold a label
AGAIN = "write it again with FFCV's DatasetWriter"


@dataclass(frozen=True)
class Field:
    """A field of every row: its name, FFCV's type id, and the arguments of its type."""

    name: str
    type_id: int
    arguments: bytes

    def __str__(self) -> str:
        kind = TYPES[self.type_id][0] if self.type_id in TYPES else f"type {self.type_id}"
        return f"{escaped(self.name)} ({kind})"


@dataclass(frozen=True)
class FfcvSource:
    """The images of a beton; names are `<file stem>/<row>`, rows from 0 with leading zeros.

    images: IMAGE (N,), as the metadata has them. sizes: bytes of each image, int64 (N,), -1 where none are allocated.
    """

    path: Path
    images: np.ndarray
    sizes: np.ndarray
    images_per_row: int = 1
    from_arrays: bool = False
    in_one_file: bool = True

    @cached_property
    def _data(self) -> np.ndarray:
        return np.memmap(self.path, np.uint8, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        # a copy in another process maps the file itself
        return {key: value for key, value in self.__dict__.items() if key != "_data"}

    @property
    def rows(self) -> int:
        """The number of images."""
        return len(self.images)

    def name(self, row: int) -> str:
        """The name of a row."""
        return f"{self.path.stem}/{row:0{len(str(self.rows - 1))}d}"

    def _row(self, name: str) -> int:
        return int(name.removeprefix(f"{self.path.stem}/"))

    def files(self, names: list[str]) -> list[str]:
        """The beton."""
        return [str(self.path)]

    def check(self, name: str) -> Check:
        """Check that a name is that of a row."""
        text = name.removeprefix(f"{self.path.stem}/")
        if not text.isdecimal() or int(text) >= self.rows or name != self.name(int(text)):
            return Check(f"is no row of {self.path}, which are {self.name(0)} to {self.name(self.rows - 1)}")
        return Check("", max(0, int(self.sizes[int(text)])), name)

    def load(self) -> None:
        """Map the file; worker processes forked later share it."""
        _ = self._data

    def read(self, name: str, number: int) -> bytes | np.ndarray:
        """The stored JPEG file of a row, or its pixels: uint8 (H, W, 3)."""
        row = self._row(name)
        mode, width, height, start = self.images[row].tolist()
        size = int(self.sizes[row])
        if size < 0 or start + size > len(self._data):
            raise InputError(f"is damaged: it points to byte {start}, where {self.path} stores nothing")
        if mode > RAW:
            raise InputError(f"is damaged: its mode is {mode}; FFCV knows 0 (JPEG) and 1 (raw)")
        data = self._data[start : start + size]
        if mode != RAW:
            return data.tobytes()
        if size != 3 * height * width or not size:
            raise InputError(f"is damaged: {size} bytes for {width} x {height} raw pixels")
        return np.asarray(data).reshape(height, width, 3)

    def size(self, name: str) -> tuple[int, int]:
        """(height, width) from the metadata."""
        image = self.images[self._row(name)]
        return int(image["height"]), int(image["width"])


@dataclass(frozen=True)
class FfcvFile:
    """An open beton: its fields, and the metadata of each row by the fields' positions."""

    path: Path
    fields: list[Field]
    metadata: np.ndarray
    data: np.ndarray
    source: FfcvSource

    def label_field(self, wanted: str) -> Field | None:
        """The field of the labels: the one named `wanted`, else `label`, else the only one of a type for labels.

        None if there is none; InputError if several are possible.
        """
        possible = [field for field in self.fields if field.type_id in LABELS]
        for name in (wanted, "label"):
            named = [field for field in self.fields if field.name == name]
            if named and named[0] not in possible:
                raise InputError(
                    f"{self.path}: {named[0]}: holds no labels; they are in a field of type "
                    f"{', '.join(TYPES[type_id][0] for type_id in LABELS)}; it has {self._listing}"
                )
            if named:
                return named[0]
        if len(possible) > 1:
            raise InputError(
                f"{self.path}: it is not clear which field holds the labels; it has {self._listing}; "
                "name it by data.label_col"
            )
        return possible[0] if possible else None

    def labels(self, field: Field) -> list[str]:
        """The labels of all rows as text."""
        column = self.metadata[str(self.fields.index(field))]
        if field.type_id in (FLOAT, INTEGER):
            return [str(value) for value in column.tolist()]
        if field.type_id == BYTES:
            texts = [
                self._bytes(field, row, start=start, size=size)
                for row, (start, size) in enumerate(column.tolist())
            ]
            try:
                return [text.rstrip(b"\0").decode() for text in texts]
            except UnicodeDecodeError:
                raise InputError(f"{self.path}: {field}: its bytes are no text in UTF-8; {AGAIN}") from None
        dtype, shape = self._layout(field)
        size = dtype.itemsize * int(np.prod(shape))
        values = np.array(
            [
                np.frombuffer(self._bytes(field, row, start=start, size=size), dtype)
                for row, start in enumerate(column.tolist())
            ]
        )
        if values.dtype.kind == "b":
            values = values.astype(np.int64)
        if values.shape[1] == 1:
            return [str(value) for value in values[:, 0].tolist()]
        if not (np.isin(values, (0, 1)).all() and (values.sum(1) == 1).all()):
            raise InputError(
                f"{self.path}: {field}: {values.shape[1]} numbers a row; a label is one number, or a 1 among 0s"
            )
        return [str(value) for value in values.argmax(1).tolist()]

    def _bytes(self, field: Field, row: int, *, start: int, size: int) -> bytes:
        if start + size > len(self.data):
            raise InputError(f"{self.path}: {field}: row {row} points behind the end of the file; {AGAIN}")
        return self.data[start : start + size].tobytes()

    def _layout(self, field: Field) -> tuple[np.dtype, tuple[int, ...]]:
        """Type and shape of an NDArrayField."""
        header = np.frombuffer(field.arguments[: ARRAY.itemsize], ARRAY)[0]
        try:
            described = json.loads(field.arguments[ARRAY.itemsize :][: int(header["type_length"])])
            dtype = np.dtype([tuple(part) for part in described])
            number = dtype[0] if len(dtype.names or ()) == 1 else np.dtype(object)
        except (ValueError, TypeError, KeyError):
            number = np.dtype(object)
        shape = tuple(int(length) for length in header["shape"] if length)
        if number.kind not in "biuf" or len(shape) > 1:
            raise InputError(
                f"{self.path}: {field}: {number} {shape}; a label is one number, or a 1 among 0s"
            )
        return number, shape

    @property
    def _listing(self) -> str:
        return ", ".join(map(str, self.fields))


def is_ffcv(path: Path) -> bool:
    """True if a file is a beton, by its suffix or its first bytes."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER.itemsize)
    except OSError:
        return False
    if len(head) < HEADER.itemsize:
        return False
    header = np.frombuffer(head, HEADER)[0]
    page = int(header["page_size"])
    return header["version"] == VERSION and page >= SMALLEST_PAGE and page & (page - 1) == 0


def open_ffcv(path: Path) -> FfcvFile:
    """Open a beton; InputError if it is damaged, unfinished, or holds other than one image a row."""
    try:
        data = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read as a beton ({cause}); {AGAIN}") from None
    if len(data) < HEADER.itemsize:
        raise InputError(f"{path}: cannot be read as a beton ({len(data)} bytes); {AGAIN}")
    header = data[: HEADER.itemsize].view(HEADER)[0]
    version, count = int(header["version"]), int(header["num_fields"])
    if version != VERSION or not 0 < count <= MAX_FIELDS:
        raise InputError(
            f"{path}: no beton of FFCV's version {VERSION} (its first bytes say version {version}, {count} fields); "
            f"{AGAIN}"
        )
    rows, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
    if not table:
        raise InputError(f"{path}: FFCV has not finished writing it; {AGAIN}")
    start = HEADER.itemsize + count * FIELD.itemsize
    if start > len(data):
        raise InputError(f"{path}: is cut off within its list of fields; {AGAIN}")
    fields = [
        Field(
            name=bytes(field["name"]).partition(b"\0")[0].decode("utf-8", "replace"),
            type_id=int(field["type_id"]),
            arguments=field["arguments"].tobytes(),
        )
        for field in data[HEADER.itemsize : start].view(FIELD)
    ]
    image = _image_position(path, fields)
    kind = np.dtype([(str(k), TYPES[field.type_id][1]) for k, field in enumerate(fields)], align=True)
    end = start + rows * kind.itemsize
    if not rows or end > table or table > len(data) or (len(data) - table) % ALLOCATION.itemsize:
        reason = "holds no rows" if not rows else "is cut off, or its header is damaged"
        raise InputError(f"{path}: {reason}; {AGAIN}")
    metadata = data[start:end].view(kind)
    images = np.array(metadata[str(image)])
    sizes = _sizes(images["data_ptr"], data[table:].view(ALLOCATION))
    return FfcvFile(path, fields, metadata, data, FfcvSource(path, images, sizes))


def _image_position(path: Path, fields: Sequence[Field]) -> int:
    """The position of the only field of images; InputError for none, several, or a field of unknown type."""
    listing = ", ".join(map(str, fields))
    unknown = [field for field in fields if field.type_id not in TYPES]
    if unknown:
        raise InputError(
            f"{path}: {unknown[0]}: only the program that wrote it knows this type; it has {listing}; write it "
            f"again with fields of FFCV's own types"
        )
    images = [position for position, field in enumerate(fields) if field.type_id == IMAGE_TYPE]
    if len(images) != 1:
        raise InputError(
            f"{path}: {len(images)} fields of images; it has {listing}; write it again with one RGBImageField"
        )
    return images[0]


def _sizes(starts: np.ndarray, allocation: np.ndarray) -> np.ndarray:
    """Bytes allocated at each position: int64 (N,), -1 where nothing is."""
    used = allocation[allocation["size"] > 0]  # an empty text begins where its neighbour does
    used = used[np.argsort(used["ptr"], kind="stable")]
    if not len(used):
        return np.full(len(starts), -1, np.int64)
    nearest = np.minimum(np.searchsorted(used["ptr"], starts), len(used) - 1)
    sizes = used["size"][nearest].astype(np.int64)
    return np.where(used["ptr"][nearest] == starts, sizes, -1)
