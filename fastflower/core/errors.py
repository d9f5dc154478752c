"""The one way in which bad input is refused: one line that says what was got, what is allowed, what to do."""

from __future__ import annotations

import inspect
import io
import os
import sys
from collections.abc import Callable

PREEMPTED = 75  # EX_TEMPFAIL, of a training that a signal stopped: the same command goes on


class InputError(Exception):
    """Something the user gave cannot be used; its text is the one line they read."""

    exit_code = 2


class CorruptionError(InputError):
    """A file that was written whole is no longer what it was."""

    exit_code = 3


class EnvironmentFault(InputError):
    """The machine lacks something: disk, memory, a library, a device."""

    exit_code = 4


class Diverged(InputError):
    """The run computes nothing but NaN; every rank finds out in the same step."""

    exit_code = 1


def run(main: Callable[[list[str]], int | None], *, own_help: bool = False) -> None:
    """Run a command's `main(argv)` as a process: one line on stderr and an exit code instead of a traceback.

    `--help` prints what stands at the top of the command's file, unless its options have help of their own. Under a
    launcher every rank meets the same bad input; only the first says so. What a console cannot show is escaped; a
    closed one hears nothing.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if not own_help and not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
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
