"""The photographs that `bench loader` measures on, and the files that contenders make of them."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastflower.data.betons.beton_file import Beton, BetonWriter, manifest_path, open_beton
from fastflower.recipe import derived

SCALE, RATIO = (0.8, 1.0), (3 / 4, 4 / 3)
Epoch = Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class Pictures:
    """Photographs on disk, and a folder for the files that contenders make of them."""

    files: tuple[Path, ...]
    work: Path
    batch: int = 64

    @functools.cached_property
    def data(self) -> list[bytes]:
        return [file.read_bytes() for file in self.files]

    def beton(self, kind: str, side: int) -> Beton:
        """Our beton of the original files, or brought down to a short side as JPEG quality 90 or raw pixels."""
        path = self.work / f"{kind}{side}.beton"
        if not manifest_path(path).exists():
            with BetonWriter(path, len(self.files)) as writer:
                for i, data in enumerate(self.data):
                    if kind == "original":
                        width, height = Image.open(io.BytesIO(data)).size
                        writer.jpeg(data, height, width=width, label=0, index=i)
                        continue
                    image = Image.open(io.BytesIO(data)).convert("RGB")
                    scale = side / min(image.size)
                    image = image.resize((round(image.width * scale), round(image.height * scale)))
                    if kind == "raw":
                        writer.raw(np.asarray(image), 0, i)
                    else:
                        file = io.BytesIO()
                        image.save(file, "JPEG", quality=90)
                        writer.jpeg(file.getvalue(), image.height, width=image.width, label=0, index=i)
                writer.commit({})
        return open_beton(path)

    def ffcv(self, mode: str) -> Path:
        """A stock FFCV beton of at most 512 pixels a side."""
        path = self.work / f"ffcv_{mode}.beton"
        if not path.exists():
            from fastflower.data.decode.ffcv_loader import write_stock

            rows = [(Image.open(file).convert("RGB"), 0) for file in self.files]
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                write_stock(path, rows, mode=mode)
        return path


def stored_side(size: int) -> int:
    """The short side that a recipe with this largest size would store; 288 leaves 224 room for larger views."""
    return {224: 288, 320: 366}.get(size, derived.resize_side(size, 1.14))


def photographs(folder: Path, most: int) -> tuple[Path, ...]:
    """The first `most` JPEG files of a folder, by name; 0: all."""
    files = sorted(
        Path(entry.path) for entry in os.scandir(folder) if entry.name.lower().endswith((".jpg", ".jpeg"))
    )
    return tuple(files[: most or None])


def pooled(items: list[Any], batch: int, *, threads: int, some: Callable[[list[Any]], Any]) -> Epoch:
    """Batches of items, each worked on by one thread of a pool, two ahead of the reader."""
    parts = [items[i : i + batch] for i in range(0, len(items), batch)]
    pool = ThreadPoolExecutor(threads)

    def epoch() -> Iterator[Any]:
        waiting = [pool.submit(some, part) for part in parts[: threads + 2]]
        for i in range(len(parts)):
            yield waiting.pop(0).result()
            if i + threads + 2 < len(parts):
                waiting.append(pool.submit(some, parts[i + threads + 2]))

    return epoch
