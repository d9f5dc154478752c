"""A pool of worker processes: they exit with the parent, a killed worker is reported, and a stalled one times out."""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Protocol, TypeVar

from fastflower.core.console import terminal
from fastflower.core.errors import REMEDIES, EnvironmentFault

T = TypeVar("T")
PATIENCE = 300.0  # seconds without a finished item after which the pool is stopped
POLL = 0.2  # seconds between two checks of the workers' progress
PR_SET_PDEATHSIG = 1  # of prctl(2)

_libc = ctypes.CDLL(None)  # loaded here: a forked child may not load
_fork = get_context("fork")
_done = _fork.Value("q", 0)  # items finished by all workers of the current call
_work: Callable[..., Any]  # set in each worker; fork hands it over with everything it refers to


def die_with_parent(signum: signal.Signals, *, parent: int = 0) -> None:
    """Have the kernel (Linux only) send this process a signal when its parent ends, even by SIGKILL.

    With the `parent`'s process id, exit if it has ended already.
    """
    if sys.platform == "linux":
        _libc.prctl(PR_SET_PDEATHSIG, signum)
    if parent and os.getppid() != parent:
        os._exit(1)


def check_threads(count: int) -> None:
    """Raise EnvironmentFault where this process may not start `count` threads: C++ libraries abort without a line."""
    ended, threads = threading.Event(), []
    try:
        for _ in range(count):
            threads.append(threading.Thread(target=ended.wait, daemon=True))
            threads[-1].start()
    except RuntimeError:
        raise EnvironmentFault(
            f"only {len(threads) - 1} of {count} threads can be started; {REMEDIES[errno.EAGAIN]}"
        ) from None
    finally:
        ended.set()
        for thread in threads:
            if thread.ident:
                thread.join()


class MapOrdered(Protocol):
    """The signature of `map_ordered`, on the processes of this machine or on those of a cluster."""

    def __call__(
        self,
        work: Callable[..., T],
        tasks: Iterator[tuple[Any, ...]],
        *,
        count: int,
        on_progress: Callable[[int], None],
        meanwhile: Callable[[], object] = ...,
    ) -> Iterator[T]: ...


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Context manager: gives a function that returns the items finished by this process since."""
    with _done.get_lock():
        _done.value = 0
    yield lambda: _done.value


def count_done(items: int = 1) -> None:
    """Report finished items to the parent process; called by the work function."""
    with _done.get_lock():
        _done.value += items


def map_ordered(
    work: Callable[..., T],
    tasks: Iterator[tuple[Any, ...]],
    *,
    count: int,
    on_progress: Callable[[int], None],
    meanwhile: Callable[[], object] = lambda: None,
) -> Iterator[T]:
    """Yield `work(*task)` for every task in order, computed by `count` processes with few tasks queued at a time.

    `on_progress(done)` is called with the items counted so far; `meanwhile` runs in this process while the workers are
    busy. Exceptions of `work` are raised here. Raises EnvironmentFault when a worker is killed, or when no item is
    finished within PATIENCE seconds.
    """
    _done.value = 0
    if count <= 1:
        meanwhile()
        for task in tasks:
            yield work(*task)
            on_progress(_done.value)
        return
    # fork: this process has one thread and its pages are shared; a spawned worker would import for seconds
    pool = ProcessPoolExecutor(count, _fork, _start, (os.getpid(), work))
    try:
        pending = deque(pool.submit(_call, *task) for task in itertools.islice(tasks, 2 * count + 2))
        meanwhile()
        while pending:
            yield _result(pool, pending.popleft(), on_progress)
            pending.extend(pool.submit(_call, *task) for task in itertools.islice(tasks, 1))
    except BrokenProcessPool:
        raise EnvironmentFault(
            "a worker process was killed, most likely for memory; lower data.workers or free memory, then run again"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(pool: ProcessPoolExecutor, future: Future[T], on_progress: Callable[[int], None]) -> T:
    """Wait for a result, reporting progress; kills the workers when they make none within PATIENCE seconds."""
    done, since = _done.value, time.monotonic()
    while True:
        try:
            result = future.result(POLL)
        except FutureTimeout:
            on_progress(_done.value)
            if _done.value != done:
                done, since = _done.value, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                for process in list((pool._processes or {}).values()):
                    process.kill()
                raise EnvironmentFault(
                    f"nothing finished within {PATIENCE:.0f} s; check the disks that hold data.root and data.home, "
                    "then run again"
                ) from None
        else:
            on_progress(_done.value)
            return result


def _start(parent: int, work: Callable[..., Any]) -> None:
    """Prepare a worker: it leaves Ctrl-C to the parent and exits with it, even when that is killed."""
    global _work
    _work = work
    gc.freeze()  # a collection would write to, and so copy, the pages shared with the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL, parent=parent)


def _call(*task: Any) -> Any:
    return _work(*task)


class Progress:
    """Prints rows done, images/s and time left: on a terminal one updated line, else a line every 5 s."""

    def __init__(self, noun: str, total: int) -> None:
        self.noun, self.total = noun, total
        self._live = sys.stdout.isatty()
        self._every = 0.2 if self._live else 5.0
        self._start = self._printed = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._printed < self._every and not (self._live and done == self.total):
            return
        self._printed = now
        speed = done / max(now - self._start, 1e-9)
        seconds_left = (self.total - done) / max(speed, 1e-9)
        percent = 100 * done // self.total
        line = (
            f"{self.noun}: {done}/{self.total} ({percent} %), {speed:.0f} images/s, {seconds_left:.0f} s left"
        )
        end = "" if self._live and done < self.total else "\n"
        print(f"\r{line:<78}" if self._live else line, end=end, flush=True, file=terminal())


def cores(threads: int, processes: int = 1) -> int:
    """`threads`, or, if that is 0, the CPU cores that each of `processes` processes on this machine may use."""
    return threads or max(1, len(os.sched_getaffinity(0)) // processes)
