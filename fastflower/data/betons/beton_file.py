"""Betons: FFCV's file format (version 2, fields image, label, index), and its reader.

A row that is a pair has a second image field behind the first: `image_b`.
A beton opens in `ffcv.reader.Reader` and in `ffcv.loader.Loader`. Beside it lies a manifest, `<beton>.json`,
with a CRC-32 for every image; it is written last, so a beton without one was never finished.
Layout: header | field descriptors | metadata (32 bytes a row) | row data | allocation table.
"""

from __future__ import annotations

import copy
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from isal.isal_zlib import crc32

from fastflower.core.errors import CorruptionError, InputError
from fastflower.core.records import read_record
from fastflower.data.betons.manifest import Manifest, Origin, manifest_path

JPEG, RAW = 0, 1
VERIFY_CHUNK = 256  # images that a thread checks at a time
CHANGED = "its bytes have changed since convert wrote them"
RESTORE = (
    "delete it and run convert again (python -m fastflower.convert)"  # convert keeps betons of the right size
)

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE_TYPE, INTEGER_TYPE = 2, 1  # FFCV's type ids of RGBImageField and IntField
IMAGE_FIELDS = ("image", "image_b")
INTEGER_FIELDS = ("label", "index")

# (device, inode, size, time of the last write, checksum of the head) of a file -> the images of it that this process
# has checked: bool (rows * images_per_row,). Kept by file, because each member of an ensemble opens its fold anew.
_checked: dict[tuple[int, ...], np.ndarray] = {}

# the decoder's description of an image; `Row` in decode.c
DESCRIPTOR = np.dtype(
    [("offset", "u8"), ("size", "u8"), ("height", "i4"), ("width", "i4"), ("mode", "i4"), ("pad", "i4")]
)


class EncodedImage(NamedTuple):
    """An image as a beton stores it; crc is the CRC-32 of data where it is already known.

    mode: JPEG, and data is a file; or RAW, and data is uint8 (height, width, 3).
    """

    mode: int
    data: bytes | memoryview
    height: int
    width: int
    crc: int | None = None


def metadata_type(images_per_row: int) -> np.dtype:
    """The metadata of a row, as FFCV lays it out."""
    return np.dtype(
        [
            *((name, IMAGE) for name in IMAGE_FIELDS[:images_per_row]),
            *((name, "<i8") for name in INTEGER_FIELDS),
        ],
        align=True,
    )


