"""Worker processes that die with their parent, whose own death is said, and for which nobody waits without a bound."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from fastflower.core.errors import EnvironmentFault

T = TypeVar("T")
PATIENCE = 300.0  # seconds without one item done after which the work is given up
LISTEN = 0.2  # seconds between two looks at how far the workers are

_fork = get_context("fork")
_done = _fork.Value("q", 0)  # items done by all workers of the run under way
_work: Callable[..., Any]  # of a worker: handed over by fork, with all that it refers to


def beat(items: int = 1) -> None:
    """Say that some more items are done; called by the work itself."""
    with _done.get_lock():
        _done.value += items


def run(
    work: Callable[..., T],
    tasks: Iterator[tuple[Any, ...]],
    *,
    count: int,
    tell: Callable[[int], None],
    meanwhile: Callable[[], object] = lambda: None,
) -> Iterator[T]:
    """`work(*task)` of every task, in order, by `count` processes with a bounded number of tasks under way.

    `tell` hears how many items have had their beat; `meanwhile` is a piece of work for this process, which would only
    wait. An exception of `work` is raised here. EnvironmentFault when a worker dies, or when no item is done for
    PATIENCE seconds.
    """
    _done.value = 0
    if count <= 1:
        meanwhile()
        for task in tasks:
            yield work(*task)
            tell(_done.value)
        return
    # fork: this process has one thread and its pages are shared; a spawned worker would import for seconds
    pool = ProcessPoolExecutor(count, _fork, _start, (os.getpid(), work))
    try:
        waiting = deque(pool.submit(_call, *task) for task in itertools.islice(tasks, 2 * count + 2))
        meanwhile()
        while waiting:
            yield _result(pool, waiting.popleft(), tell)
            waiting.extend(pool.submit(_call, *task) for task in itertools.islice(tasks, 1))
    except BrokenProcessPool:
        raise EnvironmentFault(
            "a worker process was killed, most likely for memory; lower data.workers or free memory, then run again"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(pool: ProcessPoolExecutor, future: Future[T], tell: Callable[[int], None]) -> T:
    seen, since = _done.value, time.monotonic()
    while True:
        try:
            result = future.result(LISTEN)
        except FutureTimeout:
            tell(_done.value)
            if _done.value != seen:
                seen, since = _done.value, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                for process in list((pool._processes or {}).values()):
                    process.kill()
                raise EnvironmentFault(
                    f"nothing finished within {PATIENCE:.0f} s; check the disks that hold data.root and data.home, "
                    "then run again"
                ) from None
        else:
            tell(_done.value)
            return result


def _start(parent: int, work: Callable[..., Any]) -> None:
    """Workers leave Ctrl-C to the parent and die with it, however it dies."""
    global _work
    _work = work
    gc.freeze()  # a collection would touch, and so copy, what lies in memory shared with the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _call(*task: Any) -> Any:
    return _work(*task)


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


def cores(threads: int, share: int = 1) -> int:
    """`threads`, or for 0 this process's share of the cores it may run on."""
    return threads or max(1, len(os.sched_getaffinity(0)) // share)
