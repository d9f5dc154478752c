"""Sources: the forms in which labels and images come, each behind the same small interface.

| data.form | data.root                                   | labels                                                     |
| --------- | ------------------------------------------- | ---------------------------------------------------------- |
| csv       | folder of image files                       | data.csv, columns data.image_col and data.label_col, or a  |
|           |                                             | column of 0 and 1 for each class                           |
| folders   | folder with one folder per class            | the folders' names                                         |
| pixels    | a .csv: a row per image, a column per pixel | its column data.label_col, or `label`                      |
|           | or one column `pixels` of all its numbers   |                                                            |
| arrays    | a .npz, or a .npy of images                 | in the .npz; for a .npy data.csv, a .npy with as many rows |
| pairs     | a .npz with two arrays of images            | in the .npz: one label per pair                            |
| beton     | a .beton that FFCV's DatasetWriter wrote    | its field data.label_col, `label`, or the only one of      |
|           |                                             | labels; without one data.csv: a .npy, or a table that      |
|           |                                             | names the rows                                             |

With `auto`, the type of data.root decides; a folder is `csv` if data.csv exists or it has no subfolders.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from fastflower.core.errors import InputError
from fastflower.core.tables import escaped
from fastflower.data.readers import arrays
from fastflower.data.readers.arrays import Stack
from fastflower.data.readers.ffcv_files import is_ffcv, open_ffcv
from fastflower.data.readers.image_folders import Check, FileSource, has_class_folders, list_images
from fastflower.data.readers.label_files import ClassNames, LabelRow, csv_rows, folder_rows
from fastflower.recipe import Recipe


class Source(Protocol):
    """Reads images by row name.

    images_per_row: 2 for pairs, else 1. from_arrays: all images are pixels, of one size; none is an image file.
    in_one_file: all images lie in one file.
    """

    @property
    def images_per_row(self) -> int: ...

    @property
    def from_arrays(self) -> bool: ...

    @property
    def in_one_file(self) -> bool: ...

    def files(self, names: list[str]) -> list[str]:
        """The files whose bytes decide the pixels of these rows."""

    def check(self, name: str) -> Check:
        """Check a row's image without opening it."""

    def load(self) -> None:
        """Load the data that `read` needs; worker processes forked later share it."""

    def read(self, name: str, number: int) -> bytes | np.ndarray:
        """The bytes of a file, or pixels: uint8 (H, W) or (H, W, 3); number 1 is the second image of a pair."""

    def size(self, name: str) -> tuple[int, int] | None:
        """(height, width) from the header alone; None if it cannot be read."""


ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")  # suffixes of files to unpack first


@dataclass(frozen=True)
class ArraySource:
    """Images of one file of arrays; names are `<file stem>/<row>`, rows from 0 with leading zeros."""

    path: Path
    stack: Stack
    from_arrays: bool = True
    in_one_file: bool = True

    @property
    def stem(self) -> str:
        """The first part of all names."""
        return self.path.stem

    def files(self, names: list[str]) -> list[str]:
        """The file of arrays."""
        return [str(self.path)]

    @property
    def images_per_row(self) -> int:
        """Two for pairs, else one."""
        return self.stack.images_per_row

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.stack.rows

    def name(self, row: int) -> str:
        """The name of a row."""
        return f"{self.stem}/{row:0{len(str(self.stack.rows - 1))}d}"

    def check(self, name: str) -> Check:
        """A check that always passes: the names come from the file itself."""
        return Check("", self.stack.height * self.stack.width * self.images_per_row, name)

    def load(self) -> None:
        """Load the pixels of all rows."""
        _ = self.stack.images

    def read(self, name: str, number: int) -> np.ndarray:
        """The pixels of a row: uint8 (H, W) or (H, W, 3)."""
        pixels: np.ndarray = self.stack.images[number][int(name.removeprefix(f"{self.stem}/"))]
        return pixels

    def size(self, name: str) -> tuple[int, int]:
        """(height, width), the same for all rows."""
        return self.stack.height, self.stack.width


@dataclass(frozen=True)
class JoinedSource:
    """Two sources as one; names that start with `prefix` belong to the second."""

    first: Source
    second: Source
    prefix: str

    @property
    def images_per_row(self) -> int:
        """Two for pairs, else one; equal in both sources."""
        return self.first.images_per_row

    @property
    def from_arrays(self) -> bool:
        """True if the pixels come from arrays; equal in both sources."""
        return self.first.from_arrays

    @property
    def in_one_file(self) -> bool:
        """True if the images of each source lie in one file; equal in both sources."""
        return self.first.in_one_file

    def _source_of(self, name: str) -> Source:
        return self.second if name.startswith(self.prefix) else self.first

    def files(self, names: list[str]) -> list[str]:
        """The files of both sources."""
        return [
            file
            for source in (self.first, self.second)
            for file in source.files([name for name in names if self._source_of(name) is source])
        ]

    def check(self, name: str) -> Check:
        """The check of the source that has the name."""
        return self._source_of(name).check(name)

    def load(self) -> None:
        """Load both sources."""
        self.first.load()
        self.second.load()

    def read(self, name: str, number: int) -> bytes | np.ndarray:
        """The image from the source that has the name."""
        return self._source_of(name).read(name, number)

    def size(self, name: str) -> tuple[int, int] | None:
        """(height, width) from the source that has the name."""
        return self._source_of(name).size(name)


