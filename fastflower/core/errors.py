"""Errors that a user can correct, reported in one line: the input, the allowed values, the remedy."""

from __future__ import annotations

import errno
import inspect
import io
import os
import sys
from collections.abc import Callable

from fastflower.core.console import visible_streams

PREEMPTED = 75  # EX_TEMPFAIL: a signal stopped the training; the same command resumes it
REMEDIES = {
    errno.ENOSPC: "make room on this disk, then repeat the command",
    errno.EDQUOT: "make room in your quota, then repeat the command",
    errno.EROFS: "make the disk writable, or run on a copy elsewhere",
    errno.EACCES: "give yourself permission to it, then repeat the command",
    errno.EPERM: "give yourself permission to it, then repeat the command",
    errno.EAGAIN: "raise the limit of processes (ulimit -u), then repeat the command",
    errno.EMFILE: "raise the limit of open files (ulimit -n), then repeat the command",
}


class InputError(Exception):
    """Invalid input; the text is the one line that the user reads."""

    exit_code = 2


class CorruptionError(InputError):
    """A file was changed or damaged after it was written."""

    exit_code = 3


class EnvironmentFault(InputError):
    """The machine lacks disk space, memory, a library, a device or a permission."""

    exit_code = 4


class Diverged(InputError):
    """Training yields only non-finite values; every rank raises it in the same step."""

    exit_code = 1
    REMEDY = (
        "lower opt.lr_ref or opt.lr, for instance to a quarter (of a large batch: opt.large_batch_factor), or "
        "aug.strength, or raise opt.weight_decay or sched.warmup_epochs, and start again under another exp.name"
    )


def run_command(main: Callable[[list[str]], int | None], *, parses_help: bool = False) -> None:
    """Run a command's `main(argv)` as a process: one line on stderr and an exit code instead of a traceback.

    An error of the operating system that no room explains, such as a full disk, counts as an EnvironmentFault.
    `--help` prints the docstring of the command's module, unless the command parses it itself (`parses_help`). Under
    a launcher, every rank gets the same error and only the first prints it. Control characters of names and values are
    escaped on both streams (see console.VisibleStream); a closed stdout is ignored.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with visible_streams():
        _run(main, first=first, parses_help=parses_help)


def _run(main: Callable[[list[str]], int | None], *, first: bool, parses_help: bool) -> None:
    """Print the help or run the command, and exit."""
    if not parses_help and not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        if first:
            print(inspect.getdoc(sys.modules[main.__module__]))
        sys.exit(0)
    try:
        code = main(sys.argv[1:])
    except InputError as error:
        if first:
            print(f"fastflower: {one_line(str(error))}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `| head` is not a failure
        sys.stderr.close()
        code = 0
    except (OSError, MemoryError, RuntimeError) as error:
        fault = lack_of_machine(error)
        if fault is None:
            raise
        if first:
            print(f"fastflower: {one_line(str(fault))}", file=sys.stderr, flush=True)
        code = fault.exit_code
    sys.exit(code or 0)


def lack_of_machine(error: Exception) -> EnvironmentFault | None:
    """The line for an error of the operating system, of memory, or of a limit of processes; None for a bug."""
    if isinstance(error, OSError):
        return of_machine(error)
    if isinstance(error, MemoryError):
        return EnvironmentFault(
            "out of memory; free some, or raise the limit (ulimit -v), then repeat the command"
        )
    if "can't start new thread" in str(error):
        return EnvironmentFault(f"{error}; {REMEDIES[errno.EAGAIN]}")
    return None


def one_line(text: str) -> str:
    """A message in one line, with the control characters of names and values in it escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def of_machine(error: OSError) -> EnvironmentFault:
    """The line for an error of the disk, the file system or the network: the path and the cause."""
    cause = error.strerror or str(error) or type(error).__name__
    path = error.filename2 or error.filename  # of a rename, the target
    remedy = REMEDIES.get(error.errno or 0, "check the path, its permissions and its disk")
    return EnvironmentFault(f"{os.fsdecode(path)}: {cause}; {remedy}" if path else f"{cause}; {remedy}")
