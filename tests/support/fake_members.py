"""Made-up members with known logits, for tests of everything that reads saved logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastflower.core import files, runs
from fastflower.core.tables import write_csv
from fastflower.evaluation import acceptance, logits, summary, tables
from fastflower.evaluation.logits import Logits
from fastflower.recipe import load, to_yaml

COMBOS = np.array([["blur", "low"], ["jpeg", "low"]])
IDS = ["7", "12", "100", "rose", "tulip", "x & <y>"]
BACKBONES = ("convnextv2_atto", "vit_tiny_patch16_224")


def folds(rows: int = 120, count: int = 3, seed: int = 0) -> np.ndarray:
    """folds.csv's column: int64 (rows,), the first two rows always in training."""
    column = np.random.default_rng(seed).permutation(np.arange(rows) % count)
    column[:2] = -1
    return column


def labels(rows: int = 120, seed: int = 0) -> np.ndarray:
    """Long-tailed class_idx int64 (rows,); every class occurs."""
    share = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    drawn = np.random.default_rng(seed + 1).choice(len(IDS), rows, p=share)
    drawn[: len(IDS)] = np.arange(len(IDS))
    return drawn


def member(
    fold: int, backbone: str = BACKBONES[0], seed: int = 42, skill: float = 2.0, **about: object
) -> Logits:
    """A member that is right more often than not; other arguments change its description."""
    column, classes = folds(), labels()
    index = np.flatnonzero(column == fold)
    rng = np.random.default_rng([fold, seed, BACKBONES.index(backbone)])
    own = classes[index]
    base = skill * np.eye(len(IDS))[own] + rng.normal(size=(len(own), len(IDS)))

    def noisy(scale: float) -> np.ndarray:
        return (2 * (base + scale * rng.normal(size=base.shape))).astype(np.float32)

    name = f"best_combo__{backbone}__fold{fold}_seed{seed}_epoch{fold + 3}_score0.8000.pth"
    return Logits(
        logits=noisy(0.1),
        single=noisy(0.3),
        corrupt=np.stack([noisy(0.8), noisy(1.2)]),
        class_idx=own,
        index=index,
        fold=np.full(len(own), fold),
        filename=np.array([f"image_{row}.jpg" for row in index]),
        combos=COMBOS,
        about={
            "name": name, "checkpoint": name, "backbone": backbone, "fold": fold, "seed": seed, "epoch": fold + 3,
            "weights": "ema", "head": "linear", "stored": None,
            "size": [32, 32], "views": [[32, 32, False], [32, 32, True]],
            "class_ids": IDS, "class_hash": "c0ffee", "folds_hash": "f01d", "mb": 10.0, "ms": 2.0, **about,
        },
    )  # fmt: skip


def classes_csv() -> list[dict[str, str]]:
    """The rows of classes.csv; the fourth class has an English name that needs escaping."""
    counts = np.array([150, 60, 40, 30, 12, 9])
    names = ["daisy", "", "", "dog <rose>", "", ""]
    return [
        {"class_idx": str(i), "category_id": IDS[i], "n": str(n), "english_name": names[i]}
        for i, n in enumerate(counts)
    ]


def experiment(
    folder: Path, members: list[Logits], events: list[dict[str, Any]], words: list[str]
) -> dict[str, Any]:
    """What training and evaluate leave of members in results/results/<exp>; returns scores.json's content."""
    settings = load(None, [f"exp.name={folder.name}", *words])
    files.write_atomic(folder / "meta" / "recipe.yaml", to_yaml(settings))
    write_csv(folder / "meta" / "classes.csv", classes_csv())
    write_csv(folder / "meta" / "folds.csv", [{"fold": str(fold)} for fold in folds()])
    for own in members:
        logits.save_logits(logits.member_file(folder / "oof", own.about), own)
    for row in events:
        runs.append_event(folder / "events.jsonl", row)
    found = summary.summarise(members, folds(), classes=classes_csv(), recipe=settings)
    found["acceptance"] = acceptance.check(found, events, settings.accept)
    files.write_json(folder / "scores.json", found)
    tables.save(folder / "reports", found)
    return found


def event(epoch: int, fold: int) -> dict[str, Any]:
    """A row of events.jsonl as training writes it."""
    value = 0.5 + 0.05 * epoch
    return {
        "event": "epoch", "backbone": BACKBONES[0], "fold": fold, "seed": 42, "epoch": epoch,
        "size": [32, 32] if epoch < 4 else [64, 64], "lr_min": 1e-5, "lr_max": 1e-4,
        "lr_groups": {"front": 1e-5 * epoch, "head": 1e-4 * epoch}, "train_loss": 2 / epoch, "val_loss": 2.5 / epoch,
        "clean_raw": value, "clean_ema": value + 0.01, "corrupt_raw": value - 0.1, "corrupt_ema": value - 0.1,
        "s_raw": value - 0.03, "s_ema": value, "macro_f1_raw": value, "grad_norm": 1.0 / epoch, "images_per_s": 100.0,
        "per_kind": {"blur": {"raw": value, "ema": value}}, "best": {"epoch": epoch, "score": value, "weights": "ema"},
        "new_quantity": 3.0 * epoch, "time": 1e9,
    }  # fmt: skip


def trained(backbone: str, seed: int, fold: int) -> list[dict[str, Any]]:
    """Events of a training in which the averaged weights lead, but macro F1 falls at the end of each size."""
    return [
        {
            **event(epoch, fold), "backbone": backbone, "seed": seed,
            "macro_f1_raw": 0.1, "macro_f1_ema": 0.4 + 0.01 * epoch * (6 - epoch),
        }
        for epoch in range(1, 6)
    ]  # fmt: skip
