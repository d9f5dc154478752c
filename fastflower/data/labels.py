"""The labels: the class of each image, read strictly and brought into one canonical order.

Ids are text and stay byte-exact ('007' is not '7'). Rows are sorted by file name and classes by number, then
text, so a shuffled label file gives the same table, folds and betons.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fastflower.core.errors import InputError
from fastflower.core.files import digest
from fastflower.core.tables import escaped, read_csv, write_csv
from fastflower.data.readers import sources
from fastflower.data.readers.label_files import ClassNames, LabelRow, csv_rows
from fastflower.data.readers.sources import FileSource, LabelledRows, Source
from fastflower.recipe import Recipe

MAX_LISTED = 10  # problems named in one message; the rest are counted
HEAD, TAIL = 100, 20  # head: classes of more images than HEAD; tail: of fewer than TAIL (Liu et al. 2019)

FOLD_WORDS = {"train": "-1", "val": "0", "valid": "0", "validation": "0"}

_INTEGER = re.compile(r"-?[0-9]{1,300}")
_FLOAT = re.compile(r"(-?[0-9]+)\.0+")


@dataclass(frozen=True)
class ClassMap:
    """category_id by class_idx, in canonical order."""

    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {category_id: position for position, category_id in enumerate(self.ids)}

    @cached_property
    def hash(self) -> str:
        """Hash of the ids in order."""
        return digest(*self.ids)

    def index(self, category_id: str) -> int:
        """The class_idx of an id; InputError for an unknown one."""
        if category_id not in self._index:
            near = difflib.get_close_matches(category_id, self.ids, n=1)
            raise InputError(
                f"category_id '{category_id}' is not one of the {len(self)} classes"
                + (f"; the nearest is '{near[0]}'" if near else "")
            )
        return self._index[category_id]


def class_differences(mine: Sequence[str], others: Sequence[str]) -> str:
    """A phrase on how the class ids `others` differ from `mine`; empty when they are equal."""
    my_ids, other_ids = set(mine), set(others)
    differences = [
        ("without", [category_id for category_id in mine if category_id not in other_ids]),
        ("also with", [category_id for category_id in others if category_id not in my_ids]),
    ]
    phrases = [
        f"{phrase} {', '.join(ids[:MAX_LISTED])}{' ...' * (len(ids) > MAX_LISTED)}"
        for phrase, ids in differences
        if ids
    ]
    return " and ".join(phrases) or ("in another order" if list(mine) != list(others) else "")


@dataclass(frozen=True)
class LabelTable:
    """One row per image, sorted by file name.

    class_idx: int64 (N,). sizes: bytes of each file, int64 (N,). names: the label file's columns of class names.
    given_folds: the fold that the labels or data.val give each row, int64 (N,), or None.
    """

    filenames: list[str]
    category_ids: list[str]
    class_idx: np.ndarray
    sizes: np.ndarray
    classes: ClassMap
    names: ClassNames = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    source: Source = field(default=FileSource(Path()), compare=False)
    given_folds: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.filenames)

    @cached_property
    def counts(self) -> np.ndarray:
        """Number of images of each class: int64 (C,)."""
        return np.bincount(self.class_idx, minlength=len(self.classes))

    @cached_property
    def hash(self) -> str:
        """Hash of the file names and labels, not of pixels."""
        rows = zip(self.filenames, self.category_ids, strict=True)
        return digest(*(text for row in rows for text in row))

    def take(self, rows: np.ndarray) -> LabelTable:
        """The table of the given row numbers, with the same classes."""
        return replace(
            self,
            filenames=[self.filenames[row] for row in rows],
            category_ids=[self.category_ids[row] for row in rows],
            class_idx=self.class_idx[rows],
            sizes=self.sizes[rows],
            given_folds=None if self.given_folds is None else self.given_folds[rows],
        )


def read_labels(recipe: Recipe) -> LabelTable:
    """Read the labels in any form that `sources` knows and check that every image file exists.

    Raises one InputError that lists all problems.
    """
    labelled = sources.open_labelled(recipe)
    problems = [row.problem for row in labelled.rows if row.problem]
    notices = list(labelled.notices)
    rows = [row for row in labelled.rows if not row.problem]
    problems += _canonicalise_ids(rows, notices)
    distinct = _distinct(rows, labelled.source, problems=problems, notices=notices)
    if problems:
        raise InputError(f"{labelled.origin}: {_listing(problems)}")
    distinct.sort(key=lambda image: os.fsencode(image[0].filename))
    table = _table(
        [row for row, _ in distinct],
        np.array([size for _, size in distinct], dtype=np.int64),
        labelled=labelled,
        notices=notices,
    )
    if len(table.classes) < 2:
        raise InputError(
            f"{labelled.origin}: {len(table)} images of {len(table.classes)} class; training needs two classes"
        )
    if recipe.data.split == "given" and not labelled.held_out:
        return replace(table, given_folds=_given_folds(recipe, table.filenames))
    return table


def check_columns(recipe: Recipe, classes: int) -> None:
    """Raise InputError if bundle.columns is binary and the number of classes is not two."""
    if recipe.bundle.columns == "binary" and classes != 2:
        raise InputError(f"bundle.columns = binary: there are {classes} classes, not two; use three or two")


def check_num_classes(recipe: Recipe, table: LabelTable) -> list[str]:
    """Return a notice if data.num_classes exceeds the classes of the labels; raise InputError if it is too small."""
    requested, present = recipe.data.num_classes, len(table.classes)
    if requested == "auto" or requested == present:
        return []
    if int(requested) < present:
        raise InputError(
            f"data.num_classes = {requested}: the labels have {present} classes; use auto or {present}"
        )
    return [f"data.num_classes = {requested}: classes {present}..{int(requested) - 1} have no images"]


def label_warnings(table: LabelTable) -> list[str]:
    """Warnings about suspicious but valid labels: unlabelled image files, several classes with the same name."""
    lines = []
    if isinstance(table.source, FileSource) and table.source.root.is_dir():
        extra = sorted(set(sources.image_files(table.source.root)) - set(table.filenames))
        if extra:
            lines.append(f"{len(extra)} images below data.root have no label, such as {escaped(extra[0])}")
    for column, names in table.names.items():
        by_name: dict[str, list[str]] = {}
        for category_id in sorted(names.keys() & set(table.classes.ids)):
            by_name.setdefault(names[category_id], []).append(category_id)
        if len(by_name) < 3:  # a column with so few values is no column of class names
            continue
        nameless = by_name.pop("", [])
        if nameless:
            lines.append(f"{column}: {len(nameless)} classes have no name, such as {nameless[0]}")
        shared = [(name, ids) for name, ids in by_name.items() if len(ids) > 1]
        if shared:
            name, ids = shared[0]
            lines.append(
                f"{column}: {len(shared)} names stand for several classes, such as '{escaped(name)}' "
                f"for {', '.join(ids)}"
            )
    return lines


def order_ids(ids: set[str]) -> tuple[str, ...]:
    """Class ids in canonical order: numbers by value, then text, as in 007, 7, 9, 10, rose."""

    def rank(category_id: str) -> tuple[int, int, str]:
        number = _INTEGER.fullmatch(category_id)
        return (0, int(category_id), category_id) if number else (1, 0, category_id)

    return tuple(sorted(ids, key=rank))


def part_of(n: int) -> str:
    """Head, middle or tail: the part of the class distribution that a class of n images belongs to."""
    return "head" if n > HEAD else "tail" if n < TAIL else "middle"


def class_stats(table: LabelTable) -> list[dict[str, str]]:
    """One row per class: class_idx, category_id, n, share of the images, part (head, middle, tail) and its names."""
    rows = []
    for class_idx, category_id in enumerate(table.classes.ids):
        n = int(table.counts[class_idx])
        row = {"class_idx": str(class_idx), "category_id": category_id, "n": str(n)}
        row |= {"share": f"{n / len(table):.6f}", "part": part_of(n)}
        rows.append(row | {column: names.get(category_id, "") for column, names in table.names.items()})
    return rows


def describe(table: LabelTable) -> str:
    """One line on the labels: images, classes, imbalance, and the classes in head, middle and tail."""
    counts = table.counts
    classes_in = Counter(part_of(int(n)) for n in counts)
    return (
        f"{len(table)} images of {len(table.classes)} classes, {counts.min()} to {counts.max()} each "
        f"(median {np.median(counts):g}, imbalance {counts.max() / max(counts.min(), 1):.1f}): "
        f"{classes_in['head']} head, {classes_in['middle']} middle, {classes_in['tail']} tail"
    )


def write_classes(path: Path, table: LabelTable) -> None:
    """Write classes.csv: class_idx, category_id, n, and the label file's columns of names."""
    rows = [
        {key: value for key, value in row.items() if key not in ("share", "part")}
        for row in class_stats(table)
    ]
    write_csv(path, rows)


