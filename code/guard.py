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


def run(work: Callable[[int], int], table: Any, say: Callable[[str], None]) -> int:
    """The exit code of `work(deaths)`, started again where it dies, each time knowing how often it did.

    Rows that were being read at a death are read alone afterwards, and given up when that kills again.
    Exit code 4 when it dies over and over. Without fork, or with torch already loaded, it is a plain call.
    """
    if not hasattr(os, "fork") or "torch" in sys.modules:
        return work(0)
    deaths = fruitless = 0
    while fruitless < FRUITLESS:
        done = table.done()
        child = os.fork()
        if child == 0:
            _live(work, deaths)
        try:
            code, late = _watch(child, table)
        finally:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            table.sweep(child)
        if code >= 0:
            return code
        deaths += 1
        name = "it stood still" if late else signal.Signals(-code).name
        blamed = _blame(table, name, late)
        fruitless = 0 if blamed or table.done() > done else fruitless + 1
        say(f"the working process died ({name}) with {table.done()} rows done; going on")
    table.write()
    say(f"giving up after {deaths} deaths; the other rows of {table.path} are the class prior")
    return 4


def _live(work: Callable[[int], int], deaths: int) -> None:
    """The child: default signals, no clean-up that belongs to the parent, never past this line."""
    code = 1
    try:
        for name in ("SIGTERM", "SIGHUP", "SIGINT"):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        code = work(deaths)
    except BaseException as error:
        print(f"predict: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _watch(child: int, table: Any) -> tuple[int, bool]:
    """Wait for the child: its exit code, minus a signal's number for a death; and whether it stood still."""
    done, since, nap = table.done(), time.monotonic(), 0.01
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return (-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), False
        now = time.monotonic()
        if table.done() > done:
            done, since = table.done(), now
        reading = np.array(table.reading)  # as of one moment: a row that ends while it is asked began at 0
        reading = reading[reading > 0]
        if now - since > STILL or (len(reading) and now - reading.min() > SLOW):
            return -signal.SIGKILL, True
        time.sleep(nap)
        nap = min(0.2, nap * 1.5)


def _blame(table: Any, name: str, late: bool) -> bool:
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
    table.reading[:] = 0
    return len(rows) > 0
