"""The ends of a rank: refused before training, failed during it. Imports nothing heavy, so refusals come at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from fastflower.core.errors import PREEMPTED, InputError, of_machine, one_line

PATIENCE = 60.0  # seconds that other ranks wait for rank 0 to print why all exit


class RankFailure(SystemExit):
    """An error of one rank, which exits at once because the other ranks are waiting for it."""


@contextmanager
def rank_zero_reports() -> Iterator[None]:
    """Let rank 0 print the reason and set the exit code when every rank rejects the input.

    The others wait: the launcher ends all ranks when one exits, and rank 0 may not have printed yet. A rank that still
    runs after PATIENCE was alone with its error, and prints it itself.
    """
    try:
        yield
    except RankFailure:
        raise
    except (InputError, OSError, SystemExit) as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank and getattr(error, "code", None) != PREEMPTED:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(PATIENCE)
            if not isinstance(error, SystemExit):
                fault = of_machine(error) if isinstance(error, OSError) else error
                print(f"fastflower: rank {rank}: {one_line(str(fault))}", file=sys.stderr, flush=True)
                raise RankFailure(fault.exit_code) from None
        raise


def exit_on_sigterm() -> None:
    """Let SIGTERM end this process as an exit, with PREEMPTED: nothing is to be saved yet.

    By default a process ends without removing the temporary folder that torch makes when it is imported.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))


@contextmanager
def quick_exit() -> Iterator[None]:
    """Context manager around a command: a failing rank of several ends without the interpreter's shutdown."""
    try:
        yield
    except BaseException as end:
        # a refused rank has not imported it, or not to its end
        group = sys.modules.get("torch.distributed")
        if not getattr(group, "is_initialized", bool)() or group is None or group.get_world_size() == 1:
            raise
        code = end.code if isinstance(end, SystemExit) else 1
        if not isinstance(code, int):  # an error of ours, or a text
            traceback.print_exc()
            code = 1
        leave(code)


def leave(code: int) -> NoReturn:
    """End the process without the interpreter's shutdown, in which NCCL's destructors may wait for lost ranks."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
