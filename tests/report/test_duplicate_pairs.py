from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastflower.core import runs
from fastflower.core.tables import write_csv
from fastflower.data.conversion.pipeline import PAIRS
from fastflower.data.folds import Folds
from fastflower.report import page
from fastflower.report.experiment import pairs, read
from support.fake_members import experiment, member
from support.report_parser import words

NAMES = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
FOLDS = Folds(
    NAMES, ["7", "7", "9", "7"], np.array([0, 0, 1, 0]), np.array([-1, 0, 1, 1]), np.arange(4), ["x"] * 4
)


def test_pairs_have_places_and_different_labels_come_first(tmp_path: Path) -> None:
    path = tmp_path / "duplicates.csv"
    assert pairs(path, FOLDS) == []
    rows = [("0", "b.jpg", "7", "a.jpg", "7", "3", "no"), ("1", "d.jpg", "7", "c.jpg", "9", "", "yes")]
    write_csv(path, [dict(zip(PAIRS, (*row, ""), strict=True)) for row in rows], PAIRS)
    torn, near = pairs(path, FOLDS)
    assert torn["conflict"] and torn["identical"] and torn["bits"] is None
    assert torn["category_ids"] == ["7", "9"] and torn["filenames"] == ["d.jpg", "c.jpg"]
    assert torn["rows"] == [{"index": 3, "fold": 1}, {"index": 2, "fold": 1}]
    assert not near["conflict"] and not near["identical"] and near["bits"] == 3
    assert near["rows"][1] == {"index": 0, "fold": -1}


def test_the_page_counts_them_and_says_how_alike_they_are(tmp_path: Path) -> None:
    path = tmp_path / "duplicates.csv"
    rows = [
        ("0", "b.jpg", "7", "a.jpg", "7", "3", "no"),
        ("1", "d.jpg", "7", "c.jpg", "9", "", "yes"),
        ("1", "d.jpg", "7", "a.jpg", "7", "0", "no"),
    ]
    write_csv(path, [dict(zip(PAIRS, (*row, ""), strict=True)) for row in rows], PAIRS)
    experiment(runs.RESULTS / "made", [member(f) for f in (0, 1, 2)], [], [])
    html = page.experiment(replace(read("made"), copies=pairs(path, FOLDS)))
    section = re.search(r'<section id="copies".*?</section>', html, flags=re.S)[0]
    said = words(section)
    assert "3 photographs are copies or near-copies of another" in said
    assert "1 of them bear different labels" in said
    captions = [words(caption) for caption in re.findall(r"<p>(.*?)</p></li>", section, flags=re.S)]
    assert captions == [
        "labels 7 and 9 , the same bytes d.jpg, c.jpg",
        "7 , 0 of 64 bits differ d.jpg, a.jpg",
        "7 , 3 of 64 bits differ b.jpg, a.jpg",
    ]
