"""A converted project of 30 images and checkpoints with random weights, for tests of evaluate and later commands."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastflower.core import runs, seeding
from fastflower.data.betons import fold_set
from fastflower.data.conversion.pipeline import convert
from fastflower.data.labels import read_labels
from fastflower.model.member import save_member
from fastflower.model.network import NetworkSpec, build_network
from fastflower.recipe import load
from support.member_metas import member_meta

WORDS = [
    "exp.name=tiny", "data.root=train", "data.csv=labels.csv", "data.n_splits=2", "data.group=none",
    "data.img_size=[32]", "data.store=raw", "data.workers=1", "model.backbone=resnet10t", "model.pretrained=false",
    "tta.scales=[32,48]", "robust.kinds=[blur,brightness]", "train.batch_per_gpu=5",
]  # fmt: skip


BACKBONES = ("resnet10t", "convnextv2_atto")


def draw(path: Path, colour: int, rng: np.random.Generator) -> None:
    """Write a noisy image whose hue is its class; small enough to be stored unscaled."""
    height, width = rng.integers(36, 54, 2)
    pixels = rng.integers(0, 90, (height, width, 3))
    pixels[..., colour] += 150
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)


def member(fold: int, backbone: str = BACKBONES[0], **changes: object) -> Path:
    """Write a checkpoint with random weights; `changes` replace parts of its description."""
    settings = load(None, [*WORDS, f"model.backbone={backbone}"])
    opened = fold_set.open_fold(settings, fold)
    spec = NetworkSpec.from_recipe(settings, len(opened.classes))
    seeding.seed_all(fold, len(backbone))
    network = build_network(spec)
    fields = {
        "weights": "ema", "resize_factor": settings.eval.resize_factor, "fold": fold, "epoch": 3,
        "class_ids": tuple(opened.classes.ids), "class_hash": opened.classes.hash,
        "class_counts": (5,) * len(opened.classes), "folds_hash": opened.folds.hash, **changes,
    }  # fmt: skip
    meta = member_meta(spec, **fields)
    path = runs.Run(exp="tiny", backbone=backbone, fold=fold, seed=42).checkpoint_path("best_combo", 3, 0.5)
    save_member(path, dict(network.state_dict()), meta)
    return path


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 30 images of 3 classes and their betons."""
    folder, rng = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0)
    (folder / "train").mkdir()
    rows = [(f"{i:02}.jpg", ("9", "10", "rose")[i % 3]) for i in range(30)]
    for i, (name, _) in enumerate(rows):
        draw(folder / "train" / name, i % 3, rng)
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("filename", "category_id"), *rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings = load(None, WORDS)
        convert(settings, read_labels(settings))
    return folder


@pytest.fixture
def project(converted: Path, tmp_path: Path) -> Path:
    """A copy of the converted folder, as the current directory."""
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    os.chdir(tmp_path)
    return tmp_path
