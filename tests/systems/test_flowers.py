"""The flower contest: ConvNeXt and ViT on folds of photographs, one calibrated ensemble, one table."""

from __future__ import annotations

import itertools
import json
import zipfile
from pathlib import Path

import pytest
from systems.conftest import HandIn, epochs

from fastflower import convert, ensemble, evaluate, train
from fastflower.bundle import archive
from fastflower.core import runs
from fastflower.core.records import read_record
from fastflower.core.runs import Run
from fastflower.recipe.run_record import RunEnd
from fastflower.report import __main__ as report
from support import toy_project

SMALL = [
    *("exp.name=flowers", "data.root=data/train", "data.csv=data/train_labels.csv", "data.home=smoke"),
    *(
        "data.n_splits=2",
        "data.fold=all",
        "data.workers=1",
        "data.img_size=[32,48]",
        "data.size_epochs=[1,2]",
    ),
    *("model.pretrained=false", "train.batch_per_gpu=10", "train.world_size=1", "sched.cosine_epochs=2"),
    *("tta.scales=[32,48]", "log.tensorboard=false"),
]


@pytest.mark.slow
def test_two_backbones_become_one_hand_in(repo: Path, hand_in: HandIn) -> None:
    toy_project.project(Path.cwd())
    backbones = {"convnext": "test_convnext2", "vit": "test_vit"}
    commands = [
        [str(repo / f"recipes/{recipe}.yaml"), *SMALL, f"model.backbone={backbone}"]
        for recipe, backbone in backbones.items()
    ]
    convert.main(commands[0])
    assert {"folds.csv", "classes.csv", "class_stats.csv"} <= names_in(Path("smoke"))
    assert [train.main(words) for words in commands] == [0, 0]
    rows = epochs("flowers")
    assert len(rows) == 2 * 2 * 2  # backbones, folds, epochs
    for row in rows:
        assert row["size"] == ([32, 32] if row["epoch"] == 1 else [48, 48])
        assert {
            "clean_raw",
            "clean_ema",
            "corrupt_raw",
            "corrupt_ema",
            "s_raw",
            "s_ema",
            "macro_f1_ema",
        } <= row.keys()
        better = max(("raw", "ema"), key=lambda name: row[f"s_{name}"])
        assert row["score"] == row[f"s_{better}"]
        assert row["score"] == pytest.approx(0.7 * row[f"clean_{better}"] + 0.3 * row[f"corrupt_{better}"])

    assert {"recipe.yaml", "folds.csv", "classes.csv"} <= names_in(runs.RESULTS / "flowers/meta")
    for backbone, fold in itertools.product(backbones.values(), (0, 1)):
        end = read_record(Run(exp="flowers", backbone=backbone, fold=fold, seed=42).end_path, RunEnd)
        (last,) = (r for r in rows if (r["backbone"], r["fold"], r["epoch"]) == (backbone, fold, 2))
        assert (end.best.epoch, end.best.score) == (2, last["score"]), "a larger size starts anew"

    assert evaluate.main(commands[0]) == 0
    scores = json.loads((runs.RESULTS / "flowers/scores.json").read_text(encoding="utf-8"))
    assert len(scores["members"]) == 4 and scores["fused"]["n"] == 60 and not scores["missing"]
    assert {"per_class.csv", "confusion.csv", "confusion.png", "mistakes.csv", "corruption.csv"} <= names_in(
        runs.RESULTS / "flowers/reports"
    )
    assert any(name.endswith(".jpg") for name in names_in(runs.RESULTS / "flowers/gradcam"))
    ensemble.main(commands[0])
    assert json.loads((runs.RESULTS / "flowers/ensemble.json").read_text(encoding="utf-8"))["n"] == 60

    table = hand_in([*commands[0], "--zip", "hand-in.zip"], "data/train")
    assert list(table[0]) == ["filename", "category_id", "confidence"] and len(table) == 60
    assert {row["category_id"] for row in table} <= {"7", "12", "3", "40"}
    assert all(0 < float(row["confidence"]) <= 1 for row in table)
    bundle = json.loads((runs.BUNDLE / "bundle.json").read_text(encoding="utf-8"))
    assert [member["weight"] for member in bundle["members"]] == [0.25] * 4 and bundle["hflip"]
    assert bundle["temperature"] > 0 and [len(member["views"]) for member in bundle["members"]] == [2] * 4
    with zipfile.ZipFile("hand-in.zip") as packed:
        kept = {name for name in packed.namelist() if name.startswith(archive.FOLDER)}
    assert {
        "training/REPRODUCE.md",
        "training/flowers/meta/recipe.yaml",
        "training/flowers/events.jsonl",
    } <= kept

    report.main(["flowers"])
    page = (runs.RESULTS / "flowers/report.html").read_text(encoding="utf-8")
    assert all(
        f'href="#{name}"' in page for name in ("robustness", "confusion", "mistakes", "gradcam", "hand-in")
    )


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
