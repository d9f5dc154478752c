"""Runs the work in a child process, so that the table stays complete whatever happens to it.

A decoder that crashes or hangs costs one row; a time limit, or a child that the kernel kills for its memory, costs the
rows that were not finished. The child is forked before torch is loaded, which is safe and takes milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

READ_TIMEOUT = 60.0  # seconds to read one picture
STALL_TIMEOUT = 900.0  # seconds without a finished row
MAX_FRUITLESS = 3  # deaths in a row without a finished row
PAUSE = 5.0  # seconds between two checks that mean a suspended machine or container, not a slow picture
ERROR = 70  # exit code of the child after an unexpected exception
SIGNALS = ("SIGTERM", "SIGHUP", "SIGINT")

Work = Callable[[int, int], int]
Log = Callable[[str], None]


def run(work: Work, table: Any, log: Log) -> int:
    """Run `work(deaths, unexplained)` in a child and restart it when it dies while rows are waiting.

    `deaths` counts how often the child died, `unexplained` how often while it read no picture. Pictures that were
    being read at a death are read one at a time afterwards and given up when they kill the child again. Returns the
    exit code of the work, 4 when it keeps dying. Where forking is impossible, or torch is already loaded, the work
    runs in this process.
    """
    deaths = unexplained = fruitless = 0
    while fruitless < MAX_FRUITLESS and (table.waiting() or not deaths):
        done = table.done()
        # a signal that ends this process between the fork and the `try` would leave the child running
        _hold_signals(hold=True)
        child = _fork()
        if child is None:
            _hold_signals(hold=False)
            code = _run_logged(work, deaths, unexplained=unexplained, log=log)
            return 4 if code == ERROR else code
        if child == 0:
            _run_child(work, deaths, unexplained=unexplained, log=log)
        try:
            _hold_signals(hold=False)
            code, stalled = _watch(child, table)
        finally:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            table.remove_temporary(child)
        if code >= 0 and code != ERROR:
            return code
        deaths += 1
        cause = "it hung" if stalled else "an error" if code == ERROR else signal.Signals(-code).name
        blamed = code != ERROR and _blame(table, cause, stalled=stalled)
        table.reading_since[:] = 0
        unexplained += not blamed
        fruitless = 0 if blamed or table.done() > done else fruitless + 1
        log(f"the working process died ({cause}) with {table.done()} rows done; continuing")
    if not table.waiting():
        return 0
    log(f"giving up after {deaths} deaths; the other rows of {table.path} hold the most frequent class")
    return 4


def _hold_signals(*, hold: bool) -> None:
    """Have the signals that end this process wait, or deliver them."""
    if hasattr(signal, "pthread_sigmask"):
        how = signal.SIG_BLOCK if hold else signal.SIG_UNBLOCK
        signal.pthread_sigmask(how, [getattr(signal, name) for name in SIGNALS])


def _fork() -> int | None:
    """Fork: the child's id, 0 in the child, None where forking is impossible or torch would not survive it.

    Apple's frameworks, which NumPy and torch compute with, may abort after a fork.
    """
    if not hasattr(os, "fork") or sys.platform == "darwin" or "torch" in sys.modules:
        return None
    try:
        return os.fork()
    except OSError:  # the process limit is reached, or there is no memory
        return None


def _run_child(work: Work, deaths: int, *, unexplained: int, log: Log) -> None:
    """Run the work with default signal handlers and exit without the parent's clean-up; never returns."""
    code = ERROR
    try:
        for name in SIGNALS:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        _hold_signals(hold=False)
        code = _run_logged(work, deaths, unexplained=unexplained, log=log)
    finally:
        os._exit(code)


def _run_logged(work: Work, deaths: int, *, unexplained: int, log: Log) -> int:
    """Run the work; an unexpected exception is logged in one line and becomes exit code ERROR."""
    try:
        return work(deaths, unexplained)
    except Exception as error:
        log(f"{type(error).__name__}: {' '.join(str(error).split())}")
        return ERROR


def _watch(child: int, table: Any) -> tuple[int, bool]:
    """Wait for the child; returns its exit code, or minus a signal's number, and whether it hung."""
    done, last_row, nap = table.done(), time.monotonic(), 0.01
    resumed = last_check = last_row
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return (-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), False
        now = time.monotonic()
        resumed, last_check = now if now - last_check > PAUSE else resumed, now
        if table.done() > done:
            done, last_row = table.done(), now
        # a copy: a row that ends meanwhile changes to 0, which would look like a start at time 0
        started = np.array(table.reading_since)
        started = started[started > 0]
        slow = len(started) and now - max(started.min(), resumed) > READ_TIMEOUT
        if slow or now - max(last_row, resumed) > STALL_TIMEOUT:
            return -signal.SIGKILL, True
        time.sleep(nap)
        nap = min(0.2, nap * 1.5)


def _blame(table: Any, cause: str, *, stalled: bool) -> bool:
    """Give up the picture that caused the death, or mark all candidates as suspect; False if none was being read."""
    rows = np.flatnonzero(table.reading_since)
    if stalled:
        for row in rows[time.monotonic() - table.reading_since[rows] > READ_TIMEOUT]:
            table.fail(int(row), f"not read within {READ_TIMEOUT:.0f} s")
    elif len(rows) == 1:
        table.fail(int(rows[0]), f"reading it killed the process ({cause})")
    else:
        table.suspect[rows] = True
    return len(rows) > 0


def usable_cores(groups: str = "/sys/fs/cgroup") -> int:
    """CPU cores of this process: those of its affinity mask, or fewer where a container has a quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def fields(name: str) -> list[str]:
        with open(os.path.join(groups, name), encoding="ascii") as file:
            return file.read().split()

    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroup version 2, and 1
        with contextlib.suppress(OSError, ValueError):  # "max 100000" where there is no limit, or -1
            quota, period = (int(text) for name in names for text in fields(name))
            cores = min(cores, max(1, round(quota / period))) if quota > 0 else cores
    return cores
