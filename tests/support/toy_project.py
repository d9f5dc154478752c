"""A toy project that trains in seconds: 60 noisy 48-pixel JPEGs of four colours, converted once for all tests."""

from __future__ import annotations

import csv
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastflower import convert, train
from fastflower.core import checkpoint, runs
from fastflower.core.records import read_record, to_plain
from fastflower.core.runs import Run
from fastflower.recipe.run_record import RunEnd

BACKBONE = "test_vit"  # no BatchNorm; 0.4 M parameters
AMP = str(
    torch.cuda.is_available()
).lower()  # in float32 on every CPU, or tests would depend on its instructions
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
train: {{batch_per_gpu: 10, world_size: 1, amp: {AMP}}}
sched: {{cosine_epochs: 3, warmup_epochs: 1}}
opt: {{lr: 1.0e-3}}
llrd: {{enabled: true}}
robust: {{kinds: [blur, occlusion]}}
tta: {{scales: [48]}}
log: {{tensorboard: false}}
"""
ONE = (  # epoch, of one size
    *("sched.cosine_epochs=1", "sched.warmup_epochs=0"),
    *("data.img_size=32", "data.size_epochs=auto", "tta.scales=[32]"),
)


@functools.cache
def _converted_once() -> Path:
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
    shutil.copytree(_converted_once(), folder, dirs_exist_ok=True)
    return folder


def fit(*words: str) -> int:
    """Train the project of the current directory."""
    return train.main(["tiny.yaml", *words])


def run_of(exp: str = "tiny", fold: int = 0) -> Run:
    return Run(exp=exp, backbone=BACKBONE, fold=fold, seed=42)


def last(exp: str = "tiny", fold: int = 0) -> checkpoint.Checkpoint:
    """The newest `last` of a run."""
    return checkpoint.load(run_of(exp, fold).checkpoints("last")[-1])


TIMES = (  # keys that depend on the clock
    *("time", "seconds", "total_seconds", "eval_seconds", "saving_seconds", "images_per_s"),
    *("wait_share", "wait"),
)


def epochs(exp: str = "tiny") -> list[dict[str, Any]]:
    """The epoch rows of events.jsonl, without entries that depend on the clock."""
    rows = runs.read_events(run_of(exp).events_path, [])
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows if row["event"] == "epoch"]


def end(run: Run | None = None) -> dict[str, Any]:
    """The record of a run's end in meta/, as plain values."""
    return to_plain(read_record((run or run_of()).end_path, RunEnd))


def different(first: Any, second: Any, path: str = "") -> list[str]:
    """The paths at which two trees of tensors and values differ, to the bit; times are not compared."""
    if isinstance(first, dict) and isinstance(second, dict):
        clock = {*TIMES, "total_wct", "iteration_wct", "epoch_wct", "batch_wct", "exp", "recipe"}
        keys = {key for key in {*first, *second} if key not in clock or isinstance(first.get(key), dict)}
        return [
            d
            for key in sorted(keys, key=str)
            for d in different(first.get(key), second.get(key), f"{path}/{key}")
        ]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        return [
            d
            for i, (a, b) in enumerate(zip(first, second, strict=True))
            for d in different(a, b, f"{path}/{i}")
        ]
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if first.dtype == second.dtype and torch.equal(first, second) else [path]
    return [] if first == second else [path]


def recipes_words(text: str) -> list[str]:
    """key=value words; a value may hold spaces, a key never does."""
    words: list[str] = []
    for part in text.split(" "):
        if "=" in part:
            words.append(part)
        elif words:
            words[-1] += f" {part}"
    return words
