from __future__ import annotations

import contextlib
import csv
import os
import random
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastflower.core.errors import CorruptionError, InputError
from fastflower.data import class_ids, labels
from fastflower.recipe import load
from support.sample_images import ODD_NAMES

NAMES = ["a.jpg", "b.jpg", "sub/c.jpg", "d.jpg"]


@pytest.fixture
def root() -> Path:
    for name in NAMES:
        path = Path("train", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (len(name)))
    return Path("train")


def read(data: bytes | str, *overrides: str) -> labels.LabelTable:
    Path("labels.csv").write_bytes(data.encode() if isinstance(data, str) else data)
    return labels.read_labels(load(None, ["data.root=train", "data.csv=labels.csv", *overrides]))


def test_plain_table_is_sorted_by_file_name_and_mapped(root: Path) -> None:
    table = read("filename,category_id\nsub/c.jpg,9\nb.jpg,10\na.jpg,164\nd.jpg,-1\n")
    assert table.filenames == ["a.jpg", "b.jpg", "d.jpg", "sub/c.jpg"]
    assert table.classes.ids == ("-1", "9", "10", "164")
    assert table.class_idx.tolist() == [3, 2, 0, 1]
    assert table.sizes.tolist() == [5, 5, 5, 9]
    assert [table.classes.index(i) for i in table.classes.ids] == [0, 1, 2, 3]


def test_ids_stay_byte_exact_and_sort_numbers_before_text() -> None:
    ids = {"007", "7", "10", "9", "-1", "rose", "1e5", "NA"}
    assert class_ids.order_ids(ids) == ("-1", "007", "7", "9", "10", "1e5", "NA", "rose")


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbffilename,category_id\na.jpg,1\nb.jpg,2\n",
        b"filename,category_id\r\na.jpg,1\r\n\r\nb.jpg,2",
        b"\n\r\nfilename,category_id\r\na.jpg,1\n\n\rb.jpg,2\r",
        b"filename,category_id\ra.jpg,1\rb.jpg,2\r",
        b'"filename","category_id"\n"b.jpg","2"\n"a.jpg","1"\n',
        b"filename;category_id\na.jpg;1\nb.jpg;2\n",
        b"category_id\tfilename\n1\ta.jpg\n2\tb.jpg\n",
        b"filename,category_id\na.jpg, 1 \nb.jpg,2\n",
        b"filename,category_id\na.jpg,1.0\nb.jpg,2.0\n",
        b"filename,category_id\na.jpg,1\na.jpg,1\nb.jpg,2\n",
    ],
    ids=["bom", "crlf", "mixed", "cr", "quoted", "semicolon", "tab", "spaces", "floats", "repeated"],
)
def test_every_sane_file_gives_the_same_table(root: Path, data: bytes) -> None:
    plain = read("filename,category_id\na.jpg,1\nb.jpg,2\n")
    table = read(data)
    assert (table.hash, table.classes.hash) == (plain.hash, plain.classes.hash)


def test_columns_are_configurable_and_names_are_kept(root: Path) -> None:
    text = (
        "\ufeffimg,chinese_name,english_name,taken,cls\n"
        'a.jpg,玫瑰,"Rose, red",mon,5\n'
        "b.jpg,百合,Lily,tue,6\n"
        "d.jpg,百合,Lily,wed,6\n"
    )
    table = read(text, "data.image_col=img", "data.label_col=cls")
    assert table.names == {
        "chinese_name": {"5": "玫瑰", "6": "百合"},
        "english_name": {"5": "Rose, red", "6": "Lily"},
    }
    labels.write_classes(Path("classes.csv"), table)
    assert labels.read_classes(Path("classes.csv")) == table.classes
    text = Path("classes.csv").read_text(encoding="utf-8")
    assert re.search(r'^0,5,1,[0-9a-f]{8},玫瑰,"Rose, red"$', text, flags=re.M)
    Path("classes.csv").write_text(text.replace("Lily", "White lily"), encoding="utf-8")  # names are people's
    assert [row["english_name"] for row in labels.read_class_rows(Path("classes.csv"))] == [
        "Rose, red",
        "White lily",
    ]
    for old, new in (("0,5,1,", "0,5,2,"), ("0,5,1,", "0,05,1,"), ("\n1,6,", "\n2,6,")):
        Path("classes.csv").write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(CorruptionError, match=r"classes.csv: row \d is damaged or was edited"):
            labels.read_classes(Path("classes.csv"))


