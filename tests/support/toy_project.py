"""A project that trains in seconds: 60 noisy 48-pixel JPEGs of four colours, converted once for all tests."""

from __future__ import annotations

import csv
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastflower import convert, train
from fastflower.core import checkpoint, runs
from fastflower.core.runs import Run

BACKBONE = "test_vit"  # no BatchNorm; 0.4 M parameters
CLASSES = (
    ("7", (150, 100, 100), 22),
    ("12", (100, 150, 100), 17),
    ("3", (100, 100, 150), 12),
    ("40", (140, 140, 100), 9),
)
RECIPE = f"""
exp: {{name: tiny}}
data: {{img_size: [32, 48], size_epochs: [1, 3], n_splits: 3, workers: 1, group: none}}
model: {{backbone: {BACKBONE}, pretrained: false, drop_rate: 0.1, drop_path: 0.1}}
train: {{batch_per_gpu: 10, world_size: 1}}
sched: {{cosine_epochs: 3, warmup_epochs: 1}}
opt: {{lr: 1.0e-3}}
robust: {{kinds: [blur, occlusion]}}
tta: {{scales: [48]}}
log: {{tensorboard: false}}
"""
ONE = (  # epoch, of one size
    *("sched.cosine_epochs=1", "sched.warmup_epochs=0"),
    *("data.img_size=32", "data.size_epochs=auto", "tta.scales=[32]"),
)


@functools.cache
def _made() -> Path:
    home = Path(tempfile.mkdtemp(prefix="fastflower-tiny-"))
    rng, rows = np.random.default_rng(0), []
    (home / "data/train").mkdir(parents=True)
    for category_id, colour, count in CLASSES:
        for number in range(count):
            name = f"c{category_id}_{number}.jpg"
            pixels = rng.normal(0, 40, (48, 48, 3)) + rng.normal(0, 20, 3) + np.array(colour)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(home / "data/train" / name, quality=90)
            rows.append((name, category_id))
    with open(home / "data/train_labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("filename", "category_id"), *rows])
    (home / "tiny.yaml").write_text(RECIPE)
    root = str(home / "data")
    convert.main(
        [
            str(home / "tiny.yaml"),
            f"data.root={root}/train",
            f"data.csv={root}/train_labels.csv",
            f"data.home={root}",
        ]
    )
    return home


def project(folder: Path) -> Path:
    """A fresh copy of the project in `folder`."""
    shutil.copytree(_made(), folder, dirs_exist_ok=True)
    return folder


def fit(*words: str) -> int:
    """Train the project of the current directory."""
    return train.main(["tiny.yaml", *words])


def run_of(exp: str = "tiny", fold: int = 0) -> Run:
    return Run(exp, BACKBONE, fold, 42)


def last(exp: str = "tiny", fold: int = 0) -> checkpoint.Checkpoint:
    """The newest full state of a run."""
    return checkpoint.load(run_of(exp, fold).files("last")[-1])


TIMES = (
    *("time", "seconds", "total_seconds", "eval_seconds", "saving_seconds", "images_per_s"),
    *("wait_share", "wait"),
)


def epochs(exp: str = "tiny") -> list[dict[str, Any]]:
    """The rows of events.jsonl by epoch, without what the clock says."""
    rows = runs.read_events(run_of(exp).events)
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows if row["event"] == "epoch"]


def end(exp: str = "tiny") -> dict[str, Any]:
    """How a run ended, as meta/ has it."""
    return json.loads(run_of(exp).end.read_text())


def different(one: Any, other: Any, path: str = "") -> list[str]:
    """The places in which two trees of tensors and values differ, to the bit; times are not compared."""
    if isinstance(one, dict) and isinstance(other, dict):
        clock = {*TIMES, "total_wct", "iteration_wct", "epoch_wct", "batch_wct", "exp", "recipe"}
        keys = {key for key in {*one, *other} if key not in clock or isinstance(one.get(key), dict)}
        return [
            d
            for key in sorted(keys, key=str)
            for d in different(one.get(key), other.get(key), f"{path}/{key}")
        ]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [
            d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in different(a, b, f"{path}/{i}")
        ]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [path]
    return [] if one == other else [path]


def recipes_words(text: str) -> list[str]:
    """key=value words; a value may hold spaces, a key never does."""
    words: list[str] = []
    for part in text.split(" "):
        if "=" in part:
            words.append(part)
        elif words:
            words[-1] += f" {part}"
    return words
