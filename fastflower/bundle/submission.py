"""The table of a hand-in: the texts of its classes, and the faults of a table that the predictor wrote."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from fastflower.bundle.description import BundleDescription
from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.data.labels import read_class_rows
from fastflower.evaluation.summary import class_name
from fastflower.recipe import Recipe

ROUNDING = 1e-8  # of each probability in a table


def class_texts(recipe: Recipe, class_ids: list[str]) -> list[str]:
    """The text of each class in the submission (C,): its id or, with bundle.labels=names, its name in classes.csv.

    Raises InputError when a class has no name, two have the same one, or one holds the separator of bundle.columns=top.
    """
    texts, bundle = class_ids, recipe.bundle
    if bundle.labels == "names":
        path = Path(recipe.data.home) / "classes.csv"
        names = {row["category_id"]: class_name(row) for row in read_class_rows(path)}
        texts = [names.get(class_id, "") for class_id in class_ids]
        unnamed = next((i for i, text in enumerate(texts) if not text), None)
        if unnamed is not None:
            raise InputError(
                f"bundle.labels = names: {path} has no name for class {class_ids[unnamed]}; add a column of names to "
                "the label file and convert again, or use bundle.labels=ids"
            )
        double = next((text for text in texts if texts.count(text) > 1), None)
        if double is not None:
            raise InputError(
                f"bundle.labels = names: {texts.count(double)} classes are called {double!a}; use bundle.labels=ids"
            )
    if not bundle.separator:
        raise InputError(
            "bundle.separator is empty; give the text between the classes of a cell, such as a space"
        )
    torn = next((text for text in texts if bundle.separator in text), None)
    if bundle.columns == "top" and torn is not None:
        raise InputError(
            f"bundle.separator = {bundle.separator!r} is in the class {torn!a}; use another, such as "
            "bundle.separator='|', or bundle.labels=ids"
        )
    return texts


def submission_fault(root: Path, bundle: BundleDescription, rows: int) -> str | None:
    """The first fault of the table that the predictor wrote below `root`, or None."""
    with open(root / runs.SUBMISSION, encoding="utf-8", newline="") as file:
        header, *table = list(csv.reader(file))
    width = {"two": 2, "top": 2, "odds": 1 + len(bundle.labels)}.get(bundle.columns, 3)
    if len(header) != width or any(len(row) != width for row in table):
        return f"columns {header}"
    if bundle.pairs:
        names = [f"test_dataset/{row:0{len(str(rows - 1))}d}" for row in range(rows)]
    else:
        names = sorted(path.name for path in (root / "test_dataset").iterdir())
    if [row[0] for row in table] != names or len(names) != rows:
        return f"{len(table)} rows for {rows} {bundle.noun}"
    fault = _cells_fault(header, table, bundle)
    if fault:
        return fault
    unreadable = run_summary(root)["unreadable"]
    return f"{len(unreadable)} {bundle.noun} unreadable" if unreadable else None


def _cells_fault(header: list[str], table: list[list[str]], bundle: BundleDescription) -> str | None:
    """The first fault of the cells behind the names, by bundle.columns, or None."""
    labels = bundle.labels
    if bundle.columns == "odds":
        if header[1:] != labels:
            return f"columns {header}"
        shares = [[float(cell) for cell in row[1:]] for row in table]
        if not all(0 <= share <= 1 for row in shares for share in row):
            return "a probability outside [0, 1]"
        uneven = any(abs(sum(row) - 1) > ROUNDING * len(labels) for row in shares)
        return "probabilities of a row that do not sum to 1" if uneven else None
    if bundle.columns == "top":
        cells = [row[1].split(bundle.separator) for row in table]
        if any(len(cell) != min(bundle.top_k, len(labels)) or len(set(cell)) != len(cell) for cell in cells):
            return f"a cell without {min(bundle.top_k, len(labels))} different classes"
        known = {text for cell in cells for text in cell} <= set(labels)
        return None if known else "classes that are not in the training labels"
    if not {row[1] for row in table} <= set(labels):
        return "classes that are not in the training labels"
    if bundle.columns == "binary":
        if not all(0 <= float(row[2]) <= 1 for row in table):
            return "a probability outside [0, 1]"
        sides = ((row[1] == labels[1]) != (float(row[2]) > 0.5) for row in table if row[2] != "0.500000000")
        return "a probability on the other side of 0.5 than its class" if any(sides) else None
    if len(header) == 3 and not all(0 < float(row[2]) <= 1 for row in table):
        return "a confidence outside (0, 1]"
    return None


def run_summary(root: Path) -> dict[str, Any]:
    """The submission.json that the copy's predictor wrote beside its table."""
    summary: dict[str, Any] = json.loads(
        (root / runs.SUBMISSION).with_suffix(".json").read_text(encoding="utf-8")
    )
    return summary
