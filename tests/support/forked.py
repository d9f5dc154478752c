"""Work in processes forked from this one, which has imported everything: a rank starts at once instead of in 10 s."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from fastflower.bench.forked import fork
from fastflower.core import errors, launcher
from support import toy_project


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def become_rank(rank: int, world: int, port: int) -> None:
    """Give this process the environment that a launcher gives to a rank."""
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "NODE_RANK": 0,
    }
    os.environ |= {name: str(value) for name, value in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # It reads the environment that a process starts with; this one is forked.
    launcher.check_siblings = lambda: None


def train(*words: str) -> NoReturn:
    """Run the train command on the project of the current directory and leave with its exit code."""
    sys.argv = ["fastflower/train.py", "tiny.yaml", *words]
    errors.run_command(toy_project.train.main)
    raise AssertionError("errors.run_command always leaves")


class Ranks:
    """Processes that call `work` as the ranks of one group."""

    def __init__(self, work: Callable[[], int | None], count: int = 2) -> None:
        port = free_port()

        def as_rank(rank: int) -> int | None:
            become_rank(rank, count, port)
            return work()

        self.outputs = [Path(f"rank_{rank}_{port}.txt").absolute() for rank in range(count)]
        self.processes = [
            fork(lambda rank=rank: as_rank(rank), path) for rank, path in enumerate(self.outputs)
        ]
        self.codes: dict[int, int] = {}

    def poll(self) -> list[int] | None:
        """The exit codes of all ranks once they have ended, a signal's number negative."""
        for rank, process in enumerate(self.processes):
            if rank not in self.codes:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return [self.codes[rank] for rank in range(len(self.processes))] if self._ended() else None

    def wait(self, seconds: float = 300) -> list[int]:
        """Wait for all ranks; kills them and fails when they take longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while (codes := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the ranks did not end within {seconds:.0f} s\n{self.text()}")
            time.sleep(0.01)
        return codes

    def kill(self, *ranks: int) -> None:
        """Send SIGKILL to these ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            if rank not in self.codes:
                os.kill(self.processes[rank], signal.SIGKILL)

    def text(self) -> str:
        """The output of all ranks."""
        return "\n".join(path.read_text() for path in self.outputs if path.exists())

    def _ended(self) -> bool:
        return len(self.codes) == len(self.processes)


def training(*words: str, prepare: Callable[[], object] = lambda: None) -> Ranks:
    """Two ranks that train the project of the current directory; each calls `prepare` first."""

    def work() -> NoReturn:
        prepare()
        train(*words)

    return Ranks(work)