@dataclass(frozen=True)
class LabelledRows:
    """The rows of a source as written.

    origin: the file or folder that error messages name. held_out: names of the rows from data.val.
    """

    source: Source
    rows: list[LabelRow]
    origin: str
    names: ClassNames = field(default_factory=dict)
    held_out: frozenset[str] = frozenset()
    notices: list[str] = field(default_factory=list)


def form_of(recipe: Recipe) -> str:
    """data.form, with auto resolved by the type of data.root; InputError if the form does not fit the root."""
    root, requested = Path(recipe.data.root), recipe.data.form
    if not root.exists():
        near = difflib.get_close_matches(
            root.name, os.listdir(root.parent) if root.parent.is_dir() else [], n=1
        )
        remedy = (
            "give the folder that holds the training images, or the .npz, .npy, .beton or table of pixels"
        )
        if near:
            remedy = f"did you mean {root.parent / near[0]}?"
        raise InputError(f"data.root = {root}: no such folder or file; {remedy}")
    if root.is_file() and root.suffix.lower() in ARCHIVES:
        raise InputError(f"data.root = {root}: an archive; unpack it and give the folder with its images")
    possible: tuple[str, ...] = ("csv", "folders")
    if root.is_dir():
        has_csv = Path(recipe.data.csv).exists() or not has_class_folders(root)
        detected = "csv" if has_csv else "folders"
    elif root.suffix == ".npz":
        possible, detected = ("arrays", "pairs"), "arrays"
        if requested == "auto":
            detected = ("arrays", "pairs")[_open_arrays(recipe, root, labelled=True).images_per_row - 1]
    else:
        detected = "arrays" if root.suffix == ".npy" else "beton" if is_ffcv(root) else "pixels"
        possible = (detected,)
    if requested not in ("auto", *possible):
        raise InputError(
            f"data.form = {requested}: data.root = {root} can be {' or '.join(possible)}; use auto, "
            "or give another root"
        )
    return detected if requested == "auto" else requested


def is_present(recipe: Recipe) -> bool:
    """True if the images and labels are on this machine; training needs only the betons."""
    root = Path(recipe.data.root)
    return root.is_file() or (root.is_dir() and (form_of(recipe) != "csv" or Path(recipe.data.csv).is_file()))


def open_labelled(recipe: Recipe) -> LabelledRows:
    """The training rows in any form, followed by those of data.val."""
    form, root = form_of(recipe), Path(recipe.data.root)
    if root.is_dir() and not any(root.iterdir()):
        raise InputError(
            f"data.root = {root}: the folder is empty; put the training images there, or name the folder that has them"
        )
    first = _rows(recipe, form, path=root, prefix="")
    if not recipe.data.val:
        return first
    path = Path(recipe.data.val)
    if form == "csv":
        raise InputError(
            f"data.val = {path}: with a label file, choose the validation rows by data.split=given and data.fold_col"
        )
    if not path.exists():
        raise InputError(f"data.val = {path}: no such folder or file; give images in the form of data.root")
    prefix = f"{path.name if form == 'folders' else path.stem}/"
    second = _rows(recipe, form, path=path, prefix=prefix)
    if any(row.filename.startswith(prefix) for row in first.rows):
        raise InputError(
            f"data.val = {path}: data.root = {recipe.data.root} has images below the same name; rename one"
        )
    if first.source.images_per_row != second.source.images_per_row:
        raise InputError(
            f"data.val = {path}: one of it and data.root = {recipe.data.root} holds pairs, the other single images; "
            "give both in one form"
        )
    joined = JoinedSource(first.source, second.source, prefix)
    held_out = frozenset(row.filename for row in second.rows)
    return LabelledRows(
        source=joined,
        rows=first.rows + second.rows,
        origin=f"{first.origin} and {path}",
        names=first.names,
        held_out=held_out,
        notices=first.notices + second.notices,
    )


