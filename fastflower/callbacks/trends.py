"""Trends over epochs that deserve a line: overfitting, odd gradients, falls of the learning rate, an F1 at rest."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from fastflower.recipe import Recipe

OVERFIT_EPOCHS, OVERFIT_RISE = 5, 0.1  # validation loss above its best for this long and by this fraction
FALLS = 3  # of the learning rate in a row
STILL_EPOCHS, STILL = 10, 0.001  # without a gain of F1
NORM_EPOCHS, NORM_RISE, NORM_LEAST = 3, 10.0, 1e-6  # epochs whose median is the usual gradient norm


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
    norms: list[float] = field(
        default_factory=list
    )  # mean gradient norms of the last epochs that were not odd
    longest: float = 0.0  # the largest of all that were not odd
    first_loss: float = math.inf  # the training loss of the first epoch
    odd: bool = False  # said, until a gradient norm is usual again


class Trends:
    """A state machine over the rows of events.jsonl. Each observation is said once, until it no longer holds.

    Overfitting is a validation loss that rises while the training loss falls, whatever the distance between them:
    smoothing, mixing and augmentation raise the training loss alone.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.sched, self.metric = recipe.sched, recipe.select.metric
        self.clip_grad = recipe.train.clip_grad
        self.course = Course()

    def update(self, row: dict[str, Any]) -> list[str]:
        """The lines for an epoch."""
        if row["size"] != self.course.size:
            self.course = Course(size=list(row["size"]))
        return [*self._overfitting(row), *self._gradient(row), *self._lr(row), *self._f1(row)]

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

    def _gradient(self, row: dict[str, Any]) -> list[str]:
        """Gradients longer than ever and ten times as long as usual, or none while the training loss is high."""
        course, norm = self.course, row["grad_norm"]
        if not math.isfinite(norm):  # no step of the epoch counted, which the gradient guard says
            return []
        if math.isinf(course.first_loss):
            course.first_loss = row["train_loss"]
        usual = statistics.median(course.norms) if len(course.norms) == NORM_EPOCHS else math.inf
        exploding = norm > max(NORM_RISE * usual, course.longest)
        vanishing = norm < NORM_LEAST and row["train_loss"] > course.first_loss / 2
        if not (exploding or vanishing):
            course.norms, course.odd = [*course.norms, norm][-NORM_EPOCHS:], False
            course.longest = max(course.longest, norm)
            return []
        if course.odd:
            return []
        course.odd = True
        if exploding:
            clip = "" if self.clip_grad else ", or set train.clip_grad=1.0"
            return [
                f"gradient norm {norm:.3g}, {norm / usual:.0f} times that of the epochs before: lower opt.lr{clip}"
            ]
        return [
            f"gradient norm {norm:.1g} with a training loss of {row['train_loss']:.4f}: gradients vanish; try "
            "another opt.lr, or a backbone with normalisation layers"
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
