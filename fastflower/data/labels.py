"""The labels: the class of each image, read strictly and brought into one canonical order.

Ids are text and stay byte-exact ('007' is not '7'). Rows are sorted by file name and classes by number, then
text, so a shuffled label file gives the same table, folds and betons.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fastflower.core.errors import InputError
from fastflower.core.files import digest
from fastflower.core.tables import escaped, read_sealed, sealed_rows, write_csv
from fastflower.data import auxiliary, class_ids, given_folds
from fastflower.data.auxiliary import AuxColumn
from fastflower.data.readers import sources
from fastflower.data.readers.image_folders import composed, is_hidden, list_images
from fastflower.data.readers.label_files import ClassNames, LabelRow
from fastflower.data.readers.sources import FileSource, LabelledRows, Source
from fastflower.recipe import Recipe

MAX_LISTED = 10  # problems named in one message; the rest are counted
CLASS_COLUMNS = ("class_idx", "category_id", "n")  # of classes.csv, which decide; names follow
HEAD, TAIL = 100, 20  # head: classes of more images than HEAD; tail: of fewer than TAIL (Liu et al. 2019)

MISSING = "does not exist"  # of Check.problem


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
    given_folds: the fold that the labels or data.val give each row, int64 (N,), or None. given_groups: the group that
    data.group_col gives each row, likewise. aux: the columns of data.aux_cols.
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
    given_groups: np.ndarray | None = None
    aux: tuple[AuxColumn, ...] = ()

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
            given_groups=None if self.given_groups is None else self.given_groups[rows],
            aux=tuple(column.take(rows) for column in self.aux),
        )


def read_labels(recipe: Recipe) -> LabelTable:
    """Read the labels in any form that `sources` knows and check that every image file exists.

    Raises one InputError that lists all problems.
    """
    labelled = sources.open_labelled(recipe)
    problems = [row.problem for row in labelled.rows if row.problem]
    notices = list(labelled.notices)
    rows = [row for row in labelled.rows if not row.problem]
    problems += class_ids.canonicalise(rows, notices)
    distinct = _distinct(rows, labelled.source, problems=problems, notices=notices)
    if problems:
        raise InputError(
            f"{labelled.origin}: {_listing(problems, rows=len(labelled.rows), root=recipe.data.root)}"
        )
    distinct.sort(key=lambda image: os.fsencode(image[0].filename))
    notices += class_ids.suspicions({row.category_id for row, _ in distinct})
    table = _table(
        [row for row, _ in distinct],
        np.array([size for _, size in distinct], dtype=np.int64),
        labelled=labelled,
        notices=notices,
    )
    if len(table.classes) < 2:
        raise InputError(
            f"{labelled.origin}: {len(table)} images of {len(table.classes)} class; training needs two classes"
            + _deeper(table.filenames, recipe)
        )
    if recipe.data.split == "given" and not labelled.held_out:
        table = replace(table, given_folds=given_folds.read(recipe, table.filenames, table.source))
    if recipe.data.group_col:
        table = replace(table, given_groups=given_folds.read_groups(recipe, table.filenames, table.source))
    if recipe.data.aux_cols:
        table = replace(table, aux=auxiliary.read(recipe, table.filenames, table.source))
    if table.given_folds is not None:
        given_folds.check_trained(
            recipe, table.classes.ids, class_idx=table.class_idx, folds=table.given_folds
        )
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
        listing = list_images(table.source.root)
        lines += [line for line in listing.notices(table.source.root) if line not in table.notices]
        extra = sorted(set(listing.images) - set(table.filenames))
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
    """Write classes.csv: class_idx, category_id, n with their checksums, and the label file's columns of names."""
    rows = [
        {key: value for key, value in row.items() if key not in ("share", "part")}
        for row in class_stats(table)
    ]
    write_csv(path, sealed_rows(rows, CLASS_COLUMNS, count=len(rows)))


def read_class_rows(path: Path) -> list[dict[str, str]]:
    """The rows of classes.csv; names may be edited, CorruptionError when another column was damaged or edited."""
    return read_sealed(path, CLASS_COLUMNS)


def read_classes(path: Path) -> ClassMap:
    """Read the class map from classes.csv."""
    return ClassMap(tuple(row["category_id"] for row in read_class_rows(path)))