def read_classes(path: Path) -> ClassMap:
    """Read the class map from classes.csv."""
    rows = read_csv(path, ("class_idx", "category_id"))
    if [row["class_idx"] for row in rows] != [str(position) for position in range(len(rows))]:
        raise InputError(f"{path}: class_idx must count 0, 1, 2, ...; run convert again")
    return ClassMap(tuple(row["category_id"] for row in rows))


def _given_folds(recipe: Recipe, filenames: list[str]) -> np.ndarray:
    """The fold that data.fold_col gives each image: int64 (N,).

    Raises InputError for images without a fold, values that are no folds, and folds other than 0..n_splits - 1.
    """
    data = recipe.data
    path = Path(data.fold_csv or data.csv)
    rows, *_ = csv_rows(path, Path(data.root), image_col=data.image_col, label_col=data.fold_col)
    row_of = {row.filename: row for row in rows}
    missing = [name for name in filenames if name not in row_of]
    if missing:
        raise InputError(
            f"{path}: no fold for {len(missing)} of {len(filenames)} images, such as {escaped(missing[0])}"
        )
    folds = np.zeros(len(filenames), np.int64)
    for position, name in enumerate(filenames):
        text = row_of[name].category_id.strip()
        number = FOLD_WORDS.get(text.lower(), text)
        if not re.fullmatch(r"-1|[0-9]{1,4}", number):
            raise InputError(
                f"{path}: {row_of[name].where}: {data.fold_col} = '{escaped(text)}'; folds are numbers from 0, "
                "-1 to train always, or the words train and val"
            )
        folds[position] = int(number)
    numbers = sorted({int(fold) for fold in folds} - {-1})
    if numbers != list(range(data.n_splits)):
        raise InputError(
            f"{path}: {data.fold_col} gives the folds {numbers}, data.n_splits = {data.n_splits} asks for "
            f"{list(range(data.n_splits))}; "
            + (
                f"use data.n_splits={len(numbers)}"
                if numbers
                else "give the validation images a fold from 0 on"
            )
        )
    return folds


