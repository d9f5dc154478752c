"""Sources: the forms in which labels and images come, each behind the same small interface.

| data.form | data.root                                | labels                                                     |
| --------- | ---------------------------------------- | ---------------------------------------------------------- |
| csv       | folder of image files                    | data.csv, columns data.image_col and data.label_col        |
| folders   | folder of one folder for each class      | the folders' names                                         |
| pixels    | a .csv: a row an image, a column a pixel | its column data.label_col, or `label`                      |
| arrays    | a .npz, or a .npy of images              | in the .npz; for a .npy data.csv, a .npy with as many rows |
| pairs     | a .npz with two arrays of images         | in it: one label for the two                               |

`auto` goes by what data.root is; a folder is `csv` where data.csv exists or no folders are in it.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from fastflower.core.errors import InputError
from fastflower.data.readers import arrays
from fastflower.data.readers.arrays import Stack
from fastflower.data.readers.image_files import header_size, read_bytes
from fastflower.data.readers.label_files import Names, Row, csv_rows, folder_rows, image_files
from fastflower.recipe import Recipe


class Source(Protocol):
    """Where the images of named rows come from; `count` is 2 for pairs, else 1; `numbers`: they are no files."""

    @property
    def count(self) -> int: ...

    @property
    def numbers(self) -> bool: ...

    def look(self, name: str) -> tuple[str, int, str]:
        """(what is wrong with a row or '', its bytes, what it really is); nothing is opened."""

    def load(self) -> None:
        """Read what is needed to read single images; processes that are forked later share it."""

    def read(self, name: str, place: int) -> bytes | np.ndarray:
        """A file's bytes, or pixels: uint8 (H, W) or (H, W, 3); place 1 is the second image of a pair."""

    def size(self, name: str) -> tuple[int, int] | None:
        """(height, width) from a header alone; None when it cannot be told."""


@dataclass(frozen=True)
class Files:
    """Image files below a folder; names are paths relative to it, behind a prefix."""

    root: Path
    prefix: str = ""
    count: int = 1
    numbers: bool = False

    @cached_property
    def _inside(self) -> str:
        return os.path.realpath(self.root)

    def look(self, name: str) -> tuple[str, int, str]:
        name = name.removeprefix(self.prefix)
        parts = name.split("/")
        if not name or "\0" in name:
            return "is no file name", 0, ""
        if (
            name.startswith(("/", "~"))
            or ".." in parts
            or "\\" in name
            or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name)
        ):
            return "must be a path below data.root, parts joined by '/'", 0, ""
        try:
            real = os.path.realpath(os.path.join(self._inside, name), strict=True)
            state = os.stat(real)
        except FileNotFoundError:
            return "does not exist", 0, ""
        except OSError as error:
            return f"cannot be read: {error.strerror}", 0, ""
        if os.path.commonpath([self._inside, real]) != self._inside:
            return "is a link that leaves data.root", 0, ""
        if not stat.S_ISREG(state.st_mode):
            return "is not a regular file", 0, ""
        return "", state.st_size, real

    def load(self) -> None:
        pass

    def read(self, name: str, place: int) -> bytes:
        return read_bytes(os.path.join(self._inside, name.removeprefix(self.prefix)))

    def size(self, name: str) -> tuple[int, int] | None:
        try:
            return header_size(os.path.join(self._inside, name.removeprefix(self.prefix)))
        except Exception:  # the pass over the images will say what is wrong with it
            return None


@dataclass(frozen=True)
class Arrays:
    """Images of one file of numbers; names are `<its stem>/<row>`, rows from 0 with leading zeros."""

    stem: str
    stack: Stack
    numbers: bool = True

    @property
    def count(self) -> int:
        return self.stack.count

    def name(self, row: int) -> str:
        return f"{self.stem}/{row:0{len(str(self.stack.rows - 1))}d}"

    def look(self, name: str) -> tuple[str, int, str]:
        return "", self.stack.height * self.stack.width * self.count, name

    def load(self) -> None:
        _ = self.stack.images

    def read(self, name: str, place: int) -> np.ndarray:
        pixels: np.ndarray = self.stack.images[place][int(name.removeprefix(f"{self.stem}/"))]
        return pixels

    def size(self, name: str) -> tuple[int, int]:
        return self.stack.height, self.stack.width


@dataclass(frozen=True)
class Joined:
    """Two sources: the second one has the names that start with `prefix`."""

    first: Source
    second: Source
    prefix: str

    @property
    def count(self) -> int:
        return self.first.count

    @property
    def numbers(self) -> bool:
        return self.first.numbers

    def of(self, name: str) -> Source:
        return self.second if name.startswith(self.prefix) else self.first

    def look(self, name: str) -> tuple[str, int, str]:
        return self.of(name).look(name)

    def load(self) -> None:
        self.first.load()
        self.second.load()

    def read(self, name: str, place: int) -> bytes | np.ndarray:
        return self.of(name).read(name, place)

    def size(self, name: str) -> tuple[int, int] | None:
        return self.of(name).size(name)


@dataclass(frozen=True)
class Rows:
    """The rows of a source as they were written; `held_out` are the names of those from data.val."""

    source: Source
    rows: list[Row]
    origin: str
    names: Names = field(default_factory=dict)
    held_out: frozenset[str] = frozenset()
    notices: list[str] = field(default_factory=list)


