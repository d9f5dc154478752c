"""The launcher of ranks: ours, and whether another one (composer, torchrun) made this process's environment."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.core.files import scratch_folder
from fastflower.core.workers import check_threads, die_with_parent

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
VARIABLES = (*NEEDED, "NODE_RANK")
THREADS = 32  # that a rank may start: of its process group, gradients, loaders and saving
PATIENCE = 20.0  # seconds within which a launcher has started all ranks of a machine
CLEANUP = 30.0  # seconds that the other ranks have to end after one has failed
POLL = 0.1  # seconds between two looks at the ranks
OWN_WORDS = "fastflower: rank"  # with which a rank other than 0 begins its error
SURVIVOR = "another rank has ended, and its own message says why"
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


def is_rank() -> bool:
    """True if a launcher started this process."""
    return "RANK" in os.environ


def split_ranks(argv: list[str]) -> tuple[int | None, list[str]]:
    """The number of ranks that `-n N` asks for, None without it, and the other arguments."""
    rest = list(argv)
    count = None
    while "-n" in rest:
        position = rest.index("-n")
        text = rest[position + 1] if position + 1 < len(rest) else ""
        if not text.isdecimal() or int(text) < 1:
            raise InputError(
                f"-n {text or 'without a number'}: must be a number of processes from 1, such as -n 2"
            )
        count = int(text)
        del rest[position : position + 2]
    if count is not None and is_rank():
        raise InputError(
            "got -n inside a launched process; give the number of processes to composer -n instead"
        )
    return count, rest


def gpu_count() -> int:
    """GPUs that torch can use; torch is imported only on a machine that seems to have one."""
    if not (
        any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists() or shutil.which("nvidia-smi")
    ):
        return 0
    import torch  # here: two seconds, which a machine without GPUs does not spend

    return torch.cuda.device_count()


def launch(command: list[str], count: int) -> int:
    """Run a command as `count` ranks of this machine; returns the exit code of the first that fails, else 0.

    Rank 0 writes to this process's console. What another rank writes is kept, and shown if that one fails first: an
    error is printed by the rank that has it, and nothing is added to it. SIGTERM is passed on and Ctrl-C reaches the
    ranks by itself; this process then waits until they have saved. Exit codes are theirs, 128 + n for a signal n.
    """
    check_threads(count * THREADS)
    with scratch_folder("ranks") as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {
            **os.environ,
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "NODE_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "PYTHONUNBUFFERED": "1",
        }
        free.close()
        outputs = [open(Path(folder, f"rank{rank}"), "w+b") for rank in range(count)]  # noqa: SIM115
        ranks: list[subprocess.Popen[bytes]] = []

        def pass_on(signum: int, frame: FrameType | None) -> None:
            for process in ranks:
                if signum != signal.SIGINT and process.poll() is None:
                    process.send_signal(signum)

        handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for rank, output in enumerate(outputs):
                environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                own = None if rank == 0 else output
                ranks.append(subprocess.Popen(command, env=environment, stdout=own, stderr=own))
            return _wait(ranks, outputs)
        finally:
            for process in ranks:
                process.kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for output in outputs:
                output.close()


def _wait(ranks: list[subprocess.Popen[bytes]], outputs: Sequence[IO[bytes]]) -> int:
    """Wait for all ranks, end the others when one fails, and show why; returns the exit code of that one."""
    while True:
        codes = [process.poll() for process in ranks]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None:
            break
        if None not in codes:
            return 0
        time.sleep(POLL)
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + CLEANUP
    while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
        time.sleep(POLL)
    for process in ranks:
        process.kill()  # those that would not end
        process.wait()
    _say_why(ranks, outputs, failed)
    code = ranks[failed].returncode
    return code if code > 0 else 128 - code


def _say_why(ranks: list[subprocess.Popen[bytes]], outputs: Sequence[IO[bytes]], failed: int) -> None:
    """Print the failures of the ranks other than 0; rank 0 has printed its own already."""
    for rank, output in enumerate(outputs[1:], 1):
        output.seek(0)
        text = output.read().decode(errors="replace")
        start = text.find(f"{OWN_WORDS} {rank}:")
        if ranks[rank].returncode > 0 and (start >= 0 or rank == failed) and SURVIVOR not in text:
            sys.stderr.write(text[max(start, 0) :])
    code = ranks[failed].returncode
    if code < 0:
        cause = ", most likely for want of memory" if code == -signal.SIGKILL else ""
        name = signal.Signals(-code).name
        print(f"fastflower: rank {failed} was ended by {name}{cause}", file=sys.stderr)


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

    Does nothing where /proc does not show other processes, and with one rank a machine, unless the ranks meet at an
    address that other machines cannot reach.
    """
    alone = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= 1 and not _is_loopback(os.environ["MASTER_ADDR"])
    if alone or not Path("/proc/self/environ").exists():
        return
    deadline = time.monotonic() + PATIENCE
    while not _sibling_runs():
        if time.monotonic() > deadline:
            settings = ", ".join(f"{name}={os.environ[name]}" for name in NEEDED)
            ranks = os.environ[
                "WORLD_SIZE" if _is_loopback(os.environ["MASTER_ADDR"]) else "LOCAL_WORLD_SIZE"
            ]
            raise EnvironmentFault(
                f"{settings}: no other rank runs on this machine; unset them for one rank, or start all ranks with "
                f"composer -n {ranks}"
            )
        time.sleep(0.2)


def _is_loopback(address: str) -> bool:
    return address in ("localhost", "::1") or address.startswith("127.")


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
