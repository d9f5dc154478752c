"""FFCV's own writer, decoder and loader, as a baseline for the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import RandomHorizontalFlip, ToTensor
from ffcv.writer import DatasetWriter

from fastflower.data.decode.kernel import Crop


def write_stock(
    path: Path, rows: Sequence[tuple[Any, int]], *, mode: str, workers: int = 1, longest: int = 512
) -> None:
    """Write (image, label) rows with FFCV's writer as "jpg" or "raw", at most `longest` pixels a side, quality 90."""
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
