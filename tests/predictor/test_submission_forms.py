"""Forms of a submission: a probability for each class, several classes in a cell, names instead of ids."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastflower.bundle import writer
from fastflower.bundle.description import BundleDescription
from fastflower.bundle.submission import class_texts, submission_fault
from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.core.records import read_record, write_record
from fastflower.evaluation import submissions
from fastflower.recipe import load
from support.predictor_runs import (
    IDS,
    Exported,
    save_random_member,
    write_bundle,
    write_class_table,
    write_photographs,
)  # fmt: skip

NAMED = (("7", "3", "seven"), ("012", "9", "red twelve"), ("rose, red", "4", "rose"))  # id, count, name
NAMES = [row[2] for row in NAMED]
FORMS = {
    "odds": ["bundle.columns=odds"],
    "odds by name": ["bundle.columns=odds", "bundle.labels=names"],
    "top": ["bundle.columns=top", "bundle.top_k=2", "bundle.separator='|'"],
    "top of all": ["bundle.columns=top", "bundle.labels=names", "bundle.separator=;"],
    "names": ["bundle.columns=three", "bundle.labels=names"],
}


def formed(exported: Exported, words: list[str]) -> BundleDescription:
    """A copy of the exported bundle in `formed`, as the writer would have made it with these words."""
    shutil.rmtree("formed", ignore_errors=True)
    shutil.copytree(exported.folder, "formed")
    write_class_table(Path("formed/classes.csv"), *NAMED, named=1)
    path, settings = Path("formed/bundle.json"), load(None, words)
    bundle = settings.bundle
    description = replace(
        read_record(path, BundleDescription),
        columns=bundle.columns,
        labels=class_texts(settings, IDS),
        top_k=bundle.top_k,
        separator=bundle.separator,
    )
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    write_record(path, description)
    hashes = Path("formed/SHA256").read_text()
    Path("formed/SHA256").write_text(hashes.replace(before, hashlib.sha256(path.read_bytes()).hexdigest()))
    return description


@pytest.fixture
def predicted(run: Callable, code: object, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Predict two photographs with a bundle of this form; returns header, rows, probabilities and the description."""
    monkeypatch.setattr(code.bundles, "ROOT", str(Path.cwd()))
    write_photographs(2)
    Path("data").mkdir()
    write_class_table(Path("data/classes.csv"), *NAMED)

    def call(words: list[str]) -> tuple[list[str], list[list[str]], np.ndarray, BundleDescription]:
        description = formed(exported, words)
        options = ["--bundle", "formed", "--logits", "logits.npz"]
        exit_code, (header, *rows) = run(*options, csv_path=str(runs.SUBMISSION))
        assert exit_code == 0
        logits = np.load("logits.npz")["logits"].astype(np.float64).mean(axis=(1, 2)) / 1.5
        odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return header, rows, odds, description

    return call


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_written_checked_and_scored(predicted: Callable, form: str) -> None:
    header, rows, odds, bundle = predicted(FORMS[form])
    texts = NAMES if bundle.labels == NAMES else IDS
    assert bundle.labels == texts and (texts is NAMES) == ("bundle.labels=names" in FORMS[form])
    order = np.argsort(-odds, axis=1)
    if bundle.columns == "odds":
        assert header == ["filename", *texts]
        np.testing.assert_allclose([[float(cell) for cell in row[1:]] for row in rows], odds, atol=1e-8)
    elif bundle.columns == "top":
        count, separator = (2, "|") if form == "top" else (3, ";")
        assert header == ["filename", "category_id"]
        assert [row[1] for row in rows] == [separator.join(texts[c] for c in row[:count]) for row in order]
    else:
        assert [row[1] for row in rows] == [NAMES[row[0]] for row in order]
    assert submission_fault(Path.cwd(), bundle, 2) is None
    truth = {"000.jpg": IDS[order[0, 0]], "001.jpg": IDS[order[1, 1]]}  # the first is right
    found = submissions.score(truth, runs.SUBMISSION, [(row[0], row[2]) for row in NAMED])
    assert (found.right, found.missing) == (1, 0)


