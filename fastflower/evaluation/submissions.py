"""Scores of a submission against the labels of its images, where somebody has them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastflower.core import scores
from fastflower.core.errors import InputError
from fastflower.evaluation.records import Top1


@dataclass(frozen=True)
class SubmissionScore:
    """Top-1 of a submission on the n labelled images; `missing` of them have no row, and count as wrong."""

    name: str
    score: Top1
    right: int
    missing: int


def read_labels(path: Path, *, image_col: str = "filename", label_col: str = "category_id") -> dict[str, str]:
    """File name -> category id of a table; InputError when a column is missing or there is no row."""
    with path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        missing = [name for name in (image_col, label_col) if name not in names]
        if missing:
            raise InputError(f"{path}: no column {missing[0]}, it has {', '.join(names) or 'none'}")
        rows = {row[image_col]: row[label_col] for row in reader}
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def read_predictions(path: Path, classes: Sequence[tuple[str, str]]) -> dict[str, str]:
    """File name -> category id of the likeliest class of a submission, by the classes' (id, name).

    Of a column for each class the largest counts, of a cell with several classes the first; names mean their ids.
    """
    ids = {text: class_id for class_id, name in classes for text in (name, class_id) if text}
    with path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
        rows = list(csv.DictReader(file))
    odds = [column for column in (rows[0] if rows else {}) if column in ids and column != "category_id"]
    if len(odds) > 1:
        try:
            return {row["filename"]: ids[max(odds, key=lambda column: float(row[column]))] for row in rows}
        except KeyError:
            raise InputError(f"{path}: no column filename; it has {', '.join(rows[0])}") from None
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: a probability is no number ({error})") from None

    def first(cell: str) -> str:
        starts = [
            text for text in ids if cell.startswith(text) and not cell[len(text) : len(text) + 1].isalnum()
        ]
        return ids.get(cell, ids[max(starts, key=len)] if starts else cell)

    return {name: first(cell) for name, cell in read_labels(path).items()}


def score(truth: dict[str, str], path: Path, classes: Sequence[tuple[str, str]] = ()) -> SubmissionScore:
    """Top-1 of the submission at `path`, with its 95% interval, on the images whose labels are known.

    `classes` are their (id, name), where the submission may hold names, probabilities, or several classes in a cell.
    """
    predictions, n = read_predictions(path, classes), len(truth)
    right = sum(predictions.get(name) == label for name, label in truth.items())
    low, high = scores.wilson(right, n)
    return SubmissionScore(
        path.name,
        Top1(n=n, top1=right / n, top1_low=low, top1_high=high),
        right,
        sum(name not in predictions for name in truth),
    )
