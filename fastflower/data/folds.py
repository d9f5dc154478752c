"""Folds: the split of the rows into training and validation, made once, saved, and only read from then on.

A row's fold is the one it validates; rows of fold -1 train in every fold. A group is never split between folds.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fastflower.core.errors import InputError
from fastflower.core.files import digest
from fastflower.core.tables import CHECK, escaped, read_sealed, sealed_rows, write_csv
from fastflower.data.labels import LabelTable
from fastflower.recipe import Recipe
from fastflower.recipe.derived import fold_count

ALWAYS_TRAIN = -1
COLUMNS = ("filename", "category_id", "class_idx", "fold", "group_id", "sha256")
SKIPPED = ("filename", "category_id", "reason")
DUPLICATES = "duplicates.csv"  # below data.home
DUPLICATE_COLUMNS = (
    *("group_id", "filename", "category_id", "other", "other_category_id"),
    *("distance", "identical", "cosine"),
)


@dataclass(frozen=True)
class Folds:
    """folds.csv: one row per image, in the order of the label table; numeric columns are int64 (N,)."""

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
        """The fold numbers in order: [0] for a ratio split, and where no image validates."""
        return sorted({int(number) for number in self.fold} - {ALWAYS_TRAIN}) or [0]

    @property
    def of_all(self) -> int:
        """The number of the training on all images (data.fold=none), the one after the last fold."""
        return len(self.numbers)

    @property
    def validates(self) -> bool:
        """True if images are held out; False where every image trains (data.split=none)."""
        return bool((self.fold != ALWAYS_TRAIN).any())

    @cached_property
    def hash(self) -> str:
        """Hash of file names, labels and folds; each beton's manifest records it."""
        rows = zip(self.filenames, self.category_ids, self.fold, strict=True)
        return digest(*(text for name, label, fold in rows for text in (name, label, str(fold))))

    def train_rows(self, fold: int) -> np.ndarray:
        """Rows that train when `fold` validates, ascending."""
        return np.flatnonzero(self.fold != fold)

    def val_rows(self, fold: int) -> np.ndarray:
        """Rows that validate `fold`, ascending."""
        return np.flatnonzero(self.fold == fold)


