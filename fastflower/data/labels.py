"""The labels: which image belongs to which class, read strictly and brought into one canonical order.

Ids are text and stay byte-exact ('007' is not '7'). Rows are sorted by file name and classes by number, then
text, so a shuffled label file gives the same table, folds and betons.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fastflower.core.errors import InputError
from fastflower.core.files import digest
from fastflower.core.tables import read_csv, shown, write_csv
from fastflower.data.readers import sources
from fastflower.data.readers.label_files import Names, Row, csv_rows
from fastflower.data.readers.sources import Files, Rows, Source
from fastflower.recipe import Recipe

SHOWN = 10  # problems named in one message; the rest are counted
HEAD, TAIL = 100, 20  # images of a class above and below which it is head and tail (Liu et al. 2019)

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
        return digest(*self.ids)

    def index(self, category_id: str) -> int:
        """The class_idx of an id; InputError for an unknown one."""
        if category_id not in self._index:
            near = difflib.get_close_matches(category_id, self.ids, n=1)
            raise InputError(
                f"category_id '{category_id}' is none of the {len(self)} classes"
                + (f"; the nearest is '{near[0]}'" if near else "")
            )
        return self._index[category_id]


def differing(mine: Sequence[str], others: Sequence[str]) -> str:
    """How the classes of others differ from mine, in words; nothing where they do not."""
    known, theirs = set(mine), set(others)
    parts = [
        ("without", [own for own in mine if own not in theirs]),
        ("also with", [other for other in others if other not in known]),
    ]
    said = [f"{word} {', '.join(ids[:SHOWN])}{' ...' * (len(ids) > SHOWN)}" for word, ids in parts if ids]
    return " and ".join(said) or ("in another order" if list(mine) != list(others) else "")


@dataclass(frozen=True)
class LabelTable:
    """One row an image, sorted by file name; `class_idx` is int64 (N,), `sizes` bytes of each file."""

    filenames: list[str]
    category_ids: list[str]
    class_idx: np.ndarray
    sizes: np.ndarray
    classes: ClassMap
    names: Names = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    source: Source = field(default=Files(Path()), compare=False)
    given: np.ndarray | None = None  # the fold that the labels or data.val give each row, int64 (N,)

    def __len__(self) -> int:
        return len(self.filenames)

    @cached_property
    def counts(self) -> np.ndarray:
        """Images of each class: int64 (C,)."""
        return np.bincount(self.class_idx, minlength=len(self.classes))

    @cached_property
    def hash(self) -> str:
        """Of names and labels, not of pixels."""
        return digest(*(part for row in zip(self.filenames, self.category_ids, strict=True) for part in row))

    def take(self, rows: np.ndarray) -> LabelTable:
        """The table of some rows, with the same classes."""
        return LabelTable(
            [self.filenames[row] for row in rows],
            [self.category_ids[row] for row in rows],
            self.class_idx[rows],
            self.sizes[rows],
            self.classes,
            self.names,
            self.notices,
            self.source,
            None if self.given is None else self.given[rows],
        )


def read_labels(recipe: Recipe) -> LabelTable:
    """The labels in any form of `sources`, every image looked at; InputError lists all that is wrong at once."""
    found = sources.open_labelled(recipe)
    problems = [row.problem for row in found.rows if row.problem]
    notices = list(found.notices)
    rows = [row for row in found.rows if not row.problem]
    problems += _canonical_ids(rows, notices)
    kept = _distinct(rows, found.source, problems=problems, notices=notices)
    if problems:
        raise InputError(f"{found.origin}: {_listing(problems)}")
    kept.sort(key=lambda entry: os.fsencode(entry[0].filename))
    table = _table(
        [row for row, _ in kept],
        np.array([size for _, size in kept], dtype=np.int64),
        found=found,
        notices=notices,
    )
    if len(table.classes) < 2:
        raise InputError(
            f"{found.origin}: {len(table)} images of {len(table.classes)} class; training needs two classes"
        )
    if recipe.data.split == "given" and not found.held_out:
        return replace(table, given=_given_folds(recipe, table.filenames))
    return table


def check_columns(recipe: Recipe, classes: int) -> None:
    """Refuse bundle.columns = binary where there are more classes than two."""
    if recipe.bundle.columns == "binary" and classes != 2:
        raise InputError(f"bundle.columns = binary: there are {classes} classes, not two; use three or two")


def check_num_classes(recipe: Recipe, table: LabelTable) -> list[str]:
    """Refuse a data.num_classes below the classes of the labels; one line of notice when it is above."""
    wanted, found = recipe.data.num_classes, len(table.classes)
    if wanted == "auto" or wanted == found:
        return []
    if int(wanted) < found:
        raise InputError(f"data.num_classes = {wanted}: the labels have {found} classes; use auto or {found}")
    return [f"data.num_classes = {wanted}: classes {found}..{int(wanted) - 1} have no images"]


def remarks(table: LabelTable) -> list[str]:
    """Lines on what is odd and not wrong: image files without a label, classes of one name."""
    lines = []
    if isinstance(table.source, Files) and table.source.root.is_dir():
        extra = sorted(set(sources.image_files(table.source.root)) - set(table.filenames))
        if extra:
            lines.append(f"{len(extra)} images below data.root have no label, such as {shown(extra[0])}")
    for column, names in table.names.items():
        by_name: dict[str, list[str]] = {}
        for category_id in sorted(names.keys() & set(table.classes.ids)):
            by_name.setdefault(names[category_id], []).append(category_id)
        if len(by_name) < 3:  # a column of few values names no classes
            continue
        nameless = by_name.pop("", [])
        if nameless:
            lines.append(f"{column}: {len(nameless)} classes have no name, such as {nameless[0]}")
        shared = [(name, ids) for name, ids in by_name.items() if len(ids) > 1]
        if shared:
            name, ids = shared[0]
            lines.append(
                f"{column}: {len(shared)} names stand for several classes, such as '{shown(name)}' for {', '.join(ids)}"
            )
    return lines


def order_ids(ids: set[str]) -> tuple[str, ...]:
    """Numbers by value, then text: 9, 10, 007 beside 7, rose."""

    def rank(category_id: str) -> tuple[int, int, str]:
        number = _INTEGER.fullmatch(category_id)
        return (0, int(category_id), category_id) if number else (1, 0, category_id)

    return tuple(sorted(ids, key=rank))


def class_stats(table: LabelTable) -> list[dict[str, str]]:
    """One row a class: class_idx, category_id, n, share, part (head, middle or tail) and its names."""
    rows = []
    for position, category_id in enumerate(table.classes.ids):
        n = int(table.counts[position])
        part = "head" if n > HEAD else "tail" if n < TAIL else "middle"
        row = {"class_idx": str(position), "category_id": category_id, "n": str(n)}
        row |= {"share": f"{n / len(table):.6f}", "part": part}
        rows.append(row | {column: of.get(category_id, "") for column, of in table.names.items()})
    return rows


def describe(table: LabelTable) -> str:
    """The label file in one line: images, classes, and how long the tail is."""
    counts, parts = table.counts, [row["part"] for row in class_stats(table)]
    return (
        f"{len(table)} images of {len(table.classes)} classes, {counts.min()} to {counts.max()} each "
        f"(median {np.median(counts):g}, imbalance {counts.max() / max(counts.min(), 1):.1f}): "
        f"{parts.count('head')} head, {parts.count('middle')} middle, {parts.count('tail')} tail"
    )


def write_classes(path: Path, table: LabelTable) -> None:
    """classes.csv: class_idx, category_id, n, and the label file's columns of names."""
    rows = [
        {key: value for key, value in row.items() if key not in ("share", "part")}
        for row in class_stats(table)
    ]
    write_csv(path, rows)


