"""The hand-in on the page of an experiment: its bundle with the gates it passed, and scores of submissions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastflower.bundle import hand_in
from fastflower.bundle.description import BundleDescription
from fastflower.bundle.hand_in import HandIn
from fastflower.core import runs, scores
from fastflower.core.errors import InputError
from fastflower.core.records import read_record
from fastflower.evaluation.records import ExperimentScores, Top1
from fastflower.recipe import Recipe

TRUTH = "truth.csv"  # below data.home: the labels of the test images, where somebody has them


@dataclass(frozen=True)
class BundleFacts:
    """The published bundle: members with their weight, megabytes, views, and the record of its export or None."""

    members: list[tuple[str, float]]
    megabytes: float
    sizes: list[str]
    hflip: bool
    temperature: float
    record: HandIn | None


@dataclass(frozen=True)
class SubmissionScore:
    """Top-1 of a submission on the n labelled test images; `missing` of them have no row, and count as wrong."""

    name: str
    score: Top1
    right: int
    missing: int


def read_bundle(exp: str, stored: ExperimentScores, notes: list[str]) -> BundleFacts | None:
    """The published bundle, where all of its members are of this experiment; a note when it is damaged."""
    path, record_path = runs.BUNDLE / "bundle.json", runs.RESULTS / exp / hand_in.FILE
    if not path.is_file():
        return None
    try:
        bundle = read_record(path, BundleDescription)
        record = read_record(record_path, HandIn) if record_path.is_file() else None
    except InputError as error:
        notes.append(f"{error}; the page lacks the hand-in")
        return None
    if record is not None and record.bundle != hand_in.bundle_digest():
        record = None
    if record is None and not _is_own(exp, stored, (member.name for member in bundle.members)):
        return None
    return BundleFacts(
        members=[(member.name, member.weight) for member in bundle.members],
        megabytes=sum(file.stat().st_size for file in runs.BUNDLE.rglob("*") if file.is_file()) / 1e6,
        sizes=[f"{crop.height} × {crop.width}" for crop in bundle.crops],
        hflip=bundle.hflip,
        temperature=bundle.temperature,
        record=record,
    )


def read_test_scores(
    exp: str, recipe: Recipe, stored: ExperimentScores, *, notes: list[str]
) -> list[SubmissionScore]:
    """Scores of submission.csv and the experiment's own submission*.csv against truth.csv, where there is one."""
    truth_path = Path(recipe.data.home) / TRUTH
    if not truth_path.is_file():
        return []
    try:
        truth = _column(truth_path, recipe.data.image_col, recipe.data.label_col)
    except InputError as error:
        notes.append(str(error))
        return []
    found = []
    for path in (runs.SUBMISSION, *sorted((runs.RESULTS / exp).glob("submission*.csv"))):
        if not path.is_file() or not _is_own(exp, stored, _summary(path).get("members", [])):
            continue
        try:
            predictions = _column(path, "filename", "category_id")
        except InputError as error:
            notes.append(str(error))
            continue
        right = sum(predictions.get(name) == label for name, label in truth.items())
        low, high = scores.wilson(right, len(truth))
        score = Top1(n=len(truth), top1=right / len(truth), top1_low=low, top1_high=high)
        found.append(SubmissionScore(path.name, score, right, sum(name not in predictions for name in truth)))
    return found


def _is_own(exp: str, stored: ExperimentScores, names: Iterable[str]) -> bool:
    """True if members are named, all of which are of this experiment."""
    own = {Path(member.checkpoint).stem for member in stored.members}
    own |= {path.stem for path in (runs.MODELS / exp).glob("*.pth")}
    names = list(names)
    return bool(names) and set(names) <= own


def _summary(path: Path) -> dict[str, Any]:
    """The submission.json that the predictor writes beside a table; empty without one."""
    try:
        content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _column(path: Path, key: str, value: str) -> dict[str, str]:
    """Two columns of a CSV as a dict; InputError when one is missing or there is no row."""
    with path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        missing = [name for name in (key, value) if name not in names]
        if missing:
            has = ", ".join(names) or "none"
            raise InputError(f"{path}: no column {missing[0]}, it has {has}; its top-1 is not on the page")
        rows = {row[key]: row[value] for row in reader}
    if not rows:
        raise InputError(f"{path}: no rows; its top-1 is not on the page")
    return rows
