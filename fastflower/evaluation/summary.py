"""scores.json: everything that is known about an experiment's members, from their saved logits alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import fastflower
from fastflower.core.errors import InputError
from fastflower.evaluation import ensembles, metrics, mistakes
from fastflower.evaluation.logits import (
    Logits,
    assemble,
    check_alike,
    fuse,
    load_logits,
    member_file,
    missing_folds,
)
from fastflower.recipe import Recipe

FORMAT = 2  # of scores.json; raised when what reads it would miss something
DESCRIBED = (
    "name",
    "backbone",
    "fold",
    "seed",
    "epoch",
    "checkpoint",
    "weights",
    "head",
    "stored",
    "size",
    "views",
    "mb",
    "ms",
)


def summarise(
    members: list[Logits], folds: np.ndarray, *, classes: list[dict[str, str]], recipe: Recipe
) -> dict[str, Any]:
    """The content of scores.json. `folds` (rows,) is folds.csv's column, `classes` the rows of classes.csv.

    Raises InputError for members that do not belong together or images that do not occur exactly once.
    """
    _check_members(members)
    runs = by_run(members)
    sets = [assemble(own, folds) for own in runs.values()]
    by_image, weights = ensembles.run_weights(sets, recipe)
    fused = fuse(sets, by_image)
    fit_on = recipe.ts.fit_on if recipe.ts.enabled else None
    alpha, bins = recipe.select.alpha, recipe.eval.ece_bins
    counts = np.array([int(row["n"]) for row in classes])

    def block(data: Logits) -> dict[str, Any]:
        return metrics.block(data, alpha, bins=bins, counts=counts, fit_on=fit_on)

    own = [{**{key: member.about[key] for key in DESCRIBED}, **block(member)} for member in members]
    rows = []
    for (backbone, seed), data in zip(runs, sets, strict=True):
        mine = [row for row in own if (row["backbone"], row["seed"]) == (backbone, seed)]
        row = {"backbone": backbone, "seed": seed, "missing": missing_folds(runs[backbone, seed], folds)}
        rows.append({**row, "over_folds": metrics.over_folds(mine), **block(data)})
    names, class_ids = [plain_name(row) for row in classes], members[0].about["class_ids"]
    whole, every = block(fused), sorted(set(folds[folds >= 0].tolist()))
    t = whole["temperature"]["t"] if fit_on else 1.0
    return {
        "format": FORMAT,
        "fastflower": fastflower.__version__,
        "exp": recipe.exp.name,
        "alpha": alpha,
        "bins": bins,
        "weighting": recipe.ensembling.weighting,
        "hand": recipe.ensembling.weights,
        "class_hash": members[0].about["class_hash"],
        "folds_hash": members[0].about["folds_hash"],
        "folds": every,
        "missing": sorted(set(every) - set(whole["folds"])),
        "sizes": [[fold, int((fused.fold == fold).sum())] for fold in whole["folds"]],
        "members": own,
        "runs": rows,
        "fused": {
            **whole,
            "of": fused.about["of"],
            "weights": dict(zip(fused.about["of"], weights, strict=True)),
        },
        "acceptance": [],
        "advice": metrics.advice(own, rows, whole),
        "classes": [
            {**row, "name": names[row["class_idx"]]} for row in metrics.per_class(fused, class_ids, counts)
        ],
        "robust_classes": metrics.by_class_and_corruption(fused),
        "reliability": metrics.reliability(fused, t if fit_on else None, bins),
        **mistakes.examined(fused, t),
    }


def evaluated(folder: Path) -> list[Logits]:
    """The members that scores.json of an experiment's folder speaks of, from their saved logits."""
    path = folder / "scores.json"
    if not path.is_file():
        raise InputError(f"no {path}; run python -m fastflower.evaluate first")
    rows = json.loads(path.read_text(encoding="utf-8"))["members"]
    return [load_logits(member_file(folder / "oof", row)) for row in rows]


def by_run(members: list[Logits]) -> dict[tuple[str, int], list[Logits]]:
    """Members by (backbone, seed), both and the folds inside in order."""
    runs: dict[tuple[str, int], list[Logits]] = {}
    for member in sorted(members, key=lambda m: (*m.run, int(m.about["fold"]))):
        runs.setdefault(member.run, []).append(member)
    return runs


def plain_name(row: dict[str, str]) -> str:
    """What a class is called, from the label file's column of names; English first, else the first there is."""
    columns = sorted(
        (key for key in row if "name" in key.lower()), key=lambda key: "english" not in key.lower()
    )
    return next((row[key] for key in columns if row[key]), "")


def temperatures(summary: dict[str, Any]) -> dict[str, Any]:
    """The content of temperature.json: T of each member, of each run and of the fused logits; weights of runs."""
    return {
        "fused": summary["fused"]["temperature"],
        "weighting": summary["weighting"],
        "hand": summary["hand"],
        "weights": summary["fused"]["weights"],
        "folds": summary["fused"]["folds"],
        "missing": summary["missing"],
        "runs": {row["name"]: row["temperature"] for row in summary["runs"]},
        "members": {row["checkpoint"]: row["temperature"] for row in summary["members"]},
    }


def incomplete(summary: dict[str, Any]) -> list[str]:
    """One line for each run that lacks folds, so that no part is taken for the whole."""
    return [
        f"{row['name']}: no member of {named(row['missing'])} of {len(summary['folds'])}; "
        "its scores are those of single folds, not of the whole training set"
        for row in summary["runs"]
        if row["missing"]
    ]


def named(folds: list[int]) -> str:
    """fold 0, or folds 0, 2."""
    return f"fold {folds[0]}" if len(folds) == 1 else f"folds {', '.join(map(str, folds))}"


def _check_members(members: list[Logits]) -> None:
    check_alike(members)
    heads = {str(member.about["head"]) == "linear" for member in members}
    if len(heads) > 1:
        raise InputError(
            "members with linear and with cosine heads have logits of different kinds; narrow ensembling.find_pattern "
            "to one of them, or combine them with python -m fastflower.ensemble"
        )
