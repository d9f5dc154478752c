"""Loaders: batches from a beton as pure functions of (seed, epoch, step), prefetched by one thread.

The thread calls the kernel of decode.c; there is nothing to compile and nothing to warm up. A tensor that the caller
keeps is never overwritten.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import mmap
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from fastflower.core import seeding
from fastflower.core.workers import cores
from fastflower.data.betons.beton_file import Beton
from fastflower.data.decode.kernel import Crop, decode_eval, decode_train
from fastflower.data.device_copies import DeviceCopies

SWAP_STREAM = 1090  # of random numbers; decode.c and augment.py use others
Batch = dict[str, torch.Tensor]
Size = tuple[int, int]
Extras = Callable[
    [int, int], Iterator[Batch]
]  # (epoch, step) -> further entries of each batch from that step on
Allocate = Callable[
    [int, int, int], torch.Tensor
]  # (images, height, width) -> uint8 (images, height, width, 3)


class TrainLoader:
    """Training batches: image uint8 (B, h, w, 3), of pairs (B, h, 2w, 3), label, row and key int64 (B,).

    Epoch e draws `order(e)`, rows (N,) with repeats, cut to a multiple of the global batch. Step t takes the t-th
    global batch, and rank r every world-th image of it from r on. So batches are equal for any number of threads and
    ranks (at the same global batch) and after a resume at any step. `cursor()` returns the (epoch, step) at which the
    next iteration starts. Where `features` is given, the image of rows and keys is its result, (B, F). An exception in
    the thread is raised by the next() that asks for the failed batch.
    `extras(epoch, step)` yields further entries for each batch from that step on.
    """

    def __init__(
        self,
        beton: Beton,
        order: Callable[[int], np.ndarray],
        *,
        seed: int,
        batch: Callable[[int], int],
        size: Callable[[int], Size],
        crop: Crop,
        rank: int = 0,
        world: int = 1,
        threads: int = 0,
        prefetch: int = 2,
        extras: Extras | None = None,
    ) -> None:
        self.beton, self.order, self.seed, self.extras = beton, order, seed, extras
        self.batch, self.size, self.crop = batch, size, crop
        self.rank, self.world, self.threads, self.prefetch = rank, world, cores(threads, world), prefetch
        self.cursor: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.features: Callable[[np.ndarray, np.ndarray], torch.Tensor] | None = None
        self._drawn: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self.copies: DeviceCopies | None = None  # to a GPU; batches stay on the host without
        self._buffers = _BufferPool(prefetch + 3)
        self._running: weakref.WeakSet[_Prefetcher] = weakref.WeakSet()

    @property
    def batch_size(self) -> int:
        """Number of images of one rank in a step of the cursor's epoch."""
        return self.batch(self.cursor()[0])

    def steps(self, epoch: int) -> int:
        """Number of global batches in an epoch."""
        return len(self._order(epoch)) // (self.batch(epoch) * self.world)

    def class_draws(self, epoch: int, classes: int) -> list[int]:
        """The number of images of each class that an epoch trains on, repeats included."""
        trained = self._order(epoch)[: self.steps(epoch) * self.batch(epoch) * self.world]
        return np.bincount(self.beton.labels[trained], minlength=classes).tolist()

    def __len__(self) -> int:
        return self.steps(self.cursor()[0])

    def __iter__(self) -> Iterator[Batch]:
        return _run(self, self.batches(*self.cursor()))

    def close(self) -> None:
        """Stop and join the threads of unfinished iterations."""
        _close(self)

    def _order(self, epoch: int) -> np.ndarray:
        if self._drawn[0] != epoch:
            self._drawn = (epoch, np.asarray(self.order(epoch), np.int64))
        return self._drawn[1]

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on, computed in the calling thread."""
        order, global_batch = self._order(epoch), self.batch(epoch) * self.world
        size = self.size(epoch)
        extras = self.extras(epoch, start) if self.extras else itertools.repeat({})
        for first in range(start * global_batch, len(order) // global_batch * global_batch, global_batch):
            positions = np.arange(first + self.rank, first + global_batch, self.world)
            rows = order[positions]
            keys = seeding.row_keys(self.seed, epoch, positions=positions, rows=rows)
            yield {
                "image": self.features(rows, keys)
                if self.features
                else train_images(
                    self.beton,
                    rows,
                    keys=keys,
                    size=size,
                    crop=self.crop,
                    threads=self.threads,
                    allocate=self._buffers.images,
                ),
                "label": torch.from_numpy(self.beton.labels[rows]),
                "row": torch.from_numpy(rows),
                "key": torch.from_numpy(keys.view(np.int64)),
                **next(extras),
            }


class EvalLoader:
    """Evaluation batches: every row once over all ranks, in order; image, label, row, and valid bool (B,).

    With `rows`, these rows of the beton alone, and "row" is a place in them.
    All ranks yield the same number of full batches. Rows with valid=False are padding: black images, with row 0 and its
    label. Where `features` is given, the image of rows is its result, (B, F).
    """

    def __init__(
        self,
        beton: Beton,
        batch: int,
        *,
        size: Callable[[], Size],
        factor: float,
        interpolation: str,
        rank: int = 0,
        world: int = 1,
        threads: int = 0,
        prefetch: int = 2,
        rows: np.ndarray | None = None,
    ) -> None:
        self.beton, self.batch_size, self.size = beton, batch, size
        self.rows: np.ndarray = np.arange(beton.rows) if rows is None else rows
        self.factor, self.interpolation = factor, interpolation
        self.rank, self.world, self.threads, self.prefetch = rank, world, cores(threads, world), prefetch
        self.features: Callable[[np.ndarray], torch.Tensor] | None = None
        self.copies: DeviceCopies | None = None  # to a GPU; batches stay on the host without
        self._buffers = _BufferPool(prefetch + 3)
        self._running: weakref.WeakSet[_Prefetcher] = weakref.WeakSet()

    def __len__(self) -> int:
        return -(-len(self.rows) // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[Batch]:
        return _run(self, self._batches(self.size()))

    def close(self) -> None:
        """Stop and join the threads of unfinished iterations."""
        _close(self)

    def _batches(self, size: Size) -> Iterator[Batch]:
        for step in range(len(self)):
            positions = (step * self.batch_size + np.arange(self.batch_size)) * self.world + self.rank
            valid = positions < len(self.rows)
            places = np.where(valid, positions, 0)
            rows = self.rows[places]
            yield {
                "image": self.features(rows)
                if self.features
                else eval_images(
                    self.beton,
                    rows[valid],
                    size=size,
                    factor=self.factor,
                    interpolation=self.interpolation,
                    threads=self.threads,
                    allocate=self._padded,
                ),
                "label": torch.from_numpy(self.beton.labels[rows]),
                "row": torch.from_numpy(places),
                "valid": torch.from_numpy(valid),
            }

    def _padded(self, count: int, height: int, width: int) -> torch.Tensor:
        """Memory of a full batch, black after the first `count` images."""
        images = self._buffers.images(self.batch_size, height, width)
        images[count:] = 0
        return images


def _allocate(count: int, height: int, width: int) -> torch.Tensor:
    return torch.empty((count, height, width, 3), dtype=torch.uint8)


def train_images(
    beton: Beton,
    rows: np.ndarray,
    *,
    keys: np.ndarray,
    size: Size,
    crop: Crop,
    threads: int = 0,
    allocate: Allocate = _allocate,
) -> torch.Tensor:
    """Random training crops of rows (B,) by their keys, uint64 (B,): uint8 (B, h, w, 3), of pairs (B, h, 2w, 3).

    The key of a pair's second image is derived from that of the first; with crop.swap it is on the left in half of
    the pairs. A row's checksum is checked when the process
    reads it for the first time.
    """
    beton.verify_rows(rows)
    images, first_keys = [], keys
    for side in _sides(beton):
        images.append(allocate(len(rows), *size))
        decode_train(side, rows, keys=keys, out=images[-1].numpy(), crop=crop, threads=threads)
        keys = seeding.hash64(keys)
    if crop.swap and len(images) == 2:
        swapped = torch.from_numpy(seeding.uniform(first_keys, SWAP_STREAM) < 0.5).view(-1, 1, 1, 1)
        first, second = images
        images = [torch.where(swapped, second, first), torch.where(swapped, first, second)]
    return _side_by_side(images)


def eval_images(
    beton: Beton,
    rows: np.ndarray,
    *,
    size: Size,
    factor: float,
    interpolation: str,
    threads: int = 0,
    allocate: Allocate = _allocate,
) -> torch.Tensor:
    """The centred evaluation views of rows (B,): uint8 (B, h, w, 3), of pairs (B, h, 2w, 3).

    `allocate` may return memory for more than B images; the rest is returned unchanged. A row's checksum is checked
    when the process reads it for the first time.
    """
    beton.verify_rows(rows)
    images = []
    for side in _sides(beton):
        images.append(allocate(len(rows), *size))
        decode_eval(
            side,
            rows,
            out=images[-1].numpy()[: len(rows)],
            factor=factor,
            interpolation=interpolation,
            threads=threads,
        )
    return _side_by_side(images)


def _sides(beton: Beton) -> list[Beton]:
    """The beton of each image of a row: two for pairs."""
    return [beton, beton.second] if beton.images_per_row == 2 else [beton]


def _side_by_side(images: list[torch.Tensor]) -> torch.Tensor:
    return images[0] if len(images) == 1 else torch.cat(images, 2)


class _BufferPool:
    """Memory for batches; a block is reused once nothing refers to its tensor or to a view of it.

    New pages would cost a tenth of the time that resizing raw rows takes. With a GPU, torch's page-locked memory is
    used, which torch reuses in the same way.
    """

    def __init__(self, blocks: int) -> None:
        self._free: deque[mmap.mmap] = deque(maxlen=blocks)

    def images(self, batch: int, height: int, width: int) -> torch.Tensor:
        """Allocate uint8 (batch, height, width, 3); the content is undefined."""
        shape = (batch, height, width, 3)
        if _pinned():
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        block = self._block(math.prod(shape))
        array = np.frombuffer(block, np.uint8)
        weakref.finalize(array, self._free.append, block).atexit = False
        return torch.from_numpy(array.reshape(shape))

    def _block(self, size: int) -> mmap.mmap:
        with contextlib.suppress(IndexError):
            while len(block := self._free.pop()) != size:  # blocks of another size are freed
                pass
            return block
        return mmap.mmap(-1, size)


@functools.cache
def _pinned() -> bool:
    return torch.cuda.is_available()


class _Prefetcher:
    """A thread that runs an iterator at most `prefetch` items ahead of its reader."""

    def __init__(self, items: Iterator[Any], prefetch: int) -> None:
        self._ready: queue.Queue[tuple[str, Any]] = queue.Queue(max(prefetch, 1))
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(items,), name="fastflower-loader", daemon=True
        )
        self._thread.start()

    def next(self) -> tuple[str, Any]:
        """The next message: ("item", item), ("error", exception) or ("end", None)."""
        while not self._stop.is_set():
            try:
                return self._ready.get(timeout=1.0)
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    return "error", RuntimeError("the loader's thread died")
        return "end", None

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stop.set()
        self._thread.join()

    def _work(self, items: Iterator[Any]) -> None:
        try:
            for item in items:
                self._put(("item", item))
                if self._stop.is_set():
                    return
            self._put(("end", None))
        except BaseException as error:
            self._put(("error", error))

    def _put(self, message: tuple[str, Any]) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(message, timeout=0.1)
                return


def _run(loader: TrainLoader | EvalLoader, items: Iterator[Batch]) -> Iterator[Batch]:
    """Iterate with prefetching; leaving early, by break, error or garbage collection, stops and joins the thread."""
    copies = loader.copies
    prefetcher = _Prefetcher(map(copies.start, items) if copies else items, loader.prefetch)
    loader._running.add(prefetcher)
    try:
        while True:
            kind, value = prefetcher.next()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield copies.finish(value) if copies else value
    finally:
        prefetcher.close()


def _close(loader: TrainLoader | EvalLoader) -> None:
    for prefetcher in list(loader._running):
        prefetcher.close()
