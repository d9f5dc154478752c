"""Work in processes forked from this one, which has imported everything: commands start without their imports."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastflower.core import errors


def fork(work: Callable[[], int | None], output: Path) -> int:
    """Run `work` in a child process whose output is appended to a file; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    _run_and_exit(work)
    return 0


def _run_and_exit(work: Callable[[], int | None]) -> None:
    """Run `work` with the streams that this process has been given, and exit with its code."""
    code = 70
    try:
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        faulthandler.enable(sys.stderr)
        code = work() or 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run_command(module_name: str, arguments: list[str]) -> None:
    """Run a command's main as its own process would, to its exit code; does not return."""
    module = importlib.import_module(module_name)
    sys.argv = [str(module.__file__), *arguments]
    errors.run_command(module.main)


class ForkedPopen(subprocess.Popen[bytes]):
    """A subprocess.Popen of `python -m MODULE ...` that forks this process instead of starting a new one."""

    def __init__(
        self,
        command: list[str],
        *,
        env: dict[str, str],
        preexec_fn: Callable[[], object] = lambda: None,
        **options: Any,
    ) -> None:
        def instead_of_exec() -> None:
            for number in signal.valid_signals():  # as exec does, with this and the files
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
            preexec_fn()
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the parent waits for one of them
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.clear()
            os.environ.update(env)
            _run_and_exit(lambda: run_command(command[2], command[3:]))

        super().__init__(command, preexec_fn=instead_of_exec, **options)


def exit_code(process: int) -> int | None:
    """The exit code of a child, minus a signal's number; None while it runs."""
    done, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def end_children(but: set[int], bound: float) -> int:
    """Wait for the other children of this process up to `bound` seconds, and kill those that stay; their number."""
    deadline = time.monotonic() + bound
    while (left := set(children()) - but) and time.monotonic() < deadline:
        for child in left:
            exit_code(child)
        time.sleep(0.01)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return len(left)


def children() -> Iterator[int]:
    """The ids of this process's children, the adopted ones included."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                    yield int(folder.name)
