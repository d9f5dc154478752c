"""One training as a process of its own, and many of them one after the other."""

from __future__ import annotations

import collections
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fastflower.campaign.plan import Task
from fastflower.core.errors import PREEMPTED, EnvironmentFault
from fastflower.data.betons import fold_set
from fastflower.recipe.derived import derive
from fastflower.recipe.identity import differences, identity

# what launchers tell their ranks; a training started below one must not think that it is a rank of it
RENDEZVOUS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "BASE_RANK", "GROUP_RANK", "ROLE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
SAVING = 60.0  # seconds that an interrupted training has for its checkpoint
LIBC = ctypes.CDLL(None)
TRAIN = Path(__file__).resolve().parents[1] / "train.py"


@dataclass(frozen=True)
class Result:
    """How a task ended: done, kept (finished by an earlier campaign), or failed with its reason."""

    task: Task
    state: str
    reason: str = ""

    @property
    def end(self) -> dict[str, Any]:
        """What the training wrote at its end; empty when it failed."""
        return read_end(self.task) if self.state != "failed" else {}


def read_end(task: Task) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(task.run.end.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}


class Finished:
    """Whether a task's run is finished, with this recipe, this data and this global batch; reads each fold once."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.manifests: dict[tuple[str, int, str], list[dict[str, Any]]] = {}

    def __call__(self, task: Task) -> bool:
        data = task.recipe.data
        place = data.home, task.run.fold, data.unlabelled if task.recipe.semi.enabled else ""
        if place not in self.manifests:
            fold = fold_set.open_fold(task.recipe, task.run.fold)
            self.manifests[place] = [beton.manifest for beton in (fold.train, fold.unlabelled) if beton]
        then = read_end(task).get("identity")
        if then is None or not task.run.files("last"):
            return False
        train, *unlabelled = self.manifests[place]
        derived = derive(task.recipe, self.ranks)
        now = identity(task.recipe, derived, manifest=train, unlabelled=unlabelled[0] if unlabelled else None)
        return not differences(then, now)


def one_by_one(tasks: Iterable[Task], ranks: int, finished: Finished) -> Iterator[Result]:
    """Each training in full view after the one before; ready before it is asked for the next."""
    for number, task in enumerate(tasks, 1):
        if finished(task):
            yield Result(task, "kept")
            continue
        print(f"\n[{number}] {task.name}", flush=True)
        code, reason = run(command(task, ranks), environment(), None)
        if code == PREEMPTED:
            raise KeyboardInterrupt
        yield Result(task, "failed" if code else "done", reason)


def command(task: Task, ranks: int) -> list[str]:
    """One rank needs no launcher, which would cost seconds."""
    if ranks == 1:
        return [sys.executable, "-m", "fastflower.train", *task.words]
    composer = Path(sys.executable).with_name("composer")
    return [str(composer), "-n", str(ranks), str(TRAIN), *task.words]


def environment(threads: int = 0) -> dict[str, str]:
    """This process's environment without what a launcher put there; `threads` for each rank, 0: as they like."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in RENDEZVOUS and not name.startswith("TORCHELASTIC_")
    }
    return kept | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def run(words: list[str], environment: dict[str, str], log: Path | None) -> tuple[int, str]:
    """Run a command to its end; its output goes to `log`, or to the console. Returns its exit code and why it failed.

    When this process dies, the command is told to save and leave; so it is on Ctrl-C, and then waited for.
    """
    last: collections.deque[str] = collections.deque(maxlen=50)
    target = open(log, "ab") if log else None  # noqa: SIM115  # outlives this block in the thread
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            words,
            env=environment,
            stdout=target,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches it once, through us: a second signal would stop its saving
            preexec_fn=_die_with_parent,
        )
        reader = threading.Thread(target=_forward, args=(process.stderr, target, last), daemon=True)
        reader.start()
        try:
            code = process.wait()
        except BaseException:
            _end(process)
            raise
        reader.join(5.0)  # a grandchild may still hold the pipe
    except OSError as error:
        raise EnvironmentFault(f"cannot start {words[0]}: {error.strerror}; run make setup") from None
    finally:
        if target:
            target.close()
    return code, "" if code == 0 else _why(code, list(last), time.monotonic() - started)


def _die_with_parent() -> None:
    LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _forward(source: IO[bytes] | None, target: IO[bytes] | None, last: collections.deque[str]) -> None:
    """Pass stderr on as it comes and remember its last lines."""
    assert source is not None
    with source:
        for line in source:
            last.append(line.decode("utf-8", "replace").strip())
            if target is None:
                sys.stderr.write(line.decode("utf-8", "replace"))
                sys.stderr.flush()
            elif not target.closed:
                target.write(line)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a training to save and leave, wait for that within bounds, then end it."""
    process.terminate()
    try:
        process.wait(SAVING)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _why(code: int, lines: list[str], seconds: float) -> str:
    """The training's own sentence, else its last line, else its exit code."""
    own = [line.removeprefix("fastflower: ") for line in lines if line.startswith("fastflower: ")]
    said = [line for line in lines if line]
    words = own[0] if own else said[-1] if said else "it said nothing"
    ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{words} ({ended} after {seconds:.0f} s)"
