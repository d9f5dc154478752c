"""Writes betons atomically: the file under a temporary name, verified as the disk returns it, then its manifest."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from isal.isal_zlib import crc32

from fastflower import __version__
from fastflower.core import files
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.core.records import write_record
from fastflower.data.betons.beton_file import (
    ALLOCATION,
    FIELD,
    HEADER,
    IMAGE_FIELDS,
    IMAGE_TYPE,
    INTEGER_FIELDS,
    INTEGER_TYPE,
    JPEG,
    RAW,
    Beton,
    EncodedImage,
    metadata_start,
    metadata_type,
)
from fastflower.data.betons.manifest import Manifest, Origin, manifest_path, pack_checksums

PAGE = 1 << 23  # bytes; no image crosses a page, so the page grows to the largest image
LARGEST_PAGE = 1 << 31


class BetonWriter:
    """Writes `rows` images, or pairs of images, in order; no reader sees the file before `commit`.

    The same images give the same bytes. Raises EnvironmentFault when the disk refuses a write.
    """

    def __init__(self, path: Path, rows: int, *, images_per_row: int = 1) -> None:
        if rows < 1:
            raise InputError(f"{path}: a beton needs at least one row")
        self.path, self.images_per_row = Path(path), images_per_row
        self._temporary = files.temporary_path(self.path)
        self._metadata = np.zeros(rows, metadata_type(images_per_row))
        self._allocation = np.zeros(rows * images_per_row, ALLOCATION)
        self._crc = np.zeros(rows * images_per_row, np.uint32)
        self._written = 0  # images
        self._page = PAGE
        self._offset = metadata_start(images_per_row) + self._metadata.nbytes
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            files.remove_abandoned(self.path.parent, self.path.name)
            self._file: IO[bytes] = self._temporary.open("wb", buffering=1 << 20)
        except OSError as error:
            raise self._write_error(error) from None

    def append_jpeg(self, data: bytes, *, height: int, width: int, label: int, index: int) -> None:
        """Append a JPEG file; height and width are those in its header."""
        self.append(label, index, EncodedImage(JPEG, data, height=height, width=width))

    def append_raw(self, pixels: np.ndarray, label: int, index: int) -> None:
        """Append uint8 pixels (H, W, 3)."""
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise InputError(f"{self.path}: raw rows are uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}")
        height, width, _ = pixels.shape
        data = np.ascontiguousarray(pixels).data.cast("B")
        self.append(label, index, EncodedImage(RAW, data, height=height, width=width))

    def append(self, label: int, index: int, *images: EncodedImage) -> None:
        """Append a row of one image, or two for pairs."""
        row = self._written // self.images_per_row
        if row == len(self._metadata):
            raise InputError(f"{self.path}: more rows than the {row} announced")
        if len(images) != self.images_per_row:
            raise InputError(
                f"{self.path}: a row of {len(images)} images; {self.images_per_row} were announced"
            )
        for name, image in zip(IMAGE_FIELDS, images, strict=False):
            start = self._append(row, image)
            self._metadata[name][row] = (image.mode, image.width, image.height, start)
        self._metadata["label"][row], self._metadata["index"][row] = label, index

    def commit(self, origin: Origin | None = None) -> None:
        """Finish the file, verify every row as the disk returns it, and move the beton, then its manifest, in place."""
        rows = len(self._metadata)
        written = self._written // self.images_per_row
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
            size = self._temporary.stat().st_size
            manifest = Manifest(
                fastflower=__version__,
                rows=rows,
                images_per_row=self.images_per_row,
                size=size,
                head_crc=crc32(self._allocation.data.cast("B"), crc32(head)),
                crc=pack_checksums(self._crc),
                origin=origin,
            )
            self._read_back(manifest)
            # an old manifest must not vouch for the new file
            manifest_path(self.path).unlink(missing_ok=True)
            files.replace_atomic(self._temporary, self.path)
            write_record(manifest_path(self.path), manifest)
        except OSError as error:
            raise self._write_error(error) from None
        finally:
            self.discard()

    def discard(self) -> None:
        """Close and delete the temporary file, if it is not committed."""
        with contextlib.suppress(OSError):  # a full disk refuses the last flush too
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def _append(self, row: int, image: EncodedImage) -> int:
        """Write an image's bytes and return their offset in the file."""
        _, data, height, width, crc = image
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
                # starts writing to the disk now, so that the final fsync is short
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            self.discard()
            raise self._write_error(error) from None
        self._allocation[self._written] = (row, start, size)
        self._crc[self._written] = crc32(data) if crc is None else crc
        self._written += 1
        self._offset = start + size
        return start

    def _head(self) -> bytes:
        types = dict.fromkeys(IMAGE_FIELDS[: self.images_per_row], IMAGE_TYPE) | dict.fromkeys(
            INTEGER_FIELDS, INTEGER_TYPE
        )
        header, fields = np.zeros(1, HEADER), np.zeros(len(types), FIELD)
        header[0] = (2, len(fields), self._page, len(self._metadata), self._offset)
        for field, (name, type_id) in zip(fields, types.items(), strict=True):
            field["type_id"] = type_id
            field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        return header.tobytes() + fields.tobytes() + self._metadata.tobytes()

    def _read_back(self, manifest: Manifest) -> None:
        with open(self._temporary, "rb") as file:
            if hasattr(os, "posix_fadvise"):  # drops cached pages, so that the disk is read
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        Beton(self._temporary, manifest).verify()

    def _write_error(self, error: OSError) -> EnvironmentFault:
        return EnvironmentFault(
            f"{self.path}: cannot write ({error.strerror}); free the disk or choose another data.home"
        )
