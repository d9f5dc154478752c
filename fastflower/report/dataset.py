"""Facts about the data of an experiment, for its page: images by class and fold, sizes, skipped files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastflower.core.errors import InputError
from fastflower.core.records import read_record
from fastflower.core.tables import escaped, read_sealed
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import Beton, open_beton
from fastflower.data.betons.manifest import Manifest, manifest_path
from fastflower.data.folds import ALWAYS_TRAIN, SKIPPED, Folds, read_folds
from fastflower.data.readers.image_files import header_size
from fastflower.evaluation.records import ExperimentScores
from fastflower.recipe import Recipe, derived

MEASURED = 300  # original files whose size is read, spread evenly over the rows
LISTED = 12  # skipped files named on the page


@dataclass(frozen=True)
class Sizes:
    """Height and width of `n` images: of the smallest, the median and the largest by area."""

    n: int
    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]


@dataclass(frozen=True)
class DataFacts:
    """The contents of folds.csv, the betons and skipped.csv; those that are missing leave their fields empty.

    images: rows of folds.csv, always: of them, those that every fold trains on. folds: (fold, images). enlarged: stored
    images whose short side is below the largest size of the recipe. skipped: (file, reason) of the first LISTED.
    """

    noun: str = "images"
    images: int = 0
    always: int = 0
    folds: list[tuple[int, int]] = field(default_factory=list)
    originals: Sizes | None = None
    stored: Sizes | None = None
    store: str = ""
    megabytes: float = 0.0
    needed: int = 0
    enlarged: int = 0
    skipped_count: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    reasons: list[tuple[str, int]] = field(default_factory=list)


def read_facts(recipe: Recipe, scores: ExperimentScores, notes: list[str]) -> DataFacts:
    """The facts on data.home, where it holds the folds that were scored; a note on damaged files."""
    home = Path(recipe.data.home)
    try:
        folds = read_folds(home / "folds.csv")
        if folds.hash != scores.folds_hash:
            return DataFacts(noun=noun_of(recipe, scores))
        skipped = read_sealed(home / "skipped.csv", SKIPPED) if (home / "skipped.csv").is_file() else []
        betons = _betons(home, scores)
    except InputError as error:
        if (home / "folds.csv").is_file():
            notes.append(f"{error}; the page lacks some facts about the data")
        return DataFacts(noun=noun_of(recipe, scores))
    numbers, counts = np.unique(folds.fold[folds.fold != ALWAYS_TRAIN], return_counts=True)
    sides = np.concatenate([_sides(beton) for beton in betons]) if betons else np.empty((0, 2), np.int64)
    needed = derived.largest_size(recipe)
    return DataFacts(
        noun=noun_of(recipe, scores),
        images=len(folds),
        always=int((folds.fold == ALWAYS_TRAIN).sum()),
        folds=[(int(number), int(count)) for number, count in zip(numbers, counts, strict=True)],
        originals=_original_sizes(Path(recipe.data.root), folds),
        stored=_sizes(sides),
        store=betons[0].origin.settings.store if betons else "",
        megabytes=sum(path.stat().st_size for path in (home / "betons").glob("*.beton")) / 1e6,
        needed=needed,
        enlarged=int((sides.min(1) < needed).sum()) if len(sides) else 0,
        skipped_count=len(skipped),
        skipped=[(escaped(row["filename"]), row["reason"]) for row in skipped[:LISTED]],
        reasons=Counter(row["reason"] for row in skipped).most_common(),
    )


def noun_of(recipe: Recipe | None, scores: ExperimentScores) -> str:
    """`pairs` where a row holds two images, else `images`."""
    if recipe is None:
        return "images"
    path = fold_set.beton_path(Path(recipe.data.home), scores.fused.folds[0], "val")
    try:
        return "pairs" if read_record(manifest_path(path), Manifest).images_per_row == 2 else "images"
    except InputError:
        return "pairs" if recipe.data.form == "pairs" else "images"


def _betons(home: Path, scores: ExperimentScores) -> list[Beton]:
    """The training and validation images of the first scored fold, together all of them; empty without betons."""
    paths = [fold_set.beton_path(home, scores.fused.folds[0], split) for split in ("train", "val")]
    betons = [open_beton(path) for path in paths if path.is_file()]
    same = all(beton.origin.folds_hash == scores.folds_hash for beton in betons)
    return betons if same and len(betons) == len(paths) else []


def _sides(beton: Beton) -> np.ndarray:
    """Height and width of each row's (first) image: int64 (N, 2)."""
    return np.stack([beton.descriptors["height"], beton.descriptors["width"]], 1).astype(np.int64)


def _original_sizes(root: Path, folds: Folds) -> Sizes | None:
    """Sizes of MEASURED original files by their headers; None where images are not files below data.root."""
    rows = np.unique(np.linspace(0, len(folds) - 1, MEASURED).round().astype(int))
    sides = []
    for row in rows:
        path = root / folds.filenames[row]
        try:
            sides.append(header_size(str(path)))
        except InputError:
            return None
    return _sizes(np.array(sides))


def _sizes(sides: np.ndarray) -> Sizes | None:
    """The smallest, median and largest of sizes (N, 2) by area; None of none."""
    if not len(sides):
        return None
    order = np.argsort(sides.prod(1), kind="stable")
    smallest, median, largest = (
        (int(sides[row][0]), int(sides[row][1])) for row in (order[0], order[len(order) // 2], order[-1])
    )
    return Sizes(n=len(sides), smallest=smallest, median=median, largest=largest)
