"""Betons: FFCV's file format (version 2, fields image, label, index), written so that it is whole or not there.

A row of a pair has a second field of its kind behind image: `image_b`.
A beton opens in `ffcv.reader.Reader` and in `ffcv.loader.Loader`. Beside it lies a manifest, `<beton>.json`,
with a CRC-32 for every row; it is written last, so a beton without one was never finished.
Layout: header | field descriptors | metadata (32 bytes a row) | row data | allocation table.
"""

from __future__ import annotations

import contextlib
import copy
import json
import mmap
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, cast

import numpy as np
from isal.isal_zlib import crc32

from fastflower.core import files
from fastflower.core.errors import CorruptionError, EnvironmentFault, InputError

JPEG, RAW = 0, 1
PAGE = 1 << 23  # no row crosses a page; grows when a row is larger
LARGEST_PAGE = 1 << 31

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
FIELDS = (("label", 1), ("index", 1))  # names and FFCV's numbers of IntField; images, its 2, come before
PLACES = ("image", "image_b")

ROW = np.dtype(
    [("offset", "u8"), ("size", "u8"), ("height", "i4"), ("width", "i4"), ("mode", "i4"), ("pad", "i4")]
)


def manifest_path(path: Path) -> Path:
    """`fold0_train.beton` -> `fold0_train.beton.json`."""
    return path.with_name(path.name + ".json")


class Picture(NamedTuple):
    """An encoded image: JPEG or RAW, its bytes, height, width, and the CRC-32 of the bytes where it is known."""

    mode: int
    data: bytes | memoryview
    height: int
    width: int
    crc: int | None = None


def metadata_type(images: int) -> np.dtype:
    """The metadata of a row of one image or two, as FFCV lays it out."""
    return np.dtype(
        [*((name, IMAGE) for name in PLACES[:images]), *((name, "<i8") for name, _ in FIELDS)], align=True
    )


