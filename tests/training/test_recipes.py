"""Smoke trainings of the recipes that need hardware or photographs, at sizes that train in seconds on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastflower import convert, evaluate, train
from fastflower.core import runs
from support import toy_project

SMALL = (
    *("data.root=data/train", "data.csv=data/train_labels.csv", "data.home=smoke", "data.n_splits=3"),
    *("data.img_size=[32,48]", "data.size_epochs=[1,2]", "data.workers=1", "tta.scales=[48]"),
    *("model.pretrained=false", "train.batch_per_gpu=8", "train.world_size=1"),
    *("sched.warmup_epochs=1", "sched.cosine_epochs=2", "log.tensorboard=false"),
)


@pytest.mark.parametrize(
    ("name", "backbone"), [("convnext", "test_convnext2"), ("vit", "test_vit"), ("flowers17", "test_resnet")]
)
def test_the_recipe_converts_trains_and_evaluates(name: str, backbone: str, repo: Path) -> None:
    toy_project.project(Path.cwd())
    words = [str(repo / f"recipes/{name}.yaml"), *SMALL, f"exp.name={name}", f"model.backbone={backbone}"]
    convert.main(words)
    assert train.main(words) == 0
    assert evaluate.main(words) == 0
    rows = [
        row for row in runs.read_events(runs.RESULTS / name / "events.jsonl", []) if row["event"] == "epoch"
    ]
    assert [row["size"] for row in rows] == [[32, 32], [48, 48]]
    assert all(row["train_loss"] > 0 and 0 <= row["clean_raw"] <= 1 for row in rows)
    scores = json.loads((runs.RESULTS / name / "scores.json").read_text(encoding="utf-8"))
    assert scores["fused"]["n"] == 20  # a third of the 60 images
