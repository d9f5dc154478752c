"""Checkpoint files: best_clean, best_combo and that of select.metric, ema_best and swa as members, `last` to resume.

Every file is written to a temporary path, checked and renamed; only then is its predecessor removed. Of `last` the
previous generation is kept. All hold plain tensors, numbers and text, copied to the host at the step they belong to
and written by a thread while training continues.
"""

from __future__ import annotations

import datetime
import errno
import functools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from composer.core import Callback, Precision, State, Timestamp
from composer.loggers import Logger
from composer.utils import dist
from torch import nn

from fastflower.callbacks.scoring import Scoring
from fastflower.callbacks.stop import Stop
from fastflower.callbacks.writer import BackgroundWriter
from fastflower.core import checkpoint, files
from fastflower.core.errors import PREEMPTED, EnvironmentFault
from fastflower.core.files import fsync_folder, temporary_path
from fastflower.core.records import to_plain
from fastflower.core.runs import TRAINED_KINDS, Run, parse_member
from fastflower.model.member import MemberMeta, save_member

# layout of the training state in `last`; raise it when a component's state changes its keys: resume refuses others
LAYOUT = 4
FIXED_NAMES = {kind: f"{kind}.pth" for kind in TRAINED_KINDS}


class Stateful(Protocol):
    """An algorithm or callback with state that a resume must restore."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class ResumeMeta:
    """The part of a `last`'s description that resume reads."""

    identity: dict[str, Any]  # of the run, see recipe.identity
    layout: int  # see LAYOUT
    finished: str  # the reason why training is over, "" while it is not
    best: dict[str, float | None]  # epoch and score of the best epoch so far


def previous_last(run: Run) -> Path:
    """The path of the previous generation of `last`; its name matches no member pattern."""
    return run.model_dir / f"last__{run.stem}.previous.pth"


def remove_leftovers(run: Run) -> None:
    """Delete this run's temporary files, and those of any process that is gone.

    Safe because the caller holds the run's lock: no live process can own a temporary file with this run's name.
    """
    for temporary in run.model_dir.glob(f".*__{run.stem}[._]*.tmp"):
        temporary.unlink(missing_ok=True)
    files.remove_abandoned(run.results_dir, below=True)


def publish(run: Run, kind: str, *, epoch: int, score: float, write: Callable[[Path], None]) -> Path:
    """Write a checkpoint under its templated name, link the fixed name to it, and remove its predecessors."""
    path = run.checkpoint_path(kind, epoch, score)
    try:
        if kind == "last":
            _keep_previous(run)
        write(path)
        supersede(run, kind, path)
    except OSError as error:
        raise _write_fault(path, error) from None
    return path


def supersede(run: Run, kind: str, path: Path) -> None:
    """Link the fixed name of a kind, and remove the run's other checkpoints of it.

    `last.pth` is the one written last; the others belong to the best of all runs of the experiment, whatever their
    backbone, fold and seed.
    """
    fixed = run.model_dir / FIXED_NAMES[kind]
    if kind == "last":
        _link(path, fixed)
    else:
        linked = None
        while linked != (best := _best_of_all(run, kind, path)):  # again if another run saved in between
            _link(best, fixed, temporary=path)
            linked = best
    for predecessor in run.checkpoints(kind):
        if predecessor != path:
            predecessor.unlink(missing_ok=True)


def write_permanent(write: Callable[[Path], None], path: Path) -> None:
    """Write a `last` as `epoch__*.pth`, which nothing removes and no member pattern matches, and link `path` to it.

    In this order: a run killed in between resumes from the previous `last` and writes both again.
    """
    permanent = path.with_name(path.name.replace("last__", "epoch__", 1))
    write(permanent)
    _link(permanent, path)


def _keep_previous(run: Run) -> None:
    current = run.checkpoints("last")
    if current:
        _link(current[-1], previous_last(run))


def _best_of_all(run: Run, kind: str, path: Path) -> Path:
    """The checkpoint of the highest score of a kind: the run's own `path`, or one of the experiment's other runs."""
    names = {other: parse_member(other) for other in sorted(run.model_dir.glob(f"{kind}__*.pth"))}
    own = (run.backbone, run.fold, run.seed)
    scores = {
        other: name.score
        for other, name in names.items()
        if name and name.kind == kind and (other == path or (name.backbone, name.fold, name.seed) != own)
    }
    return max(scores, key=lambda other: scores[other], default=path)


def _link(path: Path, name: Path, *, temporary: Path | None = None) -> None:
    """Atomically make `name` a hard link to `path`; a copy where the disk has no hard links.

    The temporary link is named after `temporary` (default: `path`), a checkpoint of this run: all runs of an
    experiment share fixed names.
    """
    temporary = temporary_path(temporary or path)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        temporary.write_bytes(path.read_bytes())
    os.replace(temporary, name)
    temporary.unlink(missing_ok=True)  # rename does nothing between two names of one file, as after a resume
    fsync_folder(name.parent)


def _write_fault(path: Path, error: OSError) -> EnvironmentFault:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    cause = "the disk is full" if full else f"cannot write ({error.strerror})"
    return EnvironmentFault(
        f"{path}: {cause}; the last good checkpoint is kept, make room and run the same command"
    )


