"""Labels that would split a class, join two, or are none: merged, announced or refused in one line."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from fastflower import convert
from fastflower.core.errors import InputError
from fastflower.data import labels
from fastflower.recipe import load
from support.sample_images import jpeg, picture

ACCENT = "caf\u00e9"


def table_of(
    *ids: str, names: list[str] | None = None, columns: str = "filename,category_id"
) -> labels.LabelTable:
    """Read a label file with one file for each id; the files are written under `names`, else k.jpg."""
    names = names or [f"{k}.jpg" for k in range(len(ids))]
    Path("train").mkdir()
    for k in range(len(ids)):
        Path("train", f"{k}.jpg" if names[k].isascii() and "." in names[k] else names[k]).write_bytes(b"1")
    rows = "".join(f"{name},{category_id}\n" for name, category_id in zip(names, ids, strict=True))
    Path("labels.csv").write_text(f"{columns}\n{rows}", encoding="utf-8", newline="")
    return labels.read_labels(load(None, ["data.root=train", "data.csv=labels.csv"]))


@pytest.mark.parametrize("spelling", ["nan", "NaN", " nan "])
def test_a_missing_value_is_named_and_does_not_make_whole_numbers_fractions(spelling: str) -> None:
    with pytest.raises(
        InputError,
        match=r"^labels.csv: line 4: the label '.*' is a missing value, not a class; .* row of '2.jpg'$",
    ):
        table_of("164.0", "7.0", spelling)


def test_missing_values_of_arrays_are_refused() -> None:
    x = np.zeros((4, 28, 28), np.uint8)
    np.savez("train.npz", x=x, y=np.array([1, 2, np.nan, 1]))
    with pytest.raises(InputError, match=r"row 2: the label 'nan' is a missing value"):
        labels.read_labels(load(None, ["data.root=train.npz"]))


@pytest.mark.parametrize(
    "odd",
    [
        "ro\u200ese",
        "rose\u202c",
        "\u2066rose\u2069",
        "\u200brose",
        "ro\u200bse",
        "rose\ufeff",
        "\u00a0rose",
        "rose\u2009",
        "\u2060rose",
        "ro\u00adse",
    ],
)
def test_invisible_characters_do_not_split_a_class(odd: str) -> None:
    table = table_of("rose", odd, "lily")
    assert table.classes.ids == ("lily", "rose")
    assert table.notices == ("1 labels had spaces around them, or invisible characters",)


def test_a_non_breaking_space_is_a_space() -> None:
    assert table_of("red rose", "red\u00a0rose", "red \u00a0rose", "lily").classes.ids == ("lily", "red rose")


@pytest.mark.parametrize("frequent", ["NFC", "NFD"])
def test_accents_encoded_in_two_ways_are_one_class_in_its_most_frequent_spelling(frequent: str) -> None:
    rare = {"NFC": "NFD", "NFD": "NFC"}[frequent]
    ids = [unicodedata.normalize(form, ACCENT) for form in (frequent, frequent, rare)]  # type: ignore[arg-type]
    table = table_of(*ids, "rose")
    assert table.classes.ids == (ids[0], "rose") and table.counts.tolist() == [3, 1]
    assert "1 classes are written with accents encoded in two ways" in table.notices[0]


@pytest.mark.parametrize(
    ("ids", "notice"),
    [
        (
            ("Rose", "rose", "lily"),
            "1 pairs of classes differ only in case, width, spaces or invisible characters, such as 'Rose' and 'rose'",
        ),
        (
            ("sea rose", "sea_rose", "x"),
            "differ only in case, width, spaces or invisible characters, such as 'sea rose' and 'sea_rose'",
        ),
        (
            ("ａ1", "a1", "x"),
            "differ only in case, width, spaces or invisible characters, such as 'a1' and 'ａ1'",
        ),
        (
            ("A", "B", "A B"),
            "1 classes are made of the ids of others, such as 'A B'; each is a class of its own",
        ),
        (("A", "B", "A;B"), "1 classes are made of the ids of others, such as 'A;B'"),
        (("scab", "rust", "scab|rust"), "are made of the ids of others, such as 'scab|rust'"),
        (("rose", "ro\u200dse", "lily"), r"invisible characters, such as 'rose' and 'ro\u200dse'"),
        (("rose\ufe0f", "rose"), r"invisible characters, such as 'rose' and 'rose\ufe0f'"),
        (("007", "7", "8"), "'007' and '7' are different classes"),
        (("1.5", "1.50", "2"), "'1.5' and '1.50' are different classes"),
        (("10", "1e1", "2"), "'10' and '1e1' are different classes"),
        (("None", "1", "2"), "'None' is a class; if it marks images without a label, remove their rows"),
        (("1", "2", "#N/A"), "'#N/A' is a class; if it marks images without a label"),
        (("-1", "0", "1"), "'-1' is a class; if it marks images without a label"),
    ],
)
def test_ids_that_look_like_a_slip_are_announced(ids: tuple[str, ...], notice: str) -> None:
    table = table_of(*ids)
    assert len(table.classes) == len(ids) and notice in table.notices[0]


def test_ordinary_ids_are_not_announced() -> None:
    assert table_of("-1", "1", "10", "bird rose", "rose", "seabird", "１２").notices == ()


@pytest.mark.parametrize("mark", ["\x1b[31m", "\x07", "\x9b1m", "\x7f"])
def test_control_characters_in_an_id_are_refused(mark: str) -> None:
    with pytest.raises(InputError, match=r"line 3: the label 'rose\\x.*' has control characters") as error:
        table_of("rose", f"rose{mark}")
    assert mark not in str(error.value)


def test_control_characters_of_names_never_reach_a_console_or_a_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("data/train").mkdir(parents=True)
    rows = ["filename,category_id,english\x1b[2Jname"]
    english = ["rose\x1b[31m", "lily", "rose\x1b[31m", ""]
    for k in range(9):
        Path(f"data/train/{k}\x1b[31m.jpg").write_bytes(jpeg(picture(k)))
        rows.append(f"{k}\x1b[31m.jpg,{k % 4},{english[k % 4]}")
    Path("data/train/extra\x1b[31m.jpg").write_bytes(b"1")
    Path("data/train/8\x1b[31m.jpg").write_bytes(jpeg(picture(0)))
    Path("data/train_labels.csv").write_text("\n".join(rows) + "\n")
    words = [
        "data.img_size=16",
        "tta.scales=[16]",
        "data.n_splits=2",
        "data.workers=1",
        "robust.enabled=false",
    ]
    assert convert.main(words) == 0
    output = capsys.readouterr().out
    assert "have no label, such as extra\\x1b[31m.jpg" in output and "rose" in output
    assert "copies or near-copies" in output
    for text in (
        output,
        *(path.read_text() for path in Path("data").glob("*.csv") if "train" not in path.name),
    ):
        assert not [char for char in text if not char.isprintable() and char != "\n"]


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_a_file_is_found_whichever_way_its_accents_are_encoded(on_disk: str) -> None:
    named = {"NFC": "NFD", "NFD": "NFC"}[on_disk]
    names = {
        form: [unicodedata.normalize(form, f"{ACCENT}{k}.jpg") for k in range(2)]  # type: ignore[arg-type]
        for form in ("NFC", "NFD")
    }
    Path("train").mkdir()
    for name in names[on_disk]:
        Path("train", name).write_bytes(b"1")
    rows = "".join(f"{name},{k},{k}\n" for k, name in enumerate(names[named]))
    Path("labels.csv").write_text(f"filename,category_id,fold\n{rows}", encoding="utf-8")
    recipe = load(None, ["data.root=train", "data.csv=labels.csv", "data.split=given", "data.n_splits=2"])
    table = labels.read_labels(recipe)
    assert table.filenames == names[on_disk] and table.given_folds is not None
    assert table.given_folds.tolist() == [0, 1]
    assert "2 files have other names on disk, in their accents or endings, such as " in table.notices[0]


def test_ids_without_an_ending_find_their_files() -> None:
    Path("train/sub").mkdir(parents=True)
    for name in ("a.jpg", "b.1.PNG", "sub/c.jpeg"):
        Path("train", name).write_bytes(b"1")
    Path("labels.csv").write_text("filename,category_id\na,1\nb.1,2\nsub/c,1\n")
    recipe = load(None, ["data.root=train", "data.csv=labels.csv"])
    table = labels.read_labels(recipe)
    assert table.filenames == ["a.jpg", "b.1.PNG", "sub/c.jpeg"]
    assert table.notices == (
        "3 files have other names on disk, in their accents or endings, such as 'a' for a.jpg",
    )
    Path("train/a.png").write_bytes(b"1")
    with pytest.raises(InputError, match=r"line 2: 'a' can mean a.jpg or a.png; name one of them"):
        labels.read_labels(recipe)
