"""Every form of images and labels: reading, storing, refusing."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastflower import convert
from fastflower.core.errors import InputError
from fastflower.data import labels
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import Beton
from fastflower.data.decode.kernel import decode_eval
from fastflower.data.readers import arrays, sources
from fastflower.recipe import Recipe, load

SMALL = [
    "data.img_size=32",
    "tta.scales=[32]",
    "data.n_splits=2",
    "data.workers=1",
    "robust.kinds=[occlusion]",
]


def settings(*overrides: str) -> Recipe:
    return load(None, [*SMALL, *overrides])


def grey(rows: int = 12, height: int = 28, width: int = 28, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, height, width), dtype=np.uint8)


def stored_pixels(beton: Beton, row: int) -> np.ndarray:
    """A stored image at its own size: uint8 (H, W, 3)."""
    out = np.empty(
        (1, int(beton.descriptors["height"][row]), int(beton.descriptors["width"][row]), 3), np.uint8
    )
    decode_eval(beton, np.array([row]), out=out, factor=1.0, interpolation="bilinear", threads=1)
    return out[0]


def write_pixels(path: Path, images: np.ndarray, ids: list[str] | None, header: str = "label") -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        names = [f"pixel{k}" for k in range(images[0].size)]
        writer.writerow([header, *names] if ids else names)
        for k, image in enumerate(images):
            writer.writerow([*([ids[k]] if ids else []), *image.ravel().tolist()])


IDS = [str(k % 3) for k in range(12)]


@pytest.mark.parametrize("form", ["pixels", "npz", "npy", "torch", "unit", "flat"])
def test_every_form_of_arrays_stores_the_same_pixels(form: str) -> None:
    images, y = grey(), np.array(IDS, np.int64)
    overrides = ["data.root=train.npz"]
    if form == "pixels":
        write_pixels(Path("train.csv"), images, IDS)
        overrides = ["data.root=train.csv"]
    elif form == "npy":
        np.save("train.npy", images)
        np.save("y.npy", y)
        overrides = ["data.root=train.npy", "data.csv=y.npy"]
    else:
        x = {
            "npz": images,
            "torch": images[:, None],
            "unit": (images / 255).astype(np.float32),
            "flat": images.reshape(12, -1).astype(np.int64),
        }[form]
        np.savez("train.npz", x=x, y=y)
    assert convert.main([*SMALL, *overrides]) == 0
    opened = fold_set.open_fold(settings(*overrides), 1)
    assert opened.folds.filenames == [f"train/{k:02d}" for k in range(12)]
    assert opened.folds.category_ids == IDS
    opened.val.verify()
    for row, index in enumerate(opened.val.index):
        assert np.array_equal(stored_pixels(opened.val, row), np.repeat(images[index][..., None], 3, 2))
    assert opened.val_corrupt is not None and opened.val_corrupt.rows == opened.val.rows


def test_images_that_are_not_square_keep_their_shape() -> None:
    images = np.stack([grey(12, 32, 64, seed) for seed in range(3)], -1)
    np.savez("train.npz", image=images, label=np.array(IDS))
    overrides = ["data.root=train.npz", "data.img_size=[[32,64]]"]
    convert.main([*SMALL, *overrides])
    opened = fold_set.open_fold(settings(*overrides), 0)
    for row, index in enumerate(opened.train.index):
        assert np.array_equal(stored_pixels(opened.train, row), images[index])


def test_a_pair_is_two_images_of_one_row() -> None:
    first, second = grey(seed=1), grey(seed=2)
    labels = np.array([0, 1] * 6)
    np.savez_compressed("train.npz", xa=first, xb=second, y=labels)
    overrides = ["data.root=train.npz"]
    assert sources.form_of(settings(*overrides)) == "pairs"
    convert.main([*SMALL, *overrides])
    opened = fold_set.open_fold(settings(*overrides), 0)
    for beton in (opened.train, opened.val):
        beton.verify()
        assert beton.images_per_row == 2
        for row, index in enumerate(beton.index):
            assert beton.labels[row] == labels[index]
            for view, images in ((beton, first), (beton.second, second)):
                assert np.array_equal(stored_pixels(view, row), np.repeat(images[index][..., None], 3, 2))
    assert opened.val_corrupt is not None
    covered = stored_pixels(opened.val_corrupt, 0), stored_pixels(opened.val_corrupt.second, 0)
    plain = stored_pixels(opened.val, 0), stored_pixels(opened.val.second, 0)
    corners = [np.argwhere((a != b).any(-1)).min(0).tolist() for a, b in zip(covered, plain, strict=True)]
    assert corners[0] != corners[1]  # each image of a pair is corrupted independently


def test_ffcv_reads_pairs() -> None:
    from ffcv.reader import Reader

    np.savez("train.npz", xa=grey(seed=1), xb=grey(seed=2), y=np.array([0, 1] * 6))
    convert.main([*SMALL, "data.root=train.npz"])
    reader = Reader("data/betons/fold0_train.beton")
    beton = fold_set.open_fold(settings("data.root=train.npz"), 0).train
    assert reader.field_names == ["image", "image_b", "label", "index"]
    assert reader.metadata["f2"].tolist() == beton.labels.tolist()
    for field, view in (("f0", beton), ("f1", beton.second)):
        assert reader.metadata[field]["data_ptr"].tolist() == view.descriptors["offset"].tolist()


def test_pairs_in_either_order_share_a_fold() -> None:
    first, second = grey(seed=1), grey(seed=2)
    first[7], second[7] = second[2], first[2]
    np.savez("train.npz", xa=first, xb=second, y=np.array([0, 1] * 6))
    convert.main([*SMALL, "data.root=train.npz", "data.split=kfold"])
    folds = fold_set.open_fold(settings("data.root=train.npz", "data.split=kfold"), 0).folds
    assert folds.group[7] == folds.group[2] and len(set(folds.group)) == 11


def test_images_of_data_val_validate() -> None:
    np.savez("train.npz", x=grey(seed=1), y=np.array(IDS))
    np.savez("val.npz", x=grey(6, seed=2), y=np.array(IDS[:6]))
    overrides = ["data.root=train.npz", "data.val=val.npz"]
    convert.main([*SMALL, *overrides])
    opened = fold_set.open_fold(settings(*overrides), 0)
    names = np.array(opened.folds.filenames)
    assert [name.split("/")[0] for name in names[opened.val.index]] == ["val"] * 6
    assert [name.split("/")[0] for name in names[opened.train.index]] == ["train"] * 12
    assert np.array_equal(stored_pixels(opened.val, 3)[..., 0], grey(6, seed=2)[3])


def photographs(root: Path, classes: int = 3, each: int = 4, seed: int = 0) -> dict[str, bytes]:
    """Write JPEGs, one folder per class; returns their bytes by path below root."""
    rng, files = np.random.default_rng(seed), {}
    for number in range(classes):
        (root / f"{number:02d}").mkdir(parents=True)
        for k in range(each):
            buffer = io.BytesIO()
            coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
            coarse.resize((30, 34)).save(buffer, "JPEG", quality=95)
            files[f"{number:02d}/{k}.jpg"] = buffer.getvalue()
            (root / f"{number:02d}/{k}.jpg").write_bytes(buffer.getvalue())
    return files


def test_labelled_unlabelled_and_validation_folders() -> None:
    photographs(Path("food/training/labeled"))
    held_out = photographs(Path("food/validation"), each=2, seed=1)
    loose = photographs(Path("food/training/unlabeled"), classes=1, each=5, seed=2)
    overrides = [
        "data.root=food/training/labeled", "data.val=food/validation", "data.unlabelled=food/training/unlabeled",
        "data.store=jpeg",
    ]  # fmt: skip
    assert sources.form_of(settings(*overrides)) == "folders"
    convert.main([*SMALL, *overrides])
    opened, unlabelled = (
        fold_set.open_fold(settings(*overrides), 0),
        fold_set.open_unlabelled(settings(*overrides)),
    )
    assert (opened.train.rows, opened.val.rows) == (12, 6)
    names = [opened.folds.filenames[index] for index in opened.val.index]
    assert names == [f"validation/{name}" for name in held_out]
    assert [opened.val.row(row).tobytes() for row in range(6)] == list(held_out.values())
    assert unlabelled.labels.tolist() == [-1] * 5
    assert [unlabelled.row(row).tobytes() for row in range(5)] == list(loose.values())
    listed = Path("data/unlabelled.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in listed] == ["filename", *loose]


def test_unlabelled_images_are_as_strict_as_labelled_ones(capsys: pytest.CaptureFixture[str]) -> None:
    photographs(Path("train"))
    photographs(Path("loose"), classes=1)
    Path("loose/00/1.jpg").write_bytes(b"")
    overrides = ["data.root=train", "data.unlabelled=loose"]
    with pytest.raises(InputError, match=r"1 of 4 images cannot be used: 00/1.jpg is empty; replace them"):
        convert.main([*SMALL, *overrides])
    convert.main([*SMALL, *overrides, "data.on_bad=skip"])
    assert fold_set.open_unlabelled(settings(*overrides)).rows == 3
    assert "00/1.jpg,,is empty" in Path("data/unlabelled_skipped.csv").read_text()
    convert.main([*SMALL, *overrides, "data.on_bad=skip"])
    assert "up to date" in capsys.readouterr().out
    Path("loose/00/2.jpg").unlink()
    with pytest.raises(InputError, match=r"unlabelled.beton is stale: other inputs_hash than"):
        fold_set.open_unlabelled(settings(*overrides))
    with pytest.raises(InputError, match=r"data.unlabelled is empty: name the folder"):
        fold_set.open_unlabelled(settings("data.root=train"))


@pytest.mark.parametrize("source", ["pixels", "npy", "npz"])
def test_unlabelled_arrays_are_stored(source: str) -> None:
    np.savez("train.npz", x=grey(), y=np.array(IDS))
    images = grey(5, seed=9)
    name = {"pixels": "more.csv", "npy": "more.npy", "npz": "more.npz"}[source]
    if source == "pixels":
        write_pixels(Path(name), images, None)
    elif source == "npy":
        np.save(name, images)
    else:
        np.savez(name, x=images)
    overrides = ["data.root=train.npz", f"data.unlabelled={name}"]
    convert.main([*SMALL, *overrides])
    beton = fold_set.open_unlabelled(settings(*overrides))
    assert beton.rows == 5
    assert all(np.array_equal(stored_pixels(beton, k)[..., 0], images[k]) for k in range(5))


def test_the_form_is_detected_from_the_root() -> None:
    photographs(Path("train"))
    assert sources.form_of(settings("data.root=train")) == "folders"
    Path("labels.csv").write_text("filename,category_id\n00/1.jpg,5\n01/1.jpg,6\n")
    with_csv = ["data.root=train", "data.csv=labels.csv"]
    assert sources.form_of(settings(*with_csv)) == "csv"
    assert len(labels.read_labels(settings(*with_csv))) == 2
    assert len(labels.read_labels(settings(*with_csv, "data.form=folders"))) == 12
    with pytest.raises(
        InputError, match=r"data.form = pairs: data.root = train can be csv or folders; use auto"
    ):
        sources.form_of(settings(*with_csv, "data.form=pairs"))


REFUSED = [
    ({"x": grey(), "y": np.arange(12), "z": np.arange(12)}, [], r"not clear which .* it has x uint8 \(12, 28, 28\), y"),
    ({"x": grey(), "y": np.arange(11)}, [], r"it is not clear which arrays are images and labels"),
    ({"x": grey(), "y": np.arange(12)}, ["data.arrays=[image,y]"], r"no array image; it has x uint8"),
    ({"x": grey(), "y": np.arange(12)}, ["data.arrays=x"], r"data.arrays = x; it has"),
    ({"x": grey(), "y": np.eye(12)}, ["data.arrays=[x,y]"], r"labels are one number or word per image"),
    ({"x": grey() - 3.5, "y": np.arange(12)}, [], r"x: float64 from -3.5 to 251.5; images are whole numbers 0..255"),
    ({"x": grey() * 2.0, "y": np.arange(12)}, [], r"from 0 to 510; images are whole"),
    ({"x": np.zeros((12, 28, 28, 5), np.uint8), "y": np.arange(12)}, [], r"shape \(12, 28, 28, 5\); images are"),
    ({"x": np.zeros((12, 700), np.uint8), "y": np.arange(12)}, [], r"rows of 700 pixels are no images of data.shape"),
    ({"a": grey(), "b": grey(12, 20), "y": np.arange(12)}, [], r"the two images of a pair have one size"),
    ({"x": grey(), "y": np.arange(12)}, ["data.form=pairs"], r"train.npz has one array of images; name them by"),
    ({"x": np.array([{}] * 12), "y": np.arange(12)}, ["data.arrays=[x,y]"], r"images are"),
    ({"x": grey(), "y": np.arange(12)}, ["data.store=jpeg"], r"data.store = jpeg: train.npz holds arrays, not JPEGs"),
    ({"x": grey(), "y": np.arange(12)}, ["data.val=no.npz"], r"data.val = no.npz: no such folder or file"),
    ({"x": grey(), "y": np.arange(12)}, ["data.unlabelled=nowhere"], r"data.unlabelled = nowhere: no such folder"),
]  # fmt: skip


@pytest.mark.parametrize(("stored", "overrides", "message"), REFUSED)
def test_arrays_that_are_no_images_are_refused(stored: dict, overrides: list[str], message: str) -> None:
    np.savez("train.npz", **stored)
    with pytest.raises(InputError, match=message) as error:
        convert.main([*SMALL, "data.root=train.npz", *overrides])
    assert "\n" not in str(error.value)
    assert not list(Path("data").rglob("*.beton"))


def test_damaged_array_files_are_refused() -> None:
    np.savez("whole.npz", x=grey(), y=np.arange(12))
    data = Path("whole.npz").read_bytes()
    for cut in (0, 10, 500, len(data) - 30):
        Path("cut.npz").write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"cut.npz: cannot be read as .npz"):
            convert.main([*SMALL, "data.root=cut.npz"])
    for save, name in ((np.savez, "stored"), (np.savez_compressed, "deflated")):
        save(f"{name}.npz", x=grey(), y=np.arange(12))
        broken = bytearray(Path(f"{name}.npz").read_bytes())
        broken[len(broken) // 3] ^= 1  # within the pixels, which are read last
        Path(f"{name}.npz").write_bytes(broken)
        with pytest.raises(InputError, match=rf"^{name}.npz: cannot be read as .npz \(.*\); save it again$"):
            convert.main([*SMALL, f"data.root={name}.npz"])
    Path("cut.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match=r"cut.npy: cannot be read as .npy"):
        convert.main([*SMALL, "data.root=cut.npy", "data.csv=y.npy"])
    np.save("x.npy", grey())
    with pytest.raises(InputError, match=r"the labels of x.npy must be a .npy with one label per row"):
        convert.main([*SMALL, "data.root=x.npy", "data.csv=labels.csv"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("label", "kind", 1), r"no column category_id or label; it has .*; name yours by"),
        (lambda text: text.split("\n")[0], r"has a header and no rows"),
        (lambda text: text.replace("\n0,", "\n0,300", 1), r"lines from 2: 0 to 300\d+; pixels are whole numbers"),
        (lambda text: text.replace("\n0,", "\n0,x", 1), r"lines from 2: .*; pixels are whole numbers 0..255"),
        (lambda text: text.replace("\n0,", "\n0,7,", 1), r"line 2: 786 fields, the header has 785"),
        (lambda text: text.replace("\n1,", "\n1,7,", 1), r"Expected 785 fields in line 3, saw 786"),
        (lambda text: text.rsplit(",", 1)[0], r"lines from 2: .*; pixels are whole numbers 0..255"),
        (lambda text: "a,b\n1,2\n", r"has 2 columns; a table of pixels has one for each pixel"),
    ],
)  # fmt: skip
def test_tables_that_hold_no_pixels_are_refused(change, message: str) -> None:
    write_pixels(Path("train.csv"), grey(), IDS)
    Path("train.csv").write_text(change(Path("train.csv").read_text().replace("\r", "")))
    with pytest.raises(InputError, match=message) as error:
        convert.main([*SMALL, "data.root=train.csv"])
    assert "\n" not in str(error.value)


def test_labels_of_a_table_of_pixels_stay_text() -> None:
    write_pixels(Path("train.csv"), grey(), [f"0{k % 2}" for k in range(12)], header="\ufeffkind")
    table = labels.read_labels(settings("data.root=train.csv", "data.label_col=kind"))
    assert table.classes.ids == ("00", "01")


def test_pixels_are_read_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    write_pixels(Path("train.csv"), grey(), IDS)
    np.savez("train.npz", x=grey(), y=np.array(IDS))
    monkeypatch.setattr(arrays, "as_uint8", lambda *a, **k: pytest.fail("read the pixels"))
    for root in ("train.csv", "train.npz"):
        assert len(labels.read_labels(settings(f"data.root={root}"))) == 12


def test_given_folds_are_kept() -> None:
    photographs(Path("train"))
    rows = [f"{c:02d}/{k}.jpg" for c in range(3) for k in range(4)]
    Path("labels.csv").write_text(
        "filename,category_id,fold,part\n"
        + "".join(f"{n},{n[:2]},{i % 4 - 1},{'val' if i % 4 else 'train'}\n" for i, n in enumerate(rows))
    )
    overrides = ["data.root=train", "data.csv=labels.csv", "data.split=given", "data.n_splits=3"]
    convert.main([*SMALL, *overrides])
    folds = fold_set.open_fold(settings(*overrides), 2).folds
    assert folds.fold.tolist() == [-1, 0, 1, 2] * 3
    overrides[3] = "data.n_splits=1"
    convert.main([*SMALL, *overrides, "data.fold_col=part", "data.home=words"])
    folds = fold_set.open_fold(settings(*overrides, "data.fold_col=part", "data.home=words"), 0).folds
    assert folds.fold.tolist() == [-1, 0, 0, 0] * 3
    # a folds.csv of another project gives the same folds
    overrides[3] = "data.n_splits=3"
    Path("plain.csv").write_text("filename,category_id\n" + "".join(f"{n},{n[:2]}\n" for n in rows))
    again = [*overrides, "data.csv=plain.csv", "data.fold_csv=data/folds.csv", "data.home=again"]
    convert.main([*SMALL, *again])
    assert fold_set.open_fold(settings(*again), 0).folds.fold.tolist() == [-1, 0, 1, 2] * 3
    Path("labels.csv").write_text(Path("labels.csv").read_text().replace(",0,val", ",1,val", 1))
    with pytest.raises(InputError, match=r"the given folds have changed for 1 images, such as 00/1.jpg"):
        fold_set.open_fold(settings(*overrides), 0)


def test_copies_across_given_folds_always_train() -> None:
    files = photographs(Path("train"))
    Path("train/00/2.jpg").write_bytes(files["00/1.jpg"])
    rows = list(files)
    Path("labels.csv").write_text(
        "filename,category_id,fold\n" + "".join(f"{n},{n[:2]},{i % 2}\n" for i, n in enumerate(rows))
    )
    overrides = ["data.root=train", "data.csv=labels.csv", "data.split=given", "data.group=none"]
    convert.main([*SMALL, *overrides])
    folds = fold_set.open_fold(settings(*overrides), 0).folds
    assert folds.fold.tolist() == [0, -1, -1, 1, *[0, 1] * 4]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("0,1,2", r"gives the folds \[0, 1, 2\], data.n_splits = 2 asks for \[0, 1\]; use data.n_splits=3"),
        ("-1,-1", r"gives the folds \[\], .*; give the validation images a fold from 0 on"),
        (
            "0,test",
            r"line 3: fold = 'test'; folds are numbers from 0, -1 to train always, or the words train and",
        ),
    ],
)
def test_invalid_given_folds_are_refused(column: str, message: str) -> None:
    rows = list(photographs(Path("train")))
    values = column.split(",")
    Path("labels.csv").write_text(
        "filename,category_id,fold\n"
        + "".join(f"{n},{n[:2]},{values[i % len(values)]}\n" for i, n in enumerate(rows))
    )
    overrides = ["data.root=train", "data.csv=labels.csv", "data.split=given"]
    with pytest.raises(InputError, match=message):
        convert.main([*SMALL, *overrides])
    Path("some.csv").write_text("filename,fold\n00/1.jpg,0\n")
    with pytest.raises(InputError, match=r"some.csv: no fold for 11 of 12 images, such as 00/0.jpg"):
        convert.main([*SMALL, *overrides, "data.fold_csv=some.csv"])
    with pytest.raises(
        InputError, match=r"data.val = train: with a label file, choose the validation rows by"
    ):
        convert.main([*SMALL, *overrides, "data.val=train"])
    with pytest.raises(InputError, match=r"data.n_splits = 1: must be 2 or more, unless the folds are given"):
        convert.main([*SMALL, "data.root=train", "data.n_splits=1"])


def test_tiny_digits_are_not_compared_by_hash(capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("train.npz", x=grey(), y=np.array(IDS))
    convert.main([*SMALL, "data.root=train.npz"])
    assert "near-duplicates: left out, hashes mean little for images of 28 x 28" in capsys.readouterr().out
