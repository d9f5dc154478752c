"""Records that a run keeps in meta/: the numbers known at its start, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastflower.core.runs import Run
from fastflower.recipe.derived import Derived

RETRAIN = "run python -m fastflower.train with this recipe"


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """One parameter group of the optimizer at the start; `tensors` is the number of its parameters' tensors."""

    name: str
    part: str
    lr: float
    weight_decay: float
    tensors: int


@dataclass(frozen=True, kw_only=True)
class RunNumbers(Derived):
    """The derived numbers of a run and the facts of its network, data and device."""

    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = RETRAIN

    backbone: str
    steps: tuple[int, ...]  # of an epoch, by stage
    precision: str
    device: str
    parameters: int
    groups: tuple[ParameterGroup, ...]
    class_counts: tuple[int, ...]  # training images of each class
    validation: int  # images
    unlabelled: int  # images that are trained on without a label
    combos: tuple[tuple[str, str], ...]  # (kind, level) of the corrupted copies of the validation images
    determinism: str  # off, full, or best effort with the nondeterministic operations
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BestEpoch:
    """The epoch (from 1) with the best score by select.metric, and the weights that reached it."""

    epoch: int
    score: float
    weights: str


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """The end of a run. Its file is written last: once it exists, nothing of the run is left to do."""

    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = RETRAIN

    reason: str
    stopped_early: bool
    epochs: int
    best: BestEpoch
    idle_epochs: int  # since the last gain
    scores: dict[str, float | None]  # of the best epoch, by metric and weights, such as clean_ema
    last_scores: dict[str, float | None]
    files: dict[str, str]  # kind of checkpoint -> path
    seconds: float
    saving_seconds: float  # that training waited for checkpoints
    determinism: str
    identity: dict[str, Any]  # see recipe.identity


def numbers_path(run: Run) -> Path:
    """The file of a run's RunNumbers; that of its RunEnd is `run.end_path`."""
    return run.meta_dir / f"derived_{run.stem}.json"
