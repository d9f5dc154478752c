"""An experiment as the report reads it: its scores, events, recipe and pictures, whatever of them there is."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.core.tables import shown
from fastflower.data.folds import Folds, read_folds
from fastflower.evaluation.summary import FORMAT
from fastflower.recipe import Recipe, load
from fastflower.report import experiment, thumbnails

SHOWN = {"mistakes": 36, "suspects": 18, "copies": 24}  # pictures on the page


@dataclass(frozen=True)
class Experiment:
    """Everything the pages are made from; `pictures` maps a row of folds.csv to a data URI."""

    name: str
    scores: dict[str, Any]
    events: list[dict[str, Any]]
    recipe: Recipe | None = None
    recipe_text: str = ""
    derived: dict[str, Any] = field(default_factory=dict)
    meta: list[tuple[str, str]] = field(default_factory=list)
    ensemble: dict[str, Any] | None = None
    cams: dict[str, Any] | None = None
    pictures: dict[int, str] = field(default_factory=dict)
    samples: dict[str, Any] | None = None
    copies: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(exp: str, *, with_pictures: bool = True) -> Experiment:
    """Read an experiment's files. InputError when it was not evaluated; what else is missing is left out."""
    folder = runs.RESULTS / exp
    scores = _json(folder / "scores.json")
    if scores is None:
        near = sorted(path.parent.name for path in runs.RESULTS.glob("*/scores.json"))
        known = ", ".join(near) or "none"
        raise InputError(
            f"no {folder / 'scores.json'}; run python -m fastflower.evaluate first (evaluated: {known})"
        )
    if scores.get("format") != FORMAT:
        raise InputError(
            f"{folder / 'scores.json'} was written by another version; run python -m fastflower.evaluate again"
        )
    recipe_file = folder / "meta" / "recipe.yaml"
    recipe, text, notes = _recipe(recipe_file)
    photographs: dict[int, str] = {}
    samples = None
    alike = _copies(recipe, scores["folds_hash"]) if recipe else []
    if recipe and with_pictures:
        photographs = thumbnails.thumbnails(
            Path(recipe.data.home), scores["folds_hash"], wanted(scores, alike)
        )
        samples = thumbnails.augmented(recipe, scores["folds_hash"], scores["fused"]["folds"][0])
        if not photographs:
            notes.append(f"no betons of these folds in {recipe.data.home}; the page has no photographs")
    return Experiment(
        name=exp,
        scores=scores,
        events=runs.read_events(folder / "events.jsonl"),
        recipe=recipe,
        recipe_text=text,
        derived=_derived(folder / "meta"),
        meta=_meta(folder / "meta"),
        ensemble=_json(folder / "ensemble.json"),
        cams=_json(folder / "gradcam" / "gradcam.json"),
        pictures=photographs,
        samples=samples,
        copies=alike,
        notes=notes,
    )


def wanted(scores: dict[str, Any], alike: list[dict[str, Any]]) -> dict[int, set[int]]:
    """fold -> rows of folds.csv whose pictures the page shows."""
    rows = scores["mistakes"][: SHOWN["mistakes"]] + scores["suspects"][: SHOWN["suspects"]]
    for pair in scores["pairs"]:
        rows = rows + pair["wrong"] + [row for row in pair["typical"] if row]
    for pair in alike[: SHOWN["copies"]]:
        rows = rows + [row for row in pair["rows"] if row]
    found: dict[int, set[int]] = {}
    for row in rows:
        found.setdefault(row["fold"], set()).add(row["index"])
    return found


def _copies(recipe: Recipe, folds_hash: str) -> list[dict[str, Any]]:
    """The pairs that convert left beside these folds."""
    home = Path(recipe.data.home)
    if not (home / "folds.csv").is_file():
        return []
    folds = read_folds(home / "folds.csv")
    return experiment.pairs(home / "duplicates.csv", folds) if folds.hash == folds_hash else []


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); run the command that writes it again") from None


def _recipe(path: Path) -> tuple[Recipe | None, str, list[str]]:
    """The frozen recipe, its text, and what is left out of the page where this version cannot read it."""
    if not path.is_file():
        return None, "", [f"no {path}; the page has no recipe and no photographs"]
    text = path.read_text(encoding="utf-8")
    try:
        return load(path), text, []
    except InputError as error:  # written by another version, whose scores still count
        return None, text, [f"{error}; the page has its text only, and no photographs"]


def _derived(folder: Path) -> dict[str, Any]:
    """The derived numbers of the first run; they differ between folds by a step or so."""
    paths = sorted(folder.glob("derived_*.json"))
    return _json(paths[0]) if paths else {}


def _meta(folder: Path) -> list[tuple[str, str]]:
    """Versions, command lines, git state: the small text files of meta/, without derived numbers and recipe."""
    found = []
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".txt", ".diff") and not path.name.startswith("derived_"):
            found.append((path.name, path.read_text(encoding="utf-8", errors="replace")))
    return found


def pairs(path: Path, folds: Folds) -> list[dict[str, Any]]:
    """The rows of duplicates.csv with their places in folds.csv, other labels first, then by distance.

    Each has `rows` (index and fold of both), `filenames`, `category_ids`, `bits` that their hashes differ in (None
    where there is no hash), `identical` bytes and `conflict` of labels. No file: no pairs.
    """
    if not path.is_file():
        return []
    place = {name: row for row, name in enumerate(folds.filenames)}
    with open(path, encoding="utf-8-sig", newline="") as file:
        listed = list(csv.DictReader(file))
    found = []
    for row in listed:
        both = [place.get(row["filename"]), place.get(row["other"])]
        ids = [row["category_id"], row["other_category_id"]]
        found.append(
            {
                "rows": [None if at is None else {"index": at, "fold": int(folds.fold[at])} for at in both],
                "filenames": [shown(row["filename"]), shown(row["other"])],
                "category_ids": ids,
                "bits": int(row["distance"]) if row["distance"] else None,
                "identical": row["identical"] == "yes",
                "conflict": ids[0] != ids[1],
            }
        )
    return sorted(found, key=lambda pair: (not pair["conflict"], pair["bits"] or 0))
