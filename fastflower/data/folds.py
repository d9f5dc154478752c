"""Folds: which rows validate which training. Made once, saved, and from then on only read.

A row's fold is the one it validates; rows of fold -1 train in every fold. Groups never straddle folds.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fastflower.core.errors import InputError
from fastflower.core.files import digest
from fastflower.core.tables import read_csv, shown, write_csv
from fastflower.data.labels import LabelTable
from fastflower.recipe import Recipe
from fastflower.recipe.derived import fold_count

ALWAYS_TRAIN = -1
COLUMNS = ("filename", "category_id", "class_idx", "fold", "group_id", "sha256")
SKIPPED = ("filename", "category_id", "reason")


@dataclass(frozen=True)
class Folds:
    """folds.csv: text columns as lists, numbers as int64 (N,), one row an image, in the order of the label table."""

    filenames: list[str]
    category_ids: list[str]
    class_idx: np.ndarray
    fold: np.ndarray
    group: np.ndarray
    sha256: list[str]

    def __len__(self) -> int:
        return len(self.filenames)

    @cached_property
    def numbers(self) -> list[int]:
        """The folds there are: [0] for a ratio split."""
        return sorted({int(k) for k in self.fold} - {ALWAYS_TRAIN})

    @cached_property
    def hash(self) -> str:
        """Of names, labels and folds; each beton's manifest carries it."""
        rows = zip(self.filenames, self.category_ids, self.fold, strict=True)
        return digest(*(part for name, label, fold in rows for part in (name, label, str(fold))))

    def train_rows(self, fold: int) -> np.ndarray:
        """Rows that train when `fold` validates, ascending."""
        return np.flatnonzero(self.fold != fold)

    def val_rows(self, fold: int) -> np.ndarray:
        """Rows that validate `fold`, ascending."""
        return np.flatnonzero(self.fold == fold)


def make_folds(table: LabelTable, groups: np.ndarray, recipe: Recipe) -> np.ndarray:
    """The fold of each row by data.split, seeded by the recipe: int64 (N,).

    scikit-learn splits one row for each group, labelled with the group's commonest class. A class that some
    training would not see at all goes, with its groups, to fold -1.
    """
    representative = _group_labels(table.class_idx, groups)
    if table.given is not None:
        fold = _whole_groups(groups, table.given)
    elif recipe.data.split == "ratio":
        fold = _whole_groups(groups, _ratio(len(table), recipe))
    else:
        from sklearn.model_selection import KFold, StratifiedKFold  # a second of import, for new folds only

        kind = KFold if recipe.data.split == "kfold" else StratifiedKFold
        _check_members(table, representative, recipe)
        of_group = np.zeros(len(representative), np.int64)
        splitter = kind(recipe.data.n_splits, shuffle=True, random_state=recipe.seed)
        with warnings.catch_warnings():  # `rare_classes` says it in our words
            warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
            for k, (_, held_out) in enumerate(splitter.split(representative, representative)):
                of_group[held_out] = k
        fold = of_group[groups]
    return _keep_in_training(table.class_idx, groups, fold)


def candidates(table: LabelTable, recipe: Recipe) -> np.ndarray:
    """Rows that may validate in some fold, known before any image is read: bool (N,)."""
    if table.given is not None:
        return table.given != ALWAYS_TRAIN
    if recipe.data.split == "ratio":
        return _ratio(len(table), recipe) == 0
    return np.ones(len(table), bool)


def rare_classes(folds: Folds, table: LabelTable) -> list[str]:
    """One line for the classes that cannot be in every validation part."""
    splits = len(folds.numbers)
    rare = [
        f"{shown(category_id)} ({int(n)})"
        for category_id, n in zip(table.classes.ids, table.counts, strict=True)
        if n < splits
    ]
    kept = sorted({folds.category_ids[row] for row in np.flatnonzero(folds.fold == ALWAYS_TRAIN)})
    lines = []
    if rare:
        lines.append(
            f"classes with fewer images than the {splits} folds: {_few(rare)}; some folds do not score them"
        )
    if kept and splits > 1:
        lines.append(f"classes with images that train in every fold and are never scored: {_few(kept)}")
    return lines


def save_folds(path: Path, folds: Folds) -> None:
    """Write folds.csv; refuses to replace one."""
    if path.exists():
        raise InputError(f"{path} exists and is only ever read; move it away to make new folds")
    columns = (folds.filenames, folds.category_ids, folds.class_idx, folds.fold, folds.group, folds.sha256)
    rows = (dict(zip(COLUMNS, map(str, row), strict=True)) for row in zip(*columns, strict=True))
    write_csv(path, rows, COLUMNS)


def read_folds(path: Path) -> Folds:
    """folds.csv as it is; InputError when it is missing or damaged."""
    rows = read_csv(path, COLUMNS)
    try:
        numbers = {key: np.array([int(row[key]) for row in rows], np.int64) for key in COLUMNS[2:5]}
    except (TypeError, ValueError):
        raise InputError(
            f"{path}: class_idx, fold and group_id are whole numbers; restore the file"
        ) from None
    return Folds(
        [row["filename"] for row in rows],
        [row["category_id"] for row in rows],
        numbers["class_idx"],
        numbers["fold"],
        numbers["group_id"],
        [row["sha256"] for row in rows],
    )


