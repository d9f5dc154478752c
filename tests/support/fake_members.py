"""Members with generated logits, for tests of the readers of saved logits and scores."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastflower.core import runs
from fastflower.core.records import write_record
from fastflower.core.tables import write_csv
from fastflower.data.folds import Folds, save_folds
from fastflower.evaluation import acceptance, logits, summary, tables
from fastflower.evaluation.logits import Logits, MemberInfo, MemberLogits
from fastflower.evaluation.records import ExperimentScores, Temperature, Temperatures
from fastflower.recipe import load
from fastflower.recipe.run_record import write_recipe

COMBOS = np.array([["blur", "low"], ["jpeg", "low"]])
IDS = ["7", "12", "100", "rose", "tulip", "x & <y>"]
BACKBONES = ("convnextv2_atto", "vit_tiny_patch16_224")


def folds(rows: int = 120, count: int = 3, seed: int = 0) -> np.ndarray:
    """folds.csv's column: int64 (rows,); the first two rows are -1, always in training."""
    column = np.random.default_rng(seed).permutation(np.arange(rows) % count)
    column[:2] = -1
    return column


def labels(rows: int = 120, seed: int = 0) -> np.ndarray:
    """Long-tailed class_idx int64 (rows,); every class occurs."""
    frequencies = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    class_idx = np.random.default_rng(seed + 1).choice(len(IDS), rows, p=frequencies)
    class_idx[: len(IDS)] = np.arange(len(IDS))
    return class_idx


def member(
    fold: int, backbone: str = BACKBONES[0], seed: int = 42, skill: float = 2.0, **changes: Any
) -> MemberLogits:
    """A member that is right more often than not; `changes` are fields of its MemberInfo."""
    index = np.flatnonzero(folds() == fold)
    class_idx = labels()[index]
    rng = np.random.default_rng([fold, seed, BACKBONES.index(backbone)])
    base = skill * np.eye(len(IDS))[class_idx] + rng.normal(size=(len(index), len(IDS)))

    def noisy(scale: float) -> np.ndarray:
        return (2 * (base + scale * rng.normal(size=base.shape))).astype(np.float32)

    name = f"best_combo__{backbone}__fold{fold}_seed{seed}_epoch{fold + 3}_score0.8000.pth"
    info = MemberInfo(
        name=name, checkpoint=name, seal=None, backbone=backbone, fold=fold, seed=seed, epoch=fold + 3, weights="ema",
        head="linear", stored=None, size=(32, 32), views=[(32, 32, False), (32, 32, True)], class_ids=IDS,
        class_hash="c0ffee", folds_hash=drawn_folds().hash, mb=10.0, ms=2.0,
    )  # fmt: skip
    return Logits(
        logits=noisy(0.1),
        single=noisy(0.3),
        corrupt=np.stack([noisy(0.8), noisy(1.2)]),
        class_idx=class_idx,
        index=index,
        fold=np.full(len(index), fold),
        filename=np.array([f"image_{row}.jpg" for row in index]),
        combos=COMBOS,
        info=replace(info, **changes),
    )


@functools.cache
def drawn_folds(count: int = 3) -> Folds:
    """The folds that convert would have made of the members' images."""
    column, class_idx = folds(count=count), labels()
    rows = len(column)
    return Folds(
        filenames=[f"image_{row}.jpg" for row in range(rows)],
        category_ids=[IDS[c] for c in class_idx],
        class_idx=class_idx,
        fold=column,
        group=np.arange(rows),
        sha256=[f"{row:064x}" for row in range(rows)],
    )


def write_folds(path: Path, count: int = 3) -> None:
    """Write folds.csv as convert does, in the place of an earlier one."""
    path.unlink(missing_ok=True)
    save_folds(path, drawn_folds(count))


def classes_csv() -> list[dict[str, str]]:
    """The rows of classes.csv; the fourth class has an English name that needs escaping."""
    counts = np.array([150, 60, 40, 30, 12, 9])
    names = ["daisy", "", "", "dog <rose>", "", ""]
    return [
        {"class_idx": str(i), "category_id": IDS[i], "n": str(n), "english_name": names[i]}
        for i, n in enumerate(counts)
    ]


def experiment(
    folder: Path, members: list[MemberLogits], events: list[dict[str, Any]], words: list[str]
) -> ExperimentScores:
    """Write the files of training and evaluate to results/results/<exp>; returns the scores."""
    settings = load(None, [f"exp.name={folder.name}", *words])
    write_recipe(folder / "meta" / "recipe.yaml", settings)
    write_csv(folder / "meta" / "classes.csv", classes_csv())
    write_csv(folder / "meta" / "folds.csv", [{"fold": str(fold)} for fold in folds()])
    for member_logits in members:
        logits.save_logits(folder / "oof", member_logits)
    for row in events:
        runs.append_event(folder / "events.jsonl", row)
    scores = summary.summarise(members, folds(), classes=classes_csv(), recipe=settings)
    scores = replace(scores, acceptance=acceptance.check(scores, events, settings.accept))
    write_record(folder / "scores.json", scores)
    tables.write_reports(folder / "reports", scores)
    return scores


def temperature(t: float) -> Temperature:
    """A temperature with scores of no meaning."""
    return Temperature(
        t=t, fit_on="clean", n=100, nll_before=0.9, nll_after=0.8, ece_before=0.2, ece_after=0.1,
        nll_after_low=0.7, nll_after_high=0.9, ece_after_low=0.05, ece_after_high=0.15,
    )  # fmt: skip


def temperatures(**fields: Any) -> Temperatures:
    """The content of temperature.json without temperatures and weights, except for the given fields."""
    empty = Temperatures(
        fused=None,
        weighting="flat",
        hand_weights=None,
        weights={},
        folds=[0],
        missing=[],
        runs={},
        members={},
    )
    return replace(empty, **fields)


def event(epoch: int, fold: int) -> dict[str, Any]:
    """A row of events.jsonl, as training writes it."""
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
    """Events of a training in which the averaged weights score higher, but macro F1 falls at the end of each size."""
    return [
        {
            **event(epoch, fold), "backbone": backbone, "seed": seed,
            "macro_f1_raw": 0.1, "macro_f1_ema": 0.4 + 0.01 * epoch * (6 - epoch),
        }
        for epoch in range(1, 6)
    ]  # fmt: skip
