"""Tables give back every cell, whatever is in it, and never send a terminal more than text."""

from __future__ import annotations

import csv
import io
import itertools
from pathlib import Path

import numpy as np

from fastflower import convert
from fastflower.core.tables import read_csv, write_csv
from fastflower.data.betons import fold_set
from fastflower.data.folds import read_folds
from fastflower.recipe import load
from support.sample_images import jpeg, picture

MARKS = [
    "\r",
    "\n",
    ",",
    '"',
    "\x1b[31m",
    "\x00",
    "\x7f",
    "\x9b",
    "\t",
    "\\",
    "\\x1b",
    "\\\\",
    "\u2028",
    "\u202e",
    "\\u202e",
    "\udcff",
    " ",
    "花",
]
NAMES = ["a\rb.jpg", "a\nb.jpg", "a\r\nb.jpg", "a\x1b[31mb.jpg", "a\x07b.jpg", "a\x9b1mb.jpg"]


def test_every_cell_comes_back() -> None:
    cells = ["", *MARKS, *("".join(pair) for pair in itertools.product(MARKS, repeat=2))]
    write_csv(Path("t.csv"), [{"a": cell, "b": cell} for cell in cells])
    assert [(row["a"], row["b"]) for row in read_csv(Path("t.csv"), ("a", "b"))] == [(c, c) for c in cells]
    write_csv(Path("one.csv"), [{"a": cell} for cell in cells])
    assert [row["a"] for row in read_csv(Path("one.csv"), ("a",))] == cells


def test_tables_hold_no_control_characters_and_plain_readers_find_line_ends() -> None:
    write_csv(Path("t.csv"), [{"a": cell} for cell in MARKS])
    data = Path("t.csv").read_bytes()
    text = data.decode("utf-8", "surrogateescape")
    assert not set(text) & {
        chr(code) for code in (*range(9), 11, 12, *range(14, 32), *range(0x7F, 0xA0), 0x2028, 0x202E)
    }
    rows = [row[0] for row in csv.reader(io.StringIO(text, newline=""))]
    assert rows[1:5] == MARKS[:4] and len(rows) == len(MARKS) + 1


def test_odd_names_of_every_kind_go_through_labels_folds_and_given_folds() -> None:
    Path("train").mkdir()
    for position, name in enumerate(NAMES):
        Path("train", name).write_bytes(jpeg(picture(position)))
    with open("labels.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(
            [("filename", "category_id"), *((name, k % 2) for k, name in enumerate(NAMES))]
        )
    words = [
        "data.root=train",
        "data.csv=labels.csv",
        "data.n_splits=2",
        "data.workers=1",
        "data.img_size=16",
    ]
    words += ["tta.scales=[16]", "robust.enabled=false", "data.group=none"]
    assert convert.main(words) == 0
    saved = read_folds(Path("data/folds.csv"))
    assert sorted(saved.filenames) == sorted(NAMES)
    given = [*words, "data.split=given", "data.fold_csv=data/folds.csv", "data.home=again"]
    assert convert.main(given) == 0
    again = fold_set.open_fold(load(None, given), 0).folds
    assert again.filenames == saved.filenames and np.array_equal(again.fold, saved.fold)
