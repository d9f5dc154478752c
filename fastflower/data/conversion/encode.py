"""The one pass over the images: each is read, checked, decoded, hashed and encoded once, into spool files.

Every worker process appends to a spool file of its own and hands back places, not pixels, so memory stays flat
and nothing large crosses a pipe. What is stored depends on the image alone, never on the worker.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from isal.isal_zlib import crc32
from PIL import Image

from fastflower.core import workers
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.core.files import digest
from fastflower.data.betons.beton_file import JPEG, RAW, Picture
from fastflower.data.decode.kernel import decode_file
from fastflower.data.duplicates import phash
from fastflower.data.readers.image_files import (
    LONGEST,
    decode,
    encode_jpeg,
    inspect,
    stored,
    stored_size,
    suits,
)
from fastflower.data.readers.sources import Source

CHUNK = 16  # images a task: small enough for an even end, large enough to hide the pipe
BLOB = np.dtype(
    [
        ("file", "u4"),
        ("mode", "u1"),
        ("height", "u2"),
        ("width", "u2"),
        ("offset", "u8"),
        ("size", "u4"),
        ("crc", "u4"),
    ]
)
TRAIN, VAL, PIXELS = 0, 1, 2  # columns of Spool.blobs: as trainings see it, as validation does, without loss
COLUMNS = 3


@dataclass(frozen=True)
class Encoding:
    """How images are stored: all that a worker must know."""

    source: Source
    folder: str  # of the spool files
    side: int
    raw: bool
    quality: int
    corrupting: bool  # corrupted copies will be made of the pixels of rows that may validate
    hashing: bool


@dataclass
class Spool:
    """What the pass left, by row: places of the encoded images (N, count, 3), content and perceptual hashes."""

    folder: Path
    blobs: np.ndarray
    sha256: list[str]
    hashes: np.ndarray
    hashed: np.ndarray
    problems: list[str]
    misnamed: list[str]  # the format of a file whose name says another, else ''

    def __post_init__(self) -> None:
        self._open: dict[int, int] = {}

    def read(self, rows: np.ndarray, column: int) -> Iterator[list[Picture]]:
        """The stored image of each of some rows, or the two of a pair."""
        for at in range(0, len(rows), CHUNK):  # columns of numbers become Python's own some rows at a time
            for blobs in self.blobs[rows[at : at + CHUNK], :, column].tolist():
                yield [self._read(*blob) for blob in blobs]

    def pixels(self, row: int) -> np.ndarray:
        """What training sees of a row's first image: uint8 (H, W, 3)."""
        one = self._read(*self.blobs[row, 0, TRAIN].tolist())
        if one.mode == RAW:
            return np.frombuffer(one.data, np.uint8).reshape(one.height, one.width, 3)
        return decode_file(bytes(one.data), (one.height, one.width), (one.height, one.width))

    def _read(
        self, file: int, mode: int, height: int, width: int, offset: int, size: int, crc: int
    ) -> Picture:
        if file not in self._open:
            self._open[file] = os.open(_spool_path(self.folder, file), os.O_RDONLY)
        data = os.pread(self._open[file], size, offset)
        if len(data) != size:
            raise EnvironmentFault(
                f"{self.folder}: a spool file is shorter than what was written; run convert again"
            )
        return Picture(mode, data, height, width, crc)

    def close(self) -> None:
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()


@dataclass
class _Part:
    blobs: np.ndarray
    sha256: list[str]
    hashes: list[int | None]
    problems: list[str]
    misnamed: list[str]


