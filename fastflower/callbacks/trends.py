"""Trends over epochs that deserve a line: overfitting, a learning rate that keeps falling, an F1 that stands still."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from fastflower.recipe import Recipe

OVERFIT_EPOCHS, OVERFIT_RISE = 5, 0.1  # validation loss above its best for this long and by this fraction
FALLS = 3  # of the learning rate in a row
STILL_EPOCHS, STILL = 10, 0.001  # without a gain of F1


@dataclass
class Course:
    """The epochs at one image size so far; losses and scores of another size are not comparable."""

    size: list[int] = field(default_factory=list)
    val_loss: float = math.inf  # the lowest, its epoch, and the training loss there
    val_epoch: int = 0
    train_loss: float = math.inf
    overfit: bool = False  # said, until the validation loss improves
    lr: float = 0.0
    falls: list[int] = field(default_factory=list)  # epochs
    f1: float = -math.inf
    f1_epoch: int = 0
    still: bool = False  # said, until F1 improves


class Trends:
    """A state machine over the rows of events.jsonl. Each observation is said once, until it no longer holds.

    Overfitting is a validation loss that rises while the training loss falls, whatever the distance between them:
    smoothing, mixing and augmentation raise the training loss alone.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.sched, self.metric = recipe.sched, recipe.select.metric
        self.course = Course()

    def update(self, row: dict[str, Any]) -> list[str]:
        """The lines for an epoch."""
        if row["size"] != self.course.size:
            self.course = Course(size=list(row["size"]))
        return [*self._overfitting(row), *self._lr(row), *self._f1(row)]

    def _overfitting(self, row: dict[str, Any]) -> list[str]:
        course, val, train = self.course, row["val_loss"], row["train_loss"]
        if val is None:  # nothing is held out
            return []
        if val < course.val_loss:
            course.val_loss, course.val_epoch, course.train_loss = val, row["epoch"], train
            course.overfit = False
            return []
        late = row["epoch"] - course.val_epoch >= OVERFIT_EPOCHS
        if course.overfit or not (
            late and val > (1 + OVERFIT_RISE) * course.val_loss and train < course.train_loss
        ):
            return []
        course.overfit = True
        return [
            f"validation loss rose from {course.val_loss:.4f} (epoch {course.val_epoch}) to {val:.4f} while the "
            f"training loss fell from {course.train_loss:.4f} to {train:.4f}: overfitting; raise opt.weight_decay, "
            "model.drop_rate, reg.mix_prob or aug.strength"
        ]

    def _lr(self, row: dict[str, Any]) -> list[str]:
        course, before, lr = self.course, self.course.lr, row["lr_max"]
        course.lr = lr
        if self.sched.name != "plateau" or not 0 < lr < before * (1 - 1e-9):
            return []
        course.falls.append(row["epoch"])
        lines = [f"learning rate lowered from {before:.2g} to {lr:.2g}"]
        recent = course.falls[-FALLS:]
        if len(recent) == FALLS and recent[-1] - recent[0] <= (FALLS - 1) * (self.sched.patience + 1):
            course.falls = []
            lines.append(
                f"the learning rate fell {FALLS} times in {recent[-1] - recent[0]} epochs without an improvement in "
                f"between: raise sched.patience ({self.sched.patience}) to 5 or 10, or sched.factor "
                f"({self.sched.factor:g})"
            )
        return lines

    def _f1(self, row: dict[str, Any]) -> list[str]:
        course = self.course
        name = "macro_f1" if f"f1_{row['chosen']}" not in row and self.metric == "f1" else "f1"
        f1 = row.get(f"{name}_{row['chosen']}")
        if f1 is None:
            return []
        if f1 >= course.f1 + STILL or f1 >= 1 - STILL:
            course.f1, course.f1_epoch, course.still = f1, row["epoch"], False
            return []
        if course.still or row["epoch"] - course.f1_epoch < STILL_EPOCHS:
            return []
        course.still = True
        return [
            f"F1 has stood still since epoch {course.f1_epoch} ({course.f1:.4f}): try another opt.lr, or "
            "loss.name=focal with reg.ls_eps=0.05"
        ]

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.course)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.course = Course(**state)
