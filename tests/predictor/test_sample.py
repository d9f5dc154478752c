"""The organiser's sample is followed in full, or one line says why not and the default table is written."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastflower.bundle import writer
from support.predictor_runs import IDS, jpeg, write_class_table, write_photographs

SAMPLE = Path("ref/predictions_sample.csv")
FILES = ["000.jpg", "001.jpg", "002.jpg"]
NAMED = (("7", "3", "seven"), ("012", "9", "twelve"), ("rose, red", "4", "rose"))  # id, count, name


@pytest.fixture
def table(run, code, exported, monkeypatch):
    """Predict three photographs with a sample; returns the exit code, the text, and the answers by file."""
    monkeypatch.setattr(code.bundles, "ROOT", str(Path.cwd()))
    write_photographs(3)
    SAMPLE.parent.mkdir()
    assert run()[0] == 0
    answers = {row[0]: row[1:] for row in csv.reader(io.StringIO(Path("out/submission.csv").read_text()))}

    def call(text: str | bytes, *options: str) -> tuple[int, str, dict[str, list[str]]]:
        SAMPLE.write_bytes(text.encode() if isinstance(text, str) else text)
        return run(*options)[0], Path("out/submission.csv").read_text(), answers

    return call


# a sample, and the table: {0} is the class of 000.jpg, {c0} its confidence, and so on
FOLLOWED = {
    "order": (
        "\ufeffImage,Label\r\n002.jpg,7\r\n000.jpg,7\r\n001.jpg,7\r\n",
        "Image,Label\n002.jpg,{2}\n000.jpg,{0}\n001.jpg,{1}\n",
    ),
    "stems": ("ImageId,Label\n001,0\n000,0\n002,0\n", "ImageId,Label\n001,{1}\n000,{0}\n002,{2}\n"),
    "columns swapped": (
        "label,id\n7,001.jpg\n7,000.jpg\n7,002.jpg\n",
        "label,id\n{1},001.jpg\n{0},000.jpg\n{2},002.jpg\n",
    ),
    "index": (
        ",image,category_id\n0,001.jpg,7\n1,000.jpg,7\n2,002.jpg,7\n",
        ",image,category_id\n0,001.jpg,{1}\n1,000.jpg,{0}\n2,002.jpg,{2}\n",
    ),
    "index of stems": (
        "Unnamed: 0,image,class\n0,0,7\n1,1,7\n2,2,7\n",
        "Unnamed: 0,image,class\n0,0,{0}\n1,1,{1}\n2,2,{2}\n",
    ),
    "semicolons": ("id;label\n000.jpg;7\n001.jpg;7\n002.jpg;7\n", "id;label\n000.jpg;{0}\n001.jpg;{1}\n002.jpg;{2}\n"),
    "tabs": ("id\tlabel\n000\t7\n001\t7\n002\t7\n", "id\tlabel\n000\t{0}\n001\t{1}\n002\t{2}\n"),
    "folders": (
        "id,label\ntest/000.jpg,7\ntest/001.jpg,7\ntest/002.jpg,7\n",
        "id,label\ntest/000.jpg,{0}\ntest/001.jpg,{1}\ntest/002.jpg,{2}\n",
    ),
    "other suffix and case": (
        "id,label\n000.JPG,7\n001.png,7\n002.Jpeg,7\n",
        "id,label\n000.JPG,{0}\n001.png,{1}\n002.Jpeg,{2}\n",
    ),
    "whole numbers": ("id,label\n2,7\n1,7\n0,7\n", "id,label\n2,{2}\n1,{1}\n0,{0}\n"),
    "confidence first": (
        "score,file,answer\n0.5,000.jpg,7\n0.5,001.jpg,7\n0.5,002.jpg,7\n",
        "score,file,answer\n{c0},000.jpg,{0}\n{c1},001.jpg,{1}\n{c2},002.jpg,{2}\n",
    ),
    "confidence by content": (
        "a,b,c\n000.jpg,0.5,7\n001.jpg,0.5,012\n002.jpg,0.5,7\n",
        "a,b,c\n000.jpg,{c0},{0}\n001.jpg,{c1},{1}\n002.jpg,{c2},{2}\n",
    ),
    "control characters": (
        "id\x1b[31m,label\n000.jpg,7\n001.jpg,7\n002.jpg,7\n",
        "id\\x1b[31m,label\n000.jpg,{0}\n001.jpg,{1}\n002.jpg,{2}\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_sample_is_followed_by_its_content(table, name):
    sample, expected = FOLLOWED[name]
    exit_code, text, answers = table(sample)
    delimiter = next(mark for mark in "\t;," if mark in expected)
    fields = {}
    for number, file in enumerate(FILES):
        quoted = f'"{answers[file][0]}"' if delimiter in answers[file][0] else answers[file][0]
        fields |= {f"_{number}": quoted, f"c{number}": answers[file][1]}
    for number in range(3):
        expected = expected.replace(f"{{{number}}}", f"{{_{number}}}")
    assert (exit_code, text) == (0, expected.format(**fields))


@pytest.mark.parametrize(
    "header", ['"rose, red",id,7,012', '"Class_rose, red",id,class_7,class_012', 'prob_rose,id,prob_seven,prob_twelve']
)  # fmt: skip
def test_a_column_for_each_class_gets_its_probability(table, exported, header):
    """By id, by a prefixed id, or by the name of the class."""
    shutil.copytree(exported.folder, "named")
    write_class_table(Path("named/classes.csv"), *NAMED, named=1)
    text = header + "\n" + "".join(f"0.2,{name},0.3,0.5\n" for name in ("002", "000", "001"))
    exit_code, written, answers = table(text, "--logits", "logits.npz", "--bundle", "named")
    first, *rows = list(csv.reader(io.StringIO(written)))
    logits = np.load("logits.npz")["logits"].astype(np.float64).mean(axis=(1, 2)) / 1.5
    odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert (
        exit_code == 0
        and first == next(csv.reader([header]))
        and [row[1] for row in rows] == ["002", "000", "001"]
    )
    got = np.array([[float(row[2]), float(row[3]), float(row[0])] for row in rows])
    np.testing.assert_allclose(got, odds, atol=1e-8)
    assert [IDS[row.argmax()] for row in got] == [answers[f"{row[1]}.jpg"][0] for row in rows]


REFUSED = {
    "id,label\n000.jpg,7\n001.jpg,7\n": "lacks 1 images of test_dataset, the first is '002.jpg'",
    "id,label\n000.jpg,7\n001.jpg,7\n002.jpg,7\n003.jpg,7\n": "has 1 rows that are not in test_dataset",
    "id,label\n000.jpg,7\n001.jpg,7\n001.jpg,7\n002.jpg,7\n": "lists '001.jpg' twice; each image needs one row",
    "id,label\n000,7\n001,7\n000.jpg,7\n": "lists '000.jpg' twice; each image needs one row",
    "id,label\nx.jpg,7\n": "names none of the 3 images of test_dataset in its 1 rows, the first is 'x.jpg'",
    "id,label\n": "names none of the 3 images of test_dataset in its 0 rows",
    "id\n000.jpg\n001.jpg\n002.jpg\n": "is not a table of at least two columns",
    "id,label\n000.jpg,7\n001.jpg\n002.jpg,7\n": "is not a table of at least two columns",
    "": "is not a table of at least two columns",
    "id,label,box\n000.jpg,7,a b\n001.jpg,7,a\n002.jpg,7,a\n": "has the column 'box', which is neither the image",
    "id,7,012\n000.jpg,1,0\n001.jpg,1,0\n002.jpg,1,0\n": "has columns for 2 of 3 classes; it lacks 'rose, red'",
    "id,label,class\n000.jpg,7,7\n001.jpg,7,7\n002.jpg,7,7\n": "has two columns that may be the class, 'label'",
    "id;score\n000.jpg;0.5\n001.jpg;0.5\n002.jpg;0.5\n": "has no column for the class",
    "id;label;score\n000.jpg;7;0,5\n001.jpg;7;0,5\n002.jpg;7;0,5\n": "has the column 'score', which is neither",
    "id,\x1b[31mbox,label\n000.jpg,x,7\n001.jpg,7,7\n002.jpg,x,7\n": r"has the column '\x1b[31mbox'",
}  # fmt: skip


@pytest.mark.parametrize("sample", REFUSED, ids=range(len(REFUSED)))
def test_a_sample_that_cannot_be_followed_is_one_line_beside_a_predicted_table(table, capsys, sample):
    capsys.readouterr()
    exit_code, text, answers = table(sample)
    rows = list(csv.reader(io.StringIO(text)))
    assert exit_code == 2 and {row[0]: row[1:] for row in rows} == answers
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{SAMPLE} {REFUSED[sample]}" in line
    assert line.endswith("mend or remove the sample") and "\x1b" not in line
    assert json.loads(Path("out/submission.json").read_text())["predicted"] == 3


@pytest.mark.parametrize(
    ("answers", "noted"),
    [
        (
            ("7.0", "12.0", "7.0"),
            "has 2 answers that are no classes, the first is '12.0'; the table has the classes",
        ),
        (("cat", "dog", "cat"), "has 2 answers that are no classes, the first is 'cat'"),
        (("7", "99", "7"), "has 1 answers that are no classes, the first is '99'"),
        (("7", "012", "rose, red"), ""),
        (("unknown", "unknown", "unknown"), ""),
    ],
)
def test_answers_of_a_sample_that_are_no_classes_are_announced(table, capsys, answers, noted):
    rows = "".join(f"{name};{answer}\n" for name, answer in zip(FILES, answers, strict=True))
    capsys.readouterr()
    exit_code, text, _ = table(f"id;label\n{rows}")
    assert exit_code == 0 and text.startswith("id;label\n000.jpg;")
    err = capsys.readouterr().err
    assert noted in err if noted else err == ""


def test_a_sample_may_be_given_and_must_exist_then(table, capsys):
    text = "id,label\n002.jpg,7\n000.jpg,7\n001.jpg,7\n"
    Path("other.csv").write_text(text)
    exit_code, written, _ = table("", "--sample", "other.csv")
    assert exit_code == 0 and written.startswith("id,label\n002.jpg,")
    exit_code, written, _ = table(text, "--sample", "absent.csv")
    assert exit_code == 2 and written.startswith("filename,category_id,confidence\n000.jpg,")
    assert "absent.csv does not exist; give the organiser's sample" in capsys.readouterr().err


def test_asked_columns_go_before_the_samples_but_rows_follow_it(table):
    exit_code, text, answers = table("id,label\n002,7\n000,7\n001,7\n", "--two-columns")
    rows = list(csv.reader(io.StringIO(text)))
    assert exit_code == 0
    assert rows == [
        ["filename", "category_id"],
        *([name, answers[f"{name}.jpg"][0]] for name in ("002", "000", "001")),
    ]


def test_two_photographs_of_one_stem_are_told_apart_by_whole_names_only(table, capsys):
    Path("test_dataset/000.png").write_bytes(jpeg(9))
    names = ["000.png", "002.jpg", "000.jpg", "001.jpg"]
    exit_code, text, _ = table("id,label\n" + "".join(f"{name},7\n" for name in names))
    assert exit_code == 0 and [line.split(",")[0] for line in text.splitlines()[1:]] == names
    exit_code, text, _ = table("id,label\n000,7\n001,7\n002,7\n")
    assert exit_code == 2 and len(text.splitlines()) == 5
    assert "has one name for '000.jpg' and '000.png'; rename one of them" in capsys.readouterr().err


def test_the_bundle_names_its_classes_as_conversion_does(code, exported):
    meta = exported.members[0].meta
    written = Path("bundle/classes.csv")
    written.parent.mkdir()
    writer.write_classes(written, meta, Path("classes.csv"))
    assert written.read_text().splitlines()[0] == "class_idx,category_id,n,check"
    seven, _, rose = NAMED
    for classes, names in (
        (NAMED, [["seven", "twelve", "rose"]]),
        ((seven, ("13", "9", "twelve"), rose), []),
    ):
        write_class_table(Path("classes.csv"), *classes)
        writer.write_classes(written, meta, Path("classes.csv"))
        notes: list[str] = []
        assert code.bundles.labelings("bundle", IDS, notes) == [IDS, *names]
        assert code.bundles.fallback_classes("bundle", None, notes).ids == IDS and not notes


def test_damaged_classes_are_left_out_with_a_line(code, monkeypatch):
    """Of two files the whole one is used, and control characters come back as the table of conversion keeps them."""
    monkeypatch.setattr(code.bundles, "ROOT", str(Path.cwd()))
    for folder in ("data", "bundle"):
        Path(folder).mkdir()
        write_class_table(Path(folder, "classes.csv"), ("a\\x1b", "3", "n\x1b"), ("b", "5", "m"), named=1)
    content = Path("bundle/classes.csv").read_bytes()
    for bit in range(0, 8 * len(content), 5):
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << bit % 8
        Path("bundle/classes.csv").write_bytes(broken)
        notes: list[str] = []
        assert code.bundles.fallback_classes("bundle", None, notes).prior == [3 / 8, 5 / 8]
        ids = ["a\\x1b", "b"]
        assert code.bundles.labelings("bundle", ids, notes)[:2] == [ids, ["n\x1b", "m"]]
    Path("data/classes.csv").write_bytes(content[:-4])
    assert code.bundles.fallback_classes("bundle", None, notes := []) is None
    assert len(notes) == 2 and "row 1 is damaged or was edited" in notes[1]


def test_a_sample_of_class_names_gets_names(table, exported):
    shutil.copytree(exported.folder, "named")
    write_class_table(Path("named/classes.csv"), *NAMED, named=1)
    exit_code, text, answers = table("id,flower\n000,seven\n001,rose\n002,rose\n", "--bundle", "named")
    name_of = dict(zip(IDS, ["seven", "twelve", "rose"], strict=True))
    assert exit_code == 0
    assert text.splitlines()[1:] == [
        f"{name}," + name_of[answers[f"{name}.jpg"][0]] for name in ("000", "001", "002")
    ]
