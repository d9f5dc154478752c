"""Records that a run keeps in meta/: the numbers known at its start, and how it ended."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fastflower.core.errors import CorruptionError, InputError
from fastflower.core.files import digest, write_atomic
from fastflower.core.records import read_record
from fastflower.core.runs import Run
from fastflower.recipe.derived import Derived
from fastflower.recipe.load import load, to_yaml
from fastflower.recipe.schema import Recipe

RETRAIN = "run python -m fastflower.train with this recipe"
SEAL = re.compile(r"# checksum (?P<checksum>[0-9a-f]{16}) of the lines below\n(?P<text>.*)", re.DOTALL)


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
class Environment:
    """The environment of a run, to repeat it elsewhere: versions, devices, threads, and the command line."""

    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = RETRAIN

    fastflower: str
    python: str
    packages: dict[str, str | None]
    git: dict[str, Any] | None  # commit, and whether the working tree differed from it
    platform: str
    devices: list[str]
    cuda: str | None
    threads: int
    command: list[str]
    own_sources: dict[str, str] = field(default_factory=dict)  # see recipe.own


@dataclass(frozen=True, kw_only=True)
class BestEpoch:
    """The epoch (from 1) with the best score by select.metric, and the weights that reached it.

    Epoch 0 where no image was held out to be scored.
    """

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


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write a run's recipe, every key of it, as YAML below a checksum."""
    text = to_yaml(recipe)
    write_atomic(path, f"# checksum {digest(text)} of the lines below\n{text}")


def read_recipe(path: Path) -> tuple[Recipe, str]:
    """A run's recipe and its text; CorruptionError if damaged or edited, InputError if of another version."""
    text = recipe_text(path)
    return load(path), text


def recipe_text(path: Path) -> str:
    """The text of a run's recipe, below its checksum; CorruptionError if damaged or edited."""
    sealed = SEAL.fullmatch(path.read_bytes().decode("utf-8", "surrogateescape"))
    if sealed is None or digest(sealed["text"]) != sealed["checksum"]:
        raise CorruptionError(f"{path} is damaged or was edited: its checksum differs; {RETRAIN}")
    return sealed["text"]


def missing_events(folder: Path, events: list[dict[str, Any]]) -> list[str]:
    """A line for each finished run of an experiment's folder whose end or epochs are not among its events."""
    lines = []
    for path in sorted(folder.glob("meta/early_stop_*__fold*_seed*.json")):
        stem = path.stem.removeprefix("early_stop_")
        try:
            epochs = read_record(path, RunEnd).epochs
        except InputError as error:
            lines.append(f"{error}; whether all its events are there is unknown")
            continue
        present = {
            row.get("epoch")
            for row in events
            if row.get("event") == "epoch"
            and f"{row.get('backbone')}__fold{row.get('fold')}_seed{row.get('seed')}" == stem
        }
        lost = sorted(set(range(1, epochs + 1)) - present)
        if lost:
            lines.append(f"{folder / 'events.jsonl'} lacks {len(lost)} epochs of {stem}, first {lost[0]}")
    return lines
