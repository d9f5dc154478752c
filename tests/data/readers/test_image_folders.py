"""Hidden and system entries are never images, classes or rows, and a line counts what was left out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastflower import convert
from fastflower.core.errors import InputError
from fastflower.data import labels
from fastflower.data.betons import fold_set
from fastflower.data.folds import read_folds
from fastflower.data.readers import image_folders, sources
from fastflower.recipe import load
from support.sample_images import jpeg, picture, predictor_pictures

SMALL = [
    "data.img_size=16",
    "tta.scales=[16]",
    "data.n_splits=2",
    "data.workers=1",
    "robust.kinds=[occlusion]",
]
FOLDERS = [
    *(".ipynb_checkpoints", "@eaDir", ".Trash-1000", "__MACOSX", "$RECYCLE.BIN", "lost+found", ".git"),
    *("@Recently-Snapshot", "RECYCLED", "~snapshot"),
]
FILES = ["._0.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.jpg"]
WANTED = [f"{kind}/{k}.jpg" for kind in ("lily", "rose") for k in range(4)]


def litter(folder: Path) -> None:
    """Put hidden and system entries, each with an image in it where it is a folder, into a folder."""
    for name in FOLDERS:
        (folder / name / "deep").mkdir(parents=True)
        for path in (folder / name / "0-checkpoint.jpg", folder / name / "deep/1.jpg"):
            path.write_bytes(jpeg(picture(50)))
    for name in FILES:
        (folder / name).write_bytes(b"\0\5\26\7")


@pytest.fixture
def littered() -> Path:
    root = Path("photos")
    for position, name in enumerate(WANTED):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(picture(position)))
    for folder in (root, root / "lily"):
        litter(folder)
    return root


def test_only_photographs_are_listed(littered: Path) -> None:
    (littered / "rose/linked").symlink_to(littered.resolve())
    listing = image_folders.list_images(littered)
    assert listing.images == WANTED
    assert listing.links == ["rose/linked"]
    assert set(listing.hidden) == {
        *(f"{folder}{name}" for folder in ("", "lily/") for name in (*FOLDERS, *FILES))
    }
    assert listing.notices(littered) == [
        "30 hidden or system entries below photos were left out, such as $RECYCLE.BIN",
        "1 links to folders below photos were not followed; their images do not count, such as rose/linked",
    ]


def test_the_predictor_lists_the_same_photographs(littered: Path) -> None:
    twin = predictor_pictures()
    photographs, ignored = twin.find(b"photos")
    listing = image_folders.list_images(littered)
    assert sorted(map(os.fsdecode, photographs)) == sorted(listing.images)
    assert {os.fsdecode(name) for name in ignored} >= set(listing.hidden)
    names = [
        *FOLDERS,
        *FILES,
        *WANTED,
        *(name.upper() for name in FOLDERS),
        "a/.b/c.jpg",
        "a.b",
        "#recycle/x.jpg",
    ]
    for name in [*names, *image_folders.SYSTEM_NAMES]:
        assert twin.is_hidden(os.fsencode(name)) == image_folders.is_hidden(name), name


def test_they_are_no_classes_in_training_validation_or_unlabelled_folders(
    littered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("val", "loose"):
        for name in WANTED:
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, name).write_bytes(jpeg(picture(len(folder) + ord(name[-5]) * 5 + ord(name[0]))))
        litter(Path(folder))
    words = [*SMALL, "data.root=photos", "data.val=val", "data.unlabelled=loose"]
    assert sources.form_of(load(None, words)) == "folders"
    assert convert.main(words) == 0
    folds = read_folds(Path("data/folds.csv"))
    assert set(folds.filenames) == {*WANTED, *(f"val/{name}" for name in WANTED)}
    assert set(folds.category_ids) == {"lily", "rose"}
    assert fold_set.open_unlabelled(load(None, words)).rows == 8
    output = capsys.readouterr().out
    for folder, count in (("photos", 30), ("val", 15), ("loose", 15)):
        assert output.count(f"note: {count} hidden or system entries below {folder} were left out") == 1


def files_at(*names: str) -> None:
    for name in names:
        path = Path("photos", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(picture(len(name))))


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        (("train/lily/0.jpg", "val/lily/1.jpg"), "give data.root=photos/train data.val=photos/val"),
        (
            ("Training/a/0.jpg", "Validation/a/1.jpg"),
            "give data.root=photos/Training data.val=photos/Validation",
        ),
        (("train/a/0.jpg", "test/b/1.jpg"), "give data.root=photos/train"),
        (("test/a/0.jpg",), "give data.root=photos/test"),
    ],
)
def test_folders_of_a_split_are_no_classes(names: tuple[str, ...], remedy: str) -> None:
    files_at(*names)
    with pytest.raises(
        InputError, match="hold folders of classes, and would be the classes themselves"
    ) as error:
        sources.open_labelled(load(None, ["data.root=photos"]))
    assert str(error.value).endswith(remedy)


@pytest.mark.parametrize("names", [("train/0.jpg", "val/1.jpg"), ("train/a/0.jpg", "car/b/1.jpg")])
def test_classes_may_have_names_of_a_split(names: tuple[str, ...]) -> None:
    files_at(*names)
    assert len(sources.open_labelled(load(None, ["data.root=photos"])).rows) == 2


def test_images_beside_class_folders_are_counted() -> None:
    files_at("lily/0.jpg", "rose/1.jpg", "b.jpg", "a.jpg")
    notices = sources.open_labelled(load(None, ["data.root=photos"])).notices
    assert notices == ["2 images directly in photos lie in no class folder and were left out, such as a.jpg"]


def test_a_checkpoint_folder_does_not_make_class_folders_of_photographs(littered: Path) -> None:
    flat = Path("flat")
    flat.mkdir()
    (flat / "a.jpg").write_bytes(jpeg(picture(1)))
    litter(flat)
    assert sources.form_of(load(None, ["data.root=flat"])) == "csv"


def test_rows_of_a_label_file_that_name_them_are_left_out(
    littered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [*WANTED, "._0.jpg", "lily/.ipynb_checkpoints/0-checkpoint.jpg", "__MACOSX/deep/1.jpg"]
    rows = "".join(f"{name},{position % 2}\n" for position, name in enumerate(named))
    Path("labels.csv").write_text(f"filename,category_id\n{rows}")
    words = [*SMALL, "data.root=photos", "data.csv=labels.csv"]
    table = labels.read_labels(load(None, words))
    assert table.filenames == WANTED
    assert table.notices == ("3 rows name hidden or system files and were left out, such as ._0.jpg",)
    assert labels.label_warnings(table) == [
        "30 hidden or system entries below photos were left out, such as $RECYCLE.BIN"
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_refused(littered: Path) -> None:
    (littered / "rose").chmod(0)
    try:
        with pytest.raises(InputError, match=r"photos/rose: cannot be listed: Permission denied"):
            image_folders.list_images(littered)
    finally:
        (littered / "rose").chmod(0o755)


def test_a_class_only_in_the_validation_folder_is_refused(littered: Path) -> None:
    for name in ("Rose/0.jpg", "Rose/1.jpg", "lily/0.jpg", "tulip/0.jpg"):
        Path("val", name).parent.mkdir(parents=True, exist_ok=True)
        Path("val", name).write_bytes(jpeg(picture(len(name))))
    with pytest.raises(
        InputError,
        match=r"^data.val = val: 2 classes have validation images and none to train on: "
        r"Rose \(2 images, is it 'rose'\?\), tulip \(1 images\); rename them as in data.root, or move",
    ):
        convert.main([*SMALL, "data.root=photos", "data.val=val"])


def test_a_class_only_in_a_given_validation_set_is_refused_and_in_one_fold_announced(
    littered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def given(fold_of: list[str]) -> list[str]:
        ids = ["lily"] * 4 + ["rose"] * 3 + ["tulip"]
        rows = "".join(f"{n},{i},{f}\n" for n, i, f in zip(WANTED, ids, fold_of, strict=True))
        Path("labels.csv").write_text(f"filename,category_id,fold\n{rows}")
        return [*SMALL, "data.root=photos", "data.csv=labels.csv", "data.split=given", "data.group=none"]

    words = given(["train", "val", "train", "val", "train", "val", "train", "val"])
    with pytest.raises(
        InputError,
        match=r"^data.fold_col = fold: 1 classes have validation images and none to train on: tulip \(1 images\); "
        "give images of them the fold -1 or train$",
    ):
        convert.main([*words, "data.n_splits=1"])
    assert convert.main(given(["0", "1"] * 4)) == 0
    output = capsys.readouterr().out
    assert "warning: 1 images with a given fold always train instead, as they have copies" in output
    assert "or no other images of their class train: tulip (1)" in output
    assert read_folds(Path("data/folds.csv")).fold.tolist() == [0, 1] * 3 + [0, -1]
