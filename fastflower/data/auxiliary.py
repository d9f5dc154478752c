"""Auxiliary labels: the values of further columns, such as genus or colour, each of which trains a head of its own.

convert records them in aux_labels.json below data.home, in the order of folds.csv, so training needs no label file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from fastflower.core.errors import InputError
from fastflower.core.files import digest
from fastflower.core.records import read_record, write_record
from fastflower.core.tables import escaped
from fastflower.data import class_ids, given_folds
from fastflower.data.readers.image_folders import composed
from fastflower.data.readers.sources import Source
from fastflower.recipe import Recipe

FILE = "aux_labels.json"  # below data.home
NO_VALUE = -1  # of AuxColumn.codes
MANY = 0.5  # different values as a fraction of the images with one, above which a column hardly names classes


@dataclass(frozen=True)
class AuxColumn:
    """A column: its different values in order, and for each image the number of its value or NO_VALUE."""

    name: str
    values: tuple[str, ...]
    codes: tuple[int, ...]

    def take(self, rows: np.ndarray) -> AuxColumn:
        """The column of the given row numbers, with the same values."""
        return AuxColumn(self.name, self.values, tuple(self.codes[row] for row in rows.tolist()))

    def describe(self) -> list[str]:
        """Lines on the column: its values and the images without one, and a doubt about numbers taken as classes."""
        known = sum(code != NO_VALUE for code in self.codes)
        lines = [f"auxiliary column {self.name}: {len(self.values)} values"]
        if known < len(self.codes):
            lines[0] += f", {len(self.codes) - known} of {len(self.codes)} images have none"
        if len(self.values) > MANY * known:
            lines.append(
                f"data.aux_cols: {self.name} has {len(self.values)} values for {known} images; its head learns them as "
                "classes, which takes several images each"
            )
        return lines


@dataclass(frozen=True)
class AuxLabels:
    """The recorded columns, with a row for each of folds.csv."""

    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = "run convert again"

    folds_hash: str
    columns: tuple[AuxColumn, ...]


@dataclass(frozen=True)
class AuxTargets:
    """The auxiliary labels of one fold: names, number of values, and codes int64 (rows of the beton, columns).

    `val` is None where no image is held out.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    train: np.ndarray
    val: np.ndarray | None

    @classmethod
    def of(cls, columns: Sequence[AuxColumn], *, train: np.ndarray, val: np.ndarray | None) -> AuxTargets:
        """The targets of columns, by the rows of folds.csv in the training and validation betons."""
        codes = np.array([column.codes for column in columns], np.int64).T
        return cls(
            names=tuple(column.name for column in columns),
            sizes=tuple(len(column.values) for column in columns),
            train=codes[train],
            val=None if val is None else codes[val],
        )


def read(recipe: Recipe, filenames: Sequence[str], source: Source) -> tuple[AuxColumn, ...]:
    """The columns of data.aux_cols in data.csv for these images; an empty cell, or nan, is no value.

    Raises InputError without a label file, for a column that is missing or has fewer than two values, and for images
    without a row.
    """
    columns = []
    path = given_folds.label_table(recipe, "data.aux_cols", recipe.data.aux_cols)
    for name in recipe.data.aux_cols:
        row_of = given_folds.column(recipe, path, name, filenames=filenames, source=source)
        texts = [composed(class_ids.clean(row_of[image].category_id)) for image in filenames]
        known = {text for text in texts if text and text.casefold() != class_ids.MISSING}
        if len(known) < 2:
            raise InputError(
                f"{path}: data.aux_cols: {name} has {len(known)} different values, and a head learns two or more; "
                "leave it out"
            )
        values = class_ids.order_ids(known)
        code_of = {text: code for code, text in enumerate(values)}
        columns.append(AuxColumn(name, values, tuple(code_of.get(text, NO_VALUE) for text in texts)))
    return tuple(columns)


def is_recorded(home: Path, columns: Sequence[AuxColumn], folds_hash: str) -> bool:
    """True if the record below `home` holds these columns for these folds; without columns there is none to hold."""
    if not columns:
        return True
    try:
        recorded = read_record(home / FILE, AuxLabels)
    except InputError:
        return False
    return recorded.folds_hash == folds_hash and all(column in recorded.columns for column in columns)


def record(home: Path, columns: Sequence[AuxColumn], folds_hash: str) -> None:
    """Record columns beside those that other recipes of the same folds have recorded."""
    if is_recorded(home, columns, folds_hash):
        return
    names, others = {column.name for column in columns}, tuple[AuxColumn, ...]()
    try:
        before = read_record(home / FILE, AuxLabels)
        if before.folds_hash == folds_hash:
            others = tuple(column for column in before.columns if column.name not in names)
    except InputError:  # missing, damaged or of another version: it is written anew
        pass
    write_record(home / FILE, AuxLabels(folds_hash, (*others, *columns)))


def recorded(recipe: Recipe, folds_hash: str) -> tuple[AuxColumn, ...]:
    """The columns of data.aux_cols as convert recorded them; InputError when one is missing or of other folds."""
    if not recipe.data.aux_cols:
        return ()
    path = Path(recipe.data.home) / FILE
    labels = read_record(path, AuxLabels)
    by_name = {column.name: column for column in labels.columns}
    missing = [name for name in recipe.data.aux_cols if name not in by_name]
    if missing:
        raise InputError(
            f"{path} has no column {', '.join(map(escaped, missing))} of data.aux_cols; run convert again"
        )
    if labels.folds_hash != folds_hash:
        raise InputError(f"{path} is stale: it belongs to other folds; run convert again")
    return tuple(by_name[name] for name in recipe.data.aux_cols)


def check_current(home: Path, columns: Sequence[AuxColumn], current: Sequence[AuxColumn]) -> None:
    """Refuse recorded columns that are no longer those of the label file."""
    changed = [column.name for column, now in zip(columns, current, strict=True) if column != now]
    if changed:
        raise InputError(
            f"{home / FILE} is stale: the label file has other values of {', '.join(map(escaped, changed))}; run "
            "convert again"
        )


def columns_hash(columns: Sequence[AuxColumn]) -> str:
    """Hash of the names, values and codes of columns."""
    return digest(*(f"{column.name}\0{column.values}\0{column.codes}" for column in columns))