def _canonicalise_ids(rows: list[LabelRow], notices: list[str]) -> list[str]:
    """Strip the ids in place and, if all are written like 12.0, turn them into 12; returns the problems."""
    problems, interned = [], dict[str, str]()
    spaced = 0
    for row in rows:
        stripped = row.category_id.strip()
        spaced += stripped != row.category_id
        row.category_id = interned.setdefault(stripped, stripped)  # one string object for all rows of a class
        if not stripped:
            problems.append(f"{row.where}: empty label for '{escaped(row.filename)}'")
    if spaced:
        notices.append(f"{spaced} labels had spaces around them")
    floats = [row for row in rows if _FLOAT.fullmatch(row.category_id)]
    integers = [row for row in rows if _INTEGER.fullmatch(row.category_id)]
    if floats and integers:
        problems.append(
            f"labels are written both as '{floats[0].category_id}' ({floats[0].where}) "
            f"and as '{integers[0].category_id}' ({integers[0].where}); write them all in one way"
        )
    elif floats and len(floats) == sum(bool(row.category_id) for row in rows):
        notices.append(f"labels such as {floats[0].category_id} are taken as whole numbers")
        for row in floats:
            row.category_id = _FLOAT.sub(r"\1", row.category_id)
    ids = {row.category_id for row in rows}
    padded = sorted(i for i in ids if re.fullmatch(r"0[0-9]+", i) and (i.lstrip("0") or "0") in ids)
    if padded:
        notices.append(f"'{padded[0]}' and '{padded[0].lstrip('0') or '0'}' are different classes")
    return problems


