"""Label files in the forms that contests use, and the true cause where one cannot be read."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastflower import convert
from fastflower.core.errors import InputError
from fastflower.data import labels
from fastflower.data.betons import fold_set
from fastflower.recipe import load

SMALL = ["data.img_size=32", "tta.scales=[32]", "data.n_splits=2", "data.workers=1", "robust.enabled=false"]


def read(text: str | bytes, *words: str) -> labels.LabelTable:
    Path("labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return labels.read_labels(load(None, ["data.root=train", "data.csv=labels.csv", *words]))


def files(*names: str) -> None:
    for name in names:
        Path("train", name).parent.mkdir(parents=True, exist_ok=True)
        Path("train", name).write_bytes(b"1")


def emotions(rows: int = 12, side: int = 24) -> tuple[np.ndarray, list[str]]:
    images = np.random.default_rng(0).integers(0, 256, (rows, side, side), dtype=np.uint8)
    return images, [" ".join(map(str, image.ravel())) for image in images]


def test_pixels_in_one_column_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    images, texts = emotions()
    rows = [f"{k % 3},{text},{'Training' if k % 4 else 'PublicTest'}" for k, text in enumerate(texts)]
    Path("fer.csv").write_text("emotion,pixels,Usage\n" + "\n".join(rows) + "\n")
    words = [*SMALL, "data.root=fer.csv", "data.label_col=emotion"]
    assert convert.main(words) == 0
    assert "note: fer.csv: the columns Usage are not used" in capsys.readouterr().out
    opened = fold_set.open_fold(load(None, words), 0)
    assert opened.folds.category_ids == [str(k % 3) for k in range(12)]
    for row, index in enumerate(opened.val.index):
        assert np.array_equal(
            opened.val.row(row).reshape(24, 24, 3), np.repeat(images[index][..., None], 3, 2)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + " 7", r"pixels has 577 numbers in a row, 576 in the first"),
        (lambda text: text[:-4], r"pixels has 57. numbers in a row"),
        (lambda text: text.replace(" ", " x", 1), r"lines from 2: .*pixels are whole numbers 0..255"),
        (lambda text: "256 " + text.split(" ", 1)[1], r"0 to 256; pixels are whole numbers 0..255"),
        (lambda text: "", r"pixels has 0 numbers in a row"),
    ],
)
def test_texts_of_pixels_that_are_no_image_are_refused(change, message: str) -> None:  # type: ignore[no-untyped-def]
    _, texts = emotions(rows=6)
    texts[3] = change(texts[3])
    Path("fer.csv").write_text("label,pixels\n" + "".join(f"{k % 2},{t}\n" for k, t in enumerate(texts)))
    with pytest.raises(InputError, match=message) as error:
        convert.main([*SMALL, "data.root=fer.csv"])
    assert "\n" not in str(error.value)


def test_a_table_of_pixels_without_labels_names_its_columns() -> None:
    Path("fer.csv").write_text(f"emotion,pixels\n1,{emotions(rows=1)[1][0]}\n")
    with pytest.raises(
        InputError, match=r"no column category_id or label; it has emotion, pixels; name yours"
    ):
        labels.read_labels(load(None, ["data.root=fer.csv"]))


def test_one_column_for_each_class() -> None:
    files("a.jpg", "b.jpg", "c.jpg")
    table = read(
        "image,MEL,NV,BCC,age\na,1.0,0.0,0.0,50\nb,0.0,1.0,0.0,1\nc,0.0,0.0,1.0,7\n", "data.image_col=image"
    )
    assert (table.filenames, table.category_ids) == (["a.jpg", "b.jpg", "c.jpg"], ["MEL", "NV", "BCC"])
    assert "labels.csv: the labels are its 3 columns of 0 and 1: MEL, NV, BCC" in table.notices


def test_columns_for_each_class_may_be_true_or_false_and_one_without_a_name_is_none() -> None:
    files("a.jpg", "b.jpg")
    table = read(",filename,x,y\n0,a.jpg,True,False\n1,b.jpg,False,True\n")
    assert table.category_ids == ["x", "y"]


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("filename,category_id,category_id", "category_id"),
        ("filename,filename,category_id", "filename"),
        ("filename,x,x", "x"),
    ],
)
def test_two_columns_of_one_name_are_refused(header: str, name: str) -> None:
    files("a.jpg", "b.jpg")
    with pytest.raises(
        InputError, match=rf"labels.csv: 2 columns are called {name}; leave the one that counts"
    ):
        read(f"{header}\na.jpg,1,0\nb.jpg,0,1\n")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("c.jpg,1,1", r"line 4: 2 columns are 1 \(x, y\); an image has one label"),
        ("c.jpg,0,0", r"line 4: 0 columns are 1 \(none\); an image has one label"),
        (
            "c.jpg,0,2",
            r"no column category_id; it has filename, x, y; name yours by data.image_col and data.label_col",
        ),
    ],
)
def test_rows_with_no_or_two_labels_are_refused(row: str, message: str) -> None:
    files("a.jpg", "b.jpg", "c.jpg")
    with pytest.raises(InputError, match=message):
        read(f"filename,x,y\na.jpg,1,0\nb.jpg,0,1\n{row}\n")


@pytest.mark.parametrize("header", ["filename", "filename,label", "filename,label,taken"])
def test_a_missing_column_of_labels_is_named(header: str) -> None:
    files("a.jpg", "b.jpg")
    cells = ",rose" * header.count(",")
    with pytest.raises(InputError, match=rf"no column category_id; it has {header.replace(',', ', ')}; "):
        read(f"{header}\na.jpg{cells}\nb.jpg{cells}\n")


def test_a_missing_column_of_folds_is_named() -> None:
    files("a.jpg", "b.jpg", "c.jpg", "d.jpg")
    text = "filename,category_id,x,y\na.jpg,1,1,0\nb.jpg,2,0,1\nc.jpg,1,1,0\nd.jpg,2,0,1\n"
    with pytest.raises(InputError, match=r"no column fold; it has filename, category_id, x, y"):
        read(text, "data.split=given")


CHINESE = [f"玫瑰{k}.jpg" for k in range(201)]


def test_a_missing_photograph_is_no_fault_of_the_encoding() -> None:
    files(*CHINESE[1:])
    text = "filename,category_id\n" + "".join(f"{name},{k % 2}\n" for k, name in enumerate(CHINESE))
    with pytest.raises(
        InputError,
        match=r"^labels.csv: 1 of 201 files is missing: '玫瑰0.jpg'; add the files or remove the rows "
        r"\(it is not UTF-8 and was read as GB18030\)$",
    ):
        read(text.encode("gb18030"))
    files(CHINESE[0])
    assert read(text.encode("gb18030")).notices == (
        "labels.csv is not UTF-8; it was read as GB18030, in which every file exists",
    )


def test_other_columns_are_no_fault_of_the_encoding() -> None:
    files(*CHINESE[:4])
    text = "文件名,类别\n" + "".join(f"{name},{k % 2}\n" for k, name in enumerate(CHINESE[:4]))
    with pytest.raises(
        InputError,
        match=r"labels.csv: no column filename or category_id; it has 文件名, 类别; name yours by ",
    ):
        read(text.encode("gb18030"))
    table = read(text.encode("gb18030"), "data.image_col=文件名", "data.label_col=类别")
    assert table.filenames == CHINESE[:4]


def test_class_names_in_gb18030_with_a_missing_file() -> None:
    files("a.jpg", "b.jpg")
    text = "filename,category_id\na.jpg,玫瑰\nb.jpg,百合\nc.jpg,百合\n"
    with pytest.raises(InputError, match=r"1 of 3 files is missing: 'c.jpg'"):
        read(text.encode("gb18030"))


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC photograph: save it as JPEG or PNG"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "a HEIC photograph: save it as JPEG or PNG"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "an AVIF image: save it as JPEG or PNG"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "an AVIF image: save it as JPEG or PNG"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0isommp42", "a video"),
        (b"\xff\x0a\xfa\x1f", "a JPEG XL image: save it as JPEG or PNG"),
    ],
)
def test_photographs_of_newer_formats_are_named(start: bytes, kind: str) -> None:
    files("bad.jpg")
    for k in range(4):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), (k * 60, 9, 9)).save(buffer, "JPEG")
        Path(f"train/{k}.jpg").write_bytes(buffer.getvalue())
    Path("train/bad.jpg").write_bytes(start + bytes(range(200)))
    rows = "".join(f"{k}.jpg,{k % 2}\n" for k in range(4))
    Path("labels.csv").write_text(f"filename,category_id\n{rows}bad.jpg,1\n")
    with pytest.raises(
        InputError, match=f"bad.jpg is not an image of type JPEG, .*, but {kind}; replace them"
    ):
        convert.main([*SMALL, "data.root=train", "data.csv=labels.csv"])
