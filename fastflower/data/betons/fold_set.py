"""A set of betons: the three files of each fold, which belong together when their manifests say so.

A manifest carries what the set was made from: settings, classes, labels, inputs and folds. Convert is up to date
when all agree with the recipe and the labels; a training opens a fold only then.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastflower import __version__
from fastflower.core.errors import InputError
from fastflower.core.files import digest
from fastflower.data.betons.beton_file import Beton, manifest_path, open_beton
from fastflower.data.folds import Folds, check_leaks, load_folds, read_folds
from fastflower.data.labels import ClassMap, LabelTable, read_classes, read_labels
from fastflower.data.readers import sources
from fastflower.recipe import Recipe, derived
from fastflower.recipe.derived import combos

UNLABELLED = "unlabelled"
FORMAT = 2  # of what is stored; raised when the same recipe would store other pixels


@dataclass(frozen=True)
class FoldSet:
    """One fold, open and checked: `val_corrupt` is None when the recipe scores no corruptions, `unlabelled` when it
    does not learn from data.unlabelled.
    """

    folds: Folds
    classes: ClassMap
    train: Beton
    val: Beton
    val_corrupt: Beton | None
    unlabelled: Beton | None = None


def stored_side(recipe: Recipe) -> int:
    """The short side that the largest stage or view needs before its centre crop."""
    return derived.resize_side(derived.largest_size(recipe), recipe.eval.resize_factor)


def settings(recipe: Recipe, store: str) -> dict[str, Any]:
    """What decides the stored pixels; store is raw or jpeg."""
    pairs = combos(recipe.robust.kinds, recipe.robust.level) if recipe.robust.enabled else []
    return {
        "format": FORMAT,
        "stored_side": stored_side(recipe),
        "store": store,
        "jpeg_quality": recipe.data.jpeg_quality,
        "combos": [list(pair) for pair in pairs],
    }


def manifest(
    made: dict[str, Any], table: LabelTable, *, folds: Folds, split: str, fold: int
) -> dict[str, Any]:
    """The manifest of one beton, less what its writer adds (rows, size, checksums)."""
    return {
        "fastflower": __version__,
        "split": split,
        "fold": fold,
        "settings": made,
        "stored_side": made["stored_side"],
        "combos": made["combos"] if split == "val_corrupt" else [],
        "classes_hash": table.classes.hash,
        "labels_hash": table.hash,
        "inputs_hash": digest(table.sizes.tobytes()),
        "folds_hash": folds.hash,
    }


def unlabelled_manifest(made: dict[str, Any], names: list[str], sizes: np.ndarray) -> dict[str, Any]:
    """The manifest of the images without labels, less what its writer adds; names and bytes decide it."""
    return {
        "fastflower": __version__,
        "split": UNLABELLED,
        "settings": made,
        "stored_side": made["stored_side"],
        "combos": [],
        "inputs_hash": digest(sizes.tobytes(), *names),
    }


def beton_name(fold: int, split: str) -> str:
    return f"{split}.beton" if split == UNLABELLED else f"fold{fold}_{split}.beton"


def beton_path(home: Path, fold: int, split: str) -> Path:
    return home / "betons" / beton_name(fold, split)


def splits(made: dict[str, Any]) -> tuple[str, ...]:
    """The betons of each fold."""
    return ("train", "val", "val_corrupt") if made["combos"] else ("train", "val")


def is_current(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the beton that a manifest describes is there, whole, and says the same of itself."""
    path = folder / beton_name(wanted.get("fold", -1), wanted["split"])
    try:
        found = json.loads(manifest_path(path).read_text(encoding="utf-8"))
        return path.stat().st_size == found["size"] and not _differences(found, wanted)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def open_fold(recipe: Recipe, fold: int) -> FoldSet:
    """Open the betons of a fold, checked against labels, folds, classes and recipe; rows' checksums are left to verify.

    InputError when the set is stale, mixed, too small for the recipe's largest size, or leaks between its parts.
    Where the photographs are not on this machine, the set is only checked against folds.csv.
    """
    home = Path(recipe.data.home)
    folds = read_folds(home / "folds.csv")
    classes = read_classes(home / "classes.csv")
    wanted = {"folds_hash": folds.hash, "classes_hash": classes.hash}
    if sources.present(recipe):
        folds, table = load_folds(home, read_labels(recipe), recipe)
        wanted |= {"labels_hash": table.hash, "inputs_hash": digest(table.sizes.tobytes())}
    if fold not in folds.numbers:
        raise InputError(f"data.fold = {fold}: {home / 'folds.csv'} has the folds {folds.numbers}")
    check_leaks(folds, fold)
    made = settings(recipe, "")
    opened = {split: open_beton(beton_path(home, fold, split)) for split in splits(made)}
    for split, beton in opened.items():
        _check(
            beton,
            wanted | {"split": split, "fold": fold, "settings": opened["train"].manifest.get("settings")},
        )
        _check_rows(beton, folds, split=split, fold=fold)
    _check_settings(opened["train"], made)
    more = open_unlabelled(recipe) if recipe.semi.enabled and recipe.data.unlabelled else None
    return FoldSet(folds, classes, opened["train"], opened["val"], opened.get("val_corrupt"), more)


def open_unlabelled(recipe: Recipe) -> Beton:
    """The images of data.unlabelled: labels are -1, `index` counts the rows of unlabelled.csv.

    InputError when they are stale, missing, or too small for the recipe's largest size.
    """
    if not recipe.data.unlabelled:
        raise InputError("data.unlabelled is empty: name the folder or file of images without labels")
    beton = open_beton(beton_path(Path(recipe.data.home), -1, UNLABELLED))
    if Path(recipe.data.unlabelled).exists():
        source, names = sources.open_unlabelled(recipe)
        sizes = np.array([source.look(name)[1] for name in names], np.int64)
        wanted = unlabelled_manifest(beton.manifest["settings"], names, sizes)
        _check(beton, wanted)
    _check_settings(beton, {**settings(recipe, ""), "combos": []})
    return beton


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [key for key, value in wanted.items() if key != "fastflower" and found.get(key) != value]


def _check(beton: Beton, wanted: dict[str, Any]) -> None:
    different = _differences(beton.manifest, wanted)
    if different:
        raise InputError(
            f"{beton.path} is stale: {', '.join(different)} differ from today's; run convert again"
        )


def _check_rows(beton: Beton, folds: Folds, *, split: str, fold: int) -> None:
    """Each row must be the one folds.csv means, with its label."""
    rows = folds.train_rows(fold) if split == "train" else folds.val_rows(fold)
    rows = np.tile(rows, max(1, len(beton.manifest["combos"])))
    if not np.array_equal(beton.index, rows) or not np.array_equal(beton.labels, folds.class_idx[rows]):
        raise InputError(f"{beton.path} is stale: its rows are not those of folds.csv; run convert again")


def _check_settings(beton: Beton, made: dict[str, Any]) -> None:
    found = beton.manifest["settings"]
    if found["stored_side"] < made["stored_side"]:
        raise InputError(
            f"{beton.path} holds images of short side {found['stored_side']}, the recipe's sizes and views need "
            f"{made['stored_side']}; run convert with this recipe"
        )
    if made["combos"] and found["combos"] != made["combos"]:
        raise InputError(
            f"{beton.path}: robust.kinds or robust.level differ from those converted; run convert again"
        )