def test_gb18030_is_read_only_if_its_files_exist(root: Path) -> None:
    (root / "花.jpg").write_bytes(b"1")
    text = "filename,category_id,name\n花.jpg,1,花\nb.jpg,2,草\n"
    table = read(text.encode("gb18030"))
    assert (table.hash, table.names) == (read(text).hash, read(text).names)
    assert table.notices == ("labels.csv is not UTF-8; it was read as GB18030, in which every file exists",)


@pytest.mark.parametrize(
    ("data", "byte"),
    [
        ("树.jpg,1\nb.jpg,2\n".encode("gb18030"), 21),  # no such file
        ("é.jpg,1\nb.jpg,2\n".encode("latin-1"), 21),
        ("a.jpg,é\nb.jpg,2\n".encode("latin-1"), 27),
        ("花.jpg,1\nb.jpg,2\n".encode().replace("花".encode(), "花".encode()[:2]), 21),
        ("花.jpg,1\nb.jpg,2\n".encode()[2:], 21),
    ],
    ids=["gb18030", "latin-1", "latin-1 ids", "cut", "begins inside"],
)
def test_other_encodings_are_refused_at_their_byte(root: Path, data: bytes, byte: int) -> None:
    (root / "花.jpg").write_bytes(b"1")
    with pytest.raises(InputError, match=rf"^labels.csv: byte {byte} is not UTF-8; save it as UTF-8"):
        read(b"filename,category_id\n" + data)


def test_a_shuffled_file_gives_the_same_table(root: Path) -> None:
    rows = [f"{name},{k % 2}\n" for k, name in enumerate(NAMES)]
    want = read("filename,category_id\n" + "".join(rows))
    for seed in range(20):
        random.Random(seed).shuffle(rows)
        got = read("filename,category_id\n" + "".join(rows))
        assert (got.filenames, got.hash, got.classes) == (want.filenames, want.hash, want.classes)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "empty; its first line must name the columns filename, category_id"),
        ("\ufeff\n\n", "empty; its first line must name the columns filename, category_id"),
        ("filename,category_id\n", "has a header and no rows"),
        (
            "a.jpg,1\nb.jpg,2\n",
            "no column filename or category_id; it has a.jpg, 1; its first line must name",
        ),
        (
            "filename|category_id\na.jpg|1\n",
            r"it has filename\|category_id; separate columns by ',', ';' or a tab",
        ),
        (
            "file,label\na.jpg,1\n",
            "no column filename or category_id; it has file, label; name yours by data.image_col",
        ),
        (
            "filename,category_id\na.jpg\nb.jpg,1,2\n",
            "2 problems: line 2: 1 fields, the header has 2; line 3: 3 fields",
        ),
        ("filename,category_id\na.jpg,\nb.jpg, \n", "line 2: empty label for 'a.jpg'; line 3: empty label"),
        (
            "filename,category_id\na.jpg,1\nB.JPG,2\nb.jpeg,2\n" + "sub/E\u0301.png,2\n",
            r"3 of \d+ files are missing in \S+: line 3: 'B.JPG' does not exist \(is it 'b.jpg'\?\); "
            r"line 4: 'b.jpeg' does not exist \(is it 'b.jpg'\?\); "
            r"line 5: 'sub/E\u0301.png' does not exist \(is it '\u00e9.png'\?\)$",
        ),
        (
            'filename,category_id\n"n\nl.jpg",1\nnothing.jpg,2\n',
            r"line 2: 'n\\nl.jpg' does not exist; line 4: 'nothing.jpg' does not exist$",
        ),
        (
            "filename,category_id\na.jpg,1\na.jpg,2\nb.jpg,1\nsub/c.jpg,1\nb.jpg,3\n",
            "2 problems: line 2 and line 3: 'a.jpg' has two labels, '1' and '2'; "
            "line 4 and line 6: 'b.jpg' has two labels, '1' and '3'$",
        ),
        ("filename,category_id\na.jpg,1\n./a.jpg,2\n", "has two labels"),
        (
            "filename,category_id\na.jpg,1.0\nb.jpg,2\n",
            "labels are written both as '1.0' .line 2. and as '2' .line 3.",
        ),
        ("filename,category_id\na.jpg,1\nb.jpg,1\n", "2 images of 1 class; training needs two classes"),
        ("filename,category_id\na.jpg,1\n", "1 images of 1 class; training needs two classes"),
        ('filename,category_id\n"a.jpg,1\n', "quotes must be closed"),
        ("filename,category_id\na\0.jpg,1\n", "labels.csv:2: has a NUL byte"),
        ("filename,category_id\na.jpg,1\n".encode("utf-16"), "looks like UTF-16"),
        ("filename,category_id\nsub,1\n", "'sub' is not a regular file"),
    ],
)
def test_bad_files_are_refused_in_one_line(root: Path, data: bytes | str, message: str) -> None:
    (root / "sub/\u00e9.png").write_bytes(b"1")
    with pytest.raises(InputError, match=message) as error:
        read(data)
    assert "\n" not in str(error.value)


