"""The files of an experiment as the report reads them: scores, events, recipe, images. Only scores are required."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastflower.core import runs
from fastflower.core.errors import CorruptionError, InputError
from fastflower.core.records import read_record, to_plain
from fastflower.core.tables import escaped
from fastflower.data.folds import DUPLICATES, Folds, read_duplicates, read_folds
from fastflower.evaluation.agreement import Trained, check_recipe
from fastflower.evaluation.gradcam_record import GradCams, read_gradcam
from fastflower.evaluation.measured import Leak, Priors, ViewTable
from fastflower.evaluation.records import EnsembleComparison, ExperimentScores, ImageScores
from fastflower.recipe import Recipe
from fastflower.recipe.run_record import Environment, RunEnd, RunNumbers, missing_events, read_recipe
from fastflower.report.dataset import DataFacts, noun_of, read_facts
from fastflower.report.hand_in import BundleFacts, SubmissionScore, read_bundle, read_test_scores

if TYPE_CHECKING:
    from fastflower.report.thumbnails import AugmentationSamples, CorruptedSample

M = TypeVar("M", ViewTable, Priors, Leak)
MAX_IMAGES = {"mistakes": 36, "suspects": 18, "duplicates": 24}  # on the page


@dataclass(frozen=True)
class ImageRef:
    """An image by its row in folds.csv and its fold."""

    index: int
    fold: int


@dataclass(frozen=True)
class DuplicatePair:
    """Two images that duplicates.csv lists, with their file names and category ids.

    `images`: None for a file that folds.csv does not list. `bits`: how many of 64 bits of the perceptual hashes
    differ, None without hashes. `identical`: same bytes. `conflict`: different labels.
    """

    images: tuple[ImageRef | None, ImageRef | None]
    filenames: tuple[str, str]
    category_ids: tuple[str, str]
    bits: int | None
    identical: bool
    conflict: bool


@dataclass(frozen=True)
class Experiment:
    """Content of the pages.

    `thumbnails` maps a row of folds.csv to a data URI, `maps` a file of gradcam/ to its bytes.
    """

    name: str
    scores: ExperimentScores
    events: list[dict[str, Any]]
    recipe: Recipe | None = None
    recipe_text: str = ""
    numbers: RunNumbers | None = None
    meta: list[tuple[str, str]] = field(default_factory=list)
    ensemble: EnsembleComparison | None = None
    gradcam: GradCams | None = None
    maps: dict[str, bytes] = field(default_factory=dict)
    thumbnails: dict[int, str] = field(default_factory=dict)
    augmentation: AugmentationSamples | None = None
    corrupted: list[CorruptedSample] = field(default_factory=list)
    duplicates: list[DuplicatePair] = field(default_factory=list)
    views: ViewTable | None = None
    priors: Priors | None = None
    leak: Leak | None = None
    data: DataFacts = field(default_factory=DataFacts)
    bundle: BundleFacts | None = None
    test_scores: list[SubmissionScore] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def noun(self) -> str:
        """The noun for the rows: images or pairs."""
        return self.data.noun


def read_experiment(exp: str, given: Recipe | None = None, *, with_images: bool = True) -> Experiment:
    """Read an experiment's files; missing optional ones are noted. InputError when it was not evaluated.

    A recipe that is given says where the images are; InputError when it contradicts the members that were scored.
    """
    folder = runs.RESULTS / exp
    scores_path, ensemble_path = folder / "scores.json", folder / "ensemble.json"
    if not scores_path.is_file():
        evaluated = sorted(path.parent.name for path in runs.RESULTS.glob("*/scores.json"))
        raise InputError(
            f"no {scores_path}; run python -m fastflower.evaluate first "
            f"(evaluated: {', '.join(evaluated) or 'none'})"
        )
    scores = read_record(scores_path, ExperimentScores)
    recipe, text, notes = _recipe(folder / "meta" / "recipe.yaml")
    if given is not None:
        check_recipe(given, [Trained.of(row.checkpoint, row, scores) for row in scores.members])
        recipe = replace(recipe or given, data=given.data)
    pictures = Pictures()
    duplicates = _duplicates(recipe, scores.folds_hash, notes) if recipe else []
    if recipe and with_images:
        pictures = _pictures(recipe, scores, duplicates, notes=notes)
    events = runs.read_events(folder / "events.jsonl", notes)
    notes += missing_events(folder, events)
    notes += stale_bundle(exp)
    gradcam, maps = read_gradcam(folder / "gradcam", notes)
    return Experiment(
        name=exp,
        scores=scores,
        events=events,
        recipe=recipe,
        recipe_text=text,
        numbers=_numbers(folder / "meta", notes),
        meta=_meta(folder / "meta", notes),
        ensemble=read_record(ensemble_path, EnsembleComparison) if ensemble_path.is_file() else None,
        gradcam=gradcam,
        maps=maps,
        thumbnails=pictures.thumbnails,
        augmentation=pictures.augmentation,
        corrupted=pictures.corrupted,
        duplicates=duplicates,
        views=_measured(folder, ViewTable, notes),
        priors=_measured(folder, Priors, notes),
        leak=_measured(folder, Leak, notes),
        data=read_facts(recipe, scores, notes) if recipe else DataFacts(noun=noun_of(recipe, scores)),
        bundle=read_bundle(exp, scores, notes),
        test_scores=read_test_scores(exp, recipe, scores, notes=notes) if recipe else [],
        notes=notes,
    )


def stale_bundle(exp: str) -> list[str]:
    """A note when the experiment's members were evaluated after the hand-in was exported, which may lack them."""
    bundle, evaluated = runs.BUNDLE / "bundle.json", runs.MODELS / exp / "programs" / "bundle.json"
    if not (bundle.is_file() and evaluated.is_file() and evaluated.stat().st_mtime > bundle.stat().st_mtime):
        return []
    return [
        f"{runs.BUNDLE} is older than the members evaluated since; run python -m fastflower.export to hand them in"
    ]