def read_classes(path: Path) -> ClassMap:
    """The class map of classes.csv."""
    rows = read_csv(path, ("class_idx", "category_id"))
    if [row["class_idx"] for row in rows] != [str(position) for position in range(len(rows))]:
        raise InputError(f"{path}: class_idx must count 0, 1, 2, ...; run convert again")
    return ClassMap(tuple(row["category_id"] for row in rows))


def _given_folds(recipe: Recipe, filenames: list[str]) -> np.ndarray:
    """The fold that data.fold_col gives each image: int64 (N,). InputError lists what is missing or no fold."""
    data = recipe.data
    path = Path(data.fold_csv or data.csv)
    rows, *_ = csv_rows(path, Path(data.root), image_col=data.image_col, label_col=data.fold_col)
    of = {row.filename: row for row in rows}
    lacking = [name for name in filenames if name not in of]
    if lacking:
        raise InputError(
            f"{path}: no fold for {len(lacking)} of {len(filenames)} images, such as {shown(lacking[0])}"
        )
    fold = np.zeros(len(filenames), np.int64)
    for at, name in enumerate(filenames):
        text = of[name].category_id.strip()
        number = FOLD_WORDS.get(text.lower(), text)
        if not re.fullmatch(r"-1|[0-9]{1,4}", number):
            raise InputError(
                f"{path}: {of[name].where}: {data.fold_col} = '{shown(text)}'; folds are numbers from 0, "
                "-1 to train always, or the words train and val"
            )
        fold[at] = int(number)
    there = sorted({int(k) for k in fold} - {-1})
    if there != list(range(data.n_splits)):
        raise InputError(
            f"{path}: {data.fold_col} gives the folds {there}, data.n_splits = {data.n_splits} asks for "
            f"{list(range(data.n_splits))}; "
            + (f"use data.n_splits={len(there)}" if there else "hold some out")
        )
    return fold