def open_unlabelled(recipe: Recipe) -> tuple[Source, list[str], list[str]]:
    """Open data.unlabelled, a folder of images at any depth or a file of arrays: source, names in order, notices."""
    path = Path(recipe.data.unlabelled)
    if path.is_dir():
        listing = list_images(path)
        if not listing.images:
            raise InputError(f"data.unlabelled = {path}: no images below it")
        return FileSource(path), listing.images, listing.notices(path)
    if not path.is_file():
        raise InputError(f"data.unlabelled = {path}: no such folder or file")
    source = (
        open_ffcv(path).source
        if is_ffcv(path)
        else ArraySource(path, _open_arrays(recipe, path, labelled=False))
    )
    return source, [source.name(row) for row in range(source.rows)], []


def pair_arrays(recipe: Recipe, path: str = "") -> list[str]:
    """The names of the two image arrays in data.root, or in another .npz like it; empty for single images."""
    file = Path(path or recipe.data.root)
    if file.suffix != ".npz" or recipe.data.form == "arrays":
        return []
    if not file.is_file():
        raise InputError(f"{file}: no such file; it is needed to tell pairs from single images, copy it here")
    stack = _open_arrays(recipe, file, labelled=True)
    return list(stack.names) if stack.images_per_row == 2 else []


def _rows(recipe: Recipe, form: str, *, path: Path, prefix: str) -> LabelledRows:
    data = recipe.data
    if form == "csv":
        rows, names, notices = csv_rows(
            Path(data.csv), path, image_col=data.image_col, label_col=data.label_col
        )
        return LabelledRows(FileSource(path), rows, origin=data.csv, names=names, notices=notices)
    if form == "folders":
        rows, notices = folder_rows(path)
        for row in rows:
            row.filename = prefix + row.filename
        return LabelledRows(FileSource(path, prefix), rows, origin=str(path), notices=notices)
    if form == "beton":
        return _beton_rows(recipe, path)
    stack = _open_arrays(recipe, path, labelled=True)
    if form == "pairs" and stack.images_per_row != 2:
        raise InputError(f"data.form = pairs: {path} has one array of images; {arrays.REMEDY}")
    if form != "pairs" and stack.images_per_row == 2:
        raise InputError(
            f"data.form = {form}: {path} has two arrays of images; use pairs, or {arrays.REMEDY}"
        )
    source = ArraySource(path, stack)
    rows = [LabelRow(f"row {k}", source.name(k), label) for k, label in enumerate(stack.labels or [])]
    unused = (
        [f"{path}: the columns {', '.join(map(escaped, stack.unused))} are not used"] if stack.unused else []
    )
    return LabelledRows(source, rows, origin=str(path), notices=unused)


def _beton_rows(recipe: Recipe, path: Path) -> LabelledRows:
    """The rows of a beton of FFCV, with the labels of its field or, where it has none, of data.csv."""
    data, file = recipe.data, open_ffcv(path)
    source, csv = file.source, Path(data.csv)
    field = file.label_field(data.label_col)
    names = [source.name(row) for row in range(source.rows)]
    if field:
        rows = [LabelRow(name, name, label) for name, label in zip(names, file.labels(field), strict=True)]
        notices = [f"{path}: the labels are its field {field}" + f"; {csv} is not used" * csv.is_file()]
        return LabelledRows(source, rows, origin=str(path), notices=notices)
    if path != Path(data.root):
        raise InputError(
            f"data.val = {path}: it has no field of labels; give one with labels, or choose the validation rows by "
            "data.split=given and data.fold_col"
        )
    if csv.suffix == ".npy":
        labels = arrays.npy_labels(csv, source.rows)
        rows = [LabelRow(name, name, label) for name, label in zip(names, labels, strict=True)]
        return LabelledRows(source, rows, origin=str(csv))
    if not csv.is_file():
        raise InputError(
            f"{path}: has no field of labels; give them as data.csv: a .npy with one label per row, or a table whose "
            f"column {data.image_col} names the rows {names[0]} to {names[-1]}"
        )
    rows, class_names, notices = csv_rows(
        csv, path.parent, image_col=data.image_col, label_col=data.label_col
    )
    return LabelledRows(source, rows, origin=data.csv, names=class_names, notices=notices)


def _open_arrays(recipe: Recipe, path: Path, *, labelled: bool) -> Stack:
    data = recipe.data
    if path.suffix == ".npz":
        return arrays.open_npz(path, data.arrays, shape=data.shape, labelled=labelled)
    if path.suffix == ".npy":
        csv = Path(data.csv)
        if labelled and csv.suffix != ".npy":
            raise InputError(
                f"data.csv = {csv}: the labels of {path} must be a .npy with one label per row; give its path"
            )
        return arrays.open_npy(
            path, data.shape, (lambda rows: arrays.npy_labels(csv, rows)) if labelled else None
        )
    return arrays.open_pixels(path, data.label_col, shape=data.shape, labelled=labelled)
