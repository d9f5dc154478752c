"""Pairs of photographs that convert found to be copies or near-copies of one another, for the report."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from fastflower.data.folds import Folds
from fastflower.data.tables import shown


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
