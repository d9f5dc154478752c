"""The tables beside the betons decide which images train and validate: damage is refused, what is missing returns."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fastflower import convert
from fastflower.core.errors import CorruptionError
from fastflower.core.tables import read_sealed
from fastflower.data import folds
from fastflower.data.betons import fold_set
from support.sample_images import jpeg, picture

WORDS = [
    *("data.root=train", "data.unlabelled=loose", "data.on_bad=skip", "data.group=phash"),
    *("data.img_size=32", "tta.scales=[32]", "data.n_splits=2", "data.workers=1", "robust.enabled=false"),
]


@pytest.fixture
def converted() -> folds.Folds:
    """Eight photographs of two classes, one of them twice, one unreadable, and three without labels."""
    for number in range(9):
        path = Path("train", "ab"[number % 2], f"{number}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(picture(min(number, 7))) if number != 4 else b"")
    Path("loose").mkdir()
    for number in range(3):
        Path("loose", f"{number}.jpg").write_bytes(jpeg(picture(20 + number)))
    convert.main(WORDS)
    return folds.read_folds(Path("data/folds.csv"))


def readers(table: folds.Folds) -> dict[str, Callable[[], object]]:
    home = Path("data")
    return {
        "skipped.csv": lambda: read_sealed(home / "skipped.csv", folds.SKIPPED),
        "unlabelled.csv": lambda: read_sealed(
            home / fold_set.UNLABELLED_TABLE, fold_set.UNLABELLED_COLUMNS, count=3
        ),
        "duplicates.csv": lambda: folds.read_duplicates(home / folds.DUPLICATES, table),
    }


def test_no_flip_or_cut_of_a_table_goes_unnoticed(converted: folds.Folds) -> None:
    draw = random.Random(0)
    for name, read in readers(converted).items():
        path = Path("data", name)
        content, rows = path.read_bytes(), read()
        assert rows
        for number in range(200):
            broken, place = bytearray(content), draw.randrange(len(content))
            if number % 2:
                broken[place] ^= 1 << draw.randrange(8)
            else:
                del broken[place:]
            path.write_bytes(broken)
            try:
                assert read() == rows
            except CorruptionError as error:
                assert str(path) in str(error)
        path.write_bytes(content)


def test_tables_that_are_missing_beside_current_betons_are_written_again(
    converted: folds.Folds, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("classes.csv", "unlabelled.csv"):
        path = Path("data", name)
        content = path.read_bytes()
        path.unlink()
        convert.main(WORDS)
        assert path.read_bytes() == content
    path.write_bytes(content[:-3])
    with pytest.raises(CorruptionError, match=r"unlabelled.csv: row 2 is damaged"):
        convert.main(WORDS)
