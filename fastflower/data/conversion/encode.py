"""Encoding: each image is read, checked, decoded, hashed and encoded once, into spool files.

Every worker process appends to its own spool file and returns offsets, not pixels, so memory stays flat and little
crosses the pipe. On a cluster every shard of the rows has a file of its own, which appears when it is whole: a shard
whose node was lost is encoded again. The stored bytes depend on the image alone, never on the worker.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from isal.isal_zlib import crc32
from PIL import Image

from fastflower.core import files, workers
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.core.files import digest
from fastflower.data.betons.beton_file import JPEG, RAW, EncodedImage
from fastflower.data.decode.kernel import decode_file
from fastflower.data.duplicates import phash
from fastflower.data.readers.image_files import (
    MAX_ASPECT,
    Header,
    decode,
    encode_jpeg,
    inspect,
    matches_format,
    stored,
    stored_size,
)
from fastflower.data.readers.jpeg_endings import completed
from fastflower.data.readers.sources import Source

CHUNK = 16  # rows a task: small enough for workers to finish together, large enough to hide the pipe
SHARD = 1024  # most rows of a shard, the task of a cluster: seconds of work, and what a lost node costs
SHARDS = 4  # least shards a core, so that the nodes finish together
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
TRAIN, VAL, PIXELS = (
    0,
    1,
    2,
)  # columns of Spool.blobs: for training, for validation, lossless for corrupted copies
COLUMNS = 3


@dataclass(frozen=True)
class Encoding:
    """Everything a worker must know to encode an image."""

    source: Source
    folder: str  # of the spool files
    side: int  # stored short side in pixels
    raw: bool
    quality: int  # of JPEGs
    corrupting: bool  # keep the pixels of rows that may validate, for corrupted copies
    hashing: bool  # compute perceptual hashes


@dataclass
class Spool:
    """The encoded rows, in the order of their names.

    blobs: BLOB (N, images per row, COLUMNS), the place of each encoded image in the spool files. sha256: content
    hash. hashes: perceptual hash uint64 (N,), valid where hashed, bool (N,). problems: the reason why a row cannot be
    used, else ''. misnamed: the format of a file whose name suggests another, else ''.
    """

    folder: Path
    blobs: np.ndarray
    sha256: list[str]
    hashes: np.ndarray
    hashed: np.ndarray
    problems: list[str]
    misnamed: list[str]

    def __post_init__(self) -> None:
        self._handles: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": {}}  # a copy in another process opens the files itself

    def read(self, rows: np.ndarray, column: int) -> Iterator[list[EncodedImage]]:
        """Yield the encoded images of each row: one, or two for pairs."""
        for first in range(0, len(rows), CHUNK):  # tolist() by chunk: fast, and memory stays flat
            for blobs in self.blobs[rows[first : first + CHUNK], :, column].tolist():
                yield [self._read(blob) for blob in blobs]

    def pixels(self, row: int) -> np.ndarray:
        """The first image of a row as training sees it: uint8 (H, W, 3)."""
        image = self._read(self.blobs[row, 0, TRAIN].tolist())
        if image.mode == RAW:
            return np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)
        size = (image.height, image.width)
        return decode_file(bytes(image.data), size, size)

    def _read(self, blob: Sequence[int]) -> EncodedImage:
        file, mode, height, width, offset, size, crc = blob
        if file not in self._handles:
            self._handles[file] = os.open(_spool_path(self.folder, file), os.O_RDONLY)
        data = os.pread(self._handles[file], size, offset)
        if len(data) != size:
            raise EnvironmentFault(f"{self.folder}: a spool file was truncated; run convert again")
        return EncodedImage(mode, data, height=height, width=width, crc=crc)

    def close(self) -> None:
        """Close the spool files."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


