"""Recorder of events.jsonl and TensorBoard: a row at the start, for each epoch and at the end; rank 0 writes."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from fastflower.callbacks.scoring import Scoring
from fastflower.callbacks.tensorboard_files import TensorBoard
from fastflower.core import runs
from fastflower.core.runs import Run
from fastflower.recipe.derived import Derived

SUMS = ("loss", "norm", "steps", "images", "wait", "seconds", "skipped", "hits", "seen")


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of an epoch's row, named as in TensorBoard and other services."""
    numbers = {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "epoch"
    }
    for kind, values in row["per_kind"].items():
        numbers |= {f"corrupt_{name}/{kind}": value for name, value in values.items()}
    for column, values in row.get("aux", {}).items():
        shown = re.sub(r"[^\w .-]", "_", column)  # the marks that MLflow allows
        numbers |= {f"aux_{name}/{shown}": value for name, value in values.items()}
    # MLflow rejects the whole epoch when a name has a comma
    return numbers | {f"lr/{name.replace(',', '')}": value for name, value in row["lr_groups"].items()}


def gpu_peak_mb(state: State) -> float | None:
    """The largest peak of memory, in MiB, of the ranks' GPUs since the start of the epoch; None on a CPU.

    A collective: every rank must call it.
    """
    if not torch.cuda.is_available():
        return None
    peak = torch.tensor([torch.cuda.max_memory_allocated()], dtype=torch.int64)
    peak = state.device.tensor_to_device(peak)
    dist.all_reduce(peak, reduce_operation="MAX")
    return int(peak) / 2**20


class Guard(Protocol):
    """The gradient guard's view of the last step."""

    skipped: bool  # because a gradient was not finite
    norm: float  # before clipping


class Meter:
    """Sums over the steps of an epoch; saved in `last`, so that means after a resume cover the whole epoch."""

    def __init__(self) -> None:
        self.sums = dict.fromkeys(SUMS, 0.0)
        self.lr: dict[str, float] = {}
        self.total = 0.0  # seconds of all finished epochs, evaluations included

    def reset(self) -> None:
        self.sums = dict.fromkeys(SUMS, 0.0)

    def mean(self, name: str) -> float:
        """Mean over the steps that were not skipped; NaN when there are none."""
        steps = self.sums["steps"] - self.sums["skipped"]
        return self.sums[name] / steps if steps else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "lr": dict(self.lr), "total_seconds": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.lr, self.total = dict(state["sums"]), dict(state["lr"]), state["total_seconds"]


