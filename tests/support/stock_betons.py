"""Betons in the layout of FFCV's DatasetWriter with any fields, written without FFCV, whose import takes seconds."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastflower.data.betons.beton_file import ALLOCATION, FIELD, HEADER, IMAGE_TYPE, JPEG, RAW
from fastflower.data.readers.ffcv_files import ARRAY, BYTES, JSON, NDARRAY, TENSOR, TYPES

OWN = 255  # FFCV's id of a field type of the user's own


def write(path: Path | str, columns: dict[str, tuple[int, Sequence[Any]]]) -> Path:
    """Write a beton; `columns` has the type id and the values of each field, by its name."""
    rows = len(next(iter(columns.values()))[1])
    kinds = {name: TYPES[type_id][1] if type_id in TYPES else "<u8" for name, (type_id, _) in columns.items()}
    metadata = np.zeros(rows, np.dtype(list(kinds.items()), align=True))
    fields = np.zeros(len(columns), FIELD)
    offset = HEADER.itemsize + fields.nbytes + metadata.nbytes
    blobs, allocation = [], []

    def stored(row: int, blob: bytes) -> int:
        nonlocal offset
        blobs.append(blob)
        allocation.append((row, offset, len(blob)))
        offset += len(blob)
        return offset - len(blob)

    for field, (name, (type_id, _)) in zip(fields, columns.items(), strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        if type_id in (NDARRAY, TENSOR):
            field["arguments"][:] = _array_arguments(columns[name][1][0])
    for row in range(rows):
        for name, (type_id, values) in columns.items():
            value = values[row]
            if type_id == IMAGE_TYPE:
                mode, data = (JPEG, value) if isinstance(value, bytes) else (RAW, value.tobytes())
                height, width = size_of(value)
                metadata[name][row] = (mode, width, height, stored(row, data))
            elif type_id in (BYTES, JSON):
                metadata[name][row] = (stored(row, value), len(value))
            elif type_id in (NDARRAY, TENSOR):
                metadata[name][row] = stored(row, value.tobytes())
            else:
                metadata[name][row] = value
    header = np.zeros(1, HEADER)
    header[0] = (2, len(columns), 1 << 21, rows, offset)
    table = np.array(allocation, ALLOCATION)
    Path(path).write_bytes(
        b"".join([header.tobytes(), fields.tobytes(), metadata.tobytes(), *blobs, table.tobytes()])
    )
    return Path(path)


def size_of(image: bytes | np.ndarray) -> tuple[int, int]:
    """(height, width) of a JPEG file or of pixels."""
    if isinstance(image, bytes):
        with Image.open(io.BytesIO(image)) as opened:
            return opened.height, opened.width
    return image.shape[0], image.shape[1]


def _array_arguments(value: np.ndarray) -> np.ndarray:
    header, described = np.zeros(1, ARRAY), json.dumps(value.dtype.descr).encode()
    header["shape"][0][: value.ndim] = value.shape
    header["type_length"] = len(described)
    arguments = np.zeros(1024, np.uint8)
    content = header.tobytes() + described
    arguments[: len(content)] = np.frombuffer(content, np.uint8)
    return arguments
