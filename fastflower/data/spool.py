"""The one pass over the images: each is read, checked, decoded, hashed and encoded once, into spool files.

Every worker process appends to a spool file of its own and hands back places, not pixels, so memory stays flat
and nothing large crosses a pipe. What is stored depends on the image alone, never on the worker.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import itertools
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import IO, cast

import numpy as np
from PIL import Image

from fastflower.data.betons import JPEG, RAW, ROW, Beton, Picture
from fastflower.data.corruptions import corrupt, image_key, jpeg_bytes
from fastflower.data.decode import decode_eval
from fastflower.data.duplicates import phash
from fastflower.data.pixels import decode, encode_jpeg, stored
from fastflower.data.sources import Source
from fastflower.errors import CorruptionError, EnvironmentFault, InputError
from fastflower.runs import digest

CHUNK = 16  # images a task: small enough for an even end, large enough to hide the pipe
PATIENCE = 300.0  # seconds after which a task that says nothing is given up
BLOB = np.dtype(
    [("file", "u4"), ("mode", "u1"), ("height", "u2"), ("width", "u2"), ("offset", "u8"), ("size", "u4")]
)
TRAIN, VAL, CORRUPT = 0, 1, 2  # columns of Spool.blobs; corruptions from the third on
Task = tuple[list[str], list[bool]]


@dataclass(frozen=True)
class Encoding:
    """How images are stored: all that a worker must know."""

    source: Source
    folder: str  # of the spool files
    side: int
    raw: bool
    quality: int
    combos: tuple[tuple[str, str], ...]
    hashing: bool


@dataclass
class Spool:
    """What the pass left, by row: places of the encoded images (N, count, 2 + K), content and perceptual hashes."""

    folder: Path
    blobs: np.ndarray
    sha256: list[str]
    hashes: np.ndarray
    hashed: np.ndarray
    problems: list[str]

    def __post_init__(self) -> None:
        self._open: dict[int, int] = {}

    def read(self, row: int, column: int) -> list[Picture]:
        """The stored image of a row, or the two of a pair."""
        return [self._read(blob) for blob in self.blobs[row, :, column]]

    def _read(self, blob: np.void) -> Picture:
        file = int(blob["file"])
        if file not in self._open:
            self._open[file] = os.open(_spool_path(self.folder, file), os.O_RDONLY)
        data = os.pread(self._open[file], int(blob["size"]), int(blob["offset"]))
        if len(data) != blob["size"]:
            raise EnvironmentFault(
                f"{self.folder}: a spool file is shorter than what was written; run convert again"
            )
        return Picture(int(blob["mode"]), data, int(blob["height"]), int(blob["width"]))

    def close(self) -> None:
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()


@dataclass
class _Part:
    blobs: np.ndarray
    sha256: list[str]
    hashes: list[int | None]
    problems: list[str]


def run(
    encoding: Encoding,
    filenames: list[str],
    validating: np.ndarray,
    workers: int,
    tell: Callable[[int], None],
) -> Spool:
    """Encode every file; `validating` (bool (N,)) says which may validate and so get corrupted copies.

    `tell` hears of rows done.

    Unreadable images are reported in `problems` (else ''), never raised. EnvironmentFault when the disk is full or
    a worker dies.
    """
    n = len(filenames)
    spool = Spool(
        Path(encoding.folder),
        np.zeros((n, encoding.source.count, CORRUPT + len(encoding.combos)), BLOB),
        [""] * n,
        np.zeros(n, np.uint64),
        np.zeros(n, bool),
        [""] * n,
    )
    tasks = ((filenames[at : at + CHUNK], validating[at : at + CHUNK].tolist()) for at in range(0, n, CHUNK))
    at = 0
    encoding.source.load()
    for part in _in_order(encoding, tasks, min(workers, -(-n // CHUNK))):
        size = len(part.sha256)
        span = slice(at, at + size)
        spool.blobs[span], spool.sha256[span], spool.problems[span] = part.blobs, part.sha256, part.problems
        spool.hashed[span] = [one is not None for one in part.hashes]
        spool.hashes[span] = [one or 0 for one in part.hashes]
        at += size
        tell(at)
    return spool


def _in_order(encoding: Encoding, tasks: Iterator[Task], workers: int) -> Iterator[_Part]:
    """Results in the order of the tasks, with a bounded number under way."""
    if workers <= 1:
        yield from (_encode_files(encoding, *task) for task in tasks)
        return
    # fork: this process has one thread and its pages are shared; a spawned worker would import for seconds
    pool = ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (os.getpid(), encoding))
    try:
        yield from _windowed(pool, tasks, 2 * workers + 2)
    except BrokenProcessPool:
        raise EnvironmentFault(
            "a worker process was killed, most likely for memory; lower data.workers or free memory, then run again"
        ) from None
    except FutureTimeout:
        _kill(pool)
        raise EnvironmentFault(
            f"no image finished within {PATIENCE:.0f} s; check the disk that holds data.root, then run again"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _windowed(pool: Executor, tasks: Iterator[Task], window: int) -> Iterator[_Part]:
    waiting = deque(pool.submit(_work, *task) for task in itertools.islice(tasks, window))
    while waiting:
        yield waiting.popleft().result(PATIENCE)
        waiting.extend(pool.submit(_work, *task) for task in itertools.islice(tasks, 1))


_inherited: Encoding  # of a worker: handed over by fork, as arrays of images are too large for a pipe


def _start_worker(parent: int, encoding: Encoding) -> None:
    """Workers leave Ctrl-C to the parent and die with it, however it dies."""
    global _inherited
    _inherited = encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()


def _work(filenames: list[str], validating: list[bool]) -> _Part:
    return _encode_files(_inherited, filenames, validating)


def _encode_files(encoding: Encoding, filenames: list[str], validating: list[bool]) -> _Part:
    path = _spool_path(Path(encoding.folder), os.getpid())
    n, count = len(filenames), encoding.source.count
    part = _Part(np.zeros((n, count, CORRUPT + len(encoding.combos)), BLOB), [], [None] * n, [""] * n)
    try:
        with open(path, "ab") as file:
            for row, (name, validates) in enumerate(zip(filenames, validating, strict=True)):
                content = [
                    _encode_image(encoding, name, place, validates, file, part, row) for place in range(count)
                ]
                # of a pair's two images in either order
                part.sha256.append(content[0] if count == 1 else digest(*sorted(content)))
    except OSError as error:
        raise EnvironmentFault(
            f"{path}: cannot write ({error.strerror}); free the disk or move data.home"
        ) from None
    return part


def _encode_image(
    encoding: Encoding, name: str, place: int, validates: bool, file: IO[bytes], part: _Part, row: int
) -> str:
    """Everything about one image; returns its hash, taken of the very bytes that are decoded and stored."""
    try:
        data = encoding.source.read(name, place)
        if isinstance(data, np.ndarray):
            image, plain, content = Image.fromarray(data).convert("RGB"), False, pixels_hash(data)
        else:
            image, plain = decode(data)
            if data.startswith(b"\xff\xd8"):
                _refuse_flawed(data)
            content = hashlib.sha256(data).hexdigest()
    except InputError as error:
        part.problems[row] = str(error)
        return ""
    small = stored(image, encoding.side)
    pixels = np.asarray(small)
    if encoding.hashing:
        part.hashes[row] = phash(small)
    blobs = part.blobs[row, place]
    if encoding.raw:
        blobs[TRAIN] = blobs[VAL] = _write(file, RAW, pixels)
    elif plain and small is image and isinstance(data, bytes):
        blobs[TRAIN] = blobs[VAL] = _write(file, JPEG, pixels, data)
    else:
        blobs[TRAIN] = _write(file, JPEG, pixels, encode_jpeg(pixels, encoding.quality))
        if validates:  # its pixels are never lossy a second time
            blobs[VAL] = _write(file, RAW, pixels)
    key = image_key(name if place == 0 else f"{name}:{place}")
    for column, (kind, level) in enumerate(encoding.combos if validates else (), CORRUPT):
        if kind == "jpeg" and not encoding.raw:
            blobs[column] = _write(file, JPEG, pixels, jpeg_bytes(pixels, level))
            continue
        bad = corrupt(pixels, kind, level, key)
        packed = None if encoding.raw else encode_jpeg(bad, encoding.quality)
        blobs[column] = _write(file, RAW if encoding.raw else JPEG, bad, packed)
    return content


def pixels_hash(pixels: np.ndarray) -> str:
    """The content of an image that is no file: of its shape and its numbers."""
    found = hashlib.sha256(str(pixels.shape).encode())
    found.update(np.ascontiguousarray(pixels).data)
    return found.hexdigest()


def _refuse_flawed(data: bytes) -> None:
    """Raise what libjpeg warns of: Pillow keeps silent, and most such pictures show garbage.

    The training's own decoder looks, so a beton never holds a JPEG that it would refuse.
    """
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        (width, height), mode = image.size, image.mode
    if mode not in ("RGB", "L"):
        return
    table = np.array([(0, len(data), height, width, JPEG, 0)], ROW)
    one = SimpleNamespace(rows=1, data=np.frombuffer(data, np.uint8), table=table)
    one.damage = lambda row, what: CorruptionError(what)
    out = np.empty((1, max(1, height // 8), max(1, width // 8), 3), np.uint8)
    decode_eval(cast(Beton, one), np.zeros(1, np.int64), out, 1.0, "bilinear", 1)


def _write(file: IO[bytes], mode: int, pixels: np.ndarray, data: bytes | None = None) -> tuple[int, ...]:
    """Append the file `data`, or the pixels themselves; returns the BLOB record."""
    offset = file.tell()
    size = file.write(np.ascontiguousarray(pixels).data if data is None else data)
    return os.getpid(), mode, pixels.shape[0], pixels.shape[1], offset, size


def _spool_path(folder: Path, file: int) -> Path:
    return folder / f"spool-{file}"


class Progress:
    """Rows done, images/s and time left: on a terminal one line that renews itself, else a line every 5 s."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self._live = sys.stdout.isatty()
        self._every = 0.2 if self._live else 5.0
        self._start = self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._said < self._every and not (self._live and done == self.total):
            return
        self._said = now
        speed = done / max(now - self._start, 1e-9)
        left = (self.total - done) / max(speed, 1e-9)
        share = 100 * done // self.total
        line = f"{self.what}: {done}/{self.total} ({share} %), {speed:.0f} images/s, {left:.0f} s left"
        end = "" if self._live and done < self.total else "\n"
        print(f"\r{line:<78}" if self._live else line, end=end, flush=True)