def _distinct(
    rows: list[LabelRow], source: Source, *, problems: list[str], notices: list[str]
) -> list[tuple[LabelRow, int]]:
    """The first row of each image, with its size in bytes; its name is that of the file.

    Invalid file names and images with two labels are appended to `problems`, rows that were left out to `notices`.
    """
    first_row: dict[str, LabelRow] = {}  # by the image's identity
    distinct: list[tuple[LabelRow, int]] = []
    repeated, hidden, respelled = 0, list[str](), list[tuple[str, str]]()
    for row in rows:
        image = source.check(row.filename)
        if image.problem == MISSING and isinstance(source, FileSource):
            meant = source.respelled(row.filename)
            if len(meant) == 1:
                respelled.append((row.filename, meant[0]))
                row.filename, image = meant[0], source.check(meant[0])
            elif meant:
                image = image._replace(
                    problem=f"can mean {' or '.join(map(escaped, meant))}; name one of them"
                )
            elif len(problems) < MAX_LISTED:  # the search takes long
                image = image._replace(problem=MISSING + _suggestion(source.root, row.filename))
        first = first_row.get(image.identity)
        if image.problem:
            problems.append(f"{row.where}: '{escaped(row.filename)}' {image.problem}")
        elif isinstance(source, FileSource) and is_hidden(row.filename):
            hidden.append(row.filename)
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
    if hidden:
        notices.append(
            f"{len(hidden)} rows name hidden or system files and were left out, such as {escaped(hidden[0])}"
        )
    if respelled:
        written, found = map(escaped, respelled[0])
        notices.append(
            f"{len(respelled)} files have other names on disk, in their accents or endings, such as '{written}' for "
            f"{found}"
        )
    return distinct


def _suggestion(root: Path, name: str) -> str:
    """The file beside a missing one whose name is nearest, as a question; empty if none is near."""
    folder = (root / name).parent
    entries = os.listdir(folder) if folder.is_dir() else []
    by_folded = {composed(entry).casefold(): entry for entry in entries if not is_hidden(entry)}
    folded = composed(Path(name).name).casefold()
    near = difflib.get_close_matches(folded, list(by_folded), n=1, cutoff=0.7)
    return f" (is it '{escaped(by_folded[near[0]])}'?)" if near else ""


def _id_in(known: dict[str, str], text: str) -> str:
    """The id of a class from its text in a label file; `known` has the ids by their composed spelling."""
    cleaned = composed(class_ids.clean(text))
    return known.get(cleaned) or known.get(class_ids.FLOAT.sub(r"\1", cleaned), cleaned)


def _deeper(names: list[str], recipe: Recipe) -> str:
    """The folder whose subfolders seem to be the classes, where those of data.root are one; else empty."""
    if sources.form_of(recipe) != "folders":
        return ""
    common = Path(os.path.commonpath([os.path.dirname(name) for name in names]))
    below = {Path(name).relative_to(common).parts[0] for name in names if Path(name).parent != common}
    if len(below) < 2:
        return ""
    return (
        f", the subfolders of data.root; for those below it, give data.root={Path(recipe.data.root) / common}"
    )


def _listing(problems: list[str], *, rows: int, root: str) -> str:
    """The problems in one line; where all are files that do not exist, how many of how many, and where they belong."""
    listed = MAX_LISTED
    count = f"{len(problems)} problems: " if len(problems) > 1 else ""
    if all(MISSING in problem for problem in problems):
        count = f"{len(problems)} of {rows} files {'is' if len(problems) == 1 else 'are'} missing in {root}: "
        listed = 3 if len(problems) == rows else listed  # another folder is meant
    rest = f"; and {len(problems) - listed} more" if len(problems) > listed else ""
    return count + "; ".join(problems[:listed]) + rest


def _table(
    rows: list[LabelRow], sizes: np.ndarray, *, labelled: LabelledRows, notices: list[str]
) -> LabelTable:
    classes = ClassMap(class_ids.order_ids({row.category_id for row in rows}))
    ids = [row.category_id for row in rows]
    class_idx = np.array([classes.index(category_id) for category_id in ids], dtype=np.int64)
    known = {composed(category_id): category_id for category_id in classes.ids}
    names = {
        column: {_id_in(known, key): class_ids.visible(name) for key, name in by_id.items()}
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
