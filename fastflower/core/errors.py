"""Errors that a user can correct, reported in one line: the input, the allowed values, the remedy."""

from __future__ import annotations

import inspect
import io
import os
import sys
from collections.abc import Callable

PREEMPTED = 75  # EX_TEMPFAIL: a signal stopped the training; the same command resumes it


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


def run_command(main: Callable[[list[str]], int | None], *, parses_help: bool = False) -> None:
    """Run a command's `main(argv)` as a process: one line on stderr and an exit code instead of a traceback.

    `--help` prints the docstring of the command's module, unless the command parses it itself (`parses_help`). Under
    a launcher, every rank gets the same error and only the first prints it. Unprintable characters are escaped; a
    closed stdout is ignored.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if not parses_help and not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        if first:
            print(inspect.getdoc(sys.modules[main.__module__]))
        sys.exit(0)
    try:
        code = main(sys.argv[1:])
    except InputError as error:
        if first:
            print(f"fastflower: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `| head` is not a failure
        sys.stderr.close()
        code = 0
    sys.exit(code or 0)