class CheckpointSaver(Callback):
    """EVAL_AFTER_ALL: the best checkpoints. BATCH_CHECKPOINT, EPOCH_CHECKPOINT: `last`, every train.save_every.

    BATCH_END, EPOCH_END, EVAL_BATCH_END: after a signal, save `last` and exit with code 75. FIT_END: wait for writes.
    `components` are the stateful algorithms and callbacks by name; `meta(epoch, kind, weights, scores)` describes a
    member. The `last` of every `keep`-th epoch is kept for good (0: none). Only rank 0 writes, in the background;
    `seconds` is the time that training waited for it.
    """

    def __init__(
        self,
        run: Run,
        networks: dict[str, nn.Module],
        *,
        scoring: Scoring,
        components: dict[str, Stateful],
        meta: Callable[..., MemberMeta],
        identity: dict[str, Any],
        every: tuple[int, str],
        stop: Stop,
        keep: int = 0,
    ) -> None:
        self.run = run
        self.networks = networks
        self.scoring = scoring
        self.components = components
        self.meta = meta
        self.identity = identity
        self.every = every
        self.stop = stop
        self.keep = keep
        self.writer = BackgroundWriter()
        self.seconds = 0.0

    def eval_after_all(self, state: State, logger: Logger) -> None:
        epoch_scores = self.scoring.latest
        assert epoch_scores is not None and epoch_scores.verdict is not None
        if dist.get_global_rank():
            return
        start = time.perf_counter()
        self.writer.wait()
        new = epoch_scores.verdict.new
        copies = {
            weights: checkpoint.snapshot(self.networks[weights].state_dict()) for weights in {*new.values()}
        }
        for kind, weights in new.items():
            epoch, flat = epoch_scores.epoch, epoch_scores.flat()
            meta = self.meta(epoch=epoch, kind=kind, weights=weights, scores=flat)
            write = functools.partial(save_member, tensors=copies[weights], meta=meta)
            best = self.scoring.selection.bests.get(kind)  # None where nothing is held out
            self._write_later(kind, epoch, score=best.score if best else 0.0, write=write)
        self.seconds += time.perf_counter() - start

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.stop.requested_on_any_rank(state):
            self._save_and_exit(state, state.timestamp)

    def epoch_end(self, state: State, logger: Logger) -> None:
        if self.stop.requested_on_any_rank(state):
            # with the timestamp of the epoch's last step, so that a resume repeats the end of the epoch
            self._save_and_exit(state, state.previous_timestamp)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        self.epoch_end(state, logger)  # a resume repeats the whole evaluation

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
        self.writer.wait()

    def close(self, state: State, logger: Logger) -> None:
        self.writer.close()

    def save_last(
        self, state: State, timestamp: Timestamp | None, *, finished: str = "", keep: bool = False
    ) -> None:
        """Write the whole training state at `timestamp` as `last`; with `keep` also for good as `epoch__*.pth`.

        `finished` is the reason why training is over, empty while it is not.
        """
        assert timestamp is not None
        if dist.get_global_rank():
            return
        start = time.perf_counter()
        self.writer.wait("last")
        epoch = timestamp.epoch.value
        best = self.scoring.selection.best
        member = self.meta(epoch=epoch, kind="last", weights="raw", scores=self.scoring.flat)
        resume = ResumeMeta(
            identity=self.identity,
            layout=LAYOUT,
            finished=finished,
            best={"epoch": best.epoch, "score": best.score if best.epoch else None},
        )
        meta = {**to_plain(member), **to_plain(resume)}
        training_state = {
            "time": plain_time(timestamp),
            "optimizer": state.optimizers[0].state_dict(),
            "scaler": scaler_state(state),
            "parts": {name: component.state_dict() for name, component in self.components.items()},
        }
        tensors, training_state = checkpoint.snapshot((self.networks["raw"].state_dict(), training_state))
        write = functools.partial(checkpoint.save, tensors=tensors, meta=meta, **training_state)
        if keep:
            write = functools.partial(write_permanent, write)
        self._write_later("last", epoch, score=self.scoring.score, write=write)
        self.seconds += time.perf_counter() - start

    def _write_later(self, kind: str, epoch: int, *, score: float, write: Callable[[Path], None]) -> None:
        work = functools.partial(publish, self.run, kind, epoch=epoch, score=score, write=write)
        self.writer.add(kind, work)

    def _save_and_exit(self, state: State, timestamp: Timestamp | None) -> None:
        self.save_last(state, timestamp)
        self.writer.wait()
        if dist.get_world_size() > 1:
            # the launcher kills all ranks soon after the first has ended: rank 0 may still be writing gigabytes; the
            # process group's timeout bounds the wait
            dist.barrier()
        if dist.get_global_rank() == 0:
            print(
                "fastflower: stopped by a signal; the state is saved, run the same command to resume",
                file=sys.stderr,
            )
        raise SystemExit(PREEMPTED)


def scaler_state(state: State) -> dict[str, Any]:
    """The state of the gradient scaler where the precision needs one; Composer has one for bfloat16, too, unused."""
    used = state.scaler is not None and state.precision == Precision.AMP_FP16
    return state.scaler.state_dict() if state.scaler is not None and used else {}


def plain_time(timestamp: Timestamp) -> dict[str, float]:
    """Composer's timestamp as plain numbers; durations in seconds."""
    return {
        name: value.total_seconds() if isinstance(value, datetime.timedelta) else value
        for name, value in timestamp.state_dict().items()
    }
