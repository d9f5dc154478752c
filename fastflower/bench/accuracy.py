"""`bench accuracy`: what fastflower and other tools score after the same processor time, on the same folds.

Each contender trains the recipe's backbone on the training images of data.fold, from the same weight file or, with
model.pretrained=false, from scratch, for its own number of epochs (--epochs), so that all take about as long; each seed
is a training in a process of its own, whose processor seconds are counted with start-up and scoring. The last epoch is
scored, on one view of each validation image: none of them chooses an epoch on the images that score it. Hits are paired
image by image, as means over the seeds.

fastflower trains as the recipe says, the others with the settings in fastflower/bench/finetuners.py and in float32, as
train.amp=false does here. fastai and ultralytics take part where they are installed; ultralytics has networks of its
own, so it does from scratch only. Finished trainings are kept in results/results/<exp>/accuracy/, so that a stopped
comparison continues with the same command.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from fastflower.core import files, runs, scores
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.core.records import read_record
from fastflower.data.folds import Folds, read_folds
from fastflower.evaluation.paired import PairedGain, paired_gain
from fastflower.model.pretrained import find_weights
from fastflower.recipe import Recipe, arguments, checks, derived, load, to_yaml

TITLES = {
    "fastflower": "fastflower",
    "plain": "plain loop: DataLoader, Pillow, torchvision, AdamW",
    "channels_last": "the plain loop in channels_last format",
    "timm": "timm's train.py",
    "fastai": "fastai: fine_tune, from scratch fit_one_cycle",
    "ultralytics": "Ultralytics classify, its yolo11n-cls",
}
MODULES = {  # what must be installed for it
    "plain": "torchvision",
    "channels_last": "torchvision",
    "fastai": "fastai",
    "ultralytics": "ultralytics",
}


@dataclass(frozen=True)
class Outcome:
    """A training's predictions of its validation images, by rows of folds.csv, and its processor seconds."""

    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = "remove it, and run the same command again"

    rows: list[int]
    predicted: list[int]
    seconds: float
    recipe: str  # digest of the recipe that trained it


