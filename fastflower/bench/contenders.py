"""Contenders of `bench loader`: each turns the same photographs into uint8 training batches.

A contender is a function of (Pictures, size, threads) that returns an epoch function: every call iterates over all
photographs once and yields after each batch. Libraries are imported inside the functions, so a library that is not
installed is skipped and no contender pays for the imports of another.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from fastflower.bench import peers
from fastflower.bench.pictures import RATIO, SCALE, Epoch, Pictures, pooled, stored_side
from fastflower.core.errors import EnvironmentFault
from fastflower.data.decode.kernel import Crop, library


def fastflower(pictures: Pictures, size: int, threads: int, *, kind: str) -> Epoch:
    from fastflower.data.loaders import TrainLoader

    beton = pictures.beton(kind, 0 if kind == "original" else stored_side(size))
    beton.verify()  # as train does at its start, so that no epoch pays for checksums
    order = np.resize(np.arange(beton.rows), -(-beton.rows // pictures.batch) * pictures.batch)
    loader = TrainLoader(
        beton, lambda epoch: order, seed=0, batch=lambda epoch: pictures.batch, size=lambda epoch: (size, size),
        crop=Crop(SCALE, RATIO, 0.5), threads=threads,
    )  # fmt: skip
    return lambda: iter(loader)


def decoding_alone(pictures: Pictures, size: int, threads: int, *, entropy_only: int) -> Epoch:
    """Decoding alone by libjpeg-turbo in fastflower's kernel, without writing batches."""
    beton, kernel = pictures.beton("original", 0), library()
    rows = [(int(row["offset"]), int(row["size"])) for row in beton.descriptors]

    def decode(batch: list[tuple[int, int]]) -> None:
        for offset, length in batch:
            kernel.ff_limit(beton.data.ctypes.data + offset, length, entropy_only)

    return pooled(rows, pictures.batch, threads=threads, process=decode)


def ffcv(pictures: Pictures, size: int, threads: int, *, mode: str) -> Epoch:
    from fastflower.bench.stock_ffcv import stock_loader

    loader = stock_loader(
        pictures.ffcv(mode), (size, size), crop=Crop(SCALE, RATIO, 0.5), batch=pictures.batch, threads=threads
    )
    STOCK_LOADERS.append(loader)
    return lambda: iter(loader)


# kept alive until the process ends: numba prints a KeyError when one is freed
STOCK_LOADERS: list[Iterable[Any]] = []
STOCK = "ffcv jpeg 512 q90"
CONTENDERS: dict[str, Callable[[Pictures, int, int], Epoch]] = {
    STOCK: functools.partial(ffcv, mode="jpg"),
    "ffcv raw 512": functools.partial(ffcv, mode="raw"),
    "DataLoader + PIL + torchvision": peers.torchvision,
    "OpenCV linear": functools.partial(peers.opencv, decoder="opencv"),
    "simplejpeg + OpenCV linear": functools.partial(peers.opencv, decoder="simplejpeg"),
    "DALI": functools.partial(peers.dali, quick=False),
    "DALI, quick settings": functools.partial(peers.dali, quick=True),
    "SPDL": peers.spdl,
    "TensorFlow": functools.partial(peers.tensorflow, quick=False),
    "TensorFlow, quick settings": functools.partial(peers.tensorflow, quick=True),
    "libjpeg-turbo full decode alone": functools.partial(decoding_alone, entropy_only=0),
    "libjpeg-turbo entropy decoding alone": functools.partial(decoding_alone, entropy_only=1),
    "fastflower original bytes": functools.partial(fastflower, kind="original"),
    "fastflower pre-scaled jpeg": functools.partial(fastflower, kind="jpeg"),
    "fastflower pre-scaled raw": functools.partial(fastflower, kind="raw"),
}
NEEDS = {
    "ffcv": "ffcv",
    "simplejpeg": "simplejpeg",
    "DALI": "nvidia.dali",
    "SPDL": "spdl.io",
    "TensorFlow": "tensorflow",
}


def missing(name: str) -> str | None:
    """Name of the library that a contender needs and this environment lacks, else None."""
    if "SPDL" in name and not any(_loads(f"libavdevice.so.{version}") for version in range(58, 63)):
        return "FFmpeg"
    module = next((module for word, module in NEEDS.items() if word in name), "numpy")
    try:
        return None if importlib.util.find_spec(module) else module
    except ModuleNotFoundError:  # the parent package is missing
        return module


def check_stock() -> None:
    """Raise EnvironmentFault where FFCV, with which the others are compared, is not installed."""
    if missing(STOCK):
        raise EnvironmentFault(
            "this compares with FFCV, which is not installed; pip install -e '.[ffcv]' builds it (needs "
            "libturbojpeg0-dev, libopencv-dev and pkg-config); everything else works without"
        )


def _loads(library: str) -> bool:
    try:
        return bool(ctypes.CDLL(library))
    except OSError:
        return False


def available() -> list[str]:
    """The contenders whose libraries are installed."""
    return [name for name in CONTENDERS if not missing(name)]
