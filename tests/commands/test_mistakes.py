"""Mistakes of the first hour: each is one line with its true cause and the remedy."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastflower import __main__, convert, train, weights
from fastflower.bench.pictures import photographs
from fastflower.core.errors import InputError

SMALL = ["data.img_size=32", "tta.scales=[32]", "model.pretrained=false", "model.backbone=test_resnet"]


def image(path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)


def table(path: str, *rows: tuple[str, str]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def refusal(*words: str) -> str:
    """The line with which convert refuses."""
    with pytest.raises(InputError) as error:
        convert.main([*SMALL, *words])
    return str(error.value)


def test_mistakes_with_folders_name_the_folder_that_is_meant() -> None:
    for name in ("a/b/x/0.jpg", "a/b/y/1.jpg"):
        image(f"deep/{name}")
    assert refusal("data.root=deep").endswith("for those below it, give data.root=deep/a/b")
    assert refusal("data.root=depe").endswith("no such folder or file; did you mean deep?")
    assert "give the folder that holds the training images" in refusal("data.root=elsewhere")
    Path("photos.zip").write_bytes(b"PK\x03\x04")
    for words in (["data.form=folders"], []):
        assert "photos.zip: an archive; unpack it" in refusal("data.root=photos.zip", *words)
    image("heic/a/0.png")
    Path("heic/a/0.png").rename("heic/a/0.HEIC")
    assert refusal("data.root=heic").endswith("below it; it has 1 .heic files")
    Path("empty").mkdir()
    assert refusal("data.root=empty").startswith(
        "data.root = empty: the folder is empty; put the training images"
    )
    Path("empty/rose").mkdir()
    assert refusal("data.root=empty", "data.form=folders").endswith("below it, it is empty")


def test_mistakes_with_label_files_name_the_cause() -> None:
    rows = [(f"{number}.jpg", "ab"[number % 2]) for number in range(6)]
    for name, _ in rows:
        image(f"photos/{name}")
    header = ("filename", "category_id")
    table("good.csv", header, *rows)
    table("one.csv", header, *rows, ("gone.jpg", "a"))
    assert refusal("data.root=photos", "data.csv=one.csv") == (
        "one.csv: 1 of 7 files is missing in photos: line 8: 'gone.jpg' does not exist"
    )
    image("other/portrait.png")
    line = refusal("data.root=other", "data.csv=good.csv")
    assert line.startswith("good.csv: 6 of 6 files are missing in other: line 2: '0.jpg' does not exist;")
    assert line.endswith("and 3 more")
    table("bare.csv", *rows)
    assert refusal("data.root=photos", "data.csv=bare.csv").endswith(
        "its first line must name the columns, such as filename,category_id"
    )
    Path("labels.xlsx").write_bytes(b"PK\x03\x04\0\0")
    assert refusal("data.root=photos", "data.csv=labels.xlsx") == (
        "labels.xlsx: a spreadsheet or an archive, not text; save its table as CSV in UTF-8"
    )
    assert "a label file is given as data.csv, and the folder of its images as data.root" in refusal(
        "data.root=good.csv"
    )


def test_mistakes_in_recipes_name_the_file_and_the_section(capsys: pytest.CaptureFixture[str]) -> None:
    Path("child.yaml").write_text("base: gone.yaml\n")
    Path("colon.yaml").write_text("data:\n  root:photos\n")
    for words, pattern in (
        (["child.yaml"], r"child.yaml: base = gone.yaml: no recipe \S+gone.yaml$"),
        (["colon.yaml"], r"colon.yaml: data is a section: it holds keys, .* space after the colon"),
        (["opt.lr"], r"^got opt.lr without a value; a change is written opt.lr=value"),
        (["model.backbone=resnet9999", "model.pretrained=false"], "has no such model; near: resnet50"),
        (["chld.yaml"], r"no recipe \S+chld.yaml; did you mean \S+child.yaml\?"),
    ):
        with pytest.raises(InputError, match=pattern):
            train.check(words)
    with pytest.raises(InputError, match=r"timm 1.* has no such model; near: resnet50"):
        weights.main(["resnet9999"])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="2"):
        patch.setattr("sys.argv", ["fastflower", "predict", "test_dataset"])
        __main__.main()
    assert "the predictor runs alone: python code/predict.py" in capsys.readouterr().err


def test_benchmarks_find_photographs_in_class_folders() -> None:
    for name in ("b/0.jpg", "a/1.jpeg", "a/2.png", ".hidden/3.jpg"):
        image(f"photos/{name}")
    assert photographs(Path("photos"), 0) == (Path("photos/a/1.jpeg"), Path("photos/b/0.jpg"))
    assert photographs(Path("photos"), 1) == (Path("photos/a/1.jpeg"),)
