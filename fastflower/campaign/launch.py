"""Training processes: start one, and run many one after another."""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from fastflower.campaign.plan import Task
from fastflower.core import console
from fastflower.core.errors import PREEMPTED, EnvironmentFault, InputError
from fastflower.core.files import is_locked
from fastflower.core.records import read_record
from fastflower.core.runs import Run
from fastflower.core.workers import die_with_parent
from fastflower.data.betons import fold_set
from fastflower.recipe.derived import derive
from fastflower.recipe.identity import differences, identity
from fastflower.recipe.run_record import RunEnd

# environment that a launcher sets for its ranks; a training started by a rank must not inherit it
RENDEZVOUS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "BASE_RANK", "GROUP_RANK", "ROLE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
SAVE_TIMEOUT = 60.0  # seconds that an interrupted training has to write its checkpoint
POLL = 0.1  # seconds between two looks at a run's lock
TRAIN = Path(__file__).resolve().parents[1] / "train.py"


@dataclass(frozen=True)
class Result:
    """Outcome of a task; `state` is done, kept (finished by an earlier campaign) or failed."""

    task: Task
    state: str
    reason: str = ""

    @property
    def end(self) -> RunEnd | None:
        """The record that the training wrote at its end; None when it failed."""
        return read_end(self.task) if self.state != "failed" else None


def read_end(task: Task) -> RunEnd | None:
    """The record of the end of a task's run; None when it is missing, damaged or of another version."""
    try:
        return read_record(task.run.end_path, RunEnd)
    except InputError:
        return None


class Finished:
    """Tests whether a task's run is finished with the same recipe, data and global batch; reads each fold once."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.data_identities: dict[tuple[str, int, str], dict[str, str | int]] = {}

    def __call__(self, task: Task) -> bool:
        data = task.recipe.data
        key = data.home, task.run.fold, data.unlabelled if task.recipe.semi.enabled else ""
        if key not in self.data_identities:
            self.data_identities[key] = fold_set.open_fold(task.recipe, task.run.fold).data_identity()
        recorded = read_end(task)
        if recorded is None or not task.run.checkpoints("last"):
            return False
        from fastflower.model.network import fitted  # here: torch and timm take seconds

        recipe, _ = fitted(task.recipe)
        current = identity(recipe, derive(recipe, self.ranks), self.data_identities[key])
        return not differences(recorded.identity, current)


def run_sequentially(tasks: Iterable[Task], ranks: int, finished: Finished) -> Iterator[Result]:
    """Run trainings one after another with output on the console; yields each result before the next starts."""
    for number, task in enumerate(tasks, 1):
        if finished(task):
            yield Result(task, "kept")
            continue
        print(f"\n[{number}] {task.name}", flush=True)
        await_end(task.run)
        code, reason = run_process(training_command(task, ranks), child_environment(), None)
        if code == PREEMPTED:
            raise KeyboardInterrupt
        yield Result(task, "failed" if code else "done", reason)


def await_end(run: Run) -> None:
    """Wait, within bounds, while another process trains a run: that of a killed campaign saves its state and exits."""
    deadline = time.monotonic() + SAVE_TIMEOUT
    if is_locked(run.lock_path):
        print(f"waiting for another process that trains {run.stem}, up to {SAVE_TIMEOUT:.0f} s", flush=True)
    while is_locked(run.lock_path) and time.monotonic() < deadline:
        time.sleep(POLL)


def training_command(task: Task, ranks: int) -> list[str]:
    """The train command; a single rank starts without the launcher, which costs seconds."""
    if ranks == 1:
        return [sys.executable, "-m", "fastflower.train", *task.arguments]
    composer = Path(sys.executable).with_name("composer")
    return [str(composer), "-n", str(ranks), str(TRAIN), *task.arguments]


def child_environment(threads: int = 0) -> dict[str, str]:
    """This process's environment without a launcher's variables; `threads` of each rank, 0: not set."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in RENDEZVOUS and not name.startswith("TORCHELASTIC_")
    }
    return inherited | {console.NEXT: "0"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def run_process(command: list[str], environment: dict[str, str], log: Path | None) -> tuple[int, str]:
    """Run a command to its end, with output to `log` or the console; returns the exit code and the failure reason.

    The command gets SIGTERM, on which a training saves and exits, when this process dies and on Ctrl-C; after Ctrl-C
    it is waited for.
    """
    last_lines: collections.deque[str] = collections.deque(maxlen=50)
    target = open(log, "ab") if log else None  # noqa: SIM115  # the reader thread uses it after this block
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=target,
            stderr=subprocess.PIPE,
            start_new_session=True,  # gets Ctrl-C once, from this process: a second signal would stop its saving
            preexec_fn=partial(die_with_parent, signal.SIGTERM, parent=os.getpid()),
        )
        reader = threading.Thread(target=_forward, args=(process.stderr, target, last_lines), daemon=True)
        reader.start()
        try:
            code = process.wait()
        except BaseException:
            _end(process)
            raise
        reader.join(5.0)  # a grandchild may still hold the pipe
    except OSError as error:
        raise EnvironmentFault(f"cannot start {command[0]}: {error.strerror}; run make setup") from None
    finally:
        if target:
            target.close()
    return code, "" if code == 0 else _failure_reason(code, list(last_lines), time.monotonic() - started)


def _forward(source: IO[bytes] | None, target: IO[bytes] | None, last_lines: collections.deque[str]) -> None:
    """Forward stderr line by line and keep the last lines."""
    assert source is not None
    with source:
        for line in source:
            last_lines.append(line.decode("utf-8", "replace").strip())
            if target is None:
                sys.stderr.write(line.decode("utf-8", "replace"))
                sys.stderr.flush()
            elif not target.closed:
                target.write(line)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM, wait until the training has saved, and kill it after SAVE_TIMEOUT."""
    process.terminate()
    try:
        process.wait(SAVE_TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _failure_reason(code: int, lines: list[str], seconds: float) -> str:
    """The training's error message, else the last line of stderr, with the exit code or signal."""
    messages = [line.removeprefix("fastflower: ") for line in lines if line.startswith("fastflower: ")]
    output = [line for line in lines if line]
    reason = messages[0] if messages else output[-1] if output else "no error output"
    status = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{reason} ({status} after {seconds:.0f} s)"