class Beton:
    """An open beton: columns of its rows and read-only access to their bytes.

    rows: number of rows. labels, index: int64 (N,). descriptors: DESCRIPTOR (N,), for the decoder.
    images_per_row: 2 for pairs, else 1; `descriptors` is of the first image, `second` has those of the other.
    Readers that are open keep the old content when the file is replaced.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.rows, self.images_per_row = manifest.rows, manifest.images_per_row
        with open(path, "rb") as file:  # mapped and described from one handle, so that both are of one file
            status = os.fstat(file.fileno())
            self.data = np.memmap(file, np.uint8, mode="r")
        if self.data.size != manifest.size:
            raise _wrong_size(path, self.data.size, manifest)
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, manifest.head_crc)
        self._checked = _checked.setdefault(identity, np.zeros(self.rows * self.images_per_row, bool))
        start, kind = metadata_start(self.images_per_row), metadata_type(self.images_per_row)
        self._metadata_end = start + self.rows * kind.itemsize
        self._allocation_start = self.data.size - self.rows * self.images_per_row * ALLOCATION.itemsize
        self._check_head()
        self._metadata = self.data[start : self._metadata_end].view(kind)
        self._allocation = self.data[self._allocation_start :].view(ALLOCATION)
        self.labels = self._metadata["label"].astype(np.int64)
        self.index = self._metadata["index"].astype(np.int64)
        self.descriptors = self._descriptors(0)

    @property
    def origin(self) -> Origin:
        """The data, folds and settings it was converted from."""
        if self.manifest.origin is None:
            raise InputError(f"{self.path} was not written by convert; run convert")
        return self.manifest.origin

    @cached_property
    def second(self) -> Beton:
        """The same rows, with the descriptors of the second image of each pair."""
        if self.images_per_row < 2:
            raise InputError(f"{self.path}: its rows hold one image each; data.form=pairs makes two")
        view = copy.copy(self)
        view.descriptors = self._descriptors(1)
        return view

    def _descriptors(self, image: int) -> np.ndarray:
        """Offset, size, shape and mode of the first (0) or second (1) image of each row: DESCRIPTOR (N,)."""
        descriptors = np.zeros(self.rows, DESCRIPTOR)
        allocation = self._allocation[image :: self.images_per_row]
        descriptors["offset"], descriptors["size"] = allocation["ptr"], allocation["size"]
        for name in ("height", "width", "mode"):
            descriptors[name] = self._metadata[IMAGE_FIELDS[image]][name]
        return descriptors

    def row(self, row: int) -> np.ndarray:
        """The stored bytes of one row: a JPEG file, or pixels; uint8 (size,), a view of the file."""
        start = int(self.descriptors["offset"][row])
        return self.data[start : start + int(self.descriptors["size"][row])]

    def verify(self, threads: int = 4) -> None:
        """Read the whole file against its checksums; raises CorruptionError with the first damaged row."""
        self._check_head()
        starts = self._allocation["ptr"].astype(np.int64)
        ends = starts + self._allocation["size"].astype(np.int64)
        previous_ends = np.concatenate([[self._metadata_end], ends[:-1]])
        checksums = self._checksums
        mapped = cast(mmap.mmap, self.data.base)

        def is_damaged(image: int) -> bool:
            gap = self.data[previous_ends[image] : starts[image]]
            data = self.data[starts[image] : ends[image]]
            return crc32(data.data) != checksums[image] or bool(gap.any())

        def first_damaged(images: range) -> int | None:
            low, high = int(previous_ends[images[0]]) // mmap.PAGESIZE * mmap.PAGESIZE, int(ends[images[-1]])
            mapped.madvise(mmap.MADV_WILLNEED, low, high - low)
            damaged = next((image for image in images if is_damaged(image)), None)
            mapped.madvise(mmap.MADV_DONTNEED, low, high - low)  # keeps memory flat
            return damaged

        spans = [
            range(first, min(first + VERIFY_CHUNK, len(starts)))
            for first in range(0, len(starts), VERIFY_CHUNK)
        ]
        with ThreadPoolExecutor(threads) as pool:
            for image in pool.map(first_damaged, spans):
                if image is not None:
                    raise self.damage(image // self.images_per_row, CHANGED)
        if ends[-1] != self._allocation_start:
            raise CorruptionError(f"{self.path}: bytes behind the last row; {RESTORE}")
        self._checked[:] = True

    def verify_rows(self, rows: np.ndarray) -> None:
        """Read rows (N,) against their checksums; those that this process has checked before cost nothing.

        One core checks about 3 GB/s. Raises CorruptionError with the first damaged row.
        """
        images = np.asarray(rows, np.int64)[:, None] * self.images_per_row + np.arange(self.images_per_row)
        unchecked = images[~self._checked[images]]
        if not len(unchecked):
            return
        checksums = self._checksums
        for image in unchecked.tolist():
            start, size = int(self._allocation["ptr"][image]), int(self._allocation["size"][image])
            if crc32(self.data[start : start + size].data) != checksums[image]:
                raise self.damage(image // self.images_per_row, CHANGED)
            self._checked[image] = True

    @cached_property
    def _checksums(self) -> np.ndarray:
        return self.manifest.checksums()

    def damage(self, row: int, reason: str) -> CorruptionError:
        """An error that names a row of this beton and of folds.csv."""
        return CorruptionError(
            f"{self.path}: row {row} (row {self.index[row]} of folds.csv): {reason}; {RESTORE}"
        )

    def _check_head(self) -> None:
        head, tail = self.data[: self._metadata_end].data, self.data[self._allocation_start :].data
        fits = self._allocation_start >= self._metadata_end
        if not fits or crc32(tail, crc32(head)) != self.manifest.head_crc:
            raise CorruptionError(f"{self.path}: header, metadata or allocations are damaged; {RESTORE}")


def open_beton(path: Path) -> Beton:
    """Open a finished beton; its rows' checksums are left to `verify` and to the functions that read rows.

    A conversion may replace it at that moment: beton and manifest are of one conversion. Raises InputError when it is
    missing or convert did not finish, CorruptionError when it is damaged.
    """
    path = Path(path)
    while True:
        before = _generation(path)
        try:
            beton = _open_once(path)
        except InputError:
            if _generation(path) == before:
                raise
        else:
            if _generation(path) == before:
                return beton


def _generation(path: Path) -> list[int]:
    """The inodes of a beton and its manifest, as far as they exist."""
    return [file.stat().st_ino for file in (path, manifest_path(path)) if file.exists()]


def _open_once(path: Path) -> Beton:
    if not path.is_file():
        raise InputError(f"no beton {path}; run convert")
    if not manifest_path(path).is_file():
        raise InputError(f"{path} has no manifest: convert did not finish; run convert again")
    manifest = read_record(manifest_path(path), Manifest)
    if not manifest.is_consistent:
        raise CorruptionError(
            f"{manifest_path(path)}: rows and checksums differ in number; run convert again"
        )
    size = path.stat().st_size
    if size != manifest.size:  # before mapping: an empty file cannot be mapped
        raise _wrong_size(path, size, manifest)
    return Beton(path, manifest)


def _wrong_size(path: Path, size: int, manifest: Manifest) -> CorruptionError:
    return CorruptionError(f"{path}: {size} bytes, its manifest says {manifest.size}; run convert again")


def metadata_start(images_per_row: int) -> int:
    """Offset of the metadata in the file."""
    return HEADER.itemsize + (images_per_row + len(INTEGER_FIELDS)) * FIELD.itemsize
