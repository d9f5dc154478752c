"""Label files as people write them, and folders whose names are the labels.

Encoding, delimiter and line ends are detected; a file that cannot be parsed is refused with its line.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

from fastflower.core.errors import InputError
from fastflower.core.tables import escaped

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
ClassNames = dict[str, dict[str, str]]  # column -> category_id -> name


@dataclass(slots=True)
class LabelRow:
    """A row of a label file: its location, such as "line 3", its cells, and its problem or ''."""

    where: str
    filename: str = ""
    category_id: str = ""
    problem: str = ""


def csv_rows(
    path: Path, root: Path, *, image_col: str, label_col: str
) -> tuple[list[LabelRow], ClassNames, list[str]]:
    """Read a label file: its rows in order, the columns of class names, and notices.

    A column names the classes if it is constant within each of them. The encoding is UTF-8, with or without a byte
    order mark. Failing that, GB18030 and UTF-8 with arbitrary bytes in file names are tried, and accepted only if
    every file then exists below `root`. Raises InputError.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"data.csv = {path}: {error.strerror}; give the label file, or data.form=folders"
        ) from None
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        kind = "looks like UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "has a NUL byte"
        raise InputError(f"{path}:{line}: {kind}; save it as UTF-8 text")
    try:
        return *_parse(data.decode("utf-8-sig"), path, image_col=image_col, label_col=label_col), []
    except UnicodeDecodeError as error:
        fault = f"{path}: byte {error.start} is not UTF-8; save it as UTF-8"
    for encoding, errors in (("gb18030", "strict"), ("utf-8-sig", "surrogateescape")):
        try:
            rows, names = _parse(
                data.decode(encoding, errors), path, image_col=image_col, label_col=label_col
            )
            # raises where anything but a file name has bytes that are no text
            json.dumps([[row.category_id for row in rows], names], ensure_ascii=False).encode()
        except (UnicodeError, InputError):
            continue
        if all((root / row.filename).is_file() for row in rows if not row.problem):
            detected = "GB18030" if errors == "strict" else "UTF-8 with other bytes in file names"
            return (
                rows,
                names,
                [f"{path} is not UTF-8; it was read as {detected}, in which every file exists"],
            )
    raise InputError(f"{fault} (in other encodings, its file names do not exist)")


def _parse(text: str, path: Path, *, image_col: str, label_col: str) -> tuple[list[LabelRow], ClassNames]:
    required = (image_col, label_col)
    delimiter, header = _header(text, path, required)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    image, label = header.index(image_col), header.index(label_col)
    rows: list[LabelRow] = []
    names: ClassNames = {name: {} for name in header if name not in required and name}
    line, past_header = 1, False
    try:
        for cells in reader:
            where, line = f"line {line}", reader.line_num + 1
            if not cells:
                continue
            if not past_header:
                past_header = True
            elif len(cells) != len(header):
                rows.append(
                    LabelRow(where, problem=f"{where}: {len(cells)} fields, the header has {len(header)}")
                )
            else:
                rows.append(LabelRow(where, cells[image], cells[label]))
                for name, cell in zip(header, cells, strict=True):
                    if name in names and names[name].setdefault(cells[label].strip(), cell) != cell:
                        del names[name]  # the column differs within a class, so it holds no class names
    except csv.Error as error:
        raise InputError(
            f"{path}: line {reader.line_num}: {error}; quotes must be closed and doubled inside"
        ) from None
    if not rows:
        raise InputError(f"{path}: has a header and no rows")
    return rows, names


def _header(text: str, path: Path, required: tuple[str, ...]) -> tuple[str, list[str]]:
    """The delimiter with which the first line has the required columns, and all its column names."""
    first = text.lstrip("\r\n").splitlines()[:1]
    if not first:
        raise InputError(f"{path}: empty; its first line must name the columns {', '.join(required)}")
    headers = {mark: [name.strip() for name in next(csv.reader(first, delimiter=mark))] for mark in ",;\t"}
    for delimiter, header in headers.items():
        if all(name in header for name in required):
            return delimiter, header
    header = max(headers.values(), key=len)
    missing = " or ".join(name for name in required if name not in header)
    remedy = "name yours by data.image_col and data.label_col"
    if len(header) == 1:
        remedy = "separate columns by ',', ';' or a tab"
    columns = ", ".join(escaped(name) for name in header)
    raise InputError(f"{path}: no column {missing}; it has {columns}; {remedy}")


def folder_rows(root: Path) -> list[LabelRow]:
    """A row for every image in a folder below `root`; the name of the topmost folder is the class."""
    rows = [LabelRow(name, name, name.partition("/")[0]) for name in image_files(root) if "/" in name]
    if not rows:
        raise InputError(f"{root}: no folder with images ({' '.join(SUFFIXES)}) below it")
    return rows


def image_files(root: Path) -> list[str]:
    """The image files below a folder, at any depth, as sorted paths relative to it."""
    files = sorted(file for file in root.rglob("*") if file.suffix.lower().rstrip() in SUFFIXES)
    return [str(file.relative_to(root)) for file in files]