def _canonical_ids(rows: list[Row], notices: list[str]) -> list[str]:
    """Strip ids and turn 12.0 into 12 where every id is written so; returns the problems."""
    problems, known = [], dict[str, str]()
    spaced = 0
    for row in rows:
        stripped = row.category_id.strip()
        spaced += stripped != row.category_id
        row.category_id = known.setdefault(stripped, stripped)  # one text for all rows of a class
        if not stripped:
            problems.append(f"{row.where}: empty label for '{shown(row.filename)}'")
    if spaced:
        notices.append(f"{spaced} labels had spaces around them")
    floats = [row for row in rows if _FLOAT.fullmatch(row.category_id)]
    whole = [row for row in rows if _INTEGER.fullmatch(row.category_id)]
    if floats and whole:
        problems.append(
            f"labels are written both as '{floats[0].category_id}' ({floats[0].where}) "
            f"and as '{whole[0].category_id}' ({whole[0].where}); write them all in one way"
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
    rows: list[Row], source: Source, *, problems: list[str], notices: list[str]
) -> list[tuple[Row, int]]:
    """Each image once, with its size in bytes; names that leave the root or name no file become problems."""
    seen: dict[str, Row] = {}
    kept, repeated = [], 0
    for row in rows:
        fault, size, real = source.look(row.filename)
        if fault:
            problems.append(f"{row.where}: '{shown(row.filename)}' {fault}")
        elif real not in seen:
            seen[real] = row
            kept.append((row, size))
        elif seen[real].category_id == row.category_id:
            repeated += 1
        else:
            problems.append(
                f"{seen[real].where} and {row.where}: '{shown(row.filename)}' has two labels, "
                f"'{shown(seen[real].category_id)}' and '{shown(row.category_id)}'"
            )
    if repeated:
        notices.append(f"{repeated} rows repeat an earlier one and were left out")
    for position, problem in enumerate(problems[:SHOWN]):
        if problem.endswith("does not exist") and isinstance(source, Files):
            name = problem.split("'", 1)[1].rsplit("'", 1)[0]
            problems[position] += _nearest(source.root, name)
    return kept


def _nearest(root: Path, name: str) -> str:
    folder = (root / name).parent
    there = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    plain = {unicodedata.normalize("NFC", entry).casefold(): entry for entry in there}
    wanted = unicodedata.normalize("NFC", Path(name).name).casefold()
    near = difflib.get_close_matches(wanted, list(plain), n=1, cutoff=0.7)
    return f" (is it '{shown(plain[near[0]])}'?)" if near else ""


def _listing(problems: list[str]) -> str:
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    count = f"{len(problems)} problems: " if len(problems) > 1 else ""
    return count + "; ".join(problems[:SHOWN]) + more


def _table(rows: list[Row], sizes: np.ndarray, *, found: Rows, notices: list[str]) -> LabelTable:
    classes = ClassMap(order_ids({row.category_id for row in rows}))
    ids = [row.category_id for row in rows]
    class_idx = np.array([classes.index(category_id) for category_id in ids], dtype=np.int64)
    known = set(classes.ids)
    names = {
        column: {key if key in known else _FLOAT.sub(r"\1", key): name for key, name in of.items()}
        for column, of in found.names.items()
    }
    filenames = [row.filename for row in rows]
    given = np.array([0 if name in found.held_out else -1 for name in filenames], np.int64)
    return LabelTable(
        filenames, ids, class_idx, sizes, classes, names, tuple(notices), found.source,
        given if found.held_out else None,
    )  # fmt: skip
