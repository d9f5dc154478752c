"""The launcher of a rank (composer, torchrun): whether it made this process's environment and still runs."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from fastflower.core.errors import EnvironmentFault
from fastflower.core.workers import die_with_parent

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
VARIABLES = (*NEEDED, "NODE_RANK")
PATIENCE = 20.0  # seconds within which a launcher has started all ranks of a machine
_parents: list[int] = []  # the process that started this one, once `follow` has seen it


def forget_leftovers() -> None:
    """Remove a rank's variables from the environment, with a line, where they cannot come from a launcher.

    A launcher sets all of them. Leftovers would make a process believe that it is the silent second rank of two.
    """
    found = [name for name in VARIABLES if name in os.environ]
    missing = [name for name in NEEDED if name not in os.environ]
    if found and (missing or not _is_rank()):
        text = f"{', '.join(missing)} not set" if missing else "they are not a rank's numbers"
        settings = ", ".join(f"{name}={os.environ.pop(name)}" for name in found)
        print(f"fastflower: ignoring {settings}: no launcher set them ({text})", file=sys.stderr)


def follow() -> None:
    """Have SIGTERM sent to this rank when its launcher ends, and exit if that has happened already.

    To be called before the imports that take seconds, and again by the training: a rank that outlives its launcher
    holds the run's lock, a GPU and a port.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return
    if not _parents:
        _parents.append(os.getppid())
    die_with_parent(signal.SIGTERM)
    parent = os.getppid()
    # in a container the launcher may be process 1, which otherwise adopts orphans
    if parent != _parents[0] or (parent == 1 and Path(sys.argv[0]).stem not in _read("/proc/1/cmdline")):
        raise SystemExit("fastflower: the launcher of this rank has ended")


def check_siblings() -> None:
    """Raise EnvironmentFault when no other rank of this machine is started within PATIENCE seconds.

    Does nothing where /proc does not show other processes, and with one rank a machine.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= 1 or not Path("/proc/self/environ").exists():
        return
    deadline = time.monotonic() + PATIENCE
    while not _sibling_runs():
        if time.monotonic() > deadline:
            settings = ", ".join(f"{name}={os.environ[name]}" for name in NEEDED)
            raise EnvironmentFault(
                f"{settings}: no other rank runs on this machine; unset them for one rank, or start all ranks with "
                f"composer -n {os.environ['LOCAL_WORLD_SIZE']}"
            )
        time.sleep(0.2)


def _is_rank() -> bool:
    numbers = [os.environ[name] for name in NEEDED if name != "MASTER_ADDR"]
    if not all(number.isdecimal() for number in numbers):
        return False
    rank, world, local, local_world, port = map(int, numbers)
    return rank < world and local < local_world <= world and 0 < port < 2**16


def _sibling_runs() -> bool:
    """True if another process has this rank's port and another rank number."""
    port, rank = (f"\0{name}={os.environ[name]}\0" for name in ("MASTER_PORT", "RANK"))
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            environment = "\0" + _read(f"{folder}/environ") + "\0"
            if port in environment and "\0RANK=" in environment and rank not in environment:
                return True
    return False


def _read(path: str) -> str:
    try:
        return Path(path).read_bytes().decode(errors="replace")
    except OSError:
        return ""