class Recorder(Callback):
    """BEFORE_DATALOADER, AFTER_DATALOADER, AFTER_LOSS, BATCH_END: measure. EVAL_AFTER_ALL: write the epoch's row, kept
    in `row`.

    The training accuracy is that of the augmented images against their label, in mixed ones that of the larger share.
    EPOCH_START: reset the sums and the peak of GPU memory. `extra_entries` are functions that return further entries
    of the row.
    """

    def __init__(
        self,
        run: Run,
        derived: Derived,
        *,
        guard: Guard,
        scoring: Scoring,
        tensorboard: TensorBoard | None,
        extra_entries: Sequence[Callable[[], dict[str, Any]]] = (),
        repeating: Callable[[], bool] = lambda: False,
    ) -> None:
        self.repeating = repeating
        self.run = run
        self.derived = derived
        self.guard = guard
        self.scoring = scoring
        self.extra_entries = extra_entries
        self.tensorboard = tensorboard if dist.get_global_rank() == 0 else None
        self.meter = Meter()
        self.row: dict[str, Any] = {}
        self._wait_start = self._eval_start = time.perf_counter()
        self._wait_seconds = 0.0
        self._hits: list[torch.Tensor] = []  # right answers and images of this step's microbatches, (2,) each
        self._counts: torch.Tensor | None = (
            None  # their sum on the device, read when somebody asks: reading waits
        )

    def epoch_start(self, state: State, logger: Logger) -> None:
        self.meter.reset()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._wait_start = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._wait_seconds = time.perf_counter() - self._wait_start

    def after_loss(self, state: State, logger: Logger) -> None:
        if self.repeating():
            return
        logits, batch = state.outputs, state.batch
        assert isinstance(logits, torch.Tensor)
        target = batch.get("target")  # with distillation the teacher's probabilities follow the labels
        labels = batch["label"] if target is None else target[:, : logits.shape[1]].argmax(1)
        right = (logits.detach().argmax(1) == labels).sum()
        self._hits.append(torch.stack([right, torch.ones_like(labels).sum()]))

    def batch_end(self, state: State, logger: Logger) -> None:
        sums = self.meter.sums
        step, self._hits = torch.stack(self._hits).sum(0), []
        if dist.get_world_size() > 1:  # at each step, so that a checkpoint holds the counts of all ranks
            dist.all_reduce(step)
        self._counts = step if self._counts is None else self._counts + step
        now = time.perf_counter()
        sums["steps"] += 1
        sums["skipped"] += self.guard.skipped
        if not self.guard.skipped:
            sums["loss"] += state.total_loss_dict["loss/train/total"]
            sums["norm"] += self.guard.norm
        before = state.previous_timestamp
        sums["images"] += state.timestamp.sample.value - (before.sample.value if before else 0)
        sums["wait"] += self._wait_seconds
        sums["seconds"] += now - self._wait_start
        self.meter.lr = {str(group["name"]): group["lr"] for group in state.optimizers[0].param_groups}

    def eval_before_all(self, state: State, logger: Logger) -> None:
        self._eval_start = time.perf_counter()

    def eval_after_all(self, state: State, logger: Logger) -> None:
        self.row = self._epoch_row(state)
        self.meter.total += self.row["seconds"]
        self.write(self.row)
        numbers = scalars(self.row)
        logger.log_metrics({"epoch": self.row["epoch"], **numbers})  # to the services that the recipe names
        if self.tensorboard:
            self.tensorboard.add_epoch(numbers, self.row["epoch"])

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to events.jsonl, with the run's backbone, fold and seed and the time."""
        if dist.get_global_rank() == 0:
            run = self.run
            key = {"event": row["event"], "backbone": run.backbone, "fold": run.fold, "seed": run.seed}
            runs.append_event(run.events_path, {**key, **row, "time": round(time.time(), 1)})

    def _epoch_row(self, state: State) -> dict[str, Any]:
        self._add_counts()
        scores, meter, epoch = self.scoring.latest, self.meter, state.timestamp.epoch.value
        assert scores is not None and scores.verdict is not None
        stage, best = self.derived.stage(epoch - 1), self.scoring.selection.best
        chosen = scores.verdict.chosen or "raw"
        seconds = meter.sums["seconds"]
        evaluation = time.perf_counter() - self._eval_start
        return {
            "event": "epoch",
            "epoch": epoch,
            "size": [stage.height, stage.width],
            "batch_global": int(meter.sums["images"] // max(meter.sums["steps"], 1)),
            "lr_min": min(meter.lr.values(), default=math.nan),
            "lr_max": max(meter.lr.values(), default=math.nan),
            "lr_groups": meter.lr,
            "train_loss": meter.mean("loss"),
            "train_acc": meter.sums["hits"] / meter.sums["seen"] if meter.sums["seen"] else math.nan,
            "val_loss": self.scoring.val_loss if scores.clean else None,
            "score": self.scoring.score if scores.clean else None,
            **scores.flat(),
            "per_kind": scores.per_kind,
            **({"aux": scores.aux} if self.scoring.aux else {}),
            "chosen": chosen,
            "best": {"epoch": best.epoch, "score": best.score, "weights": best.weights},
            "new_best": sorted(scores.verdict.new),
            "patience_left": scores.verdict.patience_left,
            "macro_alarm": scores.verdict.alarm,
            **{name: value for entries in self.extra_entries for name, value in entries().items()},
            "grad_norm": meter.mean("norm"),
            "nonfinite": int(meter.sums["skipped"]),
            "images_per_s": meter.sums["images"] / seconds if seconds else math.nan,
            "wait_share": meter.sums["wait"] / seconds if seconds else math.nan,
            "seconds": seconds + evaluation,
            "eval_seconds": evaluation,
            "gpu_peak_mb": gpu_peak_mb(state),
        }

    def _add_counts(self) -> None:
        """Add the right answers counted on the device to the meter's sums."""
        if self._counts is not None:
            for name, count in zip(("hits", "seen"), self._counts.tolist(), strict=True):
                self.meter.sums[name] += count
            self._counts = None

    def state_dict(self) -> dict[str, Any]:
        self._add_counts()
        return self.meter.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.meter.load_state_dict(state)

    def close(self, state: State, logger: Logger) -> None:
        if self.tensorboard:
            self.tensorboard.close()
