"""Betons of FFCV as a source: every way of storing images and labels, and what is refused."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastflower import convert, doctor
from fastflower.core.errors import InputError
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import HEADER, IMAGE_TYPE
from fastflower.data.labels import read_labels
from fastflower.data.readers import sources
from fastflower.data.readers.ffcv_files import BYTES, FLOAT, INTEGER, JSON, NDARRAY, open_ffcv
from fastflower.recipe import Recipe, load
from support import stock_betons
from support.stock_betons import OWN

SMALL = [
    "data.img_size=32",
    "tta.scales=[32]",
    "data.n_splits=2",
    "data.workers=1",
    "robust.kinds=[occlusion]",
]
ROWS = 12
IDS = [k % 3 for k in range(ROWS)]
ONE_HOT = [np.eye(3, dtype=np.float32)[k] for k in IDS]


def picture(seed: int, height: int = 40, width: int = 36) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


RAW_IMAGES = [picture(k) for k in range(ROWS)]
MIXED = [jpeg(image) if k % 2 else image for k, image in enumerate(RAW_IMAGES)]


def write(path: str = "train.beton", images: Any = MIXED, **labels: tuple[int, Any]) -> Path:
    return stock_betons.write(path, {"image": (IMAGE_TYPE, images), **(labels or {"label": (INTEGER, IDS)})})


def recipe(*overrides: str) -> Recipe:
    return load(None, [*SMALL, "data.root=train.beton", *overrides])


def label_texts(*overrides: str) -> list[str]:
    return [row.category_id for row in sources.open_labelled(recipe(*overrides)).rows]


def test_stored_jpegs_are_carried_over_and_pixels_are_equal(capsys) -> None:
    write()
    arguments = [*SMALL, "data.root=train.beton", "data.store=jpeg"]
    assert convert.main(arguments) == 0
    assert "the labels are its field label (IntField)" in capsys.readouterr().out
    opened = fold_set.open_fold(recipe("data.store=jpeg"), 0)
    assert opened.folds.filenames == [f"train/{k:02d}" for k in range(ROWS)]
    assert opened.folds.category_ids == [str(k) for k in IDS]
    for row, index in enumerate(opened.train.index.tolist()):
        if index % 2:
            assert opened.train.row(row).tobytes() == MIXED[index]
    for row, index in enumerate(
        opened.val.index.tolist()
    ):  # raw pixels that validate are stored without loss
        expected = MIXED[index] if index % 2 else RAW_IMAGES[index].tobytes()
        assert opened.val.row(row).tobytes() == expected
    assert "12 images of 3 classes" in " ".join(map(str, doctor.training(arguments)))
    convert.main(arguments)
    assert "up to date" in capsys.readouterr().out
    write(images=[*MIXED[:-1], jpeg(picture(99))])
    with pytest.raises(InputError, match="is stale"):
        fold_set.open_fold(recipe("data.store=jpeg"), 0)


def test_raw_pixels_come_out_equal() -> None:
    write("set.ffcv", images=RAW_IMAGES)
    convert.main([*SMALL, "data.root=set.ffcv", "data.store=raw"])
    opened = fold_set.open_fold(load(None, [*SMALL, "data.root=set.ffcv", "data.store=raw"]), 1)
    for row, index in enumerate(opened.train.index.tolist()):
        assert opened.train.row(row).tobytes() == RAW_IMAGES[index].tobytes()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"y": (INTEGER, [k + 164 for k in IDS])}, [str(k + 164) for k in IDS]),
        ({"y": (FLOAT, [float(k) for k in IDS])}, [f"{k}.0" for k in IDS]),
        ({"y": (BYTES, [f"rose {k}\0".encode() for k in IDS])}, [f"rose {k}" for k in IDS]),
        ({"y": (NDARRAY, [np.array([k], np.uint16) for k in IDS])}, [str(k) for k in IDS]),
        ({"y": (NDARRAY, ONE_HOT)}, [str(k) for k in IDS]),
        ({"file": (BYTES, [b""] * ROWS), "category_id": (INTEGER, IDS)}, [str(k) for k in IDS]),
        ({"index": (INTEGER, range(ROWS)), "label": (INTEGER, IDS)}, [str(k) for k in IDS]),
        ({"y": (INTEGER, IDS), "box": (JSON, [b"{}\0"] * ROWS)}, [str(k) for k in IDS]),
    ],
)
def test_labels_are_found_by_name_and_type(labels: Any, expected: list[str]) -> None:
    write(**labels)
    assert label_texts() == expected
    assert len(read_labels(recipe()).classes) == 3


def test_labels_of_data_csv_where_no_field_holds_them() -> None:
    write(about=(JSON, [b"{}\0"] * ROWS))
    with pytest.raises(
        InputError, match=r"no field of labels.*data.csv.*names the rows train/00 to train/11"
    ):
        label_texts()
    np.save("y.npy", np.array(IDS))
    assert label_texts("data.csv=y.npy") == [str(k) for k in IDS]
    lines = [f"train/{k:02d},{label},name {label}" for k, label in enumerate(IDS)]
    Path("y.csv").write_text("\n".join(["filename,category_id,english_name", *lines]))
    table = read_labels(recipe("data.csv=y.csv"))
    assert table.category_ids == [str(k) for k in IDS] and table.names["english_name"]["1"] == "name 1"
    Path("y.csv").write_text("\n".join(["filename,category_id", *lines, "train/12,1"]).replace(",name", ""))
    with pytest.raises(InputError, match=r"'train/12' is no row of train\.beton"):
        read_labels(recipe("data.csv=y.csv"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": (INTEGER, IDS)}, r"0 fields of images; it has label \(IntField\)"),
        (
            {"a": (IMAGE_TYPE, MIXED), "b": (IMAGE_TYPE, MIXED), "label": (INTEGER, IDS)},
            r"2 fields of images; it has a \(RGBImageField\), b \(RGBImageField\), label \(IntField\)",
        ),
        (
            {"image": (IMAGE_TYPE, MIXED), "depth": (OWN, IDS)},
            r"depth \(type 255\): only the program that wrote it knows .* image \(RGBImageField\), depth \(type 255\)",
        ),
        (
            {"image": (IMAGE_TYPE, MIXED), "a": (INTEGER, IDS), "b": (INTEGER, IDS)},
            r"not clear which field holds the labels.* a \(IntField\), b \(IntField\); name it by data.label_col",
        ),
        (
            {"image": (IMAGE_TYPE, MIXED), "label": (JSON, [b"{}\0"] * ROWS)},
            r"label \(JSONField\): holds no labels; they are in a field of type FloatField, IntField",
        ),
        (
            {"image": (IMAGE_TYPE, MIXED), "y": (NDARRAY, [np.ones(3, np.int64)] * ROWS)},
            r"y \(NDArrayField\): 3 numbers a row; a label is one number, or a 1 among 0s",
        ),
        (
            {"image": (IMAGE_TYPE, MIXED), "y": (NDARRAY, [np.ones((3, 2), np.int64)] * ROWS)},
            r"y \(NDArrayField\): int64 \(3, 2\)",
        ),
        ({"image": (IMAGE_TYPE, MIXED), "y": (BYTES, [b"\xff"] * ROWS)}, "its bytes are no text in UTF-8"),
    ],
)
def test_fields_that_cannot_be_read_are_refused_by_name(columns: Any, message: str) -> None:
    stock_betons.write("train.beton", columns)
    with pytest.raises(InputError, match=message):
        read_labels(recipe())


def _header(**values: int) -> None:
    data = bytearray(Path("train.beton").read_bytes())
    header = np.frombuffer(data, HEADER, count=1).copy()
    for name, value in values.items():
        header[name] = value
    data[: HEADER.itemsize] = header.tobytes()
    Path("train.beton").write_bytes(data)


def test_files_that_are_no_finished_beton_are_refused_in_one_line() -> None:
    whole = write().read_bytes()
    for cut in (0, 10, 300, len(whole) - 5):
        Path("train.beton").write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"train\.beton: (cannot be read as a beton|is cut off)"):
            read_labels(recipe())
    faults = {
        "version": (3, "no beton of FFCV's version 2"),
        "num_fields": (0, "no beton of FFCV's version 2"),
        "alloc_table_ptr": (0, "FFCV has not finished writing it"),
        "num_samples": (1 << 60, "is cut off, or its header is damaged"),
    }
    for name, (value, message) in faults.items():
        Path("train.beton").write_bytes(whole)
        _header(**{name: value})
        with pytest.raises(InputError, match=message):
            read_labels(recipe())
    Path("train.beton").write_bytes(whole)
    _header(num_samples=0)
    with pytest.raises(InputError, match="holds no rows"):
        read_labels(recipe())
    Path("train.beton").write_text("filename,category_id\n0001.jpg,164\n")
    with pytest.raises(InputError, match="no beton of FFCV's version 2"):
        read_labels(recipe())
    with pytest.raises(InputError, match=r"data.form = arrays: data.root = train.beton can be beton"):
        read_labels(recipe("data.form=arrays"))
    with pytest.raises(InputError, match=r"did you mean train.beton\?"):
        read_labels(recipe("data.root=trian.beton"))


def test_a_damaged_row_is_named_and_can_be_skipped() -> None:
    path = write()
    data = bytearray(path.read_bytes())
    source = open_ffcv(path).source
    positions = source.images["data_ptr"].tolist()
    for row in (2, 5):  # raw and JPEG: the pointers in the metadata
        data = data.replace(positions[row].to_bytes(8, "little"), (1 << 50).to_bytes(8, "little"), 1)
    path.write_bytes(data)
    arguments = [*SMALL, "data.root=train.beton"]
    with pytest.raises(
        InputError, match=r"2 of 12 images cannot be used: train/02 is damaged: it points to byte"
    ):
        convert.main(arguments)
    assert convert.main([*arguments, "data.on_bad=skip"]) == 0
    assert "train/05" in Path("data/skipped.csv").read_text()


def test_validation_and_unlabelled_images_may_be_betons() -> None:
    write()
    write("val.beton", images=[picture(50 + k) for k in range(6)], label=(INTEGER, IDS[:6]))
    write("more.ffcv", images=[picture(80 + k) for k in range(5)], about=(JSON, [b"{}\0"] * 5))
    overrides = ["data.val=val.beton", "data.split=given", "data.n_splits=1", "data.unlabelled=more.ffcv"]
    convert.main([*SMALL, "data.root=train.beton", *overrides])
    opened = fold_set.open_fold(recipe(*overrides, "semi.enabled=true"), 0)
    assert [opened.folds.filenames[row] for row in opened.val.index] == [f"val/{k}" for k in range(6)]
    assert opened.unlabelled is not None and opened.unlabelled.rows == 5


def test_another_process_opens_the_file_itself() -> None:
    source = open_ffcv(write()).source
    source.load()
    copied = pickle.loads(pickle.dumps(source))
    assert "_data" not in copied.__dict__
    assert copied.read("train/01", 0) == MIXED[1] and np.array_equal(copied.read("train/02", 0), MIXED[2])


@pytest.mark.slow  # importing FFCV takes six seconds
@pytest.mark.parametrize("mode", ["raw", "jpg", "smart", "proportion"])
def test_files_of_ffcv_itself(mode: str) -> None:
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.libffcv import imdecode
    from ffcv.reader import Reader
    from ffcv.writer import DatasetWriter

    images = [picture(k, 40 + 3 * k, 36 + k) for k in range(ROWS)]

    class Rows:
        def __len__(self) -> int:
            return ROWS

        def __getitem__(self, row: int) -> tuple[Any, ...]:
            text = np.frombuffer(f"class {IDS[row]}".encode(), np.uint8)
            return images[row], IDS[row], np.array([IDS[row]]), text, float(IDS[row]), {"row": int(row)}

    fields = {
        "photo": RGBImageField(mode, smart_threshold=6000),
        "number": IntField(),
        "array": NDArrayField(np.dtype("<i8"), (1,)),
        "text": BytesField(),
        "value": FloatField(),
        "about": JSONField(),
    }
    DatasetWriter("train.beton", fields, num_workers=2).from_indexed_dataset(Rows(), chunksize=2)
    texts = {
        "number": [str(k) for k in IDS],
        "array": [str(k) for k in IDS],
        "text": [f"class {k}" for k in IDS],
        "value": [f"{k}.0" for k in IDS],
    }
    for name, expected in texts.items():
        assert label_texts(f"data.label_col={name}") == expected
    source, metadata = open_ffcv(Path("train.beton")).source, Reader("train.beton").metadata["f0"]
    modes = metadata["mode"].tolist()
    assert set(modes) == {"raw": {1}, "jpg": {0}}.get(mode, {0, 1})
    for row in range(ROWS):
        height, width = int(metadata["height"][row]), int(metadata["width"][row])
        stored = source.read(source.name(row), 0)
        assert source.size(source.name(row)) == (height, width)
        if modes[row]:
            assert np.array_equal(stored, images[row])
            continue
        theirs = np.zeros((height, width, 3), np.uint8)
        imdecode(
            np.frombuffer(stored, np.uint8), theirs, height, width, height, width, 0, 0, 1, 1, False, False
        )
        ours = np.asarray(Image.open(io.BytesIO(stored)), np.int16)
        assert np.abs(ours - theirs).max() <= 6  # FFCV's decoder takes a faster, less exact DCT
