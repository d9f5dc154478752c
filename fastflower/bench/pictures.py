"""The photographs of the benchmarks, and the betons that contenders convert them to."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastflower.data.betons.beton_file import Beton, open_beton
from fastflower.data.betons.beton_writer import BetonWriter
from fastflower.data.betons.manifest import manifest_path
from fastflower.data.readers.image_folders import list_images
from fastflower.recipe import derived

SCALE, RATIO = (0.8, 1.0), (3 / 4, 4 / 3)
Epoch = Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class Pictures:
    """Photographs on disk, with a folder `work` for converted files."""

    files: tuple[Path, ...]
    work: Path
    batch: int = 64

    @functools.cached_property
    def data(self) -> list[bytes]:
        return [file.read_bytes() for file in self.files]

    def beton(self, kind: str, side: int) -> Beton:
        """A fastflower beton of "original" bytes, or of images with this short side as "jpeg" (quality 90) or "raw"."""
        path = self.work / f"{kind}{side}.beton"
        if not manifest_path(path).exists():
            with BetonWriter(path, len(self.files)) as writer:
                for i, data in enumerate(self.data):
                    if kind == "original":
                        width, height = Image.open(io.BytesIO(data)).size
                        writer.append_jpeg(data, height=height, width=width, label=0, index=i)
                        continue
                    image = Image.open(io.BytesIO(data)).convert("RGB")
                    scale = side / min(image.size)
                    image = image.resize((round(image.width * scale), round(image.height * scale)))
                    if kind == "raw":
                        writer.append_raw(np.asarray(image), 0, i)
                    else:
                        file = io.BytesIO()
                        image.save(file, "JPEG", quality=90)
                        writer.append_jpeg(
                            file.getvalue(), height=image.height, width=image.width, label=0, index=i
                        )
                writer.commit()
        return open_beton(path)

    def ffcv(self, mode: str) -> Path:
        """A stock FFCV beton of at most 512 pixels a side."""
        path = self.work / f"ffcv_{mode}.beton"
        if not path.exists():
            from fastflower.bench.stock_ffcv import write_stock

            rows = [(Image.open(file).convert("RGB"), 0) for file in self.files]
            with contextlib.redirect_stderr(io.StringIO()):  # hides its progress bar
                write_stock(path, rows, mode=mode)
        return path


def stored_side(size: int) -> int:
    """Short side that a recipe with this largest image size would store."""
    return {224: 288, 320: 366}.get(size, derived.resize_side(size, 1.14))


def photographs(folder: Path, limit: int) -> tuple[Path, ...]:
    """The first `limit` JPEG files of a folder and of those in it, by name; 0: all."""
    files = [folder / name for name in list_images(folder).images if name.lower().endswith((".jpg", ".jpeg"))]
    return tuple(files[: limit or None])


def pooled(items: list[Any], batch: int, *, threads: int, process: Callable[[list[Any]], Any]) -> Epoch:
    """Process batches of items in a thread pool, one batch per thread and two in advance."""
    batches = [items[i : i + batch] for i in range(0, len(items), batch)]
    pool = ThreadPoolExecutor(threads)

    def epoch() -> Iterator[Any]:
        waiting = [pool.submit(process, items) for items in batches[: threads + 2]]
        for i in range(len(batches)):
            yield waiting.pop(0).result()
            if i + threads + 2 < len(batches):
                waiting.append(pool.submit(process, batches[i + threads + 2]))

    return epoch