def _distinct(
    rows: list[LabelRow], source: Source, *, problems: list[str], notices: list[str]
) -> list[tuple[LabelRow, int]]:
    """The first row of each image, with its size in bytes.

    Invalid file names and images with two labels are appended to `problems`, repeated rows to `notices`.
    """
    first_row: dict[str, LabelRow] = {}  # by the image's identity
    distinct, repeated = [], 0
    for row in rows:
        image = source.check(row.filename)
        first = first_row.get(image.identity)
        if image.problem:
            problems.append(f"{row.where}: '{escaped(row.filename)}' {image.problem}")
        elif first is None:
            first_row[image.identity] = row
            distinct.append((row, image.size))
        elif first.category_id == row.category_id:
            repeated += 1
        else:
            problems.append(
                f"{first.where} and {row.where}: '{escaped(row.filename)}' has two labels, "
                f"'{escaped(first.category_id)}' and '{escaped(row.category_id)}'"
            )
    if repeated:
        notices.append(f"{repeated} rows repeat an earlier one and were left out")
    for position, problem in enumerate(problems[:MAX_LISTED]):
        if problem.endswith("does not exist") and isinstance(source, FileSource):
            name = problem.split("'", 1)[1].rsplit("'", 1)[0]
            problems[position] += _suggestion(source.root, name)
    return distinct


def _suggestion(root: Path, name: str) -> str:
    """The file beside a missing one whose name is nearest, as a question; empty if none is near."""
    folder = (root / name).parent
    entries = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    by_folded = {unicodedata.normalize("NFC", entry).casefold(): entry for entry in entries}
    folded = unicodedata.normalize("NFC", Path(name).name).casefold()
    near = difflib.get_close_matches(folded, list(by_folded), n=1, cutoff=0.7)
    return f" (is it '{escaped(by_folded[near[0]])}'?)" if near else ""


def _listing(problems: list[str]) -> str:
    rest = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    count = f"{len(problems)} problems: " if len(problems) > 1 else ""
    return count + "; ".join(problems[:MAX_LISTED]) + rest


def _table(
    rows: list[LabelRow], sizes: np.ndarray, *, labelled: LabelledRows, notices: list[str]
) -> LabelTable:
    classes = ClassMap(order_ids({row.category_id for row in rows}))
    ids = [row.category_id for row in rows]
    class_idx = np.array([classes.index(category_id) for category_id in ids], dtype=np.int64)
    known = set(classes.ids)
    names = {
        column: {key if key in known else _FLOAT.sub(r"\1", key): name for key, name in by_id.items()}
        for column, by_id in labelled.names.items()
    }
    filenames = [row.filename for row in rows]
    given_folds = np.array([0 if name in labelled.held_out else -1 for name in filenames], np.int64)
    return LabelTable(
        filenames=filenames,
        category_ids=ids,
        class_idx=class_idx,
        sizes=sizes,
        classes=classes,
        names=names,
        notices=tuple(notices),
        source=labelled.source,
        given_folds=given_folds if labelled.held_out else None,
    )