@dataclass(frozen=True)
class Task:
    """One training of a contender; `words` are the recipe and its changes, `out` is the file of its outcome."""

    contender: str
    words: list[str]
    fold: int
    seed: int
    epochs: int
    script: str  # path of timm's train.py
    out: str
    recipe: str  # digest


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m fastflower.bench accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="recipe file, of a project that is converted")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    parser.add_argument(
        "--epochs", nargs="+", required=True, metavar="NAME=N", help=f"epochs of each of {', '.join(TITLES)}"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(%(default)s)")
    parser.add_argument("--timm-script", default="train.py", help="timm's train.py, from its repository")
    args = parser.parse_intermixed_args(argv)
    words = [str(arguments.locate(args.recipe)), *args.overrides]
    recipe = load(words[0], words[1:])
    checks.check(recipe)
    epochs_of = parse_epochs(args.epochs, args.timm_script)
    check_start(recipe, epochs_of)
    folds = read_folds(Path(recipe.data.home) / "folds.csv")
    if not photograph(recipe, folds, 0).is_file():
        raise InputError(
            f"data.root = {recipe.data.root}: the other tools read photographs from files, and {folds.filenames[0]} is "
            "none; give a recipe whose images are files"
        )
    folder = runs.RESULTS / recipe.exp.name / "accuracy"
    files.check_writable(folder)
    tasks = [
        Task(
            name,
            words,
            fold,
            seed,
            epochs,
            args.timm_script,
            str(folder / f"{name}_{epochs}_{fold}_{seed}.json"),
            files.digest(to_yaml(recipe)),
        )
        for seed in args.seeds
        for fold in derived.fold_numbers(recipe)
        for name, epochs in epochs_of.items()
    ]
    outcomes: dict[str, list[tuple[Task, Outcome]]] = {}
    for task in tasks:
        outcome = run(task)
        outcomes.setdefault(task.contender, []).append((task, outcome))
        top1 = np.mean(folds.class_idx[outcome.rows] == outcome.predicted)
        print(
            f"{task.contender} fold {task.fold} seed {task.seed}: {top1:.4f} after {task.epochs} epochs, "
            f"{outcome.seconds:.0f} s",
            flush=True,
        )
    print("\n" + "\n".join(table(outcomes, folds.class_idx)))
    return 0


def parse_epochs(texts: Sequence[str], script: str) -> dict[str, int]:
    """The epochs of each contender from NAME=N; InputError for another name, and for what is not installed."""
    epochs: dict[str, int] = {}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in TITLES or not number.isdecimal() or not int(number):
            raise InputError(f"--epochs {text}: give NAME=N, NAME one of {', '.join(TITLES)}, N from 1")
        epochs[name] = int(number)
    if "timm" in epochs and not Path(script).is_file():
        raise InputError(
            f"--timm-script {script}: no such file; give the train.py of timm's repository, or no timm=N"
        )
    for name, module in MODULES.items():
        if name in epochs and not importlib.util.find_spec(module):
            raise EnvironmentFault(
                f"--epochs {name}={epochs[name]}: {module} is not installed; install it, or leave it out"
            )
    return epochs


def check_start(recipe: Recipe, epochs: dict[str, int]) -> None:
    """Raises InputError where the contenders cannot start from the same weights."""
    if recipe.model.init:
        raise InputError(
            f"model.init={recipe.model.init}: the other tools start from published weights or from none; leave it out"
        )
    if not recipe.model.pretrained:
        return
    find_weights(recipe.model.backbone)
    if "ultralytics" in epochs:
        raise InputError(
            f"--epochs ultralytics={epochs['ultralytics']}: its networks cannot start from the weights of "
            f"{recipe.model.backbone}; give model.pretrained=false, or leave it out"
        )


def photograph(recipe: Recipe, folds: Folds, row: int) -> Path:
    """The file of the image in a row of folds.csv."""
    return Path(recipe.data.root, folds.filenames[row]).resolve()


def run(task: Task) -> Outcome:
    """The outcome of a task, from its file when it is finished; EnvironmentFault when its process fails."""
    path = Path(task.out)
    if path.is_file():
        kept = read_record(path, Outcome)
        if kept.recipe != task.recipe:
            raise InputError(
                f"{path} was trained with another recipe; give another exp.name, or remove the file"
            )
        return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.with_suffix(".log")
    code = start(task, log)
    if code or not path.is_file():
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise EnvironmentFault(f"{task.contender} failed, exit code {code}: {last[:200]}; see {log}")
    return read_record(path, Outcome)


def start(task: Task, log: Path) -> int:
    """Run a task in a process of its own, with its output in `log`; returns the exit code."""
    command = [sys.executable, "-m", "fastflower.bench.finetuners", json.dumps(vars(task))]
    with open(log, "wb") as output:
        return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode


def table(outcomes: dict[str, list[tuple[Task, Outcome]]], truth: np.ndarray) -> list[str]:
    """A Markdown table: a row for each contender, with fastflower's gain over it in percentage points."""
    hits = {name: mean_hits(items, truth) for name, items in outcomes.items()}
    ours = hits.get("fastflower")
    lines = [
        "| tool | epochs | CPU-seconds | clean top-1, 95% | by seed | fastflower's gain, points | p |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, items in outcomes.items():
        low, high = scores.wilson(float(hits[name].sum()), len(hits[name]))
        seeds = sorted({task.seed for task, _ in items})
        by_seed = [
            mean_hits([item for item in items if item[0].seed == seed], truth).mean() for seed in seeds
        ]
        gain = paired_gain(hits[name], ours) if ours is not None and name != "fastflower" else None
        lines.append(
            f"| {TITLES[name]} | {items[0][0].epochs} | {np.mean([outcome.seconds for _, outcome in items]):.0f} "
            f"| {hits[name].mean():.4f} ({low:.3f} to {high:.3f}) "
            f"| {', '.join(f'{score:.3f}' for score in by_seed)} | {_points(gain)} |"
        )
    return lines


def mean_hits(items: list[tuple[Task, Outcome]], truth: np.ndarray) -> np.ndarray:
    """The share of seeds that are right (N,) of the images of all folds, in the order of folds.csv."""
    total, count = np.zeros(len(truth)), np.zeros(len(truth))
    for _, outcome in items:
        total[outcome.rows] += truth[outcome.rows] == outcome.predicted
        count[outcome.rows] += 1
    return total[count > 0] / count[count > 0]


def _points(gain: PairedGain | None) -> str:
    if gain is None:
        return "- | -"
    points = [100 * value for value in (gain.gain, gain.low, gain.high)]
    return f"{points[0]:+.1f} ({points[1]:+.1f} to {points[2]:+.1f}) | {gain.p_text}"