def make_folds(table: LabelTable, groups: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Assign a fold to each row by data.split, seeded by the recipe: int64 (N,).

    Rows of one group, of near-duplicates or by data.group_col, have one fold. scikit-learn splits one row per group,
    labelled with the group's most frequent class; with data.group_col, whose groups may be large and mixed,
    stratified_group is its StratifiedGroupKFold of all rows. A class that would be missing from some fold's training
    goes, with its groups, to fold -1.
    """
    if recipe.data.split == "none":
        return np.full(len(table), ALWAYS_TRAIN, np.int64)
    if table.given_groups is not None:
        groups = _joined(groups, table.given_groups)
    representative = _group_labels(table.class_idx, groups)
    if table.given_folds is not None:
        fold = _unsplit_groups(groups, table.given_folds)
    elif recipe.data.split == "ratio":
        fold = _unsplit_groups(groups, _ratio(len(table), recipe))
    elif table.given_groups is not None and recipe.data.split == "stratified_group":
        fold = _stratified_groups(table.class_idx, groups, recipe)
    else:
        from sklearn.model_selection import KFold, StratifiedKFold  # a second of import, for new folds only

        kind = KFold if recipe.data.split == "kfold" else StratifiedKFold
        _check_class_sizes(table, representative, recipe)
        group_fold = np.zeros(len(representative), np.int64)
        splitter = kind(recipe.data.n_splits, shuffle=True, random_state=recipe.seed)
        with warnings.catch_warnings():  # `rare_classes` reports these classes by name
            warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
            for number, (_, held_out) in enumerate(splitter.split(representative, representative)):
                group_fold[held_out] = number
        fold = group_fold[groups]
    return _keep_in_training(table.class_idx, groups, fold)


def may_validate(table: LabelTable, recipe: Recipe) -> np.ndarray:
    """Mask of the rows that may validate some fold, known before any image is read: bool (N,)."""
    if recipe.data.split == "none":
        return np.zeros(len(table), bool)
    if table.given_folds is not None:
        return table.given_folds != ALWAYS_TRAIN
    if recipe.data.split == "ratio":
        return _ratio(len(table), recipe) == 0
    return np.ones(len(table), bool)


def rare_classes(folds: Folds, table: LabelTable) -> list[str]:
    """Warnings about classes that are not validated in every fold, or in none, and of images moved into training."""
    if not folds.validates:
        return []
    splits = len(folds.numbers)
    rare = [
        f"{escaped(category_id)} ({int(n)})"
        for category_id, n in zip(table.classes.ids, table.counts, strict=True)
        if n < splits
    ]
    always = Counter(folds.category_ids[row] for row in np.flatnonzero(folds.fold == ALWAYS_TRAIN))
    unscored = [f"{escaped(category_id)} ({n})" for category_id, n in sorted(always.items())]
    lines = []
    if rare:
        lines.append(
            f"classes with fewer images than the {splits} folds: {_listing(rare)}; some folds do not score them"
        )
    if unscored and splits > 1:
        lines.append(
            f"classes with images that train in every fold and are never scored: {_listing(unscored)}"
        )
    if splits == 1:
        scored = {folds.category_ids[row] for row in folds.val_rows(folds.numbers[0])}
        never = [f"{escaped(i)} ({always[i]})" for i in table.classes.ids if i in always and i not in scored]
        if never:
            lines.append(f"classes that only train and are never scored: {_listing(never)}")
    if table.given_folds is not None and (moved := _moved_into_training(folds, table.given_folds)):
        classes = [f"{escaped(i)} ({n})" for i, n in sorted(moved.items())]
        lines.append(
            f"{moved.total()} images with a given fold always train instead, as they have copies in another fold or "
            f"training, or no other images of their class train: {_listing(classes)}"
        )
    return lines


def _moved_into_training(folds: Folds, given: np.ndarray) -> Counter[str]:
    rows = np.flatnonzero((given != ALWAYS_TRAIN) & (folds.fold == ALWAYS_TRAIN))
    return Counter(folds.category_ids[row] for row in rows)


def save_folds(path: Path, folds: Folds) -> None:
    """Write folds.csv; InputError if it exists, because folds are never replaced."""
    if path.exists():
        raise InputError(f"{path} exists and is never replaced; move it away to make new folds")
    columns = (folds.filenames, folds.category_ids, folds.class_idx, folds.fold, folds.group, folds.sha256)
    rows = (dict(zip(COLUMNS, map(str, row), strict=True)) for row in zip(*columns, strict=True))
    write_csv(path, sealed_rows(rows, COLUMNS, count=len(folds)), (*COLUMNS, CHECK))


def read_folds(path: Path) -> Folds:
    """Read folds.csv; InputError if it is missing, CorruptionError if it is damaged or was edited."""
    rows = read_sealed(path, COLUMNS)
    numbers = {key: np.array([int(row[key]) for row in rows], np.int64) for key in COLUMNS[2:5]}
    return Folds(
        filenames=[row["filename"] for row in rows],
        category_ids=[row["category_id"] for row in rows],
        class_idx=numbers["class_idx"],
        fold=numbers["fold"],
        group=numbers["group_id"],
        sha256=[row["sha256"] for row in rows],
    )


def read_duplicates(path: Path, folds: Folds) -> list[dict[str, str]]:
    """Read duplicates.csv, a row for each image but the first of its group; CorruptionError if it is damaged."""
    return read_sealed(path, DUPLICATE_COLUMNS, count=len(folds) - len(np.unique(folds.group)))


def load_folds(home: Path, table: LabelTable, recipe: Recipe) -> tuple[Folds, LabelTable]:
    """Read folds.csv, and the label table without the images of skipped.csv, which it does not cover.

    Raises InputError if the labels or data.n_splits have changed since folds.csv was made.
    """
    path = home / "folds.csv"
    folds, skipped = read_folds(path), _skipped(home)
    rows = np.array([row for row, name in enumerate(table.filenames) if name not in skipped], np.int64)
    table = table.take(rows)
    label = dict(zip(table.filenames, table.category_ids, strict=True))
    saved = dict(zip(folds.filenames, folds.category_ids, strict=True))
    changes = {
        "new": [name for name in label if name not in saved],
        "gone": [name for name in saved if name not in label],
        "relabelled": [name for name in label if name in saved and saved[name] != label[name]],
    }
    if any(changes.values()):
        listing = "; ".join(
            f"{len(names)} {kind}, such as {escaped(names[0])}" for kind, names in changes.items() if names
        )
        raise InputError(
            f"{path} does not match the labels: {listing}; restore the labels, or move it away for new folds"
        )
    if folds.filenames != table.filenames or not np.array_equal(folds.class_idx, table.class_idx):
        raise InputError(f"{path}: its rows or class_idx differ from the labels; move it away for new folds")
    splits = fold_count(recipe)
    if folds.validates != (recipe.data.split != "none"):
        held_out = "holds images out" if folds.validates else "holds no image out"
        raise InputError(
            f"{path} {held_out}, and data.split = {recipe.data.split} asks for the other; set another data.home, or "
            "move it away for new folds"
        )
    if folds.numbers != list(range(splits)):
        raise InputError(
            f"{path} has {len(folds.numbers)} folds, the recipe asks for {splits} (data.split = {recipe.data.split}, "
            f"data.n_splits = {recipe.data.n_splits}); change the recipe, or move it away for new folds"
        )
    if table.given_folds is not None and (moved := _moved(folds, table.given_folds)):
        raise InputError(
            f"{path}: the given folds have changed for {len(moved)} images, such as "
            f"{escaped(folds.filenames[moved[0]])}; restore them, or move it away for new folds"
        )
    if table.given_groups is not None and len(divided := _divided(folds, table.given_groups)):
        raise InputError(
            f"{path} divides {len(divided)} groups of data.group_col = {recipe.data.group_col} between folds, such as "
            f"that of {escaped(folds.filenames[divided[0]])}; move it away for new folds, or leave data.group_col empty"
        )
    return folds, table


def check_leaks(folds: Folds, fold: int) -> None:
    """Raise InputError if training and validation share a file name, group or content, or if one of them is empty."""
    train, val = folds.train_rows(fold), folds.val_rows(fold)
    if len(train) and (not folds.validates or fold == folds.of_all):
        return
    if not len(train) or not len(val):
        raise InputError(
            f"fold {fold} has {len(train)} training and {len(val)} validation images; it needs some of both"
        )
    for kind, column in (
        ("file", folds.filenames),
        ("group", folds.group.tolist()),
        ("file content", folds.sha256),
    ):
        shared = {column[row] for row in train} & {column[row] for row in val}
        if shared:
            row = next(row for row in val if column[row] in shared)
            raise InputError(
                f"leak in fold {fold}: {len(shared)} {kind}s are in training and validation, such as that of "
                f"{escaped(folds.filenames[row])}; move folds.csv away and run convert again"
            )


def write_skipped(path: Path, rows: list[tuple[str, str, str]]) -> None:
    """Write skipped images as rows of (filename, category_id, reason); there is one or more."""
    named = (dict(zip(SKIPPED, row, strict=True)) for row in rows)
    write_csv(path, sealed_rows(named, SKIPPED, count=len(rows)), (*SKIPPED, CHECK))


def _skipped(home: Path) -> set[str]:
    path = home / "skipped.csv"
    return {row["filename"] for row in read_sealed(path, SKIPPED)} if path.exists() else set()


def _group_labels(class_idx: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The most frequent class of each group, the smallest on a tie: int64 (G,)."""
    combinations, counts = np.unique(np.stack([groups, class_idx], 1), axis=0, return_counts=True)
    group, label = combinations.T
    order = np.lexsort((label, -counts, group))
    first = np.unique(group[order], return_index=True)[1]
    return label[order][first]


def _joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The groups, numbered from 0, of rows that are linked through a group of either kind: int64 (N,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    offset = int(first.max()) + 1
    size = offset + int(second.max()) + 1
    links = coo_array((np.ones(len(first)), (first, second + offset)), shape=(size, size))
    component = connected_components(links, directed=False)[1][first]
    return np.unique(component, return_inverse=True)[1].astype(np.int64)


def _stratified_groups(class_idx: np.ndarray, groups: np.ndarray, recipe: Recipe) -> np.ndarray:
    """The folds of scikit-learn's StratifiedGroupKFold: int64 (N,)."""
    from sklearn.model_selection import StratifiedGroupKFold

    splits = recipe.data.n_splits
    count = len(np.unique(groups))
    if count < splits:
        raise InputError(
            f"data.n_splits = {splits}: data.group_col = {recipe.data.group_col} has {count} groups, and a group is in "
            f"one fold; lower it to {max(count, 2)} or less"
        )
    splitter = StratifiedGroupKFold(splits, shuffle=True, random_state=recipe.seed)
    fold = np.zeros(len(groups), np.int64)
    with warnings.catch_warnings():  # `rare_classes` reports these classes by name
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        for number, (_, held_out) in enumerate(splitter.split(class_idx, class_idx, groups)):
            fold[held_out] = number
    return fold


def _check_class_sizes(table: LabelTable, representative: np.ndarray, recipe: Recipe) -> None:
    splits = recipe.data.n_splits
    largest = len(representative) if recipe.data.split == "kfold" else int(np.bincount(representative).max())
    if largest < splits:
        raise InputError(
            f"data.n_splits = {splits}: the largest class of the {len(table)} images has {largest} "
            f"that are not near-duplicates; lower it to {max(largest, 2)} or less, or use data.split=ratio"
        )


def _ratio(n: int, recipe: Recipe) -> np.ndarray:
    """Fold 0 for the last ceil(N / n_splits) of a permutation, -1 for the rest."""
    splits = recipe.data.n_splits
    held_out = np.random.default_rng(recipe.seed).permutation(n)[n * (splits - 1) // splits :]
    fold = np.full(n, ALWAYS_TRAIN, np.int64)
    fold[held_out] = 0
    return fold


def _unsplit_groups(groups: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """The folds, with -1 for every group that lies in more than one of them."""
    low, high = np.full(groups.max() + 1, np.iinfo(np.int64).max), np.full(groups.max() + 1, ALWAYS_TRAIN)
    np.minimum.at(low, groups, fold)
    np.maximum.at(high, groups, fold)
    return np.where((low == high)[groups], fold, ALWAYS_TRAIN)


def _moved(folds: Folds, given: np.ndarray) -> list[int]:
    """Rows whose fold is neither the given one nor -1, to which split groups were moved."""
    return np.flatnonzero((folds.fold != given) & (folds.fold != ALWAYS_TRAIN)).tolist()


def _divided(folds: Folds, groups: np.ndarray) -> np.ndarray:
    """The first row of each group that has rows in several folds, ascending."""
    first = np.unique(groups, return_index=True)[1][groups]
    return np.unique(first[folds.fold != folds.fold[first]])


def _keep_in_training(class_idx: np.ndarray, groups: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Move the groups of every class whose rows all validate one fold to fold -1, until no such class is left."""
    fold = fold.copy()
    while True:
        classes, class_of_row = np.unique(class_idx, return_inverse=True)
        low, high = np.full(len(classes), np.iinfo(np.int64).max), np.full(len(classes), ALWAYS_TRAIN)
        np.minimum.at(low, class_of_row, fold)
        np.maximum.at(high, class_of_row, fold)
        untrained = (low == high) & (low != ALWAYS_TRAIN)
        if not untrained.any():
            return fold
        fold[np.isin(groups, groups[untrained[class_of_row]])] = ALWAYS_TRAIN


def _listing(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
