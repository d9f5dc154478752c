"""FFCV's own Loader: the kernel of decode.c as its operations, and as it comes, to compare with.

fastflower's loaders use none of this. FFCV swallows exceptions of its decoders, so an undecodable row becomes
black and `check` raises it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.state import State
from ffcv.transforms import RandomHorizontalFlip, ToTensor
from ffcv.writer import DatasetWriter

from fastflower.core import seeding
from fastflower.core.errors import CorruptionError
from fastflower.data.decode.kernel import Crop, library


class _Settings(ctypes.Structure):
    _fields_ = [
        ("crop", ctypes.c_double * 5),
        ("factor", ctypes.c_double),
        ("base", ctypes.c_uint64),
        ("train", ctypes.c_int64),
        ("cubic", ctypes.c_int64),
        ("failed", ctypes.c_int64),
    ]


class _Decoder(SimpleRGBImageDecoder):
    """Make one per Loader. `size` (h, w) may change between epochs without compiling again."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self._settings = _Settings()

    def check(self, path: Path) -> None:
        """Raise CorruptionError when a row could not be decoded so far."""
        if self._settings.failed:
            row = self._settings.failed - 1
            raise CorruptionError(f"{path}: row {row} cannot be decoded; run convert again")

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, dtype = (*self.size, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        read, one, span = self.memory_read, library().ff_one, Compiler.get_iterator()
        settings = ctypes.addressof(self._settings)

        def decode(indices, out, metadata, storage):  # type: ignore[no-untyped-def]
            for i in span(len(indices)):
                row = metadata[np.int64(indices[i]) & 0xFFFFFFFF]
                data = read(row["data_ptr"], storage)
                height, width = np.int64(row["height"]), np.int64(row["width"])
                one(
                    data.ctypes.data, data.size, height, width, np.int64(row["mode"]), np.uint64(indices[i]),
                    settings, out[i].ctypes.data, out.shape[1], out.shape[2],
                )  # fmt: skip
            return out[: len(indices)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode


class TrainDecoder(_Decoder):
    """`decode_train` for FFCV: the key of row r at position p comes from index p << 32 | r, plain r meaning p = 0."""

    def __init__(self, size: tuple[int, int], crop: Crop, seed: int) -> None:
        super().__init__(size)
        self.seed = seed
        self._settings.train = 1
        self._settings.crop = (ctypes.c_double * 5)(*crop.pack())
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the crops of another epoch from the next batch on."""
        seed = seeding.mix(self.seed & seeding.MASK)
        self._settings.base = int(seeding.mix(seed ^ np.uint64(epoch)))


class EvalDecoder(_Decoder):
    """`decode_eval` for FFCV."""

    def __init__(self, size: tuple[int, int], factor: float, interpolation: str) -> None:
        super().__init__(size)
        self._settings.factor, self._settings.cubic = factor, int(interpolation == "bicubic")


def write_stock(
    path: Path, rows: Sequence[tuple[Any, int]], *, mode: str, workers: int = 1, longest: int = 512
) -> None:
    """(image, label) rows by FFCV's writer as "jpg" or "raw", at most `longest` pixels a side, quality 90."""
    fields = {
        "image": RGBImageField(write_mode=mode, max_resolution=longest, jpeg_quality=90),
        "label": IntField(),
    }
    DatasetWriter(str(path), fields, num_workers=workers).from_indexed_dataset(rows)


def stock_loader(path: Path, size: tuple[int, int], *, crop: Crop, batch: int, threads: int) -> Loader:
    """FFCV's loader with its own decoder, crop and flip, over a beton with fields image and label."""
    image = [
        RandomResizedCropRGBImageDecoder(size, crop.scale, crop.ratio),
        RandomHorizontalFlip(crop.hflip_p),
    ]
    return Loader(
        str(path),
        batch_size=batch,
        num_workers=threads,
        order=OrderOption.SEQUENTIAL,
        os_cache=True,
        drop_last=False,
        pipelines={"image": [*image, ToTensor()], "label": [IntDecoder(), ToTensor()]},
    )
