"""The work in a process of its own, so that whatever happens to it, the table stays whole and right.

A decoder that crashes or never ends costs one row; a time limit, or the kernel taking memory back, costs what was
not yet known. The process starts before torch is loaded, so forking is safe and costs milliseconds.
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

SLOW = 60.0  # seconds in which one picture must have been read
STILL = 900.0  # seconds in which something must have become known
FRUITLESS = 3  # deaths in a row without a new row
PAUSED = 5.0  # seconds without being asked: the machine or the container stood still, not a picture
ERROR = 70  # exit code of work that ended with an error of its own


def run(work: Callable[[int, int], int], table: Any, say: Callable[[str], None]) -> int:
    """The exit code of `work(deaths, unexplained)`, started again where it dies while rows are waiting.

    It is told how often it died, and how often while no picture was being read. Rows that were being read at a
    death are read alone afterwards, and given up when that kills again. Exit code 4 when it dies over and over.
    Where nothing can be forked, or with torch already loaded, it is a plain call.
    """
    deaths = unexplained = fruitless = 0
    while fruitless < FRUITLESS and (table.waiting() or not deaths):
        done = table.done()
        child = _fork()
        if child is None:
            return 4 if (code := _tried(work, deaths, unexplained=unexplained, say=say)) == ERROR else code
        if child == 0:
            _live(work, deaths, unexplained=unexplained, say=say)
        try:
            code, late = _watch(child, table)
        finally:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            table.sweep(child)
        if code >= 0 and code != ERROR:
            return code
        deaths += 1
        name = "it stood still" if late else "an error" if code == ERROR else signal.Signals(-code).name
        blamed = code != ERROR and _blame(table, name, late=late)
        table.reading[:] = 0
        unexplained += not blamed
        fruitless = 0 if blamed or table.done() > done else fruitless + 1
        say(f"the working process died ({name}) with {table.done()} rows done; going on")
    if not table.waiting():
        return 0
    say(f"giving up after {deaths} deaths; the other rows of {table.path} are the class prior")
    return 4


def _fork() -> int | None:
    """A child's id, 0 inside of it; None where there is none, or where torch would not survive it.

    Apple's frameworks, which NumPy and torch compute with, may abort after a fork.
    """
    if not hasattr(os, "fork") or sys.platform == "darwin" or "torch" in sys.modules:
        return None
    try:
        return os.fork()
    except OSError:  # no more processes allowed, or no memory for one
        return None


def _live(
    work: Callable[[int, int], int], deaths: int, *, unexplained: int, say: Callable[[str], None]
) -> None:
    """The child: default signals, no clean-up that belongs to the parent, never past this line."""
    code = ERROR
    try:
        for name in ("SIGTERM", "SIGHUP", "SIGINT"):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        code = _tried(work, deaths, unexplained=unexplained, say=say)
    finally:
        os._exit(code)


def _tried(
    work: Callable[[int, int], int], deaths: int, *, unexplained: int, say: Callable[[str], None]
) -> int:
    """The exit code of work; ERROR and a line for an error that nobody foresaw."""
    try:
        return work(deaths, unexplained)
    except Exception as error:
        say(f"{type(error).__name__}: {' '.join(str(error).split())}")
        return ERROR


def _watch(child: int, table: Any) -> tuple[int, bool]:
    """Wait for the child: its exit code, minus a signal's number for a death; and whether it stood still."""
    done, since, nap = table.done(), time.monotonic(), 0.01
    awake = asked = since
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return (-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), False
        now = time.monotonic()
        awake, asked = now if now - asked > PAUSED else awake, now
        if table.done() > done:
            done, since = table.done(), now
        reading = np.array(table.reading)  # as of one moment: a row that ends while it is asked began at 0
        reading = reading[reading > 0]
        if now - max(since, awake) > STILL or (len(reading) and now - max(reading.min(), awake) > SLOW):
            return -signal.SIGKILL, True
        time.sleep(nap)
        nap = min(0.2, nap * 1.5)


def _blame(table: Any, name: str, *, late: bool) -> bool:
    """Give up the picture that did it, or mark all that may have; whether there was any."""
    rows = np.flatnonzero(table.reading)
    if late:
        slow = rows[time.monotonic() - table.reading[rows] > SLOW]
        for row in slow:
            table.fail(int(row), f"not read within {SLOW:.0f} s")
    elif len(rows) == 1:
        table.fail(int(rows[0]), f"reading it killed the process ({name})")
    else:
        table.alone[rows] = True
    return len(rows) > 0


def usable_cores(groups: str = "/sys/fs/cgroup") -> int:
    """Cores that this process may use: those it may run on, or fewer where a container has a share of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def words(name: str) -> list[str]:
        with open(os.path.join(groups, name), encoding="ascii") as file:
            return file.read().split()

    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # of version 2, and of 1
        with contextlib.suppress(OSError, ValueError):  # "max 100000" where there is no limit, or -1
            share, period = (int(word) for name in names for word in words(name))
            cores = min(cores, max(1, round(share / period))) if share > 0 else cores
    return cores