class BetonWriter:
    """Write `rows` images, or pairs of images, in order; nothing opens as a beton before `commit`.

    The same images give the same bytes. Raises EnvironmentFault when the disk refuses.
    """

    def __init__(self, path: Path, rows: int, images: int = 1) -> None:
        if rows < 1:
            raise InputError(f"{path}: a beton needs at least one row")
        self.path, self.images = Path(path), images
        self._aside = files.aside_of(self.path)
        self._metadata = np.zeros(rows, metadata_type(images))
        self._allocation = np.zeros(rows * images, ALLOCATION)
        self._crc = np.zeros(rows * images, np.uint32)
        self._written = 0  # images
        self._page = PAGE
        self._offset = _start(images) + self._metadata.nbytes
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            files.sweep(self.path.parent, self.path.name)
            self._file: IO[bytes] = self._aside.open("wb", buffering=1 << 20)
        except OSError as error:
            raise self._refusal(error) from None

    def jpeg(self, data: bytes, height: int, *, width: int, label: int, index: int) -> None:
        """Append a JPEG file; height and width are those in its header."""
        self.append(label, index, Picture(JPEG, data, height, width))

    def raw(self, pixels: np.ndarray, label: int, index: int) -> None:
        """Append uint8 pixels (H, W, 3)."""
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise InputError(f"{self.path}: raw rows are uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}")
        height, width, _ = pixels.shape
        self.append(label, index, Picture(RAW, np.ascontiguousarray(pixels).data.cast("B"), height, width))

    def append(self, label: int, index: int, *pictures: Picture) -> None:
        """Append a row of as many images as the beton's rows have."""
        row = self._written // self.images
        if row == len(self._metadata):
            raise InputError(f"{self.path}: more rows than the {row} announced")
        if len(pictures) != self.images:
            raise InputError(f"{self.path}: a row of {len(pictures)} images; {self.images} were announced")
        for name, picture in zip(PLACES, pictures, strict=False):
            start = self._append(row, picture)
            self._metadata[name][row] = (picture.mode, picture.width, picture.height, start)
        self._metadata["label"][row], self._metadata["index"][row] = label, index

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Finish the file, read back every row from the disk, and put beton and then manifest in place."""
        rows = len(self._metadata)
        written = self._written // self.images
        if written != rows:
            raise InputError(f"{self.path}: {written} rows written, {rows} announced; nothing was committed")
        head = self._head()
        try:
            self._file.write(self._allocation.data.cast("B"))
            self._file.seek(0)
            self._file.write(head)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            size = self._aside.stat().st_size
            whole = {
                **manifest,
                "rows": rows,
                "images": self.images,
                "size": size,
                "head_crc": crc32(self._allocation.data.cast("B"), crc32(head)),
                "crc": self._crc.tolist(),
            }
            self._read_back(whole)
            # an old manifest must not vouch for the new file
            manifest_path(self.path).unlink(missing_ok=True)
            files.replace_atomic(self._aside, self.path)
            files.write_atomic(manifest_path(self.path), json.dumps(whole, ensure_ascii=False) + "\n")
        except OSError as error:
            raise self._refusal(error) from None
        finally:
            self.discard()

    def discard(self) -> None:
        """Drop what is not committed."""
        with contextlib.suppress(OSError):  # a full disk refuses the last flush too; the file goes anyway
            self._file.close()
        self._aside.unlink(missing_ok=True)

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def _append(self, row: int, picture: Picture) -> int:
        """Write an image's bytes; returns where they begin."""
        _, data, height, width, crc = picture
        size = len(data)
        if not (0 < height < 1 << 16 and 0 < width < 1 << 16) or not 0 < size <= LARGEST_PAGE:
            raise InputError(
                f"{self.path}: row {row} is {height} x {width}, {size} bytes; sides reach 65535, bytes 2^31"
            )
        while size > self._page:  # a larger power of two keeps every earlier row inside one page
            self._page *= 2
        start = self._offset
        if start // self._page != (start + size - 1) // self._page:
            start = -(-start // self._page) * self._page
        try:
            if start != self._offset or not self._written:  # a seek empties the buffer
                self._file.seek(start)
            self._file.write(data)
            if (start + size) // PAGE != self._offset // PAGE and hasattr(os, "posix_fadvise"):
                # the disk writes while we work, and fsync finds little left to do
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            self.discard()
            raise self._refusal(error) from None
        self._allocation[self._written] = (row, start, size)
        self._crc[self._written] = crc32(data) if crc is None else crc
        self._written += 1
        self._offset = start + size
        return start

    def _head(self) -> bytes:
        header, fields = np.zeros(1, HEADER), np.zeros(self.images + len(FIELDS), FIELD)
        header[0] = (2, len(fields), self._page, len(self._metadata), self._offset)
        for field, (name, type_id) in zip(
            fields, (*((name, 2) for name in PLACES[: self.images]), *FIELDS), strict=True
        ):
            field["type_id"] = type_id
            field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        return header.tobytes() + fields.tobytes() + self._metadata.tobytes()

    def _read_back(self, manifest: dict[str, Any]) -> None:
        with open(self._aside, "rb") as file:
            if hasattr(os, "posix_fadvise"):  # read what the disk holds, not what memory does
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        Beton(self._aside, manifest).verify()

    def _refusal(self, error: OSError) -> EnvironmentFault:
        return EnvironmentFault(
            f"{self.path}: cannot write ({error.strerror}); free the disk or choose another data.home"
        )


class Beton:
    """An open beton: columns of its rows and read-only access to their bytes.

    rows: their number. labels, index: int64 (N,). heights, widths: int32 (N,). table: ROW (N,) for the decoder.
    images: 2 for pairs, else 1; the columns are those of the first image, `second` has those of the other.
    The mapping keeps the file's inode, so replacing the file leaves a running reader alone.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.rows, self.images = int(manifest["rows"]), int(manifest.get("images", 1))
        self.data = np.memmap(path, np.uint8, mode="r")
        if self.data.size != manifest["size"]:
            raise CorruptionError(
                f"{path}: {self.data.size} bytes, its manifest says {manifest['size']}; run convert again"
            )
        start, kind = _start(self.images), metadata_type(self.images)
        self._metadata_end = start + self.rows * kind.itemsize
        self._allocation_start = self.data.size - self.rows * self.images * ALLOCATION.itemsize
        self._check_head()
        self._metadata = self.data[start : self._metadata_end].view(kind)
        self._allocation = self.data[self._allocation_start :].view(ALLOCATION)
        self.labels = self._metadata["label"].astype(np.int64)
        self.index = self._metadata["index"].astype(np.int64)
        self._show(0)

    @cached_property
    def second(self) -> Beton:
        """The same rows, seen with the second image of each pair."""
        if self.images < 2:
            raise InputError(f"{self.path}: its rows hold one image each; data.form=pairs makes two")
        other = copy.copy(self)
        other._show(1)
        return other

    def _show(self, place: int) -> None:
        """Fill the columns of the image at a place of each row."""
        self.table = np.zeros(self.rows, ROW)
        allocation = self._allocation[place :: self.images]
        self.table["offset"], self.table["size"] = allocation["ptr"], allocation["size"]
        for name in ("height", "width", "mode"):
            self.table[name] = self._metadata[PLACES[place]][name]
        self.heights, self.widths = self.table["height"].copy(), self.table["width"].copy()

    def row(self, row: int) -> np.ndarray:
        """The stored bytes of one row: a JPEG file, or pixels; uint8 (size,), a view of the file."""
        start = int(self.table["offset"][row])
        return self.data[start : start + int(self.table["size"][row])]

    def verify(self, threads: int = 4) -> None:
        """Read the whole file against its checksums; raises CorruptionError with the first damaged row."""
        self._check_head()
        starts = self._allocation["ptr"].astype(np.int64)
        ends = starts + self._allocation["size"].astype(np.int64)
        before = np.concatenate([[self._metadata_end], ends[:-1]])
        mapped = cast(mmap.mmap, self.data.base)

        def damaged(part: int) -> bool:
            gap, data = self.data[before[part] : starts[part]], self.data[starts[part] : ends[part]]
            return crc32(data.data) != self.manifest["crc"][part] or bool(gap.any())

        def first_damaged(span: range) -> int | None:
            low, high = int(before[span[0]]) // mmap.PAGESIZE * mmap.PAGESIZE, int(ends[span[-1]])
            mapped.madvise(mmap.MADV_WILLNEED, low, high - low)
            found = next((part for part in span if damaged(part)), None)
            mapped.madvise(mmap.MADV_DONTNEED, low, high - low)  # the pages read so far go: memory stays flat
            return found

        spans = [range(at, min(at + 256, len(starts))) for at in range(0, len(starts), 256)]
        with ThreadPoolExecutor(threads) as pool:
            for part in pool.map(first_damaged, spans):
                if part is not None:
                    row = part // self.images
                    raise self.damage(row, "its bytes have changed since convert wrote them")
        if ends[-1] != self._allocation_start:
            raise CorruptionError(f"{self.path}: bytes behind the last row; run convert again")

    def damage(self, row: int, what: str) -> CorruptionError:
        """The error that names a row of this beton and of the label table."""
        return CorruptionError(
            f"{self.path}: row {row} (row {self.index[row]} of folds.csv): {what}; run convert again"
        )

    def _check_head(self) -> None:
        head, tail = self.data[: self._metadata_end].data, self.data[self._allocation_start :].data
        fits = self._allocation_start >= self._metadata_end
        if not fits or crc32(tail, crc32(head)) != self.manifest["head_crc"]:
            raise CorruptionError(
                f"{self.path}: header, metadata or allocations are damaged; run convert again"
            )


def open_beton(path: Path) -> Beton:
    """Open a finished beton; its rows' checksums are left to `verify`.

    Raises InputError when it is missing or convert did not finish, CorruptionError when it is damaged.
    """
    path, beside = Path(path), manifest_path(Path(path))
    if not path.is_file():
        raise InputError(f"no beton {path}; run convert")
    if not beside.is_file():
        raise InputError(f"{path} has no manifest: convert did not finish; run convert again")
    try:
        manifest = json.loads(beside.read_text(encoding="utf-8"))
        numbers = [manifest["rows"], manifest["size"], manifest["head_crc"], *manifest["crc"]]
        parts = manifest["rows"] * manifest.get("images", 1)
        whole = all(type(n) is int for n in numbers) and parts == len(manifest["crc"]) > 0
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CorruptionError(f"{beside}: not the manifest of a beton; run convert again")
    if path.stat().st_size != manifest["size"]:  # before mapping: an empty file cannot be mapped
        raise CorruptionError(
            f"{path}: {path.stat().st_size} bytes, its manifest says {manifest['size']}; run convert again"
        )
    return Beton(path, manifest)


def _start(images: int) -> int:
    """Where the metadata begin."""
    return HEADER.itemsize + (images + len(FIELDS)) * FIELD.itemsize
