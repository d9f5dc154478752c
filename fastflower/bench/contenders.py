"""Who takes part in `bench loader`: each turns the same photographs into uint8 training batches in its own way.

A contender is a function of (Pictures, size, threads) that returns an endless supply of epochs: a callable that
goes over all pictures once and yields after every batch. Libraries are imported inside, so that what is not
installed does not take part and nobody pays for another's imports.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastflower import derived
from fastflower.data.betons import Beton, BetonWriter, manifest_path, open_beton
from fastflower.data.decode import Crop, library

BATCH = 64
SCALE, RATIO = (0.8, 1.0), (3 / 4, 4 / 3)
Epoch = Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class Pictures:
    """Photographs on disk, and a folder for the files that contenders make of them."""

    files: tuple[Path, ...]
    work: Path

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
                        writer.jpeg(data, height, width, 0, i)
                        continue
                    image = Image.open(io.BytesIO(data)).convert("RGB")
                    scale = side / min(image.size)
                    image = image.resize((round(image.width * scale), round(image.height * scale)))
                    if kind == "raw":
                        writer.raw(np.asarray(image), 0, i)
                    else:
                        file = io.BytesIO()
                        image.save(file, "JPEG", quality=90)
                        writer.jpeg(file.getvalue(), image.height, image.width, 0, i)
                writer.commit({})
        return open_beton(path)

    def ffcv(self, mode: str) -> Path:
        """A stock FFCV beton of at most 512 pixels a side."""
        path = self.work / f"ffcv_{mode}.beton"
        if not path.exists():
            from fastflower.data.operations import write_stock

            rows = [(Image.open(file).convert("RGB"), 0) for file in self.files]
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                write_stock(path, rows, mode)
        return path


def stored_side(size: int) -> int:
    """The short side that a recipe with this largest size would store; 288 leaves 224 room for larger views."""
    return {224: 288, 320: 366}.get(size, derived.resize_side(size, 1.14))


def ours(pictures: Pictures, size: int, threads: int, kind: str) -> Epoch:
    from fastflower.data.loaders import TrainLoader

    beton = pictures.beton(kind, 0 if kind == "original" else stored_side(size))
    order = np.resize(np.arange(beton.rows), -(-beton.rows // BATCH) * BATCH)
    loader = TrainLoader(
        beton, lambda epoch: order, 0, lambda epoch: BATCH, lambda epoch: (size, size), Crop(SCALE, RATIO, 0.5),
        threads=threads,
    )  # fmt: skip
    return lambda: iter(loader)


def limit(pictures: Pictures, size: int, threads: int, entropy_only: int) -> Epoch:
    """libjpeg-turbo alone through our kernel, writing no batch."""
    beton, kernel = pictures.beton("original", 0), library()
    rows = [(int(row["offset"]), int(row["size"])) for row in beton.table]

    def some(part: list[tuple[int, int]]) -> None:
        for offset, length in part:
            kernel.ff_limit(beton.data.ctypes.data + offset, length, entropy_only)

    return _pooled(rows, threads, some)


def ffcv(pictures: Pictures, size: int, threads: int, mode: str) -> Epoch:
    from fastflower.data.operations import stock_loader

    loader = stock_loader(pictures.ffcv(mode), (size, size), Crop(SCALE, RATIO, 0.5), BATCH, threads)
    return lambda: iter(loader)


class _Folder:
    """torchvision's usual training dataset."""

    def __init__(self, files: tuple[Path, ...], size: int) -> None:
        from torchvision import transforms

        self.files = files
        self.transform = transforms.Compose(
            [transforms.RandomResizedCrop(size, SCALE, RATIO), transforms.RandomHorizontalFlip(), np.array]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> np.ndarray:
        pixels: np.ndarray = self.transform(Image.open(self.files[i]).convert("RGB"))
        return pixels


def torchvision(pictures: Pictures, size: int, threads: int) -> Epoch:
    from torch.utils.data import DataLoader

    dataset: Any = _Folder(pictures.files, size)
    loader = DataLoader(dataset, BATCH, num_workers=threads, persistent_workers=True)
    return lambda: iter(loader)


def opencv(pictures: Pictures, size: int, threads: int, decoder: str) -> Epoch:
    """A pool of threads: decode, crop, resize linearly, flip."""
    import cv2

    cv2.setNumThreads(0)
    if decoder == "simplejpeg":
        from simplejpeg import decode_jpeg as decode
    else:

        def decode(data: bytes) -> np.ndarray:
            pixels: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)

    def some(part: list[bytes]) -> np.ndarray:
        batch = np.empty((len(part), size, size, 3), np.uint8)
        for i, data in enumerate(part):
            pixels = decode(data)
            height, width = pixels.shape[:2]
            area = random.uniform(*SCALE)
            ratio = random.uniform(max(RATIO[0], area), min(RATIO[1], 1 / area))
            h = max(1, min(height, round((height * width * area / ratio) ** 0.5)))
            w = max(1, min(width, round((height * width * area * ratio) ** 0.5)))
            top, left = random.randint(0, height - h), random.randint(0, width - w)
            view = cv2.resize(
                pixels[top : top + h, left : left + w], (size, size), interpolation=cv2.INTER_LINEAR
            )
            batch[i] = view[:, ::-1] if random.random() < 0.5 else view
        return batch

    return _pooled(pictures.data, threads, some)


def _pooled(items: list[Any], threads: int, some: Callable[[list[Any]], Any]) -> Epoch:
    """Batches of items, each worked on by one thread of a pool, two ahead of the reader."""
    parts = [items[i : i + BATCH] for i in range(0, len(items), BATCH)]
    pool = ThreadPoolExecutor(threads)

    def epoch() -> Iterator[Any]:
        waiting = [pool.submit(some, part) for part in parts[: threads + 2]]
        for i in range(len(parts)):
            yield waiting.pop(0).result()
            if i + threads + 2 < len(parts):
                waiting.append(pool.submit(some, parts[i + threads + 2]))

    return epoch


STOCK = "ffcv jpeg 512 q90"
CONTENDERS: dict[str, Callable[[Pictures, int, int], Epoch]] = {
    STOCK: functools.partial(ffcv, mode="jpg"),
    "ffcv raw 512": functools.partial(ffcv, mode="raw"),
    "DataLoader + PIL + torchvision": torchvision,
    "OpenCV linear": functools.partial(opencv, decoder="opencv"),
    "simplejpeg + OpenCV linear": functools.partial(opencv, decoder="simplejpeg"),
    "libjpeg-turbo full decode alone": functools.partial(limit, entropy_only=0),
    "libjpeg-turbo entropy decoding alone": functools.partial(limit, entropy_only=1),
    "fastflower original bytes": functools.partial(ours, kind="original"),
    "fastflower pre-scaled jpeg": functools.partial(ours, kind="jpeg"),
    "fastflower pre-scaled raw": functools.partial(ours, kind="raw"),
}
NEEDS = {"simplejpeg + OpenCV linear": "simplejpeg"}


def taking_part() -> list[str]:
    """The contenders whose libraries are installed."""
    return [name for name in CONTENDERS if importlib.util.find_spec(NEEDS.get(name, "numpy"))]


def photographs(folder: Path, most: int) -> tuple[Path, ...]:
    """The first `most` JPEG files of a folder, by name; 0: all."""
    files = sorted(
        Path(entry.path) for entry in os.scandir(folder) if entry.name.lower().endswith((".jpg", ".jpeg"))
    )
    return tuple(files[: most or None])
