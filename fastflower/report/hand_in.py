"""The hand-in on the page of an experiment: its bundle with the gates it passed, and scores of submissions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastflower.bundle import hand_in
from fastflower.bundle.description import BundleDescription
from fastflower.bundle.hand_in import HandIn
from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.core.records import read_record
from fastflower.evaluation import submissions
from fastflower.evaluation.records import ExperimentScores
from fastflower.evaluation.submissions import SubmissionScore
from fastflower.recipe import Recipe

TRUTH = "truth.csv"  # below data.home: the labels of the test images, where somebody has them


@dataclass(frozen=True)
class BundleFacts:
    """The published bundle: members with their weight, megabytes, views, and the record of its export or None."""

    members: list[tuple[str, float]]
    megabytes: float
    sizes: list[str]
    hflip: bool
    views: int  # of the member with most of them; mirrored ones are not counted
    crops: int  # of the same member
    temperature: float
    record: HandIn | None


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
    largest = max(bundle.members, key=lambda member: len(member.views))
    return BundleFacts(
        members=[(member.name, member.weight) for member in bundle.members],
        megabytes=sum(file.stat().st_size for file in runs.BUNDLE.rglob("*") if file.is_file()) / 1e6,
        sizes=[f"{crop.height} × {crop.width}" for crop in bundle.crops],
        hflip=bundle.hflip,
        views=len(largest.views),
        crops=len({view.crop for view in largest.views}),
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
    found = []
    try:
        truth = submissions.read_labels(
            truth_path, image_col=recipe.data.image_col, label_col=recipe.data.label_col
        )
    except InputError as error:
        notes.append(f"{error}; the page lacks the score on the test images")
        return []
    for path in (runs.SUBMISSION, *sorted((runs.RESULTS / exp).glob("submission*.csv"))):
        if path.is_file() and _is_own(exp, stored, _summary(path).get("members", [])):
            try:
                classes = [(row.category_id, row.name) for row in stored.classes]
                found.append(submissions.score(truth, path, classes))
            except InputError as error:
                notes.append(f"{error}; its top-1 is not on the page")
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
