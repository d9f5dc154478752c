"""Console output during training: one moving line for the steps and one row an epoch.

The texts are pure functions of numbers; the callback decides when they are printed. A terminal gets a line that
updates in place, a pipe gets an occasional line, and the log file gets all permanent lines.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from fastflower.callbacks.recorder import Recorder
from fastflower.callbacks.scoring import Scoring
from fastflower.callbacks.trends import Trends
from fastflower.core.console import Console, clock
from fastflower.recipe.derived import Derived

HEADER_EVERY = 20  # rows
PLAIN_SECONDS = 300.0  # between two lines of one epoch in a pipe; shorter epochs have their row alone
REPEAT = 20  # epochs after which advice is repeated that still applies
MOVING_SECONDS = 0.2  # between two updates in a terminal
NORM_HIGH, NORM_LOW = 1e4, 1e-7  # mean gradient norms that deserve a warning

COLUMNS = (  # (name, width) in an epoch's row; "acc" in training, "ema" after a score: that of the averaged weights
    ("epoch", 6), ("size", 4), ("lr", 7), ("train", 6), ("acc", 6), ("val", 6), ("clean", 6), ("ema", 6), ("corr", 6),
    ("ema", 6), ("S", 6), ("best", 12), ("pat", 3), ("img/s", 5), ("left", 7),
)  # fmt: skip

SCORE_WIDTH = 6  # of the accuracy of an auxiliary column, which follow

SCORE_NAMES = {  # of the column of scores, by select.metric
    "combo": "S", "f1": "F1", "macro_f1": "mac F1", "macro_recall": "mac R", "log_loss": "-loss",
    "auc": "AUC", "kappa": "kappa",
}  # fmt: skip


def side(size: list[int]) -> str:
    """The text of an image size: 320, or 32x64 when height and width differ."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def headline(metric: str = "combo", aux: Sequence[str] = ()) -> str:
    """The column names above `epoch_line`, and those of auxiliary columns; another metric than S stands in its place.

    A loss has a minus.
    """
    shown = SCORE_NAMES.get(metric, "score")
    names = (shown if name == "S" else name for name, _ in COLUMNS)
    cells = [name.rjust(width) for name, (_, width) in zip(names, COLUMNS, strict=True)]
    return "  ".join([*cells, *(name.rjust(SCORE_WIDTH) for name in aux)])


def epoch_line(row: dict[str, Any], epochs: int, left: float, *, aux: Sequence[str] = ()) -> str:
    """One aligned row of an epoch's numbers, `left` in seconds; a star marks a new best epoch.

    The accuracies of the auxiliary columns `aux` are those of the chosen weights.
    """

    def score(name: str) -> str:
        value = row.get(name)
        return "-" if value is None or math.isnan(value) else f"{value:.4f}"

    average = "swa" if "clean_ema" not in row and "clean_swa" in row else "ema"
    best = row["best"]
    star = "*" if best["epoch"] == row["epoch"] else " "
    patience = row["patience_left"]
    speed = row["images_per_s"]
    cells = (
        f"{row['epoch']}/{epochs}",
        side(row["size"]),
        "-" if math.isnan(row["lr_max"]) else f"{row['lr_max']:.1e}",  # a k-NN head has no training steps
        score("train_loss"),
        score("train_acc"),
        score("val_loss"),
        score("clean_raw"),
        score(f"clean_{average}"),
        score("corrupt_raw"),
        score(f"corrupt_{average}"),
        score("score"),
        f"{best['score']:.4f} @{best['epoch']}{star}" if best["epoch"] else "-",
        "-" if patience is None else str(patience),
        "-" if math.isnan(speed) else f"{speed:.0f}" if speed >= 10 else f"{speed:.1f}",
        clock(left),
    )
    texts = [cell.rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)]
    for column in aux:
        value = row.get("aux", {}).get(column, {}).get(row["chosen"])
        texts.append(("-" if value is None else f"{value:.4f}").rjust(max(SCORE_WIDTH, len(column))))
    return "  ".join(texts).rstrip()


def step_line(
    epoch: int, epochs: int, *, step: int, steps: int, loss: float, val: float | None, lr: float, speed: float,
    epoch_left: float, left: float,
) -> str:  # fmt: skip
    """The progress of an epoch, in at most 110 characters; times in seconds."""
    val_text = f"  val {val:.4f}" if val is not None else ""
    return (
        f"epoch {epoch}/{epochs}  {100 * step / max(steps, 1):3.0f}%  step {step}/{steps}  loss {loss:.4f}{val_text}  "
        f"lr {lr:.1e}  {speed:.0f} img/s  {clock(epoch_left)} left, {clock(left)} in all"
    )


