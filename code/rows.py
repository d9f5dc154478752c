"""Rows from pictures to logits: threads that read ahead, the pictures that they could not read, and their speed."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from messages import log_error
from table import Table

SETTLED = 2.0  # seconds after the first rows from which a speed is estimated
MAX_BATCH = 8  # pictures that a CPU thread runs together, at most
MAX_BATCH_PIXELS = 300_000  # of the largest views of such a batch
# Unreadable pictures that are named: a pipe that is read only at the end must not fill up and block the run.
MAX_NAMED = 40


class Speed:
    """Seconds to the first row, which include warming up, and seconds a row after it."""

    def __init__(self, start: float, done: int) -> None:
        self.start, self.loaded = start, time.monotonic()
        self.done_before = self.done = done
        self.warm_up = self.spent = 0.0
        self.seconds_per_row = 1e-6
        self.settled = False

    def update(self, done: int) -> tuple[bool, bool]:
        """Count rows done by now; returns two flags: they are the first, and the speed can be judged from now on."""
        first, self.done = self.done == self.done_before, done
        self.spent = time.monotonic() - self.loaded
        rows = done - self.done_before
        if first:
            self.warm_up = self.spent
            pace = self.spent / rows
        else:
            pace = (self.spent - self.warm_up) / (rows - 1)
        self.seconds_per_row = max(pace, 1e-6)  # the clock of Windows stands still for 16 ms
        # the first rows warm up caches and compilers, and would promise hours
        settled = not (first or self.settled) and self.spent - self.warm_up > SETTLED
        self.settled |= settled
        return first, settled

    def summary(self) -> dict[str, float]:
        """The fields of submission.json about time."""
        loading = self.loaded - self.start
        return {
            "first_row_s": loading + self.warm_up,
            "seconds": loading + self.spent,
            "ms_per_image": 1000 * self.seconds_per_row,
        }


class Worker:
    """The work of a thread: it reads pictures and, on a CPU, computes their logits.

    Pictures that cannot be read or predicted are marked in the table.
    """

    def __init__(self, ensemble: Any, source: Any, table: Table) -> None:
        self.ensemble, self.source, self.table = ensemble, source, table
        self.on_cpu = ensemble.device.type == "cpu"
        self.retry_lock = threading.Lock()
        self.noted = 0

    def process(self, rows: list[int]) -> list[tuple[int, Any]]:
        """The rows that could be read, with their logits on a CPU, else with their views."""
        results = []
        for row in rows:
            self.table.reading_since[row] = time.monotonic()
            try:
                results.append((row, self._views(self.table.names[row])))
                self._note(row)
            except Exception as error:  # a hostile file may make Pillow raise anything
                self._fail(row, error)
            finally:
                self.table.reading_since[row] = 0
        if not results or not self.on_cpu:
            return results
        readable = [row for row, _ in results]
        try:
            return list(zip(readable, self.ensemble.logits([views for _, views in results])))
        except Exception as error:
            for row in readable:
                self._fail(row, error)
            return []

    def gather(self, batches: list[list[tuple[int, Any]]]) -> tuple[list[int], np.ndarray]:
        """The rows of batches and their logits, which a GPU computes here."""
        results = [result for batch in batches for result in batch]
        rows, values = [row for row, _ in results], [value for _, value in results]
        return rows, self.ensemble.logits(values) if rows and not self.on_cpu else np.array(values)

    def _views(self, name: bytes) -> list[np.ndarray]:
        crops = self.ensemble.bundle["crops"]
        try:
            return self.source.views(name, crops)
        except (MemoryError, OSError):  # all threads together may need more memory or handles than there are
            with self.retry_lock:
                return self.source.views(name, crops)

    def _note(self, row: int) -> None:
        """Keep and show the source's note on a row that could be read only in part."""
        note = self.source.notes.pop(self.table.names[row], "")
        if note:
            self.table.note(row, note)
            self.noted += 1
            if self.noted <= MAX_NAMED:
                name = os.fsdecode(self.table.names[row])
                log_error(f"{name!r}: {note}; predicted from the pixels that are there")

    def _fail(self, row: int, error: Exception) -> None:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self.table.fail(row, reason)
        if np.count_nonzero(self.table.failed) <= MAX_NAMED:
            log_error(
                f"{os.fsdecode(self.table.names[row])!r}: {reason}; its row holds the most frequent class"
            )


def predict_rows(
    ensemble: Any, source: Any, *, table: Table, threads: int, batch: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield rows and their logits in order; pictures that cannot be read are left out and marked in the table.

    For a GPU the threads decode two batches ahead of it. On a CPU each thread takes a few pictures from file to
    logits: a batch lays out the weights once, and threads that do not wait for each other are faster.
    """
    import torch

    worker, parent = Worker(ensemble, source, table), os.getppid()
    rows = table.waiting()
    first = max(1, np.count_nonzero(table.suspect[rows]))
    for row in rows[:first]:  # an early first row, computed with all cores
        yield worker.gather([worker.process([row])])
    size = 1
    if worker.on_cpu:  # independent of the number of threads, so that the last digits are too
        crops = ensemble.bundle["crops"]
        fitting = MAX_BATCH_PIXELS // max(crop["height"] * crop["width"] for crop in crops)
        size = max(1, min(MAX_BATCH, fitting, len(rows) // 16))
    batches = (rows[start : start + size] for start in range(first, len(rows), size))
    together, running = threads if worker.on_cpu else batch, deque()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            while True:
                for rows_of_batch in itertools.islice(batches, 3 * together - len(running)):
                    running.append(pool.submit(worker.process, rows_of_batch))
                if not running or os.getppid() != parent:  # without a parent nobody reads the table
                    return
                yield worker.gather([running.popleft().result() for _ in range(min(together, len(running)))])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