@dataclass(frozen=True)
class Machine:
    """The processes that convert: of this machine, or with `shards` those of a cluster."""

    processes: int
    map_ordered: workers.MapOrdered = workers.map_ordered
    shards: bool = False

    def rows_a_task(self, rows: int) -> int:
        """The rows that a task encodes."""
        if not self.shards:
            return CHUNK
        return min(SHARD, max(CHUNK, -(-rows // (SHARDS * self.processes))))


@dataclass
class _EncodedChunk:
    """The fields of Spool for the rows of one task; hashes are None where not computed."""

    blobs: np.ndarray
    sha256: list[str]
    hashes: list[int | None]
    problems: list[str]
    misnamed: list[str]


def encode_rows(
    encoding: Encoding,
    names: list[str],
    *,
    validating: np.ndarray,
    machine: Machine,
    on_progress: Callable[[int], None],
) -> Spool:
    """Encode the rows of these names; `validating` (bool (N,)) marks rows that may validate.

    `on_progress(done)` is called with the rows finished so far. Unreadable images are reported in `problems`, never
    raised. Raises EnvironmentFault when the disk is full or a worker dies.
    """
    n = len(names)
    spool = Spool(
        folder=Path(encoding.folder),
        blobs=np.zeros((n, encoding.source.images_per_row, COLUMNS), BLOB),
        sha256=[""] * n,
        hashes=np.zeros(n, np.uint64),
        hashed=np.zeros(n, bool),
        problems=[""] * n,
        misnamed=[""] * n,
    )
    size = machine.rows_a_task(n)
    tasks = (
        (
            names[first : first + size],
            validating[first : first + size].tolist(),
            first if machine.shards else None,
        )
        for first in range(0, n, size)
    )
    encoding.source.load()
    work = functools.partial(_encode_chunk, encoding)
    first = 0
    for chunk in machine.map_ordered(
        work, tasks, count=min(machine.processes, -(-n // size)), on_progress=on_progress
    ):
        span = slice(first, first + len(chunk.sha256))
        spool.blobs[span], spool.sha256[span] = chunk.blobs, chunk.sha256
        spool.problems[span], spool.misnamed[span] = chunk.problems, chunk.misnamed
        spool.hashed[span] = [value is not None for value in chunk.hashes]
        spool.hashes[span] = [value or 0 for value in chunk.hashes]
        first = span.stop
    return spool


def _encode_chunk(
    encoding: Encoding, names: list[str], validating: list[bool], shard: int | None
) -> _EncodedChunk:
    """Encode rows into the spool file of this process or, on a cluster, of the shard, by its first row."""
    number = os.getpid() if shard is None else shard
    path = _spool_path(Path(encoding.folder), number)
    n, images = len(names), encoding.source.images_per_row
    chunk = _EncodedChunk(
        blobs=np.zeros((n, images, COLUMNS), BLOB),
        sha256=[],
        hashes=[None] * n,
        problems=[""] * n,
        misnamed=[""] * n,
    )
    try:
        with open(path, "ab") if shard is None else _whole(path) as file:
            for row, (name, validates) in enumerate(zip(names, validating, strict=True)):
                hashes = [
                    _encode_image(
                        encoding, name, number=number, validates=validates, file=file, chunk=chunk, row=row
                    )
                    for number in range(images)
                ]
                chunk.sha256.append(_row_hash(hashes))
                workers.count_done()
        chunk.blobs["file"] = number
    except OSError as error:
        raise EnvironmentFault(
            f"{path}: cannot write ({error.strerror}); free the disk or move data.home"
        ) from None
    return chunk


def _encode_image(
    encoding: Encoding,
    name: str,
    *,
    number: int,
    validates: bool,
    file: IO[bytes],
    chunk: _EncodedChunk,
    row: int,
) -> str:
    """Encode image `number` of a row into `file` and `chunk`; return the hash of the very bytes that were decoded.

    A file that cannot be decoded has its hash too; one that cannot be read has none.
    """
    sha256 = ""
    try:
        data = encoding.source.read(name, number)
        sha256 = _sha256(data)
        if isinstance(data, np.ndarray):
            decoded = _Decoded(Image.fromarray(data).convert("RGB"))
        else:
            decoded = _decode_file(data, encoding.side)
            chunk.misnamed[row] = "" if matches_format(name, decoded.format) else decoded.format
    except EnvironmentFault:  # the machine's, not this file's
        raise
    except InputError as error:
        chunk.problems[row] = str(error)
        return sha256
    image = stored(decoded.image, encoding.side)
    pixels = np.asarray(image)
    if encoding.hashing:
        chunk.hashes[row] = phash(image)
    blobs = chunk.blobs[row, number]
    if encoding.raw:
        blobs[:] = _append(file, RAW, pixels=pixels)
    elif decoded.file:
        blobs[[TRAIN, VAL]] = _append(file, JPEG, pixels=pixels, data=decoded.file)
        if validates and encoding.corrupting:
            blobs[PIXELS] = _append(file, RAW, pixels=pixels)
    else:
        blobs[TRAIN] = _append(file, JPEG, pixels=pixels, data=encode_jpeg(pixels, encoding.quality))
        if validates:  # stored without loss: a second JPEG compression would change what is scored
            blobs[[VAL, PIXELS]] = _append(file, RAW, pixels=pixels)
    return sha256


class _Decoded(NamedTuple):
    """A decoded image; file: the JPEG to store as it is, empty if it must be encoded again."""

    image: Image.Image
    file: bytes = b""
    format: str = ""


def _decode_file(data: bytes, side: int) -> _Decoded:
    """Decode a file; a JPEG with all its pixels is given a plain ending if it lacks one."""
    header = inspect(data)
    if not header.is_jpeg:
        return _Decoded(decode(data), format=header.format)
    try:
        return _decode_jpeg(header, data, side)
    except InputError:
        whole = completed(data, (header.image.height, header.image.width))
        if whole is None:
            raise
        return _decode_jpeg(header, whole, side)


def _decode_jpeg(header: Header, data: bytes, side: int) -> _Decoded:
    """Decode a JPEG, reduced while decoding where that is cheap.

    It goes through the training's own decoder, so a beton never holds one that training would refuse.
    """
    size = (header.image.height, header.image.width)
    if header.turn is not None:
        upright = Image.fromarray(decode_file(data, size, size)).transpose(header.turn)
        return _Decoded(upright, format=header.format)
    reduced = stored_size(*size, side)
    keeps_file = reduced == size and max(size) <= MAX_ASPECT * side
    image = Image.fromarray(decode_file(data, size, reduced))
    return _Decoded(image, data if keeps_file else b"", header.format)


def content_of(source: Source, name: str) -> str:
    """The hash of a row's images as folds.csv records it."""
    return _row_hash([_sha256(source.read(name, number)) for number in range(source.images_per_row)])


def _row_hash(hashes: list[str]) -> str:
    """The hash of a row from those of its images; that of a pair does not depend on their order."""
    return hashes[0] if len(hashes) == 1 else digest(*sorted(hashes))


def _sha256(image: bytes | np.ndarray) -> str:
    """Hash of a file, or of the shape and pixels of an array."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    sha256 = hashlib.sha256(str(image.shape).encode())
    sha256.update(np.ascontiguousarray(image).data)
    return sha256.hexdigest()


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """Context manager: a file to write that appears at `path` when it is whole, and may be written twice."""
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        yield file


def _append(file: IO[bytes], mode: int, *, pixels: np.ndarray, data: bytes | None = None) -> tuple[int, ...]:
    """Append the JPEG file `data`, or without it the pixels; return the fields of a BLOB, all but its file."""
    offset, content = file.tell(), np.ascontiguousarray(pixels).data if data is None else data
    size, crc = file.write(content), crc32(content)
    return 0, mode, pixels.shape[0], pixels.shape[1], offset, size, crc


def _spool_path(folder: Path, file: int) -> Path:
    return folder / f"spool-{file}"