OUTSIDE = [
    *("/etc/passwd", "//etc/passwd", "/", "/dev/zero", "/proc/self/environ", "{here}/train/a.jpg"),
    *(
        "..",
        "../x.jpg",
        "../train/a.jpg",
        "../../../../../etc/passwd",
        "sub/../../x.jpg",
        "sub/..",
        "./../x.jpg",
    ),
    *("sub/../a.jpg", "..//x.jpg", ".../../../x.jpg", "a.jpg/../../x.jpg", "~", "~/a.jpg", "~root/a.jpg"),
    *("C:a.jpg", "C:/a.jpg", "C:\\a.jpg", "c:\\..\\x.jpg", "..\\x.jpg", "a\\b.jpg", "\\\\host\\share\\a.jpg"),
    *("file:a.jpg", "file:///etc/passwd", "FILE:/etc/passwd", "http://x/a.jpg", "s3://x/a.jpg", "data:x", ""),
]


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The paths that are opened during a test."""
    paths: list[str] = []
    hooks = [lambda event, what: paths.append(os.fsdecode(what[0])) if event == "open" else None]
    sys.addaudithook(
        lambda event, what: [hook(event, what) for hook in hooks]
    )  # an audit hook cannot be removed
    yield paths
    hooks.clear()


@pytest.mark.slow
def test_paths_never_leave_the_root(root: Path, opened: list[str]) -> None:
    Path("x.jpg").write_bytes(b"1")
    for name in OUTSIDE:
        opened.clear()
        with pytest.raises(
            InputError, match=r"line 3: '.*' (must be a path below data.root|is not a file name)"
        ):
            read(f"filename,category_id\na.jpg,1\n{name.format(here=Path.cwd())},2\n")
        assert set(opened) == {"labels.csv"}, name


def test_links_and_pipes_are_refused_without_waiting(root: Path, opened: list[str]) -> None:
    Path("outside").mkdir()
    Path("outside/o.jpg").write_bytes(b"1")
    opened.clear()
    (root / "link.jpg").symlink_to(Path("outside/o.jpg").resolve())
    (root / "folder").symlink_to(Path("outside").resolve())
    (root / "up").symlink_to("..")
    (root / "loop.jpg").symlink_to("loop.jpg")
    (root / "round").symlink_to(".")
    (root / "null.jpg").symlink_to("/dev/null")
    (root / "sub/out.jpg").symlink_to(Path("outside/o.jpg").resolve())
    os.mkfifo(root / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(root):
        listener.bind("socket.jpg")
    faults = {
        "link.jpg": "is a link that leaves data.root",
        "folder/o.jpg": "is a link that leaves data.root",
        "up/outside/o.jpg": "is a link that leaves data.root",
        "null.jpg": "is a link that leaves data.root",
        "loop.jpg": "cannot be read: Too many levels of symbolic links",
        "pipe.jpg": "is not a regular file",
        "socket.jpg": "is not a regular file",
        "sub": "is not a regular file",
    }
    start = time.monotonic()
    with pytest.raises(InputError) as error:
        read("filename,category_id\na.jpg,1\n" + "".join(f"{name},2\n" for name in faults))
    for name, fault in faults.items():
        assert f"'{name}' {fault}" in str(error.value)
    table = read("filename,category_id\na.jpg,1\nround/round/b.jpg,2\nb.jpg,2\n")
    assert len(table) == 2 and "1 rows repeat an earlier one and were left out" in table.notices
    with pytest.raises(
        InputError, match=r"^train: sub/out.jpg: 'sub/out.jpg' is a link that leaves data.root$"
    ):
        read("", "data.form=folders")
    assert time.monotonic() - start < 2
    assert not [path for path in opened if path.endswith(".jpg")]


def test_all_problems_are_counted_and_ten_are_named(root: Path) -> None:
    with pytest.raises(InputError, match=r"25 of 26 files are missing in \S+: .*; and 15 more$") as error:
        read("filename,category_id\na.jpg,1\n" + "".join(f"no{k}.jpg,2\n" for k in range(25)))
    assert str(error.value).count("does not exist") == 10


def test_odd_names_survive_byte_exactly() -> None:
    for name in ODD_NAMES:
        Path("train").mkdir(exist_ok=True)
        Path("train", name).write_bytes(b"1")
    with open("labels.csv", "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows(
            [("filename", "category_id"), *((name, k % 2) for k, name in enumerate(ODD_NAMES))]
        )
    table = labels.read_labels(load(None, ["data.root=train", "data.csv=labels.csv"]))
    assert sorted(table.filenames) == sorted(ODD_NAMES)
    assert table.notices == (
        "labels.csv is not UTF-8; it was read as UTF-8 with other bytes in file names, in which every file exists",
    )


def test_folders_are_an_input_form(root: Path) -> None:
    (root / "tree").mkdir()
    (root / "tree/e.PNG").write_bytes(b"1")
    table = read("", "data.form=folders")
    assert (table.filenames, table.category_ids) == (["sub/c.jpg", "tree/e.PNG"], ["sub", "tree"])


def test_a_missing_root_or_label_file_is_refused() -> None:
    with pytest.raises(InputError, match=r"data.root = train: no such folder"):
        read("")
    Path("train").mkdir()
    with pytest.raises(
        InputError, match=r"data.root = train: the folder is empty; put the training images there"
    ):
        labels.read_labels(load(None, ["data.root=train", "data.csv=none.csv"]))
    Path("train/rose").mkdir()
    with pytest.raises(InputError, match=r"data.csv = none.csv: No such file"):
        labels.read_labels(load(None, ["data.root=train", "data.csv=none.csv", "data.form=csv"]))
    with pytest.raises(InputError, match=r"no folder with images"):
        labels.read_labels(load(None, ["data.root=train", "data.form=folders"]))


def test_notices_and_number_of_classes(root: Path) -> None:
    table = read("filename,category_id\na.jpg,7 \nb.jpg,007\nb.jpg,007\n")
    assert table.notices == (
        "1 labels had spaces around them, or invisible characters",
        "1 rows repeat an earlier one and were left out",
        "'007' and '7' are different classes",
    )
    chosen = [load(None, [f"data.num_classes={n}"]) for n in ("auto", 2, 4, 1)]
    assert labels.check_num_classes(chosen[0], table) == labels.check_num_classes(chosen[1], table) == []
    assert labels.check_num_classes(chosen[2], table) == ["data.num_classes = 4: classes 2..3 have no images"]
    with pytest.raises(InputError, match=r"data.num_classes = 1: the labels have 2 classes"):
        labels.check_num_classes(chosen[3], table)
    binary = load(None, ["bundle.columns=binary"])
    labels.check_columns(binary, 2)
    labels.check_columns(chosen[0], 3)
    with pytest.raises(InputError, match=r"bundle.columns = binary: there are 3 classes, not two; use three"):
        labels.check_columns(binary, 3)
    floats = read("filename,category_id\na.jpg,7.0\nb.jpg,12.0\n")
    assert floats.classes.ids == ("7", "12")
    assert floats.notices == ("labels such as 7.0 are taken as whole numbers",)
    with pytest.raises(
        InputError, match=r"category_id '077' is not one of the 2 classes; the nearest is '007'"
    ):
        table.classes.index("077")


def test_statistics_add_up(root: Path) -> None:
    counts = {"1": 150, "2": 50, "3": 10}
    ids = [i for i, n in counts.items() for _ in range(n)]
    names = [f"{k}.jpg" for k in range(len(ids))]
    classes = labels.ClassMap(class_ids.order_ids(set(ids)))
    table = labels.LabelTable(
        names, ids, np.array([classes.index(i) for i in ids]), np.ones(len(ids)), classes
    )
    assert [labels.part_of(n) for n in (101, 100, 20, 19)] == ["head", "middle", "middle", "tail"]
    rows = labels.class_stats(table)
    assert [(row["n"], row["part"]) for row in rows] == [("150", "head"), ("50", "middle"), ("10", "tail")]
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-5)
    assert labels.describe(table) == (
        "210 images of 3 classes, 10 to 150 each (median 50, imbalance 15.0): 1 head, 1 middle, 1 tail"
    )


def test_broken_class_tables_are_refused() -> None:
    with pytest.raises(InputError, match=r"run convert first"):
        labels.read_classes(Path("classes.csv"))
    Path("classes.csv").write_text("class_idx,n\n0,1\n")
    with pytest.raises(CorruptionError, match=r"damaged, or of an earlier version \(no column category_id"):
        labels.read_classes(Path("classes.csv"))


def test_an_empty_folder_of_images_is_the_cause_that_is_named() -> None:
    Path("data/train").mkdir(parents=True)
    for table in (None, "filename,category_id\na.jpg,1\n"):
        if table:
            Path("data/train_labels.csv").write_text(table)
        with pytest.raises(
            InputError, match=r"^data\.root = data/train: the folder is empty; put the training"
        ):
            labels.read_labels(load(None, []))
