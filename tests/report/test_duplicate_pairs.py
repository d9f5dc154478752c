"""The near-duplicate pairs of the report: how duplicates.csv is read, and how the page counts and labels them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastflower.core import runs
from fastflower.core.tables import CHECK, sealed_rows, write_csv
from fastflower.data.folds import DUPLICATE_COLUMNS, Folds
from fastflower.report import page
from fastflower.report.experiment import ImageRef, duplicate_pairs, read_experiment
from support.fake_members import experiment, member
from support.report_parser import text_of

NAMES = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
GROUPS = np.array([0, 0, 1, 1, 2])  # the last is a copy of the first in one test only
FOLDS = Folds(
    NAMES,
    ["7", "7", "9", "7", "7"],
    np.array([0, 0, 1, 0, 0]),
    np.array([-1, 0, 1, 1, 1]),
    GROUPS,
    ["x"] * 5,
)


def write_duplicates(path: Path, rows: list[tuple[str, ...]]) -> None:
    named = [dict(zip(DUPLICATE_COLUMNS, (*row, ""), strict=True)) for row in rows]
    write_csv(path, sealed_rows(named, DUPLICATE_COLUMNS, count=len(rows)), (*DUPLICATE_COLUMNS, CHECK))


def test_pairs_refer_to_rows_of_folds_csv_and_conflicts_come_first(tmp_path: Path) -> None:
    path = tmp_path / "duplicates.csv"
    assert duplicate_pairs(path, FOLDS) == []
    rows = [("0", "b.jpg", "7", "a.jpg", "7", "3", "no"), ("1", "d.jpg", "7", "c.jpg", "9", "", "yes")]
    write_duplicates(path, rows)
    conflict, near = duplicate_pairs(path, FOLDS)
    assert conflict.conflict and conflict.identical and conflict.bits is None
    assert conflict.category_ids == ("7", "9") and conflict.filenames == ("d.jpg", "c.jpg")
    assert conflict.images == (ImageRef(3, fold=1), ImageRef(2, fold=1))
    assert not near.conflict and not near.identical and near.bits == 3
    assert near.images[1] == ImageRef(0, fold=-1)


def test_the_page_counts_pairs_and_names_their_similarity(tmp_path: Path) -> None:
    path = tmp_path / "duplicates.csv"
    rows = [
        ("0", "b.jpg", "7", "a.jpg", "7", "3", "no"),
        ("1", "d.jpg", "7", "c.jpg", "9", "", "yes"),
        ("0", "e.jpg", "7", "a.jpg", "7", "0", "no"),
    ]
    write_duplicates(path, rows)
    folds = replace(FOLDS, group=np.array([0, 0, 1, 1, 0]))
    experiment(runs.RESULTS / "example", [member(f) for f in (0, 1, 2)], [], [])
    html = page.experiment_page(replace(read_experiment("example"), duplicates=duplicate_pairs(path, folds)))
    section = re.search(r'<section id="duplicates".*?</section>', html, flags=re.S)[0]
    shown = text_of(section)
    assert "3 pairs of images are duplicates or near-duplicates" in shown
    assert "1 of them have different labels" in shown
    captions = [text_of(caption) for caption in re.findall(r"<p>(.*?)</p></li>", section, flags=re.S)]
    assert captions == [
        "labels 7 and 9 , identical bytes d.jpg, c.jpg",
        "7 , 0 of 64 bits differ e.jpg, a.jpg",
        "7 , 3 of 64 bits differ b.jpg, a.jpg",
    ]