def run(
    encoding: Encoding,
    filenames: list[str],
    *,
    validating: np.ndarray,
    count: int,
    tell: Callable[[int], None],
) -> Spool:
    """Encode every file; `validating` (bool (N,)) says which may validate.

    `tell` hears of rows done.

    Unreadable images are reported in `problems` (else ''), never raised. EnvironmentFault when the disk is full or
    a worker dies.
    """
    n = len(filenames)
    spool = Spool(
        Path(encoding.folder),
        np.zeros((n, encoding.source.count, COLUMNS), BLOB),
        [""] * n,
        np.zeros(n, np.uint64),
        np.zeros(n, bool),
        [""] * n,
        [""] * n,
    )
    tasks = ((filenames[at : at + CHUNK], validating[at : at + CHUNK].tolist()) for at in range(0, n, CHUNK))
    at = 0
    encoding.source.load()
    work = functools.partial(_encode_files, encoding)
    for part in workers.run(work, tasks, count=min(count, -(-n // CHUNK)), tell=tell):
        size = len(part.sha256)
        span = slice(at, at + size)
        spool.blobs[span], spool.sha256[span], spool.problems[span] = part.blobs, part.sha256, part.problems
        spool.misnamed[span] = part.misnamed
        spool.hashed[span] = [one is not None for one in part.hashes]
        spool.hashes[span] = [one or 0 for one in part.hashes]
        at += size
    return spool


def _encode_files(encoding: Encoding, filenames: list[str], validating: list[bool]) -> _Part:
    path = _spool_path(Path(encoding.folder), os.getpid())
    n, count = len(filenames), encoding.source.count
    part = _Part(np.zeros((n, count, COLUMNS), BLOB), [], [None] * n, [""] * n, [""] * n)
    try:
        with open(path, "ab") as file:
            for row, (name, validates) in enumerate(zip(filenames, validating, strict=True)):
                content = [
                    _encode_image(
                        encoding, name, place=place, validates=validates, file=file, part=part, row=row
                    )
                    for place in range(count)
                ]
                # of a pair's two images in either order
                part.sha256.append(content[0] if count == 1 else digest(*sorted(content)))
                workers.beat()
    except OSError as error:
        raise EnvironmentFault(
            f"{path}: cannot write ({error.strerror}); free the disk or move data.home"
        ) from None
    return part


def _encode_image(
    encoding: Encoding, name: str, *, place: int, validates: bool, file: IO[bytes], part: _Part, row: int
) -> str:
    """Everything about one image; returns its hash, taken of the very bytes that are decoded and stored."""
    try:
        data = encoding.source.read(name, place)
        if isinstance(data, np.ndarray):
            small, content, kept = _numbers(data)
        else:
            small, content, kept, form = _file(data, encoding.side)
            part.misnamed[row] = "" if suits(name, form) else form
    except InputError as error:
        part.problems[row] = str(error)
        return ""
    small = stored(small, encoding.side)
    pixels = np.asarray(small)
    if encoding.hashing:
        part.hashes[row] = phash(small)
    blobs = part.blobs[row, place]
    if encoding.raw:
        blobs[:] = _write(file, RAW, pixels=pixels)
    elif kept and isinstance(data, bytes):
        blobs[[TRAIN, VAL]] = _write(file, JPEG, pixels=pixels, data=data)
        if validates and encoding.corrupting:
            blobs[PIXELS] = _write(file, RAW, pixels=pixels)
    else:
        blobs[TRAIN] = _write(file, JPEG, pixels=pixels, data=encode_jpeg(pixels, encoding.quality))
        if validates:  # its pixels are never lossy a second time
            blobs[[VAL, PIXELS]] = _write(file, RAW, pixels=pixels)
    return content


def _file(data: bytes, side: int) -> tuple[Image.Image, str, bool, str]:
    """A file's picture, not larger than it is stored if that is cheap; its hash; whether it is kept; its format.

    JPEGs go through the training's own decoder, so a beton never holds one that it would refuse.
    """
    header, content = inspect(data), hashlib.sha256(data).hexdigest()
    if not header.jpeg:
        return decode(data), content, False, header.form
    size = (header.image.height, header.image.width)
    if header.turn is not None:
        upright = Image.fromarray(decode_file(data, size, size)).transpose(header.turn)
        return upright, content, False, header.form
    wanted = stored_size(*size, side)
    kept = wanted == size and max(size) <= LONGEST * side
    return Image.fromarray(decode_file(data, size, wanted)), content, kept, header.form


def _numbers(pixels: np.ndarray) -> tuple[Image.Image, str, bool]:
    """The picture of an array; its hash, of shape and numbers."""
    content = hashlib.sha256(str(pixels.shape).encode())
    content.update(np.ascontiguousarray(pixels).data)
    return Image.fromarray(pixels).convert("RGB"), content.hexdigest(), False


def _write(file: IO[bytes], mode: int, *, pixels: np.ndarray, data: bytes | None = None) -> tuple[int, ...]:
    """Append the file `data`, or the pixels themselves; returns the BLOB record."""
    offset, content = file.tell(), np.ascontiguousarray(pixels).data if data is None else data
    size, crc = file.write(content), crc32(content)
    return os.getpid(), mode, pixels.shape[0], pixels.shape[1], offset, size, crc


def _spool_path(folder: Path, file: int) -> Path:
    return folder / f"spool-{file}"
