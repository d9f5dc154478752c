"""A thread that ends a rank which waits, inside a collective, for a process that is gone.

NCCL raises nothing when another rank ends: the main thread stays in the driver, where no Python signal handler runs,
until the launcher kills it, and the exit code of the rank that failed is lost.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
import threading
from typing import NoReturn

import torch
from composer.utils import dist

from fastflower.core.errors import EnvironmentFault
from fastflower.training.exits import leave

POLL = 0.5  # seconds between two looks
GRACE = 10.0  # seconds for the main thread to notice by itself; below the 30 s that launchers wait
SAVING = 300.0  # seconds for a rank to save its state after the launcher has ended
KEY = "fastflower/exit_code"  # of the rank that failed, in the store of the process group


class Watch:
    """Ends this process when another rank of this machine, the store of rank 0, or the launcher is gone.

    `stop` it before leaving the process group. `announce` tells the other ranks the exit code of this one, which
    failed; `failed_code` is what another rank announced. All ranks must build it at the same time.
    """

    def __init__(self) -> None:
        place = (socket.gethostname(), _pid_namespace())
        ranks = dist.all_gather_object((place, os.getpid()))
        self._peers = {rank: pid for rank, (home, pid) in enumerate(ranks) if home == place}
        self._peers.pop(dist.get_global_rank(), None)
        self._launcher = os.getppid()
        self._stopped = threading.Event()
        self._store = torch.distributed.TCPStore(  # a connection of its own: others may wait in theirs
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=GRACE),
        )
        threading.Thread(target=self._run, name="fastflower-watch", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def announce(self, code: int) -> None:
        """Tell the other ranks this rank's exit code, unless another one was first."""
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(KEY, "", str(code))

    def failed_code(self) -> int | None:
        """The exit code of the first rank that announced one; None without, or when the store is gone."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([KEY]):  # type: ignore[attr-defined]
                return int(self._store.get(KEY))
        return None

    def _run(self) -> None:
        while not self._stopped.wait(POLL):
            gone = [rank for rank, pid in self._peers.items() if not _runs(pid)]
            if gone or self.failed_code() is not None:
                if not self._stopped.wait(GRACE):
                    self._end(f"rank {gone[0]} has ended" if gone else "another rank has failed")
            elif os.getppid() != self._launcher and not self._stopped.wait(SAVING):
                self._end("the launcher has ended")

    def _end(self, reason: str) -> NoReturn:
        rank = dist.get_global_rank()
        print(f"fastflower: rank {rank}: {reason}; its own message says why", file=sys.stderr, flush=True)
        leave(self.failed_code() or EnvironmentFault.exit_code)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