def form_of(recipe: Recipe) -> str:
    """data.form, or what auto means for this data.root; InputError when the two do not fit."""
    root, said = Path(recipe.data.root), recipe.data.form
    if not root.exists():
        raise InputError(
            f"data.root = {root}: no such folder or file; give the folder that holds the training images, "
            "or the .npz, .npy or table of pixels"
        )
    fits: tuple[str, ...] = ("csv", "folders")
    if root.is_dir():
        labelled = Path(recipe.data.csv).exists() or not any(entry.is_dir() for entry in root.iterdir())
        found = "csv" if labelled else "folders"
    elif root.suffix == ".npz":
        fits, found = ("arrays", "pairs"), "arrays"
        if said == "auto":
            found = ("arrays", "pairs")[_open_arrays(recipe, root, labelled=True).count - 1]
    else:
        found = "arrays" if root.suffix == ".npy" else "pixels"
        fits = (found,)
    if said not in ("auto", *fits):
        raise InputError(
            f"data.form = {said}: data.root = {root} can be {' or '.join(fits)}; use auto, or give another root"
        )
    return found if said == "auto" else said


def present(recipe: Recipe) -> bool:
    """Whether images and labels are on this machine; a training can do without them."""
    root = Path(recipe.data.root)
    return root.is_file() or (root.is_dir() and (form_of(recipe) != "csv" or Path(recipe.data.csv).is_file()))


def open_labelled(recipe: Recipe) -> Rows:
    """The training rows in any form, and behind them those of data.val."""
    form = form_of(recipe)
    first = _rows(recipe, form, path=Path(recipe.data.root), prefix="")
    if not recipe.data.val:
        return first
    path = Path(recipe.data.val)
    if form == "csv":
        raise InputError(
            f"data.val = {path}: a label file says which rows validate by data.split=given and data.fold_col"
        )
    if not path.exists():
        raise InputError(f"data.val = {path}: no such folder or file; give images in the form of data.root")
    prefix = f"{path.name if form == 'folders' else path.stem}/"
    second = _rows(recipe, form, path=path, prefix=prefix)
    if any(row.filename.startswith(prefix) for row in first.rows):
        raise InputError(
            f"data.val = {path}: data.root = {recipe.data.root} has images below the same name; rename one"
        )
    if first.source.count != second.source.count:
        raise InputError(f"data.val = {path}: holds other than the pairs of data.root = {recipe.data.root}")
    joined = Joined(first.source, second.source, prefix)
    held_out = frozenset(row.filename for row in second.rows)
    return Rows(joined, first.rows + second.rows, f"{first.origin} and {path}", first.names, held_out)


def open_unlabelled(recipe: Recipe) -> tuple[Source, list[str]]:
    """Images of data.unlabelled and their names in order: a folder of files at any depth, or a file of numbers."""
    path = Path(recipe.data.unlabelled)
    if path.is_dir():
        names = image_files(path)
        if not names:
            raise InputError(f"data.unlabelled = {path}: no images below it")
        return Files(path), names
    if not path.is_file():
        raise InputError(f"data.unlabelled = {path}: no such folder or file")
    source = Arrays(path.stem, _open_arrays(recipe, path, labelled=False))
    return source, [source.name(row) for row in range(source.stack.rows)]


def pair_arrays(recipe: Recipe, path: str = "") -> list[str]:
    """The names of the two arrays in data.root, or another .npz like it; none for single images."""
    file = Path(path or recipe.data.root)
    if file.suffix != ".npz" or recipe.data.form == "arrays":
        return []
    if not file.is_file():
        raise InputError(f"{file}: no such file, and it says whether its images are pairs; bring it here")
    stack = _open_arrays(recipe, file, labelled=True)
    return list(stack.names) if stack.count == 2 else []


def _rows(recipe: Recipe, form: str, *, path: Path, prefix: str) -> Rows:
    data = recipe.data
    if form == "csv":
        rows, names, notices = csv_rows(
            Path(data.csv), path, image_col=data.image_col, label_col=data.label_col
        )
        return Rows(Files(path), rows, data.csv, names, notices=notices)
    if form == "folders":
        rows = folder_rows(path)
        for row in rows:
            row.filename = prefix + row.filename
        return Rows(Files(path, prefix), rows, str(path))
    stack = _open_arrays(recipe, path, labelled=True)
    if form == "pairs" and stack.count != 2:
        raise InputError(f"data.form = pairs: {path} has one array of images; {arrays.REMEDY}")
    if form != "pairs" and stack.count == 2:
        raise InputError(
            f"data.form = {form}: {path} has two arrays of images; use pairs, or {arrays.REMEDY}"
        )
    source = Arrays(path.stem, stack)
    rows = [Row(f"row {k}", source.name(k), label) for k, label in enumerate(stack.labels or [])]
    return Rows(source, rows, str(path))


def _open_arrays(recipe: Recipe, path: Path, *, labelled: bool) -> Stack:
    data = recipe.data
    if path.suffix == ".npz":
        return arrays.open_npz(path, data.arrays, shape=data.shape, labelled=labelled)
    if path.suffix == ".npy":
        csv = Path(data.csv)
        if labelled and csv.suffix != ".npy":
            raise InputError(f"data.csv = {csv}: the labels of {path} are a .npy with a label a row; name it")
        return arrays.open_npy(
            path, data.shape, (lambda rows: arrays.npy_labels(csv, rows)) if labelled else None
        )
    return arrays.open_pixels(path, data.label_col, shape=data.shape, labelled=labelled)
