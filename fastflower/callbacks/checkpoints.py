"""Checkpoints: best_clean, best_combo, ema_best (and swa) for handing in, `last` for going on.

Every file is written aside, checked and renamed, and the one it supersedes is removed after that. Of `last` the
generation before is kept. All are plain tensors, numbers and text, copied to the host at the step they belong to
and written by a thread while training goes on.
"""

from __future__ import annotations

import datetime
import errno
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from composer.core import Callback, State, Time, Timestamp, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch import nn

from fastflower.callbacks.scoring import Scoring
from fastflower.callbacks.stop import Stop
from fastflower.callbacks.writer import Writer
from fastflower.core import checkpoint, files
from fastflower.core.errors import PREEMPTED, EnvironmentFault, InputError
from fastflower.core.files import aside_of, fsync_folder
from fastflower.core.runs import Run

# of the state in `last`; another number is refused, so raise it when a part's state changes its keys
LAYOUT = 1
FIXED = {kind: f"{kind}.pth" for kind in ("best_clean", "best_combo", "ema_best", "swa", "last")}


class Stateful(Protocol):
    """What an algorithm or callback must offer to survive a restart."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def parse_interval(text: str) -> tuple[int, str]:
    """train.save_every as (number, "ep" or "ba"). Raises InputError for anything else."""
    try:
        interval = Time.from_timestring(text)
        if interval.unit in (TimeUnit.EPOCH, TimeUnit.BATCH) and interval.value >= 1:
            return int(interval.value), str(interval.unit.value)
    except ValueError:
        pass
    raise InputError(f"train.save_every = {text}: must be epochs such as 1ep or steps such as 200ba")


def previous_last(run: Run) -> Path:
    """The generation of `last` before the current one; its name matches no member pattern."""
    return run.model_dir / f"last__{run.stem}.previous.pth"


def sweep(run: Run) -> None:
    """Remove what this run left half-written when it was killed, and what any run did that is gone.

    The caller holds the run's lock, so a checkpoint that bears its name is nobody's.
    """
    for aside in run.model_dir.glob(f".*__{run.stem}[._]*.tmp"):
        aside.unlink(missing_ok=True)
    files.sweep(run.results_dir, below=True)


def place(run: Run, kind: str, epoch: int, score: float, write: Callable[[Path], None]) -> Path:
    """Write a checkpoint under its templated name, link the fixed name to it, and remove what it supersedes."""
    path = run.file(kind, epoch, max(score, 0.0))
    try:
        if kind == "last":
            _keep_previous(run)
        write(path)
        adopt(run, kind, path)
    except OSError as error:
        raise _refusal(path, error) from None
    return path


def adopt(run: Run, kind: str, path: Path) -> None:
    """Link the fixed name of a kind to a checkpoint, and remove those that it supersedes."""
    _link(path, run.model_dir / FIXED[kind])
    for other in run.files(kind):
        if other != path:
            other.unlink(missing_ok=True)


def write_kept(write: Callable[[Path], None], path: Path) -> None:
    """Write a `last` under the name of its epoch, which nothing removes and no member pattern finds, and link it.

    In this order: a run that is killed in between goes on from the `last` before and comes here again.
    """
    kept = path.with_name(path.name.replace("last__", "epoch__", 1))
    write(kept)
    _link(kept, path)


def _keep_previous(run: Run) -> None:
    current = run.files("last")
    if current:
        _link(current[-1], previous_last(run))


def _link(path: Path, name: Path) -> None:
    """Let `name` be the same file as `path`, replacing what it was; a copy where the disk has no hard links.

    Aside it bears the name of `path`, which says whose it is: fixed names are shared by the runs of an experiment.
    """
    aside = aside_of(path)
    aside.unlink(missing_ok=True)
    try:
        os.link(path, aside)
    except OSError:
        aside.write_bytes(path.read_bytes())
    os.replace(aside, name)
    aside.unlink(missing_ok=True)  # rename does nothing between two names of one file, as after a resume
    fsync_folder(name.parent)


def _refusal(path: Path, error: OSError) -> EnvironmentFault:
    what = (
        "the disk is full"
        if error.errno in (errno.ENOSPC, errno.EDQUOT)
        else f"cannot write ({error.strerror})"
    )
    return EnvironmentFault(
        f"{path}: {what}; the last good checkpoint is kept, make room and run the same command"
    )


class Saving(Callback):
    """EVAL_AFTER_ALL: the best checkpoints. BATCH_CHECKPOINT, EPOCH_CHECKPOINT: `last`, every train.save_every.

    BATCH_END, EPOCH_END, EVAL_BATCH_END: when a signal asked, save `last` and leave with exit code 75. FIT_END: wait.
    `parts` are whatever else has state, by name; `meta(epoch=...)` describes a member.
    Only rank 0 writes, behind the training; `seconds` is how long training stood still for it.
    """

    def __init__(
        self,
        run: Run,
        networks: dict[str, nn.Module],
        *,
        scoring: Scoring,
        parts: dict[str, Stateful],
        meta: Callable[..., dict[str, Any]],
        identity: dict[str, Any],
        every: tuple[int, str],
        stop: Stop,
        keep: int = 0,
    ) -> None:
        self.run = run
        self.networks = networks
        self.scoring = scoring
        self.parts = parts
        self.meta = meta
        self.identity = identity
        self.every = every
        self.stop = stop
        self.keep = keep
        self.writer = Writer()
        self.seconds = 0.0

    def eval_after_all(self, state: State, logger: Logger) -> None:
        board = self.scoring.latest
        assert board is not None and board.verdict is not None
        if dist.get_global_rank():
            return
        start = time.perf_counter()
        self.writer.settle()
        new = board.verdict.new
        copies = {
            weights: checkpoint.snapshot(self.networks[weights].state_dict()) for weights in {*new.values()}
        }
        for kind, weights in new.items():
            meta = {**self.meta(epoch=board.epoch), "kind": kind, "weights": weights, "scores": board.flat()}
            write = functools.partial(checkpoint.save, tensors=copies[weights], meta=meta)
            self._behind(kind, board.epoch, score=self.scoring.selection.bests[kind].score, write=write)
        self.seconds += time.perf_counter() - start

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.stop.agreed(state):
            self._leave(state, state.timestamp)

    def epoch_end(self, state: State, logger: Logger) -> None:
        if self.stop.agreed(state):  # as if the epoch's last step had just been made: its end comes again
            self._leave(state, state.previous_timestamp)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        self.epoch_end(state, logger)  # evaluation starts anew

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        number, unit = self.every
        if unit == "ba" and state.timestamp.batch.value % number == 0:
            self.save_last(state, state.timestamp)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        number, unit = self.every
        epoch = state.timestamp.epoch.value
        finished = epoch >= self.scoring.derived.epochs or bool(self.scoring.selection.stopped)
        keep = self.keep > 0 and epoch % self.keep == 0
        if finished or keep or (unit == "ep" and epoch % number == 0):
            reason = self.scoring.selection.stopped or f"all {epoch} epochs are done"
            self.save_last(state, state.timestamp, finished=reason if finished else "", keep=keep)

    def fit_end(self, state: State, logger: Logger) -> None:
        self.writer.settle()

    def close(self, state: State, logger: Logger) -> None:
        self.writer.close()

    def save_last(
        self, state: State, timestamp: Timestamp | None, *, finished: str = "", keep: bool = False
    ) -> None:
        """Write the whole training state as it is at `timestamp`; `finished` is the reason, when it is.

        With `keep` it also stays under the name of its epoch.
        """
        assert timestamp is not None
        if dist.get_global_rank():
            return
        start = time.perf_counter()
        self.writer.settle("last")
        epoch = timestamp.epoch.value
        best = self.scoring.selection.best
        meta = {**self.meta(epoch=epoch), "kind": "last", "weights": "raw", "scores": self.scoring.flat}
        meta |= {
            "identity": self.identity,
            "layout": LAYOUT,
            "finished": finished,
            "best": {"epoch": best.epoch, "score": best.score},
        }
        more = {
            "time": plain_time(timestamp),
            "optimizer": state.optimizers[0].state_dict(),
            "scaler": state.scaler.state_dict() if state.scaler is not None else {},
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        tensors, more = checkpoint.snapshot((self.networks["raw"].state_dict(), more))
        write = functools.partial(checkpoint.save, tensors=tensors, meta=meta, **more)
        if keep:
            write = functools.partial(write_kept, write)
        self._behind("last", epoch, score=self.scoring.score, write=write)
        self.seconds += time.perf_counter() - start

    def _behind(self, kind: str, epoch: int, *, score: float, write: Callable[[Path], None]) -> None:
        self.writer.add(kind, functools.partial(place, self.run, kind, epoch, score, write))

    def _leave(self, state: State, timestamp: Timestamp | None) -> None:
        self.save_last(state, timestamp)
        self.writer.settle()
        if dist.get_global_rank() == 0:
            print(
                "fastflower: stopped by a signal; the state is saved, the same command goes on",
                file=sys.stderr,
            )
        raise SystemExit(PREEMPTED)


def plain_time(timestamp: Timestamp) -> dict[str, float]:
    """Composer's timestamp as numbers; durations in seconds."""
    values = timestamp.state_dict()
    return {k: v.total_seconds() if isinstance(v, datetime.timedelta) else v for k, v in values.items()}