def time_left(derived: Derived, done: int, seconds: float) -> float:
    """Seconds to the horizon after `done` epochs, the last of which took `seconds`; assumes time ~ image area."""
    last = derived.stage(max(done - 1, 0))
    area = last.height * last.width
    stages = [derived.stage(epoch) for epoch in range(done, derived.epochs)]
    return sum(seconds * stage.height * stage.width / area for stage in stages)


class Progress(Callback):
    """BATCH_END: the moving line. EVAL_START: the set being scored. EVAL_AFTER_ALL: the epoch's row and notes."""

    def __init__(
        self, console: Console, derived: Derived, *, recorder: Recorder, scoring: Scoring, trends: Trends
    ) -> None:
        self.console = console
        self.trends = trends
        self.derived = derived
        self.recorder = recorder
        self.scoring = scoring
        self.rows = 0
        self._last = 0.0  # time of the last line
        self._said: dict[str, int] = {}  # note without its numbers -> epoch

    def fit_start(self, state: State, logger: Logger) -> None:
        self._last = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        now = time.perf_counter()
        step, steps = state.timestamp.batch_in_epoch.value, int(state.dataloader_len or 1)
        if now - self._last < (MOVING_SECONDS if self.console.interactive else PLAIN_SECONDS):
            return
        self._last = now
        text = self._step_text(state, step, steps)
        if self.console.interactive:
            self.console.update(text)
        else:
            self.console.write(text)

    def eval_start(self, state: State, logger: Logger) -> None:
        self.console.update(
            f"epoch {state.timestamp.epoch.value}/{self.derived.epochs}  scoring {state.dataloader_label} images"
        )

    def eval_after_all(self, state: State, logger: Logger) -> None:
        row, aux = self.recorder.row, self.scoring.recipe.data.aux_cols
        self._last = time.perf_counter()
        if self.rows % HEADER_EVERY == 0:
            self.console.write(headline(self.scoring.recipe.select.metric, aux), "bold")
        self.rows += 1
        left = (
            0.0 if self.scoring.selection.stopped else time_left(self.derived, row["epoch"], row["seconds"])
        )
        self.console.write(
            epoch_line(row, self.derived.epochs, left, aux=aux),
            "green" if row["best"]["epoch"] == row["epoch"] else "",
        )
        for note in [*self._notes(row), *self.trends.update(row)]:
            self.console.write(f"        {note}", "yellow")

    def _notes(self, row: dict[str, Any]) -> list[str]:
        latest = self.scoring.latest
        notes = [
            note
            for note in (latest.verdict.notes if latest and latest.verdict else [])
            if self._is_news(note, row["epoch"])
        ]
        if row["nonfinite"]:
            notes.append(f"{row['nonfinite']} steps were not finite and were skipped")
        if row["grad_norm"] > NORM_HIGH or row["grad_norm"] < NORM_LOW:
            notes.append(
                f"gradient norm {row['grad_norm']:.2g}: {'exploding' if row['grad_norm'] > 1 else 'vanishing'}"
            )
        return notes

    def _is_news(self, note: str, epoch: int) -> bool:
        """True unless the same note, but for its numbers, was shown in one of the last REPEAT epochs."""
        kind = re.sub(r"[\d.]+", "", note)
        news = epoch - self._said.get(kind, -REPEAT) >= REPEAT
        if news:
            self._said[kind] = epoch
        return news

    def _step_text(self, state: State, step: int, steps: int) -> str:
        sums, epoch = self.recorder.meter.sums, state.timestamp.epoch.value + 1
        per_step = sums["seconds"] / max(sums["steps"], 1)
        row, evaluation = self.recorder.row, float(self.recorder.row.get("eval_seconds", 0.0))
        epoch_left = per_step * (steps - step) + evaluation
        left = epoch_left + time_left(self.derived, epoch, per_step * steps + evaluation)
        speed = sums["images"] / sums["seconds"] if sums["seconds"] else 0.0
        lr = max(self.recorder.meter.lr.values(), default=0.0)
        loss = self.recorder.meter.mean("loss")
        return step_line(
            epoch,
            self.derived.epochs,
            step=step,
            steps=steps,
            loss=loss,
            val=row.get("val_loss"),
            lr=lr,
            speed=speed,
            epoch_left=epoch_left,
            left=left,
        )