@pytest.mark.parametrize(
    "text, said",
    [
        ("id,7,9\na.jpg,0.1,0.9\n", "s.csv: no column filename; it has id, 7, 9"),
        ("filename,7,9\na.jpg,0.1,high\n", "s.csv: a probability is no number .*high"),
        ("filename,7,9\na.jpg,0.1\n", "s.csv: a probability is no number"),
    ],
)
def test_a_table_of_probabilities_that_cannot_be_read_is_one_line(text: str, said: str) -> None:
    Path("s.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        submissions.read_predictions(Path("s.csv"), [("7", ""), ("9", "")])


CHANGED = {
    "odds": [
        (lambda text: text.replace("012", "13"), "columns"),
        (lambda text: re.sub(r"(?m)^(000.jpg,)0", r"\g<1>-0", text), r"a probability outside \[0, 1\]"),
        (
            lambda text: re.sub(r"(?m)^(000.jpg),.*", r"\1,0.5,0.4,0.2", text),
            "probabilities of a row that do not sum",
        ),
    ],
    "top": [
        (lambda text: re.sub(r"(?m)^(000.jpg),.*", r"\1,7|7", text), "a cell without 2 different classes"),
        (lambda text: re.sub(r"(?m)^(000.jpg),.*", r"\1,7", text), "a cell without 2 different classes"),
        (
            lambda text: re.sub(r"(?m)^(000.jpg),.*", r"\1,7|8", text),
            "classes that are not in the training labels",
        ),
        (lambda text: text.replace("001.jpg", "002.jpg"), "2 rows for 2 photographs"),
    ],
    "names": [
        (lambda text: re.sub(r"(?m)^(000.jpg),[^,]*", r"\1,7", text), "classes that are not in the training")
    ],
}


@pytest.mark.parametrize("form", CHANGED)
def test_a_fault_of_each_form_is_seen(predicted: Callable, form: str) -> None:
    *_, bundle = predicted(FORMS[form])
    text = runs.SUBMISSION.read_text()
    for change, fault in CHANGED[form]:
        runs.SUBMISSION.write_text(change(text))
        found = submission_fault(Path.cwd(), bundle, 2)
        assert found is not None and re.match(fault, found), found


@pytest.mark.parametrize(
    ("cells", "texts", "separator", "count"),
    [("7|012", IDS, "|", 2), ("7;7;012", IDS, ";", 3), ("seven, red twelve", NAMES, ", ", 2)],
)
def test_cells_of_several_classes_are_followed_as_the_sample_has_them(
    predicted: Callable, cells: str, texts: list[str], separator: str, count: int
) -> None:
    Path("ref").mkdir()
    Path("ref/predictions_sample.csv").write_text(f'Id,Predicted\n001.jpg,"{cells}"\n000.jpg,"{cells}"\n')
    header, rows, odds, _ = predicted([])
    assert header == ["Id", "Predicted"]
    order = np.argsort(-odds, axis=1)[:, :count]  # of the rows of the table
    assert rows == [
        [name, separator.join(texts[c] for c in row)]
        for name, row in zip(("001.jpg", "000.jpg"), order, strict=True)
    ]


def test_an_empty_sample_gets_the_labels_of_the_bundle(predicted: Callable) -> None:
    Path("ref").mkdir()
    Path("ref/predictions_sample.csv").write_text("id,label\n000.jpg,\n001.jpg,\n")
    header, rows, odds, _ = predicted(["bundle.labels=names"])
    assert header == ["id", "label"]
    assert [row[1] for row in rows] == [NAMES[c] for c in odds.argmax(1)]


@pytest.mark.parametrize(
    ("words", "classes", "fault"),
    [
        (
            ["bundle.labels=names"],
            [("7", "3", "a"), ("012", "9", "")],
            "has no name for class 012; add a column",
        ),
        (
            ["bundle.labels=names"],
            [("7", "3", "a"), ("012", "9", "a")],
            "2 classes are called 'a'; use bundle.labels",
        ),
        (
            ["bundle.columns=top", "bundle.labels=names"],
            [("7", "3", "a b"), ("012", "9", "c")],
            "bundle.separator = ' ' is in the class 'a b'; use another, such as",
        ),
        (
            ["bundle.columns=top", "bundle.separator=''"],
            [("7", "3", "a"), ("012", "9", "c")],
            "separator is empty",
        ),
    ],
)
def test_labels_that_cannot_be_written_are_refused(
    words: list[str], classes: list[tuple[str, ...]], fault: str
) -> None:
    Path("data").mkdir()
    write_class_table(Path("data/classes.csv"), *classes)
    with pytest.raises(InputError, match=fault):
        class_texts(load(None, words), ["7", "012"])


def test_the_writer_stores_the_form_and_quotes_keep_a_cell_whole(
    run: Callable, code: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code.bundles, "ROOT", str(Path.cwd()))
    write_photographs(2)
    Path("data").mkdir()
    write_class_table(Path("data/classes.csv"), *NAMED)
    words = ["bundle.columns=top", "bundle.separator=','", "bundle.labels=names", "bundle.top_k=9"]
    write_bundle(Path("written"), [save_random_member(Path.cwd())], *words, "tta.scales=[32]")
    exit_code, (header, *rows) = run("--bundle", "written")
    assert exit_code == 0 and header == ["filename", "category_id"]
    assert all(sorted(row[1].split(",")) == sorted(NAMES) for row in rows)


def test_labels_are_refused_before_any_network_is_traced() -> None:
    """The member of this test has classes and no network."""
    Path("data").mkdir()
    write_class_table(Path("data/classes.csv"), ("7", "3", "a"), ("012", "9", "a"))
    member = SimpleNamespace(meta=SimpleNamespace(class_ids=["7", "012"]))
    with pytest.raises(InputError, match="2 classes are called 'a'"):
        writer.write_bundle(
            Path("bundle"),
            [member],  # type: ignore[list-item]
            weights=np.ones(1),
            recipe=load(None, ["bundle.labels=names"]),
            temperature=1.0,
        )
