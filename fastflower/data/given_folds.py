"""Folds that people give, by a column of a table or by a validation folder of its own, and groups by a column."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastflower.core.errors import InputError
from fastflower.core.tables import escaped, restored
from fastflower.data.readers.image_folders import FileSource
from fastflower.data.readers.label_files import MAX_LISTED, LabelRow, csv_rows
from fastflower.data.readers.sources import Source
from fastflower.recipe import Recipe

FOLD_WORDS = {"train": "-1", "val": "0", "valid": "0", "validation": "0"}


def read(recipe: Recipe, filenames: Sequence[str], source: Source) -> np.ndarray:
    """The fold that data.fold_col gives each image: int64 (N,).

    Raises InputError for images without a fold, values that are no folds, and folds other than 0..n_splits - 1.
    """
    data = recipe.data
    path = Path(data.fold_csv or data.csv)
    row_of = column(recipe, path, data.fold_col, filenames=filenames, source=source)
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
                else "give the validation images a fold from 0 on, or use data.split=none to train without any"
            )
        )
    return folds


def read_groups(recipe: Recipe, filenames: Sequence[str], source: Source) -> np.ndarray:
    """The group that data.group_col of data.csv gives each image, as numbers from 0: int64 (N,).

    Images without a group are groups of their own.
    """
    heading = recipe.data.group_col
    path = label_table(recipe, "data.group_col", [heading])
    row_of = column(recipe, path, heading, filenames=filenames, source=source)
    texts = [row_of[name].category_id.strip() or f"\0{name}" for name in filenames]
    return np.unique(texts, return_inverse=True)[1].astype(np.int64)


def label_table(recipe: Recipe, key: str, headings: Sequence[str]) -> Path:
    """The path of data.csv, in which a key names further columns; InputError where it is no such table."""
    path, listed = Path(recipe.data.csv), ", ".join(headings)
    if path.suffix == ".npy" or not path.is_file():
        raise InputError(
            f"{key} = {listed}: data.csv = {path} is no label file with further columns; give a table with the columns "
            f"{recipe.data.image_col}, {listed}, or leave {key} empty"
        )
    return path


def column(
    recipe: Recipe, path: Path, heading: str, *, filenames: Sequence[str], source: Source
) -> dict[str, LabelRow]:
    """The rows of a table by the image that they name, with the column's text as their category_id.

    Raises InputError for an image without a row, and for one whose rows differ.
    """
    rows, *_ = csv_rows(
        path, Path(recipe.data.root), image_col=recipe.data.image_col, label_col=heading, one_hot=False
    )
    row_of: dict[str, LabelRow] = {}
    for row in rows:
        first = row_of.setdefault(restored(row.filename), row)
        if first.category_id.strip() != row.category_id.strip():
            raise InputError(
                f"{path}: {first.where} and {row.where}: '{escaped(row.filename)}' has two values of {heading}, "
                f"'{escaped(first.category_id)}' and '{escaped(row.category_id)}'; leave one"
            )
    if isinstance(source, FileSource):
        named = set(filenames)
        for name in [name for name in row_of if name not in named]:
            meant = source.respelled(name)
            if len(meant) == 1:
                row_of.setdefault(meant[0], row_of[name])
    missing = [name for name in filenames if name not in row_of]
    if missing:
        raise InputError(
            f"{path}: no {heading} for {len(missing)} of {len(filenames)} images, such as {escaped(missing[0])}"
        )
    return row_of


def check_trained(recipe: Recipe, ids: Sequence[str], *, class_idx: np.ndarray, folds: np.ndarray) -> None:
    """Raise InputError if a class is only in the given validation set, where no network can have learnt it.

    With several given folds such a class trains always, and `folds.rare_classes` says so.
    """
    if folds.max() > 0:
        return
    held_out, trained = (np.bincount(class_idx[rows], minlength=len(ids)) for rows in (folds >= 0, folds < 0))
    known = [ids[k] for k in np.flatnonzero(trained)]
    by_folded = {category_id.casefold(): category_id for category_id in known}
    untrained = []
    for number in np.flatnonzero((held_out > 0) & (trained == 0)):
        category_id = ids[number]
        near = difflib.get_close_matches(category_id.casefold(), list(by_folded), n=1, cutoff=0.7)
        guess = f", is it '{escaped(by_folded[near[0]])}'?" if near else ""
        untrained.append(f"{escaped(category_id)} ({held_out[number]} images{guess})")
    if untrained:
        data = recipe.data
        key, remedy = (
            (f"data.val = {data.val}", "rename them as in data.root, or move images of them there")
            if data.val
            else (f"data.fold_col = {data.fold_col}", "give images of them the fold -1 or train")
        )
        listed = ", ".join(untrained[:MAX_LISTED]) + " ..." * (len(untrained) > MAX_LISTED)
        raise InputError(
            f"{key}: {len(untrained)} classes have validation images and none to train on: {listed}; {remedy}"
        )