def load_folds(home: Path, table: LabelTable, recipe: Recipe) -> tuple[Folds, LabelTable]:
    """folds.csv and the rows of the label table that it covers (all but those of skipped.csv).

    InputError when labels or data.n_splits are no longer those it was made from.
    """
    path = home / "folds.csv"
    folds, skipped = read_folds(path), _skipped(home)
    rows = np.array([row for row, name in enumerate(table.filenames) if name not in skipped], np.int64)
    table = table.take(rows)
    have = dict(zip(table.filenames, table.category_ids, strict=True))
    want = dict(zip(folds.filenames, folds.category_ids, strict=True))
    changes = {
        "new": [name for name in have if name not in want],
        "gone": [name for name in want if name not in have],
        "relabelled": [name for name in have if name in want and want[name] != have[name]],
    }
    if any(changes.values()):
        what = "; ".join(
            f"{len(names)} {kind}, such as {shown(names[0])}" for kind, names in changes.items() if names
        )
        raise InputError(
            f"{path} does not match the labels: {what}; restore the labels, or move it away for new folds"
        )
    if folds.filenames != table.filenames or not np.array_equal(folds.class_idx, table.class_idx):
        raise InputError(f"{path}: rows or class_idx differ from the labels'; move it away for new folds")
    splits = fold_count(recipe)
    if folds.numbers != list(range(splits)):
        raise InputError(
            f"{path} has {len(folds.numbers)} folds, the recipe asks for {splits} (data.split = {recipe.data.split}, "
            f"data.n_splits = {recipe.data.n_splits}); change the recipe, or move it away for new folds"
        )
    if table.given is not None and (moved := _moved(folds, table.given)):
        raise InputError(
            f"{path}: the given folds have changed for {len(moved)} images, such as "
            f"{shown(folds.filenames[moved[0]])}; restore them, or move it away for new folds"
        )
    return folds, table


def check_leaks(folds: Folds, fold: int) -> None:
    """Refuse a fold in which a file name, a group or a file's bytes are in both parts, or a part is empty."""
    train, val = folds.train_rows(fold), folds.val_rows(fold)
    if not len(train) or not len(val):
        raise InputError(
            f"fold {fold} has {len(train)} training and {len(val)} validation images; needs both"
        )
    for what, column in (
        ("file", folds.filenames),
        ("group", folds.group.tolist()),
        ("file content", folds.sha256),
    ):
        both = {column[row] for row in train} & {column[row] for row in val}
        if both:
            row = next(row for row in val if column[row] in both)
            raise InputError(
                f"leak in fold {fold}: {len(both)} {what}s are in training and validation, such as that of "
                f"{shown(folds.filenames[row])}; move folds.csv away and run convert again"
            )


def write_skipped(path: Path, rows: list[tuple[str, str, str]]) -> None:
    """A list of (filename, category_id, reason)."""
    write_csv(path, (dict(zip(SKIPPED, row, strict=True)) for row in rows), SKIPPED)


def _skipped(home: Path) -> set[str]:
    path = home / "skipped.csv"
    return {row["filename"] for row in read_csv(path, SKIPPED)} if path.exists() else set()


def _group_labels(class_idx: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The commonest class of each group, the smallest on a tie: int64 (G,)."""
    pairs, counts = np.unique(np.stack([groups, class_idx], 1), axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], -counts, pairs[:, 0]))
    first = np.unique(pairs[order, 0], return_index=True)[1]
    return pairs[order][first, 1]


def _check_members(table: LabelTable, representative: np.ndarray, recipe: Recipe) -> None:
    splits = recipe.data.n_splits
    largest = len(representative) if recipe.data.split == "kfold" else int(np.bincount(representative).max())
    if largest < splits:
        raise InputError(
            f"data.n_splits = {splits}: the largest class of the {len(table)} images has {largest} "
            f"that are not near-duplicates; lower it to {max(largest, 2)} or less, or use data.split=ratio"
        )


def _ratio(n: int, recipe: Recipe) -> np.ndarray:
    """Fold 0 for the last ceil(N / n_splits) of a permutation, -1 for the rest."""
    parts = recipe.data.n_splits
    held_out = np.random.default_rng(recipe.seed).permutation(n)[n * (parts - 1) // parts :]
    fold = np.full(n, ALWAYS_TRAIN, np.int64)
    fold[held_out] = 0
    return fold


def _whole_groups(groups: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """The folds, with -1 for every group that lies in more than one of them."""
    low, high = np.full(groups.max() + 1, np.iinfo(np.int64).max), np.full(groups.max() + 1, ALWAYS_TRAIN)
    np.minimum.at(low, groups, fold)
    np.maximum.at(high, groups, fold)
    return np.where((low == high)[groups], fold, ALWAYS_TRAIN)


def _moved(folds: Folds, given: np.ndarray) -> list[int]:
    """Rows whose fold is neither the given one nor -1, to which whole groups may have gone."""
    return np.flatnonzero((folds.fold != given) & (folds.fold != ALWAYS_TRAIN)).tolist()


def _keep_in_training(class_idx: np.ndarray, groups: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Move to fold -1 the groups of every class whose rows all validate one fold, until there is none."""
    fold = fold.copy()
    while True:
        classes, of = np.unique(class_idx, return_inverse=True)
        low, high = np.full(len(classes), np.iinfo(np.int64).max), np.full(len(classes), ALWAYS_TRAIN)
        np.minimum.at(low, of, fold)
        np.maximum.at(high, of, fold)
        lost = (low == high) & (low != ALWAYS_TRAIN)
        if not lost.any():
            return fold
        fold[np.isin(groups, groups[lost[of]])] = ALWAYS_TRAIN


def _few(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