def rows_by_fold(scores: ExperimentScores, duplicates: list[DuplicatePair]) -> dict[int, set[int]]:
    """fold -> rows of folds.csv whose images the page shows."""
    rows: list[ImageScores] = scores.mistakes[: MAX_IMAGES["mistakes"]]
    rows += scores.suspects[: MAX_IMAGES["suspects"]]
    for confused in scores.pairs:
        rows += confused.wrong + [row for row in confused.typical if row]
    images = [(row.fold, row.index) for row in rows]
    for pair in duplicates[: MAX_IMAGES["duplicates"]]:
        images += [(image.fold, image.index) for image in pair.images if image]
    by_fold: dict[int, set[int]] = {}
    for fold, index in images:
        by_fold.setdefault(fold, set()).add(index)
    return by_fold


@dataclass
class Pictures:
    """The pictures of a page that are read from betons."""

    thumbnails: dict[int, str] = field(default_factory=dict)
    augmentation: AugmentationSamples | None = None
    corrupted: list[CorruptedSample] = field(default_factory=list)


def _pictures(
    recipe: Recipe, scores: ExperimentScores, duplicates: list[DuplicatePair], *, notes: list[str]
) -> Pictures:
    """The pictures of the page; a note instead of those whose betons are damaged or missing."""
    from fastflower.report import thumbnails  # here: torch and timm take seconds, a refusal none

    pictures, damaged = Pictures(), list[str]()
    for fold, rows in rows_by_fold(scores, duplicates).items():
        try:
            pictures.thumbnails |= thumbnails.thumbnails(
                Path(recipe.data.home), scores.folds_hash, {fold: rows}
            )
        except CorruptionError as error:
            damaged.append(str(error))
    try:
        pictures.augmentation = thumbnails.augmented(recipe, scores.folds_hash, scores.fused.folds[0])
        pictures.corrupted = thumbnails.corrupted(recipe, scores)
    except CorruptionError as error:
        damaged.append(str(error))
    notes += [f"{fault}; the page lacks its images" for fault in dict.fromkeys(damaged)]
    if not pictures.thumbnails and not damaged:
        notes.append(f"no betons of these folds in {recipe.data.home}; the page has no images")
    return pictures


def _duplicates(recipe: Recipe, folds_hash: str, notes: list[str]) -> list[DuplicatePair]:
    """The pairs that convert wrote with these folds; none when data.home holds other folds, a note when damaged."""
    home = Path(recipe.data.home)
    if not (home / "folds.csv").is_file():
        return []
    folds = read_folds(home / "folds.csv")
    try:
        return duplicate_pairs(home / DUPLICATES, folds) if folds.hash == folds_hash else []
    except CorruptionError as error:
        notes.append(f"{error}; the page lacks its duplicates")
        return []


def _measured(folder: Path, kind: type[M], notes: list[str]) -> M | None:
    """A record that evaluate writes beside the scores; None without one; a damaged one is noted."""
    path = folder / kind.FILE
    try:
        return read_record(path, kind) if path.is_file() else None
    except InputError as error:
        notes.append(f"{error}; the page lacks it")
        return None


def _recipe(path: Path) -> tuple[Recipe | None, str, list[str]]:
    """The run's recipe, its text, and notes on what the page lacks when the recipe cannot be read."""
    if not path.is_file():
        return None, "", [f"no {path}; the page has no recipe and no images"]
    try:
        return *read_recipe(path), []
    except InputError as error:  # damaged, or written by another version; the scores are still valid
        return None, "", [f"{error}; the page has no recipe and no images"]


def _numbers(folder: Path, notes: list[str]) -> RunNumbers | None:
    """Derived numbers of the first run, or a note; between folds only the steps differ slightly."""
    paths = sorted(folder.glob("derived_*.json"))
    try:
        return read_record(paths[0], RunNumbers) if paths else None
    except InputError as error:  # written by another version; the scores are still valid
        notes.append(f"{error}; the page has no derived numbers")
        return None


def _meta(folder: Path, notes: list[str]) -> list[tuple[str, str]]:
    """Name and text of the records in meta/ on environment and ends of runs; a note instead of a damaged one."""
    texts = []
    for path in sorted(folder.glob("*.json")):
        kind = Environment if path.name == "versions.json" else RunEnd
        if not path.name.startswith("derived_"):
            try:
                content = to_plain(read_record(path, kind))
            except InputError as error:
                notes.append(f"{error}; the page lacks it")
            else:
                texts.append((path.name, json.dumps(content, indent=1, ensure_ascii=False)))
    return texts


def duplicate_pairs(path: Path, folds: Folds) -> list[DuplicatePair]:
    """The pairs of duplicates.csv, conflicting labels first, then by distance; empty when there is no file."""
    if not path.is_file():
        return []
    images = {name: ImageRef(index, int(folds.fold[index])) for index, name in enumerate(folds.filenames)}
    rows = read_duplicates(path, folds)
    pairs = [
        DuplicatePair(
            images=(images.get(row["filename"]), images.get(row["other"])),
            filenames=(escaped(row["filename"]), escaped(row["other"])),
            category_ids=(row["category_id"], row["other_category_id"]),
            bits=int(row["distance"]) if row["distance"] else None,
            identical=row["identical"] == "yes",
            conflict=row["category_id"] != row["other_category_id"],
        )
        for row in rows
    ]
    return sorted(pairs, key=lambda pair: (not pair.conflict, pair.bits or 0))
