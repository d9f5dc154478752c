"""A finished project of drawn photographs, small enough to be made in half a minute: every file that commands write."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import numpy as np
from PIL import Image

from fastflower.core.files import write_atomic
from fastflower.core.runs import Run

EXP, BACKBONE, SEED = "tiny", "test_resnet", 42
SIDE, CLASSES, IMAGES = 32, 3, 30
RECIPE = f"""
exp: {{name: {EXP}}}
seed: {SEED}
data:
  {{img_size: {SIDE}, n_splits: 2, workers: 1, fold: all, group: phash, on_bad: skip, unlabelled: loose, store: jpeg}}
model: {{backbone: {BACKBONE}, pretrained: false, drop_path: 0}}
train: {{batch_per_gpu: 5, world_size: 1}}
sched: {{cosine_epochs: 1, warmup_epochs: 0}}
robust: {{kinds: [occlusion]}}
tta: {{scales: [{SIDE}]}}
log: {{tensorboard: false}}
bundle: {{max_ms: 60000, max_loss: 0.9}}
"""
RECIPE_FILE = "tiny.yaml"
JOURNAL = Path("results/results", EXP, "campaign_lr_grad_accum.journal")


def run_of(fold: int = 0) -> Run:
    """A training of the project."""
    return Run(exp=EXP, backbone=BACKBONE, fold=fold, seed=SEED)


def draw(home: Path) -> None:
    """Write photographs of three colours with labels, two of them equal and one unreadable, others, and the recipe."""
    rng, rows = np.random.default_rng(0), []
    for folder in ("data/train", "loose", "test_dataset"):
        (home / folder).mkdir(parents=True)
    for number in range(IMAGES):
        name, category = f"{number:02d}.jpg", number % CLASSES
        colour = np.eye(3)[category] * 90 + 60
        pixels = (rng.normal(0, 30, (40, 40, 3)) + colour).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(home / "data/train" / name, quality=90)
        rows.append((name, str(7 + category)))
        if number < 4:
            Image.fromarray(255 - pixels).save(home / "loose" / name, quality=90)
            Image.fromarray(pixels[::-1]).save(home / "test_dataset" / name, quality=90)
    copied = (home / "data/train/00.jpg").read_bytes()
    (home / "data/train/03.jpg").write_bytes(copied)
    (home / "data/train/05.jpg").write_bytes(b"")
    with open(home / "data/train_labels.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("filename", "category_id"), *rows])
    write_atomic(home / RECIPE_FILE, RECIPE)


def finish() -> None:
    """Convert, train, evaluate, ensemble, export and report the project of the current directory, and search."""
    for command in ("convert", "train", "evaluate", "ensemble", "export"):
        importlib.import_module(f"fastflower.{command}").main([RECIPE_FILE])
    importlib.import_module("fastflower.report.__main__").main([EXP])
    _search()


def _search() -> None:
    """A search of three trials, with invented scores and without trainings."""
    plan, searches = (importlib.import_module(f"fastflower.campaign.{name}") for name in ("plan", "search"))
    overrides = plan.parse_overrides(["opt.lr=log:1e-4..1e-2", "train.grad_accum=[1,2]"])
    search = searches.Search([RECIPE_FILE], overrides, trials=3, journal=JOURNAL)
    for number, _ in enumerate(search.tasks()):
        if number % 2:  # the two folds of a trial
            search.study.tell(number // 2, number / 10)
